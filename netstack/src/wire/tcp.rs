//! TCP's header (RFC 9293 §3.1), as far as the demultiplexer needs it; the state machine is smoltcp's.

use std::num::Wrapping;

use crate::drop_reason::DropReason;

/// The FIN bit.
pub const FIN: u8 = 0x01;
/// The SYN bit.
pub const SYN: u8 = 0x02;
/// The RST bit.
pub const RST: u8 = 0x04;
/// The PSH bit.
pub const PSH: u8 = 0x08;
/// The ACK bit.
pub const ACK: u8 = 0x10;
/// The CWR bit (RFC 3168).
pub const CWR: u8 = 0x80;

/// What of a segment matters to the demultiplexer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Sequence number.
    pub seq: Wrapping<u32>,
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
    let Some((&[s0, s1, d0, d1, q0, q1, q2, q3, _, _, _, _, offset, flags, _, _, _, _, _, _], _)) =
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
    Ok(Segment { src, dst, seq: Wrapping(u32::from_be_bytes([q0, q1, q2, q3])), flags, payload })
}

/// Where in `segment` the option of `kind` begins (RFC 9293 §3.1).
fn option(segment: &[u8], kind: u8) -> Option<usize> {
    let header = segment.get(12).map_or(0, |offset| usize::from(offset >> 4) * 4);
    let all = segment.get(20..header)?;
    let mut options = all;
    loop {
        options = match options {
            [] | [0, ..] => return None,
            [1, rest @ ..] => rest,
            [found, ..] if *found == kind => return Some(20 + all.len() - options.len()),
            [_, length, ..] if *length >= 2 => options.get(usize::from(*length)..).unwrap_or_default(),
            _ => return None,
        };
    }
}

/// Whether a SYN or SYN|ACK carries the window scale option (RFC 7323 §2.2).
#[must_use]
pub fn offers_scaling(segment: &[u8]) -> bool {
    option(segment, 3).is_some()
}

/// The maximum segment size a SYN or SYN|ACK tells (RFC 9293 §3.7.1).
#[must_use]
pub fn mss(segment: &[u8]) -> Option<u16> {
    match segment.get(option(segment, 2)?..)? {
        [_, 4, high, low, ..] => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    }
}

/// Makes the maximum segment size of a SYN or SYN|ACK no larger than `most`; the checksum is the caller's.
pub fn lower_mss(segment: &mut [u8], most: u16) {
    if segment.get(13).is_some_and(|flags| flags & SYN != 0)
        && mss(segment).is_some_and(|mss| mss > most)
        && let Some([_, _, high, low]) = option(segment, 2).and_then(|at| segment.get_mut(at..at + 4))
    {
        [*high, *low] = most.to_be_bytes();
    }
}

/// The acknowledgment number and window of a segment that tells one: ACK is set, SYN and RST are not.
#[must_use]
pub fn acknowledged(segment: &[u8]) -> Option<(Wrapping<u32>, u16)> {
    let (&[_, _, _, _, _, _, _, _, a0, a1, a2, a3, _, flags, w0, w1], _) = segment.split_first_chunk()?;
    (flags & (ACK | SYN | RST) == ACK)
        .then(|| (Wrapping(u32::from_be_bytes([a0, a1, a2, a3])), u16::from_be_bytes([w0, w1])))
}

/// The sequence number behind a segment: its payload, SYN and FIN counted (RFC 9293 §3.4). `None` when it is cut off.
#[must_use]
pub fn sequence_end(segment: &[u8]) -> Option<Wrapping<u32>> {
    let (&[_, _, _, _, s0, s1, s2, s3, _, _, _, _, offset, flags], _) = segment.split_first_chunk()?;
    let payload = segment.len().checked_sub(usize::from(offset >> 4) * 4)?;
    let counted = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    Some(Wrapping(u32::from_be_bytes([s0, s1, s2, s3])) + Wrapping(u32::try_from(payload).ok()? + counted))
}

/// Changes the window of a segment, and with `checksummed` the checksum to match (RFC 1624, equation 3).
pub fn set_window(segment: &mut [u8], window: u16, checksummed: bool) {
    let Some([w0, w1, c0, c1]) = segment.get_mut(14..18) else { return };
    if checksummed {
        let before = u32::from(u16::from_be_bytes([*w0, *w1]));
        let sum = u32::from(u16::from_be_bytes([*c0, *c1]));
        let sum = (!sum & 0xffff) + (!before & 0xffff) + u32::from(window);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        [*c0, *c1] = (!u16::try_from(sum & 0xffff).unwrap_or(0)).to_be_bytes();
    }
    [*w0, *w1] = window.to_be_bytes();
}
