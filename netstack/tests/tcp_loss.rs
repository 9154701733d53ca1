//! A true TCP in the guest, behind a link that loses, repeats and reorders: bytes in are bytes out, and what is lost is
//! sent again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use lab::real::{Dice, Faults, Guest};
use lab::{Lab, Seen, secs, segment};
use portway_netstack::{HostCommand, HostEvent, Limits};
use smoltcp::socket::tcp::State;

const GUEST: &str = "192.168.127.2:40000";
const FAR: &str = "192.0.2.7:443";

/// Moves `len` bytes each way at once over a link with faults; what arrives must be what was sent.
fn both_ways(seed: u64, mtu: u16, faults: Faults, len: usize) {
    let mut guest = Guest::new(Lab::with(Limits::default(), 1, mtu), usize::from(mtu), faults, seed);
    let socket = guest.connect("192.0.2.7:443", 40_000);
    let flow = guest.accept();
    let mut dice = Dice(seed ^ 0xabcd);
    let data: Vec<u8> = (0..len).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
    let (mut sent, mut got) = ([0usize; 2], [vec![], vec![]]);
    let mut ended = [false; 2];
    for step in 0..400_000 {
        guest.step();
        if sent[0] < len && guest.tcp(socket).can_send() {
            sent[0] += guest.tcp(socket).send_slice(&data[sent[0]..]).unwrap();
        } else if sent[0] == len && !ended[0] && guest.tcp(socket).may_send() {
            guest.tcp(socket).close();
            ended[0] = true;
        }
        // A host that is slow now and then.
        if dice.roll(3) > 0 {
            got[0].extend(guest.lab.host_reads(flow));
        }
        if sent[1] < len {
            sent[1] += guest.lab.host_writes(flow, &data[sent[1]..]);
        } else if !ended[1] {
            guest.lab.host_says(HostEvent::Eof { flow });
            ended[1] = true;
        }
        while guest.tcp(socket).can_recv() {
            guest
                .sockets
                .get_mut::<smoltcp::socket::tcp::Socket<'_>>(socket)
                .recv(|b| {
                    got[1].extend_from_slice(b);
                    (b.len(), ())
                })
                .unwrap();
        }
        let closed = matches!(guest.tcp(socket).state(), State::Closed | State::TimeWait);
        if closed && got[0].len() == len && got[1].len() == len && step > 10 {
            break;
        }
    }
    assert!(got[0] == data, "seed {seed}: guest to host: {} of {len} bytes, or others", got[0].len());
    assert!(got[1] == data, "seed {seed}: host to guest: {} of {len} bytes, or others", got[1].len());
    guest.lab.after(secs(300));
    assert_eq!(guest.lab.stack.counters().flows, 0, "seed {seed}: no state is left");
}

#[test]
fn no_byte_is_lost_repeated_or_changed_under_loss_reordering_and_duplication() {
    for seed in 1..=40 {
        both_ways(seed, 1500, Faults { lost: 5, twice: 3, late: 5 }, 60_000);
    }
}

#[test]
fn a_clean_link_carries_megabytes_past_every_ring() {
    both_ways(99, 65_520, Faults::default(), 5_000_000);
    both_ways(98, 1500, Faults::default(), 3_000_000);
}

#[test]
fn a_published_connection_carries_bytes_both_ways_through_a_faulty_link() {
    for seed in 1..=5 {
        let faults = Faults { lost: 5, twice: 3, late: 5 };
        let mut guest = Guest::new(Lab::new(), 1500, faults, seed);
        let socket = guest.listen(22);
        let (to, from) = (lab::addr("192.168.127.2:22"), lab::addr("127.0.0.1:50000"));
        let flow = guest.lab.stack.open_to_guest(guest.lab.now, to, from).unwrap();
        let (data, mut sent, mut back) = (vec![0x5au8; 50_000], 0, Vec::new());
        for _ in 0..200_000 {
            guest.step();
            sent += guest.lab.host_writes(flow, &data[sent..]);
            let tcp = guest.tcp(socket);
            if tcp.can_recv() && tcp.can_send() {
                let chunk = tcp
                    .recv(|b| {
                        let n = b.len().min(1000);
                        (n, b[..n].to_vec())
                    })
                    .unwrap();
                assert_eq!(tcp.send_slice(&chunk).unwrap(), chunk.len());
            }
            back.extend(guest.lab.host_reads(flow));
            if back.len() == data.len() {
                break;
            }
        }
        assert_eq!(back.len(), data.len(), "seed {seed}");
    }
}

