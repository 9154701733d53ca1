//! Fragments of guests, made whole (RFC 791 §3.2, RFC 8200 §4.5, RFC 5722).
//!
//! ```text
//!  fragment ─► (port, source, destination, protocol, id) ─► pieces ─┬─ whole: the packet, to be handled as if it came so
//!                                                                   ├─ overlap: nothing of it counts any more
//!                                                                   └─ 30 s: gone; Time Exceeded when its first piece came
//! ```
//! A packet that is being put together takes as much memory as its highest byte asks for, at most 64 KiB. All of them may
//! take [`BYTES`], those of one port [`PORT_BYTES`] and [`PORT_PACKETS`]; at a limit the oldest of the port goes, and when
//! it is the common one that is reached, the fragment. A packet may come in [`PIECES`] pieces that do not touch.
//!
//! A repeated piece with the same bytes is passed over; any other overlap ends the packet, and what of it still comes is
//! dropped until its time is over (RFC 5722 §3, here for IPv4 too: nobody honest sends it, RFC 1858).
//!
//! Not here: fragments between guests, which travel as they are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Range;

use ahash::RandomState;

use crate::drop_reason::DropReason;
use crate::lru::{Links, Lru};
use crate::time::{Duration, Instant};
use crate::types::{Mac, PortId};
use crate::wire::ipv6::Fragment;
use crate::wire::{ethernet, ipv4, ipv6};

/// Bytes of all packets that wait for pieces.
pub const BYTES: usize = 32 << 20;
/// Bytes of those of one port.
pub const PORT_BYTES: usize = 8 << 20;
/// Packets of one port that wait for pieces, ended ones included.
pub const PORT_PACKETS: usize = 512;
/// Pieces of one packet that do not touch.
pub const PIECES: usize = 64;
/// How long a packet waits for its pieces (RFC 8200 §4.5: 60 s; RFC 791 §3.2 lets it begin at 15 s; Linux has 30 s).
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The most an IP packet carries behind its fixed header.
const LARGEST: usize = 65_535;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    port: PortId,
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    id: u32,
}

struct Pieces {
    key: Key,
    mac: Mac,
    began: Instant,
    /// What came, at its place; as long as the highest end.
    bytes: Vec<u8>,
    /// The parts of `bytes` that came, in order, not touching.
    have: Vec<Range<usize>>,
    total: Option<usize>,
    /// Nothing of it counts any more: it is remembered so that the rest does not begin anew.
    spoiled: bool,
}

impl Pieces {
    fn is_whole(&self) -> bool {
        let [all] = &self.have[..] else { return false };
        self.total == Some(all.end) && all.start == 0
    }

    /// What `piece` would change, `None` for one that came before.
    ///
    /// # Errors
    /// When it overlaps what came, or contradicts the packet's length.
    fn fits(&self, place: &Range<usize>, more: bool, piece: &[u8]) -> Result<Option<()>, DropReason> {
        let end_known = self.total.is_some_and(|total| place.end > total || (!more && place.end != total));
        if end_known || (!more && place.end < self.bytes.len()) {
            return Err(DropReason::FragmentOverlap);
        }
        if !self.have.iter().any(|h| h.start < place.end && place.start < h.end) {
            return Ok(Some(()));
        }
        let again = self.have.iter().any(|h| h.start <= place.start && place.end <= h.end)
            && self.bytes.get(place.clone()) == Some(piece);
        if again { Ok(None) } else { Err(DropReason::FragmentOverlap) }
    }

    fn add(&mut self, place: Range<usize>, piece: &[u8]) {
        if self.bytes.len() < place.end {
            // Exactly: what is counted is what is taken.
            self.bytes.reserve_exact(place.end - self.bytes.len());
            self.bytes.resize(place.end, 0);
        }
        self.bytes[place.clone()].copy_from_slice(piece);
        let at = self.have.partition_point(|h| h.end < place.start);
        let mut merged = place;
        while let Some(next) = self.have.get(at).filter(|h| h.start <= merged.end) {
            merged = merged.start.min(next.start)..merged.end.max(next.end);
            self.have.remove(at);
        }
        self.have.insert(at, merged);
    }

