//! Unix sockets of the host that lead to a guest's over SSH: podman's line for QEMU, and CRC's `ssh-tunnel://`. The guest is a network
//! namespace on the QEMU socket, with the machine's own OpenSSH server in it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::agent::binary;
use portway_tests::host::{Ends, free_port};
use portway_tests::namespace::Namespace;
use portway_tests::program::{PATIENCE, Program, ask, named};
use portway_tests::sidecar::until;

/// The VM: a namespace with podman's address, a key that may log in, a socket that echoes.
struct Vm {
    dir: tempfile::TempDir,
    namespace: Namespace,
    tap: Option<Ends>,
}

impl Vm {
    /// `None`, said on standard error, where it cannot be.
    fn new() -> Result<Option<Self>> {
        if !Path::new("/usr/sbin/sshd").exists() {
            eprintln!("skipped: no /usr/sbin/sshd (package openssh-server)");
            return Ok(None);
        }
        let Some(namespace) = Namespace::new()? else { return Ok(None) };
        let dir = tempfile::tempdir()?;
        for (name, kind) in [("identity", "ed25519"), ("host", "ed25519"), ("rsa", "rsa")] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", kind, "-N", "", "-f"])
                .arg(dir.path().join(name))
                .status()?;
            ensure!(made.success(), "ssh-keygen");
        }
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "ListenAddress 192.168.127.2:22\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\n\
             UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
            path("host"),
            path("identity.pub")
        );
        std::fs::write(dir.path().join("sshd_config"), config)?;
        // The package leaves it to systemd.
        std::fs::create_dir_all("/run/sshd")?;
        let echo = UnixListener::bind(dir.path().join("podman.sock"))?;
        std::thread::spawn(move || {
            for stream in echo.incoming().flatten() {
                std::thread::spawn(move || -> std::io::Result<()> {
                    let mut from = stream.try_clone()?;
                    std::io::copy(&mut from, &mut &stream)?;
                    // Said only when the client's own end has come through.
                    (&stream).write_all(b"end")
                });
            }
        });
        Ok(Some(Self { dir, namespace, tap: None }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// What QEMU does: connects to gvproxy's socket; and the guest has podman's MAC and address.
    fn boot(&mut self) -> Result<()> {
        let mut tap = Command::new("nsenter");
        tap.arg(format!("--net={}", self.namespace.path().display())).arg(binary()?).arg("tap");
        tap.args(["-framing", "qemu", "-stop-if-exist", "ignore", "-no-dhcp", "-url"]);
        tap.arg(format!("unix:{}", self.text("vm")));
        self.tap = Some(Ends(tap.spawn()?));
        let (address, gateway) = ("192.168.127.2".parse()?, "192.168.127.1".parse()?);
        until(PATIENCE, || self.namespace.configure("tap0", address, gateway, 1500).is_ok())
    }

    /// Ends what sshd has left in the namespace, which has sessions of their own.
    fn end_logins(&self) -> Result<()> {
        let path = self.namespace.path();
        let name = path.file_name().context("no name")?;
        let pids = Command::new("ip").args(["netns", "pids"]).arg(name).output()?;
        let tap = self.tap.as_ref().map(|t| t.0.id().to_string());
        for pid in String::from_utf8(pids.stdout)?.lines().filter(|p| Some(*p) != tap.as_deref()) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.parse()?), nix::sys::signal::SIGKILL)?;
        }
        Ok(())
    }

    fn sshd(&self) -> Result<Ends> {
        let mut sshd = Command::new("nsenter");
        sshd.arg(format!("--net={}", self.namespace.path().display()));
        sshd.args(["/usr/sbin/sshd", "-D", "-e", "-f"]).arg(self.path("sshd_config"));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("sshd.log"))?;
        Ok(Ends(sshd.stdin(Stdio::null()).stderr(log).spawn()?))
    }
}

