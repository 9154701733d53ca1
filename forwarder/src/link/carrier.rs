//! How frames cross, once a VMM is attached: one of the carriers, behind one set of calls.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;

use portway_netstack::{FrameSink, Offload, Offloads};

#[cfg(target_os = "linux")]
use super::packets::Packets;
use super::stream::Stream;
#[cfg(target_os = "linux")]
use super::tap::Tap;
use super::tapped::Tapped;
#[cfg(target_os = "linux")]
use super::vhost_user::VhostUser;

/// What one batch brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Whether there may be more.
    pub more: bool,
    /// Frames handed on.
    pub frames: u64,
    /// Bytes in those frames.
    pub bytes: u64,
}

/// How frames cross, once a VMM is attached.
#[derive(Debug)]
pub enum Carrier {
    /// Lengths and frames on a byte stream. With offload (libkrun) large frames carry no header: their size says it.
    Stream(Box<Stream>),
    /// A tap device.
    #[cfg(target_os = "linux")]
    Tap(Box<Tap>),
    /// Guest memory.
    #[cfg(target_os = "linux")]
    VhostUser(Box<VhostUser>),
    /// A socket that keeps frames apart.
    #[cfg(target_os = "linux")]
    Packets(Box<Packets>),
    /// Any of these, while a capture looks at its frames.
    Tapped(Box<Tapped>),
}

impl Carrier {
    /// The carrier itself, whoever looks at it.
    pub(super) fn bare(&self) -> &Self {
        if let Self::Tapped(t) = self { t.inner.bare() } else { self }
    }

    /// The same, to change it.
    pub(super) fn bare_mut(&mut self) -> &mut Self {
        if let Self::Tapped(t) = self { t.inner.bare_mut() } else { self }
    }

    /// The carrier without those who look at it.
    pub(super) fn untapped(self) -> Self {
        match self {
            Self::Tapped(t) => t.into_inner().untapped(),
            bare => bare,
        }
    }

    pub(super) fn wants_receive(&self) -> bool {
        match self {
            Self::Tapped(t) => t.inner.wants_receive(),
            Self::Stream(s) => s.wants_receive(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.wants_receive(),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.wants_receive(),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.wants_receive(),
        }
    }

    /// One batch of frames; `handle` breaks off after one when it wants no further one now.
    pub(super) fn receive(
        &mut self,
        mut handle: impl FnMut(&[u8], Offload) -> ControlFlow<()>,
    ) -> io::Result<Batch> {
        match self {
            Self::Tapped(t) => t.receive(handle),
            Self::Stream(s) => s.receive(|frame| handle(frame, Offload::default())),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.receive(handle),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.receive(handle),
            #[cfg(target_os = "linux")]
            // Its batch is small, and has been read.
            Self::Packets(p) => p.receive(|frame| {
                let _ = handle(frame, Offload::default());
            }),
        }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tapped(t) => t.inner.flush(),
            Self::Stream(s) => s.flush(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.flush(),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.flush(),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.flush(),
        }
    }

    pub(super) fn is_blocked(&self) -> bool {
        match self {
            Self::Tapped(t) => t.inner.is_blocked(),
            Self::Stream(s) => s.is_blocked(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.is_blocked(),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.is_blocked(),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.is_blocked(),
        }
    }

    /// Frames and bytes that were ever written to the guest.
    #[must_use]
    pub fn written(&self) -> (u64, u64) {
        match self {
            Self::Tapped(t) => t.inner.written(),
            Self::Stream(s) => s.transmit.written(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.written(),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.written(),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.written(),
        }
    }

    /// Whether the guest takes segments and checksums that are not finished.
    pub(super) fn offloads(&self) -> Offloads {
        match self {
            Self::Tapped(t) => t.inner.offloads(),
            Self::Stream(_) => Offloads::default(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.offloads(),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.offloads(),
            #[cfg(target_os = "linux")]
            Self::Packets(_) => Offloads::default(),
        }
    }

    pub(super) fn fds(&self) -> (RawFd, Option<RawFd>) {
        match self {
            Self::Tapped(t) => t.inner.fds(),
            Self::Stream(s) => s.fds(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => (t.fd(), None),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => (v.control_fd(), None),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => (p.fd(), None),
        }
    }

    pub(super) fn note(&mut self, readable: bool, writable: bool, closed: bool) {
        match self {
            Self::Tapped(t) => t.inner.note(readable, writable, closed),
            Self::Stream(s) => s.note(readable, writable, closed),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.note(readable || closed, writable),
            // Its news are messages and kicks: see `Link::note`.
            #[cfg(target_os = "linux")]
            Self::VhostUser(_) => {}
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.note(readable, writable, closed),
        }
    }
}

impl FrameSink for Carrier {
    fn has_room(&self) -> bool {
        match self {
            Self::Tapped(t) => t.inner.has_room(),
            Self::Stream(s) => s.is_open() && s.transmit.has_room(),
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.has_room(),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.has_room(),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.has_room(),
        }
    }

    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        match self {
            Self::Tapped(t) => t.frame(len, offload, fill),
            Self::Stream(s) if s.is_open() => s.transmit.frame(len, offload, fill),
            Self::Stream(_) => None,
            #[cfg(target_os = "linux")]
            Self::Tap(t) => t.frame(len, offload, fill),
            #[cfg(target_os = "linux")]
            Self::VhostUser(v) => v.frame(len, offload, fill),
            #[cfg(target_os = "linux")]
            Self::Packets(p) => p.frame(len, offload, fill),
        }
    }
}
