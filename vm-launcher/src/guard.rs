//! What cleans up when the launcher itself is killed.
//!
//! A process that gets SIGKILL removes no file, ends no child in order and leaves the terminal as it is. So the launcher
//! starts this one first: a process of its own session that holds the reading end of a pipe. It is told of every process
//! and file before they are left to themselves; when the pipe ends without the word that all is done, it ends the
//! processes, removes the files, puts the terminal back and notes the end. (The kernel tells the children too, by
//! `PR_SET_PDEATHSIG`; this one waits for them to be gone.) It holds the state directory's lock meanwhile, so that the
//! next run does not begin in the middle.
//!
//! ```text
//! launcher ──pipe──► guard     P pid · T pid · S socket · F file · R directory · E end-note · D done
//!                      W settings: the terminal is raw, and was this · B it is back           each ended by NUL
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::Termios;
use nix::unistd::Pid;

use crate::process::{Process, timeout};
use crate::sys::{Privileges, Watched};
use crate::terminal::{Settings, Terminal};
use crate::{LaunchError, sockets, sys};

/// The first argument of the program that is the guard.
pub const GUARD: &str = "__guard";

/// How long processes that may end in order have for it.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at a socket that should be dead.
const LOOK: Duration = Duration::from_millis(20);
/// The exit code that `portway wait` tells of a launcher that was killed: the shell's for SIGKILL.
const KILLED: u8 = 137;

/// The launcher's end.
#[derive(Debug)]
pub(crate) struct Guard {
    pipe: Option<File>,
    process: Option<Process>,
}

impl Guard {
    /// Starts `program` as the guard. It holds `lock`, that of the state directory, as long as it has something to do.
    pub(crate) fn start(
        program: &Path,
        lock: Option<OwnedFd>,
        terminal: &Terminal,
    ) -> Result<Self, LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot start the guard", error);
        let (read, write) = sys::pipe().map_err(failed)?;
        let mut command = Command::new(program);
        command.arg(GUARD).stdin(Stdio::from(read)).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(terminal) = terminal.duplicate().map_err(failed)? {
            // Its stdout is the terminal to put back; it writes nothing there.
            command.stdout(terminal);
        }
        sys::prepare_session(&mut command, lock.into_iter().collect(), Privileges::Never);
        let process = Process::start(command)?;
        Ok(Self { pipe: Some(write.into()), process: Some(process) })
    }

    fn tell(&mut self, word: u8, value: &[u8]) {
        let mut message = vec![word];
        message.extend_from_slice(value);
        message.push(0);
        if let Some(pipe) = &mut self.pipe
            && pipe.write_all(&message).is_err()
        {
            // The guard was killed; what is left is PR_SET_PDEATHSIG.
            self.pipe = None;
        }
    }

    /// A process that gets SIGTERM, and SIGKILL when it takes its time; or SIGKILL at once.
    pub(crate) fn watch(&mut self, process: &Process, in_order: bool) {
        self.tell(if in_order { b'T' } else { b'P' }, process.pid().to_string().as_bytes());
    }

    /// A file, before it is made.
    pub(crate) fn file(&mut self, path: &Path) {
        self.tell(b'F', path.as_os_str().as_bytes());
    }

    /// A socket of another process, which is removed only when that process is gone.
    pub(crate) fn socket(&mut self, path: &Path) {
        self.tell(b'S', path.as_os_str().as_bytes());
    }

    /// A directory with all that is in it.
    pub(crate) fn directory(&mut self, path: &Path) {
        self.tell(b'R', path.as_os_str().as_bytes());
    }

    /// The terminal, before it is made raw, and what it was.
    pub(crate) fn terminal_is_raw(&mut self, before: &Termios) {
        self.tell(b'W', Settings::of(before).to_string().as_bytes());
    }

    /// The terminal is as it was, or another's.
    pub(crate) fn terminal_is_back(&mut self) {
        self.tell(b'B', b"");
    }

    /// Where the end is noted.
    pub(crate) fn end_note(&mut self, path: &Path) {
        self.tell(b'E', path.as_os_str().as_bytes());
    }
}

impl Drop for Guard {
    /// Whatever way the launcher ends by itself, by now it has cleaned up itself.
    fn drop(&mut self) {
        self.tell(b'D', b"");
        self.pipe = None;
        if let Some(mut process) = self.process.take() {
            let _ = process.wait(PATIENCE);
        }
    }
}

/// What the guard was told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    kill: Vec<i32>,
    terminate: Vec<i32>,
    files: Vec<PathBuf>,
    sockets: Vec<PathBuf>,
    directories: Vec<PathBuf>,
    end_note: Option<PathBuf>,
    terminal: Option<Settings>,
    done: bool,
}

