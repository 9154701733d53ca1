//! One split virtqueue in the guest's memory (virtio 1.2, §2.7).
//!
//! Chains are walked by `virtio-queue`, which bounds them (a loop ends after as many descriptors as the ring has). Used
//! entries are ours: those of one frame become visible together, for a driver that finds three of five mergeable buffers
//! drops the frame.

use std::fs::File;
use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::control::{Registers, feature};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// A ring that runs.
pub(super) struct Ring {
    queue: Queue,
    memory: GuestMemoryMmap,
    call: Option<Arc<File>>,
    event_idx: bool,
    /// The next used entry to write.
    next_used: Wrapping<u16>,
    /// What the guest can see of that.
    published: Wrapping<u16>,
    /// Where `published` was when the guest was last asked whether it wants to know.
    asked: Wrapping<u16>,
    /// Where it was when the guest was last told.
    told: Wrapping<u16>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("size", &self.queue.size())
            .field("next_available", &self.queue.next_avail())
            .field("available", &self.queue.avail_idx(&self.memory, Ordering::Acquire).ok())
            .field("next_used", &self.next_used)
            .field("published", &self.published)
            .field("used_event", &self.used_event().ok())
            .finish_non_exhaustive()
    }
}

fn broken(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the guest's ring is broken: {what}"))
}

impl Ring {
    /// The ring that `registers` describe; `None` while it does not run.
    ///
    /// # Errors
    /// When it does not lie in the guest's memory.
    pub(super) fn new(
        registers: &Registers,
        memory: Option<&GuestMemoryMmap>,
        features: u64,
    ) -> io::Result<Option<Self>> {
        let (Some(memory), Some([descriptors, available, used])) = (memory, registers.addresses) else {
            return Ok(None);
        };
        if !registers.started || !registers.enabled || registers.size == 0 {
            return Ok(None);
        }
        let mut queue = Queue::new(registers.size).map_err(broken)?;
        queue.try_set_size(registers.size).map_err(broken)?;
        queue.try_set_desc_table_address(GuestAddress(descriptors)).map_err(broken)?;
        queue.try_set_avail_ring_address(GuestAddress(available)).map_err(broken)?;
        queue.try_set_used_ring_address(GuestAddress(used)).map_err(broken)?;
        let event_idx = features & feature::EVENT_IDX != 0;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(registers.base);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(broken("it does not lie in the guest's memory"));
        }
        let used = queue.used_idx(memory, Ordering::Acquire).map_err(broken)?;
        Ok(Some(Self {
            queue,
            memory: memory.clone(),
            call: registers.call.clone(),
            event_idx,
            next_used: used,
            published: used,
            asked: used,
            told: used,
        }))
    }

    pub(super) fn size(&self) -> usize {
        self.queue.size().into()
    }

    pub(super) const fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The next available entry that was not taken yet.
    pub(super) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// The next chain the guest made available.
    ///
    /// # Errors
    /// When the guest claims more entries than the ring has.
    pub(super) fn pop(&mut self) -> io::Result<Option<DescriptorChain<&GuestMemoryMmap>>> {
        let mut available = self.queue.iter(&self.memory).map_err(broken)?;
        Ok(available.next())
    }

    /// Gives a chain back, of which `len` bytes were written; visible with the next [`Self::publish`].
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub(super) fn put(&mut self, head: u16, len: u32) -> io::Result<()> {
        let entry = u64::from(self.next_used.0 % self.queue.size());
        let at = GuestAddress(self.queue.used_ring())
            .checked_add(4 + 8 * entry)
            .ok_or_else(|| broken("used ring"))?;
        let (head, len) = (u32::from(head).to_le_bytes(), len.to_le_bytes());
        let element = [head[0], head[1], head[2], head[3], len[0], len[1], len[2], len[3]];
        self.memory.write_slice(&element, at).map_err(broken)?;
        self.next_used += 1;
        Ok(())
    }

    /// Whether the guest made more available than was taken.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub(super) fn has_available(&self) -> io::Result<bool> {
        let index = self.queue.avail_idx(&self.memory, Ordering::Acquire).map_err(broken)?;
        Ok(index.0 != self.queue.next_avail())
    }

    /// Tells the guest of what is published once more, if it still waits for that. True when it did.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub(super) fn remind(&mut self) -> io::Result<bool> {
        let waits = match self.used_event()? {
            // It waits for an entry that it could have had since the last time it was told.
            Some(event) => {
                self.told != self.published
                    && self.published - event - Wrapping(1) < self.published - self.told
            }
            None => false,
        };
        if waits {
            self.tell();
        }
        Ok(waits)
    }

    fn tell(&mut self) {
        self.told = self.published;
        if let Some(call) = &self.call {
            // A full counter (EAGAIN) has the guest woken already.
            let _ = nix::unistd::write(call, &1u64.to_ne_bytes());
        }
    }

    /// Makes what was put visible, and tells the guest if it wants to know. False: there was nothing.
    ///
    /// # Errors
    /// When the ring cannot be read or written.
    pub(super) fn publish(&mut self) -> io::Result<bool> {
        if self.published == self.next_used {
            return Ok(false);
        }
        self.published = self.next_used;
        let index = GuestAddress(self.queue.used_ring()).unchecked_add(2);
        self.memory.store(self.published.0.to_le(), index, Ordering::Release).map_err(broken)?;
        // What the guest wants is read after it can see the entries (virtio 1.2, §2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = match self.used_event()? {
            Some(event) => self.published - event - Wrapping(1) < self.published - self.asked,
            None => self.load(0)? & NO_INTERRUPT == 0,
        };
        self.asked = self.published;
        if wanted {
            self.tell();
        }
        Ok(true)
    }

    /// A u16 of the available ring, `offset` bytes behind its start.
    fn load(&self, offset: u64) -> io::Result<u16> {
        let at = GuestAddress(self.queue.avail_ring()).unchecked_add(offset);
        self.memory.load(at, Ordering::Relaxed).map(u16::from_le).map_err(broken)
    }

    /// The used entry after which the guest wants to be told, with `EVENT_IDX`.
    fn used_event(&self) -> io::Result<Option<Wrapping<u16>>> {
        if !self.event_idx {
            return Ok(None);
        }
        self.load(4 + 2 * u64::from(self.queue.size())).map(|event| Some(Wrapping(event)))
    }

    /// Asks the guest to tell when it makes more available. True when it already has.
    ///
    /// # Errors
    /// When the ring cannot be read or written.
    pub(super) fn listen(&mut self) -> io::Result<bool> {
        self.queue.enable_notification(&self.memory).map_err(broken)
    }

    /// Has the guest not tell of more for now.
    ///
    /// # Errors
    /// When the ring cannot be written.
    pub(super) fn ignore(&mut self) -> io::Result<()> {
        self.queue.disable_notification(&self.memory).map_err(broken)
    }
}
