//! `portway run` with real guests: what boots, the devices, the start and the end.
//!
//! Needs QEMU, OVMF, and the tools of `tests/guest/media.sh` (`tests/setup.sh`); without QEMU the tests are skipped, with a
//! line that says so.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::sidecar::until;
use portway_tests::vm::{Vm, guest_image, media, portway};

/// What a clean power-down may take.
const POWER_DOWN: Duration = Duration::from_secs(10);

fn has_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: no qemu-system-x86_64 in PATH (tests/setup.sh says what to install)");
    }
    found
}

/// Ends the VM by SIGTERM; it powers off in time.
fn powers_down(vm: Vm) -> Result<()> {
    let start = Instant::now();
    let (status, console) = vm.stop()?;
    ensure!(status.success(), "portway run ended with {status}:\n{console}");
    ensure!(console.contains("portway-agent: powering off: power button"), "no clean power-down:\n{console}");
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

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
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
    let label = vm.guest("blkid /dev/sr1")?;
    ensure!(label.contains("LABEL=\"cidata\""), "--cloud-init: {label}");
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

/// `portway` with a runtime directory of its own.
fn cli(dir: &Path, words: &[&str]) -> Result<Output> {
    let out = Command::new(portway()?)
        .args(words)
        .env("XDG_RUNTIME_DIR", dir)
        .env("XDG_STATE_HOME", dir)
        .stdin(Stdio::null())
        .output()?;
    Ok(out)
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Every file and directory below.
fn tree(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(tree(&path)?);
        }
        all.push(path);
    }
    all.sort();
    Ok(all)
}

#[test]
fn every_bad_value_is_named_with_its_option_before_anything_starts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| path(dir.path(), name);
    fs::write(at("os-kernel"), "kernel")?;
    fs::write(at("text"), "hello")?;
    fs::write(at("gz-kernel"), b"\x1f\x8b\x08")?;
    fs::create_dir(at("empty"))?;
    let (image, text, gz, empty) = (at("os"), at("text"), at("gz"), at("empty"));
    let cases: [(&[&str], &str); 31] = [
        (&[&text], "neither an ISO"),
        (&["/nonexistent/os"], "/nonexistent/os-kernel"),
        (&["--arch", "aarch64", &gz], "flat Image"),
        (&["--squashfs", &image], "os-squashfs.img"),
        (&["--iso", &text], "not an ISO 9660"),
        (&["--uefi", &image], "--uefi"),
        (&["--fw", "/nonexistent/fw", &image], "--fw /nonexistent/fw"),
        (&["--initrd", &text, &image], "--initrd goes with --kernel"),
        (&["--cpus", "0", &image], "--cpus 0"),
        (&["--mem", "1", &image], "--mem 1"),
        (&["--name", "a,b", &image], "--name \"a,b\""),
        (&["--accel", "hvf", &image], "--accel hvf"),
        (&["--disk", "size=0", &image], "size=0"),
        (&["--disk", "/nonexistent/d", &image], "--disk /nonexistent/d"),
        (&["--disk", "/nonexistent/d,size=1G", &image], "its directory is not there"),
        (&["--disk", "a,cache=none", &image], "cache=none"),
        (&["--data-file", "/nonexistent/f", &image], "--data-file /nonexistent/f"),
        (&["--data", "a", "--data-file", "b", &image], "--data-file"),
        (&["--cloud-init", &empty, &image], "user-data"),
        (&["--ignition", &text, &image], "--ignition"),
        (&["--virtiofs", "/nonexistent", &image], "--virtiofs /nonexistent"),
        (&["--virtiofs", "/tmp,ro", &image], "tag="),
        (&["--virtiofs", "/tmp", "--virtiofsd", "/nonexistent", &image], "--virtiofsd /nonexistent"),
        (&["--qemu", "/nonexistent/qemu", &image], "QEMU is missing"),
        (&["--mac", "01:00:5e:00:00:01", &image], "01:00:5e:00:00:01"),
        (&["--ip", "300.1.1.1", &image], "300.1.1.1"),
        (&["--net", "none", "-publish", "2222:22", &image], "-publish 2222:22"),
        (&["--networking", "nat", &image], "\"nat\""),
        (&["--networking", "tap,", &image], "tap,"),
        (&["-publish", "99999:22", &image], "99999:22"),
        (&["--mtu", "100", &image], "100"),
    ];
    let before = tree(dir.path())?;
    for (words, expected) in cases {
        let out = cli(dir.path(), &[&["run"], words].concat())?;
        let text = said(&out);
        ensure!(matches!(out.status.code(), Some(1 | 2)), "{words:?}: {}: {text}", out.status);
        ensure!(text.contains(expected), "{words:?} does not say {expected:?}: {text}");
        ensure!(text.trim_end().lines().count() == 1, "{words:?}: more than one line: {text}");
        // The runtime directory is made to know the control socket's path.
        let after: Vec<_> = tree(dir.path())?.into_iter().filter(|p| !p.ends_with("portway")).collect();
        ensure!(after == before, "{words:?} left something behind: {after:?}");
    }
    Ok(())
}

