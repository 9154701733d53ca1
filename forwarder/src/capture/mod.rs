//! Frames, copied while they pass, for Wireshark.
//!
//! ```text
//!  link ─► Carrier::Tapped ─► Capture::see: filter ─► queue (bounded by bytes) ─► reader: pcapng ─► file, HTTP client
//! ```
//! A link that is captured has its carrier wrapped ([`crate::link::tapped`]); without a capture no line of this module runs
//! for any frame. The data thread never waits for a reader: when [`BUDGET`] bytes wait for one, further frames are
//! counted instead, and the count is in the next frame's record (`epb_dropcount`).
//!
//! Limits: [`CAPTURES`] at once, [`BUDGET`] each. Frames are as they cross the link: segments of offload links are up to
//! 64 KiB, and their checksums are not made yet.

mod filter;
pub mod pcapng;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::SystemTime;

use tokio::sync::mpsc;

pub use self::filter::{Filter, FilterError, Layer4};

/// Captures that may run at once.
pub const CAPTURES: usize = 8;
/// Bytes of frames that may wait for one reader; beyond it frames are lost and counted.
pub const BUDGET: usize = 8 << 20;
/// Bytes of memory one waiting frame costs beside its own.
const OVERHEAD: usize = 96;

/// One frame that was seen.
#[derive(Debug)]
pub struct Frame {
    /// The link's name.
    pub link: Arc<str>,
    /// Whether the frame went to the guest.
    pub to_guest: bool,
    /// When.
    pub at: SystemTime,
    /// Its length on the link.
    pub len: usize,
    /// Its first bytes.
    pub bytes: Box<[u8]>,
    /// Frames that were lost before it because the reader was slow.
    pub lost: u64,
}

/// The data thread's end of one capture; shared by the links it sees.
#[derive(Debug)]
pub struct Capture {
    filter: Filter,
    queue: mpsc::UnboundedSender<Frame>,
    counts: Arc<Counts>,
}

/// What both ends count.
#[derive(Debug, Default)]
struct Counts {
    /// Bytes in the queue.
    waiting: AtomicUsize,
    /// Frames lost since the last that was queued.
    lost: AtomicU64,
    lost_total: AtomicU64,
}

/// The reader's end; when it is dropped the capture ends.
#[derive(Debug)]
pub struct Reader {
    counts: Arc<Counts>,
    frames: mpsc::UnboundedReceiver<Frame>,
}

impl Capture {
    /// A capture and its reader.
    #[must_use]
    pub fn new(filter: Filter) -> (Arc<Self>, Reader) {
        // The queue is bounded by what is in it, in bytes: see `see`.
        let (queue, frames) = mpsc::unbounded_channel();
        let counts = Arc::new(Counts::default());
        (Arc::new(Self { filter, queue, counts: Arc::clone(&counts) }), Reader { counts, frames })
    }

    /// Whether frames of the link called `link` are wanted.
    #[must_use]
    pub fn wants(&self, link: &str) -> bool {
        self.filter.vm.as_deref().is_none_or(|vm| vm == link)
    }

    /// The only link it wants, when it wants one only.
    #[must_use]
    pub fn vm(&self) -> Option<&str> {
        self.filter.vm.as_deref()
    }

    /// Whether the reader has gone.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.queue.is_closed()
    }

    /// Frames its reader was too slow for, since it began.
    #[must_use]
    pub fn lost_total(&self) -> u64 {
        self.counts.lost_total.load(Ordering::Relaxed)
    }

    /// Takes a copy of a frame that the filter wants. Never waits.
    pub fn see(&self, link: &Arc<str>, to_guest: bool, frame: &[u8]) {
        if !self.filter.wants(frame) {
            return;
        }
        let kept = frame.get(..self.filter.snaplen).unwrap_or(frame);
        let cost = kept.len() + OVERHEAD;
        // Only this thread adds, so what was read here can only be too much.
        if self.counts.waiting.load(Ordering::Relaxed) + cost > BUDGET {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
            self.counts.lost_total.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.counts.waiting.fetch_add(cost, Ordering::Relaxed);
        let lost = self.counts.lost.swap(0, Ordering::Relaxed);
        let frame = Frame {
            link: Arc::clone(link),
            to_guest,
            at: SystemTime::now(),
            len: frame.len(),
            bytes: kept.into(),
            lost,
        };
        // A reader that has gone away wants nothing; the driver takes the tap off at its next request.
        let _ = self.queue.send(frame);
    }
}

impl Reader {
    /// Waits for frames and moves what there is, up to `most`, into `into`. False when there will be no more.
    pub async fn read(&mut self, into: &mut Vec<Frame>, most: usize) -> bool {
        let read = self.frames.recv_many(into, most).await > 0;
        self.taken(into);
        read
    }

    /// [`Self::read`] of one frame, for a thread that may block.
    pub fn read_blocking(&mut self, into: &mut Vec<Frame>) -> bool {
        into.extend(self.frames.blocking_recv());
        self.taken(into);
        !into.is_empty()
    }

    /// Frames that were lost because of this reader.
    #[must_use]
    pub fn lost_total(&self) -> u64 {
        self.counts.lost_total.load(Ordering::Relaxed)
    }

    /// Whether nothing waits now.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    fn taken(&self, frames: &[Frame]) {
        let bytes: usize = frames.iter().map(|f| f.bytes.len() + OVERHEAD).sum();
        self.counts.waiting.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_loses_frames_and_learns_how_many() {
        let (capture, mut reader) = Capture::new(Filter::default());
        let link: Arc<str> = "web".into();
        let frame = vec![0; 65_000];
        let fits = BUDGET / (frame.len() + OVERHEAD);
        for _ in 0..fits + 3 {
            capture.see(&link, true, &frame);
        }
        assert_eq!(capture.lost_total(), 3);
        let mut frames = Vec::new();
        while !reader.is_empty() {
            assert!(reader.read_blocking(&mut frames));
            frames.clear();
        }
        capture.see(&link, true, &frame);
        assert!(reader.read_blocking(&mut frames));
        assert_eq!(frames[0].lost, 3);
        drop(reader);
        assert!(capture.is_over());
    }
}
