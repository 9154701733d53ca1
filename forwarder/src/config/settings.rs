//! What is typed: every field of [`Settings`] is a flag of `serve`, a key of its file and a variable of its environment.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "doc comments of options are help texts, with brackets of their own"
)]

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use portway_netstack::Subnet;
use serde::Deserialize;

use super::values::from_text;
use super::{
    ConfigError, Directory, DnsHost, Filter, Ipv6Switch, LeaseSpec, LinkSpec, LogFormat, LogLevel, Metadata,
    MetricsAddress, SandboxMode, Switch, UnixPath, bad,
};
use crate::agent::rules::Rule;
use crate::agent::{AgentSpec, GuestBinds, SocketPair};
use crate::dns::Upstream;
use crate::limits::LimitSettings;
use crate::publish::spec::PublishArg;
use crate::vsock::VsockSpec;

/// The settings as they are typed. Every field is a flag of `serve` and a key of its configuration file.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// A link to a VMM, KIND:ADDRESS[,name=VM][,mac=MAC][,ip=IP][,mtu=N][,isolate=on], such as qemu:unix:PATH or tap:NAME,netns=PID; repeatable
    #[arg(long, value_name = "LINK")]
    pub link: Vec<LinkSpec>,
    /// The guests' subnet; the gateway is its first address, the host alias its last [default: 192.168.127.0/24]
    #[arg(long, value_name = "CIDR")]
    #[serde(deserialize_with = "from_text")]
    pub subnet: Option<Subnet>,
    /// The guests' IPv6 network, a /64; the gateway is ::1 in it, the host alias ::254 [default: a ULA made from --subnet]
    #[arg(long, value_name = "CIDR")]
    #[serde(deserialize_with = "from_text")]
    pub subnet6: Option<Subnet>,
    /// IPv6 for guests; auto: with a default route only while the host has one, so that a guest does not wait in vain [default: auto]
    #[arg(long, value_name = "on|off|auto")]
    pub ipv6: Option<Ipv6Switch>,
    /// Who may answer a guest's datagrams: any port of an address it has sent to, that port alone, or anybody [default: address]
    #[arg(long, value_name = "address|endpoint|any")]
    pub udp_filter: Option<Filter>,
    /// Seconds after a guest's last datagram at which its UDP binding ends, 30 to 86400 [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub udp_idle: Option<u32>,
    /// The largest IP packet on links that do not say mtu= themselves [default: 65520 on qemu links, 1500 on others]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Publish a guest's port on the host: [BIND:]HOST[-END]:[GUEST_ADDR:]GUEST[-END][/tcp|udp], or `auto[,next-free]` for every port the guest listens on; repeatable
    #[arg(long, short, value_name = "SPEC")]
    pub publish: Vec<PublishArg>,
    /// Rules for ports that publish themselves: tables of the file of --config
    #[arg(skip)]
    pub auto_publish: Vec<Rule>,
    /// Guest agents come to this unix socket, unix:PATH[,name=VM]; those behind --vsock need no option; repeatable
    #[arg(long, value_name = "unix:PATH")]
    pub agent: Vec<AgentSpec>,
    /// A unix socket in the guest that leads to one of the host, GUEST_PATH:HOST_PATH; repeatable
    #[arg(long, value_name = "GUEST:HOST")]
    pub guest_socket: Vec<SocketPair>,
    /// On which host addresses a guest may ask to be published [default: loopback]
    #[arg(long, value_name = "loopback|any")]
    pub guest_binds: Option<GuestBinds>,
    /// Ask this resolver and not those of the host's resolv.conf: for every name, or for those of one DOMAIN; IP[:PORT],
    /// tls://IP[:PORT][#NAME] or https://IP[:PORT][/PATH][#NAME], with the NAME in its certificate; repeatable
    #[arg(long, value_name = "[DOMAIN=]SERVER")]
    pub dns_upstream: Vec<Upstream>,
    /// PEM file of the authorities whose certificates resolvers over TLS and HTTPS may have [default: the host's]
    #[arg(long, value_name = "FILE")]
    pub dns_ca: Option<PathBuf>,
    /// Keep answers of resolvers from guests that lead to private or local addresses [default: off]
    #[arg(long, value_name = "on|off")]
    pub dns_rebind_protection: Option<Switch>,
    /// With --dns-rebind-protection on: names of this domain may have private addresses; repeatable
    #[arg(long, value_name = "DOMAIN")]
    pub dns_private: Vec<String>,
    /// A name of our own, NAME=IP; `*.NAME` stands for every name under NAME; repeatable
    #[arg(long, value_name = "NAME=IP")]
    pub dns_host: Vec<DnsHost>,
    /// An address that belongs to one VM, MAC=IP[,NAME]; repeatable
    #[arg(long, value_name = "MAC=IP[,NAME]")]
    pub static_lease: Vec<LeaseSpec>,
    /// After how many idle seconds both ends of a TCP connection are asked whether they are still there; 0: never [default: 7200]
    #[arg(long, value_name = "SECONDS")]
    pub tcp_keepalive: Option<u32>,
    /// How long a DHCP lease lasts, in seconds; a guest may ask for a shorter one [default: 3600]
    #[arg(long, value_name = "SECONDS")]
    pub lease_time: Option<u32>,
    /// A time server guests are told of by DHCP; repeatable
    #[arg(long, value_name = "IP")]
    pub ntp_server: Vec<Ipv4Addr>,
    /// The network's name; its control socket is $XDG_RUNTIME_DIR/portway/NAME.sock [default: default]
    #[arg(long, value_name = "NAME")]
    pub network: Option<String>,
    /// The control socket, unix:PATH
    #[arg(long, value_name = "unix:PATH")]
    pub api: Option<UnixPath>,
    /// Where VMs join while the network runs, unix:PATH: each with a link that lives as long as its connection; the network ends with the last one
    #[arg(long, value_name = "unix:PATH")]
    pub join: Option<UnixPath>,
    /// Write one line `ready` to this descriptor when every listener is bound, and close it
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<i32>,
    /// Write the process id here; removed at the end
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Append the log here and not to standard error
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// text or json, one object per line [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Serve /metrics for Prometheus here
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics: Option<MetricsAddress>,
    /// Write every frame of every link here, as pcapng; an old file is replaced
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
    /// Keep leases and live ports here, so that they survive a restart
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// A guest's vsock, KIND:ADDRESS[,cid=N][,name=VM]: vhost-user:unix:PATH, vhost:CID, firecracker:PATH or dir:PATH; repeatable
    #[arg(long, value_name = "VSOCK")]
    pub vsock: Vec<VsockSpec>,
    /// Ports of the guest, each a unix socket guest.%08x and CID.%08x in --vsock-dir, such as 2374,62373
    #[arg(long, value_name = "PORT,…", value_delimiter = ',')]
    pub vsock_ports: Vec<u32>,
    /// Where the sockets of vsock ports are [default: --state-dir]
    #[arg(long, value_name = "DIR")]
    pub vsock_dir: Option<PathBuf>,
    /// Whether the host alias reaches the host's loopback [default: on]
    #[arg(long, value_name = "on|off")]
    pub host_loopback: Option<Switch>,
    /// Whether guests reach link-local addresses, where clouds serve credentials [default: block]
    #[arg(long, value_name = "block|allow")]
    pub metadata: Option<Metadata>,
    /// Whether guests may publish their own ports on the host's loopback, by the gateway's port 80 [default: on]
    #[arg(long, value_name = "on|off")]
    pub guest_api: Option<Switch>,
    /// The host's resolver configuration to follow [default: /etc/resolv.conf]
    #[arg(long, value_name = "FILE")]
    pub resolv_conf: Option<PathBuf>,
    /// The hosts file guests are answered from; `off` for none [default: /etc/hosts]
    #[arg(long, value_name = "FILE|off")]
    pub hosts_file: Option<PathBuf>,
    /// Whether the process gives up what it does not need before the first frame: require, best-effort or off [default: best-effort]
    #[arg(long, value_name = "MODE")]
    pub sandbox: Option<SandboxMode>,
    /// Started as root, become this user [default: nobody, or the owner of our directories]
    #[arg(long, value_name = "USER")]
    pub runas: Option<String>,
    /// Let sockets be published in this directory while the network runs; repeatable
    #[arg(long, value_name = "DIR")]
    pub allow_path: Vec<Directory>,
    /// Limits of what guests can make grow; in the file alone.
    #[arg(skip)]
    pub limits: LimitSettings,
}

