//! A VMM on a stream socket: `qemu`, and `vpnkit` once its handshake is done; or on two pipes: `stdio`.
//!
//! ```text
//!  VMM ═► read(2), large ─► Framing ─► one frame after the other, in place ─► Netstack
//!  VMM ◄═ write(2), many frames ═ TransmitBuffer ◄─ written in place by Netstack (FrameSink)
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::framing::{Framing, Prefix};
use super::vpnkit::{Handshake, Hello, Step};
use super::{Batch, TransmitBuffer};

/// The attached VMM.
#[derive(Debug)]
pub struct Stream {
    read: File,
    /// `None`: the same descriptor as `read`.
    write: Option<File>,
    framing: Framing,
    /// Where the stack writes frames to the guest.
    pub transmit: TransmitBuffer,
    readable: bool,
    writable: bool,
    /// The peer has closed: the end of file, or an error, is still to be read, and no further event tells of it.
    closing: bool,
    /// vpnkit's handshake, until it is done.
    handshake: Option<Handshake>,
    /// Who came in by it; the answer is still to be given.
    hello: Option<Hello>,
}

impl Stream {
    /// Takes a connected stream socket.
    ///
    /// # Errors
    /// When the descriptor is something else.
    pub fn socket(fd: OwnedFd, prefix: Prefix) -> io::Result<Self> {
        let socket = socket2::SockRef::from(&fd);
        if socket.r#type()? != socket2::Type::STREAM {
            return Err(io::Error::other("the descriptor is not a stream socket"));
        }
        socket.set_nonblocking(true)?;
        // More room in the kernel is fewer times the two sides wait for each other; the host's limit decides.
        let _ = socket.set_send_buffer_size(4 << 20);
        let _ = socket.set_recv_buffer_size(4 << 20);
        Ok(Self::new(fd.into(), None, prefix))
    }

    /// Takes a pipe (or whatever else) for each direction.
    ///
    /// # Errors
    /// When they cannot be made non-blocking.
    pub fn pipes(read: OwnedFd, write: OwnedFd, prefix: Prefix) -> io::Result<Self> {
        for fd in [&read, &write] {
            crate::fd::set_nonblocking(fd)?;
        }
        Ok(Self::new(read.into(), Some(write.into()), prefix))
    }

    fn new(read: File, write: Option<File>, prefix: Prefix) -> Self {
        Self {
            read,
            write,
            framing: Framing::new(prefix),
            transmit: TransmitBuffer::new(prefix),
            readable: true,
            writable: true,
            closing: false,
            handshake: None,
            hello: None,
        }
    }

    /// Begins with vpnkit's handshake.
    #[must_use]
    pub fn greeted(mut self) -> Self {
        self.handshake = Some(Handshake::new());
        self
    }

    /// Who has come in and waits for [`Self::answer`].
    pub const fn take_hello(&mut self) -> Option<Hello> {
        self.hello.take()
    }

    /// Answers a [`Hello`]; frames follow.
    pub fn answer(&mut self, response: &[u8]) {
        self.transmit.raw(response);
        self.handshake = None;
    }

    /// The bytes of a handshake that have come.
    fn greet(&mut self) -> io::Result<Batch> {
        let mut bytes = [0; 256];
        let mut step = Step::More(Vec::new());
        let mut more = false;
        match (&self.read).read(&mut bytes) {
            Ok(0) => return Err(io::Error::other("end of file")),
            Ok(n) => {
                more = n == bytes.len();
                if let Some(handshake) = &mut self.handshake {
                    step = handshake.feed(&bytes[..n]);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => more = true,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        self.readable = more || self.closing;
        match step {
            Step::More(answer) => self.transmit.raw(&answer),
            Step::Hello(answer, hello) => {
                self.transmit.raw(&answer);
                self.hello = Some(hello);
            }
            Step::Close(answer) => {
                self.transmit.raw(&answer);
                self.flush()?;
                return Err(io::Error::other("it does not speak vpnkit's handshake, version 22"));
            }
        }
        Ok(Batch { more, frames: 0, bytes: 0 })
    }

    /// The descriptors to watch: what is read, and what is written where that is another.
    #[must_use]
    pub fn fds(&self) -> (RawFd, Option<RawFd>) {
        (self.read.as_raw_fd(), self.write.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// News from the kernel.
    pub const fn note(&mut self, readable: bool, writable: bool, closed: bool) {
        self.readable |= readable || closed;
        self.writable |= writable;
        self.closing |= closed;
    }

    /// Whether `receive` may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.readable
    }

    /// Whether frames may be written: not before the handshake is answered.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.handshake.is_none()
    }

    /// One `read`.
    ///
    /// # Errors
    /// When the peer is gone, or breaks the framing.
    pub fn receive(&mut self, handle: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<Batch> {
        if self.handshake.is_some() {
            return self.greet();
        }
        let batch = self.framing.receive(&mut Reading(&self.read), handle)?;
        self.readable = batch.more || self.closing;
        Ok(batch)
    }

    /// Writes what waits, as far as the VMM takes it.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut to = self.write.as_ref().unwrap_or(&self.read);
        while self.writable && !self.transmit.is_empty() {
            match to.write(self.transmit.pending()) {
                Ok(written) => self.writable = self.transmit.take(written),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether the VMM has to read before more can be written.
    #[must_use]
    pub const fn is_blocked(&self) -> bool {
        !self.writable
    }
}

struct Reading<'a>(&'a File);

impl Read for Reading<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// One event tells of the bytes and of the end: the read that was short must not be the last.
    #[test]
    fn an_end_that_came_with_the_last_bytes_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut stream = Stream::socket(ours.into(), Prefix::Be32).unwrap();
        stream.receive(|_| panic!("nothing has come")).unwrap();
        assert!(!stream.wants_receive());
        (&theirs).write_all(&[0, 0, 1, 0, 1, 2, 3]).unwrap();
        drop(theirs);
        stream.note(true, true, true);
        stream.receive(|_| panic!("no frame is whole")).unwrap();
        assert!(stream.wants_receive());
        stream.receive(|_| panic!("no frame is whole")).unwrap_err();
    }
}
