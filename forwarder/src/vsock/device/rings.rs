//! Packets in the guest's memory: its receive ring, and the ring of events. From it they come by
//! [`crate::vhost_user::FromGuest`].
//!
//! ```text
//! streams ─► header, payload ─► scattered over one chain of the guest's, which is one packet
//! ```
//! Chains to the guest are taken, walked and checked before they are needed, so that what is read from a socket always
//! has a place: what is taken is a copy of the descriptors, and the guest cannot change it any more. They are used in
//! the order they were taken in, so that those not used can be given back when a ring stops. A bad chain goes back in
//! its turn and is counted.

use std::collections::VecDeque;
use std::io;

use vhost::vhost_user::VhostUserProtocolFeatures;

use super::packet::{Header, LEN, PAYLOAD};
use crate::vhost_user::{BadChain, BadRing, Buffer, Kind, Memory, Ring, feature};

/// The ring of packets to the guest: its receive queue (virtio 1.2, §5.10.2).
pub(super) const TO_GUEST: usize = 0;
/// The ring of packets from the guest: its transmit queue.
pub(super) const TO_HOST: usize = 1;
/// The ring of events to the guest. QEMU keeps it for itself.
pub(super) const EVENTS: usize = 2;
/// Rings of the device.
pub(super) const RINGS: usize = 3;

/// Most packets of one batch from the guest.
pub(super) const PACKETS: usize = 128;

/// What the device has of its own: its configuration, and the chains it has taken to write to.
#[derive(Debug, Default)]
pub(super) struct Posted {
    /// The guest's CID (§5.10.4).
    config: [u8; 8],
    chains: VecDeque<Chain>,
    buffers: VecDeque<Buffer>,
    /// Bytes of payload that all chains taken have room for.
    room: usize,
    /// Chains that take no packet.
    pub(super) dropped: u64,
}

#[derive(Debug, Clone, Copy)]
struct Chain {
    head: u16,
    buffers: usize,
    /// Bytes of payload; `None` when it is to go back as it is.
    room: Option<usize>,
}

impl Kind for Posted {
    // No SEQPACKET: streams are what everybody uses.
    const FEATURES: u64 = feature::RINGS;
    const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK
        .union(VhostUserProtocolFeatures::CONFIG)
        .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        .union(VhostUserProtocolFeatures::RESET_DEVICE);

    fn forget(&mut self, ring: usize) -> u16 {
        if ring != TO_GUEST {
            return 0;
        }
        let taken = u16::try_from(self.chains.len()).unwrap_or(u16::MAX);
        self.chains.clear();
        self.buffers.clear();
        self.room = 0;
        taken
    }

    fn config(&self) -> &[u8] {
        &self.config
    }
}

impl Posted {
    /// Of a device whose guest has this CID.
    pub(super) fn new(cid: u32) -> Self {
        Self { config: u64::from(cid).to_le_bytes(), ..Self::default() }
    }
}

/// The receive ring, and what is taken of it.
#[derive(Debug)]
pub(super) struct ToGuest<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) memory: &'a Memory,
    pub(super) posted: &'a mut Posted,
}

