//! A VMM's front end and its guest's driver made by hand: memory in a file, messages and rings byte for byte. And the two
//! back ends that it drives.
//!
//! Three regions: the second begins where the first ends, so that buffers can cross; the third is apart. The last two end in
//! the midst of a page, and what is behind them in the file must stay as it is: nothing is written outside of a region.
#![allow(dead_code, reason = "each target uses a part of it")]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use portway::link::vhost_user::VhostUser;
use portway::vsock::fuzzed::Fuzzed;
use portway_netstack::{FrameSink, Offload};

/// Regions: the guest's address, the front end's, bytes, where it is in the file.
pub const REGIONS: [[u64; 4]; 3] = [
    [0x1_0000, 0x7f00_0000_0000, 0x2_0000, 0],
    [0x3_0000, 0x7f01_0000_0000, 0x1_0000 - 40, 0x2_0000],
    [0x8_0000, 0x7f02_0000_0000, 0x4000 - 8, 0x3_0000],
];
/// Bytes of the file.
const FILE: u64 = 0x3_4000;
/// What is behind the regions, and where in the file.
const CANARIES: [(u64, usize); 2] = [(0x3_0000 - 40, 40), (0x3_4000 - 8, 8)];
const CANARY: u8 = 0xa5;
/// The most rings of a device.
pub const RINGS: usize = 3;
/// Where buffers are, in the guest's addresses.
const BUFFERS: u64 = 0x1_a000;
/// Where tables of descriptors are.
const TABLES: u64 = 0x1_9000;
/// The most bytes of a frame, with its header.
const LARGEST: usize = 65_550 + 12;

/// The bytes of an input, taken one after the other; behind the end there are none.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn u8(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    pub fn u16(&mut self) -> Option<u16> {
        let (&first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_le_bytes(first))
    }

    pub fn u64(&mut self) -> Option<u64> {
        let (&first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(first))
    }

    /// As many bytes as the next one says, or as there are.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = usize::from(self.u8()?).min(self.0.len());
        let (now, later) = self.0.split_at(n);
        self.0 = later;
        Some(now)
    }

    /// An address: of a buffer, around an end of a region, of a ring, or any.
    pub fn address(&mut self) -> Option<u64> {
        let (kind, value) = (self.u8()?, self.u16()?);
        let near = u64::from(value % 256);
        Some(match kind % 6 {
            0 => BUFFERS + u64::from(value),
            1 => REGIONS[1][0] - near,
            2 => REGIONS[1][0] + REGIONS[1][2] - near,
            3 => REGIONS[2][0] + REGIONS[2][2] - near,
            4 => REGIONS[0][0] + u64::from(value),
            _ => u64::from(value).rotate_right(u32::from(kind)),
        })
    }
}

/// Where a ring is: offsets of its descriptors, available and used entries into the first region; its size and base.
#[derive(Clone, Copy)]
pub struct Place {
    pub parts: [u64; 3],
    pub size: u16,
    pub base: u16,
}

impl Place {
    /// Of the ring `index`, where nothing else is.
    pub fn usual(index: usize, size: u16, base: u16) -> Self {
        let at = 0x3000 * index as u64;
        Self { parts: [at, at + 0x1000, at + 0x2000], size, base }
    }
}

/// What is sent along with a message.
#[derive(Clone, Copy)]
pub enum With {
    Memory,
    Kick(usize),
    Call(usize),
    /// One end of a socket that nobody reads.
    Socket,
}

/// The front end and the driver.
pub struct Guest {
    pub socket: UnixStream,
    memory: File,
    kicks: [EventFd; RINGS],
    calls: [EventFd; RINGS],
    pub places: [Place; RINGS],
    offered: [u16; RINGS],
    next: [u16; RINGS],
    next_buffer: u64,
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).expect("an eventfd")
}

