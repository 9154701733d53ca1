//! Every setting of `portway serve`, once: the flags, the file of `--config` and the validated [`Config`] come from
//! [`Settings`].
//!
//! ```text
//!  command line ─► Settings ─┐
//!                            ├─ merge (the command line wins, lists append) ─► Config (checked) ─► sidecar
//!  --config FILE ► Settings ─┘
//! ```
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "doc comments of options are help texts, with brackets of their own"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use portway_netstack::dhcp::StaticLease;
use portway_netstack::{Ipv6Config, Limits, Mac, Subnet, UdpConfig, UdpFilter};
use serde::Deserialize;

use crate::agent::rules::Rule;
use crate::agent::{AgentConfig, AgentSpec, GuestBinds, SocketPair};
use crate::dns::Upstream;
use crate::personality::Particulars;
use crate::publish::spec::{HostEnd, PublishArg, PublishSpec};
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
}

impl Config {
    /// The link of a VM that joins.
    ///
    /// # Errors
    /// When its address is none of this network, or it has settings that only a start takes.
    pub fn joining(&self, link: LinkSpec) -> Result<LinkConfig, ConfigError> {
        if let Some(ip) = link.ip {
            usable(self.subnet, self.gateway, self.host_alias, "--ip", ip)?;
        }
        if link.mac.is_some() {
            return Err(bad("--link", "mac= goes with the start of the network: --static-lease"));
        }
        let LinkSpec { kind, address, name, ip, isolate, offload, .. } = link;
        Ok(LinkConfig { kind, address, name, ip, mtu: link.mtu.unwrap_or(kind.mtu()), isolate, offload })
    }
}

/// Whether a guest may have `ip`.
fn usable(
    subnet: Subnet,
    gateway: Ipv4Addr,
    host_alias: Ipv4Addr,
    setting: &'static str,
    ip: Ipv4Addr,
) -> Result<(), ConfigError> {
    let taken = ip == gateway
        || ip == host_alias
        || Some(IpAddr::V4(ip)) == subnet.broadcast()
        || IpAddr::V4(ip) == subnet.network();
    if !subnet.contains(ip.into()) {
        Err(bad(setting, format!("{ip} is not in the subnet {subnet}")))
    } else if taken {
        Err(bad(setting, format!("{ip} is the network's own (gateway {gateway}, host alias {host_alias})")))
    } else {
        Ok(())
    }
}

const RUNTIME_DIR_MODE: u32 = 0o700;

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

/// The /64 of unique local addresses (RFC 4193) that goes with an IPv4 subnet: always the same, so that what refers to an
/// address still does after a restart, and different for networks that are numbered differently.
fn unique_local(subnet: &Subnet) -> Subnet {
    let name = format!("portway {subnet}");
    // FNV-1a; the global identifier has 40 bits.
    let hash =
        name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let network = 0xfd << 120 | u128::from(hash & 0xff_ffff_ffff) << 80;
    Subnet::new(Ipv6Addr::from(network).into(), 64).expect("64 is a length of prefixes")
}

/// How frames cross a link (DESIGN §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// A stream socket, a u32 length before each frame.
    Qemu,
    /// Standard input and output, a u16 length before each frame.
    Stdio,
    /// vpnkit's handshake, then a u16 length before each frame; several VMs on one socket.
    Vpnkit,
    /// A datagram socket, a frame each.
    #[cfg(target_os = "linux")]
    Dgram,
    /// A sequenced-packet socket, a frame each.
    #[cfg(target_os = "linux")]
    Seqpacket,
    /// A tap device of the kernel.
    Tap,
    /// Rings in the guest's memory.
    #[cfg(target_os = "linux")]
    VhostUser,
}

