//! IPv4 (RFC 791).

use std::net::Ipv4Addr;

use super::checksum;
pub use super::ipv6::Fragment;
use crate::drop_reason::DropReason;

/// Bytes of a header without options.
pub const HEADER: usize = 20;
/// ICMP's protocol number.
pub const ICMP: u8 = 1;
/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;

/// What of a header matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// Protocol number.
    pub protocol: u8,
    /// Time to live.
    pub hop_limit: u8,
    /// Whether this is a fragment (offset not zero, or more to come).
    pub fragment: bool,
    /// Whether nobody may fragment it (RFC 791's DF).
    pub dont_fragment: bool,
}

/// A packet cut out of its frame: Ethernet's padding is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'f> {
    /// The header.
    pub header: Header,
    /// Header and payload, exactly Total Length bytes.
    pub bytes: &'f [u8],
    /// What the header carries.
    pub payload: &'f [u8],
}

impl Packet<'_> {
    /// Where this fragment belongs.
    #[must_use]
    pub fn fragment(&self) -> Fragment {
        let Some(&[_, _, _, _, i0, i1, f0, f1]) = self.bytes.first_chunk() else {
            return Fragment { id: 0, offset: 0, more: false };
        };
        let field = u16::from_be_bytes([f0, f1]);
        Fragment {
            id: u32::from(u16::from_be_bytes([i0, i1])),
            offset: usize::from(field & 0x1fff) * 8,
            more: field & MORE_FRAGMENTS != 0,
        }
    }
}

/// Reads one packet.
///
/// # Errors
/// `BadIpHeader` for a wrong version or header length, `BadLength` when Total Length exceeds the frame or is below
/// the header's, `BadChecksum` when the header checksum is wrong.
pub fn parse(bytes: &[u8]) -> Result<Packet<'_>, DropReason> {
    let Some((&[v, _, l0, l1, _, _, f0, f1, hop_limit, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3], _)) =
        bytes.split_first_chunk::<HEADER>()
    else {
        return Err(DropReason::Truncated);
    };
    let header_len = usize::from(v & 0x0f) * 4;
    if v >> 4 != 4 || header_len < HEADER {
        return Err(DropReason::BadIpHeader);
    }
    let total = usize::from(u16::from_be_bytes([l0, l1]));
    let bytes = bytes.get(..total).ok_or(DropReason::BadLength)?;
    let (head, payload) = bytes.split_at_checked(header_len).ok_or(DropReason::BadLength)?;
    if checksum(&[head]) != 0 {
        return Err(DropReason::BadChecksum);
    }
    let header = Header {
        src: Ipv4Addr::new(s0, s1, s2, s3),
        dst: Ipv4Addr::new(d0, d1, d2, d3),
        protocol,
        hop_limit,
        fragment: u16::from_be_bytes([f0, f1]) & 0x3fff != 0,
        dont_fragment: u16::from_be_bytes([f0, f1]) & DONT_FRAGMENT != 0,
    };
    Ok(Packet { header, bytes, payload })
}

/// A header for a packet of our own: no options, don't fragment, TTL 64. `payload` is its length in bytes.
#[must_use]
pub fn header(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: u16) -> [u8; HEADER] {
    written(src, dst, protocol, payload, 0, DONT_FRAGMENT)
}

/// The header of a fragment of our own. Of `fragment.id` the lower 16 bits count.
#[must_use]
pub fn fragment_header(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: u8,
    payload: u16,
    fragment: Fragment,
) -> [u8; HEADER] {
    let offset = u16::try_from(fragment.offset / 8).unwrap_or(0) & 0x1fff;
    let id = u16::try_from(fragment.id & 0xffff).unwrap_or(0);
    written(src, dst, protocol, payload, id, offset | if fragment.more { MORE_FRAGMENTS } else { 0 })
}

fn written(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: u16, id: u16, field: u16) -> [u8; HEADER] {
    let total = payload.saturating_add(20).to_be_bytes();
    let (s, d, id, f) = (src.octets(), dst.octets(), id.to_be_bytes(), field.to_be_bytes());
    let mut out = [
        0x45, 0, total[0], total[1], id[0], id[1], f[0], f[1], 64, protocol, 0, 0, s[0], s[1], s[2], s[3],
        d[0], d[1], d[2], d[3],
    ];
    let sum = checksum(&[&out]).to_be_bytes();
    out[10] = sum[0];
    out[11] = sum[1];
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_write_we_read() {
        let mut packet = header(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), UDP, 3).to_vec();
        packet.extend([1, 2, 3, 0, 0]); // two bytes of padding
        let read = parse(&packet).unwrap();
        assert_eq!(read.payload, [1, 2, 3]);
        assert_eq!((read.header.protocol, read.header.fragment), (UDP, false));
    }

    #[test]
    fn a_fragments_place_is_read_as_it_was_written() {
        let place = Fragment { id: 0xbeef, offset: 1480, more: true };
        let mut packet =
            fragment_header(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), UDP, 8, place).to_vec();
        packet.extend([0; 8]);
        let read = parse(&packet).unwrap();
        assert_eq!((read.fragment(), read.header.fragment, read.header.dont_fragment), (place, true, false));
    }

    #[test]
    fn every_truncation_is_an_error_and_no_panic() {
        let packet = header(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, TCP, 4);
        for n in 0..packet.len() {
            assert!(parse(&packet[..n]).is_err());
        }
    }

    #[test]
    fn a_flipped_bit_fails_the_checksum() {
        let mut packet = header(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, TCP, 0);
        packet[15] ^= 1;
        assert_eq!(parse(&packet), Err(DropReason::BadChecksum));
    }
}
