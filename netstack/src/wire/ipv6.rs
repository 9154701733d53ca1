//! IPv6 (RFC 8200): the header, and the walk over its extension headers.
//!
//! At most [`EXTENSIONS`] extension headers are looked at; a packet with more, with an option that asks to be discarded by
//! those who do not know it, or with a routing header that still wants to be worked on (RFC 5095) is dropped. What is behind
//! ESP is not seen.

use std::net::Ipv6Addr;

use super::checksum;
use crate::drop_reason::DropReason;

/// Bytes of the fixed header.
pub const HEADER: usize = 40;
/// Bytes of a fragment header.
pub const FRAGMENT_HEADER: usize = 8;
/// Extension headers that are looked at.
pub const EXTENSIONS: usize = 8;
/// ICMPv6's protocol number.
pub const ICMP: u8 = 58;
/// The smallest MTU a link of IPv6 may have (RFC 8200 §5).
pub const MIN_MTU: u16 = 1280;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
/// The next-header number of a fragment header.
pub const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

/// Where a fragment belongs (RFC 8200 §4.5, RFC 791 §3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// The same for all fragments of one packet.
    pub id: u32,
    /// Where its bytes begin in what the whole packet carries.
    pub offset: usize,
    /// Whether others come behind it.
    pub more: bool,
}

impl Fragment {
    /// Whether it is a fragment at all: one that is first and last is whole (RFC 6946).
    #[must_use]
    pub const fn is_part(&self) -> bool {
        self.more || self.offset > 0
    }
}

/// What of a header and its extensions matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Source.
    pub src: Ipv6Addr,
    /// Destination.
    pub dst: Ipv6Addr,
    /// What the packet carries, behind every extension header that was looked at.
    pub protocol: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// The fragment header, when there is one.
    pub fragment: Option<Fragment>,
}

/// A packet cut out of its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'f> {
    /// The header.
    pub header: Header,
    /// All headers and the payload.
    pub bytes: &'f [u8],
    /// What the packet carries: the bytes of its part when it is a fragment.
    pub payload: &'f [u8],
}

impl Packet<'_> {
    /// Whether there are extension headers.
    #[must_use]
    pub const fn is_extended(&self) -> bool {
        self.bytes.len() > HEADER + self.payload.len()
    }
}

/// Reads one packet.
///
/// # Errors
/// `BadIpHeader` for a wrong version, a group as source, too many or malformed extension
/// headers; `BadLength` when the length exceeds the frame.
pub fn parse(bytes: &[u8]) -> Result<Packet<'_>, DropReason> {
    let Some((fixed, _)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(DropReason::Truncated);
    };
    let &[v, _, _, _, l0, l1, next, hop_limit, ..] = fixed;
    if v >> 4 != 6 {
        return Err(DropReason::BadIpHeader);
    }
    let address = |at: usize| -> Ipv6Addr {
        let octets: [u8; 16] = fixed.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or_default();
        octets.into()
    };
    let (src, dst) = (address(8), address(24));
    if src.is_multicast() {
        return Err(DropReason::BadIpHeader);
    }
    let total = HEADER + usize::from(u16::from_be_bytes([l0, l1]));
    let bytes = bytes.get(..total).ok_or(DropReason::BadLength)?;
    let mut header = Header { src, dst, protocol: next, hop_limit, fragment: None };
    let mut payload = bytes.get(HEADER..).unwrap_or_default();
    let mut walked = 0;
    while matches!(header.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | MOBILITY) {
        // RFC 8200 §4.1: hop-by-hop options come first and nowhere else.
        if walked == EXTENSIONS || (header.protocol == HOP_BY_HOP && walked > 0) {
            return Err(DropReason::BadIpHeader);
        }
        walked += 1;
        if header.protocol == FRAGMENT {
            let Some((&[next, _, o0, o1, i0, i1, i2, i3], rest)) = payload.split_first_chunk() else {
                return Err(DropReason::Truncated);
            };
            if header.fragment.is_some() {
                return Err(DropReason::BadIpHeader);
            }
            let field = u16::from_be_bytes([o0, o1]);
            let fragment = Fragment {
                id: u32::from_be_bytes([i0, i1, i2, i3]),
                offset: usize::from(field & !7),
                more: field & 1 != 0,
            };
            header.fragment = Some(fragment);
            header.protocol = next;
            payload = rest;
            if fragment.is_part() {
                // What follows is a piece; its headers are looked at when it is whole.
                break;
            }
            continue;
        }
        let Some(&[next, length, kind, left]) = payload.first_chunk() else {
            return Err(DropReason::Truncated);
        };
        let length = (usize::from(length) + 1) * 8;
        let (extension, rest) = payload.split_at_checked(length).ok_or(DropReason::BadLength)?;
        match header.protocol {
            HOP_BY_HOP | DESTINATION_OPTIONS => options(extension.get(2..).unwrap_or_default())?,
            // RFC 5095, RFC 8200 §4.4: we are no intermediate node of anybody's.
            ROUTING if left != 0 || kind == 0 => return Err(DropReason::BadIpHeader),
            _ => {}
        }
        header.protocol = next;
        payload = rest;
    }
    Ok(Packet { header, bytes, payload })
}

