//! IPv6 as guest and host see it: neighbours, the router, who may say what, and the flows of IPv4 once more.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use std::net::Ipv6Addr;

use lab::{ALIAS6, GATEWAY6, GUEST6, GUEST6_LOCAL, Lab, ROUTER, Seen, addr, mac_of, ms, secs, segment, syn};
use portway_netstack::wire::ipv6::{self, solicited_node};
use portway_netstack::{
    ConnectError, DropReason, Forward, Handled, HostCommand, HostError, HostEvent, HostTarget, Limits,
    Service, UdpPath,
};

const NS: u8 = 135;
const NA: u8 = 136;
const FAR: &str = "[2001:db8::7]:443";
const FROM: &str = "[fd00:77::2]:40000";

fn ip(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// A neighbour solicitation of guest `n` for `target`, to its group.
fn asks(lab: &mut Lab, n: usize, from: &str, target: &str) {
    let group = solicited_node(ip(target)).to_string();
    let mut body = ip(target).octets().to_vec();
    if from != "::" {
        body.extend([1, 1]);
        body.extend(mac_of(n).0);
    }
    let mut frame = Vec::new();
    lab.icmp6(n, from, &group, 255, ([NS, 0, 0, 0, 0, 0], &body), &mut frame);
}

fn solicits_router(lab: &mut Lab, from: &str) {
    let mut frame = Vec::new();
    lab.icmp6(0, from, "ff02::2", 255, ([133, 0, 0, 0, 0, 0], &[]), &mut frame);
}

/// The router lifetime of the one advertisement the guest saw, and where it went.
fn advertised(lab: &mut Lab) -> (u16, Ipv6Addr) {
    let frames = std::mem::take(&mut lab.wires[0].frames);
    assert_eq!(frames.len(), 1);
    let read = ipv6::parse(&frames[0][14..]).unwrap();
    assert_eq!((read.header.src, read.header.hop_limit, read.payload[0]), (ip(ROUTER), 255, 134));
    (u16::from_be_bytes([read.payload[6], read.payload[7]]), read.header.dst)
}

#[test]
fn rfc_4861_7_2_4_a_solicitation_for_ours_is_answered_to_the_one_who_asked_and_no_other_is() {
    let mut lab = Lab::new();
    for (target, router) in [(GATEWAY6, true), (ROUTER, true), (ALIAS6, false)] {
        asks(&mut lab, 0, GUEST6, target);
        let frames = lab.wires[0].frames.clone();
        let seen = lab.guest_sees();
        let [Seen::Icmp { src, dst, kind: NA, rest, .. }] = &seen[..] else { panic!("{seen:?}") };
        assert_eq!((ip(src), ip(dst)), (ip(target), ip(GUEST6)));
        assert_eq!(rest[..16], ip(target).octets());
        assert_eq!(rest[16..], [&[2, 1][..], &lab::GATEWAY_MAC.0].concat());
        assert_eq!(frames[0][14 + 40 + 4], if router { 0xe0 } else { 0x60 });
    }
    asks(&mut lab, 0, GUEST6, "fd00:77::99");
    assert_eq!(lab.guest_sees(), []);
}

#[test]
fn rfc_4862_5_4_a_probe_for_ours_is_defended_and_one_for_a_free_address_is_not_disturbed() {
    let mut lab = Lab::new();
    asks(&mut lab, 0, "::", GATEWAY6);
    let seen = lab.guest_sees();
    assert!(matches!(&seen[..], [Seen::Icmp { dst, kind: NA, .. }] if dst == "ff02::1"), "{seen:?}");
    asks(&mut lab, 0, "::", "fd00:77::5054:ff:fe12:3456");
    assert_eq!(lab.guest_sees(), []);
    // The address is known from then on: a published connection needs no further question.
    lab.stack.open_to_guest(lab.now, addr("[fd00:77::5054:ff:fe12:3456]:80"), addr("[::1]:5000")).unwrap();
    assert!(matches!(&lab.guest_sees()[..], [Seen::Tcp { flags: "S", .. }]));
}

#[test]
fn rfc_4861_6_2_6_a_solicitation_of_routers_is_answered_at_once() {
    let mut lab = Lab::new();
    solicits_router(&mut lab, GUEST6_LOCAL);
    assert_eq!(advertised(&mut lab), (1800, ip(GUEST6_LOCAL)));
    solicits_router(&mut lab, "::");
    assert_eq!(advertised(&mut lab), (1800, ip("ff02::1")));
}

#[test]
fn rfc_4861_6_2_4_everybody_who_speaks_ipv6_is_told_again_and_nobody_else() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    lab.after(secs(2000));
    assert_eq!((lab.guest_n_sees(0), lab.guest_n_sees(1)), (vec![], vec![]));
    solicits_router(&mut lab, GUEST6_LOCAL);
    lab.guest_sees();
    lab.after(secs(600));
    assert_eq!((lab.guest_n_sees(0).len(), lab.guest_n_sees(1)), (1, vec![]));
}

