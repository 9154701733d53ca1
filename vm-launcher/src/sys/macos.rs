//! The same for macOS, with kqueue(2): the only module of the launcher that Linux does not compile.
//!
//! Checked with `cargo check --target x86_64-apple-darwin`; it has not been run on a Mac. There is no signal at the parent's
//! death there, so a launcher that is killed is cleaned up after by its guard alone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc::timespec;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::event::{EvFlags, EventFilter, FilterFlag, KEvent, Kqueue};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

const NOW: timespec = timespec { tv_sec: 0, tv_nsec: 0 };

/// A process; readable when it has ended.
#[derive(Debug)]
pub(crate) struct Watched {
    pid: Pid,
    end: End,
}

/// What becomes readable.
#[derive(Debug)]
enum End {
    Event(Kqueue),
    /// It had ended before it could be watched: a pipe that nobody writes.
    Ended(OwnedFd),
}

impl Watched {
    /// The process of this number; ESRCH when there is none.
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        let queue = Kqueue::new()?;
        let number = usize::try_from(pid.as_raw()).map_err(|_| Errno::ESRCH)?;
        let exit =
            KEvent::new(number, EventFilter::EVFILT_PROC, EvFlags::EV_ADD, FilterFlag::NOTE_EXIT, 0, 0);
        queue.kevent(&[exit], &mut [], Some(NOW))?;
        Ok(Self { pid, end: End::Event(queue) })
    }

    /// A child that nobody has waited for yet; it may have ended.
    pub(crate) fn child(pid: Pid) -> io::Result<Self> {
        match Self::open(pid) {
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {
                let (read, _) = pipe()?;
                Ok(Self { pid, end: End::Ended(read) })
            }
            other => other,
        }
    }

    /// Sends a signal; ESRCH when the process has ended. Between the look and the signal it may end, and its number be another's:
    /// macOS has nothing that would exclude that, and gives numbers out in turn.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let mut looked = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut looked, PollTimeout::ZERO)? {
            0 => Ok(kill(self.pid, signal)?),
            _ => Err(Errno::ESRCH.into()),
        }
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.end {
            End::Event(queue) => queue.as_fd(),
            End::Ended(pipe) => pipe.as_fd(),
        }
    }
}

/// Signals that are blocked, as a descriptor that is readable when one waits. kqueue tells of them, and the signal itself is
/// then taken, so that it does not arrive when it is unblocked again.
#[derive(Debug)]
pub(crate) struct Pending(Kqueue);

impl Pending {
    /// Of these signals, which the thread has blocked.
    pub(crate) fn of(blocked: &SigSet) -> io::Result<Self> {
        let queue = Kqueue::new()?;
        for signal in blocked {
            let number = signal as usize;
            let event =
                KEvent::new(number, EventFilter::EVFILT_SIGNAL, EvFlags::EV_ADD, FilterFlag::empty(), 0, 0);
            queue.kevent(&[event], &mut [], Some(NOW))?;
        }
        Ok(Self(queue))
    }

    /// Takes one.
    pub(crate) fn next(&self) -> io::Result<Option<Signal>> {
        let none = KEvent::new(0, EventFilter::EVFILT_SIGNAL, EvFlags::empty(), FilterFlag::empty(), 0, 0);
        let mut told = [none];
        if self.0.kevent(&[], &mut told, Some(NOW))? == 0 {
            return Ok(None);
        }
        let Some(signal) = i32::try_from(told[0].ident()).ok().and_then(|n| Signal::try_from(n).ok()) else {
            return Ok(None);
        };
        let one: SigSet = [signal].into_iter().collect();
        Ok(Some(one.wait()?))
    }
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The reading and the writing end of a pipe; children that are started after this do not inherit them.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe()?;
    for end in [&read, &write] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok((read, write))
}

/// There is no such thing: the guard does it.
#[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
pub(super) fn at_parents_death(_: Signal) -> io::Result<()> {
    Ok(())
}

/// There is no such call. What we open closes at exec; what whoever started us left open stays so.
pub(super) fn close_others_on_exec() {}

/// There is no such thing.
#[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
pub(super) fn no_new_privileges() -> io::Result<()> {
    Ok(())
}

/// No core dump of this process.
pub(crate) fn keep_memory_private() -> io::Result<()> {
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}

/// Whether there is a process of this number.
pub(crate) fn runs(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// The path of a socket's file as it is: at most 103 bytes, which bind and connect say themselves.
#[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
pub(crate) fn short(path: &Path) -> io::Result<(Option<OwnedFd>, PathBuf)> {
    Ok((None, path.to_owned()))
}
