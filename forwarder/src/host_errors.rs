//! What the network told the host of its packets: the error queue of a socket (`ip(7)`, `IP_RECVERR`), and the options that
//! let a guest's hop limit and "don't fragment" leave with its packets.
//!
//! Elsewhere than on Linux there is no such queue: errors of a call are all that is known then.

use std::io;
use std::net::{IpAddr, SocketAddr};

use mio::net::UdpSocket;
use portway_netstack::icmp::{Fault, Unreachable};

/// One error about a packet of the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Where the packet was going. The port is 0 where the kernel itself refused it.
    pub(crate) to: SocketAddr,
    /// Who said so; `None` for the kernel.
    pub(crate) reporter: Option<IpAddr>,
    /// What.
    pub(crate) fault: Fault,
    /// As much of what the packet carried as is known.
    pub(crate) payload: Vec<u8>,
}

/// What a guest is told when the kernel refused its datagram with `error`; `None` for what says nothing about the network.
pub(crate) fn refused(error: &io::Error) -> Option<Fault> {
    use nix::errno::Errno;
    let why = match error.raw_os_error().map(Errno::from_raw)? {
        Errno::ENETUNREACH | Errno::ENETDOWN | Errno::EADDRNOTAVAIL => Unreachable::Network,
        Errno::EHOSTUNREACH | Errno::EHOSTDOWN | Errno::EINVAL => Unreachable::Host,
        Errno::EACCES | Errno::EPERM => Unreachable::Prohibited,
        Errno::ECONNREFUSED => Unreachable::Port,
        _ => return None,
    };
    Some(Fault::Unreachable(why))
}

#[cfg(target_os = "linux")]
pub(crate) use linux::{drain, fragmenting, watch};
#[cfg(not(target_os = "linux"))]
pub(crate) use plain::{drain, fragmenting, watch};

