//! Portway under the names of slirp4netns and vpnkit, with the programs that call those: rootlesskit and `unshare -Urn`.
//!
//! Namespaces need root here, to look inside; without, the tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::host::free_port;
use portway_tests::namespace::{Namespace, Unprivileged};
use portway_tests::program::{PATIENCE, Program, ask, left_out, named, rootlesskit, run};

const UUID: &[u8; 36] = b"d7a1e0c6-8a5c-4b6e-9f0e-0123456789ab";
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));
const RESOLVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 3));
const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 100));

/// Answers each connection with `text` and whom it sees, for ever.
fn greeter(listener: TcpListener, text: &'static str) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            // An answer before its request is none to a proxy; who asks nothing is greeted all the same.
            let (mut head, mut byte) = (Vec::new(), [0]);
            let _ = stream.set_read_timeout(Some(std::time::Duration::from_secs(1)));
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                head.push(byte[0]);
            }
            let from = stream.peer_addr().map_or_else(|e| e.to_string(), |a| a.ip().to_string());
            let body = format!("{text} {from}");
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = stream.write_all((head + &body).as_bytes());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
}

/// What a greeter says; `None` when nobody takes the connection.
fn greeting(at: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut text = String::new();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    stream.read_to_string(&mut text).ok()?;
    text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

/// slirp4netns for `namespace`, ready.
fn slirp(dir: &Path, target: &[&str], options: &[&str]) -> Result<Program> {
    let program = named(dir, "slirp4netns")?;
    let fifo = dir.join("ready");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let script = "exec 7>\"$0\"; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(&fifo).arg(program).args(["-r", "7", "-c"]).args(options).args(target);
    let process = Program::start(&mut command, &dir.join("log"))?;
    let mut ready = String::new();
    std::fs::File::open(&fifo)?.read_to_string(&mut ready)?;
    ensure!(ready == "1", "ready is {ready:?}: {}", process.log());
    Ok(process)
}

#[test]
fn slirp4netns_sets_a_namespace_up_and_connects_it() -> Result<()> {
    let Some(namespace) = Unprivileged::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let pid = namespace.pid().to_string();
    let options = ["--mtu=65520", "--macaddress=02:00:00:00:00:09"];
    let mut slirp = slirp(dir.path(), &[&pid, "tap0"], &options)?;
    let shown = namespace.ip(&["address", "show", "tap0"])?;
    for part in ["UP", "mtu 65520", "02:00:00:00:00:09", "10.0.2.100/24 brd 10.0.2.255"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(namespace.ip(&["route"])?.contains("default via 10.0.2.2 dev tap0"));
    assert!(namespace.ip(&["address", "show", "lo"])?.contains("UP"));

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    greeter(listener, "hello");
    let said = namespace.inside(|| Ok(greeting(SocketAddr::new(GATEWAY, port))))?;
    assert_eq!(said.as_deref(), Some("hello 127.0.0.1"));
    // A refused port is refused.
    let free = free_port()?;
    assert_eq!(namespace.inside(|| Ok(greeting(SocketAddr::new(GATEWAY, free))))?, None);

    // Datagrams reach the host, and the resolver answers: its own names, as no network is needed for them.
    let host = UdpSocket::bind("127.0.0.1:0")?;
    host.set_read_timeout(Some(PATIENCE))?;
    let at = host.local_addr()?.port();
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07gateway\x07portway\x08internal\0\0\x01\0\x01";
    let (answer, echo) = namespace.inside(|| {
        let socket = UdpSocket::bind((GUEST, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut bytes = [0; 512];
        socket.send_to(query, (RESOLVER, 53))?;
        let (n, from) = socket.recv_from(&mut bytes)?;
        ensure!(from == SocketAddr::new(RESOLVER, 53), "{from} answered");
        let answer = bytes[..n].to_vec();
        socket.send_to(b"ping", (GATEWAY, at))?;
        let (n, from) = host.recv_from(&mut bytes)?;
        host.send_to(&bytes[..n], from)?;
        let (n, from) = socket.recv_from(&mut bytes)?;
        Ok((answer, (bytes[..n].to_vec(), from)))
    })?;
    assert_eq!((&answer[..2], &answer[answer.len() - 4..]), (&query[..2], &[10, 0, 2, 2][..]));
    assert_eq!(echo, (b"ping".to_vec(), SocketAddr::new(GATEWAY, at)));
    assert_eq!(slirp.stop()?.code(), Some(0));
    Ok(())
}

#[test]
fn slirp4netns_keeps_the_hosts_loopback_and_the_resolver_to_itself_when_told_so() -> Result<()> {
    let Some(namespace) = Unprivileged::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let (user, net) = (namespace.path("user"), namespace.path("net"));
    let userns = format!("--userns-path={}", user.display());
    let options =
        ["--netns-type=path", &userns, "--disable-host-loopback", "--disable-dns", "--cidr=10.7.0.0/16"];
    let _slirp = slirp(dir.path(), &[&net.to_string_lossy(), "tap0"], &options)?;
    assert!(namespace.ip(&["address"])?.contains("10.7.0.100/16"));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    greeter(listener, "hello");
    assert_eq!(namespace.inside(|| Ok(greeting(SocketAddr::from(([10, 7, 0, 2], port)))))?, None);
    let resolver = SocketAddr::from(([10, 7, 0, 3], 53));
    assert!(namespace.inside(|| Ok(TcpStream::connect_timeout(&resolver, PATIENCE).is_err()))?);
    Ok(())
}

#[test]
fn slirp4netns_publishes_by_its_api_to_the_byte() -> Result<()> {
    let Some(namespace) = Unprivileged::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let api = dir.path().join("api");
    let socket = format!("--api-socket={}", api.display());
    let mut slirp = slirp(dir.path(), &[&namespace.pid().to_string(), "tap0"], &[&socket])?;
    greeter(namespace.inside(|| Ok(TcpListener::bind((GUEST, 80))?))?, "inside");
    let says = |request: &str| -> Result<String> { Ok(String::from_utf8(ask(&api, request.as_bytes())?)?) };
    let (tcp, udp) = (free_port()?, free_port()?);
    let add = format!(
        r#"{{"execute":"add_hostfwd","arguments":{{"proto":"tcp","host_addr":"127.0.0.1","host_port":{tcp},"guest_addr":"10.0.2.100","guest_port":80}}}}"#
    );
    assert_eq!(says(&add)?, r#"{"return":{"id":1}}"#);
    assert_eq!(greeting(SocketAddr::from(([127, 0, 0, 1], tcp))).as_deref(), Some("inside 10.0.2.2"));
    let twice = says(&add)?;
    assert!(
        twice.starts_with(r#"{"error":{"desc":"bad request: add_hostfwd: slirp_add_hostfwd failed"#),
        "{twice}"
    );
    let more = format!(
        r#"{{"execute":"add_hostfwd","arguments":{{"proto":"udp","host_port":{udp},"guest_port":53}}}}"#
    );
    assert_eq!(says(&more)?, r#"{"return":{"id":2}}"#);
    let entries = format!(
        concat!(
            r#"{{"entries":[{{"id":1,"proto":"tcp","host_addr":"127.0.0.1","host_port":{},"guest_addr":"10.0.2.100","guest_port":80}},"#,
            r#"{{"id":2,"proto":"udp","host_addr":"0.0.0.0","host_port":{},"guest_addr":"10.0.2.100","guest_port":53}}]}}"#
        ),
        tcp, udp
    );
    assert_eq!(says(r#"{"execute":"list_hostfwd"}"#)?, entries);
    // None of these changes anything.
    let long = " ".repeat(5000);
    for (request, fault) in [
        ("", "cannot parse JSON"),
        (r#"{"execute"#, "cannot parse JSON"),
        ("[]", "json_object() failed"),
        ("{}", "no execute found"),
        (r#"{"execute":3}"#, "no execute found"),
        (r#"{"execute":"exit"}"#, "unknown execute"),
        (r#"{"execute":"add_hostfwd"}"#, "add_hostfwd: bad arguments.proto"),
        (r#"{"execute":"remove_hostfwd"}"#, "remove_hostfwd: bad arguments.id"),
        (r#"{"execute":"remove_hostfwd","arguments":{"id":77}}"#, "remove_hostfwd: bad arguments.id"),
        (r#"{"execute":"remove_hostfwd","arguments":{"id":"1"}}"#, "remove_hostfwd: bad arguments.id"),
        (&long, "too large message"),
    ] {
        let expected = format!(r#"{{"error":{{"desc":"bad request: {fault}"}}}}"#);
        assert_eq!(says(request)?, expected, "{request}");
    }
    assert_eq!(says(r#"{"execute":"list_hostfwd"}"#)?, entries);
    assert_eq!(says(r#"{"execute":"remove_hostfwd","arguments":{"id":1}}"#)?, r#"{"return":{}}"#);
    assert_eq!(greeting(SocketAddr::from(([127, 0, 0, 1], tcp))), None);
    assert_eq!(slirp.stop()?.code(), Some(0));
    assert!(!api.exists());
    Ok(())
}

#[test]
fn slirp4netns_ends_with_its_exit_fd_and_says_what_is_wrong_with_1() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = named(dir.path(), "slirp4netns")?;
    let own = std::process::id().to_string();
    for (args, fault) in [
        (&["--bogus", "1", "tap0"][..], "--bogus"),
        (&["1"], "TAPNAME"),
        (&["x", "tap0"], "PID must be a positive integer"),
        (&["4194304999", "tap0"], "No such file"),
        (&["-e", "99", &own, "tap0"], "--exit-fd: descriptor 99"),
        (&["--cidr=10.0.2.1/24", &own, "tap0"], "CIDR needs to be a network address"),
    ] {
        let out = run(&program, args)?;
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("slirp4netns: ") && said.contains(fault), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    // What callers look for before they use an option.
    let help = String::from_utf8(run(&program, &["--help"])?.stdout)?;
    for option in
        ["--netns-type", "--disable-host-loopback", "--api-socket", "--cidr", "--userns-path", "--configure"]
    {
        assert!(help.contains(option), "{option}: {help}");
    }
    assert!(String::from_utf8(run(&program, &["-v"])?.stdout)?.starts_with("slirp4netns version 1."));

    let Some(namespace) = Unprivileged::new()? else { return Ok(()) };
    let script = "{ sleep 1; } | { exec 8<&0; exec \"$0\" -e 8 \"$1\" tap0; }";
    let pid = namespace.pid().to_string();
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(&program).arg(pid);
    let mut ended = Program::start(&mut command, &dir.path().join("log"))?;
    assert_eq!(ended.end()?.code(), Some(0), "{}", ended.log());
    Ok(())
}

#[test]
fn rootlesskit_has_its_network_from_us_as_slirp4netns() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = named(dir.path(), "slirp4netns")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let outside = listener.local_addr()?.port();
    greeter(listener, "outside");
    let port = free_port()?;
    let binary = format!("--slirp4netns-binary={}", program.display());
    let publish = format!("127.0.0.1:{port}:80/tcp");
    let options =
        ["--net=slirp4netns", &binary, "--copy-up=/etc", "--port-driver=slirp4netns", "-p", publish.as_str()];
    // What it sees of the host, then a web server until it is stopped.
    let script = format!(
        "cat /etc/resolv.conf; curl -sS --max-time 10 http://10.0.2.2:{outside}/; cd /proc/self/net; exec python3 -m http.server 80"
    );
    let log = dir.path().join("log");
    let Some(mut kit) = rootlesskit(dir.path(), &options, &script, &log)? else { return Ok(()) };
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let mut page = None;
    kit.until("the published web server", || {
        page = greeting(at).filter(|p| p.contains("Directory listing"));
        page.is_some()
    })?;
    let said = kit.log();
    assert!(said.contains("nameserver 10.0.2.3") && said.contains("outside 127.0.0.1"), "{said}");
    page.context("no page")?;
    Ok(())
}

#[test]
fn rootlesskit_has_its_network_from_us_as_vpnkit() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = named(dir.path(), "vpnkit")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let outside = listener.local_addr()?.port();
    greeter(listener, "outside");
    let port = free_port()?;
    let binary = format!("--vpnkit-binary={}", program.display());
    let publish = format!("127.0.0.1:{port}:80/tcp");
    let options =
        ["--net=vpnkit", &binary, "--copy-up=/etc", "--port-driver=builtin", "-p", publish.as_str()];
    let script = format!(
        "cat /etc/resolv.conf; curl -sS --max-time 10 http://192.168.65.2:{outside}/; echo; curl -sS --max-time 10 http://host.internal:{outside}/; cd /proc/self/net; exec python3 -m http.server 80"
    );
    let log = dir.path().join("log");
    let Some(mut kit) = rootlesskit(dir.path(), &options, &script, &log)? else { return Ok(()) };
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let mut page = None;
    let served = kit.until("the published web server", || {
        page = greeting(at).filter(|p| p.contains("Directory listing"));
        page.is_some()
    });
    if left_out(&kit) {
        return Ok(());
    }
    served?;
    let said = kit.log();
    assert!(said.contains("nameserver 192.168.65.1"), "{said}");
    assert_eq!(said.matches("outside 127.0.0.1").count(), 2, "{said}");
    Ok(())
}

/// Debian builds rootlesskit without its vpnkit driver; here is what that driver does, in its order (its `pkg/network/vpnkit`).
#[test]
fn what_rootlesskits_driver_does_finds_vpnkit_here() -> Result<()> {
    let Some(child) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let ethernet = dir.path().join("vpnkit-ethernet.sock");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let outside = listener.local_addr()?.port();
    greeter(listener, "outside");
    // It is killed with its parent; `--host-ip 0.0.0.0` is added when the host's loopback is not to be reached.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(&ethernet).args(["--mtu", "1500"]);
    let mut vpnkit = Program::start(&mut command, &dir.path().join("log"))?;
    vpnkit.until("its socket", || ethernet.exists())?;
    // A first connection, for the address alone; then the one that stays, under the same UUID.
    let mut first = Guest::attach_vpnkit(&ethernet, UUID)?;
    let (address, gateway, resolvers) = first.dhcp()?;
    ensure!((gateway, &resolvers[..]) == ([192, 168, 65, 1].into(), &[[192, 168, 65, 1].into()][..]));
    drop(first);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/vpnkit-tap.py");
    let mut tap = child.command("python3");
    tap.arg(script).arg(&ethernet).arg(std::str::from_utf8(UUID)?).arg(address.to_string());
    let mut tap = Program::start(&mut tap, &dir.path().join("tap"))?;
    tap.until("the tap", || {
        std::fs::read_to_string(dir.path().join("tap")).is_ok_and(|t| t.contains("ready"))
    })?;
    // The child's resolv.conf says 192.168.65.1.
    child.resolve_with("192.168.65.1".parse()?)?;
    for place in ["192.168.65.2", "host.internal"] {
        let (done, said) = child.run(&format!("curl -sS --max-time 10 http://{place}:{outside}/"))?;
        ensure!(done && said == "outside 127.0.0.1", "{place}: {said} {}", vpnkit.log());
    }
    let (done, said) = child.run("curl -sS --max-time 10 http://192.168.65.1:9/")?;
    ensure!(!done && said.contains("Failed to connect"), "{said}");
    Ok(())
}

/// An HTTP request to the socket at `path`: the status and the body.
fn http(path: &Path, method: &str, route: &str, body: &str) -> Result<(u16, String)> {
    let head = format!(
        "{method} {route} HTTP/1.1\r\nHost: vpnkit\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = String::from_utf8(ask(path, (head + body).as_bytes())?)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    Ok((head.split(' ').nth(1).context("no status")?.parse()?, body.to_owned()))
}

#[test]
fn vpnkit_forwards_ports_by_http_within_what_is_allowed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ethernet, port) = (dir.path().join("eth"), dir.path().join("port"));
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(&ethernet).arg("--port").arg(&port);
    command.args(["--allowed-bind-addresses", "127.0.0.1"]);
    let mut vpnkit = Program::start(&mut command, &dir.path().join("log"))?;
    vpnkit.until("its sockets", || port.exists() && ethernet.exists())?;
    let mut guest = Guest::attach_vpnkit(&ethernet, UUID)?;
    let (address, gateway, resolvers) = guest.dhcp()?;
    assert_eq!(address.octets()[..3], [192, 168, 65]);
    assert_eq!((gateway, resolvers), (Ipv4Addr::new(192, 168, 65, 1), vec![Ipv4Addr::new(192, 168, 65, 1)]));

    assert_eq!(http(&port, "GET", "/forwards/list", "")?, (200, "null".into()));
    let body = format!(r#"{{"proto":"tcp","out_ip":"127.0.0.1","in_ip":"{address}","in_port":80}}"#);
    // Twice is once.
    for method in ["PUT", "POST"] {
        assert_eq!(http(&port, method, "/forwards/expose/port", &body)?, (200, String::new()));
    }
    let (_, listed) = http(&port, "GET", "/forwards/list", "")?;
    let list: serde_json::Value = serde_json::from_str(&listed)?;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{listed}");
    let real = u16::try_from(list[0]["out_port"].as_u64().context("no port")?)?;
    let at = SocketAddr::from(([127, 0, 0, 1], real));
    let client = std::thread::spawn(move || greeting(at));
    let listener = guest.listen(80)?;
    guest.exchange(listener, b"HTTP/1.0 200 OK\r\n\r\nguest", 1)?;
    guest.tcp(listener).close();
    guest.until("the client", |_| client.is_finished().then_some(()))?;
    assert_eq!(client.join().unwrap().as_deref(), Some("guest"));

    let taken = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let _holder = TcpListener::bind(("127.0.0.1", taken))?;
    for (body, fault) in [
        (body.replace("127.0.0.1", "127.0.0.2"), "is not one of --allowed-bind-addresses"),
        (body.replace(r#""in_ip""#, &format!(r#""out_port":{taken},"in_ip""#)), "port is already allocated"),
        (body.replace(&address.to_string(), "172.17.0.2"), "is not an address of the guests' network"),
        (body.replace("\"tcp\"", "\"unix\""), "unexpected protocol"),
        ("{".into(), "EOF"),
        (body.replace("80", "\"80\""), "invalid type"),
    ] {
        let (status, said) = http(&port, "PUT", "/forwards/expose/port", &body)?;
        assert!(status == 400 && said.contains(fault), "{body}: {status} {said}");
    }
    assert_eq!(http(&port, "GET", "/forwards/list", "")?.1, listed);
    assert_eq!(http(&port, "PUT", "/forwards/expose/port", &"x".repeat(100_000))?.0, 413);
    assert_eq!(http(&port, "GET", "/forwards", "")?.0, 404);
    for _ in 0..2 {
        assert_eq!(http(&port, "DELETE", "/forwards/unexpose/port", &body)?, (200, String::new()));
    }
    assert_eq!(greeting(at), None);
    assert_eq!(vpnkit.stop()?.code(), Some(0));
    assert!(!port.exists() && !ethernet.exists());
    Ok(())
}

#[test]
fn a_vpnkit_vm_that_comes_again_has_its_address_and_its_old_connection_ends() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ethernet = dir.path().join("eth");
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(&ethernet).args(["--host-names", "box.test", "--hosts", ""]);
    command.args(["--lowest-ip", "192.168.65.40", "--domain", "lan.test"]);
    let host = TcpListener::bind("127.0.0.1:0")?;
    let to = host.local_addr()?.port();
    greeter(host, "host");
    command.args(["--tcpv4-forwards", &format!("8080:127.0.0.1:{to}")]);
    let mut vpnkit = Program::start(&mut command, &dir.path().join("log"))?;
    vpnkit.until("its socket", || ethernet.exists())?;
    let mut first = Guest::attach_vpnkit(&ethernet, UUID)?;
    let address = first.dhcp()?.0;
    assert_eq!(address, Ipv4Addr::new(192, 168, 65, 40));
    let mut second = Guest::attach_vpnkit(&ethernet, UUID)?;
    assert_eq!(second.dhcp()?.0, address);
    portway_tests::sidecar::until(PATIENCE, || first.step())?;
    // Names, a port of the gateway that leads to the host, and the host itself.
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03box\x04test\0\0\x01\0\x01";
    let (from, answer) = second.ask_udp(5353, "192.168.65.1:53".parse()?, query)?;
    assert_eq!(from, "192.168.65.1:53".parse()?);
    assert_eq!(answer[answer.len() - 4..], [192, 168, 65, 2]);
    for at in ["192.168.65.1:8080".parse()?, SocketAddr::from(([192, 168, 65, 2], to))] {
        let flow = second.connect(at)?.context("refused")?;
        let said = second.exchange(flow, b"GET / HTTP/1.0\r\n\r\n", 50)?;
        assert!(String::from_utf8_lossy(&said).contains("host 127.0.0.1"));
        // The server answers one client after the other.
        second.tcp(flow).abort();
    }
    assert!(second.connect("192.168.65.1:8081".parse()?)?.is_none());
    Ok(())
}

#[test]
fn vpnkit_takes_sockets_that_listen_already_and_answers_diagnostics() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ethernet, port, diagnostics, introspection) =
        (dir.path().join("eth"), dir.path().join("port"), dir.path().join("diag"), dir.path().join("look"));
    let sockets = [&ethernet, &port].map(|path| std::os::unix::net::UnixListener::bind(path).unwrap());
    let mut command = Command::new("sh");
    // As linuxkit hands them over: by number.
    let line =
        "exec \"$0\" --ethernet fd:0 --port fd:3 --diagnostics \"$1\" --introspection \"$2\" 3<&1 >/dev/null";
    command.args(["-c", line]).arg(named(dir.path(), "vpnkit")?).arg(&diagnostics).arg(&introspection);
    let [eth, ports] = sockets;
    command.stdin(std::os::fd::OwnedFd::from(eth)).stdout(std::os::fd::OwnedFd::from(ports));
    command.stderr(std::fs::File::create(dir.path().join("log"))?);
    let mut child = command.spawn()?;
    let ended = (|| -> Result<()> {
        portway_tests::sidecar::until(PATIENCE, || diagnostics.exists() && introspection.exists())?;
        let mut guest = Guest::attach_vpnkit(&ethernet, UUID)?;
        let address = guest.dhcp()?.0;
        assert_eq!(http(&port, "GET", "/forwards/list", "")?, (200, "null".into()));
        let archive = dir.path().join("d.tar");
        std::fs::write(&archive, ask(&diagnostics, b"")?)?;
        let listed = run(Path::new("tar"), &["-tf", &archive.to_string_lossy()])?;
        let captures =
            ["all", "dns", "ntp", "icmp", "http_proxy", "bad"].map(|c| format!("capture/{c}.pcap\n"));
        let all = format!("connections\nflows\nendpoints\nports\n{}", captures.concat());
        assert_eq!(String::from_utf8(listed.stdout)?, all);
        let file = |name: &str| -> Result<Vec<u8>> {
            Ok(run(Path::new("tar"), &["-xOf", &archive.to_string_lossy(), name])?.stdout)
        };
        assert!(String::from_utf8(file("endpoints")?)?.contains(&address.to_string()));

        // The guest asks the resolver; the frames are there for who asks afterwards, whole where they are of a kind.
        let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04host\x08internal\0\0\x01\0\x01";
        guest.ask_udp(5353, "192.168.65.1:53".parse()?, query)?;
        let mut archive_has = Vec::new();
        portway_tests::sidecar::until(PATIENCE, || {
            archive_has = ask(&diagnostics, b"").unwrap_or_default();
            std::fs::write(&archive, &archive_has).is_ok()
                && file("capture/dns.pcap")
                    .is_ok_and(|pcap| pcap.windows(13).any(|w| w == b"host\x08internal"))
        })?;
        let pcap = dir.path().join("all.pcap");
        std::fs::write(&pcap, file("capture/all.pcap")?)?;
        let words =
            ["-r", &pcap.to_string_lossy(), "-T", "fields", "-e", "frame.cap_len", "-e", "_ws.col.Protocol"];
        let read = String::from_utf8(run(Path::new("tshark"), &words)?.stdout)?;
        assert!(read.contains("128\t") && read.contains("DNS"), "{read}");

        // The same as files, over 9P: what the tree has, and one of them.
        let mut tree = Nine::connect(&introspection)?;
        assert_eq!(tree.list(&[])?, ["connections", "flows", "endpoints", "ports", "capture"]);
        assert_eq!(tree.list(&["capture"])?.len(), 6);
        assert!(String::from_utf8(tree.read(&["endpoints"])?)?.contains(&address.to_string()));
        assert_eq!(tree.read(&["capture", "dns.pcap"])?, file("capture/dns.pcap")?);
        assert!(tree.read(&["capture", "none.pcap"]).is_err());
        assert!(tree.write(&["ports"]).is_err());
        Ok(())
    })();
    child.kill()?;
    child.wait()?;
    ended.with_context(|| std::fs::read_to_string(dir.path().join("log")).unwrap_or_default())
}

/// A 9P client (9P2000): a connection, and the next fid.
struct Nine(std::os::unix::net::UnixStream, u32);

impl Nine {
    fn connect(path: &Path) -> Result<Self> {
        let stream = std::os::unix::net::UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut nine = Self(stream, 1);
        nine.ask(100, &[&8192_u32.to_le_bytes()[..], &[6, 0], b"9P2000"].concat())?;
        nine.ask(104, &[&[0; 4][..], &[0xff; 4], &[0; 4]].concat())?;
        Ok(nine)
    }

    /// The answer's body; an error where the answer is one.
    fn ask(&mut self, kind: u8, body: &[u8]) -> Result<Vec<u8>> {
        let size = u32::try_from(body.len() + 7)?.to_le_bytes();
        self.0.write_all(&[&size[..], &[kind, 1, 0], body].concat())?;
        let mut size = [0; 4];
        self.0.read_exact(&mut size)?;
        let mut answer = vec![0; usize::try_from(u32::from_le_bytes(size))? - 4];
        self.0.read_exact(&mut answer)?;
        ensure!(answer[0] == kind + 1, "{}", String::from_utf8_lossy(&answer));
        Ok(answer[3..].to_vec())
    }

    /// Walks from the root and opens; the fid.
    fn open(&mut self, names: &[&str], mode: u8) -> Result<[u8; 4]> {
        self.1 += 1;
        let (fid, count) = (self.1.to_le_bytes(), u16::try_from(names.len())?.to_le_bytes());
        let mut walk = [&[0; 4][..], &fid, &count].concat();
        for name in names {
            walk.extend(u16::try_from(name.len())?.to_le_bytes());
            walk.extend(name.as_bytes());
        }
        let found = self.ask(110, &walk)?;
        ensure!(found[..2] == count, "no {names:?}");
        self.ask(112, &[&fid[..], &[mode]].concat())?;
        Ok(fid)
    }

    fn write(&mut self, names: &[&str]) -> Result<()> {
        self.open(names, 1).map(drop)
    }

    fn read(&mut self, names: &[&str]) -> Result<Vec<u8>> {
        let fid = self.open(names, 0)?;
        let mut all = Vec::new();
        loop {
            let offset = u64::try_from(all.len())?.to_le_bytes();
            let part = self.ask(116, &[&fid[..], &offset, &4096_u32.to_le_bytes()].concat())?;
            if part.len() == 4 {
                self.ask(120, &fid)?;
                return Ok(all);
            }
            all.extend(&part[4..]);
        }
    }

    /// The names in a directory.
    fn list(&mut self, names: &[&str]) -> Result<Vec<String>> {
        let bytes = self.read(names)?;
        let (mut rest, mut found) = (&bytes[..], Vec::new());
        while let [a, b, stat @ ..] = rest {
            let size = usize::from(u16::from_le_bytes([*a, *b]));
            // stat(5): type, dev, qid, mode, times and length come before the name.
            let name = &stat[2 + 4 + 13 + 4 + 4 + 4 + 8..size];
            let length = usize::from(u16::from_le_bytes([name[0], name[1]]));
            found.push(String::from_utf8(name[2..2 + length].to_vec())?);
            rest = &stat[size..];
        }
        Ok(found)
    }
}

/// vpnkit's Go client, with which rootlesskit asks for its address, sends a DHCPDISCOVER whose IPv4 header has no sum, and looks for
/// the kind of the answer where the first option stands.
#[test]
fn the_address_of_vpnkits_go_client_is_offered_as_it_reads_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ethernet = dir.path().join("eth");
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    let mut vpnkit = Program::start(command.arg("--ethernet").arg(&ethernet), &dir.path().join("log"))?;
    vpnkit.until("its socket", || ethernet.exists())?;
    let mut stream = std::os::unix::net::UnixStream::connect(&ethernet)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[&b"VMN3T"[..], &22_u32.to_le_bytes(), &[b'0'; 40]].concat())?;
    stream.read_exact(&mut [0; 49])?;
    stream.write_all(&[&[1][..], UUID, &[0; 4]].concat())?;
    let mut vif = [0; 258];
    stream.read_exact(&mut vif)?;
    let mac = &vif[5..11];
    // BOOTREQUEST of Ethernet, to be answered by broadcast; one option.
    let mut dhcp = [&[1, 1, 6, 0, 1, 0, 0, 0, 0, 0, 0x80, 0][..], &[0; 16], mac, &[0; 202]].concat();
    dhcp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    let udp = [&[0, 68, 0, 67][..], &u16::try_from(8 + dhcp.len())?.to_be_bytes(), &[0, 0], &dhcp].concat();
    let total = u16::try_from(20 + udp.len())?.to_be_bytes();
    let head =
        [&[0x45, 0][..], &total, &[0x7f, 0x61, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]].concat();
    let frame = [&[255; 6][..], mac, &[8, 0], &head, &udp].concat();
    stream.write_all(&[&u16::try_from(frame.len())?.to_le_bytes()[..], &frame].concat())?;
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length).context("no offer")?;
        let mut frame = vec![0; usize::from(u16::from_le_bytes(length))];
        stream.read_exact(&mut frame)?;
        let data = frame.get(42..).unwrap_or_default();
        if frame[12..14] == [8, 0] && frame[34..38] == [0, 67, 0, 68] {
            ensure!(data[240..243] == [53, 1, 2], "{data:?}");
            ensure!(data[16..20] == [192, 168, 65, 3], "{data:?}");
            return Ok(());
        }
    }
}

/// A program that `--forwards` names: takes connections to 10.9.9.9:80 and greets, refuses all others.
fn taker(listener: std::os::unix::net::UnixListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut length = [0; 2];
            let Ok(()) = stream.read_exact(&mut length) else { return };
            let mut asked = vec![0; usize::from(u16::from_le_bytes(length))];
            let Ok(()) = stream.read_exact(&mut asked) else { return };
            let asked: serde_json::Value = serde_json::from_slice(&asked).unwrap();
            let accepted =
                (asked["dst_ip"].as_str(), asked["dst_port"].as_u64()) == (Some("10.9.9.9"), Some(80));
            let answer = format!("{{\"accepted\":{accepted}}}");
            let length = u16::try_from(answer.len()).unwrap().to_le_bytes();
            let greeting = if accepted { "taken" } else { "" };
            let _ = stream.write_all(&[&length[..], answer.as_bytes(), greeting.as_bytes()].concat());
        }
    });
}

#[test]
fn vpnkit_hands_connections_to_programs_and_guests_see_who_refuses() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ethernet, program, file) =
        (dir.path().join("eth"), dir.path().join("taker"), dir.path().join("forwards.json"));
    taker(std::os::unix::net::UnixListener::bind(&program)?);
    let rules = serde_json::json!([
        {"protocol": "tcp", "dst_prefix": "10.0.0.0/8", "dst_port": 0, "path": program},
        {"protocol": "tcp", "dst_prefix": "172.16.0.0/12", "dst_port": 0, "path": dir.path().join("nobody")},
    ]);
    std::fs::write(&file, rules.to_string())?;
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(&ethernet).arg("--forwards").arg(&file);
    let mut vpnkit = Program::start(&mut command, &dir.path().join("log"))?;
    vpnkit.until("its socket", || ethernet.exists())?;
    let mut guest = Guest::attach_vpnkit(&ethernet, UUID)?;
    guest.dhcp()?;
    let flow = guest.connect("10.9.9.9:80".parse()?)?.context("refused")?;
    assert_eq!(guest.exchange(flow, b"", 5)?, b"taken");
    for refused in ["10.9.9.9:81", "10.1.1.1:80", "172.16.0.1:80"] {
        assert!(guest.connect(refused.parse()?)?.is_none(), "{refused}");
    }
    Ok(())
}

/// A proxy of the outside: answers requests with what it was asked, takes CONNECT to one place and greets there.
fn upstream_proxy(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || -> Option<()> {
                loop {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        stream.read_exact(&mut byte).ok()?;
                        head.push(byte[0]);
                    }
                    let head = String::from_utf8(head).ok()?;
                    let line = head.lines().next()?;
                    if line.starts_with("CONNECT 192.0.2.7:443 ") {
                        return stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\nhello from TLS").ok();
                    }
                    let login =
                        head.lines().find(|l| l.to_lowercase().starts_with("proxy-auth")).unwrap_or("");
                    let body = format!("{line}|{login}|");
                    let status = if line.starts_with("CONNECT") { "403 No" } else { "200 OK" };
                    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).ok()?;
                }
            });
        }
    });
}

/// What comes back for `request` from `at`; `None` when the connection is refused.
fn requested(guest: &mut Guest, at: &str, request: &str, end: &str) -> Result<Option<String>> {
    let Some(flow) = guest.connect(at.parse()?)? else { return Ok(None) };
    let mut said = Vec::new();
    let mut sent = 0;
    let done = guest.until("an answer", |g| {
        let tcp = g.tcp(flow);
        if sent < request.len() && tcp.can_send() {
            sent += tcp.send_slice(&request.as_bytes()[sent..]).unwrap_or(0);
        }
        while tcp.can_recv() {
            let taken = tcp.recv(|b| {
                said.extend_from_slice(b);
                (b.len(), ())
            });
            if taken.is_err() {
                break;
            }
        }
        (String::from_utf8_lossy(&said).contains(end) || !tcp.may_recv()).then_some(())
    });
    guest.tcp(flow).abort();
    let said = String::from_utf8_lossy(&said).into_owned();
    done.with_context(|| format!("{request:?}: {said:?}"))?;
    Ok(Some(said))
}

#[test]
fn vpnkits_http_proxies_carry_what_they_are_for_and_change_while_it_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let proxy = listener.local_addr()?.port();
    upstream_proxy(listener);
    let web = TcpListener::bind("127.0.0.1:0")?;
    let direct = web.local_addr()?.port();
    greeter(web, "direct");
    let settings = serde_json::json!({
        "http": format!("http://me:p%40ss@127.0.0.1:{proxy}"), "https": format!("127.0.0.1:{proxy}"),
        "exclude": "192.168.65.2 *.local", "transparent_http_ports": [80, direct],
    });
    std::fs::write(path("http.json"), settings.to_string())?;
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(path("eth")).arg("--http").arg(path("http.json"));
    command.arg("--http-api-path").arg(path("http.sock"));
    let mut vpnkit = Program::start(&mut command, &path("log"))?;
    vpnkit.until("its sockets", || path("eth").exists() && path("http.sock").exists())?;
    let mut guest = Guest::attach_vpnkit(&path("eth"), UUID)?;
    guest.dhcp()?;

    // Nobody is at 192.0.2.7: the proxy answers, and knows who the guest meant.
    let get = "GET /a?b HTTP/1.1\r\nHost: some.test\r\nConnection: close\r\n\r\n";
    let said = requested(&mut guest, "192.0.2.7:80", get, "==|")?.context("refused")?;
    ensure!(said.starts_with("HTTP/1.1 200 OK"), "{said}");
    let asked = "GET http://some.test/a?b HTTP/1.1|proxy-authorization: basic bwu6cebzcw==|";
    ensure!(said.to_lowercase().ends_with(&asked.to_lowercase()), "{said}");
    let said =
        requested(&mut guest, "192.0.2.7:80", "GET / HTTP/1.0\r\n\r\n", "</html>")?.context("refused")?;
    ensure!(said.contains("400 Bad Request") && said.contains("names no host"), "{said}");
    // TLS is not opened; what the proxy refuses is refused.
    let said = requested(&mut guest, "192.0.2.7:443", "", "hello from TLS")?.context("refused")?;
    ensure!(said == "hello from TLS", "{said}");
    ensure!(requested(&mut guest, "192.0.2.8:443", "", "x")?.is_none());
    // Excluded: the connection goes where it wanted to go.
    let close = "GET / HTTP/1.1\r\nHost: host.internal\r\nConnection: close\r\n\r\n";
    let said =
        requested(&mut guest, &format!("192.168.65.2:{direct}"), close, "127.0.0.1")?.context("refused")?;
    ensure!(said.contains("direct 127.0.0.1"), "{said}");
    // The gateway's own proxy, for those who know of it.
    let absolute = "GET http://other.test/x HTTP/1.1\r\nHost: other.test\r\nConnection: close\r\n\r\n";
    let said = requested(&mut guest, "192.168.65.1:3128", absolute, "|")?.context("refused")?;
    ensure!(said.contains("GET http://other.test/x HTTP/1.1|"), "{said}");
    let connect = "CONNECT 192.0.2.7:443 HTTP/1.1\r\nHost: x\r\n\r\n";
    let said = requested(&mut guest, "192.168.65.1:3129", connect, "hello from TLS")?.context("refused")?;
    ensure!(said.starts_with("HTTP/1.1 200") && said.ends_with("hello from TLS"), "{said}");
    // Excluded names are dialled as far as a guest may go itself, and no further.
    let inside = format!("CONNECT 127.0.0.1:{direct} HTTP/1.1\r\nHost: x\r\n\r\n");
    let said =
        requested(&mut guest, "192.168.65.1:3128", &inside.replace("127.0.0.1", "192.168.65.2"), "200 OK")?;
    ensure!(said.is_some_and(|s| s.contains("200 OK")), "the host alias is excluded, and may be reached");

    // The API shows and changes the settings; what is no setting changes nothing.
    let shown: serde_json::Value =
        serde_json::from_str(&http(&path("http.sock"), "GET", "/http_proxy.json", "")?.1)?;
    ensure!(shown["exclude"] == "192.168.65.2 *.local", "{shown}");
    for (body, fault) in [("{", "EOF"), ("{\"http\":\"socks5://x\"}", "socks5"), ("[]", "invalid type")] {
        let (status, said) = http(&path("http.sock"), "POST", "/http_proxy.json", body)?;
        ensure!(status == 400 && said.contains(fault), "{body}: {status} {said}");
    }
    let same: serde_json::Value =
        serde_json::from_str(&http(&path("http.sock"), "GET", "/http_proxy.json", "")?.1)?;
    ensure!(same == shown);
    let allow = r#"{"exclude":"*","allow_enabled":true,"allow":["*.good.test","127.0.0.1"],"allow_error_msg":"no way to %s"}"#;
    ensure!(http(&path("http.sock"), "POST", "/http_proxy.json", allow)?.0 == 200);
    let said = requested(&mut guest, "192.0.2.7:80", get, "</html>")?.context("refused")?;
    ensure!(said.contains("403 Forbidden") && said.contains("no way to some.test"), "{said}");
    // Allowed by name, and still not where a guest may not go.
    let said = requested(&mut guest, "192.168.65.1:3128", &inside, "</html>")?.context("refused")?;
    ensure!(said.contains("503") && said.contains("is not reached from here"), "{said}");
    ensure!(requested(&mut guest, "192.0.2.7:443", "", "x")?.is_none());
    // And the file is followed.
    std::fs::write(path("http.json"), "{}")?;
    vpnkit.until("the file", || {
        http(&path("http.sock"), "GET", "/http_proxy.json", "").is_ok_and(|(_, b)| !b.contains("good.test"))
    })?;
    Ok(())
}

#[test]
fn tshark_reads_vpnkits_pcap_socket_while_it_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ethernet, pcap) = (dir.path().join("eth"), dir.path().join("pcap"));
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(&ethernet).arg("--pcap").arg(&pcap);
    let mut vpnkit = Program::start(&mut command, &dir.path().join("log"))?;
    vpnkit.until("its sockets", || ethernet.exists() && pcap.exists())?;
    let mut stream = std::os::unix::net::UnixStream::connect(&pcap)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = vec![0; 24];
    stream.read_exact(&mut bytes)?;
    let mut guest = Guest::attach_vpnkit(&ethernet, UUID)?;
    guest.dhcp()?;
    // DISCOVER, OFFER, REQUEST, ACK at least, and whole.
    for _ in 0..4 {
        let mut record = [0; 16];
        stream.read_exact(&mut record)?;
        let length = u32::from_le_bytes([record[8], record[9], record[10], record[11]]);
        let mut frame = vec![0; usize::try_from(length)?];
        stream.read_exact(&mut frame)?;
        bytes.extend(record);
        bytes.extend(frame);
    }
    let file = dir.path().join("a.pcap");
    std::fs::write(&file, bytes)?;
    let words =
        ["-r", &file.to_string_lossy(), "-T", "fields", "-e", "dhcp.option.dhcp", "-e", "_ws.malformed"];
    let out = run(Path::new("tshark"), &words)?;
    let said = String::from_utf8(out.stdout)?;
    let kinds: Vec<&str> = said.lines().map(str::trim).collect();
    ensure!(kinds == ["1", "2", "3", "5"], "{said:?}");
    Ok(())
}

#[test]
fn vpnkits_proxy_ports_refuse_without_settings() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ethernet, api) = (dir.path().join("eth"), dir.path().join("http.sock"));
    let mut command = Command::new(named(dir.path(), "vpnkit")?);
    command.arg("--ethernet").arg(&ethernet).arg("--http-api-path").arg(&api);
    let mut vpnkit = Program::start(&mut command, &dir.path().join("log"))?;
    vpnkit.until("its sockets", || ethernet.exists() && api.exists())?;
    assert_eq!(http(&api, "GET", "/http_proxy.json", "")?, (404, "None set".into()));
    let mut guest = Guest::attach_vpnkit(&ethernet, UUID)?;
    guest.dhcp()?;
    ensure!(guest.connect("192.168.65.1:3128".parse()?)?.is_none());
    assert_eq!(vpnkit.stop()?.code(), Some(0));
    ensure!(!api.exists());
    Ok(())
}
