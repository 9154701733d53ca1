//! What the front end tells over the socket: features, memory, rings.
//!
//! [`Control`] is a register file: the `vhost` crate's request handler fills it in and answers out of it, and
//! [`super::VhostUser`] makes live [`super::ring::Ring`]s of it after each message. Every number here comes from the VMM, which
//! is trusted with its own guest's memory and nothing else; what does not fit is an error that ends the link.
//!
//! Source: QEMU `docs/interop/vhost-user.rst`.

use std::fs::File;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Virtio features by bit (virtio 1.2, §5.1.3 and §6; vhost-user's own bit 30).
pub(super) mod feature {
    pub(crate) const CSUM: u64 = 1 << 0;
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const MTU: u64 = 1 << 3;
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;

    /// What we offer.
    pub(crate) const OFFERED: u64 = CSUM
        | GUEST_CSUM
        | MTU
        | GUEST_TSO4
        | GUEST_TSO6
        | HOST_TSO4
        | HOST_TSO6
        | MRG_RXBUF
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// Rings of one queue pair: 0 to the guest, 1 from it.
pub(super) const RINGS: usize = 2;
/// Memory regions a front end may have; QEMU's own limit without slots is 8.
const SLOTS: usize = 64;
/// The largest ring (virtio 1.2, §2.7).
const LARGEST_RING: u32 = 32_768;

/// One ring as the front end described it.
#[derive(Debug, Default)]
pub(super) struct Registers {
    pub(super) size: u16,
    /// Guest addresses of the descriptor table, the available ring and the used ring.
    pub(super) addresses: Option<[u64; 3]>,
    /// The next available entry to look at.
    pub(super) base: u16,
    pub(super) kick: Option<Arc<File>>,
    pub(super) call: Option<Arc<File>>,
    /// A kick descriptor, or word that there is none, has come since the ring was last stopped.
    pub(super) started: bool,
    pub(super) enabled: bool,
    /// It changed since the live ring was made.
    pub(super) dirty: bool,
}

#[derive(Debug)]
struct Slot {
    region: Arc<GuestRegionMmap>,
    /// Where it is in the front end's own address space: ring addresses are given in that.
    user: u64,
    guest: u64,
    size: u64,
}

/// Everything the front end said.
#[derive(Debug, Default)]
pub(super) struct Control {
    /// The features both sides agreed on.
    pub(super) features: u64,
    slots: Vec<Slot>,
    pub(super) memory: Option<GuestMemoryMmap>,
    pub(super) rings: [Registers; RINGS],
    /// The guest's driver started anew, with other features.
    pub(super) restarted: bool,
}

impl Control {
    fn ring(&mut self, index: u32) -> Result<&mut Registers> {
        let ring =
            usize::try_from(index).ok().and_then(|n| self.rings.get_mut(n)).ok_or(Error::InvalidParam)?;
        ring.dirty = true;
        Ok(ring)
    }

    /// Lets ring `index` run, or not.
    pub(super) fn enable(&mut self, index: u32, on: bool) -> std::io::Result<()> {
        let ring = self
            .ring(index)
            .map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e.to_string()))?;
        ring.enabled = on;
        Ok(())
    }

    fn guest_address(&self, user: u64) -> Result<u64> {
        self.slots
            .iter()
            .find_map(|s| user.checked_sub(s.user).filter(|o| *o < s.size).map(|o| s.guest + o))
            .ok_or(Error::InvalidParam)
    }

    fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Slot> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let bytes = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, region.mmap_offset), bytes)
            .map_err(|e| Error::ReqHandlerError(std::io::Error::other(e)))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(Error::InvalidParam)?;
        Ok(Slot { region: Arc::new(region), user, guest, size })
    }

    fn remap(&mut self) -> Result<()> {
        self.slots.sort_by_key(|s| s.region.start_addr());
        let regions = self.slots.iter().map(|s| Arc::clone(&s.region)).collect();
        self.memory = Some(GuestMemoryMmap::from_arc_regions(regions).map_err(|_| Error::InvalidParam)?);
        for ring in &mut self.rings {
            ring.dirty = true;
        }
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Control {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.restarted = true;
        for ring in &mut self.rings {
            *ring = Registers { dirty: true, ..Registers::default() };
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(feature::OFFERED)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !feature::OFFERED != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.restarted |= features != self.features;
        self.features = features;
        for ring in &mut self.rings {
            ring.dirty = true;
            // Without the protocol features there is no message that enables a ring.
            ring.enabled |= features & feature::PROTOCOL_FEATURES == 0;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.slots = regions.iter().zip(files).map(|(r, f)| Self::map(r, f)).collect::<Result<_>>()?;
        self.remap()?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.slots.len() >= SLOTS {
            return Err(Error::InvalidParam);
        }
        self.slots.push(Self::map(region, file)?);
        self.remap()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let same = |s: &Slot| {
            (s.guest, s.size, s.user) == (region.guest_phys_addr, region.memory_size, region.user_addr)
        };
        let at = self.slots.iter().position(same).ok_or(Error::InvalidParam)?;
        self.slots.remove(at);
        self.remap()
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if !num.is_power_of_two() || num > LARGEST_RING {
            return Err(Error::InvalidParam);
        }
        ring.size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let addresses =
            [self.guest_address(descriptors)?, self.guest_address(available)?, self.guest_address(used)?];
        self.ring(index)?.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // For a split ring: the next available index, 16 bits.
        self.ring(index)?.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // The VM may only be paused: its flows stay.
        let ring = self.ring(index)?;
        ring.started = false;
        ring.kick = None;
        ring.call = None;
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self.ring(index.into())?;
        ring.kick = fd.map(Arc::new);
        ring.started = true;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.call = fd.map(Arc::new);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        self.ring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::MTU
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    // ---- not offered, so no front end asks ----

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("config"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("config"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("gpu"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared object"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("inflight"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("inflight"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("log"))
    }
}
