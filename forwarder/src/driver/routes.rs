//! Whether the host has a route for IPv6, now: what decides whether guests are given a default route.
//!
//! The kernel says when routes or addresses change (`rtnetlink(7)`); then, and at the start, it is asked for a route by
//! connecting a datagram socket, which sends nothing. Where there is no netlink, the answer of the start stays.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};

/// Any address of the Internet: 2000::/3 is all of it.
const SOMEWHERE: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);

/// Whether the host would know where to send a packet of IPv6 to the Internet.
pub(super) fn has_ipv6() -> bool {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    UdpSocket::bind(any).and_then(|s| s.connect((SOMEWHERE, 9))).is_ok()
}

#[cfg(target_os = "linux")]
pub(super) use linux::Routes;
#[cfg(not(target_os = "linux"))]
pub(super) use plain::Routes;

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::{AsRawFd, OwnedFd};

    use mio::unix::SourceFd;
    use mio::{Interest, Registry, Token};
    use nix::libc;
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    };

    /// The kernel's news of routes.
    pub(in crate::driver) struct Routes(OwnedFd);

    impl Routes {
        /// Watches the kernel's routes.
        ///
        /// # Errors
        /// When this process may not.
        pub(in crate::driver) fn watch(registry: &Registry, token: Token) -> io::Result<Self> {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
            let groups = libc::RTMGRP_IPV6_ROUTE | libc::RTMGRP_IPV6_IFADDR;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, u32::try_from(groups).unwrap_or(0)))?;
            registry.register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)?;
            Ok(Self(fd))
        }

        /// Takes off what the kernel said; that it spoke is all that matters.
        pub(in crate::driver) fn drain(&self) {
            let mut news = [0; 8192];
            // An overrun is news as well, and not the end of them.
            while matches!(
                recv(self.0.as_raw_fd(), &mut news, MsgFlags::MSG_DONTWAIT),
                Ok(1..) | Err(nix::Error::ENOBUFS)
            ) {}
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod plain {
    use std::io;

    use mio::{Registry, Token};

    pub(in crate::driver) struct Routes;

    impl Routes {
        pub(in crate::driver) fn watch(_: &Registry, _: Token) -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        pub(in crate::driver) fn drain(&self) {}
    }
}
