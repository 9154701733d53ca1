//! smoltcp's view of a link: one packet in, or segments straight into the link's transmit buffer.

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

use super::Path;
use super::flow::FlowKey;
use super::window::Advertised;
use crate::sink::{FrameSink, Offload, PartialChecksum, SegmentKind, Segments};
use crate::stack::Outbox;
use crate::wire::{self, ethernet, ipv4, tcp};

/// The capabilities an `Interface` copies when it is made.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) mtu: u16,
    /// Whether the link segments and checksums for us.
    pub(super) offload: bool,
}

fn capabilities(mtu: u16, offload: bool) -> DeviceCapabilities {
    let mut caps = DeviceCapabilities::default();
    caps.medium = Medium::Ip;
    caps.max_transmission_unit = usize::from(mtu);
    // Not verified on the way in: see `wire`. IPv4's header was, before smoltcp sees the packet. On the way out `sum` does it,
    // where the link does not.
    caps.checksum.tcp = Checksum::None;
    caps.checksum.ipv4 = Checksum::Tx;
    if offload {
        caps.segmentation.tcpv4 = std::num::NonZeroUsize::new(65_535);
        caps.segmentation.tcpv6 = caps.segmentation.tcpv4;
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

/// The window a flow may tell the guest now, and what it has told.
pub(super) struct Window<'a> {
    pub(super) share: u32,
    pub(super) advertised: &'a mut Advertised,
}

/// What every way out of a port knows.
#[derive(Clone, Copy)]
struct Out {
    header: [u8; ethernet::HEADER],
    mtu: u16,
    offload: bool,
    v6: bool,
}

impl Out {
    fn new(path: Path, v6: bool, shape: &Shape) -> Self {
        let kind = if v6 { ethernet::IPV6 } else { ethernet::IPV4 };
        let header = ethernet::Header { dst: path.guest, src: path.gateway, kind }.bytes();
        Self { header, mtu: shape.mtu, offload: shape.offload, v6 }
    }

    /// Data bytes of a segment that fits the link's MTU, without TCP options.
    fn mss(self) -> u16 {
        self.mtu.saturating_sub(if self.v6 { 60 } else { 40 })
    }

    /// Bytes of the IP header smoltcp writes: it has no options.
    const fn ip(self) -> usize {
        if self.v6 { 40 } else { 20 }
    }
}

/// Writes the checksum of the segment behind the IP header of `ip` bytes, or the part of it that is left to a link.
fn sum(packet: &mut [u8], ip: usize, partial: bool) {
    wire::partial_checksum(packet, ip, ipv4::TCP, 16);
    if !partial {
        wire::finish_checksum(packet, ip, 16);
    }
}

/// One packet from the guest; what smoltcp answers at once (RST, challenge ACK) goes into the port's outbox.
pub(super) struct Ingress<'a> {
    packet: Option<&'a [u8]>,
    outbox: &'a mut Outbox,
    out: Out,
    window: Option<Window<'a>>,
}

impl<'a> Ingress<'a> {
    pub(super) fn new(packet: &'a [u8], outbox: &'a mut Outbox, path: Path, v6: bool, shape: &Shape) -> Self {
        Self { packet: Some(packet), outbox, out: Out::new(path, v6, shape), window: None }
    }

    pub(super) fn with_window(self, window: Window<'a>) -> Self {
        Self { window: Some(window), ..self }
    }
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
    out: Out,
    window: Option<Window<'a>>,
}

impl TxToken for Reply<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Self { outbox, out, window } = self;
        outbox.frame(&out.header, len, |packet| {
            let result = f(packet);
            // Frames of the outbox are whole, whatever the link could do.
            sum(packet, out.ip(), false);
            if let (Some(window), Some(segment)) = (window, packet.get_mut(out.ip()..)) {
                window.advertised.curb(window.share, segment, true);
            }
            result
        })
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
        let window = self.window.as_mut().map(|w| Window { share: w.share, advertised: w.advertised });
        Some((Packet(packet), Reply { outbox: self.outbox, out: self.out, window }))
    }
    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        None
    }
    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.out.mtu, self.out.offload)
    }
}

/// The way out of one flow.
pub(super) struct Egress<'a, S> {
    sink: &'a mut S,
    out: Out,
    window: Window<'a>,
    /// Whether a segment did not leave because the sink was full.
    pub(super) refused: bool,
}

impl<'a, S: FrameSink> Egress<'a, S> {
    pub(super) fn new(sink: &'a mut S, path: Path, key: FlowKey, shape: &Shape, window: Window<'a>) -> Self {
        Self { sink, out: Out::new(path, key.is_v6(), shape), window, refused: false }
    }
}

/// Room for one frame in the sink.
pub(super) struct Slot<'a, S> {
    sink: &'a mut S,
    out: Out,
    share: u32,
    advertised: &'a mut Advertised,
    segment_size: u16,
}

impl<S: FrameSink> Slot<'_, S> {
    /// What the link is left to do with a segment of `len` bytes, IP header included.
    fn offload(&self, len: usize) -> Offload {
        if !self.out.offload {
            return Offload::default();
        }
        // 14 and 40 at the most.
        let start = u16::try_from(ethernet::HEADER + self.out.ip()).unwrap_or(0);
        let checksum = Some(PartialChecksum { start, offset: 16 });
        let kind = if self.out.v6 { SegmentKind::Tcp6 } else { SegmentKind::Tcp4 };
        // Data segments of an open connection carry no options: smoltcp's timestamps are off.
        let size = match self.segment_size {
            // smoltcp says it for IPv4 alone.
            0 if self.out.v6 => self.advertised.guest_mss.min(self.out.mss()),
            said => said,
        };
        let segments = (size != 0 && len > self.out.ip() + 20 + usize::from(size)).then_some(Segments {
            kind,
            size,
            headers: start + 20,
        });
        Offload { checksum, segments }
    }
}

impl<S: FrameSink> TxToken for Slot<'_, S> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let offload = self.offload(len);
        let Self { sink, out, share, advertised, .. } = self;
        let mut f = Some(f);
        let written = sink.frame(ethernet::HEADER + len, offload, |frame| {
            let (head, packet) = frame.split_at_mut(ethernet::HEADER);
            head.copy_from_slice(&out.header);
            let result = f.take().map(|f| f(packet));
            if let Some(segment) = packet.get_mut(out.ip()..).filter(|_| out.v6) {
                // Its engine knows no MTU.
                tcp::lower_mss(segment, out.mss());
            }
            sum(packet, out.ip(), out.offload);
            if let Some(segment) = packet.get_mut(out.ip()..) {
                advertised.note_sent(segment);
                advertised.curb(share, segment, !out.offload);
            }
            result
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
        Some(Slot {
            sink: self.sink,
            out: self.out,
            share: self.window.share,
            advertised: self.window.advertised,
            segment_size: 0,
        })
    }
    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.out.mtu, self.out.offload)
    }
}
