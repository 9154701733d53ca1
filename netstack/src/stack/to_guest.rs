//! What the stack says to guests of its own accord, or for the host: answers, errors, advertisements, datagrams.
//!
//! Answers wait in the port's outbox; datagrams of the host go straight into the link's buffer. What is larger than the
//! link's MTU leaves in fragments.

use std::net::{IpAddr, SocketAddr};

use super::ip::{DHCP6_CLIENT, Packet};
use super::{Netstack, Outbox};
use crate::drop_reason::DropReason;
use crate::icmp::{self, Fault, Unreachable};
use crate::ndp;
use crate::segments;
use crate::sink::{FrameSink, Offload, Offloads, PartialChecksum, SegmentKind, Segments};
use crate::time::Instant;
use crate::types::{Mac, PortId};
use crate::udp::{BindingId, Target};
use crate::wire::ipv6::Fragment;
use crate::wire::{arp, ethernet, ipv4, ipv6, udp};

impl Netstack {
    /// Counts one more answer that a guest on `port` causes.
    pub(super) fn limit(&mut self, now: Instant, port: PortId) -> Result<(), DropReason> {
        let port =
            self.ports.get_mut(usize::from(port.0)).and_then(Option::as_mut).ok_or(DropReason::NotForUs)?;
        port.answers.take(now)
    }

    /// Tells the sender of `packet` what became of it.
    pub(super) fn refuse(
        &mut self,
        now: Instant,
        packet: &Packet<'_>,
        fault: Fault,
    ) -> Result<(), DropReason> {
        self.tell(now, packet.port, packet.mac, packet.dst, fault, packet.bytes)
    }

    /// Tells the guest `mac` that sent `about` what became of it, from `from` when that is ours, else from the gateway.
    pub(super) fn tell(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        from: IpAddr,
        fault: Fault,
        about: &[u8],
    ) -> Result<(), DropReason> {
        self.limit(now, port)?;
        // An error comes from a router: the gateway speaks for addresses that are not there.
        let ours = self.config.is_ours(from) && !matches!(fault, Fault::HopLimit | Fault::TooBig(_));
        let from = if ours { Some(from) } else { self.gateway(from.is_ipv6()) };
        if let Some(error) = from.and_then(|from| icmp::error(from, fault, about)) {
            self.answer_ip(port, mac, &error);
        }
        Ok(())
    }

    /// The gateway's address of one version.
    pub(super) fn gateway(&self, v6: bool) -> Option<IpAddr> {
        if v6 {
            self.config.ipv6.as_ref().map(|c| c.gateway.into())
        } else {
            Some(self.config.gateway.into())
        }
    }

