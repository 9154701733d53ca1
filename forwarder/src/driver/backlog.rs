//! How many DNS queries of each guest wait for the control thread.
//!
//! The queue to that thread is one for all guests. A guest may have as many queries in it as there are places free: alone
//! it has half of them, and whatever a guest does, another one finds room. A query that finds none is dropped; its client
//! asks again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use portway_netstack::PortId;

use super::SLOW_LIMIT;

/// Links that have a count of their own; those beyond share with others.
const COUNTS: usize = 64;

/// The counts.
#[derive(Debug, Clone)]
pub(super) struct Backlog(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    total: AtomicUsize,
    by_port: [AtomicUsize; COUNTS],
}

/// A query in the queue; dropped when it is taken out.
#[derive(Debug)]
pub struct Waiting {
    counts: Arc<Counts>,
    slot: usize,
}

impl Backlog {
    pub(super) fn new() -> Self {
        let by_port = std::array::from_fn(|_| AtomicUsize::new(0));
        Self(Arc::new(Counts { total: AtomicUsize::new(0), by_port }))
    }

    /// A place in the queue for a query of the guest on `port`. Only the data thread calls this, so what it reads is at most
    /// too high.
    pub(super) fn admit(&self, port: PortId) -> Option<Waiting> {
        let slot = usize::from(port.0) % COUNTS;
        let own = self.0.by_port.get(slot)?;
        let free = SLOW_LIMIT.saturating_sub(self.0.total.load(Ordering::Relaxed));
        if own.load(Ordering::Relaxed) >= free {
            return None;
        }
        own.fetch_add(1, Ordering::Relaxed);
        self.0.total.fetch_add(1, Ordering::Relaxed);
        Some(Waiting { counts: Arc::clone(&self.0), slot })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(own) = self.counts.by_port.get(self.slot) {
            own.fetch_sub(1, Ordering::Relaxed);
        }
        self.counts.total.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_floods_the_queue_leaves_room_for_the_others() {
        let backlog = Backlog::new();
        let flood = |port| std::iter::from_fn(|| backlog.admit(PortId(port))).collect::<Vec<_>>();
        let first = flood(0);
        assert_eq!(first.len(), SLOW_LIMIT / 2);
        let second = flood(1);
        assert_eq!(second.len(), SLOW_LIMIT / 4);
        assert!(backlog.admit(PortId(2)).is_some());
        drop(first);
        drop(second);
        assert_eq!(flood(3).len(), SLOW_LIMIT / 2);
    }
}
