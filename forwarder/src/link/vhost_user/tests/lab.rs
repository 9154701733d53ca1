//! A front end and a guest's driver, in one: memory in a file, rings made by hand.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserMemoryRegion, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::*;
use crate::vhost_user::Memory;

/// Entries of a ring.
pub(super) const SIZE: u16 = 256;
/// Guest memory in two regions that touch, so that buffers can cross from one into the other.
pub(super) const REGION: u64 = 4 << 20;
/// Where the guest's memory begins, in its own addresses.
pub(super) const GUEST: u64 = 0x4000_0000;
/// Where it begins in the front end's.
const USER: u64 = 0x7f00_0000_0000;
/// Where buffers may be.
pub(super) const BUFFERS: u64 = GUEST + 0x10_0000;
/// Where tables of descriptors may be.
const TABLES: u64 = GUEST + 0x8_0000;

pub(super) const ALL: u64 = feature::OFFERED;

/// A descriptor: address, length, and whether the device writes.
pub(super) type Piece = (u64, u32, bool);

pub(super) struct Lab {
    pub(super) link: VhostUser,
    pub(super) front: Frontend,
    pub(super) memory: Memory,
    pub(super) kick: [EventFd; 2],
    pub(super) call: [EventFd; 2],
    next_descriptor: [u16; 2],
    avail: [u16; 2],
    used: [u16; 2],
    /// Cleared for a driver that polls.
    pub(super) wants_interrupts: bool,
    features: u64,
    file: std::fs::File,
}

