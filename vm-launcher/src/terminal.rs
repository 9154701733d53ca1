//! The terminal as it was.
//!
//! QEMU makes the terminal raw for the serial console, and puts it back when it ends well. When it is killed it
//! cannot; so the launcher remembers the terminal before QEMU starts and puts it back on every way out. When the launcher
//! is killed too, the guard does it.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The terminal on stdin, if it is one; put back when this is dropped.
#[derive(Debug)]
pub(crate) struct Terminal(Option<Termios>);

impl Terminal {
    /// Remembers the terminal's settings.
    pub(crate) fn remember() -> io::Result<Self> {
        let stdin = io::stdin();
        Ok(Self(if stdin.is_terminal() { Some(tcgetattr(&stdin)?) } else { None }))
    }

    /// Hands every key on as it is, Ctrl-C too.
    pub(crate) fn make_raw(&self) -> io::Result<()> {
        let Some(settings) = &self.0 else { return Ok(()) };
        let mut raw = settings.clone();
        cfmakeraw(&mut raw);
        Ok(tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?)
    }

    /// Another descriptor of it.
    pub(crate) fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        self.0.as_ref().map(|_| io::stdin().as_fd().try_clone_to_owned()).transpose()
    }

    /// Whether stdin is a terminal.
    pub(crate) fn is_there(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            // A terminal that is gone (the window was closed) needs nothing put back.
            let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, settings);
        }
    }
}
