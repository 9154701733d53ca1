//! How connections begin, as guest and host see it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use etherparse::{PacketBuilder, TcpOptionElement};
use lab::{GATEWAY_MAC, Lab, Seen, addr, mac_of, ms, secs, segment, syn};
use portway_netstack::{
    ConnectError, DropReason, HostCommand, HostError, HostEvent, HostTarget, Limits, OpenError, Service,
};

const GUEST: &str = "192.168.127.2:40000";
const FAR: &str = "192.0.2.7:443";

#[test]
fn syn_is_answered_only_after_the_host_side_connects() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    assert_eq!(lab.guest_sees(), []);
    lab.after(ms(30)).host_says(HostEvent::Connected { flow });
    let seen = lab.guest_sees();
    let [Seen::Tcp { src, dst, flags: "SA", ack: 1001, .. }] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!((src.as_str(), dst.as_str()), (FAR, GUEST));
}

#[test]
fn a_refused_connect_is_a_reset_of_exactly_the_guests_syn() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.host_says(HostEvent::Failed { flow, error: ConnectError::Refused });
    let seen = lab.guest_sees();
    assert!(matches!(&seen[..], [Seen::Tcp { flags: "RA", ack: 1001, .. }]), "{seen:?}");
    assert_eq!(lab.stack.counters().flows, 0);
}

#[test]
fn an_unreachable_destination_is_an_icmp_error_that_quotes_the_syn() {
    for (error, code) in
        [(HostError::NetworkUnreachable, 0), (HostError::HostUnreachable, 1), (HostError::Prohibited, 13)]
    {
        let mut lab = Lab::new();
        let syn = syn(GUEST, FAR);
        lab.guest_sends(&syn);
        let flow = lab.connect();
        lab.host_says(HostEvent::Failed { flow, error: ConnectError::Unreachable(error) });
        let seen = lab.guest_sees();
        let [Seen::Icmp { kind: 3, code: c, rest, .. }] = &seen[..] else { panic!("{seen:?}") };
        assert_eq!((*c, &rest[..]), (code, &syn.frame(lab::mac_of(0))[14..]));
    }
}

#[test]
fn a_connect_that_times_out_is_silence() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.after(secs(130)).host_says(HostEvent::Failed { flow, error: ConnectError::TimedOut });
    assert_eq!(lab.guest_sees(), []);
    assert_eq!(lab.stack.counters().flows, 0);
}

#[test]
fn a_repeated_syn_starts_no_second_connect_and_a_new_one_is_answered_as_the_newest() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.guest_sends(&syn(GUEST, FAR));
    lab.guest_sends(&segment("S", GUEST, FAR, 7000, 0));
    assert_eq!(lab.host_sees(), []);
    lab.host_says(HostEvent::Connected { flow });
    assert!(matches!(&lab.guest_sees()[..], [Seen::Tcp { flags: "SA", ack: 7001, .. }]));
}

#[test]
fn a_guest_that_gives_up_while_the_host_dials_takes_the_dial_with_it() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.guest_sends(&segment("R", GUEST, FAR, 1001, 0));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
    lab.host_says(HostEvent::Connected { flow });
    assert_eq!(lab.guest_sees(), []);
}

#[test]
fn the_host_alias_is_the_hosts_loopback_and_the_gateway_serves_dns_alone() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, "192.168.127.254:80"));
    let target = HostTarget::Address(addr("127.0.0.1:80"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target: t, .. }] if t == target));
    lab.guest_sends(&syn(GUEST, "192.168.127.1:53"));
    assert!(matches!(
        lab.host_sees()[..],
        [HostCommand::Connect { target: HostTarget::Service(Service::Dns), .. }]
    ));
    lab.guest_sends(&syn(GUEST, "192.168.127.1:22"));
    assert_eq!((lab.host_sees(), lab.guest_sees_flags()), (vec![], vec!["RA"]));
}

#[test]
fn host_loopback_and_the_metadata_address_are_the_operators_to_switch() {
    let mut lab = Lab::configured(|c| c.host_loopback = false);
    lab.guest_sends(&syn(GUEST, "192.168.127.254:8080"));
    assert_eq!((lab.host_sees(), lab.guest_sees_flags()), (vec![], vec!["RA"]));
    let mut lab = Lab::configured(|c| c.metadata = true);
    lab.guest_sends(&syn(GUEST, "169.254.169.254:80"));
    let target = HostTarget::Address(addr("169.254.169.254:80"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target: t, .. }] if t == target));
}

