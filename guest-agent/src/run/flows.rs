//! Carried connections: from the host's wish to the last byte.
//!
//! ```text
//! Open ─► dial the target ─► dial the host ─► Stream { stream, key }, then bytes (carry.rs) ─► both ends ended
//!            └─ failed: StreamFailed              near end reset: StreamReset, then wait until the host has closed
//! ```
//! A client of one of the host's unix sockets in the guest begins at "dial the host", a connection to an `-inport` has
//! its stream already. Each step has [`PATIENCE`].

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::read;
use portway_api::agent::{DialError, Target, ToHost, encode};

use super::{Agent, FLOWS, Token, watch};
use crate::carry::{Carried, Turn};
use crate::console::say;
use crate::dial;
use crate::slab::{Key, Slab};

/// How long a connect may take, and how long the host may take to close a stream it was told is reset.
const PATIENCE: Duration = Duration::from_secs(10);

/// All connections.
#[derive(Debug)]
pub(super) struct Flows {
    places: Slab<Flow>,
    /// Those whose turn was over before their bytes were.
    pub(super) again: VecDeque<Key>,
    /// When the unfinished ones are given up, the next first: all have the same patience.
    deadlines: VecDeque<(Instant, Key)>,
}

/// One connection.
#[derive(Debug)]
struct Flow {
    /// The host's name for it; none when it did not ask for it.
    stream: Option<u64>,
    datagrams: bool,
    stage: Stage,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum Stage {
    /// Connecting in the guest.
    Near {
        near: OwnedFd,
        far: Far,
    },
    /// Connecting to the host.
    Joining {
        near: OwnedFd,
        far: OwnedFd,
        first: Vec<u8>,
    },
    Open(Box<Carried>),
    /// The near end was reset; the stream goes when the host closes it.
    Told {
        far: OwnedFd,
    },
    /// Between two stages, inside one function.
    Moving,
}

/// What the near end will be joined to.
#[derive(Debug)]
enum Far {
    /// A stream that is to be opened, with this first message.
    Host(Vec<u8>),
    /// One that stands.
    Fd(OwnedFd),
}

impl Flows {
    pub(super) const fn new() -> Self {
        Self { places: Slab::new(FLOWS), again: VecDeque::new(), deadlines: VecDeque::new() }
    }
}

impl Agent {
    /// The host wants a connection.
    pub(super) fn open(&mut self, stream: u64, key: u64, target: &Target) {
        let datagrams = matches!(target, Target::Udp { .. });
        let first = encode(&ToHost::Stream { stream, key }).unwrap_or_default();
        let begun = dial::target(target)
            .and_then(|near| self.begin_near(Some(stream), datagrams, near, Far::Host(first)));
        if let Err(errno) = begun {
            self.tell(&ToHost::StreamFailed { stream, error: dial::error(errno) });
        }
    }

    /// Somebody has come to a unix socket the host wants here.
    pub(super) fn welcome_socket(&mut self, place: u32) {
        let Some(key) = self.talk.welcome().map(|w| w.key) else { return };
        let first = encode(&ToHost::Client { socket: place, key }).unwrap_or_default();
        loop {
            let Some(socket) = self.sockets.iter().find(|s| s.place == place) else { return };
            match socket.listener.accept() {
                Ok((client, _)) => {
                    let begun = client
                        .set_nonblocking(true)
                        .map_err(|_| Errno::EMFILE)
                        .and_then(|()| self.begin_far(client.into(), first.clone()));
                    if let Err(errno) = begun {
                        say(&format!("a client of a socket of the host is lost: {}", errno.desc()));
                    }
                }
                // Without descriptors it is tried again when another has come.
                Err(_) => return,
            }
        }
    }

    /// Somebody on the host has come to a vsock port of ours.
    pub(super) fn welcome_inport(&mut self, n: u32) {
        let place = n as usize;
        while let (Some(listener), Some((port, path))) =
            (self.inports.get(place), self.options.inports.get(place))
        {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let Ok(far) = accept4(listener.as_raw_fd(), flags) else { return };
            // SAFETY: accept4 has just made the descriptor, and nobody else has it.
            let far = unsafe { OwnedFd::from_raw_fd(far) };
            let begun = dial::unix(path);
            let port = *port;
            if let Err(errno) = begun.and_then(|near| self.begin_near(None, false, near, Far::Fd(far))) {
                say(&format!("a connection to vsock port {port} is lost: {}", errno.desc()));
            }
        }
    }

    fn begin_near(
        &mut self,
        stream: Option<u64>,
        datagrams: bool,
        near: OwnedFd,
        far: Far,
    ) -> nix::Result<()> {
        self.add(Flow { stream, datagrams, stage: Stage::Near { near, far }, deadline: None })
    }

    fn begin_far(&mut self, near: OwnedFd, first: Vec<u8>) -> nix::Result<()> {
        let far = dial::host(&self.options.host)?;
        self.add(Flow {
            stream: None,
            datagrams: false,
            stage: Stage::Joining { near, far, first },
            deadline: None,
        })
    }

    /// Takes a flow in and watches what it has.
    fn add(&mut self, mut flow: Flow) -> nix::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        flow.deadline = Some(deadline);
        let key = self.flows.places.add(flow).map_err(|_| Errno::EMFILE)?;
        let watched = match self.flows.places.get_mut(key).map(|f| &f.stage) {
            Some(Stage::Near { near, far: Far::Host(_) }) => watch(&self.epoll, near, Token::Near(key), true),
            Some(Stage::Near { near, far: Far::Fd(far) }) => watch(&self.epoll, near, Token::Near(key), true)
                .and_then(|()| watch(&self.epoll, far, Token::Far(key), true)),
            Some(Stage::Joining { near, far, .. }) => watch(&self.epoll, near, Token::Near(key), true)
                .and_then(|()| watch(&self.epoll, far, Token::Far(key), true)),
            _ => Ok(()),
        };
        if watched.is_err() {
            self.flows.places.remove(key);
            return Err(Errno::ENOMEM);
        }
        self.flows.deadlines.push_back((deadline, key));
        Ok(())
    }