/// Sends `bytes` and the end, and returns what comes back.
fn exchange(mut stream: UnixStream, bytes: &[u8]) -> Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut writer = stream.try_clone()?;
    let sent = bytes.to_vec();
    let writing = std::thread::spawn(move || -> std::io::Result<()> {
        writer.write_all(&sent)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut got = Vec::new();
    match stream.read_to_end(&mut got) {
        // Closed without having been read: what a client sees that nobody takes.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        read => drop(read?),
    }
    // Whether it could be sent, the answer tells.
    let _ = writing.join();
    Ok(got)
}

fn echoed(socket: &Path, bytes: &[u8]) -> Result<()> {
    let got = exchange(UnixStream::connect(socket)?, bytes)?;
    ensure!(got == [bytes, b"end"].concat(), "{} bytes went, {} came back", bytes.len(), got.len());
    Ok(())
}

#[test]
fn podmans_line_for_qemu_forwards_its_socket_before_and_after_the_guests_sshd_is_there() -> Result<()> {
    let Some(mut vm) = Vm::new()? else { return Ok(()) };
    let port = free_port()?;
    let (qemu, ssh_port) = (format!("unix://{}", vm.text("vm")), port.to_string());
    let (api, dest, identity) = (vm.text("api.sock"), vm.text("podman.sock"), vm.text("identity"));
    let (pid, log) = (vm.text("gvproxy.pid"), vm.text("gvproxy.log"));
    // ref: podman's own order for a rootful machine.
    let mut command = Command::new(named(vm.dir.path(), "gvproxy")?);
    command.args(["-debug", "-mtu", "1500", "-ssh-port", &ssh_port, "-listen-qemu", &qemu]);
    command.args(["-forward-sock", &api, "-forward-dest", &dest, "-forward-user", "root"]);
    command.args(["-forward-identity", &identity, "-pid-file", &pid, "-log-file", &log]);
    let mut gvproxy = Program::start(&mut command, &vm.path("stderr"))?;
    gvproxy.until("its sockets", || vm.path("vm").exists() && vm.path("gvproxy.pid").exists())?;
    ensure!(std::fs::read_to_string(vm.path("gvproxy.pid"))? == gvproxy.pid().to_string());
    // The socket is there before the guest is, for its owner alone; a client waits.
    let mode = std::fs::metadata(vm.path("api.sock"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    let early = UnixStream::connect(vm.path("api.sock"))?;
    let early = std::thread::spawn(move || exchange(early, b"patience"));
    vm.boot()?;
    let sshd = vm.sshd()?;
    let got = early.join().map_err(|_| anyhow::anyhow!("the early client panicked"))??;
    ensure!(got == b"patienceend", "{got:?}");

    let mut banner = [0; 8];
    let mut ssh = TcpStream::connect(("127.0.0.1", port))?;
    ssh.set_read_timeout(Some(PATIENCE))?;
    ssh.read_exact(&mut banner)?;
    ensure!(&banner == b"SSH-2.0-");

    // Far more than all windows, each way, and many at once over the one connection.
    let bytes: Vec<u8> = (0..6_000_000_u32).map(|n| (n % 251) as u8).collect();
    echoed(&vm.path("api.sock"), &bytes)?;
    let socket = vm.path("api.sock");
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..32)
            .map(|n| {
                scope.spawn({
                    let socket = &socket;
                    move || echoed(socket, &vec![n; 100_000])
                })
            })
            .collect();
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    })?;
    let logins = std::fs::read_to_string(vm.path("sshd.log"))?.matches("Accepted publickey").count();
    ensure!(logins == 1, "{logins} logins");

    // A guest that starts again is found again: its sshd is another, and the old connection is dead.
    drop(sshd);
    vm.end_logins()?;
    let _sshd = vm.sshd()?;
    echoed(&vm.path("api.sock"), b"again").with_context(|| gvproxy.log())?;

    // Nobody behind the guest's socket: the client is closed, and the network stays.
    std::fs::remove_file(vm.path("podman.sock"))?;
    let got = exchange(UnixStream::connect(vm.path("api.sock"))?, b"x")?;
    ensure!(got.is_empty(), "{got:?}");

    // QEMU ends, and gvproxy with it; nothing is left.
    vm.tap = None;
    ensure!(gvproxy.end()?.code() == Some(0));
    for name in ["vm", "api.sock", "gvproxy.pid"] {
        ensure!(!vm.path(name).exists(), "{name} was left");
    }
    Ok(())
}

