//! The streams of one guest: what is open, what each side may send, and what is to be said.
//!
//! ```text
//! packet ─► handle ─► stream by its ports ─┬─ bytes ─► send(2) on the host's socket, or kept until it is writable
//!                                          └─ what is to be said ─► speaking (a queue of streams) ─┐
//! a socket is readable ─► note ─────────────────────────────────► speaking ─► speak ─► packets ◄───┘
//! ```
//! Bytes to the guest are read from the socket only when the guest has credit and has posted room, so nothing of them is
//! kept. Bytes to the host that the host does not take are kept, as far as the guest's credit allowed it to send them.
//!
//! **Ends.** An end of file from either side ends one direction after all its bytes. When the host's socket is closed,
//! the guest is told that both directions have ended, and its reset, which confirms that, is waited for without a socket.
//! A reset ends a stream at once; bytes that the guest sent before are still given to the host, for a unix socket can
//! tell only an end, and one that came too early would be a lie.
//!
//! **Limits.** [`STREAMS`] streams in all, dialled ones among them; at the limit the one that waits longest for a guest's
//! confirmation makes room, else the new one is refused. [`FIRST`] bytes may be kept of each stream, and those that move
//! have more, up to [`MOST`] each and [`SPARE`] together. Packets to no stream are answered with resets; when [`RESETS`]
//! of these wait for the guest to post buffers, no more packets are taken from it until it does.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::Dial;
use super::arrivals::Arrivals;
use super::packet::{Header, Op, PAYLOAD, STREAM, ends};
use super::rings::ToGuest;
use super::stream::{Guest, Key, Say, Stream, header};
use crate::vhost_user::BadRing;
use crate::vsock::{CONNECT_TIMEOUT, HOST_CID};

/// Streams of one guest.
pub(crate) const STREAMS: usize = 2048;
/// Bytes of each stream that may be kept for the host.
pub(super) const FIRST: u32 = 16 * 1024;
/// Bytes of a stream that moves that may be kept.
pub(super) const MOST: u32 = 256 * 1024;
/// Bytes beyond `FIRST` of all streams.
pub(crate) const SPARE: u32 = 16 * 1024 * 1024;
/// Resets that wait for buffers of the guest's.
pub(crate) const RESETS: usize = 256;
/// The first port that streams of ours come from: beyond those that services have.
const FIRST_PORT: u32 = 1 << 30;
/// What a packet without bytes counts for.
const SMALL: usize = 1024;
/// Bytes after which one call of [`Streams::speak`] ends.
const BATCH: usize = 512 * 1024;
/// Buffers of streams whose hosts are not slow any more that are kept for the next slow one, so that none is made per chunk.
const BUFFERS: usize = 16;

/// What came of one stream's turn to speak.
enum Spoke {
    /// It has nothing more to say.
    All,
    /// It may have; so many bytes were said.
    More(usize),
    /// The guest has posted no room.
    Blocked,
}

/// Numbers for the log.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counters {
    /// Streams that were opened, by either side.
    pub(super) opened: u64,
    /// Packets answered with a reset: to nobody, beyond a limit, or wrong.
    pub(super) refused: u64,
    /// Packets from or to other addresses than the guest's and the host's.
    pub(super) strange: u64,
}

/// All streams of one guest.
#[derive(Debug)]
pub(super) struct Streams {
    cid: u32,
    registry: Registry,
    /// The token of the stream in slot 0.
    base: usize,
    arrivals: Arc<Arrivals>,
    pub(super) limit: usize,
    slots: Vec<Option<Stream>>,
    free: Vec<usize>,
    keys: HashMap<Key, usize>,
    /// Slots that may have something to say, each once; a slot may have been reused since.
    speaking: VecDeque<usize>,
    /// Which slots are in there.
    queued: Vec<bool>,
    /// Resets for packets of no stream, and of which type they were.
    resets: VecDeque<(Key, u16)>,
    /// Who was asked, until when.
    asked: VecDeque<(Instant, usize, Key)>,
    /// Streams that wait for the guest's confirmation; as `asked`, some may be gone.
    lingering: VecDeque<(usize, Key)>,
    spare: u32,
    /// Buffers nobody uses, [`BUFFERS`] at most.
    buffers: Vec<VecDeque<u8>>,
    next_port: u32,
    scratch: Box<[u8]>,
    pub(super) counters: Counters,
}

