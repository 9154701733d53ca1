//! The host's network, watched: when it gets another way to the outside, or none, what DNS learned may be wrong.
//!
//! ```text
//!  rtnetlink(7): routes ─► a default route came or went ─► half a second of quiet ─► Dns::network_changed
//! ```
//! Flows need none of this: every connection and datagram is routed by the kernel when it leaves. Routes other than the
//! default ones come and go with every container of the host and say nothing about resolvers; a VPN that has its own
//! resolvers changes resolv.conf, or systemd-resolved's list, which are watched too. A host that wakes up gets its default
//! route again, which counts as a change.

use std::sync::Arc;

use crate::dns::Dns;

/// What the sandbox lets it do: one kind of netlink socket, that of routes. It is read as others are.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = {
    const AF_NETLINK: u64 = 16;
    const NETLINK_ROUTE: u64 = 0;
    crate::sandbox::sandbox_calls![
        SYS_socket: crate::sandbox::Only::Exactly(&[(0, AF_NETLINK), (2, NETLINK_ROUTE)]),
        SYS_bind,
        SYS_recvfrom,
    ]
};

/// Follows the network for as long as it can be watched.
#[cfg(target_os = "linux")]
pub(super) async fn follow(dns: Arc<Dns>) {
    if let Err(error) = linux::follow(|| dns.network_changed()).await {
        tracing::warn!(%error, "the host's network cannot be watched: DNS answers are kept for their time");
    }
}

/// Elsewhere nothing is watched.
#[cfg(not(target_os = "linux"))]
pub(super) async fn follow(_: Arc<Dns>) {}

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::time::Duration;

    use nix::errno::Errno;
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    };
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    /// Groups of `linux/rtnetlink.h`: RTMGRP_IPV4_ROUTE and RTMGRP_IPV6_ROUTE.
    const ROUTES: u32 = 0x40 | 0x400;
    /// One change is often many messages.
    const QUIET: Duration = Duration::from_millis(500);

    /// Calls `changed` after each change; ends only with an error.
    pub(super) async fn follow(mut changed: impl FnMut()) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, ROUTES))?;
        // SAFETY: the descriptor is owned by the `OwnedFd` that goes in, and stays open until that is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        loop {
            let mut ready = fd.readable().await?;
            let news = match drain(fd.get_ref()) {
                Ok(news) => news,
                // Messages were lost for want of room: something happened.
                Err(Errno::ENOBUFS) => true,
                Err(error) => return Err(error.into()),
            };
            ready.clear_ready();
            if news {
                tokio::time::sleep(QUIET).await;
                changed();
            }
        }
    }

    /// Reads what waits. True when a default route was among it.
    fn drain(fd: &OwnedFd) -> Result<bool, Errno> {
        let mut buffer = [0; 16_384];
        let mut news = false;
        loop {
            match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(n) => news |= buffer.get(..n).is_some_and(has_default_route),
                Err(Errno::EAGAIN) => return Ok(news),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a message of these says that a default route came or went (rtnetlink(7)).
    pub(super) fn has_default_route(mut messages: &[u8]) -> bool {
        const RTM_NEWROUTE: u16 = 24;
        const RTM_DELROUTE: u16 = 25;
        const HEADER: usize = 16;
        while let Some((&[l0, l1, l2, l3, t0, t1], _)) = messages.split_first_chunk() {
            let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
            let Some(body) = messages.get(HEADER..length) else { return false };
            let kind = u16::from_ne_bytes([t0, t1]);
            // struct rtmsg: family, then the length of the destination's prefix.
            let default = body.get(1) == Some(&0);
            if default && matches!(kind, RTM_NEWROUTE | RTM_DELROUTE) {
                return true;
            }
            messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        false
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::linux::has_default_route;

    fn message(kind: u16, prefix: u8) -> Vec<u8> {
        let mut bytes = 28_u32.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(16, 0);
        bytes.extend([2, prefix, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn only_default_routes_are_news() {
        assert!(has_default_route(&message(24, 0)) && has_default_route(&message(25, 0)));
        assert!(!has_default_route(&message(24, 24)) && !has_default_route(&message(16, 0)));
        assert!(has_default_route(&[message(24, 16), message(25, 0)].concat()), "the second of two");
    }

    #[test]
    fn cut_messages_are_survived() {
        let whole = [message(24, 16), message(20, 3)].concat();
        for n in 0..whole.len() {
            assert!(!has_default_route(&whole[..n]));
        }
        assert!(!has_default_route(&[0; 64]));
    }
}
