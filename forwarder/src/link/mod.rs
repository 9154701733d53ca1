//! Links: how frames of a VMM come and go.
//!
//! ```text
//!            ┌─ Stream     qemu, vpnkit, stdio   lengths and frames on a byte stream
//!  Link ─ Carrier ─ Packets    dgram, seqpacket      a frame per datagram
//!    │       ├─ Tap        tap                   a virtio-net header and a frame per system call
//!    │       └─ VhostUser  vhost-user            descriptors in the guest's own memory
//!    └─ where the VMM is met: listener, connect and connect again, descriptor, device
//! ```
//! A [`Link`] knows how its VMM comes and goes; the [`Carrier`] knows how frames cross once it is there. Carriers read
//! and write in batches, hand frames to the stack in place and are the `FrameSink` it writes into. None ever drops
//! a TCP segment of ours: when the VMM does not read, the sink has no room, and the stack waits.

mod carrier;
pub mod framing;
pub mod packets;
pub mod stream;
#[cfg(target_os = "linux")]
pub mod tap;
pub mod tapped;
mod transmit;
#[cfg(target_os = "linux")]
pub mod vhost_user;
pub mod vnet;
pub mod vpnkit;

use std::io;
use std::net::Ipv4Addr;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use portway_netstack::{Mac, Offload, Offloads, PortId};

pub use self::carrier::{Batch, Carrier};
use self::framing::Prefix;
use self::packets::Packets;
use self::stream::Stream;
#[cfg(target_os = "linux")]
use self::tap::Tap;
use self::tapped::{Tapped, Taps};
pub use self::transmit::TransmitBuffer;
#[cfg(target_os = "linux")]
use self::vhost_user::VhostUser;
use self::vpnkit::Hello;
use crate::capture::Capture;
use crate::config::{LinkAddress, LinkConfig, LinkKind};
use crate::unix_path;

/// How long to wait before connecting again.
const RETRY: Duration = Duration::from_secs(1);

/// What the sandbox lets links do when a VMM comes or goes: see `unix_path` for what becomes of their sockets.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![
    SYS_accept4,
    #[cfg(target_arch = "x86_64")]
    SYS_unlink,
    SYS_unlinkat,
    // Files that stand for a guest's memory are asked for their size before they are mapped.
    SYS_fstat,
    SYS_lseek,
];

/// The numbers of one link since the start.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkCounters {
    /// Frames from the guest.
    pub frames_from_guest: u64,
    /// Bytes in those.
    pub bytes_from_guest: u64,
    /// Frames to the guest.
    pub frames_to_guest: u64,
    /// Bytes in those.
    pub bytes_to_guest: u64,
}

/// One link and the VMM attached to it, if any.
#[derive(Debug)]
pub struct Link {
    /// Its port of the switch.
    pub port: PortId,
    /// The VM's name.
    pub name: Option<String>,
    /// The address that is kept for it.
    pub ip: Option<Ipv4Addr>,
    kind: LinkKind,
    address: LinkAddress,
    listener: Option<socket2::Socket>,
    carrier: Option<Carrier>,
    tokens: Tokens,
    /// When to connect again.
    retry_at: Option<Instant>,
    counters: LinkCounters,
    mtu: u16,
    /// Sums and segments are left to us, and no header says so.
    implied: bool,
    /// The MAC given in a handshake.
    given: Option<Mac>,
    /// Who came to a listener for several VMs while this link had one.
    arrivals: Vec<OwnedFd>,
    /// What is watched of a vhost-user front end beside its socket.
    #[cfg(target_os = "linux")]
    kicks: Vec<RawFd>,
    /// Who looks at the frames.
    taps: Option<Taps>,
    /// Whether nothing can attach any more.
    pub ended: bool,
}

/// The tokens of a link's descriptors.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    /// Of the listener.
    pub first: Token,
    /// Between one token and the next.
    pub step: usize,
}

impl Tokens {
    /// Tokens a link may use.
    pub const COUNT: usize = 16;
    const LISTENER: usize = 0;
    /// The carrier's descriptor, or the one it reads.
    const MAIN: usize = 1;
    /// The one it writes, where that is another.
    const WRITE: usize = 2;
    /// The first of those on which a guest tells of news in its rings.
    #[cfg(target_os = "linux")]
    const KICK: usize = 3;

    const fn get(self, n: usize) -> Token {
        Token(self.first.0 + n * self.step)
    }
}

/// What became of a link's VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// The VMM is there, or none is expected now.
    Same,
    /// The VMM is gone; its port is to be taken down.
    Gone,
    /// The guest's driver started anew and may take other frames than before.
    Restarted,
}

