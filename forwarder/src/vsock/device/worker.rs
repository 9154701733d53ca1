//! The device's thread: the VMM's connection, the kicks of its rings, the sockets of streams.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::Dial;
use super::arrivals::Arrivals;
use super::packet::{LEN, PAYLOAD};
use super::rings::{EVENTS, PACKETS, Posted, RINGS, TO_GUEST, TO_HOST, ToGuest, put_transport_reset, split};
use super::streams::Streams;
use crate::vhost_user::{Device, FromGuest, FrontEnd, Taken};

const WAKER: Token = Token(0);
const LISTENER: Token = Token(1);
const CONTROL: Token = Token(2);
const KICKS: usize = 3;
/// Tokens from here on are streams'.
const SOCKETS: usize = 16;
/// Events of one turn.
const EVENTS_AT_ONCE: usize = 256;
/// How long after something moved it is looked whether guest and device wait for each other; see
/// [`crate::link::vhost_user::VhostUser::look_again`] for why.
const LOOK: Duration = Duration::from_millis(1);

/// The thread's own.
#[derive(Debug)]
pub(super) struct Worker {
    poll: Poll,
    events: Events,
    listener: UnixListener,
    cid: u32,
    dials: Receiver<Dial>,
    pub(super) front: Option<FrontEnd<Posted, RINGS>>,
    from_guest: FromGuest,
    pub(super) streams: Streams,
    kicks: [Option<RawFd>; RINGS],
    /// Streams that the guest may believe in are none of ours, and it has not been told.
    strangers: bool,
    /// The next turn does not wait.
    busy: bool,
    look_at: Option<Instant>,
}

impl Worker {
    /// Serves VMMs that connect to `listener`, one at a time.
    pub(super) fn new(
        listener: UnixListener,
        cid: u32,
        dials: Receiver<Dial>,
        arrivals: Arc<Arrivals>,
    ) -> io::Result<(Self, Arc<mio::Waker>)> {
        let poll = Poll::new()?;
        let waker = Arc::new(mio::Waker::new(poll.registry(), WAKER)?);
        listener.set_nonblocking(true)?;
        poll.registry().register(&mut SourceFd(&listener.as_raw_fd()), LISTENER, Interest::READABLE)?;
        let streams = Streams::new(cid, poll.registry().try_clone()?, SOCKETS, arrivals);
        let worker = Self {
            poll,
            events: Events::with_capacity(EVENTS_AT_ONCE),
            listener,
            cid,
            dials,
            front: None,
            from_guest: FromGuest::new(LEN + PAYLOAD),
            streams,
            kicks: [None; RINGS],
            strangers: false,
            busy: false,
            look_at: None,
        };
        Ok((worker, waker))
    }

    /// Serves for as long as the process lives.
    pub(super) fn run(mut self) {
        loop {
            if let Err(error) = self.turn(None) {
                tracing::error!(%error, "the vsock device has ended");
                return;
            }
        }
    }