#[test]
fn an_address_that_the_network_does_not_have_ends_the_run_with_the_networks_words() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = guest_image()?.display().to_string();
    let state = path(dir.path(), "state");
    let out = cli(dir.path(), &["run", "--ip", "10.0.0.1", "--state-dir", &state, &image])?;
    ensure!(out.status.code() == Some(2), "{}", said(&out));
    ensure!(said(&out).contains("10.0.0.1 is not in the subnet"), "{}", said(&out));
    let left: Vec<_> =
        tree(dir.path())?.into_iter().filter(|p| p.extension().is_some_and(|e| e == "sock")).collect();
    ensure!(
        left.is_empty() && cli(dir.path(), &["vms"])?.stdout.split(|b| *b == b'\n').count() == 2,
        "{left:?}"
    );
    Ok(())
}

/// A VM in the background, killed with the test.
struct Detached<'a> {
    dir: &'a Path,
    name: &'static str,
}

impl<'a> Detached<'a> {
    fn start(dir: &'a Path, name: &'static str, options: &[&str]) -> Result<Self> {
        let vm = Self { dir, name };
        let (image, state) = (guest_image()?.display().to_string(), vm.state(""));
        let words = ["run", "--detach", "--name", name, "--mem", "256", "--state-dir", &state];
        let out = vm.portway(&[&words[..], options, &[&image]].concat())?;
        ensure!(out.status.success(), "{}", said(&out));
        ensure!(out.stdout == format!("{name}\n").into_bytes(), "{}", said(&out));
        Ok(vm)
    }

    fn portway(&self, words: &[&str]) -> Result<Output> {
        cli(self.dir, words)
    }

    fn state(&self, file: &str) -> String {
        path(self.dir, &format!("state-{}/{file}", self.name))
    }

    fn await_console(&self, text: &str) -> Result<()> {
        let log = || fs::read(self.state("console.log")).unwrap_or_default();
        let waited = until(Duration::from_secs(120), || String::from_utf8_lossy(&log()).contains(text));
        waited.with_context(|| format!("no {text:?}:\n{}", String::from_utf8_lossy(&log())))
    }

    /// Types a command on the console and waits for what it says.
    fn types(&self, command: &str, answer: &str) -> Result<()> {
        let mut console = UnixStream::connect(self.state("console.sock")).context("console.sock")?;
        console.write_all(format!("\n{command}\n").as_bytes())?;
        self.await_console(answer)
    }

    fn vms(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&self.portway(&["vms", "--format", "json"])?.stdout)?)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let _ = self.portway(&["kill", self.name]);
    }
}

/// tmux with a server of its own.
struct Terminal {
    socket: String,
}

impl Terminal {
    fn start(dir: &Path, command: &str) -> Result<Self> {
        let terminal = Self { socket: path(dir, "tmux") };
        terminal.tmux(&["new-session", "-d", "-x", "120", "-y", "40", "bash --norc --noprofile"])?;
        terminal.types(&[command, "Enter"])?;
        Ok(terminal)
    }

