//! The DHCPv4 server (RFC 2131, RFC 2132).
//!
//! ```text
//!  DISCOVER ─► an offer, held 60 s          REQUEST ─► lease, or NAK for an address that is not the client's
//!  DECLINE ─► quarantine                    RELEASE ─► free, remembered        INFORM ─► options only
//! ```
//! A lease belongs to a client (its client identifier, else its Ethernet address) and to the link it was made on; it
//! is offered again to the same client as long as nobody else needs the address. Gateway, host alias, network and
//! broadcast address are never leased. When no address is left the client gets no answer, and the drop is counted:
//! the lease that ended longest ago is reused first. The same when its link has [`crate::Limits::leases`] already.
//!
//! `dhcproto` reads messages; answers are written by [`reply`], because clients may depend on the order of options
//! (RFC 2131 §4.3.1: the order of their parameter request list) and the crate keeps them in a map.

mod reply;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use dhcproto::v4::{self, DhcpOption, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder};

use crate::drop_reason::DropReason;
use crate::time::{Duration, Instant};
use crate::types::{Mac, PortId, Subnet};

pub(crate) use self::reply::Settings;

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
    /// The link it was made on; `None` after a restart, until the guest is back.
    pub port: Option<PortId>,
    /// The name: fixed, or what the guest sent.
    pub name: Option<String>,
    /// Until it ends; `None` for a fixed one.
    pub remaining: Option<Duration>,
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

/// What an answer is and where it goes (RFC 2131 §4.1).
pub(crate) struct Reply {
    /// The BOOTP message.
    pub(crate) bytes: Vec<u8>,
    pub(crate) dst_mac: Mac,
    pub(crate) dst: Ipv4Addr,
    /// Whether leases changed: the driver looks at them.
    pub(crate) granted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
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
struct Lease {
    client: Vec<u8>,
    mac: Mac,
    port: Option<PortId>,
    name: Option<String>,
    state: State,
    /// When the state ends.
    ends: Instant,
    fixed: bool,
}

/// How long an offer is held.
const OFFER: Duration = Duration::from_secs(60);
/// How long a declined address is left alone.
const QUARANTINE: Duration = Duration::from_secs(600);
/// Addresses remembered; at it the lease that ended longest ago is forgotten, else the client gets no answer.
const LEASES: usize = 4096;

/// The server of one network.
pub(crate) struct DhcpServer {
    settings: Settings,
    subnet: Subnet,
    /// Leases that one port may have.
    per_port: usize,
    /// Ordered, so that the same messages give the same leases.
    leases: BTreeMap<Ipv4Addr, Lease>,
}

impl DhcpServer {
    pub(crate) fn new(settings: Settings, subnet: Subnet, per_port: usize, fixed: &[StaticLease]) -> Self {
        let leases = fixed.iter().map(|f| {
            let lease = Lease {
                client: f.mac.0.to_vec(),
                mac: f.mac,
                port: None,
                name: f.name.clone(),
                state: State::Free,
                ends: Instant::ZERO,
                fixed: true,
            };
            (f.ip, lease)
        });
        let leases = leases.collect();
        Self { settings, subnet, per_port, leases }
    }

