//! Answers of the host's resolvers, kept as long as they say.
//!
//! Kept is the message without its OPT record, which belongs to one hop (RFC 6891 §6.1.1); what differs between
//! clients (name's spelling, id, OPT) is put in when it is served, and TTLs are lowered by the time it lay here.
//! Negative answers live for the SOA's minimum (RFC 2308 §5); without a SOA they are not kept. Never kept: cut
//! answers, SERVFAIL and other errors, TTL 0, answers a client's EDNS option made (`Query::variant`).
//! At most `ENTRIES_MAX` answers and `BYTES_MAX` bytes; the one longest unused goes first.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::wire::{self, Name, Query, Rcode, Section, kind};

/// Answers kept.
pub(super) const ENTRIES_MAX: usize = 4096;
/// Bytes kept, the bookkeeping of each answer included.
pub(super) const BYTES_MAX: usize = 4 << 20;
/// What one answer costs beside its message.
const OVERHEAD: usize = 256;
/// Longest life of an answer, whatever its TTL (RFC 8767 §4 recommends a cap of days).
const POSITIVE_MAX: u32 = 86_400;
/// Longest life of a negative answer (RFC 2308 §5: one to three hours).
const NEGATIVE_MAX: u32 = 3_600;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    name: Name,
    kind: u16,
    class: u16,
    variant: u8,
}

#[derive(Debug)]
struct Entry {
    message: Box<[u8]>,
    /// Offset of each TTL and its value when stored.
    ttls: Box<[(usize, u32)]>,
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

    /// The kept answer to `query`, made out to its client.
    pub(super) fn lookup(&mut self, query: &Query<'_>, now: Instant) -> Option<Vec<u8>> {
        let key = key(query)?;
        if self.entries.get(&key)?.expires <= now {
            self.remove(&key);
            return None;
        }
        let entry = self.entries.get_mut(&key)?;
        self.by_use.remove(&entry.used);
        self.uses = self.uses.wrapping_add(1);
        entry.used = self.uses;
        self.by_use.insert(self.uses, key);

        let age = u32::try_from(now.saturating_duration_since(entry.stored).as_secs()).unwrap_or(u32::MAX);
        let mut answer = entry.message.to_vec();
        for &(at, ttl) in &entry.ttls {
            if let Some(slot) = answer.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) {
                *slot = ttl.saturating_sub(age).to_be_bytes();
            }
        }
        wire::set_id(&mut answer, query.id());
        wire::clear_authoritative(&mut answer);
        let question = query.question();
        if let Some(slot) = answer.get_mut(wire::HEADER..).and_then(|rest| rest.get_mut(..question.len())) {
            slot.copy_from_slice(question); // equal but for case
        }
        query.push_opt(&mut answer, 0);
        Some(answer)
    }

    /// Keeps `reply` to `query` if it may be kept. `generation` is that of the time the query was sent.
    pub(super) fn store(&mut self, query: &Query<'_>, reply: &[u8], generation: u64, now: Instant) {
        if generation != self.generation {
            return;
        }
        let Some(key) = key(query) else { return };
        let Some((message, ttls, life)) = storable(query, reply) else { return };
        let cost = message.len().saturating_add(ttls.len().saturating_mul(16)).saturating_add(OVERHEAD);
        if cost > BYTES_MAX {
            return;
        }
        self.remove(&key);
        while self.entries.len() >= ENTRIES_MAX || self.bytes.saturating_add(cost) > BYTES_MAX {
            let Some((_, idlest)) = self.by_use.pop_first() else { break };
            self.remove(&idlest);
        }
        self.uses = self.uses.wrapping_add(1);
        self.bytes = self.bytes.saturating_add(cost);
        self.by_use.insert(self.uses, key.clone());
        let expires = now + Duration::from_secs(life.into());
        self.entries.insert(key, Entry { message, ttls, stored: now, expires, used: self.uses, cost });
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

fn key(query: &Query<'_>) -> Option<Key> {
    let variant = query.variant()?;
    Some(Key { name: query.name.clone(), kind: query.kind, class: query.class, variant })
}

/// The message without OPT, where its TTLs are, and how many seconds it may be kept.
#[expect(clippy::type_complexity, reason = "taken apart at its one call")]
fn storable(query: &Query<'_>, reply: &[u8]) -> Option<(Box<[u8]>, Box<[(usize, u32)]>, u32)> {
    if wire::is_truncated(reply) {
        return None;
    }
    let rcode = wire::rcode(reply);
    if rcode != Rcode::NoError as u8 && rcode != Rcode::NxDomain as u8 {
        return None;
    }
    let records = wire::records(reply)?;
    let mut message = reply.to_vec();
    if let Some(opt) = records.iter().find(|r| r.kind == kind::OPT) {
        // An OPT in the middle would move what pointers mean; extended errors are not kept.
        if opt.span.end != reply.len() || opt.ttl >> 24 != 0 {
            return None;
        }
        message.truncate(opt.span.start);
        let [n0, n1] = *message.get(10..12)?.first_chunk()?;
        let count = u16::from_be_bytes([n0, n1]).checked_sub(1)?;
        message.get_mut(10..12)?.copy_from_slice(&count.to_be_bytes());
    }
    // RFC 2181 §8: a TTL with the top bit set is 0.
    let ttl_of = |ttl: u32| if ttl >> 31 == 0 { ttl } else { 0 };
    let kept = records.iter().filter(|r| r.kind != kind::OPT);
    let ttls: Box<[(usize, u32)]> = kept.clone().map(|r| (r.ttl_at, ttl_of(r.ttl))).collect();
    let mut life = kept.clone().map(|r| ttl_of(r.ttl)).min().unwrap_or(0).min(POSITIVE_MAX);
    let answered = records
        .iter()
        .any(|r| r.section == Section::Answer && (r.kind == query.kind || query.kind == kind::ANY));
    if rcode == Rcode::NxDomain as u8 || !answered {
        let soa = records.iter().find(|r| r.section == Section::Authority && r.kind == kind::SOA)?;
        let minimum = reply.get(soa.data.clone())?.last_chunk().map(|m| u32::from_be_bytes(*m))?;
        life = life.min(ttl_of(minimum)).min(NEGATIVE_MAX);
    }
    (life > 0).then(|| (message.into(), ttls, life))
}
