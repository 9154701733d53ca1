//! UDP as guest and host see it: bindings, where they lead, and what does not fit. Their filter and their end are
//! tested beside the code.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use std::net::SocketAddr;

use lab::{Lab, Seen, Unfinished, addr, ms};
use portway_netstack::icmp::{Fault, Unreachable};
use portway_netstack::udp::BindingId;
use portway_netstack::{
    Datagram, DropReason, Handled, HostCommand, Limits, Offload, Offloads, SegmentKind, UdpPath, segments,
};

const GUEST: &str = "192.168.127.2:5000";
const FAR: &str = "192.0.2.7:9000";

/// The guest sends a datagram: the binding it takes, and where to.
fn binding(lab: &mut Lab, from: &str, to: &str) -> (BindingId, SocketAddr) {
    let mut frame = Vec::new();
    match lab.udp(from, to, b"x", &mut frame) {
        Handled::Datagram(Datagram { path: UdpPath::Binding { binding, .. }, remote, .. }) => {
            (binding, remote)
        }
        other => panic!("no binding: {other:?}"),
    }
}

/// What the guest sees of a datagram from `remote` to a binding's socket.
fn answered(lab: &mut Lab, binding: BindingId, remote: &str, payload: &[u8]) -> Vec<Seen> {
    lab.stack.datagrams_from_host(binding, addr(remote), payload, payload.len(), &mut lab.wires[0]);
    lab.guest_sees()
}

#[test]
fn the_host_alias_is_loopback_in_both_directions() {
    let mut lab = Lab::new();
    let (binding, remote) = binding(&mut lab, GUEST, "192.168.127.254:9000");
    assert_eq!(remote, addr("127.0.0.1:9000"));
    let seen = answered(&mut lab, binding, "127.0.0.1:9000", b"x");
    assert!(matches!(&seen[..], [Seen::Udp { src, .. }] if src == "192.168.127.254:9000"), "{seen:?}");
}

#[test]
fn at_the_limit_the_idlest_binding_goes_and_the_host_is_told() {
    let mut lab = Lab::with(Limits { udp_bindings: 2, ..Limits::default() }, 1, 1500);
    let (first, _) = binding(&mut lab, GUEST, FAR);
    for from in ["192.168.127.2:5001", "192.168.127.2:5002"] {
        lab.after(ms(1));
        binding(&mut lab, from, FAR);
    }
    assert_eq!(lab.host_sees(), [HostCommand::CloseBinding { binding: first }]);
    assert_eq!(lab.stack.counters().bindings, 2);
    assert_eq!(answered(&mut lab, first, FAR, b"late"), []);
}

#[test]
fn the_metadata_address_is_prohibited() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    assert_eq!(lab.udp(GUEST, "169.254.169.254:80", b"x", &mut frame), Handled::Done);
    assert!(matches!(lab.guest_sees()[..], [Seen::Icmp { kind: 3, code: 13, .. }]));
}

#[test]
fn rfc_791_3_2_a_datagram_beyond_the_mtu_leaves_in_fragments_up_to_65507_bytes() {
    let mut lab = Lab::new();
    for (guest, far, most) in [(GUEST, FAR, 65_507), ("[fd00:77::2]:5000", "[2001:db8::7]:9000", 65_527)] {
        let header = if guest.starts_with('[') { 48 } else { 20 };
        let (binding, _) = binding(&mut lab, guest, far);
        assert!(matches!(answered(&mut lab, binding, far, &[0; 1452])[..], [Seen::Udp { .. }]));
        let seen = answered(&mut lab, binding, far, &vec![7; most]);
        let mut next = 0;
        for (n, fragment) in seen.iter().enumerate() {
            let Seen::Fragment { offset, more, len } = fragment else { panic!("{fragment:?}") };
            assert_eq!((*offset, *more), (next, n + 1 < seen.len()));
            assert!(len + header <= 1500);
            next += len;
        }
        assert_eq!(next, 8 + most);
    }
}

#[test]
fn a_datagram_for_a_full_link_is_dropped_and_counted() {
    let mut lab = Lab::new();
    let (binding, _) = binding(&mut lab, GUEST, FAR);
    lab.wires[0].room = 0;
    assert_eq!(answered(&mut lab, binding, FAR, b"x"), []);
    lab.wires[0].room = 1;
    assert_eq!(answered(&mut lab, binding, FAR, &[0; 3000]).len(), 1);
    assert_eq!(lab.dropped(DropReason::LinkFull), 2);
}

