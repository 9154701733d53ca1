//! The DHCPv6 server (RFC 8415): an address for every client that asks, resolver and search list for everyone.
//!
//! ```text
//!  SOLICIT ─► ADVERTISE (REPLY with rapid commit)      REQUEST, RENEW, REBIND ─► REPLY with the lease
//!  CONFIRM ─► on this link or not                      RELEASE ─► free     DECLINE ─► quarantine
//!  INFORMATION-REQUEST ─► REPLY with options only
//! ```
//! The address of a client follows from its DUID and IAID alone: a VM has the same after a restart of either side, and
//! nothing has to be kept. A lease belongs to the link it was made on until that ends, and nobody else may use its address.
//!
//! At most `Limits::leases` of one port and [`LEASES`] in all; at either a client is told that there are no addresses
//! (RFC 8415 §18.3.2), and keeps those it makes itself. Of one message the first [`IAS`] IAs count. Messages are read here
//! and not by `dhcproto`, which asserts lengths of options that a guest chooses.
//!
//! Not here: prefix delegation, temporary addresses (a guest makes those itself), authentication, reconfiguration, relays.

mod message;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use self::message::{Ia, Kind, Message, Status};
use crate::drop_reason::DropReason;
use crate::time::{Duration, Instant};
use crate::types::{Mac, PortId, Subnet};

/// Leases and quarantined addresses of all ports.
pub const LEASES: usize = 4096;
/// IAs of one message.
pub const IAS: usize = 4;
/// How long an offer is held.
const OFFER: Duration = Duration::from_secs(60);
/// How long a declined address is left alone.
const QUARANTINE: Duration = Duration::from_secs(600);
/// Addresses tried for one client before it is told that there is none.
const TRIES: u64 = 16;

/// What a listing says of one lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease6Report {
    /// The address.
    pub ip: Ipv6Addr,
    /// Whose.
    pub mac: Mac,
    /// The link it was made on; `None` when that is gone.
    pub port: Option<PortId>,
    /// The name the guest sent.
    pub name: Option<String>,
    /// Until it ends.
    pub remaining: Duration,
}

/// An answer, to go to where the question came from.
pub(crate) struct Reply {
    pub(crate) bytes: Vec<u8>,
    /// Whether leases changed.
    pub(crate) changed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Offered,
    Bound,
    Declined,
}

#[derive(Debug)]
struct Lease {
    client: Vec<u8>,
    iaid: u32,
    mac: Mac,
    port: Option<PortId>,
    name: Option<String>,
    state: State,
    ends: Instant,
}

impl Lease {
    fn is_of(&self, client: &[u8], iaid: u32) -> bool {
        self.client == client && self.iaid == iaid && self.state != State::Declined
    }
}

/// What clients are told besides their address.
#[derive(Debug, Clone)]
pub(crate) struct Settings6 {
    pub(crate) mac: Mac,
    pub(crate) subnet: Subnet,
    pub(crate) resolver: Ipv6Addr,
    pub(crate) domains: Vec<String>,
    /// How long an address is valid and preferred: as long as an IPv4 one is leased.
    pub(crate) lease_time: Duration,
}

/// The server of one network.
pub(crate) struct Dhcp6Server {
    settings: Settings6,
    per_port: usize,
    /// Ordered, so that the same messages give the same leases.
    leases: BTreeMap<Ipv6Addr, Lease>,
}

/// Who asks.
struct Asker<'m> {
    now: Instant,
    port: PortId,
    mac: Mac,
    client: &'m [u8],
    name: Option<String>,
}

impl Dhcp6Server {
    pub(crate) const fn new(settings: Settings6, per_port: usize) -> Self {
        Self { settings, per_port, leases: BTreeMap::new() }
    }

    /// Other search domains from now on (option 24).
    pub(crate) fn set_domains(&mut self, domains: Vec<String>) {
        self.settings.domains = domains;
    }

