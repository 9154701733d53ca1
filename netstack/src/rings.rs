//! The memory behind TCP flows, as the driver provides it.
//!
//! A flow has two rings: bytes on their way to the host, bytes on their way to the guest. The driver maps
//! address space once and lends it for ever; a socket that ends keeps its rings and is reused for the next flow
//! of the same class, because smoltcp cannot give a ring back. What returns to the kernel are the *pages*:
//! [`RingMemory::discard`] says that the contents of a pair are not needed, when a flow ends and when an open flow
//! with empty rings has been idle for a moment. That is how an idle flow costs less than a kilobyte.

/// How large a pair of rings is. A ring is the largest window: small ones still carry 64 KiB a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RingClass {
    /// For the first some thousand flows.
    Large,
    /// For those beyond.
    Small,
}

impl RingClass {
    /// Every class, in the order of its number.
    pub const ALL: [Self; 2] = [Self::Large, Self::Small];

    /// Bytes of the ring to the host and of the ring to the guest.
    #[must_use]
    pub const fn sizes(self) -> (usize, usize) {
        match self {
            Self::Large => (1024 * 1024, 1024 * 1024),
            Self::Small => (128 * 1024, 128 * 1024),
        }
    }
}

/// The two rings of one flow.
#[derive(Debug)]
pub struct Rings {
    /// The provider's number for the pair, for `discard`.
    pub id: u32,
    /// Bytes from the guest that the host socket has not taken yet. Its size is the largest window the guest sees.
    pub to_host: &'static mut [u8],
    /// Bytes from the host that the guest has not acknowledged yet.
    pub to_guest: &'static mut [u8],
}

/// The provider of ring memory.
pub trait RingMemory: Send {
    /// A fresh pair; `None` when the budget is used up (the flow is refused then).
    fn take(&mut self, class: RingClass) -> Option<Rings>;

    /// The contents of pair `id` are not needed any more: its pages may go. Later reads may see zeros or the old
    /// bytes; nothing reads them before it has written them.
    fn discard(&mut self, id: u32);
}
