//! The framing of QEMU's stream netdev: a frame's length as u32 in network byte order, then the frame.
//!
//! Source: QEMU's `net/stream.c`, which ends a connection on a length above its `NET_BUFSIZE` of 69632; so do we. A
//! length below an Ethernet header is a guest's fault and goes on to the stack, which counts it.

use std::io::{self, Read};

use super::TransmitBuffer;

/// The longest frame a peer may announce, in bytes.
const LONGEST: usize = 69_632;
/// Bytes one `read` may bring.
const BUFFER: usize = 512 * 1024;

/// A `read` that brings as much belongs to a bulk transfer.
const BULK: usize = 16 * 1024;

/// Bytes received and not yet handed on.
#[derive(Debug)]
pub struct Framing {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What one batch brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Whether the socket may have more.
    pub more: bool,
    /// Frames handed on.
    pub frames: u64,
    /// Bytes in those frames.
    pub bytes: u64,
}

impl Framing {
    /// An empty buffer; its pages come as they are written.
    #[must_use]
    pub fn new() -> Self {
        Self { bytes: vec![0; BUFFER].into(), start: 0, end: 0 }
    }

    /// One `read`, and every whole frame in the buffer to `handle`.
    ///
    /// # Errors
    /// When the peer is gone, or announces a frame that is too long.
    pub fn receive(
        &mut self,
        from: &mut impl Read,
        transmit: &mut TransmitBuffer,
        mut handle: impl FnMut(&[u8], &mut TransmitBuffer),
    ) -> io::Result<Batch> {
        let mut batch = Batch { more: true, frames: 0, bytes: 0 };
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
        while let Some((length, rest)) = self.bytes[self.start..self.end].split_first_chunk() {
            let length = u32::from_be_bytes(*length) as usize;
            if length > LONGEST {
                return Err(io::Error::other(format!(
                    "a frame of {length} bytes was announced, {LONGEST} are the most"
                )));
            }
            let Some(frame) = rest.get(..length) else { break };
            handle(frame, transmit);
            self.start += 4 + length;
            batch.frames += 1;
            batch.bytes += length as u64;
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if BUFFER - self.end < 4 + LONGEST {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        Ok(batch)
    }
}

impl Default for Framing {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use portway_netstack::{FrameSink, Offload};
    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        #[test]
        fn frames_survive_every_way_of_tearing_the_stream(
            sizes in prop::collection::vec(0usize..70_000, 0..12),
            pieces in prop::collection::vec(1usize..9000, 0..60),
        ) {
            let frames: Vec<Vec<u8>> = sizes.iter().zip(0u8..).map(|(n, b)| vec![b; (*n).min(LONGEST)]).collect();
            let mut wire = Vec::new();
            for f in &frames {
                wire.extend(u32::try_from(f.len()).unwrap().to_be_bytes());
                wire.extend(f);
            }
            let (mut framing, mut transmit, mut got) = (Framing::new(), TransmitBuffer::new(), Vec::new());
            let mut from = Pieces(&wire, pieces);
            while !from.0.is_empty() {
                framing.receive(&mut from, &mut transmit, |f, _| got.push(f.to_vec())).unwrap();
            }
            prop_assert_eq!(got, frames);
        }
    }

    #[test]
    fn a_length_beyond_qemus_own_limit_ends_the_connection() {
        for length in [LONGEST + 1, 0xffff_ffff] {
            let wire = u32::try_from(length).unwrap().to_be_bytes();
            let mut from = Pieces(&wire, vec![]);
            assert!(Framing::new().receive(&mut from, &mut TransmitBuffer::new(), |_, _| panic!()).is_err());
        }
    }

    #[test]
    fn what_the_transmit_buffer_holds_reads_back_as_frames() {
        let mut transmit = TransmitBuffer::new();
        assert!(transmit.push(&[1; 60]));
        transmit.frame(14, Offload::default(), |f| f.fill(2)).unwrap();
        let wire = transmit.pending().to_vec();
        let mut got = Vec::new();
        Framing::new()
            .receive(&mut Pieces(&wire, vec![]), &mut TransmitBuffer::new(), |f, _| got.push(f.to_vec()))
            .unwrap();
        assert_eq!(got, [vec![1; 60], vec![2; 14]]);
        while transmit.has_room() {
            transmit.push(&[0; 65_549]);
        }
        assert!(!transmit.push(&[0; 14]));
    }
}
