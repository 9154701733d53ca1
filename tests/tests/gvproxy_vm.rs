//! podman's own command lines of gvproxy, with a real guest behind them: QEMU's stream, and vfkit's datagrams (its stand-in).
//!
//! The guest is the demo's, with what podman's machines have over it: OpenSSH at port 22 (the demo's dropbear knows no unix
//! sockets), the user `core`, and a service behind podman's two sockets. It is laid over the demo's as a second archive of the
//! initial RAM disk. Needs QEMU, the demo's guest, ssh, curl and `sshd`; without QEMU the tests say that they were skipped.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use portway_tests::host::{Ends, free_port};
use portway_tests::program::{Program, named};
use portway_tests::sidecar::until;
use portway_tests::vm::guest_image;

/// A guest under TCG takes some seconds to its sshd; on a busy machine some more.
const BOOT: Duration = Duration::from_secs(120);
/// What podman gives every machine, and why there is one at a time.
const MAC: &str = "5a:94:ef:e4:0c:ee";
/// Root's sshd, and podman's API for root and for the user, which say on which socket they were asked.
const FILES: [(&str, u32, &str); 7] = [
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nsshd:x:74:74::/run/sshd:/bin/false\ncore:x:1000:1000::/home/core:/bin/sh\n",
    ),
    ("etc/group", 0o644, "root:x:0:\ntty:x:5:\nsshd:x:74:\ncore:x:1000:\n"),
    ("etc/shadow", 0o600, "root:*:19000:0:99999:7:::\ncore:*:19000:0:99999:7:::\n"),
    (
        "etc/ssh/sshd_config",
        0o644,
        "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\n\
         PasswordAuthentication no\nPermitRootLogin prohibit-password\n",
    ),
    (
        "etc/portway/services",
        0o644,
        "ssh /bin/start-sshd\nweb /bin/httpd -f -p 80 -h /www\nroots /bin/start-podman /run/podman\n\
         users /bin/start-podman /run/user/1000/podman\n",
    ),
    (
        "bin/start-sshd",
        0o755,
        "#!/bin/sh\nmkdir -p /run/sshd && chmod 755 /run/sshd && LD_LIBRARY_PATH=/opt/sshd exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config\n",
    ),
    (
        "bin/start-podman",
        0o755,
        "#!/bin/sh\numask 0\nmkdir -p \"$1\" && exec guest-probe unix-exec \"$1/podman.sock\" /bin/podman-api \"$1\"\n",
    ),
];
/// As much of HTTP as `GET /_ping` needs.
const API: &str = "#!/bin/sh
read -r request
while read -r line && [ \"$line\" != \"$(printf '\\r')\" ]; do :; done
printf 'HTTP/1.0 200 OK\\r\\n\\r\\nOK from %s for %s\\n' \"$1\" \"$request\"
";

fn has_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok();
    let sshd = Path::new("/usr/sbin/sshd").exists();
    if !found || !sshd {
        eprintln!("SKIPPED: qemu-system-x86_64 and sshd are needed (tests/setup.sh says what to install)");
    }
    found && sshd
}

