//! QEMU's command line, for 7.2 (Debian 12) and newer.
//!
//! The link, QMP, the console's log and virtiofs come as inherited descriptors: no paths, which have length limits and
//! permissions. The console is the serial port: on stdio, where Ctrl-A x ends QEMU as its own `-nographic` has it, or on a
//! socket of the state directory.
//!
//! The devices of a machine, in the order the guest sees them: the disk it boots or its squashfs, then `--disk` in order
//! (virtio-blk, `/dev/vda` …); a CD it boots (AHCI on a PC, which every kernel knows); CDs of metadata (virtio-scsi,
//! `/dev/sr0` …); virtio-net, vsock, virtio-rng, a balloon, virtiofs.

mod probe;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::accel::{self, Host, Kind};
use crate::boot::{Boot, Firmware};
use crate::disk::Format;
use crate::hypervisor::{Control, Hypervisor};
use crate::machine::Machine;
use crate::net::{self, Card};
use crate::qmp::Qmp;
use crate::sidecar::Link;
use crate::state::StateDir;
use crate::{Arch, LaunchConfig, LaunchError, programs, vsock};

/// CPUs that the interrupt controller of QEMU's Arm machine has by default (GICv2); newer ones have 512.
const GIC2_CPUS: u16 = 8;

/// What connects QEMU with the sidecar, with us, and with those who serve it. Descriptors are inherited.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wires {
    /// `None` when the card is no sidecar's.
    pub(crate) link: Option<Link>,
    /// The control channel.
    pub(crate) qmp: Option<RawFd>,
    /// A listening socket on which others may speak QMP.
    pub(crate) monitor: Option<RawFd>,
    /// A listening socket for the console; `None`: stdio.
    pub(crate) console: Option<RawFd>,
    /// Where everything on the console is written too.
    pub(crate) console_log: Option<RawFd>,
    /// Whether stdin is a terminal that it may change and read.
    pub(crate) terminal: bool,
    /// Tag and socket of each share.
    pub(crate) shares: Vec<(String, RawFd)>,
}

/// QEMU, found.
#[derive(Debug)]
pub(crate) struct Qemu {
    program: PathBuf,
    /// Its major version.
    version: u32,
    /// Whether it can filter its own system calls.
    filters: bool,
}

