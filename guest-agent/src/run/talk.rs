//! The control stream: what the agent and the host tell each other.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::unistd::{read, write};
use portway_api::agent::{
    Decoder, Hello, LISTENERS_PER_MESSAGE, Listener, PROTOCOL, Part, ToGuest, ToHost, Welcome, encode,
    kind_of, parse,
};

use super::{Agent, FIRST_RETRY, GuestSocket, LAST_RETRY, READY_TICK, Token, listen_at, watch};
use crate::console::say;
use crate::listeners::Delta;
use crate::{clock, dial};

/// How long the host may take to take the connection, and to answer the hello.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes for the host that may wait; beyond it the session ends, since the host does not read.
const OUTGOING: usize = 4 << 20;
/// Bytes read at once.
const READ: usize = 16 * 1024;

/// How it stands with the host.
#[derive(Debug)]
pub(super) enum Talk {
    /// Not connected.
    Away { retry: Instant, pause: Duration },
    /// Connected, or on the way to it; nothing heard yet.
    Greeting { stream: Stream, deadline: Instant },
    /// A session.
    Open { stream: Stream, welcome: Welcome },
}

/// The stream and what is under way on it.
#[derive(Debug)]
pub(super) struct Stream {
    fd: OwnedFd,
    decoder: Decoder,
    outgoing: Vec<u8>,
    connected: bool,
}

impl Talk {
    pub(super) const fn away(now: Instant) -> Self {
        Self::Away { retry: now, pause: FIRST_RETRY }
    }

    fn stream(&mut self) -> Option<&mut Stream> {
        match self {
            Self::Away { .. } => None,
            Self::Greeting { stream, .. } | Self::Open { stream, .. } => Some(stream),
        }
    }

    pub(super) const fn welcome(&self) -> Option<&Welcome> {
        match self {
            Self::Open { welcome, .. } => Some(welcome),
            _ => None,
        }
    }
}

