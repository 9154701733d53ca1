//! TCP toward the guest, rule by rule (RFC 9293 and what it builds on); each test is named after its rule. Handshakes are in
//! `tcp_connect.rs`, transfers in `tcp_flow.rs`, faulty links in `tcp_loss.rs`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use std::net::SocketAddrV4;

use lab::{GATEWAY_MAC, Lab, Seen, mac_of, ms, secs, segment, syn};
use portway_netstack::{DropReason, HostCommand, HostEvent, Limits};

const GUEST: &str = "192.168.127.2:40000";
const FAR: &str = "192.0.2.7:443";

fn v4(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

/// The one segment the guest was sent: flags, seq, ack, payload.
fn one(lab: &mut Lab) -> (&'static str, u32, u32, Vec<u8>) {
    match &lab.guest_sees()[..] {
        [Seen::Tcp { flags, seq, ack, payload, .. }] => (flags, *seq, *ack, payload.clone()),
        other => panic!("not one segment: {other:?}"),
    }
}

fn idle_lab(keep_alive: Option<u64>) -> Lab {
    Lab::with(Limits { tcp_keepalive: keep_alive.map(secs), ..Limits::default() }, 1, 1500)
}

// ---- §3.4, sequence numbers ----

#[test]
fn section_3_4_sequence_numbers_wrap_around() {
    let mut lab = Lab::new();
    let isn = u32::MAX - 2;
    lab.guest_sends(&segment("S", GUEST, FAR, isn, 0));
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    let (_, ours, ack, _) = one(&mut lab);
    assert_eq!(ack, isn.wrapping_add(1));
    lab.guest_sends(&segment("PA", GUEST, FAR, ack, ours + 1).with(b"across"));
    assert_eq!(lab.host_reads(flow), b"across");
    lab.after(ms(10));
    assert_eq!(one(&mut lab).2, ack.wrapping_add(6));
}

// ---- §3.5, opening and closing ----

#[test]
fn section_3_5_2_a_reset_for_an_acknowledgment_of_no_connection_has_its_number() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("A", GUEST, FAR, 5000, 7777));
    let (flags, seq, ..) = one(&mut lab);
    assert_eq!((flags, seq), ("R", 7777));
}

#[test]
fn section_3_5_2_a_reset_is_never_answered() {
    let mut lab = Lab::new();
    lab.guest_sends(&segment("R", GUEST, FAR, 5000, 0));
    assert_eq!(lab.guest_sees(), []);
}

/// RFC 9293 §3.10.7.4 has a reset inside the window challenged unless it is at the very next number, against attackers who
/// cannot see the connection (RFC 5961). On this link nobody but the guest can speak in its name, so smoltcp's rule, that
/// of RFC 793, is kept: a guest that lost segments of its own ends at once.
#[test]
fn section_3_5_3_a_reset_counts_inside_the_window_alone() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.guest_sends(&segment("R", GUEST, FAR, seq.wrapping_sub(10), 0));
    lab.guest_sends(&segment("R", GUEST, FAR, seq + 5_000_000, 0));
    assert_eq!(lab.host_sees(), [], "outside");
    lab.guest_sees();
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack).with(b"alive"));
    assert_eq!(lab.host_reads(flow), b"alive");
    lab.guest_sends(&segment("RA", GUEST, FAR, seq + 105, ack));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
}

#[test]
fn section_3_5_a_simultaneous_close_ends_in_order() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.host_says(HostEvent::Eof { flow });
    let (flags, fin, ..) = one(&mut lab);
    assert_eq!((flags, fin), ("FA", ack));
    // The guest's FIN left before ours came: it does not acknowledge it.
    lab.guest_sends(&segment("FA", GUEST, FAR, seq, ack));
    let answers = lab.guest_sees();
    assert!(answers.iter().any(|s| matches!(s, Seen::Tcp { ack, .. } if *ack == seq + 1)), "{answers:?}");
    assert_eq!(lab.host_sees(), [HostCommand::ShutdownWrite { flow }]);
    lab.guest_sends(&segment("A", GUEST, FAR, seq + 1, ack + 1));
    assert_eq!(lab.host_sees(), [HostCommand::Close { flow }]);
    assert_eq!(lab.stack.counters().flows, 0);
}

