//! `portway serve`: the two threads, their start and their end.
//!
//! ```text
//!  bind everything ─► ready ─► data thread (this one): Driver::run
//!                              control thread: tokio ─ API · DNS · signals · state files
//! ```
//! Nothing is left half-started: every listener is bound before `ready` is said, and any failure before that ends the
//! process with nothing behind it. SIGTERM and SIGINT close listeners, reset flows and end with 0.

mod join;
mod pcap;
mod state;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use portway_api::control::{NetworkInfo, PortInfo, SandboxInfo};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::pcap::Pcap;
use crate::agent::Agents;
use crate::config::{Config, DoorAddress, GuestApi};
use crate::control::App;
use crate::control::DoorListener;
use crate::control::kept::KeptPorts;
use crate::dns::{Dns, DnsConfig};
use crate::driver::{Driver, LeaseBook, SLOW_LIMIT, Slow, WAKER};
use crate::events::{EventLog, EventQueue, Numbered};
use crate::publish::spec::PublishSpec;
use crate::request::{PublishError, Request, Requests};
use crate::sandbox::paths::Paths;
use crate::unix_path::Removed;
use crate::uplink::{self, News};
use crate::vsock::{PortSockets, Transport, Vsock};

/// What the sandbox lets state files do: be written beside the old one, brought to the disk and renamed over it.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] = crate::sandbox::sandbox_calls![
    SYS_openat,
    SYS_fsync,
    SYS_fdatasync,
    SYS_ftruncate,
    #[cfg(target_arch = "x86_64")]
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    SYS_mkdir,
    SYS_mkdirat,
    SYS_getdents64,
];

/// What the sandbox lets it tell its supervisor (`sd_notify`).
#[cfg(target_os = "linux")]
pub(crate) const SUPERVISOR_CALLS: &[crate::sandbox::Call] =
    crate::sandbox::sandbox_calls![SYS_sendto, SYS_sendmsg];

/// Runs the network until it is told to end.
///
/// # Errors
/// When something of the configuration cannot be had at this host.
pub fn run(config: &Config) -> anyhow::Result<()> {
    run_with(config, Vec::new())
}

/// What a personality serves beside the network. It is called on the control thread, inside its runtime, when everything
/// is bound: what cannot be had must have been found out before.
pub type Door = Box<dyn FnOnce(&DoorContext) + Send>;

/// What a [`Door`] is given.
#[derive(Debug, Clone)]
pub struct DoorContext {
    /// The way to the data thread.
    pub requests: Requests,
    /// The names guests are answered.
    pub dns: Arc<Dns>,
    /// Where sockets may be made from now on.
    pub(crate) allowed: Arc<Paths>,
}