impl LinkKind {
    const ALL: &'static [Self] = &[
        Self::Qemu,
        Self::Stdio,
        Self::Vpnkit,
        Self::Tap,
        #[cfg(target_os = "linux")]
        Self::Dgram,
        #[cfg(target_os = "linux")]
        Self::Seqpacket,
        #[cfg(target_os = "linux")]
        Self::VhostUser,
    ];

    /// As it is typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Stdio => "stdio",
            Self::Vpnkit => "vpnkit",
            #[cfg(target_os = "linux")]
            Self::Dgram => "dgram",
            #[cfg(target_os = "linux")]
            Self::Seqpacket => "seqpacket",
            Self::Tap => "tap",
            #[cfg(target_os = "linux")]
            Self::VhostUser => "vhost-user",
        }
    }

    /// The MTU when nobody says one: large where nothing else makes segments large, and otherwise what the VMMs of
    /// the kind take.
    const fn mtu(self) -> u16 {
        match self {
            Self::Qemu => 65_520,
            Self::Stdio | Self::Tap | Self::Vpnkit => 1500,
            #[cfg(target_os = "linux")]
            Self::Dgram | Self::Seqpacket => 1500,
            #[cfg(target_os = "linux")]
            Self::VhostUser => 1500,
        }
    }

    /// Whether there are VMMs that offload on links of this kind without a header (libkrun).
    const fn may_offload(self) -> bool {
        match self {
            #[cfg(target_os = "linux")]
            Self::Dgram => true,
            _ => matches!(self, Self::Qemu),
        }
    }

    /// An example of an address.
    const fn example(self) -> &'static str {
        match self {
            Self::Qemu => "qemu:unix:PATH, qemu:connect:unix:PATH or qemu:fd:N",
            Self::Stdio => "stdio alone",
            Self::Vpnkit => "vpnkit:unix:PATH or vpnkit:fd:N",
            #[cfg(target_os = "linux")]
            Self::Dgram => "dgram:unix:PATH, dgram:connect:unix:PATH or dgram:fd:N",
            #[cfg(target_os = "linux")]
            Self::Seqpacket => "seqpacket:unix:PATH, seqpacket:connect:unix:PATH or seqpacket:fd:N",
            #[cfg(target_os = "linux")]
            Self::VhostUser => "vhost-user:unix:PATH, vhost-user:connect:unix:PATH or vhost-user:fd:N",
            Self::Tap => "tap:NAME or tap:NAME,netns=PATH or tap:NAME,netns=PID",
        }
    }
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// By path.
    Path(PathBuf),
    /// That of a process.
    Process(u32),
    /// A network namespace and the user namespace it belongs to, both by path.
    Within {
        /// The user namespace, entered first.
        user: PathBuf,
        /// The network namespace.
        net: PathBuf,
    },
}

/// One link, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// How frames cross it.
    pub kind: LinkKind,
    /// Where the VMM is.
    pub address: LinkAddress,
    /// The VM's name.
    pub name: Option<String>,
    /// The VM's address.
    pub ip: Option<Ipv4Addr>,
    /// The largest IP packet.
    pub mtu: u16,
    /// Whether other guests are out of its reach.
    pub isolate: bool,
    /// Whether the guest leaves sums and segments to us without a header that says so (libkrun).
    pub offload: bool,
}

/// Where a VMM is met.
#[derive(Debug, Clone)]
pub enum LinkAddress {
    /// We listen.
    Listen(PathBuf),
    /// We connect, and again when it is gone.
    Connect(PathBuf),
    /// A descriptor we inherited, with a VMM at its other end or listening for one.
    Fd(i32),
    /// The same, under the name systemd gives it (`FileDescriptorName=`).
    Activated(String),
    /// A listening socket we hold already.
    Held(Arc<std::os::fd::OwnedFd>),
    /// Standard input and output.
    Stdio,
    /// A tap device.
    #[cfg(target_os = "linux")]
    Tap {
        /// Its name.
        name: String,
        /// Where it is; ours when nothing is said.
        namespace: Option<Namespace>,
        /// How it is set up there; `None`: the guest side does that.
        setup: Option<crate::link::tap::Setup>,
    },
}

impl PartialEq for LinkAddress {
    /// Two addresses are the same when they are written the same; a socket that is held is only itself.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Held(a), Self::Held(b)) => Arc::ptr_eq(a, b),
            #[cfg(target_os = "linux")]
            (Self::Tap { name: a, namespace: m, .. }, Self::Tap { name: b, namespace: n, .. }) => {
                (a, m) == (b, n)
            }
            _ => {
                std::mem::discriminant(self) == std::mem::discriminant(other)
                    && self.to_string() == other.to_string()
            }
        }
    }
}

impl Eq for LinkAddress {}

impl std::fmt::Display for LinkAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Listen(path) => write!(f, "unix:{}", path.display()),
            Self::Connect(path) => write!(f, "connect:unix:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
            Self::Activated(name) => write!(f, "fd:{name}"),
            Self::Held(_) => f.write_str("a listening socket"),
            Self::Stdio => f.write_str("stdio"),
            #[cfg(target_os = "linux")]
            Self::Tap { name, .. } => f.write_str(name),
        }
    }
}

