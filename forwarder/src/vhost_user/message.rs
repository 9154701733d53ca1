//! The messages that the `vhost` crate refuses and QEMU's vhost-user-net needs.
//!
//! - `SET_VRING_ENABLE` comes before `SET_FEATURES` there (when the device is realized), as soon as both sides have seen that the
//!   back end speaks protocol features; the crate takes it only after.
//! - `NET_SET_MTU` is not known to the crate.
//!
//! Both have a header of three u32 (request, flags, size) and a payload without descriptors, in the host's byte order
//! (QEMU `docs/interop/vhost-user.rst`, "Message Specification").

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

const SET_VRING_ENABLE: u32 = 18;
const NET_SET_MTU: u32 = 20;
/// Requests with answers of their own: GET_FEATURES, GET_VRING_BASE, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG,
/// GET_INFLIGHT_FD, GET_MAX_MEM_SLOTS.
const ANSWERED: [u32; 7] = [1, 11, 15, 17, 24, 31, 36];
/// Flags: the version, the reply bit, and the wish for one.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;

/// A message of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// Ring, and whether it may run.
    Enable(u32, bool),
    /// The largest IP packet in bytes.
    Mtu(u64),
}

pub(super) fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

/// Takes the next message off the socket and answers it, if it is one of ours.
///
/// # Errors
/// When the front end is gone, does not send the rest in time, or sends nonsense.
pub(super) fn take(socket: &mut UnixStream) -> io::Result<Option<Message>> {
    let mut header = [0; HEADER];
    let peeked = recv(socket.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL)?;
    if peeked < HEADER {
        return if peeked == 0 { Err(io::Error::other("end of file")) } else { Ok(None) };
    }
    let [request, flags, size] = [0, 4, 8].map(|at| u32::from_ne_bytes(word(&header, at)));
    if !matches!(request, SET_VRING_ENABLE | NET_SET_MTU) {
        return Ok(None);
    }
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("message {request} of {size} bytes"));
    if size != 8 {
        return Err(bad());
    }
    let mut all = [0; HEADER + 8];
    socket.read_exact(&mut all)?;
    let payload = &all[HEADER..];
    let message = if request == NET_SET_MTU {
        Message::Mtu(u64::from_ne_bytes(word(payload, 0)))
    } else {
        match u32::from_ne_bytes(word(payload, 4)) {
            on @ (0 | 1) => Message::Enable(u32::from_ne_bytes(word(payload, 0)), on == 1),
            _ => return Err(bad()),
        }
    };
    if flags & NEED_REPLY != 0 {
        socket.write_all(&answer(request))?;
    }
    Ok(Some(message))
}

/// Acknowledges a message with the wish for an answer, one that has none of its own.
///
/// The crate does so once protocol features are negotiated on the connection. A front end that comes back to a back end
/// that was started anew may not negotiate again, and waits for what it has once agreed on: QEMU's vsock device does.
///
/// # Errors
/// When the answer cannot be written.
pub(super) fn acknowledge(socket: &mut UnixStream, request: u32, flags: u32) -> io::Result<()> {
    if flags & NEED_REPLY == 0 || ANSWERED.contains(&request) {
        return Ok(());
    }
    socket.write_all(&answer(request))
}

fn answer(request: u32) -> [u8; HEADER + 8] {
    let mut reply = [0; HEADER + 8];
    for (at, value) in [(0, request), (4, VERSION | REPLY), (8, 8)] {
        reply[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, payload: [u32; 2]) -> Vec<u8> {
        [request, flags, 8, payload[0], payload[1]].iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[test]
    fn ours_are_taken_and_answered_others_are_left() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(SET_VRING_ENABLE, VERSION | NEED_REPLY, [1, 1])).unwrap();
        theirs.write_all(&message(NET_SET_MTU, VERSION, [1500, 0])).unwrap();
        theirs.write_all(&message(1, VERSION, [0, 0])).unwrap();
        assert_eq!(take(&mut ours).unwrap(), Some(Message::Enable(1, true)));
        assert_eq!(take(&mut ours).unwrap(), Some(Message::Mtu(1500)));
        assert_eq!(take(&mut ours).unwrap(), None);
        let mut reply = [0; 20];
        theirs.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..], message(SET_VRING_ENABLE, VERSION | REPLY, [0, 0])[..]);
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut reply).is_err(), "only what asked for it is answered");
    }

    #[test]
    fn who_wishes_an_answer_without_having_negotiated_has_one() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        acknowledge(&mut ours, 2, VERSION | NEED_REPLY).unwrap();
        let mut reply = [0; 20];
        theirs.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..], message(2, VERSION | REPLY, [0, 0])[..]);
        // No wish, and a request with an answer of its own.
        acknowledge(&mut ours, 2, VERSION).unwrap();
        acknowledge(&mut ours, 11, VERSION | NEED_REPLY).unwrap();
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut reply).is_err());
    }

    #[test]
    fn nonsense_and_the_end_are_errors() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(SET_VRING_ENABLE, VERSION, [0, 7])).unwrap();
        assert!(take(&mut ours).is_err());
        drop(theirs);
        assert!(take(&mut ours).is_err());
    }
}
