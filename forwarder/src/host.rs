//! Host sockets of TCP flows, and what their errors mean to a guest.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use portway_netstack::{ConnectError, FlowId, HostError};
use socket2::{SockRef, TcpKeepalive};

/// A socket that does not block.
pub(crate) fn nonblocking(domain: socket2::Domain, kind: socket2::Type) -> io::Result<socket2::Socket> {
    #[cfg(target_os = "linux")]
    return socket2::Socket::new(domain, kind.nonblocking(), None);
    #[cfg(not(target_os = "linux"))]
    {
        let socket = socket2::Socket::new(domain, kind, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

/// What every TCP socket of the host has, those that a listener will accept with it.
///
/// Urgent bytes stay where they are in the stream (RFC 6093 §4): without this the kernel takes them out, and the guest would
/// miss them. A connection that is idle for `keep_alive` is asked for.
///
/// # Errors
/// The kernel's.
pub fn settle(socket: &SockRef<'_>, keep_alive: Option<Duration>) -> io::Result<()> {
    /// What Linux does when it is not told otherwise (tcp(7)).
    const USUAL: Duration = Duration::from_secs(7200);
    socket.set_out_of_band_inline(true)?;
    match keep_alive {
        None => Ok(()),
        Some(USUAL) => socket.set_keepalive(true),
        Some(idle) => socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle)),
    }
}

/// What the sandbox lets flows do: sockets of the host's protocols (ping sockets are datagram sockets).
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![
    SYS_socket: crate::sandbox::Only::OneOf(0, &[AF_UNIX, AF_INET, AF_INET6, AF_VSOCK]),
    SYS_socketpair: crate::sandbox::Only::OneOf(0, &[AF_UNIX]),
    SYS_connect,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_setsockopt,
    SYS_recvfrom,
    SYS_sendto,
    SYS_shutdown,
];

#[cfg(target_os = "linux")]
const AF_UNIX: u64 = 1;
#[cfg(target_os = "linux")]
const AF_INET: u64 = 2;
#[cfg(target_os = "linux")]
const AF_INET6: u64 = 10;
/// Of the agent's transports.
#[cfg(target_os = "linux")]
const AF_VSOCK: u64 = 40;

/// The host's end of a flow.
#[derive(Debug)]
pub enum HostStream {
    /// A TCP socket.
    Tcp(TcpStream),
    /// A service of ours, or a client of a published unix socket.
    Unix(UnixStream),
}

impl HostStream {
    /// Begins a connection; `from` is the host's address it leaves from, for destinations beyond the host.
    ///
    /// # Errors
    /// When the kernel refuses at once.
    pub fn connect(to: SocketAddr, from: Option<Ipv4Addr>, keep_alive: Option<Duration>) -> io::Result<Self> {
        let stream = match from.filter(|_| to.is_ipv4() && !to.ip().is_loopback()) {
            None => TcpStream::connect(to)?,
            Some(from) => Self::connect_from(to, from)?,
        };
        crate::fd::within_share(&stream)?;
        // The applications at both ends have decided about small segments already.
        stream.set_nodelay(true)?;
        settle(&SockRef::from(&stream), keep_alive)?;
        Ok(Self::Tcp(stream))
    }

    fn connect_from(to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
        let socket = nonblocking(socket2::Domain::IPV4, socket2::Type::STREAM)?;
        // The port is chosen at connect, so that the same one can serve several destinations (ip(7)).
        #[cfg(target_os = "linux")]
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::from((from, 0)).into())?;
        match socket.connect(&to.into()) {
            Err(e) if e.raw_os_error() != Some(nix::libc::EINPROGRESS) => Err(e),
            _ => Ok(TcpStream::from_std(socket.into())),
        }
    }

    /// Whether the connection stands: `None` when it is still on its way.
    pub fn outcome(&self) -> Option<io::Result<()>> {
        let Self::Tcp(stream) = self else { return Some(Ok(())) };
        match stream.take_error() {
            Err(e) | Ok(Some(e)) => Some(Err(e)),
            Ok(None) => match stream.peer_addr() {
                Ok(_) => Some(Ok(())),
                Err(e) if e.kind() == io::ErrorKind::NotConnected => None,
                Err(e) => Some(Err(e)),
            },
        }
    }

    /// Watches the socket in both directions, edge-triggered.
    ///
    /// # Errors
    /// When the kernel has no room for one more.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        match self {
            Self::Tcp(s) => registry.register(s, token, both),
            Self::Unix(s) => registry.register(s, token, both),
        }
    }

    /// One `recv`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn recv(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(into),
            Self::Unix(s) => s.read(into),
        }
    }

    /// One `send`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(bytes),
            Self::Unix(s) => s.write(bytes),
        }
    }

    /// Says that no more will be sent.
    pub fn shutdown_write(&self) {
        // A peer that is gone already says so at the next read.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Write),
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Write),
        };
    }

    /// Closes with RST, as the guest did.
    pub fn reset(self) {
        if let Self::Tcp(s) = &self {
            let _ = SockRef::from(s).set_linger(Some(Duration::ZERO));
        }
    }
}

/// One flow at the host.
#[derive(Debug)]
pub struct HostFlow {
    /// Whose.
    pub id: FlowId,
    /// Its socket.
    pub stream: HostStream,
    /// Whether `connect` is under way.
    pub dialing: bool,
    /// Whether a `recv` may bring something.
    pub readable: bool,
    /// Whether a `send` may take something.
    pub writable: bool,
    /// Whether the peer has ended its direction, though bytes may be left to read.
    pub ending: bool,
    /// Whether everything it sent has been read.
    pub eof: bool,
    /// Where to try when this connect is refused: the same port of the other loopback address ([`other_loopback`]).
    pub fallback: Option<NonZeroU16>,
}

/// Where what listens on the host's loopback may be as well: most programs listen on 127.0.0.1 alone, and the guest that
/// comes by the host alias's IPv6 address means the host and not ::1.
#[must_use]
pub fn other_loopback(to: SocketAddr) -> Option<NonZeroU16> {
    (to.ip() == IpAddr::V6(Ipv6Addr::LOCALHOST)).then(|| NonZeroU16::new(to.port())).flatten()
}

impl HostFlow {
    /// A connection that stands.
    #[must_use]
    pub const fn open(id: FlowId, stream: HostStream) -> Self {
        Self {
            id,
            stream,
            dialing: false,
            readable: true,
            writable: true,
            ending: false,
            eof: false,
            fallback: None,
        }
    }

    /// A connection on its way.
    #[must_use]
    pub const fn dialing(id: FlowId, stream: HostStream) -> Self {
        Self {
            id,
            stream,
            dialing: true,
            readable: false,
            writable: false,
            ending: false,
            eof: false,
            fallback: None,
        }
    }
}

/// What a failed `connect` means to the guest.
#[must_use]
pub fn connect_error(error: &io::Error) -> ConnectError {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED | Errno::ECONNRESET) => ConnectError::Refused,
        Some(Errno::ENETUNREACH | Errno::ENETDOWN) => {
            ConnectError::Unreachable(HostError::NetworkUnreachable)
        }
        Some(Errno::EHOSTUNREACH | Errno::EHOSTDOWN | Errno::EADDRNOTAVAIL | Errno::EINVAL) => {
            ConnectError::Unreachable(HostError::HostUnreachable)
        }
        Some(Errno::EACCES | Errno::EPERM) => ConnectError::Unreachable(HostError::Prohibited),
        Some(Errno::ETIMEDOUT) => ConnectError::TimedOut,
        Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EAGAIN) => {
            ConnectError::Exhausted
        }
        _ => ConnectError::Refused,
    }
}
