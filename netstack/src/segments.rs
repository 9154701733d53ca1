//! Frames that are not whole yet: checked, and made whole for links without offload.
//!
//! A guest with offload sends one frame of up to 64 KiB and says in the virtio-net header where to cut it and what to sum.
//! What it says is checked against the frame itself ([`checked`]) before another guest sees it: a header that lies could
//! make the other guest's kernel sum or cut in the wrong place. Toward a link without offload the frame is cut and
//! summed here ([`whole`]), as a network card would.

use std::num::Wrapping;

use crate::drop_reason::DropReason;
use crate::sink::{FrameSink, Offload, PartialChecksum, SegmentKind, Segments};
use crate::wire::{self, ethernet, ipv4, tcp};

const IPV6_HEADER: usize = 40;
/// Where the length is in a UDP header.
const UDP_LENGTH: usize = 4;
const UDP_HEADER: usize = 8;

/// What a frame of TCP or UDP over IP without extension headers is made of.
struct Layout {
    v6: bool,
    protocol: u8,
    /// Bytes before the transport header.
    transport: usize,
    /// Bytes of all headers.
    headers: usize,
}

fn layout(frame: &[u8]) -> Option<Layout> {
    let (header, packet) = ethernet::parse(frame).ok()?;
    let (v6, protocol, ip) = match header.kind {
        ethernet::IPV4 => {
            let parsed = ipv4::parse(packet).ok().filter(|p| !p.header.fragment)?;
            (false, parsed.header.protocol, parsed.bytes.len() - parsed.payload.len())
        }
        ethernet::IPV6 => (true, *packet.get(6)?, IPV6_HEADER),
        _ => return None,
    };
    let transport = ethernet::HEADER + ip;
    let body = frame.get(transport..)?;
    let own = match protocol {
        ipv4::TCP => usize::from(body.get(12)? >> 4) * 4,
        ipv4::UDP => UDP_HEADER,
        _ => return None,
    };
    let good = own >= if protocol == ipv4::TCP { 20 } else { UDP_HEADER } && own <= body.len();
    good.then_some(Layout { v6, protocol, transport, headers: transport + own })
}

/// What is true of `offload`, a guest's claim about its `frame`: positions are those of the frame itself.
///
/// # Errors
/// `BadOffload` when the claim does not fit the frame.
pub fn checked(frame: &[u8], offload: Offload) -> Result<Offload, DropReason> {
    if offload.is_whole() {
        return Ok(offload);
    }
    let layout = layout(frame).ok_or(DropReason::BadOffload)?;
    let position = |n: usize| u16::try_from(n).map_err(|_| DropReason::BadOffload);
    let offset = if layout.protocol == ipv4::TCP { 16 } else { 6 };
    let own = PartialChecksum { start: position(layout.transport)?, offset };
    if offload.checksum.is_some_and(|claim| claim != own) {
        return Err(DropReason::BadOffload);
    }
    let segments = match offload.segments {
        None => None,
        Some(claim) => {
            let fits = match claim.kind {
                SegmentKind::Tcp4 => !layout.v6 && layout.protocol == ipv4::TCP,
                SegmentKind::Tcp6 => layout.v6 && layout.protocol == ipv4::TCP,
                SegmentKind::Udp => layout.protocol == ipv4::UDP,
            };
            // Segments without a checksum to make make no sense (virtio 1.2, §5.1.6.2).
            if !fits || claim.size == 0 || offload.checksum.is_none() {
                return Err(DropReason::BadOffload);
            }
            let payload = frame.len() - layout.headers;
            let more = payload > usize::from(claim.size);
            more.then_some(Segments { headers: position(layout.headers)?, ..claim })
        }
    };
    Ok(Offload { checksum: Some(own), segments })
}

/// The size in bytes of the largest IP packet `frame` stands for, with an `offload` that [`checked`] gave.
#[must_use]
pub fn largest_packet(frame: &[u8], offload: Offload) -> usize {
    let frame = match offload.segments {
        Some(s) => usize::from(s.headers) + usize::from(s.size),
        None => frame.len(),
    };
    frame.saturating_sub(ethernet::HEADER)
}

/// Writes `frame` into `sink` as a wire would carry it; `offload` is what [`checked`] gave.
///
/// # Errors
/// `LinkFull` when the sink has no room for all of it: the segments that fit are there then.
pub fn whole(frame: &[u8], offload: Offload, sink: &mut impl FrameSink) -> Result<(), DropReason> {
    let Some(checksum) = offload.checksum else {
        return put(sink, frame.len(), |out| out.copy_from_slice(frame));
    };
    let (start, offset) = (usize::from(checksum.start), usize::from(checksum.offset));
    let Some(segments) = offload.segments else {
        return put(sink, frame.len(), |out| {
            out.copy_from_slice(frame);
            begin_sum(out, checksum);
            wire::finish_checksum(out, start, offset);
        });
    };
    let Some((headers, payload)) = frame.split_at_checked(usize::from(segments.headers)) else {
        return Err(DropReason::BadOffload);
    };
    let count = payload.len().div_ceil(usize::from(segments.size));
    for (n, chunk) in payload.chunks(usize::from(segments.size)).enumerate() {
        put(sink, headers.len() + chunk.len(), |out| {
            let (head, body) = out.split_at_mut(headers.len());
            head.copy_from_slice(headers);
            body.copy_from_slice(chunk);
            segment_headers(head, segments, start, n, n + 1 == count, chunk.len());
            sum(out, segments.kind, start, offset);
        })?;
    }
    Ok(())
}

