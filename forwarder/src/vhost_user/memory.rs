//! The guest's memory, as the front end shares it: one mapping per region.
//!
//! Addresses are the guest's own (physical) or, for rings, the front end's (virtual). Both are only numbers until a
//! region is found for them; every access is checked against it. Bytes are copied in and out, never borrowed: the
//! guest may change them at any time.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

/// Most regions one front end may share: what one message can carry descriptors for.
pub(crate) const REGIONS: usize = 32;

/// An address no region has, or a range that leaves its region for no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an address outside of the guest's memory")]
pub(crate) struct Outside;

/// Every region, in the order of the guest's addresses.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    guest: u64,
    user: u64,
    len: u64,
    mapped: Arc<GuestRegionMmap<()>>,
}

impl Region {
    fn map(wanted: &VhostUserMemoryRegion, file: File) -> io::Result<Self> {
        let (guest, user, len, offset) =
            (wanted.guest_phys_addr, wanted.user_addr, wanted.memory_size, wanted.mmap_offset);
        // Bytes behind a file's end are SIGBUS. That the file does not shrink later is the front end's word.
        let meta = file.metadata()?;
        let end = offset.checked_add(len).ok_or_else(|| io::Error::other("a memory region without end"))?;
        if meta.is_file() && meta.len() < end {
            return Err(io::Error::other(format!(
                "a memory region ends at {end} of a file of {} bytes",
                meta.len()
            )));
        }
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(io::Error::other)?;
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or_else(|| io::Error::other("a memory region wraps around"))?;
        Ok(Self { guest, user, len, mapped: Arc::new(mapped) })
    }

    /// Bytes from `address` to the region's end, and where that is in the region.
    fn offset(&self, address: u64) -> Option<(u64, u64)> {
        let offset = address.checked_sub(self.guest)?;
        (offset < self.len).then(|| (offset, self.len - offset))
    }
}

impl Memory {
    /// Maps what a message says.
    pub(crate) fn map(wanted: &[VhostUserMemoryRegion], files: Vec<File>) -> io::Result<Self> {
        let mut memory = Self::default();
        for (region, file) in wanted.iter().zip(files) {
            memory.add(region, file)?;
        }
        Ok(memory)
    }

    /// Maps one region more.
    pub(crate) fn add(&mut self, wanted: &VhostUserMemoryRegion, file: File) -> io::Result<()> {
        if self.regions.len() >= REGIONS {
            return Err(io::Error::other(format!("more than {REGIONS} memory regions")));
        }
        let region = Region::map(wanted, file)?;
        let overlaps = |r: &Region| r.guest < region.guest + region.len && region.guest < r.guest + r.len;
        if self.regions.iter().any(overlaps) {
            return Err(io::Error::other("memory regions overlap"));
        }
        let at = self.regions.partition_point(|r| r.guest < region.guest);
        self.regions.insert(at, region);
        Ok(())
    }

    /// Unmaps one region, once nothing holds it any more. False when there is none such.
    pub(crate) fn remove(&mut self, wanted: &VhostUserMemoryRegion) -> bool {
        let before = self.regions.len();
        self.regions.retain(|r| (r.guest, r.len) != (wanted.guest_phys_addr, wanted.memory_size));
        self.regions.len() < before
    }

    /// Whether nothing is shared yet.
    pub(crate) const fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    fn find(&self, address: u64) -> Option<(&Region, u64, u64)> {
        let at = self.regions.partition_point(|r| r.guest <= address).checked_sub(1)?;
        let region = self.regions.get(at)?;
        region.offset(address).map(|(offset, left)| (region, offset, left))
    }

    /// Calls `each` for every region that `address..address + len` touches.
    fn walk(
        &self,
        mut address: u64,
        len: usize,
        mut each: impl FnMut(
            &GuestRegionMmap<()>,
            MemoryRegionAddress,
            std::ops::Range<usize>,
        ) -> Result<(), Outside>,
    ) -> Result<(), Outside> {
        let mut done = 0;
        while done < len {
            let (region, offset, left) = self.find(address).ok_or(Outside)?;
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(len - done);
            each(&region.mapped, MemoryRegionAddress(offset), done..done + n)?;
            done += n;
            address = address.checked_add(n as u64).ok_or(Outside)?;
        }
        Ok(())
    }

    /// Copies from the guest's memory.
    pub(crate) fn read(&self, address: u64, to: &mut [u8]) -> Result<(), Outside> {
        self.walk(address, to.len(), |region, at, range| {
            region.read_slice(to.get_mut(range).ok_or(Outside)?, at).map_err(|_| Outside)
        })
    }

    /// Copies into the guest's memory.
    pub(crate) fn write(&self, address: u64, from: &[u8]) -> Result<(), Outside> {
        self.walk(address, from.len(), |region, at, range| {
            region.write_slice(from.get(range).ok_or(Outside)?, at).map_err(|_| Outside)
        })
    }

    /// Whether all of `address..address + len` is there.
    pub(crate) fn has(&self, address: u64, len: usize) -> bool {
        self.walk(address, len, |_, _, _| Ok(())).is_ok()
    }

    /// The bytes at an address of the front end's. Always within one region.
    pub(crate) fn area(&self, user: u64, len: u64) -> Option<Area> {
        self.regions.iter().find_map(|r| {
            let offset = user.checked_sub(r.user)?;
            let end = offset.checked_add(len)?;
            (end <= r.len).then(|| Area { region: Arc::clone(&r.mapped), start: offset, len })
        })
    }
}

/// One part of a ring: found once, read and written often.
#[derive(Debug)]
pub(crate) struct Area {
    region: Arc<GuestRegionMmap<()>>,
    start: u64,
    len: u64,
}

impl Area {
    fn at(&self, offset: u64, len: u64) -> Result<MemoryRegionAddress, Outside> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if fits { Ok(MemoryRegionAddress(self.start + offset)) } else { Err(Outside) }
    }

    /// A number both sides change.
    pub(crate) fn load(&self, offset: u64) -> Result<u16, Outside> {
        let at = self.at(offset, 2)?;
        self.region.load(at, std::sync::atomic::Ordering::Acquire).map(u16::from_le).map_err(|_| Outside)
    }

    /// Sets a number both sides change; whatever was written before is there first.
    pub(crate) fn store(&self, offset: u64, value: u16) -> Result<(), Outside> {
        let at = self.at(offset, 2)?;
        self.region.store(value.to_le(), at, std::sync::atomic::Ordering::Release).map_err(|_| Outside)
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> Result<[u8; N], Outside> {
        let mut bytes = [0; N];
        self.region.read_slice(&mut bytes, self.at(offset, N as u64)?).map_err(|_| Outside)?;
        Ok(bytes)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Outside> {
        self.region.write_slice(bytes, self.at(offset, bytes.len() as u64)?).map_err(|_| Outside)
    }

    /// Whether the area begins at a multiple of `by` in our address space: atomic accesses need it.
    pub(crate) fn is_aligned(&self, by: u64) -> bool {
        // Mappings begin at a page.
        self.start.is_multiple_of(by) && self.region.len() >= self.len
    }
}
