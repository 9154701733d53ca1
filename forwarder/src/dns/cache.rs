//! Answers of upstreams, for as long as their TTLs say.
//!
//! An answer is kept as its bytes; TTLs are counted down in place when it is given again. Negative answers live for the
//! SOA's minimum (RFC 2308 §5), an answer without TTL or SOA not at all, errors other than NXDOMAIN not at all. At most
//! [`ENTRIES`] answers of at most [`LARGEST`] bytes, none longer than [`LONGEST`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::message::{OPT, Question, Record, SOA, records, udp_size};

/// Answers kept; at it what has ended goes, then anything.
pub(super) const ENTRIES: usize = 4096;
/// Bytes of one answer.
const LARGEST: usize = 4096;
/// The longest time an answer is kept.
const LONGEST: Duration = Duration::from_secs(86_400);

/// Name, type, class; RD, CD, AD and DO of the query; whether EDNS was there.
type Key = (String, u16, u16, u8, u8, bool, bool);

struct Entry {
    answer: Vec<u8>,
    kept: Instant,
    ends: Instant,
}

#[derive(Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
}

fn key(question: &Question, query: &[u8]) -> Option<Key> {
    let opt = records(query)?.into_iter().find(|r| r.kind == OPT);
    let dnssec = opt.is_some_and(|o| o.ttl & 0x8000 != 0);
    let (rd, cd) = (query.get(2)? & 0x01, query.get(3)? & 0x30);
    Some((question.name.clone(), question.kind, question.class, rd, cd, dnssec, opt.is_some()))
}

impl Cache {
    pub(super) fn new() -> Self {
        Self::default()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&mut self, now: Instant, question: &Question, query: &[u8]) -> Option<Vec<u8>> {
        let entry = self.entries.get(&key(question, query)?).filter(|e| e.ends > now)?;
        let age = u32::try_from(now.duration_since(entry.kept).as_secs()).unwrap_or(u32::MAX);
        let mut answer = entry.answer.clone();
        for record in records(&answer)?.iter().filter(|r| r.kind != OPT) {
            let left = record.ttl.saturating_sub(age).to_be_bytes();
            answer.get_mut(record.ttl_at..record.ttl_at + 4)?.copy_from_slice(&left);
        }
        answer.get_mut(..2)?.copy_from_slice(query.get(..2)?);
        // The question as this guest wrote it: some look at the case of their letters.
        let end = question.end;
        answer.get_mut(12..end)?.copy_from_slice(query.get(12..end)?);
        Some(answer)
    }

    pub(super) fn put(&mut self, now: Instant, question: &Question, query: &[u8], answer: &[u8]) {
        let lifetime = lifetime(answer)
            .filter(|d| !d.is_zero() && answer.len() <= LARGEST.min(udp_size(query).max(512)));
        let (Some(lifetime), Some(key)) = (lifetime, key(question, query)) else { return };
        if self.entries.len() >= ENTRIES {
            self.entries.retain(|_, e| e.ends > now);
            if self.entries.len() >= ENTRIES
                && let Some(any) = self.entries.keys().next().cloned()
            {
                self.entries.remove(&any);
            }
        }
        self.entries
            .insert(key, Entry { answer: answer.to_vec(), kept: now, ends: now + lifetime.min(LONGEST) });
    }
}

/// How long an answer may be kept.
fn lifetime(answer: &[u8]) -> Option<Duration> {
    let (flags, code) = (*answer.get(2)?, answer.get(3)? & 0x0f);
    let truncated = flags & 0x02 != 0;
    if truncated || !matches!(code, 0 | 3) {
        return None;
    }
    let all = records(answer)?;
    let answers = usize::from(u16::from_be_bytes(answer.get(6..8)?.try_into().ok()?));
    let ttl = |r: &Record| if r.kind == SOA { r.ttl.min(minimum(answer, r)) } else { r.ttl };
    if (answers == 0 || code == 3) && !all.iter().any(|r| r.kind == SOA) {
        return None;
    }
    let shortest = all.iter().filter(|r| r.kind != OPT).map(ttl).min()?;
    Some(Duration::from_secs(shortest.into()))
}

/// The last field of a SOA (RFC 1035 §3.3.13).
fn minimum(answer: &[u8], soa: &Record) -> u32 {
    let field = soa.end.checked_sub(4).and_then(|at| answer.get(at..soa.end)).and_then(|b| b.try_into().ok());
    field.map_or(0, u32::from_be_bytes)
}
