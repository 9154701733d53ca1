//! The real `portway serve` on loopback, with a guest that is smoltcp at the other end of its link. No root needed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::host::{echo_server, started};
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::portway;
use smoltcp::socket::tcp::State;

const ALIAS: [u8; 4] = [192, 168, 127, 254];

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect()
}

#[test]
fn a_guest_gets_address_router_and_resolver_and_its_lease_is_listed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), &[])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    let (ip, router, dns) = guest.dhcp()?;
    ensure!((ip, router) == ([192, 168, 127, 2].into(), [192, 168, 127, 1].into()) && dns == [router]);
    let leases = sidecar.json(&["leases"])?;
    ensure!(leases[0]["ip"] == "192.168.127.2" && leases[0]["mac"] == "52:54:00:00:00:01", "{leases}");
    ensure!(leases[0]["name"] == "web", "{leases}");
    Ok(())
}

#[test]
fn megabytes_go_out_and_come_back_unchanged() -> Result<()> {
    let (_dir, sidecar, mut guest) = started(&[])?;
    let port = echo_server()?;
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    let sent = pattern(3_000_000);
    ensure!(guest.exchange(socket, &sent, sent.len())? == sent);
    let flows = sidecar.json(&["flows"])?;
    ensure!(flows[0]["bytes_to_host"] == 3_000_000 && flows[0]["bytes_to_guest"] == 3_000_000, "{flows}");
    // Half-close: our FIN goes on to the echo server, whose end comes back.
    guest.tcp(socket).close();
    guest
        .until("close", |g| matches!(g.tcp(socket).state(), State::TimeWait | State::Closed).then_some(()))?;
    until(Duration::from_secs(5), || {
        sidecar.json(&["flows"]).is_ok_and(|f| f.as_array().is_some_and(Vec::is_empty))
    })
}

#[test]
fn a_refused_port_is_refused_at_once_and_black_holes_delay_nobody() -> Result<()> {
    let (_dir, _sidecar, mut guest) = started(&[])?;
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let began = Instant::now();
    ensure!(guest.connect((ALIAS, closed).into())?.is_none());
    ensure!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());

    // A listener whose backlog is full swallows further SYNs: a black hole of loopback.
    let hole = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    hole.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    hole.listen(1)?;
    let hole_port = hole.local_addr()?.as_socket().context("no port")?.port();
    for _ in 0..200 {
        guest.dial((ALIAS, hole_port).into())?;
    }
    guest.step();
    let port = echo_server()?;
    let began = Instant::now();
    let good = guest.connect((ALIAS, port).into())?.context("refused")?;
    ensure!(guest.exchange(good, b"hi", 2)? == b"hi");
    ensure!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    Ok(())
}

#[test]
fn names_come_from_the_gateway_and_from_the_hosts_resolver() -> Result<()> {
    let resolver = UdpSocket::bind("127.0.0.1:0")?;
    let upstream = resolver.local_addr()?.to_string();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((len, from)) = resolver.recv_from(&mut buffer) {
            // Header and question, without the EDNS record behind them.
            let name = buffer[12..len].iter().position(|b| *b == 0).unwrap_or(0);
            let mut reply = buffer[..12 + name + 5].to_vec();
            reply[2] |= 0x80;
            (reply[7], reply[11]) = (1, 0);
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 80]);
            let _ = resolver.send_to(&reply, from);
        }
    });
    let (_dir, _sidecar, mut guest) = started(&["--dns-upstream", &upstream])?;
    let query = |name: &str| {
        let mut q = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            q.push(u8::try_from(label.len()).unwrap_or(0));
            q.extend(label.as_bytes());
        }
        q.extend([0, 0, 1, 0, 1]);
        q
    };
    let gateway = SocketAddr::from(([192, 168, 127, 1], 53));
    for (name, address) in [
        ("host.portway.internal", [192, 168, 127, 254]),
        ("gateway.containers.internal", [192, 168, 127, 1]),
        ("web.portway.internal", [192, 168, 127, 2]),
        ("outside.example", [192, 0, 2, 80]),
    ] {
        let (from, answer) = guest.ask_udp(5353, gateway, &query(name))?;
        ensure!(
            from == gateway && answer[..2] == [0xab, 0xcd] && answer.ends_with(&address)
                || answer.windows(4).any(|w| w == address),
            "{name}: {answer:?}"
        );
    }
    // The same over TCP.
    let socket = guest.connect(gateway)?.context("refused")?;
    let q = query("host.portway.internal");
    let framed = [&u16::try_from(q.len())?.to_be_bytes()[..], &q].concat();
    let answer = guest.exchange(socket, &framed, 40)?;
    ensure!(answer.windows(4).any(|w| w == ALIAS), "{answer:?}");
    Ok(())
}

#[test]
fn a_datagram_is_answered_by_the_one_it_was_sent_to() -> Result<()> {
    let (_dir, _sidecar, mut guest) = started(&[])?;
    let echo = UdpSocket::bind("127.0.0.1:0")?;
    let to = SocketAddr::from((ALIAS, echo.local_addr()?.port()));
    std::thread::spawn(move || {
        let mut buffer = [0; 65_536];
        while let Ok((len, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..len], from);
        }
    });
    for len in [1, 1472, 60_000] {
        ensure!(guest.ask_udp(6000, to, &pattern(len))? == (to, pattern(len)), "{len} bytes");
    }
    Ok(())
}

