//! The data thread: one loop around links, host sockets and the `Netstack`.
//!
//! ```text
//!  epoll ─► events set flags ─► pump: frames in ─► flows: host writes, host reads ─► frames out ─► again, until still
//! ```
//! Everything is edge-triggered and every readiness is a flag that only `EWOULDBLOCK` (or a short read) clears, so a
//! wake can be late but never lost. One turn of the pump: read a batch of frames of every readable link, serve the flows
//! they touched and the flows whose sockets are ready, run the stack's commands, write every link. It turns until nothing
//! moves, [`TURNS`] times at the most, so that a flood on one link keeps nobody else from being heard; then it sleeps until
//! an event or the stack's next timer.
//!
//! There is no lock, no channel of buffers and no allocation per packet. Slow things happen in the control thread; they
//! come in as [`Request`]s and go out as [`Slow`]s.

mod alarm;
mod backlog;
mod commands;
mod flows;
pub(crate) mod join;
mod names;
mod ping;
mod requests;
mod udp;

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc;
use std::time::Instant as Clock;

use mio::{Events, Poll, Token};
use portway_netstack::{
    FlowId, Forward, Handled, Instant, Mac, Netstack, Offloads, PortConfig, PortId, StackConfig,
};

use self::alarm::Alarm;
use self::backlog::Backlog;
pub use self::backlog::Waiting;
pub(crate) use self::requests::PORTS;
use self::udp::UdpSockets;
use crate::capture::Capture;
use crate::config::{Config, GuestApi, LinkAddress, LinkConfig, LinkKind};
use crate::events::{Event, EventQueue};
use crate::host::HostFlow;
use crate::link::{Carrier, Link, LinkState, Tokens};
use crate::publish::{Listener, Published};
use crate::request::{DnsTicket, Request};
use crate::rings::MappedRings;
use crate::uplink;

/// What the sandbox lets the data thread do beside waiting: set its timer, which is made before.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![SYS_timerfd_settime];

/// What the data thread leaves to the control thread.
#[derive(Debug)]
pub enum Slow {
    /// A guest's DNS query; the answer comes back as [`Request::DnsAnswer`].
    Dns(DnsTicket, Vec<u8>, Waiting),
    /// The connection of a guest, that on this port, to the DNS service.
    DnsStream(PortId, std::os::unix::net::UnixStream),
    /// A guest's connection to the gateway's port 80, and the guest.
    ApiStream(std::os::unix::net::UnixStream, std::net::IpAddr),
    /// A guest's connection that a program or a proxy is to take; the answer comes back as
    /// [`Request::HandedOver`].
    HandOver {
        /// The flow.
        flow: FlowId,
        /// Its destination.
        to: std::net::SocketAddr,
        /// Who is to take it.
        taker: crate::personality::vpnkit::Taker,
    },
}

/// The leases as they are now, and the names they give: to be kept, and to be known to DNS.
#[derive(Debug, Clone, Default)]
pub struct LeaseBook {
    /// Every lease.
    pub leases: Vec<portway_netstack::dhcp::LeaseReport>,
    /// Names and their addresses, no name twice.
    pub names: Vec<(String, std::net::IpAddr)>,
}

/// Slow things that may wait for the control thread; at it DNS queries are dropped, and the guest asks again.
pub const SLOW_LIMIT: usize = 1024;

/// Reads of one link in one turn, while they bring much: with many flows in a batch, each has few segments in it, and larger
/// batches mean fewer system calls and ACKs for the same bytes.
const READS: usize = 8;

/// Frames of one link in one turn: a guest that sends thousands of small ones, each of which costs a system call of the host,
/// keeps the others waiting for no more than these.
const FRAMES: u64 = 512;

/// Turns of the pump before events are looked at again.
const TURNS: usize = 8;

/// VMs beyond the first that the listeners of `vpnkit` links may have together.
const ARRIVALS: usize = 64;

/// How long those who wait to be accepted wait for a descriptor to come free.
const STARVED: std::time::Duration = std::time::Duration::from_millis(100);

