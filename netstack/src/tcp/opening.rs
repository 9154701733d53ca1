//! How flows begin, and what the host says of them: dialing for a guest, connections toward one, and their ends.
//!
//! ```text
//!  SYN ─► `dial` ── Connect ─► driver ─► `handle_host`: Connected ─► SYN|ACK · refused ─► RST · unreachable ─► ICMP
//!  published port ─► `open` · `open_unresolved` ─(ARP, NDP)─► `resolved` ─► SYN
//! ```
//! All of this happens once or twice in the life of a flow; what happens for every segment is in [`super`].

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::clock::{engine_span, engine_time};
use super::device::Ingress;
use super::flow::{Dialing, Ending, Flow, FlowKey, Life, Live, Resolving};
use super::{Arrival, Path, Tcp, listen_on};
use crate::drop_reason::DropReason;
use crate::host::{
    ConnectError, Direction, FlowId, HostCommand, HostError, HostEvent, HostTarget, OpenError,
};
use crate::stack::Outbox;
use crate::time::Instant;
use crate::types::{Mac, PortId};

impl Tcp {
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
        let done = live
            .socket
            .tcp()
            .connect(port.engine(flow.key.is_v6()).context(), flow.key.guest(), local)
            .is_ok();
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
            port.engine(key.is_v6()).poll_ingress_single(engine_time(now), &mut device, &mut socket.set);
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
    pub(super) fn abort(&mut self, id: FlowId) {
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
}
