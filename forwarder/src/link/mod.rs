//! Links: how frames of a VMM come and go.
//!
//! ```text
//!  VMM ═ unix stream ═► read(2), large ─► receive buffer ─► one frame after the other, in place ─► Netstack
//!  VMM ◄═ write(2), many frames ═══════ transmit buffer ◄─ written in place by Netstack (FrameSink)
//! ```
//! A link reads and writes in batches: one system call for as many frames as there are. It never drops a frame of
//! ours; when the VMM does not read, [`TransmitBuffer`] is full and the stack waits.

pub mod qemu;
mod transmit;
pub mod vnet;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use portway_netstack::PortId;

use self::qemu::Framing;
pub use self::transmit::TransmitBuffer;
use crate::config::{LinkAddress, LinkConfig};
use crate::unix_path;

/// How long to wait before connecting again.
const RETRY: Duration = Duration::from_secs(1);

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
    address: LinkAddress,
    listener: Option<UnixListener>,
    stream: Option<UnixStream>,
    tokens: Tokens,
    framing: Framing,
    /// Where the stack writes frames to the guest.
    pub transmit: TransmitBuffer,
    readable: bool,
    writable: bool,
    /// When to connect again.
    retry_at: Option<Instant>,
    counters: LinkCounters,
    /// Whether nothing can attach any more.
    pub ended: bool,
}

/// The tokens of a link's two descriptors.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    /// Of the listener.
    pub listener: Token,
    /// Of the stream.
    pub stream: Token,
}

/// What an attempt to move bytes showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// The VMM is there, or none is expected now.
    Same,
    /// The VMM is gone; its port is to be taken down.
    Gone,
}

impl Link {
    /// Binds the listener, takes the descriptor over or makes the first attempt to connect.
    ///
    /// # Errors
    /// When the path cannot be bound, or the descriptor is not a stream socket.
    pub fn open(config: &LinkConfig, port: PortId, tokens: Tokens, registry: &Registry) -> io::Result<Self> {
        let mut link = Self {
            port,
            name: config.name.clone(),
            address: config.address.clone(),
            listener: None,
            stream: None,
            tokens,
            framing: Framing::new(),
            transmit: TransmitBuffer::new(),
            readable: false,
            writable: false,
            retry_at: None,
            counters: LinkCounters::default(),
            ended: false,
        };
        match &config.address {
            LinkAddress::Listen(path) => {
                let mut listener = UnixListener::from_std(unix_path::listen(path, 0o600)?);
                registry.register(&mut listener, tokens.listener, Interest::READABLE)?;
                link.listener = Some(listener);
            }
            LinkAddress::Connect(_) => link.connect(registry),
            LinkAddress::Fd(fd) => {
                let fd = crate::fd::inherit(*fd)?;
                link.attach(stream_of(fd)?, registry)?;
            }
        }
        Ok(link)
    }

