//! Which guest has which address: what ARP, neighbour discovery and the frames themselves have told.
//!
//! An address belongs to the port that first used it until that port goes down; frames of other ports that claim
//! it are dropped. Leases come first: an address leased on one port cannot be claimed on another.
//!
//! A guest makes itself as many IPv6 addresses as it likes, and new ones each day (RFC 8981): of one Ethernet address the
//! [`PER_MAC`] learned last are remembered. Beyond [`crate::Limits::addresses`] of one port further ones work but are not
//! remembered, so only connections they open do.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

use ahash::RandomState;

use crate::drop_reason::DropReason;
use crate::types::{Mac, PortId};

/// IPv6 addresses of one Ethernet address that are remembered; the one learned first is forgotten first, and learned again
/// when it is used.
pub const PER_MAC: usize = 32;

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
}

/// The table of all ports.
pub(crate) struct Neighbours {
    by_ip: HashMap<IpAddr, Neighbour, RandomState>,
    /// The IPv6 addresses of each Ethernet address, in the order in which they were learned: together those of `by_ip`.
    of_mac: HashMap<(PortId, Mac), VecDeque<Ipv6Addr>, RandomState>,
    per_port: Vec<usize>,
    /// By port, the addresses by which the guest there may be named: its IPv4 and its first IPv6 one with a route.
    known_by: Vec<[Option<(IpAddr, Mac)>; 2]>,
    /// Whether one of `known_by` has changed.
    changed: bool,
    /// The address seen last: a burst of one guest needs no hash.
    last: Option<(IpAddr, Neighbour)>,
    limit: usize,
}

impl Neighbours {
    /// `limit` addresses of one port at most.
    pub(crate) fn new(limit: usize, seed: u64) -> Self {
        let keys = RandomState::with_seeds(!seed, seed, seed.rotate_left(31), seed ^ 0x5bd1_e995);
        let (by_ip, of_mac) = (HashMap::with_hasher(keys.clone()), HashMap::with_hasher(keys));
        Self { by_ip, of_mac, per_port: Vec::new(), known_by: Vec::new(), changed: false, last: None, limit }
    }

    /// Notes that `ip` was used by `mac` on `port`. True when that is news.
    ///
    /// # Errors
    /// `SourceSpoofed` when the address belongs to another port.
    pub(crate) fn learn(&mut self, ip: IpAddr, port: PortId, mac: Mac) -> Result<bool, DropReason> {
        let new = Neighbour { port, mac };
        if self.last == Some((ip, new)) {
            return Ok(false);
        }
        let slot = usize::from(port.0);
        if self.per_port.len() <= slot {
            self.per_port.resize(slot + 1, 0);
        }
        let before = self.by_ip.get(&ip).copied();
        match before {
            Some(known) if known.port != port => return Err(DropReason::SourceSpoofed),
            Some(known) if known == new => {}
            Some(known) => {
                self.disown(ip, known);
                self.by_ip.insert(ip, new);
                self.own(ip, new);
            }
            None => {
                self.own(ip, new);
                if self.per_port[slot] >= self.limit {
                    self.disown(ip, new);
                    return Ok(false);
                }
                self.by_ip.insert(ip, new);
                self.per_port[slot] += 1;
            }
        }
        self.last = Some((ip, new));
        if before.is_none() {
            self.name(ip, new);
        }
        Ok(before != Some(new))
    }

    /// Notes the address of a guest that nobody has leased it. IPv4: the newest of the machine that spoke first, which may be
    /// given another. IPv6: the first, for those a guest makes itself later are not to be found again (RFC 8981).
    fn name(&mut self, ip: IpAddr, at: Neighbour) {
        let slot = usize::from(at.port.0);
        if self.known_by.len() <= slot {
            self.known_by.resize(slot + 1, [None; 2]);
        }
        let place = match ip {
            IpAddr::V4(_) => 0,
            IpAddr::V6(v6) if v6.is_unicast_link_local() => return,
            IpAddr::V6(_) => 1,
        };
        let known = &mut self.known_by[slot][place];
        if known.is_none_or(|(_, mac)| place == 0 && mac == at.mac) {
            *known = Some((ip, at.mac));
            self.changed = true;
        }
    }

