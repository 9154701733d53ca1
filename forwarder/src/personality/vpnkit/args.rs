//! vpnkit's options: the grammar, and what can have no meaning here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Parser;
use portway_netstack::{GatewayForward, Mac, Transport};

use super::Plan;
use crate::config::UnixPath;

/// The network of a VM: ethernet on a unix socket, forwarded ports, DNS.
#[derive(Debug, Parser)]
#[command(name = super::NAME, disable_version_flag = true, infer_long_args = true, max_term_width = 120)]
pub(super) struct Args {
    /// Serve VMs on this socket: a path, or fd:N, a socket that listens already
    #[arg(long, value_name = "ADDRESS")]
    pub(super) ethernet: Option<String>,
    /// Take forwards on this socket, by 9P or HTTP: a path or fd:N; repeatable
    #[arg(long, value_name = "ADDRESS")]
    pub(super) port: Vec<String>,
    /// hyperkit's `connect` socket: forwarded connections go to the forwarder in the guest through it
    #[arg(long, alias = "port-forwards", value_name = "PATH")]
    pub(super) vsock_path: Option<String>,
    /// Answer each connection to this socket with an archive of what there is to know; repeatable
    #[arg(long, value_name = "ADDRESS")]
    pub(super) diagnostics: Vec<String>,
    /// Show the same as a tree of files on this socket, by 9P; repeatable
    #[arg(long, value_name = "ADDRESS")]
    pub(super) introspection: Vec<String>,
    /// Send the frames that pass to each connection to this socket, as a pcap file without end; repeatable
    #[arg(long, value_name = "ADDRESS")]
    pub(super) pcap: Vec<String>,
    /// Bytes of each frame in the capture of all frames that --diagnostics and --introspection show; at most 2048
    #[arg(long, value_name = "BYTES", default_value_t = 128, value_parser = snaplen)]
    pub(super) pcap_snaplen: usize,
    /// TCP connections at a time; each VM has as many [default: 65536; 2000 through --vsock-path]
    #[arg(long, value_name = "N", value_parser = most)]
    pub(super) max_connections: Option<usize>,
    /// Ask the resolvers of this file, and not the host's
    #[arg(long, value_name = "FILE")]
    pub(super) dns: Option<PathBuf>,
    /// Answer from this hosts file; empty: from none
    #[arg(long, value_name = "FILE", default_value = "/etc/hosts")]
    pub(super) hosts: String,
    /// Names of the host, with commas between
    #[arg(long, value_name = "NAMES", default_value = "host.internal", value_delimiter = ',')]
    host_names: Vec<String>,
    /// Names of the gateway
    #[arg(long, value_name = "NAMES", default_value = "gateway.internal", value_delimiter = ',')]
    gateway_names: Vec<String>,
    /// Names of the first VM, at --lowest-ip
    #[arg(long, value_name = "NAMES", default_value = "vm.internal", value_delimiter = ',')]
    vm_names: Vec<String>,
    /// HTTP proxies, in a JSON file that is followed
    #[arg(long, value_name = "FILE")]
    pub(super) http: Option<PathBuf>,
    /// Show and change the HTTP proxies on this socket: GET and POST /http_proxy.json
    #[arg(long, value_name = "ADDRESS")]
    pub(super) http_api_path: Option<PathBuf>,
    /// The gateway: router and resolver
    #[arg(long, value_name = "IP", default_value = "192.168.65.1")]
    pub(super) gateway_ip: Ipv4Addr,
    /// The host's loopback, for guests; 0.0.0.0: it is not reached
    #[arg(long, value_name = "IP", default_value = "192.168.65.2")]
    pub(super) host_ip: Ipv4Addr,
    /// The first address VMs get
    #[arg(long, value_name = "IP", default_value = "192.168.65.3")]
    pub(super) lowest_ip: Ipv4Addr,
    /// The last one
    #[arg(long, value_name = "IP", default_value = "192.168.65.254")]
    pub(super) highest_ip: Ipv4Addr,
    /// The Ethernet address of gateway and host
    #[arg(long, value_name = "MAC", default_value = "F6:16:36:BC:F9:C6", value_parser = mac)]
    pub(super) server_macaddr: Mac,
    /// The domain guests are told [default: that of --dhcp-path, or localdomain]
    #[arg(long, value_name = "NAME")]
    pub(super) domain: Option<String>,
    /// JSON with searchDomains and domainName
    #[arg(long, value_name = "FILE")]
    pub(super) dhcp_path: Option<PathBuf>,
    /// The largest packet
    #[arg(long, default_value_t = 1500)]
    pub(super) mtu: u16,
    /// Ports of the gateway that lead to the host, LPORT:IP:RPORT with commas between
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    tcpv4_forwards: String,
    /// The same, of UDP
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    udpv4_forwards: String,
    /// The same, in a JSON file that is followed
    #[arg(long, value_name = "FILE")]
    pub(super) gateway_forwards: Option<PathBuf>,
    /// Connections to some destinations go to programs behind unix sockets, as this JSON file says
    #[arg(long, value_name = "FILE")]
    pub(super) forwards: Option<PathBuf>,
    /// Where forwards may listen; 0.0.0.0: anywhere
    #[arg(long, value_name = "IPS", default_value = "0.0.0.0", value_delimiter = ',')]
    pub(super) allowed_bind_addresses: Vec<IpAddr>,
    /// A TCP connection without a byte ends after so many seconds; 0: never [default: 7440]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub(super) port_max_idle_time: Option<i64>,
    #[arg(long, hide = true)]
    listen_backlog: Option<u32>,
    #[arg(long, hide = true)]
    gc_compact_interval: Option<u32>,
    #[arg(long, hide = true)]
    log_destination: Option<String>,
    /// Log every decision; VPNKIT_DEBUG in the environment does the same
    #[arg(long)]
    pub(super) debug: bool,
    /// Portway's control socket, unix:PATH, for `portway flows --api` and the like
    #[arg(long, value_name = "unix:PATH")]
    pub(super) portway_api: Option<UnixPath>,
    /// Show version and exit
    #[arg(long)]
    pub(super) version: bool,
}

