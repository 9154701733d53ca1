//! vfkit: Virtualization.framework of macOS, behind a command line and a REST interface.
//!
//! The link is one end of a pair of datagram sockets (`virtio-net,fd=`), a frame in each datagram; the sidecar has the
//! other as its `dgram` link. Power-down and state go over REST on a socket of the state directory. What
//! Virtualization.framework cannot do is refused before anything starts: BIOS, qcow2, another architecture.
//!
//! The command line, the REST client and the datagrams are the same on Linux, where the tests run a stand-in.

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::accel::{self, Kind};
use crate::boot::{Boot, Firmware};
use crate::config::Console;
use crate::disk::Format;
use crate::hypervisor::{Control, Hypervisor};
use crate::machine::Machine;
use crate::net::{self, Card};
use crate::qemu::Wires;
use crate::sidecar::Link;
use crate::state::StateDir;
use crate::{Accel, Arch, DiskSpec, LaunchConfig, LaunchError, Net, http, programs, state, vsock};

/// The socket of its REST interface in the state directory.
const REST: &str = "vfkit.sock";
/// Bytes of a socket's path on macOS.
const SOCKET_PATH: usize = 103;
/// How often it is asked whether the machine runs, until it does.
const LOOK: Duration = Duration::from_millis(100);

/// vfkit, found.
#[derive(Debug)]
pub(crate) struct Vfkit {
    program: PathBuf,
    rest: PathBuf,
    /// Ports of the guest's vsock, and the sockets on which vfkit listens for them.
    ports: Vec<(u32, PathBuf)>,
}

impl Vfkit {
    /// Finds vfkit: where it was said to be, else in `PATH`.
    pub(crate) fn find(config: &LaunchConfig) -> Result<Self, LaunchError> {
        let program = match &config.vfkit {
            Some(path) => {
                programs::named(path).map_err(|why| LaunchError::Setting(format!("--vfkit: {why}")))?
            }
            None => programs::in_path("vfkit")
                .ok_or_else(|| LaunchError::NoVfkit("no vfkit in PATH".to_owned()))?,
        };
        let state = std::path::absolute(&config.state_dir)
            .map_err(|error| LaunchError::system("the state directory has no absolute path", error))?;
        let ports = config.vsock_ports.iter().map(|port| (*port, state.join(vsock::name(*port)))).collect();
        Ok(Self { program, rest: state.join(REST), ports })
    }
}

