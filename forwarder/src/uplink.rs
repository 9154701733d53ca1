//! The host's way to the outside, watched for the whole process.
//!
//! ```text
//!  rtnetlink(7): routes, addresses ─┬─► any news ──────────────────────────────► does the host have IPv6? ─► guests
//!                                   └─► a default route came or went ─┐
//!  timerfd_create(2): the host woke up, or its clock was set ─────────┴► quiet ─► DNS forgets what it learned
//! ```
//! Flows need none of this: every connection and datagram is routed by the kernel when it leaves. What does is what a guest
//! was told of routes (an IPv6 default route only while the host has one) and what DNS learned of resolvers and from them. Routes
//! other than the default ones come and go with every container of the host and say nothing about resolvers; a VPN that has its
//! own resolvers changes resolv.conf, or systemd-resolved's list, which are watched too.
//!
//! Where there is no netlink, what was found at the start stays.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};

/// Any address of the Internet: 2000::/3 is all of it.
const SOMEWHERE: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);

/// Whether the host would know where to send a packet of IPv6 to the Internet. It is asked by connecting a datagram socket,
/// which sends nothing.
pub(crate) fn has_ipv6() -> bool {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    UdpSocket::bind(any).and_then(|s| s.connect((SOMEWHERE, 9))).is_ok()
}

/// What happened to the host's network.
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "nobody tells it there"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// Routes or addresses: told at once.
    Routes,
    /// It may be another network: told when it has been quiet for a while.
    Network,
}

#[cfg(target_os = "linux")]
pub(crate) use linux::Watch;

/// Elsewhere nothing is watched.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(crate) struct Watch;

#[cfg(not(target_os = "linux"))]
impl Watch {
    pub(crate) fn open() -> std::io::Result<Self> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    pub(crate) async fn follow(self, _: impl FnMut(News) -> bool) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::future::pending;
    use std::io;
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::time::Duration;

    use nix::errno::Errno;
    use nix::libc;
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    };
    use nix::sys::time::TimeSpec;
    use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;
    use tokio::time::{Instant, sleep_until};

    use super::News;

    /// One change is often many messages. What could not be told is told again after as long.
    const QUIET: Duration = Duration::from_millis(500);

    /// The kernel's news. What happens after `open` is not missed.
    #[derive(Debug)]
    pub(crate) struct Watch {
        netlink: OwnedFd,
        clock: TimerFd,
    }

    impl Watch {
        /// Begins to watch.
        ///
        /// # Errors
        /// When this process may not.
        pub(crate) fn open() -> io::Result<Self> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
            let groups = libc::RTMGRP_IPV4_ROUTE | libc::RTMGRP_IPV6_ROUTE | libc::RTMGRP_IPV6_IFADDR;
            bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, groups.cast_unsigned()))?;
            let clock =
                TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
            arm(&clock)?;
            Ok(Self { netlink, clock })
        }

        /// Calls `tell` with each piece of news, and again with what it did not take; ends only with an error.
        pub(crate) async fn follow(self, mut tell: impl FnMut(News) -> bool) -> io::Result<()> {
            // SAFETY: the descriptor is owned by the `OwnedFd` that goes in, and stays open until that is dropped.
            let netlink = unsafe { AsyncFd::register_with_interest(self.netlink, Interest::READABLE) }?;
            let clock = self.clock.as_fd().try_clone_to_owned()?;
            // SAFETY: as above.
            let woken = unsafe { AsyncFd::register_with_interest(clock, Interest::READABLE) }?;
            let (mut routes_at, mut network_at): (Option<Instant>, Option<Instant>) = (None, None);
            loop {
                tokio::select! {
                    ready = netlink.readable() => {
                        let mut ready = ready?;
                        let default = match drain(netlink.get_ref()) {
                            Ok(default) => default,
                            // Messages were lost for want of room: something happened.
                            Err(Errno::ENOBUFS) => true,
                            Err(error) => return Err(error.into()),
                        };
                        ready.clear_ready();
                        routes_at = Some(Instant::now());
                        if default {
                            network_at = Some(Instant::now() + QUIET);
                        }
                    }
                    ready = woken.readable() => {
                        // The timer was cancelled; armed again it is no longer readable.
                        arm(&self.clock)?;
                        ready?.clear_ready();
                        network_at = Some(Instant::now() + QUIET);
                    }
                    () = reached(routes_at) => {
                        routes_at = (!tell(News::Routes)).then(|| Instant::now() + QUIET);
                    }
                    () = reached(network_at) => {
                        network_at = (!tell(News::Network)).then(|| Instant::now() + QUIET);
                    }
                }
            }
        }
    }

    async fn reached(at: Option<Instant>) {
        match at {
            Some(at) => sleep_until(at).await,
            None => pending().await,
        }
    }

    /// A timer that never expires, but is cancelled when the clock jumps, as it does when the host wakes up
    /// (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET).
    fn arm(clock: &TimerFd) -> io::Result<()> {
        let never = Expiration::OneShot(TimeSpec::new(libc::time_t::MAX, 0));
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        match clock.set(never, flags) {
            // It was cancelled again meanwhile; it is armed all the same.
            Ok(()) | Err(Errno::ECANCELED) => Ok(()),
            Err(error) => Err(error.into()),
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
        const HEADER: usize = 16;
        while let Some((&[l0, l1, l2, l3, t0, t1], _)) = messages.split_first_chunk() {
            let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
            let Some(body) = messages.get(HEADER..length) else { return false };
            let kind = u16::from_ne_bytes([t0, t1]);
            // struct rtmsg: family, then the length of the destination's prefix.
            let default = body.get(1) == Some(&0);
            if default && matches!(kind, libc::RTM_NEWROUTE | libc::RTM_DELROUTE) {
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
