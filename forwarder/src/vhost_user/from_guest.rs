//! What a guest sends: the chains of a ring that it fills, each copied whole before anybody looks at it.
//!
//! ```text
//! descriptors, in any layout ─► copied into one scratch buffer ─► the device's own parser
//! ```
//! A chain that is no packet (endless, outside of memory, too large, for the other direction, or not what its device takes)
//! goes back to the guest and is counted.

use super::{BadChain, BadRing, Memory, Ring};

/// Bytes after which a batch ends.
const BYTES: usize = 512 * 1024;
/// Descriptors after which a batch ends.
const DESCRIPTORS: u32 = 8 * 1024;
/// A batch of as many bytes belongs to a bulk transfer.
const BULK: usize = 16 * 1024;

/// What is kept between batches.
#[derive(Debug)]
pub(crate) struct FromGuest {
    scratch: Box<[u8]>,
    /// Chains that were no packet.
    pub(crate) dropped: u64,
}

/// What a device makes of one packet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// How much it brought, in bytes.
    pub(crate) bytes: usize,
    /// Whether the device takes a further one now.
    pub(crate) goes_on: bool,
}

/// What one batch was.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moved {
    /// Chains that went back to the guest.
    pub(crate) chains: usize,
    /// Whether there may be more now; if not, the guest kicks when there is.
    pub(crate) more: bool,
}

impl FromGuest {
    /// Of packets with `largest` bytes at most.
    pub(crate) fn new(largest: usize) -> Self {
        Self { scratch: vec![0; largest].into(), dropped: 0 }
    }

    /// Hands one batch of `most` packets at most to `take`, which answers `None` to what is no packet.
    ///
    /// # Errors
    /// When the ring is beyond use.
    pub(crate) fn receive(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        most: usize,
        mut take: impl FnMut(&[u8]) -> Option<Taken>,
    ) -> Result<Moved, BadRing> {
        let (mut chains, mut bytes, mut descriptors) = (0, 0, 0);
        ring.disarm()?;
        let more = loop {
            if chains == most || bytes >= BYTES || descriptors >= DESCRIPTORS {
                break true;
            }
            let Some(head) = ring.take()? else {
                // In the midst of a bulk transfer more has come by the time this batch is dealt with: worth a look
                // before the guest is asked for a kick, which costs it much.
                if bytes >= BULK {
                    break true;
                }
                if !ring.arm()? {
                    break false;
                }
                continue;
            };
            chains += 1;
            let mut goes_on = true;
            let copied = self.copy(ring, memory, head, &mut descriptors);
            match copied.map(|len| self.scratch.get(..len).and_then(&mut take)) {
                Ok(Some(taken)) => {
                    bytes += taken.bytes;
                    goes_on = taken.goes_on;
                }
                Ok(None) => self.dropped += 1,
                Err(error) => {
                    tracing::debug!(%error, "no packet in a chain of the guest's");
                    self.dropped += 1;
                }
            }
            ring.put_used(head, 0)?;
            if !goes_on {
                break true;
            }
        };
        ring.ready = more;
        Ok(Moved { chains, more })
    }

    /// Copies a chain; says how many bytes it has.
    fn copy(
        &mut self,
        ring: &Ring,
        memory: &Memory,
        head: u16,
        descriptors: &mut u32,
    ) -> Result<usize, BadChain> {
        let mut filled = 0;
        ring.walk(memory, head, |buffer| {
            *descriptors += 1;
            if buffer.writable {
                return Err(BadChain::Direction);
            }
            let room = self.scratch.get_mut(filled..).and_then(|s| s.get_mut(..buffer.len as usize));
            let room = room.ok_or(BadChain::Size)?;
            memory.read(buffer.address, room)?;
            filled += room.len();
            Ok(())
        })?;
        Ok(filled)
    }
}