/// A datagram with a hop limit.
fn with_hops(lab: &mut Lab, from: &str, to: &str, hop_limit: u8) -> Option<(BindingId, SocketAddr, u8)> {
    let (from, to) = (addr(from), addr(to));
    let mut frame = Vec::new();
    let b = lab::ip(lab::mac_of(0), from.ip(), to.ip(), hop_limit).udp(from.port(), to.port());
    b.write(&mut frame, b"probe").unwrap();
    match lab.frame(0, &frame) {
        Handled::Datagram(Datagram { path: UdpPath::Binding { binding, .. }, remote, hop_limit, .. }) => {
            Some((binding, remote, hop_limit))
        }
        _ => None,
    }
}

#[test]
fn the_gateway_is_the_first_hop_and_the_hops_behind_it_are_told_by_their_names() {
    let mut lab = Lab::new();
    for (guest, far, hop, kind) in
        [(GUEST, FAR, "198.51.100.1", 11), ("[fd00:77::2]:5000", "[2001:db8::7]:9000", "2001:db8:1::1", 3)]
    {
        assert_eq!(with_hops(&mut lab, guest, far, 1), None);
        let gateway = if guest.starts_with('[') { lab::GATEWAY6 } else { lab::GATEWAY };
        let [Seen::Icmp { src, kind: k, code: 0, .. }] = &lab.guest_sees()[..] else { panic!() };
        assert_eq!((src.as_str(), *k), (gateway, kind));
        let (binding, remote, hop_limit) = with_hops(&mut lab, guest, far, 3).unwrap();
        assert_eq!(hop_limit, 2);
        let reporter = Some(hop.parse().unwrap());
        lab.stack.host_fault(lab.now, binding, remote, reporter, Fault::HopLimit, b"probe");
        let [Seen::Icmp { src, kind: k, rest, .. }] = &lab.guest_sees()[..] else { panic!() };
        assert_eq!((src.as_str(), *k), (hop, kind));
        // The guest's own packet is quoted: by it the program knows what the error is about.
        let ip = if guest.starts_with('[') { 40 } else { 20 };
        assert_eq!(rest[ip..ip + 4], [0x13, 0x88, 0x23, 0x28]);
        assert_eq!(&rest[ip + 8..], b"probe");
    }
    assert_eq!(lab.dropped(DropReason::HopLimit), 2);
}

#[test]
fn what_the_host_learns_of_a_datagram_reaches_the_guest() {
    let mut lab = Lab::new();
    let (alias, remote) = binding(&mut lab, GUEST, "192.168.127.254:9000");
    let refused = Fault::Unreachable(Unreachable::Port);
    lab.stack.host_fault(lab.now, alias, remote, Some([127, 0, 0, 1].into()), refused, b"x");
    // A connected socket of the guest's gets ECONNREFUSED: the error names the address it knows.
    let [Seen::Icmp { src, kind: 3, code: 3, rest, .. }] = &lab.guest_sees()[..] else { panic!() };
    assert_eq!((src.as_str(), &rest[16..20]), ("192.168.127.254", &[192, 168, 127, 254][..]));
    // Listings name what the guest names.
    let listed: Vec<_> = lab.stack.bindings(lab.now).map(|b| b.remote.to_string()).collect();
    assert_eq!(listed, ["192.168.127.254:9000"]);
    // Over IPv6 it was ::1 that refused, or 127.0.0.1 after it.
    let (alias6, remote) = binding(&mut lab, "[fd00:77::2]:5000", &format!("[{}]:9000", lab::ALIAS6));
    for reporter in ["::1", "::ffff:127.0.0.1", "127.0.0.1"] {
        let reporter = Some(reporter.parse().unwrap());
        lab.stack.host_fault(lab.now, alias6, remote, reporter, refused, b"x");
        let [Seen::Icmp { src, kind: 1, code: 4, .. }] = &lab.guest_sees()[..] else { panic!() };
        assert_eq!(src, lab::ALIAS6);
    }
    let (far, remote) = binding(&mut lab, GUEST, FAR);
    for (fault, code) in [
        (Fault::Unreachable(Unreachable::Network), 0),
        (Fault::Unreachable(Unreachable::Prohibited), 13),
        (Fault::TooBig(1400), 4),
    ] {
        lab.stack.host_fault(lab.now, far, remote, None, fault, b"x");
        let seen = lab.guest_sees();
        assert!(matches!(&seen[..], [Seen::Icmp { kind: 3, code: c, .. }] if *c == code), "{seen:?}");
    }
    // About somebody the guest never sent to, or by a router that claims an address of ours.
    lab.stack.host_fault(lab.now, far, addr("203.0.113.9:1"), None, refused, b"x");
    assert_eq!((lab.guest_sees(), lab.dropped(DropReason::Filtered)), (vec![], 1));
    lab.stack.host_fault(lab.now, far, remote, Some([192, 168, 127, 3].into()), refused, b"x");
    assert!(matches!(&lab.guest_sees()[..], [Seen::Icmp { src, .. }] if src == lab::GATEWAY));
}