    fn tmux(&self, words: &[&str]) -> Result<String> {
        let out = Command::new("tmux").arg("-S").arg(&self.socket).args(words).output().context("tmux")?;
        ensure!(out.status.success(), "tmux {words:?}: {}", said(&out));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn types(&self, keys: &[&str]) -> Result<()> {
        self.tmux(&[&["send-keys"], keys].concat()).map(drop)
    }

    fn shows(&self, text: &str) -> Result<()> {
        let screen = || self.tmux(&["capture-pane", "-p", "-J"]).unwrap_or_default();
        until(Duration::from_secs(60), || screen().contains(text))
            .with_context(|| format!("no {text:?}:\n{}", screen()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

#[test]
fn a_detached_vm_is_listed_has_a_console_and_is_stopped_by_name() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &[])?;
    let listed = vm.vms()?;
    ensure!(
        listed[0]["name"] == "web" && listed[0]["detached"] == true && listed[0]["accel"].is_string(),
        "{listed}"
    );

    let again = vm.portway(&["run", "--state-dir", &vm.state(""), &guest_image()?.display().to_string()])?;
    ensure!(again.status.code() == Some(1) && said(&again).contains("in use by process"), "{}", said(&again));

    vm.await_console("portway-agent: ready")?;
    let program = portway()?.display().to_string();
    let runtime = dir.path().display().to_string();
    let command = format!(
        "stty -a > {runtime}/before; XDG_RUNTIME_DIR={runtime} {program} console web; stty -a > {runtime}/after; echo left=$?"
    );
    let terminal = Terminal::start(dir.path(), &command)?;
    terminal.shows("Ctrl-] leaves it")?;
    terminal.types(&["", "Enter"])?;
    terminal.shows("/ #")?;
    terminal.types(&["echo $((6*7))is-the-answer; tty", "Enter"])?;
    terminal.shows("42is-the-answer")?;
    // Ctrl-C is the guest's, Ctrl-] ours.
    terminal.types(&["cat", "Enter", "C-c", "echo still-he''re", "Enter"])?;
    terminal.shows("still-here")?;
    terminal.types(&["C-]"])?;
    terminal.shows("left=0")?;
    let settings = |name: &str| fs::read_to_string(dir.path().join(name));
    ensure!(settings("before")? == settings("after")?, "the terminal is not as it was");

    let start = Instant::now();
    let mut waiting = Command::new(portway()?)
        .args(["wait", "web"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = vm.portway(&["stop", "web"])?;
    ensure!(out.status.success() && said(&out).contains("powered off"), "{}", said(&out));
    ensure!(start.elapsed() < POWER_DOWN, "stopping took {:?}", start.elapsed());
    ensure!(waiting.wait()?.success(), "wait has another exit code than the VM");
    ensure!(vm.vms()? == serde_json::json!([]), "it is still listed");
    for socket in ["qmp.sock", "console.sock"] {
        ensure!(!Path::new(&vm.state(socket)).exists(), "{socket} is still there");
    }
    Ok(())
}

#[test]
fn a_killed_vm_has_an_exit_code_of_its_own() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &["--net", "none"])?;
    let waiting = Command::new(portway()?)
        .args(["wait", "web"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = vm.portway(&["kill", "web"])?;
    ensure!(out.status.success() && said(&out).contains("killed"), "{}", said(&out));
    let waited = waiting.wait_with_output()?;
    ensure!(waited.status.code() == Some(1), "{}", said(&waited));
    let out = vm.portway(&["stop", "web"])?;
    ensure!(out.status.code() == Some(2) && said(&out).contains("no VM runs"), "{}", said(&out));
    Ok(())
}

#[test]
fn a_detached_vm_that_cannot_start_says_why_and_is_not_there() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (image, state) = (guest_image()?.display().to_string(), path(dir.path(), "state"));
    let words =
        ["run", "--detach", "--net", "none", "--device", "no-such-device", "--state-dir", &state, &image];
    let out = cli(dir.path(), &words)?;
    ensure!(
        out.status.code() == Some(1) && said(&out).contains("no-such-device"),
        "{}: {}",
        out.status,
        said(&out)
    );
    ensure!(
        serde_json::from_slice::<serde_json::Value>(&cli(dir.path(), &["vms", "--format", "json"])?.stdout)?
            == serde_json::json!([])
    );
    Ok(())
}

#[test]
fn two_vms_share_a_network_find_each_other_by_name_and_it_ends_with_the_last() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let network = ["--network", "lab"];
    let one = Detached::start(dir.path(), "one", &[&network[..], &["-publish", "0:22"]].concat())?;
    let two = Detached::start(
        dir.path(),
        "two",
        &[&network[..], &["-publish", "0:80", "--ip", "192.168.127.77"]].concat(),
    )?;
    let late = cli(
        dir.path(),
        &["run", "--network", "lab", "--dns-host", "a.test=1.2.3.4", &guest_image()?.display().to_string()],
    )?;
    ensure!(
        late.status.code() == Some(2) && said(&late).contains("--dns-host cannot be given now"),
        "{}",
        said(&late)
    );
    let again = cli(
        dir.path(),
        &[
            "run",
            "--network",
            "lab",
            "--name",
            "two",
            "--state-dir",
            &path(dir.path(), "s"),
            &guest_image()?.display().to_string(),
        ],
    )?;
    ensure!(
        again.status.code() == Some(2) && said(&again).contains("\"two\" is on this network already"),
        "{}",
        said(&again)
    );
    for vm in [&one, &two] {
        vm.await_console("portway-agent: ready")?;
    }
    one.types("ping -c 1 -W 10 two && echo found-$((40+2))", "found-42")?;
    two.types("ping -c 1 -W 10 one.portway.internal && echo found-$((40+2))", "found-42")?;
    two.await_console("lease 192.168.127.77")?;
    let ports = cli(dir.path(), &["ports", "--network", "lab", "--format", "json"])?;
    let ports: serde_json::Value = serde_json::from_slice(&ports.stdout)?;
    ensure!(ports.as_array().is_some_and(|ports| ports.len() == 2), "{ports}");

    // The first may go: the network stays for the second, without the first's ports.
    ensure!(one.portway(&["stop", "one"])?.status.success());
    let left = || -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(
            &cli(dir.path(), &["ports", "--network", "lab", "--format", "json"])?.stdout,
        )?)
    };
    until(Duration::from_secs(10), || left().is_ok_and(|p| p.as_array().is_some_and(|p| p.len() == 1)))?;
    ensure!(left()?[0]["guest_port"] == 80, "{}", left()?);
    two.types("nslookup gateway.portway.internal && echo still-$((40+2))", "still-42")?;
    ensure!(two.portway(&["stop", "two"])?.status.success());
    until(Duration::from_secs(10), || sockets(dir.path()).is_ok_and(|left| left.is_empty()))
        .with_context(|| format!("left behind: {:?}", sockets(dir.path())))
}

/// Sockets, and other things that belong to a running VM alone.
fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let is_left = |path: &PathBuf| {
        let socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        socket || name == "tmp" || name.ends_with(".new") || path.parent().is_some_and(|p| p.ends_with("vms"))
    };
    Ok(tree(dir)?.into_iter().filter(is_left).collect())
}