/// One request; status and body.
fn api(vm: &Vm, route: &str, body: &str) -> Result<(u16, String)> {
    let head = format!(
        "POST {route} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = String::from_utf8(ask(&vm.path("services"), (head + body).as_bytes())?)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    Ok((head.get(9..12).context("no status")?.parse()?, body.to_owned()))
}

#[test]
fn a_unix_socket_is_exposed_by_ssh_tunnel_and_taken_away() -> Result<()> {
    let Some(mut vm) = Vm::new()? else { return Ok(()) };
    let (qemu, services) = (format!("unix://{}", vm.text("vm")), format!("unix://{}", vm.text("services")));
    let mut command = Command::new(named(vm.dir.path(), "gvproxy")?);
    command.args(["-ssh-port", "-1", "-listen-qemu", &qemu, "-services", &services]);
    let mut gvproxy = Program::start(&mut command, &vm.path("stderr"))?;
    gvproxy.until("its sockets", || vm.path("vm").exists() && vm.path("services").exists())?;
    vm.boot()?;
    let _sshd = vm.sshd()?;
    let local = vm.text("docker.sock");
    let remote =
        format!("ssh-tunnel://root@192.168.127.2:22{}?key={}", vm.text("podman.sock"), vm.text("identity"));
    let body = |remote: &str| format!(r#"{{"local":"{local}","remote":"{remote}","protocol":"unix"}}"#);
    let nothing = (200, "[]\n".to_owned());
    for (remote, said) in [
        (remote.replace("ssh-tunnel", "udp"), "remote protocol for unix forwarder is not implemented: udp"),
        (remote.replace(&vm.text("podman.sock"), ""), "remote uri must contain a path to a socket file"),
        (remote.replace("key=", "kex="), "key not provided for unix-ssh connection"),
        (remote.replace("192.168.127.2", "a.name"), "invalid remote addr"),
        (remote.replace("identity", "nothing"), "No such file or directory"),
        (remote.replace("identity", "sshd_config"), "not a private key"),
        (remote.replace("identity", "rsa"), "an RSA key"),
    ] {
        let (status, text) = api(&vm, "/services/forwarder/expose", &body(&remote))?;
        ensure!(status == 500 && text.contains(said), "{remote}: {status} {text}");
        ensure!(api(&vm, "/services/forwarder/all", "")? == nothing && !vm.path("docker.sock").exists());
    }
    // Where its sockets are others may be made, and nowhere else.
    let elsewhere = format!(
        r#"{{"local":"/tmp/portway-{}.sock","remote":"{remote}","protocol":"unix"}}"#,
        std::process::id()
    );
    let (status, text) = api(&vm, "/services/forwarder/expose", &elsewhere)?;
    ensure!(status == 500 && text.contains("lies outside of the directories"), "{status} {text}");
    ensure!(api(&vm, "/services/forwarder/all", "")? == nothing);
    ensure!(api(&vm, "/services/forwarder/expose", &body(&remote))? == (200, String::new()));
    let (status, text) = api(&vm, "/services/forwarder/expose", &body(&remote))?;
    ensure!(status == 500 && text == format!("proxy already running for unix on {local}\n"), "{text}");
    let listed = format!(r#"[{{"local":"{local}","remote":"{remote}","protocol":"unix"}}]"#);
    ensure!(api(&vm, "/services/forwarder/all", "")? == (200, listed + "\n"));
    echoed(&vm.path("docker.sock"), b"through").with_context(|| gvproxy.log())?;
    // A connection that is there stays when its socket goes.
    let mut held = UnixStream::connect(vm.path("docker.sock"))?;
    held.set_read_timeout(Some(PATIENCE))?;
    held.write_all(b"1")?;
    held.read_exact(&mut [0])?;
    let gone = format!(r#"{{"local":"{local}","protocol":"unix"}}"#);
    ensure!(api(&vm, "/services/forwarder/unexpose", &gone)? == (200, String::new()));
    until(PATIENCE, || !vm.path("docker.sock").exists())?;
    ensure!(exchange(held, b"2")? == b"2end");
    ensure!(api(&vm, "/services/forwarder/unexpose", &gone)? == (500, "proxy not found\n".into()));
    ensure!(api(&vm, "/services/forwarder/all", "")? == nothing);
    // A host key that nobody knows, where it has to be known.
    let (secure, body) = (format!("{remote}&secure=true"), vm.text("strict.sock"));
    let body = format!(r#"{{"local":"{body}","remote":"{secure}","protocol":"unix"}}"#);
    ensure!(api(&vm, "/services/forwarder/expose", &body)? == (200, String::new()));
    ensure!(exchange(UnixStream::connect(vm.path("strict.sock"))?, b"x")?.is_empty());
    until(PATIENCE, || gvproxy.log().contains("known_hosts")).with_context(|| gvproxy.log())?;
    ensure!(gvproxy.stop()?.code() == Some(0));
    ensure!(!vm.path("strict.sock").exists());
    Ok(())
}
