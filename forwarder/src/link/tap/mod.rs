//! A tap device of the kernel: the guest is a network namespace, a container, or a VMM that holds the other queue.
//!
//! ```text
//!  namespace ═► read(2): virtio-net header + frame ─► scratch ─► Netstack
//!  namespace ◄═ write(2), at once ◄─ header + frame ◄─ written in place by Netstack (FrameSink)
//! ```
//! Each frame is a system call of its own, so frames are large: the kernel hands over and takes TCP segments of up to
//! 64 KiB at any MTU, with the checksum left open (Linux `Documentation/networking/tuntap.rst`, `TUNSETOFFLOAD`). A write
//! goes all the way through the namespace's stack before it returns; nothing is gained by collecting frames first.

mod device;
mod join;
mod setup;

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};

pub use join::{CHILD, child};
use portway_netstack::{FrameSink, Offload, Offloads};
pub use setup::{BadSetup, Setup};

use super::{Batch, vnet};
use crate::config::Namespace;

/// The largest frame behind its header.
const LARGEST: usize = vnet::LEN + 14 + 4 + 65_535;
/// Bytes one batch may bring before the flows it touched are served.
const BATCH: u64 = 512 * 1024;
/// Frames of one batch.
const FRAMES: u64 = 64;

/// `EBADFD`: the device was deleted, with its namespace or by hand.
const DELETED: i32 = nix::libc::EBADFD;

/// The attached device.
#[derive(Debug)]
pub struct Tap {
    device: File,
    offloads: Offloads,
    scratch: Box<[u8]>,
    out: Box<[u8]>,
    /// Bytes of `out` that the kernel would not take yet.
    waiting: usize,
    readable: bool,
    writable: bool,
    /// Why the device is gone.
    gone: Option<io::Error>,
    written: (u64, u64),
}

impl Tap {
    /// Opens device `name`, and makes it where it is not; with `setup` it also gets an address and is up.
    ///
    /// # Errors
    /// When there is no such namespace, no permission, or somebody else holds the device; the text says what to do.
    pub fn open(name: &str, namespace: Option<&Namespace>, setup: Option<&Setup>) -> io::Result<Self> {
        let device = match namespace {
            None => {
                let device = device::open(name)?;
                setup.map_or(Ok(()), |setup| setup::apply(name, setup))?;
                device
            }
            Some(Namespace::Path(path)) => join::by_path(name, path, setup)?,
            Some(Namespace::Process(pid)) => join::by_process(name, *pid, setup)?,
            Some(Namespace::Within { user, net }) => join::by_child(name, user, net, setup)?,
        };
        let offloads = device::configure(&device)?;
        Ok(Self {
            device,
            offloads,
            scratch: vec![0; LARGEST].into(),
            out: vec![0; LARGEST].into(),
            waiting: 0,
            readable: true,
            writable: true,
            gone: None,
            written: (0, 0),
        })
    }

    /// The descriptor to watch.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }

    /// What the kernel takes unfinished.
    #[must_use]
    pub const fn offloads(&self) -> Offloads {
        self.offloads
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

    /// One batch of frames.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn receive(
        &mut self,
        mut handle: impl FnMut(&[u8], Offload) -> ControlFlow<()>,
    ) -> io::Result<Batch> {
        let mut batch = Batch { more: true, frames: 0, bytes: 0 };
        while batch.frames < FRAMES && batch.bytes < BATCH {
            match self.device.read(&mut self.scratch) {
                Ok(n) => {
                    let Some((header, frame)) = self.scratch[..n].split_first_chunk() else { continue };
                    batch.frames += 1;
                    batch.bytes += frame.len() as u64;
                    // The header is the kernel's own word.
                    if handle(frame, vnet::parse(*header).unwrap_or_default()).is_break() {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    batch.more = false;
                    break;
                }
                // The device is down: nothing comes until somebody sets it up again, which is an event.
                Err(e) if e.raw_os_error() == Some(nix::libc::EIO) => {
                    self.readable = false;
                    batch.more = false;
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(batch)
    }

    /// Offers the kernel again what it would not take.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.waiting > 0 && self.writable {
            self.write(self.waiting);
        }
        self.gone.take().map_or(Ok(()), Err)
    }

    fn write(&mut self, len: usize) {
        self.waiting = 0;
        loop {
            match self.device.write(&self.out[..len]) {
                Ok(_) => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.waiting = len;
                    self.writable = false;
                    return;
                }
                Err(e) if e.raw_os_error() == Some(DELETED) => {
                    self.gone = Some(e);
                    return;
                }
                // The device is down (EIO), or does not like the frame (EINVAL): as on a wire nobody listens to.
                Err(error) => {
                    tracing::trace!(%error, "the tap device did not take a frame");
                    return;
                }
            }
        }
    }

    /// Whether a frame waits for the kernel.
    #[must_use]
    pub const fn is_blocked(&self) -> bool {
        self.waiting > 0
    }

    /// Frames and bytes that were ever written.
    #[must_use]
    pub const fn written(&self) -> (u64, u64) {
        self.written
    }
}

impl FrameSink for Tap {
    fn has_room(&self) -> bool {
        self.waiting == 0
    }

    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        if self.waiting > 0 {
            return None;
        }
        let (header, frame) = self.out.get_mut(..vnet::LEN + len)?.split_at_mut(vnet::LEN);
        header.copy_from_slice(&vnet::bytes(offload));
        let result = fill(frame);
        self.written.0 += 1;
        self.written.1 += len as u64;
        self.write(vnet::LEN + len);
        Some(result)
    }
}