#[test]
fn a_guest_with_little_memory_that_seldom_reads_gets_every_byte() {
    for seed in 1..=40 {
        let mut guest = Guest::new(Lab::new(), 1500, Faults { lost: 8, twice: 8, late: 8 }, seed);
        let socket = guest.connect_with(FAR, 40_000, 2000 + 700 * usize::try_from(seed % 7).unwrap());
        let flow = guest.accept();
        let mut dice = Dice(seed ^ 0x51);
        let data: Vec<u8> = (0..60_000).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
        let (mut sent, mut ended, mut got) = (0, false, Vec::new());
        // Its window is closed most of the time, while bytes are under way and while none are.
        let mut next_read = 0;
        for step in 0..3_000_000 {
            guest.step();
            sent += guest.lab.host_writes(flow, &data[sent..]);
            if sent == data.len() && !ended {
                guest.lab.host_says(HostEvent::Eof { flow });
                ended = true;
            }
            let tcp = guest.tcp(socket);
            if step >= next_read && tcp.can_recv() {
                got.extend(tcp.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap());
                next_read = step + dice.roll(60);
            }
            if tcp.state() == State::CloseWait && got.len() == data.len() {
                break;
            }
        }
        assert!(got == data, "seed {seed}: {} of {} bytes, or others", got.len(), data.len());
        assert_eq!(guest.tcp(socket).state(), State::CloseWait, "seed {seed}");
    }
}

/// Twenty connections at once over a faulty link, each echoed by the host; when it took.
fn echoes(seed: u64) -> portway_netstack::Instant {
    let mut guest = Guest::new(Lab::new(), 1500, Faults { lost: 5, twice: 3, late: 5 }, seed);
    let mut dice = Dice(seed ^ 0xecc0);
    let sent: Vec<Vec<u8>> = (0..20)
        .map(|n| (0..5000 + 700 * n).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect())
        .collect();
    let sockets: Vec<_> = (40_000..).take(sent.len()).map(|port| guest.connect(FAR, port)).collect();
    let (mut put, mut got) = (vec![0; sent.len()], vec![Vec::new(); sent.len()]);
    let mut echoes = Vec::new();
    for _ in 0..600_000 {
        guest.step();
        for command in guest.lab.host_sees() {
            let HostCommand::Connect { flow, .. } = command else { panic!("{command:?}") };
            guest.lab.host_says(HostEvent::Connected { flow });
            echoes.push((flow, Vec::new()));
        }
        for (flow, back) in &mut echoes {
            back.extend(guest.lab.host_reads(*flow));
            let given = guest.lab.host_writes(*flow, back);
            back.drain(..given);
        }
        for (n, socket) in sockets.iter().enumerate() {
            let tcp = guest.tcp(*socket);
            if tcp.can_send() {
                put[n] += tcp.send_slice(&sent[n][put[n]..]).unwrap();
            }
            while tcp.can_recv() {
                got[n].extend(tcp.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap());
            }
        }
        if got.iter().zip(&sent).all(|(got, sent)| got.len() >= sent.len()) {
            break;
        }
    }
    assert!(got == sent, "seed {seed}: an echo is not what was sent");
    guest.lab.now
}

#[test]
fn many_connections_at_once_do_not_mix() {
    echoes(7);
}

#[test]
fn the_same_seed_is_the_same_run() {
    assert_eq!(echoes(3), echoes(3));
}

#[test]
fn a_lost_fin_is_sent_again() {
    let mut lab = Lab::new();
    let (flow, ..) = lab.open(GUEST, FAR);
    lab.host_says(HostEvent::Eof { flow });
    assert_eq!(lab.guest_sees_flags(), ["FA"]);
    lab.after(secs(4));
    assert!(lab.guest_sees_flags().contains(&"FA"));
}

