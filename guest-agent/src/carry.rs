//! The bytes of one carried connection: between a socket of the guest and a stream to the host.
//!
//! ```text
//! near (the guest's socket) ──read──► shared buffer ──write──► far (the stream to the host)      and back
//!                                        └─ what was not taken waits in the way's own buffer, and nothing is read
//! ```
//! Both descriptors are watched edge-triggered: readiness is a flag that only `EAGAIN` (or a short transfer) clears. All
//! connections share one buffer; a way has one of its own only while its receiver is slow, which is used again afterwards, so
//! none is made per chunk. While [`HELD`] ways have one, others are read in chunks of [`SMALL`] bytes, so that what all of
//! them hold is bounded. The end of one direction is passed on as a half-close; a reset of the near end is told to the caller,
//! one of the far end resets the near one.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{read, write};
use portway_api::agent::DATAGRAM_MAX;

/// Bytes of the shared buffer: large enough for few system calls, small enough for a second-level cache; and for the
/// largest datagram with its length.
pub(crate) const BUFFER: usize = 128 * 1024;
/// Bytes one connection may move before the next has its turn.
const TURN: usize = 1 << 20;
/// Ways that have a buffer of their own.
const HELD: usize = 64;
/// Bytes at most of what a way beyond those holds.
const SMALL: usize = 4 * 1024;

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare { buffers: Vec::new(), held: 0 }) };
}

/// Buffers of [`BUFFER`] bytes for ways whose receivers are slow.
struct Spare {
    /// Those that no way has any more.
    buffers: Vec<Vec<u8>>,
    /// How many ways have one.
    held: usize,
}

/// What a receiver has not taken. Its buffer is given back with it.
#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// Whether it is one of the [`HELD`].
    held: bool,
}

impl Waiting {
    fn keep(&mut self, bytes: &[u8]) {
        if self.bytes.capacity() == 0 && !bytes.is_empty() {
            SPARE.with_borrow_mut(|spare| {
                if spare.held < HELD {
                    spare.held += 1;
                    self.held = true;
                    self.bytes = spare.buffers.pop().unwrap_or_else(|| Vec::with_capacity(BUFFER));
                }
            });
        }
        self.bytes.extend_from_slice(bytes);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.held {
            let mut buffer = std::mem::take(&mut self.bytes);
            buffer.clear();
            // A thread that ends has nothing to give it back to.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                spare.held = spare.held.saturating_sub(1);
                spare.buffers.push(buffer);
            });
        }
    }
}

/// As much of `buffer` as may be read into.
fn chunk(buffer: &mut [u8]) -> &mut [u8] {
    let most = if SPARE.with_borrow(|spare| spare.held < HELD) { BUFFER } else { SMALL };
    let most = most.min(buffer.len());
    buffer.get_mut(..most).unwrap_or_default()
}

/// One descriptor and what is known of it.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) fd: OwnedFd,
    readable: bool,
    writable: bool,
}

impl End {
    pub(crate) const fn new(fd: OwnedFd) -> Self {
        Self { fd, readable: true, writable: true }
    }

    /// What a poll should wait for: what is not known to be possible.
    pub(crate) fn wants(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, !self.readable);
        flags.set(PollFlags::POLLOUT, !self.writable);
        flags
    }

    /// What a poll has found.
    pub(crate) fn note_poll(&mut self, found: PollFlags) {
        let ended = found.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        self.note(ended || found.contains(PollFlags::POLLIN), ended || found.contains(PollFlags::POLLOUT));
    }

    pub(crate) const fn note(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }
}

/// One direction.
#[derive(Debug, Default)]
struct Way {
    /// What was read and not taken.
    waiting: Waiting,
    at: usize,
    eof: bool,
    shut: bool,
}

impl Way {
    const fn has_waiting(&self) -> bool {
        self.at < self.waiting.bytes.len()
    }
}

/// Which end failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    From,
    To,
}

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing more until an event.
    Idle,
    /// There is more to do, after the others.
    Again,
    /// Both directions have ended.
    Done,
    /// The guest's end was reset.
    NearReset,
    /// The host's end is gone.
    FarReset,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Carried {
    pub(crate) near: End,
    pub(crate) far: End,
    to_host: Way,
    to_guest: Way,
    datagrams: bool,
}