/// A `--link` as it was typed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct LinkSpec {
    kind: LinkKind,
    address: LinkAddress,
    name: Option<String>,
    mac: Option<Mac>,
    ip: Option<Ipv4Addr>,
    mtu: Option<u16>,
    isolate: bool,
    offload: bool,
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
from_string!(LinkSpec, DnsHost, LeaseSpec, UnixPath, MetricsAddress);

fn from_text<'de, D: serde::Deserializer<'de>, T: FromStr<Err: std::fmt::Display>>(
    d: D,
) -> Result<Option<T>, D::Error> {
    let text = Option::<String>::deserialize(d)?;
    text.map(|t| t.parse().map_err(serde::de::Error::custom)).transpose()
}

impl FromStr for LinkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let place = parts.next().unwrap_or_default();
        let (kind, address) = place.split_once(':').unwrap_or((place, ""));
        let kind = LinkKind::ALL.iter().copied().find(|k| k.name() == kind).ok_or_else(|| {
            let kinds = LinkKind::ALL.iter().map(|k| k.name()).collect::<Vec<_>>().join(", ");
            format!("{kind:?} is not a kind of link ({kinds}); an example: qemu:unix:/run/user/1000/vm.sock")
        })?;
        let fault = || format!("{place:?} is not an address of a {} link: {}", kind.name(), kind.example());
        let address = match kind {
            LinkKind::Stdio if address.is_empty() => LinkAddress::Stdio,
            LinkKind::Stdio => return Err(fault()),
            LinkKind::Tap => tap_address(address).ok_or_else(fault)?,
            LinkKind::Qemu | LinkKind::Vpnkit => socket_address(address)?.ok_or_else(fault)?,
            #[cfg(target_os = "linux")]
            LinkKind::VhostUser | LinkKind::Dgram | LinkKind::Seqpacket => {
                socket_address(address)?.ok_or_else(fault)?
            }
        };
        let (isolate, offload) = (false, false);
        let mut link = Self { kind, address, name: None, mac: None, ip: None, mtu: None, isolate, offload };
        for option in parts {
            let (key, value) =
                option.split_once('=').ok_or_else(|| format!("{option:?} is not KEY=VALUE"))?;
            match key {
                "name" => link.name = Some(label(value)?),
                "mac" => link.mac = Some(value.parse().map_err(|e| format!("mac={value}: {e}"))?),
                "ip" => {
                    link.ip = Some(value.parse().map_err(|_| format!("ip={value} is not an IPv4 address"))?)
                }
                "mtu" => link.mtu = Some(mtu_of(value)?),
                "isolate" => link.isolate = switch(key, value)?,
                "netns" => link.enter(value)?,
                "offload" if kind.may_offload() => link.offload = switch(key, value)?,
                "offload" => return Err(format!("offload= is not an option of a {} link", kind.name())),
                _ => {
                    return Err(format!(
                        "{key:?} is not an option of a link: name, mac, ip, mtu, isolate, offload, netns"
                    ));
                }
            }
        }
        Ok(link)
    }
}

impl LinkSpec {
    /// `netns=`: a path, or a process.
    #[cfg(target_os = "linux")]
    fn enter(&mut self, text: &str) -> Result<(), String> {
        let LinkAddress::Tap { namespace, .. } = &mut self.address else {
            return Err("netns= is an option of tap links alone".into());
        };
        *namespace = Some(match text.parse() {
            Ok(pid) => Namespace::Process(pid),
            Err(_) => Namespace::Path(absolute(text)?),
        });
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    fn enter(&mut self, _: &str) -> Result<(), String> {
        Err("netns= needs Linux".into())
    }
}

/// The address of a socket; `None` when it is none.
fn socket_address(text: &str) -> Result<Option<LinkAddress>, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return absolute(path).map(|p| Some(LinkAddress::Listen(p)));
    }
    if let Some(path) = text.strip_prefix("connect:unix:") {
        return absolute(path).map(|p| Some(LinkAddress::Connect(p)));
    }
    let Some(fd) = text.strip_prefix("fd:") else { return Ok(None) };
    if let Ok(fd) = fd.parse() {
        return Ok(Some(fd).filter(|fd| *fd >= 0).map(LinkAddress::Fd));
    }
    let name =
        !fd.is_empty() && fd.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    Ok((name && !fd.starts_with('-')).then(|| LinkAddress::Activated(fd.to_owned())))
}

