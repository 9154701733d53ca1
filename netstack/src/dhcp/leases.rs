//! Who has which address: the table of leases, the order of choice, and the limits.
//!
//! ```text
//!   (unknown) ──offer──► Offered ──request──► Bound ──release, expiry──► Free (remembered for its client)
//!       ▲                   │ 60 s              │ decline
//!       └───────────────────┘                   └──► Declined ──10 min──► Free
//! ```
//! Every list a question needs is kept beside the table, so that no message costs more than a few steps in a tree, however
//! many leases there are: one guest that floods us with DISCOVERs takes no time from the others.
//!
//! **Limits.** The table has [`LEASES`] places. A link may have [`crate::Limits::leases`] addresses (offered, in use and
//! declined together, fixed ones not counted) whatever the others do, and more as long as half of the pool is free: one
//! guest under many names cannot take the pool from the others, while a link with hundreds of containers has what it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use crate::drop_reason::DropReason;
use crate::time::Instant;
use crate::types::{Mac, PortId, Subnet};

/// Addresses remembered; at it the lease that ended longest ago is forgotten.
pub const LEASES: usize = 4096;

/// Who asks: the identifier the client sent (option 61), else its Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Client {
    Id(Box<[u8]>),
    Mac(Mac),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Offered, not yet requested.
    Offered,
    /// In use.
    Bound,
    /// Ended or released; remembered for its client.
    Free,
    /// Somebody else answers for it.
    Declined,
}

#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) client: Client,
    pub(super) mac: Mac,
    /// The link it was made on; `None` when that is gone, or the process was started anew.
    pub(super) port: Option<PortId>,
    pub(super) name: Option<String>,
    /// Whether the name is the operator's, and not what the guest calls itself.
    pub(super) named: bool,
    pub(super) state: State,
    /// When the state ends, or ended.
    pub(super) ends: Instant,
    /// Since when its client has it.
    pub(super) since: Instant,
    /// How many links had gone when its own went.
    pub(super) orphaned: u64,
    /// Given in the configuration: this Ethernet address's alone.
    pub(super) fixed: bool,
}

impl Lease {
    /// Whether the lease is the asker's. One that was made before the guest's system sent an identifier (its boot loader
    /// did not), is known by its Ethernet address alone.
    pub(super) fn is_of(&self, asker: &Asker<'_>) -> bool {
        self.client == asker.client || (self.client == Client::Mac(asker.mac))
    }

    /// Whether the address may be used from the asker's link: it is that link's, or nobody's now.
    fn on(&self, asker: &Asker<'_>) -> bool {
        self.port.is_none_or(|p| p == asker.port) || self.state == State::Free
    }

    /// Whether it takes a place of its link.
    fn counts(&self) -> bool {
        !self.fixed && self.state != State::Free
    }
}

/// Who asks, and from where.
pub(super) struct Asker<'a> {
    pub(super) now: Instant,
    pub(super) port: PortId,
    pub(super) mac: Mac,
    pub(super) client: Client,
    /// What it calls itself.
    pub(super) name: Option<String>,
    /// The address the link's configuration gives its first guest.
    pub(super) wish: Option<Ipv4Addr>,
    /// The name the link's configuration gives it.
    pub(super) link_name: Option<&'a str>,
}

/// The addresses that are leased.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pool {
    pub(super) subnet: Subnet,
    pub(super) gateway: Ipv4Addr,
    pub(super) host_alias: Ipv4Addr,
    /// The resolver, which may have an address of its own.
    pub(super) dns: Option<Ipv4Addr>,
    /// The first and last address that is leased; `None`: the whole subnet.
    pub(super) range: Option<(Ipv4Addr, Ipv4Addr)>,
}

impl Pool {
    pub(super) fn has(&self, ip: Ipv4Addr) -> bool {
        let v4 = IpAddr::V4(ip);
        self.subnet.contains(v4)
            && v4 != self.subnet.network()
            && self.subnet.broadcast() != Some(v4)
            && ip != self.gateway
            && ip != self.host_alias
            && Some(ip) != self.dns
            && self.range.is_none_or(|(first, last)| (first..=last).contains(&ip))
    }

