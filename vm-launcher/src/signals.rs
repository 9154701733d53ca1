//! The signals that end a VM, as a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};

use crate::sys::Pending;

/// SIGTERM, SIGINT and SIGHUP press the power button; SIGQUIT kills at once, as `portway kill` wants it. The mask is put
/// back when this is dropped.
#[derive(Debug)]
pub(crate) struct Signals {
    pending: Pending,
    before: SigSet,
}

impl Signals {
    pub(crate) fn block() -> io::Result<Self> {
        let set: SigSet =
            [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
        let before = SigSet::thread_get_mask()?;
        set.thread_block()?;
        Ok(Self { pending: Pending::of(&set)?, before })
    }

    pub(crate) fn next(&self) -> io::Result<Option<Signal>> {
        self.pending.next()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pending.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // It was the mask of this thread a moment ago, so it can be again.
        let _ = self.before.thread_set_mask();
    }
}
