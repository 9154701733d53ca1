//! UDP (RFC 768).

use std::net::{IpAddr, SocketAddr};

use super::checksum;
use crate::drop_reason::DropReason;

/// Bytes of the header.
pub const HEADER: usize = 8;

/// The ports of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
}

/// Reads one datagram.
///
/// # Errors
/// `Truncated` below 8 bytes, `BadUdpHeader` when Length is below 8 or exceeds the packet, or the destination is port 0.
pub fn parse(bytes: &[u8]) -> Result<(Header, &[u8]), DropReason> {
    let Some((&[s0, s1, d0, d1, l0, l1, _, _], rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(DropReason::Truncated);
    };
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    let payload = length.checked_sub(HEADER).and_then(|n| rest.get(..n)).ok_or(DropReason::BadUdpHeader)?;
    let header = Header { src: u16::from_be_bytes([s0, s1]), dst: u16::from_be_bytes([d0, d1]) };
    if header.dst == 0 { Err(DropReason::BadUdpHeader) } else { Ok((header, payload)) }
}

/// The header of a datagram of ours with `payload` bytes, its checksum left open.
#[must_use]
pub fn open_header(src: SocketAddr, dst: SocketAddr, payload: usize) -> [u8; HEADER] {
    let [l0, l1] = u16::try_from(payload + HEADER).unwrap_or(u16::MAX).to_be_bytes();
    let ([s0, s1], [d0, d1]) = (src.port().to_be_bytes(), dst.port().to_be_bytes());
    [s0, s1, d0, d1, l0, l1, 0, 0]
}

/// The header of a datagram of ours, with its checksum.
#[must_use]
pub fn header(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> [u8; HEADER] {
    let mut out = open_header(src, dst, payload.len());
    let pseudo = [0, super::ipv4::UDP, out[4], out[5]];
    let sum = match (src.ip(), dst.ip()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => checksum(&[&s.octets(), &d.octets(), &pseudo, &out, payload]),
        (s, d) => checksum(&[&mapped(s), &mapped(d), &pseudo, &out, payload]),
    };
    // RFC 768: a sum of zero is sent as all ones; zero means that there is none, which IPv6 does not know.
    let sum = if sum == 0 { 0xffff } else { sum }.to_be_bytes();
    out[6] = sum[0];
    out[7] = sum[1];
    out
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}
