//! One split ring (virtio 1.2, §2.7): what the guest offers, what we have used, and who tells whom.
//!
//! Our own, and not `virtio-queue`'s, for three reasons. The buffers of one frame have to become visible to the guest
//! together (§5.1.6.4), so used entries are written first and published once. A chain that loops or leaves memory
//! has to be told from one that ends. And a guest without `EVENT_IDX` may still ask for silence by a flag.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{Ordering, fence};

use super::memory::{Area, Memory, Outside};

/// Most entries of a ring (virtio 1.2, §2.7).
pub(crate) const MOST: u16 = 32_768;
/// Most descriptors of a chain in a table of its own. Linux uses 19; QEMU takes as many for its own devices.
const MOST_INDIRECT: u32 = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` and `VIRTQ_USED_F_NO_NOTIFY`.
const SILENCE: u16 = 1;

/// What makes a ring useless; it is the guest's doing and ends the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRing {
    #[error("the guest offers {offered} chains on a ring of {size}")]
    Index { offered: u16, size: u16 },
    #[error("the guest offers descriptor {head} on a ring of {size}")]
    Head { head: u16, size: u16 },
    #[error("a ring lies outside of the guest's memory")]
    Memory,
    #[error("the guest posts nothing but chains that take no frame")]
    Useless,
}

impl From<Outside> for BadRing {
    fn from(_: Outside) -> Self {
        Self::Memory
    }
}

/// What is wrong with one chain; it goes back to the guest unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadChain {
    #[error("a chain of descriptors has no end")]
    Endless,
    #[error("a descriptor outside of its table")]
    Index,
    #[error("a table of descriptors inside of another, or of a wrong length")]
    Table,
    #[error("a descriptor for the wrong direction")]
    Direction,
    #[error("a chain too small or too large for a frame")]
    Size,
    #[error(transparent)]
    Outside(#[from] Outside),
}

/// A piece of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    /// Whether it is for us to write.
    pub(crate) writable: bool,
}

/// Where the front end says the three parts of a ring are, as addresses of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

/// A ring as the front end describes it, and the place in it.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) addresses: Option<Addresses>,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<File>,
    pub(crate) call: Option<File>,
    /// The next entry of the available ring to take.
    pub(crate) next: u16,
    /// Where it was when the ring stopped.
    pub(crate) stopped_at: Option<u16>,
    /// The guest may have offered something.
    pub(crate) ready: bool,
    event_idx: bool,
    parts: Option<Parts>,
    /// The guest's index when last read.
    offered: u16,
    /// The next used entry to write.
    used: u16,
    /// The used index the guest sees.
    published: u16,
    /// The used index when the guest was last told, or would have been; `None` before the first time.
    told: Option<u16>,
    /// The used index when the guest was last told indeed.
    rung: u16,
    /// Whether the guest has been asked to say when it offers more.
    armed: bool,
}

#[derive(Debug)]
struct Parts {
    descriptors: Area,
    avail: Area,
    used: Area,
}

impl Ring {
    /// Whether everything is there that a ring needs to run.
    pub(crate) const fn may_run(&self) -> bool {
        self.enabled && self.kick.is_some() && self.addresses.is_some() && self.size > 0
    }

    /// Whether the ring runs.
    pub(crate) const fn runs(&self) -> bool {
        self.parts.is_some()
    }

    /// Finds the ring in memory and begins where the front end said.
    pub(crate) fn start(&mut self, memory: &Memory, event_idx: bool) -> io::Result<()> {
        let at = self.addresses.ok_or_else(|| io::Error::other("a ring without addresses"))?;
        let size = u64::from(self.size);
        let parts = (|| {
            let descriptors = memory.area(at.descriptors, 16 * size)?;
            let avail = memory.area(at.avail, 6 + 2 * size)?;
            let used = memory.area(at.used, 6 + 8 * size)?;
            // §2.7: 16, 2 and 4; the first is nothing we rely on.
            (avail.is_aligned(2) && used.is_aligned(2)).then_some(Parts { descriptors, avail, used })
        })();
        let parts = parts.ok_or_else(|| io::Error::other(BadRing::Memory))?;
        // What was used before is written there, by us or by who served the ring before us.
        let used = parts.used.load(2).map_err(io::Error::other)?;
        (self.used, self.published, self.offered, self.told) = (used, used, self.next, None);
        self.rung = used;
        (self.event_idx, self.armed, self.ready) = (event_idx, true, true);
        self.parts = Some(parts);
        Ok(())
    }

    /// Lets go of the memory. The `taken` chains that were not used yet are taken again after a start.
    pub(crate) fn stop(&mut self, taken: u16) {
        if self.parts.take().is_some() {
            self.next = self.next.wrapping_sub(taken);
            self.stopped_at = Some(self.next);
        }
        self.ready = false;
    }

    fn parts(&self) -> Result<&Parts, BadRing> {
        self.parts.as_ref().ok_or(BadRing::Memory)
    }

    /// The head of the next chain, if one is offered.
    pub(crate) fn take(&mut self) -> Result<Option<u16>, BadRing> {
        if self.next == self.offered && !self.look()? {
            return Ok(None);
        }
        let slot = u64::from(self.next % self.size);
        let head = u16::from_le_bytes(self.parts()?.avail.read(4 + 2 * slot)?);
        if head >= self.size {
            return Err(BadRing::Head { head, size: self.size });
        }
        self.next = self.next.wrapping_add(1);
        Ok(Some(head))
    }

    /// Whether a chain is offered.
    pub(crate) fn look(&mut self) -> Result<bool, BadRing> {
        self.offered = self.parts()?.avail.load(2)?;
        let offered = self.offered.wrapping_sub(self.next);
        if offered > self.size {
            return Err(BadRing::Index { offered, size: self.size });
        }
        Ok(offered > 0)
    }

    /// Hands every buffer of the chain at `head` to `each`, and says how many descriptors of the ring it has.
    ///
    /// Chains end: no more than the table's size are followed, whatever they say.
    pub(crate) fn walk(
        &self,
        memory: &Memory,
        head: u16,
        mut each: impl FnMut(Buffer) -> Result<(), BadChain>,
    ) -> Result<usize, BadChain> {
        let parts = self.parts.as_ref().ok_or(BadChain::Index)?;
        let mut table: Option<u64> = None;
        let mut slots = 0;
        let (mut entries, mut left, mut index) = (u32::from(self.size), u32::from(self.size), head);
        loop {
            if u32::from(index) >= entries {
                return Err(BadChain::Index);
            }
            left = left.checked_sub(1).ok_or(BadChain::Endless)?;
            slots += usize::from(table.is_none());
            let offset = 16 * u64::from(index);
            let bytes: [u8; 16] = match table {
                None => parts.descriptors.read(offset)?,
                Some(start) => {
                    let mut bytes = [0; 16];
                    memory.read(start.checked_add(offset).ok_or(Outside)?, &mut bytes)?;
                    bytes
                }
            };
            let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
            let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            let len = u32::from_le_bytes([l0, l1, l2, l3]);
            let flags = u16::from_le_bytes([f0, f1]);
            if flags & INDIRECT != 0 {
                // §2.7.5.3: never in a table, never with a next one, and of whole descriptors.
                if table.is_some() || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) {
                    return Err(BadChain::Table);
                }
                (table, entries, index) = (Some(address), len / 16, 0);
                left = entries.min(MOST_INDIRECT);
                continue;
            }
            each(Buffer { address, len, writable: flags & WRITE != 0 })?;
            if flags & NEXT == 0 {
                return Ok(slots);
            }
            index = u16::from_le_bytes([n0, n1]);
        }
    }

    /// Writes a used entry; the guest sees it after [`Self::publish`].
    pub(crate) fn put_used(&mut self, head: u16, len: u32) -> Result<(), BadRing> {
        let slot = u64::from(self.used % self.size);
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&len.to_le_bytes());
        self.parts()?.used.write(4 + 8 * slot, &entry)?;
        self.used = self.used.wrapping_add(1);
        Ok(())
    }

    /// Shows the guest every used entry, and tells it when it wants to be told.
    ///
    /// False when there was nothing to show.
    pub(crate) fn publish(&mut self) -> io::Result<bool> {
        if self.parts.is_none() || self.used == self.published {
            return Ok(false);
        }
        if self.show().map_err(io::Error::other)? {
            self.tell()?;
        }
        Ok(true)
    }

    /// Tells the guest once more of what it could have had since it was last told, if it waits for that.
    pub(crate) fn remind(&mut self) -> io::Result<bool> {
        let waits = self.parts.is_some()
            && self.rung != self.published
            && self.wishes(self.rung).map_err(io::Error::other)?;
        if waits {
            self.tell()?;
        }
        Ok(waits)
    }

    /// Whether the guest wishes to be told of what was published since `before`.
    fn wishes(&self, before: u16) -> Result<bool, BadRing> {
        let avail = &self.parts()?.avail;
        if !self.event_idx {
            return Ok(avail.load(0)? & SILENCE == 0);
        }
        let event = avail.load(4 + 2 * u64::from(self.size))?;
        Ok(self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(before))
    }

    /// Moves the used index; says whether the guest wants to be told.
    fn show(&mut self) -> Result<bool, BadRing> {
        self.parts()?.used.store(2, self.used)?;
        self.published = self.used;
        // §2.7.10: the index is written before the guest's wish is read.
        fence(Ordering::SeqCst);
        match self.told.replace(self.used) {
            // Nobody knows what the guest has seen before.
            None if self.event_idx => Ok(true),
            before => self.wishes(before.unwrap_or_default()),
        }
    }

    fn tell(&mut self) -> io::Result<()> {
        self.rung = self.published;
        // Without a descriptor the front end looks for itself.
        let Some(call) = &mut self.call else { return Ok(()) };
        loop {
            match call.write(&1u64.to_ne_bytes()) {
                // An eventfd that would overflow has been readable for long.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(io::Error::new(e.kind(), format!("the guest cannot be notified: {e}"))),
            }
        }
    }

    /// Asks the guest to say when it offers more. True when it has meanwhile: nothing will be said about that.
    pub(crate) fn arm(&mut self) -> Result<bool, BadRing> {
        let parts = self.parts.as_ref().ok_or(BadRing::Memory)?;
        if self.event_idx {
            parts.used.store(4 + 8 * u64::from(self.size), self.next)?;
        } else if !self.armed {
            parts.used.store(0, 0)?;
        }
        self.armed = true;
        // §2.7.10: the wish is written before the guest's index is read.
        fence(Ordering::SeqCst);
        self.look()
    }

    /// Asks the guest for silence.
    pub(crate) fn disarm(&mut self) -> Result<(), BadRing> {
        // With EVENT_IDX the guest has said it once and is silent until asked again.
        if self.armed && !self.event_idx {
            self.parts()?.used.store(0, SILENCE)?;
        }
        self.armed = false;
        Ok(())
    }

    /// The guest may have offered something. The kick itself is never read: an edge of it is enough, and reading would be
    /// a system call more.
    pub(crate) const fn note_kick(&mut self) {
        self.ready = self.parts.is_some();
    }
}
