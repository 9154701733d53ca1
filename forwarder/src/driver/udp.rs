//! Datagrams between guests and host sockets.
//!
//! One unconnected socket per NAT binding; its kernel address is the binding's for as long as it lives. Datagrams of a
//! published port's clients come and go through that port's own socket.
//!
//! Both ways go in batches. To the host, datagrams of one binding to one place that come one after the other and have
//! the same size leave in one system call, as segments (`UDP_SEGMENT`, `udp(7)`); from the host, `recvmmsg(2)`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use mio::net::UdpSocket;
use mio::{Interest, Registry};
use portway_netstack::udp::BindingId;
use portway_netstack::{Datagram, UdpPath};

use super::{Driver, Entrance, Kind, token};
use crate::datagrams::{Receiver, hold_bursts, send_segments};
use crate::publish::Listener;

/// Batches taken from one socket before the next has its turn.
const TURN: usize = 4;

struct BindingSocket {
    id: BindingId,
    socket: UdpSocket,
    v6: bool,
    /// Whether the kernel and the route take segments; not asked again after the first refusal.
    segments: bool,
}

/// Datagrams that leave together.
struct Segments {
    binding: BindingId,
    remote: SocketAddr,
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
    fn takes(&self, binding: BindingId, remote: SocketAddr, len: usize) -> bool {
        self.count > 0
            && self.count < Self::MOST
            && (self.binding, self.remote) == (binding, remote)
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
    /// Slots with datagrams to read.
    ready: Vec<usize>,
    receiver: Receiver,
    /// The address datagrams leave from.
    outbound: Option<Ipv4Addr>,
    waiting: Option<Segments>,
}

impl UdpSockets {
    pub(super) fn new(outbound: Option<Ipv4Addr>) -> Self {
        let (sockets, ready) = (Vec::new(), Vec::new());
        Self { sockets, ready, receiver: Receiver::new(), outbound, waiting: None }
    }

    pub(super) fn note(&mut self, slot: usize) {
        if !self.ready.contains(&slot) {
            self.ready.push(slot);
        }
    }

    /// Sends a guest's datagram, now or with the next [`Self::flush`]. What the host refuses is lost, as datagrams are.
    pub(super) fn send(
        &mut self,
        registry: &Registry,
        datagram: &Datagram<'_>,
        entrances: &[Option<Entrance>],
    ) {
        let Datagram { remote, payload, path, .. } = *datagram;
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
                if let Some(waiting) =
                    self.waiting.as_mut().filter(|w| w.takes(binding, remote, payload.len()))
                {
                    waiting.bytes.extend_from_slice(payload);
                    waiting.count += 1;
                    return;
                }
                self.flush();
                if let Err(error) = self.socket(registry, binding, remote) {
                    tracing::debug!(%error, %remote, "a datagram was not sent");
                    return;
                }
                let mut bytes = self.waiting.take().map(|w| w.bytes).unwrap_or_default();
                bytes.clear();
                bytes.extend_from_slice(payload);
                self.waiting = Some(Segments { binding, remote, size: payload.len(), count: 1, bytes });
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
        if count > 1 && at.segments {
            match send_segments(&at.socket, bytes, waiting.size, remote) {
                Ok(()) => return,
                // No room: what is lost is lost, as on a wire.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // An error of an earlier datagram (ICMP) says nothing about these; a kernel or a route that takes no
                // segments (EINVAL, EIO, EMSGSIZE) will not take the next either.
                Err(e) => at.segments = e.kind() == io::ErrorKind::ConnectionRefused,
            }
        }
        // Without bytes there is one datagram all the same.
        let mut rest = bytes;
        for _ in 0..count {
            let (datagram, after) = rest.split_at(waiting.size.min(rest.len()));
            rest = after;
            if let Err(error) = at.socket.send_to(datagram, remote) {
                tracing::debug!(%error, %remote, "a datagram was not sent");
            }
        }
    }

    fn socket(&mut self, registry: &Registry, id: BindingId, remote: SocketAddr) -> io::Result<&UdpSocket> {
        let slot = id.slot();
        if self.sockets.len() <= slot {
            self.sockets.resize_with(slot + 1, || None);
        }
        let at = &mut self.sockets[slot];
        if at.as_ref().is_none_or(|s| s.id != id) {
            let any = match remote {
                SocketAddr::V4(_) => SocketAddr::from((self.outbound.unwrap_or(Ipv4Addr::UNSPECIFIED), 0)),
                SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            };
            let mut socket = UdpSocket::bind(any)?;
            hold_bursts(&socket);
            registry.register(&mut socket, token(Kind::Binding, slot), Interest::READABLE)?;
            *at = Some(BindingSocket { id, socket, v6: remote.is_ipv6(), segments: true });
        }
        at.as_ref().map(|s| &s.socket).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn close(&mut self, id: BindingId) {
        if let Some(at) = self.sockets.get_mut(id.slot()) {
            at.take_if(|s| s.id == id);
        }
    }
}

impl Driver {
    /// Takes datagrams from every socket that has some. True when there may be more.
    pub(super) fn receive_datagrams(&mut self) -> bool {
        let mut moved = false;
        for slot in std::mem::take(&mut self.udp.ready) {
            moved |= self.receive_binding(slot);
        }
        moved
    }

    fn receive_binding(&mut self, slot: usize) -> bool {
        let UdpSockets { sockets, receiver, ready, .. } = &mut self.udp;
        let Some(Some(at)) = sockets.get(slot) else { return false };
        let Some(port) = self.stack.port_of_binding(at.id) else { return false };
        let Some(sink) = Self::sink(&mut self.links, port) else { return false };
        for n in 0..TURN {
            let more = receiver.receive(&at.socket, at.v6, |from, bytes| {
                self.stack.datagram_from_host(at.id, from, bytes, sink)
            });
            if !more {
                return n > 0;
            }
        }
        ready.push(slot);
        true
    }

    /// Takes datagrams of one published port.
    pub(super) fn receive_published(&mut self, n: usize) -> bool {
        let Some(Some(entrance)) = self.entrances.get_mut(n) else { return false };
        let Listener::Udp(socket, v6) = &entrance.listener else { return false };
        let Some(Some(port)) = self.published.get_mut(entrance.published) else { return false };
        let guest = match &port.guest {
            crate::publish::spec::GuestName::Address(ip) => Some(*ip),
            other => Self::guest_of(&self.links, &self.stack, other),
        };
        let listener = u32::try_from(n).unwrap_or(u32::MAX);
        let (stack, links, now) = (&mut self.stack, &mut self.links, self.now);
        for n in 0..TURN {
            let more = self.udp.receiver.receive(socket, *v6, |client, bytes| {
                port.accepted += 1;
                let Some(ip) = guest else { return };
                let Some(known) = stack.port_of_guest(ip) else { return };
                let Some(sink) = Self::sink(links, known) else { return };
                let to = SocketAddr::new(ip, port.guest_port);
                stack.datagram_from_client(now, to, client, listener, bytes, sink);
            });
            if !more {
                entrance.ready = false;
                return n > 0;
            }
        }
        true
    }
}
