//! The program as `gvproxy`: its callers' command lines, its routes, its notifications, its exit codes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::host::free_port;
use portway_tests::sidecar::until;
use portway_tests::vm::portway;

/// The program under the name its callers start, ended with the test.
struct Gvproxy(Child);

impl Gvproxy {
    fn start(dir: &Path, args: &[&str]) -> Result<Self> {
        let program = dir.join("gvproxy");
        if !program.exists() {
            std::os::unix::fs::symlink(portway()?, &program)?;
        }
        let log = std::fs::File::create(dir.join("stderr"))?;
        let mut command = Command::new(program);
        command.args(args).env("XDG_RUNTIME_DIR", dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(Self(command.spawn()?))
    }
}

impl Drop for Gvproxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(path: &Path) -> Result<()> {
    until(Duration::from_secs(10), || path.exists()).with_context(|| path.display().to_string())
}

/// One request as Go's client sends it; status and body.
fn ask(api: &Path, method: &str, route: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(api)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let len = body.len();
    let head = format!(
        "{method} {route} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    Ok((head.get(9..12).context("no status")?.parse()?, body.to_owned()))
}

/// A request of the guest to the gateway's port 80; the whole answer.
fn ask_gateway(guest: &mut Guest, route: &str, body: &str) -> Result<String> {
    let socket = guest.connect(([192, 168, 127, 1], 80).into())?.context("refused")?;
    let len = body.len();
    let request = format!(
        "POST {route} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
    );
    let mut sent = 0;
    let mut got = Vec::new();
    guest.until("an answer of port 80", |g| {
        let tcp = g.tcp(socket);
        if sent < request.len() && tcp.can_send() {
            sent += tcp.send_slice(&request.as_bytes()[sent..]).unwrap_or(0);
        }
        while tcp.can_recv() {
            let taken = tcp.recv(|b| {
                got.extend_from_slice(b);
                (b.len(), ())
            });
            if taken.is_err() {
                break;
            }
        }
        (sent == request.len() && !tcp.may_recv()).then_some(())
    })?;
    Ok(String::from_utf8(got)?)
}

#[test]
fn podmans_line_serves_a_guest_until_the_guest_ends() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let url = |name: &str| format!("unix://{}", path(name).display());
    let text = |p: PathBuf| p.display().to_string();
    let ssh = free_port()?.to_string();
    let (listen, qemu, pid, log) = (url("api"), url("vm"), text(path("pid")), text(path("log")));
    let line = [
        "-debug",
        "-mtu",
        "1500",
        "-ssh-port",
        &ssh,
        "-listen-qemu",
        &qemu,
        "-listen",
        &listen,
        "-pid-file",
        &pid,
        "-log-file",
        &log,
    ];
    let mut gvproxy = Gvproxy::start(dir.path(), &line)?;
    wait_for(&path("pid"))?;
    wait_for(&path("api"))?;
    ensure!(std::fs::read_to_string(path("pid"))? == gvproxy.0.id().to_string(), "the pid and no newline");
    let mut guest = Guest::attach(&path("vm"), 1)?;
    // The second address belongs to the MAC podman gives its VM.
    ensure!(guest.dhcp()?.0 == std::net::Ipv4Addr::new(192, 168, 127, 3));
    let api = path("api");

    let ssh_entry = format!(r#"{{"local":"127.0.0.1:{ssh}","remote":"192.168.127.2:22","protocol":"tcp"}}"#);
    ensure!(ask(&api, "GET", "/services/forwarder/all", "")? == (200, format!("[{ssh_entry}]\n")));
    let leases = r#"{"192.168.127.1":"5a:94:ef:e4:0c:dd","192.168.127.2":"5a:94:ef:e4:0c:ee","192.168.127.3":"52:54:00:00:00:01"}"#;
    for route in ["/leases", "/services/dhcp/leases"] {
        ensure!(ask(&api, "GET", route, "")? == (200, format!("{leases}\n")), "{route}");
    }
    ensure!(ask(&api, "GET", "/cam", "")? == (200, "{\"52:54:00:00:00:01\":0}\n".into()));
    let stats: serde_json::Value = serde_json::from_str(&ask(&api, "GET", "/stats", "")?.1)?;
    ensure!(stats["BytesReceived"].as_u64().is_some_and(|n| n > 0) && stats["TCP"].is_object(), "{stats}");
    ensure!(ask(&api, "GET", "/nothing", "")? == (404, "404 page not found\n".into()));

    // The guest publishes a port of its own, as podman's does, and is reached there.
    let port = free_port()?;
    let body = format!(r#"{{"local":":{port}","remote":":8080","protocol":"tcp"}}"#);
    let answer = ask_gateway(&mut guest, "/services/forwarder/expose", &body)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let listening = guest.listen(8080)?;
    let mut client = TcpStream::connect(("127.0.0.1", port))?;
    client.write_all(b"hello")?;
    ensure!(guest.exchange(listening, b"world", 5)? == b"hello");
    guest.step();
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut got = [0; 5];
    client.read_exact(&mut got)?;
    ensure!(&got == b"world");
    let listed = ask_gateway(&mut guest, "/services/forwarder/all", "")?;
    ensure!(listed.contains(&format!(r#"[{{"local":":{port}","remote":"192.168.127.3:8080","#)), "{listed}");
    // What cannot be listened on is said in Go's words, which callers look for.
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let taken_at = taken.local_addr()?;
    for (local, why) in [
        (taken_at.to_string(), "address already in use"),
        ("192.0.2.1:1".into(), "cannot assign requested address"),
    ] {
        let body = format!(r#"{{"local":"{local}","remote":"192.168.127.3:1"}}"#);
        let said = ask(&api, "POST", "/services/forwarder/expose", &body)?;
        ensure!(said == (500, format!("listen tcp {local}: bind: {why}\n")), "{said:?}");
    }
    // A free port goes by the words it was asked for with; an IPv6 guest has brackets.
    let body = r#"{"local":":0","remote":"[fe80::1]:80"}"#;
    ensure!(ask(&api, "POST", "/services/forwarder/expose", body)?.0 == 200);
    let listed = ask(&api, "GET", "/services/forwarder/all", "")?.1;
    ensure!(listed.contains(r#""remote":"[fe80::1]:80""#), "{listed}");
    let free = r#"{"local":":0"}"#;
    ensure!(ask(&api, "POST", "/services/forwarder/unexpose", free)? == (200, String::new()));
    ensure!(ask(&api, "POST", "/services/forwarder/unexpose", free)? == (500, "proxy not found\n".into()));
    for (route, body, text) in [
        ("/services/forwarder/expose", r#"{"local":"192.0.2.1:1","remote":":1"}"#, "loopback only"),
        (
            "/services/forwarder/expose",
            r#"{"local":":0","remote":"192.168.127.2:22"}"#,
            "its own address only",
        ),
        (
            "/services/forwarder/expose",
            r#"{"local":"/tmp/x","remote":"tcp://192.168.127.3:22","protocol":"unix"}"#,
            "loopback only",
        ),
        (
            "/services/forwarder/unexpose",
            &format!(r#"{{"local":"127.0.0.1:{ssh}","protocol":"tcp"}}"#),
            "proxy not found",
        ),
        ("/leases", "", "404 page not found"),
    ] {
        let answer = ask_gateway(&mut guest, route, body)?;
        ensure!(answer.contains(text), "{route} {body}: {answer}");
    }

    // A tunnel: the two bytes, then the guest's port.
    let listening = guest.listen(2022)?;
    let mut tunnel = UnixStream::connect(&api)?;
    tunnel.set_read_timeout(Some(Duration::from_secs(10)))?;
    tunnel.write_all(b"POST /tunnel?ip=192.168.127.3&port=2022 HTTP/1.1\r\nHost: unix\r\n\r\n")?;
    let mut ok = [0; 2];
    tunnel.read_exact(&mut ok)?;
    ensure!(&ok == b"OK");
    tunnel.write_all(b"through")?;
    ensure!(guest.exchange(listening, b"back", 7)? == b"through");
    guest.step();
    let mut back = [0; 4];
    tunnel.read_exact(&mut back)?;
    ensure!(&back == b"back");
    ensure!(ask(&api, "POST", "/tunnel", "")? == (500, "ip is mandatory\n".into()));

    drop(guest);
    until(Duration::from_secs(10), || gvproxy.0.try_wait().is_ok_and(|s| s.is_some()))?;
    ensure!(gvproxy.0.wait()?.success());
    for name in ["pid", "api", "vm"] {
        ensure!(!path(name).exists(), "{name} was left");
    }
    ensure!(std::fs::metadata(path("log"))?.len() > 0);
    Ok(())
}

#[test]
fn a_vm_comes_in_by_connect_and_others_are_told() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let url = |name: &str| format!("unix://{}", path(name).display());
    let told = UnixListener::bind(path("told"))?;
    let next = || -> Result<String> {
        let (stream, _) = told.accept()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    let (listen, services, notification) = (url("api"), url("services"), url("told"));
    let line = ["-listen", &listen, "-services", &services, "-ssh-port=-1", "-notification", &notification];
    let mut gvproxy = Gvproxy::start(dir.path(), &line)?;
    ensure!(next()? == "{\"notification_type\":\"ready\"}\n");
    wait_for(&path("api"))?;
    ensure!(ask(&path("services"), "POST", "/connect", "")?.0 == 404);
    let mut vm = UnixStream::connect(path("api"))?;
    vm.set_read_timeout(Some(Duration::from_secs(10)))?;
    // ARP for the gateway, in the same segment as the request: nothing is lost.
    let mut arp = vec![0xff; 6];
    arp.extend([
        0x52, 0x54, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0, 0, 9, 192, 168, 127, 9,
    ]);
    arp.extend([0, 0, 0, 0, 0, 0, 192, 168, 127, 1]);
    let mut bytes = b"POST /connect HTTP/1.1\r\nHost: gvproxy\r\nContent-Length: 0\r\n\r\n".to_vec();
    bytes.extend(u16::try_from(arp.len())?.to_le_bytes());
    bytes.extend(&arp);
    vm.write_all(&bytes)?;
    let mut reply = [0; 44];
    vm.read_exact(&mut reply)?;
    ensure!(
        reply[..2] == [42, 0] && reply[22..24] == [0, 2],
        "an ARP reply of 42 bytes, and no HTTP: {reply:?}"
    );
    ensure!(
        next()?
            == "{\"notification_type\":\"connection_established\",\"mac_address\":\"52:54:00:00:00:09\"}\n"
    );
    drop(vm);
    ensure!(
        next()? == "{\"notification_type\":\"connection_closed\",\"mac_address\":\"52:54:00:00:00:09\"}\n"
    );
    ensure!(gvproxy.0.try_wait()?.is_none(), "VMs of /connect come and go");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(gvproxy.0.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    ensure!(gvproxy.0.wait()?.success());
    Ok(())
}

#[test]
fn exit_codes_are_gvproxys() -> Result<()> {
    let run = |args: &[&str]| -> Result<(Option<i32>, String)> {
        let out = Command::new(portway()?).arg("gvproxy").args(args).output()?;
        Ok((out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
    };
    let (code, said) = run(&["-version"])?;
    ensure!(code == Some(0) && said.starts_with("gvproxy version "), "{said}");
    let (code, said) = run(&["-nonsense"])?;
    ensure!(
        code == Some(2)
            && said.contains("flag provided but not defined: -nonsense")
            && said.contains("Usage of gvproxy")
    );
    let (code, said) = run(&["-mtu", "1500"])?;
    ensure!(code == Some(1) && said.contains("no VM can come"), "{said}");
    let taken = tempfile::NamedTempFile::new()?;
    let (code, said) = run(&["-listen-qemu", &format!("unix://{}", taken.path().display())])?;
    ensure!(code == Some(1) && said.contains("already exists"), "{said}");
    Ok(())
}

/// ARP for the gateway from `last`, as an Ethernet frame.
fn arp(last: u8) -> Vec<u8> {
    let mac = [0x52, 0x54, 0, 0, 0, last];
    let mut frame =
        [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &[192, 168, 127, last]].concat();
    frame.extend([0, 0, 0, 0, 0, 0, 192, 168, 127, 1]);
    frame
}

#[test]
fn podmans_line_for_vfkit_meets_a_vm_on_its_datagrams() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    let (ssh, url) = (free_port()?.to_string(), format!("unixgram://{}", text("vm")));
    let made =
        Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path("key")).status()?;
    ensure!(made.success(), "ssh-keygen");
    let (sock, key, pid, log) = (text("api"), text("key"), text("pid"), text("log"));
    let mut line = vec!["-debug", "-mtu", "1500", "-ssh-port", &ssh, "-listen-vfkit", &url];
    line.extend([
        "-forward-dest",
        "/run/podman/podman.sock",
        "-forward-user",
        "root",
        "-forward-identity",
        &key,
    ]);
    line.extend(["-forward-sock", &sock, "-pid-file", &pid, "-log-file", &log]);
    let mut gvproxy = Gvproxy::start(dir.path(), &line)?;
    wait_for(&path("pid"))?;
    wait_for(&path("api"))?;
    // As vfkit: bound beside it, the magic first, then frames.
    let vm = std::os::unix::net::UnixDatagram::bind(path("vfkit.sock"))?;
    vm.set_read_timeout(Some(Duration::from_secs(10)))?;
    vm.connect(path("vm"))?;
    vm.send(b"VFKT")?;
    vm.send(&arp(2))?;
    let mut reply = [0; 1514];
    let n = vm.recv(&mut reply)?;
    ensure!(n >= 42 && reply[20..22] == [0, 2] && reply[28..32] == [192, 168, 127, 1], "{:?}", &reply[..n]);
    ensure!(TcpStream::connect(("127.0.0.1", ssh.parse()?)).is_ok(), "the port of SSH is there");
    let id = nix::unistd::Pid::from_raw(i32::try_from(gvproxy.0.id())?);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM)?;
    ensure!(gvproxy.0.wait()?.success());
    ensure!(!path("pid").exists() && !path("api").exists() && !path("vm").exists());
    Ok(())
}

#[test]
fn wsls_line_carries_frames_on_standard_input_and_output() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // What `gvforwarder -url stdio:GVPROXY?listen-stdio=accept&ssh-port=-1` starts.
    let mut command = Command::new(portway()?);
    command.args(["gvproxy", "-listen-stdio=accept", "-ssh-port=-1"]).env("XDG_RUNTIME_DIR", dir.path());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut input = child.stdin.take().context("no pipe")?;
    let mut output = child.stdout.take().context("no pipe")?;
    let frame = arp(2);
    input.write_all(&[&u16::try_from(frame.len())?.to_le_bytes()[..], &frame].concat())?;
    let mut reply = [0; 44];
    output.read_exact(&mut reply)?;
    ensure!(reply[..2] == [42, 0] && reply[22..24] == [0, 2], "{reply:?}");
    // The VM's end is the network's.
    drop(input);
    ensure!(child.wait()?.success());
    Ok(())
}

#[test]
fn zones_of_the_file_and_of_the_api_are_answered_and_listed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let config = format!(
        "listen:\n  - unix://{}\ninterfaces:\n  qemu: unix://{}\nstack:\n  dns:\n    - name: crc.testing.\n      records:\n        \
         - {{name: api, ip: 10.0.0.7}}\n        - {{regexp: '^app-.*', ip: 10.0.0.8}}\n    - name: apps.test.\n      defaultIP: 10.0.0.9\n",
        path("api").display(),
        path("vm").display()
    );
    std::fs::write(path("config.yaml"), config)?;
    let file = path("config.yaml").display().to_string();
    let _gvproxy = Gvproxy::start(dir.path(), &["-config", &file])?;
    wait_for(&path("api"))?;
    wait_for(&path("vm"))?;
    let mut guest = Guest::attach(&path("vm"), 1)?;
    guest.dhcp()?;
    let mut asked = |name: &str| -> Result<(u8, Option<[u8; 4]>)> {
        let mut query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0".to_vec();
        for label in name.split('.') {
            query.push(u8::try_from(label.len())?);
            query.extend(label.bytes());
        }
        query.extend([0, 0, 1, 0, 1]);
        let (_, answer) = guest.ask_udp(5353, "192.168.127.1:53".parse()?, &query)?;
        let address = (answer[7] == 1).then(|| answer[answer.len() - 4..].try_into()).transpose()?;
        Ok((answer[3] & 15, address))
    };
    for (name, answer) in [
        ("api.crc.testing", (0, Some([10, 0, 0, 7]))),
        ("App-1.x.crc.testing", (0, Some([10, 0, 0, 8]))),
        ("none.crc.testing", (3, None)),
        ("whatever.apps.test", (0, Some([10, 0, 0, 9]))),
        ("host.containers.internal", (0, Some([192, 168, 127, 254]))),
    ] {
        ensure!(asked(name)? == answer, "{name}: {:?}", asked(name)?);
    }
    let zone = r#"{"name":"crc.testing.","records":[{"Name":"none","IP":"10.0.0.1"},{"NAME":"api","ip":"10.0.0.2"}]}"#;
    ensure!(ask(&path("api"), "POST", "/services/dns/add", zone)? == (200, String::new()));
    let more =
        r#"{"Name":"docker.internal.","Records":[{"Name":"kubernetes","IP":"10.0.0.3"}],"DefaultIP":null}"#;
    ensure!(ask(&path("api"), "POST", "/services/dns/add", more)? == (200, String::new()));
    for (name, answer) in [
        ("none.crc.testing", (0, Some([10, 0, 0, 1]))),
        ("api.crc.testing", (0, Some([10, 0, 0, 2]))),
        ("app-1.crc.testing", (0, Some([10, 0, 0, 8]))),
        ("kubernetes.docker.internal", (0, Some([10, 0, 0, 3]))),
        ("host.docker.internal", (0, Some([192, 168, 127, 254]))),
    ] {
        ensure!(asked(name)? == answer, "{name}: {:?}", asked(name)?);
    }
    let own = r#"{"Name":"gateway","IP":"192.168.127.1"},{"Name":"host","IP":"192.168.127.254"}"#;
    let listed = format!(
        concat!(
            r#"[{{"Name":"containers.internal.","Records":[{own}],"DefaultIP":""}},"#,
            r#"{{"Name":"docker.internal.","Records":[{{"Name":"kubernetes","IP":"10.0.0.3"}},{own}],"DefaultIP":""}},"#,
            r#"{{"Name":"crc.testing.","Records":[{{"Name":"none","IP":"10.0.0.1"}},{{"Name":"api","IP":"10.0.0.2"}},"#,
            r#"{{"Name":"api","IP":"10.0.0.7"}},{{"Name":"","IP":"10.0.0.8","Regexp":"^app-.*"}}],"DefaultIP":""}},"#,
            r#"{{"Name":"apps.test.","Records":[],"DefaultIP":"10.0.0.9"}}]"#,
            "\n"
        ),
        own = own
    );
    let said = ask(&path("api"), "GET", "/services/dns/all", "")?;
    ensure!(said == (200, listed.clone()), "{}\n{listed}", said.1);
    Ok(())
}

#[test]
fn a_port_of_the_hosts_vsock_is_listened_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let port = 0x7000_0000 + std::process::id() % 0xffff;
    let url = format!("vsock://:{port}");
    let mut gvproxy = Gvproxy::start(dir.path(), &["-listen", &url, "-ssh-port=-1"])?;
    let log = || std::fs::read_to_string(dir.path().join("stderr")).unwrap_or_default();
    let mut ended = None;
    until(Duration::from_secs(10), || {
        ended = gvproxy.0.try_wait().ok().flatten();
        ended.is_some() || log().contains("ready")
    })?;
    if log().contains("no AF_VSOCK") {
        eprintln!("skipped: this kernel has no AF_VSOCK");
        return Ok(());
    }
    ensure!(ended.is_none(), "{}", log());
    // A second one cannot have it.
    let out = Command::new(portway()?).args(["gvproxy", "-listen", &url, "-ssh-port=-1"]).output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(
        out.status.code() == Some(1) && said.contains(&format!("cannot listen on vsock port {port}")),
        "{said}"
    );
    // A client, where the kernel has a loopback for vsock.
    let socket = socket2::Socket::new(nix::libc::AF_VSOCK.into(), socket2::Type::STREAM, None)?;
    let address = socket2::SockAddr::vsock(1, port);
    if let Err(error) = socket.connect_timeout(&address, Duration::from_secs(1)) {
        eprintln!(
            "left out: no loopback of vsock here ({error}): that it listens has been seen, not what it answers"
        );
        return Ok(());
    }
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"GET /services/forwarder/all HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("[]\n"), "{answer}");
    Ok(())
}