#[test]
fn published_ports_reach_the_guest_on_both_loopback_addresses() -> Result<()> {
    let (dir, sidecar, mut guest) = started(&["--publish", "0:22", "--publish", "0:53/udp"])?;
    let ports = sidecar.json(&["ports"])?;
    let port =
        |n: usize| ports[n]["host_port"].as_u64().and_then(|p| u16::try_from(p).ok()).context("no port");
    ensure!(ports[0]["guest"] == "192.168.127.2" && ports[0]["guest_port"] == 22, "{ports}");
    let udp = guest.udp(53)?;
    for host in ["127.0.0.1", "::1"] {
        let server = guest.listen(22)?;
        let mut client = TcpStream::connect((host, port(0)?))?;
        client.write_all(b"from outside")?;
        ensure!(guest.exchange(server, b"from inside", 12)? == b"from outside");
        let mut answer = [0; 11];
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        guest.step();
        client.read_exact(&mut answer)?;
        ensure!(&answer == b"from inside");
        let source = guest.tcp(server).remote_endpoint().context("closed")?;
        ensure!(source.addr.to_string() == "192.168.127.254", "{source}");
        guest.tcp(server).abort();
        guest.step();

        let client = UdpSocket::bind((host, 0))?;
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        client.send_to(b"query", (host, port(1)?))?;
        guest.echo_udp(udp)?;
        ensure!(client.recv(&mut answer)? == 5);
    }
    // Live: one more, by gvproxy's route as well, and gone again.
    let done = sidecar.json(&["publish", ":80"])?;
    ensure!(done[0]["host_port"] != 0);
    let taken = done[0]["host_port"].to_string();
    let again = sidecar.cli(&["publish", &format!("{taken}:81")])?;
    let text = String::from_utf8_lossy(&again.stderr).into_owned();
    ensure!(
        again.status.code() == Some(1) && text.contains("published already") && text.lines().count() == 1,
        "{text}"
    );
    let gone = sidecar.cli(&["unpublish", &format!("{taken}:80")])?;
    ensure!(gone.status.success());
    ensure!(TcpStream::connect(("127.0.0.1", taken.parse::<u16>()?)).is_err());
    let mut api = UnixStream::connect(dir.path().join("api"))?;
    let body = format!(r#"{{"local":"127.0.0.1:{taken}","remote":"192.168.127.2:80"}}"#);
    write!(
        api,
        "POST /services/forwarder/expose HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    api.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let server = guest.listen(80)?;
    let mut client = TcpStream::connect(("127.0.0.1", taken.parse::<u16>()?))?;
    client.write_all(b"x")?;
    ensure!(guest.exchange(server, b"", 1)? == b"x");
    Ok(())
}

#[test]
fn a_client_of_a_port_nobody_serves_is_reset() -> Result<()> {
    let (_dir, sidecar, mut guest) = started(&["--publish", "0:22"])?;
    let port = sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("no port")?;
    let mut client = TcpStream::connect(("127.0.0.1", u16::try_from(port)?))?;
    client.set_nonblocking(true)?;
    let error = guest.until("reset", |_| match client.read(&mut [0; 8]) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => None,
        other => Some(other),
    })?;
    ensure!(error.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset), "{error:?}");
    Ok(())
}

#[test]
fn garbage_on_the_link_is_counted_and_never_fatal() -> Result<()> {
    let (dir, mut sidecar, mut guest) = started(&[])?;
    let runts: Vec<u8> =
        (0u8..14).flat_map(|n| [&u32::from(n).to_be_bytes()[..], &vec![n; n.into()]].concat()).collect();
    guest.raw(&runts)?;
    // A frame in single bytes.
    for byte in [&60u32.to_be_bytes()[..], &[0x55; 60]].concat() {
        guest.raw(&[byte])?;
    }
    until(Duration::from_secs(5), || sidecar.json(&["stats"]).is_ok_and(|s| s["drops"]["runt"] == 14))?;
    let port = echo_server()?;
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    ensure!(guest.exchange(socket, b"alive", 5)? == b"alive");
    // A length no frame has ends the link, and the link only.
    guest.raw(&0xffff_ffffu32.to_be_bytes())?;
    until(Duration::from_secs(5), || guest.step())?;
    // A client that goes in the middle of a frame.
    let mut torn = UnixStream::connect(dir.path().join("vm"))?;
    torn.write_all(&[0, 0, 1, 0, 1, 2, 3])?;
    drop(torn);
    let mut next = Guest::attach(&dir.path().join("vm"), 1)?;
    ensure!(next.dhcp()?.0 == std::net::Ipv4Addr::new(192, 168, 127, 2), "the lease is kept");
    ensure!(sidecar.is_alive()?);
    Ok(())
}

