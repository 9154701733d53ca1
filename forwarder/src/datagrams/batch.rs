//! `recvmmsg(2)` with what `UDP_GRO` says, and `sendmsg(2)` with `UDP_SEGMENT`.
//!
//! By hand, because nix' wrapper keeps the lengths of addresses and control messages that one call wrote for the next,
//! where they are the room there is: it would lose the size of pieces, and take several datagrams for one.
#![allow(unsafe_code, reason = "the kernel writes through the pointers of each message's header")]

use std::io::{self, IoSlice};
use std::mem::{MaybeUninit, size_of};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use mio::net::UdpSocket;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use super::LARGEST;

/// Messages of one call.
const BATCH: usize = 32;
/// Room for the one control message that a socket is asked for, an `int`.
const CONTROL: usize = 32;

/// Where the kernel writes what belongs to a message.
#[repr(C, align(8))]
struct Room {
    sender: libc::sockaddr_storage,
    control: [u8; CONTROL],
}

/// Room for one batch, used again and again; its pages come as datagrams need them.
pub(crate) struct Receiver {
    rooms: Box<[Room]>,
    buffer: Box<[u8]>,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        let room = || Room {
            // SAFETY: all zeros are an address of no family.
            sender: unsafe { MaybeUninit::zeroed().assume_init() },
            control: [0; CONTROL],
        };
        Self {
            rooms: std::iter::repeat_with(room).take(BATCH).collect(),
            buffer: vec![0; BATCH * LARGEST].into(),
        }
    }

    /// Hands what one call brings to `each`: the sender, the bytes, and how many of them make one datagram (the last may
    /// have fewer). False when there is nothing more for now.
    ///
    /// # Errors
    /// The socket's own, or one that a datagram of ours caused (ICMP), which the call has taken off; there may be more.
    pub(crate) fn receive(
        &mut self,
        socket: &UdpSocket,
        mut each: impl FnMut(SocketAddr, &[u8], usize),
    ) -> io::Result<bool> {
        // SAFETY: all zeros are valid for both; the pointers are set below.
        let mut parts: [libc::iovec; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
        let rooms = self.rooms.iter_mut().zip(self.buffer.chunks_exact_mut(LARGEST));
        for ((room, bytes), (part, message)) in rooms.zip(parts.iter_mut().zip(&mut messages)) {
            part.iov_base = bytes.as_mut_ptr().cast();
            part.iov_len = LARGEST;
            let header = &mut message.msg_hdr;
            header.msg_iov = part;
            header.msg_iovlen = 1;
            header.msg_name = (&raw mut room.sender).cast();
            header.msg_namelen = length(size_of::<libc::sockaddr_storage>());
            header.msg_control = room.control.as_mut_ptr().cast();
            header.msg_controllen = CONTROL;
        }
        // SAFETY: each header points to memory of `self` and of this call that is as long as it says and that nothing else
        // uses before the call returns; no timeout is given.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                length(BATCH),
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            return match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
                e if e.kind() == io::ErrorKind::Interrupted => Ok(true),
                e => Err(e),
            };
        };
        let received = messages.iter().take(count).zip(&*self.rooms).zip(self.buffer.chunks_exact(LARGEST));
        for ((message, room), bytes) in received {
            let bytes = bytes.get(..message.msg_len as usize).unwrap_or(bytes);
            if let Some(from) = address(&room.sender) {
                each(from, bytes, piece(&message.msg_hdr).unwrap_or(bytes.len()).min(bytes.len()));
            }
        }
        // Fewer than asked for: the queue is empty, and news comes as an event.
        Ok(count == BATCH)
    }
}

