//! Frames to the guest: its receive ring, queue 0.
//!
//! ```text
//! the stack ─► one scratch buffer: header, frame ─► scattered over the buffers the guest has posted
//! ```
//! Chains are taken, walked and checked before they are needed, so that [`ToGuest::has_room`] is exact and a frame is
//! never half written: what is taken is a copy of the descriptors, and the guest cannot change it any more. With
//! mergeable buffers a frame spreads over several chains, else it has to fit the first.

use std::collections::VecDeque;

use portway_netstack::Offload;

use super::{HEADER, LARGEST};
use crate::link::vnet;
use crate::vhost_user::{BadChain, BadRing, Buffer, Memory, Ring};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// What the guest's driver has asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shape {
    /// Bytes of the header.
    pub(super) header: usize,
    /// The most bytes of a frame that the stack may send.
    pub(super) largest: usize,
    /// Whether a frame may spread over several chains.
    pub(super) mergeable: bool,
}

/// The chains taken, and the numbers.
#[derive(Debug, Default)]
pub(super) struct ToGuest {
    scratch: Box<[u8]>,
    chains: VecDeque<Chain>,
    buffers: VecDeque<Buffer>,
    /// The chains of one frame.
    spread: Vec<(u16, u32)>,
    /// Bytes in all chains taken.
    capacity: usize,
    /// Descriptors of the ring in all chains taken.
    slots: usize,
    pub(super) frames: u64,
    pub(super) bytes: u64,
    /// Frames that did not fit, and chains that could take none.
    pub(super) dropped: u64,
}

#[derive(Debug, Clone, Copy)]
struct Chain {
    head: u16,
    buffers: usize,
    slots: usize,
    /// Bytes it takes; 0 when it is to go back as it is.
    capacity: usize,
}

impl ToGuest {
    pub(super) fn new() -> Self {
        Self { scratch: vec![0; HEADER + LARGEST].into(), ..Self::default() }
    }

    /// Chains taken and not used.
    pub(super) fn taken(&self) -> u16 {
        u16::try_from(self.chains.len()).unwrap_or(u16::MAX)
    }

    /// Forgets the chains taken.
    pub(super) fn clear(&mut self) {
        self.chains.clear();
        self.buffers.clear();
        (self.capacity, self.slots) = (0, 0);
    }

    /// Whether the largest frame fits, or all that the guest can ever post is there.
    ///
    /// The latter keeps a small ring, or small buffers, from blocking all frames for the sake of the largest.
    pub(super) fn has_room(&self, ring: &Ring, shape: Shape) -> bool {
        if !shape.mergeable {
            return self.capacity > 0;
        }
        self.capacity >= shape.header + shape.largest
            || (self.capacity > 0 && self.slots >= usize::from(ring.size - ring.size / 4))
    }

    /// Takes chains until the largest frame fits. False when the guest has to post more.
    pub(super) fn refill(&mut self, ring: &mut Ring, memory: &Memory, shape: Shape) -> Result<bool, BadRing> {
        for _ in 0..=ring.size {
            if self.has_room(ring, shape) {
                return Ok(true);
            }
            let Some(head) = ring.take()? else { return Ok(false) };
            self.keep(ring, memory, head)?;
        }
        // More than a ring holds: what was posted went back at once, and was posted again.
        Err(BadRing::Useless)
    }

    /// Walks one chain and keeps what it has.
    fn keep(&mut self, ring: &mut Ring, memory: &Memory, head: u16) -> Result<(), BadRing> {
        let (before, mut capacity) = (self.buffers.len(), 0usize);
        let walked = ring.walk(memory, head, |buffer| {
            if !buffer.writable {
                return Err(BadChain::Direction);
            }
            // Beyond the largest frame nothing is written, and what is not written need not be there.
            let useful = (buffer.len as usize).min((HEADER + LARGEST).saturating_sub(capacity));
            if useful > 0 {
                if !memory.has(buffer.address, useful) {
                    return Err(BadChain::Size);
                }
                let len = u32::try_from(useful).unwrap_or(u32::MAX);
                self.buffers.push_back(Buffer { len, ..buffer });
                capacity += useful;
            }
            Ok(())
        });
        // num_buffers has to lie in the first chain.
        let walked = walked.and_then(|slots| if capacity < HEADER { Err(BadChain::Size) } else { Ok(slots) });
        if let Err(error) = walked {
            tracing::debug!(%error, "no room in a chain of the guest's");
            self.buffers.truncate(before);
            self.dropped += 1;
            capacity = 0;
        }
        let slots = walked.unwrap_or(1);
        self.chains.push_back(Chain { head, buffers: self.buffers.len() - before, slots, capacity });
        self.capacity += capacity;
        self.slots += slots;
        // A bad chain nobody waits behind goes back at once, else in its turn.
        while self.chains.front().is_some_and(|c| c.capacity == 0) {
            let Some(chain) = self.chains.pop_front() else { break };
            self.slots -= chain.slots;
            ring.put_used(chain.head, 0)?;
        }
        Ok(())
    }

    /// Whether `total` bytes fit what is taken.
    fn fits(&self, total: usize, shape: Shape) -> bool {
        if shape.mergeable {
            self.capacity >= total
        } else {
            self.chains.front().is_some_and(|c| c.capacity >= total)
        }
    }

    /// Lets `fill` write a frame, and spreads it over the guest's buffers. `None` when it does not fit.
    pub(super) fn frame<R>(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        shape: Shape,
        (len, offload): (usize, Offload),
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<Option<R>, BadRing> {
        let total = shape.header.saturating_add(len);
        if total > self.scratch.len() || !self.fits(total, shape) {
            self.dropped += 1;
            return Ok(None);
        }
        let Some(room) = self.scratch.get_mut(shape.header..total) else { return Ok(None) };
        let result = fill(room);
        if let (Some(to), Some(from)) =
            (self.scratch.get_mut(..shape.header), vnet::bytes(offload).get(..shape.header))
        {
            to.copy_from_slice(from);
        }
        self.spread.clear();
        let (mut chains, mut sum) = (0u16, 0);
        for chain in &self.chains {
            if sum >= total {
                break;
            }
            sum += chain.capacity;
            chains += u16::from(chain.capacity > 0);
        }
        if shape.mergeable
            && let Some(field) = self.scratch.get_mut(NUM_BUFFERS)
        {
            field.copy_from_slice(&chains.to_le_bytes());
        }
        let mut written = 0;
        while written < total {
            let Some(chain) = self.chains.pop_front() else { break };
            self.capacity -= chain.capacity;
            self.slots -= chain.slots;
            let before = written;
            for _ in 0..chain.buffers {
                let Some(buffer) = self.buffers.pop_front() else { break };
                let end = total.min(written + buffer.len as usize);
                if let Some(bytes) = self.scratch.get(written..end)
                    && !bytes.is_empty()
                {
                    // Checked when it was taken, and memory has not changed since.
                    memory.write(buffer.address, bytes)?;
                }
                written = end;
            }
            if chain.capacity == 0 {
                ring.put_used(chain.head, 0)?;
            } else {
                self.spread.push((chain.head, u32::try_from(written - before).unwrap_or(0)));
            }
        }
        for (head, len) in &self.spread {
            ring.put_used(*head, *len)?;
        }
        self.frames += 1;
        self.bytes += len as u64;
        Ok(Some(result))
    }
}
