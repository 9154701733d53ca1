//! Every setting of `portway serve`, once: the flags, the file of `--config` and the validated [`Config`] come from
//! [`Settings`].
//!
//! ```text
//!  command line ─► Settings ─┐
//!                            ├─ merge (the command line wins, lists append) ─► Config (checked) ─► sidecar
//!  --config FILE ► Settings ─┘
//! ```
//! `settings` has what is typed, `values` and `link` the grammar of single values, `check` what values have to do with each
//! other. The table `[limits]` is [`crate::limits`].

mod check;
mod link;
mod settings;
#[cfg(test)]
mod tests;
mod values;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use portway_netstack::dhcp::StaticLease;
use portway_netstack::{Ipv6Config, Limits, Mac, Subnet, UdpConfig};

pub use self::check::runtime_socket;
pub use self::link::{LinkAddress, LinkConfig, LinkKind, LinkSpec, Namespace};
pub use self::settings::{Settings, variable};
pub use self::values::{
    Directory, DnsHost, Filter, Ipv6Switch, LeaseSpec, LogFormat, LogLevel, Metadata, MetricsAddress, Switch,
    UnixPath,
};
use crate::agent::AgentConfig;
use crate::dns::Upstream;
use crate::personality::Particulars;
use crate::publish::spec::PublishSpec;
pub use crate::sandbox::Mode as SandboxMode;
use crate::vsock::VsockSpec;

/// A setting that cannot be used: its name, the value, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {fault}")]
pub struct ConfigError {
    setting: &'static str,
    fault: String,
}

impl ConfigError {
    /// `setting` cannot be used because of `fault`, which says what to do.
    pub fn new(setting: &'static str, fault: impl Into<String>) -> Self {
        Self { setting, fault: fault.into() }
    }
}

fn bad(setting: &'static str, fault: impl Into<String>) -> ConfigError {
    ConfigError::new(setting, fault)
}

/// The settings, checked: what is in here works or fails at the host, not in the grammar.
#[derive(Debug, Clone)]
pub struct Config {
    /// The links, one at least unless VMs join.
    pub links: Vec<LinkConfig>,
    /// The guests' subnet.
    pub subnet: Subnet,
    /// Our address on it.
    pub gateway: Ipv4Addr,
    /// The host's loopback, for guests.
    pub host_alias: Ipv4Addr,
    /// What to publish at the start.
    pub publish: Vec<PublishSpec>,
    /// Guest agents and what they may.
    pub agent: AgentConfig,
    /// Resolvers; where none is for every name, those of `resolv_conf` are.
    pub dns_upstream: Vec<Upstream>,
    /// See [`Settings`].
    pub dns_ca: Option<PathBuf>,
    /// See [`Settings`].
    pub dns_rebind_protection: bool,
    /// See [`Settings`].
    pub dns_private: Vec<String>,
    /// Names of our own.
    pub dns_host: Vec<(String, IpAddr)>,
    /// Fixed addresses.
    pub static_lease: Vec<StaticLease>,
    /// The longest lease.
    pub lease_time: std::time::Duration,
    /// Time servers.
    pub ntp: Vec<Ipv4Addr>,
    /// The network's name.
    pub network: String,
    /// The control socket.
    pub api: PathBuf,
    /// Where VMs join.
    pub join: Option<PathBuf>,
    /// See [`Settings`].
    pub ready_fd: Option<i32>,
    /// See [`Settings`].
    pub pid_file: Option<PathBuf>,
    /// See [`Settings`].
    pub log_file: Option<PathBuf>,
    /// See [`Settings`].
    pub log_level: LogLevel,
    /// See [`Settings`].
    pub log_format: LogFormat,
    /// Where Prometheus finds the counters.
    pub metrics: Option<String>,
    /// Where every frame is written.
    pub pcap: Option<PathBuf>,
    /// See [`Settings`].
    pub state_dir: Option<PathBuf>,
    /// The guests' vsocks.
    pub vsock: Vec<VsockSpec>,
    /// Ports of the guests that have sockets in `vsock_dir`.
    pub vsock_ports: Vec<u32>,
    /// Where sockets of vsock ports are.
    pub vsock_dir: Option<PathBuf>,
    /// See [`Settings`].
    pub host_loopback: bool,
    /// Whether link-local addresses may be reached.
    pub metadata: bool,
    /// IPv6, when guests are to have it.
    pub ipv6: Option<Ipv6>,
    /// How UDP is carried.
    pub udp: UdpConfig,
    /// See [`Settings`].
    pub resolv_conf: PathBuf,
    /// `None`: guests are not answered from a hosts file.
    pub hosts_file: Option<PathBuf>,
    /// See [`Settings`].
    pub sandbox: SandboxMode,
    /// See [`Settings`].
    pub runas: Option<String>,
    /// See [`Settings`].
    pub allow_path: Vec<PathBuf>,
    /// The limits of what a guest can make grow.
    pub limits: Limits,
    /// What only a personality sets.
    pub particulars: Particulars,
    /// What guests may ask of the gateway's port 80.
    pub guest_api: GuestApi,
    /// The search domains guests are told; `None`: the host's.
    pub dns_search: Option<Vec<String>>,
    /// Ethernet addresses of vpnkit's VMs, by UUID; others get one that is made from theirs.
    pub vpnkit_macs: Vec<(String, Mac)>,
    /// Whether the end of a VM's link ends the network.
    pub ends_with_vm: bool,
    /// Whether the network stays without a link: VMs come through the API.
    pub stays: bool,
    /// The largest IP packet of VMs that come through the API.
    pub attached_mtu: u16,
    /// Further places where the API is served.
    pub doors: Vec<Door>,
    /// Who is told what happens, in gvproxy's words.
    pub notification: Option<PathBuf>,
}

/// What guests may ask of the gateway's port 80 (gvproxy's `/services/forwarder/*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestApi {
    /// Nothing: nobody listens.
    Off,
    /// Ports of their own address, on the host's loopback.
    Loopback,
    /// And on every address of the host, when they say `:PORT`.
    Any,
}

/// A further place where the API is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    /// Where.
    pub address: DoorAddress,
    /// Whether VMs may come in by `/connect`.
    pub connect: bool,
}

/// Where a [`Door`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DoorAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
    /// A port of the host's vsock, which guests with a kernel's vsock reach.
    Vsock(u32),
}

/// IPv6 of the guests' network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipv6 {
    /// The guests' /64.
    pub subnet: Subnet,
    /// Our address in it.
    pub gateway: Ipv6Addr,
    /// The host's loopback, for guests.
    pub host_alias: Ipv6Addr,
    /// Whether guests have a default route only while the host has one.
    pub follows_host: bool,
}

impl Ipv6 {
    fn new(subnet: Subnet, follows_host: bool) -> Option<Self> {
        let host = |n| match subnet.host(n) {
            Some(IpAddr::V6(ip)) if subnet.prefix() == 64 => Some(ip),
            _ => None,
        };
        Some(Self { subnet, gateway: host(1)?, host_alias: host(0x254)?, follows_host })
    }

    /// As the stack knows it. `uplink`: whether the host has a route.
    #[must_use]
    pub const fn of_stack(&self, uplink: bool) -> Ipv6Config {
        Ipv6Config { subnet: self.subnet, gateway: self.gateway, host_alias: self.host_alias, uplink }
    }
}