#[test]
fn metadata_loopback_and_unused_addresses_of_the_subnet_are_not_dialled() {
    let mut lab = Lab::new();
    for to in ["169.254.169.254:80", "127.0.0.1:80"] {
        lab.guest_sends(&syn(GUEST, to));
        assert_eq!((lab.host_sees(), lab.guest_sees_flags()), (vec![], vec!["RA"]), "{to}");
    }
    assert_eq!(lab.dropped(DropReason::Forbidden), 2);
    lab.guest_sends(&syn(GUEST, "192.168.127.77:80"));
    assert_eq!(lab.host_sees(), []);
    assert!(matches!(lab.guest_sees()[..], [Seen::Icmp { kind: 3, code: 1, .. }]));
}

#[test]
fn at_the_cap_of_pending_connects_a_syn_waits_and_loopback_is_never_starved() {
    let mut lab = Lab::with(Limits { dialing: 2, ..Limits::default() }, 1, 1500);
    for port in 1..=3 {
        lab.guest_sends(&syn(&format!("192.168.127.2:{port}"), FAR));
    }
    let dials = lab.host_sees();
    assert_eq!((dials.len(), lab.guest_sees(), lab.dropped(DropReason::DialLimit)), (2, vec![], 1));
    lab.guest_sends(&syn("192.168.127.2:9", "192.168.127.254:80"));
    assert_eq!(lab.host_sees().len(), 1);
    let HostCommand::Connect { flow, .. } = dials[0] else { panic!() };
    lab.host_says(HostEvent::Failed { flow, error: ConnectError::Refused });
    lab.guest_sends(&syn("192.168.127.2:3", FAR));
    assert_eq!(lab.host_sees().len(), 1);
}

#[test]
fn at_the_cap_of_pending_connects_to_the_hosts_loopback_a_syn_waits_and_others_do_not() {
    let mut lab = Lab::with(Limits { dialing_loopback: 1, ..Limits::default() }, 1, 1500);
    for port in 1..=2 {
        lab.guest_sends(&syn(&format!("192.168.127.2:{port}"), "192.168.127.254:80"));
    }
    let dials = lab.host_sees();
    assert_eq!((dials.len(), lab.guest_sees(), lab.dropped(DropReason::DialLimit)), (1, vec![], 1));
    lab.guest_sends(&syn("192.168.127.2:9", FAR));
    assert_eq!(lab.host_sees().len(), 1);
    let HostCommand::Connect { flow, .. } = dials[0] else { panic!() };
    lab.host_says(HostEvent::Failed { flow, error: ConnectError::Refused });
    lab.guest_sends(&syn("192.168.127.2:2", "192.168.127.254:80"));
    assert_eq!(lab.host_sees().len(), 1);
}

#[test]
fn at_the_cap_of_flows_a_syn_is_refused_and_open_flows_live() {
    let mut lab = Lab::with(Limits { flows: 1, ..Limits::default() }, 1, 1500);
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.guest_sends(&syn("192.168.127.2:40001", FAR));
    assert_eq!((lab.host_sees(), lab.guest_sees_flags()), (vec![], vec!["RA"]));
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack).with(b"still here"));
    assert_eq!(lab.host_reads(flow), b"still here");
}

#[test]
fn without_ring_memory_the_guest_is_refused_and_the_host_let_go() {
    let mut lab = Lab::with_rings(Limits::default(), 1, 1500, 0);
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    assert_eq!((lab.host_sees(), lab.guest_sees_flags()), (vec![HostCommand::Reset { flow }], vec!["RA"]));
}

#[test]
fn a_guest_that_never_finishes_its_handshake_is_given_up() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    lab.after(secs(31));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
    assert_eq!(lab.guest_sees_flags().last(), Some(&"RA"));
    assert_eq!(lab.stack.counters().flows, 0);
}

#[test]
fn a_guest_that_resets_before_its_handshake_ends_resets_the_host_side_at_once() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    let Seen::Tcp { flags: "SA", seq, .. } = lab.guest_sees()[0] else { panic!() };
    lab.guest_sends(&segment("RA", GUEST, FAR, 1001, seq + 1));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
    assert_eq!((lab.guest_sees(), lab.stack.counters().flows), (vec![], 0));
}

#[test]
fn a_syn_with_malformed_options_leaves_no_host_side_behind() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    let options = [TcpOptionElement::MaximumSegmentSize(1460)];
    PacketBuilder::ethernet2(mac_of(0).0, GATEWAY_MAC.0)
        .ipv4([192, 168, 127, 2], [192, 0, 2, 7], 64)
        .tcp(40_000, 443, 1000, 65_535)
        .syn()
        .options(&options)
        .unwrap()
        .write(&mut frame, &[])
        .unwrap();
    assert_eq!(frame[54..56], [2, 4]);
    frame[55] = 1; // shorter than its own header
    lab.frame(0, &frame);
    for command in lab.host_sees() {
        if let HostCommand::Connect { flow, .. } = command {
            lab.host_says(HostEvent::Connected { flow });
            assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
        }
    }
    assert_eq!(lab.stack.counters().flows, 0);
}

