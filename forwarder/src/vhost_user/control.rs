//! The device as the front end sets it up: the answers to the messages of the vhost-user protocol.
//!
//! A ring runs when it has addresses, a kick, memory and is enabled, in whatever order these came ([`Device::settle`]).
//! Asked for its base it stops, and everything used is shown to the guest before. When it starts again where it
//! stopped, with the same features, the guest has only been paused; else the device was reset.
//!
//! Left out: logging of dirty pages (migration), in-flight tracking, several queue pairs, rings without a kick.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};

use super::memory::{self, Memory};
use super::message::Message;
use super::ring::{Addresses, MOST, Ring};

/// Bits of the virtio features that are no device's own (virtio 1.2, §6).
pub(crate) mod feature {
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`: between front end and back end only.
    pub(crate) const PROTOCOL: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// What the rings can, and so every back end.
    pub(crate) const RINGS: u64 = INDIRECT_DESC | EVENT_IDX | PROTOCOL | VERSION_1;
}

/// What one kind of device has of its own.
pub(crate) trait Kind: Default + fmt::Debug + Send + 'static {
    /// The virtio features offered, [`feature::RINGS`] among them.
    const FEATURES: u64;
    /// The features of the protocol offered.
    const PROTOCOL: VhostUserProtocolFeatures;

    /// Forgets the chains that were taken from a ring and not used; says how many. The ring is about to stop.
    fn forget(&mut self, ring: usize) -> u16;

    /// The configuration space; asked for only where `PROTOCOL` has `CONFIG`.
    fn config(&self) -> &[u8] {
        &[]
    }
}

/// All that the front end sets, and what hangs on it.
#[derive(Debug)]
pub(crate) struct Device<K, const RINGS: usize> {
    pub(crate) acked: u64,
    pub(crate) memory: Memory,
    pub(crate) rings: [Ring; RINGS],
    pub(crate) kind: K,
    /// Kicks that were replaced: open until the driver had the time to forget them.
    pub(crate) retired: Vec<File>,
    /// The kicks are others.
    pub(crate) kicks_changed: bool,
    /// It is another device for the guest.
    pub(crate) device_changed: bool,
    /// The front end has said which features of the protocol it takes.
    pub(crate) negotiated: bool,
}

fn refused(text: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::other(text.into()))
}

impl<K: Kind, const RINGS: usize> Device<K, RINGS> {
    pub(crate) fn new(kind: K) -> Self {
        Self {
            acked: 0,
            memory: Memory::default(),
            rings: std::array::from_fn(|_| Ring::default()),
            kind,
            retired: Vec::new(),
            kicks_changed: false,
            device_changed: false,
            negotiated: false,
        }
    }

    /// Whether the guest has all of `features`.
    pub(crate) const fn has(&self, features: u64) -> bool {
        self.acked & features == features
    }

    /// Starts and stops rings as what is set now says.
    pub(crate) fn settle(&mut self) -> io::Result<()> {
        for index in 0..RINGS {
            let may_run = self.rings[index].may_run() && !self.memory.is_empty();
            if !may_run {
                self.stop(index)?;
            } else if !self.rings[index].runs() {
                let event_idx = self.has(feature::EVENT_IDX);
                let ring = &mut self.rings[index];
                ring.start(&self.memory, event_idx)?;
                self.device_changed |= ring.stopped_at != Some(ring.next);
            }
        }
        Ok(())
    }

    fn stop(&mut self, index: usize) -> io::Result<()> {
        let ring = &mut self.rings[index];
        if !ring.runs() {
            return Ok(());
        }
        let taken = self.kind.forget(index);
        let published = ring.publish();
        ring.stop(taken);
        published.map(drop)
    }

    /// A message that the `vhost` crate does not take.
    pub(super) fn ours(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Enable(index, on) => {
                self.ring(index).map_err(|e| io::Error::other(format!("vhost-user: {e}")))?.enabled = on;
            }
            // The link's own setting stands: the guest has its MTU from there, by DHCP.
            Message::Mtu(_) => {}
        }
        Ok(())
    }

    fn stop_all(&mut self) -> Result<()> {
        (0..RINGS).try_for_each(|index| self.stop(index)).map_err(Error::ReqHandlerError)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.rings
            .get_mut(index)
            .ok_or_else(|| refused(format!("more than {RINGS} rings, which were not offered")))
    }

    fn set_kick(&mut self, index: u32, kick: Option<File>) -> Result<()> {
        if let Some(old) = std::mem::replace(&mut self.ring(index)?.kick, kick) {
            self.retired.push(old);
        }
        self.kicks_changed = true;
        Ok(())
    }

    fn reset(&mut self) -> Result<()> {
        self.stop_all()?;
        for ring in &mut self.rings {
            self.retired.extend(ring.kick.take());
            *ring = Ring::default();
        }
        self.kicks_changed = true;
        self.acked = 0;
        self.device_changed = true;
        Ok(())
    }
}

/// Makes an eventfd one that never keeps us waiting. The front end's own end is the same file, and it copes: what it
/// writes to is never full, and it reads only what is ready.
fn nonblocking(file: &File) -> Result<()> {
    fcntl(file.as_fd(), FcntlArg::F_GETFL)
        .and_then(|flags| {
            fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK))
        })
        .map(|_| ())
        .map_err(|e| Error::ReqHandlerError(e.into()))
}

impl<K: Kind, const RINGS: usize> VhostUserBackendReqHandlerMut for Device<K, RINGS> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(K::FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !K::FEATURES != 0 {
            return Err(refused(format!("features that were not offered: {:#x}", features & !K::FEATURES)));
        }
        if features != self.acked {
            self.stop_all()?;
            self.acked = features;
            self.device_changed = true;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.stop_all()?;
        self.memory = Memory::map(regions, files).map_err(Error::ReqHandlerError)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= MOST);
        let size = size.ok_or_else(|| refused(format!("a ring of {num} entries")))?;
        let ring = self.ring(index)?;
        if ring.runs() && ring.size != size {
            return Err(refused("the size of a ring that runs"));
        }
        ring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        avail: u64,
        _log: u64,
    ) -> Result<()> {
        self.ring(index)?;
        self.stop(index as usize).map_err(Error::ReqHandlerError)?;
        self.ring(index)?.addresses = Some(Addresses { descriptors, avail, used });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if ring.runs() {
            return Err(refused("the base of a ring that runs"));
        }
        ring.next = u16::try_from(base).map_err(|_| refused(format!("a ring whose base is {base}")))?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.set_kick(index, None)?;
        self.stop(index as usize).map_err(Error::ReqHandlerError)?;
        let base = self.ring(index)?.next;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let Some(kick) = kick else {
            // To look at the ring all the time would cost a core.
            return Err(refused("a ring without a kick, to be polled, which this back end does not do"));
        };
        nonblocking(&kick)?;
        let negotiated = self.has(feature::PROTOCOL);
        self.set_kick(index.into(), Some(kick))?;
        // Who does not know the message for it never enables a ring.
        self.ring(index.into())?.enabled |= !negotiated;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        if let Some(call) = &call {
            nonblocking(call)?;
        }
        self.ring(index.into())?.call = call;
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _err: Option<File>) -> Result<()> {
        // A bad ring ends the connection, which says more.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(K::PROTOCOL)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        self.negotiated = true;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(memory::REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        // What runs goes on: it knows its parts, and finds buffers anew for each frame.
        self.memory.add(region, file).map(|()| None).map_err(Error::ReqHandlerError)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.stop_all()?;
        if self.memory.remove(region) { Ok(()) } else { Err(refused("no such memory region")) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let (start, size) = (offset as usize, size as usize);
        // What lies behind the end is nothing (virtio 1.2, §2.5): front ends may ask for more than there is.
        let there = self.kind.config().iter().skip(start);
        Ok(there.copied().chain(std::iter::repeat(0)).take(size).collect())
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("nothing in the configuration is for the guest to write"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("not offered: SHARED_OBJECT"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("not offered: INFLIGHT_SHMFD"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("not offered: INFLIGHT_SHMFD"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("not offered: DEVICE_STATE"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("not offered: DEVICE_STATE"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("not offered: SHMEM"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("not offered: LOG_SHMFD"))
    }
}
