//! A child whose end can be waited for in poll(2), and which does not outlive us.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::LaunchError;
use crate::sys::Watched;

/// A running child; dropped before its end was seen, it is killed.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pid: Pid,
    watched: Watched,
    ended: bool,
}

impl Process {
    /// Starts `command` and drops it, so that the descriptors made for the child close here.
    pub(crate) fn start(mut command: Command) -> Result<Self, LaunchError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let fail = |error: io::Error| LaunchError::Start { program: program.clone(), error };
        let mut child = command.spawn().map_err(fail)?;
        let opened = i32::try_from(child.id())
            .map_err(io::Error::other)
            .map(Pid::from_raw)
            .and_then(|pid| Ok((pid, Watched::child(pid)?)));
        match opened {
            Ok((pid, watched)) => Ok(Self { child, pid, watched, ended: false }),
            Err(error) => {
                // Unwatchable, so it must not live on; there is nothing to do about a kill that fails.
                let _ = child.kill().and_then(|()| child.wait().map(drop));
                Err(fail(error))
            }
        }
    }

    /// Its number.
    pub(crate) const fn pid(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        self.ended |= status.is_some();
        Ok(status)
    }

    /// Sends a signal; to a process that has ended that is nothing.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match kill(self.pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the end for at most `patience`.
    pub(crate) fn wait(&mut self, patience: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut waited = [PollFd::new(self.watched.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waited, timeout(left)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// SIGTERM, `patience`, SIGKILL.
    pub(crate) fn end(&mut self, patience: Duration) -> io::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        match self.wait(patience)? {
            Some(status) => Ok(status),
            None => self.kill(),
        }
    }

    /// SIGKILL, and waits for the end, which nothing can delay now.
    pub(crate) fn kill(&mut self) -> io::Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        let status = self.child.wait()?;
        self.ended = true;
        Ok(status)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watched.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended {
            // On the way out of an error; that error is the one to tell.
            let _ = self.kill();
        }
    }
}

/// A timeout for poll, rounded up: a rest below one millisecond must not become a busy loop.
pub(crate) fn timeout(left: Duration) -> PollTimeout {
    PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
}
