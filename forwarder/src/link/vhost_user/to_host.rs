//! Frames from the guest: its transmit ring, queue 1.
//!
//! ```text
//! descriptors, in any layout ─► copied into one scratch buffer: header, frame ─► vnet::parse ─► the stack
//! ```
//! A chain that is no frame (endless, outside of memory, too small or large, for the other direction, an impossible
//! header) goes back to the guest and is counted.

use std::io;

use portway_netstack::Offload;

use super::{HEADER, LARGEST};
use crate::link::{Batch, vnet};
use crate::vhost_user::{BadChain, Memory, Ring};

/// Most frames of one batch.
const FRAMES: u64 = 64;
/// Bytes after which a batch ends.
const BYTES: u64 = 512 * 1024;
/// Descriptors after which a batch ends.
const DESCRIPTORS: u32 = 8 * 1024;
/// A batch of as many bytes belongs to a bulk transfer.
const BULK: u64 = 16 * 1024;

/// What is kept between batches.
#[derive(Debug, Default)]
pub(super) struct ToHost {
    scratch: Box<[u8]>,
    /// Chains that were no frame.
    pub(super) dropped: u64,
}

impl ToHost {
    pub(super) fn new() -> Self {
        Self { scratch: vec![0; HEADER + LARGEST].into(), dropped: 0 }
    }

    /// One batch of frames.
    pub(super) fn receive(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        header: usize,
        mut handle: impl FnMut(&[u8], Offload),
    ) -> io::Result<Batch> {
        let mut batch = Batch { more: false, frames: 0, bytes: 0 };
        let mut descriptors = 0;
        let mut taken = 0;
        ring.disarm().map_err(io::Error::other)?;
        loop {
            if taken == FRAMES || batch.bytes >= BYTES || descriptors >= DESCRIPTORS {
                batch.more = true;
                break;
            }
            let Some(head) = ring.take().map_err(io::Error::other)? else {
                // In the midst of a bulk transfer more has come by the time this batch is dealt with: worth a look
                // before the guest is asked for a kick, which costs it much.
                batch.more = batch.bytes >= BULK;
                if batch.more || !ring.arm().map_err(io::Error::other)? {
                    break;
                }
                continue;
            };
            taken += 1;
            match copy(&mut self.scratch, ring, memory, head, &mut descriptors) {
                Ok(bytes) => match split(&self.scratch, bytes, header) {
                    Some((frame, offload)) => {
                        batch.frames += 1;
                        batch.bytes += frame.len() as u64;
                        handle(frame, offload);
                    }
                    None => self.dropped += 1,
                },
                Err(error) => {
                    tracing::debug!(%error, "no frame in a chain of the guest's");
                    self.dropped += 1;
                }
            }
            ring.put_used(head, 0).map_err(io::Error::other)?;
        }
        ring.ready = batch.more;
        Ok(batch)
    }
}

/// Copies a chain; says how many bytes it has.
fn copy(
    scratch: &mut [u8],
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
        let room = scratch.get_mut(filled..).and_then(|s| s.get_mut(..buffer.len as usize));
        let room = room.ok_or(BadChain::Size)?;
        memory.read(buffer.address, room)?;
        filled += room.len();
        Ok(())
    })?;
    Ok(filled)
}

/// The frame behind the header, and what the header says.
fn split(scratch: &[u8], bytes: usize, header: usize) -> Option<(&[u8], Offload)> {
    let (said, frame) = scratch.get(..bytes)?.split_at_checked(header)?;
    let mut full = [0; vnet::LEN];
    full.get_mut(..header)?.copy_from_slice(said);
    let offload = vnet::parse(full)?;
    (!frame.is_empty()).then_some((frame, offload))
}
