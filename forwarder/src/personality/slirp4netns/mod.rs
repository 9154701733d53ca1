//! slirp4netns: the network of an unprivileged network namespace.
//!
//! ```text
//!  slirp4netns [OPTION]... PID TAPNAME ─► a `tap` link in PID's namespaces (link::tap), set up when -c says so
//!  --api-socket PATH ─► api: add_hostfwd, list_hostfwd, remove_hostfwd ─► published ports
//! ```
//! Of the network /N: +2 is gateway and host, +3 the resolver, +15 to +30 are leased, +100 is the guest. Callers are
//! rootlesskit, rootless Docker, Podman 5 and older, and scripts. docs/guide/slirp4netns.md has every option.
//! Source: the manual page and the observed behaviour of slirp4netns 1.2.

mod api;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use portway_netstack::{DnsAt, Mac, Services, Subnet};

use super::Particulars;
use crate::config::{
    Config, GuestApi, Ipv6, LinkAddress, LinkConfig, LinkKind, LogLevel, Namespace, Settings, UnixPath,
};
use crate::link::tap::Setup;
use crate::request::{Request, Requests};
use crate::sidecar::Door;

const NAME: &str = "slirp4netns";
/// The release whose options and answers these are.
const VERSION: &str = "1.2.0";
/// The largest packet a tap device takes: 65535 less the Ethernet header.
const LARGEST_MTU: u16 = 65_521;

