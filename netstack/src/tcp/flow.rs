//! One flow: its key, and a type for each state of its life.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::num::Wrapping;

use smoltcp::socket::tcp::State;

use super::after;
use super::table::FlowSocket;
use super::window::Advertised;
use crate::config::Limits;
use crate::drop_reason::DropReason;
use crate::host::{Direction, FlowReport, FlowState};
use crate::time::{Duration, Instant};
use crate::types::{Mac, PortId};
use crate::wire::{
    self,
    tcp::{self, Segment},
};

/// How long the acknowledgment of a small segment may wait for bytes that carry it: the answer to a request that comes
/// soon saves everybody a frame. RFC 1122 §4.2.3.2 allows 500 ms. Large segments are acknowledged at once: a guest in slow
/// start waits for nothing else. A FIN waits for the one of most hosts that answer it with theirs, and for nothing once the
/// host has ended.
pub(super) const ACK_DELAY: Duration = Duration::from_millis(5);
/// Small segments that are acknowledged at once after one was waited for in vain: the guest may have held its next bytes back
/// for that acknowledgment (Nagle's algorithm).
const QUICK: u8 = 16;
/// Payload bytes below which a segment is no part of a bulk transfer: less than fills a frame at any usual MTU.
const SMALL: u32 = 1200;

/// An address and a port, in 20 bytes where a `SocketAddr` needs 32: there is one flow's worth of these per idle flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    ip: IpAddr,
    port: u16,
}

impl From<SocketAddr> for End {
    fn from(address: SocketAddr) -> Self {
        Self { ip: address.ip(), port: address.port() }
    }
}

/// What tells one flow from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlowKey {
    pub(crate) port: PortId,
    guest: End,
    remote: End,
}

impl FlowKey {
    pub(crate) fn new(port: PortId, guest: SocketAddr, remote: SocketAddr) -> Self {
        Self { port, guest: guest.into(), remote: remote.into() }
    }

    pub(crate) const fn guest(&self) -> SocketAddr {
        SocketAddr::new(self.guest.ip, self.guest.port)
    }

    /// The other end as the guest sees it.
    pub(crate) const fn remote(&self) -> SocketAddr {
        SocketAddr::new(self.remote.ip, self.remote.port)
    }

    pub(super) const fn is_v6(&self) -> bool {
        self.guest.ip.is_ipv6()
    }
}

impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match (self.guest.ip, self.remote.ip) {
            (IpAddr::V4(g), IpAddr::V4(r)) => {
                state.write_u64(u64::from(u32::from(g)) << 32 | u64::from(u32::from(r)))
            }
            (g, r) => {
                for ip in [g, r] {
                    match ip {
                        IpAddr::V4(a) => state.write_u32(a.into()),
                        IpAddr::V6(a) => state.write_u128(a.into()),
                    }
                }
            }
        }
        let ports = u64::from(self.guest.port) << 16 | u64::from(self.remote.port);
        state.write_u64(u64::from(self.port.0) << 32 | ports);
    }
}

/// One flow.
pub(super) struct Flow {
    pub(super) key: FlowKey,
    pub(super) guest_mac: Mac,
    pub(super) direction: Direction,
    /// Lies in `Tcp::touched`.
    pub(super) touched: bool,
    /// Lies in its port's egress queue.
    pub(super) queued: bool,
    /// The driver has no socket for it any more.
    pub(super) host_gone: bool,
    /// Its rings may have pages of their own.
    pub(super) warm: bool,
    pub(super) created: Instant,
    /// When a segment or byte last moved, in either direction.
    pub(super) last_active: Instant,
    /// When the guest last sent a segment.
    pub(super) last_heard: Instant,
    /// When the ring to the guest last went from empty to not empty.
    pub(super) sending_since: Instant,
    /// The earliest entry of the timer wheel.
    pub(super) deadline: Option<Instant>,
    pub(super) bytes_to_host: u64,
    pub(super) bytes_to_guest: u64,
    pub(super) life: Life,
}

