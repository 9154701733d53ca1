//! vpnkit: the network of hyperkit's, linuxkit's and rootlesskit's VMs and namespaces.
//!
//! ```text
//!  --ethernet ─► a `vpnkit` link (link::vpnkit), several VMs, addresses 192.168.65.x
//!  --port ─► control ─┬─ ninep (vpnkit's own way)  ─┐
//!                     └─ HTTP (linuxkit's way)     ─┴─► expose ─► published ports, or plane ─► forwarder in the guest
//!  --tcpv4-forwards, --udpv4-forwards, --gateway-forwards ─► ports of the gateway that lead to the host
//!  --diagnostics ─► one tar archive per connection;  --introspection ─► the same over 9P
//! ```
//! docs/guide/vpnkit.md has every option, and what of it differs. Source: vpnkit's help text and documents, and what its
//! callers exchange with it.

mod args;
mod captures;
mod control;
mod diagnostics;
mod expose;
mod files;
pub mod forward;
mod http;
pub mod mux;
pub mod ninep;
mod outgoing;
mod pcap;
mod plane;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use portway_netstack::{Duration, Services, Subnet};

use self::args::{Args, Door as Socket};
use self::captures::Captures;
use self::diagnostics::{Shown, Source};
use self::expose::Exposer;
pub use self::http::{Proxied, Settings as HttpSettings};
pub use self::outgoing::{Outgoing, Taker};
use self::plane::{CHANNELS, Plane};
use super::Particulars;
use crate::config::{Config, GuestApi, LinkConfig, LogLevel, Settings, UnixPath};
use crate::sidecar::Door;

