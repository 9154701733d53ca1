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

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, Pid, getpid, getppid, setsid};

#[cfg(not(target_os = "macos"))]
pub(crate) use self::linux::{Pending, Watched, keep_memory_private, pipe, runs, short};
#[cfg(not(target_os = "macos"))]
use self::linux::{at_parents_death, close_others_on_exec, no_new_privileges};
#[cfg(target_os = "macos")]
pub(crate) use self::macos::{Pending, Watched, keep_memory_private, pipe, runs, short};
#[cfg(target_os = "macos")]
use self::macos::{at_parents_death, close_others_on_exec, no_new_privileges};

/// Prepares a child: it keeps `inherited` open across exec under the same numbers, blocks no signal (we do), and
/// gets `orphaned` when the thread that starts it ends, however that happens. It may write on a terminal whose foreground is
/// ours, `stty tostop` or not.
///
/// The descriptors live as long as the command; drop it after the start, or the peer never sees them close.
pub(crate) fn prepare(
    command: &mut Command,
    inherited: Vec<OwnedFd>,
    orphaned: Signal,
    privileges: Privileges,
) {
    let parent = getpid();
    let in_child = move || {
        hand_over(&inherited)?;
        privileges.bound()?;
        SigSet::empty().thread_set_mask()?;
        ignore(Signal::SIGTTOU)?;
        at_parents_death(orphaned)?;
        // The parent may have died before the line above took effect.
        if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: between fork and exec the closure calls only close_range, fcntl, sigemptyset, pthread_sigmask, sigaction, prctl and getppid,
    // all async-signal-safe, and allocates nothing (errors are plain error numbers).
    unsafe { command.pre_exec(in_child) };
}

/// Prepares a child that outlives us: in a session of its own, with `inherited` open across exec.
pub(crate) fn prepare_session(command: &mut Command, inherited: Vec<OwnedFd>, privileges: Privileges) {
    let in_child = move || {
        hand_over(&inherited)?;
        privileges.bound()?;
        SigSet::empty().thread_set_mask()?;
        setsid()?;
        Ok(())
    };
    // SAFETY: as above; setsid is async-signal-safe too.
    unsafe { command.pre_exec(in_child) };
}

/// Whether a child, and what it starts, may have more privileges than we have, by a program's owner or capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privileges {
    /// Never, whatever it starts (`PR_SET_NO_NEW_PRIVS`).
    Never,
    /// It has a use for them: the sidecar, whose program may be allowed a raw socket and gives up what it does not need itself;
    /// QEMU with a bridge, whose helper belongs to root.
    Perhaps,
}

impl Privileges {
    fn bound(self) -> io::Result<()> {
        match self {
            Self::Never => no_new_privileges(),
            Self::Perhaps => Ok(()),
        }
    }
}

/// In a child: leaves these descriptors to it, and of all others none but the first three, whoever opened them.
fn hand_over(inherited: &[OwnedFd]) -> io::Result<()> {
    close_others_on_exec();
    for fd in inherited {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    Ok(())
}

/// Ignores a signal, across exec too.
fn ignore(signal: Signal) -> io::Result<()> {
    let ignored = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler of ours is called.
    unsafe { sigaction(signal, &ignored) }?;
    Ok(())
}

/// Whether whoever started us had a signal ignored, as nohup(1) does.
pub(crate) fn is_ignored(signal: Signal) -> io::Result<bool> {
    let mut found = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: sigaction(2) without a new action only writes the old one to the room it is given.
    Errno::result(unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), found.as_mut_ptr()) })?;
    // SAFETY: it succeeded, so it has written it.
    Ok(unsafe { found.assume_init() }.sa_sigaction == libc::SIG_IGN)
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
