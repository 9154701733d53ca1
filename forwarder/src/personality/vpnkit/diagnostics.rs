//! `--diagnostics`: each connection gets one tar archive of what there is to know, and its end. `--introspection` has the same as a tree
//! of files, over 9P.
//!
//! ```text
//!  Source ─┬─ connections (the counters), flows, endpoints (the leases), ports (the forwards)   ─┬─► tar (--diagnostics)
//!          └─ capture/all.pcap, dns.pcap … (captures)                                           ─┴─► ninep::look (--introspection)
//! ```
//! The archive is POSIX ustar (IEEE Std 1003.1, pax). Limit: [`CONNECTIONS`] of each socket at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Semaphore, oneshot};

use super::captures::Captures;
use super::control::{answer_once, lines};
use super::expose::Exposer;
use super::ninep::look;
use crate::request::{Request, Requests};

/// Clients at once; further ones wait to be accepted.
const CONNECTIONS: usize = 8;

/// Files that are no captures.
const TOLD: [&str; 4] = ["connections", "flows", "endpoints", "ports"];
/// The directory of those that are.
const CAPTURE: &str = "capture/";

/// Where the files come from.
pub(super) struct Source {
    pub(super) requests: Requests,
    pub(super) exposer: Arc<Exposer>,
    pub(super) captures: Arc<Captures>,
}

impl Source {
    /// The paths of all files.
    pub(super) fn names() -> impl Iterator<Item = String> {
        TOLD.into_iter().map(str::to_owned).chain(Captures::names().map(|name| format!("{CAPTURE}{name}")))
    }

    /// The file called `name`, as it is now.
    pub(super) async fn file(&self, name: &str) -> Option<Vec<u8>> {
        let requests = &self.requests;
        Some(match name {
            "connections" => ask(requests, |reply| Request::Stats { reply }, |stats| stats).await,
            "flows" => {
                let shown = |flows: crate::request::FlowReports| flows.infos().collect::<Vec<_>>();
                ask(requests, |reply| Request::Flows { reply }, shown).await
            }
            "endpoints" => ask(requests, |reply| Request::Leases { reply }, |leases| leases).await,
            "ports" => lines(&self.exposer).await.into_bytes(),
            other => return self.captures.file(other.strip_prefix(CAPTURE)?),
        })
    }

    async fn archive(&self) -> Vec<u8> {
        let mut files = Vec::new();
        for name in Self::names() {
            if let Some(content) = self.file(&name).await {
                files.push((name, content));
            }
        }
        tar(&files)
    }
}

/// How a socket shows the files.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shown {
    /// As one archive.
    Archive,
    /// Over 9P.
    Tree,
}

/// Serves one socket; ends with the runtime.
pub(super) async fn serve(listener: UnixListener, shown: Shown, source: Arc<Source>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let source = Arc::clone(&source);
                tokio::spawn(async move {
                    match shown {
                        Shown::Archive => answer_once(stream, source.archive().await).await,
                        Shown::Tree => {
                            let (from, to) = stream.into_split();
                            if let Err(error) = look::serve(from, to, source).await {
                                tracing::debug!(%error, "a client of --introspection went away");
                            }
                        }
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, ?shown, "--diagnostics or --introspection cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Asks the data thread one thing; what `shown` makes of the answer, as JSON.
async fn ask<T, S: serde::Serialize>(
    requests: &Requests,
    make: impl FnOnce(oneshot::Sender<T>) -> Request,
    shown: impl FnOnce(T) -> S,
) -> Vec<u8> {
    let (reply, answer) = oneshot::channel();
    let told = match requests.send(make(reply)) {
        Ok(()) => answer.await.map_err(|_| "the network is ending".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let text = told.and_then(|told| serde_json::to_string_pretty(&shown(told)).map_err(|e| e.to_string()));
    // What cannot be told says why.
    let mut text = text.unwrap_or_else(|fault| fault);
    text.push('\n');
    text.into_bytes()
}

/// Bytes of a block: a header, and what contents are filled up to.
const BLOCK: usize = 512;

fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        out.extend(header(name, content.len()));
        out.extend(content);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

/// A header: fields at fixed places, numbers as octal digits.
fn header(name: &str, size: usize) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        for (to, from) in block.iter_mut().skip(at).zip(text.bytes()) {
            *to = from;
        }
    };
    put(0, name);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    // The sum is that of the header with blanks where it stands.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar");
    put(263, "00");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    for (to, from) in block.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").bytes()) {
        *to = from;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_itself_reads_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(
            &path,
            tar(&[
                ("flows".into(), b"[]\n".to_vec()),
                ("ports".into(), vec![b'x'; 1000]),
                ("none".into(), vec![]),
            ]),
        )
        .unwrap();
        let out = std::process::Command::new("tar").arg("-tvf").arg(&path).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 3 && lines[1].contains("1000") && lines[2].ends_with("none"), "{text}");
    }
}