#[test]
fn an_echo_the_host_may_not_send_is_prohibited_and_counted() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    let echo = ([128, 0, 0, 7, 0, 1], &b"ping"[..]);
    let Handled::Echo(e) = lab.icmp6(0, lab::GUEST6, "2001:db8::7", 64, echo, &mut frame) else { panic!() };
    lab.stack.echo_refused(lab.now, e.binding, e.remote, e.message);
    let [Seen::Icmp { kind: 1, code: 1, rest, .. }] = &lab.guest_sees()[..] else { panic!() };
    assert_eq!((rest[40], &rest[44..]), (128, &b"\0\x07\0\x01ping"[..]));
    assert_eq!(lab.dropped(DropReason::NoPing), 1);
}

#[test]
fn errors_of_the_host_are_limited_as_answers_are() {
    let mut lab = Lab::new();
    let (binding, remote) = binding(&mut lab, GUEST, FAR);
    for _ in 0..1200 {
        lab.stack.host_fault(lab.now, binding, remote, None, Fault::HopLimit, b"");
    }
    assert_eq!((lab.guest_sees().len(), lab.dropped(DropReason::RateLimited)), (1000, 200));
}

#[test]
fn rfc_791_dont_fragment_is_handed_on() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    // etherparse sets DF; a router would clear it nowhere.
    for (field, expected) in [(0x40, true), (0x00, false)] {
        let b = lab::ip(lab::mac_of(0), addr(GUEST).ip(), addr(FAR).ip(), 64).udp(5000, 9000);
        frame.clear();
        b.write(&mut frame, b"x").unwrap();
        frame[20] = field;
        frame[24..26].fill(0);
        let sum = portway_netstack::wire::checksum(&[&frame[14..34]]).to_be_bytes();
        frame[24..26].copy_from_slice(&sum);
        let Handled::Datagram(d) = lab.frame(0, &frame) else { panic!() };
        assert_eq!(d.dont_fragment, expected);
    }
}

