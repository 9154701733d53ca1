//! Who may send how much (virtio 1.2, §5.10.6.3).
//!
//! Each side says in every packet how many bytes of a stream it can keep and how many it has had and let go of since the
//! beginning, modulo 2^32. Nobody sends what the other could not keep. What a guest says is its own affair: with wrong
//! numbers it gets more bytes than it can keep, or none.

/// What we may send to the guest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ToGuest {
    alloc: u32,
    forwarded: u32,
    sent: u32,
}

impl ToGuest {
    /// The guest has said.
    pub(super) const fn told(&mut self, alloc: u32, forwarded: u32) {
        self.alloc = alloc;
        self.forwarded = forwarded;
    }

    /// Bytes it takes now.
    pub(super) const fn free(&self) -> u32 {
        self.alloc.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// We have sent `len` bytes, no more than were [free](Self::free).
    pub(super) const fn sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

/// What the guest may send to us.
#[derive(Debug, Clone, Copy)]
pub(super) struct ToHost {
    alloc: u32,
    received: u32,
    forwarded: u32,
    /// What the guest last heard of `forwarded`.
    told: u32,
}

impl ToHost {
    /// We can keep `alloc` bytes.
    pub(super) const fn new(alloc: u32) -> Self {
        Self { alloc, received: 0, forwarded: 0, told: 0 }
    }

    /// What we can keep.
    pub(super) const fn alloc(&self) -> u32 {
        self.alloc
    }

    /// From now on we can keep `more`. It never becomes less: what is on its way was allowed.
    pub(super) const fn grow(&mut self, more: u32) {
        self.alloc = self.alloc.saturating_add(more);
    }

    /// The guest has sent `len` bytes. False when it was not allowed to.
    #[must_use]
    pub(super) const fn receive(&mut self, len: u32) -> bool {
        let kept = self.received.wrapping_sub(self.forwarded);
        match kept.checked_add(len) {
            Some(kept) if kept <= self.alloc => {
                self.received = self.received.wrapping_add(len);
                true
            }
            _ => false,
        }
    }

    /// We have let go of `len` of the bytes received.
    pub(super) const fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest should be told: it may have stopped for want of credit, or is about to.
    pub(super) const fn is_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.alloc / 2
    }

    /// What a packet says, and the guest knows then: what we can keep, and what we have let go of.
    pub(super) const fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.alloc, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_that_lies_gets_nothing_or_too_much_and_no_more() {
        let mut credit = ToGuest::default();
        assert_eq!(credit.free(), 0, "it has said nothing");
        credit.told(1000, 0);
        credit.sent(1000);
        // It takes back what it has allowed, and says it had what was never sent.
        credit.told(10, 0);
        assert_eq!(credit.free(), 0);
        credit.told(1000, 5000);
        assert_eq!(credit.free(), 0);
        credit.told(u32::MAX, 1000);
        assert_eq!(credit.free(), u32::MAX);
    }

    #[test]
    fn what_is_beyond_the_credit_is_refused() {
        let mut credit = ToHost::new(100);
        assert!(credit.receive(100));
        assert!(!credit.receive(1));
        credit.forward(1);
        assert!(credit.receive(1) && !credit.receive(1) && !credit.receive(u32::MAX));
    }

    proptest! {
        /// Two honest ends, of which one reads when it likes: nothing is ever refused, nothing is forgotten, and whoever
        /// has bytes to send gets on as soon as the other has read all. The counters start anywhere.
        #[test]
        fn two_ends_never_disagree_and_never_stop(
            steps in prop::collection::vec((1u32..5000, 0u32..5000, any::<bool>()), 1..200), start in any::<u32>(),
        ) {
            let mut sender = ToGuest { alloc: 0, forwarded: start, sent: start };
            let mut receiver = ToHost { alloc: 4096, received: start, forwarded: start, told: start };
            let (alloc, forwarded) = receiver.tell();
            sender.told(alloc, forwarded);
            let (mut sent, mut read) = (0u64, 0u64);
            for (want, reads, grows) in steps {
                let n = want.min(sender.free());
                sender.sent(n);
                sent += u64::from(n);
                prop_assert!(receiver.receive(n));
                let kept = u32::try_from(sent - read).unwrap();
                prop_assert!(kept <= receiver.alloc());
                let reads = reads.min(kept);
                receiver.forward(reads);
                read += u64::from(reads);
                if grows {
                    receiver.grow(16);
                }
                if receiver.is_due() {
                    let (alloc, forwarded) = receiver.tell();
                    sender.told(alloc, forwarded);
                }
            }
            receiver.forward(u32::try_from(sent - read).unwrap());
            if sender.free() == 0 {
                prop_assert!(receiver.is_due(), "the sender waits, and nobody tells it");
            }
        }
    }
}