impl Guest {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        let memory = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a file"));
        memory.set_len(FILE).expect("a file");
        for (at, len) in CANARIES {
            memory.write_all_at(&vec![CANARY; len], at).expect("memory");
        }
        Self {
            socket,
            memory,
            kicks: std::array::from_fn(|_| eventfd()),
            calls: std::array::from_fn(|_| eventfd()),
            places: std::array::from_fn(|index| Place::usual(index, 64, 0)),
            offered: [0; RINGS],
            next: [0; RINGS],
            next_buffer: BUFFERS,
        }
    }

    /// What is behind the regions is as it was.
    pub fn check(&self) {
        for (at, len) in CANARIES {
            let mut bytes = vec![0; len];
            self.memory.read_exact_at(&mut bytes, at).expect("memory");
            assert!(bytes.iter().all(|b| *b == CANARY), "written behind a region");
        }
    }

    /// Sends `bytes` with descriptors. What does not fit the socket is lost, with the connection.
    pub fn send(&self, bytes: &[u8], with: &[With]) {
        let (ours, theirs);
        let mut fds: Vec<RawFd> = Vec::new();
        let pair = if with.iter().any(|w| matches!(w, With::Socket)) {
            (ours, theirs) = UnixStream::pair().expect("a pair");
            Some((OwnedFd::from(ours), OwnedFd::from(theirs)))
        } else {
            None
        };
        for one in with {
            fds.push(match one {
                With::Memory => self.memory.as_raw_fd(),
                With::Kick(ring) => self.kicks[ring % RINGS].as_raw_fd(),
                With::Call(ring) => self.calls[ring % RINGS].as_raw_fd(),
                With::Socket => pair.as_ref().map_or(-1, |(fd, _)| fd.as_raw_fd()),
            });
        }
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { rights.as_slice() };
        let _ = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
    }

    /// A message as the protocol has it.
    pub fn say(&self, request: u32, body: &[u8], with: &[With]) {
        self.send(&message(request, 1, u32::try_from(body.len()).unwrap_or(0), body), with);
    }

    /// What has been answered is read.
    pub fn listen(&mut self) -> Vec<u8> {
        let (mut all, mut some) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = self.socket.read(&mut some) {
            all.extend(&some[..n]);
        }
        all
    }

    /// Features and memory.
    pub fn negotiate(&self, features: u64) {
        self.say(3, &[], &[]);
        self.say(2, &features.to_ne_bytes(), &[]);
        self.share();
    }

    /// Shares the memory.
    pub fn share(&self) {
        self.say(5, &regions(), &[With::Memory; REGIONS.len()]);
    }

    /// Makes a ring look as if `base` chains had been offered and used before.
    pub fn begin_at(&mut self, ring: usize, base: u16) {
        self.places[ring].base = base;
        self.next[ring] = 0;
        self.index(ring, base);
        self.put(self.part(ring, 2) + 2, &base.to_le_bytes());
    }

    /// Starts a ring where its place is.
    pub fn start(&mut self, ring: usize) {
        let Place { parts, size, base } = self.places[ring];
        let index = u32::try_from(ring).unwrap_or(0);
        self.say(8, &state(index, size.into()), &[]);
        self.say(10, &state(index, base.into()), &[]);
        self.say(9, &addresses(index, parts.map(|at| REGIONS[0][1] + at)), &[]);
        self.say(13, &u64::from(index).to_ne_bytes(), &[With::Call(ring)]);
        self.say(12, &u64::from(index).to_ne_bytes(), &[With::Kick(ring)]);
        self.say(18, &state(index, 1), &[]);
    }

    pub fn kick(&self, ring: usize) {
        let _ = self.kicks[ring].write(1);
    }

    /// Writes what of `bytes` lies in a region.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        let end = address.saturating_add(bytes.len() as u64);
        for [guest, _, len, file] in REGIONS {
            let (from, to) = (address.max(guest), end.min(guest + len));
            if from < to {
                let [start, stop] = [from, to].map(|at| usize::try_from(at - address).expect("a length"));
                self.memory.write_all_at(&bytes[start..stop], file + (from - guest)).expect("memory");
            }
        }
    }

    fn part(&self, ring: usize, part: usize) -> u64 {
        REGIONS[0][0] + self.places[ring].parts[part]
    }

    /// Writes the descriptor `index` of a ring's table, or of one beside the rings.
    pub fn describe(&self, table: u8, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
        let table = usize::from(table);
        let at = if table < RINGS { self.part(table, 0) } else { TABLES + 0x100 * (table % 16) as u64 };
        self.describe_at(at, index, (address, len), flags, next);
    }

    fn describe_at(&self, table: u64, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// Offers the chain at `head`.
    pub fn offer(&mut self, ring: usize, head: u16) {
        let slot = u64::from(self.offered[ring] % self.places[ring].size);
        self.put(self.part(ring, 1) + 4 + 2 * slot, &head.to_le_bytes());
        self.index(ring, self.offered[ring].wrapping_add(1));
    }

    /// Sets the available index.
    pub fn index(&mut self, ring: usize, index: u16) {
        self.offered[ring] = index;
        self.put(self.part(ring, 1) + 2, &index.to_le_bytes());
    }

    /// Sets the flags of the available entries, and when the driver wants to be told.
    pub fn wish(&mut self, ring: usize, wish: u16) {
        self.put(self.part(ring, 1), &wish.to_le_bytes());
        self.put(self.part(ring, 1) + 4 + 2 * u64::from(self.places[ring].size), &wish.to_le_bytes());
    }

    /// Posts `len` bytes in a chain of the layout: how many pieces, where it is cut, whether it has a table of its own. The
    /// first piece is as long as the cut says.
    pub fn post(&mut self, ring: usize, layout: u8, len: u32, writable: bool, bytes: &[u8]) {
        let pieces = 1 + u16::from(layout & 3);
        let (indirect, cut) = (layout & 4 != 0, u32::from(layout >> 3));
        let size = self.places[ring].size;
        if self.next_buffer > REGIONS[1][0] + 0x8000 {
            self.next_buffer = BUFFERS;
        }
        let start = self.next_buffer;
        self.put(start, bytes);
        self.next_buffer += u64::from(len.min(0x2000));
        let first = self.next[ring];
        let table = TABLES + 0x40 * u64::from(first % 64);
        let mut done = 0;
        for i in 0..pieces {
            let last = i + 1 == pieces;
            let n = if last { len - done } else { cut.min(len - done) };
            let flags = u16::from(!last) | if writable { 2 } else { 0 };
            let piece = (start + u64::from(done), n);
            if indirect {
                self.describe_at(table, i, piece, flags, i + 1);
            } else {
                self.describe_at(
                    self.part(ring, 0),
                    (first + i) % size,
                    piece,
                    flags,
                    (first + i + 1) % size,
                );
            }
            done += n;
        }
        if indirect {
            self.describe_at(self.part(ring, 0), first, (table, 16 * u32::from(pieces)), 4, 0);
        }
        self.next[ring] = (first + if indirect { 1 } else { pieces }) % size;
        self.offer(ring, first);
    }
}

