//! What Linux has for us: pidfds, signalfds, a signal at the parent's death, `/proc/self/fd`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::prctl::{set_dumpable, set_no_new_privs, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, pipe2};

/// A process, which no other can have become; readable when it has ended.
#[derive(Debug)]
pub(crate) struct Watched(OwnedFd);

impl Watched {
    /// The process of this number; ESRCH when there is none.
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel just gave us this descriptor; nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// A child that nobody has waited for yet; it may have ended.
    pub(crate) fn child(pid: Pid) -> io::Result<Self> {
        Self::open(pid)
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: pidfd_send_signal(2) takes three integers and a pointer that may be null.
        let sent = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal as libc::c_int, none, 0)
        };
        Errno::result(sent).map(drop)?;
        Ok(())
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Signals that are blocked, as a descriptor that is readable when one waits.
#[derive(Debug)]
pub(crate) struct Pending(SignalFd);

impl Pending {
    /// Of these signals, which the thread has blocked.
    pub(crate) fn of(blocked: &SigSet) -> io::Result<Self> {
        Ok(Self(SignalFd::with_flags(blocked, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// Takes one.
    pub(crate) fn next(&self) -> io::Result<Option<Signal>> {
        let Some(info) = self.0.read_signal()? else { return Ok(None) };
        Ok(i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok()))
    }
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The reading and the writing end of a pipe; children do not inherit them.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe2(OFlag::O_CLOEXEC)?)
}

/// In a child: has the kernel send `signal` when the thread that made it ends.
pub(super) fn at_parents_death(signal: Signal) -> io::Result<()> {
    Ok(set_pdeathsig(signal)?)
}

/// In a child: has every descriptor but the first three close at exec. Those of ours do anyway; these are what whoever started us
/// left open. Before Linux 5.11 there is no such call, and what was left open stays so.
pub(super) fn close_others_on_exec() {
    // SAFETY: close_range(2) takes three integers; with this flag it closes nothing that is in use here.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// In a child: no program it starts gives it privileges.
pub(super) fn no_new_privileges() -> io::Result<()> {
    Ok(set_no_new_privs()?)
}

/// No core dump of this process, and no look into its memory by others of the same user: what is typed may be a password.
pub(crate) fn keep_memory_private() -> io::Result<()> {
    Ok(set_dumpable(false)?)
}

/// Whether there is a process of this number that has not ended. One that nobody has waited for yet has.
pub(crate) fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in parentheses and may have some of its own (proc_pid_stat(5)).
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// The path of a socket's file, short; it lives as long as the descriptor.
///
/// A socket's address has 107 bytes for a path (unix(7)), and a state directory beside an image easily has more. Linux
/// follows `/proc/self/fd/N`, so directory and name are given as that: short, and the same file.
pub(crate) fn short(path: &Path) -> io::Result<(Option<OwnedFd>, PathBuf)> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let fd = open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())).join(name);
    Ok((Some(fd), short))
}
