//! Neighbour discovery (RFC 4861): who has an address of ours, who has a guest's, and which router there is.
//!
//! ```text
//!  RS ─► RA at once, to the one who asked     NS for ours ─► NA     NA, NS ─► neighbours
//!  NS from :: (DAD, RFC 4862 §5.4) ─► the address a guest is about to use; answered only when it is one of ours
//! ```
//! Messages are read here and written, [`router`] says what advertisements hold and when they are due. A message that RFC
//! 4861 has a node drop (§6.1, §7.1) is an error: hop limit other than 255, an option of length 0, and so on.
//!
//! Not here: redirects, anycast and proxy advertisements. Advertisements of guests are dropped, see `stack`.

pub mod router;

use std::net::Ipv6Addr;

use crate::drop_reason::DropReason;
use crate::types::Mac;
use crate::wire::{ethernet, ipv6};

/// Router solicitation.
pub const ROUTER_SOLICITATION: u8 = 133;
/// Router advertisement.
pub const ROUTER_ADVERTISEMENT: u8 = 134;
/// Neighbour solicitation.
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
/// Neighbour advertisement.
pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Redirect.
pub const REDIRECT: u8 = 137;

/// ff02::1.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// Of an advertisement: the sender is a router, it was asked for, it replaces what was known.
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// What a guest may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Which router is there?
    RouterSolicitation,
    /// Who has `target`?
    Solicitation {
        /// The address.
        target: Ipv6Addr,
    },
    /// `target` is at the sender's Ethernet address.
    Advertisement {
        /// The address.
        target: Ipv6Addr,
    },
}

/// Reads one message: `body` from `src` to `dst`, whose checksum is right.
///
/// # Errors
/// `BadNeighbour` for what RFC 4861 has a node drop; `RogueRouter` for what only routers say.
pub fn parse(src: Ipv6Addr, dst: Ipv6Addr, hop_limit: u8, body: &[u8]) -> Result<Message, DropReason> {
    let Some((&[kind, code, ..], rest)) = body.split_first_chunk::<8>() else {
        return Err(DropReason::Truncated);
    };
    if hop_limit != 255 || code != 0 {
        return Err(DropReason::BadNeighbour);
    }
    if matches!(kind, ROUTER_ADVERTISEMENT | REDIRECT) {
        return Err(DropReason::RogueRouter);
    }
    if kind == ROUTER_SOLICITATION {
        let has_source = options(rest)?;
        // RFC 4861 §6.1.1: one without an address has no Ethernet address to tell.
        return if src.is_unspecified() && has_source {
            Err(DropReason::BadNeighbour)
        } else {
            Ok(Message::RouterSolicitation)
        };
    }
    let Some((target, rest)) = rest.split_first_chunk::<16>() else { return Err(DropReason::Truncated) };
    let target = Ipv6Addr::from(*target);
    let has_source = options(rest)?;
    if target.is_multicast() || target.is_unspecified() {
        return Err(DropReason::BadNeighbour);
    }
    if kind == NEIGHBOUR_SOLICITATION {
        // RFC 4861 §7.1.1: a probe goes to the group of its target.
        let probe = src.is_unspecified();
        return if probe && (has_source || dst != ipv6::solicited_node(target)) {
            Err(DropReason::BadNeighbour)
        } else {
            Ok(Message::Solicitation { target })
        };
    }
    let solicited = body.get(4).is_some_and(|flags| flags & SOLICITED != 0);
    if src.is_unspecified() || (solicited && dst.is_multicast()) {
        return Err(DropReason::BadNeighbour);
    }
    Ok(Message::Advertisement { target })
}

/// Walks the options: whether there is a source link-layer address among them.
fn options(mut bytes: &[u8]) -> Result<bool, DropReason> {
    let mut has_source = false;
    while let Some((&[kind, length], _)) = bytes.split_first_chunk() {
        let length = usize::from(length) * 8;
        // RFC 4861 §4.6: length 0 is an error.
        bytes = bytes.get(length..).filter(|_| length > 0).ok_or(DropReason::BadNeighbour)?;
        has_source |= kind == SOURCE_LINK_ADDRESS;
    }
    if bytes.is_empty() { Ok(has_source) } else { Err(DropReason::BadNeighbour) }
}

/// The frame that says that `target` is ours, to the one who asked from `asker`; to everybody when that was a probe
/// (RFC 4861 §7.2.4). `router`: whether it is the gateway's.
#[must_use]
pub fn advertisement(
    target: Ipv6Addr,
    our_mac: Mac,
    router: bool,
    asker: Ipv6Addr,
    asker_mac: Mac,
) -> Vec<u8> {
    let probe = asker.is_unspecified();
    let flags = OVERRIDE | if router { ROUTER } else { 0 } | if probe { 0 } else { SOLICITED };
    let mut body = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    body.extend(target.octets());
    body.extend([TARGET_LINK_ADDRESS, 1]);
    body.extend(our_mac.0);
    let (dst, mac) = if probe { (ALL_NODES, ipv6::group_mac(ALL_NODES)) } else { (asker, asker_mac) };
    frame(our_mac, mac, target, dst, body)
}

/// The frame that asks who has `target`.
#[must_use]
pub fn solicitation(target: Ipv6Addr, our_mac: Mac, our_address: Ipv6Addr) -> Vec<u8> {
    let mut body = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    body.extend(target.octets());
    body.extend([SOURCE_LINK_ADDRESS, 1]);
    body.extend(our_mac.0);
    let group = ipv6::solicited_node(target);
    frame(our_mac, ipv6::group_mac(group), our_address, group, body)
}

