//! Bytes no honest guest would send: counted, never fatal.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use lab::real::Dice;
use lab::{Lab, Seen, mac_of, secs, segment, syn};
use portway_netstack::{DropReason, FlowId, FrameSink, HostCommand, HostEvent, Limits, Offload};

/// The stack still does its work.
fn still_serves(lab: &mut Lab) {
    lab.stack.abort_all();
    lab.transmit();
    lab.host_sees();
    lab.wires[0].frames.clear();
    let (flow, seq, ack) = lab.open("192.168.127.2:65000", "192.0.2.99:1");
    lab.guest_sends(&segment("PA", "192.168.127.2:65000", "192.0.2.99:1", seq, ack).with(b"ok"));
    assert_eq!(lab.host_reads(flow), b"ok");
}

#[test]
fn frames_shorter_than_a_header_are_runts() {
    let mut lab = Lab::new();
    for n in 0..14 {
        lab.frame(0, &vec![0x55; n]);
    }
    assert_eq!(lab.dropped(DropReason::Runt), 14);
    still_serves(&mut lab);
}

#[test]
fn every_truncation_and_every_flipped_byte_of_a_good_frame_is_harmless() {
    let mut lab = Lab::new();
    let mut udp = Vec::new();
    lab.udp("192.168.127.2:5", "192.168.127.1:53", &[0; 40], &mut udp);
    for good in [syn("192.168.127.2:1", "192.0.2.7:80").frame(mac_of(0)), udp] {
        for n in 0..good.len() {
            lab.frame(0, &good[..n]);
            for value in [0, 0xff, good[n] ^ 1] {
                let mut bad = good.clone();
                bad[n] = value;
                lab.frame(0, &bad);
            }
        }
    }
    still_serves(&mut lab);
}

#[test]
fn garbage_behind_every_ethertype_and_protocol_is_harmless() {
    let mut lab = Lab::new();
    let mut dice = Dice(42);
    for round in 0..20_000 {
        let len = usize::try_from(dice.roll(120)).unwrap();
        let mut frame = [&lab::GATEWAY_MAC.0[..], &mac_of(0).0].concat();
        frame.extend([[8, 0], [8, 6], [0x86, 0xdd], [1, 2]][round % 4]);
        frame.extend((0..len).map(|_| u8::try_from(dice.roll(256)).unwrap()));
        if round % 8 == 0 && len > 20 {
            // A header that passes, so that the layer above is reached.
            let protocol = [1, 6, 17, 47][round / 8 % 4];
            let total = u16::try_from(len).unwrap().to_be_bytes();
            let head =
                [0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0, 192, 168, 127, 2, 192, 0, 2, 1];
            frame[14..34].copy_from_slice(&head);
            let sum = portway_netstack::wire::checksum(&[&head]).to_be_bytes();
            frame[24..26].copy_from_slice(&sum);
        }
        lab.frame(0, &frame);
    }
    still_serves(&mut lab);
}

