//! `portway-agent run`: the service.
//!
//! ```text
//!                    ┌────────────── one thread, one epoll ──────────────┐
//!  host ◄─ control ──┤ talk.rs    hello · listeners · publish · clock    │
//!       ◄─ streams ──┤ flows.rs   dial in the guest ─► carry.rs          ├── sockets of the guest
//!  clients ──────────┤ clients.rs publish · unpublish · ports            │
//!                    │ listeners/ looks, a few times a second            │
//!                    └───────────────────────────────────────────────────┘
//! ```
//! The host may come and go: the agent tries again, [`FIRST_RETRY`] to [`LAST_RETRY`] apart, and says everything anew.
//! With the session the carried connections end, reset, as their clients' ends on the host did.

mod clients;
mod flows;
mod talk;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket};

use self::clients::{Asked, Client, Kept};
use self::flows::Flows;
use self::talk::Talk;
use crate::carry::BUFFER;
use crate::console::say;
use crate::dial::Host;
use crate::harden;
use crate::listeners::{Redirections, Watch};
use crate::slab::{Key, Slab};

/// The exit status when the host has said that it is of no use to come again: another agent has the session, or the versions
/// do not go together. Who supervises the agent does not start it again then.
pub(crate) const UNWANTED: u8 = 3;
/// Until the host is tried again, at first.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// And at most.
const LAST_RETRY: Duration = Duration::from_secs(2);
/// Carried connections at once; at it the host is told that there is no room.
const FLOWS: usize = 2048;
/// Clients of the local socket at once; a further one is closed.
const CLIENTS: usize = 256;
/// Between two looks whether the guest has an address, until it has.
const READY_TICK: Duration = Duration::from_millis(250);

/// `VMADDR_CID_ANY` of vsock(7).
const CID_ANY: u32 = u32::MAX;

/// What the service is asked to do.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Where the host is.
    pub(crate) host: Host,
    /// The local socket.
    pub(crate) socket: PathBuf,
    /// Whether the clock may be set.
    pub(crate) clock: bool,
    /// Whether redirected ports are looked for.
    pub(crate) redirections: bool,
    /// Whether kube-proxy's are among them.
    pub(crate) node_ports: bool,
    /// vsudd's `-inport`: a vsock port of ours, and the unix socket its connections go to.
    pub(crate) inports: Vec<(u32, PathBuf)>,
}

/// What an event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Host,
    Local,
    Redirections,
    Near(Key),
    Far(Key),
    Client(Key),
    /// A unix socket in the guest whose clients go to the host.
    Socket(u32),
    Inport(u32),
}

impl Token {
    const fn encode(self) -> u64 {
        let (kind, slot, generation) = match self {
            Self::Host => (0, 0, 0),
            Self::Local => (1, 0, 0),
            Self::Redirections => (2, 0, 0),
            Self::Near(k) => (3, k.slot, k.generation),
            Self::Far(k) => (4, k.slot, k.generation),
            Self::Client(k) => (5, k.slot, k.generation),
            Self::Socket(n) => (6, n, 0),
            Self::Inport(n) => (7, n, 0),
        };
        // Slots are few (`FLOWS`), so the three bits above them are free.
        (generation as u64) << 32 | (slot as u64) << 3 | kind
    }

    #[expect(clippy::cast_possible_truncation, reason = "each half is what `encode` put there")]
    const fn decode(data: u64) -> Self {
        let (slot, generation) = ((data as u32) >> 3, (data >> 32) as u32);
        let key = Key { slot, generation };
        match data & 7 {
            0 => Self::Host,
            1 => Self::Local,
            2 => Self::Redirections,
            3 => Self::Near(key),
            4 => Self::Far(key),
            5 => Self::Client(key),
            6 => Self::Socket(slot),
            _ => Self::Inport(slot),
        }
    }
}

/// A unix socket the host wants in the guest; its file goes with it.
#[derive(Debug)]
struct GuestSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Its place in the host's list.
    place: u32,
}

impl Drop for GuestSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The service.
#[derive(Debug)]
struct Agent {
    options: Options,
    epoll: Epoll,
    buffer: Vec<u8>,
    talk: Talk,
    flows: Flows,
    local: UnixListener,
    clients: Slab<Client>,
    asked: HashMap<u32, Asked>,
    kept: Vec<Kept>,
    next_id: u32,
    watch: Watch,
    redirections: Option<Redirections>,
    sockets: Vec<GuestSocket>,
    inports: Vec<OwnedFd>,
    ready: bool,
    /// Whether the host has said that it is of no use to come again.
    unwanted: bool,
}

/// Descriptors: two for each carried connection, and the rest.
const DESCRIPTORS: u64 = 2 * FLOWS as u64 + 512;

/// Raises the limit of descriptors, which is 1024 where nobody has: too few for [`FLOWS`]. Only root may go beyond the hard one.
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft >= DESCRIPTORS || setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, hard.max(DESCRIPTORS)).is_ok() {
        return;
    }
    if hard < DESCRIPTORS {
        say(&format!("at most {hard} descriptors: fewer than {FLOWS} connections at once"));
    }
    if let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, hard.min(DESCRIPTORS), hard) {
        say(&format!("the limit of {soft} descriptors stays: {errno}"));
    }
}