#[test]
fn section_3_6_1_a_repeated_fin_is_acknowledged_again() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    for _ in 0..2 {
        lab.guest_sends(&segment("FA", GUEST, FAR, seq, ack));
        let (flags, _, acked, _) = one(&mut lab);
        assert_eq!((flags, acked), ("A", seq + 1));
    }
    assert_eq!(lab.host_sees(), [HostCommand::ShutdownWrite { flow }], "and told once");
    // The other half is open still.
    lab.host_writes(flow, b"late");
    assert_eq!(lab.guest_reads(), b"late");
}

#[test]
fn section_3_6_1_a_new_syn_takes_the_place_of_time_wait() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.host_says(HostEvent::Eof { flow });
    lab.guest_sees();
    lab.guest_sends(&segment("FA", GUEST, FAR, seq, ack + 1));
    lab.guest_sees();
    lab.host_sees();
    let mut again = syn(GUEST, FAR);
    again.seq = seq + 100_000;
    lab.guest_sends(&again);
    let next = lab.connect();
    lab.host_says(HostEvent::Connected { flow: next });
    assert_eq!(one(&mut lab).0, "SA");
}

// ---- §3.7, segments ----

/// A SYN with these bytes of options, and what follows until a connection stands; returns the flow, and the option bytes of
/// the SYN|ACK.
fn open_with(lab: &mut Lab, options: &[u8]) -> (portway_netstack::FlowId, Vec<u8>) {
    assert_eq!(options.len() % 4, 0);
    let b = etherparse::PacketBuilder::ethernet2(mac_of(0).0, GATEWAY_MAC.0)
        .ipv4(v4(GUEST).ip().octets(), v4(FAR).ip().octets(), 64)
        .tcp(v4(GUEST).port(), v4(FAR).port(), 1000, 65_535)
        .syn()
        .options_raw(options)
        .unwrap();
    let mut frame = Vec::new();
    b.write(&mut frame, &[]).unwrap();
    lab.frame(0, &frame);
    let flow = lab.connect();
    lab.host_says(HostEvent::Connected { flow });
    lab.transmit();
    let answer = lab.wires[0].frames.pop().unwrap();
    let tcp = &answer[34..];
    let ours = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
    let options = tcp[20..usize::from(tcp[12] >> 4) * 4].to_vec();
    lab.guest_sends(&segment("A", GUEST, FAR, 1001, ours + 1));
    lab.guest_sees();
    (flow, options)
}

#[test]
fn section_3_7_1_our_mss_is_that_of_the_link_and_the_guests_is_kept() {
    let mut lab = Lab::new();
    let (flow, options) = open_with(&mut lab, &[2, 4, 0x02, 0xbc]);
    assert_eq!(options[..4], [2, 4, 0x05, 0xb4], "1460 of 1500");
    lab.host_writes(flow, &[7; 3000]);
    let sizes: Vec<usize> = lab
        .guest_sees()
        .iter()
        .map(|s| if let Seen::Tcp { payload, .. } = s { payload.len() } else { 0 })
        .collect();
    assert!(sizes.iter().all(|n| *n <= 700) && sizes.iter().sum::<usize>() == 3000, "{sizes:?}");
}

#[test]
fn section_3_7_1_without_an_mss_segments_have_536_bytes() {
    let mut lab = Lab::new();
    let (flow, _) = open_with(&mut lab, &[]);
    lab.host_writes(flow, &[7; 1500]);
    let seen = lab.guest_sees();
    assert!(seen.iter().all(|s| matches!(s, Seen::Tcp { payload, .. } if payload.len() <= 536)), "{seen:?}");
}

#[test]
fn section_3_1_options_nobody_knows_are_passed_over() {
    let mut lab = Lab::new();
    // An experimental option (RFC 6994), padding, MSS.
    let (flow, _) = open_with(&mut lab, &[253, 6, 1, 2, 3, 4, 1, 1, 2, 4, 0x05, 0xb4]);
    lab.host_writes(flow, b"ok");
    assert_eq!(lab.guest_reads(), b"ok");
}

// ---- §3.8, data ----

#[test]
fn section_3_8_1_what_is_not_acknowledged_is_sent_again_at_growing_intervals_and_then_given_up() {
    let mut lab = Lab::new();
    let (flow, ..) = lab.open(GUEST, FAR);
    lab.host_writes(flow, b"lost");
    assert_eq!(lab.guest_reads(), b"lost");
    let mut times = vec![lab.now];
    for _ in 0..4 {
        while lab.guest_sees().is_empty() {
            lab.after(ms(10));
            assert!(lab.now.since(*times.last().unwrap()) < secs(20), "not sent again");
        }
        times.push(lab.now);
    }
    let gaps: Vec<_> = times.windows(2).map(|w| w[1].since(w[0])).collect();
    assert!(gaps.windows(2).all(|g| g[1] >= g[0]) && gaps[3] >= gaps[0] * 4, "{gaps:?}");
    lab.after(Limits::default().tcp_unacknowledged);
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
    assert_eq!(lab.stack.counters().flows, 0);
}

