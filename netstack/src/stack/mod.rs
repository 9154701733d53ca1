//! `Netstack`: frames and host events in, frames and host actions out.
//!
//! One call of [`Netstack::handle_frame`] per frame, then [`Netstack::poll_flow`], [`Netstack::poll_host`] and, for each
//! port, [`Netstack::poll_transmit`] until they have nothing more. A turn of the driver:
//!
//! ```text
//!  frames of all links ─► handle_frame ─► poll_flow* ─► to_host/from_host ─► poll_host* ─► poll_transmit (each port)
//! ```

mod ip;
mod outbox;
mod to_guest;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub(crate) use self::outbox::Outbox;
use crate::config::{GatewayForward, PortConfig, StackConfig, Transport};
use crate::dhcp::{self, DhcpServer, LeaseReport, Settings};
use crate::dhcp6::{Dhcp6Server, Lease6Report, Settings6};
use crate::drop_reason::{DropCounters, DropReason};
use crate::fragments::Fragments;
use crate::host::{FlowId, FlowReport, Forward, Handled, HostCommand, HostEvent, OpenError};
use crate::icmp::{Fault, RateLimit};
use crate::ndp;
use crate::ndp::router::{Advertised, Router};
use crate::neighbours::Neighbours;
use crate::rings::RingMemory;
use crate::segments;
use crate::sink::{FrameSink, Offload, Offloads, SegmentKind};
use crate::switch::{Destination, Switch};
use crate::tcp::{FlowKey, Tcp};
use crate::time::Instant;
use crate::types::{Mac, PortId};
use crate::udp::{BindingId, BindingReport, Bindings, Target};
use crate::wire::{arp, ethernet, ipv4, udp};

/// The port of the DNS service.
const DNS: u16 = 53;
/// The port of the service where guests publish ports.
const HTTP: u16 = 80;

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
    /// Entries of the timer wheels now, with those that mean nothing any more.
    pub timers: usize,
}

struct Port {
    config: PortConfig,
    offloads: Offloads,
    answers: RateLimit,
    /// Whether its guest has spoken IPv6.
    ipv6: bool,
}