/// As [`run`], with more doors.
///
/// # Errors
/// As [`run`].
pub fn run_with(config: &Config, doors: Vec<Door>) -> anyhow::Result<()> {
    crate::last_net::tell_panics();
    crate::fd::raise_limit();
    // What we make is ours alone from the first moment, also between a socket's `bind` and its `chmod`.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    if let Some(dir) = &config.state_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("--state-dir: {}", dir.display()))?;
    }
    let poll = mio::Poll::new().context("cannot make a poll")?;
    let waker = Arc::new(mio::Waker::new(poll.registry(), WAKER).context("cannot make a waker")?);
    let (requests, incoming) = Requests::new(waker);
    let (slow, slow_incoming) = mpsc::channel(SLOW_LIMIT);
    let seed = getrandom::u64().map_err(|e| anyhow!("the host gives no randomness: {e}"))?;

    let allowed = Arc::new(Paths::of(config));
    // Before anything is learned of the network, so that no change of it is missed.
    let watch = uplink::Watch::open().inspect_err(|error| {
        tracing::warn!(%error, "the host's network cannot be watched: guests' IPv6 stays as it is, DNS answers are kept for their time");
    });
    let watch = watch.ok();
    let dns = Dns::new(dns_config(config)).map_err(|e| anyhow!("{e}"))?;
    for zone in &config.particulars.zones {
        dns.add_zone(zone).map_err(|e| anyhow!("dns: {e}"))?;
    }
    let mut driver = Driver::new(config, poll, incoming, slow, dns.search(), seed)?;
    let mut keeper = match &config.state_dir {
        Some(dir) => {
            driver.restore_leases(state::leases(dir, config.lease_time));
            Some(state::Keeper::new(dir))
        }
        None => None,
    };
    let join = config.join.as_deref().map(|path| crate::unix_path::listen(path, 0o600)).transpose();
    let join = join.context("--join")?;
    let _join = config.join.as_deref().map(RemovedAtEnd);
    let (queue, event_queue) = EventQueue::new();
    driver.tell_events(queue);
    let (carried, direct): (Vec<_>, Vec<_>) =
        config.publish.iter().cloned().partition(PublishSpec::needs_agent);
    let mut ports = driver.publish_at_start(&direct).context("--publish")?;
    let (agents, _agent_files) = Agents::open(&config.agent, carried.into_iter())?;
    let kept = config.state_dir.as_deref().map(|dir| Arc::new(KeptPorts::read(dir)));
    if let Some(kept) = &kept {
        ports.extend(publish_kept(&mut driver, kept, &allowed));
    }
    let pcap = config
        .pcap
        .as_deref()
        .map(|path| Pcap::open(&mut driver, path).with_context(|| format!("--pcap: {}", path.display())));
    let pcap = pcap.transpose()?;
    let (vsocks, _names) = vsocks(config)?;
    let api = config.particulars.control.then(|| api_listener(config)).transpose()?;
    let (api, _api) = api.map_or((None, None), |(api, guard)| (Some(api), guard));
    let metrics = config.metrics.as_deref().map(metrics_listener).transpose()?;
    for p in &ports {
        tracing::info!(proto = %p.proto, bind = p.bind.join(","), host_port = p.host_port, guest = p.guest, guest_port = p.guest_port, "published");
    }
    let _pid = config.pid_file.as_deref().map(write_pid).transpose()?;

    let ssh = config.particulars.ssh.iter().cloned().map(crate::ssh::Bound::new);
    let ssh = ssh.collect::<Result<Vec<_>, _>>().context("-forward-sock")?;
    let (more, _more) = further_doors(config)?;

    // Nothing has been read from a guest yet, and no thread but this one runs: all that start below inherit the sandbox.
    driver.confine(Arc::clone(&allowed));
    let refusals = refusals().context("the sandbox")?;
    let sandbox = crate::sandbox::enter(config, &allowed)?;
    if let Some(keeper) = &mut keeper {
        keeper.start().context("cannot start the thread that keeps leases")?;
    }
    let pcap = pcap.map(Pcap::start).transpose().context("--pcap")?;
    for (vsock, _) in &vsocks {
        vsock.start().context("--vsock")?;
    }

    let control = Control {
        requests: requests.clone(),
        dns,
        network: network(config, sandbox),
        refusals,
        agents: Some(agents),
        allowed,
        leases: driver.watch_leases(),
        keep: keeper.as_ref().map(state::Keeper::sender),
        kept,
        guest_api: config.guest_api,
        notification: config.notification.clone(),
        ssh,
        vsocks,
        join: join.map(|listener| (listener, config.clone())),
        watch,
        ipv6_follows_host: config.ipv6.as_ref().is_some_and(|v6| v6.follows_host),
        // The operator's own list stays.
        search: config.dns_search.is_none().then(|| SearchList {
            first: config.particulars.search.clone(),
            is_advertised: config.ipv6.is_some(),
        }),
    };
    let (up, is_up) = std::sync::mpsc::channel();
    let doors =
        Doors { more, up, api, metrics, events: event_queue, slow: slow_incoming, personality: doors };
    let thread = std::thread::Builder::new().name("control".into());
    let ending = requests.clone();
    let thread = thread.spawn(move || {
        // Without this thread there are no names and no API: better that a supervisor starts all anew.
        if crate::last_net::caught(|| control.run(doors)).is_none() {
            while ending.send(Request::Shutdown).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            return Err(anyhow!("the control thread panicked"));
        }
        Ok(())
    });
    let thread = thread.context("cannot start the control thread")?;
    // Ready means too that signals are heard: who is told so may end us at once.
    is_up.recv().context("the control thread has not started")?;
    say_ready(config.ready_fd, config.particulars.ready)?;
    tell_supervisor(&[NotifyState::Ready, NotifyState::Status("ready")]);
    tracing::info!(network = config.network, subnet = %config.subnet, api = %config.api.display(), "ready");
    crate::program::give_back();
    let ended = driver.run();
    tell_supervisor(&[NotifyState::Stopping]);
    if let Some(keeper) = keeper {
        keeper.finish(&driver.lease_reports());
    }
    ended.context("the data thread")?;
    // With the data thread the control thread has nothing to serve: it ends, and its listeners' files go with them.
    drop(driver);
    let controlled = thread.join();
    if let Some(writer) = pcap {
        // What was seen is written before the end.
        let _ = writer.join();
    }
    tracing::info!("ended");
    controlled.map_err(|_| anyhow!("the control thread panicked"))?
}

