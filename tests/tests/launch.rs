//! `portway run` with real guests: what boots, and its devices.
//!
//! Needs QEMU, OVMF, and the tools of `tests/guest/media.sh` (`tests/setup.sh`); without QEMU the tests are skipped, with a
//! line that says so.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portway_tests::launch::{cli, has_qemu, path, said, sockets};
use portway_tests::sidecar::until;
use portway_tests::vm::{Vm, guest_image, media, portway};

/// What a clean power-down may take.
const POWER_DOWN: Duration = Duration::from_secs(10);

/// Ends the VM by SIGTERM; it powers off in time.
fn powers_down(vm: Vm) -> Result<()> {
    let start = Instant::now();
    let (status, console) = vm.stop()?;
    ensure!(status.success(), "portway run ended with {status}:\n{console}");
    ensure!(console.contains("the VM ended (guest-shutdown)"), "no clean power-down:\n{console}");
    ensure!(start.elapsed() < POWER_DOWN, "powering down took {:?}", start.elapsed());
    Ok(())
}

/// Boots, asks the guest one thing, powers it down.
fn boots(arguments: &[&str], question: &str, answer: &str) -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Vm::boot_image(dir.path(), arguments)?;
    let said = vm.guest(question)?;
    ensure!(said.contains(answer), "{question}: {said}");
    powers_down(vm)
}

#[test]
fn metadata_disks_and_shares_are_found_in_the_guest_and_a_disk_is_kept_or_forgotten() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| path(dir.path(), name);
    fs::write(at("data"), "{\"hello\": {\"content\": \"from the host\"}}")?;
    fs::create_dir(at("ci"))?;
    fs::write(at("ci/user-data"), "#cloud-config\n")?;
    fs::create_dir(at("share"))?;
    fs::write(at("share/hello"), "shared")?;
    let ignition = r#"{"ignition":{"version":"3.4.0"}}"#;
    fs::write(at("config.ign"), ignition)?;
    let disk = format!("{},size=8M", at("disk.raw"));
    let share = format!("{},tag=code", at("share"));
    let (data, ci, ign) = (at("data"), at("ci"), at("config.ign"));
    let options = ["--disk", &disk, "--data-file", &data, "--cloud-init", &ci, "--ignition", &ign];
    let vm = Vm::boot(dir.path(), &[&options[..], &["--virtiofs", &share]].concat())?;

    let read = |vm: &Vm, command: &str| vm.guest(&format!("mkdir -p /tmp/m && {command}"));
    let config = read(&vm, "mount -t iso9660 -o ro /dev/sr0 /tmp/m && cat /tmp/m/config && umount /tmp/m")?;
    ensure!(config.contains("from the host"), "--data-file: {config}");
    let seed = read(
        &vm,
        "mount -t iso9660 -o ro /dev/sr1 /tmp/m && cat /tmp/m/user-data /tmp/m/meta-data && umount /tmp/m",
    )?;
    ensure!(seed == "#cloud-config\ninstance-id: demo\nlocal-hostname: demo\n", "--cloud-init: {seed}");
    let label = vm.guest("dd if=/dev/sr1 bs=1 skip=32808 count=6 2> /dev/null")?;
    ensure!(label == "cidata", "--cloud-init: {label}");
    let got = vm.guest("cat /sys/firmware/qemu_fw_cfg/by_name/opt/com.coreos/config/raw")?;
    ensure!(got == ignition, "--ignition: {got}");
    let got = read(
        &vm,
        "mount -t virtiofs code /tmp/m && cat /tmp/m/hello && echo back > /tmp/m/answer && umount /tmp/m",
    )?;
    ensure!(got == "shared" && fs::read_to_string(at("share/answer"))? == "back\n", "--virtiofs: {got}");
    vm.guest("echo kept | dd of=/dev/vda conv=notrunc 2> /dev/null && sync")?;
    let mac = vm.guest("cat /sys/class/net/eth0/address")?;
    powers_down(vm)?;
    let on_disk = || -> Result<String> { Ok(String::from_utf8(fs::read(at("disk.raw"))?[..5].to_vec())?) };
    ensure!(on_disk()? == "kept\n" && fs::metadata(at("disk.raw"))?.len() == 8 << 20);

    let vm = Vm::boot(dir.path(), &["--disk", &at("disk.raw"), "--disposable"])?;
    ensure!(vm.guest("dd if=/dev/vda bs=5 count=1 2> /dev/null")? == "kept\n", "the disk was not kept");
    ensure!(vm.guest("cat /sys/class/net/eth0/address")? == mac, "another Ethernet address");
    let own = vm.guest(
        "echo gone | dd of=/dev/vda conv=notrunc 2> /dev/null && sync && dd if=/dev/vda bs=5 count=1",
    )?;
    ensure!(own == "gone\n", "the guest does not see its own writing: {own}");
    powers_down(vm)?;
    ensure!(on_disk()? == "kept\n", "--disposable has written");
    ensure!(!dir.path().join("state/tmp").exists(), "what was forgotten is still there");
    Ok(())
}