/// Runs `command` to its end; what it printed.
fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(
        out.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A machine of podman's: its files, and its guest's.
struct Podman {
    dir: tempfile::TempDir,
    ssh_port: u16,
}

impl Podman {
    fn new() -> Result<Self> {
        let podman = Self { dir: tempfile::tempdir()?, ssh_port: free_port()? };
        podman.build_guest()?;
        Ok(podman)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The demo's guest and, over it, podman's parts: `kernel`, `initrd`.
    fn build_guest(&self) -> Result<()> {
        let image = guest_image()?.canonicalize_prefix()?;
        symlink(format!("{image}-kernel"), self.path("kernel"))?;
        let over = self.path("over");
        for (name, mode, text) in FILES.into_iter().chain([("bin/podman-api", 0o755, API)]) {
            self.lay(name, mode, text.as_bytes())?;
        }
        let key = |name: &str| {
            output(
                Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(self.path(name)),
            )
        };
        key("machine")?;
        key("host_key")?;
        self.lay("etc/ssh/host_key", 0o600, &fs::read(self.path("host_key"))?)?;
        self.lay("etc/ssh/authorized_keys", 0o644, &fs::read(self.path("machine.pub"))?)?;
        // OpenSSH 9.8 and newer have programs beside sshd.
        let programs = ["/usr/sbin/sshd", "/usr/lib/openssh/sshd-session", "/usr/lib/openssh/sshd-auth"];
        for program in programs.into_iter().filter(|p| Path::new(p).exists()) {
            self.lay(program.trim_start_matches('/'), 0o755, &fs::read(program)?)?;
            for word in output(Command::new("ldd").arg(program))?.split_whitespace() {
                // In a place of their own: the demo's busybox is static, and what of them it finds by itself it loads, and falls.
                if let (true, Some((_, file))) = (word.starts_with('/'), word.rsplit_once('/')) {
                    self.lay(&format!("opt/sshd/{file}"), 0o755, &fs::read(word)?)?;
                }
            }
        }
        let pack = format!(
            "cd {} && find . | busybox cpio -o -H newc -R 0:0 2>/dev/null | gzip -1 > {}",
            over.display(),
            self.text("over.gz")
        );
        output(Command::new("sh").args(["-c", &pack]))?;
        // The kernel unpacks one after the other (initramfs buffer format).
        let both = [fs::read(format!("{image}-initrd.img"))?, fs::read(self.path("over.gz"))?].concat();
        Ok(fs::write(self.path("initrd"), both)?)
    }

    /// One more file of the guest's.
    fn lay(&self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let path = self.path("over").join(name);
        fs::create_dir_all(path.parent().context("a directory")?)?;
        fs::write(&path, bytes)?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(mode))?)
    }

    /// gvproxy as podman starts it (its `-ssh-port`, and all after it, in podman's order), and podman's own wait for it.
    fn gvproxy(&self, listen: [&str; 2], user: &str, dest: &str) -> Result<Program> {
        let mut command = Command::new(named(self.dir.path(), "gvproxy")?);
        command.args(["-debug", "-mtu", "1500", "-ssh-port", &self.ssh_port.to_string()]).args(listen);
        command.args(["-forward-sock", &self.text("api.sock"), "-forward-dest", dest, "-forward-user", user]);
        command.args(["-forward-identity", &self.text("machine"), "-pid-file", &self.text("gvproxy.pid")]);
        command.args(["-log-file", &self.text("gvproxy.log")]).env("XDG_RUNTIME_DIR", self.dir.path());
        let mut gvproxy = Program::start(&mut command, &self.path("gvproxy.out"))?;
        let (_, socket) = listen[1].split_once("://").context("a URL")?;
        gvproxy.until("its socket", || Path::new(socket).exists())?;
        // Digits and nothing else: podman hands it to strconv.Atoi.
        let pid = self.path("gvproxy.pid");
        gvproxy.until("its pid file", || fs::read_to_string(&pid).is_ok_and(|text| !text.is_empty()))?;
        ensure!(fs::read_to_string(&pid)? == gvproxy.pid().to_string());
        Ok(gvproxy)
    }

    /// ssh as podman calls it.
    fn ssh(&self, user: &str, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args([
            "-i",
            &self.text("machine"),
            "-p",
            &self.ssh_port.to_string(),
            &format!("{user}@localhost"),
        ]);
        ssh.args([
            "-F",
            "none",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "LogLevel=ERROR",
        ]);
        ssh.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=10", command]);
        ssh
    }

    /// Waits as podman does for a machine: until ssh has run `true`.
    fn awaits(&self, user: &str) -> Result<()> {
        let waited = until(BOOT, || output(&mut self.ssh(user, "true")).is_ok());
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        waited.with_context(|| format!("{}\n{}", read("console"), read("gvproxy.log")))
    }

    /// What the guest's service says behind the forwarded socket.
    fn ping(&self) -> Result<String> {
        let socket = self.text("api.sock");
        output(Command::new("curl").args([
            "-sS",
            "--max-time",
            "30",
            "--unix-socket",
            &socket,
            "http://d/_ping",
        ]))
    }

    /// A machine that has come up is podman's: its address, its names, its ports, its sockets.
    fn is_podmans(&self, user: &str, dest: &str) -> Result<()> {
        let in_guest = |command: &str| output(&mut self.ssh(user, command));
        let address = in_guest("ip -4 -o addr show eth0")?;
        ensure!(address.contains("192.168.127.2/24"), "{address}");
        let directory = dest.trim_end_matches("/podman.sock");
        let (said, expected) = (self.ping()?, format!("OK from {directory} for GET /_ping HTTP/1.1"));
        ensure!(said.trim_end() == expected, "{said}");

        // A container's port, as the guest asks for it: by name, without a port of its own address.
        let port = free_port()?;
        let ask = |route: &str, body: &str| {
            let url = format!("http://gateway.containers.internal/services/forwarder/{route}");
            in_guest(&format!("wget -q -O - --post-data '{body}' {url}"))
        };
        ask("expose", &format!(r#"{{"local":":{port}","remote":":80","protocol":"tcp"}}"#))?;
        let page = || {
            let url = format!("http://localhost:{port}/cgi-bin/guest");
            output(Command::new("curl").args(["-fsS", "--max-time", "20", &url]))
        };
        let said = page()?;
        ensure!(said.contains("Hello from inside the guest") && said.contains("192.168.127.2"), "{said}");
        ask("unexpose", &format!(r#"{{"local":":{port}","protocol":"tcp"}}"#))?;
        ensure!(page().is_err(), "port {port} is still there");

        // No call of all this was one too many for the sandbox.
        let log = fs::read_to_string(self.path("gvproxy.log"))?;
        ensure!(!log.contains("the sandbox refused"), "{log}");

        // And the host by the name that podman's containers use.
        let server = portway_tests::host::echo_server()?;
        let echoed = in_guest(&format!("echo there and back | nc -w 10 host.containers.internal {server}"))?;
        ensure!(echoed == "there and back\n", "{echoed}");
        Ok(())
    }
}

/// An image's prefix, wherever the process is.
trait Canonical {
    fn canonicalize_prefix(&self) -> Result<String>;
}

impl Canonical for PathBuf {
    fn canonicalize_prefix(&self) -> Result<String> {
        let dir = self.parent().context("a directory")?.canonicalize()?;
        Ok(dir.join(self.file_name().context("a name")?).display().to_string())
    }
}

/// Starts `command` with its output in the machine's console.
fn spawn(podman: &Podman, command: &mut Command) -> Result<Child> {
    let console = fs::File::create(podman.path("console"))?;
    command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
    command.spawn().with_context(|| format!("{command:?}"))
}

#[test]
fn podmans_line_for_qemu_serves_a_real_guest_until_it_powers_off() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let podman = Podman::new()?;
    let (socket, dest) = (podman.text("vm-gvproxy.sock"), "/run/user/1000/podman/podman.sock");
    let mut gvproxy = podman.gvproxy(["-listen-qemu", &format!("unix://{socket}")], "core", dest)?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        "q35",
        "-accel",
        "tcg",
        "-cpu",
        "max",
    ]);
    qemu.args(["-m", "512M", "-serial", "stdio", "-kernel"]).arg(podman.path("kernel"));
    qemu.arg("-initrd").arg(podman.path("initrd")).args(["-append", "console=ttyS0 no_timer_check"]);
    // These two are podman's.
    qemu.args(["-netdev", &format!("stream,id=vlan,server=off,addr.type=unix,addr.path={socket}")]);
    qemu.args(["-device", &format!("virtio-net-pci,netdev=vlan,mac={MAC},romfile=")]);
    let mut machine = Ends(spawn(&podman, &mut qemu)?);
    podman.awaits("core")?;
    podman.is_podmans("core", dest)?;

    // The machine powers off, and gvproxy ends with it; nothing is left.
    let _ = podman.ssh("root", "poweroff -f").stdin(Stdio::null()).output()?;
    until(BOOT, || machine.0.try_wait().is_ok_and(|ended| ended.is_some()))?;
    ensure!(gvproxy.end()?.code() == Some(0), "{}", gvproxy.log());
    for name in ["vm-gvproxy.sock", "api.sock", "gvproxy.pid"] {
        ensure!(!podman.path(name).exists(), "{name} was left");
    }
    Ok(())
}

#[test]
fn podmans_line_for_vfkit_serves_a_real_guest_and_again_after_podmans_sigkill() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let podman = Podman::new()?;
    let (socket, dest) = (podman.text("vm-gvproxy.sock"), "/run/podman/podman.sock");
    let url = format!("unixgram://{socket}");
    let listen = ["-listen-vfkit", url.as_str()];
    for round in 0..2 {
        let mut gvproxy = podman.gvproxy(listen, "root", dest)?;
        let mut vfkit = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/vfkit"));
        let boot = format!(
            "linux,kernel={},initrd={},cmdline=\"quiet\"",
            podman.text("kernel"),
            podman.text("initrd")
        );
        vfkit.args(["--cpus", "1", "--memory", "512", "--bootloader", &boot]);
        vfkit.args(["--device", &format!("virtio-net,unixSocketPath={socket},mac={MAC}")]);
        vfkit.args(["--device", &format!("virtio-serial,logFilePath={}", podman.text("serial"))]);
        // The stand-in's QEMU ends with it.
        let machine = Group(spawn(&podman, vfkit.process_group(0))?);
        podman
            .awaits("root")
            .with_context(|| fs::read_to_string(podman.path("serial")).unwrap_or_default())?;
        match round {
            0 => podman.is_podmans("root", dest)?,
            _ => ensure!(podman.ping()?.starts_with("OK from /run/podman ")),
        }
        // podman ends gvproxy by SIGKILL, and then removes its pid file; the socket, before the next start.
        gvproxy.kill()?;
        drop(machine);
        for name in ["gvproxy.pid", "vm-gvproxy.sock"] {
            fs::remove_file(podman.path(name)).with_context(|| name.to_owned())?;
        }
    }
    Ok(())
}

/// A program and those it has started; killed when dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.0.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}