impl Hypervisor for Vfkit {
    fn name(&self) -> &'static str {
        "vfkit"
    }

    fn program(&self) -> &Path {
        &self.program
    }

    fn check(&self, config: &LaunchConfig, boot: &Boot) -> Result<(), LaunchError> {
        let refuse = |text: String| Err(LaunchError::Setting(text));
        let qcow2 = |path: &Path| {
            let file = path.display();
            refuse(format!("{file}: vfkit takes raw disks only: qemu-img convert -O raw {file} {file}.raw"))
        };
        match boot {
            Boot::Kernel { kernel, initrd: None, .. } => {
                return refuse(format!(
                    "{}: vfkit boots a kernel only together with an initrd: --initrd",
                    kernel.display()
                ));
            }
            Boot::Disk { disk, format: Format::Qcow2, .. } => return qcow2(disk),
            Boot::Cd { firmware: Firmware::Single(fw), .. }
            | Boot::Disk { firmware: Firmware::Single(fw), .. } => {
                return refuse(format!("--fw {}: vfkit brings its own firmware", fw.display()));
            }
            _ => {}
        }
        let is_qcow2 = |n: usize, disk: &DiskSpec| disk.will_be(n, &config.state_dir) == Some(Format::Qcow2);
        if let Some((_, disk)) = config.disks.iter().enumerate().find(|(n, disk)| is_qcow2(*n, disk)) {
            return qcow2(disk.path.as_deref().unwrap_or(Path::new("--disk format=qcow2")));
        }
        let refused = [
            ("--disposable", config.disposable, "copy the disk first (cp -c costs nothing on APFS)"),
            ("--qemu-arg", !config.qemu_args.is_empty(), "that is an argument of QEMU"),
            ("--arch", config.arch != Arch::HOST, "it runs guests of this machine's architecture only"),
            (
                "--accel",
                matches!(config.accel, Accel::Kvm | Accel::Tcg),
                "it has Virtualization.framework only",
            ),
            ("--net", !matches!(config.net, Net::Auto | Net::None), "its network card speaks datagrams"),
            (
                "--mtu",
                config.mtu.is_some_and(|mtu| mtu > net::DATAGRAM_MTU),
                "its network card takes 1500 at most",
            ),
        ];
        if let Some((option, _, why)) = refused.iter().find(|(_, asked, _)| *asked) {
            return refuse(format!("{option} cannot be had with vfkit: {why}"));
        }
        let sockets = std::iter::once(&self.rest).chain(self.ports.iter().map(|(_, path)| path));
        if let Some(long) = sockets.into_iter().find(|path| path.as_os_str().len() > SOCKET_PATH) {
            return refuse(format!(
                "--state-dir {}: too long for vfkit's sockets in it: {} has more than {SOCKET_PATH} bytes",
                config.state_dir.display(),
                long.display()
            ));
        }
        let twice = |n: usize, port: u32| self.ports.iter().take(n).any(|(other, _)| *other == port);
        match self.ports.iter().enumerate().find(|(n, (port, _))| twice(*n, *port)) {
            Some((_, (port, _))) => refuse(format!("--vsock-ports: port {port} is given twice")),
            None => Ok(()),
        }
    }

    fn accel(&self, _: &LaunchConfig) -> Result<accel::Choice, LaunchError> {
        Ok(accel::Choice { kind: Kind::Hvf, reason: "vfkit is Virtualization.framework".into() })
    }

    fn net(&self, config: &LaunchConfig, _: Kind) -> net::Choice {
        let (card, reason) = match config.net {
            Net::None => (Card::None, "as asked"),
            _ => (Card::Datagrams, "what Virtualization.framework speaks"),
        };
        net::Choice { card, reason: reason.into() }
    }

    fn serves_shares(&self) -> bool {
        true
    }

    fn reads_the_terminal(&self) -> bool {
        true
    }

    fn arguments(&self, config: &LaunchConfig, machine: &Machine, wires: &Wires) -> Vec<OsString> {
        arguments(config, machine, wires, self)
    }

    fn control(&self, _: &StateDir) -> io::Result<(Box<dyn Control>, Option<OwnedFd>)> {
        let next = Some(Instant::now() + LOOK);
        Ok((Box::new(Rest { socket: self.rest.clone(), running: false, next }), None))
    }

    fn leaves(&self, _: &StateDir) -> Vec<PathBuf> {
        std::iter::once(&self.rest).chain(self.ports.iter().map(|(_, path)| path)).cloned().collect()
    }
}

