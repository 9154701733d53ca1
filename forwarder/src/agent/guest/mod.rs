//! One guest's ports: what its agent reports and asks for, what rules and policy make of it, and what is published.
//!
//! ```text
//! listeners ─► rules ─► wanted places ─┐
//! agent's wishes ─► policy ────────────┼─► published ports ─┬─ Network: the data thread listens, the stack connects
//! operator's --publish 8080:127.0.0.1:80 ┘                  └─ Carried: an entrance here, the agent connects
//! ```
//! `auto` has the first way, `wishes` the second, `asked` the third; `published` is what they make.
//!
//! **When the agent is gone** (it crashed, the guest rebooted, the VM is off) its ports stay for [`GRACE`], so that an
//! agent that is started again finds them; then they are closed. An agent of another boot begins with none. After a hello
//! the agent says everything anew, and what it does not claim again within [`SETTLE`] is closed.

mod asked;
pub(crate) mod auto;
mod published;
mod wishes;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use portway_api::agent::{
    AgentInfo, Hello, Listener, PORTS_PER_MESSAGE, PROTOCOL, ToGuest, ToHost, Welcome, encode,
};
use portway_api::control::PortInfo;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use self::auto::{Auto, Wanted};
use self::published::{Published, carried_target};
use self::wishes::Wish;
use super::entrance::BoundPort;
use super::shared::{GRACE, OUTGOING, Session, Shared, secret};
use super::{AgentConfig, Complaints, SocketPair, harmless, note, session};
use crate::events::Event;
use crate::publish::spec::{GuestName, PublishSpec};
use crate::request::{PublishError, Requests};

/// Ports published for one guest by rule or at its wish.
pub(crate) const PORTS: usize = 256;
/// How long a new session has to claim what the one before had.
const SETTLE: Duration = Duration::from_secs(3);
/// Those who wait for a port or for readiness.
const WAITERS: usize = 64;
/// What may wait for the actor.
const INPUTS: usize = 64;

/// What happens to a guest.
pub(super) enum Input {
    /// An agent says hello on a new control stream.
    Hello { stream: UnixStream, hello: Hello },
    /// The agent of a session said something.
    Said { session: u64, message: ToHost },
    /// A session is over.
    Ended { session: u64, why: String },
    /// The operator publishes a port that is carried.
    Publish { spec: PublishSpec, reply: oneshot::Sender<Vec<Result<PortInfo, PublishError>>> },
    /// The operator unpublishes; `None` when it is none of ours.
    Unpublish { spec: PublishSpec, reply: oneshot::Sender<Option<Vec<PortInfo>>> },
    /// The ports that the data thread does not know.
    Ports { reply: oneshot::Sender<Vec<PortInfo>> },
    /// How it is.
    Info { reply: oneshot::Sender<AgentInfo> },
    /// Ring when the guest is ready, or the host port's listener is there.
    Await { port: Option<u16>, met: Weak<Notify> },
}

/// See the module.
pub(super) struct Guest {
    name: Option<String>,
    config: Arc<AgentConfig>,
    sockets: Vec<SocketPair>,
    requests: Requests,
    shared: Arc<Shared>,
    inputs: mpsc::Receiver<Input>,
    to_me: mpsc::WeakSender<Input>,
    complaints: Complaints,

    session: Option<Arc<Session>>,
    sessions: u64,
    boot_id: String,
    version: Option<String>,
    ready: bool,
    /// The last session has ended: when its ports go.
    void_at: Option<Instant>,
    /// A session has begun: when what it has not claimed goes.
    settle_at: Option<Instant>,
    retry_at: Option<Instant>,
    /// When the last comparison was, and when the next is, if one is due.
    reconciled: Option<Instant>,
    reconcile_at: Option<Instant>,

    listeners: BTreeSet<Listener>,
    /// The parts of a snapshot that is not complete.
    staged: Option<BTreeSet<Listener>>,
    auto: BTreeMap<Wanted, Auto>,
    wishes: Vec<Wish>,
    /// The operator's.
    configured: Vec<Published>,
    /// Listeners the operator unpublished; until they close.
    unwanted: HashSet<Listener>,
    waiters: Vec<(Option<u16>, Weak<Notify>)>,
}

