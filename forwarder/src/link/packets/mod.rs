//! A VMM on a socket that keeps frames apart: `dgram` and `seqpacket`.
//!
//! ```text
//!  VMM ═► recvmmsg(2): up to 32 frames ─► one after the other, in place ─► Netstack
//!  VMM ◄═ sendmmsg(2): up to 32 frames ◄─ one buffer, frame behind frame ◄─ written in place by Netstack
//! ```
//! (On macOS a system call for each frame: [`calls`].)
//!
//! A datagram socket we bind has no connection that would say who is at the other end. The peer is the first sender that has
//! an address itself; others are ignored and counted while its socket lives. When another speaks, or a frame to the peer finds nobody
//! (`ECONNREFUSED`, `ENOENT`), it is seen whether it does; if not, the next sender takes over. vfkit and krunkit begin with a datagram of the four bytes `VFKT`,
//! which is no frame.

#[cfg(target_os = "linux")]
mod batched;
mod calls;
#[cfg(any(test, not(target_os = "linux")))]
mod single;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{UnixAddr, connect};
use portway_netstack::{FrameSink, Offload};

#[cfg(target_os = "linux")]
use self::batched::Batched as System;
use self::calls::{Calls, FRAMES};
#[cfg(not(target_os = "linux"))]
use self::single::Single as System;
use super::Batch;

/// The largest frame a VMM sends or takes: libkrun and vfkit take no larger.
const LARGEST: usize = 65_550;
/// Bytes of frames that may wait before the stack is told to wait.
const ROOM: usize = 256 * 1024;
/// What vfkit and krunkit say first.
const GREETING: &[u8] = b"VFKT";

/// The attached VMM, or the socket it will send to.
pub struct Packets<C = System> {
    socket: OwnedFd,
    /// Where we listen; removed at the end.
    path: Option<PathBuf>,
    /// Who is at the other end of a socket we bound; on a connected one nobody needs to know.
    peer: Option<UnixAddr>,
    bound: bool,
    calls: C,
    received: Box<[u8]>,
    /// Frames to the guest, one behind the other, and their lengths.
    frames: Box<[u8]>,
    lengths: Vec<usize>,
    /// How many of `lengths` have left, and where the next begins in `frames`.
    sent: usize,
    start: usize,
    end: usize,
    readable: bool,
    /// The peer has closed: the end of file is still to be read, and no further event tells of it.
    closing: bool,
    writable: bool,
    written: (u64, u64),
    /// Datagrams that were no frames of the peer: too long, or of somebody else.
    ignored: u64,
    /// The peer went since this was last asked.
    lost: bool,
}