#[test]
fn a_published_connection_reaches_the_guest_from_the_host_alias() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1)); // the guest has spoken: its address is known
    lab.guest_sees();
    let flow = lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    let seen = lab.guest_sees();
    let [Seen::Tcp { src, flags: "S", seq, .. }] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(src, "192.168.127.254:51000");
    assert_eq!(lab.host_writes(flow, b"early"), 0, "nothing is taken before the guest has answered");
    lab.guest_sends(&segment("SA", "192.168.127.2:22", "192.168.127.254:51000", 500, seq + 1));
    assert_eq!(lab.guest_sees_flags(), ["A"]);
    assert_eq!(lab.stack.poll_flow(), Some(flow));
    assert_eq!(lab.host_writes(flow, b"hello"), 5);
    assert!(matches!(&lab.guest_sees()[..], [Seen::Tcp { payload, .. }] if payload == b"hello"));
}

#[test]
fn a_client_from_elsewhere_keeps_its_address() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    lab.guest_sees();
    lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("198.51.100.9:51000")).unwrap();
    assert!(matches!(&lab.guest_sees()[..], [Seen::Tcp { src, .. }] if src == "198.51.100.9:51000"));
}

#[test]
fn two_clients_with_one_port_are_two_connections() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    lab.guest_sees();
    for client in ["127.0.0.1:51000", "[::1]:51000"] {
        lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr(client)).unwrap();
    }
    let sources: Vec<String> = lab
        .guest_sees()
        .into_iter()
        .filter_map(|s| if let Seen::Tcp { src, .. } = s { Some(src) } else { None })
        .collect();
    assert_eq!(sources.len(), 2);
    assert_ne!(sources[0], sources[1]);
}

#[test]
fn a_guest_that_refuses_or_is_not_there_resets_the_published_connection() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    lab.guest_sees();
    let flow = lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    let Seen::Tcp { seq, .. } = lab.guest_sees()[0] else { panic!() };
    lab.guest_sends(&segment("RA", "192.168.127.2:22", "192.168.127.254:51000", 0, seq + 1));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);

    let flow = lab.stack.open_to_guest(lab.now, addr("192.168.127.3:22"), addr("127.0.0.1:51001")).unwrap();
    let asked =
        |seen: &[Seen]| seen.iter().filter(|s| matches!(s, Seen::Arp { is_reply: false, .. })).count();
    assert_eq!(asked(&lab.guest_sees()), 1);
    lab.after(secs(4));
    assert_eq!((asked(&lab.guest_sees()), lab.host_sees()), (2, vec![HostCommand::Reset { flow }]));
    for nobody in ["192.168.127.1:22", "192.168.127.254:22", "10.0.0.1:22", "192.168.127.2:0"] {
        let opened = lab.stack.open_to_guest(lab.now, addr(nobody), addr("127.0.0.1:1"));
        assert_eq!(opened, Err(OpenError::NoGuest), "{nobody}");
    }
}

#[test]
fn a_published_connection_waits_for_the_guests_arp_answer() {
    let mut lab = Lab::new();
    lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    assert!(
        matches!(&lab.guest_sees()[..], [Seen::Arp { is_reply: false, target, .. }] if target == "192.168.127.2")
    );
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    assert!(lab.guest_sees_flags().contains(&"S"));
}

#[test]
fn at_the_cap_of_clients_that_wait_for_an_arp_answer_the_next_is_told_and_room_comes_back() {
    let mut lab = Lab::with(Limits { resolving: 2, ..Limits::default() }, 1, 1500);
    let to = |lab: &mut Lab, n: u16| {
        let client = std::net::SocketAddr::from(([127, 0, 0, 1], 51_000 + n));
        lab.stack.open_to_guest(lab.now, addr("192.168.127.9:22"), client)
    };
    assert!(to(&mut lab, 0).is_ok() && to(&mut lab, 1).is_ok());
    assert_eq!(to(&mut lab, 2), Err(portway_netstack::OpenError::Limit));
    // Nobody is there: both are reset, and make room.
    lab.after(secs(10));
    assert_eq!(lab.host_sees().len(), 2);
    assert!(to(&mut lab, 3).is_ok());
}

#[test]
fn a_client_that_goes_away_while_the_guest_is_asked_for_leaves_nothing() {
    let mut lab = Lab::new();
    let (guest, client) = (addr("192.168.127.2:22"), addr("127.0.0.1:51000"));
    let flow = lab.stack.open_to_guest(lab.now, guest, client).unwrap();
    lab.host_says(HostEvent::Reset { flow });
    lab.after(secs(10));
    assert_eq!((lab.host_sees(), lab.stack.counters().flows), (vec![], 0));
}

