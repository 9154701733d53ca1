//! TCP between guests and the host: the flow table and the life of a flow.
//!
//! ```text
//!  segment ─► FlowTable (keyed hash) ─┬─ none: SYN ─► Dialing ── Connect ─► driver
//!                                     │         else ─► RST
//!                                     ├─ Dialing: the SYN is held until the host has answered
//!                                     └─ Live: window guard ─► smoltcp ─► ring to host ─► `to_host`
//!  `from_host` ─► ring to guest ─► smoltcp ─► `transmit` ─► the link's buffer
//! ```
//! smoltcp is the protocol engine: one `Interface` per port (it fixes MTU and ISN seed), one `SocketSet` with one
//! socket per flow, because a set with N sockets costs 27 ns × N for every packet. Idle flows are not touched:
//! their timers lie in a wheel.
//!
//! **Truthful connect**: a guest's SYN is answered only when the host's `connect` is done: SYN|ACK, RST, an ICMP
//! error or silence, as the host saw it. **Nothing is lost on the link**: when the sink is full a flow waits.
//!
//! **Window guard**: smoltcp 0.14 accepts data beyond its ring right after the handshake, where it takes the
//! unscaled window of the SYN|ACK for a scaled one, and panics when the ring overflows. [`Live::admits`] drops what
//! lies beyond the real window before smoltcp sees it, and a SYN that comes before its own has left, which makes it
//! panic as well. More of its faults end here: a retransmission timer that gets lost ([`Live::shown`]), a FIN before
//! the handshake is over ([`Live::host_ended`]), and a SYN that waits for its timer after a guest's challenge
//! ([`Live::is_remembered`]). docs/adr/0003 has the reasons.
//!
//! Limits: [`crate::Limits`] (`flows`, `dialing`, `dialing_loopback`, `resolving` and the times). Sources: RFC 9293,
//! RFC 5382 (timeouts of a NAT), RFC 5961 (by smoltcp, but for resets inside the window).

mod clock;
mod device;
mod flow;
mod last_net;
mod table;
mod window;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::Wrapping;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::socket::tcp::State;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpListenEndpoint};

use self::clock::{engine_span, engine_time, our_time};
use self::device::{Egress, Ingress, Shape, Window};
pub(crate) use self::flow::FlowKey;
use self::flow::{Dialing, Ending, Flow, Life, Live, Resolving, Shown};
use self::last_net::caught;
use self::table::{FlowTable, SocketPool};
use self::window::Senders;
use crate::config::Limits;
use crate::drop_reason::DropReason;
use crate::host::{
    ConnectError, Direction, FlowId, FlowReport, HostCommand, HostError, HostEvent, HostTarget, OpenError,
};
use crate::rings::RingMemory;
use crate::sink::FrameSink;
use crate::stack::Outbox;
use crate::time::{Duration, Instant};
use crate::timer::TimerWheel;
use crate::types::{Mac, PortId};
use crate::wire::tcp::{self, Segment};

/// Segments one flow may send before the next flow of the port has its turn.
const TURN: usize = 32;

/// Stale entries of the timer wheel that are not worth a sweep.
const STALE_TIMERS: usize = 1024;

/// Our Ethernet address, and the guest's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    pub(crate) gateway: Mac,
    pub(crate) guest: Mac,
}

/// One segment from a guest, and what is known of it.
#[derive(Clone, Copy)]
pub(crate) struct Arrival<'f> {
    pub(crate) key: FlowKey,
    pub(crate) path: Path,
    pub(crate) segment: Segment,
    /// The whole IP packet.
    pub(crate) packet: &'f [u8],
}

/// What a segment met.
pub(crate) enum Verdict {
    /// It was taken, or dropped and counted.
    Done(Result<(), DropReason>),
    /// A SYN of a connection that is not known: the caller decides where it goes, then calls `dial`.
    Syn,
}

/// The TCP side of one port.
struct TcpPort {
    iface: Interface,
    /// Without sockets: smoltcp answers a segment for it with the RST that RFC 9293 §3.10.7.1 asks for.
    nobody: SocketSet<'static>,
    shape: Shape,
    senders: Senders,
    egress: VecDeque<FlowId>,
    flows: usize,
    dialing: usize,
    dialing_loopback: usize,
}