impl<C> std::fmt::Debug for Packets<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packets").field("path", &self.path).field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<C: Calls> Packets<C> {
    /// Takes a socket: one that is connected, or one that is bound where its peer will send from, as systemd makes it.
    ///
    /// # Errors
    /// When it is of another type than `kind`.
    pub fn connected(fd: OwnedFd, kind: socket2::Type) -> io::Result<Self> {
        let found = socket2::SockRef::from(&fd).r#type()?;
        if found != kind {
            return Err(io::Error::other(format!(
                "the descriptor is a socket of type {found:?}, not {kind:?}"
            )));
        }
        let connected = socket2::SockRef::from(&fd).peer_addr().is_ok();
        let mut packets = Self::new(fd, None)?;
        packets.bound = !connected;
        Ok(packets)
    }

    /// Binds a datagram socket to `path`, replacing one that nobody has.
    ///
    /// # Errors
    /// When another file is there, somebody has the socket, or it cannot be bound.
    pub fn bound(path: &Path) -> io::Result<Self> {
        crate::unix_path::clear(path, |path| UnixDatagram::unbound()?.connect(path))?;
        let socket = UnixDatagram::bind(path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: cannot listen there: {error}", path.display()))
        })?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Self::new(socket.into(), Some(path.to_owned()))
    }

    fn new(fd: OwnedFd, path: Option<PathBuf>) -> io::Result<Self> {
        let options = socket2::SockRef::from(&fd);
        options.set_nonblocking(true)?;
        // What vfkit asks of its peers; the host's limits decide.
        let _ = options.set_send_buffer_size(1 << 20);
        let _ = options.set_recv_buffer_size(4 << 20);
        Ok(Self {
            socket: fd,
            bound: path.is_some(),
            path,
            peer: None,
            calls: C::default(),
            received: vec![0; FRAMES * (LARGEST + 1)].into(),
            frames: vec![0; ROOM + LARGEST].into(),
            lengths: Vec::new(),
            sent: 0,
            start: 0,
            end: 0,
            readable: true,
            closing: false,
            writable: true,
            written: (0, 0),
            ignored: 0,
            lost: false,
        })
    }

    /// The descriptor to watch.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// News from the kernel.
    pub const fn note(&mut self, readable: bool, writable: bool, closed: bool) {
        self.readable |= readable || closed;
        self.closing |= closed;
        self.writable |= writable;
    }

    /// Whether `receive` may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.readable
    }

    /// One batch of frames.
    ///
    /// # Errors
    /// When the peer of a connected socket is gone.
    pub fn receive(&mut self, mut handle: impl FnMut(&[u8])) -> io::Result<Batch> {
        let mut batch = Batch { more: true, frames: 0, bytes: 0 };
        let Self { socket, calls, received, bound, peer, ignored, .. } = self;
        let mut end = false;
        let mut first = true;
        let (mut looked, mut gone) = (false, false);
        let done = calls.receive(socket.as_raw_fd(), received, LARGEST + 1, *bound, |message| {
            let is_first = std::mem::replace(&mut first, false);
            if gone {
                // What the next one says is heard when the stack has forgotten the one before.
                *ignored += 1;
                return;
            }
            if *bound {
                match (message.from, *peer) {
                    (Some(from), None) => {
                        tracing::info!(peer = %from, "VMM attached");
                        *peer = Some(from);
                    }
                    (Some(from), Some(known)) if from == known => {}
                    (from, known) => {
                        // Once in a batch: nothing may ever be sent to a peer that is gone, and then no error tells of it.
                        if let Some(known) = known.filter(|_| from.is_some())
                            && !std::mem::replace(&mut looked, true)
                            && is_gone(&known)
                        {
                            tracing::info!(peer = %known, "VMM detached");
                            *peer = None;
                            gone = true;
                        }
                        *ignored += 1;
                        return;
                    }
                }
            }
            match message.frame {
                Some(frame) if frame.len() <= LARGEST && frame != GREETING => {
                    batch.frames += 1;
                    batch.bytes += frame.len() as u64;
                    handle(frame);
                }
                Some(GREETING) => {}
                // On a connected seqpacket socket nothing at all is the end.
                None if !*bound && is_first => end = true,
                Some(_) | None => *ignored += 1,
            }
        });
        let count = match done {
            Ok(_) if end => return Err(io::Error::other("end of file")),
            Ok(count) => count,
            Err(Errno::EAGAIN) => {
                self.readable = false;
                return Ok(Batch { more: false, ..batch });
            }
            Err(Errno::EINTR) => return Ok(batch),
            Err(e) => return Err(e.into()),
        };
        if gone {
            self.lost = true;
            self.forget();
        }
        batch.more = count == FRAMES;
        self.readable = batch.more || self.closing;
        Ok(batch)
    }

    /// Sends what waits, as far as the VMM takes it.
    ///
    /// # Errors
    /// When the peer of a connected socket is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.writable && self.sent < self.lengths.len() {
            if self.bound && self.peer.is_none() {
                // Nobody has sent yet, so nothing waits for anybody.
                self.forget();
                break;
            }
            let count = (self.lengths.len() - self.sent).min(FRAMES);
            let frames = &self.frames[self.start..self.end];
            let lengths = &self.lengths[self.sent..self.sent + count];
            match self.calls.send(self.socket.as_raw_fd(), self.peer.as_ref(), frames, lengths) {
                Ok(left) => {
                    self.start += self.lengths[self.sent..self.sent + left].iter().sum::<usize>();
                    self.sent += left;
                    self.writable = left == count;
                }
                Err(Errno::EAGAIN | Errno::ENOBUFS) => self.writable = false,
                Err(Errno::EINTR) => {}
                // The one we sent to is gone: the next to send takes over.
                Err(Errno::ECONNREFUSED | Errno::ENOENT) if self.bound => {
                    tracing::info!(peer = self.peer.map(|p| p.to_string()), "VMM detached");
                    self.peer = None;
                    self.lost = true;
                    self.forget();
                }
                Err(e) => return Err(e.into()),
            }
        }
        if self.sent == self.lengths.len() {
            self.forget();
        }
        Ok(())
    }

    fn forget(&mut self) {
        self.lengths.clear();
        (self.sent, self.start, self.end) = (0, 0, 0);
    }

    /// Whether the peer went since this was last asked: another may come in its place.
    pub const fn take_lost(&mut self) -> bool {
        std::mem::replace(&mut self.lost, false)
    }

    /// Whether the VMM has to read before more can be sent.
    #[must_use]
    pub const fn is_blocked(&self) -> bool {
        !self.writable
    }

    /// Frames and bytes that were ever written.
    #[must_use]
    pub const fn written(&self) -> (u64, u64) {
        self.written
    }

    /// Datagrams that were no frames of the peer.
    #[must_use]
    pub const fn ignored(&self) -> u64 {
        self.ignored
    }
}

/// Whether nobody has the socket at `peer` any more. Where that cannot be known, somebody has.
fn is_gone(peer: &UnixAddr) -> bool {
    let Ok(probe) = UnixDatagram::unbound() else { return false };
    matches!(connect(probe.as_raw_fd(), peer), Err(Errno::ECONNREFUSED | Errno::ENOENT))
}

impl<C> Drop for Packets<C> {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl<C> FrameSink for Packets<C> {
    fn has_room(&self) -> bool {
        self.end < ROOM
    }

    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let room = self.frames.get_mut(self.end..)?.get_mut(..len).filter(|_| len <= LARGEST)?;
        let result = fill(room);
        self.end += len;
        self.lengths.push(len);
        self.written.0 += 1;
        self.written.1 += len as u64;
        Some(result)
    }
}

#[cfg(test)]
mod tests;