impl Carried {
    /// Begins with `first` for the host, which is the stream's first message.
    pub(crate) fn new(near: OwnedFd, far: OwnedFd, first: Vec<u8>, datagrams: bool) -> Self {
        let to_host = Way { waiting: Waiting { bytes: first, held: false }, ..Way::default() };
        Self { near: End::new(near), far: End::new(far), to_host, to_guest: Way::default(), datagrams }
    }

    /// Moves what can be moved.
    pub(crate) fn turn(&mut self, buffer: &mut [u8]) -> Turn {
        let mut more = false;
        let moved = if self.datagrams {
            frame(&mut self.near, &mut self.far, &mut self.to_host, buffer)
        } else {
            stream(&mut self.near, &mut self.far, &mut self.to_host, buffer)
        };
        match moved {
            Ok(again) => more |= again,
            Err(Side::From) => return Turn::NearReset,
            Err(Side::To) => return Turn::FarReset,
        }
        let moved = if self.datagrams {
            unframe(&mut self.far, &mut self.near, &mut self.to_guest, buffer)
        } else {
            stream(&mut self.far, &mut self.near, &mut self.to_guest, buffer)
        };
        match moved {
            Ok(again) => more |= again,
            Err(Side::From) => return Turn::FarReset,
            Err(Side::To) => return Turn::NearReset,
        }
        // A datagram socket has no end of its own: the stream's is the flow's.
        let done = if self.datagrams { self.to_guest.eof } else { self.to_host.shut && self.to_guest.shut };
        match (done, more) {
            (true, _) => Turn::Done,
            (false, true) => Turn::Again,
            (false, false) => Turn::Idle,
        }
    }
}

/// Writes what waits. True when nothing waits any more.
fn drain(to: &mut End, way: &mut Way) -> Result<bool, Side> {
    while way.has_waiting() {
        if !to.writable {
            return Ok(false);
        }
        let rest = way.waiting.bytes.get(way.at..).unwrap_or_default();
        match write(&to.fd, rest) {
            Ok(n) => way.at += n,
            Err(Errno::EAGAIN) => to.writable = false,
            Err(Errno::EINTR) => {}
            Err(_) => return Err(Side::To),
        }
    }
    if !way.waiting.bytes.is_empty() {
        // Given back: a connection that was slow once is not charged for it for ever.
        *way = Way { eof: way.eof, shut: way.shut, ..Way::default() };
    }
    Ok(true)
}

/// Moves bytes of a stream. True when its turn is over before the bytes are.
fn stream(from: &mut End, to: &mut End, way: &mut Way, buffer: &mut [u8]) -> Result<bool, Side> {
    let mut moved = 0;
    while moved < TURN {
        if !drain(to, way)? {
            return Ok(false);
        }
        if way.eof {
            if !std::mem::replace(&mut way.shut, true) {
                // A peer that is gone already says so at the next write.
                let _ = shutdown(to.fd.as_raw_fd(), Shutdown::Write);
            }
            return Ok(false);
        }
        if !from.readable {
            return Ok(false);
        }
        match read(&from.fd, chunk(buffer)) {
            Ok(0) => way.eof = true,
            Ok(n) => {
                moved += n;
                let bytes = buffer.get(..n).unwrap_or_default();
                way.waiting.keep(bytes.get(pass(to, bytes)?..).unwrap_or_default());
            }
            Err(Errno::EAGAIN) => from.readable = false,
            Err(Errno::EINTR) => {}
            Err(_) => return Err(Side::From),
        }
    }
    Ok(true)
}

/// Writes `bytes` as far as they are taken now, and says how many were.
fn pass(to: &mut End, bytes: &[u8]) -> Result<usize, Side> {
    let mut taken = 0;
    while taken < bytes.len() && to.writable {
        match write(&to.fd, bytes.get(taken..).unwrap_or_default()) {
            Ok(n) => taken += n,
            Err(Errno::EAGAIN) => to.writable = false,
            Err(Errno::EINTR) => {}
            Err(_) => return Err(Side::To),
        }
    }
    Ok(taken)
}

