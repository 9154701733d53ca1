//! Answers that wait for the link: ARP, DHCP, ICMP, RST. One byte ring per port, bounded; nothing in it is ever
//! worth waiting for, so what does not fit is dropped and counted.

use crate::sink::{FrameSink, Offload};
use crate::wire::ethernet;

/// Whole frames, each behind its length.
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    /// Where the next frame to leave begins.
    read: usize,
    limit: usize,
    /// Frames that did not fit since this was last asked.
    dropped: u64,
}

impl Outbox {
    pub(crate) const fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), read: 0, limit, dropped: 0 }
    }

    /// Queues a frame of `header` and `len` bytes that `fill` writes. `fill` is called in any case.
    pub(crate) fn frame<R>(
        &mut self,
        header: &[u8; ethernet::HEADER],
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        self.queue(ethernet::HEADER + len, |bytes| bytes.extend_from_slice(header), fill)
    }

    /// Queues a frame of `size` bytes: what `begin` appends, then what `fill` writes.
    fn queue<R>(
        &mut self,
        size: usize,
        begin: impl FnOnce(&mut Vec<u8>),
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&u32::try_from(size).unwrap_or(u32::MAX).to_ne_bytes());
        begin(&mut self.bytes);
        let body = self.bytes.len();
        self.bytes.resize(start + 4 + size, 0);
        let result = fill(&mut self.bytes[body..]);
        if self.bytes.len() - self.read > self.limit {
            self.bytes.truncate(start);
            self.dropped += 1;
        }
        result
    }

    /// Queues a frame of `len` bytes that `fill` writes.
    pub(crate) fn whole<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        self.queue(len, |_| {}, fill)
    }

    /// Queues a whole frame.
    pub(crate) fn push(&mut self, frame: &[u8]) {
        if let Some((header, payload)) = frame.split_first_chunk() {
            self.frame(header, payload.len(), |body| body.copy_from_slice(payload));
        }
    }

    /// Moves frames into the sink until it is full. True when some are left.
    pub(crate) fn drain(&mut self, sink: &mut impl FrameSink) -> bool {
        while let Some((size, rest)) = self.bytes[self.read..].split_first_chunk() {
            if !sink.has_room() {
                return true;
            }
            let size = u32::from_ne_bytes(*size) as usize;
            sink.frame(size, Offload::default(), |out| out.copy_from_slice(&rest[..size]));
            self.read += 4 + size;
        }
        self.bytes.clear();
        self.read = 0;
        false
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Frames dropped since this was last called.
    pub(crate) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Vecs(Vec<Vec<u8>>, usize);
    impl FrameSink for Vecs {
        fn has_room(&self) -> bool {
            self.0.len() < self.1
        }
        fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
            let mut frame = vec![0; len];
            let r = fill(&mut frame);
            self.0.push(frame);
            Some(r)
        }
    }

    #[test]
    fn frames_leave_in_order_and_wait_for_room() {
        let mut outbox = Outbox::new(1000);
        outbox.push(&[1; 20]);
        outbox.push(&[2; 14]);
        let mut sink = Vecs(Vec::new(), 1);
        assert!(outbox.drain(&mut sink));
        sink.1 = 2;
        assert!(!outbox.drain(&mut sink));
        assert_eq!(sink.0, [vec![1; 20], vec![2; 14]]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn beyond_the_limit_a_frame_is_dropped_and_counted() {
        let mut outbox = Outbox::new(50);
        outbox.push(&[1; 40]);
        outbox.push(&[2; 40]);
        assert_eq!(outbox.take_dropped(), 1);
        let mut sink = Vecs(Vec::new(), 9);
        outbox.drain(&mut sink);
        assert_eq!(sink.0.len(), 1);
    }
}
