//! QEMU's command lines, word for word.

use super::*;
use crate::BootImage;
use crate::disk::Disk;

fn config() -> LaunchConfig {
    let image = BootImage::Prefix("/images/demo".into());
    let mut config = LaunchConfig::new(image, "demo".into(), "/s".into(), "/a".into(), "/p".into());
    config.arch = Arch::X86_64;
    config.cpus = 2;
    config.mem_mib = 512;
    config.vsock = false;
    config
}

fn machine() -> Machine {
    Machine {
        boot: Boot::Kernel {
            kernel: "/images/demo-kernel".into(),
            initrd: Some("/images/demo-initrd.img".into()),
            cmdline: "console=ttyS0 quiet".into(),
            root: None,
        },
        disks: Vec::new(),
        cds: Vec::new(),
        vars: None,
        accel: Kind::Tcg,
        card: Card::Socket,
        mac: "52:00:00:00:00:07".parse().expect("a MAC"),
    }
}

fn disk(path: &str, format: Format) -> Disk {
    Disk { path: path.into(), format, read_only: false }
}

fn wires() -> Wires {
    Wires { link: Some(Link::Inherited(5)), qmp: Some(7), ..Wires::default() }
}

fn line(config: &LaunchConfig, machine: &Machine, wires: &Wires) -> String {
    let words = arguments(config, machine, wires);
    words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join("\n")
}

fn has(line: &str, words: &[&str]) {
    let words = words.join("\n");
    assert!(line.contains(&words), "{words}\nis not in\n{line}");
}

#[test]
fn the_whole_command_line_under_tcg() {
    let expected = "-nodefaults\n-no-user-config\n-display\nnone\n-name\ndemo\n-machine\nq35,dump-guest-core=off\n\
        -accel\ntcg,thread=multi\n-cpu\nmax\n-smp\n2\n-m\n512M\n\
        -kernel\n/images/demo-kernel\n-initrd\n/images/demo-initrd.img\n-append\nconsole=ttyS0 quiet\n\
        -netdev\nstream,id=net0,server=off,addr.type=fd,addr.str=5\n\
        -device\nvirtio-net-pci,netdev=net0,mac=52:00:00:00:00:07,host_mtu=65520,romfile=\n\
        -object\nrng-random,id=rng0,filename=/dev/urandom\n-device\nvirtio-rng-pci,rng=rng0\n\
        -device\nvirtio-balloon-pci,deflate-on-oom=on\n\
        -chardev\nstdio,id=console,mux=on,signal=off\n\
        -serial\nchardev:console\n-mon\nchardev=console,mode=readline\n\
        -chardev\nsocket,id=qmp,fd=7\n-mon\nchardev=qmp,mode=control";
    assert_eq!(line(&config(), &machine(), &wires()), expected);
}

#[test]
fn vhost_user_shares_the_guests_memory() {
    let machine = Machine { card: Card::VhostUser, accel: Kind::Kvm, ..machine() };
    let wires = Wires { link: Some(Link::Path("/run/a,b".into())), ..wires() };
    let line = line(&config(), &machine, &wires);
    has(&line, &["-machine", "q35,dump-guest-core=off,memory-backend=ram"]);
    has(&line, &["-object", "memory-backend-memfd,id=ram,size=512M,share=on"]);
    has(&line, &["-chardev", "socket,id=link,path=/run/a,,b", "-netdev", "vhost-user,id=net0,chardev=link"]);
    has(&line, &["-accel", "kvm", "-cpu", "host"]);
}

#[test]
#[cfg(target_os = "linux")]
fn vsock_is_a_device_of_the_sidecars_and_shares_the_guests_memory() {
    let mut config = config();
    config.vsock = true;
    config.api = "/run/a,b".into();
    let tcg = line(&config, &machine(), &wires());
    has(&tcg, &["-machine", "q35,dump-guest-core=off,memory-backend=ram"]);
    has(&tcg, &["-object", "memory-backend-memfd,id=ram,size=512M,share=on"]);
    has(&tcg, &["-chardev", "socket,id=vsock,path=/run/a,,b-demo-vsock"]);
    has(&tcg, &["-device", "vhost-user-vsock-pci,chardev=vsock,vectors=0"]);
    let kvm = line(&config, &Machine { accel: Kind::Kvm, ..machine() }, &wires());
    has(&kvm, &["-device", "vhost-user-vsock-pci,chardev=vsock", "-object"]);
}

