//! `portway run`: the options, made into a [`LaunchConfig`] for `vm-launcher`.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "doc comments of options are help texts, with brackets of their own"
)]

use std::ffi::OsString;
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use portway_api::control::PortInfo;
use portway_launcher::{
    Accel, Arch, BootImage, Console, Data, DiskSpec, Event, HypervisorKind, LaunchConfig, LaunchError, Leave,
    Mac, Net, Share, SharedNetwork, Side,
};

use super::{Failure, listing};
use crate::agent::{GuestBinds, SocketPair};
use crate::config::{Config, DnsHost, Settings, Switch, UnixPath, runtime_socket};
use crate::control::client::Client;
use crate::dns::Upstream;
use crate::publish::spec::PublishArg;

/// Bytes of a network's name: its control socket has a path of some 100.
const NETWORK_NAME: usize = 40;

/// The options of `run`.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// A disk or ISO file, or the prefix of IMAGE-kernel, IMAGE-initrd.img and IMAGE-cmdline, as LinuxKit names them
    #[arg(value_name = "IMAGE", required_unless_present = "kernel", conflicts_with = "kernel")]
    image: Option<PathBuf>,
    #[command(flatten)]
    boot: BootArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    life: LifeArgs,
}

/// What boots.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Boot")]
struct BootArgs {
    /// The kernel, when it is not one of IMAGE's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk that goes with --kernel; with --squashfs one that loads what the kernel lacks
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The command line that goes with --kernel [default: console= of the serial port]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Boot IMAGE-kernel with IMAGE-squashfs.img as its root
    #[arg(long, conflicts_with_all = ["kernel", "iso", "uefi"])]
    squashfs: bool,
    /// Boot IMAGE, IMAGE.iso or IMAGE-efi.iso as a CD
    #[arg(long, conflicts_with = "kernel")]
    iso: bool,
    /// Boot by UEFI, where the image does not say so itself
    #[arg(long, conflicts_with = "kernel")]
    uefi: bool,
    /// The firmware, such as OVMF_CODE.fd [default: where distributions put it]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "squashfs"])]
    fw: Option<PathBuf>,
}

/// The machine and its devices.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
struct MachineArgs {
    /// The guest's architecture [default: this machine's]
    #[arg(long, value_enum)]
    arch: Option<ArchArg>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = |text: &str| number::<u16>(text, 1..=255, "2"))]
    cpus: u16,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = |text: &str| number::<u32>(text, 32..=u32::MAX, "1024"))]
    mem: u32,
    /// What runs the guest's instructions
    #[arg(long, value_enum, default_value_t = AccelArg::Auto)]
    accel: AccelArg,
    /// A disk, [file=]PATH[,size=N[G|M]][,format=raw|qcow2]; one with a size is made if it is not there; repeatable
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskSpec>,
    /// Forget at the end what the guest has written to disks
    #[arg(long)]
    disposable: bool,
    /// Metadata for the guest: LinuxKit's CD with the file /config
    #[arg(long, value_name = "TEXT", conflicts_with = "data_file")]
    data: Option<String>,
    /// As --data, from a file
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,
    /// A CD for cloud-init (NoCloud) with the files of DIR: user-data and others
    #[arg(long, value_name = "DIR")]
    cloud_init: Option<PathBuf>,
    /// An Ignition configuration
    #[arg(long, value_name = "FILE")]
    ignition: Option<PathBuf>,
    /// A directory of this host in the guest: DIR[,tag=NAME], mounted there with -t virtiofs; repeatable
    #[arg(long, value_name = "DIR")]
    virtiofs: Vec<Share>,
    /// The virtiofsd to use [default: in PATH, or where distributions put it]
    #[arg(long, value_name = "FILE")]
    virtiofsd: Option<PathBuf>,
    /// A further device, in QEMU's words; repeatable
    #[arg(long, value_name = "DEVICE")]
    device: Vec<OsString>,
    /// What runs the VM [default: QEMU, on macOS vfkit]
    #[arg(long, value_enum)]
    hypervisor: Option<HypervisorArg>,
    /// The vfkit to use [default: in PATH]
    #[arg(long, value_name = "FILE")]
    vfkit: Option<PathBuf>,
    /// The QEMU to use [default: this machine's in PATH]
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// One more argument for QEMU; repeatable
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<OsString>,
}