/// A frame around a message, with the hop limit that says that no router passed it on.
fn frame(from: Mac, to: Mac, src: Ipv6Addr, dst: Ipv6Addr, body: Vec<u8>) -> Vec<u8> {
    let mut out = ethernet::Header { dst: to, src: from, kind: ethernet::IPV6 }.bytes().to_vec();
    out.extend(ipv6::icmp_packet(src, dst, 255, body));
    out
}

/// The link-local address an interface with `mac` makes itself (RFC 4291 appendix A, RFC 2464 §5).
#[must_use]
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The Ethernet address an IPv6 address was made of in that way, when it looks like one.
#[must_use]
pub fn ethernet_of(address: Ipv6Addr) -> Option<Mac> {
    match address.octets() {
        [.., a, b, c, 0xff, 0xfe, d, e, f] => Some(Mac([a ^ 2, b, c, d, e, f])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OURS: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
    const GUEST: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const A: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

    fn message(kind: u8, target: Option<Ipv6Addr>, options: &[u8]) -> Vec<u8> {
        let mut body = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        body.extend(target.into_iter().flat_map(|t| t.octets()));
        body.extend(options);
        body
    }

    #[test]
    fn rfc_4861_6_1_1_a_solicitation_of_routers_without_an_address_has_no_link_address() {
        let rs = message(ROUTER_SOLICITATION, None, &[1, 1, 2, 0, 0, 0, 0, 1]);
        let all_routers: Ipv6Addr = "ff02::2".parse().unwrap();
        assert_eq!(parse(link_local(GUEST), all_routers, 255, &rs), Ok(Message::RouterSolicitation));
        assert_eq!(parse(Ipv6Addr::UNSPECIFIED, all_routers, 255, &rs), Err(DropReason::BadNeighbour));
        assert_eq!(parse(link_local(GUEST), all_routers, 254, &rs), Err(DropReason::BadNeighbour));
    }

    #[test]
    fn rfc_4861_7_1_1_a_probe_goes_to_its_targets_group() {
        let ns = message(NEIGHBOUR_SOLICITATION, Some(A), &[]);
        let none = Ipv6Addr::UNSPECIFIED;
        assert_eq!(parse(none, ipv6::solicited_node(A), 255, &ns), Ok(Message::Solicitation { target: A }));
        assert_eq!(parse(none, ALL_NODES, 255, &ns), Err(DropReason::BadNeighbour));
        let with = message(NEIGHBOUR_SOLICITATION, Some(A), &[1, 1, 2, 0, 0, 0, 0, 1]);
        assert_eq!(parse(none, ipv6::solicited_node(A), 255, &with), Err(DropReason::BadNeighbour));
    }

    #[test]
    fn rfc_4861_4_6_an_option_of_length_zero_or_beyond_the_end_ends_the_message() {
        for options in [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[1, 2, 0, 0, 0, 0, 0, 0], &[1]] {
            let ns = message(NEIGHBOUR_SOLICITATION, Some(A), options);
            assert_eq!(parse(A, ipv6::solicited_node(A), 255, &ns), Err(DropReason::BadNeighbour));
        }
    }

    #[test]
    fn rfc_6105_what_only_routers_say_is_no_guests_to_say() {
        for kind in [ROUTER_ADVERTISEMENT, REDIRECT] {
            let body = message(kind, Some(A), &[]);
            assert_eq!(parse(link_local(GUEST), ALL_NODES, 255, &body), Err(DropReason::RogueRouter));
        }
    }

    #[test]
    fn what_we_write_is_read_as_it_was_meant() {
        for (asker, router) in [(A, true), (Ipv6Addr::UNSPECIFIED, false)] {
            let frame = advertisement(A, OURS, router, asker, GUEST);
            let (header, packet) = ethernet::parse(&frame).unwrap();
            let read = ipv6::parse(packet).unwrap();
            let h = read.header;
            assert_eq!(ipv6::icmp_checksum(h.src, h.dst, &[read.payload]), 0);
            assert_eq!(
                parse(h.src, h.dst, h.hop_limit, read.payload),
                Ok(Message::Advertisement { target: A })
            );
            assert_eq!(header.dst.is_group(), asker.is_unspecified());
            assert_eq!(read.payload[4] & ROUTER != 0, router);
        }
        let frame = solicitation(A, OURS, link_local(OURS));
        let read = ipv6::parse(&frame[14..]).unwrap();
        let h = read.header;
        assert_eq!(parse(h.src, h.dst, h.hop_limit, read.payload), Ok(Message::Solicitation { target: A }));
    }

    #[test]
    fn rfc_2464_5_the_interfaces_identifier_comes_from_its_mac() {
        assert_eq!(link_local(OURS), "fe80::5894:efff:fee4:cdd".parse::<Ipv6Addr>().unwrap());
        assert_eq!((ethernet_of(link_local(OURS)), ethernet_of(A)), (Some(OURS), None));
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(kind in 130u8..140, rest in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut body = vec![kind, 0];
            body.extend(rest);
            let _ = parse(A, ALL_NODES, 255, &body);
            let _ = parse(Ipv6Addr::UNSPECIFIED, ipv6::solicited_node(A), 255, &body);
        }
    }
}