impl Stream {
    /// Writes what waits, as far as it is taken.
    fn flush(&mut self) -> nix::Result<()> {
        while self.connected && !self.outgoing.is_empty() {
            match write(&self.fd, &self.outgoing) {
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

impl Agent {
    pub(super) fn next_talk(&self) -> Option<Instant> {
        match &self.talk {
            Talk::Away { retry, .. } => Some(*retry),
            Talk::Greeting { deadline, .. } => Some(*deadline),
            Talk::Open { welcome, .. } => {
                let look = welcome.listeners.then(|| self.watch.next());
                let ready = (!self.ready).then(|| Instant::now() + READY_TICK);
                look.into_iter().chain(ready).min()
            }
        }
    }

    pub(super) fn tick_talk(&mut self, now: Instant) {
        match &self.talk {
            Talk::Away { retry, .. } if *retry <= now => self.approach(now),
            Talk::Greeting { deadline, .. } if *deadline <= now => self.part("the host does not answer"),
            Talk::Open { welcome, .. } => {
                if welcome.listeners && self.watch.next() <= now {
                    self.look(now);
                }
                if !self.ready && has_address() {
                    self.ready = true;
                    self.tell(&ToHost::Ready);
                }
            }
            _ => {}
        }
    }

    /// Begins a connection to the host.
    fn approach(&mut self, now: Instant) {
        let began = dial::host(&self.options.host).map_err(io::Error::from);
        let watched = began.and_then(|fd| watch(&self.epoll, &fd, Token::Host, true).map(|()| fd));
        match watched {
            Ok(fd) => {
                let stream =
                    Stream { fd, decoder: Decoder::default(), outgoing: Vec::new(), connected: false };
                self.talk = Talk::Greeting { stream, deadline: now + PATIENCE };
                self.tell(&ToHost::Hello(hello()));
            }
            Err(error) => self.part_quietly(&error.to_string()),
        }
    }

    /// The session, or the attempt at one, is over.
    fn part(&mut self, reason: &str) {
        let was_open = matches!(self.talk, Talk::Open { .. });
        if was_open {
            say(&format!("the host is gone ({reason}); trying again"));
        }
        self.part_quietly(reason);
    }

    fn part_quietly(&mut self, reason: &str) {
        let pause = match &self.talk {
            Talk::Away { pause, .. } => (*pause * 2).min(LAST_RETRY),
            Talk::Greeting { .. } => LAST_RETRY,
            Talk::Open { .. } => FIRST_RETRY,
        };
        self.talk = Talk::Away { retry: Instant::now() + pause, pause };
        self.ready = false;
        self.sockets.clear();
        self.end_flows();
        self.fail_clients(reason);
    }

    /// Says something to the host, or nothing when there is none.
    pub(super) fn tell(&mut self, message: &ToHost) {
        let Some(stream) = self.talk.stream() else { return };
        match encode(message) {
            Ok(bytes) => stream.outgoing.extend_from_slice(&bytes),
            // Only what a local client wrote can be too long, and that was checked.
            Err(error) => return say(&format!("not told to the host: {error}")),
        }
        let fault = match stream.flush() {
            Ok(()) if stream.outgoing.len() <= OUTGOING => return,
            Ok(()) => "it does not read".to_owned(),
            Err(errno) => errno.desc().to_owned(),
        };
        self.part(&fault);
    }

    /// Something has happened on the control stream.
    pub(super) fn hear_host(&mut self) {
        let Some(stream) = self.talk.stream() else { return };
        if !stream.connected {
            match dial::outcome(&stream.fd) {
                Ok(connected) => stream.connected = connected,
                Err(errno) => return self.part_quietly(errno.desc()),
            }
        }
        if !stream.connected {
            return;
        }
        if let Err(errno) = stream.flush() {
            return self.part(errno.desc());
        }
        let mut buffer = [0; READ];
        loop {
            let Some(stream) = self.talk.stream() else { return };
            let read = match read(&stream.fd, &mut buffer) {
                Ok(0) => return self.part("it ended the session"),
                Ok(n) => n,
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => continue,
                Err(errno) => return self.part(errno.desc()),
            };
            stream.decoder.feed(buffer.get(..read).unwrap_or_default());
            while let Some(stream) = self.talk.stream() {
                match stream.decoder.message() {
                    Ok(None) => break,
                    Ok(Some(bytes)) => match parse::<ToGuest>(bytes) {
                        Ok(ToGuest::Other) => {
                            let kind = kind_of(bytes);
                            self.tell(&ToHost::Unknown { kind });
                        }
                        Ok(message) => self.heed(message),
                        Err(error) => self.part(&error.to_string()),
                    },
                    Err(error) => self.part(&error.to_string()),
                }
            }
        }
    }

    fn heed(&mut self, message: ToGuest) {
        match message {
            ToGuest::Welcome(welcome) => self.begin(welcome),
            ToGuest::Bye { reason, stay_away } => {
                say(&format!("the host says good-bye: {reason}"));
                self.unwanted = stay_away;
                self.part_quietly(&reason);
                if let Talk::Away { retry, pause } = &mut self.talk {
                    (*retry, *pause) = (Instant::now() + LAST_RETRY, LAST_RETRY);
                }
            }
            ToGuest::Open { stream, key, target } => self.open(stream, key, &target),
            ToGuest::Reset { stream } => self.reset(stream),
            ToGuest::Done { id, ports, errors } => self.done(id, ports, errors),
            ToGuest::Ports { id, ports, more } => self.list(id, ports, more),
            ToGuest::Refused { listener, reason } => say(&format!("{listener} is not published: {reason}")),
            ToGuest::Time { unix_us } => self.set_clock(unix_us),
            ToGuest::Unknown { kind } => say(&format!("the host does not know {kind:?}")),
            ToGuest::Other => {}
        }
    }

    /// The session has begun: everything is said anew.
    fn begin(&mut self, welcome: Welcome) {
        let Talk::Greeting { .. } = self.talk else { return };
        if welcome.protocol != PROTOCOL {
            return self.part(&format!(
                "it speaks version {} of the protocol, this agent {PROTOCOL}",
                welcome.protocol
            ));
        }
        let away = Talk::Away { retry: Instant::now(), pause: FIRST_RETRY };
        if let Talk::Greeting { stream, .. } = std::mem::replace(&mut self.talk, away) {
            say(&format!("session with {} (portway {})", self.options.host, welcome.host));
            self.talk = Talk::Open { stream, welcome };
        }
        self.make_sockets();
        self.publish_again();
        if self.talk.welcome().is_some_and(|w| w.listeners) {
            self.tell_all();
        }
    }

    /// Listens on the unix sockets the host wants.
    fn make_sockets(&mut self) {
        let paths = self.talk.welcome().map(|w| w.sockets.clone()).unwrap_or_default();
        for (n, path) in (0u32..).zip(paths) {
            let made = listen_at(path.as_ref(), 0o600).and_then(|listener| {
                watch(&self.epoll, &listener, Token::Socket(n), false).map(|()| listener)
            });
            match made {
                Ok(listener) => self.sockets.push(GuestSocket { listener, path: path.into(), place: n }),
                Err(error) => say(&format!("a socket the host wants here: {error}")),
            }
        }
    }

    /// A snapshot of what listens.
    fn tell_all(&mut self) {
        if let Err(error) = self.watch.look(Instant::now()) {
            say(&format!("listeners cannot be seen: {error}"));
        }
        let known = self.watch.known();
        let parts: Vec<&[Listener]> = match known.is_empty() {
            true => vec![&[]],
            false => known.chunks(LISTENERS_PER_MESSAGE).collect(),
        };
        let last = parts.len() - 1;
        for (n, chunk) in parts.into_iter().enumerate() {
            let part = match (n == 0, n == last) {
                (true, true) => Part::Whole,
                (true, false) => Part::First,
                (false, true) => Part::Last,
                (false, false) => Part::Middle,
            };
            self.tell(&ToHost::Listeners { part, added: chunk.to_vec(), removed: Vec::new() });
        }
    }

    fn look(&mut self, now: Instant) {
        match self.watch.look(now) {
            Ok(Delta { added, removed }) => {
                for chunk in removed.chunks(LISTENERS_PER_MESSAGE) {
                    let removed = chunk.to_vec();
                    self.tell(&ToHost::Listeners { part: Part::Delta, added: Vec::new(), removed });
                }
                for chunk in added.chunks(LISTENERS_PER_MESSAGE) {
                    let added = chunk.to_vec();
                    self.tell(&ToHost::Listeners { part: Part::Delta, added, removed: Vec::new() });
                }
            }
            Err(error) => say(&format!("listeners cannot be seen: {error}")),
        }
    }

    fn set_clock(&mut self, unix_us: u64) {
        let behind_ms = clock::behind_ms(unix_us, SystemTime::now());
        if !self.options.clock || !clock::is_off(behind_ms) {
            return;
        }
        let set = clock::set(unix_us);
        match set {
            Ok(()) => say(&format!("the clock was {behind_ms} ms behind and is set")),
            Err(errno) => {
                say(&format!("the clock is {behind_ms} ms behind and cannot be set: {}", errno.desc()));
                // Asked once: a right that is missing now is missing in ten seconds.
                self.options.clock = false;
            }
        }
        let error = set.err().map(|errno| errno.desc().to_owned());
        self.tell(&ToHost::Clock { behind_ms, set: error.is_none(), error });
    }
}

fn hello() -> Hello {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Hello {
        protocol: PROTOCOL,
        agent: env!("CARGO_PKG_VERSION").into(),
        boot_id: boot_id.trim().into(),
        capabilities: ["tcp", "udp", "unix", "sockets", "clock"].map(str::to_owned).to_vec(),
    }
}

/// Whether the guest has an address beside its loopback, or no device that could have one.
fn has_address() -> bool {
    let Ok(addresses) = nix::ifaddrs::getifaddrs() else { return true };
    let mut devices = false;
    for at in addresses.filter(|a| !a.interface_name.eq("lo")) {
        devices = true;
        let address = at.address.as_ref();
        let v4 = address.and_then(|a| a.as_sockaddr_in()).is_some_and(|a| !a.ip().is_link_local());
        // fe80::/10 is there before anybody has given an address.
        let v6 = address
            .and_then(|a| a.as_sockaddr_in6())
            .is_some_and(|a| a.ip().segments()[0] & 0xffc0 != 0xfe80);
        if v4 || v6 {
            return true;
        }
    }
    !devices
}