    /// The number of the first address that may be leased.
    fn first(&self) -> u32 {
        match (self.range, self.subnet.network()) {
            (Some((first, _)), IpAddr::V4(network)) => {
                u32::from(first).saturating_sub(u32::from(network)).max(1)
            }
            _ => 1,
        }
    }

    /// How many there are, as far as they are leased.
    fn len(&self) -> usize {
        let bits = 32_u32.saturating_sub(self.subnet.prefix().into());
        let all = 1_usize.checked_shl(bits).unwrap_or(usize::MAX).saturating_sub(4);
        let range = self.range.map_or(usize::MAX, |(first, last)| {
            usize::try_from(u32::from(last).saturating_sub(u32::from(first))).map_or(usize::MAX, |n| n + 1)
        });
        all.min(range).min(LEASES)
    }

    fn address(&self, n: u32) -> Option<Ipv4Addr> {
        match self.subnet.host(n)? {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        }
    }
}

type Timed = BTreeSet<(Instant, Ipv4Addr)>;

/// The table, and what is known of it at once.
pub(super) struct Leases {
    pool: Pool,
    /// Leases a port has whatever the others do.
    share: usize,
    /// Ordered, so that the same messages give the same leases.
    all: BTreeMap<Ipv4Addr, Lease>,
    by_client: BTreeMap<Client, BTreeSet<Ipv4Addr>>,
    by_mac: BTreeMap<Mac, BTreeSet<Ipv4Addr>>,
    /// States that end by themselves.
    ending: Timed,
    /// Free addresses, the one that ended longest ago first.
    free: Timed,
    /// Addresses in use whose link is gone, the one gone longest first.
    orphans: BTreeSet<(u64, Ipv4Addr)>,
    links_gone: u64,
    /// What the links have, fixed addresses in use too.
    by_port: BTreeMap<PortId, BTreeSet<Ipv4Addr>>,
    /// How many places of theirs that takes.
    held: BTreeMap<PortId, usize>,
    /// Every address below this one has been leased.
    fresh: u32,
    /// Whether something happened that listings, names and the kept file should know.
    changed: bool,
}

impl Leases {
    pub(super) fn new(pool: Pool, share: usize) -> Self {
        let fresh = pool.first();
        Self {
            pool,
            share,
            all: BTreeMap::new(),
            by_client: BTreeMap::new(),
            by_mac: BTreeMap::new(),
            ending: Timed::new(),
            free: Timed::new(),
            orphans: BTreeSet::new(),
            links_gone: 0,
            by_port: BTreeMap::new(),
            held: BTreeMap::new(),
            fresh,
            changed: false,
        }
    }

    pub(super) const fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn get(&self, ip: Ipv4Addr) -> Option<&Lease> {
        self.all.get(&ip)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Ipv4Addr, &Lease)> {
        self.all.iter().map(|(ip, lease)| (*ip, lease))
    }

    pub(super) fn is_full(&self) -> bool {
        self.all.len() >= LEASES
    }

    /// What is in use on `port`, the lowest address first.
    pub(super) fn bound_on(&self, port: PortId) -> impl Iterator<Item = (Ipv4Addr, &Lease)> {
        let all = self.by_port.get(&port).into_iter().flatten();
        all.filter_map(|ip| self.all.get(ip).map(|l| (*ip, l))).filter(|(_, l)| l.state == State::Bound)
    }

    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub(super) const fn has_changed(&self) -> bool {
        self.changed
    }

    // ---- the table and its lists ----

    fn note(&mut self, ip: Ipv4Addr, lease: &Lease) {
        self.by_client.entry(lease.client.clone()).or_default().insert(ip);
        self.by_mac.entry(lease.mac).or_default().insert(ip);
        match lease.state {
            State::Free if lease.fixed => {}
            State::Free => drop(self.free.insert((lease.ends, ip))),
            _ => drop(self.ending.insert((lease.ends, ip))),
        }
        if lease.state == State::Bound && lease.port.is_none() && !lease.fixed {
            self.orphans.insert((lease.orphaned, ip));
        }
        if let Some(port) = lease.port.filter(|_| lease.state != State::Free) {
            self.by_port.entry(port).or_default().insert(ip);
            *self.held.entry(port).or_default() += usize::from(lease.counts());
        }
    }

