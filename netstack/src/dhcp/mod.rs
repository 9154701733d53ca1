//! The DHCPv4 server (RFC 2131, RFC 2132).
//!
//! ```text
//!  DISCOVER ─► an offer, held 60 s; with rapid commit a lease at once (RFC 4039)
//!  REQUEST ──► lease, or NAK for an address that is not the client's      DECLINE ─► quarantine of 10 min
//!  INFORM ───► options only                                              RELEASE ─► free, remembered
//! ```
//! A lease belongs to a client (its client identifier, else its Ethernet address) and to the link it was made on; it
//! is offered again to the same client as long as nobody else needs the address. Gateway, host alias, network and
//! broadcast address are never leased. When no address is left the client gets no answer, and the drop is counted:
//! the lease that ended longest ago is reused first, then the one whose link is gone longest. [`leases`] has the table and
//! its limits, [`message`] reads, [`reply`] writes.
//!
//! We are the only server of the network, and so know every client: one that asks for a free address we have no record
//! of gets it, where RFC 2131 §4.3.2 would have us silent (INIT-REBOOT) for the sake of other servers. A lease that was
//! not written down before a crash is thus the same client's again.
//!
//! Left out: BOOTP clients (no option 53), networks other than the guests' own behind a relay, authentication (RFC 3118),
//! FORCERENEW.

mod leases;
mod message;
mod reply;

use std::net::Ipv4Addr;

use crate::drop_reason::DropReason;
use crate::time::{Duration, Instant};
use crate::types::{Mac, PortId, Subnet};

pub use self::leases::LEASES;
use self::leases::{Asker, Client, Lease, Leases, Pool, State};
use self::message::{Kind, Message};
pub(crate) use self::reply::Settings;
use self::reply::Terms;

/// An address that belongs to one Ethernet address for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticLease {
    /// Whose.
    pub mac: Mac,
    /// The address.
    pub ip: Ipv4Addr,
    /// The name in DNS, if any.
    pub name: Option<String>,
}

/// What a listing says of one lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseReport {
    /// The address.
    pub ip: Ipv4Addr,
    /// Whose.
    pub mac: Mac,
    /// The identifier its client sent (option 61), if any.
    pub client_id: Option<Box<[u8]>>,
    /// The link it was made on; `None` while that is gone, and after a restart until the guest is back.
    pub port: Option<PortId>,
    /// The name: the operator's, or what the guest calls itself.
    pub name: Option<String>,
    /// Whether it is the operator's.
    pub named: bool,
    /// Until it ends; `None` for a fixed one that is not in use.
    pub remaining: Option<Duration>,
    /// How long its client has had it.
    pub age: Duration,
    /// Whether it was fixed in the configuration.
    pub fixed: bool,
}

/// Why a guest cannot have the address it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreferError {
    /// It is not one of those that are leased.
    #[error("Preferred IP address out of range.")]
    OutOfRange,
    /// Another guest has it.
    #[error("Preferred IP address already used.")]
    Taken,
    /// The guest has another.
    #[error("UUID already assigned to a different IP than the IP requested by the client")]
    HasAnother,
}

/// One message, and where it came from.
pub(crate) struct Arrival<'f> {
    pub(crate) port: PortId,
    /// The Ethernet source: the client, or its relay.
    pub(crate) from: Mac,
    /// The largest packet of the link.
    pub(crate) mtu: u16,
    /// The BOOTP message.
    pub(crate) bytes: &'f [u8],
    /// The address the link's configuration gives its first guest, and the name.
    pub(crate) wish: Option<Ipv4Addr>,
    pub(crate) link_name: Option<&'f str>,
}

/// What an answer is and where it goes (RFC 2131 §4.1).
pub(crate) struct Reply {
    /// The BOOTP message.
    pub(crate) bytes: Vec<u8>,
    pub(crate) dst_mac: Mac,
    pub(crate) dst: Ipv4Addr,
    pub(crate) dst_port: u16,
}

/// Ports of clients and of servers (and relays).
const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;
/// How long an offer is held.
const OFFER: Duration = Duration::from_secs(60);
/// How long a declined address is left alone.
const QUARANTINE: Duration = Duration::from_secs(600);
/// The shortest lease a client may ask for.
const SHORTEST: Duration = Duration::from_secs(60);

