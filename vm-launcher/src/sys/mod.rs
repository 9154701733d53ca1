//! The system: what a child does between fork and exec, and processes and signals as descriptors to wait for, which every
//! system has in its own way (`linux`, `macos`).

#[cfg(not(target_os = "macos"))]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{ForkResult, Pid, getpid, getppid, setsid};

#[cfg(not(target_os = "macos"))]
use self::linux::at_parents_death;
#[cfg(not(target_os = "macos"))]
pub(crate) use self::linux::{Pending, Watched, pipe, runs, short};
#[cfg(target_os = "macos")]
use self::macos::at_parents_death;
#[cfg(target_os = "macos")]
pub(crate) use self::macos::{Pending, Watched, pipe, runs, short};

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
        at_parents_death(orphaned)?;
        // The parent may have died before the line above took effect.
        if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: between fork and exec the closure calls only fcntl, sigemptyset, pthread_sigmask, prctl and getppid,
    // all async-signal-safe, and allocates nothing (errors are plain error numbers).
    unsafe { command.pre_exec(in_child) };
}

/// Prepares a child that outlives us: in a session of its own, with `inherited` open across exec.
pub(crate) fn prepare_session(command: &mut Command, inherited: Vec<OwnedFd>) {
    let in_child = move || {
        for fd in &inherited {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        SigSet::empty().thread_set_mask()?;
        setsid()?;
        Ok(())
    };
    // SAFETY: as above; setsid is async-signal-safe too.
    unsafe { command.pre_exec(in_child) };
}

/// Goes on in a child and in the parent, which is told the child's pid.
///
/// The process must have one thread: in the child there would be only this one, with the locks of the others.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: by the caller's word there is no other thread, so the child may do all that we may.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// The number a descriptor will have in the child, which is the one it has here.
pub(crate) fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