    pub(super) fn answer(&mut self, port: PortId, frame: &[u8]) {
        if let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) {
            outbox.push(frame);
        }
    }

    /// One IP packet of ours to a guest, in fragments when it has to be.
    pub(super) fn answer_ip(&mut self, port: PortId, mac: Mac, packet: &[u8]) {
        let Some(mtu) = self.mtu_of(port) else { return };
        let slot = usize::from(port.0);
        let Some(outbox) = self.outboxes.get_mut(slot).and_then(Option::as_mut) else { return };
        if packet.len() <= usize::from(mtu) {
            let kind =
                if packet.first().is_some_and(|b| b >> 4 == 6) { ethernet::IPV6 } else { ethernet::IPV4 };
            let header = ethernet::Header { dst: mac, src: self.config.gateway_mac, kind }.bytes();
            outbox.frame(&header, packet.len(), |body| body.copy_from_slice(packet));
            return;
        }
        let addressed = match packet.first().map(|b| b >> 4) {
            Some(4) => ipv4::parse(packet)
                .ok()
                .map(|p| (p.header.src.into(), p.header.dst.into(), p.header.protocol, p.payload)),
            _ => ipv6::parse(packet)
                .ok()
                .map(|p| (p.header.src.into(), p.header.dst.into(), p.header.protocol, p.payload)),
        };
        let Some((src, dst, protocol, payload)) = addressed else { return };
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let out = Outgoing { gateway: self.config.gateway_mac, mac, src, dst, protocol, mtu };
        // What does not fit the outbox is counted there.
        let _ = out.fragments(self.fragment_id, [&[], payload], &mut Waiting(outbox));
    }

    fn offloads_of(&self, port: PortId) -> Offloads {
        let port = self.ports.get(usize::from(port.0)).and_then(Option::as_ref);
        port.map(|p| p.offloads).unwrap_or_default()
    }

    fn mtu_of(&self, port: PortId) -> Option<u16> {
        self.ports.get(usize::from(port.0))?.as_ref().map(|p| p.config.mtu)
    }

    /// Asks every link who has `ip`.
    pub(super) fn ask(&mut self, ip: IpAddr) {
        let (ours, mac) = (self.config.gateway, self.config.gateway_mac);
        let frame = match (ip, &self.router) {
            (IpAddr::V4(target_ip), _) => {
                let request = arp::Message {
                    operation: arp::Operation::Request,
                    sender_mac: mac,
                    sender_ip: ours,
                    target_mac: Mac([0; 6]),
                    target_ip,
                };
                arp::frame(&request, Mac::BROADCAST).to_vec()
            }
            (IpAddr::V6(target), Some(router)) => ndp::solicitation(target, mac, router.link_local()),
            (IpAddr::V6(_), None) => return,
        };
        for outbox in self.outboxes.iter_mut().flatten() {
            outbox.push(&frame);
        }
    }

    // ---- the router ----

    /// A guest on `port` speaks IPv6: it is told of the router from now on.
    pub(super) fn router_begins(&mut self, now: Instant, port: PortId) {
        if let Some(Some(port)) = self.ports.get_mut(usize::from(port.0))
            && !std::mem::replace(&mut port.ipv6, true)
            && let Some(router) = &mut self.router
        {
            router.begin(now);
        }
    }

    /// A router advertisement on `port`: to `guest`, or to everybody there.
    pub(super) fn advertise_router(&mut self, port: PortId, guest: Option<(std::net::Ipv6Addr, Mac)>) {
        if let (Some(router), Some(mtu)) = (&self.router, self.mtu_of(port)) {
            let frame = router.frame(guest, mtu);
            self.answer(port, &frame);
        }
    }

    pub(super) fn advertise_to_all(&mut self) {
        let ports: Vec<PortId> = (0u16..)
            .zip(&self.ports)
            .filter(|(_, p)| p.as_ref().is_some_and(|p| p.ipv6))
            .map(|(n, _)| PortId(n))
            .collect();
        for port in ports {
            self.advertise_router(port, None);
        }
    }

    /// The host got a route for IPv6, or lost it: guests are told at once, and have a default route as it has one.
    pub fn set_ipv6_uplink(&mut self, uplink: bool) {
        if self.router.as_mut().is_some_and(|router| router.set_uplink(uplink)) {
            self.advertise_to_all();
        }
    }

    /// A DHCPv6 message of a guest.
    pub(super) fn dhcp6(&mut self, now: Instant, packet: &Packet<'_>, body: &[u8]) -> Result<(), DropReason> {
        let (Some(server), IpAddr::V6(guest)) = (&mut self.dhcp6, packet.src) else {
            return Err(DropReason::NotForUs);
        };
        let multicast = matches!(packet.dst, IpAddr::V6(dst) if dst.is_multicast());
        let Some(reply) = server.handle(now, packet.port, packet.mac, multicast, body)? else {
            return Ok(());
        };
        self.leases_changed |= reply.changed;
        self.limit(now, packet.port)?;
        let Some(router) = &self.router else { return Ok(()) };
        // RFC 8415 §18.3.10: to where it came from; from an address that reaches there.
        let (src, dst) =
            (SocketAddr::new(router.link_local().into(), 547), SocketAddr::new(guest.into(), DHCP6_CLIENT));
        let header = udp::header(src, dst, &reply.bytes);
        let length = u16::try_from(header.len() + reply.bytes.len()).map_err(|_| DropReason::BadDhcp)?;
        let mut out = ipv6::header(router.link_local(), guest, ipv4::UDP, 64, length).to_vec();
        out.extend(header);
        out.extend(&reply.bytes);
        self.answer_ip(packet.port, packet.mac, &out);
        Ok(())
    }

    // ---- for the host ----

    /// Datagrams of `size` bytes each to a guest, the last with what is left: as one frame where the link has that.
    pub(super) fn datagrams(
        &mut self,
        to: Target,
        from: SocketAddr,
        payload: &[u8],
        size: usize,
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let takes = self.offloads_of(to.port);
        if takes.tcp && size > 0 {
            let out = self.outgoing(to, from.ip(), ipv4::UDP)?;
            let together = payload.len() > size;
            if out.header() + udp::HEADER + size <= usize::from(out.mtu)
                && out.header() + udp::HEADER + payload.len() <= usize::from(u16::MAX)
                && (takes.udp || !together)
            {
                if !sink.has_room() {
                    return Err(DropReason::LinkFull);
                }
                let size = if together { u16::try_from(size).ok() } else { None };
                return out.unfinished_datagrams(
                    udp::open_header(from, to.guest, payload.len()),
                    payload,
                    size,
                    sink,
                );
            }
        }
        if payload.len() <= size {
            return self.datagram(to, from, payload, sink);
        }
        // Each by itself: one that is not larger than its size ends here.
        payload.chunks(size.max(1)).try_for_each(|one| self.datagrams(to, from, one, one.len(), sink))
    }

    /// One UDP datagram to a guest.
    pub(super) fn datagram(
        &mut self,
        to: Target,
        from: SocketAddr,
        payload: &[u8],
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        if payload.len() + udp::HEADER > usize::from(u16::MAX) {
            return Err(DropReason::TooBig);
        }
        let header = udp::header(from, to.guest, payload);
        self.packet(to, from.ip(), ipv4::UDP, [&header, payload], sink)
    }

    /// One packet to a guest, of what the two `parts` carry together; in fragments when it has to be.
    fn packet(
        &mut self,
        to: Target,
        src: IpAddr,
        protocol: u8,
        parts: [&[u8]; 2],
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let out = self.outgoing(to, src, protocol)?;
        if !sink.has_room() {
            return Err(DropReason::LinkFull);
        }
        let carried = parts[0].len() + parts[1].len();
        if carried + out.header() > usize::from(out.mtu) {
            self.fragment_id = self.fragment_id.wrapping_add(1);
            return out.fragments(self.fragment_id, parts, sink);
        }
        out.whole(parts, sink)
    }

    fn outgoing(&self, to: Target, src: IpAddr, protocol: u8) -> Result<Outgoing, DropReason> {
        let mtu = self.mtu_of(to.port).ok_or(DropReason::NotForUs)?;
        let dst = to.guest.ip();
        Ok(Outgoing { gateway: self.config.gateway_mac, mac: to.mac, src, dst, protocol, mtu })
    }

    /// The answer to an echo request of `binding`: `message` is the whole ICMP message, of either version, that came from
    /// `remote`; into the sink of the port that [`Self::port_of_binding`] names.
    pub fn echo_from_host(
        &mut self,
        binding: BindingId,
        remote: SocketAddr,
        message: &[u8],
        sink: &mut impl FrameSink,
    ) {
        let remote = SocketAddr::new(remote.ip(), 0);
        let result = self.udp.from_host(binding, remote, message.len()).and_then(|to| {
            let v6 = to.guest.is_ipv6();
            let from = self.guest_view(remote, v6).ip();
            let packet = icmp::echo_message(from, to.guest.ip(), message, to.guest.port())
                .ok_or(DropReason::BadIcmp)?;
            let (header, protocol) = if v6 { (ipv6::HEADER, ipv6::ICMP) } else { (ipv4::HEADER, ipv4::ICMP) };
            self.packet(to, from, protocol, [&[], packet.get(header..).unwrap_or_default()], sink)
        });
        if let Err(reason) = result {
            self.drops.count(reason);
        }
    }

    /// What the host learned of a datagram, or an echo request, of `binding` to `remote`: its socket refused it, or an error
    /// came back from `reporter`, a router on the way or `remote` itself. The guest is told by ICMP, with `payload`, or what
    /// is known of it, quoted: a datagram's own bytes, or an echo request's whole message.
    pub fn host_fault(
        &mut self,
        now: Instant,
        binding: BindingId,
        remote: SocketAddr,
        reporter: Option<IpAddr>,
        fault: Fault,
        payload: &[u8],
    ) {
        if let Err(reason) = self.try_host_fault(now, binding, remote, reporter, fault, payload) {
            self.drops.count(reason);
        }
    }

    /// The host does not send echo requests on: the guest is told that this is prohibited, as by [`Self::host_fault`].
    pub fn echo_refused(&mut self, now: Instant, binding: BindingId, remote: SocketAddr, message: &[u8]) {
        self.drops.count(DropReason::NoPing);
        self.host_fault(now, binding, remote, None, Fault::Unreachable(Unreachable::Prohibited), message);
    }

    fn try_host_fault(
        &mut self,
        now: Instant,
        binding: BindingId,
        remote: SocketAddr,
        reporter: Option<IpAddr>,
        fault: Fault,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        let (to, echo) = self.udp.blamed(binding, remote)?;
        let v6 = to.guest.is_ipv6();
        let seen = self.guest_view(remote, v6);
        let about = quoted(to.guest, seen, echo, payload).ok_or(DropReason::BadIcmp)?;
        self.limit(now, to.port)?;
        // A router of the host's that has an address of our subnet, or of its loopback, has no name of its own here.
        let reporter = reporter.map(|r| r.to_canonical());
        let from = match reporter {
            Some(ip) if ip.is_ipv6() == v6 && self.guest_view(SocketAddr::new(ip, 0), v6).ip() == ip => {
                Some(ip)
            }
            // Over IPv6 too, whichever loopback address it was that refused.
            Some(_) if remote.ip().to_canonical().is_loopback() => Some(seen.ip()),
            _ => self.gateway(v6),
        };
        if let Some(error) = from.and_then(|from| icmp::error(from, fault, &about)) {
            self.answer_ip(to.port, to.mac, &error);
        }
        Ok(())
    }
}

