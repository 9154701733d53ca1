//! Published ports: listeners on the host, and the guest each belongs to.
//!
//! A spec of several ports is several [`Published`]; each has one listener per address it is bound to. `HOST` 0 gives
//! one number for 127.0.0.1 and ::1. Without an IPv6 loopback ::1 is left out.

pub mod spec;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mio::net::{TcpListener, UdpSocket, UnixListener};
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use portway_api::control::{PortInfo, Protocol};
use portway_netstack::PortId;
use socket2::{Domain, SockRef, Type};

use self::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::request::PublishError;

/// Ports one guest may publish by itself.
pub(crate) const GUEST_PORTS: usize = 256;
/// How often a free port is looked for that both loopback addresses have.
const TRIES: usize = 32;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// How the reason begins when somebody else has the port.
pub(crate) const IN_USE: &str = "the port is in use";
/// What the reason says of a port that not everybody may have.
pub(crate) const PRIVILEGE: &str = "needs a privilege";
/// The reason when the address is none of this host's.
pub(crate) const NOT_HERE: &str = "this host does not have the address";

/// One socket of a published port.
#[derive(Debug)]
pub enum Listener {
    /// Accepts connections.
    Tcp(TcpListener),
    /// Accepts connections.
    Unix(UnixListener, PathBuf),
    /// Takes datagrams; true: of IPv6 (and IPv4, when bound to every address).
    Udp(UdpSocket, bool),
}

/// One published port.
#[derive(Debug)]
pub struct Published {
    /// The protocol.
    pub proto: Protocol,
    /// Where the host listens, as it was asked for: what `unpublish` compares.
    pub host: HostEnd,
    /// The addresses that are bound.
    pub bound: Vec<String>,
    /// The port that is bound; 0 for a unix socket.
    pub host_port: u16,
    /// Whose port.
    pub guest: GuestName,
    /// The guest's port.
    pub guest_port: u16,
    /// The guest that published it itself, and its link; `None`: the operator, or what serves him.
    pub by: Option<(IpAddr, Option<PortId>)>,
    /// Connections or datagrams' clients so far.
    pub accepted: u64,
}

impl Published {
    /// What listings show. `guest` is the name the guest goes by now.
    #[must_use]
    pub fn info(&self, guest: String) -> PortInfo {
        PortInfo {
            proto: self.proto,
            bind: self.bound.clone(),
            host_port: self.host_port,
            guest,
            guest_port: self.guest_port,
            state: "listening".into(),
            accepted: self.accepted,
        }
    }

    /// Whether `spec` names this port, at place `n` of its range.
    #[must_use]
    pub fn is_named(&self, spec: &PublishSpec, n: u16) -> bool {
        let guest = self.guest_port == spec.guest_port.saturating_add(n) && self.guest == spec.guest;
        self.proto == spec.proto
            && match (&self.host, &spec.host) {
                (HostEnd::Unix(a), HostEnd::Unix(b)) => a == b,
                (HostEnd::Ports { bind: a, .. }, HostEnd::Ports { bind: b, first }) => {
                    a == b && if *first == 0 { guest } else { self.host_port == first.saturating_add(n) }
                }
                _ => false,
            }
    }
}

/// Binds every address of one port. `port` 0 takes a free one.
///
/// # Errors
/// `Bind` with the address, what the host said, and what helps.
pub fn bind(
    host: &HostEnd,
    port: u16,
    proto: Protocol,
    keep_alive: Option<Duration>,
) -> Result<(Vec<Listener>, Vec<String>, u16), PublishError> {
    let (addresses, optional): (Vec<IpAddr>, bool) = match host {
        HostEnd::Unix(path) => {
            let fault = |e: io::Error| PublishError::Bind {
                address: format!("unix:{}", path.display()),
                reason: e.to_string(),
            };
            let listener = crate::unix_path::listen(path, 0o600).map_err(fault)?;
            let listener = Listener::Unix(UnixListener::from_std(listener), path.clone());
            return Ok((vec![listener], vec![format!("unix:{}", path.display())], 0));
        }
        HostEnd::Ports { bind: Bind::Localhost, .. } => {
            (vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()], true)
        }
        HostEnd::Ports { bind: Bind::Address(ip), .. } => (vec![*ip], false),
    };
    let mut tries = if port == 0 { TRIES } else { 1 };
    loop {
        tries -= 1;
        match bind_all(&addresses, optional, port, proto, keep_alive) {
            Err((address, Errno::EADDRINUSE)) if tries > 0 => {
                tracing::debug!(%address, "the free port is taken at the other address, trying the next");
            }
            Err((address, errno)) => {
                let reason = match errno {
                    Errno::EADDRINUSE => {
                        format!("{IN_USE}: take another host port, or 0 for a free one")
                    }
                    Errno::EACCES => format!(
                        "port {port} {PRIVILEGE}: take one from 1024 on, or lower net.ipv4.ip_unprivileged_port_start"
                    ),
                    Errno::EADDRNOTAVAIL => NOT_HERE.to_owned(),
                    other => other.desc().to_owned(),
                };
                return Err(PublishError::Bind { address: format!("{proto} {address}"), reason });
            }
            Ok(bound) => return Ok(bound),
        }
    }
}

