//! A VMM on a socket that keeps frames apart: `dgram` and `seqpacket`.
//!
//! ```text
//!  VMM ═► recvmmsg(2): up to 32 frames ─► one after the other, in place ─► Netstack
//!  VMM ◄═ sendmmsg(2): up to 32 frames ◄─ one buffer, frame behind frame ◄─ written in place by Netstack
//! ```
//! A datagram socket we bind has no connection that would say who is at the other end. The peer is the first sender that has
//! an address itself; others are ignored and counted while its socket lives. When another speaks, or a frame to the peer finds nobody
//! (`ECONNREFUSED`, `ENOENT`), it is seen whether it does; if not, the next sender takes over. vfkit and krunkit begin with a datagram of the four bytes `VFKT`,
//! which is no frame.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrLike, UnixAddr, bind, connect,
    recvmmsg, sendmmsg, socket,
};
use portway_netstack::{FrameSink, Offload};

use super::Batch;

/// The largest frame a VMM sends or takes: libkrun and vfkit take no larger.
const LARGEST: usize = 65_550;
/// Frames of one system call.
const FRAMES: usize = 32;
/// Bytes of frames that may wait before the stack is told to wait.
const ROOM: usize = 256 * 1024;
/// Bytes of a socket's address that has no name: the family alone (`unix(7)`).
const UNNAMED: nix::libc::socklen_t = 2;
/// What vfkit and krunkit say first.
const GREETING: &[u8] = b"VFKT";

/// The attached VMM, or the socket it will send to.
pub struct Packets {
    socket: OwnedFd,
    /// Where we listen; removed at the end.
    path: Option<PathBuf>,
    /// Who is at the other end of a socket we bound; on a connected one nobody needs to know.
    peer: Option<UnixAddr>,
    bound: bool,
    incoming: MultiHeaders<UnixAddr>,
    outgoing: MultiHeaders<UnixAddr>,
    received: Box<[u8]>,
    /// Frames to the guest, one behind the other, and their lengths.
    frames: Box<[u8]>,
    lengths: Vec<usize>,
    /// How many of `lengths` have left, and where the next begins in `frames`.
    sent: usize,
    start: usize,
    end: usize,
    readable: bool,
    /// The peer has closed: the end of file is still to be read, and no further event tells of it.
    closing: bool,
    writable: bool,
    written: (u64, u64),
    /// Datagrams that were no frames of the peer: too long, or of somebody else.
    ignored: u64,
    /// The peer went since this was last asked.
    lost: bool,
}

