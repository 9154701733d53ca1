//! Lines from the DHCP client's script to pid 1, through the FIFO `/run/portway/events`.
//!
//! `lease ADDRESS` is the only word so far. Lines longer than [`LINE_MAX`] and unknown words are dropped: the
//! FIFO is the guest's own, and nothing in it may end pid 1.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

const DIRECTORY: &str = "/run/portway";
const FIFO: &str = "/run/portway/events";
/// Bytes of one line at most.
const LINE_MAX: usize = 256;

/// Something a script told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The guest has this address now.
    Lease(IpAddr),
}

/// The reading end.
#[derive(Debug)]
pub(crate) struct Events {
    fifo: File,
    partial: Vec<u8>,
}

impl Events {
    /// Makes the FIFO. It is opened for both ways, so that it never reads as ended between two writers.
    pub(crate) fn open() -> io::Result<Self> {
        fs::create_dir_all(DIRECTORY)?;
        nix::unistd::mkfifo(FIFO, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let fifo =
            OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(FIFO)?;
        Ok(Self { fifo, partial: Vec::new() })
    }

    /// What has arrived since the last call.
    pub(crate) fn read(&mut self) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        let mut buffer = [0; 512];
        loop {
            match self.fifo.read(&mut buffer) {
                Ok(read) => events.extend(feed(&mut self.partial, buffer.get(..read).unwrap_or_default())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(events),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fifo.as_fd()
    }
}

/// Adds bytes to the unfinished line and gives out the events of the finished ones.
fn feed(partial: &mut Vec<u8>, bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    for &byte in bytes {
        if byte == b'\n' {
            events.extend(std::str::from_utf8(partial).ok().and_then(parse));
            partial.clear();
        } else if partial.len() < LINE_MAX {
            partial.push(byte);
        }
    }
    events
}

fn parse(line: &str) -> Option<Event> {
    line.strip_prefix("lease ")?.trim().parse().ok().map(Event::Lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_may_arrive_in_pieces() {
        let mut partial = Vec::new();
        assert_eq!(feed(&mut partial, b"lease 192.168"), []);
        let lease = Event::Lease("192.168.127.2".parse().expect("an address"));
        assert_eq!(feed(&mut partial, b".127.2\nlease "), [lease]);
    }

    #[test]
    fn nonsense_and_endless_lines_are_dropped() {
        let mut partial = Vec::new();
        assert_eq!(feed(&mut partial, b"lease nowhere\n\xff\xfe\nbonjour\n"), []);
        assert_eq!(feed(&mut partial, &[b'x'; 10_000]), []);
        assert!(partial.len() <= LINE_MAX);
    }
}
