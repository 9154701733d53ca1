//! Answers of the host's resolvers, kept as long as they say (see [`super::reply`]).
//!
//! Kept apart is what makes answers differ: the question, and the client's AD, CD and DO bits. Answers that a client's EDNS
//! option made are nobody else's (`Query::variant`). At most `ENTRIES_MAX` answers and `BYTES_MAX` bytes; the one longest
//! unused goes first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::reply::Reply;
use super::wire::{Name, Query};

/// Answers kept.
pub(crate) const ENTRIES_MAX: usize = 4096;
/// Bytes kept, the bookkeeping of each answer included.
pub(crate) const BYTES_MAX: usize = 4 << 20;
/// What one answer costs beside its message.
const OVERHEAD: usize = 256;

/// What an answer is kept under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) name: Name,
    pub(super) kind: u16,
    pub(super) class: u16,
    pub(super) variant: u8,
}

impl Key {
    /// The key of `query`; `None` when its answer is for its client alone.
    pub(super) fn of(query: &Query<'_>) -> Option<Self> {
        let variant = query.variant()?;
        Some(Self { name: query.name.clone(), kind: query.kind, class: query.class, variant })
    }
}

#[derive(Debug)]
struct Entry {
    reply: Arc<Reply>,
    stored: Instant,
    expires: Instant,
    used: u64,
    cost: usize,
}

/// The answers kept, and the order of their last use.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    by_use: BTreeMap<u64, Key>,
    bytes: usize,
    uses: u64,
    generation: u64,
}

impl Cache {
    /// Changes with every `clear`: an answer asked for before is not stored after.
    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Drops everything; for other resolvers, whose answers may differ (split DNS).
    pub(super) fn clear(&mut self) {
        let generation = self.generation.wrapping_add(1);
        *self = Self { generation, ..Self::default() };
    }

    /// The kept answer under `key`, and its age in seconds.
    pub(super) fn lookup(&mut self, key: &Key, now: Instant) -> Option<(Arc<Reply>, u32)> {
        let entry = self.entries.get_mut(key)?;
        if entry.expires <= now {
            self.remove(key);
            return None;
        }
        self.uses = self.uses.wrapping_add(1);
        let key = self.by_use.remove(&entry.used).unwrap_or_else(|| key.clone());
        entry.used = self.uses;
        self.by_use.insert(self.uses, key);
        let age = now.saturating_duration_since(entry.stored).as_secs();
        Some((Arc::clone(&entry.reply), u32::try_from(age).unwrap_or(u32::MAX)))
    }

    /// Keeps `reply` under `key` if it may be kept. `generation` is that of the time its query was sent.
    pub(super) fn store(&mut self, key: &Key, reply: &Arc<Reply>, generation: u64, now: Instant) {
        let cost = reply.size().saturating_add(OVERHEAD);
        if generation != self.generation || reply.life == 0 || cost > BYTES_MAX {
            return;
        }
        self.remove(key);
        while self.entries.len() >= ENTRIES_MAX || self.bytes.saturating_add(cost) > BYTES_MAX {
            let Some((_, idlest)) = self.by_use.pop_first() else { break };
            self.remove(&idlest);
        }
        self.uses = self.uses.wrapping_add(1);
        self.bytes = self.bytes.saturating_add(cost);
        self.by_use.insert(self.uses, key.clone());
        let expires = now + Duration::from_secs(reply.life.into());
        let reply = Arc::clone(reply);
        self.entries.insert(key.clone(), Entry { reply, stored: now, expires, used: self.uses, cost });
    }

    /// Answers kept, and what they cost in bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.by_use.remove(&entry.used);
            self.bytes = self.bytes.saturating_sub(entry.cost);
        }
    }
}
