//! The console of a VM that runs in the background, on this terminal.
//!
//! ```text
//! keys ─► raw terminal ─► at most PENDING bytes that the guest has not taken ─► console.sock ─► serial port
//! screen ◄──────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! Everything that is typed is the guest's, Ctrl-C too; only Ctrl-] is ours, and it works while the guest takes nothing. The
//! terminal is put back on every way out: Ctrl-], the VM's end, a signal, an error, and by the guard when this is killed.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::guard::Guard;
use crate::process::timeout;
use crate::registry::VmInfo;
use crate::signals::{Signals, Told};
use crate::terminal::{Output, Terminal};
use crate::{LaunchError, qmp, sockets, state};

/// Ctrl-], as telnet has it.
const LEAVE: u8 = 0x1d;
/// Bytes that are kept for a guest that does not take them; then the terminal is not read.
const PENDING: usize = 64 * 1024;

/// Why the console was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// By Ctrl-]. The VM goes on.
    Asked,
    /// The VM ended.
    Ended,
    /// By a signal. The VM goes on.
    Signal(i32),
}

/// Connects the terminal with the console of a VM until Ctrl-], a signal, or the VM's end.
///
/// `program` is the one that is the guard (see [`crate::GUARD`]), which puts the terminal back when this process is killed.
///
/// # Errors
/// When its console is elsewhere, is in use or cannot be reached.
pub fn console(vm: &VmInfo, program: &Path) -> Result<Left, LaunchError> {
    let setting = |text: String| Err(LaunchError::Setting(text));
    if !vm.detached {
        return setting(format!(
            "the console of {} is not on a socket, as it is with QEMU and run --detach: it is the terminal that started \
             process {}, and what was written on it is in {}",
            vm.name,
            vm.pid,
            vm.state_dir.join(state::CONSOLE_LOG).display()
        ));
    }
    if qmp::is_taken(&vm.state_dir.join(state::QMP), "console") {
        return setting(format!(
            "the console of {} is in use by another portway console, and has one reader at a time: leave that one first; \
             what is written on it is in {} too",
            vm.name,
            vm.state_dir.join(state::CONSOLE_LOG).display()
        ));
    }
    let failed = |error: io::Error| LaunchError::system("the console", error);
    let path = vm.state_dir.join(state::CONSOLE);
    let socket = sockets::connect(&path)
        .map_err(|error| LaunchError::State { path: path.clone(), reason: error.to_string() })?;
    let signals = Signals::block().map_err(failed)?;
    let terminal = Terminal::on_stdin(Output::AsItIs);
    let mut desk = match terminal.is_there() {
        true => Some(Desk { guard: Guard::start(program, None, &terminal)?, terminal }),
        false => None,
    };
    let relay = Relay::new(socket).map_err(failed)?;
    relay.run(&io::stdin(), &mut io::stdout().lock(), &signals, desk.as_mut()).map_err(failed)
}

/// The terminal on which it is typed. The one that is dropped first is the terminal: the guard learns that all is done when it is
/// put back.
struct Desk {
    terminal: Terminal,
    guard: Guard,
}

impl Desk {
    fn look(&mut self) -> io::Result<()> {
        self.terminal.take(&mut self.guard)
    }
}

/// Bytes between the terminal and the console.
struct Relay {
    socket: UnixStream,
    /// Typed, and not yet taken by the guest.
    pending: Vec<u8>,
    typing: bool,
}

