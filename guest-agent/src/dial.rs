//! Sockets that connect without waiting: to the host, and to what a carried connection is for.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, UnixAddr,
    VsockAddr, connect, getpeername, getsockopt, setsockopt, socket, sockopt,
};
use portway_api::agent::{DialError, PORT, Target};

/// `VMADDR_CID_HOST` of vsock(7).
const CID_HOST: u32 = 2;

/// Where the host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Host {
    /// `vsock://CID:PORT`.
    Vsock {
        /// The context; 2 is the host.
        cid: u32,
        /// The port.
        port: u32,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl Default for Host {
    fn default() -> Self {
        Self::Vsock { cid: CID_HOST, port: PORT }
    }
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")) {
            return match path.starts_with('/') {
                true => Ok(Self::Unix(path.into())),
                false => Err(format!("{text:?}: the path is not absolute")),
            };
        }
        let fault = || format!("{text:?} is not vsock://CID:PORT or unix:PATH; an example: vsock://2:{PORT}");
        let rest = text.strip_prefix("vsock://").ok_or_else(fault)?;
        let (cid, port) = rest.split_once(':').unwrap_or((rest, ""));
        let port = if port.is_empty() { Ok(PORT) } else { port.parse() };
        Ok(Self::Vsock { cid: cid.parse().map_err(|_| fault())?, port: port.map_err(|_| fault())? })
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vsock { cid, port } => write!(f, "vsock://{cid}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Begins a connection to the host.
pub(crate) fn host(host: &Host) -> nix::Result<OwnedFd> {
    match host {
        Host::Vsock { cid, port } => {
            begin(AddressFamily::Vsock, SockType::Stream, &VsockAddr::new(*cid, *port))
        }
        Host::Unix(path) => unix(path),
    }
}

/// Begins a connection to a target of the guest.
pub(crate) fn target(target: &Target) -> nix::Result<OwnedFd> {
    match target {
        Target::Tcp { address } => {
            let fd = inet(*address, SockType::Stream)?;
            // The applications at both ends have decided about small segments already.
            setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
            Ok(fd)
        }
        Target::Udp { address } => inet(*address, SockType::Datagram),
        Target::Unix { path } => unix(Path::new(path)),
    }
}

/// Begins a connection to a unix socket.
pub(crate) fn unix(path: &Path) -> nix::Result<OwnedFd> {
    begin(AddressFamily::Unix, SockType::Stream, &UnixAddr::new(path)?)
}

fn inet(address: SocketAddr, kind: SockType) -> nix::Result<OwnedFd> {
    match address {
        SocketAddr::V4(v4) => begin(AddressFamily::Inet, kind, &SockaddrIn::from(v4)),
        SocketAddr::V6(v6) => begin(AddressFamily::Inet6, kind, &SockaddrIn6::from(v6)),
    }
}

fn begin(family: AddressFamily, kind: SockType, address: &dyn SockaddrLike) -> nix::Result<OwnedFd> {
    let fd = socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
    match connect(fd.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(errno) => Err(errno),
    }
}

/// Whether a connection stands; false while it is on its way.
pub(crate) fn outcome(fd: &OwnedFd) -> nix::Result<bool> {
    match getsockopt(fd, sockopt::SocketError)? {
        0 => match getpeername::<SockaddrStorage>(fd.as_raw_fd()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOTCONN) => Ok(false),
            Err(errno) => Err(errno),
        },
        errno => Err(Errno::from_raw(errno)),
    }
}

/// What a failed connect means to the host.
pub(crate) fn error(errno: Errno) -> DialError {
    match errno {
        // ENOENT: of a unix socket.
        Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::ENOENT => DialError::Refused,
        Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EADDRNOTAVAIL | Errno::ENETDOWN => {
            DialError::Unreachable
        }
        Errno::ETIMEDOUT => DialError::TimedOut,
        Errno::EACCES | Errno::EPERM => DialError::Denied,
        // EAGAIN: the backlog of a unix socket is full.
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EAGAIN => {
            DialError::Exhausted
        }
        _ => DialError::Failed,
    }
}

/// Makes the close of a TCP socket a reset (`SO_LINGER` 0); for others it says nothing.
pub(crate) fn reset_on_close(fd: &OwnedFd) {
    let _ = setsockopt(fd, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_read_as_it_is_written() {
        for text in ["vsock://2:7927", "vsock://1:5", "unix:/run/host.sock"] {
            assert_eq!(text.parse::<Host>().map(|h| h.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("vsock://2".parse(), Ok(Host::default()));
        assert_eq!("unix:///run/host.sock".parse(), Ok(Host::Unix("/run/host.sock".into())));
        for text in ["", "2:7927", "vsock://host:1", "vsock://2:x", "unix:run/x"] {
            assert!(text.parse::<Host>().is_err(), "{text}");
        }
    }
}
