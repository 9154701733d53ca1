//! BOOTP messages of any bytes from several clients on two links, with time between them: nothing panics, what is answered
//! is a BOOTP reply with the request's id, and no address is leased twice. Each message is a byte of control (link, seconds,
//! whether its fixed fields are put right), a byte of length, and that many bytes.
#![no_main]

mod arena;
#[path = "../../netstack/tests/lab/mod.rs"]
mod lab;

use lab::{Lab, mac_of, secs};
use libfuzzer_sys::fuzz_target;

/// Where the BOOTP message begins in a frame: behind Ethernet, IPv4 and UDP.
const BOOTP: usize = 42;

fn frame(from: usize, message: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let b = etherparse::PacketBuilder::ethernet2(mac_of(from).0, [0xff; 6]).ipv4([0; 4], [255; 4], 64);
    b.udp(68, 67).write(&mut frame, message).expect("a frame in memory");
    frame
}

fuzz_target!(|data: &[u8]| {
    let mut lab = Lab::with_memory(portway_netstack::Limits::default(), 2, 1500, arena::Arena::for_this_run());
    let mut rest = data;
    while let Some((&[control, length], after)) = rest.split_first_chunk::<2>() {
        let (body, next) = after.split_at(usize::from(length).min(after.len()));
        rest = next;
        let (link, client) = (usize::from(control & 1), usize::from(control >> 1 & 3));
        let mut message = body.to_vec();
        if control & 8 != 0 {
            // What follows the fixed fields is what is interesting.
            message = vec![1, 1, 6, 0, 9, 8, 7, 6];
            message.resize(28, 0);
            message.extend(mac_of(client).0);
            message.resize(236, 0);
            message.extend([99, 130, 83, 99]);
            message.extend(body);
        }
        let frame = frame(client, &message);
        lab.frame(link, &frame);
        for wire in &mut lab.wires {
            for answer in wire.frames.drain(..).filter(|f| f.get(23) == Some(&17) && f.get(12..14) == Some(&[8, 0])) {
                let reply = answer.get(BOOTP..).expect("whole headers");
                assert!(reply.len() >= 300 && reply[0] == 2);
                assert_eq!(reply[4..8], message[4..8]);
            }
        }
        let leases = lab.stack.leases(lab.now);
        assert!(leases.windows(2).all(|pair| pair[0].ip < pair[1].ip));
        lab.after(secs(u64::from(control >> 4) * 60));
    }
});