/// A frame of IPv6 from the guest to `to`, with `payload` behind the header.
fn v6(next: u8, hop_limit: u8, to: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let mut frame = [&lab::GATEWAY_MAC.0[..], &mac_of(0).0, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend([next, hop_limit]);
    frame.extend([0xfd, 0, 0, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    frame.extend(to);
    frame.extend(payload);
    frame
}

#[test]
fn garbage_in_ipv6_behind_every_extension_header_and_message_is_harmless() {
    let mut lab = Lab::new();
    let mut dice = Dice(43);
    let gateway = [0xfd, 0, 0, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let servers = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2];
    for _ in 0..30_000 {
        let len = usize::try_from(dice.roll(100)).unwrap();
        let mut payload: Vec<u8> = (0..len).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
        let next = any(&mut dice, [0, 6, 17, 43, 44, 58, 59, 60, 135, 255]);
        let to = any(&mut dice, [gateway, servers, [0x20; 16]]);
        if next == 58 && len >= 4 {
            // A message that passes, so that its parser is reached.
            payload[0] = any(&mut dice, [1, 128, 129, 133, 134, 135, 136, 137]);
            payload[1] = 0;
            payload[2..4].fill(0);
            let from = std::net::Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 2);
            let sum = portway_netstack::wire::ipv6::icmp_checksum(from, to.into(), &[&payload]).to_be_bytes();
            payload[2..4].copy_from_slice(&sum);
        }
        if next == 17 && len >= 8 {
            // To the DHCPv6 server.
            payload[..6].copy_from_slice(&[2, 0x22, 2, 0x23, 0, u8::try_from(len).unwrap()]);
        }
        let frame = v6(next, 255, to, &payload);
        if let portway_netstack::Handled::Whole(whole) = lab.frame(0, &frame) {
            lab.frame(0, &whole);
        }
        lab.host_sees();
    }
    lab.after(lab::secs(100));
    still_serves(&mut lab);
}

#[test]
fn a_flood_of_fragments_reaches_every_limit_and_no_more_memory_than_that() {
    use portway_netstack::fragments::{PATIENCE, PORT_PACKETS};
    let mut lab = Lab::new();
    let mut dice = Dice(44);
    for n in 0..40_000u32 {
        // Never a whole packet: the last piece is missing, and most lie far behind.
        let offset = u16::try_from(dice.roll(8000)).unwrap() * 8;
        let id = if dice.roll(2) == 0 { n } else { n % 64 };
        let mut payload = vec![17, 0];
        payload.extend((offset | 1).to_be_bytes());
        payload.extend(id.to_be_bytes());
        payload.extend(vec![u8::try_from(n % 256).unwrap(); 8 * usize::try_from(1 + dice.roll(20)).unwrap()]);
        lab.frame(0, &v6(44, 64, [0x20; 16], &payload));
    }
    assert!(lab.dropped(DropReason::FragmentOverlap) > 0);
    lab.after(PATIENCE);
    let late = lab.dropped(DropReason::FragmentTimeout);
    assert!(late > 0 && late <= u64::try_from(PORT_PACKETS).unwrap(), "{late}");
    still_serves(&mut lab);
}

#[test]
fn pings_under_many_identifiers_and_solicitations_are_bounded() {
    let mut lab = Lab::with(Limits { pings: 8, ..Limits::default() }, 1, 1500);
    let mut frame = Vec::new();
    for n in 0..2000u16 {
        let [a, b] = n.to_be_bytes();
        lab.icmp6(0, lab::GUEST6, "2001:db8::7", 64, ([128, 0, a, b, 0, 1], b""), &mut frame);
        lab.icmp6(0, lab::GUEST6_LOCAL, "ff02::2", 255, ([133, 0, 0, 0, 0, 0], b""), &mut frame);
    }
    // Three in four found the bucket of answers empty; the identifiers before the last ones were closed.
    assert_eq!(lab.dropped(DropReason::RateLimited), 3000);
    let closed = lab.host_sees().len();
    assert_eq!(closed, 500 - 8);
    lab.after(lab::secs(70));
    assert_eq!(lab.host_sees().len(), 8);
    lab.guest_sees();
    still_serves(&mut lab);
}

#[test]
fn a_syn_that_meets_ours_before_it_has_left_is_harmless() {
    // smoltcp 0.14 panics on it: "attempt to subtract sequence numbers with underflow".
    let (guest, client) = ("192.168.127.2:22", "192.168.127.254:51000");
    let mut lab = Lab::new();
    lab.guest_announces();
    let port = lab.ports[0];
    lab.stack.open_to_guest(lab.now, lab::addr(guest), lab::addr("127.0.0.1:51000")).unwrap();
    lab.stack.handle_frame(lab.now, port, &syn(guest, client).frame(mac_of(0)));
    lab.after(lab::ms(1));
    // The same when the guest has challenged our SYN, which begins anew, in one batch with a SYN.
    lab.stack.handle_frame(lab.now, port, &segment("A", guest, client, 9, 9).frame(mac_of(0)));
    lab.stack.handle_frame(lab.now, port, &syn(guest, client).frame(mac_of(0)));
    lab.after(lab::ms(1));
    assert_eq!(lab.dropped(DropReason::NoFlow), 3);
    still_serves(&mut lab);
}

#[test]
fn random_segments_in_batches_on_open_flows_never_panic() {
    for seed in 1..=60 {
        let mut lab = Lab::with(Limits { flows: 64, ..Limits::default() }, 1, 65_520);
        let mut dice = Dice(seed);
        let (flow, seq, ack) = lab.open("192.168.127.2:1", "192.0.2.7:80");
        lab.host_writes(flow, &[1; 5000]);
        // The second pair of ports is a published connection: the guest answers our SYN with anything.
        let (guest, client) = (lab::addr("192.168.127.2:2"), lab::addr("192.0.2.7:80"));
        let published = lab.stack.open_to_guest(lab.now, guest, client).unwrap();
        let port = lab.ports[0];
        for _ in 0..1500 {
            let flags = ["A", "PA", "FA", "S", "R", "SA", "RA"][usize::try_from(dice.roll(7)).unwrap()];
            let near = |base: u32, dice: &mut Dice| match dice.roll(4) {
                0 => u32::try_from(dice.roll(1 << 32)).unwrap(),
                1 => base,
                _ => base.wrapping_add(u32::try_from(dice.roll(2_000_000)).unwrap()).wrapping_sub(500_000),
            };
            let from = format!("192.168.127.2:{}", 1 + dice.roll(2));
            let len = [0, 1, 1448, 60_000][usize::try_from(dice.roll(4)).unwrap()];
            let (seq, ack) = (near(seq, &mut dice), near(ack, &mut dice));
            let mut s = segment(flags, &from, "192.0.2.7:80", seq, ack).with(&vec![3; len]);
            s.window = [0, 1, 500, 65_535][usize::try_from(dice.roll(4)).unwrap()];
            lab.stack.handle_frame(lab.now, port, &s.frame(mac_of(0)));
            if dice.roll(5) == 0 {
                lab.after(lab::ms(dice.roll(3000)));
                for command in lab.host_sees() {
                    if let HostCommand::Connect { flow, .. } = command {
                        lab.host_says(HostEvent::Connected { flow });
                    }
                }
                if dice.roll(40) == 0 {
                    lab.host_says(HostEvent::Eof { flow: if dice.roll(2) == 0 { flow } else { published } });
                }
                if dice.roll(2) == 0 {
                    lab.host_reads(flow);
                    lab.host_writes(flow, &[2; 3000]);
                    lab.host_reads(published);
                    lab.host_writes(published, &[4; 3000]);
                }
            }
        }
        still_serves(&mut lab);
    }
}

/// One of `choices`.
fn any<T: Copy, const N: usize>(dice: &mut Dice, choices: [T; N]) -> T {
    choices[usize::try_from(dice.roll(u64::try_from(N).unwrap())).unwrap()]
}

/// A guest that knows the sequence numbers of its connections, keeps to them most of the time, and sends anything.
struct Rogue {
    lab: Lab,
    dice: Dice,
    /// For each guest port from 1 on: what it sends next, and what it expects next.
    next: [(u32, u32); 4],
    flows: Vec<FlowId>,
}

impl Rogue {
    const FAR: &'static str = "192.0.2.7:80";

    /// Takes what is on the link, and tells the host what it asks for.
    fn listens(&mut self) {
        for seen in self.lab.guest_sees() {
            let Seen::Tcp { dst, flags, seq, ack, payload, .. } = seen else { continue };
            let port: usize = dst.rsplit(':').next().unwrap().parse().unwrap();
            let Some((mine, theirs)) = self.next.get_mut(port - 1) else { continue };
            let counted = u32::from(flags.contains('S')) + u32::from(flags.contains('F'));
            *theirs = seq.wrapping_add(u32::try_from(payload.len()).unwrap()).wrapping_add(counted);
            if ack != 0 {
                *mine = ack;
            }
        }
        for command in self.lab.host_sees() {
            if let HostCommand::Connect { flow, .. } = command {
                self.flows.push(flow);
                if self.dice.roll(8) > 0 {
                    self.lab.host_says(HostEvent::Connected { flow });
                }
            }
        }
    }

    fn speaks(&mut self) {
        let honest = self.dice.roll(8) > 0;
        let dice = &mut self.dice;
        let n = dice.roll(4);
        let (mine, theirs) = self.next[usize::try_from(n).unwrap()];
        let stray = if honest {
            0
        } else {
            any(dice, [0, 1, u32::MAX, 1448, 1449, u32::MAX - 1447, 70_000, 1 << 20])
        };
        let stray_ack = if honest { 0 } else { any(dice, [0, 1, 2, u32::MAX, u32::MAX - 1447, 1 << 30]) };
        let (seq, ack) = (mine.wrapping_add(stray), theirs.wrapping_add(stray_ack));
        let flags = if honest {
            any(dice, ["A", "A", "A", "A", "PA", "PA", "SA", "S", "FA"])
        } else {
            any(dice, ["A", "FA", "S", "SA", "R", "RA"])
        };
        let len = any(dice, [0, 0, 0, 1, 1448, 60_000]);
        let mut s = segment(flags, &format!("192.168.127.2:{}", n + 1), Self::FAR, seq, ack);
        if !flags.contains('S') || dice.roll(20) == 0 {
            s.payload = vec![3; len];
        }
        if flags.contains('S') && dice.roll(2) == 0 {
            s.scale = Some(any(dice, [0, 1, 7, 14, 255]));
        }
        s.window = any(dice, [0, 0, 1, 500, 65_535, 65_535]);
        let port = self.lab.ports[0];
        self.lab.stack.handle_frame(self.lab.now, port, &s.frame(mac_of(0)));
        // Honest about what it has sent, most of the time.
        if self.dice.roll(4) > 0 && stray == 0 {
            let counted = u32::from(flags.contains('F')) + u32::from(flags.contains('S'));
            let sent = u32::try_from(s.payload.len()).unwrap().wrapping_add(counted);
            self.next[usize::try_from(n).unwrap()].0 = mine.wrapping_add(sent);
        }
    }

    /// The host does something, too.
    fn host(&mut self) {
        if self.dice.roll(6) == 0 {
            let guest = lab::addr(&format!("192.168.127.2:{}", 1 + self.dice.roll(4)));
            self.flows.extend(self.lab.stack.open_to_guest(self.lab.now, guest, lab::addr(Self::FAR)));
        }
        let Some(last) = u64::try_from(self.flows.len()).unwrap().checked_sub(1) else { return };
        let flow = self.flows[usize::try_from(last - self.dice.roll(6).min(last)).unwrap()];
        match self.dice.roll(20) {
            0 => self.lab.host_says(HostEvent::Eof { flow }),
            1 if self.dice.roll(3) == 0 => self.lab.host_says(HostEvent::Reset { flow }),
            2..8 => drop(self.lab.host_reads(flow)),
            _ => drop(self.lab.host_writes(flow, &[4; 3000])),
        }
    }
}

#[test]
fn a_guest_that_knows_the_protocol_and_breaks_it_never_panics() {
    for seed in 1..=150 {
        let mtu = if seed % 2 == 0 { 65_520 } else { 1500 };
        let mut lab = Lab::with(Limits { flows: 64, ..Limits::default() }, 1, mtu);
        lab.guest_announces();
        let mut rogue = Rogue { lab, dice: Dice(seed << 1 | 1), next: [(1000, 0); 4], flows: vec![] };
        for _ in 0..400 {
            // In batches: the stack sends nothing between the frames of one.
            for _ in 0..=rogue.dice.roll(6) {
                rogue.speaks();
                if rogue.dice.roll(4) == 0 {
                    rogue.host();
                }
            }
            if rogue.dice.roll(6) == 0 {
                rogue.lab.wires[0].room = any(&mut rogue.dice, [0, 1, 3]);
            }
            rogue.lab.after(lab::ms(any(&mut rogue.dice, [0, 0, 0, 1, 1, 40, 40, 400, 3000])));
            rogue.listens();
            rogue.lab.wires[0].room = usize::MAX;
        }
        still_serves(&mut rogue.lab);
    }
}

/// A link that panics as none may, on a frame to one port of the guest.
struct Bomb(u16);

impl FrameSink for Bomb {
    fn has_room(&self) -> bool {
        true
    }
    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        // Behind 14 bytes of Ethernet and 20 of IPv4: the ports.
        assert_ne!(u16::from_be_bytes([frame[36], frame[37]]), self.0, "on purpose");
        Some(result)
    }
}

#[test]
fn a_panic_in_the_engine_ends_the_flow_it_was_about_and_no_other() {
    let mut lab = Lab::new();
    let (from, to) = ("192.168.127.2:40001", "192.0.2.7:443");
    let (first, seq, ack) = lab.open(from, to);
    let (second, ..) = lab.open("192.168.127.2:40002", to);
    for flow in [first, second] {
        let put = lab.stack.from_host(lab.now, flow, |space| {
            space[..3].copy_from_slice(b"abc");
            3
        });
        assert_eq!(put, Some(3));
    }
    lab.stack.poll_transmit(lab.now, lab.ports[0], &mut Bomb(40_001));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow: first }]);
    assert_eq!(lab.dropped(DropReason::EngineFault), 1);
    // The guest hears of it as soon as it speaks; the other flow carries bytes, and new ones open.
    lab.guest_sends(&segment("A", from, to, seq, ack));
    assert!(lab.guest_sees_flags().iter().all(|f| f.contains('R')));
    assert_eq!(lab.host_writes(second, b"def"), 3);
    assert!(!lab.guest_sees().is_empty());
    lab.open("192.168.127.2:40003", to);
    assert_eq!(lab.stack.counters().flows, 2);
}

#[test]
fn flows_that_cool_and_close_leave_no_crowd_of_timers() {
    let mut lab = Lab::new();
    let to = "192.0.2.7:443";
    for round in 0..80_u16 {
        let mut open = Vec::new();
        for n in 0..50 {
            let from = format!("192.168.127.2:{}", 1024 + round * 50 + n);
            let (_, seq, _) = lab.open(&from, to);
            open.push((from, seq));
        }
        // Long enough for their rings to be given back: what is left is the timer of hours.
        lab.after(secs(5));
        for (from, seq) in open {
            lab.guest_sends(&segment("R", &from, to, seq, 0));
        }
        lab.host_sees();
        lab.guest_sees();
        assert_eq!(lab.stack.counters().flows, 0);
    }
    assert!(lab.stack.counters().timers < 1200, "{}", lab.stack.counters().timers);
}
