//! Unix sockets of the host that lead to unix sockets of a guest, over SSH on the guests' network.
//!
//! ```text
//!  client ─► unix socket (0600) ─► Forward ─► Session ─► a connection to the guest's sshd, as published ports make them
//!                                     └── one direct-streamlocal channel for each client (OpenSSH's PROTOCOL, §2.4)
//! ```
//! They come from gvproxy's `-forward-sock` and from `/services/forwarder/expose` with `ssh-tunnel://`. The socket is there before the
//! guest is: a client waits while its sshd is dialled again and again, and is closed when that has been in vain. Nothing of it
//! ends the network. All clients of a forward share one connection, which is made anew when it breaks.
//!
//! SSH is spoken in this process (russh), through the stack and not through the host's network. The guest's host key is not checked
//! unless that is asked for (`secure=true`): nobody but the guest is at the other end of its link.
//!
//! No RSA, neither of keys nor of hosts: the crate that russh has it from leaks private keys by the time it takes (RUSTSEC-2023-0071,
//! without a remedy), to whom but a guest.
//!
//! Limits: [`FORWARDS`] in all, [`CLIENTS`] of each at once; further ones wait to be accepted.

mod remote;
mod session;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

pub(crate) use self::remote::{Remote, RemoteError};
use self::session::Session;
use crate::request::Requests;
use crate::sandbox::paths::Paths;
use crate::unix_path::Removed;

/// What the sandbox lets forwards do: russh keeps its secrets in memory that is not swapped out.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![SYS_mlock, SYS_munlock];

/// Forwards of one network.
pub const FORWARDS: usize = 256;
/// Clients of one forward at once.
pub const CLIENTS: usize = 128;
/// Bytes of a file with a key; those of 16384 bits have 13 KiB.
const KEY_FILE: u64 = 64 * 1024;
/// Bytes carried at one go, each way.
const CHUNK: usize = 32 * 1024;

/// Where a forward leads, and as whom.
#[derive(Debug, Clone)]
pub struct Forward {
    /// The host's socket.
    pub socket: PathBuf,
    /// The guest's.
    pub dest: String,
    /// How the guest is entered.
    pub login: Login,
}

/// How a guest is entered.
#[derive(Debug, Clone)]
pub struct Login {
    /// Its sshd.
    pub server: SocketAddr,
    /// The user.
    pub user: String,
    /// What proves it.
    pub key: Key,
    /// Whether its host key has to be one of the user's `known_hosts`.
    pub known_host: bool,
}

/// A private key.
#[derive(Clone)]
pub struct Key(Arc<russh::keys::PrivateKey>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What it is, and nothing of it.
        f.debug_tuple("Key").field(&self.0.algorithm()).finish()
    }
}