#[test]
fn a_client_that_ends_before_the_guest_answers_is_still_a_connection_and_a_fin() {
    let mut lab = Lab::new();
    lab.guest_announces();
    let flow = lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    lab.host_says(HostEvent::Eof { flow });
    let Seen::Tcp { flags: "S", seq, .. } = lab.guest_sees()[0] else { panic!() };
    lab.guest_sends(&segment("SA", "192.168.127.2:22", "192.168.127.254:51000", 500, seq + 1));
    assert_eq!(lab.guest_sees_flags(), ["FA"]);
    assert_eq!(lab.host_sees(), []);
}

#[test]
fn a_host_that_ends_before_the_guests_handshake_does_is_still_a_fin() {
    let mut lab = Lab::new();
    lab.guest_sends(&syn(GUEST, FAR));
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    lab.host_says(HostEvent::Eof { flow });
    let Seen::Tcp { flags: "SA", seq, .. } = lab.guest_sees()[0] else { panic!() };
    lab.guest_sends(&segment("A", GUEST, FAR, 1001, seq + 1));
    assert_eq!(lab.guest_sees_flags(), ["FA"]);
}

/// A published connection that the guest closed first: the next sequence numbers of guest and stack on its ports.
fn closed_by_the_guest(lab: &mut Lab, guest: &str, client: &str) -> (u32, u32) {
    let flow = lab.stack.open_to_guest(lab.now, addr(guest), addr("127.0.0.1:51000")).unwrap();
    let Seen::Tcp { flags: "S", seq, .. } = lab.guest_sees()[0] else { panic!() };
    lab.guest_sends(&segment("SA", guest, client, 500, seq + 1));
    lab.guest_sends(&segment("FA", guest, client, 501, seq + 1));
    lab.host_says(HostEvent::Eof { flow });
    lab.guest_sends(&segment("A", guest, client, 502, seq + 2));
    assert_eq!(lab.host_sees(), [HostCommand::ShutdownWrite { flow }, HostCommand::Close { flow }]);
    lab.guest_sees();
    (502, seq + 2)
}

#[test]
fn a_client_port_the_guest_holds_in_time_wait_is_open_again_without_a_wait() {
    let (guest, client) = ("192.168.127.2:22", "192.168.127.254:51000");
    let mut lab = Lab::new();
    lab.guest_announces();
    let (seq, ack) = closed_by_the_guest(&mut lab, guest, client);
    let flow = lab.stack.open_to_guest(lab.now, addr(guest), addr("127.0.0.1:51000")).unwrap();
    assert_eq!(lab.guest_sees_flags(), ["S"]);
    // RFC 9293 §3.10.7.4: TIME-WAIT answers with what it last acknowledged. Our RST ends it, and no timer runs.
    lab.guest_sends(&segment("A", guest, client, seq, ack));
    let seen = lab.guest_sees();
    let [Seen::Tcp { flags: "R", seq: reset, .. }, Seen::Tcp { flags: "S", seq: anew, .. }] = seen[..] else {
        panic!("{seen:?}")
    };
    assert_eq!(reset, ack);
    lab.guest_sends(&segment("SA", guest, client, 9000, anew + 1));
    assert_eq!(lab.guest_sees_flags(), ["A"]);
    assert_eq!(lab.host_writes(flow, b"hello"), 5);
    assert_eq!(lab.guest_reads(), b"hello");
}

#[test]
fn a_guest_that_challenges_every_syn_is_not_sent_one_each_time() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    lab.guest_sees();
    lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    assert_eq!(lab.guest_sees_flags(), ["S"]);
    for _ in 0..9 {
        lab.guest_sends(&segment("A", "192.168.127.2:22", "192.168.127.254:51000", 900, 77));
    }
    assert_eq!(lab.guest_sees_flags().iter().filter(|f| **f == "S").count(), 2);
    // The timer goes on.
    lab.after(ms(150));
    assert_eq!(lab.guest_sees_flags(), ["S"]);
}

#[test]
fn clients_without_a_port_get_one_each_also_while_the_guest_is_asked_for() {
    // Clients of a published unix socket.
    let mut lab = Lab::new();
    for _ in 0..2 {
        lab.stack.open_to_guest(lab.now, lab::addr("192.168.127.2:22"), lab::addr("127.0.0.1:0")).unwrap();
    }
    lab.guest_sees();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    let sources: Vec<String> = lab
        .guest_sees()
        .into_iter()
        .filter_map(|seen| match seen {
            Seen::Tcp { src, flags: "S", .. } => Some(src),
            _ => None,
        })
        .collect();
    assert_eq!(sources, ["192.168.127.254:65535", "192.168.127.254:65534"]);
}
