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
use nix::unistd::{ForkResult, Pid, getpid, getppid, setsid};

/// A file descriptor that becomes readable when the process ends.
pub(crate) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether there is a process of this number that has not ended. One that nobody has waited for yet has.
pub(crate) fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in parentheses and may have some of its own (proc_pid_stat(5)).
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
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

/// Sends a signal to the process of a pidfd, which no other process can have become.
pub(crate) fn pidfd_signal(fd: &OwnedFd, signal: Signal) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal(2) takes three integers and a pointer that may be null.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal as libc::c_int, none, 0) };
    Errno::result(sent).map(drop)?;
    Ok(())
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