/// The network.
pub struct Netstack {
    config: StackConfig,
    ports: Vec<Option<Port>>,
    outboxes: Vec<Option<Outbox>>,
    switch: Switch,
    neighbours: Neighbours,
    dhcp: DhcpServer,
    dhcp6: Option<Dhcp6Server>,
    router: Option<Router>,
    fragments: Fragments,
    /// Of the last packet of ours that was cut.
    fragment_id: u32,
    udp: Bindings,
    tcp: Tcp,
    commands: VecDeque<HostCommand>,
    drops: DropCounters,
    dns_queries: u64,
    /// Of IPv6; the DHCPv4 server knows of its own.
    leases_changed: bool,
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
            dns: config.dns(),
            pool: config.services.pool,
            mask,
            broadcast,
            domain: config.domain.clone(),
            search: config.search.clone(),
            ntp: config.ntp.clone(),
            lease_time: config.lease_time,
        };
        let domains: Vec<String> = std::iter::once(&config.domain).chain(&config.search).cloned().collect();
        let (mac, leases) = (config.gateway_mac, config.limits.leases);
        let router = config.ipv6.as_ref().and_then(|v6| {
            let IpAddr::V6(prefix) = v6.subnet.network() else { return None };
            let (link_local, resolver) = (ndp::link_local(mac), v6.gateway);
            let advertised = Advertised { mac, link_local, prefix, resolver, domains: domains.clone() };
            Some(Router::new(advertised, v6.uplink, seed))
        });
        let dhcp6 = config.ipv6.as_ref().map(|v6| {
            let (subnet, resolver) = (v6.subnet, v6.gateway);
            let lease_time = config.lease_time;
            Dhcp6Server::new(Settings6 { mac, subnet, resolver, domains, lease_time }, leases)
        });
        Self {
            ports: Vec::new(),
            outboxes: Vec::new(),
            switch: Switch::new(config.gateway_mac, config.limits.macs, seed),
            neighbours: Neighbours::new(config.limits.addresses, seed),
            dhcp: DhcpServer::new(settings, config.subnet, config.limits.leases, &config.static_leases),
            dhcp6,
            router,
            fragments: Fragments::new(seed),
            fragment_id: u32::try_from(seed & 0xffff_ffff).unwrap_or(0),
            udp: Bindings::new(&config.limits, config.udp.clone(), seed),
            tcp: Tcp::new(config.limits.clone(), config.gateway_mac, memory, seed),
            commands: VecDeque::new(),
            drops: DropCounters::default(),
            dns_queries: 0,
            leases_changed: false,
            seed,
            config,
        }
    }

    // ---- ports ----

    /// Adds a port. `offloads` other than none are for links that carry a virtio-net header.
    pub fn add_port(&mut self, now: Instant, config: PortConfig, offloads: Offloads) -> PortId {
        let slot = self.ports.len();
        let port =
            PortId(u16::try_from(slot).expect("links are given by the operator, far fewer than 65536"));
        self.tcp_up(now, port, config.mtu, offloads);
        self.ports.push(Some(Port { config, offloads, answers: RateLimit::new(now), ipv6: false }));
        self.outboxes.push(Some(Outbox::new(self.config.limits.outbox_bytes)));
        port
    }

    fn tcp_up(&mut self, now: Instant, port: PortId, mtu: u16, offloads: Offloads) {
        // Initial sequence numbers of one guest say nothing about another's.
        let seed = self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(u32::from(port.0) % 64)
            ^ u64::from(port.0)
            ^ now.micros().rotate_left(32);
        self.tcp.port_up(now, port, mtu, offloads.tcp, IpAddr::V4(self.config.gateway).into(), seed);
    }

    /// What the guest on `port` agreed to do for us is another thing now (its driver started anew). Flows of
    /// the port do not survive that: call [`Self::port_down`] first.
    pub fn set_offloads(&mut self, now: Instant, port: PortId, offloads: Offloads) {
        let Some(Some(at)) = self.ports.get_mut(usize::from(port.0)) else { return };
        at.offloads = offloads;
        let mtu = at.config.mtu;
        self.tcp_up(now, port, mtu, offloads);
    }

    /// Another guest than before is to be behind `port`, which is down.
    pub fn set_port(&mut self, now: Instant, port: PortId, config: PortConfig) {
        let Some(Some(at)) = self.ports.get_mut(usize::from(port.0)) else { return };
        let (mtu, offloads) = (config.mtu, at.offloads);
        at.config = config;
        self.tcp_up(now, port, mtu, offloads);
    }

    /// The VMM of a port is gone: its flows are reset, its bindings closed, its addresses free for others. The port
    /// itself stays, for the VMM may come back.
    pub fn port_down(&mut self, port: PortId) {
        self.tcp.port_down(port, &mut self.commands);
        self.udp.port_down(port);
        self.switch.port_down(port);
        self.neighbours.port_down(port);
        self.dhcp.port_down(port);
        self.fragments.port_down(port);
        if let Some(dhcp6) = &mut self.dhcp6 {
            dhcp6.port_down(port);
        }
        if let Some(Some(at)) = self.ports.get_mut(usize::from(port.0)) {
            at.ipv6 = false;
        }
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

    /// The addresses the guest on `port` uses, leased or not: of each version one, which its name may stand for.
    pub fn known_by(&self, port: PortId) -> impl Iterator<Item = IpAddr> + '_ {
        self.neighbours.known_by(port)
    }

    /// Every address of the guests on `port`: what they leased and what they use.
    #[must_use]
    pub fn addresses(&self, now: Instant, port: PortId) -> Vec<IpAddr> {
        let leased =
            self.dhcp.reports(now).into_iter().filter(|l| l.port == Some(port) && l.remaining.is_some());
        let leased6 = self.leases6(now).into_iter().filter(|l| l.port == Some(port));
        let leased = leased.map(|l| IpAddr::V4(l.ip)).chain(leased6.map(|l| IpAddr::V6(l.ip)));
        let mut all: Vec<IpAddr> = leased.chain(self.neighbours.on(port)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The port behind which `guest` is, as far as is known.
    #[must_use]
    pub fn known_port_of(&self, guest: IpAddr) -> Option<PortId> {
        self.neighbours.get(guest).map(|n| n.port)
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

    fn to_gateway<'f>(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        match header.kind {
            ethernet::IPV4 => self.ipv4(now, port, header, payload),
            ethernet::IPV6 => self.ipv6(now, port, header, payload),
            ethernet::ARP => {
                let message = arp::parse(payload)?;
                // RFC 5227: a probe has no sender address yet.
                if !message.sender_ip.is_unspecified() {
                    self.claim(now, port, header.src, message.sender_ip.into())?;
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
        packet.extend(udp::header((gateway, 67).into(), (reply.dst, reply.dst_port).into(), &reply.bytes));
        packet.extend(&reply.bytes);
        self.answer_ip(port, reply.dst_mac, &packet);
        Ok(())
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
        let (mtu, takes) = (target.config.mtu, target.offloads);
        let offload = segments::checked(frame, offload)?;
        if segments::largest_packet(frame, offload) > usize::from(mtu) {
            self.too_big(now, from, mtu, frame)?;
            return Err(DropReason::TooBig);
        }
        let datagrams = offload.segments.is_some_and(|s| s.kind == SegmentKind::Udp);
        if !takes.tcp || (datagrams && !takes.udp) {
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
        if header.dst.is_group() {
            return Ok(());
        }
        let from = match header.kind {
            ethernet::IPV4 => self.gateway(false),
            ethernet::IPV6 => self.gateway(true),
            _ => None,
        };
        let Some(from) = from else { return Ok(()) };
        self.tell(now, port, header.src, from, Fault::TooBig(mtu.into()), packet)
    }

    // ---- the host side ----

    /// Something happened at the host side of a TCP flow.
    pub fn handle_host(&mut self, now: Instant, event: HostEvent) {
        if let Some((key, mac, syn, error)) =
            self.tcp.handle_host(now, event, &mut self.outboxes, &mut self.commands)
            && let Err(reason) =
                self.tell(now, key.port, mac, key.remote().ip(), Fault::Unreachable(error.into()), &syn)
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
    /// host alias where that would be loopback, of the other version, or an address of the subnet (a guest must not take a
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
        if !self.is_guests(guest.ip()) || guest.port() == 0 {
            return Err(OpenError::NoGuest);
        }
        let seen = self.client_view(client, guest.is_ipv6());
        let Some(known) = self.neighbours.get(guest.ip()) else {
            let id = self.tcp.open_unresolved(now, guest, seen)?;
            self.ask(guest.ip());
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

    /// Datagrams from `remote` for the socket of `binding`, into the sink of the port that [`Self::port_of_binding`]
    /// names: of `size` bytes each, the last with what is left. One that came alone has its own size.
    pub fn datagrams_from_host(
        &mut self,
        binding: BindingId,
        remote: SocketAddr,
        payload: &[u8],
        size: usize,
        sink: &mut impl FrameSink,
    ) {
        let result = self.udp.from_host(binding, remote, payload.len());
        let result = result.and_then(|target| {
            let seen = self.answered_as(remote, target.guest.is_ipv6());
            self.datagrams(target, seen, payload, size, sink)
        });
        if let Err(reason) = result {
            self.drops.count(reason);
        }
    }

    /// The address from which a guest sees the answer of `remote` to its datagram: the gateway's, when that is how it
    /// got there.
    fn answered_as(&self, remote: SocketAddr, v6: bool) -> SocketAddr {
        let forwards = self.config.services.forwards.iter();
        let forward = forwards.clone().find(|f| f.transport == Transport::Udp && f.to == remote && !v6);
        match forward {
            Some(f) => SocketAddr::new(self.config.gateway.into(), f.port),
            None => self.guest_view(remote, v6),
        }
    }

    /// Replaces the ports of the gateway that lead elsewhere. Open flows stay as they are.
    pub fn set_gateway_forwards(&mut self, forwards: Vec<GatewayForward>) {
        self.config.services.forwards = forwards;
    }

    /// The port whose guest owns `binding`.
    #[must_use]
    pub fn port_of_binding(&self, binding: BindingId) -> Option<PortId> {
        self.udp.port_of(binding)
    }

    /// The port behind which `guest` is, for [`Self::datagrams_from_client`]; asks who has it when it is not known.
    pub fn port_of_guest(&mut self, guest: IpAddr) -> Option<PortId> {
        let known = self.neighbours.get(guest).map(|n| n.port);
        if known.is_none() {
            self.ask(guest);
        }
        known
    }

    /// Datagrams of `client` to a published port: to `guest`, into its port's sink. `listener` is the driver's number
    /// of the published port; the guest's answers come back with it. `size` as of [`Self::datagrams_from_host`].
    pub fn datagrams_from_client(
        &mut self,
        now: Instant,
        guest: SocketAddr,
        (client, listener): (SocketAddr, u32),
        payload: &[u8],
        size: usize,
        sink: &mut impl FrameSink,
    ) {
        let Some(known) = self.neighbours.get(guest.ip()) else { return };
        let target = Target { port: known.port, mac: known.mac, guest };
        let mut seen = self.client_view(client, guest.is_ipv6());
        // Two clients that look alike to the guest (127.0.0.1 and ::1 with the same port) are told apart by port.
        for port in std::iter::once(seen.port()).chain((49_152..=u16::MAX).rev().take(1024)) {
            seen.set_port(port);
            if !self.udp.is_taken(guest, seen, client, listener) {
                break;
            }
        }
        self.udp.from_client(now, target, seen, client, listener, payload.len());
        if let Err(reason) = self.datagrams(target, seen, payload, size, sink) {
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
        let full = self.tcp.transmit(now, port, sink, &mut self.commands);
        self.drops.add(DropReason::EngineFault, self.tcp.take_faults());
        full
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
        let router = self.router.as_ref().and_then(Router::poll_timeout);
        let (fragments, dhcp) = (self.fragments.poll_timeout(), self.dhcp.poll_timeout());
        [self.tcp.poll_timeout(), self.udp.poll_timeout(), fragments, dhcp, router]
            .into_iter()
            .flatten()
            .min()
    }

    /// Runs every timer that is due; does nothing when none is.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut ask = Vec::new();
        self.tcp.handle_timeout(now, &mut self.commands, |ip| ask.push(ip));
        for ip in ask {
            self.ask(ip);
        }
        self.udp.handle_timeout(now);
        self.dhcp.handle_timeout(now);
        while let Some(expired) = self.fragments.pop_expired(now) {
            self.drops.count(DropReason::FragmentTimeout);
            // RFC 792, RFC 8200 §4.5: told when the first piece came.
            let Some(about) = expired.first else { continue };
            let from = self.gateway(about.first().is_some_and(|b| b >> 4 == 6));
            if let Some(from) = from
                && let Err(reason) =
                    self.tell(now, expired.port, expired.mac, from, Fault::Reassembly, &about)
            {
                self.drops.count(reason);
            }
        }
        if self.router.as_mut().is_some_and(|router| router.is_due(now)) {
            self.advertise_to_all();
        }
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

    /// Every lease of an IPv6 address in use.
    #[must_use]
    pub fn leases6(&self, now: Instant) -> Vec<Lease6Report> {
        self.dhcp6.as_ref().map_or_else(Vec::new, |d| d.reports(now))
    }

    /// Takes leases of an earlier run back.
    pub fn restore_leases(&mut self, now: Instant, leases: impl IntoIterator<Item = LeaseReport>) {
        self.dhcp.restore(now, leases);
    }

    /// Other search domains: for the guests that ask by DHCP or DHCPv6 from now on (options 119 and 24), and at once for those
    /// that speak IPv6, in a router advertisement that withdraws those that have gone.
    pub fn set_search(&mut self, search: Vec<String>) {
        let domains: Vec<String> = std::iter::once(&self.config.domain).chain(&search).cloned().collect();
        self.dhcp.set_search(search);
        if let Some(server) = &mut self.dhcp6 {
            server.set_domains(domains.clone());
        }
        if self.router.as_mut().is_some_and(|router| router.set_domains(domains)) {
            self.advertise_to_all();
            if let Some(router) = &mut self.router {
                router.withdrawn();
            }
        }
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

    /// Whether leases were made, renewed or ended since this was last asked, or what [`Self::known_by`] says has changed.
    pub fn leases_changed(&mut self) -> bool {
        // All are asked: each answers once.
        std::mem::take(&mut self.leases_changed) | self.dhcp.take_changed() | self.neighbours.take_changed()
    }

    /// Every TCP flow.
    pub fn flows(&self, now: Instant) -> impl Iterator<Item = FlowReport> + '_ {
        self.tcp.reports(now)
    }

    /// Every UDP binding and published client, with their remotes as the guest sees them.
    pub fn bindings(&self, now: Instant) -> impl Iterator<Item = BindingReport> + '_ {
        self.udp.reports(now).map(move |report| match report.published {
            true => report,
            false => {
                BindingReport { remote: self.answered_as(report.remote, report.guest.is_ipv6()), ..report }
            }
        })
    }

    /// Why frames went no further.
    #[must_use]
    pub const fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// How many flows and bindings there ever were. Each costs the host a socket, and so more than any other frame does.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.tcp.opened_total() + self.udp.opened_total
    }

    /// Numbers of the whole stack.
    #[must_use]
    pub fn counters(&self) -> StackCounters {
        let (flows, dialing, flows_total) = self.tcp.counts();
        let (bindings, dns_queries) = (self.udp.len(), self.dns_queries);
        let timers = self.tcp.timers() + self.udp.timers();
        StackCounters { flows, dialing, flows_total, bindings, dns_queries, timers }
    }
}
