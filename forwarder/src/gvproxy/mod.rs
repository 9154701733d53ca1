//! The program as `gvproxy`: its flags and its file, made into a [`Config`].
//!
//! ```text
//!  argv ─► flags ─┐
//!                 ├─► Plan (checked) ─► Config ─► sidecar ─► control: gvproxy's routes on every -listen and -services
//!  -config ► yaml ┘
//! ```
//! What differs from gvproxy on purpose is in docs/guide/gvproxy.md. Errors of usage end with 2, of the configuration with 1, as
//! there; unlike there a network that fails while it runs ends with 1 too.

mod flags;
pub(crate) mod notify;
mod yaml;

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;

use portway_netstack::dhcp::StaticLease;
use portway_netstack::{Mac, Subnet};

use self::flags::{Flags, Refused};
use self::yaml::File;
use crate::config::{
    Config, Door, DoorAddress, GuestApi, LinkAddress, LinkConfig, LinkKind, LogLevel, Settings,
};
use crate::dns::{GivenRecord, GivenZone};
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::ssh::{Forward, Key, Login};

/// The VM that gvproxy's callers configure: its MAC has the second address.
const DEVICE_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee]);
/// HyperKit's VM of the same MAC.
const DEVICE_UUID: &str = "c3d68012-0208-11ea-9fd7-f2189899ab08";

/// Whether a program called `name` is to be gvproxy.
#[must_use]
pub fn is_called(name: &std::ffi::OsStr) -> bool {
    name == "gvproxy" || name == "gvproxy.exe"
}

