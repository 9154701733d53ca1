//! Frames to a guest, behind their lengths, in one buffer that one `write` takes.

use portway_netstack::{FrameSink, Offload};

use super::framing::Prefix;

/// Bytes that may wait before the stack is told to wait. It stays inside a core's second-level cache: a buffer that
/// outgrows it is written to memory and read back.
const ROOM: usize = 256 * 1024;
/// The largest frame behind its length.
const LARGEST: usize = 4 + 14 + 65_535;

/// The transmit buffer of a stream link.
#[derive(Debug)]
pub struct TransmitBuffer {
    prefix: Prefix,
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    frames: u64,
    total: u64,
}

impl TransmitBuffer {
    /// An empty buffer; its pages come as they are written.
    #[must_use]
    pub fn new(prefix: Prefix) -> Self {
        Self { prefix, bytes: vec![0; ROOM + LARGEST].into(), start: 0, end: 0, frames: 0, total: 0 }
    }

    /// Whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// What waits.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Puts bytes in that are no frame: a handshake's. They are few, and come before any frame.
    pub fn raw(&mut self, bytes: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.end..).and_then(|b| b.get_mut(..bytes.len())) {
            room.copy_from_slice(bytes);
            self.end += bytes.len();
        }
    }

    /// Forgets the first `n` bytes. True when nothing is left.
    pub fn take(&mut self, n: usize) -> bool {
        self.start = (self.start + n).min(self.end);
        if self.is_empty() {
            self.clear();
            return true;
        }
        false
    }

    /// Forgets everything.
    pub const fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Frames and bytes that were ever put in.
    #[must_use]
    pub const fn written(&self) -> (u64, u64) {
        (self.frames, self.total)
    }
}

impl FrameSink for TransmitBuffer {
    fn has_room(&self) -> bool {
        self.end < ROOM
    }

    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let size = self.prefix.size();
        let room = self.bytes.get_mut(self.end..)?.get_mut(..size + len)?;
        let (head, body) = room.split_at_mut(size);
        if !self.prefix.write(len, head) {
            return None;
        }
        let result = fill(body);
        self.end += size + len;
        self.frames += 1;
        self.total += len as u64;
        Some(result)
    }
}
