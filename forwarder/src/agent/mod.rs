//! Guest agents: ports that publish themselves, ports that guests ask for, and connections carried over vsock.
//!
//! ```text
//! vsock, unix socket ─► door ─┬─ Hello ──► session ─► guest: rules · policy · what is published ─┬─► data thread
//!                             ├─ Stream ─► the client that waits for it (carry)                  └─► entrances (here)
//!                             └─ Client ─► a unix socket of the host (carry)
//! CLI, API ─► Requests ─► here first: `ports` and `publish` of both worlds
//! ```
//! Each guest has one [`guest::Guest`], which is an actor: everything about its ports happens in its task, one thing
//! after the other. A listener on every address of the guest is published through the network stack, as `--publish`
//! publishes; one on the guest's loopback, or on an address that only the guest can reach, is carried by the agent.
//!
//! **A hostile agent** is no more than a hostile guest. What it may grow has a limit and a behaviour at it:
//!
//! | what | limit | beyond it |
//! |---|---|---|
//! | streams that have not said what they are | [`door::NAMELESS`], 5 s | the oldest is closed |
//! | first message of a stream | 4 KiB | closed |
//! | messages | 64 KiB; [`session::RATE`] a second after [`session::BURST`] | closed; read more slowly |
//! | messages to it that it does not read | [`shared::OUTGOING`] | the session ends |
//! | listeners | [`guest::auto::LISTENERS`] | the rest is not seen |
//! | published ports | [`guest::PORTS`] | refused |
//! | carried connections | [`shared::STREAMS`] | the client is reset |
//! | bytes of carried connections that their receivers do not take | [`carry::HELD`] buffers of 128 KiB, then 4 KiB each | no more is read |
//! | UDP clients of a port | [`udp::CLIENTS`] | the idlest goes |
//! | lines in the log | 20 in 10 s | counted |
//!
//! It can have published what the guest itself can reach, on the host's loopback unless `--guest-binds any`; it cannot name
//! another guest, nor a file of the host.

pub(crate) mod carry;
pub(crate) mod door;
mod entrance;
pub(crate) mod guest;
pub mod rules;
pub(crate) mod session;
pub(crate) mod shared;
#[cfg(test)]
mod tests;
pub(crate) mod udp;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use portway_api::control::PortInfo;
use serde::Deserialize;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot};

use self::entrance::BoundPort;
use self::guest::{Guest, Input};
use self::rules::Rule;
use crate::config::ConfigError;
use crate::publish::spec::{HostEnd, PublishSpec};
use crate::request::{PublishError, Request, Requests};
use crate::sandbox::paths::Paths;

/// Streams from one guest that may wait for the door.
const ARRIVALS: usize = 128;
/// Requests that may wait for the service.
const REQUESTS: usize = 256;

/// The settings of the agent service.
#[derive(Debug, Clone, Default)]
pub struct AgentConfig {
    /// Agents that come over a unix socket.
    pub agents: Vec<AgentSpec>,
    /// What publishes itself.
    pub rules: Vec<Rule>,
    /// Unix sockets in the first guest that lead to the host.
    pub sockets: Vec<SocketPair>,
    /// Where a guest may ask to be published.
    pub binds: GuestBinds,
    /// After which idle time the client of a carried port is asked whether it is still there; `None`: never.
    pub keep_alive: Option<Duration>,
}

impl AgentConfig {
    /// Whether the settings go together. `others`: whether agents may come another way than `--agent`.
    ///
    /// # Errors
    /// When something needs an agent and none can come.
    pub(crate) fn check(&self, publish: &[PublishSpec], others: bool) -> Result<(), ConfigError> {
        let twice = |(n, a): (usize, &AgentSpec)| {
            self.agents.iter().take(n).any(|o| o.path == a.path || (a.name.is_some() && o.name == a.name))
        };
        if self.agents.iter().enumerate().any(twice) {
            return Err(ConfigError::new("--agent", "two agents have the same path or name"));
        }
        if others || !self.agents.is_empty() {
            return Ok(());
        }
        let needs = "needs the guest agent, and nothing leads to one: give --vsock or --agent";
        if let Some(spec) = publish.iter().find(|p| p.needs_agent()) {
            return Err(ConfigError::new("--publish", format!("{spec} {needs}")));
        }
        if !self.rules.is_empty() {
            return Err(ConfigError::new("--publish", format!("auto, or a rule of auto-publish, {needs}")));
        }
        if let Some(pair) = self.sockets.first() {
            return Err(ConfigError::new("--guest-socket", format!("{} {needs}", pair.guest)));
        }
        Ok(())
    }
}

/// `unix:PATH[,name=VM]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct AgentSpec {
    /// The socket we listen on.
    pub path: PathBuf,
    /// Whose agent comes there: the VM's name, as its link has it.
    pub name: Option<String>,
}