impl Settings {
    /// The settings of a file.
    ///
    /// # Errors
    /// When it cannot be read, or has a key or value that is not one.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|e| bad("--config", format!("{}: {e}", path.display())))?;
        Self::from_toml(&text).map_err(|e| bad("--config", format!("{}, {e}", path.display())))
    }

    /// The settings of a file's text.
    ///
    /// # Errors
    /// The line, what is wrong, and the key that was probably meant.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            // serde's own list, which is that of the table the key stands in: `unknown field `a`, expected one of `b`, `c``.
            let mut words = e.message().strip_prefix("unknown field `").map(|m| m.split('`').step_by(2));
            let message = match words.as_mut().and_then(Iterator::next) {
                Some(key) => {
                    let known = e.message().split('`').skip(3).step_by(2).collect::<Vec<_>>();
                    not_a_setting(key, &known)
                }
                None => {
                    let key = text.lines().nth(line - 1).and_then(|l| l.split_once('='));
                    let bare =
                        |k: &str| k.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
                    let key =
                        key.map(|(key, _)| key.trim()).filter(|key| bare(key)).map(|key| format!("{key}: "));
                    key.unwrap_or_default() + e.message()
                }
            };
            format!("line {line}: {message}")
        })
    }

    /// The command-line options that the settings are.
    #[must_use]
    pub fn command() -> clap::Command {
        use clap::Args;
        Self::augment_args(clap::Command::new("settings").no_binary_name(true))
    }

    /// The settings of environment variables, `PORTWAY_DNS_UPSTREAM` for `--dns-upstream`; lists have blanks between.
    ///
    /// # Errors
    /// A value that is none for its setting.
    pub fn from_env(
        variables: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    ) -> Result<Self, ConfigError> {
        use clap::FromArgMatches;
        let command = Self::command();
        let mut words = Vec::new();
        let mut names = Vec::new();
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|n| n.starts_with("PORTWAY_")) else { continue };
            let is = |arg: &&clap::Arg| arg.get_long().is_some_and(|long| variable(long) == name);
            let Some(arg) = command.get_arguments().find(is) else { continue };
            let Some(long) = arg.get_long() else { continue };
            let Some(value) = value.to_str() else {
                return Err(bad("environment", format!("{name} is no text")));
            };
            names.push(name.to_owned());
            if matches!(arg.get_action(), clap::ArgAction::Append) {
                words.extend(value.split_whitespace().map(|v| format!("--{long}={v}")));
            } else {
                words.push(format!("--{long}={value}"));
            }
        }
        let fault = |e: clap::Error| {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            bad("environment", format!("{first} (from {})", names.join(", ")))
        };
        let matches = command.try_get_matches_from(words).map_err(fault)?;
        Self::from_arg_matches(&matches).map_err(fault)
    }

    /// These settings over `file`'s: what is set here wins, lists append.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        fn join<T>(mut a: Vec<T>, b: Vec<T>) -> Vec<T> {
            a.extend(b);
            a
        }
        Self {
            link: join(file.link, self.link),
            subnet: self.subnet.or(file.subnet),
            subnet6: self.subnet6.or(file.subnet6),
            ipv6: self.ipv6.or(file.ipv6),
            udp_filter: self.udp_filter.or(file.udp_filter),
            udp_idle: self.udp_idle.or(file.udp_idle),
            mtu: self.mtu.or(file.mtu),
            publish: join(file.publish, self.publish),
            auto_publish: join(file.auto_publish, self.auto_publish),
            agent: join(file.agent, self.agent),
            guest_socket: join(file.guest_socket, self.guest_socket),
            guest_binds: self.guest_binds.or(file.guest_binds),
            dns_upstream: join(file.dns_upstream, self.dns_upstream),
            dns_ca: self.dns_ca.or(file.dns_ca),
            dns_rebind_protection: self.dns_rebind_protection.or(file.dns_rebind_protection),
            dns_private: join(file.dns_private, self.dns_private),
            dns_host: join(file.dns_host, self.dns_host),
            static_lease: join(file.static_lease, self.static_lease),
            tcp_keepalive: self.tcp_keepalive.or(file.tcp_keepalive),
            lease_time: self.lease_time.or(file.lease_time),
            ntp_server: join(file.ntp_server, self.ntp_server),
            network: self.network.or(file.network),
            api: self.api.or(file.api),
            join: self.join.or(file.join),
            ready_fd: self.ready_fd.or(file.ready_fd),
            pid_file: self.pid_file.or(file.pid_file),
            log_file: self.log_file.or(file.log_file),
            log_level: self.log_level.or(file.log_level),
            log_format: self.log_format.or(file.log_format),
            metrics: self.metrics.or(file.metrics),
            pcap: self.pcap.or(file.pcap),
            state_dir: self.state_dir.or(file.state_dir),
            vsock: join(file.vsock, self.vsock),
            vsock_ports: join(file.vsock_ports, self.vsock_ports),
            vsock_dir: self.vsock_dir.or(file.vsock_dir),
            host_loopback: self.host_loopback.or(file.host_loopback),
            metadata: self.metadata.or(file.metadata),
            guest_api: self.guest_api.or(file.guest_api),
            resolv_conf: self.resolv_conf.or(file.resolv_conf),
            hosts_file: self.hosts_file.or(file.hosts_file),
            sandbox: self.sandbox.or(file.sandbox),
            runas: self.runas.or(file.runas),
            allow_path: join(file.allow_path, self.allow_path),
            limits: file.limits,
        }
    }
}

/// The environment variable of a setting.
#[must_use]
pub fn variable(long: &str) -> String {
    format!("PORTWAY_{}", long.to_ascii_uppercase().replace('-', "_"))
}

/// A key that is none, and the one that was probably meant.
fn not_a_setting(key: &str, known: &[&str]) -> String {
    match crate::nearest::name(key, known.iter().copied()) {
        Some(near) => format!("{key:?} is not a setting: did you mean {near:?}?"),
        None => format!("{key:?} is not a setting; there are {}", known.join(", ")),
    }
}