/// The network.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Publish a port of the VM: [BIND:]HOST[-END]:[GUEST_ADDR:]GUEST[-END][/tcp|udp], or `auto[,next-free]` for every port it listens on; repeatable
    #[arg(long, short, value_name = "SPEC")]
    publish: Vec<PublishArg>,
    /// How the VM's network card reaches the network
    #[arg(long, value_enum, default_value_t = NetArg::Auto)]
    net: NetArg,
    /// LinuxKit's word for the network: user, vpnkit, docker-for-mac, vmnet (all: Portway's), none, tap,NAME, bridge,NAME
    #[arg(long, value_name = "WORD", conflicts_with = "net", value_parser = Net::networking)]
    networking: Option<Net>,
    /// The VM's Ethernet address [default: kept in the state directory]
    #[arg(long, value_name = "MAC")]
    mac: Option<Mac>,
    /// The VM's address on its network [default: the next free one]
    #[arg(long, value_name = "IP")]
    ip: Option<Ipv4Addr>,
    /// The largest IP packet on the link [default: 65520; 1500 with vfkit]
    #[arg(long, value_name = "BYTES", value_parser = |text: &str| number::<u16>(text, 576..=u16::MAX, "1500"))]
    mtu: Option<u16>,
    /// Whether the VM has a vsock, by the network's own device: streams between host and guest without a network [default: on]
    #[arg(long, value_name = "on|off")]
    vsock: Option<Switch>,
    /// Ports of the guest's vsock, each a unix socket guest.%08x in the state directory, such as 2374,62373
    #[arg(long, value_name = "PORT,…", value_delimiter = ',', value_parser = |text: &str| number::<u32>(text, 1..=u32::MAX - 1, "2374"))]
    vsock_ports: Vec<u32>,
    /// A unix socket in the guest that leads to one of this host, GUEST_PATH:HOST_PATH; needs the guest agent; repeatable
    #[arg(long, value_name = "PATH:PATH")]
    guest_socket: Vec<SocketPair>,
    /// On which host addresses the guest may ask to be published
    #[arg(long, value_enum, value_name = "WHERE")]
    guest_binds: Option<GuestBinds>,
    /// More settings of the network, in the file that `serve --config` takes: rules of auto-publish and others
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Start or join the network of this name, which several VMs share [default: a network of its own, called default]
    #[arg(long, value_name = "NAME")]
    network: Option<String>,
    /// The network's control socket, when it is to have one of its own
    #[arg(long, value_name = "unix:PATH")]
    api: Option<UnixPath>,
    /// Ask this resolver and not those of the host's resolv.conf, as of `serve`; repeatable
    #[arg(long, value_name = "[DOMAIN=]SERVER", value_parser = as_typed::<Upstream>)]
    dns_upstream: Vec<String>,
    /// PEM file of the authorities whose certificates resolvers over TLS and HTTPS may have [default: the host's]
    #[arg(long, value_name = "FILE")]
    dns_ca: Option<PathBuf>,
    /// A name of our own, NAME=IP; repeatable
    #[arg(long, value_name = "NAME=IP", value_parser = as_typed::<DnsHost>)]
    dns_host: Vec<String>,
}

impl NetworkArgs {
    /// An option that was given and says nothing without a network of ours; what the launcher knows of, it checks itself.
    fn needs_network(&self) -> Option<&'static str> {
        let given = [
            ("--api", self.api.is_some()),
            ("--dns-upstream", !self.dns_upstream.is_empty()),
            ("--dns-host", !self.dns_host.is_empty()),
            ("--dns-ca", self.dns_ca.is_some()),
            ("--vsock on", self.vsock == Some(Switch::On)),
            ("--config", self.config.is_some()),
            ("--guest-socket", !self.guest_socket.is_empty()),
            ("--guest-binds", self.guest_binds.is_some()),
        ];
        given.into_iter().find_map(|(option, given)| given.then_some(option))
    }
}