impl FromStr for AgentSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault =
            || format!("{text:?} is not unix:PATH[,name=VM]; an example: unix:/run/user/1000/agent.sock");
        let (place, option) = text.split_once(',').map_or((text, None), |(p, o)| (p, Some(o)));
        let path = place.strip_prefix("unix:").filter(|p| !p.is_empty()).ok_or_else(fault)?;
        let path = std::path::absolute(path).map_err(|_| fault())?;
        let name = match option {
            None => None,
            Some(option) => {
                Some(option.strip_prefix("name=").filter(|n| !n.is_empty()).ok_or_else(fault)?.to_owned())
            }
        };
        Ok(Self { path, name })
    }
}

/// `GUEST_PATH:HOST_PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SocketPair {
    /// Where the agent listens in the guest.
    pub guest: String,
    /// Where its clients come out on the host.
    pub host: PathBuf,
}

impl FromStr for SocketPair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let pair = text.split_once(':').filter(|(g, h)| g.starts_with('/') && h.starts_with('/'));
        let (guest, host) = pair.ok_or_else(|| {
            format!("{text:?} is not GUEST_PATH:HOST_PATH; an example: /run/ssh-agent.sock:/run/user/1000/ssh-agent.sock")
        })?;
        Ok(Self { guest: guest.to_owned(), host: host.into() })
    }
}

impl std::fmt::Display for SocketPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.guest, self.host.display())
    }
}

macro_rules! from_string {
    ($($type:ty),+) => {$(
        impl TryFrom<String> for $type {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
    )+};
}
from_string!(AgentSpec, SocketPair);

/// On which host addresses a guest may ask to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestBinds {
    /// 127.0.0.0/8 and ::1. A wish for every address is granted as localhost.
    #[default]
    Loopback,
    /// Any.
    Any,
}

/// A socket's file, removed with the value.
#[derive(Debug)]
pub(crate) struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The service, bound and not yet served.
#[derive(Debug)]
pub(crate) struct Agents {
    config: Arc<AgentConfig>,
    listeners: Vec<(Option<String>, std::os::unix::net::UnixListener)>,
    ports: Vec<(PublishSpec, Vec<BoundPort>)>,
}

impl Agents {
    /// Binds the agents' sockets, and the ports of the first guest that go through its agent.
    ///
    /// # Errors
    /// When one of them cannot be bound: at the start nothing is half done.
    pub(crate) fn open(
        config: &AgentConfig,
        ports: impl Iterator<Item = PublishSpec>,
    ) -> Result<(Self, Vec<Removed>), ConfigError> {
        let (mut listeners, mut files) = (Vec::new(), Vec::new());
        for AgentSpec { path, name } in &config.agents {
            let listener = crate::unix_path::listen(path, 0o600)
                .map_err(|e| ConfigError::new("--agent", e.to_string()))?;
            files.push(Removed(path.clone()));
            listeners.push((name.clone(), listener));
        }
        let mut bound = Vec::new();
        for spec in ports {
            let all: Result<Vec<BoundPort>, PublishError> =
                (0..spec.count).map(|n| bind(&spec, n, config.keep_alive)).collect();
            bound.push((spec, all.map_err(|e| ConfigError::new("--publish", e.to_string()))?));
        }
        Ok((Self { config: Arc::new(config.clone()), listeners, ports: bound }, files))
    }

    /// Serves every agent, and answers what is asked about ports; needs the runtime. `others` are streams from guests
    /// whose agents come another way.
    pub(crate) fn serve(
        self,
        requests: &Requests,
        others: Vec<(Option<String>, mpsc::Receiver<UnixStream>)>,
        allowed: &Arc<Paths>,
    ) {
        let mut streams = others;
        for (name, listener) in self.listeners {
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => {
                    let (arrive, arrivals) = mpsc::channel(ARRIVALS);
                    tokio::spawn(accept(listener, arrive));
                    streams.push((name, arrivals));
                }
                Err(error) => tracing::error!(%error, "the agents' socket cannot be served"),
            }
        }
        if streams.is_empty() {
            return;
        }
        let mut ports = Some(self.ports);
        let mut guests = Vec::new();
        for (name, arrivals) in streams {
            let shared = shared::Shared::new();
            let first = ports.take();
            let sockets = if first.is_some() { self.config.sockets.clone() } else { Vec::new() };
            let (guest, inputs) = Guest::new(
                name,
                Arc::clone(&self.config),
                sockets.clone(),
                requests.clone(),
                Arc::clone(&shared),
            );
            tokio::spawn(guest.run(first.unwrap_or_default()));
            tokio::spawn(door::keep(arrivals, shared, inputs.clone(), sockets));
            guests.push(inputs);
        }
        let (ask, asked) = mpsc::channel(REQUESTS);
        requests.by_way_of(ask);
        tokio::spawn(answer(asked, requests.clone(), guests, Arc::clone(allowed)));
    }
}

