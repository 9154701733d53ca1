//! UDP between guests and the host: the table of NAT bindings, and of clients of published ports.
//!
//! ```text
//!  datagram from guest ─┬─ to an address that is a published port's client ─► UdpPath::Client
//!                       └─ (port, guest address) ─► binding ─► UdpPath::Binding: one host socket each
//!  datagram from host ─► binding ─► filter ─► guest
//! ```
//! The mapping is endpoint-independent (RFC 4787 REQ-1): one host socket for each address and port of a guest, for
//! every destination. The filter is address-dependent (§5) unless [`crate::UdpFilter`] says otherwise: any port of an address the
//! guest has sent to may answer. A binding lives 5 min (or [`UdpConfig::idle`]) after the last datagram *from the guest*
//! (REQ-5, REQ-6), or until the guest says that nobody has the port any more; 30 s when it has only ever spoken to port 53 (REQ-5a allows it there). At most `Limits::udp_bindings` per
//! port of each kind; the idlest goes. Each remembers the [`PEERS`] it sent to last, or up to twice as many.
//!
//! Echo requests are bindings too (RFC 5508 §3): the identifier stands for the port, they live [`IDLE_ECHO`], and
//! `Limits::pings` of a port are remembered.

mod peers;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;

use ahash::RandomState;

use crate::config::{Limits, UdpConfig};
use crate::drop_reason::DropReason;
use crate::host::UdpPath;
use crate::lru::{Links, Lru};
use crate::time::{Duration, Instant};
use crate::timer::TimerWheel;
use crate::types::{Mac, PortId};

pub use self::peers::PEERS;
use self::peers::Peers;

/// Stale entries of the timer wheel that are not worth a sweep.
const STALE_TIMERS: usize = 1024;
/// See the module documentation.
pub const IDLE_DNS: Duration = Duration::from_secs(30);
/// See the module documentation (RFC 5508 REQ-2: 60 s at the least).
pub const IDLE_ECHO: Duration = Duration::from_secs(60);

/// One binding; the slot is small and reused, the generation tells it from an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindingId {
    slot: u32,
    generation: u32,
}

impl BindingId {
    /// The slot: below the largest number of bindings that ever were at once.
    #[must_use]
    pub const fn slot(self) -> usize {
        self.slot as usize
    }
}

/// What a listing says of one binding of UDP, or one client of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindingReport {
    /// The guest's port of the switch.
    pub port: PortId,
    /// The guest's end.
    pub guest: SocketAddr,
    /// Where its last datagram went; of a published client, the client. Both as the guest sees them.
    pub remote: SocketAddr,
    /// Whether this is a client of a published port.
    pub published: bool,
    /// Payload bytes to the host.
    pub bytes_to_host: u64,
    /// Payload bytes to the guest.
    pub bytes_to_guest: u64,
    /// Since it began.
    pub age: Duration,
    /// Since the guest last sent.
    pub idle: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    /// A binding.
    Guest(PortId, SocketAddr),
    /// A binding of echo requests: the guest's address, with the identifier for a port.
    Echo(PortId, SocketAddr),
    /// A client of a published port: the guest's end, and the client as the guest sees it.
    Client(SocketAddr, SocketAddr),
}

impl Key {
    /// Which of a port's lists it is in.
    const fn kind(&self) -> usize {
        match self {
            Self::Guest(..) => 0,
            Self::Client(..) => 1,
            Self::Echo(..) => 2,
        }
    }
}

struct Entry {
    key: Key,
    port: PortId,
    mac: Mac,
    guest: SocketAddr,
    remote: SocketAddr,
    /// Of a client: the driver's listener.
    listener: u32,
    dns_only: bool,
    created: Instant,
    last_active: Instant,
    bytes_to_host: u64,
    bytes_to_guest: u64,
    peers: Peers,
}

impl Entry {
    fn ends(&self, idle: Duration) -> Instant {
        self.last_active
            + match self.key {
                Key::Echo(..) => IDLE_ECHO,
                _ if self.dns_only => IDLE_DNS.min(idle),
                _ => idle,
            }
    }

