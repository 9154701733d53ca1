//! Datagrams and echo requests between guests and host sockets.
//!
//! One unconnected socket per binding; its kernel address is the binding's for as long as it lives. Datagrams of a
//! published port's clients come and go through that port's own socket. Echo requests go through ping sockets ([`super::ping`]).
//!
//! Both ways go in batches. To the host, datagrams of one binding to one place that come one after the other and have
//! the same size leave in one system call, as segments (`UDP_SEGMENT`, `udp(7)`); from the host, `recvmmsg(2)`.
//!
//! What the network says of a guest's packet, or the kernel when it is sent, goes back to the guest as ICMP. A host that gives
//! no sockets, or sockets that only fail (after a sleep, say), are not asked in a loop: [`Backoff`], [`FAILURES`].

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant as Clock;

use mio::net::UdpSocket;
use mio::{Interest, Registry};
use portway_netstack::udp::BindingId;
use portway_netstack::{Datagram, Echo, Offload, SegmentKind, UdpPath};

use super::binding::{Backoff, BindingSocket, FAILURES, HostFault, as_asked, push};
use super::ping::{self, Ping};
use super::{Driver, Entrance, Kind, token};
use crate::datagrams::{Receiver, come_together, hold_bursts, send_segments};
use crate::host_errors;
use crate::publish::Listener;

/// Batches taken from one socket before the next has its turn.
const TURN: usize = 4;
/// Sockets that have a turn before links are heard again.
const SOCKETS: usize = 64;

/// Datagrams that leave together.
struct Segments {
    binding: BindingId,
    remote: SocketAddr,
    hop_limit: u8,
    dont_fragment: bool,
    /// Bytes of each; the last may have fewer.
    size: usize,
    count: usize,
    bytes: Vec<u8>,
}

impl Segments {
    /// The kernel's `UDP_MAX_SEGMENTS` was 64 until Linux 6.9.
    const MOST: usize = 64;
    /// The largest UDP payload over IPv4.
    const BYTES: usize = 65_507;

    /// Whether a datagram of `len` bytes may join.
    fn takes(&self, binding: BindingId, datagram: &Datagram<'_>) -> bool {
        let len = datagram.payload.len();
        self.count > 0
            && self.count < Self::MOST
            && (self.binding, self.remote) == (binding, datagram.remote)
            && (self.hop_limit, self.dont_fragment) == (datagram.hop_limit, datagram.dont_fragment)
            && len <= self.size
            && len > 0
            && self.bytes.len() == self.count * self.size
            && self.bytes.len() + len <= Self::BYTES
    }
}

/// The sockets of all bindings.
pub(super) struct UdpSockets {
    /// By binding slot.
    sockets: Vec<Option<BindingSocket>>,
    /// Slots with datagrams to read, none twice.
    ready: VecDeque<usize>,
    receiver: Receiver,
    /// The address datagrams leave from.
    outbound: Option<Ipv4Addr>,
    waiting: Option<Segments>,
    faults: Vec<HostFault>,
    /// Echo requests the host does not send on: bindings, and where they went.
    refused: Vec<(BindingId, SocketAddr, Vec<u8>)>,
    backoff: Backoff,
    ping: ping::Permission,
}

impl UdpSockets {
    pub(super) fn new(outbound: Option<Ipv4Addr>) -> Self {
        Self {
            sockets: Vec::new(),
            ready: VecDeque::new(),
            receiver: Receiver::new(),
            outbound,
            waiting: None,
            faults: Vec::new(),
            refused: Vec::new(),
            backoff: Backoff::default(),
            ping: ping::Permission::ask(),
        }
    }

    pub(super) fn note(&mut self, slot: usize, error: bool) {
        // News of a binding that is gone is of no interest.
        let Some(Some(at)) = self.sockets.get_mut(slot) else { return };
        at.errors |= error;
        if !std::mem::replace(&mut at.queued, true) {
            self.ready.push_back(slot);
        }
    }