/// Writes the pseudo-header's sum where it belongs, whatever stood there: a guest's word is not taken for it.
pub(crate) fn begin_sum(frame: &mut [u8], checksum: PartialChecksum) {
    let (start, offset) = (usize::from(checksum.start), usize::from(checksum.offset));
    let protocol = if offset == 16 { ipv4::TCP } else { ipv4::UDP };
    if let (Some(packet), Some(header)) =
        (frame.get_mut(ethernet::HEADER..), start.checked_sub(ethernet::HEADER))
    {
        wire::partial_checksum(packet, header, protocol, offset);
    }
}

/// What is true of a frame on a link whose guest leaves sums and segments to us and says so by no header (libkrun): every
/// sum is open, and a TCP segment larger than a frame of `mtu` bytes stands for several.
#[must_use]
pub fn implied(frame: &[u8], mtu: u16) -> Offload {
    let Some(layout) = layout(frame) else { return Offload::default() };
    let position = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    let tcp = layout.protocol == ipv4::TCP;
    let start = position(layout.transport);
    let checksum = Some(PartialChecksum { start, offset: if tcp { 16 } else { 6 } });
    let room = (usize::from(mtu) + ethernet::HEADER).saturating_sub(layout.headers);
    let large = tcp && room > 0 && frame.len() - layout.headers > room;
    let kind = if layout.v6 { SegmentKind::Tcp6 } else { SegmentKind::Tcp4 };
    let segments = large.then(|| Segments { kind, size: position(room), headers: position(layout.headers) });
    Offload { checksum, segments }
}

fn put(sink: &mut impl FrameSink, len: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), DropReason> {
    if !sink.has_room() {
        return Err(DropReason::LinkFull);
    }
    sink.frame(len, Offload::default(), fill).ok_or(DropReason::LinkFull)
}

/// Makes `head` the headers of segment `n`.
fn segment_headers(head: &mut [u8], segments: Segments, start: usize, n: usize, last: bool, payload: usize) {
    let ip_len = u16::try_from(head.len() - ethernet::HEADER + payload).unwrap_or(u16::MAX);
    let transport_len = u16::try_from(head.len() - start + payload).unwrap_or(u16::MAX);
    let Some((before, transport)) = head.split_at_mut_checked(start) else { return };
    let Some(ip) = before.get_mut(ethernet::HEADER..) else { return };
    if ip.first().is_some_and(|b| b >> 4 == 6) {
        set16(ip, 4, transport_len);
    } else {
        set16(ip, 2, ip_len);
        let id = get16(ip, 4).wrapping_add(u16::try_from(n & 0xffff).unwrap_or(0));
        set16(ip, 4, id);
        set16(ip, 10, 0);
        let sum = wire::checksum(&[ip]);
        set16(ip, 10, sum);
    }
    if segments.kind == SegmentKind::Udp {
        set16(transport, UDP_LENGTH, transport_len);
        return;
    }
    if let Some([s0, s1, s2, s3]) = transport.get_mut(4..8) {
        let skipped = u32::try_from(n * usize::from(segments.size)).unwrap_or(0);
        let seq = Wrapping(u32::from_be_bytes([*s0, *s1, *s2, *s3])) + Wrapping(skipped);
        [*s0, *s1, *s2, *s3] = seq.0.to_be_bytes();
    }
    if let Some(flags) = transport.get_mut(13) {
        if !last {
            *flags &= !(tcp::FIN | tcp::PSH);
        }
        if n > 0 {
            // RFC 3168 §6.1.2: the window was reduced once.
            *flags &= !tcp::CWR;
        }
    }
}

/// Sums a whole segment, pseudo-header included.
fn sum(frame: &mut [u8], kind: SegmentKind, start: usize, offset: usize) {
    let Some(packet) = frame.get_mut(ethernet::HEADER..) else { return };
    let header = start - ethernet::HEADER;
    let protocol = if kind == SegmentKind::Udp { ipv4::UDP } else { ipv4::TCP };
    wire::partial_checksum(packet, header, protocol, offset);
    wire::finish_checksum(packet, header, offset);
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b))
}