impl std::fmt::Debug for Packets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packets").field("path", &self.path).field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Packets {
    /// Takes a socket: one that is connected, or one that is bound where its peer will send from, as systemd makes it.
    ///
    /// # Errors
    /// When it is of another type than `kind`.
    pub fn connected(fd: OwnedFd, kind: socket2::Type) -> io::Result<Self> {
        let found = socket2::SockRef::from(&fd).r#type()?;
        if found != kind {
            return Err(io::Error::other(format!(
                "the descriptor is a socket of type {found:?}, not {kind:?}"
            )));
        }
        let connected = socket2::SockRef::from(&fd).peer_addr().is_ok();
        let mut packets = Self::new(fd, None)?;
        packets.bound = !connected;
        Ok(packets)
    }

    /// Binds a datagram socket to `path`, replacing one that nobody has.
    ///
    /// # Errors
    /// When another file is there, somebody has the socket, or it cannot be bound.
    pub fn bound(path: &Path) -> io::Result<Self> {
        crate::unix_path::clear(path, |path| UnixDatagram::unbound()?.connect(path))?;
        let fd = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?).map_err(|e| {
            io::Error::new(
                io::Error::from(e).kind(),
                format!("{}: cannot listen there: {}", path.display(), e.desc()),
            )
        })?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Self::new(fd, Some(path.to_owned()))
    }

    fn new(fd: OwnedFd, path: Option<PathBuf>) -> io::Result<Self> {
        let options = socket2::SockRef::from(&fd);
        options.set_nonblocking(true)?;
        // What vfkit asks of its peers; the host's limits decide.
        let _ = options.set_send_buffer_size(1 << 20);
        let _ = options.set_recv_buffer_size(4 << 20);
        Ok(Self {
            socket: fd,
            bound: path.is_some(),
            path,
            peer: None,
            incoming: MultiHeaders::preallocate(FRAMES, None),
            outgoing: MultiHeaders::preallocate(FRAMES, None),
            received: vec![0; FRAMES * (LARGEST + 1)].into(),
            frames: vec![0; ROOM + LARGEST].into(),
            lengths: Vec::new(),
            sent: 0,
            start: 0,
            end: 0,
            readable: true,
            closing: false,
            writable: true,
            written: (0, 0),
            ignored: 0,
            lost: false,
        })
    }

    /// The descriptor to watch.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// News from the kernel.
    pub const fn note(&mut self, readable: bool, writable: bool, closed: bool) {
        self.readable |= readable || closed;
        self.closing |= closed;
        self.writable |= writable;
    }

    /// Whether `receive` may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.readable
    }

    /// One batch of frames.
    ///
    /// # Errors
    /// When the peer of a connected socket is gone.
    pub fn receive(&mut self, mut handle: impl FnMut(&[u8])) -> io::Result<Batch> {
        let mut batch = Batch { more: true, frames: 0, bytes: 0 };
        if self.bound {
            // The kernel leaves the length of a sender's name in the header, where the next call takes it for the room
            // there is: a longer name would come cut off, and might then be the peer's.
            self.incoming = MultiHeaders::preallocate(FRAMES, None);
        }
        let mut rooms = self.received.chunks_exact_mut(LARGEST + 1);
        let mut slices: [[IoSliceMut<'_>; 1]; FRAMES] =
            std::array::from_fn(|_| [IoSliceMut::new(rooms.next().unwrap_or_default())]);
        let messages = match recvmmsg(
            self.socket.as_raw_fd(),
            &mut self.incoming,
            &mut slices,
            MsgFlags::MSG_DONTWAIT,
            None,
        ) {
            Ok(messages) => messages,
            Err(Errno::EAGAIN) => {
                self.readable = false;
                return Ok(Batch { more: false, ..batch });
            }
            Err(Errno::EINTR) => return Ok(batch),
            Err(e) => return Err(e.into()),
        };
        let mut count = 0;
        let (mut looked, mut gone) = (false, false);
        for message in messages {
            count += 1;
            if gone {
                // What the next one says is heard when the stack has forgotten the one before.
                self.ignored += 1;
                continue;
            }
            if self.bound {
                // A sender without a name has an address of no length, which `UnixAddr` does not look into.
                let from = message.address.filter(|from| from.len() > UNNAMED);
                match (from, self.peer) {
                    (Some(from), None) => {
                        tracing::info!(peer = %from, "VMM attached");
                        self.peer = Some(from);
                    }
                    (Some(from), Some(peer)) if from == peer => {}
                    (from, Some(peer)) => {
                        // Once in a batch: nothing may ever be sent to a peer that is gone, and then no error tells of it.
                        if from.is_some() && !std::mem::replace(&mut looked, true) && is_gone(&peer) {
                            tracing::info!(%peer, "VMM detached");
                            (self.peer, self.lost, gone) = (None, true, true);
                            self.lengths.clear();
                            (self.sent, self.start, self.end) = (0, 0, 0);
                        }
                        self.ignored += 1;
                        continue;
                    }
                    (None, None) => {
                        self.ignored += 1;
                        continue;
                    }
                }
            }
            match message.iovs().next() {
                Some(frame) if frame.len() <= LARGEST && frame != GREETING => {
                    batch.frames += 1;
                    batch.bytes += frame.len() as u64;
                    handle(frame);
                }
                Some(GREETING) => {}
                Some(_) => self.ignored += 1,
                // On a connected seqpacket socket nothing at all is the end.
                None if !self.bound && count == 1 => return Err(io::Error::other("end of file")),
                None => self.ignored += 1,
            }
        }
        batch.more = count == FRAMES;
        self.readable = batch.more || self.closing;
        Ok(batch)
    }

    /// Sends what waits, as far as the VMM takes it.
    ///
    /// # Errors
    /// When the peer of a connected socket is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.writable && self.sent < self.lengths.len() {
            if self.bound && self.peer.is_none() {
                // Nobody has sent yet, so nothing waits for anybody.
                self.forget();
                break;
            }
            let count = (self.lengths.len() - self.sent).min(FRAMES);
            let mut rest = &self.frames[self.start..self.end];
            let lengths = &self.lengths[self.sent..self.sent + count];
            let slices: [[IoSlice<'_>; 1]; FRAMES] = std::array::from_fn(|n| {
                let (frame, after) = rest.split_at(lengths.get(n).copied().unwrap_or(0));
                rest = after;
                [IoSlice::new(frame)]
            });
            let to = [self.peer; FRAMES];
            let done = sendmmsg(
                self.socket.as_raw_fd(),
                &mut self.outgoing,
                &slices[..count],
                &to[..count],
                [],
                MsgFlags::MSG_DONTWAIT,
            );
            match done.map(Iterator::count) {
                Ok(left) => {
                    self.start += self.lengths[self.sent..self.sent + left].iter().sum::<usize>();
                    self.sent += left;
                    self.writable = left == count;
                }
                Err(Errno::EAGAIN | Errno::ENOBUFS) => self.writable = false,
                Err(Errno::EINTR) => {}
                // The one we sent to is gone: the next to send takes over.
                Err(Errno::ECONNREFUSED | Errno::ENOENT) if self.bound => {
                    tracing::info!(peer = self.peer.map(|p| p.to_string()), "VMM detached");
                    self.peer = None;
                    self.lost = true;
                    self.forget();
                }
                Err(e) => return Err(e.into()),
            }
        }
        if self.sent == self.lengths.len() {
            self.forget();
        }
        Ok(())
    }

    fn forget(&mut self) {
        self.lengths.clear();
        (self.sent, self.start, self.end) = (0, 0, 0);
    }

    /// Whether the peer went since this was last asked: another may come in its place.
    pub const fn take_lost(&mut self) -> bool {
        std::mem::replace(&mut self.lost, false)
    }

    /// Whether the VMM has to read before more can be sent.
    #[must_use]
    pub const fn is_blocked(&self) -> bool {
        !self.writable
    }

    /// Frames and bytes that were ever written.
    #[must_use]
    pub const fn written(&self) -> (u64, u64) {
        self.written
    }

    /// Datagrams that were no frames of the peer.
    #[must_use]
    pub const fn ignored(&self) -> u64 {
        self.ignored
    }
}

