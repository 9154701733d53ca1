//! Where lines go, and what becomes of them when nobody takes them there.
//!
//! Standard error is often a pipe to a supervisor, or a terminal somebody has stopped (Ctrl-S); a file may be a named pipe. A write
//! to one that is full waits for its reader, and with it would wait the thread that carries everybody's frames: guests can make us
//! say things. So a line is written only where there is room (`poll(2)`; of a pipe that is said to have room, [`ROOM`] bytes are
//! taken without waiting, pipe(7)), else it is counted, and the count is told once there is. Likewise on a disk that is full.
//!
//! Not here: a pipe that other processes write to as well may fill between the look and the write; ours alone never does.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes of one line at most: `PIPE_BUF` of Linux.
const ROOM: usize = 4096;

/// What lines are written to.
pub(super) struct Output {
    /// Standard error, where there is no file.
    file: Option<File>,
    /// Lines lost since the last that was written. Held while one is written, so that lines of two threads do not meet.
    lost: Mutex<u64>,
}

impl Output {
    pub(super) const fn new(file: Option<File>) -> Self {
        Self { file, lost: Mutex::new(0) }
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { file: self.file.as_ref(), lost: self.lost.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

/// One line on its way.
pub(super) struct Line<'a> {
    file: Option<&'a File>,
    lost: MutexGuard<'a, u64>,
}

impl Line<'_> {
    /// Writes `bytes` if that needs no waiting. What cannot be written is lost.
    fn put(&self, bytes: &[u8]) -> bool {
        match self.file {
            Some(mut file) => has_room(file.as_fd()) && file.write_all(bytes).is_ok(),
            None => {
                let mut stderr = io::stderr();
                has_room(stderr.as_fd()) && stderr.write_all(bytes).is_ok()
            }
        }
    }
}

fn has_room(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    let ready = poll(&mut fds, PollTimeout::ZERO);
    // A reader that has gone (POLLERR) makes the write fail at once, which is no waiting either.
    ready.is_ok_and(|n| n > 0)
}

impl Write for Line<'_> {
    /// Takes every line whole: a fault here must not be told to the log.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if *self.lost > 0 {
            let told = format!("({} lines are lost: the log had no room)\n", self.lost);
            if !self.put(told.as_bytes()) {
                *self.lost += 1;
                super::lose();
                return Ok(line.len());
            }
            *self.lost = 0;
        }
        let written = match line.split_at_checked(ROOM) {
            Some((start, rest)) if !rest.is_empty() => {
                self.put(&[start.split_at(ROOM - 1).0, b"\n"].concat())
            }
            _ => self.put(line),
        };
        if !written {
            *self.lost += 1;
            super::lose();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_full_pipe_loses_lines_and_tells_how_many_once_somebody_reads() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        let say = |line: &[u8]| output.make_writer().write_all(line).unwrap();
        // More than any pipe holds; a thread that waited would never end this test.
        let line = [&[b'x'; 999][..], b"\n"].concat();
        for _ in 0..3000 {
            say(&line);
        }
        let lost = *output.lost.lock().unwrap();
        assert!(lost > 0 && lost < 3000, "{lost}");
        let mut taken = vec![0; 65_536];
        assert!(reader.read(&mut taken).unwrap() > 4096);
        say(b"again\n");
        drop(output);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert!(rest.ends_with(&format!("({lost} lines are lost: the log had no room)\nagain\n")), "{rest}");
    }

    #[test]
    fn a_long_line_is_cut_and_ends_as_lines_do() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        output.make_writer().write_all(&[b'y'; 100_000]).unwrap();
        drop(output);
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        assert!(text.len() == ROOM && text.ends_with(b"y\n"));
    }

    #[test]
    fn a_reader_that_has_gone_is_no_fault_of_ours() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = Output::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        output.make_writer().write_all(b"to nobody\n").unwrap();
        assert_eq!(*output.lost.lock().unwrap(), 1);
    }
}