#[test]
fn without_a_route_at_the_host_there_is_no_default_route_and_changes_are_told_at_once() {
    let mut lab = Lab::configured(|c| c.ipv6.as_mut().unwrap().uplink = false);
    solicits_router(&mut lab, GUEST6_LOCAL);
    assert_eq!(advertised(&mut lab).0, 0);
    for (uplink, lifetime) in [(true, 1800), (false, 0)] {
        lab.stack.set_ipv6_uplink(uplink);
        lab.stack.set_ipv6_uplink(uplink);
        lab.transmit();
        assert_eq!(advertised(&mut lab), (lifetime, ip("ff02::1")));
    }
}

#[test]
fn rfc_6105_a_guest_is_no_router_and_no_dhcp_server_for_others() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    let mut frame = Vec::new();
    for kind in [134, 137] {
        let message = ([kind, 0, 64, 0, 7, 8], &[0; 32][..]);
        assert_eq!(lab.icmp6(0, GUEST6_LOCAL, "ff02::1", 255, message, &mut frame), Handled::Done);
    }
    let mut server = Vec::new();
    let handled = lab.udp("[fe80::ff:fe00:1]:547", "[fe80::2]:546", b"x", &mut server);
    assert_eq!((handled, lab.dropped(DropReason::RogueRouter)), (Handled::Done, 3));
    // The same to another guest, behind extension headers.
    let mut hidden = frame.clone();
    hidden[..6].copy_from_slice(&mac_of(1).0);
    hidden.splice(14 + 40..14 + 40, [58, 0, 1, 4, 0, 0, 0, 0]);
    hidden[14 + 6] = 60;
    let length = u16::try_from(hidden.len() - 54).unwrap().to_be_bytes();
    hidden[18..20].copy_from_slice(&length);
    assert_eq!(lab.frame(0, &hidden), Handled::Done);
    assert_eq!(lab.dropped(DropReason::RogueRouter), 4);
}

#[test]
fn a_guest_cannot_advertise_the_gateways_address_or_anothers() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    asks(&mut lab, 0, GUEST6, GATEWAY6);
    let mut frame = Vec::new();
    for target in [GATEWAY6, ALIAS6, ROUTER, GUEST6] {
        let head = [NA, 0, 0x20, 0, 0, 0];
        let body = ip(target).octets();
        lab.icmp6(1, "fe80::2", "ff02::1", 255, (head, &body), &mut frame);
    }
    for source in [GATEWAY6, ROUTER, GUEST6, "2001:db8::1", "fd00:77::"] {
        lab.icmp6(1, source, GATEWAY6, 64, ([128, 0, 0, 1, 0, 1], b"hi"), &mut frame);
    }
    assert_eq!(lab.dropped(DropReason::SourceSpoofed), 9);
    assert_eq!(lab.guest_n_sees(1), []);
}

#[test]
fn an_address_made_of_a_mac_is_its_owners_whoever_was_first() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    let mut frame = Vec::new();
    let (made, echo) = ("fd00:77::ff:fe00:1", ([128, 0, 0, 0, 0, 1], &b""[..]));
    // The other guest takes it before its owner has come.
    lab.icmp6(1, made, GATEWAY6, 64, echo, &mut frame);
    assert_eq!(lab.guest_n_sees(1).len(), 1);
    lab.icmp6(0, made, GATEWAY6, 64, echo, &mut frame);
    assert_eq!(lab.guest_n_sees(0).len(), 1);
    lab.icmp6(1, made, GATEWAY6, 64, echo, &mut frame);
    assert_eq!((lab.guest_n_sees(1), lab.dropped(DropReason::SourceSpoofed)), (vec![], 1));
}

