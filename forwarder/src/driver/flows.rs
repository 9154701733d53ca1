//! Bytes between host sockets and the rings of their flows.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use portway_netstack::{FlowId, HostEvent};

use super::{Driver, Entrance, Kind, token};
use crate::host::{HostFlow, HostStream};
use crate::publish::Listener;

/// Bytes one flow may send to its host before the next has its turn.
const TURN: usize = 1 << 20;
/// Bytes one flow may take from its host before they are on the link: as many as a core's second-level cache keeps
/// between the `recv`, the copy into the link's buffer and the `write`.
const RECV: usize = 256 * 1024;

/// What came of one system call inside a ring's closure.
enum Outcome {
    Idle,
    Moved(usize),
    End,
    Failed,
}

impl Driver {
    /// Serves one flow. A panic in its turn ends it, and nothing else.
    pub(super) fn serve(&mut self, id: FlowId) -> bool {
        let Some(moved) = crate::last_net::caught(|| self.turn(id)) else {
            if let Some(flow) = self.flows.get_mut(id.slot()).and_then(|f| f.take_if(|f| f.id == id)) {
                flow.stream.reset();
            }
            self.stack.handle_host(self.now, HostEvent::Reset { flow: id });
            return true;
        };
        moved
    }

    /// The outcome of a flow's connect, bytes to the host, bytes from the host.
    fn turn(&mut self, id: FlowId) -> bool {
        let Some(Some(flow)) = self.flows.get_mut(id.slot()) else { return false };
        if flow.id != id {
            return false;
        }
        if flow.dialing {
            match flow.stream.outcome() {
                None => return false,
                Some(Ok(())) => {
                    flow.dialing = false;
                    (flow.readable, flow.writable) = (true, true);
                    self.stack.handle_host(self.now, HostEvent::Connected { flow: id });
                }
                Some(Err(error)) => {
                    let fallback = flow.fallback;
                    self.flows[id.slot()] = None;
                    self.not_connected(id, fallback, &error);
                    return true;
                }
            }
        }
        self.move_bytes(id)
    }

    fn move_bytes(&mut self, id: FlowId) -> bool {
        let Some(Some(flow)) = self.flows.get_mut(id.slot()) else { return false };
        let (stack, now) = (&mut self.stack, self.now);
        let mut moved = 0;
        let mut failed = false;
        while flow.writable && !failed && moved < TURN {
            let mut outcome = Outcome::Idle;
            let lent = stack.to_host(now, id, |bytes| {
                outcome = to_host(flow, bytes);
                if let Outcome::Moved(n) = outcome { n } else { 0 }
            });
            match outcome {
                _ if lent.is_none() => break,
                Outcome::Moved(n) => moved += n,
                Outcome::Failed => failed = true,
                Outcome::Idle | Outcome::End => break,
            }
        }
        let mut read = 0;
        while flow.readable && !flow.eof && !failed && read < RECV {
            let mut outcome = Outcome::Idle;
            let lent = stack.from_host(now, id, |space| {
                outcome = from_host(flow, space);
                if let Outcome::Moved(n) = outcome { n } else { 0 }
            });
            match outcome {
                _ if lent.is_none() => break,
                Outcome::Moved(n) => read += n,
                Outcome::Failed => failed = true,
                Outcome::End => {
                    flow.eof = true;
                    stack.handle_host(now, HostEvent::Eof { flow: id });
                }
                Outcome::Idle => break,
            }
        }
        if failed {
            self.flows[id.slot()] = None;
            self.stack.handle_host(now, HostEvent::Reset { flow: id });
            return true;
        }
        if moved >= TURN || read >= RECV {
            self.ready.push_back(id);
        }
        moved + read > 0
    }

    /// Serves every published port that may have somebody waiting.
    pub(super) fn accept_all(&mut self) -> bool {
        let mut moved = false;
        self.starved = false;
        for n in std::mem::take(&mut self.ready_entrances) {
            moved |= match self.entrances.get(n) {
                Some(Some(Entrance { listener: Listener::Udp(..), .. })) => self.receive_published(n),
                _ => self.accept(n),
            };
            if self.entrances.get(n).is_some_and(|e| e.as_ref().is_some_and(|e| e.ready)) {
                self.ready_entrances.push(n);
            }
        }
        moved
    }