/// The bytes of a message.
pub fn message(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    [&request.to_ne_bytes()[..], &flags.to_ne_bytes(), &size.to_ne_bytes(), body].concat()
}

/// A ring, and a number.
pub fn state(index: u32, number: u32) -> [u8; 8] {
    (u64::from(index) | u64::from(number) << 32).to_le_bytes()
}

/// Where the descriptors, available and used entries of a ring are.
pub fn addresses(index: u32, [descriptors, avail, used]: [u64; 3]) -> Vec<u8> {
    [u64::from(index), descriptors, used, avail, 0].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// All regions.
pub fn regions() -> Vec<u8> {
    let mut body = (REGIONS.len() as u64).to_ne_bytes().to_vec();
    for [guest, user, len, file] in REGIONS {
        body.extend([guest, len, user, file].iter().flat_map(|word| word.to_ne_bytes()));
    }
    body
}

/// A back end.
pub enum Device {
    Net(Box<VhostUser>),
    Vsock(Box<Fuzzed>, Vec<UnixStream>),
}

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    // libFuzzer's `main` leaves SIGPIPE as it is, where Rust's would ignore it.
    // SAFETY: to ignore a signal runs no code.
    unsafe {
        nix::sys::signal::signal(nix::sys::signal::Signal::SIGPIPE, nix::sys::signal::SigHandler::SigIgn)
    }
    .expect("a signal");
    tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime")
});