/// Whether nobody has the socket at `peer` any more. Where that cannot be known, somebody has.
fn is_gone(peer: &UnixAddr) -> bool {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let Ok(probe) = socket(AddressFamily::Unix, SockType::Datagram, flags, None) else { return false };
    matches!(connect(probe.as_raw_fd(), peer), Err(Errno::ECONNREFUSED | Errno::ENOENT))
}

impl Drop for Packets {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl FrameSink for Packets {
    fn has_room(&self) -> bool {
        self.end < ROOM
    }

    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let room = self.frames.get_mut(self.end..)?.get_mut(..len).filter(|_| len <= LARGEST)?;
        let result = fill(room);
        self.end += len;
        self.lengths.push(len);
        self.written.0 += 1;
        self.written.1 += len as u64;
        Some(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(packets: &mut Packets) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        packets.note(true, false, false);
        while packets.receive(|f| got.push(f.to_vec())).unwrap().more {}
        got
    }

    fn send(packets: &mut Packets, len: usize, byte: u8) -> Option<()> {
        packets.frame(len, Offload::default(), |f| f.fill(byte))
    }

    fn named(dir: &Path, name: &str) -> UnixDatagram {
        UnixDatagram::bind(dir.join(name)).unwrap()
    }

    #[test]
    fn the_first_sender_with_a_name_is_the_peer_until_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        let mut packets = Packets::bound(&path).unwrap();
        let (first, second) = (named(dir.path(), "first"), named(dir.path(), "second"));
        let nameless = UnixDatagram::unbound().unwrap();
        nameless.send_to(&[9; 60], &path).unwrap();
        assert_eq!(frames(&mut packets), Vec::<Vec<u8>>::new());
        first.send_to(b"VFKT", &path).unwrap();
        first.send_to(&[1; 60], &path).unwrap();
        second.send_to(&[2; 60], &path).unwrap();
        assert_eq!(frames(&mut packets), [vec![1; 60]]);
        assert_eq!(packets.ignored(), 2);

