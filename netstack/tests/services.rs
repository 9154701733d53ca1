//! What the gateway does besides TCP, and what guests can do to each other.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use etherparse::PacketBuilder;
use lab::{GATEWAY_MAC, Lab, Seen, addr, mac_of, secs, segment, syn};
use portway_netstack::{Datagram, DropReason, Forward, Handled, HostCommand, Limits, Mac, PortId, UdpPath};

fn arp(mac: Mac, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &mac.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    frame.extend(mac.0);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

fn ping(to: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::new();
    let b = PacketBuilder::ethernet2(mac_of(0).0, GATEWAY_MAC.0).ipv4([192, 168, 127, 2], to, 64);
    b.icmpv4_echo_request(7, 1).write(&mut frame, b"ping").unwrap();
    frame
}

fn discover(mac: Mac) -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    bootp.resize(28, 0);
    bootp.extend(mac.0);
    bootp.resize(236, 0);
    bootp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    let mut frame = Vec::new();
    let b = PacketBuilder::ethernet2(mac.0, [0xff; 6]).ipv4([0; 4], [255; 4], 64).udp(68, 67);
    b.write(&mut frame, &bootp).unwrap();
    frame
}

#[test]
fn arp_is_answered_for_gateway_and_host_alias_and_for_nobody_else() {
    let mut lab = Lab::new();
    for (last, answered) in [(1, true), (254, true), (77, false), (2, false)] {
        lab.frame(0, &arp(mac_of(0), [192, 168, 127, 2], [192, 168, 127, last]));
        let seen = lab.guest_sees();
        assert_eq!(matches!(&seen[..], [Seen::Arp { is_reply: true, .. }]), answered, "{last}: {seen:?}");
    }
}

#[test]
fn a_discover_is_offered_the_first_address_and_the_links_mtu() {
    let mut lab = Lab::with(Limits::default(), 1, 9000);
    lab.frame(0, &discover(mac_of(0)));
    let seen = lab.guest_sees();
    let [Seen::Udp { src, dst, payload }] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!((src.as_str(), dst.as_str()), ("192.168.127.1:67", "192.168.127.2:68"));
    assert!(payload.windows(4).any(|w| w == [26, 2, 0x23, 0x28]));
}

#[test]
fn a_link_with_all_its_leases_gets_no_offer_and_another_link_does() {
    let mut lab = Lab::configured_for(2, |config| {
        // Four addresses are leased: one link has one for certain, and another while two are free.
        config.subnet = "192.168.127.0/29".parse().unwrap();
        config.host_alias = "192.168.127.6".parse().unwrap();
        config.limits.leases = 1;
    });
    for guest in [0, 8] {
        lab.frame(0, &discover(mac_of(guest)));
        assert_eq!(lab.guest_n_sees(0).len(), 1);
    }
    lab.frame(0, &discover(mac_of(9)));
    assert_eq!((lab.guest_n_sees(0), lab.dropped(DropReason::DhcpLimit)), (vec![], 1));
    lab.frame(1, &discover(mac_of(1)));
    assert!(matches!(&lab.guest_n_sees(1)[..], [Seen::Udp { dst, .. }] if dst == "192.168.127.4:68"));
}

#[test]
fn rfc_792_echo_is_answered_for_our_own_addresses_and_handed_out_beyond_them() {
    let mut lab = Lab::new();
    for ours in [1, 254] {
        lab.frame(0, &ping([192, 168, 127, ours]));
        assert!(matches!(&lab.guest_sees()[..], [Seen::Icmp { kind: 0, rest, .. }] if rest == b"ping"));
    }
    let frame = ping([192, 0, 2, 7]);
    let Handled::Echo(echo) = lab.frame(0, &frame) else { panic!("not handed out") };
    assert_eq!((echo.remote, echo.hop_limit), (addr("192.0.2.7:0"), 63));
    assert_eq!(echo.message[..2], [8, 0]);
    // The host's socket has an identifier of its own.
    lab.stack.echo_from_host(echo.binding, echo.remote, b"\0\0\0\0\x99\x99\0\x01ping", &mut lab.wires[0]);
    let raw = lab.wires[0].frames[0].clone();
    assert_eq!(raw[14 + 20 + 4..], *b"\0\x07\0\x01ping");
    assert!(
        matches!(&lab.guest_sees()[..], [Seen::Icmp { src, kind: 0, .. }] if src == "192.0.2.7"),
        "the reply comes from whom the guest asked"
    );
    lab.stack.echo_from_host(echo.binding, addr("192.0.2.8:0"), &[0; 8], &mut lab.wires[0]);
    assert_eq!((lab.guest_sees(), lab.dropped(DropReason::Filtered)), (vec![], 1));
}

#[test]
fn a_flood_of_pings_is_limited_and_the_limit_passes() {
    let mut lab = Lab::new();
    for _ in 0..1500 {
        lab.frame(0, &ping([192, 168, 127, 1]));
    }
    assert_eq!((lab.guest_sees().len(), lab.dropped(DropReason::RateLimited)), (1000, 500));
    lab.after(secs(1));
    lab.frame(0, &ping([192, 168, 127, 1]));
    assert_eq!(lab.guest_sees().len(), 1);
}