    /// One BOOTP message of a guest on `port`. `wish` is the address the link's configuration gives its first guest.
    pub(crate) fn handle(
        &mut self,
        now: Instant,
        port: PortId,
        mtu: u16,
        bytes: &[u8],
        wish: Option<Ipv4Addr>,
    ) -> Result<Option<Reply>, DropReason> {
        let readable = with_known_options(bytes).ok_or(DropReason::BadDhcp)?;
        let message = v4::Message::decode(&mut Decoder::new(&readable)).map_err(|_| DropReason::BadDhcp)?;
        if message.opcode() != v4::Opcode::BootRequest || message.hlen() != 6 {
            return Err(DropReason::BadDhcp);
        }
        let mac = Mac(bytes.get(28..34).and_then(|b| b.try_into().ok()).ok_or(DropReason::BadDhcp)?);
        if mac.is_group() {
            return Err(DropReason::BadDhcp);
        }
        let options = message.opts();
        let client = match options.get(OptionCode::ClientIdentifier) {
            Some(DhcpOption::ClientIdentifier(id)) if !id.is_empty() => id.clone(),
            _ => mac.0.to_vec(),
        };
        let server = match options.get(OptionCode::ServerIdentifier) {
            Some(DhcpOption::ServerIdentifier(ip)) => Some(*ip),
            _ => None,
        };
        let requested = match options.get(OptionCode::RequestedIpAddress) {
            Some(DhcpOption::RequestedIpAddress(ip)) => Some(*ip),
            _ => None,
        };
        let name = match options.get(OptionCode::Hostname) {
            Some(DhcpOption::Hostname(name)) => host_label(name),
            _ => None,
        };
        let asker = Asker { now, port, mac, client, name, wish };
        let answer =
            |kind, ip, lease: bool| reply::write(&self.settings, &message, mac, kind, ip, mtu, lease);
        match options.msg_type().ok_or(DropReason::BadDhcp)? {
            MessageType::Discover => {
                let ip = self.choose(&asker, requested)?;
                self.admits(&asker, ip)?;
                let bytes = answer(MessageType::Offer, ip, true);
                self.hold(&asker, ip, State::Offered, now + OFFER);
                Ok(Some(self.addressed(&message, mac, ip, bytes, false)))
            }
            MessageType::Request => {
                // RFC 2131 §4.3.2: SELECTING names us as the server; INIT-REBOOT the address in option 50;
                // RENEWING and REBINDING have it in ciaddr.
                if server.is_some_and(|s| s != self.settings.gateway) {
                    // §3.1 step 4: the client took another server's offer; ours is free again.
                    self.leases.retain(|_, l| l.fixed || l.state != State::Offered || !l.is_of(&asker));
                    return Err(DropReason::DhcpIgnored);
                }
                let ip = match requested {
                    Some(ip) => ip,
                    None if !message.ciaddr().is_unspecified() => message.ciaddr(),
                    None => return Err(DropReason::BadDhcp),
                };
                if !self.may_have(&asker, ip) {
                    let bytes = answer(MessageType::Nak, Ipv4Addr::UNSPECIFIED, false);
                    // §4.3.2: a NAK is broadcast: the client has no address that is right here.
                    let dst = Ipv4Addr::BROADCAST;
                    return Ok(Some(Reply { bytes, dst_mac: Mac::BROADCAST, dst, granted: false }));
                }
                self.admits(&asker, ip)?;
                let bytes = answer(MessageType::Ack, ip, true);
                self.hold(&asker, ip, State::Bound, now + self.settings.lease_time);
                Ok(Some(self.addressed(&message, mac, ip, bytes, true)))
            }
            MessageType::Decline => {
                let ip = requested.ok_or(DropReason::BadDhcp)?;
                let lease = self.leases.get_mut(&ip).filter(|l| l.is_of(&asker) && !l.fixed);
                let lease = lease.ok_or(DropReason::DhcpIgnored)?;
                lease.state = State::Declined;
                lease.ends = now + QUARANTINE;
                Ok(None)
            }
            MessageType::Release => {
                let lease = self.leases.get_mut(&message.ciaddr()).filter(|l| l.is_of(&asker));
                let lease = lease.ok_or(DropReason::DhcpIgnored)?;
                lease.state = State::Free;
                lease.ends = now;
                Ok(None)
            }
            MessageType::Inform => {
                let ip = message.ciaddr();
                if !self.subnet.contains(IpAddr::V4(ip)) {
                    return Err(DropReason::DhcpIgnored);
                }
                let bytes = answer(MessageType::Ack, ip, false);
                Ok(Some(Reply { bytes, dst_mac: mac, dst: ip, granted: false }))
            }
            _ => Err(DropReason::DhcpIgnored),
        }
    }

    /// RFC 2131 §4.1: to ciaddr when there is one, else broadcast when the client asks for it, else to the address
    /// it is being given.
    fn addressed(
        &self,
        message: &v4::Message,
        mac: Mac,
        ip: Ipv4Addr,
        bytes: Vec<u8>,
        granted: bool,
    ) -> Reply {
        let (dst_mac, dst) = if !message.ciaddr().is_unspecified() {
            (mac, message.ciaddr())
        } else if message.flags().broadcast() {
            (Mac::BROADCAST, Ipv4Addr::BROADCAST)
        } else {
            (mac, ip)
        };
        Reply { bytes, dst_mac, dst, granted }
    }