#[test]
fn rfc_6980_5_neighbour_discovery_in_a_fragment_header_is_dropped() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    lab.icmp6(0, GUEST6, GATEWAY6, 255, ([NS, 0, 0, 0, 0, 0], &ip(GATEWAY6).octets()), &mut frame);
    assert_eq!(lab.guest_sees().len(), 1);
    frame.splice(14 + 40..14 + 40, [58, 0, 0, 0, 0, 0, 0, 1]);
    frame[14 + 6] = 44;
    frame[19] += 8;
    lab.frame(0, &frame);
    assert_eq!((lab.guest_sees(), lab.dropped(DropReason::BadNeighbour)), (vec![], 1));
}

#[test]
fn rfc_4443_4_2_echo_is_answered_for_our_own_addresses_and_handed_out_beyond_them() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    for ours in [GATEWAY6, ALIAS6, ROUTER] {
        lab.icmp6(0, GUEST6, ours, 64, ([128, 0, 0, 7, 0, 1], b"ping"), &mut frame);
        let seen = lab.guest_sees();
        assert!(
            matches!(&seen[..], [Seen::Icmp { src, kind: 129, rest, .. }] if ip(src) == ip(ours) && rest == b"ping")
        );
    }
    let echo = match lab.icmp6(0, GUEST6, "2001:db8::7", 64, ([128, 0, 0, 7, 0, 1], b"ping"), &mut frame) {
        Handled::Echo(echo) => (echo.binding, echo.remote, echo.hop_limit),
        other => panic!("{other:?}"),
    };
    assert_eq!((echo.1, echo.2), (addr("[2001:db8::7]:0"), 63));
    lab.stack.echo_from_host(echo.0, echo.1, b"\x81\0\0\0\x99\x99\0\x01ping", &mut lab.wires[0]);
    assert_eq!(lab.wires[0].frames[0][14 + 40 + 4..14 + 40 + 6], [0, 7]);
    assert!(matches!(&lab.guest_sees()[..], [Seen::Icmp { kind: 129, .. }]));
}

#[test]
fn a_connection_is_carried_as_over_ipv4() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(FROM, FAR);
    lab.guest_sends(&segment("PA", FROM, FAR, seq, ack).with(b"hello"));
    assert_eq!(lab.host_reads(flow), b"hello");
    lab.host_writes(flow, b"world");
    assert_eq!(lab.guest_reads(), b"world");
    lab.host_says(HostEvent::Reset { flow });
    assert_eq!(lab.guest_sees_flags(), ["RA"]);
}

#[test]
fn extension_headers_before_a_segment_are_passed_over() {
    let mut lab = Lab::new();
    let mut frame = syn(FROM, FAR).frame(mac_of(0));
    frame.splice(14 + 40..14 + 40, [6, 0, 1, 4, 0, 0, 0, 0]);
    frame[14 + 6] = 60;
    frame[19] += 8;
    lab.frame(0, &frame);
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    assert_eq!(lab.guest_sees_flags(), ["SA"]);
}

#[test]
fn rfc_4443_3_1_a_destination_without_a_route_is_told_at_once() {
    let mut lab = Lab::new();
    for (error, code) in
        [(HostError::NetworkUnreachable, 0), (HostError::Prohibited, 1), (HostError::HostUnreachable, 3)]
    {
        lab.guest_sends(&syn(FROM, FAR));
        let flow = lab.connect();
        lab.host_says(HostEvent::Failed { flow, error: ConnectError::Unreachable(error) });
        let seen = lab.guest_sees();
        assert!(
            matches!(&seen[..], [Seen::Icmp { src, kind: 1, code: c, .. }] if *c == code && src == GATEWAY6)
        );
    }
    lab.guest_sends(&syn(FROM, "[fd00:77::99]:80"));
    assert!(matches!(lab.guest_sees()[..], [Seen::Icmp { kind: 1, code: 3, .. }]));
}