/// A device name as the kernel allows it: at most 15 bytes, no slash, no space.
#[cfg(target_os = "linux")]
fn tap_address(name: &str) -> Option<LinkAddress> {
    let good = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%')
        && name != "."
        && name != "..";
    good.then(|| LinkAddress::Tap { name: name.to_owned(), namespace: None, setup: None })
}

#[cfg(not(target_os = "linux"))]
fn tap_address(_: &str) -> Option<LinkAddress> {
    None
}

fn switch(key: &str, text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={text} is neither on nor off")),
    }
}

fn absolute(path: &str) -> Result<PathBuf, String> {
    if path.is_empty() {
        return Err("the path is empty".into());
    }
    std::path::absolute(path).map_err(|e| format!("{path:?}: {e}"))
}

fn label(text: &str) -> Result<String, String> {
    let good = (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.bytes().all(|b| b.is_ascii_digit());
    if good {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(format!("{text:?} is not a name: letters, digits and inner hyphens"))
    }
}

fn mtu_of(text: &str) -> Result<u16, String> {
    let mtu = text.parse().ok().filter(|m| (576..=65_535).contains(m));
    mtu.ok_or_else(|| format!("mtu={text}: 576 to 65535 bytes"))
}

/// `NAME=IP` of a record.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct DnsHost(pub String, pub IpAddr);

impl FromStr for DnsHost {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is not NAME=IP; an example: registry.test=192.0.2.7");
        let (name, ip) = text.split_once('=').ok_or_else(fault)?;
        let ip = ip.parse().map_err(|_| fault())?;
        let name = name.trim_end_matches('.');
        // `*` for every name below is the first label, and not the only one.
        let below = name.strip_prefix("*.").unwrap_or(name);
        let labels = below.split('.').all(|l| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        });
        if labels && name.len() <= 253 { Ok(Self(name.to_ascii_lowercase(), ip)) } else { Err(fault()) }
    }
}

/// `MAC=IP[,NAME]` of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct LeaseSpec(StaticLease);

impl FromStr for LeaseSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fault =
            || format!("{text:?} is not MAC=IP[,NAME]; an example: 52:54:00:12:34:56=192.168.127.9,db");
        let (mac, rest) = text.split_once('=').ok_or_else(fault)?;
        let (ip, name) = rest.split_once(',').map_or((rest, None), |(ip, name)| (ip, Some(name)));
        let mac: Mac = mac.parse().map_err(|_| fault())?;
        let ip = ip.parse().map_err(|_| fault())?;
        Ok(Self(StaticLease { mac, ip, name: name.map(label).transpose()? }))
    }
}

/// `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct UnixPath(pub PathBuf);

impl FromStr for UnixPath {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix:").ok_or_else(|| format!("{text:?} is not unix:PATH"))?;
        absolute(path.strip_prefix("//").unwrap_or(path)).map(Self)
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Block or allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metadata {
    /// Not reachable.
    Block,
    /// Reachable.
    Allow,
}

/// On, off, or as the host has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ipv6Switch {
    /// With a default route.
    On,
    /// Not at all.
    Off,
    /// With a default route while the host has one.
    #[default]
    Auto,
}

/// Who may answer a guest's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// Any port of an address it has sent to.
    Address,
    /// The port it has sent to.
    Endpoint,
    /// Anybody.
    Any,
}

impl From<Filter> for UdpFilter {
    fn from(filter: Filter) -> Self {
        match filter {
            Filter::Address => Self::Address,
            Filter::Endpoint => Self::Endpoint,
            Filter::Any => Self::Any,
        }
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What ended something.
    Error,
    /// What an operator should look at.
    Warn,
    /// What a running network says of itself.
    #[default]
    Info,
    /// Every decision.
    Debug,
    /// Everything.
    Trace,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// `HOST:PORT` to listen on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct MetricsAddress(String);

impl FromStr for MetricsAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is not HOST:PORT; an example: 127.0.0.1:9110");
        let (host, port) = text.rsplit_once(':').ok_or_else(fault)?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let good = match bare {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains(':'),
        };
        let port: Option<u16> = port.parse().ok();
        if good && port.is_some() { Ok(Self(text.to_owned())) } else { Err(fault()) }
    }
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
    fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            let unknown = e.message().strip_prefix("unknown field `").and_then(|m| m.split('`').next());
            let message = match unknown {
                Some(key) => not_a_setting(key),
                None => e.message().to_owned(),
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
        }
    }
}