/// The server of one network.
pub(crate) struct DhcpServer {
    settings: Settings,
    leases: Leases,
}

impl DhcpServer {
    pub(crate) fn new(settings: Settings, subnet: Subnet, per_port: usize, fixed: &[StaticLease]) -> Self {
        let pool = Pool {
            subnet,
            gateway: settings.gateway,
            host_alias: settings.host_alias,
            dns: settings.dns,
            range: settings.pool,
        };
        let mut leases = Leases::new(pool, per_port);
        for fixed in fixed {
            let lease = Lease {
                client: Client::Mac(fixed.mac),
                mac: fixed.mac,
                port: None,
                name: fixed.name.clone(),
                named: fixed.name.is_some(),
                state: State::Free,
                ends: Instant::ZERO,
                since: Instant::ZERO,
                orphaned: 0,
                fixed: true,
            };
            leases.insert(fixed.ip, lease);
        }
        Self { settings, leases }
    }

    /// One BOOTP message of a guest.
    pub(crate) fn handle(
        &mut self,
        now: Instant,
        arrival: &Arrival<'_>,
    ) -> Result<Option<Reply>, DropReason> {
        let message = Message::parse(arrival.bytes).ok_or(DropReason::BadDhcp)?;
        self.leases.expire(now);
        // A relay on another network (RFC 2131 §4.3.1): there are no addresses of that one here.
        if message.giaddr.is_some_and(|relay| !self.leases.pool().subnet.contains(relay.into())) {
            return Err(DropReason::DhcpIgnored);
        }
        let client = match message.client_id() {
            Some(id) => Client::Id(id.into()),
            None => Client::Mac(message.mac),
        };
        let name = message.host_label();
        let Arrival { port, wish, link_name, .. } = *arrival;
        let asker = Asker { now, port, mac: message.mac, client, name, wish, link_name };
        let answer = match message.kind {
            Kind::Discover => self.discover(&asker, &message, arrival.mtu)?,
            Kind::Request => self.request(&asker, &message, arrival.mtu)?,
            Kind::Inform => self.inform(&message, arrival.mtu)?,
            Kind::Decline | Kind::Release => return self.give_up(&asker, &message).map(|()| None),
            Kind::Offer | Kind::Ack | Kind::Nak => return Err(DropReason::DhcpIgnored),
        };
        Ok(Some(addressed(&message, arrival.from, answer)))
    }

    fn discover(&mut self, asker: &Asker<'_>, message: &Message, mtu: u16) -> Result<Answer, DropReason> {
        let ip = self.leases.choose(asker, message.requested())?;
        self.leases.admits(asker, ip)?;
        if message.rapid_commit() {
            return Ok(self.lend(asker, message, ip, mtu));
        }
        let time = self.lease_time(message);
        let (name, _) = self.leases.name_for(asker, ip);
        let terms = Terms { lease: Some((ip, time)), name: name.as_deref(), mtu, why: None };
        let bytes = reply::write(&self.settings, message, Kind::Offer, terms);
        self.leases.hold(asker, ip, State::Offered, asker.now + OFFER);
        Ok(Answer { kind: Kind::Offer, bytes, ip })
    }

    /// RFC 2131 §4.3.2: SELECTING names us as the server; INIT-REBOOT the address in option 50; RENEWING and REBINDING
    /// have it in ciaddr.
    fn request(&mut self, asker: &Asker<'_>, message: &Message, mtu: u16) -> Result<Answer, DropReason> {
        if message.server().is_some_and(|s| s != self.settings.gateway) {
            // §3.1 step 4: the client took another server's offer; ours is free again.
            self.leases.withdraw_offers(asker);
            return Err(DropReason::DhcpIgnored);
        }
        let ip = message.requested().or(message.ciaddr).ok_or(DropReason::BadDhcp)?;
        if !self.leases.may_have(asker, ip) {
            let why = if self.leases.pool().has(ip) {
                "the address is not yours"
            } else {
                "the address is not leased on this network"
            };
            let terms = Terms { lease: None, name: None, mtu, why: Some(why) };
            let bytes = reply::write(&self.settings, message, Kind::Nak, terms);
            return Ok(Answer { kind: Kind::Nak, bytes, ip });
        }
        self.leases.admits(asker, ip)?;
        Ok(self.lend(asker, message, ip, mtu))
    }