/// What the sandbox lets published ports do, live too: bind, listen, and take the place of a socket nobody has.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![
    SYS_listen,
    SYS_statx,
    #[cfg(target_arch = "x86_64")]
    SYS_chmod,
    SYS_fchmodat,
    #[cfg(target_arch = "x86_64")]
    SYS_readlink,
    SYS_readlinkat,
];

type Bound = (Vec<Listener>, Vec<String>, u16);

fn bind_all(
    addresses: &[IpAddr],
    optional: bool,
    mut port: u16,
    proto: Protocol,
    keep_alive: Option<Duration>,
) -> Result<Bound, (SocketAddr, Errno)> {
    let (mut listeners, mut bound) = (Vec::new(), Vec::new());
    for (n, ip) in addresses.iter().enumerate() {
        let address = SocketAddr::new(*ip, port);
        match bind_one(address, proto, keep_alive) {
            Ok((listener, real)) => {
                port = real;
                listeners.push(listener);
                bound.push(ip.to_string());
            }
            Err(error) => {
                let errno = error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
                let absent = matches!(errno, Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT);
                if !(optional && n > 0 && absent) {
                    return Err((address, errno));
                }
            }
        }
    }
    Ok((listeners, bound, port))
}

fn bind_one(
    address: SocketAddr,
    proto: Protocol,
    keep_alive: Option<Duration>,
) -> io::Result<(Listener, u16)> {
    let kind = match proto {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = crate::host::nonblocking(Domain::for_address(address), kind)?;
    if address.is_ipv6() {
        // [::] means every address, as it does for every other program; ::1 is ::1.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    if proto == Protocol::Tcp {
        socket.set_reuse_address(true)?;
        // Connections have from their listener what they do not set themselves.
        crate::host::settle(&SockRef::from(&socket), keep_alive)?;
    }
    socket.bind(&address.into())?;
    if proto == Protocol::Tcp {
        socket.listen(BACKLOG)?;
    }
    let port = socket.local_addr()?.as_socket().map_or(0, |a| a.port());
    let listener = match proto {
        Protocol::Tcp => Listener::Tcp(TcpListener::from_std(socket.into())),
        Protocol::Udp => {
            let socket = UdpSocket::from_std(socket.into());
            crate::datagrams::hold_bursts(&socket);
            crate::datagrams::come_together(&socket);
            Listener::Udp(socket, address.is_ipv6())
        }
    };
    Ok((listener, port))
}

impl Listener {
    /// The socket once more, for another loop than the data thread's.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn fd(&self) -> io::Result<std::os::fd::OwnedFd> {
        use std::os::fd::AsFd;
        match self {
            Self::Tcp(s) => s.as_fd().try_clone_to_owned(),
            Self::Unix(s, _) => s.as_fd().try_clone_to_owned(),
            Self::Udp(s, _) => s.as_fd().try_clone_to_owned(),
        }
    }

    /// Watches the socket.
    ///
    /// # Errors
    /// The kernel's.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Self::Tcp(s) => registry.register(s, token, Interest::READABLE),
            Self::Unix(s, _) => registry.register(s, token, Interest::READABLE),
            Self::Udp(s, _) => registry.register(s, token, Interest::READABLE),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_the_same_on_both_loopback_addresses() {
        let host = HostEnd::Ports { bind: Bind::Localhost, first: 0 };
        for proto in [Protocol::Tcp, Protocol::Udp] {
            let (listeners, bound, port) = bind(&host, 0, proto, None).unwrap();
            assert_eq!(listeners.len(), bound.len());
            assert_ne!(port, 0);
            let error = bind(&host, port, proto, None).unwrap_err().to_string();
            assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("in use"), "{error}");
        }
    }

    #[test]
    fn an_address_the_host_does_not_have_is_said() {
        let host = HostEnd::Ports { bind: Bind::Address("192.0.2.1".parse().unwrap()), first: 0 };
        assert!(
            bind(&host, 0, Protocol::Tcp, None)
                .unwrap_err()
                .to_string()
                .contains("does not have the address")
        );
    }
}
