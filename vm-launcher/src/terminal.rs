//! The terminal on stdin: the guest's keys while it is ours, and as it was whenever it is not.
//!
//! ```text
//!            started in the foreground, or fg                      bg, ^Z, the shell takes it back
//! untouched ─────────────────────────────────► raw, keys are read ─────────────────────────────► untouched
//!                                              └─ the end, however it comes ─► as it was
//! ```
//! A terminal belongs to the process group in its foreground (POSIX.1-2017, 11.1.4). One that is not may not read it and should
//! not change it: it would be stopped, and a launcher that is stopped takes no signal and ends no VM. So whose it is, is asked
//! before it is touched; a shell that moves a running job into the foreground tells nobody, hence [`LOOK`]. The guard knows
//! the settings of a terminal that is raw, and puts them back when the launcher is killed.

use std::fmt;
use std::io::{self, IsTerminal};
use std::num::ParseIntError;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::tcflag_t;
use nix::sys::termios::{
    ControlFlags, InputFlags, LocalFlags, OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr,
};
use nix::unistd::{getpgrp, tcgetpgrp};

use crate::guard::Guard;

/// How often it is asked whether a terminal in whose background we are has become ours.
const LOOK: Duration = Duration::from_millis(500);

/// The terminal on stdin, if it is one; put back when this is dropped.
#[derive(Debug)]
pub(crate) struct Terminal {
    is_there: bool,
    output: Output,
    /// Its settings before it was made raw, while it is.
    before: Option<Termios>,
    /// Whether it may be read, by the last look.
    ours: bool,
}

/// What is done to what is written on a terminal that is raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// A line's end begins the next at its left, as QEMU has it: others than the guest write there too.
    Lines,
    /// Nothing.
    AsItIs,
}

impl Terminal {
    /// Looks whether stdin is one, and touches nothing.
    pub(crate) fn on_stdin(output: Output) -> Self {
        Self { is_there: io::stdin().is_terminal(), output, before: None, ours: false }
    }

    /// Whether it is there and we are in its foreground.
    pub(crate) fn is_in_front(&mut self) -> bool {
        match self.is_there.then(|| tcgetpgrp(io::stdin())) {
            None => false,
            Some(Ok(group)) => group == getpgrp(),
            // Not the one that controls our session: it has no background for us.
            Some(Err(Errno::ENOTTY)) => true,
            // Hung up.
            Some(Err(_)) => {
                self.is_there = false;
                false
            }
        }
    }

    /// Makes it raw if it is ours now: every key is handed on as it is, Ctrl-C too.
    pub(crate) fn take(&mut self, guard: &mut Guard) -> io::Result<()> {
        self.ours = self.is_in_front();
        if !self.ours {
            // Who has it now has given it settings of its own.
            if self.before.take().is_some() {
                guard.terminal_is_back();
            }
            return Ok(());
        }
        let before = match self.before.take() {
            Some(before) => before,
            None => tcgetattr(io::stdin())?,
        };
        guard.terminal_is_raw(&before);
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        if self.output == Output::Lines {
            raw.output_flags.insert(OutputFlags::OPOST);
        }
        self.before = Some(before);
        Ok(tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?)
    }

    /// Remembers its settings, to be put back: somebody else is going to change them.
    pub(crate) fn remember(&mut self, guard: &mut Guard) -> io::Result<()> {
        let before = tcgetattr(io::stdin())?;
        guard.terminal_is_raw(&before);
        self.before = Some(before);
        Ok(())
    }

    /// Whether it may be read.
    pub(crate) const fn may_be_read(&self) -> bool {
        self.ours
    }

    /// When to [`Self::take`] it again, which no descriptor tells.
    pub(crate) fn look_at(&self) -> Option<Instant> {
        (self.is_there && !self.ours).then(|| Instant::now() + LOOK)
    }

    /// Reading it has failed: it was taken from us, or has hung up, which the next look finds.
    pub(crate) const fn was_taken(&mut self) {
        self.ours = false;
    }

    /// Puts it back, if we have changed it and it is still ours.
    pub(crate) fn put_back(&mut self) {
        self.ours = false;
        if let Some(before) = self.before.take()
            && self.is_in_front()
        {
            // A terminal that is gone (the window was closed) needs nothing put back.
            let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
        }
    }

    /// Another descriptor of it.
    pub(crate) fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        self.is_there.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose()
    }

    /// Whether stdin is a terminal that has not hung up.
    pub(crate) const fn is_there(&self) -> bool {
        self.is_there
    }

    /// It has hung up.
    pub(crate) const fn hung_up(&mut self) {
        (self.is_there, self.ours) = (false, false);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.put_back();
    }
}

/// Settings of a terminal as text, as `stty -g` has them: four sets of flags and the control characters, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    flags: [tcflag_t; 4],
    characters: Vec<u8>,
}

impl Settings {
    pub(crate) fn of(termios: &Termios) -> Self {
        let flags = [
            termios.input_flags.bits(),
            termios.output_flags.bits(),
            termios.control_flags.bits(),
            termios.local_flags.bits(),
        ];
        Self { flags, characters: termios.control_chars.to_vec() }
    }

    /// Gives them to a terminal; what is not in them, its speed above all, stays.
    pub(crate) fn put_on(&self, terminal: &impl AsFd) -> io::Result<()> {
        let mut termios = tcgetattr(terminal)?;
        let [input, output, control, local] = self.flags;
        termios.input_flags = InputFlags::from_bits_retain(input);
        termios.output_flags = OutputFlags::from_bits_retain(output);
        termios.control_flags = ControlFlags::from_bits_retain(control);
        termios.local_flags = LocalFlags::from_bits_retain(local);
        for (character, was) in termios.control_chars.iter_mut().zip(&self.characters) {
            *character = *was;
        }
        Ok(tcsetattr(terminal, SetArg::TCSANOW, &termios)?)
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [input, output, control, local] = self.flags;
        write!(f, "{input:x}:{output:x}:{control:x}:{local:x}")?;
        self.characters.iter().try_for_each(|character| write!(f, ":{character:x}"))
    }
}

impl FromStr for Settings {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let mut parts = text.split(':');
        let mut flags = [0; 4];
        for flag in &mut flags {
            *flag = tcflag_t::from_str_radix(parts.next().unwrap_or_default(), 16)?;
        }
        let characters = parts.map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>()?;
        Ok(Self { flags, characters })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;
    use nix::sys::termios::SpecialCharacterIndices;

    #[test]
    fn a_terminals_settings_are_put_back_from_their_text() {
        let pty = openpty(None, None).expect("a terminal");
        let before = tcgetattr(&pty.slave).expect("its settings");
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        raw.control_chars[SpecialCharacterIndices::VINTR as usize] = 7;
        tcsetattr(&pty.slave, SetArg::TCSANOW, &raw).expect("raw");
        assert_ne!(Settings::of(&before), Settings::of(&tcgetattr(&pty.slave).expect("raw")));
        let settings: Settings = Settings::of(&before).to_string().parse().expect("its own text");
        settings.put_on(&pty.slave).expect("putting it back");
        assert_eq!(Settings::of(&before), Settings::of(&tcgetattr(&pty.slave).expect("as it was")));
        for nonsense in ["", "1:2:3", "1:2:3:x", "1:2:3:4:100", "1:2:3:4:"] {
            nonsense.parse::<Settings>().expect_err(nonsense);
        }
    }
}