fn arguments(config: &LaunchConfig, machine: &Machine, wires: &Wires, vfkit: &Vfkit) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |name: &str, value: OsString| words.extend([name.into(), value]);
    add("--cpus", config.cpus.to_string().into());
    add("--memory", config.mem_mib.to_string().into());
    let with_path = |before: &str, path: &Path, after: &str| {
        let mut value = OsString::from(before);
        value.push(path);
        value.push(after);
        value
    };
    let mut blocks: Vec<OsString> = Vec::new();
    match &machine.boot {
        Boot::Kernel { kernel, initrd, cmdline, root } => {
            let mut loader = with_path("linux,kernel=", kernel, "");
            if let Some(initrd) = initrd {
                loader.push(with_path(",initrd=", initrd, ""));
            }
            // The console is virtio's, which the kernel has to be told.
            let console = if cmdline.contains("console=hvc0") { "" } else { " console=hvc0" };
            loader.push(format!(",cmdline=\"{}{console}\"", cmdline.replace('"', "\\\"")));
            add("--bootloader", loader);
            blocks.extend(root.as_ref().map(|root| with_path("virtio-blk,path=", root, ",readonly")));
        }
        Boot::Cd { iso, .. } => {
            let vars = config.state_dir.join("efi-variable-store");
            add("--bootloader", with_path("efi,variable-store=", &vars, ",create"));
            blocks.push(with_path("usb-mass-storage,path=", iso, ",readonly"));
        }
        Boot::Disk { disk, .. } => {
            let vars = config.state_dir.join("efi-variable-store");
            add("--bootloader", with_path("efi,variable-store=", &vars, ",create"));
            blocks.push(with_path("virtio-blk,path=", disk, ""));
        }
    }
    for disk in &machine.disks {
        blocks.push(with_path("virtio-blk,path=", &disk.path, ""));
    }
    for cd in &machine.cds {
        blocks.push(with_path("usb-mass-storage,path=", cd, ",readonly"));
    }
    blocks.into_iter().for_each(|block| add("--device", block));
    if let Some(Link::Inherited(fd)) = &wires.link {
        add("--device", format!("virtio-net,fd={fd},mac={}", machine.mac).into());
    } else if let Some(Link::Path(path)) = &wires.link {
        add("--device", with_path("virtio-net,unixSocketPath=", path, &format!(",mac={}", machine.mac)));
    }
    for (port, path) in &vfkit.ports {
        // `connect`: whoever connects to the socket is connected with the guest's port.
        add("--device", with_path(&format!("virtio-vsock,port={port},socketURL="), path, ",connect"));
    }
    for (n, share) in config.shares.iter().enumerate() {
        add(
            "--device",
            with_path("virtio-fs,sharedDir=", &share.dir, &format!(",mountTag={}", share.tag(n))),
        );
    }
    add("--device", "virtio-rng".into());
    add("--device", "virtio-balloon".into());
    let console = match config.console {
        // It makes stdin raw, and does not start where that is no terminal.
        Console::Stdio if wires.terminal => "virtio-serial,stdio".into(),
        Console::Stdio | Console::Socket => {
            with_path("virtio-serial,logFilePath=", &config.state_dir.join(state::CONSOLE_LOG), "")
        }
    };
    add("--device", console);
    if let Some(path) = &config.ignition {
        add("--ignition", path.into());
    }
    for device in &config.devices {
        add("--device", device.clone());
    }
    add("--restful-uri", with_path("unix://", &vfkit.rest, ""));
    words
}

/// vfkit's REST interface.
#[derive(Debug)]
struct Rest {
    socket: PathBuf,
    running: bool,
    next: Option<Instant>,
}

impl Control for Rest {
    fn power_down(&mut self) -> io::Result<()> {
        http::ask(&self.socket, "POST", "/vm/state", Some(&json!({ "state": "Stop" }))).map(drop)
    }

