//! Router advertisements (RFC 4861 §4.2, §6.2): what they hold, and when they are due.
//!
//! Prefix with on-link and autonomous flags (RFC 4862), MTU, resolver and search domains (RFC 8106), and both flags that send
//! a guest to DHCPv6: it gets a lease besides the address it makes itself. One is sent at once to whoever asks, and to every
//! guest that speaks IPv6 each [`INTERVAL`], a little less by chance (§6.2.4).
//!
//! The router lifetime is the truth about the host: 0 while it has no route for IPv6, so that a guest has none either and
//! turns to IPv4 without waiting. When the host's routes change an advertisement goes out at once.

use std::net::Ipv6Addr;

use super::{ALL_NODES, ROUTER_ADVERTISEMENT, SOURCE_LINK_ADDRESS};
use crate::time::{Duration, Instant};
use crate::types::Mac;
use crate::wire::{ethernet, ipv6};

/// The longest time between two advertisements (RFC 4861's MaxRtrAdvInterval).
pub const INTERVAL: Duration = Duration::from_secs(600);
/// How long what was advertised counts: three intervals (RFC 4861 §6.2.1, RFC 8106 §5.1).
pub const LIFETIME: Duration = Duration::from_secs(1800);
/// How long a prefix is preferred, and valid.
const PREFERRED: u32 = 14_400;
const VALID: u32 = 86_400;

const PREFIX: u8 = 3;
const MTU: u8 = 5;
const RESOLVERS: u8 = 25;
const SEARCH: u8 = 31;
/// Of the advertisement: addresses and more by DHCPv6.
const MANAGED: u8 = 0x80;
const OTHER: u8 = 0x40;
/// Of the prefix: on the link, and good for addresses one makes oneself.
const ON_LINK: u8 = 0x80;
const AUTONOMOUS: u8 = 0x40;
/// The size of a search list that fits any frame, in bytes.
const SEARCH_BYTES: usize = 480;

/// What the guests are told.
#[derive(Debug, Clone)]
pub(crate) struct Advertised {
    pub(crate) mac: Mac,
    pub(crate) link_local: Ipv6Addr,
    pub(crate) prefix: Ipv6Addr,
    pub(crate) resolver: Ipv6Addr,
    pub(crate) domains: Vec<String>,
}

/// The router of one network.
#[derive(Debug)]
pub(crate) struct Router {
    content: Advertised,
    /// Domains that were advertised and are no more.
    gone: Vec<String>,
    /// Whether the host has a route for IPv6.
    uplink: bool,
    /// When every guest is told again; `None` while no guest speaks IPv6.
    next: Option<Instant>,
    dice: u64,
}

impl Router {
    pub(crate) const fn new(content: Advertised, uplink: bool, seed: u64) -> Self {
        Self { content, gone: Vec::new(), uplink, next: None, dice: seed | 1 }
    }

    pub(crate) const fn link_local(&self) -> Ipv6Addr {
        self.content.link_local
    }

    pub(crate) const fn uplink(&self) -> bool {
        self.uplink
    }

    /// Whether that is news.
    pub(crate) fn set_uplink(&mut self, uplink: bool) -> bool {
        std::mem::replace(&mut self.uplink, uplink) != uplink
    }

    /// Other search domains. Whether that is news; then [`Self::withdrawn`] is to be called when everybody has been told.
    pub(crate) fn set_domains(&mut self, domains: Vec<String>) -> bool {
        if self.content.domains == domains {
            return false;
        }
        let before = std::mem::replace(&mut self.content.domains, domains);
        self.gone = before.into_iter().filter(|d| !self.content.domains.contains(d)).collect();
        true
    }

    /// Everybody has heard which domains are gone.
    pub(crate) fn withdrawn(&mut self) {
        self.gone.clear();
    }

    /// A guest speaks IPv6: advertisements go out from now on.
    pub(crate) fn begin(&mut self, now: Instant) {
        if self.next.is_none() {
            self.schedule(now);
        }
    }

    fn schedule(&mut self, now: Instant) {
        // xorshift64: when, not what, is by chance.
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        let less = Duration::from_millis(self.dice % 200_000);
        self.next = Some(now + (INTERVAL - less));
    }