    /// One message of the guest `mac` on `port`. `multicast`: it was sent to all servers, as clients must.
    pub(crate) fn handle(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        multicast: bool,
        bytes: &[u8],
    ) -> Result<Option<Reply>, DropReason> {
        let message = message::parse(bytes).ok_or(DropReason::BadDhcp)?;
        let ours = message::duid(self.settings.mac);
        self.leases.retain(|_, l| l.ends > now);
        // RFC 8415 §16: which messages name a client and a server, and which must not.
        let named = message.server.is_some_and(|s| s == ours);
        let addressed = match message.kind {
            Kind::Solicit | Kind::Confirm | Kind::Rebind => message.server.is_none(),
            Kind::Request | Kind::Renew | Kind::Release | Kind::Decline => named,
            Kind::InformationRequest => message.server.is_none() || named,
        };
        if !addressed {
            return Err(DropReason::DhcpIgnored);
        }
        let mut out = message::Writer::new(&message, &ours);
        if message.kind == Kind::InformationRequest {
            if !multicast || !message.ias.is_empty() {
                return Err(DropReason::BadDhcp);
            }
            out.options(self.settings.resolver, &self.settings.domains);
            return Ok(Some(Reply { bytes: out.reply(), changed: false }));
        }
        let client = message.client.ok_or(DropReason::BadDhcp)?;
        if !multicast {
            // RFC 8415 §18.4: we never said that a client may do that.
            out.status(Status::UseMulticast);
            return match message.kind {
                Kind::Solicit | Kind::Confirm | Kind::Rebind => Err(DropReason::BadDhcp),
                _ => Ok(Some(Reply { bytes: out.reply(), changed: false })),
            };
        }
        let asker = Asker { now, port, mac, client, name: message.name.clone() };
        let mut changed = false;
        match message.kind {
            Kind::Solicit | Kind::Request | Kind::Renew | Kind::Rebind => {
                let commit = message.kind != Kind::Solicit || message.rapid_commit;
                for ia in &message.ias {
                    changed |= self.grant(&asker, &message, ia, commit, &mut out);
                }
                out.options(self.settings.resolver, &self.settings.domains);
                if !commit {
                    // There is no other server: a client that sees this does not wait for more offers.
                    out.preference(u8::MAX);
                    return Ok(Some(Reply { bytes: out.advertise(), changed }));
                }
                if message.kind == Kind::Solicit {
                    out.rapid_commit();
                }
            }
            Kind::Confirm => {
                // RFC 8415 §18.3.3: without an address there is nothing to confirm, and no answer.
                let mut addresses = message.ias.iter().flat_map(|ia| ia.addresses.iter()).peekable();
                if addresses.peek().is_none() {
                    return Err(DropReason::DhcpIgnored);
                }
                let here = addresses.all(|ip| self.settings.subnet.contains(IpAddr::V6(*ip)));
                out.status(if here { Status::Success } else { Status::NotOnLink });
            }
            Kind::Release | Kind::Decline => {
                for ia in &message.ias {
                    changed |= self.give_back(&asker, &message, ia, &mut out);
                }
                out.status(Status::Success);
            }
            Kind::InformationRequest => {}
        }
        Ok(Some(Reply { bytes: out.reply(), changed }))
    }

    /// The lease for one IA, written into the answer. True when leases changed.
    fn grant(
        &mut self,
        asker: &Asker<'_>,
        message: &Message<'_>,
        ia: &Ia,
        commit: bool,
        out: &mut message::Writer,
    ) -> bool {
        let Some(ip) = self.choose(asker, ia.id) else {
            // RFC 8415 §18.3.4: one that renews hears that there is no such lease, and begins anew.
            let renews = matches!(message.kind, Kind::Renew | Kind::Rebind);
            out.ia(ia.id, &[], Some(if renews { Status::NoBinding } else { Status::NoAddrsAvail }));
            return false;
        };
        let (state, ends) = if commit {
            (State::Bound, asker.now + self.settings.lease_time)
        } else {
            (State::Offered, asker.now + OFFER)
        };
        let held = self.leases.get(&ip).filter(|l| l.state == State::Bound).map(|l| l.ends);
        let lease = Lease {
            client: asker.client.to_vec(),
            iaid: ia.id,
            mac: asker.mac,
            port: Some(asker.port),
            name: asker.name.clone(),
            // An offer to one whose lease still runs does not shorten it.
            state: if held.is_some() { State::Bound } else { state },
            ends: held.map_or(ends, |held| held.max(ends)),
        };
        self.leases.insert(ip, lease);
        // RFC 8415 §7.7: all ones would be for ever.
        let lifetime =
            u32::try_from(self.settings.lease_time.as_secs()).unwrap_or(u32::MAX).min(u32::MAX - 1);
        let mut addresses = vec![(ip, lifetime, lifetime)];
        if matches!(message.kind, Kind::Renew | Kind::Rebind) {
            // RFC 8415 §18.3.4: addresses that are not its own end now.
            addresses.extend(ia.addresses.iter().filter(|other| **other != ip).map(|other| (*other, 0, 0)));
        }
        out.ia(ia.id, &addresses, None);
        commit
    }

