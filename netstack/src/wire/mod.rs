//! Headers of the hot path, parsed by hand: total, without allocation, a few nanoseconds each.
//!
//! Everything that is not on the path of every packet is left to `etherparse` and `dhcproto`. Checksums of TCP and
//! UDP are not verified on the way in: the link is memory of this machine, and a guest with checksum offload
//! (libkrun) sends no more of it than the pseudo-header sum. IPv4's header checksum is.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::indexing_slicing))]

pub mod arp;
pub mod ethernet;
pub mod ipv4;
pub mod ipv6;
pub mod labels;
pub mod tcp;
pub mod udp;

/// The Internet checksum (RFC 1071) over `parts`, each but the last of even length, ready to be stored.
///
/// The sum does not depend on the byte order it is made in (RFC 1071 §2 B): words are added as they lie in memory, which
/// compilers turn into vector instructions, and the result is turned round once.
#[must_use]
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        let (words, rest) = part.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        sum += u64::from(u32::from_ne_bytes(last));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop above leaves 16 bits.
    !u16::from_be(u16::try_from(sum).unwrap_or(0))
}

/// What an IP packet carries, IPv6's extension headers not looked at; nothing when it is none.
#[must_use]
pub fn transport(packet: &[u8]) -> &[u8] {
    let header = match packet.first() {
        Some(first) if first >> 4 == 4 => usize::from(first & 0x0f) * 4,
        Some(first) if first >> 4 == 6 => 40,
        _ => return &[],
    };
    packet.get(header..).unwrap_or_default()
}

/// Writes the sum of the pseudo-header (RFC 9293 §3.1, RFC 768, RFC 8200 §8.1), and nothing else, into the checksum
/// field of the segment in `packet`: its IP header has `header` bytes, the field is `offset` bytes behind it. It is what
/// virtio asks for where the checksum is left to the link.
pub fn partial_checksum(packet: &mut [u8], header: usize, protocol: u8, offset: usize) {
    let Some((ip, segment)) = packet.split_at_mut_checked(header) else { return };
    let length = u32::try_from(segment.len()).unwrap_or(0).to_be_bytes();
    let addresses = match ip.first().map(|b| b >> 4) {
        Some(4) => ip.get(12..20),
        Some(6) => ip.get(8..40),
        _ => None,
    };
    let field = segment.get_mut(offset..).and_then(|f| f.first_chunk_mut());
    let (Some(addresses), Some(field)) = (addresses, field) else { return };
    // `checksum` complements; the field holds the sum itself.
    *field = (!checksum(&[addresses, &[0, 0, 0, protocol], &length])).to_be_bytes();
}

/// Where UDP has its checksum (RFC 768), in bytes.
const UDP_FIELD: usize = 6;

/// Finishes a partial checksum: sums `bytes` from `start`, the pseudo-header's sum in the field included, and stores
/// the result `offset` bytes behind `start` (virtio 1.2, §5.1.6.2). A field outside of `bytes` is left alone.
pub fn finish_checksum(bytes: &mut [u8], start: usize, offset: usize) {
    let Some(covered) = bytes.get_mut(start..) else { return };
    let sum = match checksum(&[covered]) {
        // In UDP's field zero means that there is none (RFC 768).
        0 if offset == UDP_FIELD => 0xffff,
        sum => sum,
    };
    if let Some(field) = covered.get_mut(offset..).and_then(|f| f.first_chunk_mut()) {
        *field = sum.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_rfc_1071s_example() {
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
    }

    #[test]
    fn an_odd_last_byte_counts_as_the_high_half_of_a_word() {
        assert_eq!(checksum(&[&[0x12, 0x34, 0x56]]), !(0x1234 + 0x5600));
    }
}