    /// Something has happened at one end of a flow.
    pub(super) fn note_flow(&mut self, key: Key, near: bool, readable: bool, writable: bool) {
        let Some(flow) = self.flows.places.get_mut(key) else { return };
        match (&mut flow.stage, near) {
            (Stage::Near { near, .. }, true) if writable => match dial::outcome(near) {
                Ok(true) => self.join(key),
                Ok(false) => {}
                Err(errno) => self.fail(key, dial::error(errno)),
            },
            (Stage::Joining { far, .. }, false) if writable => match dial::outcome(far) {
                Ok(true) => self.carry(key),
                Ok(false) => {}
                Err(_) => self.fail(key, DialError::Failed),
            },
            (Stage::Open(carried), _) => {
                let end = if near { &mut carried.near } else { &mut carried.far };
                end.note(readable, writable);
                self.turn(key);
            }
            (Stage::Told { far }, false) if readable => {
                let mut rest = [0; 4096];
                loop {
                    match read(&*far, &mut rest) {
                        Ok(0) => break drop(self.flows.places.remove(key)),
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(Errno::EAGAIN) => break,
                        Err(_) => break drop(self.flows.places.remove(key)),
                    }
                }
            }
            // A connection that is not open yet is asked when it is.
            _ => {}
        }
    }

    /// The near end stands: on to the host.
    fn join(&mut self, key: Key) {
        let Some(flow) = self.flows.places.get_mut(key) else { return };
        let Stage::Near { near, far } = std::mem::replace(&mut flow.stage, Stage::Moving) else { return };
        match far {
            Far::Fd(far) => {
                flow.stage = Stage::Joining { near, far, first: Vec::new() };
                self.carry(key);
            }
            Far::Host(first) => {
                let dialed = dial::host(&self.options.host).and_then(|far| {
                    watch(&self.epoll, &far, Token::Far(key), true).map(|()| far).map_err(|_| Errno::ENOMEM)
                });
                match dialed {
                    Ok(far) => flow.stage = Stage::Joining { near, far, first },
                    Err(errno) => self.fail(key, dial::error(errno)),
                }
            }
        }
    }

    /// Both ends stand.
    fn carry(&mut self, key: Key) {
        let Some(flow) = self.flows.places.get_mut(key) else { return };
        let Stage::Joining { near, far, first } = std::mem::replace(&mut flow.stage, Stage::Moving) else {
            return;
        };
        flow.deadline = None;
        flow.stage = Stage::Open(Box::new(Carried::new(near, far, first, flow.datagrams)));
        self.turn(key);
    }

    /// The connection could not be made.
    fn fail(&mut self, key: Key, error: DialError) {
        if let Some(Flow { stream: Some(stream), .. }) = self.flows.places.remove(key) {
            self.tell(&ToHost::StreamFailed { stream, error });
        }
    }

    /// One turn of moving bytes.
    pub(super) fn turn(&mut self, key: Key) {
        let Some(flow) = self.flows.places.get_mut(key) else { return };
        let Stage::Open(carried) = &mut flow.stage else { return };
        match carried.turn(&mut self.buffer) {
            Turn::Idle => {}
            Turn::Again => self.flows.again.push_back(key),
            Turn::Done => drop(self.flows.places.remove(key)),
            Turn::FarReset => {
                dial::reset_on_close(&carried.near.fd);
                self.flows.places.remove(key);
            }
            Turn::NearReset => {
                let Some(stream) = flow.stream else { return drop(self.flows.places.remove(key)) };
                let deadline = Instant::now() + PATIENCE;
                if let Stage::Open(carried) = std::mem::replace(&mut flow.stage, Stage::Moving) {
                    flow.stage = Stage::Told { far: carried.far.fd };
                    flow.deadline = Some(deadline);
                    self.flows.deadlines.push_back((deadline, key));
                }
                self.tell(&ToHost::StreamReset { stream });
            }
        }
    }

    /// The host's end was reset.
    pub(super) fn reset(&mut self, stream: u64) {
        let found = self.flows.places.keys(|f| f.stream == Some(stream));
        for key in found {
            if let Some(Flow { stage: Stage::Open(carried), .. }) = self.flows.places.remove(key) {
                dial::reset_on_close(&carried.near.fd);
            }
        }
    }

    /// The session is over: so is everything it carried.
    pub(super) fn end_flows(&mut self) {
        for key in self.flows.places.keys(|_| true) {
            if let Some(Flow { stage: Stage::Open(carried), .. }) = self.flows.places.remove(key) {
                dial::reset_on_close(&carried.near.fd);
            }
        }
        self.flows.again.clear();
        self.flows.deadlines.clear();
    }

    pub(super) fn next_flow(&self) -> Option<Instant> {
        self.flows.deadlines.front().map(|(at, _)| *at)
    }

    pub(super) fn tick_flows(&mut self, now: Instant) {
        while let Some((at, key)) = self.flows.deadlines.front().copied().filter(|(at, _)| *at <= now) {
            self.flows.deadlines.pop_front();
            // One that has gone on since has another deadline, or none.
            if self.flows.places.get_mut(key).is_some_and(|f| f.deadline == Some(at)) {
                self.fail(key, DialError::TimedOut);
            }
        }
    }
}
