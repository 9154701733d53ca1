//! Frames on a byte stream, each behind its length.
//!
//! | prefix | peers | source |
//! |---|---|---|
//! | u32, network byte order | QEMU `-netdev stream`, libkrun | QEMU's `net/stream.c` |
//! | u16, little-endian | hyperkit, WSL, gvforwarder | vpnkit's `docs/ethernet.md` |
//!
//! QEMU ends a connection on a length above its `NET_BUFSIZE` of 69632; so do we. A length below an Ethernet header is a
//! guest's fault and goes on to the stack, which counts it.

use std::io::{self, Read};
use std::ops::ControlFlow;

use super::Batch;

/// The longest frame a peer may announce, in bytes.
const LONGEST: usize = 69_632;
/// Bytes one `read` may bring.
const BUFFER: usize = 512 * 1024;

/// A `read` that brings as much belongs to a bulk transfer.
const BULK: usize = 16 * 1024;

/// Frames handed on at a time. A buffer holds thousands of small ones, and other links wait meanwhile.
const FRAMES: u64 = 256;

/// How a frame's length is written before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix {
    /// u32 in network byte order.
    Be32,
    /// u16, little-endian.
    Le16,
}

impl Prefix {
    /// Bytes of the prefix.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Be32 => 4,
            Self::Le16 => 2,
        }
    }

    /// The length at the beginning of `bytes`, and what comes behind it; `None` when that is not all there.
    fn split(self, bytes: &[u8]) -> Option<(usize, &[u8])> {
        match self {
            Self::Be32 => bytes.split_first_chunk().map(|(n, rest)| (u32::from_be_bytes(*n) as usize, rest)),
            Self::Le16 => {
                bytes.split_first_chunk().map(|(n, rest)| (usize::from(u16::from_le_bytes(*n)), rest))
            }
        }
    }

    /// Writes `len` into `out`, which has [`Self::size`] bytes. False when it cannot be said.
    pub fn write(self, len: usize, out: &mut [u8]) -> bool {
        match self {
            Self::Be32 => u32::try_from(len).map(|n| out.copy_from_slice(&n.to_be_bytes())).is_ok(),
            Self::Le16 => u16::try_from(len).map(|n| out.copy_from_slice(&n.to_le_bytes())).is_ok(),
        }
    }
}

/// Bytes received and not yet handed on.
#[derive(Debug)]
pub struct Framing {
    prefix: Prefix,
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    /// Whole frames were left: they come before anything more is read.
    left: bool,
}

impl Framing {
    /// An empty buffer; its pages come as they are written.
    #[must_use]
    pub fn new(prefix: Prefix) -> Self {
        Self { prefix, bytes: vec![0; BUFFER].into(), start: 0, end: 0, left: false }
    }

