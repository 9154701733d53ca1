//! The virtio-net header (virtio 1.2, §5.1.6): what links with offload carry before each frame.
//!
//! Always the 12-byte form with `num_buffers`, little-endian: vhost-user with `VIRTIO_F_VERSION_1`, and tap devices
//! told so by `TUNSETVNETHDRSZ` and `TUNSETVNETLE`. From a guest every field is only a claim: what does not fit is
//! `None`, and what fits is checked again by the stack against the frame.

use portway_netstack::{Offload, PartialChecksum, SegmentKind, Segments};

/// Bytes of a header.
pub const LEN: usize = 12;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, a bit beside the kind: it says only that CWR may be set.
const GSO_ECN: u8 = 0x80;

/// What a header says. `None` for a kind of segmentation nobody negotiated, or a segment size of 0.
#[must_use]
pub fn parse(header: [u8; LEN]) -> Option<Offload> {
    let [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
    let checksum = (flags & NEEDS_CSUM != 0).then_some(PartialChecksum {
        start: u16::from_le_bytes([c0, c1]),
        offset: u16::from_le_bytes([o0, o1]),
    });
    let kind = match kind & !GSO_ECN {
        0 => return Some(Offload { checksum, segments: None }),
        GSO_TCPV4 => SegmentKind::Tcp4,
        GSO_TCPV6 => SegmentKind::Tcp6,
        GSO_UDP_L4 => SegmentKind::Udp,
        _ => return None,
    };
    let size = u16::from_le_bytes([s0, s1]);
    let segments = Segments { kind, size, headers: u16::from_le_bytes([h0, h1]) };
    (size != 0).then_some(Offload { checksum, segments: Some(segments) })
}

/// The header of a frame that needs one descriptor chain.
#[must_use]
pub fn bytes(offload: Offload) -> [u8; LEN] {
    let mut header = [0; LEN];
    if let Some(checksum) = offload.checksum {
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&checksum.start.to_le_bytes());
        header[8..10].copy_from_slice(&checksum.offset.to_le_bytes());
    }
    if let Some(segments) = offload.segments {
        header[1] = match segments.kind {
            SegmentKind::Tcp4 => GSO_TCPV4,
            SegmentKind::Tcp6 => GSO_TCPV6,
            SegmentKind::Udp => GSO_UDP_L4,
        };
        header[2..4].copy_from_slice(&segments.headers.to_le_bytes());
        header[4..6].copy_from_slice(&segments.size.to_le_bytes());
    }
    header[10] = 1;
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_write_we_read() {
        let checksum = Some(PartialChecksum { start: 34, offset: 16 });
        for offload in [
            Offload::default(),
            Offload { checksum, segments: None },
            Offload {
                checksum,
                segments: Some(Segments { kind: SegmentKind::Tcp6, size: 1440, headers: 74 }),
            },
        ] {
            assert_eq!(parse(bytes(offload)), Some(offload));
        }
    }

    #[test]
    fn segments_of_an_unknown_kind_or_of_no_size_are_refused() {
        for (kind, size) in [(3, 1460), (2, 1460), (GSO_TCPV4, 0)] {
            let mut header = [0; LEN];
            header[1] = kind;
            header[4..6].copy_from_slice(&u16::to_le_bytes(size));
            assert_eq!(parse(header), None);
        }
    }
}
