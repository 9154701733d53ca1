//! UDP as guest and host see it: bindings, where they lead, and what does not fit. Their filter and their end are
//! tested beside the code.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use std::net::SocketAddr;

use lab::{Lab, Seen, addr, ms};
use portway_netstack::udp::BindingId;
use portway_netstack::{Datagram, DropReason, Handled, HostCommand, Limits, UdpPath};

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
    lab.stack.datagram_from_host(binding, addr(remote), payload, &mut lab.wires[0]);
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
fn a_datagram_beyond_the_mtu_or_a_full_link_is_dropped_and_counted() {
    let mut lab = Lab::new();
    let (binding, _) = binding(&mut lab, GUEST, FAR);
    assert_eq!(answered(&mut lab, binding, FAR, &[0; 1472]).len(), 1);
    assert_eq!(answered(&mut lab, binding, FAR, &[0; 1473]), []);
    lab.wires[0].room = 0;
    assert_eq!(answered(&mut lab, binding, FAR, b"x"), []);
    assert_eq!((lab.dropped(DropReason::TooBig), lab.dropped(DropReason::LinkFull)), (1, 1));
}
