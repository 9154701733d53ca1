//! A vhost-user-net back end: frames in the guest's own memory, with segmentation and checksum offload.
//!
//! ```text
//!  front end ═ socket ═► Control (features, memory, rings) ─► Ring × 2
//!  guest: transmit ring ─► chain ─► copied into a scratch buffer: header + frame ─► Netstack
//!  guest: receive ring ◄─ mergeable buffers ◄─ copied out of a scratch buffer ◄─ written by Netstack (FrameSink)
//! ```
//! One queue pair, split rings, in the data thread: there is no lock and no thread between a kick and the stack. A frame is
//! copied once each way. Guest memory is racy, so a frame is copied whole before a byte of it is looked at, and
//! nothing in it is a Rust reference to what the guest may change.
//!
//! **Trust.** The front end is the VMM: it may end its link, and can do no more. The guest writes rings and descriptors: any
//! layout is taken; a chain that points nowhere or is too long is a frame dropped and counted; a ring that claims more
//! than it has ends this link (`InvalidData`), and no other.
//!
//! The front end's messages are read blocking, with a time limit: a message that is torn apart holds the data thread for
//! [`PATIENCE`] at the most, and ends the link.

mod control;
mod message;
mod ring;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use portway_netstack::{FrameSink, Offload};
use vhost::vhost_user::BackendReqHandler;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use self::control::{Control, RINGS, feature};
use self::message::Message;
use self::ring::Ring;
use super::{Batch, vnet};

/// The ring of buffers for frames to the guest.
const TO_GUEST: usize = 0;
/// The ring of frames from the guest.
const FROM_GUEST: usize = 1;
/// The largest frame behind its header: a VLAN tag and an IP packet as long as its length field can say.
const LARGEST: usize = vnet::LEN + 14 + 4 + 65_535;
/// Frames and bytes of one batch, before the flows it touched are served.
const FRAMES: u64 = 64;
const BYTES: u64 = 512 * 1024;
/// How long the front end may take for one message once it has begun.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long after something moved [`VhostUser::look_again`] looks.
const LOOK: Duration = Duration::from_millis(1);

/// What changed by the front end's messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// [`VhostUser::kicks`] gives other descriptors than before.
    pub kicks: bool,
    /// The guest's driver started anew with other features: its flows are gone, and [`VhostUser::offload`] may differ.
    pub device: bool,
}

/// A chain the guest posted for frames to it.
struct Posted {
    head: u16,
    bytes: usize,
    /// How many of `VhostUser::spans` are its.
    spans: usize,
}

/// One attached front end.
pub struct VhostUser {
    socket: UnixStream,
    handler: BackendReqHandler<Mutex<Control>>,
    control: Arc<Mutex<Control>>,
    features: u64,
    mtu: u16,
    rings: [Option<Ring>; RINGS],
    /// Chains taken from the receive ring and not filled yet, and the pieces of guest memory they are made of.
    posted: VecDeque<Posted>,
    spans: VecDeque<(GuestAddress, usize)>,
    posted_bytes: usize,
    from_guest: Box<[u8]>,
    to_guest: Box<[u8]>,
    readable: bool,
    written: (u64, u64),
    /// Frames that did not fit, or were malformed.
    dropped: u64,
    /// What `frame`, which cannot fail, found wrong; `flush` says it.
    fault: Option<io::Error>,
    /// When to look again whether guest and device wait for each other.
    look_at: Option<Instant>,
}

impl std::fmt::Debug for VhostUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let features = format_args!("{:#x}", self.features);
        f.debug_struct("VhostUser")
            .field("features", &features)
            .field("rings", &self.rings)
            .field("posted", &self.posted.len())
            .field("posted_bytes", &self.posted_bytes)
            .field("readable", &self.readable)
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}