/// Binds place `n` of a spec that goes through the agent.
fn bind(spec: &PublishSpec, n: u16, keep_alive: Option<Duration>) -> Result<BoundPort, PublishError> {
    let port = match spec.host {
        HostEnd::Ports { first: 0, .. } | HostEnd::Unix(_) => 0,
        HostEnd::Ports { first, .. } => first.saturating_add(n),
    };
    BoundPort::new(&spec.host, port, spec.proto, keep_alive)
}

async fn accept(listener: tokio::net::UnixListener, arrive: mpsc::Sender<UnixStream>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if arrive.send(stream).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the agents' socket cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Answers what is asked about ports and agents. Each answer is a task: a guest that is busy delays nobody else's.
async fn answer(
    mut asked: mpsc::Receiver<Request>,
    requests: Requests,
    guests: Vec<mpsc::Sender<Input>>,
    allowed: Arc<Paths>,
) {
    while let Some(request) = asked.recv().await {
        let (requests, guests) = (requests.clone(), guests.clone());
        match request {
            Request::Publish { spec, reply } if spec.needs_agent() => {
                if let Err(error) = spec.within(&allowed) {
                    // One who does not wait any more has gone.
                    let _ = reply.send(vec![Err(error)]);
                } else if let Some(first) = guests.first() {
                    let _ = first.send(Input::Publish { spec, reply }).await;
                }
            }
            Request::Unpublish { spec, reply } => drop(tokio::spawn(async move {
                for guest in &guests {
                    let spec = spec.clone();
                    if let Some(Some(gone)) = ask(guest, |reply| Input::Unpublish { spec, reply }).await {
                        return drop(reply.send(Ok(gone)));
                    }
                }
                // A reply that is dropped says that there is no answer.
                let _ = requests.send_to_data_thread(Request::Unpublish { spec, reply });
            })),
            Request::Ports { reply } => drop(tokio::spawn(async move {
                let Some(mut ports) = ask_data_thread(&requests, |reply| Request::Ports { reply }).await
                else {
                    return;
                };
                for guest in &guests {
                    ports.extend(ask(guest, |reply| Input::Ports { reply }).await.unwrap_or_default());
                }
                let _ = reply.send(ports);
            })),
            Request::Agents { reply } => drop(tokio::spawn(async move {
                let mut agents = Vec::new();
                for guest in &guests {
                    agents.extend(ask(guest, |reply| Input::Info { reply }).await);
                }
                let _ = reply.send(agents);
            })),
            Request::Await { port, mut reply } => drop(tokio::spawn(async move {
                let met = Arc::new(Notify::new());
                let asked =
                    if port.is_some() { guests.as_slice() } else { guests.get(..1).unwrap_or_default() };
                for guest in asked {
                    let _ = guest.send(Input::Await { port, met: Arc::downgrade(&met) }).await;
                }
                tokio::select! {
                    () = met.notified() => drop(reply.send(Ok(()))),
                    () = reply.closed() => {}
                }
            })),
            other => drop(requests.send_to_data_thread(other)),
        }
    }
}

async fn ask<T>(guest: &mpsc::Sender<Input>, make: impl FnOnce(oneshot::Sender<T>) -> Input) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    guest.send(make(reply)).await.ok()?;
    answer.await.ok()
}

/// Asks the data thread one thing; `None` when it is overloaded or ending.
async fn ask_data_thread<T>(
    requests: &Requests,
    make: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    requests.send_to_data_thread(make(reply)).ok()?;
    answer.await.ok()
}

/// Lines in the log that a guest can cause: [`Self::LINES`] in [`Self::TIME`], then a count.
#[derive(Debug)]
struct Complaints {
    since: std::sync::Mutex<Instant>,
    said: AtomicU32,
}

impl Complaints {
    const LINES: u32 = 20;
    const TIME: Duration = Duration::from_secs(10);

    fn new() -> Self {
        Self { since: std::sync::Mutex::new(Instant::now()), said: AtomicU32::new(0) }
    }

    /// Whether one more may be said.
    fn may(&self) -> bool {
        let mut since = self.since.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if since.elapsed() >= Self::TIME {
            *since = Instant::now();
            let unsaid = self.said.swap(0, Ordering::Relaxed).saturating_sub(Self::LINES);
            if unsaid > 0 {
                tracing::warn!(unsaid, "more was said of a guest than is logged");
            }
        }
        self.said.fetch_add(1, Ordering::Relaxed) < Self::LINES
    }
}

/// A guest's word for the log: short, and nothing that moves a terminal.
fn harmless(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(64).collect()
}

/// What a listing shows for a path in the guest.
fn socket_label(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A port for events.
fn note(requests: &Requests, event: crate::events::Event) {
    // Events are for those who watch: when the data thread is overloaded one is missing.
    let _ = requests.send_to_data_thread(Request::Note(event));
}

/// What was published, for events.
fn note_published(requests: &Requests, port: &PortInfo) {
    note(requests, crate::events::Event::Published(port.clone()));
}