#[test]
fn a_second_vmm_waits_and_never_disturbs_the_first() -> Result<()> {
    let (dir, _sidecar, mut guest) = started(&[])?;
    let mut second = Guest::attach(&dir.path().join("vm"), 2)?;
    second.step();
    let port = echo_server()?;
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    ensure!(guest.exchange(socket, b"first", 5)? == b"first");
    drop(guest);
    second.dhcp()?;
    Ok(())
}

#[test]
fn sigterm_ends_with_0_and_leaves_nothing_and_leases_survive() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let options = ["--state-dir", state.to_str().context("path")?];
    let sidecar = Sidecar::start(dir.path(), &options)?;
    let mut first = Guest::attach(&dir.path().join("vm"), 1)?;
    first.dhcp()?;
    drop(first);
    let mut guest = Guest::attach(&dir.path().join("vm"), 2)?;
    let (ip, ..) = guest.dhcp()?;
    until(Duration::from_secs(5), || {
        std::fs::read_to_string(state.join("leases.json")).is_ok_and(|t| t.contains("02\""))
    })?;
    ensure!(sidecar.stop()?.code() == Some(0));
    let left: Vec<_> = std::fs::read_dir(dir.path())?.flatten().map(|e| e.file_name()).collect();
    ensure!(left.len() == 2, "log and state, and not {left:?}");
    ensure!(guest.step(), "the link ended");
    let _again = Sidecar::start(dir.path(), &options)?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 2)?;
    ensure!(guest.dhcp()?.0 == ip);
    Ok(())
}

#[test]
fn bad_usage_is_one_clear_line_and_nothing_is_started() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let publish = format!("{}:22", taken.local_addr()?.port());
    std::fs::write(path("bad.toml"), "mto = 3\n")?;
    std::fs::write(path("file"), "")?;
    let (link, api) = (format!("qemu:unix:{}", path("vm")), format!("unix:{}", path("api")));
    let bad = path("bad.toml");
    let serve = ["serve", "--link", &link, "--api", &api];
    let owner = format!("(pid {})", std::process::id());
    let cases: [(Vec<&str>, i32, &str); 9] = [
        ([&serve[..], &["--publish", "99999:22"]].concat(), 2, "\"99999\" is not a port"),
        ([&serve[..], &["--publish", &publish]].concat(), 1, &owner),
        ([&serve[..], &["--colour"]].concat(), 2, "--colour"),
        ([&serve[..], &["--config", "/nonexistent.toml"]].concat(), 2, "/nonexistent.toml"),
        ([&serve[..], &["--config", &bad]].concat(), 2, "mto"),
        ([&serve[..], &["--mtu", "12"]].concat(), 2, "576 to 65535"),
        (vec!["serve", "--api", &api], 2, "--link"),
        (vec!["serve", "--link", "qemu:fd:99", "--api", &api], 1, "descriptor 99"),
        (vec!["ports", "--api", &api], 1, "no network answers"),
    ];
    for (args, code, text) in &cases {
        let out = Command::new(portway()?).args(args).output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        let lines: Vec<&str> = said.lines().filter(|l| l.starts_with("portway: ")).collect();
        ensure!(out.status.code() == Some(*code), "{args:?}: {:?} {said}", out.status);
        ensure!(lines.len() == 1 && lines[0].contains(text), "{args:?}: {said}");
        ensure!(
            !dir.path().join("vm").exists() && !dir.path().join("api").exists(),
            "{args:?} left a socket"
        );
    }
    Ok(())
}

/// The host's ends as the kernel shows them; the guest's are in netstack/tests/rfc9293.rs (section 3.8.4).
#[test]
fn the_hosts_end_of_an_idle_connection_is_asked_after_the_time_the_operator_sets_or_never() -> Result<()> {
    for (seconds, shown) in [("90", true), ("0", false)] {
        let options = ["--tcp-keepalive", seconds, "--publish", "0:5000"];
        let (_dir, sidecar, mut guest) = started(&options)?;
        let echo = echo_server()?;
        let out = guest.connect(SocketAddr::from((ALIAS, echo)))?.context("refused")?;
        ensure!(guest.exchange(out, b"x", 1)? == b"x");
        let port = sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("a port")?;
        let listener = guest.listen(5000)?;
        let client = TcpStream::connect(("127.0.0.1", u16::try_from(port)?))?;
        guest.until("the client", |g| (g.tcp(listener).state() == State::Established).then_some(()))?;
        // ss(8): `timer:(keepalive,1min29sec,0)`, of the sidecar's own ends.
        for filter in [format!("dport = :{echo}"), format!("sport = :{port}")] {
            let timers = || {
                let out = Command::new("ss").args(["-Htno", "state", "established", &filter]).output();
                out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
            };
            let mut seen = String::new();
            let right = until(Duration::from_secs(5), || {
                seen = timers();
                let asked = seen.contains("timer:(keepalive,1min");
                !seen.trim().is_empty() && asked == shown && (shown || !seen.contains("keepalive"))
            });
            right.with_context(|| format!("--tcp-keepalive {seconds}, {filter}: {seen:?}"))?;
        }
        drop(client);
    }
    Ok(())
}