/// Lengths that the kernel counts with fewer bits; ours are small constants.
fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The sender, as the kernel wrote it.
fn address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let at = std::ptr::from_ref(storage);
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the kernel wrote a `sockaddr_in`, which is smaller than the storage and no
            // stricter aligned.
            let v4 = unsafe { &*at.cast::<libc::sockaddr_in>() };
            let ip = u32::from_be(v4.sin_addr.s_addr).into();
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above, of a `sockaddr_in6`.
            let v6 = unsafe { &*at.cast::<libc::sockaddr_in6>() };
            let (ip, port) = (v6.sin6_addr.s6_addr.into(), u16::from_be(v6.sin6_port));
            Some(SocketAddrV6::new(ip, port, v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// The size of each datagram in a message of several.
fn piece(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel wrote `msg_controllen` bytes of control messages into the room the header points to.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: not null, so a whole `cmsghdr` is there.
        let head = unsafe { &*control };
        if (head.cmsg_level, head.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
            // SAFETY: `udp(7)`: the message carries an `int`, of whatever alignment.
            let size = unsafe { libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned() };
            return usize::try_from(size).ok().filter(|n| *n > 0);
        }
        // SAFETY: `control` is of this header.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    None
}

/// Sends `bytes` as datagrams of `size` bytes each, the last with what is left.
pub(crate) fn send_segments(socket: &UdpSocket, bytes: &[u8], size: usize, to: SocketAddr) -> io::Result<()> {
    let size = u16::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let segments = [ControlMessage::UdpGsoSegments(&size)];
    let to = SockaddrStorage::from(to);
    let parts = [IoSlice::new(bytes)];
    sendmsg(socket.as_raw_fd(), &parts, &segments, MsgFlags::MSG_DONTWAIT, Some(&to))?;
    Ok(())
}

/// What the kernel would have written is written by hand: no system call, so that Miri can look at the pointers.
#[cfg(test)]
mod tests {
    use nix::sys::socket::SockaddrLike;

    use super::*;

    /// The size of a piece that these control messages tell: level, kind, bytes of each.
    fn told(messages: &[(i32, i32, &[u8])]) -> Option<usize> {
        let mut bytes = Vec::new();
        for (level, kind, data) in messages {
            bytes.extend((size_of::<libc::cmsghdr>() + data.len()).to_ne_bytes());
            bytes.extend(level.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(*data);
            bytes.resize(bytes.len().next_multiple_of(size_of::<usize>()), 0);
        }
        let mut receiver = Receiver::new();
        let control = &mut receiver.rooms[0].control;
        control[..bytes.len()].copy_from_slice(&bytes);
        // SAFETY: all zeros are a header without anything.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = bytes.len();
        piece(&header)
    }

    #[test]
    fn the_size_of_pieces_is_found_among_control_messages_and_nothing_else_is_one() {
        let gro = |size: i32| (libc::SOL_UDP, libc::UDP_GRO, size.to_ne_bytes());
        let one = |(level, kind, data): (i32, i32, [u8; 4])| told(&[(level, kind, &data)]);
        assert_eq!(one(gro(1400)), Some(1400));
        assert_eq!(one(gro(0)), None);
        assert_eq!(one(gro(-1)), None);
        assert_eq!(told(&[]), None);
        assert_eq!(told(&[(libc::SOL_IP, libc::IP_TTL, &[64, 0, 0, 0])]), None);
        // Room enough for the first one and the header of a second.
        assert_eq!(told(&[(libc::SOL_IP, 77, &[])]), None);
        assert_eq!(told(&[(libc::SOL_IP, 77, &[]), (libc::SOL_UDP, 77, &[])]), None);
    }

    #[test]
    fn senders_of_both_families_are_read_out_of_the_room_and_others_are_nobody() {
        let mut receiver = Receiver::new();
        for text in ["192.0.2.7:53", "[2001:db8::7%3]:65535", "[::]:0"] {
            let wanted: SocketAddr = text.parse().unwrap();
            let (told, sender) = (SockaddrStorage::from(wanted), &mut receiver.rooms[1].sender);
            // SAFETY: an address is no longer than the storage for any.
            unsafe {
                std::ptr::from_mut(sender).cast::<u8>().copy_from(told.as_ptr().cast(), told.len() as usize)
            };
            assert_eq!(address(sender), Some(wanted));
        }
        receiver.rooms[1].sender.ss_family = 1;
        assert_eq!(address(&receiver.rooms[1].sender), None);
    }
}