        send(&mut packets, 60, 7).unwrap();
        packets.flush().unwrap();
        let mut buffer = [0; 100];
        assert_eq!((first.recv(&mut buffer).unwrap(), buffer[0]), (60, 7));

        drop(first);
        send(&mut packets, 60, 8).unwrap();
        packets.flush().unwrap();
        second.send_to(&[2; 60], &path).unwrap();
        assert_eq!(frames(&mut packets), [vec![2; 60]]);
        send(&mut packets, 60, 9).unwrap();
        packets.flush().unwrap();
        assert_eq!((second.recv(&mut buffer).unwrap(), buffer[0]), (60, 9));

        // It goes, and nothing was on its way to it: the next is heard all the same, from its second frame on.
        drop(second);
        let third = named(dir.path(), "third");
        for byte in [3, 4] {
            third.send_to(&[byte; 60], &path).unwrap();
            packets.note(true, false, false);
            assert_eq!(frames(&mut packets).len(), usize::from(byte == 4));
            assert_eq!(packets.take_lost(), byte == 3);
        }
        drop(packets);
        assert!(!path.exists());
    }

    #[test]
    fn a_peer_that_does_not_read_makes_the_stack_wait_and_loses_nothing() {
        for kind in [socket2::Type::DGRAM, socket2::Type::SEQPACKET] {
            let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, kind, None).unwrap();
            let mut packets = Packets::connected(ours.into(), kind).unwrap();
            let mut sent = 0u64;
            while !packets.is_blocked() || packets.has_room() {
                send(&mut packets, 60_000, u8::try_from(sent % 251).unwrap()).unwrap();
                sent += 1;
                packets.flush().unwrap();
            }
            let mut theirs = std::fs::File::from(OwnedFd::from(theirs));
            let mut buffer = vec![0; 70_000];
            for n in 0..sent {
                let len = io::Read::read(&mut theirs, &mut buffer).unwrap();
                assert_eq!((len, u64::from(buffer[0])), (60_000, n % 251));
                packets.note(false, true, false);
                packets.flush().unwrap();
            }
        }
    }

    #[test]
    fn the_end_of_a_seqpacket_peer_is_an_error_and_too_long_a_frame_is_ignored() {
        let kind = socket2::Type::SEQPACKET;
        let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, kind, None).unwrap();
        let mut packets = Packets::connected(ours.into(), kind).unwrap();
        theirs.send(&[1; LARGEST]).unwrap();
        theirs.send(&[1; LARGEST + 1]).unwrap();
        assert_eq!(frames(&mut packets), [vec![1; LARGEST]]);
        assert_eq!(packets.ignored(), 1);
        drop(theirs);
        packets.note(true, false, false);
        assert!(packets.receive(|_| panic!()).is_err());
        let (stream, _keep) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Packets::connected(stream.into(), kind).is_err());
    }

    proptest::proptest! {
        #[test]
        fn frames_stay_apart_and_in_order(sizes in proptest::collection::vec(14usize..65_551, 1..40)) {
            let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, socket2::Type::DGRAM, None).unwrap();
            theirs.set_nonblocking(true).unwrap();
            let mut packets = Packets::connected(ours.into(), socket2::Type::DGRAM).unwrap();
            let mut theirs = std::fs::File::from(OwnedFd::from(theirs));
            let (mut buffer, mut got) = (vec![0; 70_000], Vec::new());
            let mut queue = sizes.clone();
            queue.reverse();
            while got.len() < sizes.len() {
                while packets.has_room() && let Some(len) = queue.pop() {
                    send(&mut packets, len, 1).unwrap();
                }
                packets.note(false, true, false);
                packets.flush().unwrap();
                while let Ok(n) = io::Read::read(&mut theirs, &mut buffer) {
                    got.push(n);
                }
            }
            proptest::prop_assert_eq!(got, sizes);
        }
    }
}