#[test]
fn a_datagram_goes_out_through_its_binding_and_the_answer_comes_back() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    let handled = lab.udp("192.168.127.2:5000", "192.0.2.7:7", b"hi", &mut frame);
    let Handled::Datagram(Datagram {
        path: UdpPath::Binding { binding, new: true },
        remote,
        payload: b"hi",
        ..
    }) = handled
    else {
        panic!("{handled:?}");
    };
    assert_eq!(remote, addr("192.0.2.7:7"));
    lab.stack.datagrams_from_host(binding, remote, b"ho", b"ho".len(), &mut lab.wires[0]);
    lab.stack.datagrams_from_host(
        binding,
        addr("198.51.100.1:7"),
        b"stranger",
        b"stranger".len(),
        &mut lab.wires[0],
    );
    let src = "192.0.2.7:7".to_owned();
    assert_eq!(
        lab.guest_sees(),
        [Seen::Udp { src, dst: "192.168.127.2:5000".into(), payload: b"ho".to_vec() }]
    );
    assert_eq!(lab.dropped(DropReason::Filtered), 1);
    lab.after(secs(301));
    assert_eq!(lab.host_sees(), [HostCommand::CloseBinding { binding }]);
}

#[test]
fn a_published_datagram_shows_the_host_alias_and_its_answer_finds_the_client() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", "192.168.127.2:9", "192.0.2.7:9", 1, 1));
    lab.guest_sees();
    let (guest, client) = (addr("192.168.127.2:53"), addr("[::1]:6000"));
    lab.stack.datagrams_from_client(lab.now, guest, (client, 3), b"q", 1, &mut lab.wires[0]);
    assert!(matches!(&lab.guest_sees()[..], [Seen::Udp { src, .. }] if src == "192.168.127.254:6000"));
    let mut frame = Vec::new();
    let handled = lab.udp("192.168.127.2:53", "192.168.127.254:6000", b"a", &mut frame);
    assert!(matches!(handled, Handled::Datagram(d) if d.path == UdpPath::Client { listener: 3, client }));
}

#[test]
fn a_dns_query_to_the_gateway_is_handed_out_and_answered_from_it() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    let handled = lab.udp("192.168.127.2:5353", "192.168.127.1:53", b"query", &mut frame);
    let Handled::Dns { guest, asked, query: b"query" } = handled else { panic!("{handled:?}") };
    let port = lab.ports[0];
    lab.stack.dns_answer(guest, asked, port, b"answer", &mut lab.wires[0]);
    assert!(
        matches!(&lab.guest_sees()[..], [Seen::Udp { src, payload, .. }] if src == "192.168.127.1:53" && payload == b"answer")
    );
    let handled = lab.udp("192.168.127.2:5353", "192.168.127.1:54", b"x", &mut frame);
    assert!(matches!(handled, Handled::Done));
    assert!(matches!(lab.guest_sees()[..], [Seen::Icmp { kind: 3, code: 3, .. }]));
}

#[test]
fn guests_reach_each_other_and_a_broadcast_reaches_all() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    let hello = arp(mac_of(1), [192, 168, 127, 3], [192, 168, 127, 2]);
    assert_eq!(lab.frame(1, &hello), Handled::Forward(Forward::Flood));
    let mut to_other = segment("S", "192.168.127.2:1", "192.168.127.3:80", 1, 0).frame(mac_of(0));
    to_other[..6].copy_from_slice(&mac_of(1).0);
    assert_eq!(lab.frame(0, &to_other), Handled::Forward(Forward::Port(PortId(1))));
}

#[test]
fn a_guest_cannot_be_another_or_the_gateway() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    lab.frame(0, &arp(mac_of(0), [192, 168, 127, 2], [192, 168, 127, 1]));
    lab.guest_sees();
    // The other's Ethernet address, the gateway's, the other's address by ARP and by IP, ours.
    lab.frame(1, &arp(mac_of(0), [192, 168, 127, 3], [192, 168, 127, 1]));
    lab.frame(1, &arp(GATEWAY_MAC, [192, 168, 127, 3], [192, 168, 127, 1]));
    assert_eq!(lab.dropped(DropReason::MacSpoofed), 2);
    lab.frame(1, &arp(mac_of(1), [192, 168, 127, 2], [192, 168, 127, 1]));
    lab.frame(1, &syn("192.168.127.2:5", "192.0.2.7:80").frame(mac_of(1)));
    lab.frame(1, &arp(mac_of(1), [192, 168, 127, 1], [192, 168, 127, 2]));
    lab.frame(1, &syn("10.0.0.1:5", "192.0.2.7:80").frame(mac_of(1)));
    assert_eq!(lab.dropped(DropReason::SourceSpoofed), 4);
    assert_eq!((lab.guest_n_sees(1), lab.host_sees()), (vec![], vec![]));
}

#[test]
fn a_link_that_goes_takes_its_flows_and_leaves_the_others() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    let (flow, ..) = lab.open("192.168.127.2:1", "192.0.2.7:80");
    lab.frame(1, &syn("192.168.127.3:1", "192.0.2.7:80").frame(mac_of(1)));
    lab.connect();
    lab.guest_sends(&syn("192.168.127.2:2", "192.0.2.7:80"));
    let dialing = lab.connect();
    let port = lab.ports[0];
    lab.stack.port_down(port);
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }, HostCommand::Reset { flow: dialing }]);
    assert_eq!((lab.stack.counters().flows, lab.stack.counters().dialing), (1, 1));
    // Its addresses are free for others now.
    lab.frame(1, &arp(mac_of(1), [192, 168, 127, 2], [192, 168, 127, 1]));
    assert_eq!(lab.guest_n_sees(1).len(), 1);
}
