//! What happened, for those who watch.
//!
//! ```text
//!  data thread ─ EventQueue::push ─► bounded queue ─► EventLog: the last ones, and everybody who follows
//! ```
//! The data thread never waits: when the queue is full an event is lost and counted, and its number is missing in the
//! listing. A follower that is slower than the events misses some too, and sees it by the same gap.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use portway_api::control::{self, EventInfo, PortInfo};
use tokio::sync::{broadcast, mpsc};

/// One thing worth knowing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A VMM attached to the link of this name.
    LinkUp(String),
    /// It is gone.
    LinkDown(String),
    /// A guest got a lease: address and Ethernet address.
    Lease(String, String),
    /// A lease ended: address and Ethernet address.
    LeaseEnded(String, String),
    /// A port is published.
    Published(PortInfo),
    /// A port is not published any more.
    Unpublished(PortInfo),
    /// The agent of the guest of this name has a session.
    AgentUp(String),
    /// It has none any more.
    AgentDown(String),
    /// The guest of this name says that it is ready.
    GuestReady(String),
    /// A guest's listener, which a rule wants published, is not: the guest, the listener, and why.
    NotPublished(String, String, String),
}

impl From<Event> for control::Event {
    fn from(event: Event) -> Self {
        match event {
            Event::LinkUp(link) => Self::LinkUp { link },
            Event::LinkDown(link) => Self::LinkDown { link },
            Event::Lease(ip, mac) => Self::Lease { ip, mac },
            Event::LeaseEnded(ip, mac) => Self::LeaseEnded { ip, mac },
            Event::Published(port) => Self::PortPublished { port },
            Event::Unpublished(port) => Self::PortUnpublished { port },
            Event::AgentUp(guest) => Self::AgentUp { guest },
            Event::AgentDown(guest) => Self::AgentDown { guest },
            Event::GuestReady(guest) => Self::GuestReady { guest },
            Event::NotPublished(guest, listener, reason) => Self::NotPublished { guest, listener, reason },
        }
    }
}

/// An event with its number and time.
pub type Numbered = (u64, SystemTime, Event);

/// The data thread's end.
#[derive(Debug, Default)]
pub struct EventQueue {
    out: Option<mpsc::Sender<Numbered>>,
    next: u64,
    lost: u64,
}

impl EventQueue {
    /// Events that may wait for the control thread; at it further ones are lost, and counted.
    pub const LIMIT: usize = 1024;

    /// A queue, and the end that [`EventLog::keep`] reads.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Numbered>) {
        let (out, incoming) = mpsc::channel(Self::LIMIT);
        (Self { out: Some(out), next: 0, lost: 0 }, incoming)
    }

    /// Tells one.
    pub fn push(&mut self, event: Event) {
        tracing::debug!(?event, "event");
        let told =
            self.out.as_ref().is_some_and(|o| o.try_send((self.next, SystemTime::now(), event)).is_ok());
        self.lost += u64::from(!told);
        self.next += 1;
    }

    /// Events nobody could be told.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }
}

/// The last events, and those who follow.
#[derive(Debug)]
pub struct EventLog {
    last: Mutex<VecDeque<Arc<EventInfo>>>,
    live: broadcast::Sender<Arc<EventInfo>>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self { last: Mutex::default(), live: broadcast::Sender::new(Self::BEHIND) }
    }
}

impl EventLog {
    /// Events kept; at it the oldest goes.
    pub const LIMIT: usize = 1024;
    /// Events a follower may be behind; beyond it, it misses the oldest.
    pub const BEHIND: usize = 256;

    /// Keeps what comes, until the data thread ends.
    pub async fn keep(&self, mut incoming: mpsc::Receiver<Numbered>) {
        while let Some((id, at, event)) = incoming.recv().await {
            let time = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
            let time_ms = u64::try_from(time).unwrap_or(u64::MAX);
            let info = Arc::new(EventInfo { id, time_ms, event: event.into() });
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.len() == Self::LIMIT {
                last.pop_front();
            }
            last.push_back(Arc::clone(&info));
            // Sent under the lock, so that nobody who begins to follow sees it twice or not at all.
            let _ = self.live.send(info);
        }
    }

    /// Those from number `from` on that are still known.
    #[must_use]
    pub fn since(&self, from: u64) -> Vec<Arc<EventInfo>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.iter().filter(|e| e.id >= from).map(Arc::clone).collect()
    }

    /// [`Self::since`], and what comes after.
    #[must_use]
    pub fn follow(&self, from: u64) -> (Vec<Arc<EventInfo>>, broadcast::Receiver<Arc<EventInfo>>) {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let known = last.iter().filter(|e| e.id >= from).map(Arc::clone).collect();
        (known, self.live.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_event_goes_at_the_limit() {
        let (mut queue, incoming) = EventQueue::new();
        for n in 0..=EventQueue::LIMIT {
            queue.push(Event::LinkUp(n.to_string()));
        }
        assert_eq!(queue.lost(), 1, "the data thread does not wait");
        drop(queue);
        let log = EventLog::default();
        log.keep(incoming).await;
        let (mut more, incoming) = EventQueue::new();
        more.next = 2000;
        more.push(Event::LinkDown("x".into()));
        drop(more);
        let (known, mut live) = log.follow(1020);
        assert_eq!(known.iter().map(|e| e.id).collect::<Vec<_>>(), [1020, 1021, 1022, 1023]);
        log.keep(incoming).await;
        assert_eq!(live.recv().await.unwrap().id, 2000);
        assert_eq!(log.since(0).first().unwrap().id, 1);
        assert_eq!(log.since(0).len(), EventLog::LIMIT);
    }
}