#[test]
fn a_squashfs_boots_as_the_root_on_the_first_disk() -> Result<()> {
    let media = media()?;
    let (image, stage) = (path(&media, "squash"), path(&media, "squash-stage1.img"));
    boots(&["--squashfs", "--initrd", &stage, &image], "mount", "/dev/vda on / type squashfs (ro")
}

#[test]
fn an_iso_boots_by_bios() -> Result<()> {
    let iso = path(&media()?, "os.iso");
    boots(&["--iso", &iso], "ls -d /sys/firmware/efi || echo bios", "bios")
}

#[test]
fn an_iso_boots_by_uefi() -> Result<()> {
    let iso = path(&media()?, "os.iso");
    boots(&["--iso", "--uefi", &iso], "ls -d /sys/firmware/efi", "/sys/firmware/efi")
}

#[test]
fn a_disk_with_an_efi_partition_boots_by_uefi_without_being_asked() -> Result<()> {
    let disk = path(&media()?, "efi.img");
    boots(&["--disposable", &disk], "ls -d /sys/firmware/efi /dev/vda1", "/sys/firmware/efi")
}

#[test]
fn a_qcow2_disk_of_a_prefix_boots_by_bios() -> Result<()> {
    let prefix = path(&media()?, "disk");
    boots(&["--disposable", &prefix], "ls /dev/vda", "/dev/vda")
}

/// LinuxKit's first example, word for word, in a directory with what `linuxkit build sshd` makes.
#[test]
fn linuxkits_sshd_is_reached_on_the_port_that_was_published() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let guest = guest_image()?;
    for suffix in ["kernel", "initrd.img", "cmdline"] {
        let built = fs::canonicalize(format!("{}-{suffix}", guest.display()))?;
        std::os::unix::fs::symlink(built, dir.path().join(format!("sshd-{suffix}")))?;
    }
    let port = match TcpListener::bind((Ipv4Addr::LOCALHOST, 2222)) {
        Ok(_) => 2222,
        // Somebody has it: another then.
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port(),
    };
    let log = fs::File::create(dir.path().join("log"))?;
    let mut launcher = Command::new(fs::canonicalize(portway()?)?)
        .args(["run", "-publish", &format!("{port}:22/tcp"), "sshd"])
        .current_dir(dir.path())
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let keys = guest.parent().context("a directory")?;
    let ssh = || {
        let out = Command::new("ssh")
            .args([
                "-n",
                "-o",
                "BatchMode=yes",
                "-o",
                "IdentitiesOnly=yes",
                "-o",
                "HostKeyAlias=portway-guest",
            ])
            .args(["-o", "ConnectTimeout=5", "-p", &port.to_string(), "-i"])
            .arg(keys.join("id_ed25519"))
            .args(["-o", &format!("UserKnownHostsFile={}", keys.join("known_hosts").display())])
            .args(["root@localhost", "cat /proc/cmdline"])
            .output();
        out.is_ok_and(|out| out.status.success() && said(&out).contains("console=ttyS0"))
    };
    let reached = until(Duration::from_secs(120), ssh);
    kill(Pid::from_raw(i32::try_from(launcher.id())?), Signal::SIGTERM)?;
    let start = Instant::now();
    let status = launcher.wait()?;
    let console = || fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    reached.with_context(console)?;
    ensure!(
        status.success() && start.elapsed() < POWER_DOWN,
        "{status} after {:?}:\n{}",
        start.elapsed(),
        console()
    );
    // The state is where LinuxKit has it.
    ensure!(dir.path().join("sshd-state/mac").exists(), "no sshd-state");
    Ok(())
}

