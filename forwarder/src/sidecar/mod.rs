//! `portway serve`: the two threads, their start and their end.
//!
//! ```text
//!  bind everything ─► ready ─► data thread (this one): Driver::run
//!                              control thread: tokio ─ API · DNS · signals · state files
//! ```
//! Nothing is left half-started: every listener is bound before `ready` is said, and any failure before that ends the
//! process with nothing behind it. SIGTERM and SIGINT close listeners, reset flows and end with 0.

mod state;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use portway_api::control::NetworkInfo;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::dns::{Dns, DnsConfig};
use crate::driver::{Driver, SLOW_LIMIT, Slow, WAKER};
use crate::request::{Request, Requests};

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
}

/// As [`run`], with more doors.
///
/// # Errors
/// As [`run`].
pub fn run_with(config: &Config, doors: Vec<Door>) -> anyhow::Result<()> {
    raise_descriptor_limit();
    if let Some(dir) = &config.state_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("--state-dir: {}", dir.display()))?;
    }
    let poll = mio::Poll::new().context("cannot make a poll")?;
    let waker = Arc::new(mio::Waker::new(poll.registry(), WAKER).context("cannot make a waker")?);
    let (requests, incoming) = Requests::new(waker);
    let (slow, slow_incoming) = mpsc::channel(SLOW_LIMIT);
    let seed = getrandom::u64().map_err(|e| anyhow!("the host gives no randomness: {e}"))?;

    let dns = Dns::new(dns_config(config)).map_err(|e| anyhow!("{e}"))?;
    let mut driver = Driver::new(config, poll, incoming, slow, dns.search(), seed)?;
    if let Some(dir) = &config.state_dir {
        driver.restore_leases(state::leases(dir));
    }
    let ports = driver.publish_at_start(&config.publish).context("--publish")?;
    let api = config.particulars.control.then(|| crate::unix_path::listen(&config.api, 0o600)).transpose();
    let api = api.context("--api")?;
    let _api = api.is_some().then_some(RemovedAtEnd(&config.api));
    for p in &ports {
        tracing::info!(proto = %p.proto, bind = p.bind.join(","), host_port = p.host_port, guest = p.guest, guest_port = p.guest_port, "published");
    }
    let _pid = config.pid_file.as_deref().map(write_pid).transpose()?;

    let control = Control {
        requests: requests.clone(),
        dns,
        network: network(config),
        state_dir: config.state_dir.clone(),
    };
    let thread = std::thread::Builder::new().name("control".into());
    thread
        .spawn(move || control.run(api, slow_incoming, doors))
        .context("cannot start the control thread")?;
    say_ready(config.ready_fd, config.particulars.ready)?;
    tracing::info!(network = config.network, subnet = %config.subnet, api = %config.api.display(), "ready");
    driver.run().context("the data thread")?;
    tracing::info!("ended");
    Ok(())
}

fn network(config: &Config) -> NetworkInfo {
    NetworkInfo {
        name: config.network.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        subnet: config.subnet.to_string(),
        gateway: config.gateway.to_string(),
        host_alias: config.host_alias.to_string(),
        domain: crate::DOMAIN.into(),
    }
}

fn dns_config(config: &Config) -> DnsConfig {
    DnsConfig {
        domain: crate::DOMAIN.into(),
        aliases: vec!["containers.internal".into(), "docker.internal".into()],
        gateway: both(config.gateway, config.ipv6.as_ref().map(|v6| v6.gateway)),
        // Where nothing of the host is behind the gateway's own address, the host has none.
        host: if config.host_loopback || config.host_alias != config.gateway {
            both(config.host_alias, config.ipv6.as_ref().map(|v6| v6.host_alias))
        } else {
            Vec::new()
        },
        host_loopback: config.host_loopback,
        records: config.dns_host.clone(),
        upstreams: (!config.dns_upstream.is_empty()).then(|| config.dns_upstream.clone()),
        resolv_conf: config.resolv_conf.clone(),
        hosts: config.hosts_file.clone(),
    }
}

fn both(v4: std::net::Ipv4Addr, v6: Option<std::net::Ipv6Addr>) -> Vec<std::net::IpAddr> {
    std::iter::once(v4.into()).chain(v6.map(Into::into)).collect()
}