impl Key {
    /// Reads the key in the file at `path`, an Ed25519 or ECDSA one: OpenSSH's format, PKCS#8 or PuTTY's.
    ///
    /// # Errors
    /// When it cannot be read or used; the text says why and names the file, and nothing that is in it.
    pub fn read(path: &Path, passphrase: Option<&str>) -> Result<Self, String> {
        let fault = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        let meta = std::fs::metadata(path).map_err(|e| fault(&e))?;
        if !meta.is_file() || meta.len() > KEY_FILE {
            return Err(fault(&"not a file that could hold a private key"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| fault(&e))?;
        // PKCS#1 says what it is; the other formats once they are read.
        let rsa = || fault(&"an RSA key; Ed25519 and ECDSA are used here: ssh-keygen -t ed25519 makes one");
        if text.contains("BEGIN RSA PRIVATE KEY") {
            return Err(rsa());
        }
        let key = russh::keys::decode_secret_key(&text, passphrase)
            .map_err(|e| fault(&format_args!("not a private key that can be used: {e}")))?;
        if key.algorithm().is_rsa() {
            return Err(rsa());
        }
        Ok(Self(Arc::new(key)))
    }
}

/// A forward whose socket is there.
#[derive(Debug)]
pub(crate) struct Bound {
    forward: Forward,
    listener: StdUnixListener,
    file: Removed,
}

impl Bound {
    /// Listens on the socket of `forward`.
    ///
    /// # Errors
    /// As [`crate::unix_path::listen`].
    pub(crate) fn new(forward: Forward) -> std::io::Result<Self> {
        let listener = crate::unix_path::listen(&forward.socket, 0o600)?;
        let file = Removed(forward.socket.clone());
        Ok(Self { forward, listener, file })
    }
}

/// The forwards of one network that are served.
#[derive(Debug, Clone, Default)]
pub(crate) struct Forwards {
    served: Arc<Mutex<BTreeMap<PathBuf, Served>>>,
    /// Where sockets may be made while the network runs; nowhere unless told.
    allowed: Arc<Paths>,
}

/// One of them; it ends with the value, established connections stay.
#[derive(Debug)]
struct Served {
    /// What was exposed, as listings show it; `None` for those of the configuration, which they do not show.
    remote: Option<String>,
    task: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a forward is not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ForwardError {
    /// There is one at this path.
    Taken,
    /// [`FORWARDS`] are there.
    Limit,
    /// Sockets are not made there while the network runs.
    Outside(PathBuf),
    /// The socket cannot be made; why.
    Socket(String),
}

impl Forwards {
    /// None yet; while the network runs they are made in `allowed` places.
    pub(crate) fn within(allowed: Arc<Paths>) -> Self {
        Self { served: Arc::default(), allowed }
    }

    /// Serves `bound`, until it is taken away or the runtime ends. `remote`: as listings show it.
    pub(crate) fn serve(&self, bound: Bound, remote: Option<String>, requests: Requests) {
        let path = bound.forward.socket.clone();
        let task = tokio::spawn(serve(bound, requests));
        self.lock().insert(path, Served { remote, task });
    }

    /// Makes a forward while the network runs.
    ///
    /// # Errors
    /// See [`ForwardError`]; nothing has changed then.
    pub(crate) fn add(
        &self,
        forward: Forward,
        remote: String,
        requests: Requests,
    ) -> Result<(), ForwardError> {
        {
            let forwards = self.lock();
            if forwards.contains_key(&forward.socket) {
                return Err(ForwardError::Taken);
            }
            if forwards.len() >= FORWARDS {
                return Err(ForwardError::Limit);
            }
        }
        if !self.allowed.may_make(&forward.socket) {
            return Err(ForwardError::Outside(forward.socket));
        }
        let bound = Bound::new(forward).map_err(|e| ForwardError::Socket(e.to_string()))?;
        self.serve(bound, Some(remote), requests);
        Ok(())
    }

    /// Takes away a forward that was made while the network runs; whether there was one.
    pub(crate) fn remove(&self, socket: &Path) -> bool {
        let mut forwards = self.lock();
        match forwards.get(socket) {
            Some(served) if served.remote.is_some() => forwards.remove(socket).is_some(),
            _ => false,
        }
    }

    /// Those that were made while the network runs: socket and remote.
    pub(crate) fn list(&self) -> Vec<(String, String)> {
        let shown = |(path, served): (&PathBuf, &Served)| {
            served.remote.clone().map(|remote| (path.display().to_string(), remote))
        };
        self.lock().iter().filter_map(shown).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, Served>> {
        // Each critical section is one step: what a panicking holder leaves is whole.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(bound: Bound, requests: Requests) {
    let Bound { forward, listener, file: _file } = bound;
    let socket = forward.socket.display().to_string();
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, socket, "a socket that is forwarded over SSH cannot be served");
            return;
        }
    };
    let session = Arc::new(Session::new(forward.login, requests));
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let (session, dest, socket) = (Arc::clone(&session), forward.dest.clone(), socket.clone());
                tokio::spawn(async move {
                    if let Err(error) = carry(client, &session, &dest).await {
                        tracing::warn!(%error, socket, dest, "a client of a forwarded socket was closed");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, socket, "a forwarded socket cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Carries one client's bytes to the guest's socket and back, each way until its own end.
async fn carry(mut client: UnixStream, session: &Session, dest: &str) -> Result<(), session::SshError> {
    let mut channel = tokio::select! {
        channel = session.channel(dest) => channel?,
        // Who does not wait any more is not dialled for.
        () = gone(&client) => return Ok(()),
    };
    match tokio::io::copy_bidirectional_with_sizes(&mut client, &mut channel, CHUNK, CHUNK).await {
        Ok(_) => {}
        // One of the two has had enough.
        Err(error) => tracing::debug!(%error, dest, "a forwarded connection broke"),
    }
    Ok(())
}

/// Returns when the other side of `client` is closed for good: it neither reads nor writes any more.
async fn gone(client: &UnixStream) {
    loop {
        match client.ready(tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE).await {
            Ok(ready) if ready.is_write_closed() => return,
            Ok(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
