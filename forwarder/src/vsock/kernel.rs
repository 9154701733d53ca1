//! The kernel's vsock, for VMMs with a vhost-vsock device (QEMU's `vhost-vsock-pci`, crosvm, Cloud Hypervisor's).
//!
//! The host's ports belong to the whole host and the peers are told apart by their CID: a stream from another guest
//! than ours is closed. Programs of the host may use `AF_VSOCK` themselves (`vsock(7)`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;

use nix::errno::Errno;
use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername, listen,
    socket,
};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::BACKLOG;

/// What the kernel module makes.
const DEVICE: &str = "/dev/vhost-vsock";

/// The guest with a CID.
#[derive(Debug)]
pub(super) struct Kernel {
    cid: u32,
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}

/// A stream whose descriptor is not of a unix socket: what is used of it works on any.
fn wrapped(fd: OwnedFd) -> io::Result<UnixStream> {
    UnixStream::from_std(StdStream::from(fd))
}

impl Kernel {
    /// # Errors
    /// When the host has no vsock to give to guests.
    pub(super) fn open(cid: u32) -> io::Result<Self> {
        if !Path::new(DEVICE).exists() {
            let text = format!(
                "{DEVICE} is not there: load the vhost_vsock module, or use vhost-user:unix:PATH, which needs none"
            );
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        new_socket().map_err(|e| io::Error::new(e.kind(), format!("this kernel has no AF_VSOCK: {e}")))?;
        Ok(Self { cid })
    }

    pub(super) async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let fd = new_socket()?;
        match connect(fd.as_raw_fd(), &VsockAddr::new(self.cid, port)) {
            Ok(()) => return wrapped(fd),
            Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(said(errno.into())),
        }
        let stream = wrapped(fd)?;
        stream.writable().await?;
        match stream.take_error()? {
            None => Ok(stream),
            Some(error) => Err(said(error)),
        }
    }

    pub(super) fn listen(&self, port: u32) -> mpsc::Receiver<UnixStream> {
        let (streams, receiver) = mpsc::channel(BACKLOG);
        let listener = || -> io::Result<AsyncFd<OwnedFd>> {
            let fd = new_socket()?;
            bind(fd.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port))?;
            listen(&fd, Backlog::new(i32::try_from(BACKLOG).unwrap_or(1))?)?;
            // SAFETY: the descriptor is owned by what is registered, which neither closes nor changes it before it goes.
            Ok(unsafe { AsyncFd::register(fd) }?)
        };
        match listener() {
            Ok(listener) => drop(tokio::spawn(accept(listener, self.cid, streams))),
            Err(error) => tracing::warn!(%error, port, "the guest's streams cannot be taken"),
        }
        receiver
    }
}

/// A port of the host for every guest of the kernel's, and for the host's own programs.
#[derive(Debug)]
pub struct HostPort(OwnedFd);

impl HostPort {
    /// Listens on `port`.
    ///
    /// # Errors
    /// When the kernel has no vsock, or the port is taken.
    pub fn bind(port: u32) -> io::Result<Self> {
        let fd = new_socket()
            .map_err(|e| io::Error::new(e.kind(), format!("this kernel has no AF_VSOCK: {e}")))?;
        bind(fd.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port))?;
        listen(&fd, Backlog::new(i32::try_from(BACKLOG).unwrap_or(1))?)?;
        Ok(Self(fd))
    }

    /// The port on tokio, whose runtime has to be entered.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub(crate) fn watched(self) -> io::Result<WatchedPort> {
        // SAFETY: the descriptor is owned by what is registered, which neither closes nor changes it before it goes.
        Ok(WatchedPort(unsafe { AsyncFd::register(self.0) }?))
    }
}

/// A [`HostPort`] on tokio.
#[derive(Debug)]
pub(crate) struct WatchedPort(AsyncFd<OwnedFd>);

impl WatchedPort {
    /// The next stream, and the CID it comes from.
    ///
    /// # Errors
    /// Those of accepting.
    pub(crate) async fn accept(&self) -> io::Result<(UnixStream, u32)> {
        loop {
            let mut guard = self.0.readable().await?;
            if let Ok(accepted) = guard.try_io(|fd| from_anybody(fd.get_ref())) {
                return accepted.and_then(|(fd, cid)| Ok((wrapped(fd)?, cid)));
            }
        }
    }
}

/// What the kernel says of a guest, in our words: it resets what nobody listens for, and knows no device for a CID
/// that no VM has.
fn said(error: io::Error) -> io::Error {
    let kind = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNRESET | Errno::ECONNREFUSED) => io::ErrorKind::ConnectionRefused,
        Some(Errno::ENODEV | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => io::ErrorKind::NotConnected,
        Some(Errno::ETIMEDOUT) => io::ErrorKind::TimedOut,
        _ => return error,
    };
    io::Error::new(kind, error)
}

/// The next stream, and the CID it comes from.
fn from_anybody(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has made the descriptor in the line above, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let peer: VsockAddr = getpeername(fd.as_raw_fd())?;
    Ok((fd, peer.cid()))
}

/// The next stream of the guest `cid`.
fn next(listener: &OwnedFd, cid: u32) -> io::Result<Option<UnixStream>> {
    let (fd, from) = from_anybody(listener)?;
    if from != cid {
        tracing::debug!(cid = from, "a stream of another guest's was closed");
        return Ok(None);
    }
    wrapped(fd).map(Some)
}

/// Hands on what arrives until nobody wants it.
async fn accept(listener: AsyncFd<OwnedFd>, cid: u32, streams: mpsc::Sender<UnixStream>) {
    loop {
        let Ok(place) = streams.reserve().await else { return };
        let accepted = loop {
            let ready = tokio::select! {
                () = streams.closed() => return,
                ready = listener.readable() => ready,
            };
            let accepted =
                ready.and_then(|mut guard| guard.try_io(|fd| next(fd.get_ref(), cid)).unwrap_or(Ok(None)));
            match accepted {
                Ok(Some(stream)) => break Some(stream),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "a stream of the guest's was not taken");
                    tokio::time::sleep(super::ACCEPT_AGAIN).await;
                    break None;
                }
            }
        };
        if let Some(stream) = accepted {
            place.send(stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_the_module_says_what_to_do() {
        match Kernel::open(42) {
            Ok(kernel) => assert_eq!(kernel.cid, 42),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("vhost-user:unix:PATH") || text.contains("AF_VSOCK"), "{text}");
            }
        }
    }

    #[test]
    fn what_the_kernel_says_is_said_in_the_handles_words() {
        use io::ErrorKind::{ConnectionRefused, NotConnected, PermissionDenied, TimedOut};
        for (errno, kind) in [
            (Errno::ECONNRESET, ConnectionRefused),
            (Errno::ENODEV, NotConnected),
            (Errno::ETIMEDOUT, TimedOut),
            (Errno::EACCES, PermissionDenied),
        ] {
            assert_eq!(said(errno.into()).kind(), kind, "{errno}");
        }
    }
}