    /// The address for a client: its own, the one it or its link wishes, the lowest free one, the one free longest.
    fn choose(&self, asker: &Asker, requested: Option<Ipv4Addr>) -> Result<Ipv4Addr, DropReason> {
        let own = self.leases.iter().filter(|(_, l)| l.is_of(asker) || (l.fixed && l.mac == asker.mac));
        let own = own
            .filter(|(_, l)| l.state != State::Declined)
            .max_by_key(|(_, l)| (l.fixed, l.ends))
            .map(|(ip, _)| *ip);
        let wishes = [own, asker.wish, requested];
        if let Some(ip) = wishes.into_iter().flatten().find(|ip| self.may_have(asker, *ip)) {
            return Ok(ip);
        }
        let skipped = match (self.settings.pool, self.subnet.network()) {
            (Some((first, _)), IpAddr::V4(network)) => {
                u32::from(first).saturating_sub(u32::from(network)).max(1)
            }
            _ => 1,
        };
        let mut free = (skipped..).map_while(|n| self.subnet.host(n)).filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        });
        let fresh = free.by_ref().take(LEASES).find(|ip| !self.leases.contains_key(ip) && self.is_pool(*ip));
        let stale = || {
            let ended =
                self.leases.iter().filter(|(ip, l)| !l.fixed && self.is_pool(**ip) && l.is_over(asker.now));
            ended.min_by_key(|(_, l)| l.ends).map(|(ip, _)| *ip)
        };
        fresh.filter(|_| self.leases.len() < LEASES).or_else(stale).ok_or(DropReason::DhcpExhausted)
    }

    fn is_pool(&self, ip: Ipv4Addr) -> bool {
        let v4 = IpAddr::V4(ip);
        self.subnet.contains(v4)
            && v4 != self.subnet.network()
            && self.subnet.broadcast() != Some(v4)
            && ip != self.settings.gateway
            && ip != self.settings.host_alias
            && Some(ip) != self.settings.dns
            && self.settings.pool.is_none_or(|(first, last)| (first..=last).contains(&ip))
    }

    /// Whether the client may be given `ip`, now.
    fn may_have(&self, asker: &Asker, ip: Ipv4Addr) -> bool {
        if !self.is_pool(ip) {
            return false;
        }
        match self.leases.get(&ip) {
            None => self.leases.len() < LEASES && !self.has_fixed_elsewhere(asker, ip),
            Some(l) if l.fixed => l.mac == asker.mac && l.on(asker),
            Some(l) if l.is_of(asker) => l.state != State::Declined && l.on(asker),
            Some(l) => l.is_over(asker.now) && !self.has_fixed_elsewhere(asker, ip),
        }
    }

    /// Whether the asker's link may have a lease of `ip`: it has it already, or fewer than its limit.
    fn admits(&self, asker: &Asker, ip: Ipv4Addr) -> Result<(), DropReason> {
        let counts = |l: &Lease| !l.fixed && l.port == Some(asker.port) && !l.is_over(asker.now);
        let known = self.leases.get(&ip).is_some_and(|l| l.fixed || counts(l));
        if known || self.leases.values().filter(|l| counts(l)).count() < self.per_port {
            Ok(())
        } else {
            Err(DropReason::DhcpLimit)
        }
    }

    fn has_fixed_elsewhere(&self, asker: &Asker, ip: Ipv4Addr) -> bool {
        self.leases.iter().any(|(other, l)| l.fixed && l.mac == asker.mac && *other != ip)
    }

    fn hold(&mut self, asker: &Asker, ip: Ipv4Addr, state: State, ends: Instant) {
        let lease = self.leases.entry(ip).or_insert_with(|| Lease {
            client: asker.client.clone(),
            mac: asker.mac,
            port: None,
            name: None,
            state,
            ends,
            fixed: false,
        });
        // An offer to a client whose lease still runs does not shorten it.
        if state == State::Offered && lease.is_of(asker) && lease.state == State::Bound && lease.ends > ends {
            return;
        }
        lease.client.clone_from(&asker.client);
        lease.mac = asker.mac;
        lease.port = Some(asker.port);
        if !lease.fixed || lease.name.is_none() {
            lease.name.clone_from(&asker.name);
        }
        (lease.state, lease.ends) = (state, ends);
    }

    /// Whether `ip` is leased to somebody on another port than `port`.
    pub(crate) fn is_elsewhere(&self, now: Instant, ip: Ipv4Addr, port: PortId) -> bool {
        self.leases
            .get(&ip)
            .is_some_and(|l| l.state == State::Bound && l.ends > now && l.port.is_some_and(|p| p != port))
    }

    /// The address leased first on `port`.
    pub(crate) fn first_on(&self, port: PortId) -> Option<Ipv4Addr> {
        let mine = self.leases.iter().filter(|(_, l)| l.port == Some(port) && l.state == State::Bound);
        mine.map(|(ip, _)| *ip).min()
    }

    /// The link is gone: its leases may be claimed by the same clients from another link.
    pub(crate) fn port_down(&mut self, port: PortId) {
        for lease in self.leases.values_mut().filter(|l| l.port == Some(port)) {
            lease.port = None;
        }
    }

    /// Every lease in use and every fixed one.
    pub(crate) fn reports(&self, now: Instant) -> Vec<LeaseReport> {
        let shown = self.leases.iter().filter(|(_, l)| l.fixed || (l.state == State::Bound && l.ends > now));
        let report = |(ip, l): (&Ipv4Addr, &Lease)| LeaseReport {
            ip: *ip,
            mac: l.mac,
            port: l.port,
            name: l.name.clone(),
            remaining: (l.state == State::Bound && l.ends > now).then(|| l.ends.since(now)),
            fixed: l.fixed,
        };
        let mut all: Vec<_> = shown.map(report).collect();
        all.sort_by_key(|l| l.ip);
        all
    }

    /// Keeps `ip` for the guest `mac`, as if it had leased it.
    ///
    /// # Errors
    /// When it is not the guest's to have.
    pub(crate) fn prefer(&mut self, now: Instant, mac: Mac, ip: Ipv4Addr) -> Result<(), PreferError> {
        if !self.is_pool(ip) {
            return Err(PreferError::OutOfRange);
        }
        let bound = |l: &Lease| l.fixed || (l.state == State::Bound && l.ends > now);
        if self.leases.get(&ip).is_some_and(|l| l.mac != mac && bound(l)) {
            return Err(PreferError::Taken);
        }
        if self.leases.iter().any(|(other, l)| *other != ip && l.mac == mac && bound(l)) {
            return Err(PreferError::HasAnother);
        }
        self.leases.retain(|other, l| *other != ip || l.mac == mac);
        let remaining = Some(self.settings.lease_time);
        self.restore(now, [LeaseReport { ip, mac, port: None, name: None, remaining, fixed: false }]);
        Ok(())
    }

    /// Takes leases back that an earlier run had given.
    pub(crate) fn restore(&mut self, now: Instant, leases: impl IntoIterator<Item = LeaseReport>) {
        for old in leases {
            let Some(remaining) = old.remaining.filter(|_| self.is_pool(old.ip) && !old.fixed) else {
                continue;
            };
            if self.leases.len() < LEASES && !self.leases.contains_key(&old.ip) {
                let ends = now + remaining.min(self.settings.lease_time);
                let client = old.mac.0.to_vec();
                let lease = Lease {
                    client,
                    mac: old.mac,
                    port: None,
                    name: old.name,
                    state: State::Bound,
                    ends,
                    fixed: false,
                };
                self.leases.insert(old.ip, lease);
            }
        }
    }
}