/// The states of a flow; each owns what it needs and nothing else.
pub(super) enum Life {
    /// The guest asked, the host has not answered yet: no socket, no rings.
    Dialing(Dialing),
    /// A published connection that waits for the guest's Ethernet address.
    Resolving(Resolving),
    /// smoltcp speaks with the guest.
    Live(Live),
}

pub(super) struct Dialing {
    /// The guest's SYN, the whole packet: its options (MSS, window scale, SACK) are answered as they were asked.
    pub(super) syn: Box<[u8]>,
    pub(super) irs: Wrapping<u32>,
    pub(super) loopback: bool,
}

pub(super) struct Resolving {
    /// ARP requests sent.
    pub(super) asked: u8,
}

impl Resolving {
    /// Requests, one a second, before the connection is given up.
    pub(super) const TRIES: u8 = 3;
}

/// How smoltcp's Closed came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It has not.
    Not,
    /// Both FINs were acknowledged.
    InOrder,
    /// The guest sent RST.
    Reset,
    /// We did.
    Aborted,
}

impl Ending {
    /// Whether bytes that the host has not taken are forgotten.
    pub(super) const fn forgets(self) -> bool {
        matches!(self, Self::Reset | Self::Aborted)
    }
}

pub(super) struct Live {
    pub(super) socket: FlowSocket,
    /// The guest's initial sequence number; of an active open it comes with the SYN|ACK.
    irs: Option<Wrapping<u32>>,
    /// Bytes taken out of the ring to the host, modulo 2³².
    taken: Wrapping<u32>,
    /// The highest end of a segment smoltcp was given.
    seen_end: Wrapping<u32>,
    /// The host's end of file came before the guest's part of the handshake: the FIN is still owed.
    owes_fin: bool,
    pub(super) established: bool,
    pub(super) told_end: bool,
    pub(super) ending: Ending,
    pub(super) time_wait_since: Option<Instant>,
    pub(super) advertised: Advertised,
    /// How often our SYN met a connection that the guest still remembered.
    remembered: u8,
    /// What the guest sent last is acknowledged without delay.
    ack_now: bool,
    /// Small segments that are still to be acknowledged without delay.
    quick: u8,
    /// When it was last counted among the senders.
    pub(super) sent_in: u64,
}

/// What smoltcp sees of a segment.
pub(super) enum Shown {
    /// All of it.
    Whole,
    /// Another packet.
    Instead(Vec<u8>),
    /// Nothing; it says nothing new.
    Nothing,
}

impl Live {
    pub(super) fn new(socket: FlowSocket, irs: Option<Wrapping<u32>>) -> Self {
        Self {
            socket,
            irs,
            taken: Wrapping(0),
            seen_end: irs.unwrap_or_default() + Wrapping(1),
            owes_fin: false,
            established: false,
            told_end: false,
            ending: Ending::Not,
            time_wait_since: None,
            advertised: Advertised::default(),
            remembered: 0,
            ack_now: false,
            quick: 0,
            sent_in: 0,
        }
    }

    /// How far ahead of time smoltcp's clock goes for the next segments, so that an acknowledgment it keeps back for
    /// [`ACK_DELAY`] leaves at once.
    pub(super) const fn take_ack_haste(&mut self) -> Duration {
        if std::mem::replace(&mut self.ack_now, false) { ACK_DELAY } else { Duration::ZERO }
    }

    /// No answer came within [`ACK_DELAY`]: the guest does not ask and wait.
    pub(super) const fn waited_in_vain(&mut self) {
        self.quick = QUICK;
    }

    /// The guest's SYN or SYN|ACK says whether windows are scaled.
    pub(super) fn begin_window(&mut self, packet: &[u8]) {
        let capacity = self.socket.tcp_ref().recv_capacity();
        self.advertised.begin(wire::transport(packet), capacity);
    }