#[test]
fn host_alias_and_dns_are_reached_and_what_policy_forbids_is_not() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(FROM, "[fd00:77::254]:80"));
    let loopback = HostTarget::Address(addr("[::1]:80"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target, .. }] if target == loopback));
    lab.guest_sends(&syn(FROM, "[fd00:77::1]:53"));
    let dns = HostTarget::Service(Service::Dns);
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target, .. }] if target == dns));
    // The name of the gateway has both addresses: what its port 80 serves is at both.
    lab.guest_sends(&syn(FROM, "[fd00:77::1]:80"));
    let api = HostTarget::Service(Service::Api);
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target, .. }] if target == api));
    let mut frame = Vec::new();
    for resolver in ["[fd00:77::1]:53", "[fe80::5894:efff:fee4:cdd]:53"] {
        assert!(matches!(lab.udp(FROM, resolver, b"q", &mut frame), Handled::Dns { .. }));
    }
    for forbidden in [
        "[fd00:77::1]:81",
        "[fd00:ec2::254]:80",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[::127.0.0.1]:80",
        "[64:ff9b::a9fe:a9fe]:80",
        "[64:ff9b::7f00:1]:80",
    ] {
        lab.guest_sends(&syn(FROM, forbidden));
        assert_eq!((lab.guest_sees_flags(), lab.host_sees()), (vec!["RA"], vec![]), "{forbidden}");
    }
    lab.guest_sends(&syn(FROM, "[64:ff9b::c000:207]:80"));
    assert_eq!(lab.host_sees().len(), 1);
}

#[test]
fn a_v6_only_guest_is_reached_by_clients_of_both_versions() {
    let mut lab = Lab::new();
    lab.guest_announces_v6();
    assert_eq!(lab.stack.guest_of(lab.ports[0]), Some(ip(GUEST6).into()));
    for (client, seen_as) in [
        ("127.0.0.1:5000", "[fd00:77::254]:5000"),
        ("[::1]:5001", "[fd00:77::254]:5001"),
        ("192.0.2.9:5002", "[fd00:77::254]:5002"),
        ("[2001:db8::9]:5003", "[2001:db8::9]:5003"),
    ] {
        lab.stack.open_to_guest(lab.now, addr("[fd00:77::2]:80"), addr(client)).unwrap();
        let seen = lab.guest_sees();
        assert!(matches!(&seen[..], [Seen::Tcp { src, flags: "S", .. }] if src == seen_as), "{seen:?}");
    }
    // Without a route of its own it could not answer the client's address.
    lab.stack.set_ipv6_uplink(false);
    lab.guest_sees();
    lab.stack.open_to_guest(lab.now, addr("[fd00:77::2]:80"), addr("[2001:db8::9]:5004")).unwrap();
    assert!(matches!(&lab.guest_sees()[..], [Seen::Tcp { src, .. }] if src == "[fd00:77::254]:5004"));
}

#[test]
fn a_v4_only_guest_is_reached_from_the_v6_loopback() {
    let mut lab = Lab::new();
    lab.guest_announces();
    lab.stack.open_to_guest(lab.now, addr("192.168.127.2:80"), addr("[::1]:5000")).unwrap();
    assert!(matches!(&lab.guest_sees()[..], [Seen::Tcp { src, .. }] if src == "192.168.127.254:5000"));
}

#[test]
fn rfc_4861_7_2_2_a_guest_whose_address_is_not_known_is_asked_for_and_found() {
    let mut lab = Lab::new();
    let guest = "fd00:77::2";
    let flow = lab.stack.open_to_guest(lab.now, addr("[fd00:77::2]:80"), addr("[::1]:5000")).unwrap();
    let seen = lab.guest_sees();
    let [Seen::Icmp { src, dst, kind: NS, rest, .. }] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!((ip(src), ip(dst)), (ip(ROUTER), solicited_node(ip(guest))));
    assert_eq!(rest[..16], ip(guest).octets());
    let mut frame = Vec::new();
    let mut body = ip(guest).octets().to_vec();
    body.extend([2, 1]);
    body.extend(mac_of(0).0);
    lab.icmp6(0, guest, ROUTER, 255, ([NA, 0, 0x60, 0, 0, 0], &body), &mut frame);
    assert_eq!(lab.guest_sees_flags(), ["S"]);
    // And when nobody answers, the client is told after three questions.
    let silent = lab.stack.open_to_guest(lab.now, addr("[fd00:77::3]:80"), addr("[::1]:5001")).unwrap();
    lab.after(secs(5));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow: silent }]);
    assert_ne!(flow, silent);
}