#[test]
fn section_3_8_4_an_idle_guest_is_asked_whether_it_is_there_and_keeps_its_flow_as_long_as_it_answers() {
    let mut lab = idle_lab(Some(3600));
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    for _ in 0..5 {
        lab.after(secs(3599));
        assert_eq!(lab.guest_sees(), [], "not before its time");
        lab.after(secs(2));
        let (_, asked, ..) = one(&mut lab);
        assert_eq!(asked, ack.wrapping_sub(1), "a number the guest has acknowledged");
        lab.guest_sends(&segment("A", GUEST, FAR, seq, ack));
    }
    assert_eq!(lab.host_sees(), [], "five hours, which is more than tcp_idle");
    lab.host_writes(flow, b"still here");
    assert_eq!(lab.guest_reads(), b"still here");
}

#[test]
fn section_3_8_4_a_guest_that_does_not_answer_is_asked_twice_and_let_go() {
    let mut lab = idle_lab(Some(7200));
    let (flow, ..) = lab.open(GUEST, FAR);
    lab.after(secs(2 * 7200 + 30));
    assert_eq!(lab.guest_sees().len(), 2);
    assert_eq!(lab.host_sees(), []);
    lab.after(secs(60));
    assert_eq!(lab.host_sees(), [HostCommand::Reset { flow }]);
    assert_eq!(lab.guest_sees_flags(), ["RA"]);
}

#[test]
fn section_3_8_4_a_guest_is_not_asked_when_the_operator_does_not_want_it() {
    let mut lab = idle_lab(None);
    lab.open(GUEST, FAR);
    lab.after(Limits::default().tcp_idle - secs(1));
    assert_eq!(lab.guest_sees(), []);
}

#[test]
fn section_3_8_4_a_published_connections_guest_is_asked_too() {
    let mut lab = idle_lab(Some(3600));
    lab.guest_announces();
    let flow = lab
        .stack
        .open_to_guest(lab.now, lab::addr("192.168.127.2:80"), lab::addr("198.51.100.9:5000"))
        .unwrap();
    let (flags, isn, ..) = one(&mut lab);
    assert_eq!(flags, "S");
    lab.guest_sends(&segment("SA", "192.168.127.2:80", "198.51.100.9:5000", 9000, isn + 1));
    assert_eq!(lab.guest_sees_flags(), ["A"]);
    lab.after(secs(3601));
    assert_eq!(one(&mut lab).1, isn);
    let _ = flow;
}

#[test]
fn section_3_8_5_urgent_bytes_stay_in_the_stream() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    for (at, pointer) in [(0, 3), (6, 1), (12, 60_000)] {
        let b = etherparse::PacketBuilder::ethernet2(mac_of(0).0, GATEWAY_MAC.0)
            .ipv4(v4(GUEST).ip().octets(), v4(FAR).ip().octets(), 64)
            .tcp(v4(GUEST).port(), v4(FAR).port(), seq + at, 65_535)
            .ack(ack)
            .psh()
            .urg(pointer);
        let mut frame = Vec::new();
        b.write(&mut frame, b"urgent").unwrap();
        lab.frame(0, &frame);
    }
    assert_eq!(lab.host_reads(flow), b"urgenturgenturgent");
}

#[test]
fn section_3_8_6_1_a_closed_window_is_probed_until_it_opens() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.guest_sends(&segment("A", GUEST, FAR, seq, ack).window(0));
    lab.host_writes(flow, b"waits for room");
    let mut probes = 0;
    for _ in 0..40 {
        lab.after(ms(500));
        for seen in lab.guest_sees() {
            let Seen::Tcp { seq: at, payload, .. } = seen else { panic!("{seen:?}") };
            // Three answers that say the same are three duplicate ACKs to smoltcp, and then it sends the segment.
            assert!(at == ack && (payload.len() == 1 || probes >= 3), "{} bytes at {at}", payload.len());
            probes += 1;
            lab.guest_sends(&segment("A", GUEST, FAR, seq, ack).window(0));
        }
    }
    assert!((2..40).contains(&probes), "{probes} probes in 20 s");
    lab.guest_sends(&segment("A", GUEST, FAR, seq, ack).window(1000));
    // Whatever of it comes first: the guest, which took no probe, has all of it in the end.
    let mut got = [0; 14];
    let since = lab.now;
    while got.contains(&0) {
        lab.after(ms(100));
        for seen in lab.guest_sees() {
            let Seen::Tcp { seq: at, payload, .. } = seen else { panic!("{seen:?}") };
            let at = usize::try_from(at.wrapping_sub(ack)).unwrap();
            got[at..at + payload.len()].copy_from_slice(&payload);
        }
        assert!(lab.now.since(since) < secs(60), "{got:?}");
    }
    assert_eq!(&got, b"waits for room");
    assert_eq!(lab.host_sees(), []);
}