/// A guest's packet as an ICMP error quotes it: from `guest` to `seen`, as much of it as `payload` tells.
fn quoted(guest: SocketAddr, seen: SocketAddr, echo: bool, payload: &[u8]) -> Option<Vec<u8>> {
    let v6 = guest.is_ipv6();
    let body = if echo {
        let mut body = payload.to_vec();
        let kind = if v6 { icmp::ECHO_REQUEST_V6 } else { icmp::ECHO_REQUEST };
        body.resize(body.len().max(icmp::ECHO_HEADER), 0);
        body.get_mut(..2)?.copy_from_slice(&[kind, 0]);
        body.get_mut(4..6)?.copy_from_slice(&guest.port().to_be_bytes());
        body
    } else {
        let mut body = udp::header(guest, seen, payload).to_vec();
        body.extend_from_slice(payload);
        body
    };
    let protocol = match (echo, v6) {
        (false, _) => ipv4::UDP,
        (true, false) => ipv4::ICMP,
        (true, true) => ipv6::ICMP,
    };
    let length = u16::try_from(body.len()).ok()?;
    let mut out = match (guest.ip(), seen.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ipv4::header(src, dst, protocol, length).to_vec(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ipv6::header(src, dst, protocol, 1, length).to_vec(),
        _ => return None,
    };
    out.append(&mut body.clone());
    Some(out)
}

/// Room in an outbox.
struct Waiting<'a>(&'a mut Outbox);

