//! The memory of TCP rings: address space mapped once, pages given back when a flow is idle.
//!
//! `mmap` with `MAP_NORESERVE` costs nothing until bytes are written; a `vec![0; n]` per flow would cost a system
//! call, page faults and fragmentation (measured: 80 µs and 100 KB per flow instead of under 1 µs and under 1 KB).

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use portway_netstack::{RingClass, RingMemory, Rings};

/// Bytes mapped at a time.
#[cfg(not(miri))]
const CHUNK: usize = 256 << 20;
#[cfg(not(miri))]
const HOW: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);
// Miri has no address space to spare, and nothing to reserve.
#[cfg(miri)]
const CHUNK: usize = 16 << 20;
#[cfg(miri)]
const HOW: MapFlags = MapFlags::MAP_PRIVATE;

/// What the sandbox lets rings do, beside mapping memory.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![SYS_madvise];

/// Mapped ring memory; never unmapped, for rings are lent for ever.
#[derive(Debug, Default)]
pub struct MappedRings {
    chunk: Option<&'static mut [u8]>,
    pairs: Vec<(usize, usize)>,
}

impl MappedRings {
    /// No memory yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { chunk: None, pairs: Vec::new() }
    }
}

fn map(len: usize) -> Option<&'static mut [u8]> {
    let length = std::num::NonZeroUsize::new(len)?;
    // SAFETY: an anonymous mapping at an address the kernel chooses overlaps nothing.
    let at =
        unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, HOW) }.ok()?;
    // SAFETY: the mapping is `len` readable, writable, zeroed bytes, is never unmapped, and this is its only reference.
    Some(unsafe { std::slice::from_raw_parts_mut(at.as_ptr().cast(), len) })
}

impl RingMemory for MappedRings {
    fn take(&mut self, class: RingClass) -> Option<Rings> {
        let (to_host, to_guest) = class.sizes();
        let both = to_host + to_guest;
        let mut chunk = self.chunk.take().unwrap_or_default();
        if chunk.len() < both {
            chunk = map(CHUNK)?;
        }
        let (pair, rest) = chunk.split_at_mut(both);
        self.chunk = Some(rest);
        let id = u32::try_from(self.pairs.len()).ok()?;
        self.pairs.push((pair.as_mut_ptr().expose_provenance(), both));
        let (to_host, to_guest) = pair.split_at_mut(to_host);
        Some(Rings { id, to_host, to_guest })
    }

    fn discard(&mut self, id: u32) {
        let Some((start, len)) = self.pairs.get(id as usize).copied() else { return };
        let Some(at) = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(start)) else { return };
        // SAFETY: the range is one pair of a private anonymous mapping of ours, page-aligned because every class is a
        // multiple of the page size. MADV_DONTNEED turns its bytes into zeros, which are valid for [u8]; the socket that
        // holds the slices reads nothing it has not written since (RingMemory::discard's contract).
        let advised = unsafe { nix::sys::mman::madvise(at, len, nix::sys::mman::MmapAdvise::MADV_DONTNEED) };
        debug_assert!(advised.is_ok(), "madvise: {advised:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_apart_within_a_mapping_and_beyond_it() {
        let mut rings = MappedRings::new();
        let mut pairs = Vec::new();
        let mut bytes = 0;
        for class in RingClass::ALL.into_iter().cycle() {
            let pair = rings.take(class).unwrap();
            assert_eq!((pair.to_host.len(), pair.to_guest.len()), class.sizes());
            bytes += pair.to_host.len() + pair.to_guest.len();
            pairs.push(pair);
            // One more chunk than the first, at least.
            if bytes > CHUNK {
                break;
            }
        }
        let ends = |ring: &mut [u8], n: u8| (ring[0], *ring.last_mut().unwrap()) = (n, n);
        for (n, pair) in (1..=u8::MAX).cycle().zip(&mut pairs) {
            ends(pair.to_host, n);
            ends(pair.to_guest, !n);
        }
        for (n, pair) in (1..=u8::MAX).cycle().zip(&pairs) {
            assert_eq!([pair.to_host.first(), pair.to_host.last()], [Some(&n); 2]);
            assert_eq!([pair.to_guest.first(), pair.to_guest.last()], [Some(&!n); 2]);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "what madvise does is nothing Miri could look at")]
    fn a_discarded_ring_is_zero_and_can_be_written_again() {
        let mut rings = MappedRings::new();
        let pair = rings.take(RingClass::Small).unwrap();
        let other = rings.take(RingClass::Large).unwrap();
        pair.to_guest[5] = 7;
        other.to_host[0] = 9;
        rings.discard(pair.id);
        assert_eq!((pair.to_guest[5], other.to_host[0]), (0, 9));
        pair.to_guest[5] = 8;
        assert_eq!(pair.to_guest[5], 8);
    }

    #[test]
    fn every_class_is_whole_pages() {
        for class in RingClass::ALL {
            assert_eq!((class.sizes().0 % 65_536, class.sizes().1 % 65_536), (0, 0));
        }
    }
}