    fn give_back(
        &mut self,
        asker: &Asker<'_>,
        message: &Message<'_>,
        ia: &Ia,
        out: &mut message::Writer,
    ) -> bool {
        let mut found = false;
        for ip in &ia.addresses {
            let Some(lease) = self.leases.get_mut(ip).filter(|l| l.is_of(asker.client, ia.id)) else {
                continue;
            };
            found = true;
            if message.kind == Kind::Decline {
                (lease.state, lease.ends) = (State::Declined, asker.now + QUARANTINE);
            } else {
                self.leases.remove(ip);
            }
        }
        if !found {
            out.ia(ia.id, &[], Some(Status::NoBinding));
        }
        found
    }

    /// The address for one IA of a client: its own, or the first of those that follow from its name that is free.
    fn choose(&self, asker: &Asker<'_>, iaid: u32) -> Option<Ipv6Addr> {
        let mine = |l: &Lease| l.port == Some(asker.port);
        let own = self.leases.iter().find(|(_, l)| l.is_of(asker.client, iaid));
        if let Some((ip, lease)) = own {
            // A client identifier is no secret: one from another link does not get the lease that goes with it.
            let here = lease.port.is_none_or(|p| p == asker.port);
            return here.then_some(*ip);
        }
        if self.leases.len() >= LEASES || self.leases.values().filter(|l| mine(l)).count() >= self.per_port {
            return None;
        }
        (0..TRIES).find_map(|n| {
            let ip = self.address(asker.client, iaid, n)?;
            (!self.leases.contains_key(&ip)).then_some(ip)
        })
    }

    /// The `n`th address that follows from a client's name: in `<prefix>::1:0:0/96`, where no host puts itself by chance.
    fn address(&self, client: &[u8], iaid: u32, n: u64) -> Option<Ipv6Addr> {
        // FNV-1a: the same on every machine and in every version.
        let bytes = client.iter().copied().chain(iaid.to_be_bytes()).chain(n.to_be_bytes());
        let hash =
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let low = (hash >> 32) ^ (hash & 0xffff_ffff);
        match self.settings.subnet.network() {
            IpAddr::V6(prefix) => Some(Ipv6Addr::from(u128::from(prefix) | 1 << 32 | u128::from(low))),
            IpAddr::V4(_) => None,
        }
    }

    /// Whether `ip` is leased to somebody on another port than `port`.
    pub(crate) fn is_elsewhere(&self, now: Instant, ip: Ipv6Addr, port: PortId) -> bool {
        self.leases
            .get(&ip)
            .is_some_and(|l| l.state == State::Bound && l.ends > now && l.port.is_some_and(|p| p != port))
    }

    /// The link is gone: its leases may be claimed by the same clients from another link.
    pub(crate) fn port_down(&mut self, port: PortId) {
        for lease in self.leases.values_mut().filter(|l| l.port == Some(port)) {
            lease.port = None;
        }
    }

    /// Every lease in use.
    pub(crate) fn reports(&self, now: Instant) -> Vec<Lease6Report> {
        let bound = self.leases.iter().filter(|(_, l)| l.state == State::Bound && l.ends > now);
        let report = |(ip, l): (&Ipv6Addr, &Lease)| Lease6Report {
            ip: *ip,
            mac: l.mac,
            port: l.port,
            name: l.name.clone(),
            remaining: l.ends.since(now),
        };
        bound.map(report).collect()
    }
}

#[cfg(test)]
mod tests;