/// The environment variable of a setting.
#[must_use]
pub fn variable(long: &str) -> String {
    format!("PORTWAY_{}", long.to_ascii_uppercase().replace('-', "_"))
}

/// A key that is none, and the one that was probably meant.
fn not_a_setting(key: &str) -> String {
    let command = Settings::command();
    let known: Vec<&str> = command.get_arguments().filter_map(clap::Arg::get_long).collect();
    match crate::nearest::name(key, known.iter().copied()) {
        Some(near) => format!("{key:?} is not a setting: did you mean {near:?}?"),
        None => format!("{key:?} is not a setting; there are {}", known.join(", ")),
    }
}

impl TryFrom<Settings> for Config {
    type Error = ConfigError;

    fn try_from(s: Settings) -> Result<Self, ConfigError> {
        let subnet = s.subnet.unwrap_or_else(|| "192.168.127.0/24".parse().expect("a subnet"));
        let host = |n: u32| match subnet.host(n) {
            Some(IpAddr::V4(ip)) => Some(ip),
            _ => None,
        };
        let Some(IpAddr::V4(broadcast)) = subnet.broadcast().filter(|_| (8..=29).contains(&subnet.prefix()))
        else {
            return Err(bad(
                "--subnet",
                format!("{subnet}: an IPv4 subnet from /8 to /29 is needed, such as 192.168.127.0/24"),
            ));
        };
        let gateway = host(1).ok_or_else(|| bad("--subnet", format!("{subnet} has no addresses")))?;
        let host_alias = Ipv4Addr::from(u32::from(broadcast) - 1);
        let usable = |setting, ip| usable(subnet, gateway, host_alias, setting, ip);
        let follows_host = s.ipv6.unwrap_or_default() == Ipv6Switch::Auto;
        let subnet6 = s.subnet6.unwrap_or_else(|| unique_local(&subnet));
        let ipv6 = Ipv6::new(subnet6, follows_host).ok_or_else(|| {
            bad(
                "--subnet6",
                format!("{subnet6}: an IPv6 network of 64 bits is needed, such as fd12:3456:789a::/64"),
            )
        })?;
        let udp_idle = s.udp_idle.unwrap_or(300);
        if !(30..=86_400).contains(&udp_idle) {
            return Err(bad("--udp-idle", format!("{udp_idle}: 30 to 86400 seconds")));
        }
        if let Some(mtu) = s.mtu
            && !(576..=65_535).contains(&mtu)
        {
            return Err(bad("--mtu", format!("{mtu}: 576 to 65535 bytes")));
        }
        if s.link.is_empty() && s.join.is_none() {
            return Err(bad(
                "--link",
                "one at least is needed, such as --link qemu:unix:/run/user/1000/vm.sock",
            ));
        }
        let mut static_lease: Vec<StaticLease> = s.static_lease.into_iter().map(|l| l.0).collect();
        let mut links: Vec<LinkConfig> = Vec::new();
        for link in s.link {
            if let Some(ip) = link.ip {
                usable("--link", ip)?;
            }
            if let (Some(mac), Some(ip)) = (link.mac, link.ip) {
                static_lease.push(StaticLease { mac, ip, name: link.name.clone() });
            } else if link.mac.is_some() {
                return Err(bad("--link", "mac= alone says nothing: it goes with ip="));
            }
            let twice =
                |l: &LinkConfig| l.address == link.address || (l.name.is_some() && l.name == link.name);
            if links.iter().any(twice) {
                return Err(bad("--link", "two links have the same address or name"));
            }
            let LinkSpec { kind, address, name, ip, isolate, offload, .. } = link;
            let mtu = link.mtu.or(s.mtu).unwrap_or(kind.mtu());
            links.push(LinkConfig { kind, address, name, ip, mtu, isolate, offload });
        }
        for (n, lease) in static_lease.iter().enumerate() {
            usable("--static-lease", lease.ip)?;
            if static_lease[..n].iter().any(|l| l.ip == lease.ip || l.mac == lease.mac) {
                return Err(bad("--static-lease", format!("{} and {} are given twice", lease.mac, lease.ip)));
            }
        }
        let (mut publish, mut rules) = (Vec::new(), s.auto_publish);
        for arg in s.publish {
            match arg {
                PublishArg::Port(spec) => publish.push(spec),
                PublishArg::Auto { next_free } => rules.push(Rule::everything(next_free)),
            }
        }
        for (n, spec) in publish.iter().enumerate() {
            let free = matches!(spec.host, HostEnd::Ports { first: 0, .. });
            if !free && publish[..n].iter().any(|o| o.host == spec.host && o.proto == spec.proto) {
                return Err(bad("--publish", format!("{spec}: its host port is given twice")));
            }
        }
        let tcp_keepalive = match s.tcp_keepalive.unwrap_or(7200) {
            0 => None,
            // The largest the kernel takes.
            seconds @ 1..=32_767 => Some(std::time::Duration::from_secs(seconds.into())),
            other => return Err(bad("--tcp-keepalive", format!("{other}: 0 to 32767 seconds"))),
        };
        let agent = AgentConfig {
            agents: s.agent,
            rules,
            sockets: s.guest_socket,
            binds: s.guest_binds.unwrap_or_default(),
            keep_alive: tcp_keepalive,
        };
        agent.check(&publish, !s.vsock.is_empty())?;
        let lease_time = s.lease_time.unwrap_or(3600);
        if lease_time < 60 {
            return Err(bad("--lease-time", format!("{lease_time}: 60 seconds at least")));
        }
        let vsock_dir = s.vsock_dir.or_else(|| s.state_dir.clone());
        crate::vsock::check(&s.vsock, &s.vsock_ports, vsock_dir.is_some())?;
        if let Some(text) = s.dns_private.iter().find(|text| !crate::dns::is_name(text)) {
            return Err(bad("--dns-private", format!("{text:?} is not a domain; an example: corp.example")));
        }
        let network = s.network.unwrap_or_else(|| "default".into());
        if network.is_empty() || network.contains(['/', '\0']) || network.starts_with('.') {
            return Err(bad("--network", format!("{network:?} is not a name")));
        }
        let api = match s.api {
            Some(UnixPath(path)) => path,
            None => runtime_socket(&network)?,
        };
        Ok(Self {
            links,
            subnet,
            gateway,
            host_alias,
            publish,
            agent,
            dns_upstream: s.dns_upstream,
            dns_ca: s.dns_ca,
            dns_rebind_protection: s.dns_rebind_protection == Some(Switch::On),
            dns_private: s.dns_private,
            dns_host: s.dns_host.into_iter().map(|h| (h.0, h.1)).collect(),
            static_lease,
            lease_time: std::time::Duration::from_secs(lease_time.into()),
            ntp: s.ntp_server,
            network,
            api,
            join: s.join.map(|UnixPath(path)| path),
            ready_fd: s.ready_fd,
            pid_file: s.pid_file,
            log_file: s.log_file,
            log_level: s.log_level.unwrap_or_default(),
            log_format: s.log_format.unwrap_or_default(),
            metrics: s.metrics.map(|m| m.0),
            pcap: s.pcap,
            state_dir: s.state_dir,
            vsock: s.vsock,
            vsock_ports: s.vsock_ports,
            vsock_dir,
            host_loopback: s.host_loopback != Some(Switch::Off),
            metadata: s.metadata == Some(Metadata::Allow),
            ipv6: (s.ipv6 != Some(Ipv6Switch::Off)).then_some(ipv6),
            udp: UdpConfig {
                filter: s.udp_filter.map(UdpFilter::from).unwrap_or_default(),
                idle: std::time::Duration::from_secs(udp_idle.into()),
            },
            resolv_conf: s.resolv_conf.unwrap_or_else(|| "/etc/resolv.conf".into()),
            hosts_file: match s.hosts_file {
                Some(p) if p.as_os_str() == "off" => None,
                other => Some(other.unwrap_or_else(|| "/etc/hosts".into())),
            },
            limits: Limits { tcp_keepalive, ..Limits::default() },
            particulars: Particulars::default(),
            guest_api: if s.guest_api == Some(Switch::Off) { GuestApi::Off } else { GuestApi::Loopback },
            dns_search: None,
            vpnkit_macs: Vec::new(),
            ends_with_vm: false,
            stays: false,
            attached_mtu: s.mtu.unwrap_or(LinkKind::Stdio.mtu()),
            doors: Vec::new(),
            notification: None,
        })
    }
}