/// Whether options may be passed over (RFC 8200 §4.2): the two highest bits of an unknown one say what is to be done.
fn options(mut bytes: &[u8]) -> Result<(), DropReason> {
    const PAD_1: u8 = 0;
    const ROUTER_ALERT: u8 = 5;
    while let Some((&kind, rest)) = bytes.split_first() {
        if kind == PAD_1 {
            bytes = rest;
            continue;
        }
        let (&length, rest) = rest.split_first().ok_or(DropReason::BadIpHeader)?;
        bytes = rest.get(usize::from(length)..).ok_or(DropReason::BadIpHeader)?;
        if kind >> 6 != 0 && kind != ROUTER_ALERT {
            return Err(DropReason::BadIpHeader);
        }
    }
    Ok(())
}

/// A header for a packet of our own. `payload` is its length in bytes.
#[must_use]
pub fn header(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, hop_limit: u8, payload: u16) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    let (first, addresses) = out.split_at_mut(8);
    let [l0, l1] = payload.to_be_bytes();
    first.copy_from_slice(&[0x60, 0, 0, 0, l0, l1, protocol, hop_limit]);
    let (s, d) = addresses.split_at_mut(16);
    s.copy_from_slice(&src.octets());
    d.copy_from_slice(&dst.octets());
    out
}

/// A fragment header in front of `protocol`.
#[must_use]
pub fn fragment_header(protocol: u8, fragment: Fragment) -> [u8; FRAGMENT_HEADER] {
    let offset = u16::try_from(fragment.offset).unwrap_or(u16::MAX) & !7;
    let [o0, o1] = (offset | u16::from(fragment.more)).to_be_bytes();
    let [i0, i1, i2, i3] = fragment.id.to_be_bytes();
    [protocol, 0, o0, o1, i0, i1, i2, i3]
}

/// The checksum of ICMPv6 over the message `parts`, each but the last of even length (RFC 8200 §8.1, RFC 4443 §2.3).
#[must_use]
pub fn icmp_checksum(src: Ipv6Addr, dst: Ipv6Addr, parts: &[&[u8]]) -> u16 {
    let length = u32::try_from(parts.iter().map(|p| p.len()).sum::<usize>()).unwrap_or(0).to_be_bytes();
    let (s, d) = (src.octets(), dst.octets());
    let mut all: Vec<&[u8]> = vec![&s, &d, &length, &[0, 0, 0, ICMP]];
    all.extend(parts);
    checksum(&all)
}

/// A whole ICMPv6 packet around `body`, whose checksum is filled in.
#[must_use]
pub fn icmp_packet(src: Ipv6Addr, dst: Ipv6Addr, hop_limit: u8, mut body: Vec<u8>) -> Vec<u8> {
    if let Some(field) = body.get_mut(2..4) {
        field.fill(0);
    }
    let sum = icmp_checksum(src, dst, &[&body]).to_be_bytes();
    if let Some(field) = body.get_mut(2..4) {
        field.copy_from_slice(&sum);
    }
    let mut out = header(src, dst, ICMP, hop_limit, u16::try_from(body.len()).unwrap_or(u16::MAX)).to_vec();
    out.append(&mut body);
    out
}