    fn forget(&mut self, ip: Ipv4Addr, lease: &Lease) {
        fn remove<K: Ord>(from: &mut BTreeMap<K, BTreeSet<Ipv4Addr>>, key: &K, ip: Ipv4Addr) {
            if let Some(set) = from.get_mut(key) {
                set.remove(&ip);
                if set.is_empty() {
                    from.remove(key);
                }
            }
        }
        remove(&mut self.by_client, &lease.client, ip);
        remove(&mut self.by_mac, &lease.mac, ip);
        self.free.remove(&(lease.ends, ip));
        self.ending.remove(&(lease.ends, ip));
        self.orphans.remove(&(lease.orphaned, ip));
        if let Some(port) = lease.port {
            remove(&mut self.by_port, &port, ip);
            if let Some(held) = self.held.get_mut(&port) {
                *held = held.saturating_sub(usize::from(lease.counts()));
            }
        }
    }

    pub(super) fn insert(&mut self, ip: Ipv4Addr, lease: Lease) {
        self.remove(ip);
        self.note(ip, &lease);
        self.all.insert(ip, lease);
    }

    pub(super) fn remove(&mut self, ip: Ipv4Addr) {
        if let Some(lease) = self.all.remove(&ip) {
            self.forget(ip, &lease);
            let n = u32::from(ip).checked_sub(match self.pool.subnet.network() {
                IpAddr::V4(network) => network.into(),
                IpAddr::V6(_) => 0,
            });
            self.fresh = self.fresh.min(n.unwrap_or(1)).max(self.pool.first());
        }
    }

    /// Changes the lease of `ip`, if there is one.
    fn change(&mut self, ip: Ipv4Addr, change: impl FnOnce(&mut Lease)) {
        if let Some(mut lease) = self.all.remove(&ip) {
            self.forget(ip, &lease);
            change(&mut lease);
            self.note(ip, &lease);
            self.all.insert(ip, lease);
        }
    }

    // ---- time ----

