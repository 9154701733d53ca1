//! A network card without a VM: the front end of a vhost-user-net device by hand, message by message and descriptor by descriptor,
//! so that it may post layouts no driver of a test library would, iPXE's among them, and nonsense.
//!
//! Messages: QEMU `docs/interop/vhost-user.rst`; rings: virtio 1.2 §2.7. The guest's memory is a memfd that is read and written as a
//! file, which the kernel keeps the same as the mapping the sidecar has of it.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::sidecar::until;

/// Requests of the protocol.
pub mod request {
    /// What the device offers.
    pub const GET_FEATURES: u32 = 1;
    /// What the driver takes.
    pub const SET_FEATURES: u32 = 2;
    /// The session begins.
    pub const SET_OWNER: u32 = 3;
    /// Where the guest's memory is.
    pub const SET_MEM_TABLE: u32 = 5;
    /// A ring's size.
    pub const SET_VRING_NUM: u32 = 8;
    /// A ring's places.
    pub const SET_VRING_ADDR: u32 = 9;
    /// Where a ring goes on.
    pub const SET_VRING_BASE: u32 = 10;
    /// How the driver tells of buffers.
    pub const SET_VRING_KICK: u32 = 12;
    /// How the device tells of buffers.
    pub const SET_VRING_CALL: u32 = 13;
    /// A ring may run.
    pub const SET_VRING_ENABLE: u32 = 18;
}

/// The ring toward the guest, and the one from it.
pub const TO_GUEST: u32 = 0;
/// The ring from the guest.
pub const FROM_GUEST: u32 = 1;
/// There is a next descriptor.
pub const NEXT: u16 = 1;
/// The device writes it.
pub const WRITE: u16 = 2;
/// It is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes of memory, and where the front end says that it has it.
pub const MEMORY: u64 = 2 << 20;
const USER: u64 = 0x7000_0000_0000;
/// Descriptors of a ring.
pub const SIZE: u16 = 16;
/// The header before a frame (virtio 1.2 §5.1.6, VERSION_1).
const HEADER: u32 = 12;
const BUFFERS: u64 = 0x4_0000;
const BUFFER: u64 = 0x1000;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;

const fn base(ring: u32) -> u64 {
    0x1_0000 * (ring as u64)
}

/// One descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// The card.
#[derive(Debug)]
pub struct Card {
    /// The session; for bytes no front end should send.
    pub socket: UnixStream,
    memory: File,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    posted: [u16; 2],
    taken: [u16; 2],
}