impl FrameSink for Waiting<'_> {
    fn has_room(&self) -> bool {
        true
    }
    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        Some(self.0.whole(len, fill))
    }
}

/// One packet on its way to a guest.
struct Outgoing {
    gateway: Mac,
    mac: Mac,
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    mtu: u16,
}

impl Outgoing {
    const fn header(&self) -> usize {
        if self.dst.is_ipv6() { ipv6::HEADER } else { ipv4::HEADER }
    }

    fn ethernet(&self) -> [u8; ethernet::HEADER] {
        let kind = if self.dst.is_ipv6() { ethernet::IPV6 } else { ethernet::IPV4 };
        ethernet::Header { dst: self.mac, src: self.gateway, kind }.bytes()
    }

    fn whole(&self, [head, payload]: [&[u8]; 2], sink: &mut impl FrameSink) -> Result<(), DropReason> {
        self.frame([head, payload], Offload::default(), sink)
    }

    /// Datagrams whose checksum the guest makes; `size` when there are several behind the one `header`, which is open.
    fn unfinished_datagrams(
        &self,
        header: [u8; udp::HEADER],
        payload: &[u8],
        size: Option<u16>,
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let transport = ethernet::HEADER + self.header();
        let position = |n: usize| u16::try_from(n).map_err(|_| DropReason::TooBig);
        let checksum = Some(PartialChecksum { start: position(transport)?, offset: 6 });
        let headers = position(transport + udp::HEADER)?;
        let segments = size.map(|size| Segments { kind: SegmentKind::Udp, size, headers });
        self.frame([&header, payload], Offload { checksum, segments }, sink)
    }

