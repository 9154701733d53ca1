//! Linux: recvmmsg(2) and sendmmsg(2).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrLike, UnixAddr, recvmmsg, sendmmsg};

use super::calls::{Calls, FRAMES, Received};

/// Bytes of a socket's address that has no name: the family alone (`unix(7)`).
const UNNAMED: nix::libc::socklen_t = 2;

/// Up to [`FRAMES`] frames in a call.
pub struct Batched {
    outgoing: MultiHeaders<UnixAddr>,
    incoming: MultiHeaders<UnixAddr>,
}

impl Default for Batched {
    fn default() -> Self {
        Self {
            outgoing: MultiHeaders::preallocate(FRAMES, None),
            incoming: MultiHeaders::preallocate(FRAMES, None),
        }
    }
}

impl Calls for Batched {
    fn receive(
        &mut self,
        fd: RawFd,
        buffer: &mut [u8],
        room: usize,
        senders: bool,
        mut each: impl FnMut(Received<'_>),
    ) -> Result<usize, Errno> {
        if senders {
            // The kernel leaves the length of a sender's name in the header, where the next call takes it for the room
            // there is: a longer name would come cut off, and might then be the peer's.
            self.incoming = MultiHeaders::preallocate(FRAMES, None);
        }
        let mut rooms = buffer.chunks_exact_mut(room);
        let mut slices: [[IoSliceMut<'_>; 1]; FRAMES] =
            std::array::from_fn(|_| [IoSliceMut::new(rooms.next().unwrap_or_default())]);
        let messages = recvmmsg(fd, &mut self.incoming, &mut slices, MsgFlags::MSG_DONTWAIT, None)?;
        let mut count = 0;
        for message in messages {
            count += 1;
            // A sender without a name has an address of no length, which `UnixAddr` does not look into.
            let from = message.address.filter(|from| from.len() > UNNAMED);
            each(Received { frame: message.iovs().next(), from });
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
        let count = lengths.len().min(FRAMES);
        let mut rest = frames;
        let slices: [[IoSlice<'_>; 1]; FRAMES] = std::array::from_fn(|n| {
            let (frame, after) = rest.split_at(lengths.get(n).copied().unwrap_or(0));
            rest = after;
            [IoSlice::new(frame)]
        });
        let to = [to.copied(); FRAMES];
        let (slices, to) = (&slices[..count], &to[..count]);
        sendmmsg(fd, &mut self.outgoing, slices, to, [], MsgFlags::MSG_DONTWAIT).map(Iterator::count)
    }
}
