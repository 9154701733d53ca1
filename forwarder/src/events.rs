//! What happened, for those who will want to watch: a bounded queue that forgets the oldest.

use std::collections::VecDeque;

use portway_api::control::PortInfo;

/// One thing worth knowing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A VMM attached to the link of this name.
    LinkUp(String),
    /// It is gone.
    LinkDown(String),
    /// A guest got, or renewed, a lease: address and Ethernet address.
    Lease(String, String),
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

/// The last events, each with its number since the start.
#[derive(Debug, Default)]
pub struct EventQueue {
    events: VecDeque<(u64, Event)>,
    next: u64,
}

impl EventQueue {
    /// Events kept; at it the oldest goes.
    pub const LIMIT: usize = 1024;

    /// Adds one.
    pub fn push(&mut self, event: Event) {
        tracing::debug!(?event, "event");
        if self.events.len() == Self::LIMIT {
            self.events.pop_front();
        }
        self.events.push_back((self.next, event));
        self.next += 1;
    }

    /// Those from number `from` on that are still known.
    pub fn since(&self, from: u64) -> impl Iterator<Item = &(u64, Event)> {
        self.events.iter().skip_while(move |(n, _)| *n < from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_event_goes_at_the_limit() {
        let mut queue = EventQueue::default();
        for n in 0..=EventQueue::LIMIT {
            queue.push(Event::LinkUp(n.to_string()));
        }
        assert_eq!(queue.since(0).next(), Some(&(1, Event::LinkUp("1".into()))));
        assert_eq!(queue.since(1024).count(), 1);
    }
}