    /// One turn: waits `longest`, or until something happens, and deals with it.
    ///
    /// # Errors
    /// When the host's poll does not work.
    pub(super) fn turn(&mut self, longest: Option<Duration>) -> io::Result<()> {
        let timeout = self.timeout(longest);
        let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        let polled = self.poll.poll(&mut events, timeout);
        let interrupted = polled.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::Interrupted);
        if !interrupted {
            polled?;
            self.busy = false;
            for event in &events {
                match event.token() {
                    WAKER => {}
                    LISTENER => self.accept(),
                    CONTROL => self.handle_messages(),
                    Token(kick) if kick < SOCKETS => {
                        if let Some(front) = &mut self.front
                            && let Some(ring) = front.device.rings.get_mut(kick - KICKS)
                        {
                            ring.note_kick();
                        }
                    }
                    Token(token) => self.streams.note(token, event),
                }
            }
        }
        self.events = events;
        let now = Instant::now();
        let up = self.is_up();
        while let Ok(dial) = self.dials.try_recv() {
            self.streams.dial(now, up, dial);
        }
        self.streams.expire(now);
        if let Err(error) = self.move_packets(now) {
            self.detach(&error);
        }
        Ok(())
    }

    fn timeout(&self, longest: Option<Duration>) -> Option<Duration> {
        if self.busy {
            return Some(Duration::ZERO);
        }
        let next = [self.look_at, self.streams.deadline()].into_iter().flatten().min();
        let left = next.map(|at| at.saturating_duration_since(Instant::now()));
        [left, longest].into_iter().flatten().min()
    }

    /// Whether a driver is there to talk to.
    fn is_up(&self) -> bool {
        self.front.as_ref().is_some_and(|f| {
            let [to_guest, to_host, _] = &f.device.rings;
            to_guest.runs() && to_host.runs()
        })
    }

    /// Takes VMMs that connect: one is served, others are closed.
    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "a VMM was not taken");
                    return;
                }
            };
            // One that has gone may not have been noticed yet.
            self.handle_messages();
            if self.front.is_some() {
                tracing::warn!(cid = self.cid, "a second VMM wants the same vsock: closed");
                continue;
            }
            let attached = FrontEnd::new(stream, Posted::new(self.cid)).and_then(|front| {
                let fd = front.socket().as_raw_fd();
                self.poll.registry().register(&mut SourceFd(&fd), CONTROL, Interest::READABLE)?;
                Ok(front)
            });
            match attached {
                Ok(front) => {
                    tracing::info!(cid = self.cid, "vsock: VMM attached");
                    self.front = Some(front);
                    self.handle_messages();
                }
                Err(error) => tracing::warn!(%error, "a VMM was not taken"),
            }
        }
    }

    /// Handles messages of the VMM's, all there are.
    fn handle_messages(&mut self) {
        while let Some(front) = &mut self.front {
            let changes = match front.handle_messages() {
                Ok(changes) => changes,
                Err(error) => return self.detach(&error),
            };
            if changes.device {
                self.streams.guest_gone();
                // A ring that does not begin at its beginning has a driver that has used it: with who was here before us.
                self.strangers = front.device.rings.iter().any(|ring| ring.runs() && ring.next != 0);
            }
            if changes.kicks
                && let Err(error) = self.watch_kicks()
            {
                return self.detach(&error);
            }
            if !changes.more {
                return;
            }
        }
    }

    fn watch_kicks(&mut self) -> io::Result<()> {
        let registry = self.poll.registry();
        for old in self.kicks.iter_mut().filter_map(Option::take) {
            // It is open until the next messages are handled.
            registry.deregister(&mut SourceFd(&old))?;
        }
        let Some(front) = &self.front else { return Ok(()) };
        for (ring, fd) in front.kick_fds() {
            registry.register(&mut SourceFd(&fd), Token(KICKS + ring), Interest::READABLE)?;
            if let Some(place) = self.kicks.get_mut(ring) {
                *place = Some(fd);
            }
        }
        Ok(())
    }

    /// The VMM is gone, or has to go.
    fn detach(&mut self, error: &io::Error) {
        let Some(front) = self.front.take() else { return };
        let (registry, counters) = (self.poll.registry(), self.streams.counters);
        for old in self.kicks.iter_mut().filter_map(Option::take) {
            // Closing it does the same, unless the VMM has it too, as it has.
            let _ = registry.deregister(&mut SourceFd(&old));
        }
        let _ = registry.deregister(&mut SourceFd(&front.socket().as_raw_fd()));
        tracing::info!(
            cid = self.cid, reason = %error, ?counters, streams = self.streams.count(),
            bad_chains = self.from_guest.dropped + front.device.kind.dropped, "vsock: VMM detached"
        );
        self.look_at = None;
        self.strangers = false;
        self.streams.guest_gone();
    }

    /// Moves packets both ways, and tells the guest.
    fn move_packets(&mut self, now: Instant) -> io::Result<()> {
        if !self.is_up() {
            return Ok(());
        }
        let Some(front) = &mut self.front else { return Ok(()) };
        let Device { rings, memory, kind: posted, .. } = &mut front.device;
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            for ring in rings.iter_mut().filter(|ring| ring.runs()) {
                ring.remind()?;
                ring.ready |= ring.look().map_err(io::Error::other)?;
            }
        }
        if self.strangers && rings[EVENTS].runs() {
            self.strangers = !put_transport_reset(&mut rings[EVENTS], memory)?;
        }
        let mut moved = false;
        if rings[TO_HOST].ready && self.streams.takes() {
            let streams = &mut self.streams;
            let batch = self
                .from_guest
                .receive(&mut rings[TO_HOST], memory, PACKETS, |packet| {
                    let (header, payload) = split(packet)?;
                    streams.handle(&header, payload);
                    Some(Taken { bytes: payload.len(), goes_on: streams.takes() })
                })
                .map_err(io::Error::other)?;
            moved = batch.more || batch.chains > 0;
        }
        let mut to_guest = ToGuest { ring: &mut rings[TO_GUEST], memory, posted };
        let more = self.streams.speak(&mut to_guest).map_err(io::Error::other)?;
        for ring in rings.iter_mut() {
            moved |= ring.publish()?;
        }
        if moved {
            self.look_at = Some(now + LOOK);
        }
        self.busy = more || (rings[TO_HOST].ready && self.streams.takes());
        Ok(())
    }
}
