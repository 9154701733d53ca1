//! Where a guest's streams to ports of the host go: to who listens, else to the unix socket of the port's name.

use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::vsock::sockets::name;
use crate::vsock::{BACKLOG, HOST_CID};

/// Who listens, and the directory of the sockets.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    dir: Option<PathBuf>,
    listeners: Mutex<HashMap<u32, Listener>>,
}

#[derive(Debug)]
struct Listener {
    streams: mpsc::Sender<UnixStream>,
    runtime: Handle,
}

impl Arrivals {
    /// With the sockets in `dir`.
    pub(super) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, listeners: Mutex::default() }
    }

    /// See [`crate::vsock::Vsock::listen`].
    pub(super) fn listen(&self, port: u32) -> mpsc::Receiver<UnixStream> {
        let (streams, receiver) = mpsc::channel(BACKLOG);
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        // Those nobody listens to any more; a place each is all they had.
        listeners.retain(|_, listener| !listener.streams.is_closed());
        listeners.insert(port, Listener { streams, runtime: Handle::current() });
        receiver
    }

    /// The host's side of a stream to `port`; `None` when nobody takes it.
    pub(super) fn take(&self, port: u32) -> Option<StdStream> {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        match listeners.get(&port) {
            Some(listener) if !listener.streams.is_closed() => listener.take(),
            _ => {
                drop(listeners);
                self.connect(port)
            }
        }
    }

    fn connect(&self, port: u32) -> Option<StdStream> {
        let path = self.dir.as_ref()?.join(name(HOST_CID, port));
        // Without waiting: where the backlog is full, the guest is refused.
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None);
        let connected = socket.and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.connect(&socket2::SockAddr::unix(&path)?)?;
            Ok(StdStream::from(std::os::fd::OwnedFd::from(socket)))
        });
        connected.inspect_err(|error| tracing::debug!(%error, port, "nobody takes the guest's stream")).ok()
    }
}

impl Listener {
    fn take(&self) -> Option<StdStream> {
        let Ok(place) = self.streams.try_reserve() else {
            tracing::debug!("streams of the guest's are not taken fast enough: one is refused");
            return None;
        };
        let pair = super::pair().and_then(|(ours, theirs)| {
            // It belongs to the runtime that listens, and this thread is none of its.
            let _runtime = self.runtime.enter();
            Ok((ours, UnixStream::from_std(theirs)?))
        });
        match pair {
            Ok((ours, theirs)) => {
                place.send(theirs);
                Some(ours)
            }
            Err(error) => {
                tracing::warn!(%error, "a stream of the guest's is refused: no socket for it");
                None
            }
        }
    }
}