impl Link {
    /// Binds the listener, takes the descriptor over, opens the device or makes the first attempt to connect.
    ///
    /// # Errors
    /// When the path cannot be bound, the descriptor is of another kind, or the device cannot be had.
    pub fn open(config: &LinkConfig, port: PortId, tokens: Tokens, registry: &Registry) -> io::Result<Self> {
        let mut link = Self::new(config, port, tokens);
        match &config.address {
            LinkAddress::Listen(path) if config.kind == LinkKind::Dgram => {
                link.attach(Carrier::Packets(Box::new(Packets::bound(path)?)), registry)?;
            }
            LinkAddress::Listen(path) => {
                link.listen_on(unix_path::listen_as(path, 0o600, socket_type(config.kind))?, registry)?;
            }
            LinkAddress::Connect(_) => link.connect(registry),
            LinkAddress::Fd(fd) => link.adopt(crate::fd::inherit(*fd)?, registry)?,
            LinkAddress::Held(socket) => link.adopt(socket.try_clone()?, registry)?,
            LinkAddress::Activated(name) => {
                let fault = || {
                    let text = format!(
                        "fd:{name}: nobody passed a socket of this name (systemd's FileDescriptorName=)"
                    );
                    io::Error::new(io::ErrorKind::NotFound, text)
                };
                link.adopt(crate::fd::activated(name)?.ok_or_else(fault)?, registry)?;
            }
            LinkAddress::Stdio => {
                let stdio = |fd| crate::fd::inherit(fd);
                let stream = Stream::pipes(stdio(0)?, stdio(1)?, Prefix::Le16)?;
                link.attach(Carrier::Stream(Box::new(stream)), registry)?;
            }
            #[cfg(target_os = "linux")]
            LinkAddress::Tap { name, namespace, setup } => {
                let tap = Tap::open(name, namespace.as_ref(), setup.as_ref())?;
                link.attach(Carrier::Tap(Box::new(tap)), registry)?;
            }
        }
        Ok(link)
    }

