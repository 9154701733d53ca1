//! `--vsock-ports`: a unix socket of the host for each of some ports of the guest.
//!
//! `CID.%08x` is the socket, and `guest.%08x` a link to it, as hyperkit makes them for LinuxKit's `-vsock-ports`
//! (port 2374 of the guest is `guest.00000946`).

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::Vsock;
use super::sockets::{guest_name, name};
use crate::unix_path::Removed;

/// Clients carried at once on the sockets of one guest; further ones wait in the sockets' backlogs.
const CLIENTS: usize = 1024;

/// The sockets, bound.
#[derive(Debug)]
pub(crate) struct PortSockets {
    sockets: Vec<(u32, StdListener)>,
}

impl PortSockets {
    /// Listens for `ports` of the guest `cid` in `dir`, which is made if absent, for this user alone. `short` says
    /// whether `guest.%08x` is this guest's. The names go with what is given beside the sockets.
    ///
    /// # Errors
    /// When a socket cannot be made; the text has its path.
    pub(crate) fn bind(dir: &Path, cid: u32, ports: &[u32], short: bool) -> io::Result<(Self, Vec<Removed>)> {
        use std::os::unix::fs::DirBuilderExt;
        let fault = |path: &Path, e: &io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|e| fault(dir, &e))?;
        let (mut sockets, mut names) = (Vec::new(), Vec::new());
        for &port in ports {
            let path = dir.join(name(cid, port));
            sockets.push((port, crate::unix_path::listen(&path, 0o600)?));
            names.push(Removed(path));
            if short {
                let link = dir.join(guest_name(port));
                linked(&link, Path::new(&name(cid, port))).map_err(|e| fault(&link, &e))?;
                names.push(Removed(link));
            }
        }
        Ok((Self { sockets }, names))
    }

    /// Carries who connects, for ever.
    pub(crate) async fn serve(self, vsock: Vsock) {
        let clients = Arc::new(Semaphore::new(CLIENTS));
        let mut serving = tokio::task::JoinSet::new();
        for (port, listener) in self.sockets {
            match UnixListener::from_std(listener) {
                Ok(listener) => {
                    drop(serving.spawn(serve_port(port, listener, vsock.clone(), Arc::clone(&clients))));
                }
                Err(error) => tracing::error!(%error, port, "a vsock port cannot be served"),
            }
        }
        while serving.join_next().await.is_some() {}
    }
}

/// Makes `link` point to `target`; another link is replaced, any other file is not.
fn linked(link: &Path, target: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(link) {
        Ok(meta) if meta.is_symlink() => std::fs::remove_file(link)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "is a file, and no link of ours")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    std::os::unix::fs::symlink(target, link)
}

async fn serve_port(port: u32, listener: UnixListener, vsock: Vsock, clients: Arc<Semaphore>) {
    loop {
        // Never closed.
        let Ok(place) = Arc::clone(&clients).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let vsock = vsock.clone();
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = vsock.carry(port, client).await {
                        tracing::debug!(%error, port, "a client of a vsock port was not carried");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, port, "a client of a vsock port was not taken");
                tokio::time::sleep(super::ACCEPT_AGAIN).await;
            }
        }
    }
}
