//! The guest's sockets, asked of the kernel: `NETLINK_SOCK_DIAG` dumps (`sock_diag(7)`).
//!
//! Four dumps, each filtered by state in the kernel: TCP sockets in LISTEN, and UDP sockets in the state the kernel calls
//! CLOSE, which is an unconnected one. Only what listens comes back, however many connections there are; the dump of
//! TCP walks the hash of listeners alone. Connected UDP sockets come too where somebody asks for them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use portway_api::agent::Listener;
use portway_api::control::Protocol;

/// linux/sock_diag.h, linux/netlink.h, linux/inet_diag.h, net/tcp_states.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const TCP_ESTABLISHED: u32 = 1;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const INET_DIAG_SKV6ONLY: u16 = 11;

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_msg`.
const DIAG: usize = 72;
/// One read; the kernel fills at most 32 KiB of a dump at a time.
const READ: usize = 64 * 1024;
/// Listeners taken of one guest at most; beyond it the rest is not seen. A guest has tens of them.
pub(crate) const LISTENERS: usize = 4096;

/// One socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) listener: Listener,
    /// What no other socket has, until the machine reboots (`idiag_cookie`).
    pub(crate) cookie: u64,
    /// Whether it has a peer: of UDP alone, and only where such are asked for.
    pub(crate) connected: bool,
}

/// The socket to the kernel.
#[derive(Debug)]
pub(crate) struct Diag {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
    /// Protocols the kernel cannot tell of.
    missing: Vec<&'static str>,
}

impl Diag {
    /// Opens it; needs no privilege.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        // The kernel answers inside the call; this only keeps a broken one from stopping the agent.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        Ok(Self { socket, buffer: vec![0; READ], sequence: 0, missing: Vec::new() })
    }

    /// Everything that listens now, in no order; `connected`: UDP sockets with a peer too.
    pub(crate) fn sockets(&mut self, connected: bool) -> io::Result<Vec<Seen>> {
        let mut found = Vec::new();
        self.missing.clear();
        let udp = 1 << TCP_CLOSE | u32::from(connected) << TCP_ESTABLISHED;
        for (family, protocol, states) in [
            (AF_INET, IPPROTO_TCP, 1 << TCP_LISTEN),
            (AF_INET6, IPPROTO_TCP, 1 << TCP_LISTEN),
            (AF_INET, IPPROTO_UDP, udp),
            (AF_INET6, IPPROTO_UDP, udp),
        ] {
            self.dump(family, protocol, states, &mut found)?;
        }
        Ok(found)
    }

    /// The kernel's modules that the last look was without: what listens by such a protocol is not seen.
    pub(crate) fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    fn dump(&mut self, family: u8, protocol: u8, states: u32, into: &mut Vec<Seen>) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(family, protocol, states, self.sequence);
        sendto(self.socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        loop {
            let read = match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            match take(self.buffer.get(..read).unwrap_or_default(), self.sequence, protocol, into) {
                Taken::More => {}
                Taken::Done => return Ok(()),
                // A kernel without IPv6, or without the module of a protocol, tells of no such sockets.
                Taken::Failed(nix::libc::ENOENT | nix::libc::EINVAL | nix::libc::EAFNOSUPPORT) => {
                    if family == AF_INET {
                        self.missing.push(if protocol == IPPROTO_TCP { "tcp_diag" } else { "udp_diag" });
                    }
                    return Ok(());
                }
                Taken::Failed(errno) => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

/// `nlmsghdr` and `inet_diag_req_v2`.
fn request(family: u8, protocol: u8, states: u32, sequence: u32) -> [u8; 72] {
    let mut bytes = [0; 72];
    bytes[0..4].copy_from_slice(&72u32.to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes[16] = family;
    bytes[17] = protocol;
    bytes[20..24].copy_from_slice(&states.to_ne_bytes());
    bytes
}

#[derive(Debug, PartialEq, Eq)]
enum Taken {
    More,
    Done,
    Failed(i32),
}

/// Takes the listeners out of one read.
fn take(mut bytes: &[u8], sequence: u32, protocol: u8, into: &mut Vec<Seen>) -> Taken {
    while let Some((len, kind, seq)) = header(bytes) {
        let Some(message) = bytes.get(HEADER..len.max(HEADER)) else { break };
        if seq == sequence {
            match kind {
                NLMSG_DONE => return Taken::Done,
                NLMSG_ERROR => {
                    let errno = message.first_chunk::<4>().map_or(0, |e| i32::from_ne_bytes(*e));
                    return Taken::Failed(errno.saturating_neg());
                }
                SOCK_DIAG_BY_FAMILY if into.len() < LISTENERS => into.extend(seen(message, protocol)),
                _ => {}
            }
        }
        bytes = bytes.get(aligned(len.max(HEADER))..).unwrap_or_default();
    }
    Taken::More
}

fn header(bytes: &[u8]) -> Option<(usize, u16, u32)> {
    let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *bytes.first_chunk::<HEADER>()?;
    let len = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
    Some((len, u16::from_ne_bytes([k0, k1]), u32::from_ne_bytes([s0, s1, s2, s3])))
}

const fn aligned(len: usize) -> usize {
    (len + 3) & !3
}

/// `inet_diag_msg`: family u8, state u8, timer u8, retrans u8, then the id: source port and destination port, both
/// big-endian, source and destination address of 16 bytes each, interface u32 and cookie, two u32.
fn seen(message: &[u8], protocol: u8) -> Option<Seen> {
    let (fixed, attributes) = message.split_first_chunk::<DIAG>()?;
    let [family, _, _, _, p0, p1, d0, d1, address @ ..] = fixed;
    let connected = (*d0, *d1) != (0, 0);
    let cookie = u64::from_ne_bytes(*address.get(36..)?.first_chunk()?);
    let address = address.first_chunk::<16>()?;
    let address: IpAddr = match *family {
        AF_INET => Ipv4Addr::from(*address.first_chunk::<4>()?).into(),
        AF_INET6 => {
            let v6 = Ipv6Addr::from(*address);
            // An IPv6 socket bound to ::ffff:127.0.0.1 is reached over IPv4 alone.
            v6.to_ipv4_mapped().map_or(v6.into(), IpAddr::from)
        }
        _ => return None,
    };
    let proto = if protocol == IPPROTO_TCP { Protocol::Tcp } else { Protocol::Udp };
    let v6_only = *family == AF_INET6
        && attribute(attributes, INET_DIAG_SKV6ONLY).is_some_and(|v| v.first() == Some(&1));
    let port = u16::from_be_bytes([*p0, *p1]);
    Some(Seen { listener: Listener { proto, address, port, v6_only, redirected: false }, cookie, connected })
}

/// The value of one netlink attribute.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let [l0, l1, k0, k1] = *bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..len)?;
        if u16::from_ne_bytes([k0, k1]) == wanted {
            return Some(value);
        }
        bytes = bytes.get(aligned(len)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn find(found: &[Seen], proto: Protocol, at: SocketAddr) -> Option<Seen> {
        let same = |l: &Listener| (l.proto, l.address, l.port) == (proto, at.ip(), at.port());
        found.iter().find(|s| same(&s.listener)).copied()
    }

    fn has(found: &[Seen], proto: Protocol, at: SocketAddr) -> bool {
        find(found, proto, at).is_some()
    }

    #[test]
    fn a_udp_socket_that_takes_a_peer_keeps_its_cookie() {
        let mut diag = Diag::open().expect("sock_diag");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let at = udp.local_addr().expect("bound");
        let before = find(&diag.sockets(false).expect("dump"), Protocol::Udp, at).expect("seen");
        udp.connect("127.0.0.1:9").expect("connect");
        let after = find(&diag.sockets(true).expect("dump"), Protocol::Udp, at).expect("seen");
        assert!(!before.connected && after.connected && before.cookie == after.cookie);
        assert_ne!(before.cookie, 0);
        assert!(diag.missing().is_empty());
    }

    #[test]
    fn what_listens_is_seen_and_what_is_connected_or_closed_is_not() {
        let mut diag = Diag::open().expect("sock_diag");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("a port");
        let v6 = TcpListener::bind("[::1]:0");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let connected = UdpSocket::bind("127.0.0.1:0").expect("a port");
        connected.connect(udp.local_addr().expect("bound")).expect("connect");
        let at = tcp.local_addr().expect("bound");
        let client = TcpStream::connect(at).expect("connect");
        let found = diag.sockets(false).expect("dump");
        assert!(has(&found, Protocol::Tcp, at));
        if let Ok(v6) = &v6 {
            assert!(has(&found, Protocol::Tcp, v6.local_addr().expect("bound")));
        }
        assert!(has(&found, Protocol::Udp, udp.local_addr().expect("bound")));
        assert!(!has(&found, Protocol::Udp, connected.local_addr().expect("bound")));
        assert!(!has(&found, Protocol::Tcp, client.local_addr().expect("bound")));
        drop(tcp);
        assert!(!has(&diag.sockets(false).expect("dump"), Protocol::Tcp, at));
    }

    #[test]
    fn a_socket_of_ipv6_alone_is_told_from_one_of_both() {
        let Ok(both) = TcpListener::bind("[::]:0") else { return eprintln!("skipped: no IPv6 here") };
        let port = both.local_addr().expect("bound").port();
        let found = Diag::open().expect("sock_diag").sockets(false).expect("dump");
        let at = found
            .iter()
            .map(|s| s.listener)
            .find(|l| l.port == port && l.proto == Protocol::Tcp)
            .expect("seen");
        assert!(at.address.is_unspecified() && !at.v6_only, "std binds both");
    }

    #[test]
    fn torn_and_lying_messages_end_the_parse_and_nothing_else() {
        let mut into = Vec::new();
        let mut lying = vec![0; HEADER + DIAG];
        for len in [0u32, 1, 15, 16, 40, 9999, u32::MAX] {
            lying[0..4].copy_from_slice(&len.to_ne_bytes());
            lying[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
            assert_eq!(take(&lying, 0, IPPROTO_TCP, &mut into), Taken::More);
        }
        assert_eq!(take(&[0; 7], 0, IPPROTO_TCP, &mut into), Taken::More);
        assert!(into.is_empty());
        assert_eq!(attribute(&[0, 0, 0, 0], 1), None);
        assert_eq!(attribute(&[3, 0, 1, 0, 9], 1), None);
    }
}