    /// One `read`, and the whole frames in the buffer to `handle`, [`FRAMES`] of them at the most, and
    /// none after it breaks off: what is left comes with the next call, which reads nothing.
    ///
    /// # Errors
    /// When the peer is gone, or announces a frame that is too long.
    pub fn receive(
        &mut self,
        from: &mut impl Read,
        mut handle: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> io::Result<Batch> {
        let mut batch = Batch { more: true, frames: 0, bytes: 0 };
        if std::mem::take(&mut self.left) {
            self.hand_on(&mut batch, &mut handle)?;
            return Ok(batch);
        }
        let room = &mut self.bytes[self.end..];
        let asked = room.len();
        match from.read(room) {
            Ok(0) => return Err(io::Error::other("end of file")),
            Ok(n) => {
                self.end += n;
                // A stream socket that gave less than asked has given all, and news of more comes as an event. In the
                // midst of a bulk transfer more has come meanwhile, and is worth a look before anything is answered.
                batch.more = n == asked || n >= BULK;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(batch),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => batch.more = false,
            Err(e) => return Err(e),
        }
        self.hand_on(&mut batch, &mut handle)?;
        Ok(batch)
    }

    /// Hands whole frames on, and makes room behind the rest.
    fn hand_on(
        &mut self,
        batch: &mut Batch,
        handle: &mut impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let mut flow = ControlFlow::Continue(());
        while let Some((length, rest)) = self.prefix.split(&self.bytes[self.start..self.end]) {
            if batch.frames == FRAMES || flow.is_break() {
                (self.left, batch.more) = (true, true);
                return Ok(());
            }
            if length > LONGEST {
                return Err(io::Error::other(format!(
                    "a frame of {length} bytes was announced, {LONGEST} are the most"
                )));
            }
            if rest.len() < length {
                break;
            }
            let at = self.start + self.prefix.size();
            let frame = &mut self.bytes[at..at + length];
            if self.prefix == Prefix::Le16 {
                super::vpnkit::finish_header(frame);
            }
            flow = handle(frame);
            self.start += self.prefix.size() + length;
            batch.frames += 1;
            batch.bytes += length as u64;
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if BUFFER - self.end < 4 + LONGEST {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use portway_netstack::{FrameSink, Offload};
    use proptest::prelude::*;

    use super::*;
    use crate::link::TransmitBuffer;

    /// Gives bytes in pieces of the sizes it is told.
    struct Pieces<'a>(&'a [u8], Vec<usize>);

    impl Read for Pieces<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let n = self.1.pop().unwrap_or(usize::MAX).clamp(1, out.len()).min(self.0.len());
            if n == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            out[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    /// Keeps every frame.
    fn keep(got: &mut Vec<Vec<u8>>) -> impl FnMut(&[u8]) -> ControlFlow<()> {
        |frame| {
            got.push(frame.to_vec());
            ControlFlow::Continue(())
        }
    }

    #[test]
    fn frames_behind_a_break_come_with_the_next_call() {
        let wire: Vec<u8> = (0..5).flat_map(|n| [1, 0, n]).collect();
        let (mut framing, mut from, mut got) =
            (Framing::new(Prefix::Le16), Pieces(&wire, vec![]), Vec::new());
        for n in 1..=5 {
            let batch = framing.receive(&mut from, |f| {
                got.push(f[0]);
                ControlFlow::Break(())
            });
            assert_eq!((batch.unwrap().frames, got.len()), (1, n));
        }
        assert_eq!(got, [0, 1, 2, 3, 4]);
        assert!(!framing.receive(&mut from, |_| panic!()).unwrap().more);
    }

    #[test]
    fn a_crowd_of_small_frames_comes_in_turns_and_whole() {
        let wire: Vec<u8> = (0..1000_u32).flat_map(|n| [&[4, 0][..], &n.to_le_bytes()].concat()).collect();
        let (mut framing, mut got, mut calls) = (Framing::new(Prefix::Le16), Vec::new(), 0);
        let mut from = Pieces(&wire, vec![]);
        while got.len() < 1000 {
            let batch = framing.receive(&mut from, keep(&mut got)).unwrap();
            assert!(batch.frames <= FRAMES && batch.more);
            calls += 1;
        }
        assert_eq!(calls, 4);
        assert!(got.iter().zip(0_u32..).all(|(frame, n)| *frame == n.to_le_bytes()));
    }

    proptest! {
        #[test]
        fn frames_survive_every_way_of_tearing_the_stream(
            sizes in prop::collection::vec(0usize..70_000, 0..12),
            pieces in prop::collection::vec(1usize..9000, 0..60),
        ) {
            for (prefix, longest) in [(Prefix::Be32, LONGEST), (Prefix::Le16, 65_535)] {
                let frames: Vec<Vec<u8>> =
                    sizes.iter().zip(0u8..).map(|(n, b)| vec![b; (*n).min(longest)]).collect();
                let mut wire = Vec::new();
                for f in &frames {
                    let at = wire.len();
                    wire.resize(at + prefix.size(), 0);
                    prop_assert!(prefix.write(f.len(), &mut wire[at..]));
                    wire.extend(f);
                }
                let (mut framing, mut got) = (Framing::new(prefix), Vec::new());
                let mut from = Pieces(&wire, pieces.clone());
                while !from.0.is_empty() {
                    framing.receive(&mut from, keep(&mut got)).unwrap();
                }
                prop_assert_eq!(got, frames);
            }
        }
    }

    #[test]
    fn a_length_beyond_qemus_own_limit_ends_the_connection() {
        for length in [LONGEST + 1, 0xffff_ffff] {
            let wire = u32::try_from(length).unwrap().to_be_bytes();
            let mut from = Pieces(&wire, vec![]);
            assert!(Framing::new(Prefix::Be32).receive(&mut from, |_| panic!()).is_err());
        }
    }

    #[test]
    fn what_the_transmit_buffer_holds_reads_back_as_frames() {
        for prefix in [Prefix::Be32, Prefix::Le16] {
            let mut transmit = TransmitBuffer::new(prefix);
            transmit.frame(60, Offload::default(), |f| f.fill(1)).unwrap();
            transmit.frame(14, Offload::default(), |f| f.fill(2)).unwrap();
            let wire = transmit.pending().to_vec();
            let mut got = Vec::new();
            Framing::new(prefix).receive(&mut Pieces(&wire, vec![]), keep(&mut got)).unwrap();
            assert_eq!(got, [vec![1; 60], vec![2; 14]]);
        }
    }
}
