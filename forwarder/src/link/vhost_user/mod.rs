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
//! What is common to devices is in [`crate::vhost_user`]: messages, memory, rings, who is trusted with what. Here is
//! virtio 1.2 §5.1, the network device. A bad ring ends the link and nothing else.

#[cfg(test)]
mod tests;
mod to_guest;
mod to_host;

use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use portway_netstack::{FrameSink, Offload, Offloads};
use vhost::vhost_user::VhostUserProtocolFeatures;

use self::to_guest::{Shape, ToGuest};
use self::to_host::ToHost;
use super::{Batch, vnet};
pub use crate::vhost_user::Changes;
use crate::vhost_user::{BadRing, Device, FrontEnd, Kind};

/// The most bytes of a frame: 64 KiB of IP packet behind Ethernet's header and a VLAN tag, less what cannot be.
const LARGEST: usize = 65_550;
/// Bytes of the virtio-net header.
const HEADER: usize = vnet::LEN;
/// How long after something moved [`VhostUser::look_again`] looks.
const LOOK: Duration = Duration::from_millis(1);

/// The ring of frames to the guest: its receive queue.
const TO_GUEST: usize = 0;
/// The ring of frames from the guest: its transmit queue.
const TO_HOST: usize = 1;

/// Bits of the virtio features (virtio 1.2, §5.1.3).
mod feature {
    #[cfg(test)]
    pub(super) use crate::vhost_user::feature::{EVENT_IDX, PROTOCOL};
    pub(super) use crate::vhost_user::feature::{RINGS, VERSION_1};

    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
    pub(super) const HOST_USO: u64 = 1 << 56;
    /// All that this back end can.
    pub(super) const OFFERED: u64 = CSUM
        | GUEST_CSUM
        | MTU
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_USO4
        | GUEST_USO6
        | HOST_TSO4
        | HOST_TSO6
        | HOST_USO
        | MRG_RXBUF
        | RINGS;
}

impl Kind for ToGuest {
    const FEATURES: u64 = feature::OFFERED;
    // Not MQ: without it every front end takes it that there is one queue pair. With it QEMU reads the answer as pairs
    // and cloud-hypervisor as rings, and 1 would be too few for that.
    const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK
        .union(VhostUserProtocolFeatures::MTU)
        .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        .union(VhostUserProtocolFeatures::RESET_DEVICE);

    fn forget(&mut self, ring: usize) -> u16 {
        if ring != TO_GUEST {
            return 0;
        }
        let taken = self.taken();
        self.clear();
        taken
    }
}

/// What frames look like to this guest's driver.
const fn shape(device: &Device<ToGuest, 2>, mtu: usize) -> Shape {
    let segments = device.acked & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
    Shape {
        // Before VERSION_1 the header has no num_buffers unless buffers can be merged (§5.1.6.1).
        header: if device.acked & (feature::VERSION_1 | feature::MRG_RXBUF) == 0 {
            HEADER - 2
        } else {
            HEADER
        },
        // Ethernet's header and a VLAN tag.
        largest: if segments || mtu + 18 > LARGEST { LARGEST } else { mtu + 18 },
        mergeable: device.has(feature::MRG_RXBUF),
    }
}

/// One front end and the device it drives.
pub struct VhostUser {
    front: FrontEnd<ToGuest, 2>,
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
            .field("front", &self.front)
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
        let front = FrontEnd::new(stream, ToGuest::new())?;
        Ok(Self {
            shape: shape(&front.device, mtu.into()),
            front,
            to_host: ToHost::new(),
            mtu: mtu.into(),
            broken: None,
            look_at: None,
        })
    }

    /// The socket: when it is readable, [`Self::handle_control`] has something to do.
    #[must_use]
    pub fn control_fd(&self) -> RawFd {
        self.front.socket().as_raw_fd()
    }

    /// Handles the messages that wait whole, without ever blocking. After a change of the device the flows of the port are
    /// to be reset, and [`Self::offloads`] to be asked again.
    ///
    /// # Errors
    /// When the front end is gone or broke the protocol: the link is down.
    pub fn handle_control(&mut self) -> io::Result<Changes> {
        let changes = self.front.handle_messages()?;
        self.shape = shape(&self.front.device, self.mtu);
        self.refill();
        self.check()?;
        Ok(changes)
    }

    /// The eventfds by which the guest says that it did something to a queue; each has an edge then, and
    /// [`Self::note_kick`] is to be called. They are never read.
    pub fn kick_fds(&self) -> impl Iterator<Item = (usize, RawFd)> {
        self.front.kick_fds()
    }

    /// The guest has kicked a queue.
    pub fn note_kick(&mut self, queue: usize) {
        let Some(ring) = self.front.device.rings.get_mut(queue) else { return };
        ring.note_kick();
        if queue == TO_GUEST {
            self.refill();
        }
    }

    /// What the guest takes unfinished: then the stack may send it.
    #[must_use]
    pub const fn offloads(&self) -> Offloads {
        let device = &self.front.device;
        let tcp = device.has(feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6);
        Offloads { tcp, udp: tcp && device.has(feature::GUEST_USO4 | feature::GUEST_USO6) }
    }

    /// The features the guest has accepted, as virtio numbers them.
    #[must_use]
    pub const fn features(&self) -> u64 {
        self.front.device.acked
    }

    /// Whether [`Self::receive`] may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.front.device.rings[TO_HOST].ready
    }

    /// Hands one bounded batch of frames from the guest to `handle`; each is a copy that the guest cannot change.
    ///
    /// They may have partial checksums and segments whatever [`Self::offloads`] says: that is about the other direction.
    ///
    /// # Errors
    /// When the ring is beyond use: the link is down.
    pub fn receive(&mut self, handle: impl FnMut(&[u8], Offload) -> ControlFlow<()>) -> io::Result<Batch> {
        let Device { rings, memory, .. } = &mut self.front.device;
        let ring = &mut rings[TO_HOST];
        if !ring.runs() {
            ring.ready = false;
            return Ok(Batch { more: false, frames: 0, bytes: 0 });
        }
        let batch = self.to_host.receive(ring, memory, self.shape.header, handle)?;
        if batch.frames > 0 {
            self.look_at = Some(Instant::now() + LOOK);
        }
        Ok(batch)
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
        for (queue, ring) in self.front.device.rings.iter_mut().enumerate() {
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
        for ring in &mut self.front.device.rings {
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
        (self.front.device.kind.frames, self.front.device.kind.bytes)
    }

    /// Frames from and to the guest that were lost: bad chains, and frames that did not fit.
    #[must_use]
    pub const fn dropped(&self) -> (u64, u64) {
        (self.to_host.dropped(), self.front.device.kind.dropped)
    }

    /// Takes buffers until there is room, or asks the guest to say when it posts more.
    fn refill(&mut self) {
        let Device { rings, memory, kind: to_guest, .. } = &mut self.front.device;
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
        let ring = &self.front.device.rings[TO_GUEST];
        self.broken.is_none() && ring.runs() && self.front.device.kind.has_room(ring, self.shape)
    }

    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let Device { rings, memory, kind: to_guest, .. } = &mut self.front.device;
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
