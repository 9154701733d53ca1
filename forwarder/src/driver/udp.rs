//! Datagrams between guests and host sockets.
//!
//! One unconnected socket per NAT binding; its kernel address is the binding's for as long as it lives. Datagrams of a
//! published port's clients come and go through that port's own socket.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use mio::net::UdpSocket;
use mio::{Interest, Registry};
use portway_netstack::udp::BindingId;
use portway_netstack::{Datagram, UdpPath};

use super::{Driver, Entrance, Kind, token};
use crate::publish::Listener;

/// Datagrams taken from one socket before the next has its turn.
const TURN: usize = 64;
/// The largest datagram.
const LARGEST: usize = 65_535;

struct BindingSocket {
    id: BindingId,
    socket: UdpSocket,
}

/// The sockets of all bindings.
pub(super) struct UdpSockets {
    /// By binding slot.
    sockets: Vec<Option<BindingSocket>>,
    /// Slots with datagrams to read.
    ready: Vec<usize>,
    buffer: Box<[u8]>,
}

impl UdpSockets {
    pub(super) fn new() -> Self {
        Self { sockets: Vec::new(), ready: Vec::new(), buffer: vec![0; LARGEST].into() }
    }

    pub(super) fn note(&mut self, slot: usize) {
        if !self.ready.contains(&slot) {
            self.ready.push(slot);
        }
    }

    /// Sends a guest's datagram. What the host refuses is lost, as datagrams are.
    pub(super) fn send(
        &mut self,
        registry: &Registry,
        datagram: &Datagram<'_>,
        entrances: &[Option<Entrance>],
    ) {
        let result = match datagram.path {
            UdpPath::Client { listener, client } => match entrances.get(listener as usize) {
                Some(Some(Entrance { listener: Listener::Udp(socket), .. })) => {
                    socket.send_to(datagram.payload, client)
                }
                _ => return,
            },
            UdpPath::Binding { binding, .. } => match self.socket(registry, binding, datagram.remote) {
                Ok(socket) => socket.send_to(datagram.payload, datagram.remote),
                Err(e) => Err(e),
            },
        };
        if let Err(error) = result {
            tracing::debug!(%error, remote = %datagram.remote, "a datagram was not sent");
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
                SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
                SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            };
            let mut socket = UdpSocket::bind(any)?;
            registry.register(&mut socket, token(Kind::Binding, slot), Interest::READABLE)?;
            *at = Some(BindingSocket { id, socket });
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
        let UdpSockets { sockets, buffer, ready } = &mut self.udp;
        let Some(Some(at)) = sockets.get(slot) else { return false };
        let Some(port) = self.stack.port_of_binding(at.id) else { return false };
        let Some(sink) = Self::sink(&mut self.links, port) else { return false };
        for n in 0..TURN {
            match at.socket.recv_from(buffer) {
                Ok((len, from)) => self.stack.datagram_from_host(at.id, from, &buffer[..len], sink),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Anything but EWOULDBLOCK is an error that a datagram of ours caused: it is taken off, and reading goes on.
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => {}
                Err(_) => return n > 0,
            }
        }
        ready.push(slot);
        true
    }

    /// Takes datagrams of one published port.
    pub(super) fn receive_published(&mut self, n: usize) -> bool {
        let Some(Some(entrance)) = self.entrances.get_mut(n) else { return false };
        let Listener::Udp(socket) = &entrance.listener else { return false };
        let Some(Some(port)) = self.published.get_mut(entrance.published) else { return false };
        let guest = match &port.guest {
            crate::publish::spec::GuestName::Address(ip) => Some(*ip),
            other => Self::guest_of(&self.links, &self.stack, other),
        };
        let listener = u32::try_from(n).unwrap_or(u32::MAX);
        for n in 0..TURN {
            match socket.recv_from(&mut self.udp.buffer) {
                Ok((len, client)) => {
                    port.accepted += 1;
                    let Some(ip) = guest else { continue };
                    let Some(known) = self.stack.port_of_guest(ip) else { continue };
                    let Some(sink) = Self::sink(&mut self.links, known) else { continue };
                    let to = SocketAddr::new(ip, port.guest_port);
                    self.stack.datagram_from_client(
                        self.now,
                        to,
                        client,
                        listener,
                        &self.udp.buffer[..len],
                        sink,
                    );
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    entrance.ready = false;
                    return n > 0;
                }
                Err(_) => {}
            }
        }
        true
    }
}