    /// A packet of `bytes`: the fixed header, then what it carries.
    fn packet(&self, bytes: &[u8]) -> Vec<u8> {
        let protocol = self.key.protocol;
        let length = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        let mut packet = Vec::with_capacity(ipv6::HEADER + ipv6::FRAGMENT_HEADER + bytes.len());
        match (self.key.src, self.key.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let whole = Fragment { id: self.key.id, offset: 0, more: false };
                packet.extend(ipv4::fragment_header(src, dst, protocol, length(bytes.len()), whole));
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                // RFC 6946: a fragment header that says "all of it" stays, for the sender may be asked to fragment again.
                let whole = Fragment { id: self.key.id, offset: 0, more: false };
                let all = length(ipv6::FRAGMENT_HEADER + bytes.len());
                packet.extend(ipv6::header(src, dst, ipv6::FRAGMENT, 64, all));
                packet.extend(ipv6::fragment_header(protocol, whole));
            }
            _ => {}
        }
        packet.extend(bytes);
        packet
    }
}

/// One fragment as its header told.
pub(crate) struct Piece<'f> {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) place: Fragment,
    pub(crate) bytes: &'f [u8],
}

/// A packet whose time is over.
pub(crate) struct Expired {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
    /// The packet as far as its first piece goes; `None` when that never came.
    pub(crate) first: Option<Vec<u8>>,
}

/// Packets of all ports that wait for pieces.
pub(crate) struct Fragments {
    slots: Vec<Option<Pieces>>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32, RandomState>,
    /// Per port, oldest first.
    ages: Vec<Lru>,
    links: Links,
    /// Per port.
    port_bytes: Vec<usize>,
    bytes: usize,
}

