//! smoltcp's view of a link: one packet in, or segments straight into the link's transmit buffer.

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

use super::Path;
use super::flow::FlowKey;
use crate::sink::{FrameSink, Offload};
use crate::stack::Outbox;
use crate::wire::ethernet;

/// The capabilities an `Interface` copies when it is made.
pub(super) struct Shape {
    pub(super) mtu: u16,
    /// Whether the link segments and checksums for us.
    pub(super) offload: bool,
}

fn capabilities(mtu: u16, offload: bool) -> DeviceCapabilities {
    let mut caps = DeviceCapabilities::default();
    caps.medium = Medium::Ip;
    caps.max_transmission_unit = usize::from(mtu);
    // Not verified on the way in: see `wire`. IPv4's header was, before smoltcp sees the packet.
    caps.checksum.tcp = if offload { Checksum::None } else { Checksum::Tx };
    caps.checksum.ipv4 = Checksum::Tx;
    if offload {
        caps.segmentation.tcpv4 = std::num::NonZeroUsize::new(65_535);
        caps.segmentation.tcpv6 = std::num::NonZeroUsize::new(65_535);
    }
    caps
}

impl Device for Shape {
    type RxToken<'a> = Packet<'a>;
    type TxToken<'a> = Reply<'a>;
    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        None
    }
    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        None
    }
    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.mtu, self.offload)
    }
}

/// One packet from the guest; what smoltcp answers at once (RST, challenge ACK) goes into the port's outbox.
pub(super) struct Ingress<'a> {
    packet: Option<&'a [u8]>,
    outbox: &'a mut Outbox,
    header: [u8; ethernet::HEADER],
    mtu: u16,
}

impl<'a> Ingress<'a> {
    pub(super) fn new(packet: &'a [u8], outbox: &'a mut Outbox, path: Path, v6: bool, mtu: u16) -> Self {
        Self { packet: Some(packet), outbox, header: header(path, v6), mtu }
    }
}

fn header(path: Path, v6: bool) -> [u8; ethernet::HEADER] {
    let kind = if v6 { ethernet::IPV6 } else { ethernet::IPV4 };
    ethernet::Header { dst: path.guest, src: path.gateway, kind }.bytes()
}

/// The packet.
pub(super) struct Packet<'a>(&'a [u8]);

impl RxToken for Packet<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room in the outbox.
pub(super) struct Reply<'a> {
    outbox: &'a mut Outbox,
    header: [u8; ethernet::HEADER],
}

impl TxToken for Reply<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.outbox.frame(&self.header, len, f)
    }
}

impl Device for Ingress<'_> {
    type RxToken<'a>
        = Packet<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Reply<'a>
    where
        Self: 'a;
    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let packet = self.packet.take()?;
        Some((Packet(packet), Reply { outbox: self.outbox, header: self.header }))
    }
    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        None
    }
    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.mtu, false)
    }
}

/// The way out of one flow.
pub(super) struct Egress<'a, S> {
    sink: &'a mut S,
    header: [u8; ethernet::HEADER],
    mtu: u16,
    /// Whether a segment did not leave because the sink was full.
    pub(super) refused: bool,
}

impl<'a, S: FrameSink> Egress<'a, S> {
    pub(super) fn new(sink: &'a mut S, path: Path, key: FlowKey, mtu: u16) -> Self {
        Self { sink, header: header(path, key.is_v6()), mtu, refused: false }
    }
}

/// Room for one frame in the sink.
pub(super) struct Slot<'a, S> {
    sink: &'a mut S,
    header: [u8; ethernet::HEADER],
    segment_size: u16,
}

impl<S: FrameSink> TxToken for Slot<'_, S> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let header = self.header;
        let mut f = Some(f);
        let offload = Offload::default();
        let written = self.sink.frame(ethernet::HEADER + len, offload, |frame| {
            let (head, packet) = frame.split_at_mut(ethernet::HEADER);
            head.copy_from_slice(&header);
            f.take().map(|f| f(packet))
        });
        match (written.flatten(), f) {
            (Some(r), _) => r,
            // The sink said that it had room and refused all the same; smoltcp needs a buffer to go on.
            (None, Some(f)) => f(&mut vec![0; len]),
            (None, None) => unreachable!("the closure is taken only where its result is returned"),
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_size = meta.segmentation_offload_size.map_or(0, std::num::NonZero::get);
    }
}

impl<S: FrameSink> Device for Egress<'_, S> {
    type RxToken<'a>
        = Packet<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Slot<'a, S>
    where
        Self: 'a;
    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        None
    }
    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        if !self.sink.has_room() {
            self.refused = true;
            return None;
        }
        Some(Slot { sink: self.sink, header: self.header, segment_size: 0 })
    }
    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.mtu, false)
    }
}