    /// Sends a guest's datagram, now or with the next [`Self::flush`]; several, where its frame stood for such.
    pub(super) fn send_all(
        &mut self,
        registry: &Registry,
        datagram: &Datagram<'_>,
        offload: Offload,
        entrances: &[Option<Entrance>],
    ) {
        let together = offload.segments.filter(|s| s.kind == SegmentKind::Udp);
        let size = together.map_or(usize::MAX, |s| s.size.into());
        if datagram.payload.len() <= size {
            return self.send(registry, datagram, entrances);
        }
        for payload in datagram.payload.chunks(size.max(1)) {
            self.send(registry, &Datagram { payload, ..*datagram }, entrances);
        }
    }

    fn send(&mut self, registry: &Registry, datagram: &Datagram<'_>, entrances: &[Option<Entrance>]) {
        let Datagram { remote, payload, path, hop_limit, dont_fragment } = *datagram;
        match path {
            UdpPath::Client { listener, client } => {
                if let Some(Some(Entrance { listener: Listener::Udp(socket, _), .. })) =
                    entrances.get(listener as usize)
                    && let Err(error) = socket.send_to(payload, client)
                {
                    tracing::debug!(%error, %client, "a datagram was not sent");
                }
            }
            UdpPath::Binding { binding, .. } => {
                if let Some(waiting) = self.waiting.as_mut().filter(|w| w.takes(binding, datagram)) {
                    waiting.bytes.extend_from_slice(payload);
                    waiting.count += 1;
                    return;
                }
                self.flush();
                if let Err(error) = self.socket(registry, binding, remote) {
                    tracing::debug!(%error, %remote, "a datagram was not sent");
                    if let Some(fault) = host_errors::refused(&error) {
                        push(&mut self.faults, HostFault::new(binding, remote, None, fault, payload));
                    }
                    return;
                }
                let mut bytes = self.waiting.take().map(|w| w.bytes).unwrap_or_default();
                bytes.clear();
                bytes.extend_from_slice(payload);
                let size = payload.len();
                self.waiting =
                    Some(Segments { binding, remote, hop_limit, dont_fragment, size, count: 1, bytes });
            }
        }
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self) {
        let Some(waiting) = self.waiting.as_mut().filter(|w| w.count > 0) else { return };
        let count = std::mem::take(&mut waiting.count);
        let Some(Some(at)) = self.sockets.get_mut(waiting.binding.slot()) else { return };
        if at.id != waiting.binding {
            return;
        }
        let (bytes, remote) = (&waiting.bytes[..], waiting.remote);
        if let Err(error) = at.prepare(waiting.hop_limit, waiting.dont_fragment) {
            tracing::debug!(%error, %remote, "a datagram was not sent");
            return;
        }
        if count > 1 && at.segments {
            match send_segments(&at.socket, bytes, waiting.size, at.place(remote)) {
                Ok(()) => {
                    at.failures = 0;
                    return;
                }
                // No room: what is lost is lost, as on a wire.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // An error of an earlier datagram (ICMP) says nothing about these; a kernel or a route that takes no
                    // segments (EINVAL, EIO, EMSGSIZE) will not take the next either.
                    let mut earlier = false;
                    at.drain(|report| earlier |= report.reporter.is_some(), &mut self.faults);
                    at.segments = earlier;
                }
            }
        }
        // Without bytes there is one datagram all the same.
        let mut rest = bytes;
        for _ in 0..count {
            let (datagram, after) = rest.split_at(waiting.size.min(rest.len()));
            rest = after;
            at.send(datagram, remote, &mut self.faults);
        }
        self.give_up(waiting_slot(&self.waiting));
    }

    /// Sends a guest's echo request.
    pub(super) fn ping(&mut self, registry: &Registry, echo: &Echo<'_>) {
        let Echo { binding, remote, message, hop_limit, dont_fragment } = *echo;
        let slot = binding.slot();
        self.make_room(slot);
        if self.sockets[slot].as_ref().is_none_or(|s| s.id != binding) {
            if !self.backoff.admits(Clock::now()) {
                return;
            }
            let made = self.ping.open(remote.is_ipv6(), slot).and_then(|(mut socket, ping)| {
                crate::fd::within_share(&socket)?;
                registry.register(&mut socket, token(Kind::Binding, slot), Interest::READABLE)?;
                host_errors::watch(&socket, remote.is_ipv6())?;
                Ok((socket, ping))
            });
            match made {
                Ok((socket, ping)) => {
                    self.backoff.succeeded();
                    self.sockets[slot] = Some(BindingSocket::new(binding, socket, remote, Some(ping)));
                }
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    self.refused.push((binding, remote, message.to_vec()));
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "an echo request was not sent");
                    self.backoff.failed(Clock::now());
                    return;
                }
            }
        }
        let Some(at) = self.sockets[slot].as_mut() else { return };
        if let Err(error) = at.prepare(hop_limit, dont_fragment) {
            tracing::debug!(%error, %remote, "an echo request was not sent");
            return;
        }
        let marked = at.ping.as_ref().and_then(|p| p.marked(message, remote.is_ipv6()));
        at.send(marked.as_deref().unwrap_or(message), remote, &mut self.faults);
        self.give_up(Some(slot));
    }

    /// Closes a socket that only fails.
    fn give_up(&mut self, slot: Option<usize>) {
        if let Some(at) = slot.and_then(|slot| self.sockets.get_mut(slot))
            && at.take_if(|s| s.failures >= FAILURES).is_some()
        {
            tracing::debug!("a socket only failed and was closed");
        }
    }

    fn make_room(&mut self, slot: usize) {
        if self.sockets.len() <= slot {
            self.sockets.resize_with(slot + 1, || None);
        }
    }

    fn socket(&mut self, registry: &Registry, id: BindingId, remote: SocketAddr) -> io::Result<()> {
        let slot = id.slot();
        self.make_room(slot);
        if self.sockets[slot].as_ref().is_some_and(|s| s.id == id) {
            return Ok(());
        }
        // Only where there were failures is the clock asked.
        if self.backoff.until.is_some() && !self.backoff.admits(Clock::now()) {
            return Err(io::Error::other("the host gave no socket a moment ago"));
        }
        let any = match remote {
            SocketAddr::V4(_) => SocketAddr::from((self.outbound.unwrap_or(Ipv4Addr::UNSPECIFIED), 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let made = UdpSocket::bind(any).and_then(|mut socket| {
            crate::fd::within_share(&socket)?;
            hold_bursts(&socket);
            come_together(&socket);
            host_errors::watch(&socket, remote.is_ipv6())?;
            registry.register(&mut socket, token(Kind::Binding, slot), Interest::READABLE)?;
            Ok(socket)
        });
        let socket = made.inspect_err(|_| self.backoff.failed(Clock::now()))?;
        self.backoff.succeeded();
        self.sockets[slot] = Some(BindingSocket::new(id, socket, remote, None));
        Ok(())
    }

    pub(super) fn close(&mut self, registry: &Registry, id: BindingId) {
        let closed = self.sockets.get_mut(id.slot()).and_then(|at| at.take_if(|s| s.id == id));
        if let Some(BindingSocket { mut socket, v6, ping: Some(Ping::Raw(_)), .. }) = closed
            && registry.deregister(&mut socket).is_ok()
        {
            self.ping.give_back(v6, socket);
        }
    }
}

fn waiting_slot(waiting: &Option<Segments>) -> Option<usize> {
    waiting.as_ref().map(|w| w.binding.slot())
}

impl Driver {
    /// Tells guests what became of their packets.
    pub(super) fn tell_faults(&mut self) {
        for f in self.udp.faults.drain(..) {
            self.stack.host_fault(self.now, f.binding, f.remote, f.reporter, f.fault, &f.payload);
        }
        for (binding, remote, message) in self.udp.refused.drain(..) {
            self.stack.echo_refused(self.now, binding, remote, &message);
        }
    }

    /// Takes datagrams of the sockets that have some, [`SOCKETS`] of them at the most. True when there may be more.
    pub(super) fn receive_datagrams(&mut self) -> bool {
        let mut moved = self.udp.ready.len() > SOCKETS;
        for _ in 0..self.udp.ready.len().min(SOCKETS) {
            let Some(slot) = self.udp.ready.pop_front() else { break };
            moved |= self.receive_binding(slot);
        }
        if moved || !self.udp.faults.is_empty() {
            self.tell_faults();
        }
        moved
    }

    fn receive_binding(&mut self, slot: usize) -> bool {
        let UdpSockets { sockets, receiver, ready, faults, .. } = &mut self.udp;
        let Some(Some(at)) = sockets.get_mut(slot) else { return false };
        at.queued = false;
        let told = faults.len();
        if at.errors {
            at.drain(|_| {}, faults);
        }
        let Some(port) = self.stack.port_of_binding(at.id) else { return false };
        let Some(sink) = Self::sink(&mut self.links, port) else { return false };
        for n in 0..TURN {
            let (id, v6, ping) = (at.id, at.v6, at.ping.as_ref());
            let received = receiver.receive(&at.socket, |from, bytes, size| match ping {
                None => self.stack.datagrams_from_host(id, as_asked(from), bytes, size, sink),
                Some(ping) => {
                    if let Some(message) = ping.reply(bytes, v6) {
                        self.stack.echo_from_host(id, from, message, sink);
                    }
                }
            });
            match received {
                Ok(more) => {
                    at.failures = 0;
                    if !more {
                        return n > 0 || faults.len() > told;
                    }
                }
                Err(_) => {
                    // What an earlier packet of ours caused, mostly: the queue says it better.
                    at.drain(|_| {}, faults);
                    at.failures = at.failures.saturating_add(1);
                    if at.failures >= FAILURES {
                        self.udp.give_up(Some(slot));
                        return true;
                    }
                }
            }
        }
        if !std::mem::replace(&mut at.queued, true) {
            ready.push_back(slot);
        }
        true
    }

    /// Takes datagrams of one published port.
    pub(super) fn receive_published(&mut self, n: usize) -> bool {
        let Some(Some(entrance)) = self.entrances.get_mut(n) else { return false };
        let Listener::Udp(socket, _) = &entrance.listener else { return false };
        let Some(Some(port)) = self.published.get_mut(entrance.published) else { return false };
        let guest = match &port.guest {
            crate::publish::spec::GuestName::Address(ip) => Some(*ip),
            other => Self::guest_of(&self.links, &self.stack, other),
        };
        let listener = u32::try_from(n).unwrap_or(u32::MAX);
        let (stack, links, now) = (&mut self.stack, &mut self.links, self.now);
        let mut failures = 0;
        for n in 0..TURN {
            let received = self.udp.receiver.receive(socket, |client, bytes, size| {
                port.accepted += 1;
                let Some(ip) = guest else { return };
                let Some(known) = stack.port_of_guest(ip) else { return };
                let Some(sink) = Self::sink(links, known) else { return };
                let to = SocketAddr::new(ip, port.guest_port);
                stack.datagrams_from_client(now, to, (client, listener), bytes, size, sink);
            });
            match received {
                Ok(true) => {}
                Ok(false) => {
                    entrance.ready = false;
                    return n > 0;
                }
                Err(error) => {
                    tracing::debug!(%error, "a published port's socket failed");
                    failures += 1;
                }
            }
        }
        // One that only fails is heard again when the kernel says that there is news.
        entrance.ready = failures < TURN;
        entrance.ready
    }
}