/// The guests' vsocks with the sockets of their ports, and the sockets' names, which go at the end.
fn vsocks(config: &Config) -> anyhow::Result<(Vec<GuestVsock>, Vec<Removed>)> {
    let (mut vsocks, mut all_names) = (Vec::new(), Vec::new());
    for (n, spec) in config.vsock.iter().enumerate() {
        let vsock = Vsock::open(spec, config.vsock_dir.as_deref()).context("--vsock")?;
        if let Transport::VhostUser(path) = &spec.transport {
            all_names.push(Removed(path.clone()));
        }
        let mut ports = None;
        if let Some(dir) = config.vsock_dir.as_ref().filter(|_| !config.vsock_ports.is_empty()) {
            let bound = PortSockets::bind(dir, vsock.cid(), &config.vsock_ports, n == 0);
            let (sockets, names) = bound.context("--vsock-ports")?;
            all_names.extend(names);
            ports = Some(sockets);
        }
        vsocks.push((vsock, ports));
    }
    Ok((vsocks, all_names))
}

fn network(config: &Config, sandbox: SandboxInfo) -> NetworkInfo {
    NetworkInfo {
        name: config.network.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        subnet: config.subnet.to_string(),
        gateway: config.gateway.to_string(),
        gateway_mac: config.particulars.gateway_mac.to_string(),
        host_alias: config.host_alias.to_string(),
        ipv6: config.ipv6.is_some(),
        subnet6: config.ipv6.as_ref().map(|v6| v6.subnet.to_string()),
        gateway6: config.ipv6.as_ref().map(|v6| v6.gateway.to_string()),
        host_alias6: config.ipv6.as_ref().map(|v6| v6.host_alias.to_string()),
        domain: crate::DOMAIN.into(),
        sandbox,
        // These change while it runs: they are filled in when somebody asks.
        dns_upstreams: Vec::new(),
        log_file: config.log_file.as_deref().map(absolute),
        state_dir: config.state_dir.as_deref().map(absolute),
        started_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// A path as everybody can open it, who may be in another directory.
fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// Publishes what was published live in an earlier run. One that fails is said and stays kept: its port may be free
/// again at the next start.
fn publish_kept(driver: &mut Driver, kept: &KeptPorts, allowed: &Paths) -> Vec<PortInfo> {
    let mut ports = Vec::new();
    for spec in kept.specs() {
        // Settings may have changed since it was published.
        if let Err(error) = spec.within(allowed) {
            tracing::warn!(%spec, %error, "a kept port is not published");
            continue;
        }
        match driver.publish_at_start(std::slice::from_ref(&spec)) {
            Ok(mut done) => ports.append(&mut done),
            // The configuration has it by now.
            Err(PublishError::AlreadyPublished(_)) => {}
            Err(error) => tracing::warn!(%spec, %error, "a kept port is not published"),
        }
    }
    ports
}

/// The control socket: the one systemd holds for us under the name `api`, or one of our own.
fn api_listener(config: &Config) -> anyhow::Result<(StdUnixListener, Option<RemovedAtEnd<'_>>)> {
    if let Some(fd) = crate::fd::activated("api").context("--api")? {
        let listener = StdUnixListener::from(fd);
        listener.set_nonblocking(true).context("--api")?;
        return Ok((listener, None));
    }
    let api = crate::unix_path::listen(&config.api, 0o600).context("--api")?;
    Ok((api, Some(RemovedAtEnd(&config.api))))
}

/// Listeners of the API, and whether VMs may come in there.
type FurtherDoors = Vec<(DoorListener, bool)>;

/// Binds the further places of the API; unix sockets go when the second part of the answer goes.
fn further_doors(config: &Config) -> anyhow::Result<(FurtherDoors, Vec<RemovedAtEnd<'_>>)> {
    let (mut doors, mut paths) = (Vec::new(), Vec::new());
    for door in &config.doors {
        let listener = match &door.address {
            DoorAddress::Unix(path) => {
                let listener = crate::unix_path::listen(path, 0o600).context("-listen")?;
                paths.push(RemovedAtEnd(path));
                DoorListener::Unix(listener)
            }
            DoorAddress::Tcp(address) => {
                let bound = std::net::TcpListener::bind(address);
                let listener = bound.with_context(|| format!("-listen: cannot listen on tcp {address}"))?;
                listener.set_nonblocking(true).context("-listen")?;
                DoorListener::Tcp(listener)
            }
            #[cfg(target_os = "linux")]
            DoorAddress::Vsock(port) => {
                let bound = crate::vsock::HostPort::bind(*port);
                DoorListener::Vsock(
                    bound.with_context(|| format!("-listen: cannot listen on vsock port {port}"))?,
                )
            }
            #[cfg(not(target_os = "linux"))]
            DoorAddress::Vsock(port) => {
                return Err(anyhow!("-listen: vsock port {port}: this system has no AF_VSOCK"));
            }
        };
        doors.push((listener, door.connect));
    }
    Ok((doors, paths))
}

fn metrics_listener(address: &str) -> anyhow::Result<std::net::TcpListener> {
    let bound = std::net::TcpListener::bind(address);
    let listener = bound.with_context(|| format!("--metrics: cannot listen on tcp {address}"))?;
    listener.set_nonblocking(true).context("--metrics")?;
    tracing::info!(address = %listener.local_addr().context("--metrics")?, "metrics");
    Ok(listener)
}

/// Tells systemd, or whoever set NOTIFY_SOCKET; nobody having asked is no fault.
fn tell_supervisor(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the supervisor could not be told (NOTIFY_SOCKET)");
    }
}

/// Where the sandbox rings when it refuses a call; nowhere on systems without one.
fn refusals() -> std::io::Result<Option<std::os::unix::net::UnixStream>> {
    #[cfg(target_os = "linux")]
    return crate::sandbox::refused::bell().map(Some);
    #[cfg(not(target_os = "linux"))]
    Ok(None)
}

fn dns_config(config: &Config) -> DnsConfig {
    DnsConfig {
        domain: crate::DOMAIN.into(),
        aliases: vec!["containers.internal".into(), "docker.internal".into()],
        // gvproxy's guests ask port 80 of the gateway by its name, and gvproxy has it over IPv4; some try one address alone.
        gateway: both(
            config.gateway,
            config.ipv6.as_ref().map(|v6| v6.gateway).filter(|_| config.guest_api != GuestApi::Any),
        ),
        // Where nothing of the host is behind the gateway's own address, the host has none.
        host: if config.host_loopback || config.host_alias != config.gateway {
            both(config.host_alias, config.ipv6.as_ref().map(|v6| v6.host_alias))
        } else {
            Vec::new()
        },
        host_loopback: config.host_loopback,
        records: config.dns_host.clone(),
        subnets: std::iter::once(config.subnet).chain(config.ipv6.as_ref().map(|v6| v6.subnet)).collect(),
        upstreams: config.dns_upstream.clone(),
        authorities: config.dns_ca.clone(),
        rebind_protection: config.dns_rebind_protection,
        private_domains: config.dns_private.clone(),
        resolv_conf: config.resolv_conf.clone(),
        uplinks: Some("/run/systemd/resolve/resolv.conf".into()),
        hosts: config.hosts_file.clone(),
    }
}

fn both(v4: std::net::Ipv4Addr, v6: Option<std::net::Ipv6Addr>) -> Vec<std::net::IpAddr> {
    std::iter::once(v4.into()).chain(v6.map(Into::into)).collect()
}

struct RemovedAtEnd<'a>(&'a Path);

