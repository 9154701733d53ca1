//! From [`Settings`] to [`Config`]: defaults, ranges, and what settings have to do with each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use portway_netstack::dhcp::StaticLease;
use portway_netstack::{Limits, Subnet, UdpConfig, UdpFilter};

use super::{
    Config, ConfigError, GuestApi, Ipv6, Ipv6Switch, LinkAddress, LinkConfig, LinkKind, LinkSpec, Metadata,
    Settings, Switch, UnixPath, bad,
};
use crate::agent::AgentConfig;
use crate::agent::rules::Rule;
use crate::personality::Particulars;
use crate::publish::spec::{GuestName, HostEnd, PublishArg};

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
        if let Some(what) = unusable(&subnet) {
            return Err(bad("--subnet", format!("{subnet}: {what}; such as 192.168.127.0/24 is good")));
        }
        let gateway = host(1).ok_or_else(|| bad("--subnet", format!("{subnet} has no addresses")))?;
        let host_alias = Ipv4Addr::from(u32::from(broadcast) - 1);
        let usable = |setting, ip| usable(subnet, gateway, host_alias, setting, ip);
        let follows_host = s.ipv6.unwrap_or_default() == Ipv6Switch::Auto;
        let subnet6 = s.subnet6.unwrap_or_else(|| unique_local(&subnet));
        if let Some(what) = unusable(&subnet6) {
            return Err(bad("--subnet6", format!("{subnet6}: {what}; such as fd12:3456:789a::/64 is good")));
        }
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
            if let Some(ip) = link.ip.filter(|_| links.iter().any(|l| l.ip == link.ip)) {
                return Err(bad("--link", format!("two links have ip={ip}")));
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
            let Some(name) = &lease.name else { continue };
            if static_lease[..n].iter().any(|l| l.name.as_ref() == Some(name)) {
                return Err(bad("--static-lease", format!("two guests are called {name:?}")));
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
            match &spec.guest {
                GuestName::Name(name) if !links.iter().any(|l| l.name.as_ref() == Some(name)) => {
                    let error = crate::request::PublishError::NoGuest(name.clone());
                    return Err(bad("--publish", format!("{spec}: {error}")));
                }
                // What the agent carries goes to the guest's own addresses, its loopback among them.
                GuestName::Address(IpAddr::V4(ip)) if !spec.needs_agent() => usable("--publish", *ip)?,
                _ => {}
            }
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
        if let Some(path) = s.allow_path.iter().map(|d| &d.0).find(|path| !path.is_dir()) {
            return Err(bad("--allow-path", format!("{} is no directory: make it first", path.display())));
        }
        crate::sandbox::check_user(s.runas.as_deref(), s.sandbox.unwrap_or_default())?;
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
            sandbox: s.sandbox.unwrap_or_default(),
            runas: s.runas,
            allow_path: s.allow_path.into_iter().map(|d| d.0).collect(),
            limits: Limits { tcp_keepalive, ..s.limits.limits()? },
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
        // A descriptor would be one of ours, and a namespace is not entered any more.
        if !matches!(link.address, LinkAddress::Listen(_) | LinkAddress::Connect(_)) {
            return Err(bad("--link", "a VM joins by a socket: unix:PATH or connect:unix:PATH"));
        }
        let LinkSpec { kind, address, name, ip, isolate, offload, .. } = link;
        Ok(LinkConfig { kind, address, name, ip, mtu: link.mtu.unwrap_or(kind.mtu()), isolate, offload })
    }
}

/// Why guests cannot be numbered from `subnet`.
fn unusable(subnet: &Subnet) -> Option<&'static str> {
    let (first, last) = match (subnet.network(), subnet.broadcast()) {
        (IpAddr::V4(first), Some(IpAddr::V4(last))) => (first, last),
        (IpAddr::V6(ip), _) if ip.is_unicast_link_local() => {
            return Some("link-local addresses are each link's own");
        }
        (IpAddr::V6(ip), _) if ip.is_multicast() => return Some("these are addresses of groups"),
        _ => return None,
    };
    match () {
        () if first.octets()[0] == 0 => Some("a host in 0.0.0.0/8 is itself alone"),
        () if first.is_loopback() || last.is_loopback() => Some("127.0.0.0/8 is each host's own loopback"),
        () if last.octets()[0] >= 224 => Some("these are addresses of groups, or of nobody"),
        () => None,
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

const RUNTIME_DIR_MODE: u32 = 0o700;

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
