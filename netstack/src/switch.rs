//! The Ethernet switch: which address is behind which port.
//!
//! A MAC belongs to the port that first used it until that port goes down or has not used it for
//! [`AGE`]; frames from elsewhere that claim it are dropped, and so are frames that claim the gateway's. At most
//! `Limits::macs` addresses per port: frames from further ones are dropped.

use std::collections::HashMap;

use ahash::RandomState;

use crate::drop_reason::DropReason;
use crate::time::{Duration, Instant};
use crate::types::{Mac, PortId};

/// How long an address that is not used stays with its port (IEEE 802.1D's recommended ageing time).
const AGE: Duration = Duration::from_secs(300);

/// How often the table notes that an address is still used; well below [`AGE`].
const REFRESH: Duration = Duration::from_secs(1);

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Destination {
    /// To the gateway itself.
    Gateway,
    /// To one port.
    Port(PortId),
    /// To every port and the gateway.
    Everyone,
    /// To every port: the address is not known yet.
    Unknown,
}

struct Learned {
    port: PortId,
    seen: Instant,
}

/// The table of all ports.
pub(crate) struct Switch {
    gateway: Mac,
    macs: HashMap<Mac, Learned, RandomState>,
    per_port: Vec<usize>,
    limit: usize,
    /// The address seen last and when that was noted: a burst of one guest needs no hash.
    last: Option<(Mac, PortId, Instant)>,
}

impl Switch {
    pub(crate) fn new(gateway: Mac, limit: usize, seed: u64) -> Self {
        let keys = RandomState::with_seeds(seed, 1, seed.rotate_left(9), !seed);
        Self { gateway, macs: HashMap::with_hasher(keys), per_port: Vec::new(), limit, last: None }
    }

    /// Notes the source of a frame.
    pub(crate) fn learn(&mut self, now: Instant, port: PortId, mac: Mac) -> Result<(), DropReason> {
        if self.last.is_some_and(|(m, p, at)| (m, p) == (mac, port) && now.since(at) < REFRESH) {
            return Ok(());
        }
        if mac.is_group() || mac == self.gateway {
            return Err(DropReason::MacSpoofed);
        }
        let slot = usize::from(port.0);
        if self.per_port.len() <= slot {
            self.per_port.resize(slot + 1, 0);
        }
        match self.macs.get_mut(&mac) {
            Some(known) if known.port == port => known.seen = now,
            Some(known) if now.since(known.seen) < AGE => return Err(DropReason::MacSpoofed),
            Some(known) => {
                self.per_port[usize::from(known.port.0)] -= 1;
                self.per_port[slot] += 1;
                *known = Learned { port, seen: now };
            }
            None => {
                if self.per_port[slot] >= self.limit {
                    self.forget_old(now, port);
                    if self.per_port[slot] >= self.limit {
                        return Err(DropReason::MacLimit);
                    }
                }
                self.per_port[slot] += 1;
                self.macs.insert(mac, Learned { port, seen: now });
            }
        }
        self.last = Some((mac, port, now));
        Ok(())
    }

    fn forget_old(&mut self, now: Instant, port: PortId) {
        let before = self.macs.len();
        self.macs.retain(|_, l| l.port != port || now.since(l.seen) < AGE);
        self.per_port[usize::from(port.0)] -= before - self.macs.len();
        self.last = None;
    }

    /// Every address that is known.
    pub(crate) fn macs(&self) -> impl Iterator<Item = (Mac, PortId)> + '_ {
        self.macs.iter().map(|(mac, learned)| (*mac, learned.port))
    }

    /// Where a frame to `mac` goes.
    pub(crate) fn destination(&self, mac: Mac) -> Destination {
        if mac == self.gateway {
            Destination::Gateway
        } else if mac.is_group() {
            Destination::Everyone
        } else {
            self.macs.get(&mac).map_or(Destination::Unknown, |l| Destination::Port(l.port))
        }
    }

    pub(crate) fn port_down(&mut self, port: PortId) {
        self.macs.retain(|_, l| l.port != port);
        self.last = None;
        if let Some(n) = self.per_port.get_mut(usize::from(port.0)) {
            *n = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn switch() -> Switch {
        Switch::new(GATEWAY, 2, 7)
    }

    #[test]
    fn the_gateways_and_group_addresses_are_never_a_source() {
        let mut switch = switch();
        assert_eq!(switch.learn(Instant::ZERO, PortId(0), GATEWAY), Err(DropReason::MacSpoofed));
        assert_eq!(switch.learn(Instant::ZERO, PortId(0), Mac::BROADCAST), Err(DropReason::MacSpoofed));
    }

    #[test]
    fn an_address_stays_with_its_port_until_it_ages_or_the_port_goes_down() {
        let mut switch = switch();
        switch.learn(Instant::ZERO, PortId(0), A).unwrap();
        assert_eq!(switch.learn(Instant::ZERO, PortId(1), A), Err(DropReason::MacSpoofed));
        assert_eq!(switch.destination(A), Destination::Port(PortId(0)));
        assert_eq!(switch.learn(Instant::ZERO + AGE, PortId(1), A), Ok(()));
        switch.port_down(PortId(1));
        assert_eq!(switch.destination(A), Destination::Unknown);
    }

    #[test]
    fn an_address_in_use_does_not_age() {
        let mut switch = switch();
        for seconds in (0..=600).step_by(10) {
            switch.learn(Instant::from_millis(seconds * 1000), PortId(0), A).unwrap();
        }
        let later = Instant::from_millis(601_000);
        assert_eq!(switch.learn(later, PortId(1), A), Err(DropReason::MacSpoofed));
    }

    #[test]
    fn at_the_limit_further_addresses_are_dropped_until_old_ones_age() {
        let mut switch = switch();
        for n in 1..=2 {
            switch.learn(Instant::ZERO, PortId(0), Mac([2, 0, 0, 0, 0, n])).unwrap();
        }
        let third = Mac([2, 0, 0, 0, 0, 3]);
        assert_eq!(switch.learn(Instant::ZERO, PortId(0), third), Err(DropReason::MacLimit));
        assert_eq!(switch.learn(Instant::ZERO + AGE, PortId(0), third), Ok(()));
    }
}
