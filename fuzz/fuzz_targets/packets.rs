//! What IPv6 and fragments carry, made of an input's bytes behind headers that pass: extension headers, neighbour discovery,
//! DHCPv6, pieces of packets in any order, and what hosts say of echo requests. Nothing panics.
#![no_main]

mod arena;
#[path = "../../netstack/tests/lab/mod.rs"]
mod lab;

use std::net::Ipv6Addr;

use arbitrary::Arbitrary;
use lab::{GATEWAY_MAC, Lab, mac_of};
use libfuzzer_sys::fuzz_target;
use portway_netstack::icmp::{Fault, Unreachable};
use portway_netstack::wire::{checksum, ipv6};
use portway_netstack::{Handled, Limits};

#[derive(Debug, Arbitrary)]
enum Step<'a> {
    /// A packet of the protocol, to one of a few destinations.
    V6 { next: u8, hop_limit: u8, to: u8, local: bool, body: &'a [u8] },
    /// ICMPv6 with a checksum that is right.
    Icmp6 { kind: u8, to: u8, local: bool, body: &'a [u8] },
    /// To the DHCPv6 server.
    Dhcp6 { body: &'a [u8] },
    /// A piece of an IPv4 packet.
    Piece { id: u8, offset: u16, more: bool, len: u8 },
    /// An echo request, and what the host says of it.
    Echo { id: u16, reply: &'a [u8], fault: u8 },
    Wait(u16),
    Uplink(bool),
}

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 2);

fn destination(n: u8) -> Ipv6Addr {
    let all = ["fd00:77::1", "fe80::5894:efff:fee4:cdd", "ff02::1", "ff02::1:2", "ff02::1:ff00:1", "2001:db8::7"];
    all[usize::from(n) % all.len()].parse().expect("an address")
}

fn frame(src: Ipv6Addr, dst: Ipv6Addr, next: u8, hop_limit: u8, body: &[u8]) -> Vec<u8> {
    let mac = if dst.is_multicast() { ipv6::group_mac(dst) } else { GATEWAY_MAC };
    let mut out = [&mac.0[..], &mac_of(0).0, &[0x86, 0xdd]].concat();
    out.extend(ipv6::header(src, dst, next, hop_limit, u16::try_from(body.len()).unwrap_or(u16::MAX)));
    out.extend(body);
    out
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let limits = Limits { pings: 4, udp_bindings: 4, ..Limits::default() };
    let mut lab = Lab::with_memory(limits, 1, 1500, arena::Arena::for_this_run());
    for step in steps.into_iter().take(100) {
        let from = |local: bool| if local { lab::GUEST6_LOCAL.parse().expect("an address") } else { GUEST };
        let bytes = match step {
            Step::V6 { next, hop_limit, to, local, body } => {
                frame(from(local), destination(to), next, hop_limit, &body[..body.len().min(3000)])
            }
            Step::Icmp6 { kind, to, local, body } => {
                let (src, dst) = (from(local), destination(to));
                let mut message = [&[kind, 0, 0, 0], &body[..body.len().min(3000)]].concat();
                let sum = ipv6::icmp_checksum(src, dst, &[&message]).to_be_bytes();
                message[2..4].copy_from_slice(&sum);
                frame(src, dst, ipv6::ICMP, 255, &message)
            }
            Step::Dhcp6 { body } => {
                let body = &body[..body.len().min(1000)];
                let length = u16::try_from(8 + body.len()).unwrap_or(8).to_be_bytes();
                let udp = [&[2, 0x22, 2, 0x23, length[0], length[1], 0, 0], body].concat();
                frame(from(true), destination(3), 17, 1, &udp)
            }
            Step::Piece { id, offset, more, len } => {
                let len = usize::from(len) * 8 + usize::from(!more);
                let mut packet = vec![0x45, 0, 0, 0, 0, id % 4, 0, 0, 64, 17, 0, 0, 192, 168, 127, 2, 192, 0, 2, 7];
                packet[2..4].copy_from_slice(&u16::try_from(20 + len).unwrap_or(20).to_be_bytes());
                packet[6..8].copy_from_slice(&((offset & 0x1fff) | (u16::from(more) << 13)).to_be_bytes());
                let sum = checksum(&[&packet]).to_be_bytes();
                packet[10..12].copy_from_slice(&sum);
                packet.extend(vec![id; len]);
                [&GATEWAY_MAC.0[..], &mac_of(0).0, &[8, 0], &packet].concat()
            }
            Step::Echo { id, reply, fault } => {
                let [a, b] = id.to_be_bytes();
                let mut request = Vec::new();
                let handled = lab.icmp6(0, lab::GUEST6, "2001:db8::7", 64, ([128, 0, a, b, 0, 1], b"x"), &mut request);
                if let Handled::Echo(echo) = handled {
                    lab.stack.echo_from_host(echo.binding, echo.remote, reply, &mut lab.wires[0]);
                    let all = [Fault::HopLimit, Fault::TooBig(id.into()), Fault::Unreachable(Unreachable::Port)];
                    let fault = all[usize::from(fault) % all.len()];
                    lab.stack.host_fault(lab.now, echo.binding, echo.remote, None, fault, reply);
                }
                continue;
            }
            Step::Wait(ms) => {
                lab.after(lab::ms(ms.into()));
                continue;
            }
            Step::Uplink(up) => {
                lab.stack.set_ipv6_uplink(up);
                continue;
            }
        };
        if let Handled::Whole(whole) = lab.frame(0, &bytes) {
            lab.frame(0, &whole);
        }
        lab.host_sees();
        lab.wires[0].frames.clear();
    }
});