/// What a token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Waker,
    Link,
    Flow,
    Binding,
    Listener,
}

const KINDS: [Kind; 5] = [Kind::Waker, Kind::Link, Kind::Flow, Kind::Binding, Kind::Listener];

/// Bits of a token that say the kind.
const TOKEN_SHIFT: u32 = 3;

const fn token(kind: Kind, index: usize) -> Token {
    Token(index << TOKEN_SHIFT | kind as usize)
}

fn kind_of(token: Token) -> Option<(Kind, usize)> {
    KINDS.get(token.0 & 7).map(|kind| (*kind, token.0 >> TOKEN_SHIFT))
}

/// The token of the waker of `Requests`.
pub const WAKER: Token = token(Kind::Waker, 0);
/// The token of the [`Alarm`].
const ALARM: Token = token(Kind::Waker, 1);

/// One socket of a published port.
struct Entrance {
    listener: Listener,
    /// The published port it belongs to.
    published: usize,
    ready: bool,
}

/// The data thread's state.
pub struct Driver {
    poll: Poll,
    alarm: Alarm,
    stack: Netstack,
    started: Clock,
    now: Instant,
    links: Vec<Link>,
    /// As they were configured; links that came to the listener of another are not among them.
    link_configs: Vec<LinkConfig>,
    /// What VMs are that come through the API.
    attached: LinkConfig,
    /// Whether the end of a configured VM's link is ours.
    ends_with_vm: bool,
    /// Whether we stay without a link.
    stays: bool,
    vpnkit_macs: Vec<(String, Mac)>,
    /// By flow slot.
    flows: Vec<Option<HostFlow>>,
    /// Flows with news from their sockets.
    ready: VecDeque<FlowId>,
    udp: UdpSockets,
    /// Destinations that are handed over, and flows whose takers have not answered yet.
    outgoing: Vec<crate::personality::vpnkit::Outgoing>,
    handing: Vec<FlowId>,
    /// The address outgoing connections leave from.
    outbound: Option<std::net::Ipv4Addr>,
    published: Vec<Option<Published>>,
    entrances: Vec<Option<Entrance>>,
    /// Entrances that may have somebody waiting.
    ready_entrances: Vec<usize>,
    /// Whether an entrance could not accept for want of descriptors.
    starved: bool,
    requests: mpsc::Receiver<Request>,
    slow: tokio::sync::mpsc::Sender<Slow>,
    backlog: Backlog,
    /// After which idle time the host's end of a connection is asked for.
    keep_alive: Option<std::time::Duration>,
    /// Where leases are told. Only the newest matters, so a slow reader misses nothing but what is over.
    leases: tokio::sync::watch::Sender<LeaseBook>,
    events: EventQueue,
    /// Where sockets may be made from now on; `None` while the process starts, when the configuration says where.
    allowed: Option<std::sync::Arc<crate::sandbox::paths::Paths>>,
    /// Whether VMs may still come when there is none.
    joinable: bool,
    /// Address and MAC of every lease that has been told, sorted.
    known_leases: Vec<(std::net::Ipv4Addr, Mac)>,
    captures: Vec<std::sync::Arc<Capture>>,
    /// Frames lost by captures that have ended.
    capture_lost: u64,
    ending: bool,
}

