//! What becomes of a system call that is not in the list: the kernel sends `SIGSYS` in its place, the handler here makes it
//! fail with `EPERM`, counts it and wakes the control thread, which says so once for each call.
//!
//! A handler may do next to nothing (`signal-safety(7)`): it touches atomics and its own saved registers, and writes one byte.
#![allow(unsafe_code, reason = "a signal handler that answers for the kernel has no safe interface")]

use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use seccompiler::SeccompAction;

use super::calls;

/// What the filter does with calls that are not listed.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) const ACTION: SeccompAction = SeccompAction::Trap;
/// Where the registers of a signal are not known to us, the call fails without a word.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) const ACTION: SeccompAction = SeccompAction::Errno(nix::libc::EPERM.unsigned_abs());

/// Call numbers that are counted one by one; larger ones count as the last. Linux has some 470.
const NUMBERS: usize = 1024;

static COUNTS: [AtomicU32; NUMBERS] = [const { AtomicU32::new(0) }; NUMBERS];
/// Where the handler writes its byte.
static BELL: AtomicI32 = AtomicI32::new(-1);

/// Calls that were refused since the start.
#[must_use]
pub(crate) fn count() -> u64 {
    COUNTS.iter().map(|n| u64::from(n.load(Ordering::Relaxed))).sum()
}

/// Where a byte comes whenever a call was refused.
///
/// # Errors
/// When there is no descriptor for it.
pub(crate) fn bell() -> io::Result<UnixStream> {
    let (ours, handlers) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    handlers.set_nonblocking(true)?;
    // The handler's end stays open as long as the process: a handler may run at any time.
    BELL.store(handlers.into_raw_fd(), Ordering::Relaxed);
    Ok(ours)
}

/// Says what was refused: each call with the first refusal, and not again.
#[derive(Debug, Default)]
pub(crate) struct Teller {
    told: std::collections::BTreeSet<usize>,
}

impl Teller {
    /// Names of calls that were refused and not told yet.
    pub(crate) fn news(&mut self) -> Vec<String> {
        let refused = (0..NUMBERS).filter(|n| COUNTS[*n].load(Ordering::Relaxed) > 0);
        refused.filter(|n| self.told.insert(*n)).map(calls::name).collect()
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod handler {
    use std::sync::atomic::Ordering;

    use nix::libc;
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

    use super::{BELL, COUNTS, NUMBERS};

    pub(in super::super) fn watch() -> nix::Result<()> {
        let action = SigAction::new(SigHandler::SigAction(handle), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: `handle` does only what signal-safety(7) allows.
        unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
    }

    /// Runs in place of a refused call, on its thread.
    extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: with SA_SIGINFO the kernel gives the handler a `ucontext_t` of its own (sigaction(2)), which nobody else
        // touches until it returns.
        let Some(context) = (unsafe { context.as_mut() }) else { return };
        let number = refuse(&mut context.uc_mcontext);
        COUNTS[usize::try_from(number).map_or(NUMBERS - 1, |n| n.min(NUMBERS - 1))]
            .fetch_add(1, Ordering::Relaxed);
        let bell = BELL.load(Ordering::Relaxed);
        if bell >= 0 {
            // SAFETY: one byte of a static, and a descriptor that is never closed. A full socket has rung already.
            unsafe { libc::write(bell, b"!".as_ptr().cast(), 1) };
        }
    }

    /// Makes the call return EPERM, and answers its number. The kernel has put the registers back as they were before the
    /// call (seccomp(2), SECCOMP_RET_TRAP).
    #[cfg(target_arch = "x86_64")]
    fn refuse(registers: &mut libc::mcontext_t) -> i64 {
        let result = &mut registers.gregs[libc::REG_RAX as usize];
        std::mem::replace(result, i64::from(-libc::EPERM))
    }

    #[cfg(target_arch = "aarch64")]
    fn refuse(registers: &mut libc::mcontext_t) -> i64 {
        registers.regs[0] = i64::from(-libc::EPERM).cast_unsigned();
        registers.regs[8].cast_signed()
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use handler::watch;

/// Nothing to watch.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn watch() -> nix::Result<()> {
    Ok(())
}

/// A descriptor that never moves, for tests.
#[cfg(test)]
fn bell_number() -> i32 {
    BELL.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn the_bell_stays_open_as_long_as_the_process() {
        let ours = bell().unwrap();
        assert!(bell_number() >= 0 && ours.as_raw_fd() != bell_number());
    }
}
