//! An answer of a resolver, made ready for more than one client.
//!
//! Taken out is the OPT record, which belongs to one hop (RFC 6891 §6.1.1); what differs between clients (the name's
//! letters, id, OPT) is put in when it is given to one, and TTLs are lowered by the time it lay here.
//!
//! A negative answer lives as long as its SOA says: the least of its TTL and its minimum, which becomes the SOA's TTL for
//! those who get it from here (RFC 2308 §5). Without a SOA it is not kept. Never kept: cut answers, SERVFAIL and other
//! errors, TTL 0.

use super::cache::Key;
use super::wire::{self, Query, Rcode, Section, kind};

/// Longest life of an answer, whatever its TTL (RFC 8767 §4 recommends a cap of days), in seconds.
pub(super) const POSITIVE_MAX: u32 = 86_400;
/// Longest life of a negative answer (RFC 2308 §5: one to three hours).
pub(super) const NEGATIVE_MAX: u32 = 3_600;

/// The answer.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    message: Box<[u8]>,
    /// Offset of each TTL, and its value when it came.
    ttls: Box<[(usize, u32)]>,
    /// Seconds it may be kept.
    pub(super) life: u32,
}

impl Reply {
    /// What `bytes` say about a question for `asked`; `None` when they are malformed.
    pub(super) fn read(asked: u16, bytes: &[u8]) -> Option<Self> {
        let records = wire::records(bytes)?;
        let mut message = bytes.to_vec();
        if let Some(opt) = records.iter().find(|r| r.kind == kind::OPT) {
            // An OPT in the middle would move what pointers mean; a code beyond 15 has no meaning without it.
            if opt.span.end != bytes.len() || opt.ttl >> 24 != 0 {
                return None;
            }
            message.truncate(opt.span.start);
            let [n0, n1] = *message.get(10..12)?.first_chunk()?;
            let count = u16::from_be_bytes([n0, n1]).checked_sub(1)?;
            message.get_mut(10..12)?.copy_from_slice(&count.to_be_bytes());
        }
        // RFC 2181 §8: a TTL with the top bit set is 0.
        let ttl_of = |ttl: u32| if ttl >> 31 == 0 { ttl } else { 0 };
        let kept = || records.iter().filter(|r| r.kind != kind::OPT);
        let mut ttls: Vec<(usize, u32)> = kept().map(|r| (r.ttl_at, ttl_of(r.ttl))).collect();
        let mut life = ttls.iter().map(|(_, ttl)| *ttl).min().unwrap_or(0).min(POSITIVE_MAX);
        let code = wire::rcode(bytes);
        let known = code == Rcode::NoError as u8 || code == Rcode::NxDomain as u8;
        let answered =
            records.iter().any(|r| r.section == Section::Answer && (r.kind == asked || asked == kind::ANY));
        if code == Rcode::NxDomain as u8 || !answered {
            let soa = records.iter().find(|r| r.section == Section::Authority && r.kind == kind::SOA);
            let minimum = soa.and_then(|soa| {
                let minimum = bytes.get(soa.data.clone())?.last_chunk().map(|m| u32::from_be_bytes(*m))?;
                Some((soa.ttl_at, ttl_of(minimum).min(ttl_of(soa.ttl)).min(NEGATIVE_MAX)))
            });
            life = life.min(minimum.map_or(0, |(_, ttl)| ttl));
            if let Some((at, least)) = minimum
                && let Some((_, ttl)) = ttls.iter_mut().find(|(ttl_at, _)| *ttl_at == at)
            {
                *ttl = least;
            }
        }
        if wire::is_truncated(bytes) || !known {
            life = 0;
        }
        Some(Self { message: message.into(), ttls: ttls.into(), life })
    }

    /// An answer that says nothing, in the place of one that is kept from guests.
    pub(super) fn empty(key: &Key) -> Self {
        Self {
            message: wire::empty_answer(&key.name, (key.kind, key.class)).into(),
            ttls: Box::default(),
            life: 0,
        }
    }

    /// The message for the client of `query`, `age` seconds after it came.
    pub(super) fn made_out(&self, query: &Query<'_>, age: u32) -> Vec<u8> {
        let mut answer = self.message.to_vec();
        for &(at, ttl) in &self.ttls {
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
        answer
    }

    /// What it takes in memory, about.
    pub(super) fn size(&self) -> usize {
        self.message.len().saturating_add(self.ttls.len().saturating_mul(16))
    }
}
