//! TCP's header (RFC 9293 §3.1), as far as the demultiplexer needs it; the state machine is smoltcp's.

use std::num::Wrapping;

use crate::drop_reason::DropReason;

/// The FIN bit.
pub const FIN: u8 = 0x01;
/// The SYN bit.
pub const SYN: u8 = 0x02;
/// The RST bit.
pub const RST: u8 = 0x04;
/// The ACK bit.
pub const ACK: u8 = 0x10;

/// What of a segment matters to the demultiplexer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Sequence number.
    pub seq: Wrapping<u32>,
    /// Acknowledgement number; means nothing without the ACK bit.
    pub ack: Wrapping<u32>,
    /// Flags.
    pub flags: u8,
    /// Payload bytes.
    pub payload: u32,
}

impl Segment {
    /// Whether every bit of `mask` is set.
    #[must_use]
    pub const fn has(&self, mask: u8) -> bool {
        self.flags & mask == mask
    }

    /// Whether this opens a connection: SYN, and neither ACK, RST nor FIN.
    #[must_use]
    pub const fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// The sequence number after the payload.
    #[must_use]
    pub fn end(&self) -> Wrapping<u32> {
        self.seq + Wrapping(self.payload)
    }
}

/// Reads one segment.
///
/// # Errors
/// `Truncated` below 20 bytes, `BadTcpHeader` for a data offset outside the segment or a port 0.
pub fn parse(bytes: &[u8]) -> Result<Segment, DropReason> {
    let Some((&[s0, s1, d0, d1, q0, q1, q2, q3, a0, a1, a2, a3, offset, flags, _, _, _, _, _, _], _)) =
        bytes.split_first_chunk::<20>()
    else {
        return Err(DropReason::Truncated);
    };
    let header = usize::from(offset >> 4) * 4;
    let payload = bytes.len().checked_sub(header).filter(|_| header >= 20).ok_or(DropReason::BadTcpHeader)?;
    let (src, dst) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
    if src == 0 || dst == 0 {
        return Err(DropReason::BadTcpHeader);
    }
    let payload = u32::try_from(payload).map_err(|_| DropReason::BadLength)?;
    let (seq, ack) = (u32::from_be_bytes([q0, q1, q2, q3]), u32::from_be_bytes([a0, a1, a2, a3]));
    Ok(Segment { src, dst, seq: Wrapping(seq), ack: Wrapping(ack), flags, payload })
}