impl Driver {
    /// Binds every link. Published ports come after, by [`Self::publish_at_start`].
    ///
    /// # Errors
    /// When a link cannot be made; the text names it.
    pub fn new(
        config: &Config,
        poll: Poll,
        requests: mpsc::Receiver<Request>,
        slow: tokio::sync::mpsc::Sender<Slow>,
        search: Vec<String>,
        seed: u64,
    ) -> io::Result<Self> {
        let stack = StackConfig {
            subnet: config.subnet,
            gateway: config.gateway,
            host_alias: config.host_alias,
            gateway_mac: config.particulars.gateway_mac,
            services: config.particulars.services.clone(),
            domain: config.particulars.domain.clone(),
            search: match &config.dns_search {
                Some(search) => search.clone(),
                None => [config.particulars.search.clone(), search].concat(),
            },
            ntp: config.ntp.clone(),
            lease_time: config.lease_time,
            static_leases: config.static_lease.clone(),
            host_loopback: config.host_loopback,
            metadata: config.metadata,
            guest_api: config.guest_api != GuestApi::Off,
            ipv6: config.ipv6.as_ref().map(|v6| v6.of_stack(!v6.follows_host || uplink::has_ipv6())),
            udp: config.udp.clone(),
            limits: config.limits.clone(),
        };
        let started = Clock::now();
        let mut stack = Netstack::new(stack, Box::new(MappedRings::new()), seed);
        let mut links = Vec::new();
        for (n, link) in config.links.iter().enumerate() {
            let isolate = link.isolate;
            let port = PortConfig { name: link.name.clone(), mtu: link.mtu, address: link.ip, isolate };
            let port = stack.add_port(Instant::ZERO, port, Offloads::default());
            let tokens = Tokens { first: token(Kind::Link, n * Tokens::COUNT), step: 1 << TOKEN_SHIFT };
            let made = Link::open(link, port, tokens, poll.registry())
                .map_err(|e| io::Error::new(e.kind(), format!("--link: {e}")))?;
            if made.is_up() {
                stack.set_offloads(Instant::ZERO, port, made.offloads());
            }
            links.push(made);
        }
        Ok(Self {
            alarm: Alarm::new(poll.registry(), ALARM)?,
            poll,
            stack,
            started,
            now: Instant::ZERO,
            links,
            link_configs: config.links.clone(),
            attached: LinkConfig {
                kind: LinkKind::Stdio,
                address: LinkAddress::Stdio,
                name: None,
                ip: None,
                mtu: config.attached_mtu,
                isolate: false,
                offload: false,
            },
            ends_with_vm: config.ends_with_vm,
            stays: config.stays,
            vpnkit_macs: config.vpnkit_macs.clone(),
            flows: Vec::new(),
            ready: VecDeque::new(),
            udp: UdpSockets::new(config.particulars.outbound),
            outgoing: config.particulars.outgoing.clone(),
            handing: Vec::new(),
            outbound: config.particulars.outbound,
            published: Vec::new(),
            entrances: Vec::new(),
            ready_entrances: Vec::new(),
            starved: false,
            requests,
            slow,
            backlog: Backlog::new(),
            keep_alive: config.limits.tcp_keepalive,
            leases: tokio::sync::watch::Sender::default(),
            events: EventQueue::default(),
            allowed: None,
            joinable: config.join.is_some(),
            known_leases: Vec::new(),
            captures: Vec::new(),
            capture_lost: 0,
            ending: false,
        })
    }

    /// Tells events to `events` from now on.
    pub fn tell_events(&mut self, events: EventQueue) {
        self.events = events;
    }

    /// Takes leases of an earlier run back.
    pub fn restore_leases(&mut self, leases: Vec<portway_netstack::dhcp::LeaseReport>) {
        self.stack.restore_leases(self.now, leases);
        self.tell_leases();
    }

    /// Where leases are told when they change.
    #[must_use]
    pub fn watch_leases(&self) -> tokio::sync::watch::Receiver<LeaseBook> {
        self.leases.subscribe()
    }

    /// The leases as they are now.
    #[must_use]
    pub fn lease_reports(&self) -> Vec<portway_netstack::dhcp::LeaseReport> {
        self.stack.leases(self.now)
    }

    /// From now on sockets are made only where `allowed` says.
    pub(crate) fn confine(&mut self, allowed: std::sync::Arc<crate::sandbox::paths::Paths>) {
        self.allowed = Some(allowed);
    }