    fn look(&mut self) {
        if self.running || self.next.is_some_and(|at| at > Instant::now()) {
            return;
        }
        // Until it listens there is nobody to ask.
        let state = http::ask(&self.socket, "GET", "/vm/state", None).unwrap_or(Value::Null);
        self.running = state.get("state").is_some_and(|state| state == "VirtualMachineStateRunning");
        self.next = (!self.running).then(|| Instant::now() + LOOK);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn look_at(&self) -> Option<Instant> {
        self.next
    }

    fn is_running(&self) -> bool {
        self.running
    }

    fn shutdown_reason(&self) -> Option<&str> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BootImage;
    use crate::disk::Disk;

    fn config() -> LaunchConfig {
        let image = BootImage::Prefix("/i/demo".into());
        let mut config = LaunchConfig::new(image, "demo".into(), "/s".into(), "/a".into(), "/p".into());
        config.mem_mib = 512;
        config
    }

    fn machine(boot: Boot) -> Machine {
        Machine {
            boot,
            disks: Vec::new(),
            cds: Vec::new(),
            vars: None,
            accel: Kind::Hvf,
            card: Card::Datagrams,
            mac: "52:00:00:00:00:07".parse().expect("a MAC"),
        }
    }

    fn kernel() -> Boot {
        Boot::Kernel {
            kernel: "/i/demo-kernel".into(),
            initrd: Some("/i/demo-initrd.img".into()),
            cmdline: "quiet".into(),
            root: None,
        }
    }

    fn line(config: &LaunchConfig, machine: &Machine) -> String {
        let wires = Wires { link: Some(Link::Inherited(5)), terminal: true, ..Wires::default() };
        let words = arguments(config, machine, &wires, &vfkit());
        words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join("\n")
    }

    fn vfkit() -> Vfkit {
        Vfkit {
            program: "/v".into(),
            rest: "/s/vfkit.sock".into(),
            ports: vec![(2374, "/s/guest.00000946".into())],
        }
    }

    #[test]
    fn the_whole_command_line_of_a_kernel() {
        let expected = "--cpus\n1\n--memory\n512\n\
            --bootloader\nlinux,kernel=/i/demo-kernel,initrd=/i/demo-initrd.img,cmdline=\"quiet console=hvc0\"\n\
            --device\nvirtio-net,fd=5,mac=52:00:00:00:00:07\n\
            --device\nvirtio-vsock,port=2374,socketURL=/s/guest.00000946,connect\n--device\nvirtio-rng\n--device\nvirtio-balloon\n\
            --device\nvirtio-serial,stdio\n--restful-uri\nunix:///s/vfkit.sock";
        assert_eq!(line(&config(), &machine(kernel())), expected);
    }

    #[test]
    fn a_console_that_is_no_terminal_is_a_file() {
        let words = arguments(&config(), &machine(kernel()), &Wires::default(), &vfkit());
        let word = |text: &str| words.iter().any(|word| word.to_string_lossy() == text);
        assert!(
            word("virtio-serial,logFilePath=/s/console.log") && !word("virtio-serial,stdio"),
            "{words:?}"
        );
    }

    #[test]
    fn the_whole_command_line_of_a_disk_with_everything() {
        let mut config = config();
        config.console = Console::Socket;
        config.shares = vec!["/srv,tag=code".parse().expect("a share")];
        config.ignition = Some("/c.ign".into());
        config.devices = vec!["virtio-gpu".into()];
        let boot = Boot::Disk { disk: "/i/os.raw".into(), format: Format::Raw, firmware: Firmware::Default };
        let mut machine = machine(boot);
        machine.disks = vec![Disk { path: "/d".into(), format: Format::Raw, read_only: false }];
        machine.cds = vec!["/s/data.iso".into()];
        let expected = "--cpus\n1\n--memory\n512\n--bootloader\nefi,variable-store=/s/efi-variable-store,create\n\
            --device\nvirtio-blk,path=/i/os.raw\n--device\nvirtio-blk,path=/d\n\
            --device\nusb-mass-storage,path=/s/data.iso,readonly\n\
            --device\nvirtio-net,fd=5,mac=52:00:00:00:00:07\n\
            --device\nvirtio-vsock,port=2374,socketURL=/s/guest.00000946,connect\n--device\nvirtio-fs,sharedDir=/srv,mountTag=code\n\
            --device\nvirtio-rng\n--device\nvirtio-balloon\n\
            --device\nvirtio-serial,logFilePath=/s/console.log\n--ignition\n/c.ign\n--device\nvirtio-gpu\n\
            --restful-uri\nunix:///s/vfkit.sock";
        assert_eq!(line(&config, &machine), expected);
    }

    #[test]
    fn what_virtualization_framework_cannot_do_is_refused_with_the_option() {
        let refused = |change: fn(&mut LaunchConfig), boot: &Boot| {
            let mut config = config();
            change(&mut config);
            vfkit().check(&config, boot).expect_err("it cannot").to_string()
        };
        vfkit().check(&config(), &kernel()).expect("it can");
        assert!(refused(|c| c.disposable = true, &kernel()).contains("--disposable"));
        assert!(refused(|c| c.qemu_args = vec!["-s".into()], &kernel()).contains("--qemu-arg"));
        assert!(refused(|c| c.accel = Accel::Tcg, &kernel()).contains("--accel"));
        assert!(refused(|c| c.net = Net::VhostUser, &kernel()).contains("--net"));
        assert!(refused(|c| c.mtu = Some(9000), &kernel()).contains("--mtu"));
        let qcow2 = |c: &mut LaunchConfig| c.disks = vec!["/n/d.qcow2,size=1G".parse().expect("a disk")];
        assert!(refused(qcow2, &kernel()).contains("convert -O raw /n/d.qcow2"));
        let alone = Boot::Kernel { kernel: "/k".into(), initrd: None, cmdline: String::new(), root: None };
        assert!(refused(|_| {}, &alone).contains("--initrd"));
        let boot = Boot::Disk { disk: "/d".into(), format: Format::Qcow2, firmware: Firmware::Default };
        assert!(refused(|_| {}, &boot).contains("convert -O raw"));
        let far = Vfkit { rest: PathBuf::from("/".repeat(200)), ..vfkit() };
        assert!(far.check(&config(), &kernel()).expect_err("too long").to_string().contains("--state-dir"));
    }
}