#[test]
fn a_shared_network_is_reached_by_path() {
    let wires = Wires { link: Some(Link::Path("/run/vm".into())), ..wires() };
    has(
        &line(&config(), &machine(), &wires),
        &["-netdev", "stream,id=net0,server=off,addr.type=unix,addr.path=/run/vm"],
    );
}

#[test]
fn a_squashfs_is_the_first_disk_and_cannot_be_written() {
    let mut machine = machine();
    let Boot::Kernel { root, .. } = &mut machine.boot else { panic!("a kernel") };
    *root = Some("/i/s".into());
    machine.disks = vec![disk("/d", Format::Qcow2)];
    let line = line(&config(), &machine, &wires());
    has(&line, &["-drive", "if=none,id=disk0,format=raw,readonly=on,discard=unmap,file=/i/s"]);
    has(&line, &["-device", "virtio-blk-pci,drive=disk0"]);
    has(&line, &["-drive", "if=none,id=disk1,format=qcow2,discard=unmap,file=/d"]);
}

#[test]
fn a_cd_boots_by_the_machines_own_bios_from_ahci() {
    let boot = Boot::Cd { iso: "/i/os.iso".into(), firmware: Firmware::Default };
    let line = line(&config(), &Machine { boot, ..machine() }, &wires());
    has(&line, &["-machine", "q35,dump-guest-core=off,graphics=off"]);
    has(&line, &["-drive", "if=none,id=boot,format=raw,media=cdrom,readonly=on,file=/i/os.iso"]);
    has(&line, &["-device", "ide-cd,bus=ide.0,drive=boot,bootindex=0"]);
    assert!(!line.contains("-bios") && !line.contains("-kernel"), "{line}");
}

#[test]
fn uefi_has_its_code_in_common_and_variables_of_its_own() {
    let firmware = Firmware::Flash { code: "/f/CODE.fd".into(), vars: "/f/VARS.fd".into() };
    let boot = Boot::Disk { disk: "/i/os.qcow2".into(), format: Format::Qcow2, firmware };
    let machine = Machine { boot, vars: Some("/s/efi-vars.fd".into()), ..machine() };
    let line = line(&config(), &machine, &wires());
    has(&line, &["-drive", "if=pflash,unit=0,format=raw,readonly=on,file=/f/CODE.fd"]);
    has(&line, &["-drive", "if=pflash,unit=1,format=raw,file=/s/efi-vars.fd"]);
    has(&line, &["-device", "virtio-blk-pci,drive=disk0,bootindex=0"]);
}

#[test]
fn a_disposable_vm_forgets_every_disk() {
    let firmware = Firmware::Flash { code: "/f/CODE.fd".into(), vars: "/f/VARS.fd".into() };
    let boot = Boot::Disk { disk: "/i/os".into(), format: Format::Raw, firmware };
    let vars = Some("/s/efi-vars.fd".into());
    let machine = Machine { boot, vars, disks: vec![disk("/d", Format::Raw)], ..machine() };
    let mut config = config();
    config.disposable = true;
    let line = line(&config, &machine, &wires());
    assert_eq!(line.matches("snapshot=on").count(), 3, "{line}");
}

#[test]
fn metadata_is_a_cd_on_scsi_and_ignition_is_in_the_firmwares_configuration() {
    let mut config = config();
    config.ignition = Some("/c,d.ign".into());
    let machine = Machine { cds: vec!["/s/data.iso".into()], ..machine() };
    let line = line(&config, &machine, &wires());
    has(&line, &["-device", "virtio-scsi-pci,id=scsi0"]);
    has(&line, &["-device", "scsi-cd,bus=scsi0.0,drive=cd0"]);
    has(&line, &["-fw_cfg", "name=opt/com.coreos/config,file=/c,,d.ign"]);
}

#[test]
fn a_share_is_a_device_and_shares_the_guests_memory() {
    let wires = Wires { shares: vec![("code".into(), 9)], ..wires() };
    let line = line(&config(), &machine(), &wires);
    has(&line, &["-machine", "q35,dump-guest-core=off,memory-backend=ram"]);
    has(&line, &["-chardev", "socket,id=fs0,fd=9", "-device", "vhost-user-fs-pci,chardev=fs0,tag=code"]);
}