const NAME: &str = "vpnkit";
/// The release whose options and answers these are.
const VERSION: &str = "0.6.0";
/// An idle time that never comes.
const NEVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Runs vpnkit with `args`, its name first.
pub(super) fn main(args: &[OsString]) -> ExitCode {
    let args: Args = match super::parsed(NAME, args) {
        Ok(args) => args,
        Err(code) => return code,
    };
    if args.version {
        super::say(&format!("{VERSION}\nportway: {}\n", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    match prepare(&args) {
        Ok(Prepared { config, doors, sockets, warnings }) => {
            for line in warnings {
                use std::io::Write;
                let _ = writeln!(std::io::stderr(), "vpnkit: {line}");
            }
            super::serve(NAME, &config, doors, &sockets)
        }
        Err(line) => super::fail(NAME, &line),
    }
}

/// Everything that is needed to run.
struct Prepared {
    config: Config,
    doors: Vec<Door>,
    /// Files to remove at the end.
    sockets: Vec<PathBuf>,
    /// What has less effect than one might think.
    warnings: Vec<String>,
}

/// The addresses of one network, checked against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    subnet: Subnet,
    gateway: Ipv4Addr,
    /// `None`: the host is not reached by an address.
    host: Option<Ipv4Addr>,
    pool: (Ipv4Addr, Ipv4Addr),
}

impl Plan {
    /// The smallest network that has all of `args`' addresses as addresses of hosts.
    fn of(args: &Args) -> Result<Self, String> {
        let host = (!args.host_ip.is_unspecified()).then_some(args.host_ip);
        let (gateway, pool) = (args.gateway_ip, (args.lowest_ip, args.highest_ip));
        let all = [Some(gateway), host, Some(pool.0), Some(pool.1)];
        if pool.0 > pool.1 {
            return Err(format!("--lowest-ip {} is above --highest-ip {}", pool.0, pool.1));
        }
        if host == Some(gateway) {
            return Err(format!("--host-ip and --gateway-ip are both {gateway}"));
        }
        let holds = |subnet: &Subnet| {
            all.iter().flatten().all(|ip| {
                let ip = IpAddr::V4(*ip);
                subnet.contains(ip) && ip != subnet.network() && Some(ip) != subnet.broadcast()
            })
        };
        let subnet = (8..=30).rev().filter_map(|prefix| Subnet::new(gateway.into(), prefix)).find(holds);
        let subnet = subnet.ok_or_else(|| {
            format!(
                "--gateway-ip {gateway}, --lowest-ip {} and --highest-ip {} are in no common network",
                pool.0, pool.1
            )
        })?;
        Ok(Self { subnet, gateway, host, pool })
    }
}

fn prepare(args: &Args) -> Result<Prepared, String> {
    let plan = Plan::of(args)?;
    let warnings = args.check()?;
    let ethernet = args.ethernet.as_deref().ok_or("--ethernet is needed: the path of a socket, or fd:N")?;
    let link = match Socket::parse("--ethernet", ethernet)? {
        Socket::Path(path) => format!("vpnkit:unix:{}", path.display()),
        Socket::Fd(fd) => format!("vpnkit:fd:{fd}"),
    };
    let resolvers = args.dns.as_deref().map(files::resolvers).transpose()?.unwrap_or_default();
    let dhcp = args.dhcp_path.as_deref().map(files::dhcp).transpose()?.unwrap_or_default();
    let control = args.portway_api.clone();
    let settings = Settings {
        api: Some(control.clone().unwrap_or_else(|| UnixPath(PathBuf::from("/nonexistent")))),
        link: vec![link.parse()?],
        mtu: Some(args.mtu),
        hosts_file: Some(if args.hosts.is_empty() { "off".into() } else { PathBuf::from(&args.hosts) }),
        log_level: Some(if args.debug || std::env::var_os("VPNKIT_DEBUG").is_some() {
            LogLevel::Debug
        } else {
            LogLevel::Warn
        }),
        ..super::confinement()?
    };
    let mut config = Config::try_from(settings).map_err(|e| e.to_string())?;
    (config.subnet, config.gateway) = (plan.subnet, plan.gateway);
    // Without an address for the host, its place is taken by the gateway, behind which nothing of the host's is.
    config.host_alias = plan.host.unwrap_or(plan.gateway);
    config.host_loopback = plan.host.is_some();
    config.metadata = true;
    // vpnkit's networks are IPv4 alone, and its callers configure nothing else.
    config.ipv6 = None;
    // As vpnkit tells its guests: `--udpv4-forwards 123:…` gives the gateway a time server.
    config.ntp = vec![plan.gateway];
    // Its guests never had a say in ports.
    config.guest_api = GuestApi::Off;
    config.dns_upstream = resolvers.upstreams;
    config.dns_host = args.names(&plan);
    if let Some(seconds) = args.port_max_idle_time {
        config.limits.tcp_idle =
            u64::try_from(seconds).ok().filter(|s| *s > 0).map_or(NEVER, Duration::from_secs);
    }
    if let Some(most) = args.max_connections {
        (config.limits.flows, config.limits.udp_bindings) = (most, config.limits.udp_bindings.min(most));
    }
    let programs = args.forwards.as_deref().map(files::forwards).transpose()?.unwrap_or_default();
    let proxies = Proxies::of(args, &plan, &programs)?;
    let mut fixed = [args.forwards_of("--tcpv4-forwards")?, args.forwards_of("--udpv4-forwards")?].concat();
    fixed.extend(proxies.iter().flat_map(|_| http::gateway_forwards(plan.gateway)));
    let watched =
        args.gateway_forwards.as_deref().map(|path| files::GatewayForwards::read(path, fixed.clone()));
    let watched = watched.transpose()?;
    config.particulars = Particulars {
        control: control.is_some(),
        gateway_mac: args.server_macaddr,
        domain: args.domain.clone().or(dhcp.domain_name).unwrap_or_else(|| "localdomain".into()),
        search: [dhcp.search_domains, resolvers.search].concat(),
        outgoing: proxies.as_ref().map_or_else(|| programs.clone(), |p| p.outgoing.clone()),
        services: Services {
            pool: Some(plan.pool),
            forwards: watched.as_ref().map_or(fixed, |w| w.all().to_vec()),
            ..Services::default()
        },
        ..Particulars::default()
    };
    let (doors, sockets) = doors(args, &plan, watched, proxies)?;
    let plane = args.vsock_path.as_deref().filter(|p| !p.is_empty()).map(data_socket).transpose()?;
    let parents = sockets.iter().chain(&plane).filter_map(|p| p.parent().map(Path::to_path_buf));
    config.particulars.directories =
        parents.chain(config.links.iter().filter_map(LinkConfig::directory)).collect();
    config.particulars.followed = args.gateway_forwards.iter().chain(&args.http).cloned().collect();
    Ok(Prepared { config, doors, sockets, warnings: [warnings, resolvers.warnings].concat() })
}

/// The sockets beside the network, bound; and the files of those that have one.
fn doors(
    args: &Args,
    plan: &Plan,
    watched: Option<files::GatewayForwards>,
    proxies: Option<Proxies>,
) -> Result<(Vec<Door>, Vec<PathBuf>), String> {
    let (mut doors, mut sockets): (Vec<Door>, Vec<PathBuf>) = Default::default();
    let channels = args.max_connections.unwrap_or(CHANNELS);
    let plane = args.vsock_path.as_deref().filter(|p| !p.is_empty());
    let plane = plane.map(|p| data_socket(p).map(|path| Plane::new(path, channels))).transpose()?;
    let ports = listen_all("--port", &args.port, &mut sockets)?;
    let diagnostics = listen_all("--diagnostics", &args.diagnostics, &mut sockets)?;
    let introspection = listen_all("--introspection", &args.introspection, &mut sockets)?;
    let captures = Arc::new(Captures::new(args.pcap_snaplen));
    let pcaps = listen_all("--pcap", &args.pcap, &mut sockets)?;
    let (subnet, allowed) = (plan.subnet, args.allowed_bind_addresses.clone());
    doors.push(Box::new(move |context| {
        let exposer = Arc::new(Exposer::new(
            context.requests.clone(),
            Arc::clone(&context.allowed),
            subnet,
            allowed,
            plane,
        ));
        for listener in ports.into_iter().filter_map(watch) {
            tokio::spawn(control::serve(listener, Arc::clone(&exposer)));
        }
        if !diagnostics.is_empty() || !introspection.is_empty() {
            tokio::spawn(Arc::clone(&captures).keep(context.requests.clone()));
        }
        let source = Arc::new(Source { requests: context.requests.clone(), exposer, captures });
        for (listeners, shown) in [(diagnostics, Shown::Archive), (introspection, Shown::Tree)] {
            for listener in listeners.into_iter().filter_map(watch) {
                tokio::spawn(diagnostics::serve(listener, shown, Arc::clone(&source)));
            }
        }
        for listener in pcaps.into_iter().filter_map(watch) {
            tokio::spawn(pcap::serve(listener, context.requests.clone()));
        }
    }));
    if let Some(watched) = watched {
        doors.push(Box::new(move |context| drop(tokio::spawn(watched.follow(context.requests.clone())))));
    }
    if let Some(Proxies { live, file, .. }) = proxies {
        let api = args.http_api_path.as_deref().map(|path| path.to_string_lossy().into_owned());
        let api = listen_all("--http-api-path", api.as_slice(), &mut sockets)?;
        doors.push(Box::new(move |context| {
            for listener in api.into_iter().filter_map(watch) {
                tokio::spawn(http::serve_api(listener, Arc::clone(&live), context.clone()));
            }
            if let Some((path, text)) = file {
                tokio::spawn(live.follow(path, text, context.clone()));
            }
        }));
    }
    Ok((doors, sockets))
}

/// What `--http` and `--http-api-path` ask for.
struct Proxies {
    live: Arc<http::Live>,
    /// The file and its text, to be followed.
    file: Option<(PathBuf, String)>,
    /// Whose connections are taken at first.
    outgoing: Vec<Outgoing>,
}

impl Proxies {
    /// `None` when neither is given. `programs`: those of `--forwards`, which come first.
    fn of(args: &Args, plan: &Plan, programs: &[Outgoing]) -> Result<Option<Self>, String> {
        if args.http.is_none() && args.http_api_path.is_none() {
            return Ok(None);
        }
        let read = args.http.as_deref().map(http::read).transpose()?;
        let (text, settings) = read.map_or((None, None), |(text, s)| (Some(text), Some(Arc::new(s))));
        let at = http::Addresses { gateway: plan.gateway, host: plan.host };
        let outgoing = [programs.to_vec(), http::rules(settings.as_ref(), at)].concat();
        let live = Arc::new(http::Live::new(programs.to_vec(), at, settings));
        Ok(Some(Self { live, file: args.http.clone().zip(text), outgoing }))
    }
}

/// The path of hyperkit's `connect` socket.
fn data_socket(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if text.contains("://") && !text.starts_with("unix://") {
        return Err(format!("--vsock-path {text}: a unix socket is needed; Hyper-V sockets are not served"));
    }
    std::path::absolute(path).map_err(|e| format!("--vsock-path {text}: {e}"))
}

fn listen_all(
    option: &str,
    texts: &[String],
    sockets: &mut Vec<PathBuf>,
) -> Result<Vec<StdUnixListener>, String> {
    let mut listeners = Vec::new();
    for text in texts {
        let listener = match Socket::parse(option, text)? {
            Socket::Path(path) => {
                let listener =
                    crate::unix_path::listen(&path, 0o600).map_err(|e| format!("{option}: {e}"))?;
                sockets.push(path);
                listener
            }
            Socket::Fd(fd) => {
                let fd = crate::fd::inherit(fd).map_err(|e| format!("{option}: {e}"))?;
                crate::fd::set_nonblocking(&fd).map_err(|e| format!("{option} {text}: {e}"))?;
                let listens = nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::AcceptConn);
                if listens != Ok(true) {
                    return Err(format!("{option} {text}: the descriptor is not a listening socket"));
                }
                StdUnixListener::from(fd)
            }
        };
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Hands a listener to the control thread's runtime.
fn watch(listener: StdUnixListener) -> Option<tokio::net::UnixListener> {
    tokio::net::UnixListener::from_std(listener)
        .inspect_err(|error| tracing::error!(%error, "a socket cannot be served"))
        .ok()
}

/// The absolute form of a path that was typed.
fn absolute(option: &str, path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("{option} {}: {e}", path.display()))
}

#[cfg(test)]
mod tests;