    /// Runs until it is told to end, or nothing can attach any more.
    ///
    /// # Errors
    /// When the kernel's poll fails.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        self.tick();
        let mut busy = self.pump();
        while !self.ending && (self.joinable || self.stays || !self.links.iter().all(|l| l.ended)) {
            let patience = if busy { Some(std::time::Duration::ZERO) } else { self.patience() };
            match self.poll.poll(&mut events, patience) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            self.tick();
            for event in &events {
                self.note(event);
            }
            if self.stack.poll_timeout().is_some_and(|at| at <= self.now) {
                self.stack.handle_timeout(self.now);
            }
            self.tick_links();
            busy = self.pump();
        }
        self.end();
        Ok(())
    }

    fn tick(&mut self) {
        self.now = self.instant(Clock::now());
    }

    /// A point of the host's clock as the stack counts.
    fn instant(&self, at: Clock) -> Instant {
        let since = at.saturating_duration_since(self.started);
        Instant::from_micros(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    /// How long the poll may sleep.
    fn patience(&mut self) -> Option<std::time::Duration> {
        let ticks = self.links.iter().filter_map(Link::wants_tick);
        let starved = self.starved.then_some(Clock::now() + STARVED);
        let host = ticks.chain(starved).min().map(|at| self.instant(at));
        let at = self.stack.poll_timeout().into_iter().chain(host).min();
        self.alarm.sleep_until(self.now, at)
    }

    fn note(&mut self, event: &mio::event::Event) {
        let Some((kind, n)) = kind_of(event.token()) else { return };
        match kind {
            Kind::Waker if event.token() == ALARM => self.alarm.rang(),
            Kind::Waker => self.answer_requests(),
            Kind::Link => {
                let n = n / Tokens::COUNT;
                if let Some(link) = self.links.get_mut(n) {
                    let was_up = link.is_up();
                    match link.note(event, self.poll.registry()) {
                        LinkState::Same => self.note_link_up(n, was_up),
                        LinkState::Gone => self.take_down(n),
                        LinkState::Restarted => self.restart(n),
                    }
                    self.welcome(n);
                }
            }
            Kind::Flow => {
                if let Some(Some(flow)) = self.flows.get_mut(n) {
                    flow.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
                    flow.writable |= event.is_writable();
                    flow.ending |= event.is_read_closed() || event.is_error();
                    let id = flow.id;
                    self.ready.push_back(id);
                }
            }
            Kind::Binding => self.udp.note(n, event.is_error()),
            Kind::Listener => {
                if let Some(Some(entrance)) = self.entrances.get_mut(n)
                    && !std::mem::replace(&mut entrance.ready, true)
                {
                    self.ready_entrances.push(n);
                }
            }
        }
    }

    /// Link `n` may have got a VMM.
    fn note_link_up(&mut self, n: usize, was_up: bool) {
        let Some(link) = self.links.get(n).filter(|l| !was_up && l.is_up()) else { return };
        self.stack.set_offloads(self.now, link.port, link.offloads());
        self.events.push(Event::LinkUp(link.label()));
    }

    fn tick_links(&mut self) {
        let now = Clock::now();
        for n in 0..self.links.len() {
            let was_up = self.links[n].is_up();
            match self.links[n].tick(now, self.poll.registry()) {
                LinkState::Gone => self.take_down(n),
                LinkState::Same | LinkState::Restarted => self.note_link_up(n, was_up),
            }
        }
    }

    /// Moves bytes until nothing moves, or its turns are over. True in the second case.
    fn pump(&mut self) -> bool {
        let mut busy = true;
        for _ in 0..TURNS {
            let mut moved = false;
            for n in 0..self.links.len() {
                let enough = self.links[n].counters().frames_from_guest + FRAMES;
                for _ in 0..READS {
                    if !self.receive(n) {
                        break;
                    }
                    moved = true;
                    if self.links[n].counters().frames_from_guest >= enough {
                        break;
                    }
                }
            }
            moved |= self.accept_all();
            moved |= self.receive_datagrams();
            while let Some(flow) = self.stack.poll_flow() {
                moved |= self.serve(flow);
            }
            for _ in 0..self.ready.len() {
                let Some(flow) = self.ready.pop_front() else { break };
                moved |= self.serve(flow);
            }
            moved |= self.run_commands();
            for n in 0..self.links.len() {
                moved |= self.transmit(n);
            }
            moved |= self.run_commands();
            if !moved && self.ready.is_empty() {
                busy = false;
                break;
            }
            self.tick();
        }
        if self.stack.leases_changed() {
            self.tell_leases();
        }
        busy
    }

    /// One batch of frames of link `n`.
    fn receive(&mut self, n: usize) -> bool {
        if !self.links[n].wants_receive() {
            return false;
        }
        // The link is taken out so that its frames can be copied into the others' buffers.
        let (before, rest) = self.links.split_at_mut(n);
        let Some((link, after)) = rest.split_first_mut() else { return false };
        let (stack, now, port) = (&mut self.stack, self.now, link.port);
        let (udp, slow, registry) = (&mut self.udp, &self.slow, self.poll.registry());
        let (entrances, backlog) = (&self.entrances, &self.backlog);
        let mut panicked = false;
        let mut take = |frame: &[u8], offload: portway_netstack::Offload| {
            crate::last_net::on_purpose(frame.get(42..).unwrap_or_default());
            let (whole, mut handled);
            handled = stack.handle_frame(now, port, frame);
            if let Handled::Whole(packet) = handled {
                whole = packet;
                handled = stack.handle_frame(now, port, &whole);
            }
            match handled {
                Handled::Done | Handled::Whole(_) => {}
                Handled::Echo(echo) => udp.ping(registry, &echo),
                Handled::Datagram(datagram) => udp.send_all(registry, &datagram, offload, entrances),
                Handled::Dns { guest, asked, query } => {
                    // At the limit the query is dropped: the guest asks again.
                    if let Some(waiting) = backlog.admit(port) {
                        let ticket = DnsTicket { guest, asked, port };
                        let _ = slow.try_send(Slow::Dns(ticket, query.to_vec(), waiting));
                    }
                }
                Handled::Forward(to) => {
                    for other in before.iter_mut().chain(after.iter_mut()) {
                        if matches!(to, Forward::Flood) || to == Forward::Port(other.port) {
                            let target = other.port;
                            if let Some(sink) = other.sink() {
                                stack.forward(now, (port, target), frame, offload, sink);
                            }
                        }
                    }
                }
            }
        };
        let state = link.receive(|frame, offload| {
            // What such a frame left half done is this link's, and goes with it; so do the frames behind it.
            panicked = panicked || crate::last_net::caught(|| take(frame, offload)).is_none();
        });
        udp.flush();
        self.tell_faults();
        if state == LinkState::Gone || panicked {
            self.take_down(n);
        } else if state == LinkState::Restarted {
            self.restart(n);
        } else if let Some(hello) = self.links[n].take_hello() {
            let answer = self.admit(hello);
            if let Ok(mac) = answer
                && let Some(old) =
                    (0..self.links.len()).find(|i| *i != n && self.links[*i].given() == Some(mac))
            {
                // A VM that comes again before its first connection ended is one VM: rootlesskit asks for its address on
                // a connection of its own.
                self.take_down(old);
            }
            if self.links[n].answer(answer) == LinkState::Gone {
                self.take_down(n);
            }
        }
        true
    }

    /// The MAC of a guest that came by a handshake, or why it may not come in.
    fn admit(&mut self, hello: crate::link::vpnkit::Hello) -> Result<Mac, String> {
        let uuid = hello.uuid.map(|u| String::from_utf8_lossy(&u).to_ascii_lowercase());
        let known = self.vpnkit_macs.iter().find(|(u, _)| uuid.as_ref() == Some(u));
        let mac = known.map_or_else(|| hello.mac(), |(_, mac)| *mac);
        if let Some(ip) = hello.address {
            self.stack.prefer_address(self.now, mac, ip).map_err(|e| e.to_string())?;
        }
        Ok(mac)
    }

    /// Makes links of the VMs that came to the listener of link `n`.
    fn welcome(&mut self, n: usize) {
        while let Some(fd) = self.links[n].take_arrival() {
            let Some(config) = self.link_configs.get(n).cloned() else { return };
            self.attach(&config, fd);
        }
    }

    /// Makes a link like `config` of a VM that came by `fd`. At the limit it is sent away.
    pub(super) fn attach(&mut self, config: &LinkConfig, fd: std::os::fd::OwnedFd) -> bool {
        {
            // The place of one that is gone, or a new one.
            let configured = self.link_configs.len();
            let place = (configured..self.links.len())
                .find(|i| self.links[*i].ended && self.links[*i].mtu() == config.mtu);
            if place.is_none() && self.links.len() - configured >= ARRIVALS {
                tracing::warn!(most = ARRIVALS, "too many VMs came by themselves: one was sent away");
                return false;
            }
            let index = place.unwrap_or(self.links.len());
            let port = match place {
                Some(i) => self.links[i].port,
                None => {
                    let isolate = config.isolate;
                    let port = PortConfig { name: None, mtu: config.mtu, address: None, isolate };
                    self.stack.add_port(self.now, port, Offloads::default())
                }
            };
            let tokens = Tokens { first: token(Kind::Link, index * Tokens::COUNT), step: 1 << TOKEN_SHIFT };
            match Link::arrived(config, port, tokens, fd, self.poll.registry()) {
                Ok(link) if index < self.links.len() => self.links[index] = link,
                Ok(link) => self.links.push(link),
                Err(error) => {
                    tracing::warn!(%error, "a VMM could not be attached");
                    return false;
                }
            }
            if !self.captures.is_empty() {
                self.tap_links();
            }
            self.note_link_up(index, false);
        }
        true
    }

    /// Writes link `n` until the stack has nothing more or the VMM takes no more.
    fn transmit(&mut self, n: usize) -> bool {
        let mut moved = false;
        loop {
            let link = &mut self.links[n];
            let port = link.port;
            let Some(sink) = link.sink() else { return moved };
            let wanted = self.stack.wants_transmit(port);
            let before = sink.written();
            let more = wanted && self.stack.poll_transmit(self.now, port, sink);
            // A carrier that writes at once has nothing waiting, and has moved all the same.
            moved |= sink.written() != before;
            match link.flush() {
                LinkState::Same => {}
                LinkState::Gone => {
                    self.take_down(n);
                    return true;
                }
                LinkState::Restarted => {
                    self.restart(n);
                    return true;
                }
            }
            if !more || link.is_blocked() {
                return moved;
            }
        }
    }

    /// Another guest is behind link `n` than before, or the same with other features.
    fn restart(&mut self, n: usize) {
        let (port, offloads) = (self.links[n].port, self.links[n].offloads());
        self.stack.port_down(port);
        self.stack.set_offloads(self.now, port, offloads);
    }

    fn take_down(&mut self, n: usize) {
        let link = &mut self.links[n];
        let label = link.label();
        self.stack.port_down(link.port);
        link.detach(self.poll.registry());
        self.events.push(Event::LinkDown(label));
        let configured = self.link_configs.get(n);
        if self.ends_with_vm && configured.is_some_and(|c| c.kind != LinkKind::Vpnkit) {
            self.ending = true;
        }
        self.note_link_up(n, false);
    }

    /// The transmit buffer of a port.
    fn sink(links: &mut [Link], port: PortId) -> Option<&mut Carrier> {
        links.iter_mut().find(|l| l.port == port).and_then(Link::sink)
    }

    /// Closes listeners, resets every flow, and lets the RSTs leave as far as the links take them.
    fn end(&mut self) {
        self.entrances.clear();
        self.stack.abort_all();
        for slot in &mut self.flows {
            if let Some(flow) = slot.take() {
                flow.stream.reset();
            }
        }
        for n in 0..self.links.len() {
            self.transmit(n);
            self.links[n].close();
        }
    }
}
