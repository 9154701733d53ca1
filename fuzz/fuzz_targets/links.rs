//! Link framings and vpnkit's handshake, in any pieces: the frames are those a plain reading of the bytes gives, however they
//! are cut, and a handshake keeps no more than its own bytes.
#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use portway::link::framing::{Framing, Prefix};
use portway::link::vpnkit::{Handshake, Step};

/// Bytes in pieces.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.0.len().min(self.1.max(1)).min(into.len());
        let (now, later) = self.0.split_at(n);
        into[..n].copy_from_slice(now);
        self.0 = later;
        Ok(n)
    }
}

/// The frames of `bytes`, read in pieces of `piece`.
fn frames(prefix: Prefix, bytes: &[u8], piece: usize) -> Vec<Vec<u8>> {
    let (mut framing, mut found) = (Framing::new(prefix), Vec::new());
    let mut from = Pieces(bytes, piece);
    while framing.receive(&mut from, |frame| {
        found.push(frame.to_vec());
        std::ops::ControlFlow::Continue(())
    }).is_ok() {}
    found
}

fuzz_target!(|data: &[u8]| {
    // The first byte says how long a piece is.
    let Some((&piece, bytes)) = data.split_first() else { return };
    for prefix in [Prefix::Be32, Prefix::Le16] {
        let whole = frames(prefix, bytes, usize::MAX);
        assert_eq!(frames(prefix, bytes, piece.into()), whole);
        assert!(whole.iter().map(Vec::len).sum::<usize>() <= bytes.len());
    }
    let mut handshake = Handshake::new();
    for chunk in bytes.chunks(usize::from(piece).max(1)) {
        match handshake.feed(chunk) {
            Step::More(answer) => assert!(answer.len() <= 49),
            Step::Hello(_, hello) => return assert!(!hello.mac().is_group()),
            Step::Close(_) => return,
        }
    }
});