impl Told {
    fn hear(&mut self, message: &[u8]) {
        let Some((word, value)) = message.split_first() else { return };
        let path = || PathBuf::from(OsStr::from_bytes(value));
        let pid =
            std::str::from_utf8(value).ok().and_then(|text| text.parse::<i32>().ok()).filter(|pid| *pid > 1);
        match word {
            b'P' => self.kill.extend(pid),
            b'T' => self.terminate.extend(pid),
            b'F' => self.files.push(path()),
            b'S' => self.sockets.push(path()),
            b'R' => self.directories.push(path()),
            b'E' => self.end_note = Some(path()),
            b'W' => self.terminal = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()),
            b'B' => self.terminal = None,
            b'D' => self.done = true,
            _ => {}
        }
    }
}

/// The guard's life; `main` calls it when the first argument is [`GUARD`].
#[must_use]
pub fn guard() -> ExitCode {
    // Nothing but the pipe's end is for us; SIGTTOU would stop us at the terminal.
    let _ = SigSet::all().thread_set_mask();
    let mut told = Told::default();
    let mut watched: Vec<(Watched, bool)> = Vec::new();
    let mut partial = Vec::new();
    let mut buffer = [0; 4096];
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                for byte in buffer.get(..read).unwrap_or_default() {
                    if *byte != 0 {
                        partial.push(*byte);
                        continue;
                    }
                    told.hear(&partial);
                    partial.clear();
                    // Now, while the launcher has not yet waited for it, the number is surely this process.
                    let opened = |pids: &mut Vec<i32>, in_order: bool| -> Vec<(Watched, bool)> {
                        let open =
                            |pid| Watched::open(Pid::from_raw(pid)).ok().map(|process| (process, in_order));
                        pids.drain(..).filter_map(open).collect()
                    };
                    watched.extend(opened(&mut told.kill, false));
                    watched.extend(opened(&mut told.terminate, true));
                }
            }
        }
    }
    if !told.done {
        end_all(&watched);
        clean(&told, PATIENCE);
        if let Some(settings) = &told.terminal {
            // A terminal that is gone needs nothing put back.
            let _ = settings.put_on(&io::stdout());
        }
    }
    ExitCode::SUCCESS
}

fn end_all(watched: &[(Watched, bool)]) {
    for (process, in_order) in watched {
        // A process that has ended already needs no signal.
        let _ = process.signal(if *in_order { Signal::SIGTERM } else { Signal::SIGKILL });
    }
    let deadline = Instant::now() + PATIENCE;
    for (process, _) in watched {
        if !ended_by(process, deadline) {
            let _ = process.signal(Signal::SIGKILL);
            ended_by(process, Instant::now() + PATIENCE);
        }
    }
}

/// Whether a process ends before `deadline`.
fn ended_by(process: &Watched, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut waited = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited, timeout(left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Sockets that somebody still listens on have `patience`: a process that was started in the moment the launcher was killed is not
/// known here by its number, and the kernel is ending it.
fn clean(told: &Told, patience: Duration) {
    for file in &told.files {
        let _ = fs::remove_file(file);
    }
    let deadline = Instant::now() + patience;
    for socket in &told.sockets {
        while !sockets::remove_dead(socket) && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
    }
    for directory in &told.directories {
        let _ = fs::remove_dir_all(directory);
    }
    if let Some(path) = &told.end_note {
        let _ = fs::write(path, format!("{KILLED} the launcher was killed\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_is_told_is_understood_and_nonsense_is_not() {
        let mut told = Told::default();
        for message in
            [&b"P12"[..], b"T34", b"F/a b", b"S/s", b"R/d", b"E/e", b"P1", b"P-5", b"Px", b"", b"Z"]
        {
            told.hear(message);
        }
        let expected = Told {
            kill: vec![12],
            terminate: vec![34],
            files: vec!["/a b".into()],
            sockets: vec!["/s".into()],
            directories: vec!["/d".into()],
            end_note: Some("/e".into()),
            terminal: None,
            done: false,
        };
        assert_eq!(told, expected);
        told.hear(b"D");
        assert!(told.done);
    }

    #[test]
    fn what_is_left_is_removed_and_the_end_is_noted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "x").expect("writing");
        fs::create_dir_all(path("tmp/deep")).expect("directories");
        drop(std::os::unix::net::UnixListener::bind(path("dead")).expect("a socket"));
        let _live = std::os::unix::net::UnixListener::bind(path("live")).expect("a socket");
        let told = Told {
            files: vec![path("file"), path("never-made")],
            sockets: vec![path("dead"), path("live")],
            directories: vec![path("tmp")],
            end_note: Some(path("end")),
            ..Told::default()
        };
        clean(&told, Duration::ZERO);
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .expect("a directory")
            .map(|e| e.expect("an entry").file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["end", "live"]);
        assert!(fs::read_to_string(path("end")).expect("a note").starts_with("137 "));
    }
}