    fn lend(&mut self, asker: &Asker<'_>, message: &Message, ip: Ipv4Addr, mtu: u16) -> Answer {
        let time = self.lease_time(message);
        let (name, _) = self.leases.name_for(asker, ip);
        let terms = Terms { lease: Some((ip, time)), name: name.as_deref(), mtu, why: None };
        let bytes = reply::write(&self.settings, message, Kind::Ack, terms);
        self.leases.hold(asker, ip, State::Bound, asker.now + time);
        Answer { kind: Kind::Ack, bytes, ip }
    }

    /// RFC 2131 §4.3.5: options for a client that has its address from elsewhere; leases are not looked at.
    fn inform(&self, message: &Message, mtu: u16) -> Result<Answer, DropReason> {
        let subnet = &self.leases.pool().subnet;
        let ip = message.ciaddr.filter(|ip| subnet.contains((*ip).into())).ok_or(DropReason::DhcpIgnored)?;
        let name = message.host_label();
        let terms = Terms { lease: None, name: name.as_deref(), mtu, why: None };
        let bytes = reply::write(&self.settings, message, Kind::Ack, terms);
        Ok(Answer { kind: Kind::Ack, bytes, ip })
    }

    /// DECLINE (RFC 2131 §4.3.3) and RELEASE (§4.3.4): no answer.
    fn give_up(&mut self, asker: &Asker<'_>, message: &Message) -> Result<(), DropReason> {
        // Table 5 has both name the server; a client that names none means the one there is.
        let ours = message.server().is_none_or(|s| s == self.settings.gateway);
        let done = ours
            && match message.kind {
                Kind::Decline => {
                    let ip = message.requested().ok_or(DropReason::BadDhcp)?;
                    self.leases.decline(asker, ip, asker.now + QUARANTINE)
                }
                _ => {
                    let ip = message.ciaddr.ok_or(DropReason::BadDhcp)?;
                    self.leases.release(asker, ip)
                }
            };
        if done { Ok(()) } else { Err(DropReason::DhcpIgnored) }
    }

    /// RFC 2131 §4.3.1: the time the client asks for, within what is allowed.
    fn lease_time(&self, message: &Message) -> Duration {
        let longest = self.settings.lease_time;
        message.lease_time().map_or(longest, |wanted| wanted.max(SHORTEST).min(longest))
    }

    // ---- what others ask ----

    /// Whether `ip` is leased to somebody on another port than `port`.
    pub(crate) fn is_elsewhere(&self, now: Instant, ip: Ipv4Addr, port: PortId) -> bool {
        self.leases
            .get(ip)
            .is_some_and(|l| l.state == State::Bound && l.ends > now && l.port.is_some_and(|p| p != port))
    }

    /// The address of the first guest on `port`: the lowest one leased there; of several that one machine has under
    /// different identifiers, as a boot loader and the system it loads, the newest.
    pub(crate) fn first_on(&self, port: PortId) -> Option<Ipv4Addr> {
        let first = self.leases.bound_on(port).map(|(_, l)| l.mac).next()?;
        let machine = self.leases.bound_on(port).filter(|(_, l)| l.mac == first);
        machine.max_by_key(|(_, l)| l.since).map(|(ip, _)| ip)
    }

    /// The link is gone: its leases may be claimed by the same clients from another link.
    pub(crate) fn port_down(&mut self, port: PortId) {
        self.leases.port_down(port);
    }