#[test]
fn networks_of_the_hosts_own_have_no_sidecar() {
    let wires = Wires { link: None, ..wires() };
    let card = |card| line(&config(), &Machine { card, ..machine() }, &wires);
    has(&card(Card::Tap("tap0".into())), &["-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no"]);
    has(&card(Card::Bridge("br0".into())), &["-netdev", "bridge,id=net0,br=br0"]);
    assert!(!card(Card::None).contains("net0"));
}

#[test]
fn an_arm_machine_has_its_own_names() {
    let mut config = config();
    config.arch = Arch::Aarch64;
    let boot = Boot::Cd { iso: "/i".into(), firmware: Firmware::Single("/f".into()) };
    let line = line(&config, &Machine { boot, ..machine() }, &wires());
    has(&line, &["-machine", "virt,dump-guest-core=off", "-accel", "tcg,thread=multi"]);
    has(&line, &["-bios", "/f"]);
    has(&line, &["-device", "scsi-cd,bus=scsi0.0,drive=boot,bootindex=0"]);
}

#[test]
fn a_console_on_a_socket_and_its_log() {
    let wires = Wires { console: Some(11), console_log: Some(12), monitor: Some(13), ..wires() };
    let line = line(&config(), &machine(), &wires);
    has(&line, &["-chardev", "socket,id=console,fd=11,server=on,wait=off,logfile=/dev/fd/12,logappend=on"]);
    has(
        &line,
        &["-chardev", "socket,id=monitor,fd=13,server=on,wait=off", "-mon", "chardev=monitor,mode=control"],
    );
    assert!(!line.contains("stdio"), "{line}");
}

#[test]
fn what_is_absent_has_no_option_and_the_users_arguments_come_last() {
    let mut config = config();
    config.qemu_args = vec!["-snapshot".into()];
    config.devices = vec!["edu".into()];
    config.name = "a,b".into();
    let boot = Boot::Kernel { kernel: "/k".into(), initrd: None, cmdline: String::new(), root: None };
    let line = line(&config, &Machine { boot, ..machine() }, &wires());
    assert!(!line.contains("-initrd") && !line.contains("-append"), "{line}");
    assert!(line.contains("-name\na,,b\n") && line.ends_with("\n-snapshot"), "{line}");
    has(&line, &["-device", "edu"]);
}

#[test]
fn a_missing_qemu_says_which_setting_named_it_or_what_to_install() {
    let mut config = config();
    config.qemu = Some("/nonexistent/qemu".into());
    let error = Qemu::find(&config).expect_err("it is not there").to_string();
    assert!(error.starts_with("--qemu: /nonexistent/qemu: "), "{error}");
    for (arch, package) in [(Arch::X86_64, "qemu-system-x86"), (Arch::Aarch64, "qemu-system-arm")] {
        let error =
            LaunchError::NoQemu { why: "no qemu in PATH".into(), package: arch.package() }.to_string();
        assert!(error.contains(&format!("apt-get install {package}")), "{error}");
    }
}

#[test]
fn its_own_system_calls_are_filtered_but_for_a_bridges_helper_and_where_somebody_else_decides() {
    let qemu = Qemu { program: "/q".into(), version: 7, filters: true };
    let first = |config: &LaunchConfig, machine: &Machine| {
        let words = qemu.arguments(config, machine, &wires());
        words.iter().take(2).map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    };
    let denied = "-sandbox on,obsolete=deny,resourcecontrol=deny,elevateprivileges=deny,spawn=deny";
    assert_eq!(first(&config(), &machine()), denied);
    let bridged = Machine { card: Card::Bridge("br0".into()), ..machine() };
    assert_eq!(first(&config(), &bridged), "-sandbox on,obsolete=deny,resourcecontrol=deny");
    let mut own = config();
    own.qemu_args = vec!["-sandbox".into(), "off".into()];
    assert!(!first(&own, &machine()).contains("-sandbox"));
    let without = Qemu { filters: false, ..qemu };
    assert!(!without.arguments(&config(), &machine(), &wires()).contains(&"-sandbox".into()));
}