impl TcpPort {
    /// The bytes of window one flow may tell the guest.
    fn share(&self) -> u32 {
        // With offload a frame of the guest's queue is up to 64 KiB long, whatever the MTU.
        self.senders.share(if self.shape.offload { 65_535 } else { u32::from(self.shape.mtu) })
    }
}

/// All flows.
pub(crate) struct Tcp {
    ports: Vec<Option<TcpPort>>,
    table: FlowTable,
    pool: SocketPool,
    wheel: TimerWheel<FlowId>,
    /// Flows whose rings changed on the guest's side, for the driver.
    touched: VecDeque<FlowId>,
    resolving: VecDeque<FlowId>,
    limits: Limits,
    gateway_mac: Mac,
    opened_total: u64,
    faults: u64,
}

impl Tcp {
    pub(crate) fn new(limits: Limits, gateway_mac: Mac, memory: Box<dyn RingMemory>, seed: u64) -> Self {
        Self {
            ports: Vec::new(),
            table: FlowTable::new(seed),
            pool: SocketPool::new(memory),
            wheel: TimerWheel::new(),
            touched: VecDeque::new(),
            resolving: VecDeque::new(),
            limits,
            gateway_mac,
            opened_total: 0,
            faults: 0,
        }
    }

    pub(crate) fn port_up(
        &mut self,
        now: Instant,
        port: PortId,
        mtu: u16,
        offload: bool,
        own: IpAddress,
        seed: u64,
    ) {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut shape = Shape { mtu, offload };
        let mut iface = Interface::new(config, &mut shape, engine_time(now));
        iface.set_any_ip(true);
        iface.update_ip_addrs(|addresses| {
            // The list holds two entries by default; any_ip makes the one address stand for all.
            let _ =
                addresses.push(IpCidr::new(own, if matches!(own, IpAddress::Ipv4(_)) { 32 } else { 128 }));
        });
        if let IpAddress::Ipv4(own) = own {
            let _ = iface.routes_mut().add_default_ipv4_route(own);
        }
        let slot = usize::from(port.0);
        if self.ports.len() <= slot {
            self.ports.resize_with(slot + 1, || None);
        }
        self.ports[slot] = Some(TcpPort {
            iface,
            nobody: SocketSet::new(Vec::new()),
            shape,
            senders: Senders::default(),
            egress: VecDeque::new(),
            flows: 0,
            dialing: 0,
            dialing_loopback: 0,
        });
    }

    /// Ends every flow of `port`: its guest is gone.
    pub(crate) fn port_down(&mut self, port: PortId, commands: &mut VecDeque<HostCommand>) {
        let gone: Vec<FlowId> =
            self.table.ids().filter(|id| self.table.get(*id).is_some_and(|f| f.key.port == port)).collect();
        for id in gone {
            if self.table.get(id).is_some_and(|f| !f.host_gone) {
                commands.push_back(HostCommand::Reset { flow: id });
            }
            self.release(id);
        }
        if let Some(p) = self.port(port) {
            p.egress.clear();
        }
    }

    fn port(&mut self, port: PortId) -> Option<&mut TcpPort> {
        self.ports.get_mut(usize::from(port.0))?.as_mut()
    }

    // ---- from the guest ----