impl Guest {
    pub(super) fn new(
        name: Option<String>,
        config: Arc<AgentConfig>,
        sockets: Vec<SocketPair>,
        requests: Requests,
        shared: Arc<Shared>,
    ) -> (Self, mpsc::Sender<Input>) {
        let (to_me, inputs) = mpsc::channel(INPUTS);
        let guest = Self {
            name,
            config,
            sockets,
            requests,
            shared,
            inputs,
            to_me: to_me.downgrade(),
            complaints: Complaints::new(),
            session: None,
            sessions: 0,
            boot_id: String::new(),
            version: None,
            ready: false,
            void_at: None,
            settle_at: None,
            retry_at: None,
            reconciled: None,
            reconcile_at: None,
            listeners: BTreeSet::new(),
            staged: None,
            auto: BTreeMap::new(),
            wishes: Vec::new(),
            configured: Vec::new(),
            unwanted: HashSet::new(),
            waiters: Vec::new(),
        };
        (guest, to_me)
    }

    /// Runs until nobody can send anything any more.
    pub(super) async fn run(mut self, ports: Vec<(PublishSpec, Vec<BoundPort>)>) {
        for (spec, bound) in ports {
            for (n, port) in (0..spec.count).zip(bound) {
                match self.serve(&spec.host, port, spec.proto, carried_target(&spec, n)) {
                    Ok(port) => self.configured.push(port),
                    Err(error) => tracing::error!(%error, %spec, "a port cannot be served"),
                }
            }
        }
        loop {
            let deadlines = [self.void_at, self.settle_at, self.retry_at, self.reconcile_at];
            let next = deadlines.into_iter().flatten().min();
            let input = match next {
                None => self.inputs.recv().await,
                Some(at) => match tokio::time::timeout_at(at, self.inputs.recv()).await {
                    Ok(input) => input,
                    Err(_) => {
                        self.tick(Instant::now()).await;
                        continue;
                    }
                },
            };
            let Some(input) = input else { return };
            self.handle(input).await;
            // A busy guest's deadlines come all the same.
            if next.is_some_and(|at| at <= Instant::now()) {
                self.tick(Instant::now()).await;
            }
        }
    }

    async fn handle(&mut self, input: Input) {
        match input {
            Input::Hello { stream, hello } => self.begin(stream, hello).await,
            Input::Said { session, message } => {
                // What a replaced agent said is nobody's word any more.
                if self.session.as_ref().is_some_and(|s| s.number == session) {
                    self.heed(message).await;
                }
            }
            Input::Ended { session, why } => self.end(session, &why),
            Input::Publish { spec, reply } => {
                let done = self.publish_configured(&spec);
                // A caller that has gone away does not want its answer; likewise below.
                let _ = reply.send(done);
                self.ring().await;
            }
            Input::Unpublish { spec, reply } => drop(reply.send(self.unpublish_named(&spec).await)),
            Input::Ports { reply } => drop(reply.send(self.extra_ports())),
            Input::Info { reply } => drop(reply.send(self.info())),
            Input::Await { port, met } => {
                self.waiters.retain(|(_, met)| met.strong_count() > 0);
                if self.waiters.len() < WAITERS {
                    self.waiters.push((port, met));
                }
                self.ring().await;
            }
        }
    }

    fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| "the guest".into())
    }

    fn guest_name(&self) -> GuestName {
        self.name.clone().map_or(GuestName::Default, GuestName::Name)
    }

    fn tell(&self, message: &ToGuest) {
        if let Some(session) = &self.session {
            session.tell(message);
        }
    }

    // ---- the session ----

    async fn begin(&mut self, mut stream: UnixStream, hello: Hello) {
        let (version, boot_id) = (harmless(&hello.agent), harmless(&hello.boot_id));
        if hello.protocol != PROTOCOL {
            tracing::warn!(
                guest = self.label(),
                version,
                protocol = hello.protocol,
                "an agent of another protocol is sent away"
            );
            let reason =
                format!("this host speaks version {PROTOCOL} of the protocol, the agent {}", hello.protocol);
            let bye = encode(&ToGuest::Bye { reason, stay_away: true }).unwrap_or_default();
            // It goes at once or not at all: the stream is new and empty.
            let _ = stream.write_all(&bye).await;
            return;
        }
        if let Some(before) = self.session.take() {
            let reason = "another agent has said hello".to_owned();
            before.tell(&ToGuest::Bye { reason, stay_away: before.boot_id == boot_id });
            before.end.notify_one();
            self.shared.end_session(before.number);
        }
        self.sessions += 1;
        let (out, outgoing) = mpsc::channel(OUTGOING);
        let session = Arc::new(Session::new(self.sessions, boot_id.clone(), secret(), out));
        if self.boot_id != boot_id {
            // The guest has rebooted: nothing of before is there any more.
            self.void().await;
        }
        self.boot_id = boot_id;
        self.version = Some(version.clone());
        self.ready = false;
        self.staged = None;
        self.void_at = None;
        self.settle_at = Some(Instant::now() + SETTLE);
        session.tell(&ToGuest::Welcome(Welcome {
            protocol: PROTOCOL,
            host: env!("CARGO_PKG_VERSION").into(),
            key: session.key,
            sockets: self.sockets.iter().map(|s| s.guest.clone()).collect(),
            listeners: true,
        }));
        self.session = Some(Arc::clone(&session));
        self.shared.session.send_replace(Some(Arc::clone(&session)));
        if self.complaints.may() {
            tracing::info!(guest = self.label(), version, "the agent is here");
        }
        note(&self.requests, Event::AgentUp(self.label()));
        if let Some(to_me) = self.to_me.upgrade() {
            tokio::spawn(async move {
                let number = session.number;
                let why = session::talk(stream, session, outgoing, to_me.clone()).await;
                let _ = to_me.send(Input::Ended { session: number, why }).await;
            });
        }
    }

    fn end(&mut self, number: u64, why: &str) {
        if self.session.take_if(|s| s.number == number).is_none() {
            return;
        }
        if self.complaints.may() {
            tracing::info!(guest = self.label(), why = harmless(why), "the agent is gone");
        }
        self.shared.session.send_replace(None);
        self.shared.end_session(number);
        self.ready = false;
        self.void_at = Some(Instant::now() + GRACE);
        self.settle_at = None;
        note(&self.requests, Event::AgentDown(self.label()));
    }

    async fn tick(&mut self, now: Instant) {
        if self.void_at.take_if(|at| *at <= now).is_some() {
            self.void().await;
        }
        if self.settle_at.take_if(|at| *at <= now).is_some() {
            let session = self.sessions;
            for mut wish in std::mem::take(&mut self.wishes) {
                if wish.settle(session) {
                    self.wishes.push(wish);
                } else {
                    self.close_all(wish.ports).await;
                }
            }
        }
        let retry = self.retry_at.take_if(|at| *at <= now).is_some();
        let due = self.reconcile_at.take_if(|at| *at <= now).is_some();
        if (retry || due) && self.session.is_some() {
            self.reconcile(retry).await;
        }
    }

    /// Nothing of the guest is valid any more, but for what the operator said.
    async fn void(&mut self) {
        self.listeners.clear();
        self.staged = None;
        self.unwanted.clear();
        self.retry_at = None;
        for (_, auto) in std::mem::take(&mut self.auto) {
            if let Auto::Published(_, port) = auto {
                self.close(port).await;
            }
        }
        for wish in std::mem::take(&mut self.wishes) {
            self.close_all(wish.ports).await;
        }
    }

    async fn heed(&mut self, message: ToHost) {
        match message {
            ToHost::Listeners { part, added, removed } => self.hear_listeners(part, added, &removed).await,
            ToHost::Publish { id, spec } => {
                let (ports, errors) = self.wish(spec).await;
                self.tell(&ToGuest::Done { id, ports, errors });
                self.ring().await;
            }
            ToHost::Unpublish { id, spec } => {
                let (ports, errors) = self.unwish(&spec).await;
                self.tell(&ToGuest::Done { id, ports, errors });
            }
            ToHost::Ports { id } => {
                let ports = self.all_ports().await;
                let parts = ports.chunks(PORTS_PER_MESSAGE).count().max(1);
                for n in 0..parts {
                    let chunk = ports.chunks(PORTS_PER_MESSAGE).nth(n).unwrap_or_default().to_vec();
                    self.tell(&ToGuest::Ports { id, ports: chunk, more: n + 1 < parts });
                }
            }
            ToHost::StreamFailed { stream, error } => self.shared.fail(stream, error),
            ToHost::StreamReset { stream } => self.shared.reset(stream),
            ToHost::Clock { behind_ms, set, error } => {
                if self.complaints.may() {
                    let error = error.as_deref().map(harmless);
                    tracing::info!(guest = self.label(), behind_ms, set, error, "the guest's clock was off");
                }
            }
            ToHost::Ready => {
                if !std::mem::replace(&mut self.ready, true) {
                    tracing::info!(guest = self.label(), "the guest is ready");
                    note(&self.requests, Event::GuestReady(self.label()));
                }
                self.ring().await;
            }
            ToHost::Unknown { kind } => {
                if self.complaints.may() {
                    tracing::debug!(
                        guest = self.label(),
                        kind = harmless(&kind),
                        "the agent is older than this host"
                    );
                }
            }
            // Handled where they may come: at the door.
            ToHost::Hello(_) | ToHost::Stream { .. } | ToHost::Client { .. } | ToHost::Other => {
                if self.complaints.may() {
                    tracing::warn!(guest = self.label(), "an agent says what has no place in a session");
                }
            }
        }
    }
}