    /// One more VM that came to the listener of a link like `config`.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn arrived(
        config: &LinkConfig,
        port: PortId,
        tokens: Tokens,
        fd: OwnedFd,
        registry: &Registry,
    ) -> io::Result<Self> {
        let config = LinkConfig { address: LinkAddress::Fd(-1), name: None, ..config.clone() };
        let mut link = Self::new(&config, port, tokens);
        link.attach_socket(fd, registry)?;
        Ok(link)
    }

    /// The place of a link that could not be made.
    #[must_use]
    pub fn none(config: &LinkConfig, port: PortId, tokens: Tokens) -> Self {
        let mut link = Self::new(config, port, tokens);
        link.ended = true;
        link
    }

    fn new(config: &LinkConfig, port: PortId, tokens: Tokens) -> Self {
        Self {
            port,
            name: config.name.clone(),
            ip: config.ip,
            kind: config.kind,
            address: config.address.clone(),
            listener: None,
            carrier: None,
            tokens,
            retry_at: None,
            counters: LinkCounters::default(),
            mtu: config.mtu,
            implied: config.offload,
            given: None,
            arrivals: Vec::new(),
            #[cfg(target_os = "linux")]
            kicks: Vec::new(),
            taps: None,
            ended: false,
        }
    }

    /// Whether a VMM is attached.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.carrier.is_some()
    }

    /// The kind of link, as it is typed.
    #[must_use]
    pub const fn kind(&self) -> LinkKind {
        self.kind
    }

    /// Where the stack writes frames to the guest, when a VMM is attached.
    pub const fn sink(&mut self) -> Option<&mut Carrier> {
        self.carrier.as_mut()
    }

    /// Whether the guest takes segments and checksums that are not finished.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        if self.implied {
            // Without a header nothing says where to cut datagrams.
            return Offloads { tcp: true, udp: false };
        }
        self.carrier.as_ref().map(Carrier::offloads).unwrap_or_default()
    }

    /// The link's numbers.
    #[must_use]
    pub fn counters(&self) -> LinkCounters {
        let (frames, bytes) = self.carrier.as_ref().map_or((0, 0), Carrier::written);
        let mut counters = self.counters;
        counters.frames_to_guest += frames;
        counters.bytes_to_guest += bytes;
        counters
    }

    /// The link's name in logs.
    #[must_use]
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("link{}", self.port.0))
    }

    /// The address as it is typed.
    #[must_use]
    pub const fn address(&self) -> &LinkAddress {
        &self.address
    }

    /// The largest IP packet.
    #[must_use]
    pub const fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Lets `captures` look at the frames from now on, and nobody else.
    pub fn tap(&mut self, captures: Vec<Arc<Capture>>) {
        let link = self.label().into();
        self.taps = (!captures.is_empty()).then_some(Taps { link, captures });
        if let Some(carrier) = self.carrier.take().map(Carrier::untapped) {
            self.carrier = Some(match &self.taps {
                Some(taps) => Carrier::Tapped(Box::new(Tapped::new(carrier, taps.clone()))),
                None => carrier,
            });
        }
    }

    // ---- how a VMM comes and goes ----

    fn listen_on(&mut self, listener: socket2::Socket, registry: &Registry) -> io::Result<()> {
        let raw = listener.as_raw_fd();
        registry.register(&mut SourceFd(&raw), self.tokens.get(Tokens::LISTENER), Interest::READABLE)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Takes a socket over: one that listens, or one with a VMM at its other end.
    fn adopt(&mut self, fd: OwnedFd, registry: &Registry) -> io::Result<()> {
        if !nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::AcceptConn).unwrap_or(false) {
            return self.attach_socket(fd, registry);
        }
        let listener = socket2::Socket::from(fd);
        listener.set_nonblocking(true)?;
        self.listen_on(listener, registry)
    }

    fn attach_socket(&mut self, fd: OwnedFd, registry: &Registry) -> io::Result<()> {
        let carrier = match self.kind {
            LinkKind::Qemu => Carrier::Stream(Box::new(Stream::socket(fd, Prefix::Be32)?)),
            LinkKind::Stdio => Carrier::Stream(Box::new(Stream::socket(fd, Prefix::Le16)?)),
            #[cfg(target_os = "linux")]
            LinkKind::VhostUser => {
                let stream = std::os::unix::net::UnixStream::from(fd);
                Carrier::VhostUser(Box::new(VhostUser::new(stream, self.mtu)?))
            }
            LinkKind::Vpnkit => Carrier::Stream(Box::new(Stream::socket(fd, Prefix::Le16)?.greeted())),
            LinkKind::Dgram => Carrier::Packets(Box::new(Packets::connected(fd, socket2::Type::DGRAM)?)),
            #[cfg(target_os = "linux")]
            LinkKind::Seqpacket => {
                Carrier::Packets(Box::new(Packets::connected(fd, socket2::Type::SEQPACKET)?))
            }
            LinkKind::Tap => return Err(io::ErrorKind::Unsupported.into()),
        };
        self.attach(carrier, registry)
    }

    fn attach(&mut self, carrier: Carrier, registry: &Registry) -> io::Result<()> {
        let (main, write) = carrier.fds();
        let both = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut SourceFd(&main), self.tokens.get(Tokens::MAIN), both)?;
        if let Some(fd) = write {
            registry.register(&mut SourceFd(&fd), self.tokens.get(Tokens::WRITE), Interest::WRITABLE)?;
        }
        self.carrier = Some(match &self.taps {
            Some(taps) => Carrier::Tapped(Box::new(Tapped::new(carrier, taps.clone()))),
            None => carrier,
        });
        tracing::info!(link = self.label(), "VMM attached");
        Ok(())
    }

    fn connect(&mut self, registry: &Registry) {
        let LinkAddress::Connect(path) = &self.address else { return };
        match dial(path, socket_type(self.kind)).and_then(|s| self.attach_socket(s.into(), registry)) {
            Ok(()) => self.retry_at = None,
            Err(error) => {
                if self.retry_at.is_none() {
                    tracing::warn!(link = self.label(), %error, address = %self.address, "cannot connect, trying every second");
                }
                self.retry_at = Some(Instant::now() + RETRY);
            }
        }
    }

    /// When `tick` has something to do.
    #[must_use]
    pub fn wants_tick(&self) -> Option<Instant> {
        match self.carrier.as_ref().map(Carrier::bare) {
            #[cfg(target_os = "linux")]
            Some(Carrier::VhostUser(front_end)) => front_end.wants_look(),
            _ => self.retry_at,
        }
    }

    /// Does what it is time for: connects again, looks at rings again.
    pub fn tick(&mut self, now: Instant, registry: &Registry) -> LinkState {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.connect(registry);
        }
        match self.carrier.as_mut().map(Carrier::bare_mut) {
            #[cfg(target_os = "linux")]
            Some(Carrier::VhostUser(front_end)) if front_end.wants_look().is_some_and(|at| at <= now) => {
                let looked = front_end.look_again();
                looked.map_or_else(|error| self.lost(&error), |()| LinkState::Same)
            }
            _ => LinkState::Same,
        }
    }

    /// One of the link's descriptors has news.
    pub fn note(&mut self, event: &Event, registry: &Registry) -> LinkState {
        let token = event.token();
        if token == self.tokens.get(Tokens::LISTENER) {
            self.accept(registry);
            return LinkState::Same;
        }
        match self.carrier.as_mut().map(Carrier::bare_mut) {
            None => LinkState::Same,
            #[cfg(target_os = "linux")]
            Some(Carrier::VhostUser(front_end)) => {
                if token != self.tokens.get(Tokens::MAIN) {
                    front_end.note_kick(usize::from(token != self.tokens.get(Tokens::KICK)));
                    return LinkState::Same;
                }
                let noted = self.listen_to_front_end(registry);
                noted.unwrap_or_else(|error| self.lost(&error))
            }
            Some(carrier) => {
                let closed = event.is_error() || event.is_read_closed();
                carrier.note(event.is_readable(), event.is_writable(), closed);
                LinkState::Same
            }
        }
    }

    /// Handles a front end's messages, and watches the descriptors it has given for its rings and no others.
    #[cfg(target_os = "linux")]
    fn listen_to_front_end(&mut self, registry: &Registry) -> io::Result<LinkState> {
        let mut state = LinkState::Same;
        loop {
            let Some(Carrier::VhostUser(front_end)) = self.carrier.as_mut().map(Carrier::bare_mut) else {
                return Ok(state);
            };
            let changes = front_end.handle_control()?;
            if changes.device {
                state = LinkState::Restarted;
            }
            if changes.kicks {
                let kicks: Vec<(usize, RawFd)> = front_end.kick_fds().collect();
                self.forget_kicks(registry);
                for (queue, fd) in kicks {
                    let token = self.tokens.get(Tokens::KICK + queue);
                    registry.register(&mut SourceFd(&fd), token, Interest::READABLE)?;
                    self.kicks.push(fd);
                }
            }
            if !changes.more {
                return Ok(state);
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn forget_kicks(&mut self, registry: &Registry) {
        for fd in self.kicks.drain(..) {
            let _ = registry.deregister(&mut SourceFd(&fd));
        }
    }

    /// Takes the next VMM that waits, when none is attached: a second one waits and never disturbs the first.
    /// On a listener for several VMs it goes to [`Self::take_arrival`].
    fn accept(&mut self, registry: &Registry) {
        while self.carrier.is_none() || self.kind == LinkKind::Vpnkit {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) if self.carrier.is_some() => self.arrivals.push(stream.into()),
                Ok((stream, _)) => {
                    if let Err(error) = self.attach_socket(OwnedFd::from(stream), registry) {
                        tracing::warn!(link = self.label(), %error, "a VMM could not be attached");
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(link = self.label(), %error, "cannot accept a VMM");
                    return;
                }
            }
        }
    }

    /// A further VM that came to this link's listener.
    pub fn take_arrival(&mut self) -> Option<OwnedFd> {
        self.arrivals.pop()
    }

    /// Who has come in by a handshake and waits for [`Self::answer`].
    pub fn take_hello(&mut self) -> Option<Hello> {
        match self.carrier.as_mut().map(Carrier::bare_mut) {
            Some(Carrier::Stream(stream)) => stream.take_hello(),
            _ => None,
        }
    }

    /// Answers a [`Hello`]: the guest's MAC, or why it may not come in.
    pub fn answer(&mut self, answer: Result<Mac, String>) -> LinkState {
        let (mtu, label) = (self.mtu, self.label());
        let Some(Carrier::Stream(stream)) = self.carrier.as_mut().map(Carrier::bare_mut) else {
            return LinkState::Same;
        };
        match answer {
            Ok(mac) => {
                self.given = Some(mac);
                stream.answer(&vpnkit::accept(mac, mtu));
                LinkState::Same
            }
            Err(reason) => {
                stream.answer(&vpnkit::refuse(&reason));
                let _ = stream.flush();
                tracing::warn!(link = label, reason, "a VM was refused");
                LinkState::Gone
            }
        }
    }

    /// The MAC that the VMM was given in a handshake.
    #[must_use]
    pub const fn given(&self) -> Option<Mac> {
        self.given
    }

    /// Forgets the VMM and makes ready for the next one.
    pub fn detach(&mut self, registry: &Registry) {
        self.counters = self.counters();
        self.given = None;
        #[cfg(target_os = "linux")]
        self.forget_kicks(registry);
        if let Some(carrier) = self.carrier.take() {
            let (main, write) = carrier.fds();
            for fd in std::iter::once(main).chain(write) {
                let _ = registry.deregister(&mut SourceFd(&fd));
            }
        }
        match &self.address {
            LinkAddress::Listen(_) => self.accept(registry),
            LinkAddress::Connect(_) => self.retry_at = Some(Instant::now()),
            LinkAddress::Fd(_) | LinkAddress::Activated(_) | LinkAddress::Held(_)
                if self.listener.is_some() =>
            {
                self.accept(registry);
            }
            LinkAddress::Fd(_) | LinkAddress::Activated(_) | LinkAddress::Held(_) | LinkAddress::Stdio => {
                self.ended = true;
            }
            #[cfg(target_os = "linux")]
            LinkAddress::Tap { .. } => self.ended = true,
        }
    }

    /// Removes the socket we listen on.
    pub fn close(&mut self) {
        if self.listener.take().is_some()
            && let LinkAddress::Listen(path) = &self.address
        {
            let _ = std::fs::remove_file(path);
        }
        self.carrier = None;
    }

    /// Ends the link for good: nobody can attach any more, and its socket is gone.
    pub fn remove(&mut self, registry: &Registry) {
        if self.listener.take().is_some()
            && let LinkAddress::Listen(path) = &self.address
        {
            let _ = std::fs::remove_file(path);
        }
        self.detach(registry);
        self.retry_at = None;
        self.ended = true;
    }

    // ---- frames ----

    /// Whether `receive` may have frames.
    #[must_use]
    pub fn wants_receive(&self) -> bool {
        self.carrier.as_ref().is_some_and(Carrier::wants_receive)
    }

    /// Reads one batch and hands every whole frame to `handle`, in place.
    pub fn receive(&mut self, mut handle: impl FnMut(&[u8], Offload) -> ControlFlow<()>) -> LinkState {
        let Some(carrier) = &mut self.carrier else { return LinkState::Same };
        let (implied, mtu) = (self.implied, self.mtu);
        match carrier.receive(|frame, offload| {
            let offload = if implied { portway_netstack::segments::implied(frame, mtu) } else { offload };
            handle(frame, offload)
        }) {
            Ok(batch) => {
                self.counters.frames_from_guest += batch.frames;
                self.counters.bytes_from_guest += batch.bytes;
                if peer_went(carrier) { LinkState::Restarted } else { LinkState::Same }
            }
            Err(error) => self.lost(&error),
        }
    }

    /// Brings what the stack wrote to the VMM, as far as that takes it.
    pub fn flush(&mut self) -> LinkState {
        let Some(carrier) = &mut self.carrier else { return LinkState::Same };
        match carrier.flush() {
            Ok(()) if peer_went(carrier) => LinkState::Restarted,
            Ok(()) => LinkState::Same,
            Err(error) => self.lost(&error),
        }
    }

    fn lost(&self, error: &io::Error) -> LinkState {
        tracing::info!(link = self.label(), reason = %error, "VMM detached");
        LinkState::Gone
    }

    /// Whether the VMM has to read before more can be written.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.carrier.as_ref().is_some_and(Carrier::is_blocked)
    }
}