    /// One segment from a guest.
    pub(crate) fn from_guest(
        &mut self,
        now: Instant,
        arrival: Arrival<'_>,
        outbox: &mut Outbox,
        commands: &mut VecDeque<HostCommand>,
    ) -> Verdict {
        let Arrival { key, path, segment, packet } = arrival;
        let segment = &segment;
        let Some(id) = self.table.find(&key) else {
            if segment.opens() {
                return Verdict::Syn;
            }
            self.reject(now, key.port, path, packet, outbox);
            return Verdict::Done(Err(DropReason::NoFlow));
        };
        let Some(flow) = self.table.get_mut(id) else { return Verdict::Done(Err(DropReason::NoFlow)) };
        flow.guest_mac = path.guest;
        let live = match &mut flow.life {
            Life::Live(live) => live,
            Life::Resolving(_) => return Verdict::Done(Err(DropReason::NoFlow)),
            Life::Dialing(dialing) => {
                if segment.has(tcp::RST) {
                    commands.push_back(HostCommand::Reset { flow: id });
                    self.release(id);
                } else if segment.opens() && segment.seq != dialing.irs {
                    // The guest started anew on the same ports; the answer must fit its newest SYN.
                    dialing.irs = segment.seq;
                    dialing.syn = packet.into();
                }
                return Verdict::Done(Ok(()));
            }
        };
        if let Err(reason) = live.admits(segment) {
            return Verdict::Done(Err(reason));
        }
        let Some(port) = self.ports.get_mut(usize::from(key.port.0)).and_then(Option::as_mut) else {
            return Verdict::Done(Err(DropReason::NotForUs));
        };
        if segment.payload > 0 {
            port.senders.note(now, &mut live.sent_in);
        }
        let instead;
        let shown = match live.shown(segment, packet) {
            Shown::Whole => packet,
            Shown::Instead(other) => {
                instead = other;
                &instead[..]
            }
            Shown::Nothing => return Verdict::Done(Ok(())),
        };
        let window = Window { share: port.share(), advertised: &mut live.advertised };
        let calling = live.socket.tcp_ref().state() == State::SynSent;
        let mut device = Ingress::new(shown, outbox, path, key.is_v6(), &port.shape).with_window(window);
        let taken = caught(|| {
            port.iface.poll_ingress_single(engine_time(now), &mut device, &mut live.socket.set);
        });
        if taken.is_err() {
            self.fault(id, commands);
            return Verdict::Done(Err(DropReason::EngineFault));
        }
        if calling && live.is_remembered(segment) {
            // smoltcp has answered with RST, which ends what the guest remembers, and would say SYN again in a second.
            live.socket.tcp().abort();
            let _ = live.socket.tcp().connect(port.iface.context(), key.guest(), listen_on(&key));
        }
        live.note_segment(segment, packet);
        flow.last_active = now;
        flow.last_heard = now;
        flow.warm = true;
        Self::mark(&mut self.touched, flow, id);
        Self::queue(port, flow, id);
        Verdict::Done(Ok(()))
    }

    /// Puts a flow among those the driver should look at.
    fn mark(touched: &mut VecDeque<FlowId>, flow: &mut Flow, id: FlowId) {
        if !flow.touched && !flow.host_gone {
            flow.touched = true;
            touched.push_back(id);
        }
    }

    /// Puts a flow among those that may have something to send.
    fn queue(port: &mut TcpPort, flow: &mut Flow, id: FlowId) {
        if !flow.queued {
            flow.queued = true;
            port.egress.push_back(id);
        }
    }

    /// Answers a segment of no flow with RST.
    pub(crate) fn reject(
        &mut self,
        now: Instant,
        port: PortId,
        path: Path,
        packet: &[u8],
        outbox: &mut Outbox,
    ) {
        if let Some(port) = self.port(port) {
            let v6 = packet.first().is_some_and(|b| b >> 4 == 6);
            let mut device = Ingress::new(packet, outbox, path, v6, &port.shape);
            port.iface.poll_ingress_single(engine_time(now), &mut device, &mut port.nobody);
        }
    }

    /// Begins a connection the guest asked for: holds its SYN and has the driver connect.
    pub(crate) fn dial(
        &mut self,
        now: Instant,
        arrival: Arrival<'_>,
        target: HostTarget,
        outbox: &mut Outbox,
        commands: &mut VecDeque<HostCommand>,
    ) -> Result<(), DropReason> {
        let Arrival { key, path, segment, packet } = arrival;
        if segment.payload != 0 {
            // Data on a SYN (RFC 7413) has no cookie from us; without an answer the guest sends the SYN alone.
            return Err(DropReason::BeyondWindow);
        }
        let loopback = match target {
            HostTarget::Address(a) => a.ip().is_loopback(),
            HostTarget::Service(_) => true,
        };
        let (flows, dialing, dialing_loopback) =
            (self.limits.flows, self.limits.dialing, self.limits.dialing_loopback);
        let Some(port) = self.port(key.port) else { return Err(DropReason::NotForUs) };
        if port.flows >= flows {
            self.reject(now, key.port, path, packet, outbox);
            return Err(DropReason::FlowLimit);
        }
        if if loopback { port.dialing_loopback >= dialing_loopback } else { port.dialing >= dialing } {
            return Err(DropReason::DialLimit);
        }
        port.flows += 1;
        if loopback {
            port.dialing_loopback += 1;
        } else {
            port.dialing += 1;
        }
        let dialing = Dialing { syn: packet.into(), irs: segment.seq, loopback };
        let id =
            self.table.insert(Flow::new(now, key, path.guest, Direction::Outbound, Life::Dialing(dialing)));
        self.table.index(id);
        self.opened_total += 1;
        commands.push_back(HostCommand::Connect { flow: id, target });
        Ok(())
    }