/// The most streams a host holds.
const HOSTS: usize = 16;

impl Device {
    /// A back end, and the front end that is connected with it.
    pub fn new(net: bool) -> (Self, Guest) {
        let _runtime = RUNTIME.enter();
        if net {
            let (ours, theirs) = UnixStream::pair().expect("a pair");
            (Self::Net(Box::new(VhostUser::new(ours, 1500).expect("a link"))), Guest::new(theirs))
        } else {
            let (device, vmm) = Fuzzed::new().expect("a device");
            (Self::Vsock(Box::new(device), Vec::new()), Guest::new(vmm))
        }
    }

    /// The first `rings` rings are used from now on.
    pub fn started(&mut self, guest: &mut Guest, rings: usize) -> Option<()> {
        self.turn()?;
        for ring in 0..rings {
            guest.start(ring);
        }
        self.turn()?;
        guest.listen();
        Some(())
    }

    /// Does what there is to do, within bounds; `None` once the connection has ended.
    pub fn turn(&mut self) -> Option<()> {
        match self {
            Self::Net(link) => {
                while link.handle_control().ok()?.more {}
                for _ in 0..4 {
                    if !link.wants_receive() {
                        break;
                    }
                    let (mut frames, mut bytes) = (0, 0);
                    let batch = link.receive(|frame, _| {
                        assert!(frame.len() <= LARGEST, "a frame longer than any");
                        (frames, bytes) = (frames + 1, bytes + frame.len());
                        ControlFlow::Continue(())
                    });
                    assert!(frames <= 64 && bytes <= 512 * 1024 + LARGEST, "a batch without bounds");
                    batch.ok()?;
                }
                link.flush().ok()
            }
            Self::Vsock(device, hosts) => {
                for _ in 0..2 {
                    let attached = device.turn().expect("a poll");
                    while let Some(stream) = device.accepted() {
                        // The oldest goes.
                        hosts.push(stream);
                        if hosts.len() > HOSTS {
                            hosts.remove(0);
                        }
                    }
                    attached.then_some(())?;
                }
                Some(())
            }
        }
    }

    /// The guest has kicked a ring.
    pub fn kicked(&mut self, guest: &Guest, ring: usize) {
        match self {
            Self::Net(link) => link.note_kick(ring),
            Self::Vsock(..) => guest.kick(ring),
        }
    }

    /// Something for the guest: a frame, or what a host does with a stream.
    pub fn to_guest(&mut self, what: u8, which: u8, len: u16) {
        match self {
            Self::Net(link) => {
                for _ in 0..=what % 4 {
                    if !link.has_room() {
                        return;
                    }
                    link.frame(len.into(), Offload::default(), |room| room.fill(which));
                }
            }
            Self::Vsock(device, hosts) => {
                let which = usize::from(which) % hosts.len().max(1);
                let Some(host) = hosts.get_mut(which).filter(|_| what % 5 > 0) else {
                    let _runtime = RUNTIME.enter();
                    hosts.push(device.dial(u32::from(len) % 8).expect("a pair"));
                    if hosts.len() > HOSTS {
                        hosts.remove(0);
                    }
                    return;
                };
                match what % 5 {
                    1 => drop(std::io::Write::write(host, &vec![what; len.into()])),
                    2 => drop(host.read(&mut vec![0; len.into()])),
                    3 => drop(host.shutdown(std::net::Shutdown::Write)),
                    _ => drop(hosts.remove(which)),
                }
            }
        }
    }

    /// Lets time pass.
    pub fn later(&mut self) -> Option<()> {
        match self {
            Self::Net(link) => link.look_again().ok(),
            Self::Vsock(device, _) => {
                device.give_up();
                Some(())
            }
        }
    }

    /// The end of it all: nothing is left.
    pub fn end(self, guest: &Guest) {
        guest.check();
        if let Self::Vsock(mut device, hosts) = self {
            let _runtime = RUNTIME.enter();
            assert_eq!(device.end(&guest.socket, hosts).expect("a poll"), 0, "streams are left");
        }
    }
}
