//! A vhost-user-net back end: the VMM shares the guest's memory, and frames are copied between it and the stack.
//!
//! ```text
//!  VMM ══ unix socket ═► control: features, memory, rings ─► Device
//!  guest ─ kick (eventfd) ─► transmit ring ─► one copy into a scratch buffer ─► Netstack
//!  guest ◄ call (eventfd) ── receive ring ◄── one copy out of a scratch buffer ◄ Netstack (FrameSink)
//! ```
//! One front end, one queue pair, one thread: everything happens in the calls of the network's driver. Nothing is
//! allocated per frame, and a turn notifies the guest once per ring at most, and only when it wants it.
//!
//! **Sources**: the vhost-user protocol as QEMU documents it (docs/interop/vhost-user.rst), virtio 1.2 §2.7 for split
//! rings and §5.1 for the network device. The messages are parsed by the `vhost` crate, memory is mapped and copied
//! by `vm-memory`; the rings are our own (see `ring`).
//!
//! **Who is trusted.** The front end is the VMM, the user's own: it is trusted not to shrink the files it shares
//! (that would be SIGBUS), and with nothing else. What it sends wrong ends the link. The guest is not trusted at all:
//! any number in a ring may be anything and change at any time. Descriptors are copied, then checked, then used; frames
//! are copied, then parsed. A bad chain is given back and counted, a bad ring ends the link and nothing else.
//!
//! **Blocking.** The crate's request handler reads a message with blocking calls, and a time limit on the socket would
//! not help: it tries again for ever. So a message is left alone until all of its bytes are there (`MSG_PEEK`), and none
//! is read while the front end leaves so many answers unread that writing one could block. A message torn apart waits
//! for its rest, as everything behind it does, and the frames go on. A message must come in one `sendmsg` with its
//! descriptors, as every front end sends it.

mod control;
mod memory;
mod message;
mod ring;
#[cfg(test)]
mod tests;
mod to_guest;
mod to_host;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use portway_netstack::{FrameSink, Offload};
use vhost::vhost_user::BackendReqHandler;

use self::control::{Device, TO_GUEST, TO_HOST, feature};
use self::ring::BadRing;
use self::to_guest::{Shape, ToGuest};
use self::to_host::ToHost;
use super::{Batch, vnet};

/// The most bytes of a frame: 64 KiB of IP packet behind Ethernet's header and a VLAN tag, less what cannot be.
const LARGEST: usize = 65_550;
/// Bytes of the virtio-net header.
const HEADER: usize = vnet::LEN;
/// Messages one call handles.
const MESSAGES: usize = 64;
/// Bytes of a message's header: request, flags, size.
const MESSAGE_HEADER: usize = 12;
/// The most bytes behind it.
const MESSAGE: usize = 4096;
/// How long after something moved [`VhostUser::look_again`] looks.
const LOOK: Duration = Duration::from_millis(1);

/// What messages changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// [`VhostUser::kick_fds`] gives others. Those it gave before stay open until the next call of
    /// [`VhostUser::handle_control`], so that they can be deregistered.
    pub kicks: bool,
    /// For the guest it is another device: it was set up for the first time or reset, or has other features. Flows of
    /// the port are to be reset, and [`VhostUser::offload`] to be asked again. A pause of the VM is no such change.
    pub device: bool,
    /// More messages may wait.
    pub more: bool,
}

/// One front end and the device it drives.
pub struct VhostUser {
    stream: UnixStream,
    handler: BackendReqHandler<Mutex<Device>>,
    /// Where the device is while a message is handled, and only then: no lock is taken for frames.
    lent: Arc<Mutex<Device>>,
    device: Device,
    shape: Shape,
    to_host: ToHost,
    mtu: usize,
    /// What made the receive ring useless, until somebody can be told.
    broken: Option<BadRing>,
    /// When to look again whether guest and device wait for each other.
    look_at: Option<Instant>,
}