/// Datagrams of the guest's socket, each with its length, into the stream. While the stream is full they are lost, as a
/// network loses them.
fn frame(from: &mut End, to: &mut End, way: &mut Way, buffer: &mut [u8]) -> Result<bool, Side> {
    let mut moved = 0;
    while moved < TURN {
        let free = drain(to, way)?;
        if !from.readable {
            return Ok(false);
        }
        let Some((prefix, space)) = buffer.split_first_chunk_mut::<2>() else { return Ok(false) };
        match read(&from.fd, space.get_mut(..DATAGRAM_MAX).unwrap_or_default()) {
            Ok(n) if free => {
                *prefix = u16::try_from(n).unwrap_or(u16::MAX).to_be_bytes();
                let framed = buffer.get(..2 + n).unwrap_or_default();
                let taken = pass(to, framed)?;
                // A frame that has begun must end: the rest waits.
                if taken > 0 {
                    way.waiting.keep(framed.get(taken..).unwrap_or_default());
                }
                moved += n + 2;
            }
            Ok(n) => moved += n + 2,
            Err(Errno::EAGAIN) => from.readable = false,
            // Nobody listens there now (ICMP port unreachable): somebody may again.
            Err(Errno::EINTR | Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => moved += 1,
            Err(_) => return Err(Side::From),
        }
    }
    Ok(true)
}

/// Datagrams out of the stream, to the guest's socket.
fn unframe(from: &mut End, to: &mut End, way: &mut Way, buffer: &mut [u8]) -> Result<bool, Side> {
    let mut moved = 0;
    while moved < TURN {
        while let Some((prefix, rest)) =
            way.waiting.bytes.get(way.at..).unwrap_or_default().split_first_chunk::<2>()
        {
            let len = usize::from(u16::from_be_bytes(*prefix));
            let Some(datagram) = rest.get(..len) else { break };
            // What the socket does not take is lost. An error of an earlier datagram says nothing about this one.
            if let Err(Errno::ECONNREFUSED | Errno::EINTR) = write(&to.fd, datagram) {
                let _ = write(&to.fd, datagram);
            }
            way.at += 2 + len;
        }
        if !way.has_waiting() {
            *way = Way { eof: way.eof, shut: way.shut, ..Way::default() };
        }
        if !from.readable || way.eof {
            return Ok(false);
        }
        match read(&from.fd, chunk(buffer)) {
            Ok(0) => way.eof = true,
            Ok(n) => {
                moved += n;
                way.waiting.bytes.drain(..way.at);
                way.at = 0;
                way.waiting.keep(buffer.get(..n).unwrap_or_default());
            }
            Err(Errno::EAGAIN) => from.readable = false,
            Err(Errno::EINTR) => {}
            Err(_) => return Err(Side::From),
        }
    }
    Ok(true)
}

impl AsFd for End {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::UdpSocket;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The application's end, the host's end, and what is between.
    fn lab(first: &[u8]) -> (UnixStream, UnixStream, Carried) {
        let (application, near) = UnixStream::pair().expect("a pair");
        let (host, far) = UnixStream::pair().expect("a pair");
        near.set_nonblocking(true).expect("nonblocking");
        far.set_nonblocking(true).expect("nonblocking");
        (application, host, Carried::new(near.into(), far.into(), first.to_vec(), false))
    }

    /// Turns until nothing moves, with every descriptor noted as ready.
    fn turns(carried: &mut Carried) -> Turn {
        let mut buffer = vec![0; BUFFER];
        carried.near.note(true, true);
        carried.far.note(true, true);
        loop {
            match carried.turn(&mut buffer) {
                Turn::Again => {}
                other => return other,
            }
        }
    }

    #[test]
    fn the_first_message_goes_before_the_bytes_and_ends_are_passed_on_one_by_one() {
        let (mut application, mut host, mut carried) = lab(b"first");
        application.write_all(b" and the rest").expect("room");
        application.shutdown(std::net::Shutdown::Write).expect("open");
        assert_eq!(turns(&mut carried), Turn::Idle);
        let mut got = String::new();
        host.read_to_string(&mut got).expect("an end");
        assert_eq!(got, "first and the rest");
        host.write_all(b"answer").expect("the other direction is open");
        assert_eq!(turns(&mut carried), Turn::Idle);
        drop(host);
        assert_eq!(turns(&mut carried), Turn::Done);
        let mut answer = String::new();
        application.read_to_string(&mut answer).expect("an end");
        assert_eq!(answer, "answer");
    }

    #[test]
    fn no_byte_is_lost_when_the_receiver_is_slow() {
        let (mut application, mut host, mut carried) = lab(b"");
        host.set_nonblocking(true).expect("nonblocking");
        application.set_nonblocking(true).expect("nonblocking");
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
        let (mut at, mut got, mut buffer) = (0, Vec::new(), vec![0; 7001]);
        while got.len() < sent.len() {
            at += application.write(&sent[at..]).unwrap_or(0);
            assert_eq!(turns(&mut carried), Turn::Idle);
            if let Ok(n) = host.read(&mut buffer) {
                got.extend_from_slice(&buffer[..n]);
            }
        }
        assert!(got == sent);
        assert!(carried.to_host.waiting.bytes.capacity() <= BUFFER, "a way holds one buffer at most");
    }

    #[test]
    fn what_slow_receivers_hold_is_bounded_and_its_buffers_are_used_again() {
        let spare = || SPARE.with_borrow(|s| (s.held, s.buffers.len()));
        for _ in 0..2 {
            let mut labs: Vec<_> = (0..HELD + 16).map(|_| lab(b"")).collect();
            let mut sent = vec![0; labs.len()];
            for ((application, _, carried), sent) in labs.iter_mut().zip(&mut sent) {
                application.set_nonblocking(true).expect("nonblocking");
                // Until nothing moves: the host does not read.
                while let Ok(n @ 1..) = application.write(&[7; BUFFER]) {
                    *sent += n;
                    assert_eq!(turns(carried), Turn::Idle);
                }
                assert!(carried.to_host.waiting.bytes.len() <= BUFFER);
            }
            assert_eq!(spare().0, HELD);
            for (.., carried) in labs.iter().skip(HELD) {
                assert!(carried.to_host.waiting.bytes.capacity() <= 2 * SMALL, "those beyond hold little");
            }
            for ((_, host, carried), sent) in labs.iter_mut().zip(&sent) {
                host.set_nonblocking(true).expect("nonblocking");
                let (mut got, mut buffer) = (0, vec![0; BUFFER]);
                while got < *sent {
                    got += host.read(&mut buffer).expect("bytes");
                    assert_eq!(turns(carried), Turn::Idle);
                }
            }
            assert_eq!(spare(), (0, HELD), "given back, and no more are ever made");
        }
    }

    #[test]
    fn a_host_that_is_gone_is_told_apart_from_one_that_has_ended() {
        let (mut application, host, mut carried) = lab(b"");
        drop(host);
        assert_eq!(turns(&mut carried), Turn::Idle, "its direction has ended");
        application.write_all(b"x").expect("room");
        assert_eq!(turns(&mut carried), Turn::FarReset);
    }

    #[test]
    fn datagrams_keep_their_borders_and_an_empty_one_is_one() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let near = UdpSocket::bind("127.0.0.1:0").expect("a port");
        near.connect(server.local_addr().expect("bound")).expect("connect");
        near.set_nonblocking(true).expect("nonblocking");
        let (mut host, far) = UnixStream::pair().expect("a pair");
        far.set_nonblocking(true).expect("nonblocking");
        let mut carried = Carried::new(near.into(), far.into(), Vec::new(), true);
        // The second datagram is torn in the middle.
        host.write_all(b"\0\x03one\0\0\0\x05thr").expect("room");
        turns(&mut carried);
        host.write_all(b"ee").expect("room");
        turns(&mut carried);
        let mut buffer = [0; 64];
        let mut from = None;
        let got: Vec<Vec<u8>> = (0..3)
            .map(|_| {
                let (n, peer) = server.recv_from(&mut buffer).expect("a datagram");
                from = Some(peer);
                buffer[..n].to_vec()
            })
            .collect();
        assert_eq!(got, [b"one".to_vec(), Vec::new(), b"three".to_vec()]);
        server.send_to(b"reply", from.expect("a sender")).expect("sent");
        let mut framed = [0; 7];
        turns(&mut carried);
        host.read_exact(&mut framed).expect("a frame");
        assert_eq!(&framed, b"\0\x05reply");
        drop(host);
        assert_eq!(turns(&mut carried), Turn::Done);
    }
}