    /// Whether smoltcp may see `segment`: it answers something, and its data must lie inside the ring (see the module
    /// documentation).
    pub(super) fn admits(&self, segment: &Segment) -> Result<(), DropReason> {
        // smoltcp 0.14 panics when a SYN arrives before its own SYN has left: it counts from a window it has not told.
        if self.socket.tcp_ref().state() == State::SynSent && self.advertised.is_silent() {
            return Err(DropReason::NoFlow);
        }
        if segment.payload == 0 {
            return Ok(());
        }
        if segment.has(tcp::SYN) {
            return Err(DropReason::BeyondWindow);
        }
        let Some(irs) = self.irs else { return Err(DropReason::BeyondWindow) };
        // recv_capacity is at most 1 MiB: it fits.
        let capacity = Wrapping(u32::try_from(self.socket.tcp_ref().recv_capacity()).unwrap_or(0));
        let limit = irs + Wrapping(1) + self.taken + capacity;
        if after(segment.end(), limit) || after(segment.seq, segment.end()) {
            return Err(DropReason::BeyondWindow);
        }
        Ok(())
    }

    /// What smoltcp is to see of `segment`, which it admits.
    ///
    /// smoltcp 0.14 has one timer, and loses the one that sends again what got lost in two cases, after which a flow stands
    /// still for ever: when the guest closes its window while bytes are under way (the zero-window probe's timer takes its
    /// place, and is stopped when the window opens), and at the third duplicate ACK when only a FIN is under way. Both happen
    /// with guests that drop what they have no memory for. So a window is never quite closed while bytes are under way, which
    /// hold it anyway; and duplicate ACKs of a FIN's predecessor are not shown.
    pub(super) fn shown(&self, segment: &Segment, packet: &[u8]) -> Shown {
        let Some((ack, window)) = tcp::acknowledged(wire::transport(packet)) else { return Shown::Whole };
        let under_way = self.advertised.in_flight(ack);
        let socket = self.socket.tcp_ref();
        let alone = segment.payload == 0 && !segment.has(tcp::FIN);
        let only_fin = matches!(socket.state(), State::FinWait1 | State::Closing | State::LastAck)
            && socket.send_queue() == 0
            && under_way == 1;
        if alone && only_fin {
            return Shown::Nothing;
        }
        if window == 0 && under_way > 0 {
            let mut copy = packet.to_vec();
            let header = packet.len() - wire::transport(packet).len();
            if let Some(segment) = copy.get_mut(header..) {
                tcp::set_window(segment, 1, true);
            }
            return Shown::Instead(copy);
        }
        Shown::Whole
    }

    /// The host has sent its last byte. Before the handshake is over the FIN has to wait: smoltcp 0.14 takes the
    /// acknowledgement of its SYN for one of the FIN that it has not sent, and forgets a SYN of its own.
    pub(super) fn host_ended(&mut self) {
        let socket = self.socket.tcp();
        match socket.state() {
            State::SynSent | State::SynReceived => self.owes_fin = true,
            _ => socket.close(),
        }
    }

    /// Ends a socket that listens: the guest reset its handshake, or smoltcp did not take its SYN. smoltcp would wait
    /// for another connection, while the host has one that nobody uses.
    pub(super) fn never_listens(&mut self) {
        let socket = self.socket.tcp();
        if socket.state() == State::Listen {
            socket.abort();
            self.ending = Ending::Reset;
        }
    }

    /// Whether `segment`, the answer to our SYN, says that the guest still has a connection on these ports in TIME-WAIT, or
    /// half open: an ACK alone (RFC 9293 §3.5.1, figure 9). True twice at the most: a guest that
    /// ignores RST in TIME-WAIT (RFC 1337) challenges every SYN, and then the timer has to do.
    pub(super) fn is_remembered(&mut self, segment: &Segment) -> bool {
        let answer = segment.has(tcp::ACK) && segment.flags & (tcp::SYN | tcp::RST) == 0;
        if !answer || self.remembered >= 2 || self.socket.tcp_ref().state() != State::SynSent {
            return false;
        }
        self.remembered += 1;
        // The next SYN has another initial sequence number.
        self.advertised = Advertised::default();
        true
    }