impl fmt::Debug for VhostUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUser")
            .field("device", &self.device)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl VhostUser {
    /// Serves the front end at the other end of `stream`. `mtu` is the largest packet of the link, in bytes.
    ///
    /// # Errors
    /// When the socket cannot be made blocking or duplicated.
    pub fn new(stream: UnixStream, mtu: u16) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let lent = Arc::new(Mutex::new(Device::default()));
        let device = Device { to_guest: ToGuest::new(), ..Device::default() };
        Ok(Self {
            handler: BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&lent)),
            stream,
            lent,
            shape: device.shape(mtu.into()),
            device,
            to_host: ToHost::new(),
            mtu: mtu.into(),
            broken: None,
            look_at: None,
        })
    }

    /// The socket: when it is readable, [`Self::handle_control`] has something to do.
    #[must_use]
    pub fn control_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Handles the messages that wait whole, without ever blocking.
    ///
    /// # Errors
    /// When the front end is gone or broke the protocol: the link is down.
    pub fn handle_control(&mut self) -> io::Result<Changes> {
        self.device.retired.clear();
        let mut handled = 0;
        while handled < MESSAGES && self.message_waits()? {
            handled += 1;
            if let Some(message) = message::take(&mut self.stream)? {
                self.device.ours(message)?;
                self.device.settle()?;
                continue;
            }
            let lend = |device: &mut Device| {
                std::mem::swap(&mut *self.lent.lock().unwrap_or_else(PoisonError::into_inner), device);
            };
            lend(&mut self.device);
            let result = self.handler.handle_request();
            lend(&mut self.device);
            result.map_err(|e| io::Error::other(format!("vhost-user: {e}")))?;
            self.device.settle()?;
        }
        self.shape = self.device.shape(self.mtu);
        self.refill();
        self.check()?;
        Ok(Changes {
            kicks: std::mem::take(&mut self.device.kicks_changed),
            device: std::mem::take(&mut self.device.device_changed),
            more: handled == MESSAGES,
        })
    }

    /// Whether a message waits whole, and its answer could be written.
    fn message_waits(&self) -> io::Result<bool> {
        let mut bytes = [0; MESSAGE_HEADER + MESSAGE];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let n = match recv(self.stream.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => return Err(io::Error::other("end of file")),
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let [_, _, _, _, _, _, _, _, s0, s1, s2, s3] = bytes[..MESSAGE_HEADER] else { return Ok(false) };
        let size = u32::from_le_bytes([s0, s1, s2, s3]) as usize;
        if n >= MESSAGE_HEADER && size > MESSAGE {
            return Err(io::Error::other(format!("a message of {size} bytes, {MESSAGE} are the most")));
        }
        if n < MESSAGE_HEADER || n < MESSAGE_HEADER + size {
            if self.ready(PollFlags::POLLHUP)? {
                return Err(io::Error::other("end of file in the midst of a message"));
            }
            return Ok(false);
        }
        if !self.ready(PollFlags::POLLOUT)? {
            return Err(io::Error::other("the front end asks and does not read the answers"));
        }
        Ok(true)
    }

    fn ready(&self, what: PollFlags) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.stream.as_fd(), what)];
        poll(&mut fds, PollTimeout::ZERO)?;
        Ok(fds[0].revents().is_some_and(|r| r.intersects(what)))
    }

    /// The eventfds by which the guest says that it did something to a queue; each is readable then, and
    /// [`Self::note_kick`] to be called.
    pub fn kick_fds(&self) -> impl Iterator<Item = (usize, RawFd)> {
        let fds = self.device.rings.iter().map(|r| r.kick.as_ref().map(|k| k.as_fd()));
        fds.enumerate().filter_map(|(queue, fd): (_, Option<BorrowedFd<'_>>)| Some((queue, fd?.as_raw_fd())))
    }

    /// The guest has kicked a queue.
    pub fn note_kick(&mut self, queue: usize) {
        let Some(ring) = self.device.rings.get_mut(queue) else { return };
        ring.drain_kick();
        if queue == TO_GUEST {
            self.refill();
        }
    }

    /// Whether the guest takes partial checksums and segments of TCP over both IPs: then the stack may send them.
    #[must_use]
    pub const fn offload(&self) -> bool {
        self.device.has(feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6)
    }

    /// The features the guest has accepted, as virtio numbers them.
    #[must_use]
    pub const fn features(&self) -> u64 {
        self.device.acked
    }

    /// Whether [`Self::receive`] may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.device.rings[TO_HOST].ready
    }

    /// Hands one bounded batch of frames from the guest to `handle`; each is a copy that the guest cannot change.
    ///
    /// They may have partial checksums and segments whatever [`Self::offload`] says: that is about the other direction.
    ///
    /// # Errors
    /// When the ring is beyond use: the link is down.
    pub fn receive(&mut self, handle: impl FnMut(&[u8], Offload)) -> io::Result<Batch> {
        let Device { rings, memory, .. } = &mut self.device;
        let ring = &mut rings[TO_HOST];
        if !ring.runs() {
            ring.ready = false;
            return Ok(Batch { more: false, frames: 0, bytes: 0 });
        }
        self.look_at = Some(Instant::now() + LOOK);
        self.to_host.receive(ring, memory, self.shape.header, handle)
    }

    /// When [`Self::look_again`] has something to do.
    #[must_use]
    pub const fn wants_look(&self) -> Option<Instant> {
        self.look_at
    }

    /// Looks for news that nobody told of. Guest and device each write what they wait for and then look whether it has
    /// come already; that needs a barrier between the two on both sides, and QEMU's TCG gives a guest with one CPU none
    /// (it leaves barriers out where it runs one thread). Without this look a stream could stop for good.
    ///
    /// # Errors
    /// When a ring is beyond use: the link is down.
    pub fn look_again(&mut self) -> io::Result<()> {
        self.look_at = None;
        for (queue, ring) in self.device.rings.iter_mut().enumerate() {
            if !ring.runs() {
                continue;
            }
            if ring.remind()? {
                tracing::debug!(queue, "the guest was told again");
            }
            if queue == TO_HOST && !ring.ready && ring.look().map_err(io::Error::other)? {
                tracing::debug!("the guest has sent without a kick");
                ring.ready = true;
            }
        }
        self.refill();
        self.check()
    }

    /// Shows the guest what was used, and tells it once per queue when it wants that.
    ///
    /// # Errors
    /// When a ring is beyond use, or the guest cannot be notified: the link is down.
    pub fn flush(&mut self) -> io::Result<()> {
        for ring in &mut self.device.rings {
            if ring.publish()? {
                self.look_at = Some(Instant::now() + LOOK);
            }
        }
        self.refill();
        self.check()
    }

    /// Whether the guest has to post buffers before [`FrameSink::has_room`] is true; it kicks queue 0 then.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        !self.has_room()
    }

    /// Frames and bytes ever put into the receive ring.
    #[must_use]
    pub const fn written(&self) -> (u64, u64) {
        (self.device.to_guest.frames, self.device.to_guest.bytes)
    }

    /// Frames from and to the guest that were lost: bad chains, and frames that did not fit.
    #[must_use]
    pub const fn dropped(&self) -> (u64, u64) {
        (self.to_host.dropped, self.device.to_guest.dropped)
    }

    /// Takes buffers until there is room, or asks the guest to say when it posts more.
    fn refill(&mut self) {
        let Device { rings, memory, to_guest, .. } = &mut self.device;
        let ring = &mut rings[TO_GUEST];
        if !ring.runs() || self.broken.is_some() {
            return;
        }
        let shape = self.shape;
        let mut attempt = || {
            // Bounded: a guest cannot offer more than its ring has, or it is an error.
            for _ in 0..=ring.size {
                if to_guest.refill(ring, memory, shape)? {
                    return ring.disarm();
                }
                if !ring.arm()? {
                    return Ok(());
                }
            }
            Err(BadRing::Useless)
        };
        self.broken = attempt().err();
    }

    fn check(&self) -> io::Result<()> {
        self.broken.map_or(Ok(()), |error| Err(io::Error::other(error)))
    }
}

impl FrameSink for VhostUser {
    fn has_room(&self) -> bool {
        let ring = &self.device.rings[TO_GUEST];
        self.broken.is_none() && ring.runs() && self.device.to_guest.has_room(ring, self.shape)
    }

    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let Device { rings, memory, to_guest, .. } = &mut self.device;
        let ring = &mut rings[TO_GUEST];
        if self.broken.is_some() || !ring.runs() {
            return None;
        }
        let shape = self.shape;
        let written = to_guest
            .frame(ring, memory, shape, (len, offload), fill)
            .and_then(|result| to_guest.refill(ring, memory, shape).map(|_| result));
        match written {
            Ok(result) => result,
            Err(error) => {
                self.broken = Some(error);
                None
            }
        }
    }
}