    /// When the next state ends.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.ending.first().map(|(at, _)| *at)
    }

    /// Ends what is over at `now`.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((_, ip)) = self.ending.first().copied().filter(|(at, _)| *at <= now) {
            match self.all.get(&ip).map(|l| (l.state, l.fixed)) {
                // Nobody took it: nothing is to be remembered.
                Some((State::Offered, false)) => self.remove(ip),
                Some((state, _)) => {
                    self.changed |= state == State::Bound;
                    self.change(ip, |l| l.state = State::Free);
                }
                None => break, // cannot be: both are written together
            }
        }
    }

    // ---- choice ----

    /// The addresses that are the asker's, or were.
    fn of<'a>(&'a self, asker: &'a Asker) -> impl Iterator<Item = (Ipv4Addr, &'a Lease)> + 'a {
        let mac = Client::Mac(asker.mac);
        let also = (mac != asker.client).then(|| self.by_client.get(&mac)).flatten();
        let fixed = self.by_mac.get(&asker.mac).into_iter().flatten();
        let fixed = fixed.filter(|ip| self.all.get(ip).is_some_and(|l| l.fixed));
        let known = self.by_client.get(&asker.client).into_iter().chain(also).flatten();
        known.chain(fixed).filter_map(|ip| self.all.get(ip).map(|lease| (*ip, lease)))
    }

    /// The address for a client: its own, the one it or its link wishes, the lowest never leased, the one free longest,
    /// and at last the one whose link is gone longest.
    pub(super) fn choose(
        &mut self,
        asker: &Asker<'_>,
        requested: Option<Ipv4Addr>,
    ) -> Result<Ipv4Addr, DropReason> {
        let own = self.of(asker).filter(|(_, l)| l.state != State::Declined);
        let own = own.max_by_key(|(_, l)| (l.fixed, l.ends)).map(|(ip, _)| ip);
        let wishes = [own, asker.wish, requested];
        if let Some(ip) = wishes.into_iter().flatten().find(|ip| self.may_have(asker, *ip)) {
            return Ok(ip);
        }
        if self.all.len() < LEASES
            && let Some(ip) = self.lowest_fresh()
        {
            return Ok(ip);
        }
        // An address whose link is gone is still lent (RFC 2131 §2.2): it goes to another only when there is no other.
        let free = self.free.first().map(|(_, ip)| *ip);
        free.or_else(|| self.orphans.first().map(|(_, ip)| *ip)).ok_or(DropReason::DhcpExhausted)
    }

    fn lowest_fresh(&mut self) -> Option<Ipv4Addr> {
        loop {
            let tried = (self.fresh - self.pool.first()) as usize;
            let ip = self.pool.address(self.fresh).filter(|_| tried <= LEASES * 2)?;
            if self.pool.has(ip) && !self.all.contains_key(&ip) {
                return Some(ip);
            }
            self.fresh += 1;
        }
    }

    /// Whether the client may be given `ip`, now.
    pub(super) fn may_have(&self, asker: &Asker<'_>, ip: Ipv4Addr) -> bool {
        if !self.pool.has(ip) {
            return false;
        }
        match self.all.get(&ip) {
            None => self.all.len() < LEASES && !self.has_fixed_elsewhere(asker, ip),
            Some(l) if l.fixed => l.mac == asker.mac && l.state != State::Declined && l.on(asker),
            Some(l) if l.is_of(asker) => {
                l.state != State::Declined && l.on(asker) && !self.has_fixed_elsewhere(asker, ip)
            }
            Some(l) => l.state == State::Free && !self.has_fixed_elsewhere(asker, ip),
        }
    }

    /// Whether the asker has a fixed address other than `ip` that it can use.
    fn has_fixed_elsewhere(&self, asker: &Asker<'_>, ip: Ipv4Addr) -> bool {
        let mine = self.by_mac.get(&asker.mac).into_iter().flatten().filter(|other| **other != ip);
        mine.filter_map(|other| self.all.get(other))
            .any(|l| l.fixed && l.state != State::Declined && l.on(asker))
    }

    /// Whether the asker's link may have a lease of `ip`: it has it already, or a place is left.
    pub(super) fn admits(&self, asker: &Asker<'_>, ip: Ipv4Addr) -> Result<(), DropReason> {
        let counted = |l: &Lease| l.fixed || (l.counts() && l.port == Some(asker.port));
        if self.all.get(&ip).is_some_and(counted) {
            return Ok(());
        }
        let held = self.held.get(&asker.port).copied().unwrap_or(0);
        let pool = self.pool.len();
        let taken = self.ending.len(); // what is fixed and not in use is too little to count
        if held < self.share || taken < pool / 2 { Ok(()) } else { Err(DropReason::DhcpLimit) }
    }

    // ---- what happens to leases ----

    /// Gives `ip` to the asker, in `state` until `ends`.
    pub(super) fn hold(&mut self, asker: &Asker<'_>, ip: Ipv4Addr, state: State, ends: Instant) {
        let (name, named) = self.name_for(asker, ip);
        let Some(known) = self.all.get(&ip) else {
            let lease = Lease {
                client: asker.client.clone(),
                mac: asker.mac,
                port: Some(asker.port),
                name,
                named,
                state,
                ends,
                since: asker.now,
                orphaned: 0,
                fixed: false,
            };
            self.changed |= state == State::Bound;
            self.insert(ip, lease);
            return;
        };
        let renewed = known.state == State::Bound && known.is_of(asker);
        // An offer to a client whose lease still runs takes nothing from it.
        if state == State::Offered && renewed && known.ends > ends && known.port == Some(asker.port) {
            return;
        }
        self.changed |= state == State::Bound || known.state == State::Bound;
        self.change(ip, |lease| {
            lease.client.clone_from(&asker.client);
            lease.mac = asker.mac;
            lease.port = Some(asker.port);
            (lease.name, lease.named) = (name, named);
            if !renewed {
                lease.since = asker.now;
            }
            (lease.state, lease.ends) = (state, ends);
        });
    }

    /// The name a lease of `ip` would have, and whether the operator gave it: that of the fixed lease, else the link's for
    /// the link's first guest, else the guest's own, else what it called itself before.
    pub(super) fn name_for(&self, asker: &Asker<'_>, ip: Ipv4Addr) -> (Option<String>, bool) {
        let known = self.all.get(&ip);
        if let Some(lease) = known.filter(|l| l.fixed && l.named) {
            return (lease.name.clone(), true);
        }
        if let Some(name) = asker.link_name
            && self.bound_on(asker.port).next().is_none_or(|(_, first)| first.mac == asker.mac)
        {
            return (Some(name.to_owned()), true);
        }
        let before = known.filter(|l| l.is_of(asker) && !l.named).and_then(|l| l.name.clone());
        (asker.name.clone().or(before), false)
    }

    /// The asker says that somebody else answers for `ip`: nobody gets it until `until`. False when it is not its own.
    pub(super) fn decline(&mut self, asker: &Asker<'_>, ip: Ipv4Addr, until: Instant) -> bool {
        let mine =
            |l: &Lease| (l.is_of(asker) || (l.fixed && l.mac == asker.mac)) && l.port == Some(asker.port);
        let Some(lease) = self.all.get(&ip).filter(|l| mine(l)) else { return false };
        self.changed |= lease.state == State::Bound;
        self.change(ip, |l| (l.state, l.ends) = (State::Declined, until));
        true
    }

    /// The asker gives `ip` back. False when it does not have it.
    pub(super) fn release(&mut self, asker: &Asker<'_>, ip: Ipv4Addr) -> bool {
        let mine = |l: &Lease| l.is_of(asker) && l.port == Some(asker.port) && l.state == State::Bound;
        if !self.all.get(&ip).is_some_and(mine) {
            return false;
        }
        self.changed = true;
        self.change(ip, |l| (l.state, l.ends) = (State::Free, asker.now));
        true
    }

    /// The asker took another server's offer: ours are free.
    pub(super) fn withdraw_offers(&mut self, asker: &Asker<'_>) {
        let offered = self.of(asker).filter(|(_, l)| l.state == State::Offered && l.port == Some(asker.port));
        for (ip, fixed) in offered.map(|(ip, l)| (ip, l.fixed)).collect::<Vec<_>>() {
            if fixed {
                self.change(ip, |l| l.state = State::Free);
            } else {
                self.remove(ip);
            }
        }
    }

    /// The link is gone: its leases may be claimed by the same clients from another link.
    pub(super) fn port_down(&mut self, port: PortId) {
        self.links_gone += 1;
        let gone = self.links_gone;
        for ip in self.by_port.get(&port).cloned().unwrap_or_default() {
            self.change(ip, |l| (l.port, l.orphaned) = (None, gone));
        }
        self.held.remove(&port);
    }
}

#[cfg(test)]
impl Leases {
    /// Builds every list anew, and compares.
    pub(super) fn check(&self) {
        let mut anew = Self::new(self.pool, self.share);
        for (ip, lease) in &self.all {
            anew.note(*ip, lease);
        }
        assert_eq!(self.by_client, anew.by_client);
        assert_eq!(self.by_mac, anew.by_mac);
        assert_eq!(self.ending, anew.ending);
        assert_eq!(self.free, anew.free);
        assert_eq!(self.orphans, anew.orphans);
        let held = |all: &Self| all.held.clone().into_iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>();
        assert_eq!(held(self), held(&anew));
        assert_eq!(self.by_port, anew.by_port);
        for n in self.pool.first()..self.fresh {
            let ip = self.pool.address(n).filter(|ip| self.pool.has(*ip));
            assert!(ip.is_none_or(|ip| self.all.contains_key(&ip)), "{ip:?} is fresh");
        }
    }
}