impl Drop for RemovedAtEnd<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

fn write_pid(path: &Path) -> anyhow::Result<RemovedAtEnd<'_>> {
    let written = std::fs::write(path, std::process::id().to_string());
    // Whoever may see processes may see this one's number.
    let readable = std::fs::Permissions::from_mode(0o644);
    written
        .and_then(|()| std::fs::set_permissions(path, readable))
        .with_context(|| format!("--pid-file: {}", path.display()))?;
    Ok(RemovedAtEnd(path))
}

fn say_ready(fd: Option<i32>, word: &str) -> anyhow::Result<()> {
    let Some(fd) = fd else { return Ok(()) };
    let mut file = std::fs::File::from(crate::fd::inherit(fd).context("--ready-fd")?);
    // One who has stopped waiting does not keep us from serving.
    let _ = file.write_all(word.as_bytes());
    Ok(())
}

/// A guest's vsock, and the sockets of its ports where it has some.
type GuestVsock = (Vsock, Option<PortSockets>);

/// The control thread.
struct Control {
    requests: Requests,
    dns: Arc<Dns>,
    network: NetworkInfo,
    /// See [`refusals`].
    refusals: Option<std::os::unix::net::UnixStream>,
    agents: Option<Agents>,
    /// Where sockets may be made from now on.
    allowed: Arc<Paths>,
    leases: watch::Receiver<LeaseBook>,
    keep: Option<state::Keep>,
    kept: Option<Arc<KeptPorts>>,
    guest_api: GuestApi,
    notification: Option<std::path::PathBuf>,
    ssh: Vec<crate::ssh::Bound>,
    vsocks: Vec<GuestVsock>,
    join: Option<(std::os::unix::net::UnixListener, Config)>,
    watch: Option<uplink::Watch>,
    ipv6_follows_host: bool,
    /// `None` when guests do not search the host's domains.
    search: Option<SearchList>,
}

