//! Which guest has which address: what ARP and the frames themselves have told.
//!
//! An address belongs to the port that first used it until that port goes down; frames of other ports that claim
//! it are dropped. Leases come first: an address leased on one port cannot be claimed on another.

use std::collections::HashMap;
use std::net::IpAddr;

use ahash::RandomState;

use crate::drop_reason::DropReason;
use crate::types::{Mac, PortId};

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
}

/// The table of all ports.
pub(crate) struct Neighbours {
    by_ip: HashMap<IpAddr, Neighbour, RandomState>,
    /// The address seen last: a burst of one guest needs no hash.
    last: Option<(IpAddr, Neighbour)>,
    limit: usize,
}

impl Neighbours {
    /// `limit` addresses at most; further ones work but are not remembered, so only connections they open do.
    pub(crate) fn new(limit: usize, seed: u64) -> Self {
        let keys = RandomState::with_seeds(!seed, seed, seed.rotate_left(31), seed ^ 0x5bd1_e995);
        Self { by_ip: HashMap::with_hasher(keys), last: None, limit }
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
        let full = self.by_ip.len() >= self.limit;
        match self.by_ip.get_mut(&ip) {
            Some(known) if known.port != port => Err(DropReason::SourceSpoofed),
            Some(known) => {
                let news = *known != new;
                *known = new;
                self.last = Some((ip, new));
                Ok(news)
            }
            None if full => Ok(false),
            None => {
                self.by_ip.insert(ip, new);
                self.last = Some((ip, new));
                Ok(true)
            }
        }
    }

    pub(crate) fn get(&self, ip: IpAddr) -> Option<Neighbour> {
        self.by_ip.get(&ip).copied()
    }

    /// The lowest address in use on `port`.
    pub(crate) fn first_on(&self, port: PortId) -> Option<IpAddr> {
        self.by_ip.iter().filter(|(_, n)| n.port == port).map(|(ip, _)| *ip).min()
    }

    pub(crate) fn port_down(&mut self, port: PortId) {
        self.by_ip.retain(|_, n| n.port != port);
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn beyond_the_limit_addresses_are_not_remembered() {
        let mut table = Neighbours::new(1, 1);
        assert_eq!(table.learn([10, 0, 0, 1].into(), PortId(0), Mac([2; 6])), Ok(true));
        assert_eq!(table.learn([10, 0, 0, 2].into(), PortId(0), Mac([2; 6])), Ok(false));
        assert_eq!(table.get([10, 0, 0, 2].into()), None);
    }
}