/// Who asks.
struct Asker {
    now: Instant,
    port: PortId,
    mac: Mac,
    client: Vec<u8>,
    name: Option<String>,
    wish: Option<Ipv4Addr>,
}

impl Lease {
    fn is_over(&self, now: Instant) -> bool {
        self.state == State::Free || self.ends <= now
    }

    /// Whether the lease is the asker's. One that was kept over a restart, or made before the guest's system sent an
    /// identifier (its boot loader did), is known by its Ethernet address alone.
    fn is_of(&self, asker: &Asker) -> bool {
        self.client == asker.client || (self.client == self.mac.0 && self.mac == asker.mac)
    }

    /// Whether the lease may be used from the asker's link: it is that link's, or nobody's now.
    fn on(&self, asker: &Asker) -> bool {
        self.port.is_none_or(|p| p == asker.port) || self.is_over(asker.now)
    }
}

/// The guest's name for itself as one DNS label (RFC 1123 §2.1); `None` when nothing is left of it.
fn host_label(name: &str) -> Option<String> {
    let first = name.split('.').next().unwrap_or_default();
    let label: String = first.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(63).collect();
    let label = label.trim_matches('-').to_ascii_lowercase();
    (!label.is_empty()).then_some(label)
}

/// The message with only those options that are read here. dhcproto 0.15 asserts the lengths of some others (80, 81, 94,
/// 152–155) in builds with debug assertions, so a guest's bytes must not reach it there. `None` when an option is cut off.
fn with_known_options(bytes: &[u8]) -> Option<Vec<u8>> {
    /// Bytes of the fixed fields and the magic cookie (RFC 2131 §2).
    const FIXED: usize = 240;
    const PAD: u8 = 0;
    const END: u8 = 255;
    /// Host name, requested address, message type, server, parameter request list, client identifier.
    const READ: [u8; 6] = [12, 50, 53, 54, 55, 61];
    let (fixed, mut rest) = bytes.split_at_checked(FIXED)?;
    let mut out = fixed.to_vec();
    while let Some((&code, after)) = rest.split_first() {
        match code {
            PAD => rest = after,
            END => break,
            _ => {
                let (&len, after) = after.split_first()?;
                let (value, after) = after.split_at_checked(usize::from(len))?;
                if READ.contains(&code) {
                    out.extend([code, len]);
                    out.extend_from_slice(value);
                }
                rest = after;
            }
        }
    }
    out.push(END);
    Some(out)
}

#[cfg(test)]
mod tests;