impl VhostUser {
    /// Speaks with the front end at the other end of `stream`. `mtu` is the largest IP packet in bytes where the guest
    /// takes no larger segments.
    ///
    /// # Errors
    /// When the socket takes no time limit.
    pub fn new(stream: UnixStream, mtu: u16) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let control = Arc::new(Mutex::new(Control::default()));
        Ok(Self {
            handler: BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&control)),
            socket: stream,
            control,
            features: 0,
            mtu,
            rings: [None, None],
            posted: VecDeque::new(),
            spans: VecDeque::new(),
            posted_bytes: 0,
            from_guest: vec![0; LARGEST].into(),
            to_guest: vec![0; LARGEST].into(),
            readable: false,
            written: (0, 0),
            dropped: 0,
            fault: None,
            look_at: None,
        })
    }

    /// The socket, to be watched for messages.
    #[must_use]
    pub fn control_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        // Nobody panics while holding it; and if somebody did, the registers are numbers.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles every message that waits.
    ///
    /// # Errors
    /// When the front end is gone, breaks the protocol, or describes rings that do not exist.
    pub fn handle_control(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::default();
        while is_readable(self.socket.as_fd())? {
            let control = Arc::clone(&self.control);
            let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
            for (n, ring) in self.rings.iter_mut().enumerate() {
                // Chains taken and not filled are the guest's again when the ring stops.
                let taken = if n == TO_GUEST { self.posted.len() } else { 0 };
                if let Some(ring) = ring {
                    ring.publish()?;
                    let taken = u16::try_from(taken).unwrap_or(u16::MAX);
                    control.rings[n].base = ring.next_available().wrapping_sub(taken);
                }
            }
            let ours = message::take(&mut self.socket)?;
            match ours {
                Some(Message::Enable(ring, on)) => control.enable(ring, on)?,
                // The link's own setting stands: the guest has its MTU from there, by DHCP.
                Some(Message::Mtu(_)) => {}
                None => {}
            }
            drop(control);
            let handled = if ours.is_some() { Ok(()) } else { self.handler.handle_request() };
            match handled {
                Ok(()) => {}
                Err(vhost::vhost_user::Error::Disconnected) => return Err(io::Error::other("end of file")),
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
            }
            self.apply(&mut changes)?;
        }
        Ok(changes)
    }

    /// Makes the rings what the registers say.
    fn apply(&mut self, changes: &mut Changes) -> io::Result<()> {
        let control = Arc::clone(&self.control);
        let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
        changes.device |= std::mem::take(&mut control.restarted);
        self.features = control.features;
        let Control { rings, memory, features, .. } = &mut *control;
        for (n, registers) in rings.iter_mut().enumerate() {
            if !std::mem::take(&mut registers.dirty) {
                continue;
            }
            changes.kicks = true;
            if n == TO_GUEST {
                self.posted.clear();
                self.spans.clear();
                self.posted_bytes = 0;
            }
            self.rings[n] = Ring::new(registers, memory.as_ref(), *features)?;
            // What was posted before the ring ran came without a kick that anybody saw.
            self.readable |= n == FROM_GUEST;
        }
        drop(control);
        self.refill()
    }

    /// The descriptors on which the guest tells of news, by ring. An edge of each is enough: they are never read.
    pub fn kicks(&self) -> [Option<Arc<std::fs::File>>; RINGS] {
        let control = self.control();
        std::array::from_fn(|n| control.rings[n].kick.clone())
    }

    /// The guest has told of news in `ring`.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn note_kick(&mut self, ring: usize) -> io::Result<()> {
        if ring == FROM_GUEST {
            self.readable = true;
            return Ok(());
        }
        self.refill()
    }

    /// Whether the guest takes segments and checksums that are not finished.
    #[must_use]
    pub const fn offload(&self) -> bool {
        let all = feature::GUEST_CSUM | feature::GUEST_TSO4;
        self.features & all == all
    }

    const fn merges(&self) -> bool {
        self.features & feature::MRG_RXBUF != 0
    }

    /// Bytes of guest memory that the largest frame to it needs.
    fn need(&self) -> usize {
        if self.offload() { LARGEST } else { vnet::LEN + 14 + 4 + usize::from(self.mtu) }
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
    /// When a ring is broken.
    pub fn look_again(&mut self) -> io::Result<()> {
        self.look_at = None;
        if let Some(ring) = &mut self.rings[FROM_GUEST] {
            if !self.readable && ring.has_available()? {
                tracing::debug!("a kick was lost");
                self.readable = true;
            }
            if ring.remind()? {
                tracing::debug!("an interrupt of the transmit ring was lost");
            }
        }
        if let Some(ring) = &mut self.rings[TO_GUEST]
            && ring.remind()?
        {
            tracing::debug!("an interrupt of the receive ring was lost");
        }
        let before = self.posted_bytes;
        self.refill()?;
        if self.posted_bytes > before {
            tracing::debug!("a kick of the receive ring was lost");
        }
        Ok(())
    }

    // ---- from the guest ----

    /// Whether `receive` may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.readable && self.rings[FROM_GUEST].is_some()
    }

    /// One batch of frames.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn receive(&mut self, mut handle: impl FnMut(&[u8], Offload)) -> io::Result<Batch> {
        let mut batch = Batch { more: true, frames: 0, bytes: 0 };
        let Some(ring) = &mut self.rings[FROM_GUEST] else {
            self.readable = false;
            return Ok(Batch { more: false, ..batch });
        };
        ring.ignore()?;
        while batch.frames < FRAMES && batch.bytes < BYTES {
            let Some(chain) = ring.pop()? else {
                if ring.listen()? {
                    continue;
                }
                batch.more = false;
                break;
            };
            let head = chain.head_index();
            let copied = copy_in(chain, &mut self.from_guest);
            ring.put(head, 0)?;
            batch.frames += 1;
            match copied.and_then(|len| self.from_guest[..len].split_first_chunk()) {
                Some((header, frame)) => {
                    batch.bytes += frame.len() as u64;
                    match vnet::parse(*header) {
                        Some(offload) => handle(frame, offload),
                        None => self.dropped += 1,
                    }
                }
                None => self.dropped += 1,
            }
        }
        if batch.frames > 0 {
            ring.publish()?;
            self.look_at = Some(Instant::now() + LOOK);
        }
        self.readable = batch.more;
        Ok(batch)
    }

    // ---- to the guest ----

    /// Takes posted chains off the ring until the largest frame fits, and asks to be told of more while it does not.
    fn refill(&mut self) -> io::Result<()> {
        let need = self.need();
        let Some(ring) = &mut self.rings[TO_GUEST] else { return Ok(()) };
        loop {
            while self.posted_bytes < need {
                let Some(chain) = ring.pop()? else { break };
                let (head, before) = (chain.head_index(), self.spans.len());
                let mut bytes = 0;
                for descriptor in chain.writable() {
                    let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX).min(LARGEST);
                    bytes += len;
                    self.spans.push_back((descriptor.addr(), len));
                    if bytes >= LARGEST {
                        break;
                    }
                }
                self.posted_bytes += bytes;
                self.posted.push_back(Posted { head, bytes, spans: self.spans.len() - before });
            }
            if self.posted_bytes >= need || !ring.listen()? {
                return Ok(());
            }
        }
    }

    /// Writes the `total` bytes of the scratch buffer into posted chains. False: they do not fit.
    fn scatter(&mut self, total: usize) -> io::Result<bool> {
        let merges = self.merges();
        let Some(ring) = &mut self.rings[TO_GUEST] else { return Ok(false) };
        let (mut chains, mut room) = (0, 0);
        for posted in self.posted.iter().take(if merges { usize::MAX } else { 1 }) {
            chains += 1;
            room += posted.bytes;
            if room >= total {
                break;
            }
        }
        if room < total {
            return Ok(false);
        }
        let count = u16::try_from(chains).unwrap_or(u16::MAX).to_le_bytes();
        self.to_guest[10..12].copy_from_slice(&count);
        let mut rest = &self.to_guest[..total];
        for posted in self.posted.drain(..chains) {
            let before = rest.len();
            for (address, len) in self.spans.drain(..posted.spans) {
                let (now, later) = rest.split_at(len.min(rest.len()));
                // A buffer outside of memory is the guest's own loss.
                if ring.memory().write_slice(now, address).is_err() {
                    self.dropped += 1;
                }
                rest = later;
            }
            self.posted_bytes -= posted.bytes;
            ring.put(posted.head, u32::try_from(before - rest.len()).unwrap_or(u32::MAX))?;
        }
        Ok(true)
    }

    /// Makes what was written visible.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        if let Some(ring) = &mut self.rings[TO_GUEST]
            && ring.publish()?
        {
            self.look_at = Some(Instant::now() + LOOK);
        }
        if self.has_room() { Ok(()) } else { self.refill() }
    }

    /// Whether the guest has to post buffers before the stack may write.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        !self.has_room()
    }

    /// Frames and bytes that were ever written.
    #[must_use]
    pub const fn written(&self) -> (u64, u64) {
        self.written
    }

    /// Frames that were malformed, or did not fit the guest's buffers.
    #[must_use]
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }
}

