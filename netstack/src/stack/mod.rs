//! `Netstack`: frames and host events in, frames and host actions out.
//!
//! One call of [`Netstack::handle_frame`] per frame, then [`Netstack::poll_flow`], [`Netstack::poll_host`] and, for each
//! port, [`Netstack::poll_transmit`] until they have nothing more. A turn of the driver:
//!
//! ```text
//!  frames of all links ─► handle_frame ─► poll_flow* ─► to_host/from_host ─► poll_host* ─► poll_transmit (each port)
//! ```

mod outbox;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub(crate) use self::outbox::Outbox;
use crate::config::{PortConfig, StackConfig};
use crate::dhcp::{self, DhcpServer, LeaseReport, Settings};
use crate::drop_reason::{DropCounters, DropReason};
use crate::host::{
    Datagram, FlowId, FlowReport, Forward, Handled, HostCommand, HostEvent, HostTarget, OpenError, Service,
};
use crate::icmp::{self, RateLimit, Unreachable};
use crate::neighbours::Neighbours;
use crate::rings::RingMemory;
use crate::segments;
use crate::sink::{FrameSink, Offload};
use crate::switch::{Destination, Switch};
use crate::tcp::{Arrival, FlowKey, Path, Tcp, Verdict};
use crate::time::Instant;
use crate::types::{Mac, PortId};
use crate::udp::{BindingId, BindingReport, Bindings, Target};
use crate::wire::{arp, ethernet, ipv4, tcp, udp};

/// Addresses of guests that are remembered, on all ports.
const NEIGHBOURS: usize = 4096;
/// The port of the DNS service.
const DNS: u16 = 53;

/// Numbers of the whole stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StackCounters {
    /// TCP flows now.
    pub flows: usize,
    /// Guest connects that wait for the host now.
    pub dialing: usize,
    /// TCP flows since the start.
    pub flows_total: u64,
    /// UDP bindings now.
    pub bindings: usize,
    /// DNS queries over UDP since the start.
    pub dns_queries: u64,
}

struct Port {
    config: PortConfig,
    /// Whether the link segments and checksums TCP for us.
    offload: bool,
    answers: RateLimit,
}

/// The network.
pub struct Netstack {
    config: StackConfig,
    ports: Vec<Option<Port>>,
    outboxes: Vec<Option<Outbox>>,
    switch: Switch,
    neighbours: Neighbours,
    dhcp: DhcpServer,
    udp: Bindings,
    tcp: Tcp,
    commands: VecDeque<HostCommand>,
    drops: DropCounters,
    dns_queries: u64,
    seed: u64,
}