fn mac(text: &str) -> Result<Mac, String> {
    let mac: Mac = text.parse().map_err(|e: portway_netstack::BadMac| e.to_string())?;
    if mac.is_group() { Err("a group address cannot be the gateway's".into()) } else { Ok(mac) }
}

fn most(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1_000_000).contains(n)).ok_or_else(|| "1 to 1000000 is needed".into())
}

fn snaplen(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n >= 14).ok_or_else(|| "14 or more is needed".into())
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Door {
    Path(PathBuf),
    /// A descriptor that listens already.
    Fd(i32),
}

impl Door {
    pub(super) fn parse(option: &str, text: &str) -> Result<Self, String> {
        if let Some(fd) = text.strip_prefix("fd:") {
            let fd = fd.trim_start_matches("//").parse().ok().filter(|fd| *fd >= 0);
            return fd.map(Self::Fd).ok_or_else(|| format!("{option} {text}: fd:N is a descriptor's number"));
        }
        let path = text.strip_prefix("unix://").unwrap_or(text);
        if path.contains("://") {
            return Err(format!(
                "{option} {text}: a path or fd:N is needed; Hyper-V and hyperkit sockets are not served"
            ));
        }
        if path.is_empty() {
            return Err(format!("{option}: the path is empty"));
        }
        super::absolute(option, Path::new(path)).map(Self::Path)
    }
}

impl Args {
    /// What is to be said of options that do less than they say.
    ///
    /// # Errors
    /// For those that would be wrong to ignore.
    pub(super) fn check(&self) -> Result<Vec<String>, String> {
        let mut warnings = Vec::new();
        let mut say = |given: bool, text: &str| warnings.extend(given.then(|| text.to_owned()));
        say(self.listen_backlog.is_some(), "--listen-backlog has no effect: as many wait as the kernel lets");
        say(
            self.gc_compact_interval.is_some(),
            "--gc-compact-interval has no effect: there is no garbage collector",
        );
        say(self.log_destination.is_some(), "--log-destination has no effect: the log is standard error");
        Ok(warnings)
    }

    /// The names of our own that DNS knows.
    pub(super) fn names(&self, plan: &Plan) -> Vec<(String, IpAddr)> {
        let of = |names: &[String], ip: Option<Ipv4Addr>| {
            let names = names.iter().map(|n| n.trim().trim_end_matches('.')).filter(|n| !n.is_empty());
            let known = names.filter_map(|n| Some((n.to_ascii_lowercase(), IpAddr::V4(ip?))));
            known.collect::<Vec<_>>()
        };
        let all = [
            of(&self.host_names, plan.host),
            of(&self.gateway_names, Some(plan.gateway)),
            of(&self.vm_names, Some(plan.pool.0)),
        ];
        all.concat()
    }

    /// The ports of the gateway that `option` forwards.
    ///
    /// # Errors
    /// When one is none.
    pub(super) fn forwards_of(&self, option: &str) -> Result<Vec<GatewayForward>, String> {
        let (text, transport) = match option {
            "--tcpv4-forwards" => (&self.tcpv4_forwards, Transport::Tcp),
            _ => (&self.udpv4_forwards, Transport::Udp),
        };
        let one = |part: &str| {
            let mut fields = part.split(':');
            let port = |field: Option<&str>| field?.parse::<u16>().ok().filter(|p| *p > 0);
            let local = port(fields.next())?;
            let ip: Ipv4Addr = fields.next()?.parse().ok()?;
            let remote = port(fields.next())?;
            let to = SocketAddr::new(ip.into(), remote);
            fields.next().is_none().then_some(GatewayForward { transport, port: local, to })
        };
        let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
        parts
            .map(|part| {
                one(part).ok_or_else(|| {
                    format!("{option} {part:?}: LPORT:IPv4:RPORT is needed, such as 123:127.0.0.1:1123")
                })
            })
            .collect()
    }
}