fn set16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(|b| b.first_chunk_mut()) {
        *field = value.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    struct Wire(Vec<(Vec<u8>, Offload)>);
    impl FrameSink for Wire {
        fn has_room(&self) -> bool {
            true
        }
        fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
            let mut frame = vec![0; len];
            let r = fill(&mut frame);
            self.0.push((frame, offload));
            Some(r)
        }
    }

    /// A TCP frame with `payload` bytes of which only the pseudo-header is summed.
    fn large(payload: usize, flags: u8) -> (Vec<u8>, Offload) {
        let (src, dst) = (Ipv4Addr::new(192, 168, 127, 2), Ipv4Addr::new(192, 168, 127, 3));
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        frame.extend(ipv4::header(src, dst, ipv4::TCP, u16::try_from(20 + payload).unwrap()));
        frame.extend([0, 80, 4, 0, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        frame.extend((0..payload).map(|n| u8::try_from(n % 251).unwrap()));
        wire::partial_checksum(&mut frame[14..], 20, ipv4::TCP, 16);
        let checksum = Some(PartialChecksum { start: 34, offset: 16 });
        let segments = Some(Segments { kind: SegmentKind::Tcp4, size: 1460, headers: 0 });
        (frame, Offload { checksum, segments })
    }

    /// The TCP checksum of a whole frame is right when the sum over it and its pseudo-header is zero.
    fn is_summed(frame: &[u8]) -> bool {
        let length = u32::try_from(frame.len() - 34).unwrap().to_be_bytes();
        wire::checksum(&[&frame[26..34], &[0, 0, 0, ipv4::TCP], &length, &frame[34..]]) == 0
    }

    #[test]
    fn a_large_segment_becomes_segments_with_the_same_bytes() {
        let (frame, offload) = large(4000, tcp::ACK | tcp::FIN | tcp::PSH | tcp::CWR);
        let offload = checked(&frame, offload).unwrap();
        assert_eq!(largest_packet(&frame, offload), 1500);
        let mut wire = Wire(Vec::new());
        whole(&frame, offload, &mut wire).unwrap();
        let frames: Vec<Vec<u8>> = wire.0.into_iter().map(|(f, _)| f).collect();
        assert_eq!(frames.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 54 + 1080]);
        let mut bytes = Vec::new();
        for (n, f) in frames.iter().enumerate() {
            let packet = ipv4::parse(&f[14..]).unwrap();
            let segment = tcp::parse(packet.payload).unwrap();
            assert!(is_summed(f));
            assert_eq!(segment.seq, Wrapping(0xffff_fff0) + Wrapping(1460 * u32::try_from(n).unwrap()));
            assert_eq!(segment.has(tcp::FIN), n == 2);
            assert_eq!(segment.has(tcp::CWR), n == 0);
            bytes.extend_from_slice(&f[54..]);
        }
        assert_eq!(bytes, frame[54..]);
    }

    #[test]
    fn a_partial_checksum_is_finished() {
        let (frame, offload) = large(101, tcp::ACK);
        let offload = checked(&frame, Offload { segments: None, ..offload }).unwrap();
        let mut wire = Wire(Vec::new());
        whole(&frame, offload, &mut wire).unwrap();
        assert!(is_summed(&wire.0[0].0));
        assert!(!is_summed(&frame));
    }

    #[test]
    fn without_a_header_the_frame_itself_says_what_is_left_to_do() {
        let (frame, _) = large(4000, tcp::ACK);
        let offload = implied(&frame, 1500);
        assert_eq!(checked(&frame, offload), Ok(offload));
        assert_eq!(largest_packet(&frame, offload), 1500);
        let mut wire = Wire(Vec::new());
        whole(&frame, offload, &mut wire).unwrap();
        assert!(wire.0.len() == 3 && wire.0.iter().all(|(f, _)| is_summed(f)));
        let small = large(100, tcp::ACK).0;
        let mut wire = Wire(Vec::new());
        for _ in 0..2 {
            // A sum that is there already is made anew, and comes out the same.
            let frame = wire.0.pop().map_or(small.clone(), |(f, _)| f);
            whole(&frame, implied(&frame, 1500), &mut wire).unwrap();
            assert!(is_summed(&wire.0[0].0));
        }
        assert_eq!(implied(&[0; 60], 1500), Offload::default());
    }

    #[test]
    fn claims_that_do_not_fit_the_frame_are_refused() {
        let (frame, good) = large(4000, tcp::ACK);
        let with = |kind, size| Some(Segments { kind, size, headers: 54 });
        let at = |start, offset| Some(PartialChecksum { start, offset });
        for bad in [
            Offload { checksum: at(33, 16), ..good },
            Offload { checksum: at(34, 6), ..good },
            Offload { checksum: at(0xffff, 0xffff), ..good },
            Offload { checksum: None, ..good },
            Offload { segments: with(SegmentKind::Tcp6, 1460), ..good },
            Offload { segments: with(SegmentKind::Udp, 1460), ..good },
            Offload { segments: with(SegmentKind::Tcp4, 0), ..good },
        ] {
            assert_eq!(checked(&frame, bad), Err(DropReason::BadOffload), "{bad:?}");
        }
        for cut in 0..54 {
            assert_eq!(checked(&frame[..cut], good), Err(DropReason::BadOffload));
        }
        assert_eq!(checked(&[0; 60], Offload::default()), Ok(Offload::default()));
    }
}
