//! The VM's state directory: one VM at a time, its Ethernet address, the logs of the two processes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::{LaunchError, Mac, sys};

/// Bytes of a log's end that are looked at, and lines of it that are told.
const TAIL_BYTES: u64 = 8192;
const TAIL_LINES: usize = 12;

/// The launcher's process id, and the lock.
pub(crate) const PID: &str = "pid";
/// The socket on which QEMU takes QMP from anyone of this user.
pub(crate) const QMP: &str = "qmp.sock";
/// The socket of the console, when it is not a terminal's.
pub(crate) const CONSOLE: &str = "console.sock";
/// What was written on the console.
pub(crate) const CONSOLE_LOG: &str = "console.log";
/// How the last run ended: its exit code and a line.
pub(crate) const END: &str = "end";
/// Where QEMU keeps what a disposable VM writes.
pub(crate) const TMP: &str = "tmp";
/// How long the guard of a launcher that was killed may take over its cleaning.
const GUARD_PATIENCE: Duration = Duration::from_secs(8);
/// How often the lock is tried meanwhile.
const GUARD_POLL: Duration = Duration::from_millis(20);

/// Takes the lock. Its owner may be gone while that one's guard still cleans up, which is worth waiting for.
fn take(mut file: File, path: &Path) -> Result<Flock<File>, LaunchError> {
    let fail = |reason: String| LaunchError::State { path: path.to_owned(), reason };
    let deadline = Instant::now() + GUARD_PATIENCE;
    loop {
        let (back, errno) = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err(refused) => refused,
        };
        file = back;
        if errno != Errno::EWOULDBLOCK {
            return Err(fail(format!("cannot lock it: {errno}")));
        }
        let mut owner = String::new();
        file.rewind()
            .and_then(|()| file.read_to_string(&mut owner))
            .map_err(|error| fail(error.to_string()))?;
        let owner = owner.trim();
        let gone = owner.parse().is_ok_and(|pid| !sys::runs(pid));
        if !gone || Instant::now() >= deadline {
            return Err(fail(format!(
                "in use by process {owner}: stop that VM, or give this one its own --state-dir"
            )));
        }
        thread::sleep(GUARD_POLL);
    }
}

/// The directory, locked for as long as this lives.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    lock: Flock<File>,
}

impl StateDir {
    /// Makes the directory if it is absent (for this user only) and takes its lock.
    pub(crate) fn open(path: &Path) -> Result<Self, LaunchError> {
        let fail = |path: &Path, reason: String| LaunchError::State { path: path.to_owned(), reason };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| fail(path, format!("cannot make it: {error}")))?;
        let lock = path.join(PID);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock)
            .map_err(|error| fail(&lock, error.to_string()))?;
        let mut lock = take(file, path)?;
        // Who holds it, for the message above.
        let noted = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        noted.map_err(|error| fail(path, error.to_string()))?;
        let state = Self { path: path.to_owned(), lock };
        state.clear();
        Ok(state)
    }

    /// Removes what a run that was cut short has left: nobody else can be at it now.
    fn clear(&self) {
        for name in [QMP, CONSOLE, END] {
            // What is not there needs no removal, and what cannot be removed is told when it is made anew.
            let _ = fs::remove_file(self.path.join(name));
        }
        let _ = fs::remove_dir_all(self.path.join(TMP));
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Another descriptor of the lock, which is free when all of them are closed.
    pub(crate) fn lock(&self) -> io::Result<OwnedFd> {
        self.lock.as_fd().try_clone_to_owned()
    }

    /// The VM's Ethernet address: the same at every start, so that its lease is the same too. `half`: see [`write_private`].
    pub(crate) fn mac(&self, half: impl FnOnce(&Path)) -> Result<Mac, LaunchError> {
        let path = self.path.join("mac");
        let fail = |reason: String| LaunchError::State { path: path.clone(), reason };
        match fs::read_to_string(&path) {
            Ok(text) => {
                text.trim().parse().map_err(|why| fail(format!("{why}; remove the file for a new address")))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut random = [0; 6];
                let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
                let mac = Mac::local(random);
                read.and_then(|()| write_private(&path, format!("{mac}\n").as_bytes(), half))
                    .map_err(|error| fail(error.to_string()))?;
                Ok(mac)
            }
            Err(error) => Err(fail(error.to_string())),
        }
    }

    /// Begins a log anew.
    pub(crate) fn log(&self, name: &str) -> Result<Log, LaunchError> {
        let path = self.path.join(name);
        let opened =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path).and_then(
                |_| {
                    // Appending, so that two writers (stdout and stderr) do not overwrite each other.
                    OpenOptions::new().append(true).open(&path)
                },
            );
        match opened {
            Ok(file) => Ok(Log { path, file }),
            Err(error) => Err(LaunchError::State { path, reason: error.to_string() }),
        }
    }
}

/// Writes a file of the state directory, for this user alone, and whole or not at all. `half` is told first under which name
/// it lies until it is whole: what a launcher that is killed leaves there, somebody has to remove.
pub(crate) fn write_private(path: &Path, bytes: &[u8], half: impl FnOnce(&Path)) -> io::Result<()> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    half(Path::new(&new));
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        // The error told is the first; a piece of a file helps nobody.
        let _ = fs::remove_file(&new);
    }
    written
}

/// What one process says, in a file.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) path: PathBuf,
    file: File,
}

impl Log {
    /// The writing end, for a child's stdout or stderr.
    pub(crate) fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The last lines, or where the log is if it has none.
    pub(crate) fn tail(&self) -> String {
        Self::tail_of(&self.path)
    }

    /// The last lines of the log at `path`.
    pub(crate) fn tail_of(path: &Path) -> String {
        let text = File::open(path).and_then(|mut file| {
            let len = file.metadata()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        });
        match text {
            Ok(text) if text.trim().is_empty() => {
                format!("it said nothing ({} is empty)", path.display())
            }
            Ok(text) => last_lines(&text),
            Err(error) => format!("{} cannot be read: {error}", path.display()),
        }
    }

    /// The last line, without the name of the program that everything we say begins with.
    pub(crate) fn last_words(&self) -> String {
        Self::last_words_of(&self.path)
    }

    /// The last line of the log at `path`.
    pub(crate) fn last_words_of(path: &Path) -> String {
        let tail = Self::tail_of(path);
        let line = tail.lines().last().unwrap_or_default();
        line.strip_prefix("portway: ").unwrap_or(line).to_owned()
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    lines.get(from..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ethernet_address_is_kept() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(dir.path()).expect("it can be locked");
        let mac = state.mac(|_| ()).expect("a new address");
        assert_eq!(state.mac(|_| ()).expect("the kept one"), mac);
    }

    #[test]
    fn a_damaged_address_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let state = StateDir::open(dir.path()).expect("it can be locked");
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:5", "01:00:5e:00:00:01", "+1:54:00:12:34:56"] {
            fs::write(dir.path().join("mac"), bad).expect("writing");
            let error = state.mac(|_| ()).expect_err("it is no address").to_string();
            assert!(error.contains("mac") && error.contains("remove"), "{bad:?}: {error}");
        }
    }

    #[test]
    fn a_second_vm_in_the_same_directory_is_refused_with_the_owner() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let _first = StateDir::open(dir.path()).expect("it can be locked");
        let error = StateDir::open(dir.path()).expect_err("it is locked").to_string();
        assert!(error.contains(&std::process::id().to_string()) && error.contains("--state-dir"), "{error}");
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let text: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let tail = last_lines(&text);
        assert!(tail.starts_with("line 88\n") && tail.ends_with("line 99"), "{tail}");
    }
}
