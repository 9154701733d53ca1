//! The system calls of a socket that keeps frames apart: many frames each where the system can (`batched`), one each elsewhere
//! (`single`). Linux compiles both, and runs the same tests with both.

use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sys::socket::UnixAddr;

/// Frames of one call of [`Calls`].
pub(super) const FRAMES: usize = 32;

/// A datagram that came.
#[derive(Debug)]
pub struct Received<'a> {
    /// What is in it; `None`: nothing at all.
    pub frame: Option<&'a [u8]>,
    /// Who sent it, if that was asked and the sender's socket has a name.
    pub from: Option<UnixAddr>,
}

/// How datagrams are received and sent. Neither call waits.
pub trait Calls: Default {
    /// Receives at most [`FRAMES`] datagrams, each into `room` bytes of `buffer`, and hands them on; answers how many there were.
    /// `senders`: somebody asks who sent them.
    ///
    /// # Errors
    /// When nothing came: EAGAIN when nothing is there, EINTR, or what is wrong with the socket.
    fn receive(
        &mut self,
        fd: RawFd,
        buffer: &mut [u8],
        room: usize,
        senders: bool,
        each: impl FnMut(Received<'_>),
    ) -> Result<usize, Errno>;

    /// Sends the frames that lie one behind the other in `frames`, at most [`FRAMES`] of them; answers how many left.
    ///
    /// # Errors
    /// When none left: EAGAIN when there is no room, EINTR, or what is wrong with the socket or its peer.
    fn send(
        &mut self,
        fd: RawFd,
        to: Option<&UnixAddr>,
        frames: &[u8],
        lengths: &[usize],
    ) -> Result<usize, Errno>;
}
