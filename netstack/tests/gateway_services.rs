//! What the gateway does for guests where that is not the usual: a resolver and a pool of its own, forwarded ports.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use etherparse::PacketBuilder;
use lab::{GATEWAY_MAC, Lab, Seen, addr, mac_of, syn};
use portway_netstack::{
    Datagram, DnsAt, GatewayForward, Handled, HostCommand, HostTarget, Services, Transport, UdpPath,
};

fn discover() -> Vec<u8> {
    let mac = mac_of(0);
    let mut bootp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    bootp.resize(28, 0);
    bootp.extend(mac.0);
    bootp.resize(236, 0);
    bootp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    let mut frame = Vec::new();
    let b = PacketBuilder::ethernet2(mac.0, GATEWAY_MAC.0).ipv4([0; 4], [255; 4], 64).udp(68, 67);
    b.write(&mut frame, &bootp).unwrap();
    frame
}

/// The option `code` of the offer a DISCOVER is answered with, and the address.
fn offered(lab: &mut Lab, code: u8) -> (String, Option<Vec<u8>>) {
    lab.frame(0, &discover());
    let seen = lab.guest_sees();
    let [Seen::Udp { dst, payload, .. }] = &seen[..] else { panic!("{seen:?}") };
    let mut options = &payload[240..];
    while let [kind, len, rest @ ..] = options {
        let (data, after) = rest.split_at(usize::from(*len));
        if *kind == code {
            return (dst.clone(), Some(data.to_vec()));
        }
        options = after;
    }
    (dst.clone(), None)
}

#[test]
fn a_resolver_of_its_own_address_is_told_of_asked_and_nothing_else() {
    let at = "192.168.127.3".parse().unwrap();
    let mut lab = Lab::configured(|c| c.services.dns = DnsAt::Address(at));
    assert_eq!(offered(&mut lab, 6), ("192.168.127.2:68".into(), Some(vec![192, 168, 127, 3])));
    let mut frame = Vec::new();
    let handled = lab.udp("192.168.127.2:5353", "192.168.127.3:53", b"query", &mut frame);
    assert!(matches!(handled, Handled::Dns { .. }), "{handled:?}");
    assert_eq!(lab.udp("192.168.127.2:5353", "192.168.127.1:53", b"query", &mut frame), Handled::Done);
    assert_eq!(lab.udp("192.168.127.2:5353", "192.168.127.3:54", b"x", &mut frame), Handled::Done);
    lab.guest_sees();
    lab.guest_sends(&syn("192.168.127.2:40000", "192.168.127.3:53"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target: HostTarget::Service(_), .. }]));
    lab.guest_sends(&syn("192.168.127.2:40001", "192.168.127.3:80"));
    assert!(lab.host_sees().is_empty());
}

#[test]
fn without_a_resolver_guests_are_told_of_none() {
    let mut lab = Lab::configured(|c| c.services.dns = DnsAt::Nowhere);
    assert_eq!(offered(&mut lab, 6).1, None);
    let mut frame = Vec::new();
    assert_eq!(lab.udp("192.168.127.2:5353", "192.168.127.1:53", b"query", &mut frame), Handled::Done);
}

#[test]
fn leases_come_from_the_pool() {
    let pool = ("192.168.127.15".parse().unwrap(), "192.168.127.30".parse().unwrap());
    let mut lab = Lab::configured(|c| c.services.pool = Some(pool));
    assert_eq!(offered(&mut lab, 1), ("192.168.127.15:68".into(), Some(vec![255, 255, 255, 0])));
}

#[test]
fn a_gateway_that_is_the_host_alias_too_leads_to_the_hosts_loopback() {
    let mut lab = Lab::configured(|c| c.host_alias = c.gateway);
    lab.guest_sends(&syn("192.168.127.2:40000", "192.168.127.1:80"));
    let target = HostTarget::Address(addr("127.0.0.1:80"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target: t, .. }] if t == target));
    let mut frame = Vec::new();
    let handled = lab.udp("192.168.127.2:5000", "192.168.127.1:7", b"x", &mut frame);
    assert!(matches!(handled, Handled::Datagram(d) if d.remote == addr("127.0.0.1:7")), "{handled:?}");
}

#[test]
fn forwarded_ports_of_the_gateway_lead_on_and_answers_come_from_the_port_that_was_asked() {
    let forward = |transport, port, to| GatewayForward { transport, port, to: addr(to) };
    let first =
        vec![forward(Transport::Tcp, 80, "127.0.0.1:8080"), forward(Transport::Udp, 123, "192.0.2.9:1123")];
    let mut lab = Lab::configured(|c| c.services = Services { forwards: first, ..Services::default() });
    lab.guest_sends(&syn("192.168.127.2:40000", "192.168.127.1:80"));
    let target = HostTarget::Address(addr("127.0.0.1:8080"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { target: t, .. }] if t == target));
    // Of the other protocol it is closed.
    lab.guest_sends(&syn("192.168.127.2:40001", "192.168.127.1:123"));
    assert!(lab.host_sees().is_empty());

    let mut frame = Vec::new();
    let handled = lab.udp("192.168.127.2:5000", "192.168.127.1:123", b"time", &mut frame);
    let Handled::Datagram(Datagram { path: UdpPath::Binding { binding, .. }, remote, .. }) = handled else {
        panic!("{handled:?}");
    };
    assert_eq!(remote, addr("192.0.2.9:1123"));
    lab.guest_sees();
    lab.stack.datagrams_from_host(binding, remote, b"late", b"late".len(), &mut lab.wires[0]);
    assert!(matches!(&lab.guest_sees()[..], [Seen::Udp { src, .. }] if src == "192.168.127.1:123"));

    lab.stack.set_gateway_forwards(vec![forward(Transport::Tcp, 81, "127.0.0.1:8081")]);
    lab.guest_sends(&syn("192.168.127.2:40002", "192.168.127.1:82"));
    assert!(lab.host_sees().is_empty());
    lab.guest_sends(&syn("192.168.127.2:40003", "192.168.127.1:81"));
    assert!(matches!(lab.host_sees()[..], [HostCommand::Connect { .. }]));
}