/// User-mode networking for unprivileged network namespaces.
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    override_usage = "slirp4netns [OPTION]... PID|PATH [TAPNAME]",
    disable_version_flag = true,
    infer_long_args = true,
    max_term_width = 120
)]
struct Args {
    /// Bring up the interface
    #[arg(short, long)]
    configure: bool,
    /// End when this descriptor has an event
    #[arg(short, long, value_name = "FD")]
    exit_fd: Option<i32>,
    /// Write to this descriptor when the network is configured
    #[arg(short, long, value_name = "FD")]
    ready_fd: Option<i32>,
    /// The largest packet (max=65521)
    #[arg(short, long, default_value_t = 1500, value_parser = clap::value_parser!(u16).range(1..=i64::from(LARGEST_MTU)))]
    mtu: u16,
    /// Enable IPv6: fd00::/64, host ::2, resolver ::3
    #[arg(short = '6', long)]
    enable_ipv6: bool,
    /// The API socket's path
    #[arg(short, long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// The network
    #[arg(long, default_value = "10.0.2.0/24")]
    cidr: String,
    /// Prohibit connecting to 127.0.0.1:* on the host namespace
    #[arg(long)]
    disable_host_loopback: bool,
    /// How the namespace is given: path or pid
    #[arg(long, value_name = "TYPE", default_value = "pid")]
    netns_type: NetnsType,
    /// The user namespace, with --netns-type=path
    #[arg(long, value_name = "PATH")]
    userns_path: Option<PathBuf>,
    /// Accepted; says that it has no effect
    #[arg(long, hide = true)]
    enable_sandbox: bool,
    /// Accepted; says that it has no effect
    #[arg(long, hide = true)]
    enable_seccomp: bool,
    /// The host's IPv4 address, or the interface, that connections leave from
    #[arg(long, value_name = "IPv4|IFACE")]
    outbound_addr: Option<String>,
    /// Refused: leave it to the host
    #[arg(long, value_name = "IPv6", hide = true)]
    outbound_addr6: Option<String>,
    /// Disable the resolver, 10.0.2.3
    #[arg(long)]
    disable_dns: bool,
    /// The Ethernet address of the TAP (only valid with -c)
    #[arg(long, value_name = "MAC")]
    macaddress: Option<Mac>,
    /// What the target is: netns, or bess for user-mode Linux
    #[arg(long, value_name = "TYPE", default_value = "netns")]
    target_type: TargetType,
    /// Say what is done, on standard error
    #[arg(long)]
    debug: bool,
    /// Portway's control socket, unix:PATH, for `portway flows --api` and the like
    #[arg(long, value_name = "unix:PATH")]
    portway_api: Option<UnixPath>,
    /// Show version and exit
    #[arg(short, long)]
    version: bool,
    /// The process, or the path, whose network namespace it is; the socket's path with --target-type=bess
    #[arg(value_name = "PID|PATH")]
    target: Option<String>,
    /// The device
    #[arg(value_name = "TAPNAME")]
    tap: Option<String>,
    #[arg(hide = true)]
    rest: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum NetnsType {
    Pid,
    Path,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TargetType {
    Netns,
    Bess,
}

/// The addresses of one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    subnet: Subnet,
    gateway: Ipv4Addr,
    dns: Ipv4Addr,
    pool: (Ipv4Addr, Ipv4Addr),
    guest: Ipv4Addr,
}

impl Plan {
    /// The plan of the network `cidr`.
    fn of(cidr: &str) -> Result<Self, String> {
        let subnet: Subnet = cidr.parse().map_err(|_| format!("invalid CIDR: {cidr}"))?;
        let (IpAddr::V4(network), 1..=25) = (subnet.network(), subnet.prefix()) else {
            return Err(format!("--cidr {cidr}: an IPv4 network with a prefix of 1 to 25 is needed"));
        };
        if cidr.split('/').next() != Some(network.to_string().as_str()) {
            return Err(format!("CIDR needs to be a network address like {subnet}, not like {cidr}"));
        }
        // A prefix of 25 leaves 126 addresses: none of these can be missing.
        let host = |n: u32| Ipv4Addr::from(u32::from(network) + n);
        Ok(Self { subnet, gateway: host(2), dns: host(3), pool: (host(15), host(30)), guest: host(100) })
    }
}

/// Runs slirp4netns with `args`, its name first. Whatever is wrong ends with 1, usage included, as callers know it.
pub(super) fn main(args: &[OsString]) -> ExitCode {
    let args: Args = match super::parsed(NAME, args) {
        Ok(args) => args,
        Err(code) => return code,
    };
    if args.version {
        super::say(&format!("slirp4netns version {VERSION}\nportway: {}\n", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    match prepare(&args) {
        Ok((config, doors)) => {
            warn(&args, &config);
            super::serve(NAME, &config, doors, args.api_socket.as_slice())
        }
        Err(line) => super::fail(NAME, &line),
    }
}

/// What a user should know about options that do less than they say, or more than is safe.
fn warn(args: &Args, config: &Config) {
    let mut lines = Vec::new();
    for (given, name) in
        [(args.enable_sandbox, "--enable-sandbox"), (args.enable_seccomp, "--enable-seccomp")]
    {
        if given {
            lines.push(format!("{name} has no effect: there is no sandbox of slirp4netns's kind"));
        }
    }
    if !args.disable_host_loopback {
        lines.push(format!(
            "127.0.0.1:* on the host is accessible as {} (set --disable-host-loopback to prohibit connecting to 127.0.0.1:*)",
            config.gateway
        ));
    }
    if !args.rest.is_empty() {
        lines.push("too many arguments".into());
    }
    for line in lines {
        super::say(&format!("WARNING: {line}\n"));
    }
}

/// The network, and the doors beside it.
fn prepare(args: &Args) -> Result<(Config, Vec<Door>), String> {
    let plan = Plan::of(&args.cidr)?;
    if args.outbound_addr6.is_some() {
        return Err("--outbound-addr6 is not in this release: the host chooses the IPv6 address".into());
    }
    if args.macaddress.is_some() && !args.configure {
        return Err("--macaddress cannot be specified when --configure or -c is not specified".into());
    }
    if args.macaddress.is_some_and(Mac::is_group) {
        return Err("--macaddress: a group address cannot be a device's".into());
    }
    if args.userns_path.is_some() && args.netns_type == NetnsType::Pid {
        return Err("--userns-path requires --netns-type=path".into());
    }
    let outbound = args.outbound_addr.as_deref().map(outbound).transpose()?;
    let (kind, address) = link(args, &plan)?;
    let control = args.portway_api.clone();
    let unused = || UnixPath(PathBuf::from("/nonexistent"));
    let settings = Settings {
        // The control socket is served only where it is asked for; so no directory is made for it.
        api: Some(control.clone().unwrap_or_else(unused)),
        link: vec!["tap:tap0".parse()?],
        ready_fd: args.ready_fd,
        hosts_file: Some("off".into()),
        log_level: Some(if args.debug { LogLevel::Debug } else { LogLevel::Warn }),
        ..super::confinement()?
    };
    let mut config = Config::try_from(settings).map_err(|e| e.to_string())?;
    config.links = vec![LinkConfig {
        kind,
        address,
        name: None,
        ip: None,
        mtu: args.mtu,
        isolate: false,
        offload: false,
    }];
    (config.subnet, config.gateway, config.host_alias) = (plan.subnet, plan.gateway, plan.gateway);
    config.host_loopback = !args.disable_host_loopback;
    // Its guests never had a say in ports.
    config.guest_api = GuestApi::Off;
    config.ipv6 = args.enable_ipv6.then(ipv6).transpose()?;
    // slirp keeps nothing from its guest but the host's loopback.
    config.metadata = true;
    config.particulars = Particulars {
        control: control.is_some(),
        ready: "1",
        services: Services {
            dns: if args.disable_dns { DnsAt::Nowhere } else { DnsAt::Address(plan.dns) },
            pool: Some(plan.pool),
            forwards: Vec::new(),
        },
        outbound,
        ..Particulars::default()
    };
    let mut doors: Vec<Door> = Vec::new();
    if let Some(path) = &args.api_socket {
        doors.push(api::door(path, plan.guest).map_err(|e| format!("--api-socket: {e}"))?);
        config.particulars.directories.extend(path.parent().map(std::path::Path::to_path_buf));
    }
    if let Some(fd) = args.exit_fd {
        let fd = crate::fd::inherit(fd).map_err(|e| format!("--exit-fd: {e}"))?;
        doors.push(Box::new(move |context| end_with(fd, context.requests.clone())));
    }
    Ok((config, doors))
}

/// slirp's IPv6 network: the host is ::2, the resolver ::3. The namespace configures itself, by router advertisements.
fn ipv6() -> Result<Ipv6, String> {
    let network = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0);
    let subnet = Subnet::new(network.into(), 64).ok_or("no such network")?;
    let host = |n: u16| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n);
    Ok(Ipv6 { subnet, gateway: host(3), host_alias: host(2), follows_host: true })
}

/// How the guest is met.
fn link(args: &Args, plan: &Plan) -> Result<(LinkKind, LinkAddress), String> {
    let usage = "PID or PATH, and TAPNAME are needed (see slirp4netns --help)";
    let target = args.target.as_deref().ok_or(usage)?;
    if args.target_type == TargetType::Bess {
        if args.configure || args.userns_path.is_some() || args.netns_type == NetnsType::Path {
            return Err("the options for namespaces mean nothing with --target-type=bess".into());
        }
        let path = std::path::absolute(target).map_err(|e| format!("{target}: {e}"))?;
        return Ok((LinkKind::Seqpacket, LinkAddress::Listen(path)));
    }
    let name = args.tap.clone().ok_or(usage)?;
    // The grammar of links knows which names are names of devices.
    if name.contains(',') || format!("tap:{name}").parse::<crate::config::LinkSpec>().is_err() {
        return Err(format!("{name:?} is not the name of a device: 1 to 15 characters without / : %"));
    }
    let existing = |path: &str, what: &str| {
        std::fs::metadata(path).map_err(|e| format!("{what} path {path}: {e}")).map(|_| PathBuf::from(path))
    };
    let namespace = match args.netns_type {
        NetnsType::Pid => {
            let pid =
                target.parse().ok().filter(|pid: &u32| *pid > 0).ok_or("PID must be a positive integer")?;
            existing(&format!("/proc/{pid}/ns/net"), "namespace")?;
            Namespace::Process(pid)
        }
        NetnsType::Path => {
            let net = existing(target, "namespace")?;
            match &args.userns_path {
                None => Namespace::Path(net),
                Some(user) => {
                    let user = existing(&user.to_string_lossy(), "user namespace")?;
                    Namespace::Within { user, net }
                }
            }
        }
    };
    let setup = args.configure.then_some(Setup {
        address: plan.guest,
        prefix: plan.subnet.prefix(),
        gateway: plan.gateway,
        mtu: args.mtu,
        mac: args.macaddress,
    });
    Ok((LinkKind::Tap, LinkAddress::Tap { name, namespace: Some(namespace), setup }))
}

/// The address connections leave from: given, or that of an interface.
fn outbound(text: &str) -> Result<Ipv4Addr, String> {
    if let Ok(ip) = text.parse() {
        return Ok(ip);
    }
    let found = nix::ifaddrs::getifaddrs().map_err(|e| format!("--outbound-addr {text}: {}", e.desc()))?;
    let of_interface = found.filter(|i| i.interface_name == text);
    of_interface
        .filter_map(|i| i.address.as_ref().and_then(|a| a.as_sockaddr_in().map(|v4| v4.ip())))
        .next()
        .ok_or_else(|| {
            format!("--outbound-addr {text}: neither an IPv4 address nor an interface that has one")
        })
}

/// Ends the network at the first event of `fd`, its end included. A thread, for any kind of descriptor may be given.
fn end_with(fd: OwnedFd, requests: Requests) {
    let watch = move || {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        loop {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(0) | Err(nix::Error::EINTR) => {}
                _ if requests.send(Request::Shutdown).is_ok() => return,
                // Its queue is full: it is about to be read.
                _ => std::thread::yield_now(),
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("exit-fd".into()).spawn(watch) {
        tracing::error!(%error, "--exit-fd cannot be watched");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(line: &str) -> Result<Config, String> {
        let args = Args::try_parse_from(std::iter::once(NAME).chain(line.split(' ')));
        prepare(&args.map_err(|e| e.to_string())?).map(|(config, _)| config)
    }

    #[test]
    fn a_network_has_slirps_addresses() {
        let plan = Plan::of("10.0.2.0/24").unwrap();
        let last = |ip: Ipv4Addr| ip.octets()[3];
        assert_eq!(
            [plan.gateway, plan.dns, plan.pool.0, plan.pool.1, plan.guest].map(last),
            [2, 3, 15, 30, 100]
        );
        for (bad, fault) in [
            ("10.0.2.1/24", "needs to be a network address like 10.0.2.0/24"),
            ("10.0.2.0/26", "a prefix of 1 to 25"),
            ("fd00::/64", "an IPv4 network"),
            ("bad", "invalid CIDR"),
        ] {
            assert!(Plan::of(bad).unwrap_err().contains(fault), "{bad}");
        }
    }

    #[test]
    fn the_command_lines_of_callers_are_understood() {
        let pid = std::process::id();
        // rootlesskit, Podman, and the manual's example.
        for line in [
            format!("--mtu 65520 --disable-host-loopback --cidr 10.0.2.0/24 {pid} tap0"),
            format!("--disable-host-loopback --mtu=65520 -c --netns-type=path /proc/{pid}/ns/net tap0"),
            format!("--configure --mtu=65520 --disable-host-loopback {pid} tap0"),
            format!("-c -m 1500 --conf --disable-dns {pid} tap0"),
        ] {
            let config = prepared(&line.replace(" --conf ", " ")).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(config.gateway, Ipv4Addr::new(10, 0, 2, 2));
            assert!(!config.particulars.control);
        }
    }

    #[test]
    fn what_is_wrong_is_said_before_anything_starts() {
        let pid = std::process::id();
        for (line, fault) in [
            ("--bogus 1 tap0".to_owned(), "--bogus"),
            ("1".to_owned(), "TAPNAME"),
            ("x tap0".to_owned(), "PID must be a positive integer"),
            ("0 tap0".to_owned(), "PID must be a positive integer"),
            ("4294967 tap0".to_owned(), "/proc/4294967/ns/net"),
            (format!("-m 65522 {pid} tap0"), "65521"),
            (format!("-m 0 {pid} tap0"), "0"),
            (format!("--outbound-addr6=::1 {pid} tap0"), "--outbound-addr6 is not in this release"),
            (format!("--netns-type=x {pid} tap0"), "netns-type"),
            ("--netns-type=path /nonexistent tap0".to_owned(), "/nonexistent"),
            (format!("--netns-type=path --userns-path=/nonexistent /proc/{pid}/ns/net tap0"), "/nonexistent"),
            (format!("--userns-path=/proc/{pid}/ns/user {pid} tap0"), "--userns-path requires"),
            (format!("--macaddress=02:00:00:00:00:01 {pid} tap0"), "--macaddress cannot be"),
            (format!("-c --macaddress=03:00:00:00:00:01 {pid} tap0"), "group address"),
            (format!("--outbound-addr=nowhere0 {pid} tap0"), "nowhere0"),
            (format!("-a /nonexistent/api {pid} tap0"), "/nonexistent/api"),
            (format!("{pid} a-very-long-device-name"), "not the name of a device"),
            (format!("{pid} tap0,netns=1"), "not the name of a device"),
            ("-c --target-type=bess /tmp/x".to_owned(), "mean nothing with --target-type=bess"),
        ] {
            let error = prepared(&line).expect_err(&line);
            assert!(error.contains(fault), "{line}: {error}");
        }
    }

    #[test]
    fn an_interface_stands_for_its_address() {
        assert_eq!(outbound("lo"), Ok(Ipv4Addr::LOCALHOST));
        assert_eq!(outbound("192.0.2.7"), Ok(Ipv4Addr::new(192, 0, 2, 7)));
    }
}