#[test]
fn section_3_8_6_2_2_a_window_that_was_closed_opens_by_itself_when_the_host_has_read() {
    let mut lab = Lab::new();
    let (flow, mut seq, ack) = lab.open(GUEST, FAR);
    // Until the ring is full.
    let (mut window, mut sent) = (1400, 0);
    while window > 0 {
        let n = window.min(1400);
        lab.guest_sends(&segment("A", GUEST, FAR, seq, ack).with(&vec![1; n]));
        lab.after(ms(5));
        let Some(Seen::Tcp { ack: acked, window: told, .. }) = lab.guest_sees().pop() else {
            panic!("no answer")
        };
        (seq, window, sent) = (acked, usize::from(told), sent + n);
        assert!(sent < 10_000_000, "the window never closes");
    }
    assert_eq!(lab.host_reads(flow).len(), sent);
    lab.after(ms(5));
    let update = lab.guest_sees();
    assert!(matches!(update.last(), Some(Seen::Tcp { window, .. }) if *window > 0), "{update:?}");
}

// ---- §3.10.7.4, segments of a connection that stands ----

#[test]
fn section_3_10_7_4_a_segment_outside_the_window_is_acknowledged_and_dropped() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack).with(b"abc"));
    assert_eq!(lab.host_reads(flow), b"abc");
    lab.after(ms(10));
    lab.guest_sees();
    // The same once more, as after a lost acknowledgment.
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack).with(b"abc"));
    lab.after(ms(10));
    assert_eq!(one(&mut lab).2, seq + 3);
    assert_eq!(lab.host_reads(flow), b"");
    lab.guest_sends(&segment("PA", GUEST, FAR, seq + 5_000_000, ack).with(b"far"));
    assert_eq!(lab.dropped(DropReason::BeyondWindow), 1);
    assert_eq!(lab.host_reads(flow), b"");
}

#[test]
fn section_3_10_7_4_bytes_that_overlap_are_taken_once() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack).with(b"abcd"));
    lab.guest_sends(&segment("PA", GUEST, FAR, seq + 2, ack).with(b"cdef"));
    lab.guest_sends(&segment("PA", GUEST, FAR, seq + 8, ack).with(b"ij"));
    lab.guest_sends(&segment("PA", GUEST, FAR, seq + 6, ack).with(b"gh"));
    assert_eq!(lab.host_reads(flow), b"abcdefghij");
}

#[test]
fn section_3_10_7_4_a_syn_on_a_connection_that_stands_is_challenged_and_changes_nothing() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    // RFC 5961 §4: whatever its number.
    for at in [seq, seq + 10, 5] {
        let mut again = syn(GUEST, FAR);
        again.seq = at;
        lab.guest_sends(&again);
        assert_eq!(lab.host_sees(), [], "no new connection");
        let seen = lab.guest_sees();
        assert!(seen.iter().all(|s| matches!(s, Seen::Tcp { flags: "A", .. })), "{seen:?}");
        lab.after(secs(2));
        lab.guest_sees();
    }
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack).with(b"alive"));
    assert_eq!(lab.host_reads(flow), b"alive");
}

#[test]
fn section_3_10_7_4_an_acknowledgment_of_what_was_not_sent_is_answered_and_dropped() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.guest_sends(&segment("PA", GUEST, FAR, seq, ack + 1000).with(b"bogus"));
    lab.after(ms(10));
    let seen = lab.guest_sees();
    assert!(seen.iter().all(|s| matches!(s, Seen::Tcp { flags: "A", ack, .. } if *ack == seq)), "{seen:?}");
    assert_eq!((lab.host_reads(flow), lab.host_sees()), (vec![], vec![]));
}