#[test]
fn a_lost_fin_is_sent_again_after_three_duplicate_acks() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.host_says(HostEvent::Eof { flow });
    assert_eq!(lab.guest_sees_flags(), ["FA"]);
    for _ in 0..4 {
        lab.guest_sends(&segment("A", GUEST, FAR, seq, ack));
    }
    lab.guest_sees();
    lab.after(secs(60));
    assert!(lab.guest_sees_flags().contains(&"FA"));
}

/// The host sends some bytes, and its end of file just after them, over a link that loses, repeats and delays much: what
/// comes late is acknowledged once more, again and again, while the FIN is under way. Whether the guest, which keeps its
/// own direction open, sees the end within four minutes.
fn the_hosts_end_arrives(seed: u64, published: bool) -> bool {
    let mut guest = Guest::new(Lab::new(), 1500, Faults { lost: 15, twice: 50, late: 50 }, seed);
    let (socket, flow) = if published {
        let socket = guest.listen(22);
        let (to, from) = (lab::addr("192.168.127.2:22"), lab::addr("127.0.0.1:50000"));
        (socket, guest.lab.stack.open_to_guest(guest.lab.now, to, from).unwrap())
    } else {
        let socket = guest.connect(FAR, 40_000);
        (socket, guest.accept())
    };
    let (mut left, mut wait, mut got) = (5000, Some(seed % 4), 0);
    for _ in 0..240_000 {
        guest.step();
        left -= guest.lab.host_writes(flow, &vec![1; left]);
        if left == 0 {
            if wait == Some(0) {
                guest.lab.host_says(HostEvent::Eof { flow });
            }
            wait = wait.and_then(|steps| steps.checked_sub(1));
        }
        let tcp = guest.tcp(socket);
        while tcp.can_recv() {
            got += tcp.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        if tcp.state() == State::CloseWait && got == 5000 {
            return true;
        }
    }
    false
}

#[test]
fn the_hosts_end_of_file_reaches_the_guest_whatever_the_link_does_to_it() {
    for seed in 1..=40 {
        assert!(the_hosts_end_arrives(seed, false), "a guest's connection, seed {seed}");
        assert!(the_hosts_end_arrives(seed, true), "a published connection, seed {seed}");
    }
}

#[test]
fn a_lost_fin_is_sent_again_whatever_old_acknowledgements_come_late() {
    let mut lab = Lab::new();
    let (flow, seq, ack) = lab.open(GUEST, FAR);
    lab.host_writes(flow, &[1; 100]);
    lab.guest_sends(&segment("A", GUEST, FAR, seq, ack + 100));
    lab.host_says(HostEvent::Eof { flow });
    lab.guest_sees();
    for late in 0..9 {
        lab.guest_sends(&segment("A", GUEST, FAR, seq, ack + 10 * late));
        lab.guest_sends(&segment("A", GUEST, FAR, seq, ack + 100));
    }
    lab.guest_sees();
    lab.after(secs(60));
    assert!(lab.guest_sees_flags().contains(&"FA"));
}

#[test]
fn a_lost_fin_is_sent_again_though_the_syn_had_to_begin_anew() {
    let mut lab = Lab::new();
    lab.guest_announces();
    let guest = "192.168.127.2:22";
    // The second initial sequence number lies before the first about every other time.
    for port in 51_000..51_020 {
        let client = format!("192.168.127.254:{port}");
        let from = lab::addr(&format!("127.0.0.1:{port}"));
        let flow = lab.stack.open_to_guest(lab.now, lab::addr(guest), from).unwrap();
        lab.guest_sees();
        lab.guest_sends(&segment("A", guest, &client, 900, 77));
        let Seen::Tcp { flags: "S", seq, .. } = lab.guest_sees()[1] else { panic!() };
        lab.guest_sends(&segment("SA", guest, &client, 500, seq + 1));
        lab.host_says(HostEvent::Eof { flow });
        assert_eq!(lab.guest_sees_flags(), ["A", "FA"]);
        for _ in 0..4 {
            lab.guest_sends(&segment("A", guest, &client, 501, seq + 1));
        }
        lab.guest_sees();
        lab.after(secs(60));
        assert!(lab.guest_sees_flags().contains(&"FA"), "{port}");
    }
}
