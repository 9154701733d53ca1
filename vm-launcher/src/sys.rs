//! The few system calls that need `unsafe`: a pidfd, and what a child does between fork and exec.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, getpid, getppid};

/// A file descriptor that becomes readable when the process ends.
pub(crate) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Prepares a child: it keeps `inherited` open across exec under the same numbers, blocks no signal (we do), and
/// gets `orphaned` when the thread that starts it ends, however that happens.
///
/// The descriptors live as long as the command; drop it after the start, or the peer never sees them close.
pub(crate) fn prepare(command: &mut Command, inherited: Vec<OwnedFd>, orphaned: Signal) {
    let parent = getpid();
    let in_child = move || {
        for fd in &inherited {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        SigSet::empty().thread_set_mask()?;
        set_pdeathsig(orphaned)?;
        // The parent may have died before the line above took effect.
        if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: between fork and exec the closure calls only fcntl, sigemptyset, pthread_sigmask, prctl and getppid,
    // all async-signal-safe, and allocates nothing (errors are plain error numbers).
    unsafe { command.pre_exec(in_child) };
}

/// The number a descriptor will have in the child, which is the one it has here.
pub(crate) fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
