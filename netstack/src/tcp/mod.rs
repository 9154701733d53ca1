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
//! unscaled window of the SYN|ACK for a scaled one, and panics when the ring overflows. [`Live::admits`](flow::Live::admits) drops what
//! lies beyond the real window before smoltcp sees it, and a SYN that comes before its own has left, which makes it
//! panic as well. More of its faults end here: a retransmission timer that gets lost ([`Live::shown`](flow::Live::shown)), a FIN before
//! the handshake is over ([`Live::host_ended`](flow::Live::host_ended)), and a SYN that waits for its timer after a guest's challenge
//! ([`Live::is_remembered`](flow::Live::is_remembered)). docs/adr/0003 has the reasons.
//!
//! Limits: [`crate::Limits`] (`flows`, `dialing`, `dialing_loopback`, `resolving` and the times). Sources: RFC 9293,
//! RFC 5382 (timeouts of a NAT), RFC 5961 (by smoltcp, but for resets inside the window).

mod clock;
mod device;
mod flow;
mod last_net;
mod opening;
mod table;
mod timers;
mod window;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::Wrapping;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::socket::tcp::State;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpListenEndpoint};

use self::clock::engine_time;
use self::device::{Egress, Ingress, Shape, Window};
pub(crate) use self::flow::FlowKey;
use self::flow::{Ending, Flow, Life, Resolving, Shown};
use self::last_net::caught;
use self::table::{FlowTable, SocketPool};
use self::window::Senders;
use crate::config::Limits;
use crate::drop_reason::DropReason;
use crate::host::{FlowId, FlowReport, HostCommand};
use crate::rings::RingMemory;
use crate::sink::FrameSink;
use crate::stack::Outbox;
use crate::time::Instant;
use crate::timer::TimerWheel;
use crate::types::{Mac, PortId};
use crate::wire::tcp::{self, Segment};

/// Segments one flow may send before the next flow of the port has its turn.
const TURN: usize = 32;

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
    engine: Interface,
    /// Of IPv6 with offload, whose segments smoltcp 0.14 drops when they exceed its MTU (`dispatch_ip`): so it has none.
    /// Segments are cut, and the MSS told, by the link's MTU all the same; see [`device`].
    engine6: Option<Interface>,
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
    /// The engine of a flow.
    fn engine(&mut self, v6: bool) -> &mut Interface {
        self.engine6.as_mut().filter(|_| v6).unwrap_or(&mut self.engine)
    }

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
        let shape = Shape { mtu, offload };
        let engine = |mut shape: Shape| {
            let mut config = Config::new(HardwareAddress::Ip);
            config.random_seed = seed;
            let mut engine = Interface::new(config, &mut shape, engine_time(now));
            engine.set_any_ip(true);
            engine.update_ip_addrs(|addresses| {
                // The list holds two entries by default; any_ip makes the one address stand for all.
                let bits = if matches!(own, IpAddress::Ipv4(_)) { 32 } else { 128 };
                let _ = addresses.push(IpCidr::new(own, bits));
            });
            if let IpAddress::Ipv4(own) = own {
                let _ = engine.routes_mut().add_default_ipv4_route(own);
            }
            engine
        };
        let slot = usize::from(port.0);
        if self.ports.len() <= slot {
            self.ports.resize_with(slot + 1, || None);
        }
        self.ports[slot] = Some(TcpPort {
            engine: engine(shape),
            engine6: offload.then(|| engine(Shape { mtu: u16::MAX, offload })),
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
            let engine = port.engine(key.is_v6());
            engine.poll_ingress_single(engine_time(now), &mut device, &mut live.socket.set);
        });
        if taken.is_err() {
            self.fault(id, commands);
            return Verdict::Done(Err(DropReason::EngineFault));
        }
        if calling && live.is_remembered(segment) {
            // smoltcp has answered with RST, which ends what the guest remembers, and would say SYN again in a second.
            live.socket.tcp().abort();
            let _ =
                live.socket.tcp().connect(port.engine(key.is_v6()).context(), key.guest(), listen_on(&key));
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
            port.engine.poll_ingress_single(engine_time(now), &mut device, &mut port.nobody);
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
        let (path, v6) = (Path { gateway: self.gateway_mac, guest: flow.guest_mac }, flow.key.is_v6());
        let clock = live.clock(now) + live.take_ack_haste();
        let window = Window { share: port.share(), advertised: &mut live.advertised };
        let mut device = Egress::new(sink, path, flow.key, &port.shape, window);
        let turn = caught(|| {
            (0..TURN).all(|_| {
                let engine = port.engine(v6);
                let polled = engine.poll_egress(engine_time(clock), &mut device, &mut live.socket.set);
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

    /// Flows since the start.
    pub(crate) const fn opened_total(&self) -> u64 {
        self.opened_total
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
