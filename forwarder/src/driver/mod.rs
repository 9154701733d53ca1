//! The data thread: one loop around links, host sockets and the `Netstack`.
//!
//! ```text
//!  epoll ─► events set flags ─► pump: frames in ─► flows: host writes, host reads ─► frames out ─► again, until still
//! ```
//! Everything is edge-triggered and every readiness is a flag that only `EWOULDBLOCK` (or a short read) clears, so a
//! wake can be late but never lost. The [`pump`] moves bytes until nothing moves, or a link has had its share; then it sleeps
//! until an event or the stack's next timer.
//!
//! There is no lock, no channel of buffers and no allocation per packet. Slow things happen in the control thread; they
//! come in as [`Request`]s and go out as [`Slow`]s.

mod alarm;
mod arrivals;
mod backlog;
mod binding;
mod commands;
mod flows;
pub(crate) mod join;
mod names;
mod ping;
pub(crate) mod pump;
mod requests;
mod udp;

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc;
use std::time::Instant as Clock;

use mio::{Events, Poll, Token};
use portway_netstack::{FlowId, Instant, Mac, Netstack, Offloads, PortConfig, PortId, StackConfig};

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
    known_leases: Vec<(std::net::IpAddr, Mac)>,
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
        // A tap and a descriptor that was handed over are there from the start.
        for link in self.links.iter().filter(|l| l.is_up()) {
            self.events.push(Event::LinkUp(link.label()));
        }
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