impl FrameSink for VhostUser {
    fn has_room(&self) -> bool {
        // A ring that is full and still smaller than the largest frame gets what fits.
        self.rings[TO_GUEST]
            .as_ref()
            .is_some_and(|ring| self.posted_bytes >= self.need() || self.posted.len() == ring.size())
    }

    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let total = vnet::LEN + len;
        if !self.has_room() {
            self.dropped += 1;
            return None;
        }
        let (header, frame) = self.to_guest.get_mut(..total)?.split_at_mut(vnet::LEN);
        header.copy_from_slice(&vnet::bytes(offload));
        let result = fill(frame);
        match self.scatter(total) {
            Ok(true) => {
                self.written.0 += 1;
                self.written.1 += len as u64;
            }
            Ok(false) => self.dropped += 1,
            Err(error) => self.fault = Some(error),
        }
        if let Err(error) = self.refill() {
            self.fault.get_or_insert(error);
        }
        Some(result)
    }
}

/// Copies what the guest wrote in `chain`; `None` when it points nowhere or is too long.
fn copy_in(chain: DescriptorChain<&GuestMemoryMmap>, into: &mut [u8]) -> Option<usize> {
    let memory = chain.memory();
    let mut len = 0usize;
    for descriptor in chain.clone().readable() {
        let end = len.checked_add(usize::try_from(descriptor.len()).ok()?)?;
        memory.read_slice(into.get_mut(len..end)?, descriptor.addr()).ok()?;
        len = end;
    }
    Some(len)
}

fn is_readable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}
