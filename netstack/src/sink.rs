//! Where frames to a guest are written: the link's own transmit buffer.
//!
//! The stack never drops a TCP segment for want of room. It asks [`FrameSink::has_room`] first, and a flow that
//! cannot send waits until the driver polls again: smoltcp's retransmission timer is 1 s at the least, so one
//! frame lost here would cost a second.

/// How far a frame is from what a wire would carry: what a virtio-net header says (virtio 1.2, §5.1.6).
///
/// The default is a frame that is whole. Anything else travels only over links that were added to the stack with
/// offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// The checksum of TCP or UDP still has to be made.
    pub checksum: Option<PartialChecksum>,
    /// The frame stands for several of the same header.
    pub segments: Option<Segments>,
}

/// A checksum field that holds the sum of the pseudo-header and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where the bytes to sum begin, in bytes from the start of the frame: the transport header.
    pub start: u16,
    /// Where the checksum goes, in bytes from `start`: 16 for TCP, 6 for UDP.
    pub offset: u16,
}

/// A frame that stands for several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// What is segmented.
    pub kind: SegmentKind,
    /// Bytes of payload of each segment; the last may have fewer. Never 0.
    pub size: u16,
    /// Bytes of all headers of the frame, Ethernet's included. A guest's word for it is not to be trusted.
    pub headers: u16,
}

/// What is segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams.
    Udp,
}

impl Offload {
    /// Whether the frame is as a wire would carry it.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.checksum.is_none() && self.segments.is_none()
    }
}

/// What the guest behind a link finishes itself, so that we need not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// It takes partial checksums, and segments of TCP over both IPs.
    pub tcp: bool,
    /// It takes datagrams of UDP that came together as one frame; never without `tcp`.
    pub udp: bool,
}

/// A link's transmit buffer, lent to the stack for one turn.
pub trait FrameSink {
    /// Whether one more frame of the link's largest size fits.
    fn has_room(&self) -> bool;

    /// Lets `fill` write one frame of `len` bytes in place and queues it. When there is no room the frame is
    /// dropped and `fill` not called; `None` then. The bytes handed to `fill` are not zeroed.
    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R>;
}