/// The type of socket on which frames of `kind` travel.
const fn socket_type(kind: LinkKind) -> socket2::Type {
    match kind {
        LinkKind::Dgram => socket2::Type::DGRAM,
        #[cfg(target_os = "linux")]
        LinkKind::Seqpacket => socket2::Type::SEQPACKET,
        _ => socket2::Type::STREAM,
    }
}

/// Connects to the VMM's socket at `path`.
fn dial(path: &std::path::Path, kind: socket2::Type) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, kind, None)?;
    if kind == socket2::Type::DGRAM {
        // With a name of ours, which the kernel makes up, or the VMM could not answer.
        #[cfg(target_os = "linux")]
        nix::sys::socket::bind(socket.as_raw_fd(), &nix::sys::socket::UnixAddr::new_unnamed())?;
        // Only Linux's kernel makes one up.
        #[cfg(not(target_os = "linux"))]
        return Err(io::ErrorKind::Unsupported.into());
    }
    socket.connect(&socket2::SockAddr::unix(path)?)?;
    Ok(socket)
}

impl Drop for Link {
    /// A start that fails behind this link must not leave its socket.
    fn drop(&mut self) {
        self.close();
    }
}
/// Whether the peer of a socket without connections went, so that another may come in its place.
fn peer_went(carrier: &mut Carrier) -> bool {
    match carrier.bare_mut() {
        #[cfg(target_os = "linux")]
        Carrier::Packets(p) => p.take_lost(),
        _ => false,
    }
}