    /// The addresses by which the guest on `port` may be named, of each version one at the most.
    pub(crate) fn known_by(&self, port: PortId) -> impl Iterator<Item = IpAddr> + '_ {
        let known = self.known_by.get(usize::from(port.0)).into_iter().flatten();
        known.filter_map(|known| known.map(|(ip, _)| ip))
    }

    /// Whether what [`Self::known_by`] says has changed since this was last asked.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Nobody is known by `ip` any more.
    fn unname(&mut self, ip: IpAddr, port: PortId) {
        for known in self.known_by.get_mut(usize::from(port.0)).into_iter().flatten() {
            self.changed |= known.take_if(|(known, _)| *known == ip).is_some();
        }
    }

    /// Puts an IPv6 address among those of its Ethernet address, in place of the first when there are enough.
    fn own(&mut self, ip: IpAddr, at: Neighbour) {
        let IpAddr::V6(ip) = ip else { return };
        let addresses = self.of_mac.entry((at.port, at.mac)).or_default();
        addresses.push_back(ip);
        if addresses.len() > PER_MAC
            && let Some(first) = addresses.pop_front()
            && self.by_ip.remove(&IpAddr::V6(first)).is_some()
        {
            self.unname(first.into(), at.port);
            self.per_port[usize::from(at.port.0)] -= 1;
        }
    }

    fn disown(&mut self, ip: IpAddr, at: Neighbour) {
        let IpAddr::V6(ip) = ip else { return };
        if let Some(addresses) = self.of_mac.get_mut(&(at.port, at.mac)) {
            addresses.retain(|a| *a != ip);
            if addresses.is_empty() {
                self.of_mac.remove(&(at.port, at.mac));
            }
        }
    }

    /// Forgets that `ip` belongs to another port than `port`.
    pub(crate) fn take_from_others(&mut self, ip: IpAddr, port: PortId) {
        if let Some(known) = self.by_ip.get(&ip).copied().filter(|known| known.port != port) {
            self.disown(ip, known);
            self.by_ip.remove(&ip);
            self.unname(ip, known.port);
            self.per_port[usize::from(known.port.0)] -= 1;
            self.last = None;
        }
    }

    pub(crate) fn get(&self, ip: IpAddr) -> Option<Neighbour> {
        self.by_ip.get(&ip).copied()
    }

    /// The address by which the guest on `port` is reached when nothing else is said: IPv4, else IPv6, else link-local.
    pub(crate) fn first_on(&self, port: PortId) -> Option<IpAddr> {
        // The order of addresses is this order already: fd00::/8 comes before fe80::/10.
        self.by_ip.iter().filter(|(_, n)| n.port == port).map(|(ip, _)| *ip).min()
    }

    /// Every address that is remembered of `port`.
    pub(crate) fn on(&self, port: PortId) -> impl Iterator<Item = IpAddr> + '_ {
        self.by_ip.iter().filter(move |(_, n)| n.port == port).map(|(ip, _)| *ip)
    }

    pub(crate) fn port_down(&mut self, port: PortId) {
        self.by_ip.retain(|_, n| n.port != port);
        self.of_mac.retain(|(p, _), _| *p != port);
        if let Some(n) = self.per_port.get_mut(usize::from(port.0)) {
            *n = 0;
        }
        if let Some(known) = self.known_by.get_mut(usize::from(port.0)) {
            self.changed |= known.iter().any(Option::is_some);
            *known = [None; 2];
        }
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v6(n: usize) -> IpAddr {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::try_from(n).unwrap()])
    }

    #[test]
    fn an_address_belongs_to_the_port_that_used_it_first_until_that_goes_down() {
        let mut table = Neighbours::new(8, 1);
        let ip = IpAddr::from([192, 168, 127, 2]);
        assert_eq!(table.learn(ip, PortId(0), Mac([2; 6])), Ok(true));
        assert_eq!(table.learn(ip, PortId(0), Mac([2; 6])), Ok(false));
        assert_eq!(table.learn(ip, PortId(1), Mac([4; 6])), Err(DropReason::SourceSpoofed));
        table.port_down(PortId(0));
        assert_eq!(table.learn(ip, PortId(1), Mac([4; 6])), Ok(true));
    }

    #[test]
    fn beyond_the_limit_of_a_port_its_addresses_are_not_remembered_and_those_of_others_are() {
        let mut table = Neighbours::new(1, 1);
        assert_eq!(table.learn([10, 0, 0, 1].into(), PortId(0), Mac([2; 6])), Ok(true));
        for further in [IpAddr::from([10, 0, 0, 2]), v6(1)] {
            assert_eq!(table.learn(further, PortId(0), Mac([2; 6])), Ok(false));
            assert_eq!(table.get(further), None);
        }
        assert!(table.of_mac.is_empty());
        assert_eq!(table.learn([10, 0, 0, 3].into(), PortId(1), Mac([4; 6])), Ok(true));
    }

    #[test]
    fn rfc_8981_a_guest_with_ever_new_addresses_keeps_the_last_and_takes_no_more_room() {
        let mut table = Neighbours::new(1000, 1);
        for n in 0..=3 * PER_MAC {
            assert_eq!(table.learn(v6(n), PortId(0), Mac([2; 6])), Ok(true));
        }
        assert_eq!((table.by_ip.len(), table.per_port[0]), (PER_MAC, PER_MAC));
        assert!(table.get(v6(2 * PER_MAC)).is_none() && table.get(v6(2 * PER_MAC + 1)).is_some());
    }

    #[test]
    fn an_address_that_moves_between_ethernet_addresses_of_a_port_is_counted_once() {
        let mut table = Neighbours::new(1000, 1);
        for n in 0..500u16 {
            let [a, b] = n.to_be_bytes();
            assert_eq!(table.learn(v6(1), PortId(0), Mac([2, 0, 0, 0, a, b])), Ok(true));
        }
        assert_eq!((table.by_ip.len(), table.of_mac.len(), table.per_port[0]), (1, 1, 1));
    }

    #[test]
    fn a_guest_is_named_by_its_newest_ipv4_address_and_its_first_of_ipv6_until_its_link_goes() {
        let mut table = Neighbours::new(1000, 1);
        let (port, mac) = (PortId(0), Mac([2; 6]));
        let v4 = |last| IpAddr::from([10, 0, 0, last]);
        table.learn("fe80::1".parse().unwrap(), port, mac).unwrap();
        assert!(!table.take_changed());
        for ip in [v4(1), v6(1), v4(2), v6(2)] {
            table.learn(ip, port, mac).unwrap();
        }
        // Another machine behind the same link is not the one that has its name.
        table.learn(v4(3), port, Mac([4; 6])).unwrap();
        assert!(table.take_changed());
        assert_eq!(table.known_by(port).collect::<Vec<_>>(), [v4(2), v6(1)]);
        // Ever new addresses are no news, but for one in as many as are remembered.
        let mut news = 0;
        for n in 3..3 + 10 * PER_MAC {
            table.learn(v6(n), port, mac).unwrap();
            news += usize::from(table.take_changed());
        }
        assert!(news <= 10, "{news}");
        table.port_down(port);
        assert!(table.take_changed() && table.known_by(port).next().is_none());
    }

    #[test]
    fn a_guest_is_reached_by_ipv4_then_by_the_prefix_then_by_its_link_local_address() {
        let mut table = Neighbours::new(8, 1);
        let order: [IpAddr; 3] = ["fe80::1".parse().unwrap(), v6(1), [10, 0, 0, 1].into()];
        for ip in order {
            table.learn(ip, PortId(0), Mac([2; 6])).unwrap();
            assert_eq!(table.first_on(PortId(0)), Some(ip));
        }
    }
}