#[test]
fn a_published_datagram_reaches_a_v6_guest_and_its_answer_the_client() {
    let mut lab = Lab::new();
    lab.guest_announces_v6();
    let (guest, client) = (addr("[fd00:77::2]:53"), addr("127.0.0.1:6000"));
    lab.stack.datagrams_from_client(lab.now, guest, (client, 3), b"q", 1, &mut lab.wires[0]);
    assert!(matches!(&lab.guest_sees()[..], [Seen::Udp { src, .. }] if src == "[fd00:77::254]:6000"));
    let mut frame = Vec::new();
    let handled = lab.udp("[fd00:77::2]:53", "[fd00:77::254]:6000", b"a", &mut frame);
    assert!(matches!(handled, Handled::Datagram(d) if d.path == UdpPath::Client { listener: 3, client }));
}

#[test]
fn rfc_8415_a_guest_gets_a_lease_which_no_other_link_may_use() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    let duid = [0, 1, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 1];
    let solicit =
        [&[1, 7, 8, 9][..], &duid, &[0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 14, 0, 0]].concat();
    let mut frame = Vec::new();
    lab.udp("[fe80::ff:fe00:1]:546", "[ff02::1:2]:547", &solicit, &mut frame);
    let seen = lab.guest_sees();
    let [Seen::Udp { src, dst, payload }] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!((src, dst), (&format!("[{ROUTER}]:547"), &"[fe80::ff:fe00:1]:546".to_owned()));
    assert_eq!(payload[0], 7);
    let leased = lab.stack.leases6(lab.now)[0].ip.to_string();
    assert!(lab.stack.leases_changed());
    lab.icmp6(1, &leased, GATEWAY6, 64, ([128, 0, 0, 7, 0, 1], b""), &mut frame);
    assert_eq!((lab.guest_n_sees(1), lab.dropped(DropReason::SourceSpoofed)), (vec![], 1));
    lab.icmp6(0, &leased, GATEWAY6, 64, ([128, 0, 0, 7, 0, 1], b""), &mut frame);
    assert_eq!(lab.guest_sees().len(), 1);
}

#[test]
fn rfc_8981_a_guest_with_ever_new_addresses_keeps_working_and_takes_bounded_room() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    for n in 2..2000 {
        let from = format!("fd00:77::{n:x}:5");
        lab.icmp6(0, &from, GATEWAY6, 64, ([128, 0, 0, 7, 0, 1], b""), &mut frame);
        lab.after(ms(2));
    }
    assert_eq!(lab.guest_sees().len(), 1998);
}

#[test]
fn rfc_8200_5_a_packet_of_another_guest_beyond_the_mtu_is_answered() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    asks(&mut lab, 1, "fd00:77::3", GATEWAY6);
    lab.guest_n_sees(1);
    let mut frame = segment("A", FROM, "[fd00:77::3]:80", 1, 1).with(&[0; 2000]).frame(mac_of(0));
    frame[..6].copy_from_slice(&mac_of(1).0);
    let ports = (lab.ports[0], lab.ports[1]);
    assert_eq!(lab.frame(0, &frame), Handled::Forward(Forward::Port(ports.1)));
    lab.stack.forward(lab.now, ports, &frame, portway_netstack::Offload::default(), &mut lab.wires[1]);
    let seen = lab.guest_sees();
    assert!(matches!(&seen[..], [Seen::Icmp { kind: 2, code: 0, .. }]), "{seen:?}");
}

#[test]
fn a_link_too_small_for_ipv6_or_a_network_without_has_none() {
    for mut lab in [Lab::with(Limits::default(), 1, 1279), Lab::configured(|c| c.ipv6 = None)] {
        solicits_router(&mut lab, GUEST6_LOCAL);
        lab.guest_sends(&syn(FROM, FAR));
        assert_eq!((lab.guest_sees(), lab.host_sees()), (vec![], vec![]));
        let (flow, ..) = lab.open("192.168.127.2:1", "192.0.2.7:80");
        lab.host_reads(flow);
    }
}
