//! Where frames to a guest are written: the link's own transmit buffer.
//!
//! The stack never drops a TCP segment for want of room. It asks [`FrameSink::has_room`] first, and a flow that
//! cannot send waits until the driver polls again: smoltcp's retransmission timer is 1 s at the least, so one
//! frame lost here would cost a second.

/// What the link has to do, or tell the guest, about a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// The size in bytes of the segments a larger TCP segment stands for; 0: the frame is whole as it is.
    pub segment_size: u16,
}

/// A link's transmit buffer, lent to the stack for one turn.
pub trait FrameSink {
    /// Whether one more frame of the link's largest size fits.
    fn has_room(&self) -> bool;

    /// Lets `fill` write one frame of `len` bytes in place and queues it. When there is no room the frame is
    /// dropped and `fill` not called; `None` then. The bytes handed to `fill` are not zeroed.
    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R>;
}
