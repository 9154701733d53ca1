//! One guest's ports: what its agent reports and asks for, what rules and policy make of it, and what is published.
//!
//! ```text
//! listeners ─► rules ─► wanted places ─┐
//! agent's wishes ─► policy ────────────┼─► published ports ─┬─ Network: the data thread listens, the stack connects
//! operator's --publish 8080:127.0.0.1:80 ┘                  └─ Carried: an entrance here, the agent connects
//! ```
//! **When the agent is gone** (it crashed, the guest rebooted, the VM is off) its ports stay for [`GRACE`], so that an
//! agent that is started again finds them; then they are closed. An agent of another boot begins with none. After a hello
//! the agent says everything anew, and what it does not claim again within [`SETTLE`] is closed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use portway_api::agent::{
    AgentInfo, Hello, Listener, PORTS_PER_MESSAGE, PROTOCOL, Part, Target, ToGuest, ToHost, Welcome, encode,
};
use portway_api::control::{PortInfo, Protocol};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use super::entrance::{BoundPort, Entrance};
use super::rules::{Place, place};
use super::shared::{GRACE, OUTGOING, Session, Shared, secret};
use super::{
    AgentConfig, Complaints, GuestBinds, SocketPair, ask_data_thread, bind, harmless, note, note_published,
    session, socket_label,
};
use crate::events::Event;
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::request::{PublishError, Request, Requests};

/// Listeners of one guest; further ones are not seen.
pub(crate) const LISTENERS: usize = 4096;
/// Ports published for one guest by rule or at its wish.
pub(crate) const PORTS: usize = 256;
/// Refused listeners that are known beside as many published ones.
const REFUSED: usize = 256;
/// Bytes of a spec that a guest asks for.
const SPEC: usize = 1024;
/// How long a new session has to claim what the one before had.
const SETTLE: Duration = Duration::from_secs(3);
/// How often a refused port is tried again, and a port that is carried for want of an address looked at.
const RETRY: Duration = Duration::from_secs(5);
/// Between two comparisons of what is published with what is wanted, however fast listeners come and go.
const PACE: Duration = Duration::from_millis(50);
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

/// Where a connection to a published port goes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// Through the stack, to the guest's own address.
    Network(u16),
    /// Through the agent.
    Carried(Target),
}

/// One port of the host.
#[derive(Debug)]
struct Published {
    proto: Protocol,
    host: HostEnd,
    bound: Vec<String>,
    host_port: u16,
    way: Way,
    /// Of a carried one; the data thread has the others.
    entrance: Option<Entrance>,
}

impl Published {
    fn info(&self) -> PortInfo {
        let (guest, guest_port) = match &self.way {
            Way::Network(port) => (String::new(), *port),
            Way::Carried(Target::Tcp { address } | Target::Udp { address }) => {
                (address.ip().to_string(), address.port())
            }
            Way::Carried(Target::Unix { path }) => (socket_label(path.as_ref()), 0),
        };
        PortInfo {
            proto: self.proto,
            bind: self.bound.clone(),
            host_port: self.host_port,
            guest,
            guest_port,
            state: "listening".into(),
            accepted: self.entrance.as_ref().map_or(0, |e| e.accepted.load(Ordering::Relaxed)),
        }
    }

    /// Whether the operator's `spec` means this port, at some place of its range.
    fn is_named(&self, spec: &PublishSpec) -> bool {
        self.proto == spec.proto
            && match (&self.host, &spec.host) {
                (HostEnd::Unix(a), HostEnd::Unix(b)) => a == b,
                (HostEnd::Ports { bind: a, .. }, HostEnd::Ports { bind: b, first }) => {
                    let range = *first..=first.saturating_add(spec.count - 1);
                    a == b && *first != 0 && range.contains(&self.host_port)
                }
                _ => false,
            }
    }
}

/// What a rule wants: a place on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    proto: Protocol,
    place: Place,
}

/// And what came of it.
#[derive(Debug)]
enum Auto {
    Published(Listener, Published),
    Refused(Listener, String),
}