    fn frame(
        &self,
        [head, payload]: [&[u8]; 2],
        offload: Offload,
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let length = u16::try_from(head.len() + payload.len()).map_err(|_| DropReason::TooBig)?;
        let ethernet = self.ethernet();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let ip = ipv4::header(src, dst, self.protocol, length);
                put(sink, [&ethernet, &ip, head, payload], offload)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = ipv6::header(src, dst, self.protocol, 64, length);
                put(sink, [&ethernet, &ip, head, payload], offload)
            }
            _ => Err(DropReason::NotForUs),
        }
    }

    /// The fragments of one packet (RFC 791 §3.2, RFC 8200 §4.5).
    fn fragments(
        &self,
        id: u32,
        [head, payload]: [&[u8]; 2],
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let extra = if self.dst.is_ipv6() { ipv6::FRAGMENT_HEADER } else { 0 };
        let room = usize::from(self.mtu).saturating_sub(self.header() + extra) & !7;
        let total = head.len() + payload.len();
        if room == 0 {
            return Err(DropReason::TooBig);
        }
        let mut offset = 0;
        while offset < total {
            let end = (offset + room).min(total);
            // The bytes from `offset` to `end` of head and payload together.
            let first = head.get(offset.min(head.len())..end.min(head.len())).unwrap_or_default();
            let (from, to) = (offset.saturating_sub(head.len()), end.saturating_sub(head.len()));
            let second = payload.get(from..to).unwrap_or_default();
            let place = Fragment { id, offset, more: end < total };
            let length = u16::try_from(end - offset + extra).map_err(|_| DropReason::TooBig)?;
            if !sink.has_room() {
                return Err(DropReason::LinkFull);
            }
            match (self.src, self.dst) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    let ip = ipv4::fragment_header(src, dst, self.protocol, length, place);
                    put(sink, [&self.ethernet(), &ip, first, second], Offload::default())?;
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let mut ip = ipv6::header(src, dst, ipv6::FRAGMENT, 64, length).to_vec();
                    ip.extend(ipv6::fragment_header(self.protocol, place));
                    put(sink, [&self.ethernet(), &ip, first, second], Offload::default())?;
                }
                _ => return Err(DropReason::NotForUs),
            }
            offset = end;
        }
        Ok(())
    }
}

fn put(sink: &mut impl FrameSink, parts: [&[u8]; 4], offload: Offload) -> Result<(), DropReason> {
    let len = parts.iter().map(|p| p.len()).sum();
    let written = sink.frame(len, offload, |frame| {
        let mut rest = &mut *frame;
        for part in parts {
            let (here, after) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            rest = after;
        }
        if let Some(checksum) = offload.checksum {
            segments::begin_sum(frame, checksum);
        }
    });
    written.ok_or(DropReason::LinkFull)
}