impl Card {
    /// Connects to the back end at `path`, and says nothing.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.set_write_timeout(Some(Duration::from_secs(10)))?;
        let memory = File::from(memfd_create(c"guest", MFdFlags::empty())?);
        memory.set_len(MEMORY)?;
        let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            socket,
            memory,
            kicks: [event()?, event()?],
            calls: [event()?, event()?],
            posted: [0; 2],
            taken: [0; 2],
        })
    }

    /// Connects and brings both rings up, with buffers posted as iPXE does: header and frame in two descriptors, and no mergeable
    /// buffers.
    ///
    /// # Errors
    /// When the back end does not take part.
    pub fn start(path: &Path) -> Result<Self> {
        let mut card = Self::connect(path)?;
        card.negotiate()?;
        for ring in [TO_GUEST, FROM_GUEST] {
            card.set_up(ring)?;
        }
        for n in 0..SIZE / 2 {
            card.offer(n)?;
        }
        Ok(card)
    }

    /// One message, with a descriptor where it has one.
    ///
    /// # Errors
    /// When the back end is gone.
    pub fn say(&self, request: u32, payload: &[u8], fd: Option<&dyn AsFd>) -> Result<()> {
        let size = u32::try_from(payload.len())?;
        let head: Vec<u8> = [request, 1, size].iter().flat_map(|w| w.to_ne_bytes()).collect();
        let fds: Vec<_> = fd.iter().map(|f| f.as_fd().as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&head), IoSlice::new(payload)];
        sendmsg::<()>(self.socket.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Features and memory.
    ///
    /// # Errors
    /// When the back end does not take part.
    pub fn negotiate(&mut self) -> Result<()> {
        self.say(request::SET_OWNER, &[], None)?;
        self.say(request::GET_FEATURES, &[], None)?;
        let mut reply = [0; 20];
        self.socket.read_exact(&mut reply)?;
        let offered = u64::from_ne_bytes(reply[12..].try_into()?);
        ensure!(offered & VERSION_1 != 0 && offered & PROTOCOL_FEATURES != 0, "{offered:x}");
        // With protocol features and none of them: rings wait until they are enabled.
        self.say(request::SET_FEATURES, &(VERSION_1 | PROTOCOL_FEATURES).to_ne_bytes(), None)?;
        let region = [0, MEMORY, USER, 0];
        let region: Vec<u8> = region.iter().flat_map(|w: &u64| w.to_ne_bytes()).collect();
        let table = [&1u32.to_ne_bytes()[..], &[0; 4], &region].concat();
        self.say(request::SET_MEM_TABLE, &table, Some(&self.memory))
    }

    fn set_up(&self, ring: u32) -> Result<()> {
        let pair = |value: u32| [ring.to_ne_bytes(), value.to_ne_bytes()].concat();
        self.say(request::SET_VRING_NUM, &pair(SIZE.into()), None)?;
        self.say(request::SET_VRING_BASE, &pair(0), None)?;
        let places = [USER + base(ring), USER + base(ring) + 0x800, USER + base(ring) + 0x400, 0];
        let places: Vec<u8> = places.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.say(request::SET_VRING_ADDR, &[&pair(0)[..], &places].concat(), None)?;
        let index = u64::from(ring).to_ne_bytes();
        self.say(request::SET_VRING_CALL, &index, Some(&self.calls[ring as usize]))?;
        self.say(request::SET_VRING_KICK, &index, Some(&self.kicks[ring as usize]))?;
        self.say(request::SET_VRING_ENABLE, &pair(1), None)
    }

    fn word(&self, at: u64) -> Result<u16> {
        let mut word = [0; 2];
        self.memory.read_exact_at(&mut word, at)?;
        Ok(u16::from_le_bytes(word))
    }

    /// Writes descriptors from `first` on, in their order in the table.
    ///
    /// # Errors
    /// When the memory cannot be written.
    pub fn describe(&self, ring: u32, first: u16, chain: &[Descriptor]) -> Result<()> {
        for (n, (address, len, flags, next)) in (u64::from(first)..).zip(chain) {
            let bytes =
                [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
            self.memory.write_all_at(&bytes.concat(), base(ring) + n * 16)?;
        }
        Ok(())
    }

    /// Makes the chain that begins at `head` available, `ahead` places on (1 is what a driver does), and tells.
    ///
    /// # Errors
    /// When the memory cannot be written.
    pub fn post(&mut self, ring: u32, head: u16, ahead: u16) -> Result<()> {
        let available = base(ring) + 0x400;
        let posted = &mut self.posted[ring as usize];
        self.memory.write_all_at(&head.to_le_bytes(), available + 4 + u64::from(*posted % SIZE) * 2)?;
        *posted = posted.wrapping_add(ahead);
        self.memory.write_all_at(&posted.to_le_bytes(), available + 2)?;
        self.kicks[ring as usize].write(1)?;
        Ok(())
    }

    /// Posts buffer `n` for a frame to the guest.
    fn offer(&mut self, n: u16) -> Result<()> {
        let (head, at) = (n * 2, BUFFERS + u64::from(n) * BUFFER);
        let header = (at, HEADER, WRITE | NEXT, head + 1);
        self.describe(TO_GUEST, head, &[header, (at + 64, 1526, WRITE, 0)])?;
        self.post(TO_GUEST, head, 1)
    }

    /// The next chain the device has used: its head, and the bytes written to it.
    fn used(&mut self, ring: u32) -> Result<Option<(u16, u32)>> {
        let (used, taken) = (base(ring) + 0x800, self.taken[ring as usize]);
        if self.word(used + 2)? == taken {
            return Ok(None);
        }
        let mut entry = [0; 8];
        self.memory.read_exact_at(&mut entry, used + 4 + u64::from(taken % SIZE) * 8)?;
        self.taken[ring as usize] = taken.wrapping_add(1);
        let [a, b, _, _, l0, l1, l2, l3] = entry;
        Ok(Some((u16::from_le_bytes([a, b]), u32::from_le_bytes([l0, l1, l2, l3]))))
    }

    /// Sends a frame as iPXE does, header and frame in two descriptors, and waits until the device has taken it.
    ///
    /// # Errors
    /// When it does not.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        let at = BUFFERS + 0x8_0000;
        self.memory.write_all_at(&[0; HEADER as usize], at)?;
        self.memory.write_all_at(frame, at + 64)?;
        let len = u32::try_from(frame.len())?;
        self.describe(FROM_GUEST, 0, &[(at, HEADER, NEXT, 1), (at + 64, len, 0, 0)])?;
        self.post(FROM_GUEST, 0, 1)?;
        until(Duration::from_secs(10), || matches!(self.used(FROM_GUEST), Ok(Some(_)))).context("a frame")
    }

    /// Frames that have come.
    ///
    /// # Errors
    /// When the memory cannot be read.
    pub fn frames(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        while let Some((head, len)) = self.used(TO_GUEST)? {
            let at = BUFFERS + u64::from(head / 2) * BUFFER;
            let mut frame = vec![0; usize::try_from(len.saturating_sub(HEADER))?];
            self.memory.read_exact_at(&mut frame, at + 64)?;
            frames.push(frame);
            self.offer(head / 2)?;
        }
        Ok(frames)
    }

    /// Whether the back end has ended the session.
    pub fn has_ended(&mut self) -> bool {
        self.socket.set_nonblocking(true).is_ok() && matches!(self.socket.read(&mut [0; 64]), Ok(0))
    }
}