impl Fragments {
    pub(crate) fn new(seed: u64) -> Self {
        let keys = RandomState::with_seeds(seed.rotate_left(23), !seed, seed, 5);
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::with_hasher(keys),
            ages: Vec::new(),
            links: Links::default(),
            port_bytes: Vec::new(),
            bytes: 0,
        }
    }

    /// One more fragment. The frame of the whole packet, to `gateway`, when that was its last.
    ///
    /// # Errors
    /// Why it does not count.
    pub(crate) fn add(
        &mut self,
        now: Instant,
        piece: &Piece<'_>,
        gateway: Mac,
    ) -> Result<Option<Vec<u8>>, DropReason> {
        let Piece { port, mac, src, dst, protocol, place, bytes } = *piece;
        let range = place.offset..place.offset + bytes.len();
        // RFC 8200 §4.5: all but the last are multiples of eight, and none reaches beyond what a packet carries.
        let fixed = if src.is_ipv4() { ipv4::HEADER } else { ipv6::FRAGMENT_HEADER };
        if bytes.is_empty() || (place.more && bytes.len() % 8 != 0) || range.end + fixed > LARGEST {
            return Err(DropReason::BadFragment);
        }
        let key = Key { port, src, dst, protocol, id: place.id };
        let slot = match self.by_key.get(&key) {
            Some(slot) => *slot,
            None => self.begin(now, key, mac),
        };
        let Some(pieces) = self.slots[slot as usize].as_mut() else { return Err(DropReason::BadFragment) };
        if pieces.spoiled {
            return Err(DropReason::FragmentOverlap);
        }
        match pieces.fits(&range, place.more, bytes) {
            Ok(Some(())) => {}
            Ok(None) => return Ok(None),
            Err(reason) => {
                self.spoil(slot);
                return Err(reason);
            }
        }
        if pieces.have.len() >= PIECES {
            self.spoil(slot);
            return Err(DropReason::FragmentLimit);
        }
        let more = range.end.saturating_sub(pieces.bytes.len());
        if !place.more {
            pieces.total = Some(range.end);
        }
        self.make_room(port, slot, more)?;
        let Some(pieces) = self.slots[slot as usize].as_mut() else { return Err(DropReason::FragmentLimit) };
        pieces.add(range, bytes);
        if !pieces.is_whole() {
            return Ok(None);
        }
        let mut frame = ethernet::Header {
            dst: gateway,
            src: mac,
            kind: if src.is_ipv4() { ethernet::IPV4 } else { ethernet::IPV6 },
        }
        .bytes()
        .to_vec();
        frame.extend(pieces.packet(&pieces.bytes));
        self.remove(slot);
        Ok(Some(frame))
    }

    fn begin(&mut self, now: Instant, key: Key, mac: Mac) -> u32 {
        let at = usize::from(key.port.0);
        if self.ages.len() <= at {
            self.ages.resize_with(at + 1, Lru::default);
            self.port_bytes.resize(at + 1, 0);
        }
        if self.ages[at].len >= PORT_PACKETS
            && let Some(oldest) = self.ages[at].oldest()
        {
            self.remove(oldest);
        }
        let (bytes, have) = (Vec::new(), Vec::new());
        let pieces = Some(Pieces { key, mac, began: now, bytes, have, total: None, spoiled: false });
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = pieces;
            slot
        } else {
            self.slots.push(pieces);
            u32::try_from(self.slots.len() - 1).expect("packets per port are limited, ports are u16")
        };
        self.by_key.insert(key, slot);
        self.links.push_newest(&mut self.ages[at], slot);
        slot
    }

    /// Makes sure that `more` bytes fit, by ending older packets of the port; counts them.
    fn make_room(&mut self, port: PortId, slot: u32, more: usize) -> Result<(), DropReason> {
        let at = usize::from(port.0);
        while self.port_bytes[at] + more > PORT_BYTES {
            match self.ages[at].oldest().filter(|oldest| *oldest != slot) {
                Some(oldest) => self.remove(oldest),
                None => return Err(DropReason::FragmentLimit),
            }
        }
        if self.bytes + more > BYTES {
            return Err(DropReason::FragmentLimit);
        }
        self.port_bytes[at] += more;
        self.bytes += more;
        Ok(())
    }

    /// Frees the bytes of a packet and remembers that it is none.
    fn spoil(&mut self, slot: u32) {
        let Some(pieces) = self.slots[slot as usize].as_mut() else { return };
        let freed = pieces.bytes.len();
        let port = usize::from(pieces.key.port.0);
        pieces.spoiled = true;
        (pieces.bytes, pieces.have) = (Vec::new(), Vec::new());
        self.port_bytes[port] -= freed;
        self.bytes -= freed;
    }

    fn remove(&mut self, slot: u32) {
        let Some(pieces) = self.slots[slot as usize].take() else { return };
        let port = usize::from(pieces.key.port.0);
        self.by_key.remove(&pieces.key);
        self.links.unlink(&mut self.ages[port], slot);
        self.port_bytes[port] -= pieces.bytes.len();
        self.bytes -= pieces.bytes.len();
        self.free.push(slot);
    }

    pub(crate) fn port_down(&mut self, port: PortId) {
        while let Some(oldest) = self.ages.get(usize::from(port.0)).and_then(Lru::oldest) {
            self.remove(oldest);
        }
    }

    fn oldest(&self) -> Option<(u32, Instant)> {
        let heads = self.ages.iter().filter_map(Lru::oldest);
        let began = |slot: u32| self.slots[slot as usize].as_ref().map(|p| (slot, p.began));
        heads.filter_map(began).min_by_key(|(_, began)| *began)
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.oldest().map(|(_, began)| began + PATIENCE)
    }

    /// The next packet whose time is over. Call until `None`.
    pub(crate) fn pop_expired(&mut self, now: Instant) -> Option<Expired> {
        let (slot, _) = self.oldest().filter(|(_, began)| *began + PATIENCE <= now)?;
        let pieces = self.slots[slot as usize].as_ref()?;
        let first =
            pieces.have.first().filter(|h| h.start == 0).map(|h| pieces.packet(&pieces.bytes[..h.end]));
        let expired = Expired { port: pieces.key.port, mac: pieces.mac, first };
        self.remove(slot);
        Some(expired)
    }

    /// Packets that wait, and the bytes they take.
    #[cfg(test)]
    fn held(&self) -> (usize, usize) {
        (self.by_key.len(), self.bytes)
    }
}

#[cfg(test)]
mod tests;