#[test]
fn the_vfkit_back_end_boots_a_guest_over_datagrams_and_stops_it_over_rest() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vfkit = path(Path::new(env!("CARGO_MANIFEST_DIR")), "guest/vfkit");
    let disk = format!("{},size=1M", path(dir.path(), "disk.raw"));
    let vm = Vm::boot(dir.path(), &["--vfkit", &vfkit, "--disk", &disk])?;
    let said = vm.guest("cat /sys/class/net/eth0/mtu; ls /dev/vda; wget -qO- http://127.0.0.1/ > /dev/null && nslookup gateway.portway.internal")?;
    ensure!(said.starts_with("1500\n/dev/vda\n") && said.contains("192.168.127.1"), "{said}");
    ensure!(vm.console().contains("network card: datagrams"), "{}", vm.console());
    let start = Instant::now();
    let (status, console) = vm.stop()?;
    ensure!(
        status.success() && start.elapsed() < POWER_DOWN,
        "{status} after {:?}:\n{console}",
        start.elapsed()
    );
    ensure!(console.contains("reboot: Power down"), "{console}");
    ensure!(sockets(dir.path())?.is_empty(), "{:?}", sockets(dir.path()));
    Ok(())
}

/// An arm64 kernel of ten instructions: it writes a line on the serial port and powers off by PSCI.
fn tiny_arm64_kernel() -> Vec<u8> {
    let text = b"hello from arm64\n\0";
    // adr x0, text; mov x1, #0x09000000 (the UART of QEMU's virt machine); 1: ldrb w2, [x0], #1; cbz w2, 2f;
    // strb w2, [x1]; b 1b; 2: movz w0, #8; movk w0, #0x8400, lsl #16 (PSCI SYSTEM_OFF); hvc #0; b .
    let code: [u32; 10] = [
        0x1000_0140,
        0xd2a1_2001,
        0x3840_1402,
        0x3400_0062,
        0x3900_0022,
        0x17ff_fffd,
        0x5280_0100,
        0x72b0_8000,
        0xd400_0002,
        0x1400_0000,
    ];
    // Documentation/arch/arm64/booting.rst: a branch over the header, text_offset, image_size, flags, …, the magic at 56.
    let mut image = vec![0; 64];
    image[..4].copy_from_slice(&0x1400_0010_u32.to_le_bytes());
    image[16..24].copy_from_slice(&0x1000_u64.to_le_bytes());
    image[24..32].copy_from_slice(&0xa_u64.to_le_bytes());
    image[56..60].copy_from_slice(b"ARM\x64");
    code.iter().for_each(|word| image.extend(word.to_le_bytes()));
    image.extend(text);
    image
}

#[test]
fn an_arm64_guest_runs_by_translation_and_a_compressed_kernel_is_refused() -> Result<()> {
    if Command::new("qemu-system-aarch64").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: no qemu-system-aarch64 in PATH (tests/setup.sh says what to install)");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let kernel = path(dir.path(), "Image");
    fs::write(&kernel, tiny_arm64_kernel())?;
    let state = path(dir.path(), "state");
    let out = cli(
        dir.path(),
        &["run", "--arch", "aarch64", "--mem", "64", "--state-dir", &state, "--kernel", &kernel],
    )?;
    ensure!(
        out.status.success() && said(&out).contains("hello from arm64"),
        "{}: {}",
        out.status,
        said(&out)
    );
    ensure!(
        cfg!(target_arch = "aarch64") || said(&out).contains("accelerator: tcg (the guest is aarch64"),
        "{}",
        said(&out)
    );
    let gzip = Command::new("gzip").arg("-k").arg(&kernel).status()?;
    ensure!(gzip.success());
    let kernel = format!("{kernel}.gz");
    let out = cli(dir.path(), &["run", "--arch", "aarch64", "--state-dir", &state, "--kernel", &kernel])?;
    ensure!(
        out.status.code() == Some(1) && said(&out).contains("gunzip -c"),
        "{}: {}",
        out.status,
        said(&out)
    );
    Ok(())
}
