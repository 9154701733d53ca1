//! Sockets for echo requests.
//!
//! Linux gives *ping sockets* (`icmp(7)`, `net.ipv4.ping_group_range`): datagram sockets whose messages are echo requests and
//! replies, with an identifier the kernel chooses. Where this user may not have one, a raw socket does, if that is permitted;
//! it hears every ICMP message of the host, and an identifier of ours tells which are meant. Where neither is, guests are told
//! that pinging is prohibited, and the operator, once, what helps.

use std::io;

use mio::net::UdpSocket;
use portway_netstack::icmp;
use portway_netstack::wire::checksum;
use socket2::{Domain, Protocol, Socket, Type};

/// How the socket of one binding works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ping {
    /// The kernel puts its own identifier into requests and takes only their replies.
    Datagram,
    /// A raw socket, with this identifier.
    Raw(u16),
}

/// Raw sockets of each version that are opened at the start, while the process may: the sandbox takes the right to more. Guests
/// together may have so many identifiers at once; further requests are told to be prohibited.
const SPARE: usize = 8;

/// What the host permits, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Permission {
    /// Whether the operator was told.
    told: bool,
    /// Raw sockets nobody has, of IPv4 and of IPv6.
    spare: [Vec<UdpSocket>; 2],
}

impl Permission {
    /// Looks what there is, and opens raw sockets in advance where there is nothing better.
    pub(super) fn ask() -> Self {
        let spare = [false, true].map(|v6| {
            let denied = |e: io::Error| e.kind() == io::ErrorKind::PermissionDenied;
            if socket(v6, Type::DGRAM).is_err_and(denied) {
                (0..SPARE).map_while(|_| socket(v6, Type::RAW).ok()).collect()
            } else {
                Vec::new()
            }
        });
        Self { told: false, spare }
    }

    /// Takes a raw socket back that a binding does not need any more.
    pub(super) fn give_back(&mut self, v6: bool, socket: UdpSocket) {
        let spare = &mut self.spare[usize::from(v6)];
        if spare.len() < SPARE {
            spare.push(socket);
        }
    }

    /// A raw socket that was opened at the start, without what it has heard since.
    fn spare(&mut self, v6: bool) -> Option<UdpSocket> {
        let socket = self.spare[usize::from(v6)].pop()?;
        // It holds what its buffer has room for; what comes meanwhile is dropped by its identifier.
        for _ in 0..10_000 {
            if socket.recv(&mut [0; 64]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                break;
            }
        }
        Some(socket)
    }

    /// A socket for one binding. `slot` is different for every binding of the process.
    ///
    /// # Errors
    /// `PermissionDenied` when this process may have none.
    pub(super) fn open(&mut self, v6: bool, slot: usize) -> io::Result<(UdpSocket, Ping)> {
        match socket(v6, Type::DGRAM) {
            Ok(socket) => return Ok((socket, Ping::Datagram)),
            Err(e) if e.kind() != io::ErrorKind::PermissionDenied => return Err(e),
            Err(_) => {}
        }
        let raw = self.spare(v6).map_or_else(|| socket(v6, Type::RAW), Ok);
        match &raw {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && !self.told => {
                self.told = true;
                tracing::warn!(
                    "guests cannot ping beyond the gateway: this user may not have ping sockets; \
                     sysctl -w net.ipv4.ping_group_range=\"0 2147483647\" allows them"
                );
            }
            _ => {}
        }
        // Another process with the same identifier at the same time hears ours and drops them, as we do its.
        let id =
            u16::try_from((std::process::id() as usize).wrapping_mul(0x9e37).wrapping_add(slot) & 0xffff);
        Ok((raw?, Ping::Raw(id.unwrap_or(0))))
    }
}

/// A socket for ICMP messages. It has the type of a UDP socket: both carry datagrams, and are used alike.
fn socket(v6: bool, kind: Type) -> io::Result<UdpSocket> {
    let (domain, protocol) =
        if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    Ok(UdpSocket::from_std(socket.into()))
}

impl Ping {
    /// `message` as this socket wants it sent: with the identifier by which its reply is known. `None`: as it is.
    pub(super) fn marked(self, message: &[u8], v6: bool) -> Option<Vec<u8>> {
        let Self::Raw(id) = self else { return None };
        let mut out = message.to_vec();
        out.get_mut(4..6)?.copy_from_slice(&id.to_be_bytes());
        // The kernel sums ICMPv6 of raw sockets (RFC 3542 §3.1), and not ICMP.
        out.get_mut(2..4)?.fill(0);
        if !v6 {
            let sum = checksum(&[&out]).to_be_bytes();
            out.get_mut(2..4)?.copy_from_slice(&sum);
        }
        Some(out)
    }

    /// The echo reply in what the socket received, when it is one of ours.
    pub(super) fn reply(self, bytes: &[u8], v6: bool) -> Option<&[u8]> {
        // A raw socket of IPv4 gives the IP header too.
        let message = match self {
            Self::Raw(_) if !v6 => bytes.get(usize::from(bytes.first()? & 0x0f) * 4..)?,
            _ => bytes,
        };
        let kind = if v6 { icmp::ECHO_REPLY_V6 } else { icmp::ECHO_REPLY };
        let good = message.len() >= icmp::ECHO_HEADER && message.first() == Some(&kind);
        (good && self.is_ours(message)).then_some(message)
    }

    /// Whether an echo, or one that an error quotes, went through this socket.
    pub(super) fn is_ours(self, message: &[u8]) -> bool {
        match self {
            Self::Datagram => true,
            Self::Raw(id) => message.len() >= icmp::ECHO_HEADER && icmp::echo_id(message) == id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_sockets_messages_are_known_by_their_identifier() {
        let ping = Ping::Raw(0x1234);
        let sent = ping.marked(&[8, 0, 9, 9, 0, 7, 0, 1, b'x'], false).unwrap();
        assert_eq!((checksum(&[&sent]), icmp::echo_id(&sent)), (0, 0x1234));
        let reply = [0, 0, 0, 0, 0x12, 0x34, 0, 1];
        let mut packet = vec![0x46; 24];
        packet.extend(reply);
        assert_eq!(ping.reply(&packet, false), Some(&reply[..]));
        assert_eq!(Ping::Raw(1).reply(&packet, false), None);
        let reply6 = [129, 0, 0, 0, 0x12, 0x34, 0, 1];
        assert_eq!(ping.reply(&reply6, true), Some(&reply6[..]));
        for cut in 0..packet.len() {
            ping.reply(&packet[..cut], false);
            ping.reply(&packet[..cut], true);
        }
        // One's own requests come to a raw socket on loopback, too.
        assert_eq!(ping.reply(&[128, 0, 0, 0, 0x12, 0x34, 0, 1], true), None);
    }

    #[test]
    fn a_ping_sockets_messages_are_taken_as_they_are() {
        assert_eq!(Ping::Datagram.marked(&[8; 8], false), None);
        assert_eq!(Ping::Datagram.reply(&[0; 8], false), Some(&[0; 8][..]));
    }
}