/// Processes that were started with this runtime directory, zombies excepted.
fn processes(dir: &Path) -> Result<Vec<String>> {
    let mark = format!("XDG_RUNTIME_DIR={}\0", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // A process that ends meanwhile is none.
        let environment = fs::read(path.join("environ")).unwrap_or_default();
        if environment.windows(mark.len()).any(|bytes| bytes == mark.as_bytes()) {
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    Ok(found)
}

#[test]
fn a_launcher_that_is_killed_at_any_moment_leaves_nothing_behind() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let image = guest_image()?.display().to_string();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..50 {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| path(dir.path(), name);
        fs::create_dir(at("share"))?;
        let (state, disk, share) = (at("state"), format!("{},size=1M", at("disk")), at("share"));
        let mut words =
            vec!["run", "--mem", "64", "--disposable", "--disk", &disk, "--data", "x", "--state-dir", &state];
        match round % 3 {
            0 => words.extend(["--network", "lab"]),
            1 => words.extend(["--virtiofs", &share]),
            _ => {}
        }
        words.push(&image);
        let mut launcher = Command::new(portway()?)
            .args(&words)
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("XDG_STATE_HOME", dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(at("said"))?)
            .spawn()?;
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_millis(random % 400));
        launcher.kill()?;
        launcher.wait()?;
        let gone = until(Duration::from_secs(30), || {
            processes(dir.path()).is_ok_and(|p| p.is_empty())
                && sockets(dir.path()).is_ok_and(|s| s.is_empty())
        });
        gone.with_context(|| {
            let said = fs::read_to_string(at("said")).unwrap_or_default();
            format!("round {round}: {:?} {:?}\n{said}", processes(dir.path()), sockets(dir.path()))
        })?;
        // And the same state can be used again at once.
        if round % 10 == 9 {
            let out = cli(dir.path(), &["run", "--state-dir", &state, "--device", "no-such-device", &image])?;
            ensure!(said(&out).contains("no-such-device"), "{}", said(&out));
        }
    }
    Ok(())
}