impl Qemu {
    /// Finds QEMU: where it was said to be, else in `PATH`.
    pub(crate) fn find(config: &LaunchConfig) -> Result<Self, LaunchError> {
        let fail = |why: String| LaunchError::NoQemu { why, package: config.arch.package() };
        let program = config.arch.qemu();
        let with_version = |program: PathBuf| {
            probe::version(&program).map(|(version, filters)| Self { program, version, filters })
        };
        match &config.qemu {
            Some(path) => programs::named(path)
                .and_then(with_version)
                .map_err(|why| LaunchError::Setting(format!("--qemu: {why}"))),
            None => programs::in_path(program)
                .ok_or_else(|| format!("no {program} in PATH"))
                .and_then(with_version)
                .map_err(fail),
        }
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn program(&self) -> &Path {
        &self.program
    }

    fn check(&self, config: &LaunchConfig, _: &Boot) -> Result<(), LaunchError> {
        let mut devices = config.devices.iter();
        devices.try_for_each(|device| probe::device(&self.program, device)).map_err(LaunchError::Setting)
    }

    fn accel(&self, config: &LaunchConfig) -> Result<accel::Choice, LaunchError> {
        config.accel.choose(&Host::detect(), config.arch)
    }

    fn net(&self, config: &LaunchConfig, accel: Kind) -> net::Choice {
        config.net.choose(accel == Kind::Kvm, self.version)
    }

    fn arguments(&self, config: &LaunchConfig, machine: &Machine, wires: &Wires) -> Vec<OsString> {
        let mut words = if self.filters { sandbox(config, machine) } else { Vec::new() };
        words.extend(arguments(config, machine, wires));
        words
    }

    fn takes_sockets(&self) -> bool {
        true
    }

    fn control(&self, _: &StateDir) -> io::Result<(Box<dyn Control>, Option<OwnedFd>)> {
        let (ours, qemus) = UnixStream::pair()?;
        Ok((Box::new(Qmp::new(ours)?), Some(qemus.into())))
    }
}

/// A filter for its own system calls (seccomp), as libvirt has it: it starts no program, takes no privilege and leaves its
/// scheduling alone. `--qemu-arg -sandbox` takes its place.
fn sandbox(config: &LaunchConfig, machine: &Machine) -> Vec<OsString> {
    if config.qemu_args.iter().any(|word| word == "-sandbox" || word == "--sandbox") {
        return Vec::new();
    }
    // The helper that connects it with a bridge is a program of root's.
    let may_spawn = matches!(machine.card, Card::Bridge(_));
    let spawn = if may_spawn { "" } else { ",elevateprivileges=deny,spawn=deny" };
    vec!["-sandbox".into(), format!("on,obsolete=deny,resourcecontrol=deny{spawn}").into()]
}

/// The words of a command line.
struct Words(Vec<OsString>);

impl Words {
    fn one(&mut self, word: impl AsRef<OsStr>) {
        self.0.push(word.as_ref().to_owned());
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.one(name);
        self.one(value);
    }
}

/// The arguments of QEMU.
pub(crate) fn arguments(config: &LaunchConfig, machine: &Machine, wires: &Wires) -> Vec<OsString> {
    let mut words = Words(Vec::new());
    // Nothing we did not ask for: no default devices, no configuration of the user's, no window.
    words.one("-nodefaults");
    words.one("-no-user-config");
    words.option("-display", "none");
    words.option("-name", escaped(&config.name));
    // Who serves the card or a share maps the guest's memory: it has to be a file, if one without a name.
    let vsock = vsock::socket(config);
    let shared = machine.card == Card::VhostUser || !wires.shares.is_empty() || vsock.is_some();
    let mut kind = config.arch.machine().to_owned();
    // What the guest has in memory is in no file when QEMU dies.
    kind += ",dump-guest-core=off";
    if shared {
        kind += ",memory-backend=ram";
    }
    if config.arch == Arch::Aarch64 && config.cpus > GIC2_CPUS {
        kind += ",gic-version=max";
    }
    if !matches!(machine.boot, Boot::Kernel { .. }) && config.arch == Arch::X86_64 {
        // The firmware and the boot loader are on the serial console too.
        kind += ",graphics=off";
    }
    words.option("-machine", kind);
    let accel = if machine.accel == Kind::Tcg { "tcg,thread=multi" } else { machine.accel.name() };
    words.option("-accel", accel);
    words.option("-cpu", if machine.accel == Kind::Tcg { "max" } else { "host" });
    words.option("-smp", config.cpus.to_string());
    words.option("-m", format!("{}M", config.mem_mib));
    if shared {
        words.option("-object", format!("memory-backend-memfd,id=ram,size={}M,share=on", config.mem_mib));
    }
    boot(&mut words, config, machine);
    disks(&mut words, config, machine);
    network(&mut words, config, machine, wires.link.as_ref());
    if let Some(path) = &vsock {
        words.option("-chardev", with_path("socket,id=vsock,path=", path, ""));
        // QEMU 7.2 under TCG dies when a guest masks an MSI-X vector of a vhost-user device: without vectors there is none.
        let vectors = if machine.accel == Kind::Tcg { ",vectors=0" } else { "" };
        words.option("-device", format!("vhost-user-vsock-pci,chardev=vsock{vectors}"));
    }
    words.option("-object", "rng-random,id=rng0,filename=/dev/urandom");
    words.option("-device", "virtio-rng-pci,rng=rng0");
    words.option("-device", "virtio-balloon-pci,deflate-on-oom=on");
    for (n, (tag, socket)) in wires.shares.iter().enumerate() {
        words.option("-chardev", format!("socket,id=fs{n},fd={socket}"));
        words.option("-device", format!("vhost-user-fs-pci,chardev=fs{n},tag={tag}"));
    }
    if let Some(path) = &config.ignition {
        words.option("-fw_cfg", with_path("name=opt/com.coreos/config,file=", path, ""));
    }
    for device in &config.devices {
        words.option("-device", device);
    }
    console(&mut words, wires);
    if let Some(fd) = wires.qmp {
        words.option("-chardev", format!("socket,id=qmp,fd={fd}"));
        words.option("-mon", "chardev=qmp,mode=control");
    }
    if let Some(fd) = wires.monitor {
        words.option("-chardev", format!("socket,id=monitor,fd={fd},server=on,wait=off"));
        words.option("-mon", "chardev=monitor,mode=control");
    }
    words.0.extend(config.qemu_args.iter().cloned());
    words.0
}

fn boot(words: &mut Words, config: &LaunchConfig, machine: &Machine) {
    let firmware = match &machine.boot {
        Boot::Kernel { kernel, initrd, cmdline, .. } => {
            words.option("-kernel", kernel);
            if let Some(initrd) = initrd {
                words.option("-initrd", initrd);
            }
            if !cmdline.is_empty() {
                words.option("-append", cmdline);
            }
            return;
        }
        Boot::Cd { firmware, .. } | Boot::Disk { firmware, .. } => firmware,
    };
    match firmware {
        Firmware::Default => {}
        Firmware::Single(path) => words.option("-bios", path),
        Firmware::Flash { code, .. } => {
            words.option("-drive", with_path("if=pflash,unit=0,format=raw,readonly=on,file=", code, ""));
            if let Some(vars) = &machine.vars {
                let forget = if config.disposable { ",snapshot=on" } else { "" };
                words.option("-drive", with_path("if=pflash,unit=1,format=raw,file=", vars, forget));
            }
        }
    }
}

fn disks(words: &mut Words, config: &LaunchConfig, machine: &Machine) {
    let forget = if config.disposable { ",snapshot=on" } else { "" };
    let mut count = 0;
    let mut disk = |words: &mut Words, path: &Path, format: Format, read_only: bool, first: bool| {
        let mode = if read_only { ",readonly=on" } else { forget };
        let drive = format!("if=none,id=disk{count},format={format}{mode},discard=unmap,file=");
        words.option("-drive", with_path(&drive, path, ""));
        let order = if first { ",bootindex=0" } else { "" };
        words.option("-device", format!("virtio-blk-pci,drive=disk{count}{order}"));
        count += 1;
    };
    match &machine.boot {
        Boot::Kernel { root: Some(root), .. } => disk(words, root, Format::Raw, true, false),
        Boot::Disk { disk: path, format, .. } => disk(words, path, *format, false, true),
        Boot::Kernel { .. } | Boot::Cd { .. } => {}
    }
    for d in &machine.disks {
        disk(words, &d.path, d.format, d.read_only, false);
    }
    let boots = match &machine.boot {
        Boot::Cd { iso, .. } => Some(iso),
        _ => None,
    };
    // An Arm machine has no AHCI, and its firmware knows virtio-scsi.
    let on_ahci = config.arch == Arch::X86_64;
    if !machine.cds.is_empty() || (boots.is_some() && !on_ahci) {
        words.option("-device", "virtio-scsi-pci,id=scsi0");
    }
    let drive = |id: &str| format!("if=none,id={id},format=raw,media=cdrom,readonly=on,file=");
    if let Some(iso) = boots {
        words.option("-drive", with_path(&drive("boot"), iso, ""));
        let device = if on_ahci { "ide-cd,bus=ide.0" } else { "scsi-cd,bus=scsi0.0" };
        words.option("-device", format!("{device},drive=boot,bootindex=0"));
    }
    for (n, cd) in machine.cds.iter().enumerate() {
        words.option("-drive", with_path(&drive(&format!("cd{n}")), cd, ""));
        words.option("-device", format!("scsi-cd,bus=scsi0.0,drive=cd{n}"));
    }
}

fn network(words: &mut Words, config: &LaunchConfig, machine: &Machine, link: Option<&Link>) {
    match (&machine.card, link) {
        (Card::Tap(name), _) => {
            words.option("-netdev", format!("tap,id=net0,ifname={name},script=no,downscript=no"));
        }
        (Card::Bridge(name), _) => words.option("-netdev", format!("bridge,id=net0,br={name}")),
        (_, None) => return,
        (_, Some(Link::Inherited(fd))) => {
            words.option("-netdev", format!("stream,id=net0,server=off,addr.type=fd,addr.str={fd}"));
        }
        (Card::VhostUser, Some(Link::Path(path))) => {
            words.option("-chardev", with_path("socket,id=link,path=", path, ""));
            words.option("-netdev", "vhost-user,id=net0,chardev=link");
        }
        (_, Some(Link::Path(path))) => {
            words.option(
                "-netdev",
                with_path("stream,id=net0,server=off,addr.type=unix,addr.path=", path, ""),
            );
        }
    }
    // romfile=: nobody boots from the network here, and the option ROM is a package of its own.
    let mtu =
        if link.is_some() { format!(",host_mtu={}", net::mtu(config, &machine.card)) } else { String::new() };
    words.option("-device", format!("virtio-net-pci,netdev=net0,mac={}{mtu},romfile=", machine.mac));
}

fn console(words: &mut Words, wires: &Wires) {
    // A pipe cannot be truncated or sought in, and QEMU does neither.
    let log = wires.console_log.map_or_else(String::new, |fd| format!(",logfile=/dev/fd/{fd},logappend=on"));
    match wires.console {
        None => {
            words.option("-chardev", format!("stdio,id=console,mux=on,signal=off{log}"));
            words.option("-serial", "chardev:console");
            words.option("-mon", "chardev=console,mode=readline");
        }
        Some(fd) => {
            words.option("-chardev", format!("socket,id=console,fd={fd},server=on,wait=off{log}"));
            words.option("-serial", "chardev:console");
        }
    }
}

/// A path between two pieces of an option's value.
fn with_path(before: &str, path: &Path, after: &str) -> OsString {
    let mut value = OsString::from(before);
    match path.to_str() {
        Some(text) => value.push(escaped(text)),
        // A comma among bytes that are no UTF-8 cannot be written twice without a look at them all.
        None => value.push(path),
    }
    value.push(after);
    value
}

/// A comma in a value is written twice in QEMU's options.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests;