impl Relay {
    fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, pending: Vec::new(), typing: true })
    }

    /// `input` is read as a descriptor, past any buffer: what a buffer held back, poll would not tell of.
    /// Without a desk the input is no terminal, and may be read at all times.
    fn run(
        mut self,
        input: &impl AsFd,
        output: &mut impl Write,
        signals: &Signals,
        mut desk: Option<&mut Desk>,
    ) -> io::Result<Left> {
        if let Some(desk) = &mut desk {
            desk.look()?;
        }
        loop {
            let terminal = desk.as_ref().map(|desk| &desk.terminal);
            let ready = self.wait(input.as_fd(), signals.as_fd(), terminal)?;
            if ready.signal
                && let Some(told) = signals.next()?
            {
                match (told, &mut desk) {
                    (Told::End(signal), _) => return Ok(Left::Signal(signal as i32)),
                    (Told::Suspend, Some(desk)) => {
                        desk.terminal.put_back();
                        desk.guard.terminal_is_back();
                        signals.suspend()?;
                        desk.look()?;
                    }
                    (Told::Suspend, None) => signals.suspend()?,
                    // Another may have had the terminal meanwhile.
                    (Told::Continued, Some(desk)) => desk.look()?,
                    (Told::Continued, None) => {}
                }
                continue;
            }
            if let Some(desk) = &mut desk
                && (ready.user || desk.terminal.look_at().is_some())
            {
                desk.look()?;
            }
            if ready.guest && !self.show(output)? {
                return Ok(Left::Ended);
            }
            let may_read = desk.as_ref().is_none_or(|desk| desk.terminal.may_be_read());
            if ready.user && may_read && self.take(input.as_fd())? {
                return Ok(Left::Asked);
            }
            if !self.send()? {
                return Ok(Left::Ended);
            }
        }
    }

    fn wait(
        &self,
        input: BorrowedFd<'_>,
        signals: BorrowedFd<'_>,
        terminal: Option<&Terminal>,
    ) -> io::Result<Ready> {
        let wanted = match self.pending.is_empty() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        };
        let mut waited =
            vec![PollFd::new(self.socket.as_fd(), wanted), PollFd::new(signals, PollFlags::POLLIN)];
        let may_read = terminal.is_none_or(Terminal::may_be_read);
        if self.typing && may_read && self.pending.len() < PENDING {
            waited.push(PollFd::new(input, PollFlags::POLLIN));
        }
        let look_at = terminal.and_then(Terminal::look_at);
        let left = look_at.map(|at| at.saturating_duration_since(Instant::now()));
        match poll(&mut waited, left.map_or(PollTimeout::NONE, timeout)) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        }
        let ready = |n: usize| waited.get(n).and_then(PollFd::any).unwrap_or(false);
        Ok(Ready { guest: ready(0), signal: ready(1), user: ready(2) })
    }

    /// From the guest to the screen; false at the VM's end.
    fn show(&mut self, output: &mut impl Write) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        match self.socket.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(read) => {
                output.write_all(buffer.get(..read).unwrap_or_default())?;
                output.flush()?;
                Ok(true)
            }
            Err(error) => Self::goes_on(error),
        }
    }

    /// From the keys into what is pending; true at Ctrl-].
    fn take(&mut self, input: BorrowedFd<'_>) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        let read = match nix::unistd::read(input, &mut buffer) {
            Ok(read) => read,
            // EIO: in the background, in this very moment.
            Err(Errno::EINTR | Errno::EAGAIN | Errno::EIO) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        self.typing = read > 0;
        let typed = buffer.get(..read).unwrap_or_default();
        let end = typed.iter().position(|byte| *byte == LEAVE);
        self.pending.extend_from_slice(typed.get(..end.unwrap_or(read)).unwrap_or_default());
        if end.is_some() {
            // What was typed before is the guest's, as far as it takes it now.
            self.send()?;
        }
        Ok(end.is_some())
    }

    /// From what is pending to the guest; false at the VM's end.
    fn send(&mut self) -> io::Result<bool> {
        while !self.pending.is_empty() {
            match self.socket.write(&self.pending) {
                Ok(sent) => drop(self.pending.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Self::goes_on(error),
            }
        }
        Ok(true)
    }

    /// The socket's end is the VM's, in whatever way it comes.
    fn goes_on(error: io::Error) -> io::Result<bool> {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(true),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Ok(false),
            _ => Err(error),
        }
    }
}

