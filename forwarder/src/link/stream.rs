//! A VMM on a stream socket: `qemu`, and `vpnkit` once its handshake is done; or on two pipes: `stdio`.
//!
//! ```text
//!  VMM ═► read(2), large ─► Framing ─► one frame after the other, in place ─► Netstack
//!  VMM ◄═ write(2), many frames ═ TransmitBuffer ◄─ written in place by Netstack (FrameSink)
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::framing::{Framing, Prefix};
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
        }
    }

    /// The descriptors to watch: what is read, and what is written where that is another.
    #[must_use]
    pub fn fds(&self) -> (RawFd, Option<RawFd>) {
        (self.read.as_raw_fd(), self.write.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// News from the kernel.
    pub const fn note(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Whether `receive` may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.readable
    }

    /// One `read`.
    ///
    /// # Errors
    /// When the peer is gone, or breaks the framing.
    pub fn receive(&mut self, handle: impl FnMut(&[u8])) -> io::Result<Batch> {
        let batch = self.framing.receive(&mut Reading(&self.read), handle)?;
        self.readable = batch.more;
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