    // ---- toward the guest ----

    /// Opens a connection toward a guest whose address is resolved.
    pub(crate) fn open(&mut self, now: Instant, key: FlowKey, guest_mac: Mac) -> Result<FlowId, OpenError> {
        self.room(key.port)?;
        let socket = self.pool.take(self.table.len()).ok_or(OpenError::Limit)?;
        let life = Life::Live(Live::new(socket, None));
        let id = self.table.insert(Flow::new(now, key, guest_mac, Direction::Published, life));
        self.table.index(id);
        self.opened_total += 1;
        self.port(key.port).ok_or(OpenError::NoGuest)?.flows += 1;
        if !self.connect(now, id) {
            self.release(id);
            return Err(OpenError::NoGuest);
        }
        Ok(id)
    }

    /// Begins a published connection to a guest whose Ethernet address is not known yet.
    pub(crate) fn open_unresolved(
        &mut self,
        now: Instant,
        guest: SocketAddr,
        remote: SocketAddr,
    ) -> Result<FlowId, OpenError> {
        if self.resolving.len() >= self.limits.resolving {
            return Err(OpenError::Limit);
        }
        let key = FlowKey::new(PortId(u16::MAX), guest, remote);
        let life = Life::Resolving(Resolving { asked: 1 });
        let id = self.table.insert(Flow::new(now, key, Mac::BROADCAST, Direction::Published, life));
        self.opened_total += 1;
        self.resolving.push_back(id);
        self.arm(now, id);
        Ok(id)
    }

    fn room(&mut self, port: PortId) -> Result<(), OpenError> {
        let limit = self.limits.flows;
        let port = self.port(port).ok_or(OpenError::NoGuest)?;
        if port.flows >= limit { Err(OpenError::Limit) } else { Ok(()) }
    }

    /// Whether a flow with this key exists.
    pub(crate) fn knows(&mut self, key: &FlowKey) -> bool {
        self.table.find(key).is_some()
    }

    /// A key for a flow from `remote` to `guest` that no flow has: with its own port, or, where that is taken or it has none
    /// (a client of a unix socket), with one from the end of the ephemeral range.
    fn free_key(&mut self, port: PortId, guest: SocketAddr, remote: SocketAddr) -> Option<FlowKey> {
        let ports = std::iter::once(remote.port()).chain((49_152..=u16::MAX).rev().take(1024));
        let mut keys =
            ports.filter(|p| *p != 0).map(|p| FlowKey::new(port, guest, SocketAddr::new(remote.ip(), p)));
        keys.find(|key| !self.knows(key))
    }

    /// Whether somebody waits for an ARP answer.
    pub(crate) fn is_resolving(&self) -> bool {
        !self.resolving.is_empty()
    }

    /// A guest's address became known: connections that waited for it go on.
    pub(crate) fn resolved(
        &mut self,
        now: Instant,
        port: PortId,
        guest: std::net::IpAddr,
        mac: Mac,
        commands: &mut VecDeque<HostCommand>,
    ) {
        let mut rest = VecDeque::with_capacity(self.resolving.len());
        for id in std::mem::take(&mut self.resolving) {
            let Some(flow) = self.table.get_mut(id).filter(|f| matches!(f.life, Life::Resolving(_))) else {
                continue;
            };
            if flow.key.guest().ip() != guest {
                rest.push_back(id);
                continue;
            }
            let (guest, remote) = (flow.key.guest(), flow.key.remote());
            let key = self.room(port).ok().and_then(|()| self.free_key(port, guest, remote));
            let socket = if key.is_some() { self.pool.take(self.table.len()) } else { None };
            let (Some(key), Some(socket), Some(flow)) = (key, socket, self.table.get_mut(id)) else {
                commands.push_back(HostCommand::Reset { flow: id });
                self.table.remove(id);
                continue;
            };
            flow.key = key;
            flow.guest_mac = mac;
            flow.life = Life::Live(Live::new(socket, None));
            self.table.index(id);
            if let Some(port) = self.port(port) {
                port.flows += 1;
            }
            if !self.connect(now, id) {
                commands.push_back(HostCommand::Reset { flow: id });
                self.release(id);
            }
        }
        self.resolving.append(&mut rest);
    }

