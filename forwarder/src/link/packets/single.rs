//! Every POSIX system, macOS above all: recvmsg(2) and sendmsg(2), a frame in a call.
//!
//! macOS has no room of the sender's own for a datagram: when the receiver has none, sendmsg(2) says ENOBUFS, and no event tells
//! when that is over. So such a frame is tried again for a moment, and then lost as on a cable, for TCP to send again.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::RawFd;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrLike, UnixAddr, recvmsg, sendmsg};

use super::calls::{Calls, FRAMES, Received};

/// How often a frame is tried again for which the receiver has no room, and after what time.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_micros(100);

/// Bytes of a socket's address that has no name, at most: the family alone, and on macOS its length.
const UNNAMED: nix::libc::socklen_t = 2;

/// One frame in a call.
#[cfg_attr(target_os = "linux", expect(unreachable_pub, reason = "on Linux it is the tests' alone"))]
#[derive(Debug, Default)]
pub struct Single;

impl Calls for Single {
    fn receive(
        &mut self,
        fd: RawFd,
        buffer: &mut [u8],
        room: usize,
        senders: bool,
        mut each: impl FnMut(Received<'_>),
    ) -> Result<usize, Errno> {
        let mut count = 0;
        for room in buffer.chunks_exact_mut(room).take(FRAMES) {
            let mut slices = [IoSliceMut::new(room)];
            let received = loop {
                match recvmsg::<UnixAddr>(fd, &mut slices, None, MsgFlags::MSG_DONTWAIT) {
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) if count > 0 => return Ok(count),
                    other => break other?,
                }
            };
            let (bytes, address) = (received.bytes, received.address);
            count += 1;
            // A sender without a name has an address of no length, which `UnixAddr` does not look into, or one without a path.
            let is_name = |from: &UnixAddr| {
                from.len() > UNNAMED && from.path().is_some_and(|path| !path.as_os_str().is_empty())
            };
            let from = address.filter(|from| senders && is_name(from));
            each(Received { frame: room.get(..bytes).filter(|frame| !frame.is_empty()), from });
        }
        Ok(count)
    }

    fn send(
        &mut self,
        fd: RawFd,
        to: Option<&UnixAddr>,
        frames: &[u8],
        lengths: &[usize],
    ) -> Result<usize, Errno> {
        let mut rest = frames;
        for (n, length) in lengths.iter().take(FRAMES).enumerate() {
            let (frame, after) = rest.split_at(*length);
            rest = after;
            let slices = [IoSlice::new(frame)];
            let sent = patiently(|| sendmsg(fd, &slices, &[], MsgFlags::MSG_DONTWAIT, to).map(drop));
            match sent {
                Ok(()) => {}
                Err(errno) if n == 0 => return Err(errno),
                Err(_) => return Ok(n),
            }
        }
        Ok(lengths.len().min(FRAMES))
    }
}

/// Sends until the receiver has room, or it has been waited long enough: then the frame counts as sent, and is lost.
fn patiently(mut send: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 0..TRIES {
        match send() {
            Err(Errno::ENOBUFS) => thread::sleep(PAUSE),
            sent => return sent,
        }
    }
    tracing::debug!("the VMM reads nothing: a frame is lost");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_without_room_is_tried_again_and_costs_a_frame_at_worst() {
        for (full, tried) in [(0, 1), (3, 4), (u32::MAX, TRIES)] {
            let mut tries = 0;
            let sent = patiently(|| {
                tries += 1;
                if tries <= full { Err(Errno::ENOBUFS) } else { Ok(()) }
            });
            assert_eq!((sent, tries), (Ok(()), tried));
        }
        let mut tries = 0;
        let refused = patiently(|| {
            tries += 1;
            Err(Errno::ECONNREFUSED)
        });
        assert_eq!((refused, tries), (Err(Errno::ECONNREFUSED), 1));
    }
}