impl ToGuest<'_> {
    /// Takes chains until they have room for a packet with `wanted` bytes, or several, or the guest has posted no more;
    /// says how many bytes there is room for, or `None` when not even a header fits. Then the guest says when it posts.
    pub(super) fn room(&mut self, wanted: usize) -> Result<Option<usize>, BadRing> {
        for _ in 0..=self.ring.size {
            if !self.posted.chains.is_empty() && self.posted.room >= wanted {
                break;
            }
            match self.ring.take()? {
                Some(head) => self.keep(head)?,
                None if !self.posted.chains.is_empty() => break,
                None if self.ring.arm()? => {}
                None => return Ok(None),
            }
        }
        if self.posted.chains.is_empty() {
            // More than a ring holds: what was posted went back at once, and was posted again.
            return Err(BadRing::Useless);
        }
        self.ring.disarm()?;
        Ok(Some(self.posted.room))
    }

    /// Walks one chain and keeps what it has.
    fn keep(&mut self, head: u16) -> Result<(), BadRing> {
        let Self { ring, memory, posted } = self;
        let (before, mut size) = (posted.buffers.len(), 0usize);
        let walked = ring.walk(memory, head, |buffer| {
            if !buffer.writable {
                return Err(BadChain::Direction);
            }
            // Beyond the largest packet nothing is written, and what is not written need not be there.
            let useful = (buffer.len as usize).min((LEN + PAYLOAD).saturating_sub(size));
            if useful > 0 {
                if !memory.has(buffer.address, useful) {
                    return Err(BadChain::Size);
                }
                let len = u32::try_from(useful).unwrap_or(u32::MAX);
                posted.buffers.push_back(Buffer { len, ..buffer });
                size += useful;
            }
            Ok(())
        });
        let room = match walked.and_then(|_| size.checked_sub(LEN).ok_or(BadChain::Size)) {
            Ok(room) => Some(room),
            Err(error) => {
                tracing::debug!(%error, "no room in a chain of the guest's");
                posted.buffers.truncate(before);
                posted.dropped += 1;
                None
            }
        };
        posted.chains.push_back(Chain { head, buffers: posted.buffers.len() - before, room });
        posted.room += room.unwrap_or_default();
        self.give_back()
    }

    /// Gives bad chains back that nobody waits before.
    fn give_back(&mut self) -> Result<(), BadRing> {
        while let Some(Chain { head, room: None, .. }) = self.posted.chains.front().copied() {
            self.posted.chains.pop_front();
            self.ring.put_used(head, 0)?;
        }
        Ok(())
    }

    /// Writes a packet with as much of `payload` as its chain takes, and says how much that was. There has to be
    /// [room](Self::room).
    pub(super) fn put(&mut self, header: &Header, payload: &[u8]) -> Result<usize, BadRing> {
        let Some(chain) = self.posted.chains.pop_front() else { return Err(BadRing::Useless) };
        let room = chain.room.unwrap_or_default();
        self.posted.room -= room;
        let payload = payload.get(..room).unwrap_or(payload);
        let header = Header { len: u32::try_from(payload.len()).unwrap_or_default(), ..*header }.bytes();
        let mut parts = [header.as_slice(), payload];
        for _ in 0..chain.buffers {
            let Some(buffer) = self.posted.buffers.pop_front() else { break };
            let (mut address, mut left) = (buffer.address, buffer.len as usize);
            for part in &mut parts {
                let (now, later) = part.split_at(left.min(part.len()));
                if !now.is_empty() {
                    // Checked when it was taken, and memory has not changed since.
                    self.memory.write(address, now)?;
                }
                address += now.len() as u64;
                left -= now.len();
                *part = later;
            }
        }
        self.ring.put_used(chain.head, u32::try_from(LEN + payload.len()).unwrap_or_default())?;
        self.give_back()?;
        Ok(payload.len())
    }
}

/// Header and payload of a packet that has as many bytes as it says, at least.
pub(super) fn split(packet: &[u8]) -> Option<(Header, &[u8])> {
    let (header, rest) = packet.split_first_chunk()?;
    let header = Header::parse(header);
    let payload = rest.get(..usize::try_from(header.len).ok()?)?;
    Some((header, payload))
}

/// Tells the guest that its streams are no more (§5.10.6.7, `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`). False while it has
/// posted nothing to write that to.
pub(super) fn put_transport_reset(ring: &mut Ring, memory: &Memory) -> io::Result<bool> {
    let mut head = ring.take().map_err(io::Error::other)?;
    if head.is_none() && ring.arm().map_err(io::Error::other)? {
        head = ring.take().map_err(io::Error::other)?;
    }
    let Some(head) = head else { return Ok(false) };
    let mut event = [0u8; 4].as_slice();
    let walked = ring.walk(memory, head, |buffer| {
        if !buffer.writable {
            return Err(BadChain::Direction);
        }
        let (now, later) = event.split_at(event.len().min(buffer.len as usize));
        memory.write(buffer.address, now)?;
        event = later;
        Ok(())
    });
    let told = walked.is_ok() && event.is_empty();
    ring.put_used(head, if told { 4 } else { 0 }).map_err(io::Error::other)?;
    Ok(told)
}