/// Lets packets of `socket` pass `hops` routers.
pub(crate) fn hop_limit(socket: &UdpSocket, v6: bool, hops: u8) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    if v6 { socket.set_unicast_hops_v6(hops.into()) } else { socket.set_ttl_v4(hops.into()) }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io::IoSliceMut;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::os::fd::AsRawFd;

    use nix::libc::{self, c_int, sock_extended_err};
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};

    use super::{Fault, IpAddr, Report, SocketAddr, UdpSocket, Unreachable, io};

    /// As much of a packet as an error tells, at most: what ICMPv6 quotes.
    const QUOTED: usize = 1280;
    /// Errors taken at one time: what is left comes with the next event.
    const TURN: usize = 64;

    /// Has the kernel keep errors about packets of `socket`.
    pub(crate) fn watch(socket: &UdpSocket, v6: bool) -> io::Result<()> {
        if v6 {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
            // For mapped addresses; a raw socket has none.
            let _ = setsockopt(socket, sockopt::Ipv4RecvErr, &true);
        } else {
            setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
        }
        Ok(())
    }

    /// Whether packets of `socket` may be fragmented; where not, one that does not fit is refused.
    pub(crate) fn fragmenting(socket: &UdpSocket, v6: bool, allowed: bool) -> io::Result<()> {
        let how: c_int = match (v6, allowed) {
            (false, true) => libc::IP_PMTUDISC_WANT,
            (false, false) => libc::IP_PMTUDISC_DO,
            (true, true) => libc::IPV6_PMTUDISC_WANT,
            (true, false) => libc::IPV6_PMTUDISC_DO,
        };
        let (level, name) = if v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
        };
        let size = libc::socklen_t::try_from(size_of::<c_int>()).unwrap_or(0);
        // SAFETY: the descriptor is open as long as `socket` lives, and the kernel reads `size` bytes of `how`, which is
        // one `int`, as `ip(7)` and `ipv6(7)` have it.
        #[allow(unsafe_code, reason = "neither nix nor socket2 has this option")]
        let done =
            unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const how).cast(), size) };
        nix::errno::Errno::result(done)?;
        Ok(())
    }

    /// Takes errors off `socket`'s queue, and hands them to `each`; how many they were.
    pub(crate) fn drain(socket: &UdpSocket, mut each: impl FnMut(Report)) -> usize {
        let mut payload = [0; QUOTED];
        let mut space = nix::cmsg_space!(sock_extended_err, libc::sockaddr_in6);
        for n in 0..TURN {
            let mut parts = [IoSliceMut::new(&mut payload)];
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags);
            let Ok(message) = message else { return n };
            let to = message.address.as_ref().and_then(address);
            let told = message.cmsgs().ok().into_iter().flatten().find_map(|cmsg| match cmsg {
                ControlMessageOwned::Ipv4RecvErr(e, from) => {
                    Some((e, from.map(|a| IpAddr::V4(Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr))))))
                }
                ControlMessageOwned::Ipv6RecvErr(e, from) => {
                    Some((e, from.map(|a| IpAddr::V6(Ipv6Addr::from(a.sin6_addr.s6_addr)))))
                }
                _ => None,
            });
            let len = message.bytes;
            if let (Some(to), Some((error, from))) = (to, told)
                && let Some(fault) = fault(&error)
            {
                let by_kernel = error.ee_origin == libc::SO_EE_ORIGIN_LOCAL;
                let reporter = from.filter(|ip| !by_kernel && !ip.is_unspecified());
                let payload = payload.get(..len).unwrap_or_default().to_vec();
                each(Report { to, reporter, fault, payload });
            }
        }
        TURN
    }

    fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
        storage
            .as_sockaddr_in()
            .map(|a| SocketAddr::V4((*a).into()))
            .or_else(|| storage.as_sockaddr_in6().map(|a| SocketAddr::V6((*a).into())))
    }

    /// What an error means (RFC 792, RFC 1812 §5.2.7.1, RFC 4443 §3).
    fn fault(error: &sock_extended_err) -> Option<Fault> {
        let unreachable = Fault::Unreachable;
        match (error.ee_origin, error.ee_type, error.ee_code) {
            (libc::SO_EE_ORIGIN_LOCAL, ..)
                if error.ee_errno == u32::try_from(libc::EMSGSIZE).unwrap_or(0) =>
            {
                Some(Fault::TooBig(error.ee_info))
            }
            (libc::SO_EE_ORIGIN_LOCAL, ..) => Some(unreachable(Unreachable::Host)),
            (libc::SO_EE_ORIGIN_ICMP, 3, code) => Some(match code {
                4 => Fault::TooBig(error.ee_info),
                2 => unreachable(Unreachable::Protocol),
                3 => unreachable(Unreachable::Port),
                9 | 10 | 13 => unreachable(Unreachable::Prohibited),
                1 | 7 | 12 => unreachable(Unreachable::Host),
                _ => unreachable(Unreachable::Network),
            }),
            (libc::SO_EE_ORIGIN_ICMP, 11, 0) | (libc::SO_EE_ORIGIN_ICMP6, 3, 0) => Some(Fault::HopLimit),
            (libc::SO_EE_ORIGIN_ICMP, 11, _) | (libc::SO_EE_ORIGIN_ICMP6, 3, _) => Some(Fault::Reassembly),
            (libc::SO_EE_ORIGIN_ICMP6, 1, code) => Some(match code {
                1 | 5 | 6 => unreachable(Unreachable::Prohibited),
                3 => unreachable(Unreachable::Host),
                4 => unreachable(Unreachable::Port),
                _ => unreachable(Unreachable::Network),
            }),
            (libc::SO_EE_ORIGIN_ICMP6, 2, _) => Some(Fault::TooBig(error.ee_info)),
            (libc::SO_EE_ORIGIN_ICMP6, 4, 1) => Some(unreachable(Unreachable::Protocol)),
            _ => None,
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod plain {
    use super::{Report, UdpSocket, io};

    pub(crate) fn watch(_: &UdpSocket, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn fragmenting(_: &UdpSocket, _: bool, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn drain(_: &UdpSocket, _: impl FnMut(Report)) -> usize {
        0
    }
}

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// The errors about one datagram to a port where nobody listens.
    fn told(ip: &str, payload: &[u8]) -> Option<(SocketAddr, Vec<Report>)> {
        let ip: IpAddr = ip.parse().unwrap();
        // A host without IPv6 has no ::1.
        let gone = UdpSocket::bind(SocketAddr::new(ip, 0)).ok()?.local_addr().unwrap();
        let socket = UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap();
        watch(&socket, ip.is_ipv6()).unwrap();
        socket.send_to(payload, gone).unwrap();
        let (mut reports, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(5));
        while reports.is_empty() && Instant::now() < deadline {
            drain(&socket, |r| reports.push(r));
        }
        Some((gone, reports))
    }

    #[test]
    fn the_kernel_says_who_refused_which_datagram() {
        for ip in ["127.0.0.1", "::1"] {
            let Some((to, reports)) = told(ip, b"hello") else { continue };
            let [report] = &reports[..] else { panic!("{reports:?}") };
            assert_eq!((report.to, report.reporter), (to, Some(to.ip())));
            assert_eq!(report.fault, Fault::Unreachable(Unreachable::Port));
            assert_eq!(report.payload, b"hello");
        }
    }

    #[test]
    fn a_datagram_that_may_not_be_fragmented_is_refused_with_the_mtu_that_would_fit() {
        // Loopback's MTU is the largest there is; nothing larger than 64 KiB - 1 can be asked for either.
        let socket = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        watch(&socket, false).unwrap();
        fragmenting(&socket, false, false).unwrap();
        hop_limit(&socket, false, 7).unwrap();
        let error = socket.send_to(&[0; 65_507], socket.local_addr().unwrap());
        let mut reports = Vec::new();
        drain(&socket, |r| reports.push(r));
        match error {
            Ok(_) => assert!(reports.is_empty()),
            Err(_) => {
                assert!(matches!(reports[..], [Report { fault: Fault::TooBig(_), reporter: None, .. }]))
            }
        }
    }

    #[test]
    fn what_a_refused_call_means() {
        let meaning = |e: nix::errno::Errno| refused(&io::Error::from(e));
        assert_eq!(meaning(nix::errno::Errno::ENETUNREACH), Some(Fault::Unreachable(Unreachable::Network)));
        assert_eq!(meaning(nix::errno::Errno::EPERM), Some(Fault::Unreachable(Unreachable::Prohibited)));
        assert_eq!(meaning(nix::errno::Errno::ENOBUFS), None);
    }
}