/// What poll has told.
#[derive(Debug, Default)]
struct Ready {
    guest: bool,
    signal: bool,
    user: bool,
}

/// The exit code of a console that was left by a signal: the shell's.
#[must_use]
pub fn exit_code(left: Left) -> u8 {
    match left {
        Left::Asked | Left::Ended => 0,
        Left::Signal(signal) => u8::try_from(signal + SIGNALLED).unwrap_or(1),
    }
}

/// What shells add to a signal's number.
const SIGNALLED: i32 = 128;

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A pair of sockets whose first is a terminal's keys.
    struct Keys(UnixStream);

    /// Runs a console between the user's fingers and the guest's serial port; answers how it was left and what the screen shows.
    fn session(
        user: impl FnOnce(&mut UnixStream) + Send,
        guest: impl FnOnce(&mut UnixStream) + Send,
    ) -> (Left, Vec<u8>) {
        let (console, serial) = UnixStream::pair().expect("a pair");
        between(console, serial, user, guest)
    }

    fn between(
        console: UnixStream,
        mut serial: UnixStream,
        user: impl FnOnce(&mut UnixStream) + Send,
        guest: impl FnOnce(&mut UnixStream) + Send,
    ) -> (Left, Vec<u8>) {
        let (keys, mut fingers) = UnixStream::pair().expect("a pair");
        let signals = Signals::block().expect("signals");
        let mut screen = Vec::new();
        let left = thread::scope(|scope| {
            scope.spawn(move || guest(&mut serial));
            // Borrowed: the keys' end would be the end of typing.
            let fingers = &mut fingers;
            scope.spawn(move || user(fingers));
            Relay::new(console)
                .expect("a socket")
                .run(&Keys(keys), &mut screen, &signals, None)
                .expect("no error")
        });
        (left, screen)
    }

    impl AsFd for Keys {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    #[test]
    fn every_byte_is_the_guests_but_the_one_that_leaves() {
        let (left, screen) = session(
            |user| user.write_all(b"ab\x03\x04\x1a\x1d").expect("typing"),
            |guest| {
                let mut got = Vec::new();
                guest.read_to_end(&mut got).expect("reading");
                assert_eq!(got, b"ab\x03\x04\x1a");
            },
        );
        assert_eq!((left, screen), (Left::Asked, Vec::new()));
    }

    #[test]
    fn a_long_paste_arrives_whole_at_a_guest_that_answers() {
        let text = vec![b'x'; 500_000];
        let typed = text.clone();
        let (left, screen) = session(
            move |user| user.write_all(&typed).expect("typing"),
            |guest| {
                let mut got = vec![0; 500_000];
                guest.read_exact(&mut got).expect("reading");
                assert!(got.iter().all(|byte| *byte == b'x'));
                guest.write_all(b"all of it").expect("writing");
            },
        );
        assert_eq!(screen, b"all of it");
        assert_eq!(left, Left::Ended);
    }

    #[test]
    fn a_guest_that_takes_nothing_can_be_left() {
        let (console, serial) = UnixStream::pair().expect("a pair");
        console.set_nonblocking(true).expect("a socket");
        while (&console).write(&[0; 4096]).is_ok() {}
        let (left, _) = between(
            console,
            serial,
            |user| user.write_all(b"anybody there?\x1d").expect("typing"),
            |guest| {
                // It only waits for the other end to go.
                let mut waited = [PollFd::new(guest.as_fd(), PollFlags::empty())];
                poll(&mut waited, PollTimeout::NONE).expect("waiting");
            },
        );
        assert_eq!(left, Left::Asked);
    }

    #[test]
    fn the_end_of_input_is_not_the_end_of_the_console() {
        let (left, screen) = session(
            |user| user.shutdown(std::net::Shutdown::Write).expect("no more keys"),
            |guest| guest.write_all(b"still here").expect("writing"),
        );
        assert_eq!((left, screen.as_slice()), (Left::Ended, &b"still here"[..]));
    }
}