/// The domains guests search, when the host's are among them.
struct SearchList {
    /// Those before the host's.
    first: Vec<String>,
    /// Whether guests are told of changes at once, by router advertisements.
    is_advertised: bool,
}

/// Where things come in to the control thread.
struct Doors {
    more: FurtherDoors,
    /// Told when everything is served and signals are heard.
    up: std::sync::mpsc::Sender<()>,
    api: Option<StdUnixListener>,
    metrics: Option<std::net::TcpListener>,
    events: mpsc::Receiver<Numbered>,
    slow: mpsc::Receiver<Slow>,
    personality: Vec<Door>,
}

impl Control {
    fn run(mut self, doors: Doors) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the control thread cannot start");
                let _ = self.requests.send(Request::Shutdown);
                return;
            }
        };
        let Doors { more, up, api, metrics, events, slow, personality } = doors;
        runtime.block_on(async {
            let log = Arc::new(EventLog::default());
            let app = App::new(
                self.requests.clone(),
                self.network.clone(),
                Arc::clone(&self.dns),
                Arc::clone(&log),
                self.kept.clone(),
                self.guest_api,
            )
            .within(Arc::clone(&self.allowed));
            if let Some(path) = self.notification.clone() {
                let followed = log.follow(0);
                tokio::spawn(crate::gvproxy::notify::run(path, followed.1, app.clone()));
            }
            #[cfg(target_os = "linux")]
            if let Some(bell) = self.refusals.take() {
                tokio::spawn(tell_refusals(bell));
            }
            self.ssh.drain(..).for_each(|bound| app.serve_forward(bound));
            for (listener, connect) in more {
                app.serve_door(listener, connect);
            }
            tokio::spawn(async move { log.keep(events).await });
            match api.map(UnixListener::from_std) {
                Some(Ok(api)) => drop(tokio::spawn(crate::control::serve(api, app.clone()))),
                Some(Err(error)) => tracing::error!(%error, "the control socket cannot be served"),
                None => {}
            }
            let context = DoorContext {
                requests: self.requests.clone(),
                dns: Arc::clone(&self.dns),
                allowed: Arc::clone(&self.allowed),
            };
            personality.into_iter().for_each(|door| door(&context));
            let mut agents_streams = Vec::new();
            for (vsock, ports) in self.vsocks.drain(..) {
                agents_streams
                    .push((vsock.name().map(str::to_owned), vsock.listen(portway_api::agent::PORT)));
                if let Some(ports) = ports {
                    tokio::spawn(ports.serve(vsock));
                }
            }
            if let Some(agents) = self.agents.take() {
                agents.serve(&self.requests, agents_streams, &self.allowed);
            }
            if let Some((listener, config)) = self.join.take() {
                match UnixListener::from_std(listener) {
                    Ok(listener) => drop(tokio::spawn(join::serve(
                        listener,
                        config,
                        Arc::clone(&self.allowed),
                        self.requests.clone(),
                    ))),
                    Err(error) => tracing::error!(%error, "the socket of --join cannot be served"),
                }
            }
            tokio::spawn(follow_leases(self.leases.clone(), Arc::clone(&self.dns), self.keep.clone()));
            if let Some(watch) = self.watch.take() {
                let (dns, requests) = (Arc::clone(&self.dns), self.requests.clone());
                tokio::spawn(follow_network(watch, dns, requests, self.ipv6_follows_host));
            }
            if let Some(search) = self.search.take() {
                tokio::spawn(follow_search(search, Arc::clone(&self.dns), self.requests.clone()));
            }
            match metrics.map(tokio::net::TcpListener::from_std) {
                Some(Ok(listener)) => {
                    drop(tokio::spawn(crate::control::serve_metrics(listener, app.clone())))
                }
                Some(Err(error)) => tracing::error!(%error, "the metrics cannot be served"),
                None => {}
            }
            match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
                (Ok(term), Ok(int)) => drop(tokio::spawn(end_on_signal(term, int, self.requests.clone()))),
                _ => tracing::error!("signals cannot be watched: the process ends at once when it gets one"),
            }
            // One who does not wait any more has ended.
            let _ = up.send(());
            self.slow_things(slow, app).await;
        });
    }

    async fn slow_things(self, mut slow: mpsc::Receiver<Slow>, app: App) {
        while let Some(thing) = slow.recv().await {
            match thing {
                Slow::Dns(ticket, query, waiting) => {
                    drop(waiting);
                    let (dns, requests) = (Arc::clone(&self.dns), self.requests.clone());
                    tokio::spawn(async move {
                        if let Some(answer) = dns.answer_datagram(ticket.port, &query).await {
                            // When the queue is full the answer is lost, and the guest asks again.
                            let _ = requests.send(Request::DnsAnswer { ticket, answer });
                        }
                    });
                }
                Slow::HandOver { flow, to, taker } => {
                    let requests = self.requests.clone();
                    let context = DoorContext {
                        requests: requests.clone(),
                        dns: Arc::clone(&self.dns),
                        allowed: Arc::clone(&self.allowed),
                    };
                    tokio::spawn(async move {
                        let stream = taker.take(to, &context).await;
                        let stream = stream.inspect_err(|error| tracing::debug!(%error, %to, "not taken"));
                        let mut answer = Request::HandedOver { flow, stream: stream.ok() };
                        // A full queue is about to be read; without an answer the guest would wait for ever.
                        while let Err(unsent) = requests.offer(answer) {
                            answer = *unsent;
                            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                        }
                    });
                }
                Slow::DnsStream(port, stream) => match tokio::net::UnixStream::from_std(stream) {
                    Ok(stream) => drop(tokio::spawn(Arc::clone(&self.dns).serve_stream(port, stream))),
                    Err(error) => tracing::warn!(%error, "a DNS connection cannot be served"),
                },
                Slow::ApiStream(stream, guest) => match tokio::net::UnixStream::from_std(stream) {
                    Ok(stream) => app.serve_guest(stream, guest),
                    Err(error) => tracing::warn!(%error, "a guest's connection to port 80 cannot be served"),
                },
            }
        }
    }
}