/// Runs until it is told that nobody wants it.
pub(crate) fn run(options: Options) -> ExitCode {
    raise_descriptors();
    let host = options.host.clone();
    match Agent::new(options) {
        Ok(mut agent) => {
            say(&format!("version {}, host {host}", env!("CARGO_PKG_VERSION")));
            match agent.serve() {
                Ok(()) => ExitCode::from(UNWANTED),
                Err(error) => {
                    say(&format!("cannot go on: {error}"));
                    ExitCode::FAILURE
                }
            }
        }
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

impl Agent {
    fn new(options: Options) -> io::Result<Self> {
        let now = Instant::now();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let local = listen_at(&options.socket, 0o666)?;
        watch(&epoll, &local, Token::Local, false)?;
        let mut inports = Vec::new();
        for (n, (port, _)) in (0u32..).zip(&options.inports) {
            let socket = listen_vsock(*port).map_err(|errno| {
                io::Error::new(io::Error::from(errno).kind(), format!("vsock port {port}: {errno}"))
            })?;
            watch(&epoll, &socket, Token::Inport(n), false)?;
            inports.push(socket);
        }
        // Everything that needs more than what stays is bound; nothing has been read yet.
        harden::every_thread(options.clock, options.redirections);
        let redirections = options.redirections.then(|| Redirections::watch(options.node_ports)).transpose();
        let redirections = redirections.unwrap_or_else(|error| {
            say(&format!("redirected ports are not seen: {error}"));
            None
        });
        if let Some(redirections) = &redirections {
            watch(&epoll, redirections, Token::Redirections, false)?;
        }
        harden::service(options.clock);
        let kept = clients::restore(&options.socket);
        Ok(Self {
            options,
            epoll,
            buffer: vec![0; BUFFER],
            talk: Talk::away(now),
            flows: Flows::new(),
            local,
            clients: Slab::new(CLIENTS),
            asked: HashMap::new(),
            kept,
            next_id: 0,
            watch: Watch::new(now)?,
            redirections,
            sockets: Vec::new(),
            inports,
            ready: false,
            unwanted: false,
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        while !self.unwanted {
            self.tick(Instant::now());
            let timeout = self.timeout(Instant::now());
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in events.iter().take(count) {
                self.note(Token::decode(event.data()), event.events());
            }
            for _ in 0..self.flows.again.len() {
                if let Some(key) = self.flows.again.pop_front() {
                    self.turn(key);
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, token: Token, flags: EpollFlags) {
        let ended = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR | EpollFlags::EPOLLRDHUP);
        let readable = ended || flags.contains(EpollFlags::EPOLLIN);
        let writable = ended || flags.contains(EpollFlags::EPOLLOUT);
        match token {
            Token::Host => self.hear_host(),
            Token::Local => self.welcome_clients(),
            Token::Redirections => {
                if let Some(ports) = self.redirections.as_ref().and_then(Redirections::changed) {
                    self.watch.redirect(ports, Instant::now());
                }
            }
            Token::Near(key) => self.note_flow(key, true, readable, writable),
            Token::Far(key) => self.note_flow(key, false, readable, writable),
            Token::Client(key) => self.hear_client(key),
            Token::Socket(n) => self.welcome_socket(n),
            Token::Inport(n) => self.welcome_inport(n),
        }
    }

    /// What time alone brings: the next attempt, the next look, deadlines.
    fn tick(&mut self, now: Instant) {
        self.tick_talk(now);
        self.tick_flows(now);
    }

    fn timeout(&self, now: Instant) -> EpollTimeout {
        if !self.flows.again.is_empty() {
            return EpollTimeout::ZERO;
        }
        let next = self.next_talk().into_iter().chain(self.next_flow()).min();
        let Some(next) = next else { return EpollTimeout::NONE };
        // Rounded up: a rest below one millisecond must not become a busy loop.
        let left = next.saturating_duration_since(now) + Duration::from_millis(1);
        EpollTimeout::try_from(left).unwrap_or(EpollTimeout::NONE)
    }
}

/// Watches a descriptor; `edge`: both directions, told once for each change.
fn watch(epoll: &Epoll, fd: &impl AsFd, token: Token, edge: bool) -> io::Result<()> {
    let flags = match edge {
        true => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET,
        false => EpollFlags::EPOLLIN,
    };
    Ok(epoll.add(fd, EpollEvent::new(flags, token.encode()))?)
}

/// Listens on a unix socket, in the place of one that nobody has any more.
fn listen_at(path: &Path, mode: u32) -> io::Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let fault = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(fault)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(fault(io::Error::new(io::ErrorKind::AlreadyExists, "is a file and not a socket")));
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(fault)?;
            }
            _ => {
                return Err(fault(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "somebody listens there already",
                )));
            }
        },
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(fault)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(fault)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn listen_vsock(port: u32) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    bind(fd.as_raw_fd(), &VsockAddr::new(CID_ANY, port))?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_written() {
        let key = Key { slot: 2047, generation: u32::MAX };
        for token in [
            Token::Host,
            Token::Local,
            Token::Redirections,
            Token::Near(key),
            Token::Far(key),
            Token::Client(key),
            Token::Socket(5),
            Token::Inport(6),
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