/// The solicited-node multicast address of `address` (RFC 4291 §2.7.1).
#[must_use]
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// The Ethernet address of a multicast group (RFC 2464 §7).
#[must_use]
pub fn group_mac(group: Ipv6Addr) -> crate::types::Mac {
    let [.., a, b, c, d] = group.octets();
    crate::types::Mac([0x33, 0x33, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const B: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

    fn packet(first: u8, rest: &[u8]) -> Vec<u8> {
        let mut out = header(A, B, first, 64, u16::try_from(rest.len()).unwrap()).to_vec();
        out.extend(rest);
        out
    }

    #[test]
    fn what_we_write_we_read() {
        let mut bytes = packet(17, &[1, 2, 3]);
        bytes.extend([0; 4]); // the frame's padding
        let read = parse(&bytes).unwrap();
        assert_eq!((read.header.src, read.header.dst, read.header.protocol), (A, B, 17));
        assert_eq!((read.payload, read.is_extended()), (&[1, 2, 3][..], false));
    }

    #[test]
    fn rfc_8200_4_extension_headers_are_passed_over_in_their_order() {
        // Hop-by-hop with a router alert, as MLD has it; destination options; then UDP.
        let rest = [60, 0, 5, 2, 0, 0, 1, 0, 17, 0, 1, 4, 0, 0, 0, 0, 9, 9];
        let bytes = packet(0, &rest);
        let read = parse(&bytes).unwrap();
        assert_eq!((read.header.protocol, read.payload, read.is_extended()), (17, &[9, 9][..], true));
    }

    #[test]
    fn rfc_8200_4_1_hop_by_hop_options_stand_first_or_nowhere() {
        let rest = [0, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(parse(&packet(60, &rest)), Err(DropReason::BadIpHeader));
    }

    #[test]
    fn rfc_8200_4_2_an_unknown_option_that_asks_for_it_is_the_packets_end() {
        for (kind, dropped) in [(0x1e, false), (0x5e, true), (0x9e, true), (0xde, true), (0xc2, true)] {
            let read = parse(&packet(60, &[17, 0, kind, 4, 0, 0, 0, 0])).map(|_| ());
            assert_eq!(read.is_err(), dropped, "{kind:#x}");
        }
    }

    #[test]
    fn rfc_5095_routing_headers_that_want_something_are_dropped() {
        assert!(parse(&packet(43, &[17, 0, 0, 0, 0, 0, 0, 0])).is_err());
        assert!(parse(&packet(43, &[17, 0, 4, 1, 0, 0, 0, 0])).is_err());
        assert!(parse(&packet(43, &[17, 0, 4, 0, 0, 0, 0, 0])).is_ok());
    }

    #[test]
    fn more_extension_headers_than_the_limit_are_refused() {
        let chain = |n: usize| {
            let mut rest = Vec::new();
            for i in 0..n {
                rest.extend([if i + 1 == n { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
            }
            packet(60, &rest)
        };
        assert!(parse(&chain(EXTENSIONS)).is_ok());
        assert_eq!(parse(&chain(EXTENSIONS + 1)), Err(DropReason::BadIpHeader));
    }

    #[test]
    fn a_fragment_is_known_and_one_that_is_whole_is_read_on() {
        let part = Fragment { id: 7, offset: 1480, more: true };
        let bytes = packet(FRAGMENT, &[&fragment_header(60, part)[..], &[1; 16]].concat());
        let read = parse(&bytes).unwrap();
        assert_eq!((read.header.fragment, read.header.protocol, read.payload.len()), (Some(part), 60, 16));
        let atomic = Fragment { id: 7, offset: 0, more: false };
        let inner = [17, 0, 1, 4, 0, 0, 0, 0, 5];
        let bytes = packet(FRAGMENT, &[&fragment_header(60, atomic)[..], &inner].concat());
        let read = parse(&bytes).unwrap();
        assert_eq!((read.header.protocol, read.payload), (17, &[5][..]));
    }

    #[test]
    fn rfc_4291_2_7_1_the_solicited_node_group_has_the_last_24_bits() {
        let address: Ipv6Addr = "4037::01:800:200e:8c6c".parse().unwrap();
        assert_eq!(solicited_node(address), "ff02::1:ff0e:8c6c".parse::<Ipv6Addr>().unwrap());
        assert_eq!(group_mac(solicited_node(address)).to_string(), "33:33:ff:0e:8c:6c");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_and_never_reach_beyond_themselves(
            first in prop::sample::select(vec![0u8, 43, 44, 60, 135, 17, 58, 255]),
            rest in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0usize..250,
        ) {
            let bytes = packet(first, &rest);
            let _ = parse(&bytes[..cut.min(bytes.len())]);
            if let Ok(read) = parse(&bytes) {
                prop_assert!(bytes.ends_with(read.payload));
            }
        }
    }
}