/// The control socket of a network that was not given one; its directory is made, for this user alone.
///
/// # Errors
/// When the directory cannot be made, or is somebody else's.
pub fn runtime_socket(network: &str) -> Result<PathBuf, ConfigError> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};

    let user = nix::unistd::geteuid();
    let directory = match std::env::var_os("XDG_RUNTIME_DIR").filter(|d| Path::new(d).is_absolute()) {
        Some(runtime) => PathBuf::from(runtime).join("portway"),
        None => std::env::temp_dir().join(format!("portway-{user}")),
    };
    let fault = |e: &dyn std::fmt::Display| {
        bad("--api", format!("{}: {e}; give --api unix:PATH", directory.display()))
    };
    match std::fs::DirBuilder::new().mode(RUNTIME_DIR_MODE).create(&directory) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(fault(&e)),
        _ => {}
    }
    let meta = std::fs::symlink_metadata(&directory).map_err(|e| fault(&e))?;
    if !meta.is_dir() || meta.uid() != user.as_raw() || meta.mode() & 0o022 != 0 {
        return Err(fault(&"is not a directory of this user alone"));
    }
    Ok(directory.join(format!("{network}.sock")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(toml: &str) -> Result<Config, String> {
        let settings = Settings::from_toml(toml)?;
        Config::try_from(settings).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_has_the_flags_names() {
        let config = settings(
            r#"
            link = ["qemu:unix:/tmp/vm.sock,name=web,mtu=1500", "qemu:fd:7"]
            subnet = "10.1.0.0/16"
            publish = ["2222:22"]
            dns-upstream = ["192.0.2.53", "192.0.2.54:5353"]
            static-lease = ["52:54:00:12:34:56=10.1.0.9,db"]
            api = "unix:/tmp/api.sock"
            host-loopback = "off"
            "#,
        )
        .unwrap();
        assert_eq!(
            (config.gateway, config.host_alias),
            (Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 1, 255, 254))
        );
        assert_eq!((config.links[0].mtu, config.links[1].mtu), (1500, 65_520));
        assert_eq!(config.dns_upstream[0].server.address.port(), 53);
        assert!(!config.host_loopback && !config.metadata);
    }

    fn environment(pairs: &[(&str, &str)]) -> Result<Settings, String> {
        Settings::from_env(pairs.iter().map(|(k, v)| (k.into(), v.into()))).map_err(|e| e.to_string())
    }

    #[test]
    fn the_environment_has_the_flags_names_too() {
        let settings = environment(&[
            ("PORTWAY_LINK", "qemu:unix:/a qemu:unix:/b,name=db"),
            ("PORTWAY_MTU", "1500"),
            ("PORTWAY_DNS_HOST", "a.test=192.0.2.1"),
            ("PORTWAY_BIN", "/not/a/setting"),
            ("PATH", "/bin"),
        ]);
        let settings = settings.unwrap();
        assert_eq!((settings.link.len(), settings.mtu, settings.dns_host.len()), (2, Some(1500), 1));
        for (pair, fault) in [
            (("PORTWAY_MTU", "big"), "PORTWAY_MTU"),
            (("PORTWAY_LINK", "wire:fd:1"), "is not a kind of link"),
            (("PORTWAY_LOG_LEVEL", ""), "PORTWAY_LOG_LEVEL"),
        ] {
            let error = environment(&[pair]).unwrap_err();
            assert!(error.contains(fault), "{pair:?}: {error}");
        }
    }

    #[test]
    fn a_network_has_an_ipv6_prefix_of_its_own_that_stays_the_same() {
        let of = |extra: &str| settings(&format!("link = [\"qemu:unix:/x\"]\n{extra}")).unwrap().ipv6;
        let v6 = of("").unwrap();
        assert_eq!(v6.subnet.to_string(), "fd6b:420b:1fb5::/64");
        assert_eq!(v6.host_alias.to_string(), "fd6b:420b:1fb5::254");
        assert!(v6.follows_host && !of("ipv6 = \"on\"").unwrap().follows_host);
        assert_ne!(of("subnet = \"10.0.0.0/24\"").unwrap().subnet, v6.subnet);
        assert_eq!(of("ipv6 = \"off\""), None);
        let given = of("subnet6 = \"2001:db8:1::/64\"").unwrap();
        assert_eq!(given.gateway.to_string(), "2001:db8:1::1");
    }

    #[test]
    fn the_command_line_wins_and_lists_append() {
        let file: Settings = toml::from_str("mtu = 1500\npublish = [\"1:1\"]").unwrap();
        let line: Settings = toml::from_str("mtu = 9000\npublish = [\"2:2\"]").unwrap();
        let both = line.over(file);
        assert_eq!((both.mtu, both.publish.len()), (Some(9000), 2));
    }

    #[test]
    fn a_bad_value_names_the_setting_the_value_and_what_to_do() {
        for (toml, fault) in [
            ("", "--link: one at least is needed"),
            ("link = [\"qemu\"]", "is not an address of a qemu link"),
            ("link = [\"stdio:1\"]", "is not an address of a stdio link"),
            ("link = [\"tap:a-very-long-device\"]", "is not an address of a tap link"),
            ("link = [\"qemu:unix:/x,netns=1\"]", "netns= is an option of tap links alone"),
            ("link = [\"tap:tap0,offload=on\"]", "offload= is not an option of a tap link"),
            ("link = [\"qemu:unix:/x,isolate=yes\"]", "isolate=yes is neither on nor off"),
            ("link = [\"wire:unix:/x\"]", "is not a kind of link"),
            ("link = [\"qemu:tcp:1.2.3.4:5\"]", "is not an address of a qemu link"),
            ("link = [\"qemu:unix:/x,mtu=100\"]", "576 to 65535"),
            ("link = [\"qemu:unix:/x,color=red\"]", "is not an option of a link"),
            ("link = [\"qemu:unix:/x\"]\nmtu = 1", "--mtu: 1: 576"),
            ("link = [\"qemu:unix:/x\"]\nsubnet = \"10.0.0.0/30\"", "--subnet: 10.0.0.0/30"),
            ("link = [\"qemu:unix:/x\"]\nsubnet6 = \"fd00::/48\"", "--subnet6: fd00::/48"),
            ("link = [\"qemu:unix:/x\"]\nsubnet6 = \"10.0.0.0/24\"", "--subnet6: 10.0.0.0/24"),
            ("link = [\"qemu:unix:/x\"]\nudp-idle = 5", "--udp-idle: 5: 30 to 86400"),
            ("link = [\"qemu:unix:/x\"]\nudp-filter = \"none\"", "unknown variant `none`"),
            ("link = [\"qemu:unix:/x,ip=10.0.0.9\"]", "10.0.0.9 is not in the subnet"),
            ("link = [\"qemu:unix:/x,ip=192.168.127.254\"]", "is the network's own"),
            ("link = [\"qemu:unix:/x\", \"qemu:unix:/x\"]", "the same address or name"),
            ("link = [\"qemu:unix:/x\"]\npublish = [\"1:1\", \"1:2\"]", "given twice"),
            ("link = [\"qemu:unix:/x\"]\ndns-upstream = [\"dns.test\"]", "is not IP[:PORT]"),
            ("link = [\"qemu:unix:/x\"]\ndns-upstream = [\"a..b=1.1.1.1\"]", "\"a..b\" is not a domain"),
            ("link = [\"qemu:unix:/x\"]\ndns-host = [\"*=1.1.1.1\"]", "is not NAME=IP"),
            ("link = [\"qemu:unix:/x\"]\nstatic-lease = [\"a=b\"]", "is not MAC=IP"),
            ("link = [\"qemu:unix:/x\"]\nlease-time = 5", "--lease-time: 5: 60 seconds at least"),
            ("link = [\"qemu:unix:/x\"]\nvsock = [\"wire:/x\"]", "is not a kind of vsock"),
            ("link = [\"qemu:unix:/x\"]\nvsock = [\"dir:/x\", \"dir:/y\"]", "--vsock: two guests have CID 3"),
            ("link = [\"qemu:unix:/x\"]\nvsock-ports = [1]", "--vsock-ports: there is no --vsock"),
            (
                "link = [\"qemu:unix:/x\"]\nvsock = [\"dir:/x\"]\nvsock-ports = [1]",
                "--vsock-ports: they need",
            ),
            ("link = [\"qemu:unix:/x\"]\nmto = 3", "line 2: \"mto\" is not a setting: did you mean \"mtu\"?"),
            ("link = [\"qemu:unix:/x\"]\ncolour = 3", "is not a setting; there are link, subnet"),
            ("link = [\"qemu:unix:/x\"]\nmtu = \"big\"", "line 2: invalid type"),
            ("link = [\"qemu:unix:/x\"]\nmtu = 1500\nmtu = 1501", "duplicate key"),
            ("link = [\"qemu:unix:/x\"]\nmetrics = \"9110\"", "is not HOST:PORT"),
            ("link = [\"qemu:unix:/x\"]\nlog-format = \"xml\"", "unknown variant"),
        ] {
            let error = settings(toml).expect_err(toml);
            assert!(error.contains(fault), "{toml}: {error}");
        }
    }
}
