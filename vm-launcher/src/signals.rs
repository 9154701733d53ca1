//! The signals that end a VM, and those of job control, as a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal, raise};

use crate::LaunchError;
use crate::process::timeout;
use crate::sys::{self, Pending};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The end: SIGTERM, SIGINT and SIGHUP press the power button; SIGQUIT kills at once, as `portway kill` wants it.
    End(Signal),
    /// To be stopped, as Ctrl-Z asks for ([`Signals::suspend`]).
    Suspend,
    /// We were continued, perhaps in the foreground now.
    Continued,
}

/// Blocks them; the mask is put back when this is dropped.
#[derive(Debug)]
pub(crate) struct Signals {
    pending: Pending,
    before: SigSet,
}

impl Signals {
    pub(crate) fn block() -> io::Result<Self> {
        let mut told: SigSet =
            [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGCONT]
                .into_iter()
                .collect();
        // nohup(1): the VM outlives the terminal.
        if !sys::is_ignored(Signal::SIGHUP)? {
            told.add(Signal::SIGHUP);
        }
        // Blocked, the kernel sends neither (tty_ioctl(4)): what we do to the terminal in the moment it is taken from us fails
        // or passes, and does not stop us.
        let mut blocked = told;
        blocked.add(Signal::SIGTTIN);
        blocked.add(Signal::SIGTTOU);
        let before = SigSet::thread_get_mask()?;
        blocked.thread_block()?;
        Ok(Self { pending: Pending::of(&told)?, before })
    }

    pub(crate) fn next(&self) -> io::Result<Option<Told>> {
        Ok(self.pending.next()?.map(|signal| match signal {
            Signal::SIGTSTP => Told::Suspend,
            Signal::SIGCONT => Told::Continued,
            signal => Told::End(signal),
        }))
    }

    /// Waits until one has come, until `fd` has something to read, or for `patience`; answers whether `fd` has.
    pub(crate) fn wait(&self, fd: Option<BorrowedFd<'_>>, patience: Duration) -> io::Result<bool> {
        let mut waited: Vec<PollFd<'_>> =
            fd.into_iter().chain([self.as_fd()]).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut waited, timeout(patience)) {
            Ok(_) => Ok(fd.is_some() && waited.first().and_then(PollFd::any).unwrap_or(false)),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What is done about those that come before the VM has started.
    ///
    /// # Errors
    /// One that ends us.
    pub(crate) fn heed(&self) -> Result<(), LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot read signals", error);
        match self.next().map_err(failed)? {
            Some(Told::End(signal)) => Err(LaunchError::Interrupted(signal.as_str())),
            Some(Told::Suspend) => self.suspend().map_err(failed),
            Some(Told::Continued) | None => Ok(()),
        }
    }

    /// Stops this process until it is continued. Where nobody could continue it (an orphaned process group), the kernel does not
    /// stop it (POSIX.1-2017, 2.4.3), and this returns at once.
    #[expect(clippy::unused_self, reason = "it is blocked as long as this is there")]
    pub(crate) fn suspend(&self) -> io::Result<()> {
        let stop: SigSet = [Signal::SIGTSTP].into_iter().collect();
        raise(Signal::SIGTSTP)?;
        // It takes effect here.
        stop.thread_unblock()?;
        Ok(stop.thread_block()?)
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
