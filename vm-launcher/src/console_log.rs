//! What the guest writes on its console, kept in the state directory: `console.log`.
//!
//! The hypervisor writes it into a pipe, and we into the file, because a guest may write for ever: at [`LIMIT`] bytes the
//! file becomes `console.log.1` and a new one begins, so that at most twice that is kept.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::sys;

/// Bytes of one file.
pub(crate) const LIMIT: u64 = 8 << 20;
/// Bytes read at a time.
const CHUNK: usize = 16 * 1024;

/// The pipe and the file.
#[derive(Debug)]
pub(crate) struct ConsoleLog {
    pipe: Option<File>,
    path: PathBuf,
    file: Option<File>,
    written: u64,
    limit: u64,
}

impl ConsoleLog {
    /// Begins the log at `path` anew; the answer's other part is the writing end of the pipe.
    pub(crate) fn start(path: &Path) -> io::Result<(Self, OwnedFd)> {
        Self::with_limit(path, LIMIT)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<(Self, OwnedFd)> {
        let (read, write) = sys::pipe()?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let file = Some(begin(path)?);
        Ok((Self { pipe: Some(read.into()), path: path.to_owned(), file, written: 0, limit }, write))
    }

    /// What to wait for, while there is something to come.
    pub(crate) fn source(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Moves what has arrived into the file.
    pub(crate) fn read(&mut self) {
        let mut buffer = [0; CHUNK];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(read) => self.keep(buffer.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    /// The guest must not stop because the disk is full: then its words are not kept from there on.
    fn keep(&mut self, bytes: &[u8]) {
        if self.written >= self.limit {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            self.file = fs::rename(&self.path, old).and_then(|()| begin(&self.path)).ok();
            self.written = 0;
        }
        let kept = self.file.as_mut().is_some_and(|file| file.write_all(bytes).is_ok());
        if kept {
            self.written += bytes.len() as u64;
        } else {
            self.file = None;
        }
    }
}

fn begin(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_kept_up_to_its_limit_and_the_end_is_seen() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("console.log");
        let (mut log, end) = ConsoleLog::with_limit(&path, 10).expect("a log");
        let mut end = File::from(end);
        for text in ["0123456789", "second", "third"] {
            end.write_all(text.as_bytes()).expect("writing");
            log.read();
        }
        assert_eq!(fs::read(dir.path().join("console.log.1")).expect("the first file"), b"0123456789");
        assert_eq!(fs::read(&path).expect("the second file"), b"secondthird");
        end.write_all(b"x").expect("writing");
        log.read();
        assert_eq!(fs::read(&path).expect("a third file"), b"x");
        drop(end);
        log.read();
        assert!(log.source().is_none());
    }

    #[test]
    fn a_log_that_cannot_be_written_does_not_stop_the_guest() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("console.log");
        let (mut log, end) = ConsoleLog::with_limit(&path, 1).expect("a log");
        let mut end = File::from(end);
        end.write_all(b"ab").expect("writing");
        log.read();
        fs::remove_dir_all(dir.path()).expect("the directory goes");
        for _ in 0..100 {
            end.write_all(&[0; 4096]).expect("it is read");
            log.read();
        }
    }
}
