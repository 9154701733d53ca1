//! How connections begin, as guest and host see it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use lab::{Lab, Seen, addr, ms, secs, segment, syn};
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
fn a_guest_that_remembers_the_ports_is_reset_and_asked_again_at_once() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    lab.guest_sees();
    lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    let [Seen::Tcp { seq: first, .. }] = lab.guest_sees()[..] else { panic!() };
    // RFC 9293 §3.10.7.4: in TIME-WAIT a SYN that is no news is answered with what was acknowledged last.
    let answer = segment("A", "192.168.127.2:22", "192.168.127.254:51000", 900, 77);
    lab.guest_sends(&answer);
    let seen = lab.guest_sees();
    let [Seen::Tcp { flags: "R", seq: 77, .. }, Seen::Tcp { flags: "S", seq: second, .. }] = seen[..] else {
        panic!("{seen:?}")
    };
    assert_ne!(first, second);
    lab.guest_sends(&segment("SA", "192.168.127.2:22", "192.168.127.254:51000", 500, second + 1));
    assert_eq!(lab.guest_sees_flags(), ["A"]);
}

#[test]
fn a_guest_that_never_stops_remembering_is_asked_no_more_than_three_times_at_once() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 1, 1));
    lab.guest_sees();
    lab.stack.open_to_guest(lab.now, addr("192.168.127.2:22"), addr("127.0.0.1:51000")).unwrap();
    assert_eq!(lab.guest_sees_flags(), ["S"]);
    for _ in 0..9 {
        lab.guest_sends(&segment("A", "192.168.127.2:22", "192.168.127.254:51000", 900, 77));
    }
    assert_eq!(lab.guest_sees_flags().iter().filter(|f| **f == "S").count(), 3);
}