    /// Notes a segment smoltcp has seen.
    pub(super) fn note_segment(&mut self, segment: &Segment, packet: &[u8]) {
        self.never_listens();
        let state = self.socket.tcp_ref().state();
        if self.irs.is_none() && segment.has(tcp::SYN) && state != State::SynSent && state != State::Closed {
            self.irs = Some(segment.seq);
            self.seen_end = segment.seq + Wrapping(1);
            self.begin_window(packet);
        }
        if segment.payload > 0 && after(segment.end(), self.seen_end) {
            self.seen_end = segment.end();
        }
        let last = segment.has(tcp::FIN) && state != State::CloseWait;
        self.ack_now |= segment.payload >= SMALL || last;
        if segment.payload > 0 && self.quick > 0 {
            self.quick -= 1;
            self.ack_now = true;
        }
        if self.owes_fin && matches!(state, State::Established | State::CloseWait) {
            self.owes_fin = false;
            self.socket.tcp().close();
        }
        if state == State::Closed && self.ending == Ending::Not {
            self.ending = if segment.has(tcp::RST) { Ending::Reset } else { Ending::InOrder };
        }
    }

    pub(super) fn note_taken(&mut self, bytes: usize) {
        // A ring is smaller than 2³²; the sum is modulo 2³² by its nature.
        self.taken += Wrapping(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Whether both rings are empty, segments that came out of order included: their pages hold nothing.
    pub(super) fn holds_nothing(&self) -> bool {
        let socket = self.socket.tcp_ref();
        let next = self.irs.map(|irs| irs + Wrapping(1) + self.taken);
        socket.recv_queue() == 0
            && socket.send_queue() == 0
            && next.is_some_and(|next| !after(self.seen_end, next))
    }

    /// The flow has reached TIME-WAIT, and the host has not taken every byte yet.
    pub(super) fn time_wait(&mut self, now: Instant) {
        self.time_wait_since.get_or_insert(now);
    }

    /// The time for smoltcp. It stands still in TIME-WAIT, or the end of that would take the ring's bytes away from
    /// a host that reads slowly.
    pub(super) fn clock(&self, now: Instant) -> Instant {
        self.time_wait_since.unwrap_or(now)
    }
}

impl Flow {
    pub(super) fn new(now: Instant, key: FlowKey, guest_mac: Mac, direction: Direction, life: Life) -> Self {
        Self {
            key,
            guest_mac,
            direction,
            touched: false,
            queued: false,
            host_gone: false,
            warm: false,
            created: now,
            last_active: now,
            last_heard: now,
            sending_since: now,
            deadline: None,
            bytes_to_host: 0,
            bytes_to_guest: 0,
            life,
        }
    }

    /// When the flow is given up unless something moves.
    pub(super) fn reaped_at(&self, limits: &Limits) -> Instant {
        const NEVER: Instant = Instant::from_micros(u64::MAX);
        let Life::Live(live) = &self.life else { return NEVER };
        if live.ending.forgets() {
            return self.last_active + limits.tcp_half_closed;
        }
        let socket = live.socket.tcp_ref();
        match socket.state() {
            State::SynSent | State::SynReceived => self.last_active + limits.tcp_handshake,
            _ if socket.send_queue() > 0 => {
                self.last_heard.max(self.sending_since) + limits.tcp_unacknowledged
            }
            State::Established => self.last_active + limits.open_for(),
            _ => self.last_active + limits.tcp_half_closed,
        }
    }

    pub(super) fn report(&self, now: Instant) -> FlowReport {
        let state = match &self.life {
            Life::Dialing(_) | Life::Resolving(_) => FlowState::Dialing,
            Life::Live(live) => match live.socket.tcp_ref().state() {
                State::SynSent | State::SynReceived | State::Listen => FlowState::Dialing,
                State::Established => FlowState::Open,
                _ => FlowState::Closing,
            },
        };
        FlowReport {
            port: self.key.port,
            direction: self.direction,
            guest: self.key.guest(),
            remote: self.key.remote(),
            state,
            bytes_to_host: self.bytes_to_host,
            bytes_to_guest: self.bytes_to_guest,
            age: now.since(self.created),
            idle: now.since(self.last_active),
        }
    }
}
