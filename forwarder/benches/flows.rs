//! What a packet costs with one flow, with ten and with fifty thousand, and what an idle flow costs in memory:
//! `cargo bench -p portway --bench flows`.
//!
//! A packet here is one full data segment in, its bytes taken by the host, and its acknowledgement out. The figures of
//! one run are compared with each other; the absolute ones depend on the machine. Memory is the growth of VmRSS over
//! flows that each moved a byte both ways and then were idle, with the real ring memory; kernel sockets are not in it.
//! Ends with 1 above a ratio of 2 or above 1 KiB.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a benchmark has a clock and speaks"
)]

#[path = "../../netstack/tests/lab/mod.rs"]
mod lab;

use std::time::Instant;

use lab::{Lab, segment};
use portway::rings::MappedRings;
use portway_netstack::{FlowId, Limits};

const ROUNDS: u32 = 200_000;

struct Flow {
    id: FlowId,
    from: String,
    seq: u32,
    ack: u32,
}

fn open(lab: &mut Lab, n: usize) -> Flow {
    let from = format!("192.168.127.2:{}", 1024 + n % 60_000);
    let to = format!("192.0.2.{}:443", 1 + n / 60_000);
    let (id, seq, ack) = lab.open(&from, &to);
    // A byte each way, as a connection that was used has had.
    lab.guest_sends(&segment("PA", &from, &to, seq, ack).with(b"?"));
    lab.host_reads(id);
    lab.host_writes(id, b"!");
    lab.guest_sends(&segment("A", &from, &to, seq + 1, ack + 1));
    while lab.stack.poll_flow().is_some() {}
    lab.wires[0].frames.clear();
    Flow { id, from, seq: seq + 1, ack: ack + 1 }
}

/// Nanoseconds per packet over `flows`, one after the other.
fn cost(lab: &mut Lab, flows: &mut [Flow], pick: impl Fn(u32) -> usize) -> f64 {
    // The frames are made before the clock runs; sequence numbers are patched in, checksums are not looked at.
    let frames: Vec<Vec<u8>> = flows
        .iter()
        .map(|f| segment("PA", &f.from, "192.0.2.1:443", f.seq, f.ack).with(&[7; 1448]).frame(lab::mac_of(0)))
        .collect();
    let mut frame = frames[0].clone();
    let port = lab.ports[0];
    let began = Instant::now();
    for round in 0..ROUNDS {
        let at = pick(round) % flows.len();
        let flow = &mut flows[at];
        frame.copy_from_slice(&frames[at]);
        frame[38..42].copy_from_slice(&flow.seq.to_be_bytes());
        lab.stack.handle_frame(lab.now, port, &frame);
        while let Some(touched) = lab.stack.poll_flow() {
            lab.stack.to_host(lab.now, touched, <[u8]>::len);
        }
        lab.stack.poll_transmit(lab.now, port, &mut lab.wires[0]);
        lab.wires[0].frames.clear();
        flow.seq = flow.seq.wrapping_add(1448);
    }
    let _ = flows[0].id;
    began.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
}

/// Opens flows until there are `n`, each of which is idle then.
fn hold(lab: &mut Lab, flows: &mut Vec<Flow>, n: usize) {
    for n in flows.len()..n {
        flows.push(open(lab, n));
        lab.after(lab::ms(1));
    }
    lab.after(lab::secs(2));
}

/// Resident KiB of this process.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn main() {
    let mut lab = Lab::with_memory(Limits::default(), 1, 1500, Box::new(MappedRings::new()));
    let mut flows = vec![open(&mut lab, 0)];
    cost(&mut lab, &mut flows, |_| 0);
    let alone = cost(&mut lab, &mut flows, |_| 0);
    let before = resident();
    hold(&mut lab, &mut flows, 10_000);
    let each = (resident() - before) / 9_999.0;
    let held = cost(&mut lab, &mut flows, |_| 0);
    let spread = cost(&mut lab, &mut flows[..64], |round| round as usize * 7);
    hold(&mut lab, &mut flows, 50_000);
    let each_of_50 = (resident() - before) / 49_999.0;
    let held_50 = cost(&mut lab, &mut flows, |_| 0);
    println!("1 flow                            {alone:8.0} ns per packet");
    println!("1 of 10000 flows, the rest idle   {held:8.0} ns per packet  ratio {:.2}", held / alone);
    println!("1 of 50000 flows, the rest idle   {held_50:8.0} ns per packet  ratio {:.2}", held_50 / alone);
    println!("64 of 10000 flows in turn         {spread:8.0} ns per packet  ratio {:.2}", spread / alone);
    println!(
        "resident per idle flow            {each:8.2} KiB of 10000, {each_of_50:.2} KiB of 50000 (the bench's own {} bytes of notes in it)",
        size_of::<Flow>()
    );
    let worst = held.max(held_50) / alone;
    std::process::exit(i32::from(worst > 2.0 || each.max(each_of_50) > 1.0));
}