pub(super) fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Lets the front end talk while the link answers.
pub(super) fn talk<T: Send>(
    link: &mut VhostUser,
    front: &mut Frontend,
    say: impl FnOnce(&mut Frontend) -> T + Send,
) -> (T, io::Result<Changes>) {
    std::thread::scope(|scope| {
        let said = scope.spawn(|| say(front));
        let mut all = Ok(Changes::default());
        loop {
            let last = said.is_finished();
            let mut fds = [PollFd::new(link.front.socket().as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(1u8)).unwrap();
            match (link.handle_control(), &mut all) {
                (Ok(new), Ok(all)) => {
                    all.kicks |= new.kicks;
                    all.device |= new.device;
                }
                (Err(error), _) => {
                    // The front end must not wait for ever.
                    link.front.socket().shutdown(std::net::Shutdown::Both).unwrap();
                    return (said.join().unwrap(), Err(error));
                }
                (Ok(_), Err(_)) => {}
            }
            if last {
                return (said.join().unwrap(), all);
            }
        }
    })
}

impl Lab {
    /// A device set up with `features`, running.
    pub(super) fn new(features: u64) -> Self {
        let mut lab = Self::connected(features);
        let changes = lab.set_up();
        assert_eq!(changes, Changes { kicks: true, device: true, more: false });
        lab
    }

    /// A front end that has said nothing yet.
    pub(super) fn connected(features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * REGION).unwrap();
        let regions = Self::regions()
            .map(|(guest, user, offset)| VhostUserMemoryRegion::new(guest, REGION, user, offset));
        let files = regions.iter().map(|_| file.try_clone().unwrap()).collect();
        Self {
            link: VhostUser::new(ours, 1500).unwrap(),
            front: Frontend::from_stream(theirs, 2),
            memory: Memory::map(&regions, files).unwrap(),
            kick: [eventfd(), eventfd()],
            call: [eventfd(), eventfd()],
            next_descriptor: [0; 2],
            avail: [0; 2],
            used: [0; 2],
            wants_interrupts: true,
            features,
            file,
        }
    }

    fn regions() -> [(u64, u64, u64); 2] {
        [(GUEST, USER, 0), (GUEST + REGION, USER + 0x1_0000_0000, REGION)]
    }

    pub(super) fn infos(&self) -> [VhostUserMemoryRegionInfo; 2] {
        Self::regions().map(|(guest_phys_addr, userspace_addr, mmap_offset)| VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size: REGION,
            userspace_addr,
            mmap_offset,
            mmap_handle: self.file.as_raw_fd(),
        })
    }

    /// Features and memory, then both rings.
    pub(super) fn set_up(&mut self) -> Changes {
        let infos = self.infos();
        let features = self.features;
        let (said, first) = talk(&mut self.link, &mut self.front, |front| {
            let offered = front.get_features()?;
            assert_eq!(features & !offered, 0);
            front.set_features(features)?;
            let protocol = front.get_protocol_features()?;
            front.set_protocol_features(protocol & VhostUserProtocolFeatures::all())?;
            front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            front.set_owner()?;
            front.set_mem_table(&infos)
        });
        said.unwrap();
        let first = first.unwrap();
        let second = self.start([0, 0]);
        Changes { kicks: first.kicks | second.kicks, device: first.device | second.device, more: false }
    }

    /// Where a ring's three parts are: offsets into the first region.
    fn parts(queue: usize) -> [u64; 3] {
        let base = 0x1_0000 * queue as u64;
        [base, base + 0x4000, base + 0x8000]
    }

    pub(super) fn config(queue: usize) -> VringConfigData {
        let [descriptors, avail, used] = Self::parts(queue).map(|at| USER + at);
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: descriptors,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        }
    }

    /// Starts both rings at `base`.
    pub(super) fn start(&mut self, base: [u16; 2]) -> Changes {
        let Self { link, front, kick, call, .. } = self;
        let (said, changes) = talk(link, front, |front| -> vhost::Result<()> {
            for queue in 0..2 {
                front.set_vring_num(queue, SIZE)?;
                front.set_vring_base(queue, base[queue])?;
                front.set_vring_addr(queue, &Self::config(queue))?;
                front.set_vring_call(queue, &call[queue])?;
                front.set_vring_kick(queue, &kick[queue])?;
                front.set_vring_enable(queue, true)?;
            }
            Ok(())
        });
        said.unwrap();
        changes.unwrap()
    }

    /// Stops both rings and says where.
    pub(super) fn stop(&mut self) -> ([u16; 2], Changes) {
        let (bases, changes) = talk(&mut self.link, &mut self.front, |front| {
            [0, 1].map(|queue| u16::try_from(front.get_vring_base(queue).unwrap()).unwrap())
        });
        (bases, changes.unwrap())
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write(address, bytes).unwrap();
    }

    pub(super) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(address, &mut bytes).unwrap();
        bytes
    }

    fn get_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address, 2).try_into().unwrap())
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(super) fn describe(&self, table: u64, index: u16, (address, len, _): Piece, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    pub(super) fn table(queue: usize) -> u64 {
        GUEST + Self::parts(queue)[0]
    }

    /// Links `pieces` up in the ring, or in a table of their own, and gives the head.
    pub(super) fn chain(&mut self, queue: usize, pieces: &[Piece], indirect: bool) -> u16 {
        let flags = |i: usize| u16::from(i + 1 < pieces.len()) | (u16::from(pieces[i].2) << 1);
        let first = self.next_descriptor[queue];
        if indirect {
            let table = TABLES + 0x2_0000 * queue as u64 + 0x100 * u64::from(first);
            for (i, piece) in pieces.iter().enumerate() {
                let i16 = u16::try_from(i).unwrap();
                self.describe(table, i16, *piece, flags(i), i16 + 1);
            }
            let len = u32::try_from(16 * pieces.len()).unwrap();
            self.describe(Self::table(queue), first, (table, len, false), 4, 0);
            self.next_descriptor[queue] = (first + 1) % SIZE;
            return first;
        }
        for (i, piece) in pieces.iter().enumerate() {
            let index = (first + u16::try_from(i).unwrap()) % SIZE;
            self.describe(Self::table(queue), index, *piece, flags(i), (index + 1) % SIZE);
        }
        self.next_descriptor[queue] = (first + u16::try_from(pieces.len()).unwrap()) % SIZE;
        first
    }

    /// Offers the chain at `head`; true when the device wants a kick.
    pub(super) fn offer(&mut self, queue: usize, head: u16) -> bool {
        let [_, avail, used] = Self::parts(queue).map(|at| GUEST + at);
        let old = self.avail[queue];
        self.put(avail + 4 + 2 * u64::from(old % SIZE), &head.to_le_bytes());
        self.avail[queue] = old.wrapping_add(1);
        self.put(avail + 2, &self.avail[queue].to_le_bytes());
        if self.features & feature::EVENT_IDX == 0 {
            return self.get_u16(used) & 1 == 0;
        }
        self.get_u16(used + 4 + 8 * u64::from(SIZE)) == old
    }

    /// Sets the available index to anything.
    pub(super) fn lie_about_index(&mut self, queue: usize, index: u16) {
        self.put(GUEST + Self::parts(queue)[1] + 2, &index.to_le_bytes());
    }

    /// Makes a chain of `pieces` and offers it.
    pub(super) fn post(&mut self, queue: usize, pieces: &[Piece], indirect: bool) -> bool {
        let head = self.chain(queue, pieces, indirect);
        self.offer(queue, head)
    }

    /// Kicks, as the driver of the network would hear it.
    pub(super) fn kick(&mut self, queue: usize) {
        self.link.note_kick(queue);
    }

    /// What the device has used since the last time.
    pub(super) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let [_, avail, used] = Self::parts(queue).map(|at| GUEST + at);
        let index = self.get_u16(used + 2);
        let mut entries = Vec::new();
        while self.used[queue] != index {
            let slot = u64::from(self.used[queue] % SIZE);
            let bytes: [u8; 8] = self.get(used + 4 + 8 * slot, 8).try_into().unwrap();
            let [a, b, c, d, e, f, g, h] = bytes;
            entries.push((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])));
            self.used[queue] = self.used[queue].wrapping_add(1);
        }
        if self.wants_interrupts {
            self.put(avail + 4 + 2 * u64::from(SIZE), &self.used[queue].to_le_bytes());
        }
        entries
    }

    /// Wishes to be told of the used entry `index`.
    pub(super) fn wish(&mut self, queue: usize, index: u16) {
        let avail = GUEST + Self::parts(queue)[1];
        self.put(avail + 4 + 2 * u64::from(SIZE), &index.to_le_bytes());
    }

    /// Sets the flag by which a driver without `EVENT_IDX` asks for silence.
    pub(super) fn set_silence(&mut self, queue: usize, on: bool) {
        self.put(GUEST + Self::parts(queue)[1], &u16::from(on).to_le_bytes());
    }

    /// Whether the guest was notified since the last time.
    pub(super) fn interrupted(&mut self, queue: usize) -> bool {
        self.call[queue].read().is_ok()
    }

    /// All frames that wait from the guest.
    pub(super) fn received(&mut self) -> Vec<(Vec<u8>, Offload)> {
        let mut frames = Vec::new();
        while self.link.wants_receive() {
            self.link.receive(|frame, offload| frames.push((frame.to_vec(), offload))).unwrap();
        }
        self.link.flush().unwrap();
        frames
    }
}