/// A wish of the guest.
#[derive(Debug)]
struct Wish {
    text: String,
    ports: Vec<Published>,
    /// The session that claimed it last.
    session: u64,
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
            for wish in std::mem::take(&mut self.wishes) {
                if wish.session == session {
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

    // ---- listeners ----

    async fn hear_listeners(&mut self, part: Part, added: Vec<Listener>, removed: &[Listener]) {
        let room = |set: &BTreeSet<Listener>| LISTENERS.saturating_sub(set.len());
        let public = added.into_iter().filter(|l| !l.is_private());
        match part {
            Part::Delta => {
                for gone in removed {
                    self.listeners.remove(gone);
                }
                let room = room(&self.listeners);
                self.listeners.extend(public.take(room));
            }
            Part::Whole => self.listeners = public.take(LISTENERS).collect(),
            Part::First => {
                self.staged = Some(public.take(LISTENERS).collect());
                return;
            }
            Part::Middle | Part::Last => {
                let Some(staged) = self.staged.as_mut() else { return };
                let room = room(staged);
                staged.extend(public.take(room));
                if part == Part::Middle {
                    return;
                }
                self.listeners = self.staged.take().unwrap_or_default();
            }
        }
        let listeners = &self.listeners;
        self.unwanted.retain(|l| listeners.contains(l));
        let now = Instant::now();
        match self.reconciled.map(|at| at + PACE).filter(|at| *at > now) {
            None => self.reconcile(false).await,
            // A listener that flaps is bound and closed so many times a second, and no more.
            Some(at) => self.reconcile_at = Some(at),
        }
    }

    /// Makes what is published what is wanted. `retry`: also what was refused before.
    async fn reconcile(&mut self, retry: bool) {
        self.reconciled = Some(Instant::now());
        self.reconcile_at = None;
        let own = self.own_address().await;
        let mut wanted = wanted(&self.listeners, |listener| {
            (!self.unwanted.contains(listener)).then(|| place(&self.config.rules, listener)).flatten()
        });
        if !wanted.is_empty() {
            let taken = self.taken_elsewhere(own).await;
            wanted.retain(|w, l| !self.is_wished(w) && !taken.contains(&(l.proto, l.port)));
        }
        let stale: Vec<Wanted> = self
            .auto
            .iter()
            .filter(|(place, auto)| match (wanted.get(*place), auto) {
                (Some(l), Auto::Published(_, port)) => self.way(l, own) != port.way,
                (Some(_), Auto::Refused(..)) => false,
                (None, _) => true,
            })
            .map(|(place, _)| place.clone())
            .collect();
        for place in stale {
            if let Some(Auto::Published(_, port)) = self.auto.remove(&place) {
                self.close(port).await;
            }
        }
        for (place, listener) in wanted {
            self.publish_auto(place, listener, own, retry).await;
        }
        let refused = self.auto.values().any(|a| matches!(a, Auto::Refused(..)));
        let carried_for_now = own.is_none()
            && self.auto.values().any(|a| matches!(a, Auto::Published(l, _) if l.address.is_unspecified()));
        self.retry_at = (refused || carried_for_now).then(|| Instant::now() + RETRY);
        self.ring().await;
    }

    async fn publish_auto(&mut self, wanted: Wanted, listener: Listener, own: Option<IpAddr>, retry: bool) {
        let full = self.auto.len() >= PORTS + REFUSED;
        let known = match self.auto.get_mut(&wanted) {
            Some(Auto::Published(known, _)) => return *known = listener,
            Some(Auto::Refused(known, _)) if !retry && *known == listener => return,
            Some(Auto::Refused(_, reason)) => Some(reason.clone()),
            // Beyond both limits nothing is tried: it would be tried again with every change.
            None if full => return,
            None => None,
        };
        let done = if self.count() >= PORTS {
            Err(PublishError::Limit(format!("{PORTS} ports of one guest are published")))
        } else {
            self.publish_at(&wanted, self.way(&listener, own)).await
        };
        match done {
            Ok(port) => {
                if self.complaints.may() {
                    let (host_port, bind) = (port.host_port, port.bound.join(","));
                    tracing::info!(guest = self.label(), %listener, bind, host_port, "published by rule");
                }
                self.auto.insert(wanted, Auto::Published(listener, port));
            }
            Err(error) => {
                let reason = error.to_string();
                if known.as_ref() != Some(&reason) {
                    if self.complaints.may() {
                        tracing::info!(guest = self.label(), %listener, reason, "not published");
                    }
                    let event = Event::NotPublished(self.label(), listener.to_string(), reason.clone());
                    note(&self.requests, event);
                    self.tell(&ToGuest::Refused { listener, reason: reason.clone() });
                }
                self.auto.insert(wanted, Auto::Refused(listener, reason));
            }
        }
    }

    /// Publishes at the first of the place's ports that is free.
    async fn publish_at(&mut self, wanted: &Wanted, way: Way) -> Result<Published, PublishError> {
        let mut last = None;
        for port in wanted.place.candidates() {
            let host = match &wanted.place {
                Place::Socket(path) => HostEnd::Unix(path.clone()),
                Place::Port { bind, .. } => {
                    HostEnd::Ports { bind: bind.map_or(Bind::Localhost, Bind::Address), first: port }
                }
            };
            match self.publish(host, wanted.proto, way.clone()).await {
                Err(error @ (PublishError::Bind { .. } | PublishError::AlreadyPublished(_))) => {
                    // The first says most: the port that was wanted.
                    last.get_or_insert(error);
                }
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| PublishError::Limit("no port is left".into())))
    }

    async fn publish(&mut self, host: HostEnd, proto: Protocol, way: Way) -> Result<Published, PublishError> {
        match way {
            Way::Carried(target) => {
                let port = match host {
                    HostEnd::Ports { first, .. } => first,
                    HostEnd::Unix(_) => 0,
                };
                let bound = BoundPort::new(&host, port, proto, self.config.keep_alive)?;
                let port = self.serve(&host, bound, proto, target)?;
                note_published(&self.requests, &port.info());
                Ok(port)
            }
            Way::Network(guest_port) => {
                let spec =
                    PublishSpec { host: host.clone(), guest: self.guest_name(), guest_port, count: 1, proto };
                let mut done = ask_data_thread(&self.requests, |reply| Request::Publish { spec, reply })
                    .await
                    .ok_or_else(|| PublishError::Limit("the network is overloaded or ending".into()))?;
                let info =
                    done.pop().ok_or_else(|| PublishError::Limit("no port was published".into()))??;
                // With the number of a free port, by which it is unpublished.
                let host = match host {
                    HostEnd::Ports { bind, .. } => HostEnd::Ports { bind, first: info.host_port },
                    unix @ HostEnd::Unix(_) => unix,
                };
                let (bound, host_port) = (info.bind, info.host_port);
                Ok(Published { proto, host, bound, host_port, way: Way::Network(guest_port), entrance: None })
            }
        }
    }

    fn serve(
        &self,
        host: &HostEnd,
        bound: BoundPort,
        proto: Protocol,
        target: Target,
    ) -> Result<Published, PublishError> {
        let address = format!("{proto} {}", bound.bound.join(","));
        let entrance = bound
            .serve(&target, &self.shared)
            .map_err(|e| PublishError::Bind { address, reason: e.to_string() })?;
        Ok(Published {
            proto,
            host: host.clone(),
            bound: entrance.bound.clone(),
            host_port: entrance.host_port,
            way: Way::Carried(target),
            entrance: Some(entrance),
        })
    }

    async fn close(&self, port: Published) {
        let info = port.info();
        match port.entrance {
            Some(entrance) => {
                entrance.close().await;
                note(&self.requests, Event::Unpublished(info));
            }
            None => {
                let Way::Network(guest_port) = port.way else { return };
                let (host, guest, proto) = (port.host, self.guest_name(), port.proto);
                let spec = PublishSpec { host, guest, guest_port, count: 1, proto };
                // The operator may have unpublished it already.
                let _ = ask_data_thread(&self.requests, |reply| Request::Unpublish { spec, reply }).await;
            }
        }
    }

    async fn close_all(&self, ports: Vec<Published>) {
        for port in ports {
            self.close(port).await;
        }
    }

    // ---- wishes ----

    async fn wish(&mut self, text: String) -> (Vec<PortInfo>, Vec<String>) {
        let session = self.sessions;
        if let Some(wish) = self.wishes.iter_mut().find(|w| w.text == text) {
            wish.session = session;
            return (wish.ports.iter().map(Published::info).collect(), Vec::new());
        }
        let spec = match allowed(&text, self.config.binds) {
            Ok(spec) => spec,
            Err(error) => return (Vec::new(), vec![error.to_string()]),
        };
        if usize::from(spec.count) > PORTS {
            let line = PublishError::Limit(format!("{} ports at once: {PORTS} at most", spec.count));
            return (Vec::new(), vec![line.to_string()]);
        }
        let own = self.own_address().await;
        let (mut ports, mut infos, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        for n in 0..spec.count {
            let done = if self.count() + ports.len() >= PORTS {
                Err(PublishError::Limit(format!("{PORTS} ports of one guest are published")))
            } else {
                self.make_way(&spec, n).await;
                let host = match &spec.host {
                    HostEnd::Ports { bind, first } if *first != 0 => {
                        HostEnd::Ports { bind: *bind, first: first.saturating_add(n) }
                    }
                    other => other.clone(),
                };
                self.publish(host, spec.proto, self.wished_way(&spec, n, own)).await
            };
            match done {
                Ok(port) => {
                    infos.push(port.info());
                    ports.push(port);
                }
                Err(error) => errors.push(error.to_string()),
            }
        }
        if !ports.is_empty() {
            if self.complaints.may() {
                tracing::info!(guest = self.label(), spec = harmless(&text), "published at the guest's wish");
            }
            self.wishes.push(Wish { text, ports, session });
        }
        (infos, errors)
    }

    async fn unwish(&mut self, text: &str) -> (Vec<PortInfo>, Vec<String>) {
        let same = |w: &Wish| {
            w.text == text
                || text.parse::<PublishSpec>().is_ok_and(|s| Ok(s) == w.text.parse::<PublishSpec>())
        };
        let Some(at) = self.wishes.iter().position(same) else {
            let line = PublishError::NotPublished(harmless(text)).to_string();
            return (Vec::new(), vec![line]);
        };
        let wish = self.wishes.remove(at);
        let infos = wish.ports.iter().map(Published::info).collect();
        self.close_all(wish.ports).await;
        // The port may be one that a rule wants; but the listener may be closing too, and is seen to in a moment.
        self.retry_at = Some(Instant::now() + Duration::from_secs(1));
        (infos, Vec::new())
    }

    /// A wish goes before a rule: one that has the port gives it away.
    async fn make_way(&mut self, spec: &PublishSpec, n: u16) {
        let HostEnd::Ports { first, .. } = spec.host else { return };
        let port = first.saturating_add(n);
        let has = |auto: &Auto| matches!(auto, Auto::Published(_, p) if p.proto == spec.proto && p.host_port == port);
        let found: Vec<Wanted> = self.auto.iter().filter(|(_, a)| has(a)).map(|(w, _)| w.clone()).collect();
        for wanted in found.into_iter().filter(|_| first != 0) {
            if let Some(Auto::Published(_, port)) = self.auto.remove(&wanted) {
                self.close(port).await;
            }
        }
    }

    fn is_wished(&self, wanted: &Wanted) -> bool {
        let Place::Port { port, .. } = wanted.place else { return false };
        let wished = self.wishes.iter().flat_map(|w| &w.ports);
        wished.into_iter().any(|p| p.proto == wanted.proto && p.host_port == port)
    }

    fn wished_way(&self, spec: &PublishSpec, n: u16, own: Option<IpAddr>) -> Way {
        let port = spec.guest_port.saturating_add(n);
        match &spec.guest {
            GuestName::Address(ip) if Some(*ip) != own => carried(spec.proto, *ip, port),
            GuestName::Socket(_) => Way::Carried(carried_target(spec, n)),
            _ if own.is_some() => Way::Network(port),
            _ => carried(spec.proto, Ipv4Addr::LOCALHOST.into(), port),
        }
    }

    // ---- the operator ----

    fn publish_configured(&mut self, spec: &PublishSpec) -> Vec<Result<PortInfo, PublishError>> {
        let publish = |n: u16| {
            let bound = bind(spec, n, self.config.keep_alive)?;
            let port = self.serve(&spec.host, bound, spec.proto, carried_target(spec, n))?;
            let info = port.info();
            note_published(&self.requests, &info);
            Ok((port, info))
        };
        let done: Vec<Result<(Published, PortInfo), PublishError>> = (0..spec.count).map(publish).collect();
        let mut infos = Vec::new();
        for result in done {
            infos.push(result.map(|(port, info)| {
                self.configured.push(port);
                info
            }));
        }
        infos
    }

    async fn unpublish_named(&mut self, spec: &PublishSpec) -> Option<Vec<PortInfo>> {
        let mut gone: Vec<Published> = self.configured.extract_if(.., |p| p.is_named(spec)).collect();
        let named = |auto: &Auto| matches!(auto, Auto::Published(_, p) if p.is_named(spec));
        let autos: Vec<Wanted> = self.auto.iter().filter(|(_, a)| named(a)).map(|(w, _)| w.clone()).collect();
        for wanted in autos {
            if let Some(Auto::Published(listener, port)) = self.auto.remove(&wanted) {
                // Until it closes: what the operator takes away does not come back by itself.
                self.unwanted.insert(listener);
                gone.push(port);
            }
        }
        for wish in &mut self.wishes {
            gone.extend(wish.ports.extract_if(.., |p| p.is_named(spec)));
        }
        self.wishes.retain(|w| !w.ports.is_empty());
        if gone.is_empty() {
            return None;
        }
        let label = self.own_address().await.map_or_else(|| self.label(), |ip| ip.to_string());
        let infos = gone.iter().map(|p| with_guest(p.info(), &label)).collect();
        self.close_all(gone).await;
        Some(infos)
    }

    /// The ports that the data thread does not list: carried ones, and those that could not be published.
    fn extra_ports(&self) -> Vec<PortInfo> {
        let auto = self.auto.values().filter_map(|a| match a {
            Auto::Published(_, port) => Some(port),
            Auto::Refused(..) => None,
        });
        let published = auto.chain(self.wishes.iter().flat_map(|w| &w.ports)).chain(&self.configured);
        let carried = published.filter(|p| p.entrance.is_some()).map(Published::info);
        let refused = self.auto.iter().filter_map(|(wanted, auto)| match auto {
            Auto::Refused(listener, reason) => Some(refused_info(wanted, listener, reason)),
            Auto::Published(..) => None,
        });
        carried.chain(refused).collect()
    }

    /// For the guest: all that is its own.
    async fn all_ports(&self) -> Vec<PortInfo> {
        let label = self.own_address().await.map_or_else(|| self.label(), |ip| ip.to_string());
        let auto = self.auto.values().filter_map(|a| match a {
            Auto::Published(_, port) => Some(port),
            Auto::Refused(..) => None,
        });
        let network = auto.chain(self.wishes.iter().flat_map(|w| &w.ports)).filter(|p| p.entrance.is_none());
        let mut ports: Vec<PortInfo> = network.map(|p| with_guest(p.info(), &label)).collect();
        ports.extend(self.extra_ports());
        ports
    }

    fn info(&self) -> AgentInfo {
        let refused = self.auto.values().filter(|a| matches!(a, Auto::Refused(..))).count();
        AgentInfo {
            name: self.name.clone(),
            connected: self.session.is_some(),
            ready: self.ready,
            version: self.version.clone(),
            listeners: self.listeners.len(),
            ports: self.count(),
            refused,
            streams: self.shared.streams(),
            sessions: self.sessions,
        }
    }

    /// Ports published by rule or wish.
    fn count(&self) -> usize {
        let auto = self.auto.values().filter(|a| matches!(a, Auto::Published(..))).count();
        auto + self.wishes.iter().map(|w| w.ports.len()).sum::<usize>()
    }

    // ---- the network ----

    /// The guest's own address, where the stack knows it.
    async fn own_address(&self) -> Option<IpAddr> {
        let guest = self.guest_name();
        ask_data_thread(&self.requests, |reply| Request::GuestAddress { guest, reply }).await.flatten()
    }

    /// Guest ports the operator published by hand: a rule adds nothing to them.
    async fn taken_elsewhere(&self, own: Option<IpAddr>) -> HashSet<(Protocol, u16)> {
        let all = ask_data_thread(&self.requests, |reply| Request::Ports { reply }).await.unwrap_or_default();
        let labels = [own.map(|ip| ip.to_string()), self.name.clone()];
        let mine = |p: &PortInfo| {
            let auto = self.auto.values().filter_map(|a| match a {
                Auto::Published(_, port) => Some(port),
                Auto::Refused(..) => None,
            });
            auto.chain(self.wishes.iter().flat_map(|w| &w.ports)).any(|q| {
                q.entrance.is_none() && (q.proto, q.host_port, &q.bound) == (p.proto, p.host_port, &p.bind)
            })
        };
        let by_hand = all.iter().filter(|p| labels.iter().flatten().any(|l| *l == p.guest) && !mine(p));
        let configured = self.configured.iter().map(|p| {
            let info = p.info();
            (p.proto, info.guest_port)
        });
        by_hand.map(|p| (p.proto, p.guest_port)).chain(configured).collect()
    }

    /// How a listener is reached best.
    fn way(&self, listener: &Listener, own: Option<IpAddr>) -> Way {
        let everywhere = listener.address.is_unspecified();
        // The stack's address of a guest is of one family; a socket of IPv6 alone does not answer on the other.
        let same_family = own.is_some_and(|ip| !(listener.v6_only && ip.is_ipv4()));
        if own == Some(listener.address) || (everywhere && same_family) {
            return Way::Network(listener.port);
        }
        let address = match listener.address {
            ip if !everywhere => ip,
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        carried(listener.proto, address, listener.port)
    }

    // ---- those who wait ----

    /// Rings for those whose wish has come true.
    async fn ring(&mut self) {
        if self.waiters.is_empty() {
            return;
        }
        let ports = if self.waiters.iter().any(|(p, _)| p.is_some()) && self.session.is_some() {
            self.reachable().await
        } else {
            HashSet::new()
        };
        let ready = self.ready;
        self.waiters.retain(|(port, met)| {
            let Some(met) = met.upgrade() else { return false };
            let is_met = port.map_or(ready, |p| ports.contains(&p));
            if is_met {
                met.notify_one();
            }
            !is_met
        });
    }

    /// Host ports whose listener is there in the guest.
    async fn reachable(&self) -> HashSet<u16> {
        let listens = |port: u16| self.listeners.iter().any(|l| l.port == port);
        let own = self.all_ports().await;
        let listed =
            ask_data_thread(&self.requests, |reply| Request::Ports { reply }).await.unwrap_or_default();
        let label = self.own_address().await.map(|ip| ip.to_string());
        let of_mine = listed.into_iter().filter(|p| Some(&p.guest) == label.as_ref());
        own.into_iter()
            .chain(of_mine)
            .filter(|p| p.state == "listening" && (listens(p.guest_port) || p.guest_port == 0))
            .map(|p| p.host_port)
            .collect()
    }
}

fn with_guest(mut info: PortInfo, guest: &str) -> PortInfo {
    if info.guest.is_empty() {
        guest.clone_into(&mut info.guest);
    }
    info
}

fn refused_info(wanted: &Wanted, listener: &Listener, reason: &str) -> PortInfo {
    let (bind, host_port) = match &wanted.place {
        Place::Socket(path) => (vec![socket_label(path)], 0),
        Place::Port { bind, port, .. } => {
            (vec![bind.unwrap_or(Ipv4Addr::LOCALHOST.into()).to_string()], *port)
        }
    };
    PortInfo {
        proto: wanted.proto,
        bind,
        host_port,
        guest: listener.address.to_string(),
        guest_port: listener.port,
        state: format!("not published: {}", reason.chars().take(200).collect::<String>()),
        accepted: 0,
    }
}

fn carried(proto: Protocol, address: IpAddr, port: u16) -> Way {
    let address = SocketAddr::new(address, port);
    Way::Carried(match proto {
        Protocol::Tcp => Target::Tcp { address },
        Protocol::Udp => Target::Udp { address },
    })
}

/// Where place `n` of a spec that goes through the agent leads.
fn carried_target(spec: &PublishSpec, n: u16) -> Target {
    let port = spec.guest_port.saturating_add(n);
    let address = match &spec.guest {
        GuestName::Socket(path) => return Target::Unix { path: path.display().to_string() },
        GuestName::Address(ip) => SocketAddr::new(*ip, port),
        GuestName::Default | GuestName::Name(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
    };
    match spec.proto {
        Protocol::Tcp => Target::Tcp { address },
        Protocol::Udp => Target::Udp { address },
    }
}

/// The places rules want, and for each the listener that has it: of several, the one that most can reach.
fn wanted(
    listeners: &BTreeSet<Listener>,
    place: impl Fn(&Listener) -> Option<Place>,
) -> BTreeMap<Wanted, Listener> {
    let rank = |l: &Listener| match l.address {
        ip if ip.is_unspecified() => (0, l.v6_only, l.redirected),
        ip if ip.is_loopback() => (2, ip.is_ipv6(), l.redirected),
        _ => (1, l.v6_only, l.redirected),
    };
    let mut wanted: BTreeMap<Wanted, Listener> = BTreeMap::new();
    for listener in listeners {
        let Some(place) = place(listener) else { continue };
        let best = wanted.entry(Wanted { proto: listener.proto, place }).or_insert(*listener);
        if rank(listener) < rank(best) {
            *best = *listener;
        }
    }
    wanted
}

/// What the policy makes of a guest's wish.
fn allowed(text: &str, binds: GuestBinds) -> Result<PublishSpec, PublishError> {
    if text.len() > SPEC {
        return Err(PublishError::Policy(format!("a spec of {} bytes", text.len())));
    }
    let mut spec: PublishSpec = text.parse().map_err(|e| PublishError::Policy(format!("{e}")))?;
    match &mut spec.host {
        HostEnd::Unix(_) => return Err(PublishError::Policy("a socket file on the host".into())),
        HostEnd::Ports { bind: Bind::Address(ip), .. } if binds == GuestBinds::Loopback => match *ip {
            ip if ip.is_loopback() => {}
            // Docker asks for every address unless it is told otherwise.
            ip if ip.is_unspecified() => {
                let HostEnd::Ports { first, .. } = spec.host else { return Ok(spec) };
                spec.host = HostEnd::Ports { bind: Bind::Localhost, first };
            }
            ip => {
                return Err(PublishError::Policy(format!(
                    "listening on {ip}: loopback only, unless the host says --guest-binds any"
                )));
            }
        },
        HostEnd::Ports { .. } => {}
    }
    if let GuestName::Name(name) = &spec.guest {
        return Err(PublishError::Policy(format!("another guest, {name:?}")));
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(text: &str) -> Listener {
        let at: SocketAddr = text.parse().expect("an address");
        Listener {
            proto: Protocol::Tcp,
            address: at.ip(),
            port: at.port(),
            v6_only: false,
            redirected: false,
        }
    }

    #[test]
    fn of_several_listeners_on_one_port_the_most_reachable_is_published() {
        let everything = [super::super::rules::Rule::everything(false)];
        let chosen = |texts: &[&str]| {
            let listeners: BTreeSet<Listener> = texts.iter().map(|t| listener(t)).collect();
            let wanted = wanted(&listeners, |l| place(&everything, l));
            wanted.values().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(chosen(&["127.0.0.1:80", "[::1]:80"]), ["tcp 127.0.0.1:80"]);
        assert_eq!(chosen(&["127.0.0.1:80", "0.0.0.0:80", "10.0.0.1:80"]), ["tcp 0.0.0.0:80"]);
        assert_eq!(chosen(&["[::1]:80", "10.0.0.1:80"]), ["tcp 10.0.0.1:80"]);
        assert_eq!(chosen(&["[::1]:80", "127.0.0.1:81"]).len(), 2);
    }

    #[test]
    fn a_guests_wish_is_granted_within_the_policy() {
        let loopback = |text: &str| allowed(text, GuestBinds::Loopback);
        let host = |text: &str| loopback(text).map(|s| s.host);
        let localhost = |first| Ok(HostEnd::Ports { bind: Bind::Localhost, first });
        assert_eq!(host("8080:80"), localhost(8080));
        assert_eq!(host("0.0.0.0:8080:80"), localhost(8080));
        assert_eq!(host("[::]:8080:172.17.0.2:80"), localhost(8080));
        assert!(host("127.0.0.1:8080:80").is_ok());
        assert!(
            allowed("0.0.0.0:8080:80", GuestBinds::Any).is_ok_and(|s| s.to_string().starts_with("0.0.0.0"))
        );
        for (text, fault) in [
            ("192.0.2.1:8080:80", "--guest-binds any"),
            ("unix:/tmp/x:80", "a socket file on the host"),
            ("unix:/tmp/x:/tmp/y", "a socket file on the host"),
            ("8080:db:80", "another guest"),
            ("nonsense", "bad publish spec"),
        ] {
            assert!(loopback(text).is_err_and(|e| e.to_string().contains(fault)), "{text}");
        }
        assert!(loopback(&"1".repeat(SPEC + 1)).is_err());
    }
}