impl Netstack {
    /// A network without ports. `seed` must not be known to guests: hash keys and initial sequence numbers come from
    /// it. The same seed and the same calls give the same frames.
    #[must_use]
    pub fn new(config: StackConfig, memory: Box<dyn RingMemory>, seed: u64) -> Self {
        let mask =
            Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(config.subnet.prefix().min(32))).unwrap_or(0));
        let broadcast = match config.subnet.broadcast() {
            Some(IpAddr::V4(b)) => b,
            _ => Ipv4Addr::BROADCAST,
        };
        let settings = Settings {
            gateway: config.gateway,
            host_alias: config.host_alias,
            mask,
            broadcast,
            domain: config.domain.clone(),
            search: config.search.clone(),
            ntp: config.ntp.clone(),
            lease_time: config.lease_time,
        };
        Self {
            ports: Vec::new(),
            outboxes: Vec::new(),
            switch: Switch::new(config.gateway_mac, config.limits.macs, seed),
            neighbours: Neighbours::new(NEIGHBOURS, seed),
            dhcp: DhcpServer::new(settings, config.subnet, config.limits.leases, &config.static_leases),
            udp: Bindings::new(config.limits.udp_bindings, seed),
            tcp: Tcp::new(config.limits.clone(), config.gateway_mac, memory, seed),
            commands: VecDeque::new(),
            drops: DropCounters::default(),
            dns_queries: 0,
            seed,
            config,
        }
    }

    // ---- ports ----

    /// Adds a port. `offload`: the link segments and checksums TCP for us (it carries a virtio-net header).
    pub fn add_port(&mut self, now: Instant, config: PortConfig, offload: bool) -> PortId {
        let slot = self.ports.len();
        let port =
            PortId(u16::try_from(slot).expect("links are given by the operator, far fewer than 65536"));
        self.tcp_up(now, port, config.mtu, offload);
        self.ports.push(Some(Port { config, offload, answers: RateLimit::new(now) }));
        self.outboxes.push(Some(Outbox::new(self.config.limits.outbox_bytes)));
        port
    }

    fn tcp_up(&mut self, now: Instant, port: PortId, mtu: u16, offload: bool) {
        // Initial sequence numbers of one guest say nothing about another's.
        let seed = self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(u32::from(port.0) % 64)
            ^ u64::from(port.0)
            ^ now.micros().rotate_left(32);
        self.tcp.port_up(now, port, mtu, offload, IpAddr::V4(self.config.gateway).into(), seed);
    }

    /// The guest on `port` agreed to segment and checksum for us, or no longer does (its driver started anew). Flows of
    /// the port do not survive that: call [`Self::port_down`] first.
    pub fn set_offload(&mut self, now: Instant, port: PortId, offload: bool) {
        let Some(Some(at)) = self.ports.get_mut(usize::from(port.0)) else { return };
        at.offload = offload;
        let mtu = at.config.mtu;
        self.tcp_up(now, port, mtu, offload);
    }

    /// The VMM of a port is gone: its flows are reset, its bindings closed, its addresses free for others. The port
    /// itself stays, for the VMM may come back.
    pub fn port_down(&mut self, port: PortId) {
        self.tcp.port_down(port, &mut self.commands);
        self.udp.port_down(port);
        self.switch.port_down(port);
        self.neighbours.port_down(port);
        self.dhcp.port_down(port);
        if let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) {
            *outbox = Outbox::new(self.config.limits.outbox_bytes);
        }
    }

    /// The address of the guest on `port`: what it leased, is to lease, or uses.
    #[must_use]
    pub fn guest_of(&self, port: PortId) -> Option<IpAddr> {
        let leased = self.dhcp.first_on(port).map(IpAddr::V4);
        let config = self.ports.get(usize::from(port.0))?.as_ref().map(|p| &p.config)?;
        leased.or_else(|| self.neighbours.first_on(port)).or(config.address.map(IpAddr::V4))
    }

    // ---- frames in ----

    /// One frame from the VMM behind `port`. What the driver still has to do is the answer; what the guest is told
    /// comes out of `poll_transmit`.
    pub fn handle_frame<'f>(&mut self, now: Instant, port: PortId, frame: &'f [u8]) -> Handled<'f> {
        self.frame(now, port, frame).unwrap_or_else(|reason| {
            self.drops.count(reason);
            Handled::Done
        })
    }

    fn frame<'f>(&mut self, now: Instant, port: PortId, frame: &'f [u8]) -> Result<Handled<'f>, DropReason> {
        let (header, payload) = ethernet::parse(frame)?;
        self.switch.learn(now, port, header.src)?;
        match self.switch.destination(header.dst) {
            Destination::Gateway => self.to_gateway(now, port, header, payload),
            Destination::Port(p) if p == port => Err(DropReason::NotForUs),
            Destination::Port(p) => {
                self.check_claim(now, port, header, payload)?;
                Ok(Handled::Forward(Forward::Port(p)))
            }
            Destination::Unknown => {
                self.check_claim(now, port, header, payload)?;
                Ok(Handled::Forward(Forward::Flood))
            }
            Destination::Everyone => {
                let done = self.to_gateway(now, port, header, payload);
                match done {
                    Ok(Handled::Done) => Ok(Handled::Forward(Forward::Flood)),
                    // Multicast is nothing to us, yet other guests may care.
                    Err(DropReason::Multicast | DropReason::UnknownEtherType) => {
                        Ok(Handled::Forward(Forward::Flood))
                    }
                    other => other,
                }
            }
        }
    }

    /// A frame between guests must not claim an address of ours or of another port.
    fn check_claim(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        let source = match header.kind {
            ethernet::IPV4 => ipv4::parse(payload)?.header.src,
            ethernet::ARP => arp::parse(payload)?.sender_ip,
            _ => return Ok(()),
        };
        if source.is_unspecified() { Ok(()) } else { self.claim(now, port, header.src, source) }
    }

    /// Notes that the guest `mac` on `port` uses `ip`.
    fn claim(&mut self, now: Instant, port: PortId, mac: Mac, ip: Ipv4Addr) -> Result<(), DropReason> {
        let v4 = IpAddr::V4(ip);
        let reserved = self.config.is_ours(v4)
            || Some(v4) == self.config.subnet.broadcast()
            || v4 == self.config.subnet.network();
        if !self.config.subnet.contains(v4) || reserved || self.dhcp.is_elsewhere(now, ip, port) {
            return Err(DropReason::SourceSpoofed);
        }
        if self.neighbours.learn(v4, port, mac)? && self.tcp.is_resolving() {
            self.tcp.resolved(now, port, v4, mac, &mut self.commands);
        }
        Ok(())
    }

    fn to_gateway<'f>(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        match header.kind {
            ethernet::IPV4 => self.ipv4(now, port, header, payload),
            ethernet::ARP => {
                let message = arp::parse(payload)?;
                // RFC 5227: a probe has no sender address yet.
                if !message.sender_ip.is_unspecified() {
                    self.claim(now, port, header.src, message.sender_ip)?;
                }
                if message.operation == arp::Operation::Request
                    && self.config.is_ours(message.target_ip.into())
                {
                    let reply = arp::Message {
                        operation: arp::Operation::Reply,
                        sender_mac: self.config.gateway_mac,
                        sender_ip: message.target_ip,
                        target_mac: message.sender_mac,
                        target_ip: message.sender_ip,
                    };
                    let frame = arp::frame(&reply, header.src);
                    self.answer(port, &frame);
                }
                Ok(Handled::Done)
            }
            _ => Err(DropReason::UnknownEtherType),
        }
    }

    fn ipv4<'f>(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        let packet = ipv4::parse(payload)?;
        let (src, dst) = (packet.header.src, packet.header.dst);
        if packet.header.fragment {
            return Err(DropReason::Fragment);
        }
        if packet.header.protocol == ipv4::UDP {
            let (ports, body) = udp::parse(packet.payload)?;
            if ports.dst == 67 && (dst.is_broadcast() || dst == self.config.gateway) {
                return self.dhcp(now, port, header.src, body).map(|()| Handled::Done);
            }
            self.claim(now, port, header.src, src)?;
            self.forbid_groups(dst)?;
            return self.udp(now, port, header.src, packet, ports, body);
        }
        self.claim(now, port, header.src, src)?;
        self.forbid_groups(dst)?;
        match packet.header.protocol {
            ipv4::TCP => self.tcp(now, port, header.src, packet).map(|()| Handled::Done),
            ipv4::ICMP => self.icmp(now, port, header.src, packet).map(|()| Handled::Done),
            _ => {
                self.unreachable(now, port, header.src, dst, Unreachable::Prohibited, packet.bytes)?;
                Err(DropReason::UnknownProtocol)
            }
        }
    }

    fn forbid_groups(&self, dst: Ipv4Addr) -> Result<(), DropReason> {
        let directed = Some(IpAddr::V4(dst)) == self.config.subnet.broadcast();
        if dst.is_multicast() || dst.is_broadcast() || directed { Err(DropReason::Multicast) } else { Ok(()) }
    }

    /// A destination of a guest as the host knows it. `Err` when policy forbids it.
    fn host_view(&self, dst: SocketAddr) -> Result<SocketAddr, DropReason> {
        let ip = match dst.ip() {
            IpAddr::V4(ip) if ip == self.config.host_alias && self.config.host_loopback => {
                IpAddr::V4(Ipv4Addr::LOCALHOST)
            }
            // The gateway serves what it serves; nothing of the host stands behind it.
            IpAddr::V4(ip) if ip == self.config.host_alias || ip == self.config.gateway => {
                return Err(DropReason::Forbidden);
            }
            IpAddr::V4(ip) if ip.is_link_local() && !self.config.metadata => {
                return Err(DropReason::Forbidden);
            }
            IpAddr::V4(ip) if ip.is_loopback() || ip.octets()[0] == 0 => return Err(DropReason::Forbidden),
            // An address of the subnet that no guest has: there is nobody, and the host's network of the same
            // numbers is not meant.
            ip if self.config.subnet.contains(ip) => return Err(DropReason::NotForUs),
            ip => ip,
        };
        Ok(SocketAddr::new(ip, dst.port()))
    }

    /// An address of the host as the guest knows it.
    fn guest_view(&self, remote: SocketAddr) -> SocketAddr {
        let alias = IpAddr::V4(self.config.host_alias);
        let ip = match remote.ip().to_canonical() {
            ip if ip.is_loopback() || ip.is_ipv6() || self.config.subnet.contains(ip) => alias,
            ip => ip,
        };
        SocketAddr::new(ip, remote.port())
    }

    fn tcp(
        &mut self,
        now: Instant,
        port: PortId,
        guest_mac: Mac,
        packet: ipv4::Packet<'_>,
    ) -> Result<(), DropReason> {
        let segment = tcp::parse(packet.payload)?;
        let key = FlowKey::new(
            port,
            SocketAddr::new(packet.header.src.into(), segment.src),
            SocketAddr::new(packet.header.dst.into(), segment.dst),
        );
        let path = Path { gateway: self.config.gateway_mac, guest: guest_mac };
        let arrival = Arrival { key, path, segment, packet: packet.bytes };
        let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) else {
            return Err(DropReason::NotForUs);
        };
        match self.tcp.from_guest(now, arrival, outbox, &mut self.commands) {
            Verdict::Done(result) => result,
            Verdict::Syn => {
                let target = if key.remote() == SocketAddr::new(self.config.gateway.into(), DNS) {
                    Ok(HostTarget::Service(Service::Dns))
                } else {
                    self.host_view(key.remote()).map(HostTarget::Address)
                };
                match target {
                    Ok(target) => {
                        let Some(outbox) =
                            self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut)
                        else {
                            return Err(DropReason::NotForUs);
                        };
                        self.tcp.dial(now, arrival, target, outbox, &mut self.commands)
                    }
                    Err(DropReason::NotForUs) => {
                        self.unreachable(
                            now,
                            port,
                            guest_mac,
                            packet.header.dst,
                            Unreachable::Host,
                            packet.bytes,
                        )?;
                        Err(DropReason::NotForUs)
                    }
                    Err(reason) => {
                        if let Some(outbox) =
                            self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut)
                        {
                            self.tcp.reject(now, port, path, packet.bytes, outbox);
                        }
                        Err(reason)
                    }
                }
            }
        }
    }

    fn udp<'f>(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        packet: ipv4::Packet<'f>,
        ports: udp::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        let guest = SocketAddr::new(packet.header.src.into(), ports.src);
        let seen = SocketAddr::new(packet.header.dst.into(), ports.dst);
        if seen.ip() == IpAddr::V4(self.config.gateway) {
            if ports.dst == DNS {
                self.dns_queries += 1;
                return Ok(Handled::Dns { guest, asked: seen, query: payload });
            }
            self.unreachable(now, port, mac, self.config.gateway, Unreachable::Port, packet.bytes)?;
            return Err(DropReason::NotForUs);
        }
        match self.host_view(seen) {
            Ok(remote) => {
                let path = self.udp.to_host(now, Target { port, mac, guest }, seen, remote, payload.len());
                Ok(Handled::Datagram(Datagram { path, remote, payload }))
            }
            Err(reason) => {
                let code =
                    if reason == DropReason::NotForUs { Unreachable::Host } else { Unreachable::Prohibited };
                self.unreachable(now, port, mac, self.config.gateway, code, packet.bytes)?;
                Err(reason)
            }
        }
    }

    fn icmp(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        packet: ipv4::Packet<'_>,
    ) -> Result<(), DropReason> {
        if !icmp::is_echo_request(packet.payload)? {
            return Err(DropReason::UnknownProtocol);
        }
        let dst = packet.header.dst;
        if !self.config.is_ours(dst.into()) {
            // Echo beyond the gateway needs ping sockets, which this release does not have: said, not timed out.
            self.unreachable(now, port, mac, self.config.gateway, Unreachable::Prohibited, packet.bytes)?;
            return Err(DropReason::UnknownProtocol);
        }
        self.limit(now, port)?;
        let reply = icmp::echo_reply(dst, packet.header.src, packet.payload);
        self.answer_ip(port, mac, &reply);
        Ok(())
    }

    fn dhcp(&mut self, now: Instant, port: PortId, from: Mac, bytes: &[u8]) -> Result<(), DropReason> {
        let config =
            &self.ports.get(usize::from(port.0)).and_then(Option::as_ref).ok_or(DropReason::NotForUs)?.config;
        let (mtu, wish, link_name) = (config.mtu, config.address, config.name.as_deref());
        let arrival = dhcp::Arrival { port, from, mtu, bytes, wish, link_name };
        let Some(reply) = self.dhcp.handle(now, &arrival)? else { return Ok(()) };
        let gateway = self.config.gateway;
        let mut packet = Vec::with_capacity(ipv4::HEADER + udp::HEADER + reply.bytes.len());
        let length = u16::try_from(udp::HEADER + reply.bytes.len()).map_err(|_| DropReason::BadDhcp)?;
        packet.extend(ipv4::header(gateway, reply.dst, ipv4::UDP, length));
        packet.extend(udp::header_v4((gateway, 67), (reply.dst, reply.dst_port), &reply.bytes));
        packet.extend(&reply.bytes);
        self.answer_ip(port, reply.dst_mac, &packet);
        Ok(())
    }

    // ---- answers of our own ----

    fn limit(&mut self, now: Instant, port: PortId) -> Result<(), DropReason> {
        let port =
            self.ports.get_mut(usize::from(port.0)).and_then(Option::as_mut).ok_or(DropReason::NotForUs)?;
        port.answers.take(now)
    }

    fn unreachable(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        from: Ipv4Addr,
        code: Unreachable,
        about: &[u8],
    ) -> Result<(), DropReason> {
        self.limit(now, port)?;
        // An error comes from a router: the gateway speaks for addresses that are not there.
        let from = if self.config.is_ours(from.into()) { from } else { self.config.gateway };
        if let Some(error) = icmp::unreachable(from, code, about) {
            self.answer_ip(port, mac, &error);
        }
        Ok(())
    }

    fn answer(&mut self, port: PortId, frame: &[u8]) {
        if let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) {
            outbox.push(frame);
        }
    }

    fn answer_ip(&mut self, port: PortId, mac: Mac, packet: &[u8]) {
        let header =
            ethernet::Header { dst: mac, src: self.config.gateway_mac, kind: ethernet::IPV4 }.bytes();
        if let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) {
            outbox.frame(&header, packet.len(), |body| body.copy_from_slice(packet));
        }
    }

    // ---- between guests ----

    /// Writes a frame that [`Handled::Forward`] named, from the guest on `from`, into the sink of port `to`: as it is
    /// where that link has offload, whole where not. What cannot go there is counted, and a packet that is too large is
    /// answered (RFC 1191).
    pub fn forward(
        &mut self,
        now: Instant,
        (from, to): (PortId, PortId),
        frame: &[u8],
        offload: Offload,
        sink: &mut impl FrameSink,
    ) {
        if let Err(reason) = self.try_forward(now, (from, to), frame, offload, sink) {
            self.drops.count(reason);
        }
    }

    fn try_forward(
        &mut self,
        now: Instant,
        (from, to): (PortId, PortId),
        frame: &[u8],
        offload: Offload,
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let port = |id: PortId| self.ports.get(usize::from(id.0)).and_then(Option::as_ref);
        let (Some(source), Some(target)) = (port(from), port(to)) else { return Err(DropReason::NotForUs) };
        if source.config.isolate || target.config.isolate {
            return Err(DropReason::Isolated);
        }
        let (mtu, keeps_offload) = (target.config.mtu, target.offload);
        let offload = segments::checked(frame, offload)?;
        if segments::largest_packet(frame, offload) > usize::from(mtu) {
            self.too_big(now, from, mtu, frame)?;
            return Err(DropReason::TooBig);
        }
        if !keeps_offload {
            return segments::whole(frame, offload, sink);
        }
        if !sink.has_room() {
            return Err(DropReason::LinkFull);
        }
        let copied = sink.frame(frame.len(), offload, |out| {
            out.copy_from_slice(frame);
            if let Some(checksum) = offload.checksum {
                segments::begin_sum(out, checksum);
            }
        });
        copied.ok_or(DropReason::LinkFull)
    }

    /// Tells the guest that sent `frame` which MTU would fit.
    fn too_big(&mut self, now: Instant, port: PortId, mtu: u16, frame: &[u8]) -> Result<(), DropReason> {
        let (header, packet) = ethernet::parse(frame)?;
        if header.kind != ethernet::IPV4 || header.dst.is_group() {
            return Ok(());
        }
        self.limit(now, port)?;
        if let Some(error) = icmp::too_big(self.config.gateway, mtu, packet) {
            self.answer_ip(port, header.src, &error);
        }
        Ok(())
    }

    // ---- the host side ----

    /// Something happened at the host side of a TCP flow.
    pub fn handle_host(&mut self, now: Instant, event: HostEvent) {
        if let Some((key, mac, syn, error)) =
            self.tcp.handle_host(now, event, &mut self.outboxes, &mut self.commands)
            && let IpAddr::V4(remote) = key.remote().ip()
            && let Err(reason) = self.unreachable(now, key.port, mac, remote, error.into(), &syn)
        {
            self.drops.count(reason);
        }
    }

    /// The next command for the host side; poll until `None` after every call that takes `now`.
    pub fn poll_host(&mut self) -> Option<HostCommand> {
        if let Some(command) = self.commands.pop_front() {
            return Some(command);
        }
        self.udp.poll_closed().map(|binding| HostCommand::CloseBinding { binding })
    }

    /// The next flow whose rings changed on the guest's side: the driver tries `to_host` and `from_host` for it. Poll
    /// until `None` after `handle_frame` and `poll_transmit`.
    pub fn poll_flow(&mut self) -> Option<FlowId> {
        self.tcp.poll_touched()
    }

    /// Lends the next contiguous bytes for the host to `send`, which answers how many it took. `None` when there are
    /// none. A ring that wraps needs two calls.
    pub fn to_host(
        &mut self,
        now: Instant,
        flow: FlowId,
        send: impl FnOnce(&[u8]) -> usize,
    ) -> Option<usize> {
        self.tcp.to_host(now, flow, send)
    }

    /// Lends free space for bytes from the host to `recv`, which answers how many it wrote. `None` when there is no
    /// space now, or the guest has not opened the connection yet: `poll_flow` names the flow when that changes.
    pub fn from_host(
        &mut self,
        now: Instant,
        flow: FlowId,
        recv: impl FnOnce(&mut [u8]) -> usize,
    ) -> Option<usize> {
        self.tcp.from_host(now, flow, recv)
    }

    /// The port a flow belongs to.
    #[must_use]
    pub fn port_of(&self, flow: FlowId) -> Option<PortId> {
        self.tcp.port_of(flow)
    }

    /// Opens a connection of a published port's `client` to `guest`. The guest sees the client's own address, or the
    /// host alias where that would be loopback, IPv6, or an address of the subnet (a guest must not take a
    /// connection from outside for one of its own: CVE-2021-20199).
    ///
    /// # Errors
    /// `NoGuest` for an address no guest can have, `Limit` when flows are used up.
    pub fn open_to_guest(
        &mut self,
        now: Instant,
        guest: SocketAddr,
        client: SocketAddr,
    ) -> Result<FlowId, OpenError> {
        if !self.config.subnet.contains(guest.ip()) || self.config.is_ours(guest.ip()) || guest.port() == 0 {
            return Err(OpenError::NoGuest);
        }
        let seen = self.guest_view(client);
        let Some(known) = self.neighbours.get(guest.ip()) else {
            let id = self.tcp.open_unresolved(now, guest, seen)?;
            self.ask_arp(guest.ip());
            return Ok(id);
        };
        let ports = std::iter::once(seen.port()).chain((49_152..=u16::MAX).rev().take(1024));
        for port in ports {
            let key = FlowKey::new(known.port, guest, SocketAddr::new(seen.ip(), port));
            if port != 0 && !self.tcp.knows(&key) {
                return self.tcp.open(now, key, known.mac);
            }
        }
        Err(OpenError::Limit)
    }

    fn ask_arp(&mut self, ip: IpAddr) {
        let IpAddr::V4(target_ip) = ip else { return };
        let request = arp::Message {
            operation: arp::Operation::Request,
            sender_mac: self.config.gateway_mac,
            sender_ip: self.config.gateway,
            target_mac: Mac([0; 6]),
            target_ip,
        };
        let frame = arp::frame(&request, Mac::BROADCAST);
        for outbox in self.outboxes.iter_mut().flatten() {
            outbox.push(&frame);
        }
    }

    /// A datagram from `remote` for the socket of `binding`, into the sink of the port that [`Self::port_of_binding`]
    /// names.
    pub fn datagram_from_host(
        &mut self,
        binding: BindingId,
        remote: SocketAddr,
        payload: &[u8],
        sink: &mut impl FrameSink,
    ) {
        let result = self.udp.from_host(binding, remote, payload.len());
        let result = result.and_then(|target| self.datagram(target, self.guest_view(remote), payload, sink));
        if let Err(reason) = result {
            self.drops.count(reason);
        }
    }

    /// The port whose guest owns `binding`.
    #[must_use]
    pub fn port_of_binding(&self, binding: BindingId) -> Option<PortId> {
        self.udp.port_of(binding)
    }

    /// The port behind which `guest` is, for [`Self::datagram_from_client`]; asks by ARP when it is not known.
    pub fn port_of_guest(&mut self, guest: IpAddr) -> Option<PortId> {
        let known = self.neighbours.get(guest).map(|n| n.port);
        if known.is_none() {
            self.ask_arp(guest);
        }
        known
    }

    /// A datagram of `client` to a published port: to `guest`, into its port's sink. `listener` is the driver's number
    /// of the published port; the guest's answers come back with it.
    pub fn datagram_from_client(
        &mut self,
        now: Instant,
        guest: SocketAddr,
        client: SocketAddr,
        listener: u32,
        payload: &[u8],
        sink: &mut impl FrameSink,
    ) {
        let Some(known) = self.neighbours.get(guest.ip()) else { return };
        let target = Target { port: known.port, mac: known.mac, guest };
        let mut seen = self.guest_view(client);
        // Two clients that look alike to the guest (127.0.0.1 and ::1 with the same port) are told apart by port.
        for port in std::iter::once(seen.port()).chain((49_152..=u16::MAX).rev().take(1024)) {
            seen.set_port(port);
            if !self.udp.is_taken(guest, seen, client, listener) {
                break;
            }
        }
        self.udp.from_client(now, target, seen, client, listener, payload.len());
        if let Err(reason) = self.datagram(target, seen, payload, sink) {
            self.drops.count(reason);
        }
    }

    /// A published UDP port is gone.
    pub fn listener_closed(&mut self, listener: u32) {
        self.udp.listener_closed(listener);
    }

    /// The answer to a [`Handled::Dns`], into the port's sink.
    pub fn dns_answer(
        &mut self,
        guest: SocketAddr,
        asked: SocketAddr,
        port: PortId,
        answer: &[u8],
        sink: &mut impl FrameSink,
    ) {
        let Some(known) = self.neighbours.get(guest.ip()).filter(|n| n.port == port) else { return };
        let target = Target { port, mac: known.mac, guest };
        if let Err(reason) = self.datagram(target, asked, answer, sink) {
            self.drops.count(reason);
        }
    }

    /// One UDP datagram to a guest.
    fn datagram(
        &self,
        to: Target,
        from: SocketAddr,
        payload: &[u8],
        sink: &mut impl FrameSink,
    ) -> Result<(), DropReason> {
        let (IpAddr::V4(src), IpAddr::V4(dst)) = (from.ip(), to.guest.ip()) else {
            return Err(DropReason::NotForUs);
        };
        let port =
            self.ports.get(usize::from(to.port.0)).and_then(Option::as_ref).ok_or(DropReason::NotForUs)?;
        let length = u16::try_from(payload.len() + udp::HEADER).map_err(|_| DropReason::TooBig)?;
        if usize::from(length) + ipv4::HEADER > usize::from(port.config.mtu) {
            return Err(DropReason::TooBig);
        }
        if !sink.has_room() {
            return Err(DropReason::LinkFull);
        }
        let header =
            ethernet::Header { dst: to.mac, src: self.config.gateway_mac, kind: ethernet::IPV4 }.bytes();
        let ip = ipv4::header(src, dst, ipv4::UDP, length);
        let udp = udp::header_v4((src, from.port()), (dst, to.guest.port()), payload);
        let len = header.len() + ip.len() + udp.len() + payload.len();
        let written = sink.frame(len, Offload::default(), |frame| {
            let mut rest = frame;
            for part in [&header[..], &ip, &udp, payload] {
                let (here, after) = rest.split_at_mut(part.len());
                here.copy_from_slice(part);
                rest = after;
            }
        });
        written.ok_or(DropReason::LinkFull)
    }

    // ---- frames out ----

    /// Writes what waits for `port` into its sink: answers first, then every flow that has something to send. True
    /// when the sink was full: poll again when the link has room. Poll after every call that takes `now`.
    pub fn poll_transmit(&mut self, now: Instant, port: PortId, sink: &mut impl FrameSink) -> bool {
        if let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) {
            let dropped = outbox.take_dropped();
            self.drops.add(DropReason::OutboxFull, dropped);
            if outbox.drain(sink) {
                return true;
            }
        }
        self.tcp.transmit(now, port, sink, &mut self.commands)
    }

    /// Whether `port` has frames or flows that wait for `poll_transmit`.
    #[must_use]
    pub fn wants_transmit(&self, port: PortId) -> bool {
        let outbox = self.outboxes.get(usize::from(port.0)).and_then(Option::as_ref);
        outbox.is_some_and(|o| !o.is_empty()) || self.tcp.wants_transmit(port)
    }

    // ---- time ----

    /// When `handle_timeout` has to be called, unless something else happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.tcp.poll_timeout(), self.udp.poll_timeout(), self.dhcp.poll_timeout()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Runs every timer that is due; does nothing when none is.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut ask = Vec::new();
        self.tcp.handle_timeout(now, &mut self.commands, |ip| ask.push(ip));
        for ip in ask {
            self.ask_arp(ip);
        }
        self.udp.handle_timeout(now);
        self.dhcp.handle_timeout(now);
    }

    /// Resets every flow toward its guest; `poll_transmit` sends the RSTs. For the end of the process.
    pub fn abort_all(&mut self) {
        self.tcp.abort_all();
    }

    // ---- listings ----

    /// Every lease in use and every fixed one.
    #[must_use]
    pub fn leases(&self, now: Instant) -> Vec<LeaseReport> {
        self.dhcp.reports(now)
    }

    /// Takes leases of an earlier run back.
    pub fn restore_leases(&mut self, now: Instant, leases: impl IntoIterator<Item = LeaseReport>) {
        self.dhcp.restore(now, leases);
    }

    /// Other search domains for the guests that ask from now on (DHCP option 119).
    pub fn set_search(&mut self, search: Vec<String>) {
        self.dhcp.set_search(search);
    }

    /// Keeps `ip` for the guest `mac`, which will ask for it by DHCP.
    ///
    /// # Errors
    /// When the guest cannot have it.
    pub fn prefer_address(
        &mut self,
        now: Instant,
        mac: Mac,
        ip: Ipv4Addr,
    ) -> Result<(), crate::dhcp::PreferError> {
        self.dhcp.prefer(now, mac, ip)
    }

    /// Whether leases were made, renewed or ended since this was last asked.
    pub fn leases_changed(&mut self) -> bool {
        self.dhcp.take_changed()
    }

    /// Every TCP flow.
    pub fn flows(&self, now: Instant) -> impl Iterator<Item = FlowReport> + '_ {
        self.tcp.reports(now)
    }

    /// Every UDP binding and published client.
    pub fn bindings(&self, now: Instant) -> impl Iterator<Item = BindingReport> + '_ {
        self.udp.reports(now)
    }

    /// Why frames went no further.
    #[must_use]
    pub const fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// Numbers of the whole stack.
    #[must_use]
    pub fn counters(&self) -> StackCounters {
        let (flows, dialing, flows_total) = self.tcp.counts();
        StackCounters { flows, dialing, flows_total, bindings: self.udp.len(), dns_queries: self.dns_queries }
    }
}
