//! Whole scripts: segments, host events, bytes and time in any order. Nothing panics, and when everything is aborted no
//! flow is left.
#![no_main]

mod arena;
#[path = "../../netstack/tests/lab/mod.rs"]
mod lab;

use arbitrary::Arbitrary;
use lab::{Lab, mac_of, segment};
use libfuzzer_sys::fuzz_target;
use portway_netstack::{ConnectError, FlowId, HostCommand, HostEvent, Limits};

#[derive(Debug, Arbitrary)]
enum Step {
    /// Flags, source port, sequence and acknowledgement relative to what the flow is at, length.
    Segment { flags: u8, port: u8, seq: i32, ack: i32, len: u16 },
    Connected(u8),
    Refused(u8),
    Eof(u8),
    Reset(u8),
    Read(u8),
    Write(u8, u16),
    Wait(u16),
    Room(u8),
    Publish(u8),
}

fuzz_target!(|steps: Vec<Step>| {
    let limits = Limits { flows: 32, dialing: 8, ..Limits::default() };
    let mut lab = Lab::with_memory(limits, 1, 65_520, arena::Arena::for_this_run());
    let mut flows: Vec<FlowId> = Vec::new();
    let mut isn = 0u32;
    for step in steps.into_iter().take(200) {
        let pick = |n: u8| flows.get(usize::from(n) % flows.len().max(1)).copied();
        match step {
            Step::Segment { flags, port, seq, ack, len } => {
                let flags = ["S", "A", "PA", "FA", "R", "SA", "RA"][usize::from(flags) % 7];
                let from = format!("192.168.127.2:{}", 1 + port % 8);
                let (seq, ack) = (1001u32.wrapping_add_signed(seq), isn.wrapping_add(1).wrapping_add_signed(ack));
                let s = segment(flags, &from, "192.0.2.7:80", seq, ack).with(&vec![1; usize::from(len).min(65_000)]);
                let port = lab.ports[0];
                lab.stack.handle_frame(lab.now, port, &s.frame(mac_of(0)));
            }
            Step::Connected(n) => pick(n).into_iter().for_each(|flow| lab.host_says(HostEvent::Connected { flow })),
            Step::Refused(n) => {
                pick(n).into_iter().for_each(|flow| lab.host_says(HostEvent::Failed { flow, error: ConnectError::Refused }))
            }
            Step::Eof(n) => pick(n).into_iter().for_each(|flow| lab.host_says(HostEvent::Eof { flow })),
            Step::Reset(n) => pick(n).into_iter().for_each(|flow| lab.host_says(HostEvent::Reset { flow })),
            Step::Read(n) => pick(n).into_iter().for_each(|flow| drop(lab.host_reads(flow))),
            Step::Write(n, len) => pick(n).into_iter().for_each(|flow| { let _ = lab.host_writes(flow, &vec![2; len.into()]); }),
            Step::Wait(ms) => drop(lab.after(lab::ms(ms.into())).now),
            Step::Room(n) => lab.wires[0].room = n.into(),
            Step::Publish(n) => {
                let (to, from) = (lab::addr("192.168.127.2:22"), lab::addr("127.0.0.1:5000"));
                flows.extend(lab.stack.open_to_guest(lab.now, to, from).ok().filter(|_| n < 128));
            }
        }
        for command in lab.host_sees() {
            if let HostCommand::Connect { flow, .. } = command {
                flows.push(flow);
            }
        }
        if let Some(lab::Seen::Tcp { flags: "SA", seq, .. }) = lab.guest_sees().last() {
            isn = *seq;
        }
    }
    lab.wires[0].room = usize::MAX;
    lab.stack.abort_all();
    lab.guest_sees();
    assert_eq!(lab.stack.counters().flows, 0);
});
