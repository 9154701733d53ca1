//! One stream: what each side may send, has ended, and is to be told. Who has which is in [`super::streams`].

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::Reply;
use super::credit::{ToGuest as CreditToGuest, ToHost as CreditToHost};
use super::packet::{Header, Op, STREAM, ends};
use super::streams::FIRST;
use crate::vsock::HOST_CID;

/// The ports of a stream; both CIDs are always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest: u32,
    pub(super) host: u32,
}

/// What the guest makes of a stream.
#[derive(Debug)]
pub(super) enum Guest {
    /// It has been asked and has not answered.
    Asked(Reply),
    Open,
    /// It has forgotten it; what it sent before is still on its way to the host.
    Gone,
}

/// What is to be said to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Say {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit: bool,
    pub(super) credit_request: bool,
}

/// One stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) key: Key,
    pub(super) guest: Guest,
    /// The host's side; `None` when it is closed.
    pub(super) socket: Option<UnixStream>,
    pub(super) say: Say,

    pub(super) to_guest: CreditToGuest,
    /// The socket may have bytes.
    pub(super) readable: bool,
    /// Nobody is at the socket's other end any more.
    pub(super) hung_up: bool,
    /// The guest was asked for credit and has given none since.
    pub(super) begged: bool,

    pub(super) to_host: CreditToHost,
    /// What the host has not taken yet.
    pub(super) kept: VecDeque<u8>,

    /// Directions that the host has ended, as the guest is to be told, and what it was told.
    pub(super) host_ends: u32,
    pub(super) told_ends: u32,
    /// Directions that the guest has ended, and what of it the socket knows.
    pub(super) guest_ends: u32,
    pub(super) shut: u32,
}

impl Stream {
    pub(super) fn new(key: Key, socket: UnixStream, guest: Guest, say: Say) -> Self {
        Self {
            key,
            guest,
            socket: Some(socket),
            say,
            to_guest: CreditToGuest::default(),
            readable: true,
            hung_up: false,
            begged: false,
            to_host: CreditToHost::new(FIRST),
            kept: VecDeque::new(),
            host_ends: 0,
            told_ends: 0,
            guest_ends: 0,
            shut: 0,
        }
    }

    /// Whether bytes of the socket's may go to the guest.
    pub(super) fn may_read(&self) -> bool {
        matches!(self.guest, Guest::Open)
            && self.socket.is_some()
            && self.readable
            && (self.host_ends & ends::SEND) | (self.guest_ends & ends::RECEIVE) == 0
    }

    /// Whether there is something to say.
    pub(super) fn has_say(&self) -> bool {
        self.say != Say::default()
            || (matches!(self.guest, Guest::Open) && self.host_ends != self.told_ends)
            || (self.may_read() && (self.to_guest.free() > 0 || !self.begged))
    }

    /// Says the next thing but bytes: the header's fields, and no payload.
    pub(super) fn next_say(&mut self) -> Option<(Op, u32)> {
        let Say { request, response, credit, credit_request } = &mut self.say;
        for (due, op) in [
            (request, Op::Request),
            (response, Op::Response),
            (credit_request, Op::CreditRequest),
            (credit, Op::CreditUpdate),
        ] {
            if std::mem::take(due) {
                return Some((op, 0));
            }
        }
        // Ends come after the bytes, as far as the guest takes these.
        let ends = self.host_ends != self.told_ends && matches!(self.guest, Guest::Open);
        if ends && !(self.may_read() && self.to_guest.free() > 0) {
            self.told_ends = self.host_ends;
            return Some((Op::Shutdown, self.host_ends));
        }
        None
    }

    pub(super) fn header(&mut self, cid: u32, op: Op, flags: u32) -> Header {
        // Every packet tells the credit.
        self.say.credit = false;
        let (buf_alloc, fwd_cnt) = self.to_host.tell();
        Header { flags, buf_alloc, fwd_cnt, ..header(cid, self.key, STREAM, op) }
    }

    /// Gives bytes to the socket; says how many it took. Errors are told as the end of this direction.
    pub(super) fn push(&mut self, bytes: &[u8]) -> usize {
        let Some(socket) = &self.socket else { return 0 };
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match send(socket.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN | Errno::ENOBUFS) => break,
                Err(_) => {
                    self.host_ends |= ends::RECEIVE;
                    break;
                }
            }
        }
        done
    }
}

/// A packet to the guest about the stream of these ports.
pub(super) fn header(cid: u32, key: Key, kind: u16, op: Op) -> Header {
    Header {
        src_cid: HOST_CID.into(),
        dst_cid: cid.into(),
        src_port: key.host,
        dst_port: key.guest,
        len: 0,
        kind,
        op: Some(op),
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}
