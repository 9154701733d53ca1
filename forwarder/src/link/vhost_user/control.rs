//! The device as the front end sets it up: the answers to the messages of the vhost-user protocol.
//!
//! A ring runs when it has addresses, a kick, memory and is enabled, in whatever order these came ([`Device::settle`]).
//! Asked for its base it stops, and everything used is shown to the guest before. When it starts again where it
//! stopped, with the same features, the guest has only been paused; else the device was reset.
//!
//! Left out: logging of dirty pages (migration), in-flight tracking, several queue pairs, rings without a kick.

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
use super::to_guest::{Shape, ToGuest};
use super::{HEADER, LARGEST};

/// Bits of the virtio features (virtio 1.2, §5.1.3 and §6).
pub(super) mod feature {
    pub(in super::super) const CSUM: u64 = 1 << 0;
    pub(in super::super) const GUEST_CSUM: u64 = 1 << 1;
    pub(in super::super) const MTU: u64 = 1 << 3;
    pub(in super::super) const GUEST_TSO4: u64 = 1 << 7;
    pub(in super::super) const GUEST_TSO6: u64 = 1 << 8;
    pub(in super::super) const HOST_TSO4: u64 = 1 << 11;
    pub(in super::super) const HOST_TSO6: u64 = 1 << 12;
    pub(in super::super) const MRG_RXBUF: u64 = 1 << 15;
    pub(in super::super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(in super::super) const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`: between front end and back end only.
    pub(in super::super) const PROTOCOL: u64 = 1 << 30;
    pub(in super::super) const VERSION_1: u64 = 1 << 32;
    /// All that this back end can.
    pub(in super::super) const OFFERED: u64 = CSUM
        | GUEST_CSUM
        | MTU
        | GUEST_TSO4
        | GUEST_TSO6
        | HOST_TSO4
        | HOST_TSO6
        | MRG_RXBUF
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL
        | VERSION_1;
}

/// The ring of frames to the guest: its receive queue.
pub(super) const TO_GUEST: usize = 0;
/// The ring of frames from the guest: its transmit queue.
pub(super) const TO_HOST: usize = 1;

/// All that the front end sets, and what hangs on it.
#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) acked: u64,
    pub(super) memory: Memory,
    pub(super) rings: [Ring; 2],
    pub(super) to_guest: ToGuest,
    /// Kicks that were replaced: open until the driver had the time to forget them.
    pub(super) retired: Vec<File>,
    /// The kicks are others.
    pub(super) kicks_changed: bool,
    /// It is another device for the guest.
    pub(super) device_changed: bool,
}

fn refused(text: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::other(text.into()))
}

impl Device {
    /// Whether the guest has all of `features`.
    pub(super) const fn has(&self, features: u64) -> bool {
        self.acked & features == features
    }

    /// What frames look like to this guest's driver.
    pub(super) const fn shape(&self, mtu: usize) -> Shape {
        let segments = self.acked & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
        Shape {
            // Before VERSION_1 the header has no num_buffers unless buffers can be merged (§5.1.6.1).
            header: if self.acked & (feature::VERSION_1 | feature::MRG_RXBUF) == 0 {
                HEADER - 2
            } else {
                HEADER
            },
            // Ethernet's header and a VLAN tag.
            largest: if segments || mtu + 18 > LARGEST { LARGEST } else { mtu + 18 },
            mergeable: self.has(feature::MRG_RXBUF),
        }
    }

    /// Starts and stops rings as what is set now says.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        for index in [TO_GUEST, TO_HOST] {
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
        let taken = if index == TO_GUEST { self.to_guest.taken() } else { 0 };
        if index == TO_GUEST {
            self.to_guest.clear();
        }
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
        self.stop(TO_GUEST).and_then(|()| self.stop(TO_HOST)).map_err(Error::ReqHandlerError)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.rings.get_mut(index).ok_or_else(|| refused("more than one queue pair, which was not offered"))
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
        for index in 0..2 {
            self.set_kick(index, None)?;
            *self.ring(index)? = Ring::default();
        }
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

impl VhostUserBackendReqHandlerMut for Device {
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
        Ok(feature::OFFERED)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !feature::OFFERED != 0 {
            return Err(refused(format!(
                "features that were not offered: {:#x}",
                features & !feature::OFFERED
            )));
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
        // A bad ring ends the link, which says more.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::MTU
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
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

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("not offered: CONFIG"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("not offered: CONFIG"))
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
