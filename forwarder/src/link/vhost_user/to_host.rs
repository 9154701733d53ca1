//! Frames from the guest: its transmit ring, queue 1, by [`FromGuest`]. Each is behind a virtio-net header.

use std::io;
use std::ops::ControlFlow;

use portway_netstack::Offload;

use super::{HEADER, LARGEST};
use crate::link::{Batch, vnet};
use crate::vhost_user::{FromGuest, Memory, Ring, Taken};

/// Most frames of one batch.
const FRAMES: usize = 64;

/// What is kept between batches.
#[derive(Debug)]
pub(super) struct ToHost(FromGuest);

impl ToHost {
    pub(super) fn new() -> Self {
        Self(FromGuest::new(HEADER + LARGEST))
    }

    /// Chains that were no frame.
    pub(super) const fn dropped(&self) -> u64 {
        self.0.dropped
    }

    /// One batch of frames, whose headers have `header` bytes.
    pub(super) fn receive(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        header: usize,
        mut handle: impl FnMut(&[u8], Offload) -> ControlFlow<()>,
    ) -> io::Result<Batch> {
        let mut batch = Batch { more: false, frames: 0, bytes: 0 };
        let moved = self.0.receive(ring, memory, FRAMES, |packet| {
            let (frame, offload) = split(packet, header)?;
            batch.frames += 1;
            batch.bytes += frame.len() as u64;
            let goes_on = handle(frame, offload).is_continue();
            Some(Taken { bytes: frame.len(), goes_on })
        });
        batch.more = moved.map_err(io::Error::other)?.more;
        Ok(batch)
    }
}

/// The frame behind the header, and what the header says.
fn split(packet: &[u8], header: usize) -> Option<(&[u8], Offload)> {
    let (said, frame) = packet.split_at_checked(header)?;
    let mut full = [0; vnet::LEN];
    full.get_mut(..header)?.copy_from_slice(said);
    let offload = vnet::parse(full)?;
    (!frame.is_empty()).then_some((frame, offload))
}