/// Makes DNS know the guests by the names they have, and has their leases kept.
async fn follow_leases(mut leases: watch::Receiver<LeaseBook>, dns: Arc<Dns>, keep: Option<state::Keep>) {
    loop {
        let book = leases.borrow_and_update().clone();
        dns.set_guests(&book.names);
        if let Some(keep) = &keep {
            keep.keep(book.leases);
        }
        if leases.changed().await.is_err() {
            return; // the data thread has ended
        }
    }
}

/// Says which system calls the sandbox refused, each once.
#[cfg(target_os = "linux")]
async fn tell_refusals(bell: std::os::unix::net::UnixStream) {
    use tokio::io::AsyncReadExt;
    let mut bell = match tokio::net::UnixStream::from_std(bell) {
        Ok(bell) => bell,
        Err(error) => return tracing::warn!(%error, "what the sandbox refuses is counted and not told"),
    };
    let (mut teller, mut rings) = (crate::sandbox::refused::Teller::default(), [0; 64]);
    while bell.read(&mut rings).await.is_ok_and(|n| n > 0) {
        for call in teller.news() {
            tracing::warn!(
                call,
                "the sandbox refused a system call; this is a fault of portway, please report it"
            );
        }
    }
}

/// How often it is looked whether the host searches other domains, where guests would be told at once.
/// Seldom, for each look wakes an idle process: a change of the host's network and every query have it looked at once.
const SEARCH_LOOK: std::time::Duration = std::time::Duration::from_secs(30);