    /// The active open of a live flow; its SYN leaves at the next `transmit`.
    fn connect(&mut self, now: Instant, id: FlowId) -> bool {
        let Some(flow) = self.table.get_mut(id) else { return false };
        let Life::Live(live) = &mut flow.life else { return false };
        let Some(port) = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut) else {
            return false;
        };
        let local = listen_on(&flow.key);
        // Before the socket begins: later, smoltcp would ask at once.
        live.socket.tcp().set_keep_alive(self.limits.tcp_keepalive.map(engine_span));
        let done = live.socket.tcp().connect(port.iface.context(), flow.key.guest(), local).is_ok();
        Self::queue(port, flow, id);
        self.arm(now, id);
        done
    }

    // ---- from the host ----

    /// Something happened at the host side of a flow. The packet that ICMP should quote comes back when the guest
    /// must be told by ICMP.
    pub(crate) fn handle_host(
        &mut self,
        now: Instant,
        event: HostEvent,
        outboxes: &mut [Option<Outbox>],
        commands: &mut VecDeque<HostCommand>,
    ) -> Option<(FlowKey, Mac, Box<[u8]>, HostError)> {
        match event {
            HostEvent::Connected { flow } => {
                if !self.connected(now, flow, outboxes) {
                    // No ring memory: the guest is told at once, and the host that nobody will speak.
                    commands.push_back(HostCommand::Reset { flow });
                    return self.handle_host(
                        now,
                        HostEvent::Failed { flow, error: ConnectError::Exhausted },
                        outboxes,
                        commands,
                    );
                }
            }
            HostEvent::Failed { flow: id, error } => {
                let flow = self.table.get_mut(id)?;
                flow.host_gone = true;
                let (key, path) = (flow.key, Path { gateway: self.gateway_mac, guest: flow.guest_mac });
                let Life::Dialing(dialing) = &mut flow.life else {
                    self.abort(id);
                    return None;
                };
                let syn = std::mem::take(&mut dialing.syn);
                self.release(id);
                match error {
                    ConnectError::Refused | ConnectError::Exhausted => {
                        if let Some(outbox) =
                            outboxes.get_mut(usize::from(key.port.0)).and_then(Option::as_mut)
                        {
                            self.reject(now, key.port, path, &syn, outbox);
                        }
                    }
                    ConnectError::Unreachable(why) => return Some((key, path.guest, syn, why)),
                    ConnectError::TimedOut => {}
                }
            }
            HostEvent::Eof { flow: id } => {
                let flow = self.table.get_mut(id)?;
                if let Life::Live(live) = &mut flow.life {
                    live.host_ended();
                    flow.last_active = now;
                    if let Some(port) =
                        self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut)
                    {
                        Self::queue(port, flow, id);
                    }
                }
            }
            HostEvent::Reset { flow: id } => {
                self.table.get_mut(id)?.host_gone = true;
                self.abort(id);
            }
        }
        None
    }

    fn connected(&mut self, now: Instant, id: FlowId, outboxes: &mut [Option<Outbox>]) -> bool {
        if !self.table.get(id).is_some_and(|f| matches!(f.life, Life::Dialing(_))) {
            return true;
        }
        let Some(mut socket) = self.pool.take(self.table.len()) else { return false };
        let Some(flow) = self.table.get_mut(id) else { return true };
        let Life::Dialing(dialing) = &mut flow.life else { return true };
        let (key, path) = (flow.key, Path { gateway: self.gateway_mac, guest: flow.guest_mac });
        let slot = usize::from(key.port.0);
        let port = self.ports.get_mut(slot).and_then(Option::as_mut);
        let (Some(port), Some(outbox)) = (port, outboxes.get_mut(slot).and_then(Option::as_mut)) else {
            return true;
        };
        if dialing.loopback {
            port.dialing_loopback -= 1;
        } else {
            port.dialing -= 1;
        }
        let local = listen_on(&key);
        socket.tcp().set_keep_alive(self.limits.tcp_keepalive.map(engine_span));
        if socket.tcp().listen(local).is_ok() {
            let mut device = Ingress::new(&dialing.syn, outbox, path, key.is_v6(), &port.shape);
            port.iface.poll_ingress_single(engine_time(now), &mut device, &mut socket.set);
        }
        let mut live = Live::new(socket, Some(dialing.irs));
        live.begin_window(&dialing.syn);
        live.never_listens();
        flow.life = Life::Live(live);
        flow.last_active = now;
        flow.last_heard = now;
        flow.warm = true;
        Self::queue(port, flow, id);
        self.arm(now, id);
        true
    }

    /// Has smoltcp send RST; the flow goes when that has left.
    fn abort(&mut self, id: FlowId) {
        let Some(flow) = self.table.get_mut(id) else { return };
        match &mut flow.life {
            Life::Live(live) => {
                live.socket.tcp().abort();
                live.ending = Ending::Aborted;
                if let Some(port) = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut)
                {
                    Self::queue(port, flow, id);
                }
            }
            Life::Dialing(_) | Life::Resolving(_) => self.release(id),
        }
    }

    /// Resets every flow, for the end of the process.
    pub(crate) fn abort_all(&mut self) {
        let ids: Vec<FlowId> = self.table.ids().collect();
        for id in ids {
            if let Some(flow) = self.table.get_mut(id) {
                flow.host_gone = true;
            }
            self.abort(id);
        }
    }

    /// Lends the next contiguous bytes for the host to `send`, which answers how many it took. `None` when there
    /// are none (or the flow is gone).
    pub(crate) fn to_host(
        &mut self,
        now: Instant,
        id: FlowId,
        send: impl FnOnce(&[u8]) -> usize,
    ) -> Option<usize> {
        let flow = self.table.get_mut(id)?;
        let Life::Live(live) = &mut flow.life else { return None };
        let socket = live.socket.tcp();
        if socket.recv_queue() == 0 {
            return None;
        }
        let taken = socket
            .recv(|bytes| {
                let taken = send(bytes).min(bytes.len());
                (taken, taken)
            })
            .ok()?;
        if taken > 0 {
            live.note_taken(taken);
            flow.bytes_to_host += taken as u64;
            flow.last_active = now;
            if let Some(port) = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut) {
                Self::queue(port, flow, id);
            }
        }
        Some(taken)
    }

    /// Lends free ring space for bytes from the host to `recv`, which answers how many it wrote. `None` when there
    /// is no space, or the flow cannot take bytes (yet).
    pub(crate) fn from_host(
        &mut self,
        now: Instant,
        id: FlowId,
        recv: impl FnOnce(&mut [u8]) -> usize,
    ) -> Option<usize> {
        let flow = self.table.get_mut(id)?;
        let Life::Live(live) = &mut flow.life else { return None };
        let socket = live.socket.tcp();
        if !socket.can_send() {
            return None;
        }
        if socket.send_queue() == 0 {
            flow.sending_since = now;
        }
        let given = socket
            .send(|space| {
                let given = recv(space).min(space.len());
                (given, given)
            })
            .ok()?;
        if given > 0 {
            flow.bytes_to_guest += given as u64;
            flow.last_active = now;
            flow.warm = true;
            if let Some(port) = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut) {
                Self::queue(port, flow, id);
            }
        }
        Some(given)
    }

    /// The next flow whose rings changed on the guest's side since it was returned last.
    pub(crate) fn poll_touched(&mut self) -> Option<FlowId> {
        while let Some(id) = self.touched.pop_front() {
            if let Some(flow) = self.table.get_mut(id) {
                flow.touched = false;
                return Some(id);
            }
        }
        None
    }

    // ---- to the guest ----

    /// Lets every queued flow of `port` send until it has nothing more or the sink is full. True when the sink
    /// was the reason to stop.
    pub(crate) fn transmit(
        &mut self,
        now: Instant,
        port: PortId,
        sink: &mut impl FrameSink,
        commands: &mut VecDeque<HostCommand>,
    ) -> bool {
        while let Some(id) = self.port(port).and_then(|p| p.egress.pop_front()) {
            if !sink.has_room() {
                if let Some(p) = self.port(port) {
                    p.egress.push_front(id);
                }
                return true;
            }
            let Some(flow) = self.table.get_mut(id) else { continue };
            flow.queued = false;
            // A flow that has more to send than one turn goes to the end of the queue.
            if self.settle(now, id, sink, commands)
                && let Some(flow) = self.table.get_mut(id)
                && let Some(p) = self.ports.get_mut(usize::from(port.0)).and_then(Option::as_mut)
            {
                Self::queue(p, flow, id);
            }
        }
        false
    }

    /// One turn of one flow: segments out, then what its state asks of the host. True when it has more to send.
    fn settle(
        &mut self,
        now: Instant,
        id: FlowId,
        sink: &mut impl FrameSink,
        commands: &mut VecDeque<HostCommand>,
    ) -> bool {
        let Some(flow) = self.table.get_mut(id) else { return false };
        let Life::Live(live) = &mut flow.life else { return false };
        let Some(port) = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut) else {
            return false;
        };
        let path = Path { gateway: self.gateway_mac, guest: flow.guest_mac };
        let clock = live.clock(now) + live.take_ack_haste();
        let window = Window { share: port.share(), advertised: &mut live.advertised };
        let mut device = Egress::new(sink, path, flow.key, &port.shape, window);
        let turn = caught(|| {
            (0..TURN).all(|_| {
                let polled = port.iface.poll_egress(engine_time(clock), &mut device, &mut live.socket.set);
                polled != PollResult::None
            })
        });
        let Ok(mut more) = turn else {
            self.faults += 1;
            self.fault(id, commands);
            return false;
        };
        more |= device.refused;
        let refused = device.refused;

        let state = live.socket.tcp().state();
        let drained = live.socket.tcp().recv_queue() == 0;
        match state {
            State::Closed if refused => {}
            State::Closed | State::TimeWait if drained || live.ending.forgets() => {
                if !flow.host_gone {
                    let orderly = live.ending == Ending::InOrder || state == State::TimeWait;
                    commands.push_back(if orderly {
                        HostCommand::Close { flow: id }
                    } else {
                        HostCommand::Reset { flow: id }
                    });
                }
                if !refused {
                    self.release(id);
                    return false;
                }
                flow.host_gone = true;
            }
            State::TimeWait => live.time_wait(now),
            State::CloseWait | State::LastAck | State::Closing if drained && !live.told_end => {
                live.told_end = true;
                commands.push_back(HostCommand::ShutdownWrite { flow: id });
            }
            State::Established if !live.established => {
                live.established = true;
                // A published flow could not take the host's bytes before; the driver looks again.
                Self::mark(&mut self.touched, flow, id);
            }
            _ => {}
        }
        self.arm(now, id);
        more
    }

    // ---- time ----

    /// Puts the earliest time a flow needs us into the wheel, unless an earlier one is there already.
    fn arm(&mut self, now: Instant, id: FlowId) {
        let Some(flow) = self.table.get_mut(id) else { return };
        let mut at = flow.reaped_at(&self.limits);
        if flow.warm {
            at = at.min(flow.last_active + self.limits.ring_idle);
        }
        match &mut flow.life {
            Life::Live(live) => {
                let port = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut);
                if let Some(t) =
                    port.and_then(|p| p.iface.poll_at(engine_time(live.clock(now)), &live.socket.set))
                    && live.time_wait_since.is_none()
                {
                    at = at.min(our_time(t));
                }
            }
            Life::Resolving(r) => at = at.min(flow.created + Duration::from_secs(u64::from(r.asked))),
            Life::Dialing(_) => return,
        }
        let at = at.max(now);
        if flow.deadline.is_none_or(|d| at < d) {
            flow.deadline = Some(at);
            self.wheel.insert(at, id);
            self.sweep();
        }
    }

    /// Entries of flows that have gone stay in the wheel until their time, which may be hours: when they are more than those
    /// in use, they are taken out. Otherwise a guest could fill memory with flows it lets cool and closes.
    fn sweep(&mut self) {
        if self.wheel.len() <= 2 * self.table.len() + STALE_TIMERS {
            return;
        }
        let table = &self.table;
        self.wheel.retain(|at, id| table.get(id).is_some_and(|flow| flow.deadline == Some(at)));
    }

    /// Entries of the timer wheel, stale ones included.
    pub(crate) fn timers(&self) -> usize {
        self.wheel.len()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.wheel.poll_at()
    }

    /// Runs every timer that is due. `ask` is called with the address a connection still waits for.
    pub(crate) fn handle_timeout(
        &mut self,
        now: Instant,
        commands: &mut VecDeque<HostCommand>,
        mut ask: impl FnMut(std::net::IpAddr),
    ) {
        while let Some((at, id)) = self.wheel.pop_expired(now) {
            let Some(flow) = self.table.get_mut(id) else { continue };
            if flow.deadline != Some(at) {
                continue; // an older, later entry of the same flow
            }
            flow.deadline = None;
            if now >= flow.reaped_at(&self.limits) {
                if !flow.host_gone {
                    flow.host_gone = true;
                    commands.push_back(HostCommand::Reset { flow: id });
                }
                self.abort(id);
                continue;
            }
            if flow.warm && now >= flow.last_active + self.limits.ring_idle {
                flow.warm = false;
                if let Life::Live(live) = &mut flow.life
                    && live.holds_nothing()
                {
                    self.pool.discard(&live.socket);
                }
            }
            match &mut flow.life {
                Life::Live(_) => {
                    if let Some(port) =
                        self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut)
                    {
                        // Only smoltcp's own timers have something to send; the rest is re-armed below.
                        let due = {
                            let Life::Live(live) = &mut flow.life else { continue };
                            let due = port
                                .iface
                                .poll_at(engine_time(live.clock(now)), &live.socket.set)
                                .is_some_and(|t| our_time(t) <= now);
                            if due {
                                live.waited_in_vain();
                            }
                            due
                        };
                        if due {
                            Self::queue(port, flow, id);
                            continue;
                        }
                    }
                }
                Life::Resolving(r) => {
                    if r.asked >= Resolving::TRIES {
                        commands.push_back(HostCommand::Reset { flow: id });
                        self.release(id);
                        continue;
                    }
                    r.asked += 1;
                    ask(flow.key.guest().ip());
                }
                Life::Dialing(_) => {}
            }
            self.arm(now, id);
        }
    }

    // ---- the end of a flow ----

    /// The engine panicked in a flow: it ends, and its socket, which may hold anything, is not used again. The rings' address
    /// space is lost to the pool; their pages go back.
    fn fault(&mut self, id: FlowId, commands: &mut VecDeque<HostCommand>) {
        let Some(flow) = self.table.get_mut(id) else { return };
        if !flow.host_gone {
            commands.push_back(HostCommand::Reset { flow: id });
        }
        if let Life::Live(live) = std::mem::replace(&mut flow.life, Life::Resolving(Resolving { asked: 0 })) {
            self.pool.discard(&live.socket);
        }
        self.release(id);
    }

    /// Faults of the engine while it sent, since this was asked last.
    pub(crate) fn take_faults(&mut self) -> u64 {
        std::mem::take(&mut self.faults)
    }

    fn release(&mut self, id: FlowId) {
        let Some(flow) = self.table.remove(id) else { return };
        if matches!(flow.life, Life::Resolving(_)) {
            self.resolving.retain(|r| *r != id);
        }
        let key = flow.key;
        if let Some(port) = self.port(key.port) {
            port.flows = port.flows.saturating_sub(1);
            if let Life::Dialing(d) = &flow.life {
                if d.loopback {
                    port.dialing_loopback = port.dialing_loopback.saturating_sub(1);
                } else {
                    port.dialing = port.dialing.saturating_sub(1);
                }
            }
        }
        if let Life::Live(live) = flow.life {
            self.pool.give_back(live.socket, flow.bytes_to_host + flow.bytes_to_guest);
        }
    }

    // ---- listings ----

    pub(crate) fn reports(&self, now: Instant) -> impl Iterator<Item = FlowReport> + '_ {
        self.table.ids().filter_map(move |id| self.table.get(id)).map(move |flow| flow.report(now))
    }

    pub(crate) fn counts(&self) -> (usize, usize, u64) {
        let dialing = self.ports.iter().flatten().map(|p| p.dialing + p.dialing_loopback).sum();
        (self.table.len(), dialing, self.opened_total)
    }

    pub(crate) fn wants_transmit(&self, port: PortId) -> bool {
        self.ports.get(usize::from(port.0)).and_then(Option::as_ref).is_some_and(|p| !p.egress.is_empty())
    }

    /// The port a flow belongs to.
    pub(crate) fn guest_of(&self, id: FlowId) -> Option<SocketAddr> {
        self.table.get(id).map(|f| f.key.guest())
    }

    pub(crate) fn port_of(&self, id: FlowId) -> Option<PortId> {
        self.table.get(id).map(|f| f.key.port)
    }
}

/// smoltcp's name of our end of a flow.
fn listen_on(key: &FlowKey) -> IpListenEndpoint {
    IpListenEndpoint { addr: Some(key.remote().ip().into()), port: key.remote().port() }
}

/// `a` comes after `b` in sequence space (RFC 9293 §3.4).
fn after(a: Wrapping<u32>, b: Wrapping<u32>) -> bool {
    (a - b).0.wrapping_sub(1) < 0x7fff_ffff
}
