//! What `portway run` was asked to do.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Accel, Arch, BootImage, Data, DiskSpec, Mac, Net, Share, SharedNetwork};

/// What runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HypervisorKind {
    /// QEMU.
    Qemu,
    /// vfkit, on macOS.
    Vfkit,
}

impl HypervisorKind {
    /// This system's.
    pub const HOST: Self = if cfg!(target_os = "macos") { Self::Vfkit } else { Self::Qemu };
}

/// Where the VM's console is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Console {
    /// On our stdin and stdout.
    #[default]
    Stdio,
    /// On a socket of the state directory, for `portway console`.
    Socket,
}

/// A VM to run with its network. Plain data: the command line makes it, `run` checks it.
#[derive(Debug, Clone)]
pub struct LaunchConfig {
    /// What the VM boots.
    pub image: BootImage,
    /// Whether it boots by UEFI, where its files do not say so.
    pub uefi: bool,
    /// The firmware; `None` looks where distributions put it.
    pub firmware: Option<PathBuf>,
    /// What the guest's instructions are.
    pub arch: Arch,
    /// Virtual CPUs.
    pub cpus: u16,
    /// Memory in MiB.
    pub mem_mib: u32,
    /// KVM, HVF, TCG, or whichever works.
    pub accel: Accel,
    /// Disks, in the order the guest sees them, after the one it boots.
    pub disks: Vec<DiskSpec>,
    /// Whether everything the guest writes to disks is forgotten at the end.
    pub disposable: bool,
    /// LinuxKit's metadata.
    pub data: Option<Data>,
    /// A directory of cloud-init's files (NoCloud).
    pub cloud_init: Option<PathBuf>,
    /// An Ignition configuration.
    pub ignition: Option<PathBuf>,
    /// Directories of the host in the guest.
    pub shares: Vec<Share>,
    /// The program that serves them; `None` looks for it.
    pub virtiofsd: Option<PathBuf>,
    /// Further devices, in QEMU's words.
    pub devices: Vec<OsString>,
    /// Publish specs, handed to the sidecar as they are; it is the one that parses them.
    pub publish: Vec<String>,
    /// How frames reach the sidecar.
    pub net: Net,
    /// The VM's Ethernet address; `None`: the one of the state directory.
    pub mac: Option<Mac>,
    /// The VM's address; `None`: the next free one.
    pub ip: Option<Ipv4Addr>,
    /// The link's MTU in bytes; `None`: what suits the card. The guest learns it from virtio (`host_mtu`) and from DHCP.
    pub mtu: Option<u16>,
    /// Whether the VM has a vsock, where it can have one.
    pub vsock: bool,
    /// Ports of the guest's vsock that have sockets in the state directory.
    pub vsock_ports: Vec<u32>,
    /// Where the VM's Ethernet address, the logs and the sidecar's leases live; made if absent. One VM at a time.
    pub state_dir: PathBuf,
    /// The VM's name: its link's name, and its name in DNS.
    pub name: String,
    /// The control API's socket.
    pub api: PathBuf,
    /// The network it shares with others; `None`: one of its own.
    pub shared: Option<SharedNetwork>,
    /// The program that is the sidecar when called with `serve`; `portway` itself as a rule.
    pub sidecar: PathBuf,
    /// Further arguments of `serve`, such as `--dns-upstream`.
    pub serve_args: Vec<OsString>,
    /// What runs the VM.
    pub hypervisor: HypervisorKind,
    /// The vfkit program; `None` looks for it in `PATH`.
    pub vfkit: Option<PathBuf>,
    /// The QEMU program; `None` looks for the machine's own in `PATH`.
    pub qemu: Option<PathBuf>,
    /// Further arguments of QEMU, after ours.
    pub qemu_args: Vec<OsString>,
    /// Where the console is.
    pub console: Console,
    /// Where running VMs are listed; `None`: this one is not.
    pub registry: Option<PathBuf>,
    /// How long the guest has to power off after SIGTERM or SIGINT before it is killed.
    pub stop_timeout: Duration,
}

impl LaunchConfig {
    /// The default of `stop_timeout`.
    pub const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);

    /// The largest `stop_timeout`: a day.
    pub const LONGEST_STOP_TIMEOUT: Duration = Duration::from_secs(86_400);

    /// A VM with the defaults: one CPU, 1024 MiB (LinuxKit's), nothing published.
    #[must_use]
    pub fn new(image: BootImage, name: String, state_dir: PathBuf, api: PathBuf, sidecar: PathBuf) -> Self {
        Self {
            image,
            uefi: false,
            firmware: None,
            arch: Arch::HOST,
            cpus: 1,
            mem_mib: 1024,
            accel: Accel::Auto,
            disks: Vec::new(),
            disposable: false,
            data: None,
            cloud_init: None,
            ignition: None,
            shares: Vec::new(),
            virtiofsd: None,
            devices: Vec::new(),
            publish: Vec::new(),
            net: Net::Auto,
            mac: None,
            ip: None,
            mtu: None,
            vsock: true,
            vsock_ports: Vec::new(),
            state_dir,
            name,
            api,
            shared: None,
            sidecar,
            serve_args: Vec::new(),
            hypervisor: HypervisorKind::HOST,
            vfkit: None,
            qemu: None,
            qemu_args: Vec::new(),
            console: Console::Stdio,
            registry: None,
            stop_timeout: Self::DEFAULT_STOP_TIMEOUT,
        }
    }
}