    fn target(&self) -> Target {
        Target { port: self.port, mac: self.mac, guest: self.guest }
    }
}

/// A guest's end of UDP: where a datagram comes from, or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
    pub(crate) guest: SocketAddr,
}

/// The table of all ports.
pub(crate) struct Bindings {
    slots: Vec<(u32, Option<Entry>)>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32, RandomState>,
    /// Per port, oldest activity first, by kind of key.
    ages: Vec<[Lru; 3]>,
    lru: Links,
    wheel: TimerWheel<BindingId>,
    closed: VecDeque<BindingId>,
    /// By kind of key.
    limits: [usize; 3],
    config: UdpConfig,
    bindings: usize,
    /// Of all kinds, since the start.
    pub(crate) opened_total: u64,
}

impl Bindings {
    pub(crate) fn new(limits: &Limits, config: UdpConfig, seed: u64) -> Self {
        let keys = RandomState::with_seeds(seed.rotate_left(40), seed, !seed, 3);
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::with_hasher(keys),
            ages: Vec::new(),
            lru: Links::default(),
            wheel: TimerWheel::new(),
            closed: VecDeque::new(),
            limits: [limits.udp_bindings, limits.udp_bindings, limits.pings],
            config,
            bindings: 0,
            opened_total: 0,
        }
    }

    /// Bindings of UDP now, published clients not counted.
    pub(crate) const fn len(&self) -> usize {
        self.bindings
    }

    /// A datagram `from` a guest to `remote`. `seen` is the destination as the guest knows it, `remote` as the host does.
    pub(crate) fn to_host(
        &mut self,
        now: Instant,
        from: Target,
        seen: SocketAddr,
        remote: SocketAddr,
        bytes: usize,
    ) -> UdpPath {
        let Target { port, mac, guest } = from;
        if let Some(slot) = self.by_key.get(&Key::Client(guest, seen)).copied()
            && let Some(entry) = self.entry(slot).filter(|e| e.port == port)
        {
            entry.last_active = now;
            entry.bytes_to_host += bytes as u64;
            let path = UdpPath::Client { listener: entry.listener, client: entry.remote };
            self.touch(slot);
            return path;
        }
        let (binding, new) =
            self.outbound(now, Key::Guest(port, guest), Target { port, mac, guest }, remote, bytes);
        UdpPath::Binding { binding, new }
    }

    /// An echo request `from` a guest to `remote`; the identifier stands in the place of the guest's port.
    pub(crate) fn echo_to_host(
        &mut self,
        now: Instant,
        from: Target,
        remote: SocketAddr,
        bytes: usize,
    ) -> BindingId {
        self.outbound(now, Key::Echo(from.port, from.guest), from, remote, bytes).0
    }

    fn outbound(
        &mut self,
        now: Instant,
        key: Key,
        from: Target,
        remote: SocketAddr,
        bytes: usize,
    ) -> (BindingId, bool) {
        let known = self.by_key.get(&key).copied();
        let new = known.is_none();
        let slot = known.unwrap_or_else(|| self.insert(now, key, from, remote, 0));
        let filter = self.config.filter;
        if let Some(entry) = self.entry(slot) {
            entry.mac = from.mac;
            entry.last_active = now;
            entry.bytes_to_host += bytes as u64;
            entry.dns_only &= remote.port() == 53;
            if entry.remote != remote || new {
                entry.remote = remote;
                entry.peers.note(filter, remote);
            }
        }
        self.touch(slot);
        (self.id(slot), new)
    }

    /// A datagram from the host at `remote` for a binding.
    pub(crate) fn from_host(
        &mut self,
        id: BindingId,
        remote: SocketAddr,
        bytes: usize,
    ) -> Result<Target, DropReason> {
        let filter = self.config.filter;
        let entry = self.known(id).filter(|e| e.peers.admit(filter, remote)).ok_or(DropReason::Filtered)?;
        entry.bytes_to_guest += bytes as u64;
        Ok(entry.target())
    }

    /// Whom an error about a packet to `remote` concerns, and whether that was an echo request. The guest must have sent
    /// there.
    pub(crate) fn blamed(&mut self, id: BindingId, remote: SocketAddr) -> Result<(Target, bool), DropReason> {
        let filter = self.config.filter;
        let entry = self.known(id).filter(|e| e.peers.admit(filter, remote)).ok_or(DropReason::Filtered)?;
        Ok((entry.target(), matches!(entry.key, Key::Echo(..))))
    }

    /// Nobody has the `guest`'s port any more, says the guest about a datagram of `remote`.
    pub(crate) fn refused(&mut self, port: PortId, guest: SocketAddr, remote: SocketAddr) {
        if let Some(slot) = self.by_key.get(&Key::Guest(port, guest)).copied()
            && self.entry(slot).is_some_and(|e| e.remote == remote)
        {
            self.remove(slot);
        }
    }

    fn known(&mut self, id: BindingId) -> Option<&mut Entry> {
        self.slots.get_mut(id.slot()).filter(|s| s.0 == id.generation)?.1.as_mut()
    }

    /// A datagram of `client` to a published port of `guest`, which knows the client as `seen`. `listener` is the
    /// driver's number of the published port.
    pub(crate) fn from_client(
        &mut self,
        now: Instant,
        target: Target,
        seen: SocketAddr,
        client: SocketAddr,
        listener: u32,
        bytes: usize,
    ) {
        let key = Key::Client(target.guest, seen);
        let known = self.by_key.get(&key).copied();
        let slot = known.unwrap_or_else(|| self.insert(now, key, target, client, listener));
        if let Some(entry) = self.entry(slot) {
            entry.remote = client;
            entry.listener = listener;
            entry.last_active = now;
            entry.bytes_to_guest += bytes as u64;
        }
        self.touch(slot);
    }

    pub(crate) fn port_of(&self, id: BindingId) -> Option<PortId> {
        let (_, entry) = self.slots.get(id.slot()).filter(|s| s.0 == id.generation)?;
        entry.as_ref().map(|e| e.port)
    }

    /// Whether `seen` stands for another client than `client` at this guest already.
    pub(crate) fn is_taken(
        &mut self,
        guest: SocketAddr,
        seen: SocketAddr,
        client: SocketAddr,
        listener: u32,
    ) -> bool {
        let slot = self.by_key.get(&Key::Client(guest, seen)).copied();
        slot.and_then(|s| self.entry(s)).is_some_and(|e| e.remote != client || e.listener != listener)
    }

    /// The published port `listener` is gone: its clients are forgotten.
    pub(crate) fn listener_closed(&mut self, listener: u32) {
        let gone = |e: &Entry| matches!(e.key, Key::Client(..)) && e.listener == listener;
        self.remove_where(gone);
    }

    pub(crate) fn port_down(&mut self, port: PortId) {
        self.remove_where(|e| e.port == port);
    }

    fn remove_where(&mut self, gone: impl Fn(&Entry) -> bool) {
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            if self.entry(slot).is_some_and(|e| gone(e)) {
                self.remove(slot);
            }
        }
    }

    /// The next binding whose socket the driver should close.
    pub(crate) fn poll_closed(&mut self) -> Option<BindingId> {
        self.closed.pop_front()
    }

    /// Entries of the timer wheel, stale ones included.
    pub(crate) fn timers(&self) -> usize {
        self.wheel.len()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.wheel.poll_at()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        while let Some((_, id)) = self.wheel.pop_expired(now) {
            if self.slots.get(id.slot()).is_none_or(|s| s.0 != id.generation) {
                continue;
            }
            let idle = self.config.idle;
            let Some(ends) = self.entry(id.slot).map(|e| e.ends(idle)) else { continue };
            if ends <= now {
                self.remove(id.slot);
            } else {
                self.wheel.insert(ends, id);
            }
        }
    }

    pub(crate) fn reports(&self, now: Instant) -> impl Iterator<Item = BindingReport> + '_ {
        let entries = self.slots.iter().filter_map(|(_, e)| e.as_ref());
        entries.filter(|e| !matches!(e.key, Key::Echo(..))).map(move |e| BindingReport {
            port: e.port,
            guest: e.guest,
            remote: match e.key {
                Key::Client(_, seen) => seen,
                Key::Guest(..) | Key::Echo(..) => e.remote,
            },
            published: matches!(e.key, Key::Client(..)),
            bytes_to_host: e.bytes_to_host,
            bytes_to_guest: e.bytes_to_guest,
            age: now.since(e.created),
            idle: now.since(e.last_active),
        })
    }

    fn id(&self, slot: u32) -> BindingId {
        BindingId { slot, generation: self.slots[slot as usize].0 }
    }

    fn entry(&mut self, slot: u32) -> Option<&mut Entry> {
        self.slots.get_mut(slot as usize)?.1.as_mut()
    }

    fn ages(&mut self, port: PortId, key: &Key) -> &mut Lru {
        let at = usize::from(port.0);
        if self.ages.len() <= at {
            self.ages.resize_with(at + 1, Default::default);
        }
        &mut self.ages[at][key.kind()]
    }

    fn touch(&mut self, slot: u32) {
        let Some((port, key)) = self.entry(slot).map(|e| (e.port, e.key)) else { return };
        let mut age = *self.ages(port, &key);
        self.lru.to_newest(&mut age, slot);
        *self.ages(port, &key) = age;
    }

    fn insert(&mut self, now: Instant, key: Key, guest: Target, remote: SocketAddr, listener: u32) -> u32 {
        let Target { port, mac, guest } = guest;
        let age = *self.ages(port, &key);
        if age.len >= self.limits[key.kind()]
            && let Some(idlest) = age.oldest()
        {
            self.remove(idlest);
        }
        let entry = Entry {
            key,
            port,
            mac,
            guest,
            remote,
            listener,
            dns_only: true,
            created: now,
            last_active: now,
            bytes_to_host: 0,
            bytes_to_guest: 0,
            peers: Peers::default(),
        };
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize].1 = Some(entry);
            slot
        } else {
            self.slots.push((0, Some(entry)));
            u32::try_from(self.slots.len() - 1).expect("bindings are limited per port, ports are u16")
        };
        self.by_key.insert(key, slot);
        self.bindings += usize::from(matches!(key, Key::Guest(..)));
        self.opened_total += 1;
        let mut age = *self.ages(port, &key);
        self.lru.push_newest(&mut age, slot);
        *self.ages(port, &key) = age;
        let id = self.id(slot);
        // It may live longer than this; the timer looks again.
        self.wheel.insert(now + IDLE_DNS, id);
        // Entries of bindings that were evicted would stay until their time, and a guest makes new bindings faster.
        if self.wheel.len() > 2 * self.by_key.len() + STALE_TIMERS {
            let slots = &self.slots;
            self.wheel
                .retain(|_, id| slots.get(id.slot()).is_some_and(|s| s.0 == id.generation && s.1.is_some()));
        }
        slot
    }

    fn remove(&mut self, slot: u32) {
        let id = self.id(slot);
        let Some(entry) = self.slots[slot as usize].1.take() else { return };
        self.slots[slot as usize].0 = id.generation.wrapping_add(1);
        self.by_key.remove(&entry.key);
        let mut age = *self.ages(entry.port, &entry.key);
        self.lru.unlink(&mut age, slot);
        *self.ages(entry.port, &entry.key) = age;
        self.free.push(slot);
        match entry.key {
            Key::Guest(..) => {
                self.bindings -= 1;
                self.closed.push_back(id);
            }
            Key::Echo(..) => self.closed.push_back(id),
            Key::Client(..) => {}
        }
    }
}

#[cfg(test)]
mod tests;