/// Tells the data thread which domains the host searches, when that changes. Elsewhere than where it is advertised, guests ask again
/// only when they renew a lease: a change that the next query finds is soon enough.
async fn follow_search(list: SearchList, dns: Arc<Dns>, requests: Requests) {
    let mut search = dns.watch_search();
    loop {
        if list.is_advertised {
            // A look that finds something new has it told below.
            let Ok(changed) = tokio::time::timeout(SEARCH_LOOK, search.changed()).await else {
                let _ = dns.search();
                continue;
            };
            if changed.is_err() {
                return;
            }
        } else if search.changed().await.is_err() {
            return;
        }
        let domains = [list.first.clone(), search.borrow_and_update().clone()].concat();
        // When the queue is full guests go on with what they were told.
        let _ = requests.send(Request::Search { domains });
    }
}

/// Tells the data thread and DNS what becomes of the host's network.
async fn follow_network(watch: uplink::Watch, dns: Arc<Dns>, requests: Requests, ipv6_follows_host: bool) {
    let followed = watch.follow(|news| match news {
        News::Routes if ipv6_follows_host => requests.send(Request::Ipv6Uplink(uplink::has_ipv6())).is_ok(),
        News::Routes => true,
        News::Network => {
            tracing::debug!("the host may be in another network");
            dns.network_changed();
            true
        }
    });
    if let Err(error) = followed.await {
        tracing::warn!(%error, "the host's network is watched no longer");
    }
}

async fn end_on_signal(mut term: Signal, mut int: Signal, requests: Requests) {
    loop {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        // At an overloaded data thread the next signal tries again.
        if requests.send(Request::Shutdown).is_ok() {
            return;
        }
    }
}
