//! What is typed on the launcher's terminal, on its way to the guest.
//!
//! ```text
//! keys ─► terminal, raw while it is ours ─► at most PENDING bytes that QEMU has not taken ─► pipe ─► QEMU's stdin ─► serial port
//! ```
//! QEMU would make the terminal raw itself, and be stopped by it in the background, with us: one process group, one fate. With a
//! pipe for its stdin it has a group of its own and never sees the terminal but to write on it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::guard::Guard;
use crate::sys;
use crate::terminal::Terminal;

/// Bytes that are kept for a guest that does not take them; then the terminal is not read.
const PENDING: usize = 64 * 1024;

/// The terminal and the pipe.
#[derive(Debug)]
pub(crate) struct Keys {
    terminal: Terminal,
    /// `None` once the hypervisor has closed its end.
    pipe: Option<File>,
    pending: Vec<u8>,
}

impl Keys {
    /// The terminal's keys, and the end of the pipe from which the hypervisor reads them.
    pub(crate) fn of(terminal: Terminal) -> io::Result<(Self, OwnedFd)> {
        let (read, write) = sys::pipe()?;
        fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { terminal, pipe: Some(write.into()), pending: Vec::new() }, read))
    }

    /// Takes the terminal if it is ours now: at the start, and when we are continued.
    pub(crate) fn look(&mut self, guard: &mut Guard) -> io::Result<()> {
        self.terminal.take(guard)
    }

    /// Puts the terminal back, before we are stopped.
    pub(crate) fn put_back(&mut self, guard: &mut Guard) {
        self.terminal.put_back();
        guard.terminal_is_back();
    }

    /// When [`Self::turn`] has something to do that no descriptor tells of.
    pub(crate) fn look_at(&self) -> Option<Instant> {
        self.terminal.look_at()
    }

    /// Whether the terminal is to be waited for.
    pub(crate) fn wants_keys(&self) -> bool {
        self.pipe.is_some() && self.terminal.may_be_read() && self.pending.len() < PENDING
    }

    /// The pipe, when something waits for room in it.
    pub(crate) fn wants_room(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| !self.pending.is_empty()).map(AsFd::as_fd)
    }

    /// Hands on what was typed. `typed`: the terminal has something to read.
    pub(crate) fn turn(&mut self, typed: bool, guard: &mut Guard) -> io::Result<()> {
        if typed || (self.terminal.is_there() && !self.terminal.may_be_read()) {
            // It may have been taken from us, or given to us, since.
            self.look(guard)?;
        }
        if typed && self.terminal.may_be_read() {
            self.read();
        }
        self.hand_on();
        Ok(())
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        match nix::unistd::read(io::stdin(), &mut buffer) {
            // SIGHUP says the rest, if somebody wants to be told.
            Ok(0) => self.terminal.hung_up(),
            Ok(read) => self.pending.extend_from_slice(buffer.get(..read).unwrap_or_default()),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => self.terminal.was_taken(),
        }
    }

    fn hand_on(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        while !self.pending.is_empty() {
            match pipe.write(&self.pending) {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The hypervisor has ended, which its process tells.
                Err(_) => {
                    self.pipe = None;
                    return;
                }
            }
        }
    }
}
