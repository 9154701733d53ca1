//! The back end of a vhost-user device: the VMM shares the guest's memory, and rings in it carry buffers both ways.
//!
//! ```text
//!  VMM ══ unix socket ═► FrontEnd: message ─► control: features, memory, rings ─► Device
//!  guest ─ kick (eventfd) ─► ring ─► whoever drives the device ─► ring ─ call (eventfd) ─► guest
//! ```
//! What is common to the network card (`link::vhost_user`) and to vsock (`vsock::device`). One front end; everything
//! happens in the calls of the thread that drives the device.
//!
//! **Sources**: the vhost-user protocol as QEMU documents it (docs/interop/vhost-user.rst) and virtio 1.2 §2.7 for split
//! rings. The messages are parsed by the `vhost` crate, memory is mapped and copied by `vm-memory`; the rings are our own
//! (see `ring`).
//!
//! **Who is trusted.** The front end is the VMM, the user's own: it is trusted not to shrink the files it shares
//! (that would be SIGBUS), and with nothing else. What it sends wrong ends the connection. The guest is not trusted at
//! all: any number in a ring may be anything and change at any time. Descriptors are copied, then checked, then used;
//! what is in buffers is copied, then parsed. A bad chain is given back and counted, a bad ring ends the connection and
//! nothing else.
//!
//! **Blocking.** The crate's request handler reads a message with blocking calls, and a time limit on the socket would
//! not help: it tries again for ever. So a message is left alone until all of its bytes are there (`MSG_PEEK`), and none
//! is read while the front end leaves so many answers unread that writing one could block. A message torn apart waits
//! for its rest, as everything behind it does, and the data goes on. A message must come in one `sendmsg` with its
//! descriptors, as every front end sends it.

mod control;
mod from_guest;
#[cfg(test)]
pub(crate) mod lab;
mod memory;
mod message;
mod ring;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::BackendReqHandler;

pub(crate) use self::control::{Device, Kind, feature};
pub(crate) use self::from_guest::{FromGuest, Taken};
pub(crate) use self::memory::Memory;
pub(crate) use self::ring::{BadChain, BadRing, Buffer, Ring};

/// Messages one call handles.
const MESSAGES: usize = 64;
/// Bytes of a message's header: request, flags, size.
const MESSAGE_HEADER: usize = 12;
/// The most bytes behind it.
const MESSAGE: usize = 4096;

/// What messages changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// The kicks are others. Those given before stay open until messages are handled again, so that they can be
    /// deregistered.
    pub kicks: bool,
    /// For the guest it is another device: it was set up for the first time or reset, or has other features. A pause of
    /// the VM is no such change.
    pub device: bool,
    /// More messages may wait.
    pub more: bool,
}

/// One front end, and the device it sets up.
pub(crate) struct FrontEnd<K: Kind, const RINGS: usize> {
    stream: UnixStream,
    handler: BackendReqHandler<Mutex<Device<K, RINGS>>>,
    /// Where the device is while a message is handled, and only then: no lock is taken for data.
    lent: Arc<Mutex<Device<K, RINGS>>>,
    /// The device.
    pub(crate) device: Device<K, RINGS>,
}

impl<K: Kind, const RINGS: usize> fmt::Debug for FrontEnd<K, RINGS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEnd").field("device", &self.device).finish_non_exhaustive()
    }
}

impl<K: Kind, const RINGS: usize> FrontEnd<K, RINGS> {
    /// Serves the front end at the other end of `stream`.
    ///
    /// # Errors
    /// When the socket cannot be made blocking or duplicated.
    pub(crate) fn new(stream: UnixStream, kind: K) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let lent = Arc::new(Mutex::new(Device::new(K::default())));
        let handler = BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&lent));
        Ok(Self { handler, stream, lent, device: Device::new(kind) })
    }

    /// The socket: when it is readable, [`Self::handle_messages`] has something to do.
    pub(crate) const fn socket(&self) -> &UnixStream {
        &self.stream
    }

    /// Handles the messages that wait whole, without ever blocking.
    ///
    /// # Errors
    /// When the front end is gone or broke the protocol.
    pub(crate) fn handle_messages(&mut self) -> io::Result<Changes> {
        self.device.retired.clear();
        let mut handled = 0;
        while handled < MESSAGES
            && let Some((request, flags)) = self.message_waits()?
        {
            handled += 1;
            if let Some(message) = message::take(&mut self.stream)? {
                self.device.ours(message)?;
                self.device.settle()?;
                continue;
            }
            let lend = |device: &mut Device<K, RINGS>| {
                std::mem::swap(&mut *self.lent.lock().unwrap_or_else(PoisonError::into_inner), device);
            };
            lend(&mut self.device);
            let result = self.handler.handle_request();
            lend(&mut self.device);
            result.map_err(|e| io::Error::other(format!("vhost-user: {e}")))?;
            if !self.device.negotiated {
                message::acknowledge(&mut self.stream, request, flags)?;
            }
            self.device.settle()?;
        }
        Ok(Changes {
            kicks: std::mem::take(&mut self.device.kicks_changed),
            device: std::mem::take(&mut self.device.device_changed),
            more: handled == MESSAGES,
        })
    }

    /// Request and flags of a message that waits whole, when its answer could be written.
    fn message_waits(&self) -> io::Result<Option<(u32, u32)>> {
        let mut bytes = [0; MESSAGE_HEADER + MESSAGE];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let n = match recv(self.stream.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => return Err(io::Error::other("end of file")),
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let word = |at| u32::from_ne_bytes(message::word(&bytes, at));
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        if n >= MESSAGE_HEADER && size > MESSAGE {
            return Err(io::Error::other(format!("a message of {size} bytes, {MESSAGE} are the most")));
        }
        if n < MESSAGE_HEADER || n < MESSAGE_HEADER + size {
            if self.ready(PollFlags::POLLHUP)? {
                return Err(io::Error::other("end of file in the midst of a message"));
            }
            return Ok(None);
        }
        if !self.ready(PollFlags::POLLOUT)? {
            return Err(io::Error::other("the front end asks and does not read the answers"));
        }
        Ok(Some((request, flags)))
    }

    fn ready(&self, what: PollFlags) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.stream.as_fd(), what)];
        poll(&mut fds, PollTimeout::ZERO)?;
        Ok(fds[0].revents().is_some_and(|r| r.intersects(what)))
    }

    /// The eventfds by which the guest says that it did something to a ring; each has an edge then, and
    /// [`Ring::note_kick`] is to be called. They are never read.
    pub(crate) fn kick_fds(&self) -> impl Iterator<Item = (usize, RawFd)> {
        let fds = self.device.rings.iter().map(|r| r.kick.as_ref().map(|k| k.as_fd()));
        fds.enumerate().filter_map(|(ring, fd): (_, Option<BorrowedFd<'_>>)| Some((ring, fd?.as_raw_fd())))
    }
}