    /// Accepts what waits at one entrance.
    fn accept(&mut self, n: usize) -> bool {
        let mut moved = false;
        while let Some(Some(entrance)) = self.entrances.get_mut(n) {
            let accepted = match &entrance.listener {
                Listener::Tcp(l) => l.accept().map(|(s, client)| {
                    let _ = s.set_nodelay(true);
                    (HostStream::Tcp(s), client)
                }),
                // A client of a unix socket has no address; the guest sees the host alias.
                Listener::Unix(l, _) => l
                    .accept()
                    .map(|(s, _)| (HostStream::Unix(s), SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0))),
                Listener::Udp(..) => break,
            };
            let published = entrance.published;
            match accepted {
                Ok((stream, client)) => {
                    moved = true;
                    let share = match &stream {
                        HostStream::Tcp(s) => crate::fd::within_share(s),
                        HostStream::Unix(s) => crate::fd::within_share(s),
                    };
                    match share {
                        Ok(()) => self.open_to_guest(published, stream, client),
                        // Refused and not left in the backlog: it would wait for nothing.
                        Err(_) => stream.reset(),
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    entrance.ready = false;
                    break;
                }
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // Out of descriptors: those who wait are accepted when a flow has ended.
                    tracing::warn!(%error, "cannot accept at a published port, trying again");
                    self.starved = true;
                    break;
                }
            }
        }
        moved
    }

    fn open_to_guest(&mut self, published: usize, stream: HostStream, client: SocketAddr) {
        let Some(Some(port)) = self.published.get_mut(published) else { return };
        port.accepted += 1;
        let guest_port = port.guest_port;
        let guest = port.guest.clone();
        let Some(ip) = self.guest_address(&guest) else {
            tracing::debug!(?guest, "a published port's guest has no address yet");
            stream.reset();
            return;
        };
        match self.stack.open_to_guest(self.now, SocketAddr::new(ip, guest_port), client) {
            Ok(id) => self.adopt(HostFlow::open(id, stream)),
            Err(reason) => {
                tracing::debug!(%reason, %client, "a published connection was not opened");
                stream.reset();
            }
        }
    }

    /// Watches a flow's socket. Without room in the kernel the flow is reset.
    pub(super) fn adopt(&mut self, mut flow: HostFlow) {
        let id = flow.id;
        if let Err(error) = flow.stream.register(self.poll.registry(), token(Kind::Flow, id.slot())) {
            tracing::warn!(%error, "a host socket cannot be watched");
            flow.stream.reset();
            self.stack.handle_host(self.now, HostEvent::Reset { flow: id });
            return;
        }
        if self.flows.len() <= id.slot() {
            self.flows.resize_with(id.slot() + 1, || None);
        }
        self.flows[id.slot()] = Some(flow);
        // The kernel's first edge may be past already.
        self.ready.push_back(id);
    }
}

/// One `send` out of a ring.
fn to_host(flow: &mut HostFlow, bytes: &[u8]) -> Outcome {
    crate::last_net::on_purpose(bytes);
    match flow.stream.send(bytes) {
        Ok(n) => {
            // A socket that took less than it was given is full.
            flow.writable = n == bytes.len();
            Outcome::Moved(n)
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            flow.writable = false;
            Outcome::Idle
        }
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Outcome::Moved(0),
        // The peer reset: what it had sent before is still there to read, and the read says so too.
        Err(_) => Outcome::Failed,
    }
}

/// One `recv` into a ring.
fn from_host(flow: &mut HostFlow, space: &mut [u8]) -> Outcome {
    let most = space.len().min(RECV);
    match flow.stream.recv(&mut space[..most]) {
        Ok(0) => Outcome::End,
        Ok(n) => {
            // Less than asked: all there was. The end of file still has to be read if it has been announced.
            flow.readable = n == most || flow.ending;
            Outcome::Moved(n)
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            flow.readable = false;
            Outcome::Idle
        }
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Outcome::Moved(0),
        Err(_) => Outcome::Failed,
    }
}
