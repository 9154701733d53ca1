//! A front end and a guest's driver, in one: memory in a file, rings made by hand.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserMemoryRegion, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Changes, Memory, feature};

/// Entries of a ring.
pub(crate) const SIZE: u16 = 256;
/// Guest memory in two regions that touch, so that buffers can cross from one into the other.
pub(crate) const REGION: u64 = 4 << 20;
/// Where the guest's memory begins, in its own addresses.
pub(crate) const GUEST: u64 = 0x4000_0000;
/// Where it begins in the front end's.
const USER: u64 = 0x7f00_0000_0000;
/// Where buffers may be.
pub(crate) const BUFFERS: u64 = GUEST + 0x10_0000;
/// Where tables of descriptors may be.
const TABLES: u64 = GUEST + 0x8_0000;

/// A descriptor: address, length, and whether the device writes.
pub(crate) type Piece = (u64, u32, bool);

/// A driver of `RINGS` rings.
pub(crate) struct Driver<const RINGS: usize> {
    pub(crate) front: Frontend,
    pub(crate) memory: Memory,
    pub(crate) kick: [EventFd; RINGS],
    pub(crate) call: [EventFd; RINGS],
    next_descriptor: [u16; RINGS],
    avail: [u16; RINGS],
    used: [u16; RINGS],
    /// Cleared for a driver that polls.
    pub(crate) wants_interrupts: bool,
    pub(crate) features: u64,
    file: std::fs::File,
}

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Lets the front end say something while the back end answers: `handle` is called until it has.
pub(crate) fn talk<T: Send>(
    front: &mut Frontend,
    say: impl FnOnce(&mut Frontend) -> T + Send,
    mut handle: impl FnMut() -> io::Result<Changes>,
) -> (T, io::Result<Changes>) {
    std::thread::scope(|scope| {
        let said = scope.spawn(|| say(front));
        let mut all = Ok(Changes::default());
        loop {
            let last = said.is_finished();
            match (handle(), &mut all) {
                (Ok(new), Ok(all)) => {
                    all.kicks |= new.kicks;
                    all.device |= new.device;
                }
                (Err(error), _) => return (said.join().unwrap(), Err(error)),
                (Ok(_), Err(_)) => {}
            }
            if last {
                return (said.join().unwrap(), all);
            }
        }
    })
}

impl<const RINGS: usize> Driver<RINGS> {
    /// A front end that has said nothing yet.
    pub(crate) fn new(stream: UnixStream, features: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * REGION).unwrap();
        let regions = Self::regions()
            .map(|(guest, user, offset)| VhostUserMemoryRegion::new(guest, REGION, user, offset));
        let files = regions.iter().map(|_| file.try_clone().unwrap()).collect();
        Self {
            front: Frontend::from_stream(stream, RINGS as u64),
            memory: Memory::map(&regions, files).unwrap(),
            kick: std::array::from_fn(|_| eventfd()),
            call: std::array::from_fn(|_| eventfd()),
            next_descriptor: [0; RINGS],
            avail: [0; RINGS],
            used: [0; RINGS],
            wants_interrupts: true,
            features,
            file,
        }
    }

    /// Features and memory.
    pub(crate) fn negotiate(
        front: &mut Frontend,
        features: u64,
        infos: &[VhostUserMemoryRegionInfo],
    ) -> vhost::Result<()> {
        let offered = front.get_features()?;
        assert_eq!(features & !offered, 0);
        front.set_features(features)?;
        let protocol = front.get_protocol_features()?;
        front.set_protocol_features(protocol & VhostUserProtocolFeatures::all())?;
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_owner()?;
        front.set_mem_table(infos).map(drop)
    }

    /// Starts the rings at `base`.
    pub(crate) fn start(
        front: &mut Frontend,
        kick: &[EventFd; RINGS],
        call: &[EventFd; RINGS],
        base: [u16; RINGS],
    ) -> vhost::Result<()> {
        for ring in 0..RINGS {
            front.set_vring_num(ring, SIZE)?;
            front.set_vring_base(ring, base[ring])?;
            front.set_vring_addr(ring, &Self::config(ring))?;
            front.set_vring_call(ring, &call[ring])?;
            front.set_vring_kick(ring, &kick[ring])?;
            front.set_vring_enable(ring, true)?;
        }
        Ok(())
    }

    fn regions() -> [(u64, u64, u64); 2] {
        [(GUEST, USER, 0), (GUEST + REGION, USER + 0x1_0000_0000, REGION)]
    }

    pub(crate) fn infos(&self) -> [VhostUserMemoryRegionInfo; 2] {
        Self::regions().map(|(guest_phys_addr, userspace_addr, mmap_offset)| VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size: REGION,
            userspace_addr,
            mmap_offset,
            mmap_handle: self.file.as_raw_fd(),
        })
    }

    /// Where a ring's three parts are: offsets into the first region.
    fn parts(queue: usize) -> [u64; 3] {
        let base = 0x1_0000 * queue as u64;
        [base, base + 0x4000, base + 0x8000]
    }

    pub(crate) fn config(queue: usize) -> VringConfigData {
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

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write(address, bytes).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(address, &mut bytes).unwrap();
        bytes
    }

    fn get_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address, 2).try_into().unwrap())
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(crate) fn describe(&self, table: u64, index: u16, (address, len, _): Piece, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    pub(crate) fn table(queue: usize) -> u64 {
        GUEST + Self::parts(queue)[0]
    }

    /// Links `pieces` up in the ring, or in a table of their own, and gives the head.
    pub(crate) fn chain(&mut self, queue: usize, pieces: &[Piece], indirect: bool) -> u16 {
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
    pub(crate) fn offer(&mut self, queue: usize, head: u16) -> bool {
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
    pub(crate) fn lie_about_index(&mut self, queue: usize, index: u16) {
        self.put(GUEST + Self::parts(queue)[1] + 2, &index.to_le_bytes());
    }

    /// Makes a chain of `pieces` and offers it.
    pub(crate) fn post(&mut self, queue: usize, pieces: &[Piece], indirect: bool) -> bool {
        let head = self.chain(queue, pieces, indirect);
        self.offer(queue, head)
    }

    /// What the device has used since the last time.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
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

    /// Makes rings look as if chains had been offered and used before.
    pub(crate) fn begin_at(&mut self, base: [u16; RINGS]) {
        for (ring, index) in base.into_iter().enumerate() {
            let [_, avail, used] = Self::parts(ring).map(|at| GUEST + at);
            self.put(avail + 2, &index.to_le_bytes());
            self.put(used + 2, &index.to_le_bytes());
            (self.avail[ring], self.used[ring]) = (index, index);
        }
    }

    /// Wishes to be told of the used entry `index`.
    pub(crate) fn wish(&mut self, queue: usize, index: u16) {
        let avail = GUEST + Self::parts(queue)[1];
        self.put(avail + 4 + 2 * u64::from(SIZE), &index.to_le_bytes());
    }

    /// Sets the flag by which a driver without `EVENT_IDX` asks for silence.
    pub(crate) fn set_silence(&mut self, queue: usize, on: bool) {
        self.put(GUEST + Self::parts(queue)[1], &u16::from(on).to_le_bytes());
    }

    /// Whether the guest was notified since the last time.
    pub(crate) fn interrupted(&mut self, queue: usize) -> bool {
        self.call[queue].read().is_ok()
    }
}