    /// When [`Self::handle_timeout`] has to be called.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.leases.next_end()
    }

    /// Ends the leases that are over.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.leases.expire(now);
    }

    /// Whether leases were made, renewed or ended since this was last asked.
    pub(crate) fn take_changed(&mut self) -> bool {
        self.leases.has_changed() && self.leases.take_changed()
    }

    /// Other search domains from now on (option 119).
    pub(crate) fn set_search(&mut self, search: Vec<String>) {
        self.settings.search = search;
    }

    /// Every lease in use and every fixed one, by address.
    pub(crate) fn reports(&self, now: Instant) -> Vec<LeaseReport> {
        let in_use = |l: &Lease| l.state == State::Bound && l.ends > now;
        let shown = self.leases.iter().filter(|(_, l)| l.fixed || in_use(l));
        let report = |(ip, l): (Ipv4Addr, &Lease)| LeaseReport {
            ip,
            mac: l.mac,
            client_id: match &l.client {
                Client::Id(id) => Some(id.clone()),
                Client::Mac(_) => None,
            },
            port: l.port,
            name: l.name.clone(),
            named: l.named,
            remaining: in_use(l).then(|| l.ends.since(now)),
            age: now.since(l.since),
            fixed: l.fixed,
        };
        shown.map(report).collect()
    }

    /// Keeps `ip` for the guest `mac`, as if it had leased it.
    ///
    /// # Errors
    /// When it is not the guest's to have.
    pub(crate) fn prefer(&mut self, now: Instant, mac: Mac, ip: Ipv4Addr) -> Result<(), PreferError> {
        self.leases.expire(now);
        if !self.leases.pool().has(ip) {
            return Err(PreferError::OutOfRange);
        }
        let bound = |l: &Lease| l.fixed || l.state == State::Bound;
        if self.leases.get(ip).is_some_and(|l| l.mac != mac && bound(l)) {
            return Err(PreferError::Taken);
        }
        if self.leases.iter().any(|(other, l)| other != ip && l.mac == mac && bound(l)) {
            return Err(PreferError::HasAnother);
        }
        if self.leases.get(ip).is_some_and(|l| l.mac != mac) {
            self.leases.remove(ip);
        }
        let (remaining, age) = (Some(self.settings.lease_time), Duration::ZERO);
        let kept = LeaseReport {
            ip,
            mac,
            client_id: None,
            port: None,
            name: None,
            named: false,
            remaining,
            age,
            fixed: false,
        };
        self.restore(now, [kept]);
        Ok(())
    }

    /// Takes leases back that an earlier run had given.
    pub(crate) fn restore(&mut self, now: Instant, leases: impl IntoIterator<Item = LeaseReport>) {
        for old in leases {
            let Some(remaining) = old.remaining else { continue };
            // A clock that was set back does not make a lease longer than leases are.
            let ends = now + remaining.min(self.settings.lease_time);
            if let Some(fixed) = self.leases.get(old.ip).filter(|l| l.fixed && l.mac == old.mac) {
                if fixed.state == State::Free {
                    let client = old.client_id.map_or(Client::Mac(old.mac), Client::Id);
                    let name = if fixed.named { fixed.name.clone() } else { old.name };
                    let named = fixed.named || old.named;
                    let state = State::Bound;
                    let lease = Lease { client, name, named, state, ends, since: now, ..fixed.clone() };
                    self.leases.insert(old.ip, lease);
                }
                continue;
            }
            let known = self.leases.get(old.ip).is_some();
            if known || self.leases.is_full() || !self.leases.pool().has(old.ip) {
                continue;
            }
            let lease = Lease {
                client: old.client_id.map_or(Client::Mac(old.mac), Client::Id),
                mac: old.mac,
                port: None,
                name: old.name,
                named: old.named,
                state: State::Bound,
                ends,
                since: now,
                orphaned: 0,
                fixed: false,
            };
            self.leases.insert(old.ip, lease);
        }
    }
}

/// An answer before it has an address to go to.
struct Answer {
    kind: Kind,
    bytes: Vec<u8>,
    ip: Ipv4Addr,
}

/// RFC 2131 §4.1: to the relay when there is one; a NAK to everybody; else to ciaddr when there is one; else to
/// everybody when the client asks for it; else to the address the client is being given.
fn addressed(message: &Message, from: Mac, answer: Answer) -> Reply {
    let (mac, all) = (message.mac, (Mac::BROADCAST, Ipv4Addr::BROADCAST));
    let (dst_mac, dst) = match (message.giaddr, message.ciaddr) {
        (Some(relay), _) => {
            let dst_port = SERVER_PORT;
            return Reply { bytes: answer.bytes, dst_mac: from, dst: relay, dst_port };
        }
        _ if answer.kind == Kind::Nak => all,
        (None, Some(ciaddr)) => (mac, ciaddr),
        (None, None) if message.broadcast() => all,
        (None, None) => (mac, answer.ip),
    };
    Reply { bytes: answer.bytes, dst_mac, dst, dst_port: CLIENT_PORT }
}

#[cfg(test)]
mod tests;