/// Start and end.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Life")]
struct LifeArgs {
    /// The VM's name, also in DNS [default: from IMAGE]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Where the VM's Ethernet address, leases and logs are kept [default: IMAGE-state]
    #[arg(long, value_name = "DIR", visible_alias = "state")]
    state_dir: Option<PathBuf>,
    /// Answer when the VM runs and leave it running: see vms, console, stop, kill, wait
    #[arg(long, visible_alias = "detached")]
    detach: bool,
    /// As --detach, and answer when the guest says that it is ready; needs the guest agent
    #[arg(long)]
    wait: bool,
    /// Seconds the guest has to power off after SIGTERM or SIGINT
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = LaunchConfig::DEFAULT_STOP_TIMEOUT.as_secs(),
        value_parser = |text: &str| number::<u64>(text, 0..=LaunchConfig::LONGEST_STOP_TIMEOUT.as_secs(), "30")
    )]
    stop_timeout: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ArchArg {
    /// 64-bit PC.
    #[value(name = "x86_64", alias = "amd64")]
    X86_64,
    /// 64-bit Arm.
    #[value(name = "aarch64", alias = "arm64")]
    Aarch64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum HypervisorArg {
    /// QEMU.
    Qemu,
    /// Virtualization.framework of macOS.
    Vfkit,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AccelArg {
    /// KVM or HVF where it works, else TCG.
    Auto,
    /// Linux's virtualization.
    Kvm,
    /// macOS's virtualization.
    Hvf,
    /// QEMU's translator.
    Tcg,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NetArg {
    /// vhost-user where QEMU bears it, else a socket.
    Auto,
    /// The guest's memory, with segmentation offload.
    VhostUser,
    /// A socketpair, with large frames.
    Socket,
    /// No network card.
    None,
}

impl From<NetArg> for Net {
    fn from(arg: NetArg) -> Self {
        match arg {
            NetArg::Auto => Self::Auto,
            NetArg::VhostUser => Self::VhostUser,
            NetArg::Socket => Self::Socket,
            NetArg::None => Self::None,
        }
    }
}

impl From<AccelArg> for Accel {
    fn from(arg: AccelArg) -> Self {
        match arg {
            AccelArg::Auto => Self::Auto,
            AccelArg::Kvm => Self::Kvm,
            AccelArg::Hvf => Self::Hvf,
            AccelArg::Tcg => Self::Tcg,
        }
    }
}

impl From<ArchArg> for Arch {
    fn from(arg: ArchArg) -> Self {
        match arg {
            ArchArg::X86_64 => Self::X86_64,
            ArchArg::Aarch64 => Self::Aarch64,
        }
    }
}

/// A number in a range; the error says which, and gives an example.
fn number<T>(text: &str, range: RangeInclusive<T>, example: &str) -> Result<T, String>
where
    T: FromStr + PartialOrd + Display,
{
    let fault = || format!("a number from {} to {} is needed, such as {example}", range.start(), range.end());
    text.parse().ok().filter(|number| range.contains(number)).ok_or_else(fault)
}

/// A value of `serve`, checked and handed on as it was typed.
fn as_typed<T: FromStr>(text: &str) -> Result<String, T::Err> {
    text.parse::<T>().map(|_| text.to_owned())
}

/// Looks at the sidecar's command line as the sidecar will, before anything is started.
fn check_network(config: &LaunchConfig) -> Result<(), Failure> {
    let Some(words) = config.sidecar_arguments().map_err(failure)? else { return Ok(()) };
    let line = std::iter::once(OsString::from("portway")).chain(words);
    let cli = super::Cli::try_parse_from(line).map_err(|error| Failure::usage(super::one_line(&error)))?;
    let super::Command::Serve { settings, config: file, .. } = cli.command else { return Ok(()) };
    let mut settings = settings.over(Settings::from_env(std::env::vars_os()).map_err(Failure::usage)?);
    if let Some(path) = file {
        settings = settings.over(Settings::from_file(&path).map_err(Failure::usage)?);
    }
    Config::try_from(settings).map(drop).map_err(|error| {
        let text = error.to_string();
        // The user knows the link's address by another name.
        match (config.ip, text.strip_prefix("--link: ")) {
            (Some(_), Some(fault)) => Failure::usage(format!("--ip: {fault}")),
            _ => Failure::usage(text),
        }
    })
}

pub(super) fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let wait = args.life.wait;
    let detach = args.life.detach || wait;
    let has_settings = args.network.config.is_some();
    let config = config(args)?;
    check_network(&config)?;
    if wait && !config.net.needs_sidecar() {
        return Err(Failure::usage(
            "--wait asks a network of Portway's, and the VM has none with this --net or --networking",
        ));
    }
    // Settings of the user's may name another way for the agent.
    if wait && !has_settings && (config.shared.is_some() || !config.vsock) {
        return Err(Failure::usage(
            "--wait asks the guest agent, which comes by vsock, and the VM has none with --network or --vsock off: --detach, \
             and portway wait for what it serves",
        ));
    }
    let mut leave = None;
    if detach {
        match portway_launcher::detach(&config.state_dir).map_err(failure)? {
            Side::Front(Ok(())) => {
                listing::say(&config.name);
                if wait {
                    return super::wait::until_ready(&Client::new(&config.api), None, super::wait::PATIENCE);
                }
                return Ok(ExitCode::SUCCESS);
            }
            Side::Front(Err(code)) => return Ok(ExitCode::from(code)),
            Side::Launcher(launcher) => leave = Some(launcher),
        }
    }
    let ended = portway_launcher::run(&config, |event| match event {
        Event::NetworkReady => show_ports(&config.api),
        Event::Running => {
            if let Some(Err(error)) = leave.take().map(Leave::leave) {
                listing::complain(&error.to_string());
            }
        }
    });
    ended.map(ExitCode::from).map_err(failure)
}

pub(super) fn failure(error: LaunchError) -> Failure {
    Failure { code: error.exit_code(), line: error.to_string() }
}

/// Where running VMs are listed.
pub(super) fn registry() -> Result<PathBuf, Failure> {
    let socket = runtime_socket("default").map_err(Failure::usage)?;
    Ok(socket.with_file_name("vms"))
}

fn image(prefix: Option<PathBuf>, boot: &BootArgs, arch: Arch) -> Result<(PathBuf, BootImage), Failure> {
    if boot.initrd.is_some() && boot.kernel.is_none() && !boot.squashfs {
        return Err(Failure::usage("--initrd goes with --kernel or --squashfs"));
    }
    if boot.cmdline.is_some() && boot.kernel.is_none() {
        return Err(Failure::usage("--cmdline goes with --kernel; an image has its own, in IMAGE-cmdline"));
    }
    match (prefix, &boot.kernel) {
        (_, Some(kernel)) => {
            let cmdline = boot.cmdline.clone().unwrap_or_else(|| format!("console={}", arch.console()));
            let image = BootImage::Files { kernel: kernel.clone(), initrd: boot.initrd.clone(), cmdline };
            Ok((kernel.clone(), image))
        }
        (Some(prefix), None) if boot.squashfs => {
            let image = BootImage::Squashfs { prefix: prefix.clone(), initrd: boot.initrd.clone() };
            Ok((prefix, image))
        }
        (Some(prefix), None) if boot.iso => Ok((prefix.clone(), BootImage::Iso(prefix))),
        (Some(prefix), None) => Ok((prefix.clone(), BootImage::Prefix(prefix))),
        (None, None) => Err(Failure::usage("IMAGE is missing (see portway run --help)")),
    }
}

fn config(args: RunArgs) -> Result<LaunchConfig, Failure> {
    let RunArgs { image: prefix, boot, machine, network, life } = args;
    if let Some(name) = network.network.as_deref().filter(|name| !is_network_name(name)) {
        return Err(Failure::usage(format!(
            "--network {name:?}: letters, digits and inner - _ . only, at most {NETWORK_NAME}, such as --network dev"
        )));
    }
    let net = network.networking.clone().unwrap_or_else(|| network.net.into());
    if let Some(path) = network.dns_ca.as_ref().filter(|path| !path.is_file()) {
        return Err(Failure::usage(format!(
            "--dns-ca {}: there is no such file: a file of certificates in PEM form is needed",
            path.display()
        )));
    }
    if let Some(option) = network.needs_network().filter(|_| !net.needs_sidecar()) {
        return Err(Failure::usage(format!(
            "{option} goes with a network of Portway's, and the VM has none with this --net or --networking"
        )));
    }
    if network.network.is_some() && network.vsock == Some(Switch::On) {
        return Err(Failure::usage(
            "--vsock on: a VM on a network that is shared has no vsock yet: leave --network out",
        ));
    }
    let sidecar = std::env::current_exe().map_err(|error| {
        Failure::failed(format!("cannot find this program to start the network: {error}"))
    })?;
    let arch = machine.arch.map_or(Arch::HOST, Arch::from);
    let (base, image) = image(prefix, &boot, arch)?;
    let name = life.name.unwrap_or_else(|| name_of(&base));
    let registry = match registry() {
        Ok(directory) => Some(directory),
        // It runs all the same, and `vms` does not know of it.
        Err(_) if network.api.is_some() && !life.detach && !life.wait => None,
        Err(failure) => return Err(failure),
    };
    let Place { network: named, api } = match (network.network.as_ref(), network.api) {
        (named, Some(UnixPath(api))) => Place { network: named.map_or("default", |n| n).into(), api },
        (Some(named), None) => Place::of(named)?,
        (None, None) if net.needs_sidecar() => Place::free(&name)?,
        (None, None) => Place::of("default")?,
    };
    let shared = network.network.map(|name| SharedNetwork { state_dir: network_state(&name), name });
    let state_dir = life.state_dir.unwrap_or_else(|| state_beside(&base));
    let mut config = LaunchConfig::new(image, name, state_dir, api, sidecar);
    config.uefi = boot.uefi;
    config.firmware = boot.fw;
    config.arch = arch;
    config.cpus = machine.cpus;
    config.mem_mib = machine.mem;
    config.accel = machine.accel.into();
    config.disks = machine.disk;
    config.disposable = machine.disposable;
    config.data = machine.data.map(Data::Text).or(machine.data_file.map(Data::File));
    config.cloud_init = machine.cloud_init;
    config.ignition = machine.ignition;
    config.shares = machine.virtiofs;
    config.virtiofsd = machine.virtiofsd;
    config.devices = machine.device;
    config.hypervisor = match machine.hypervisor {
        Some(HypervisorArg::Qemu) => HypervisorKind::Qemu,
        Some(HypervisorArg::Vfkit) => HypervisorKind::Vfkit,
        None if machine.vfkit.is_some() => HypervisorKind::Vfkit,
        None => HypervisorKind::HOST,
    };
    config.vfkit = machine.vfkit;
    config.qemu = machine.qemu;
    config.qemu_args = machine.qemu_arg;
    config.publish = network.publish.iter().map(ToString::to_string).collect();
    config.net = net;
    config.mac = network.mac;
    config.ip = network.ip;
    config.mtu = network.mtu;
    config.vsock = network.vsock != Some(Switch::Off);
    config.vsock_ports = network.vsock_ports;
    config.console = if life.detach || life.wait { Console::Socket } else { Console::Stdio };
    config.registry = registry;
    config.stop_timeout = Duration::from_secs(life.stop_timeout);
    if shared.is_none() {
        config.serve_args = vec!["--network".into(), named.into()];
    }
    config.shared = shared;
    config.serve_args.extend(network_args(network.config, &network.guest_socket, network.guest_binds)?);
    if let Some(authorities) = network.dns_ca {
        config.serve_args.extend(["--dns-ca".into(), authorities.into()]);
    }
    for (option, values) in [("--dns-upstream", network.dns_upstream), ("--dns-host", network.dns_host)] {
        config.serve_args.extend(values.into_iter().flat_map(|value| [option.into(), value.into()]));
    }
    Ok(config)
}

/// A network and its control socket.
struct Place {
    network: String,
    api: PathBuf,
}

impl Place {
    fn of(network: &str) -> Result<Self, Failure> {
        Ok(Self { network: network.into(), api: runtime_socket(network).map_err(Failure::usage)? })
    }

    fn is_taken(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.api).is_ok()
    }

    /// For a VM with a network of its own: `default`, or the VM's name where that runs already.
    fn free(vm: &str) -> Result<Self, Failure> {
        let default = Self::of("default")?;
        if !default.is_taken() {
            return Ok(default);
        }
        if vm != "default" && is_network_name(vm) {
            let own = Self::of(vm)?;
            if !own.is_taken() {
                listing::complain(&format!(
                    "the network default runs already: this VM's is called {vm} (portway ports --network {vm})"
                ));
                return Ok(own);
            }
        }
        Err(Failure::usage(format!(
            "{}: a network runs there already, and so does one called {vm}: give this VM another --name, or its network a \
             place by --api unix:PATH; VMs that are all started with --network NAME share one",
            default.api.display()
        )))
    }
}

/// What the network is told as it was told us.
fn network_args(
    config: Option<PathBuf>,
    sockets: &[SocketPair],
    binds: Option<GuestBinds>,
) -> Result<Vec<OsString>, Failure> {
    let mut args: Vec<OsString> = Vec::new();
    if let Some(file) = config {
        let file = std::path::absolute(&file)
            .map_err(|error| Failure::usage(format!("--config {}: {error}", file.display())))?;
        args.extend(["--config".into(), file.into()]);
    }
    for pair in sockets {
        args.extend(["--guest-socket".into(), pair.to_string().into()]);
    }
    if let Some(value) = binds.and_then(|binds| binds.to_possible_value()) {
        args.extend(["--guest-binds".into(), value.get_name().into()]);
    }
    Ok(args)
}

/// A part of a file's name, and a word of a command line.
fn is_network_name(name: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.len() <= NETWORK_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(inner)
}

/// Where a network that VMs share keeps its leases and its log: $XDG_STATE_HOME, else ~/.local/state.
fn network_state(name: &str) -> PathBuf {
    let set = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = set("XDG_STATE_HOME").or_else(|| set("HOME").map(|home| home.join(".local/state")));
    base.unwrap_or_else(std::env::temp_dir).join("portway/networks").join(name)
}

/// A DNS label from a file's name: `images/my_os.v2` is called `my-os-v2`.
fn name_of(image: &Path) -> String {
    let stem = image.file_name().unwrap_or_default().to_string_lossy();
    let label: String = stem
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(63)
        .collect();
    match label.trim_matches('-') {
        "" => "vm".into(),
        label => label.into(),
    }
}

fn state_beside(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push("-state");
    name.into()
}

/// Tells which ports are published: a host port of 0 has its number now. On stderr; stdout is the VM's console.
fn show_ports(api: &Path) {
    match Client::new(api).get::<Vec<PortInfo>>("/v1/ports") {
        Ok(ports) => ports.iter().for_each(|port| listing::complain(&listing::published(port))),
        Err(error) => listing::complain(&format!("the published ports cannot be listed: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_called_by_its_image() {
        assert_eq!(name_of(Path::new("images/My_os.v2")), "my-os-v2");
        assert_eq!(name_of(Path::new("/")), "vm");
    }

    #[test]
    fn the_state_lies_beside_the_image_as_linuxkit_has_it() {
        assert_eq!(state_beside(Path::new("target/guest/demo")), Path::new("target/guest/demo-state"));
    }
}
