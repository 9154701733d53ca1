//! Ethernet II (IEEE 802.3 §3.1.1), without frame check sequence.

use crate::drop_reason::DropReason;
use crate::types::Mac;

/// Bytes of the header.
pub const HEADER: usize = 14;
/// IPv4's EtherType.
pub const IPV4: u16 = 0x0800;
/// ARP's EtherType.
pub const ARP: u16 = 0x0806;
/// IPv6's EtherType.
pub const IPV6: u16 = 0x86dd;

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// EtherType.
    pub kind: u16,
}

impl Header {
    /// The header as bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        let (dst, rest) = out.split_at_mut(6);
        dst.copy_from_slice(&self.dst.0);
        let (src, kind) = rest.split_at_mut(6);
        src.copy_from_slice(&self.src.0);
        kind.copy_from_slice(&self.kind.to_be_bytes());
        out
    }
}

/// Splits a frame into header and payload.
///
/// # Errors
/// `Runt` below 14 bytes.
pub fn parse(frame: &[u8]) -> Result<(Header, &[u8]), DropReason> {
    let Some((&[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, k0, k1], payload)) =
        frame.split_first_chunk()
    else {
        return Err(DropReason::Runt);
    };
    let header = Header {
        dst: Mac([d0, d1, d2, d3, d4, d5]),
        src: Mac([s0, s1, s2, s3, s4, s5]),
        kind: u16::from_be_bytes([k0, k1]),
    };
    Ok((header, payload))
}
