//! Frames of any bytes, cut out of the input by their lengths, into a stack: nothing panics.
#![no_main]

mod arena;
#[path = "../../netstack/tests/lab/mod.rs"]
mod lab;

use lab::Lab;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut lab = Lab::with_memory(portway_netstack::Limits::default(), 1, 65_520, arena::Arena::for_this_run());
    let mut rest = data;
    while let Some((&[a, b], after)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes([a, b])).min(after.len());
        let (frame, next) = after.split_at(len);
        if let portway_netstack::Handled::Whole(whole) = lab.frame(0, frame) {
            lab.frame(0, &whole);
        }
        lab.host_sees();
        lab.wires[0].frames.clear();
        rest = next;
    }
});