    /// Whether a VMM is attached.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.stream.is_some()
    }

    /// The link's numbers.
    #[must_use]
    pub const fn counters(&self) -> LinkCounters {
        let mut counters = self.counters;
        (counters.frames_to_guest, counters.bytes_to_guest) = self.transmit.written();
        counters
    }

    fn attach(&mut self, mut stream: UnixStream, registry: &Registry) -> io::Result<()> {
        // More room in the kernel is fewer times the two sides wait for each other; the host's limit decides.
        let socket = socket2::SockRef::from(&stream);
        let _ = socket.set_send_buffer_size(4 << 20);
        let _ = socket.set_recv_buffer_size(4 << 20);
        registry.register(&mut stream, self.tokens.stream, Interest::READABLE | Interest::WRITABLE)?;
        self.stream = Some(stream);
        (self.readable, self.writable) = (true, true);
        tracing::info!(link = self.label(), "VMM attached");
        Ok(())
    }

    /// The link's name in logs.
    #[must_use]
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("link{}", self.port.0))
    }

    fn connect(&mut self, registry: &Registry) {
        let LinkAddress::Connect(path) = &self.address else { return };
        let result =
            std::os::unix::net::UnixStream::connect(path).and_then(|s| s.set_nonblocking(true).map(|()| s));
        match result.and_then(|s| self.attach(UnixStream::from_std(s), registry)) {
            Ok(()) => self.retry_at = None,
            Err(error) => {
                if self.retry_at.is_none() {
                    tracing::warn!(link = self.label(), %error, path = %self.path().display(), "cannot connect, trying every second");
                }
                self.retry_at = Some(Instant::now() + RETRY);
            }
        }
    }

    fn path(&self) -> &Path {
        match &self.address {
            LinkAddress::Listen(path) | LinkAddress::Connect(path) => path,
            LinkAddress::Fd(_) => Path::new(""),
        }
    }

    /// When `tick` has something to do.
    #[must_use]
    pub const fn wants_tick(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Connects again when it is time.
    pub fn tick(&mut self, now: Instant, registry: &Registry) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.connect(registry);
        }
    }

    /// The listener or stream has news.
    pub fn note(&mut self, token: Token, readable: bool, writable: bool, registry: &Registry) {
        if token == self.tokens.stream {
            self.readable |= readable;
            self.writable |= writable;
        } else {
            self.accept(registry);
        }
    }

    /// Takes the next VMM that waits, when none is attached: a second one waits and never disturbs the first.
    fn accept(&mut self, registry: &Registry) {
        while self.stream.is_none() {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.attach(stream, registry) {
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

    /// Whether `receive` may have frames.
    #[must_use]
    pub const fn wants_receive(&self) -> bool {
        self.readable && self.stream.is_some()
    }

    /// Reads one batch and hands every whole frame to `handle`, in place.
    pub fn receive(&mut self, handle: impl FnMut(&[u8], &mut TransmitBuffer)) -> LinkState {
        let Some(stream) = &mut self.stream else { return LinkState::Same };
        match self.framing.receive(stream, &mut self.transmit, handle) {
            Ok(batch) => {
                self.readable = batch.more;
                self.counters.frames_from_guest += batch.frames;
                self.counters.bytes_from_guest += batch.bytes;
                LinkState::Same
            }
            Err(error) => {
                tracing::info!(link = self.label(), reason = %error, "VMM detached");
                LinkState::Gone
            }
        }
    }

    /// Writes what the transmit buffer holds, as far as the VMM takes it.
    pub fn flush(&mut self) -> LinkState {
        let Some(stream) = &mut self.stream else {
            self.transmit.clear();
            return LinkState::Same;
        };
        while self.writable && !self.transmit.is_empty() {
            match io::Write::write(stream, self.transmit.pending()) {
                Ok(written) => {
                    let all = self.transmit.take(written);
                    self.writable = all;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) => {
                    tracing::info!(link = self.label(), reason = %error, "VMM detached");
                    return LinkState::Gone;
                }
            }
        }
        LinkState::Same
    }

    /// Whether the VMM has to read before more can be written.
    #[must_use]
    pub const fn is_blocked(&self) -> bool {
        !self.writable
    }

    /// Forgets the VMM and makes ready for the next one.
    pub fn detach(&mut self, registry: &Registry) {
        if let Some(mut stream) = self.stream.take() {
            let _ = registry.deregister(&mut stream);
        }
        self.framing = Framing::new();
        self.transmit.clear();
        (self.readable, self.writable) = (false, false);
        match &self.address {
            LinkAddress::Listen(_) => self.accept(registry),
            LinkAddress::Connect(_) => self.retry_at = Some(Instant::now()),
            LinkAddress::Fd(_) => self.ended = true,
        }
    }

    /// Removes the socket we listen on.
    pub fn close(&mut self) {
        if self.listener.take().is_some() {
            let _ = std::fs::remove_file(self.path());
        }
        self.stream = None;
    }
}

impl Drop for Link {
    /// A start that fails behind this link must not leave its socket.
    fn drop(&mut self) {
        self.close();
    }
}

fn stream_of(fd: OwnedFd) -> io::Result<UnixStream> {
    let kind = socket2::SockRef::from(&fd).r#type()?;
    if kind != socket2::Type::STREAM {
        return Err(io::Error::other("the descriptor is not a stream socket"));
    }
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    Ok(UnixStream::from_std(stream))
}