/// What the network sends a guest that agreed to `offloads`, of datagrams of `size` bytes that came together; and the same
/// as a wire would carry it.
fn together(offloads: Offloads, (guest, far): (&str, &str), size: usize) -> (Unfinished, Vec<Seen>) {
    let mut lab = Lab::new();
    lab.stack.set_offloads(lab.now, lab.ports[0], offloads);
    let (binding, remote) = binding(&mut lab, guest, far);
    let bytes: Vec<u8> = (0..3000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut link = Unfinished::default();
    lab.stack.datagrams_from_host(binding, remote, &bytes, size, &mut link);
    for (frame, offload) in &link.0 {
        let offload = segments::checked(frame, *offload).unwrap();
        segments::whole(frame, offload, &mut lab.wires[0]).unwrap();
    }
    (link, lab.guest_sees())
}

fn payloads(seen: &[Seen]) -> Vec<usize> {
    let payload = |s: &Seen| if let Seen::Udp { payload, .. } = s { payload.len() } else { usize::MAX };
    seen.iter().map(payload).collect()
}

#[test]
fn datagrams_that_came_together_are_one_frame_for_a_guest_that_takes_them_so() {
    for ends in [(GUEST, FAR), ("[fd00:77::2]:5000", "[2001:db8::7]:9000")] {
        let (link, seen) = together(Offloads { tcp: true, udp: true }, ends, 1200);
        let [(_, Offload { checksum: Some(_), segments: Some(s) })] = &link.0[..] else {
            panic!("{:?}", link.0);
        };
        assert_eq!((s.kind, s.size), (SegmentKind::Udp, 1200));
        assert_eq!(payloads(&seen), [1200, 1200, 600], "cut, each with its own sum");
    }
}

#[test]
fn a_guest_that_takes_only_checksums_gets_them_one_by_one_and_sums_itself() {
    let (link, seen) = together(Offloads { tcp: true, udp: false }, (GUEST, FAR), 1200);
    assert!(link.0.iter().all(|(_, o)| o.checksum.is_some() && o.segments.is_none()));
    assert_eq!(payloads(&seen), [1200, 1200, 600]);
}

#[test]
fn a_guest_that_takes_nothing_gets_them_whole_and_what_is_larger_than_its_mtu_in_fragments() {
    let (link, seen) = together(Offloads::default(), (GUEST, FAR), 1200);
    assert!(link.0.iter().all(|(_, o)| o.is_whole()));
    assert_eq!(payloads(&seen), [1200, 1200, 600]);
    for offloads in [Offloads::default(), Offloads { tcp: true, udp: true }] {
        let (link, seen) = together(offloads, (GUEST, FAR), 2000);
        assert!(link.0.iter().all(|(_, o)| o.segments.is_none()));
        let fragments = seen.iter().filter(|s| matches!(s, Seen::Fragment { .. })).count();
        assert_eq!((fragments, seen.len()), (2, 3), "{seen:?}");
    }
}

#[test]
fn datagrams_of_one_guest_in_one_frame_reach_a_guest_that_takes_none_such_each_by_itself() {
    let mut lab = Lab::with(Limits::default(), 2, 1500);
    lab.stack.set_offloads(lab.now, lab.ports[1], Offloads { tcp: true, udp: false });
    let mut frame = Vec::new();
    lab.udp(GUEST, "192.168.127.3:9", &[7; 2500], &mut frame);
    let claim = segments::implied(&frame, 1500);
    let cut = portway_netstack::Segments { kind: SegmentKind::Udp, size: 1000, headers: 42 };
    let offload = Offload { segments: Some(cut), ..claim };
    let ports = (lab.ports[0], lab.ports[1]);
    lab.stack.forward(lab.now, ports, &frame, offload, &mut lab.wires[1]);
    assert_eq!(payloads(&lab.guest_n_sees(1)), [1000, 1000, 500]);
    // One that takes them has them as they came.
    lab.stack.set_offloads(lab.now, lab.ports[1], Offloads { tcp: true, udp: true });
    let mut link = Unfinished::default();
    lab.stack.forward(lab.now, ports, &frame, offload, &mut link);
    assert_eq!(link.0[0].1, offload);
}

/// The guest's error about a datagram of `remote`: nobody has the port.
fn refuses(lab: &mut Lab, guest: &str, remote: &str) {
    let (guest, remote) = (addr(guest), addr(remote));
    let (mut datagram, mut frame) = (Vec::new(), Vec::new());
    let about = lab::ip(lab::mac_of(0), remote.ip(), guest.ip(), 64).udp(remote.port(), guest.port());
    about.write(&mut datagram, b"x").unwrap();
    let error = lab::ip(lab::mac_of(0), guest.ip(), remote.ip(), 64);
    match guest.is_ipv4() {
        true => error.icmpv4_raw(3, 3, [0; 4]).write(&mut frame, &datagram[14..]).unwrap(),
        false => error.icmpv6_raw(1, 4, [0; 4]).write(&mut frame, &datagram[14..]).unwrap(),
    }
    assert_eq!(lab.frame(0, &frame), Handled::Done);
}

#[test]
fn rfc_792_and_rfc_4443_3_1_a_port_that_the_guest_says_nobody_has_is_nobodys_at_the_host_either() {
    let mut lab = Lab::new();
    let v6 = ("[fd00:77::2]:5000", "[2001:db8::7]:9000", "[2001:db8::7]:9001");
    for (guest, far, other) in [(GUEST, FAR, "192.0.2.7:9001"), v6, (GUEST, "192.168.127.254:9000", FAR)] {
        let (binding, _) = binding(&mut lab, guest, far);
        // A connected socket of the guest's refuses everybody else and is there all the same.
        refuses(&mut lab, guest, other);
        assert_eq!(lab.host_sees(), []);
        refuses(&mut lab, guest, far);
        assert_eq!(lab.host_sees(), [HostCommand::CloseBinding { binding }]);
    }
}

#[test]
fn an_error_of_the_guest_that_is_none_about_its_port_is_dropped() {
    let mut lab = Lab::new();
    binding(&mut lab, GUEST, FAR);
    let (guest, far) = (addr(GUEST), addr(FAR));
    let mut datagram = Vec::new();
    lab::ip(lab::mac_of(0), far.ip(), guest.ip(), 64)
        .udp(far.port(), guest.port())
        .write(&mut datagram, b"x")
        .unwrap();
    let quoted = datagram[14..].to_vec();
    let with = |at: usize, byte: u8| [&quoted[..at], &[byte], &quoted[at + 1..]].concat();
    // Cut off anywhere before the ports' end; another protocol; a later fragment; somebody else's address; header too short.
    let cut = (0..24).map(|n| quoted[..n].to_vec());
    for about in cut.chain([with(9, 6), with(7, 1), with(19, 99), with(0, 0x44), with(0, 0x65)]) {
        let mut frame = Vec::new();
        lab::ip(lab::mac_of(0), guest.ip(), far.ip(), 64)
            .icmpv4_raw(3, 3, [0; 4])
            .write(&mut frame, &about)
            .unwrap();
        assert_eq!(lab.frame(0, &frame), Handled::Done);
    }
    assert_eq!((lab.host_sees(), lab.dropped(DropReason::UnknownProtocol)), (vec![], 29));
}
