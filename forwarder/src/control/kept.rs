//! Ports that were published live, kept in the state directory so that they are there after a restart.
//!
//! What is kept is the port that was given: `0:22` comes back with the same number. Ports of flags and files are not kept:
//! they come from there again. The file is written whole to a new one, then renamed: a crash leaves the old or the new.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use portway_api::control::PortInfo;

use crate::publish::spec::{HostEnd, PublishSpec};
use crate::request::PublishError;

const FILE: &str = "ports.json";

/// The ports that are kept.
#[derive(Debug)]
pub struct KeptPorts {
    dir: PathBuf,
    ports: Mutex<Vec<PublishSpec>>,
}

impl KeptPorts {
    /// What `dir` has kept; a file that cannot be read counts as none, and is said.
    #[must_use]
    pub fn read(dir: &Path) -> Self {
        let ports = match std::fs::read(dir.join(FILE)) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(%error, dir = %dir.display(), "kept ports cannot be used");
                Vec::new()
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                tracing::warn!(%error, dir = %dir.display(), "kept ports cannot be read");
                Vec::new()
            }
        };
        Self { dir: dir.to_owned(), ports: Mutex::new(ports) }
    }

    /// The ports.
    #[must_use]
    pub fn specs(&self) -> Vec<PublishSpec> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps those of `spec` that were published: `done` has one result for each of its ports.
    pub(super) async fn add(self: &Arc<Self>, spec: &PublishSpec, done: &[Result<PortInfo, PublishError>]) {
        let mut new = Vec::new();
        for (n, port) in (0u16..).zip(done) {
            if let Ok(port) = port {
                new.push(single(spec, n, port.host_port));
            }
        }
        if !new.is_empty() {
            self.change(move |ports| {
                ports.retain(|p| !new.iter().any(|n| n.host == p.host && n.proto == p.proto));
                ports.extend(new);
            })
            .await;
        }
    }

    /// Keeps `gone`, which `spec` named, no more.
    pub(super) async fn remove(self: &Arc<Self>, spec: &PublishSpec, gone: &[PortInfo]) {
        let gone: Vec<PublishSpec> = gone.iter().map(|p| single(spec, 0, p.host_port)).collect();
        self.change(move |ports| {
            ports.retain(|p| !gone.iter().any(|g| g.host == p.host && g.proto == p.proto))
        })
        .await;
    }

    /// Changes the list and writes it. A failure is said, and costs the next start.
    async fn change(self: &Arc<Self>, change: impl FnOnce(&mut Vec<PublishSpec>) + Send + 'static) {
        let kept = Arc::clone(self);
        let written = tokio::task::spawn_blocking(move || {
            let mut ports = kept.ports.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut ports);
            write(&kept.dir, &ports)
        });
        let written = written.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        if let Err(error) = written {
            tracing::warn!(%error, dir = %self.dir.display(), "ports could not be kept");
        }
    }
}

fn write(dir: &Path, ports: &[PublishSpec]) -> io::Result<()> {
    let text = serde_json::to_vec(ports).map_err(io::Error::other)?;
    let new = dir.join(format!("{FILE}.new"));
    std::fs::write(&new, text)?;
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))
}

/// The spec of port `n` of a range, with the host port it was given.
fn single(spec: &PublishSpec, n: u16, host_port: u16) -> PublishSpec {
    let mut spec = spec.clone();
    if let HostEnd::Ports { first, .. } = &mut spec.host {
        *first = host_port;
    }
    spec.guest_port = spec.guest_port.saturating_add(n);
    spec.count = 1;
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_port: u16) -> PortInfo {
        PortInfo {
            proto: portway_api::control::Protocol::Tcp,
            bind: Vec::new(),
            host_port,
            guest: String::new(),
            guest_port: 0,
            state: String::new(),
            accepted: 0,
        }
    }

    #[tokio::test]
    async fn what_was_given_is_kept_and_a_torn_file_is_no_port() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Arc::new(KeptPorts::read(dir.path()));
        let range: PublishSpec = "8000-8001:80-81".parse().unwrap();
        let busy = Err(PublishError::Limit(String::new()));
        kept.add(&range, &[Ok(port(8000)), busy]).await;
        kept.add(&"0:22".parse().unwrap(), &[Ok(port(40_000))]).await;
        let read = || KeptPorts::read(dir.path()).specs().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(read(), ["8000:80/tcp", "40000:22/tcp"]);
        kept.remove(&":22".parse().unwrap(), &[port(40_000)]).await;
        assert_eq!(read(), ["8000:80/tcp"]);
        std::fs::write(dir.path().join(FILE), "[\"8000").unwrap();
        assert!(read().is_empty());
    }
}