/// Every flow needs a descriptor: the soft limit goes up to the hard one.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "the descriptor limit could not be raised");
    }
}

struct RemovedAtEnd<'a>(&'a Path);

impl Drop for RemovedAtEnd<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

fn write_pid(path: &Path) -> anyhow::Result<RemovedAtEnd<'_>> {
    std::fs::write(path, std::process::id().to_string())
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

/// The control thread.
struct Control {
    requests: Requests,
    dns: Arc<Dns>,
    network: NetworkInfo,
    state_dir: Option<std::path::PathBuf>,
}

impl Control {
    fn run(
        self,
        api: Option<std::os::unix::net::UnixListener>,
        slow: mpsc::Receiver<Slow>,
        doors: Vec<Door>,
    ) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the control thread cannot start");
                let _ = self.requests.send(Request::Shutdown);
                return;
            }
        };
        runtime.block_on(async {
            match api.map(UnixListener::from_std) {
                Some(Ok(api)) => drop(tokio::spawn(crate::control::serve(
                    api,
                    self.requests.clone(),
                    self.network.clone(),
                ))),
                Some(Err(error)) => tracing::error!(%error, "the control socket cannot be served"),
                None => {}
            }
            let context = DoorContext { requests: self.requests.clone(), dns: Arc::clone(&self.dns) };
            doors.into_iter().for_each(|door| door(&context));
            tokio::spawn(end_on_signal(self.requests.clone()));
            self.slow_things(slow).await;
        });
    }

    async fn slow_things(self, mut slow: mpsc::Receiver<Slow>) {
        let mut known = Vec::new();
        while let Some(thing) = slow.recv().await {
            match thing {
                Slow::Dns(ticket, query) => {
                    let (dns, requests) = (Arc::clone(&self.dns), self.requests.clone());
                    tokio::spawn(async move {
                        if let Some(answer) = dns.answer_datagram(&query).await {
                            // When the queue is full the answer is lost, and the guest asks again.
                            let _ = requests.send(Request::DnsAnswer { ticket, answer });
                        }
                    });
                }
                Slow::HandOver { flow, to, path } => {
                    let requests = self.requests.clone();
                    tokio::spawn(async move {
                        let stream = crate::personality::vpnkit::dial(&path, to).await;
                        let stream = stream.inspect_err(
                            |error| tracing::debug!(%error, path = %path.display(), "not taken"),
                        );
                        let mut answer = Request::HandedOver { flow, stream: stream.ok() };
                        // A full queue is about to be read; without an answer the guest would wait for ever.
                        while let Err(unsent) = requests.offer(answer) {
                            answer = unsent;
                            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                        }
                    });
                }
                Slow::DnsStream(stream) => match tokio::net::UnixStream::from_std(stream) {
                    Ok(stream) => drop(tokio::spawn(Arc::clone(&self.dns).serve_stream(stream))),
                    Err(error) => tracing::warn!(%error, "a DNS connection cannot be served"),
                },
                Slow::Leases(leases, names) => {
                    self.name_guests(&names, &mut known);
                    if let Some(dir) = &self.state_dir
                        && let Err(error) = state::keep_leases(dir, &leases)
                    {
                        tracing::warn!(%error, dir = %dir.display(), "leases could not be kept");
                    }
                }
            }
        }
    }
}

impl Control {
    /// Makes DNS know the guests by the names they have now, and forget those in `known` that are gone.
    fn name_guests(&self, names: &[(String, std::net::IpAddr)], known: &mut Vec<String>) {
        for gone in known.iter().filter(|k| !names.iter().any(|(name, _)| name == *k)) {
            self.dns.remove_guest(gone);
        }
        known.clear();
        for (name, _) in names {
            if known.contains(name) {
                continue;
            }
            let addresses: Vec<_> = names.iter().filter(|(n, _)| n == name).map(|(_, ip)| *ip).collect();
            match self.dns.set_guest(name, &addresses) {
                Ok(()) => known.push(name.clone()),
                // A guest may call itself anything; it just has no name then.
                Err(error) => tracing::debug!(%error, "a guest's name is not given"),
            }
        }
    }
}

async fn end_on_signal(requests: Requests) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signals cannot be watched: the process ends at once when it gets one");
        return;
    };
    loop {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        if requests.send(Request::Shutdown).is_ok() {
            return;
        }
    }
}
