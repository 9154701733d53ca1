//! Ring memory that every run uses again.
//!
//! A `Netstack` keeps its rings for ever; millions of them in one process would eat all memory. A run is over when the
//! fuzz target returns, and its `Netstack` with it: the next run may have the same bytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use portway_netstack::{RingClass, RingMemory, Rings};

/// Bytes of all rings of one run.
const SIZE: usize = 96 << 20;

static BASE: AtomicUsize = AtomicUsize::new(0);

/// The rings of one run. There must be only one at a time, and nothing it gave may outlive the run.
pub struct Arena {
    used: usize,
    count: u32,
}

impl Arena {
    pub fn for_this_run() -> Box<Self> {
        if BASE.load(Ordering::Relaxed) == 0 {
            let memory = Box::leak(vec![0u8; SIZE].into_boxed_slice());
            BASE.store(memory.as_mut_ptr().expose_provenance(), Ordering::Relaxed);
        }
        Box::new(Self { used: 0, count: 0 })
    }

    fn ring(&mut self, len: usize) -> Option<&'static mut [u8]> {
        let at = self.used;
        self.used = at.checked_add(len).filter(|end| *end <= SIZE)?;
        let base = std::ptr::with_exposed_provenance_mut::<u8>(BASE.load(Ordering::Relaxed));
        // SAFETY: the range lies in the leaked allocation, no other ring of this run overlaps it, and the rings of the run
        // before are gone with its `Netstack` (libFuzzer runs one input at a time, in one thread).
        Some(unsafe { std::slice::from_raw_parts_mut(base.add(at), len) })
    }
}

impl RingMemory for Arena {
    fn take(&mut self, class: RingClass) -> Option<Rings> {
        let (to_host, to_guest) = class.sizes();
        self.count += 1;
        Some(Rings { id: self.count, to_host: self.ring(to_host)?, to_guest: self.ring(to_guest)? })
    }

    fn discard(&mut self, _: u32) {}
}