impl Streams {
    /// For the guest `cid`. Events of sockets have tokens from `base` on.
    pub(super) fn new(cid: u32, registry: Registry, base: usize, arrivals: Arc<Arrivals>) -> Self {
        Self {
            cid,
            registry,
            base,
            arrivals,
            limit: STREAMS.min(descriptors() / 4),
            slots: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            speaking: VecDeque::new(),
            queued: Vec::new(),
            resets: VecDeque::new(),
            asked: VecDeque::new(),
            lingering: VecDeque::new(),
            spare: SPARE,
            buffers: Vec::with_capacity(BUFFERS),
            next_port: FIRST_PORT,
            scratch: vec![0; PAYLOAD].into(),
            counters: Counters::default(),
        }
    }

    fn stream(&mut self, slot: usize) -> Option<&mut Stream> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Streams there are.
    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Bytes kept for the host.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.slots.iter().flatten().map(|s| s.kept.len()).sum()
    }

    /// Buffers that wait to be used again.
    #[cfg(test)]
    pub(super) fn spare_buffers(&self) -> usize {
        self.buffers.len()
    }

    /// Streams that wait to speak.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.speaking.len()
    }

    /// Whether packets are taken from the guest.
    pub(super) fn takes(&self) -> bool {
        self.resets.len() < RESETS
    }

    /// A packet from the guest.
    pub(super) fn handle(&mut self, header: &Header, payload: &[u8]) {
        // §5.10.6.1: packets are for the host alone, and from the guest alone.
        if header.src_cid != u64::from(self.cid) || header.dst_cid != u64::from(HOST_CID) {
            self.counters.strange += 1;
            return;
        }
        let key = Key { guest: header.src_port, host: header.dst_port };
        if header.kind != STREAM {
            // §5.10.6.2: a type that is not supported is answered with a reset.
            return self.refuse(key, header.kind, header.op);
        }
        match self.keys.get(&key).copied() {
            Some(slot) => self.handle_known(slot, key, header, payload),
            None if header.op == Some(Op::Request) => self.open(key, header),
            None => self.refuse(key, STREAM, header.op),
        }
    }

    /// Answers a packet of no stream.
    fn refuse(&mut self, key: Key, kind: u16, op: Option<Op>) {
        // A reset for a reset would never end.
        if op != Some(Op::Reset) {
            self.counters.refused += 1;
            self.resets.push_back((key, kind));
        }
    }

    fn handle_known(&mut self, slot: usize, key: Key, header: &Header, payload: &[u8]) {
        let Some(stream) = self.stream(slot) else { return };
        stream.to_guest.told(header.buf_alloc, header.fwd_cnt);
        // Not by every packet: an answer that gives nothing would be asked about again, for ever.
        stream.begged &= stream.to_guest.free() == 0;
        let asked = matches!(stream.guest, Guest::Asked(_));
        match header.op {
            Some(Op::Reset) if asked => {
                self.fail(slot, io::ErrorKind::ConnectionRefused, "the guest refuses")
            }
            Some(Op::Reset) => self.leave(slot),
            Some(Op::Response) if asked => {
                if let Guest::Asked(reply) = std::mem::replace(&mut stream.guest, Guest::Open) {
                    reply.send(Ok(()));
                }
            }
            Some(Op::Data) if !asked => self.data(slot, payload),
            Some(Op::Shutdown) if !asked => {
                stream.guest_ends |= header.flags & ends::BOTH;
                self.settle(slot);
            }
            Some(Op::CreditUpdate) if !asked => {}
            Some(Op::CreditRequest) if !asked => stream.say.credit = true,
            _ => {
                tracing::debug!(?header.op, ?key, "a packet at the wrong time: the stream is reset");
                self.counters.refused += 1;
                self.reset(slot);
            }
        }
        self.wake(slot);
    }

    /// The guest opens a stream.
    fn open(&mut self, key: Key, header: &Header) {
        // What is still to be said of an older stream is not for this one.
        self.resets.retain(|(old, _)| *old != key);
        let place = self.make_place();
        let Some(socket) = place.then(|| self.arrivals.take(key.host)).flatten() else {
            return self.refuse(key, STREAM, header.op);
        };
        let say = Say { response: true, ..Say::default() };
        let mut stream = Stream::new(key, socket, Guest::Open, say);
        stream.to_guest.told(header.buf_alloc, header.fwd_cnt);
        if self.insert(stream).is_err() {
            self.refuse(key, STREAM, header.op);
        }
    }

    /// The host opens a stream; `up` says whether there is a guest to ask.
    pub(super) fn dial(&mut self, now: Instant, up: bool, dial: Dial) {
        let Dial { port, socket, reply } = dial;
        if !up {
            return reply.fail(io::ErrorKind::NotConnected, "there is no guest, or its driver is not up");
        }
        if !self.make_place() {
            let text = format!("the guest has {} streams, which is the limit", self.limit);
            return reply.send(Err(io::Error::other(text)));
        }
        let key = loop {
            let key = Key { guest: port, host: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT).max(FIRST_PORT);
            if !self.keys.contains_key(&key) {
                break key;
            }
        };
        let say = Say { request: true, ..Say::default() };
        match self.insert(Stream::new(key, socket, Guest::Asked(reply), say)) {
            Ok(slot) => self.asked.push_back((now + CONNECT_TIMEOUT, slot, key)),
            Err((error, Guest::Asked(reply))) => reply.send(Err(error)),
            Err(_) => {}
        }
    }

    /// Whether one stream more may be.
    fn make_place(&mut self) -> bool {
        while self.count() >= self.limit {
            let Some((slot, key)) = self.lingering.pop_front() else { return false };
            if self.stream(slot).is_some_and(|s| s.key == key && s.socket.is_none()) {
                self.reset(slot);
            }
        }
        true
    }

    fn insert(&mut self, stream: Stream) -> Result<usize, (io::Error, Guest)> {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        let fd = stream.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let token = Token(self.base + slot);
        if let Err(error) = self.registry.register(&mut SourceFd(&fd), token, Interest::READABLE) {
            if slot < self.slots.len() {
                self.free.push(slot);
            }
            return Err((error, stream.guest));
        }
        self.counters.opened += 1;
        self.keys.insert(stream.key, slot);
        match self.slots.get_mut(slot) {
            Some(place) => *place = Some(stream),
            None => {
                self.slots.push(Some(stream));
                self.queued.push(false);
            }
        }
        self.wake(slot);
        Ok(slot)
    }

    /// Asks for events of a stream's socket. Whether it is writable is asked only while bytes are kept for it: every read
    /// at its other end would wake us.
    fn watch(&mut self, slot: usize, interest: Interest) {
        let Some(Some(stream)) = self.slots.get(slot) else { return };
        let Some(socket) = &stream.socket else { return };
        let (fd, token) = (socket.as_raw_fd(), Token(self.base + slot));
        if let Err(error) = self.registry.reregister(&mut SourceFd(&fd), token, interest) {
            tracing::warn!(%error, "a socket cannot be watched: its stream is reset");
            self.reset(slot);
        }
    }

    /// Queues a stream that has something to say.
    fn wake(&mut self, slot: usize) {
        if self.stream(slot).is_some_and(|s| s.has_say())
            && let Some(queued @ false) = self.queued.get_mut(slot)
        {
            *queued = true;
            self.speaking.push_back(slot);
        }
    }

    /// An event of a stream's socket.
    pub(super) fn note(&mut self, token: usize, event: &mio::event::Event) {
        let Some(slot) = token.checked_sub(self.base) else { return };
        let Some(stream) = self.stream(slot) else { return };
        stream.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        stream.hung_up |= event.is_write_closed() || event.is_error();
        let hung_up = stream.hung_up;
        if hung_up && matches!(stream.guest, Guest::Asked(_)) {
            // Whoever asked may have said all and gone; with nothing said it does not want the answer any more.
            let socket = stream.socket.as_ref().map(AsRawFd::as_raw_fd);
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            if !socket.is_some_and(|fd| recv(fd, &mut [0], flags).is_ok_and(|n| n > 0)) {
                let unasked = stream.say.request;
                let key = stream.key;
                self.remove(slot);
                if !unasked {
                    self.resets.push_back((key, STREAM));
                }
                return;
            }
        } else if hung_up {
            stream.host_ends |= ends::RECEIVE;
        }
        self.flush(slot);
        self.wake(slot);
    }

    /// Bytes from the guest.
    fn data(&mut self, slot: usize, payload: &[u8]) {
        let Some(stream) = self.stream(slot) else { return };
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if stream.guest_ends & ends::SEND != 0 || !stream.to_host.receive(len) {
            tracing::debug!(key = ?stream.key, "bytes beyond the end or the credit: the stream is reset");
            self.counters.refused += 1;
            return self.reset(slot);
        }
        let mut taken = 0;
        if stream.kept.is_empty() && stream.host_ends & ends::RECEIVE == 0 {
            taken = stream.push(payload);
        }
        if stream.host_ends & ends::RECEIVE != 0 {
            return self.flush(slot);
        }
        if let Some(rest) = payload.get(taken..).filter(|rest| !rest.is_empty()) {
            if stream.kept.is_empty() {
                self.keep_first(slot, rest);
            } else {
                stream.kept.extend(rest);
            }
        }
        self.forwarded(slot, taken);
    }

    /// Keeps bytes for a host that has become slow.
    fn keep_first(&mut self, slot: usize, bytes: &[u8]) {
        let mut kept = self.buffers.pop().unwrap_or_default();
        let Some(stream) = self.stream(slot) else { return };
        kept.reserve_exact(stream.to_host.alloc() as usize);
        kept.extend(bytes);
        stream.kept = kept;
        // It may take more already: then the event comes at once.
        self.watch(slot, Interest::READABLE | Interest::WRITABLE);
    }

    /// Gives the socket what is kept for it, and settles what hung on that.
    fn flush(&mut self, slot: usize) {
        let Some(stream) = self.stream(slot) else { return };
        let waited = !stream.kept.is_empty();
        let mut taken = 0;
        while !stream.kept.is_empty() && stream.host_ends & ends::RECEIVE == 0 {
            let mut kept = std::mem::take(&mut stream.kept);
            let n = stream.push(kept.as_slices().0);
            drop(kept.drain(..n));
            stream.kept = kept;
            taken += n;
            if n == 0 {
                break;
            }
        }
        if stream.host_ends & ends::RECEIVE != 0 {
            // Nobody wants it any more.
            stream.kept.clear();
        }
        if waited && stream.kept.is_empty() {
            let buffer = std::mem::take(&mut stream.kept);
            if self.buffers.len() < BUFFERS {
                self.buffers.push(buffer);
            }
            self.watch(slot, Interest::READABLE);
        }
        self.forwarded(slot, taken);
        self.settle(slot);
    }

    /// The host has taken `len` bytes.
    fn forwarded(&mut self, slot: usize, len: usize) {
        let spare = self.spare;
        let Some(stream) = self.stream(slot) else { return };
        stream.to_host.forward(u32::try_from(len).unwrap_or_default());
        if len == 0 || !stream.to_host.is_due() || !matches!(stream.guest, Guest::Open) {
            return;
        }
        stream.say.credit = true;
        if !stream.kept.is_empty() {
            return self.wake(slot);
        }
        // It moves, and the host keeps up: more at once costs less.
        let alloc = stream.to_host.alloc();
        let more = alloc.min(MOST - alloc).min(spare);
        stream.to_host.grow(more);
        self.spare -= more;
        self.wake(slot);
    }

    /// Carries on what the guest has ended, as soon as the host has all the bytes before.
    fn settle(&mut self, slot: usize) {
        let Some(stream) = self.stream(slot) else { return };
        let empty = stream.kept.is_empty();
        if matches!(stream.guest, Guest::Gone) {
            if empty {
                self.remove(slot);
            }
            return;
        }
        let mut ended = stream.guest_ends & !stream.shut;
        if !empty {
            ended &= !ends::SEND;
        }
        stream.shut |= ended;
        if let Some(socket) = &stream.socket {
            for (end, how) in [(ends::SEND, Shutdown::Write), (ends::RECEIVE, Shutdown::Read)] {
                if ended & end != 0 {
                    // Who has gone meanwhile need not be told.
                    let _ = socket.shutdown(how);
                }
            }
        }
        if stream.shut == ends::BOTH {
            // §5.10.6.5: a reset confirms the end.
            self.reset(slot);
        }
    }

    /// The guest has forgotten a stream.
    fn leave(&mut self, slot: usize) {
        let Some(stream) = self.stream(slot) else { return };
        let key = stream.key;
        stream.guest = Guest::Gone;
        stream.say = Say::default();
        self.keys.remove(&key);
        self.settle(slot);
    }

    /// Ends a stream at once, and tells the guest.
    fn reset(&mut self, slot: usize) {
        if let Some(stream) = self.stream(slot) {
            let key = stream.key;
            self.remove(slot);
            self.resets.push_back((key, STREAM));
        }
    }

    /// Ends a stream that was asked for in vain.
    fn fail(&mut self, slot: usize, kind: io::ErrorKind, text: &'static str) {
        if let Some(stream) = self.stream(slot)
            && let Guest::Asked(reply) = std::mem::replace(&mut stream.guest, Guest::Open)
        {
            reply.fail(kind, text);
        }
        self.remove(slot);
    }

    fn remove(&mut self, slot: usize) {
        let Some(stream) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        self.free.push(slot);
        self.spare += stream.to_host.alloc() - FIRST;
        if self.keys.get(&stream.key) == Some(&slot) {
            self.keys.remove(&stream.key);
        }
        if let Some(socket) = &stream.socket {
            // It was registered; and if not, then there is nothing to undo.
            let _ = self.registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
        }
    }

    /// Says to the guest what is to be said, as far as there is room. True when there is more, and room may be.
    pub(super) fn speak(&mut self, to_guest: &mut ToGuest<'_>) -> Result<bool, BadRing> {
        let mut said = 0;
        while said < BATCH {
            if let Some((key, kind)) = self.resets.front().copied() {
                if to_guest.room(0)?.is_none() {
                    return Ok(false);
                }
                to_guest.put(&header(self.cid, key, kind, Op::Reset), &[])?;
                self.resets.pop_front();
                said += SMALL;
                continue;
            }
            let Some(slot) = self.speaking.front().copied() else { return Ok(false) };
            match self.speak_of(slot, to_guest)? {
                Spoke::Blocked => return Ok(false),
                Spoke::All => {
                    self.speaking.pop_front();
                    if let Some(queued) = self.queued.get_mut(slot) {
                        *queued = false;
                    }
                }
                Spoke::More(bytes) => {
                    said += bytes.max(SMALL);
                    self.speaking.rotate_left(1);
                }
            }
        }
        Ok(true)
    }

    fn speak_of(&mut self, slot: usize, to_guest: &mut ToGuest<'_>) -> Result<Spoke, BadRing> {
        let (cid, Self { slots, scratch, .. }) = (self.cid, &mut *self);
        let Some(Some(stream)) = slots.get_mut(slot) else { return Ok(Spoke::All) };
        if !stream.has_say() {
            return Ok(Spoke::All);
        }
        if to_guest.room(0)?.is_none() {
            return Ok(Spoke::Blocked);
        }
        if let Some((op, flags)) = stream.next_say() {
            let header = stream.header(cid, op, flags);
            to_guest.put(&header, &[])?;
            if stream.told_ends == ends::BOTH && stream.socket.is_some() {
                self.linger(slot);
            }
            return Ok(Spoke::More(0));
        }
        if !stream.may_read() {
            return Ok(Spoke::All);
        }
        let free = stream.to_guest.free() as usize;
        if free == 0 {
            // Most guests say so themselves when they have room again; asking costs one packet and helps the others.
            stream.say.credit_request = !std::mem::replace(&mut stream.begged, true);
            return Ok(if stream.say.credit_request { Spoke::More(0) } else { Spoke::All });
        }
        let wanted = free.min(scratch.len());
        let Some(room) = to_guest.room(wanted)? else { return Ok(Spoke::Blocked) };
        let Some(socket) = &stream.socket else { return Ok(Spoke::All) };
        // A chain without room for bytes takes a packet that says nothing, and the next one may be better.
        let Some(space) = scratch.get_mut(..room.min(wanted)) else { return Ok(Spoke::All) };
        if space.is_empty() {
            let header = stream.header(cid, Op::CreditUpdate, 0);
            to_guest.put(&header, &[])?;
            return Ok(Spoke::More(0));
        }
        let mut read = match recv(socket.as_raw_fd(), space, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => {
                stream.host_ends |= if stream.hung_up { ends::BOTH } else { ends::SEND };
                return Ok(Spoke::More(0));
            }
            Ok(n) => space.get(..n).unwrap_or_default(),
            Err(Errno::EINTR) => return Ok(Spoke::More(0)),
            Err(Errno::EAGAIN) => {
                stream.readable = false;
                return Ok(Spoke::All);
            }
            Err(errno) => {
                // The other end was closed with bytes of the guest's in it: a reset, and no end.
                tracing::debug!(%errno, "the host has reset a stream");
                self.reset(slot);
                return Ok(Spoke::All);
            }
        };
        let total = read.len();
        stream.to_guest.sent(u32::try_from(total).unwrap_or_default());
        while !read.is_empty() {
            let header = stream.header(cid, Op::Data, 0);
            let n = to_guest.put(&header, read)?;
            read = read.get(n..).unwrap_or_default();
        }
        Ok(Spoke::More(total))
    }

    /// The guest knows that both directions have ended; nothing comes from the socket any more, and nobody is behind it.
    fn linger(&mut self, slot: usize) {
        let Some(Some(stream)) = self.slots.get_mut(slot) else { return };
        if let Some(socket) = stream.socket.take() {
            let _ = self.registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
        }
        stream.kept = VecDeque::new();
        self.lingering.push_back((slot, stream.key));
        // What is not there any more is not worth a place; the queue is as long as the table at most, twice over.
        if self.lingering.len() > 2 * self.limit {
            let slots = &self.slots;
            self.lingering.retain(|(slot, key)| {
                slots.get(*slot).and_then(Option::as_ref).is_some_and(|s| s.key == *key && s.socket.is_none())
            });
        }
    }

    /// When [`Self::expire`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.asked.front().map(|(at, ..)| *at)
    }

    /// Gives up on those who were asked and have not answered.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((_, slot, key)) = self.asked.front().copied().filter(|(at, ..)| *at <= now) {
            self.asked.pop_front();
            if self.stream(slot).is_some_and(|s| s.key == key && matches!(s.guest, Guest::Asked(_))) {
                self.fail(slot, io::ErrorKind::TimedOut, "the guest does not answer");
                self.resets.push_back((key, STREAM));
            }
        }
    }

    /// The guest is another one, or none: its streams have ended for it.
    pub(super) fn guest_gone(&mut self) {
        self.resets.clear();
        self.speaking.clear();
        self.queued.fill(false);
        self.asked.clear();
        self.lingering.clear();
        for slot in 0..self.slots.len() {
            let Some(stream) = self.stream(slot) else { continue };
            if matches!(stream.guest, Guest::Asked(_)) {
                self.fail(slot, io::ErrorKind::NotConnected, "the guest is gone");
            } else {
                self.leave(slot);
            }
        }
    }
}

/// Descriptors that this process may have.
fn descriptors() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX))
}
