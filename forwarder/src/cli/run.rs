//! `portway run`: the options, made into a [`LaunchConfig`] for `vm-launcher`.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "doc comments of options are help texts, with brackets of their own"
)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use portway_api::control::PortInfo;
use portway_launcher::{Accel, BootImage, LaunchConfig, Net};

use super::{Failure, listing};
use crate::config::{UnixPath, runtime_socket};
use crate::control::client::Client;
use crate::publish::spec::PublishArg;

/// The options of `run`.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// The prefix of IMAGE-kernel, IMAGE-initrd.img and IMAGE-cmdline, as LinuxKit names them
    #[arg(value_name = "IMAGE", required_unless_present = "kernel", conflicts_with = "kernel")]
    image: Option<PathBuf>,
    /// The kernel, when it is not one of IMAGE's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk that goes with --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The command line that goes with --kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "console=ttyS0")]
    cmdline: String,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u16,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    mem: u32,
    /// What runs the guest's instructions
    #[arg(long, value_enum, default_value_t = AccelArg::Auto)]
    accel: AccelArg,
    /// Publish a port of the VM: [BIND:]HOST[-END]:[GUEST_ADDR:]GUEST[-END][/tcp|udp], or `auto[,next-free]` for every port it listens on; repeatable
    #[arg(long, short, value_name = "SPEC")]
    publish: Vec<PublishArg>,
    /// How the VM's network card reaches the network
    #[arg(long, value_enum, default_value_t = NetArg::Auto)]
    net: NetArg,
    /// The largest IP packet on the link
    #[arg(long, value_name = "BYTES", default_value_t = LaunchConfig::DEFAULT_MTU, value_parser = clap::value_parser!(u16).range(576..))]
    mtu: u16,
    /// The VM's name, also in DNS [default: from IMAGE]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The network's name; its control socket is $XDG_RUNTIME_DIR/portway/NAME.sock
    #[arg(long, value_name = "NAME", default_value = "default")]
    network: String,
    /// The network's control socket, when it is to have one of its own
    #[arg(long, value_name = "unix:PATH")]
    api: Option<UnixPath>,
    /// Ask this resolver, IP[:PORT], and not those of the host's resolv.conf; repeatable
    #[arg(long, value_name = "IP[:PORT]")]
    dns_upstream: Vec<String>,
    /// A name of our own, NAME=IP; repeatable
    #[arg(long, value_name = "NAME=IP")]
    dns_host: Vec<String>,
    /// Where the VM's Ethernet address, leases and logs are kept [default: IMAGE-state]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The QEMU to use [default: this machine's in PATH]
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// One more argument for QEMU; repeatable
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<OsString>,
    /// Seconds the guest has to power off after SIGTERM or SIGINT
    #[arg(long, value_name = "SECONDS", default_value_t = LaunchConfig::DEFAULT_STOP_TIMEOUT.as_secs())]
    stop_timeout: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AccelArg {
    /// KVM where it works, else TCG.
    Auto,
    /// The host's virtualization.
    Kvm,
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
}

impl From<NetArg> for Net {
    fn from(arg: NetArg) -> Self {
        match arg {
            NetArg::Auto => Self::Auto,
            NetArg::VhostUser => Self::VhostUser,
            NetArg::Socket => Self::Socket,
        }
    }
}

impl From<AccelArg> for Accel {
    fn from(arg: AccelArg) -> Self {
        match arg {
            AccelArg::Auto => Self::Auto,
            AccelArg::Kvm => Self::Kvm,
            AccelArg::Tcg => Self::Tcg,
        }
    }
}

pub(super) fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let config = config(args)?;
    let api = config.api.clone();
    let ended = portway_launcher::run(&config, || show_ports(&api));
    ended.map(ExitCode::from).map_err(|error| Failure { code: error.exit_code(), line: error.to_string() })
}

fn config(args: RunArgs) -> Result<LaunchConfig, Failure> {
    let api = match args.api {
        Some(UnixPath(path)) => path,
        None => runtime_socket(&args.network).map_err(Failure::usage)?,
    };
    let sidecar = std::env::current_exe().map_err(|error| {
        Failure::failed(format!("cannot find this program to start the network: {error}"))
    })?;
    let (base, image) = match (args.image, args.kernel) {
        (_, Some(kernel)) => {
            let image =
                BootImage::Files { kernel: kernel.clone(), initrd: args.initrd, cmdline: args.cmdline };
            (kernel, image)
        }
        (Some(prefix), None) => (prefix.clone(), BootImage::Prefix(prefix)),
        (None, None) => return Err(Failure::usage("IMAGE is missing (see portway run --help)")),
    };
    let name = args.name.unwrap_or_else(|| name_of(&base));
    let state_dir = args.state_dir.unwrap_or_else(|| state_beside(&base));
    let mut config = LaunchConfig::new(image, name, state_dir, api, sidecar);
    config.cpus = args.cpus;
    config.mem_mib = args.mem;
    config.accel = args.accel.into();
    config.publish = args.publish.iter().map(ToString::to_string).collect();
    config.net = args.net.into();
    config.mtu = args.mtu;
    config.qemu = args.qemu;
    config.qemu_args = args.qemu_arg;
    config.stop_timeout = Duration::from_secs(args.stop_timeout);
    config.serve_args = vec!["--network".into(), args.network.into()];
    for (option, values) in [("--dns-upstream", args.dns_upstream), ("--dns-host", args.dns_host)] {
        config.serve_args.extend(values.into_iter().flat_map(|value| [option.into(), value.into()]));
    }
    Ok(config)
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