/// Runs with the words behind the program's name.
#[must_use]
pub fn main(words: &[String]) -> ExitCode {
    let flags = match Flags::parse(words) {
        Ok(flags) => flags,
        Err(Refused::Help) => {
            say(&flags::usage());
            return ExitCode::SUCCESS;
        }
        Err(Refused::Wrong(text)) => {
            say(&format!("{text}\n{}", flags::usage()));
            return ExitCode::from(2);
        }
    };
    if flags.is_on("version") {
        use std::io::Write;
        // One who does not read it has not asked.
        let _ = writeln!(std::io::stdout(), "gvproxy version {} (portway)", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let done = plan(&flags).and_then(|config| {
        if let Some(log) = &config.log_file {
            // gvproxy begins its log anew.
            std::fs::File::create(log).map_err(|e| format!("log-file: {}: {e}", log.display()))?;
        }
        crate::log::start(config.log_level, config.log_format, config.log_file.as_deref())
            .map_err(|e| e.to_string())?;
        crate::sidecar::run(&config).map_err(|e| format!("{e:#}"))
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            say(&format!("gvproxy: {text}\n"));
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) {
    use std::io::Write;
    let _ = write!(std::io::stderr(), "{text}");
}

/// The path of a URL of one of `schemes`.
fn path_of(flag: &str, url: &str, scheme: &str) -> Result<PathBuf, String> {
    let path = url.strip_prefix(scheme).and_then(|u| u.strip_prefix("://"));
    let path = path.ok_or_else(|| format!("{flag}: {url:?} is not {scheme}://PATH"))?;
    if path.is_empty() {
        return Err(format!("{flag}: {url:?} has no path"));
    }
    // gvproxy takes paths relative to where it was started.
    std::path::absolute(path).map_err(|e| format!("{flag}: {url:?}: {e}"))
}

/// Where an API is served.
fn door(flag: &str, url: &str, connect: bool) -> Result<Door, String> {
    let address = if url.starts_with("unix://") {
        DoorAddress::Unix(path_of(flag, url, "unix")?)
    } else if let Some(host) = url.strip_prefix("tcp://") {
        DoorAddress::Tcp(host.trim_end_matches('/').to_owned())
    } else if let Some(place) = url.strip_prefix("vsock://") {
        DoorAddress::Vsock(vsock_port(flag, url, place)?)
    } else {
        return Err(format!("{flag}: {url:?}: unix://PATH, tcp://HOST:PORT or vsock://[CID]:PORT is needed"));
    };
    Ok(Door { address, connect })
}

/// The port of `vsock://[CID]:PORT`. The CID is whom gvproxy listens as, and the host has one alone.
fn vsock_port(flag: &str, url: &str, place: &str) -> Result<u32, String> {
    let (cid, port) = place.trim_end_matches('/').rsplit_once(':').unwrap_or(("?", ""));
    if !cid.is_empty() && cid.parse::<u32>().is_err() {
        return Err(format!("{flag}: {url:?}: vsock://[CID]:PORT is needed, such as vsock://:1024"));
    }
    port.parse().map_err(|_| format!("{flag}: {url:?}: {port:?} is not a port, such as vsock://:1024"))
}

/// The file and the flags together: the file wins where gvproxy lets it.
fn merge(flags: &Flags) -> Result<(File, bool), String> {
    let from_file = flags.text("config").is_some();
    let mut file = match flags.text("config") {
        None => File::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("config: {path}: {e}"))?;
            File::parse(&text).map_err(|e| format!("config: {path}: {e}"))?
        }
    };
    let over = |field: &mut String, flag: &str| {
        if let Some(value) = flags.text(flag) {
            value.clone_into(field);
        }
    };
    let listen: Vec<String> = flags.all("listen").map(str::to_owned).collect();
    if !listen.is_empty() {
        file.listen = listen;
    }
    over(&mut file.services, "services");
    over(&mut file.pid_file, "pid-file");
    over(&mut file.log_file, "log-file");
    over(&mut file.notification, "notification");
    over(&mut file.interfaces.qemu, "listen-qemu");
    over(&mut file.interfaces.bess, "listen-bess");
    over(&mut file.interfaces.vfkit, "listen-vfkit");
    over(&mut file.interfaces.vpnkit, "listen-vpnkit");
    over(&mut file.interfaces.stdio, "listen-stdio");
    if flags.is_on("debug") {
        file.stack.debug = true;
    }
    let stack = &mut file.stack;
    // The file's addresses win over the flags'.
    for (field, flag) in [
        (&mut stack.subnet, "subnet"),
        (&mut stack.gateway_ip, "gatewayIP"),
        (&mut stack.device_ip, "deviceIP"),
        (&mut stack.host_ip, "hostIP"),
        (&mut stack.capture_file, "pcap"),
    ] {
        if field.is_empty() {
            over(field, flag);
        }
    }
    if let Some(mtu) = flags.number("mtu") {
        stack.mtu = mtu;
    }
    stack.ec2_metadata_access |= flags.is_on("ec2-metadata-access") || file.ec2_metadata_access;
    let lists =
        ["forward-sock", "forward-dest", "forward-user", "forward-identity"].map(|f| flags.all(f).count());
    if lists.iter().any(|n| *n != lists[0]) {
        return Err("-forward-sock, -forward-dest, -forward-user, and -forward-identity must all be specified together, \
                    the same number of times"
            .into());
    }
    let of = |flag: &'static str, n: usize| flags.all(flag).nth(n).unwrap_or_default().to_owned();
    for n in 0..lists[0] {
        file.forwards.push(yaml::SshForward {
            socket: of("forward-sock", n),
            dest: of("forward-dest", n),
            user: of("forward-user", n),
            identity: of("forward-identity", n),
        });
    }
    Ok((file, from_file))
}

/// The configuration of the sidecar; what it opens is opened here as far as gvproxy's own errors ask for it.
fn plan(flags: &Flags) -> Result<Config, String> {
    let (file, from_file) = merge(flags)?;
    let subnet = if file.stack.subnet.is_empty() { "192.168.127.0/24" } else { &file.stack.subnet };
    let subnet: Subnet = subnet.parse().map_err(|e| format!("subnet {subnet:?}: {e}"))?;
    let addresses = Addresses::new(&file, subnet)?;
    let mtu = match file.stack.mtu {
        0 => 1500,
        n => u16::try_from(n)
            .ok()
            .filter(|n| *n >= 576)
            .ok_or_else(|| format!("mtu: {n}: 576 to 65535 bytes"))?,
    };
    let links = links(&file, mtu)?;
    let ends_with_vm = links.iter().any(|l| l.kind != LinkKind::Vpnkit);
    let mut doors = Vec::new();
    for url in &file.listen {
        doors.push(door("listen", url, true)?);
    }
    if !file.services.is_empty() {
        doors.push(door("services", &file.services, false)?);
    }
    let network = format!("gvproxy-{}", std::process::id());
    let settings = Settings {
        subnet: Some(subnet),
        network: Some(network),
        pid_file: (!file.pid_file.is_empty()).then(|| file.pid_file.clone().into()),
        log_file: (!file.log_file.is_empty()).then(|| file.log_file.clone().into()),
        pcap: (!file.stack.capture_file.is_empty()).then(|| file.stack.capture_file.clone().into()),
        log_level: Some(log_level(&file)),
        // A link of its own kind: the real ones replace it below.
        link: vec!["stdio".parse()?],
        ..crate::personality::confinement()?
    };
    let mut config = Config::try_from(settings).map_err(|e| e.to_string())?;
    config.stays = !ends_with_vm;
    if links.is_empty() && doors.iter().all(|d| !d.connect) {
        return Err("no VM can come: give -listen, -listen-qemu, -listen-vfkit, -listen-bess, -listen-vpnkit or -listen-stdio".into());
    }
    config.links = links;
    config.ends_with_vm = ends_with_vm;
    config.attached_mtu = mtu;
    config.gateway = addresses.gateway;
    config.host_alias = addresses.host;
    config.metadata = file.stack.ec2_metadata_access;
    config.doors = doors;
    config.guest_api = GuestApi::Any;
    config.notification =
        notification(&file.notification, from_file && flags.text("notification").is_none())?;
    if !file.stack.gateway_mac_address.is_empty() {
        let mac = &file.stack.gateway_mac_address;
        config.particulars.gateway_mac =
            mac.parse().map_err(|e| format!("gatewayMacAddress {mac:?}: {e}"))?;
    }
    config.dns_search = match (file.stack.dns_search_domains.clone(), from_file) {
        (Some(domains), _) => Some(domains),
        (None, true) => Some(Vec::new()),
        (None, false) => None,
    };
    config.particulars.zones = zones(&file)?;
    leases_and_macs(&file, from_file, addresses.device, &mut config)?;
    config.publish = forwards(&file)?;
    if !from_file {
        config.publish.extend(ssh_port(flags, addresses.device)?);
    }
    check_nat(&file, &addresses)?;
    config.particulars.ssh = ssh_forwards(&file, addresses.device)?;
    let doors = config.doors.iter().filter_map(|door| match &door.address {
        DoorAddress::Unix(path) => path.parent(),
        DoorAddress::Tcp(_) | DoorAddress::Vsock(_) => None,
    });
    let sockets = config.particulars.ssh.iter().filter_map(|forward| forward.socket.parent());
    let sockets = doors.chain(sockets).map(std::path::Path::to_path_buf);
    config.particulars.directories =
        sockets.chain(config.links.iter().filter_map(LinkConfig::directory)).collect();
    Ok(config)
}

struct Addresses {
    gateway: Ipv4Addr,
    device: Ipv4Addr,
    host: Ipv4Addr,
}

impl Addresses {
    fn new(file: &File, subnet: Subnet) -> Result<Self, String> {
        let Some(IpAddr::V4(broadcast)) = subnet.broadcast().filter(|_| subnet.prefix() <= 29) else {
            return Err(format!("subnet {subnet}: an IPv4 subnet of /29 or larger is needed"));
        };
        let host = |n| match subnet.host(n) {
            Some(IpAddr::V4(ip)) => ip,
            _ => broadcast,
        };
        let pick = |name: &str, text: &str, default: Ipv4Addr| -> Result<Ipv4Addr, String> {
            let ip: Ipv4Addr = match text {
                "" => default,
                text => text.parse().map_err(|_| format!("{name} {text:?} is not an IPv4 address"))?,
            };
            let reserved = ip == broadcast || IpAddr::V4(ip) == subnet.network();
            if !subnet.contains(ip.into()) || reserved {
                return Err(format!("{name} {ip} is not a usable address of the subnet {subnet}"));
            }
            Ok(ip)
        };
        let stack = &file.stack;
        let last = Ipv4Addr::from(u32::from(broadcast) - 1);
        let out = Self {
            gateway: pick("gatewayIP", &stack.gateway_ip, host(1))?,
            device: pick("deviceIP", &stack.device_ip, host(2))?,
            host: pick("hostIP", &stack.host_ip, last)?,
        };
        if out.gateway == out.device || out.gateway == out.host || out.device == out.host {
            return Err("gatewayIP, deviceIP and hostIP have to be three addresses".into());
        }
        Ok(out)
    }
}

fn log_level(file: &File) -> LogLevel {
    match file.log_level.as_str() {
        _ if file.stack.debug => LogLevel::Debug,
        "trace" => LogLevel::Trace,
        "debug" => LogLevel::Debug,
        "warn" | "warning" => LogLevel::Warn,
        "error" | "fatal" | "panic" => LogLevel::Error,
        // As gvproxy: anything else is info.
        _ => LogLevel::Info,
    }
}

/// The links of `-listen-…`. A path that is there already is an error, as callers know it.
fn links(file: &File, mtu: u16) -> Result<Vec<LinkConfig>, String> {
    let on = &file.interfaces;
    for (a, b, names) in [
        (&on.vpnkit, &on.qemu, "vpnkit and qemu"),
        (&on.vpnkit, &on.bess, "vpnkit and bess"),
        (&on.qemu, &on.bess, "qemu and bess"),
    ] {
        if !a.is_empty() && !b.is_empty() {
            return Err(format!("cannot use {names} protocol at the same time"));
        }
    }
    let link = |kind, address| LinkConfig {
        kind,
        address,
        name: None,
        ip: None,
        mtu,
        isolate: false,
        offload: false,
    };
    let fresh = |flag: &str, url: &str, scheme: &str| -> Result<LinkAddress, String> {
        let path = path_of(flag, url, scheme)?;
        if std::fs::symlink_metadata(&path).is_ok() {
            return Err(format!("{:?} already exists", path.display().to_string()));
        }
        Ok(LinkAddress::Listen(path))
    };
    let mut links = Vec::new();
    if let Some(host) = on.qemu.strip_prefix("tcp://") {
        let listener = TcpListener::bind(host.trim_end_matches('/'));
        let listener = listener.map_err(|e| format!("listen-qemu: cannot listen on {host}: {e}"))?;
        links.push(link(LinkKind::Qemu, LinkAddress::Held(std::sync::Arc::new(listener.into()))));
    } else if !on.qemu.is_empty() {
        links.push(link(LinkKind::Qemu, fresh("listen-qemu", &on.qemu, "unix")?));
    }
    #[cfg(target_os = "linux")]
    {
        if !on.bess.is_empty() {
            links.push(link(LinkKind::Seqpacket, fresh("listen-bess", &on.bess, "unixpacket")?));
        }
        if !on.vfkit.is_empty() {
            links.push(link(LinkKind::Dgram, fresh("listen-vfkit", &on.vfkit, "unixgram")?));
        }
    }
    if !on.vpnkit.is_empty() {
        let path = path_of("listen-vpnkit", &on.vpnkit, "unix")?;
        links.push(link(LinkKind::Vpnkit, LinkAddress::Listen(path)));
    }
    if !on.stdio.is_empty() {
        links.push(link(LinkKind::Stdio, LinkAddress::Stdio));
    }
    Ok(links)
}

/// Where notifications go: a URL on the command line, a path in the file.
fn notification(text: &str, plain: bool) -> Result<Option<PathBuf>, String> {
    match text {
        "" => Ok(None),
        path if plain && !path.contains("://") => Ok(Some(path.into())),
        url => path_of("notification", url, "unix").map(Some),
    }
}

/// The file's zones.
fn zones(file: &File) -> Result<Vec<GivenZone>, String> {
    let address = |zone: &str, text: &str| match text {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| format!("dns: {zone}: {text:?} is not an address")),
    };
    let zone = |zone: &yaml::Zone| {
        let record = |record: &yaml::Record| {
            Ok(GivenRecord {
                name: record.name.clone(),
                address: address(&zone.name, &record.ip)?,
                pattern: Some(record.regexp.clone()).filter(|p| !p.is_empty()),
            })
        };
        Ok(GivenZone {
            name: zone.name.clone(),
            records: zone.records.iter().map(record).collect::<Result<_, String>>()?,
            default: address(&zone.name, &zone.default_ip)?,
        })
    };
    file.stack.dns.iter().map(zone).collect()
}

/// The unix sockets that lead to the VM over SSH. Their keys are read here: without a key that can be used nothing starts.
fn ssh_forwards(file: &File, device: Ipv4Addr) -> Result<Vec<Forward>, String> {
    let mut forwards: Vec<Forward> = Vec::new();
    for forward in &file.forwards {
        let yaml::SshForward { socket, dest, user, identity } = forward;
        if [socket, dest, user, identity].into_iter().any(String::is_empty) {
            return Err(
                "-forward-sock, -forward-dest, -forward-user, and -forward-identity must all be specified together"
                    .into(),
            );
        }
        if socket.starts_with("npipe:") {
            return Err(format!("-forward-sock {socket}: named pipes are not supported by this platform"));
        }
        let socket = match socket.contains("://") {
            true => path_of("-forward-sock", socket, "unix")?,
            false => std::path::absolute(socket).map_err(|e| format!("-forward-sock {socket}: {e}"))?,
        };
        if forwards.iter().any(|f| f.socket == socket) {
            return Err(format!("-forward-sock {}: given twice", socket.display()));
        }
        let key = Key::read(identity.as_ref(), None).map_err(|e| format!("-forward-identity: {e}"))?;
        let login = Login { server: (device, 22).into(), user: user.clone(), key, known_host: false };
        forwards.push(Forward { socket, dest: dest.clone(), login });
    }
    Ok(forwards)
}

fn leases_and_macs(
    file: &File,
    from_file: bool,
    device: Ipv4Addr,
    config: &mut Config,
) -> Result<(), String> {
    if !from_file {
        config.static_lease.push(StaticLease { mac: DEVICE_MAC, ip: device, name: None });
        config.vpnkit_macs.push((DEVICE_UUID.to_owned(), DEVICE_MAC));
    }
    for (ip, mac) in &file.stack.dhcp_static_leases {
        let mac: Mac = mac.parse().map_err(|e| format!("dhcpStaticLeases: {mac:?}: {e}"))?;
        let ip: Ipv4Addr =
            ip.parse().map_err(|_| format!("dhcpStaticLeases: {ip:?} is not an IPv4 address"))?;
        if !config.subnet.contains(ip.into())
            || config.static_lease.iter().any(|l| l.ip == ip || l.mac == mac)
        {
            return Err(format!("dhcpStaticLeases: {ip} {mac}: outside the subnet, or given twice"));
        }
        config.static_lease.push(StaticLease { mac, ip, name: None });
    }
    for (uuid, mac) in &file.stack.vpnkit_macs {
        let mac = mac.parse().map_err(|e| format!("vpnKitUUIDMacAddresses: {mac:?}: {e}"))?;
        config.vpnkit_macs.push((uuid.to_ascii_lowercase(), mac));
    }
    Ok(())
}

/// The file's `forwards`, `[udp:]HOSTADDR: GUESTIP:PORT`.
fn forwards(file: &File) -> Result<Vec<PublishSpec>, String> {
    let spec = |(local, remote): (&String, &String)| {
        let (proto, address) = match local.strip_prefix("udp:") {
            Some(rest) => (portway_api::control::Protocol::Udp, rest),
            None => (portway_api::control::Protocol::Tcp, local.strip_prefix("tcp:").unwrap_or(local)),
        };
        let fault = || format!("forwards: {local:?}: {remote:?}: HOST:PORT and GUESTIP:PORT are needed");
        let (host, port) = address.rsplit_once(':').ok_or_else(fault)?;
        let bind = match host.trim_matches(['[', ']']) {
            "" => Bind::Address(IpAddr::from([0; 16])),
            "localhost" => Bind::Localhost,
            ip => Bind::Address(ip.parse().map_err(|_| fault())?),
        };
        let (guest, guest_port) = remote.rsplit_once(':').ok_or_else(fault)?;
        Ok(PublishSpec {
            host: HostEnd::Ports { bind, first: port.parse().map_err(|_| fault())? },
            guest: GuestName::Address(guest.parse().map_err(|_| fault())?),
            guest_port: guest_port.parse().ok().filter(|p| *p > 0).ok_or_else(fault)?,
            count: 1,
            proto,
        })
    };
    file.stack.forwards.iter().map(spec).collect()
}

/// `-ssh-port`: 2222 unless said otherwise, -1 for none.
fn ssh_port(flags: &Flags, device: Ipv4Addr) -> Result<Option<PublishSpec>, String> {
    let first = match flags.number("ssh-port").unwrap_or(2222) {
        -1 => return Ok(None),
        n => u16::try_from(n)
            .ok()
            .filter(|p| *p >= 1024)
            .ok_or("ssh-port value must be between 1024 and 65535")?,
    };
    Ok(Some(PublishSpec {
        host: HostEnd::Ports { bind: Bind::Address(Ipv4Addr::LOCALHOST.into()), first },
        guest: GuestName::Address(device.into()),
        guest_port: 22,
        count: 1,
        proto: portway_api::control::Protocol::Tcp,
    }))
}

/// The one translation there is: the host alias stands for the host's loopback.
fn check_nat(file: &File, addresses: &Addresses) -> Result<(), String> {
    let host = addresses.host.to_string();
    let other = file.stack.nat.iter().find(|(ip, to)| **ip != host || *to != "127.0.0.1");
    if let Some((ip, to)) = other {
        return Err(format!("nat: {ip}: {to}: only {host}: 127.0.0.1 is possible"));
    }
    match file.stack.gateway_virtual_ips.iter().find(|ip| **ip != host) {
        Some(ip) => Err(format!("gatewayVirtualIPs: {ip}: only {host} is possible")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