    pub(crate) const fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Whether everybody is to be told now.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.next.is_some_and(|at| at <= now);
        if due {
            self.schedule(now);
        }
        due
    }

    /// The frame for one link of `mtu` bytes: to `guest` when that asked from an address, else to everybody on the link.
    pub(crate) fn frame(&self, guest: Option<(Ipv6Addr, Mac)>, mtu: u16) -> Vec<u8> {
        let (dst, mac) = guest.unwrap_or((ALL_NODES, ipv6::group_mac(ALL_NODES)));
        let c = &self.content;
        let mut out = ethernet::Header { dst: mac, src: c.mac, kind: ethernet::IPV6 }.bytes().to_vec();
        out.extend(ipv6::icmp_packet(c.link_local, dst, 255, self.body(mtu)));
        out
    }

    fn body(&self, mtu: u16) -> Vec<u8> {
        let c = &self.content;
        let lifetime = u32::try_from(LIFETIME.as_secs()).unwrap_or(u32::MAX).to_be_bytes();
        let router = if self.uplink { [lifetime[2], lifetime[3]] } else { [0, 0] };
        let mut body = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, MANAGED | OTHER, router[0], router[1]];
        // Reachable time and retransmission timer: the guest's own.
        body.extend([0; 8]);
        body.extend([SOURCE_LINK_ADDRESS, 1]);
        body.extend(c.mac.0);
        body.extend([MTU, 1, 0, 0, 0, 0]);
        body.extend(mtu.to_be_bytes());
        body.extend([PREFIX, 4, 64, ON_LINK | AUTONOMOUS]);
        body.extend(VALID.to_be_bytes());
        body.extend(PREFERRED.to_be_bytes());
        body.extend([0; 4]);
        body.extend(c.prefix.octets());
        body.extend([RESOLVERS, 3, 0, 0]);
        body.extend(lifetime);
        body.extend(c.resolver.octets());
        // RFC 8106 §5.2: what has no lifetime is to be searched no more.
        for (domains, lifetime) in [(&c.domains, lifetime), (&self.gone, [0; 4])] {
            let mut list = crate::wire::labels::list(domains, SEARCH_BYTES);
            if !list.is_empty() {
                // RFC 8106 §5.2: padded with zeros to a multiple of eight.
                list.resize(list.len().next_multiple_of(8), 0);
                body.extend([SEARCH, u8::try_from(1 + list.len() / 8).unwrap_or(u8::MAX), 0, 0]);
                body.extend(lifetime);
                body.append(&mut list);
            }
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(uplink: bool) -> Router {
        let content = Advertised {
            mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
            link_local: "fe80::1".parse().unwrap(),
            prefix: "fd00:1::".parse().unwrap(),
            resolver: "fd00:1::1".parse().unwrap(),
            domains: vec!["portway.internal".into(), "a..b".into(), "lan".into()],
        };
        Router::new(content, uplink, 7)
    }

    /// The options of an advertisement, by type.
    fn options(frame: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let read = ipv6::parse(&frame[14..]).unwrap();
        assert_eq!(ipv6::icmp_checksum(read.header.src, read.header.dst, &[read.payload]), 0);
        let (mut rest, mut out) = (&read.payload[16..], Vec::new());
        while let [kind, length, ..] = *rest {
            let (option, after) = rest.split_at(usize::from(length) * 8);
            out.push((kind, option.to_vec()));
            rest = after;
        }
        out
    }

    #[test]
    fn rfc_8106_5_resolver_and_search_list_are_advertised_with_prefix_and_mtu() {
        let frame = router(true).frame(None, 65_520);
        let options = options(&frame);
        assert_eq!(options.iter().map(|o| o.0).collect::<Vec<_>>(), [1, 5, 3, 25, 31]);
        assert_eq!(options[1].1[4..], [0, 0, 0xff, 0xf0]);
        assert_eq!((options[2].1[2], options[2].1[3]), (64, 0xc0));
        let search = &options[4].1;
        assert_eq!(search.len() % 8, 0);
        assert_eq!(search[8..30], *b"\x07portway\x08internal\0\x03lan");
    }

    #[test]
    fn rfc_8106_5_2_other_domains_are_advertised_and_those_that_have_gone_withdrawn_once() {
        let mut router = router(true);
        let lists = |router: &Router| {
            let all = options(&router.frame(None, 1500)).into_iter().filter(|o| o.0 == SEARCH);
            let text = |o: Vec<u8>| String::from_utf8_lossy(&o[9..]).trim_end_matches('\0').to_owned();
            all.map(|o| (o.1[4..8] != [0; 4], text(o.1))).collect::<Vec<_>>()
        };
        let same = router.content.domains.clone();
        assert!(!router.set_domains(same));
        assert!(router.set_domains(vec!["portway.internal".into(), "corp".into()]));
        assert_eq!(
            lists(&router),
            [(true, "portway\x08internal\0\x04corp".to_owned()), (false, "lan".to_owned())]
        );
        router.withdrawn();
        assert_eq!(lists(&router).len(), 1);
    }

    #[test]
    fn rfc_4861_6_2_5_without_a_route_the_lifetime_is_zero_and_the_prefix_stays() {
        let mut router = router(false);
        let lifetime = |r: &Router| r.frame(None, 1500)[14 + 40 + 6..14 + 40 + 8].to_vec();
        assert_eq!(lifetime(&router), [0, 0]);
        assert!(router.set_uplink(true) && !router.set_uplink(true));
        assert_eq!(lifetime(&router), 1800u16.to_be_bytes());
    }

    #[test]
    fn rfc_4861_6_2_4_advertisements_repeat_within_the_interval_once_a_guest_speaks() {
        let mut router = router(true);
        assert_eq!(router.poll_timeout(), None);
        let mut now = Instant::ZERO;
        router.begin(now);
        for _ in 0..20 {
            let at = router.poll_timeout().unwrap();
            assert!(at.since(now) <= INTERVAL && at.since(now) >= INTERVAL - Duration::from_secs(200));
            now = at;
            assert!(router.is_due(now) && !router.is_due(now));
        }
    }
}
