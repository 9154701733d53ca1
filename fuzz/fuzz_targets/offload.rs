//! Frames with any claim about checksums and segments: what is accepted is cut into frames no longer than the claim says, and
//! nothing panics. vpnkit's handshake beside it: any bytes, torn anywhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::link::vnet;
use portway::link::vpnkit::{Handshake, Step};
use portway_netstack::{FrameSink, Offload, segments};

struct Sizes(Vec<usize>);

impl FrameSink for Sizes {
    fn has_room(&self) -> bool {
        self.0.len() < 70_000
    }
    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        self.0.push(len);
        Some(fill(&mut vec![0; len]))
    }
}

fuzz_target!(|data: &[u8]| {
    let mut handshake = Handshake::new();
    for part in data.chunks(7) {
        if !matches!(handshake.feed(part), Step::More(_)) {
            break;
        }
    }
    let Some((header, frame)) = data.split_first_chunk() else { return };
    let claimed = [vnet::parse(*header), Some(segments::implied(frame, 1500))];
    for offload in claimed.into_iter().flatten() {
        let Ok(offload) = segments::checked(frame, offload) else { continue };
        let mut sizes = Sizes(Vec::new());
        if segments::whole(frame, offload, &mut sizes).is_ok() && offload.segments.is_some() {
            let largest = segments::largest_packet(frame, offload) + 14;
            assert!(sizes.0.iter().all(|size| *size <= largest));
        }
    }
});
