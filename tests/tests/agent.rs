//! The real agent in a network namespace, the real `portway serve` beside it: what is opened there is reachable here.
//!
//! The guest is a namespace with a tap link, as `links.rs` has it, so that a listener on every address goes through the
//! stack and one on loopback through the agent. Needs root for the namespace.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::agent::Agent;
use portway_tests::agent_lab::{Lab, PATIENCE, SECOND, answers, connects, free_port, serve};
use portway_tests::sidecar::until;
use portway_tests::vm::portway;

#[test]
fn what_listens_in_the_guest_is_reachable_within_a_second_and_gone_within_one() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    for (bind, is_v6) in
        [("127.0.0.1", false), ("0.0.0.0", false), ("192.168.127.2", false), ("[::1]", true), ("[::]", true)]
    {
        if is_v6 && !v6 {
            eprintln!("skipped {bind}: no IPv6 here");
            continue;
        }
        let port = free_port()?;
        let here = SocketAddr::from(([127, 0, 0, 1], port));
        let server = lab.listen(&format!("{bind}:{port}"))?;
        let opened = Instant::now();
        until(SECOND, || answers(here, &server)).with_context(|| format!("{bind}\n{}", lab.context()))?;
        eprintln!("{bind}: reachable after {:?}", opened.elapsed());
        if v6 {
            ensure!(answers((Ipv6Addr::LOCALHOST, port), &server), "{bind}: not on ::1\n{}", lab.context());
        }
        let listed = lab.ports()?.into_iter().find(|p| p["host_port"] == port).context("not listed")?;
        let guest: IpAddr = listed["guest"].as_str().context("a guest")?.parse()?;
        ensure!(
            guest.is_loopback() == bind.contains('1') && !bind.starts_with("192") || !guest.is_loopback(),
            "{listed}"
        );
        // It stays for as long as it listens, over many looks.
        let stays = Instant::now();
        while stays.elapsed() < SECOND {
            ensure!(connects(here), "{bind}: gone while it listens\n{}", lab.context());
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(server);
        let closed = Instant::now();
        until(SECOND, || !connects(here)).with_context(|| format!("{bind}\n{}", lab.context()))?;
        eprintln!("{bind}: gone after {:?}", closed.elapsed());
    }
    until(SECOND, || lab.ports().is_ok_and(|p| p.is_empty()))
}

#[test]
fn udp_is_published_with_a_flow_for_each_client() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    for bind in ["127.0.0.1", "0.0.0.0"] {
        let port = free_port()?;
        let server = lab.bind_udp(&format!("{bind}:{port}"))?;
        server.set_read_timeout(Some(PATIENCE))?;
        until(SECOND, || {
            lab.ports().is_ok_and(|p| p.iter().any(|p| p["proto"] == "udp" && p["host_port"] == port))
        })
        .with_context(|| format!("{bind}\n{}", lab.context()))?;
        let clients = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
        let mut peers = Vec::new();
        for (n, client) in (0u8..).zip(&clients) {
            client.set_read_timeout(Some(PATIENCE))?;
            client.send_to(&[n; 100], ("127.0.0.1", port))?;
            let mut buffer = [0; 256];
            let (len, peer) = server.recv_from(&mut buffer).with_context(|| lab.context())?;
            ensure!(buffer[..len] == [n; 100], "{bind}: {len} bytes");
            peers.push(peer);
        }
        for (n, (client, peer)) in (0u8..).zip(clients.iter().zip(&peers)) {
            server.send_to(&[n + 10; 50], peer)?;
            let mut buffer = [0; 256];
            let len = client.recv(&mut buffer).with_context(|| lab.context())?;
            ensure!(buffer[..len] == [n + 10; 50], "{bind}: an answer went astray");
        }
        drop(server);
        until(SECOND, || lab.ports().is_ok_and(|p| p.is_empty())).with_context(|| lab.context())?;
    }
    Ok(())
}

#[test]
fn clients_of_the_guest_are_not_published() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    // A DHCP client, mDNS, an unconnected and a connected client of UDP, and at last a server.
    let mut held = Vec::new();
    for at in ["0.0.0.0:68", "0.0.0.0:5353", "0.0.0.0:5355", "0.0.0.0:123", "0.0.0.0:0"] {
        held.push(lab.bind_udp(at)?);
    }
    let connected = lab.bind_udp(&format!("127.0.0.1:{}", free_port()?))?;
    connected.connect("127.0.0.1:9")?;
    let port = free_port()?;
    let _server = lab.listen(&format!("127.0.0.1:{port}"))?;
    until(SECOND, || lab.ports().is_ok_and(|p| p.iter().any(|p| p["host_port"] == port)))?;
    let ports = lab.ports()?;
    ensure!(ports.len() == 1, "{ports:?}");
    Ok(())
}

#[test]
fn megabytes_cross_with_their_ends_and_a_reset_is_a_reset() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let port = free_port()?;
    let server = lab.listen(&format!("127.0.0.1:{port}"))?;
    until(SECOND, || lab.ports().is_ok_and(|p| p.len() == 1))?;
    let echo = std::thread::spawn(move || -> Result<()> {
        let (stream, _) = server.accept()?;
        let mut from = stream.try_clone()?;
        let mut to = stream;
        std::io::copy(&mut from, &mut to)?;
        to.shutdown(Shutdown::Write)?;
        // The next is reset.
        let (stream, _) = server.accept()?;
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        Ok(())
    });
    let sent: Vec<u8> = (0..50_000_000u32).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
    let client = TcpStream::connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(PATIENCE))?;
    let began = Instant::now();
    let got = std::thread::scope(|scope| -> Result<Vec<u8>> {
        let writer = scope.spawn(|| -> Result<()> {
            (&client).write_all(&sent)?;
            Ok(client.shutdown(Shutdown::Write)?)
        });
        let mut got = Vec::new();
        (&client).read_to_end(&mut got)?;
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok(got)
    })?;
    ensure!(got == sent, "{} bytes came back", got.len());
    eprintln!("50 MB there and back in {:?}", began.elapsed());
    let mut reset = TcpStream::connect(("127.0.0.1", port))?;
    reset.set_read_timeout(Some(PATIENCE))?;
    let error = reset.read(&mut [0]).map(|n| anyhow::anyhow!("{n} bytes and no reset"));
    ensure!(error.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset), "{error:?}");
    echo.join().map_err(|_| anyhow::anyhow!("the echo server panicked"))??;
    // And one whose server has gone meanwhile.
    until(PATIENCE, || lab.ports().is_ok_and(|p| p.is_empty()))
}

#[test]
fn a_thousand_connections_at_once_are_carried() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let port = free_port()?;
    let server = lab.listen(&format!("127.0.0.1:{port}"))?;
    until(SECOND, || lab.ports().is_ok_and(|p| p.len() == 1))?;
    let held = std::thread::spawn(move || -> Result<()> {
        let mut streams = Vec::new();
        while streams.len() < 1000 {
            let (mut stream, _) = server.accept()?;
            stream.write_all(b"here")?;
            streams.push(stream);
        }
        for stream in &mut streams {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
        }
        Ok(())
    });
    let mut clients = Vec::new();
    for _ in 0..1000 {
        let client = TcpStream::connect(("127.0.0.1", port))?;
        client.set_read_timeout(Some(Duration::from_secs(30)))?;
        clients.push(client);
    }
    for client in &mut clients {
        client.read_exact(&mut [0; 4]).with_context(|| lab.context())?;
    }
    ensure!(lab.sidecar.json(&["agents"])?[0]["streams"] == 1000);
    for (n, client) in clients.iter_mut().enumerate() {
        let byte = [u8::try_from(n % 256)?];
        client.write_all(&byte)?;
    }
    for (n, client) in clients.iter_mut().enumerate() {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        ensure!(usize::from(byte[0]) == n % 256, "another's byte");
    }
    held.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    drop(clients);
    until(PATIENCE, || lab.sidecar.json(&["agents"]).is_ok_and(|a| a[0]["streams"] == 0))
}

#[test]
fn the_state_is_right_when_the_agent_or_the_sidecar_is_started_again() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let port = free_port()?;
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let server = lab.listen(&format!("127.0.0.1:{port}"))?;
    until(SECOND, || answers(here, &server)).with_context(|| lab.context())?;
    let out = lab.agent.cli(&["publish", "0:127.0.0.1:4242"])?;
    ensure!(out.status.success(), "{out:?}");

    let Lab { agent, sidecar, guest, dir } = lab;
    agent.kill();
    let gone = free_port()?;
    let agent = Agent::start(dir.path(), &guest, &dir.path().join("agent"), &[])?;
    let lab = Lab { agent, sidecar, guest, dir };
    lab.until_session()?;
    until(PATIENCE, || answers(here, &server)).with_context(|| lab.context())?;
    let wished = |lab: &Lab| lab.ports().is_ok_and(|p| p.iter().any(|p| p["guest_port"] == 4242));
    until(PATIENCE, || wished(&lab)).with_context(|| lab.context())?;

    let Lab { agent, sidecar, guest, dir } = lab;
    ensure!(sidecar.stop()?.success());
    ensure!(!connects(here), "a listener of a sidecar that has ended");
    let sidecar = serve(dir.path(), &guest, &["--publish", "auto"])?;
    let mut lab = Lab { agent, sidecar, guest, dir };
    lab.until_session()?;
    until(PATIENCE, || answers(here, &server)).with_context(|| lab.context())?;
    until(PATIENCE, || wished(&lab)).with_context(|| lab.context())?;
    ensure!(lab.agent.is_alive()? && !connects(([127, 0, 0, 1], gone).into()));

    // Without an agent there is nobody to carry: after a moment the ports are closed.
    let Lab { agent, sidecar, guest, dir } = lab;
    agent.kill();
    until(PATIENCE, || !connects(here))?;
    drop((sidecar, guest, dir));
    Ok(())
}

#[test]
fn a_guest_publishes_lists_and_unpublishes_by_hand() -> Result<()> {
    let Some(lab) = Lab::start(&[])? else { return Ok(()) };
    let port = free_port()?;
    let server = lab.listen("127.0.0.1:8080")?;
    let spec = format!("0.0.0.0:{port}:127.0.0.1:8080");
    let out = lab.agent.cli(&["publish", &spec])?;
    ensure!(out.status.success(), "{out:?}\n{}", lab.context());
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(said.starts_with(&format!("published tcp 127.0.0.1:{port}")), "{said}");
    ensure!(answers(([127, 0, 0, 1], port), &server), "{}", lab.context());
    let listed = lab.agent.cli(&["ports"])?;
    ensure!(String::from_utf8_lossy(&listed.stdout).contains(&format!("127.0.0.1:{port}")), "{listed:?}");
    let json: serde_json::Value = serde_json::from_slice(&lab.agent.cli(&["ports", "--json"])?.stdout)?;
    ensure!(json[0]["host_port"] == port, "{json}");
    let refused = lab.agent.cli(&["publish", "192.0.2.7:80:80"])?;
    ensure!(refused.status.code() == Some(1), "{refused:?}");
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("--guest-binds any"), "{refused:?}");
    let out = lab.agent.cli(&["unpublish", &spec])?;
    ensure!(out.status.success(), "{out:?}");
    ensure!(!connects(([127, 0, 0, 1], port).into()));
    Ok(())
}

#[test]
fn unix_sockets_cross_both_ways() -> Result<()> {
    let files = tempfile::tempdir()?;
    let path = |name: &str| files.path().join(name).display().to_string();
    let server = UnixListener::bind(path("host-service"))?;
    let publish = format!("unix:{}:{}", path("docker-here"), path("docker-there"));
    let socket = format!("{}:{}", path("ssh-there"), path("host-service"));
    let Some(lab) = Lab::start(&["--publish", &publish, "--guest-socket", &socket])? else { return Ok(()) };
    let there = UnixListener::bind(path("docker-there"))?;
    let mut client = UnixStream::connect(path("docker-here"))?;
    client.write_all(b"GET")?;
    let (mut accepted, _) = there.accept()?;
    accepted.read_exact(&mut [0; 3])?;
    accepted.write_all(b"200")?;
    client.read_exact(&mut [0; 3])?;
    until(PATIENCE, || Path::new(&path("ssh-there")).exists()).with_context(|| lab.context())?;
    let mut guest = UnixStream::connect(path("ssh-there"))?;
    guest.write_all(b"sign")?;
    let (mut accepted, _) = server.accept()?;
    accepted.read_exact(&mut [0; 4])?;
    drop(accepted);
    ensure!(guest.read(&mut [0])? == 0);
    ensure!(lab.sidecar.stop()?.success() && !Path::new(&path("docker-here")).exists(), "a socket is left");
    Ok(())
}

#[test]
fn wait_returns_when_the_guest_is_ready_and_when_its_port_is() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let out = lab.sidecar.cli(&["wait", "--ready", "--timeout", "10"])?;
    ensure!(out.status.success(), "{out:?}\n{}", lab.context());
    let port = free_port()?;
    let api = format!("unix:{}", lab.dir.path().join("api").display());
    let mut waiting =
        Command::new(portway()?).args(["wait", "--port", &port.to_string(), "--api", &api]).spawn()?;
    ensure!(waiting.try_wait()?.is_none());
    let _server = lab.listen(&format!("127.0.0.1:{port}"))?;
    until(PATIENCE, || waiting.try_wait().is_ok_and(|s| s.is_some()))?;
    ensure!(waiting.wait()?.success());
    let late = lab.sidecar.cli(&["wait", "--port", "1", "--timeout", "0"])?;
    ensure!(late.status.code() == Some(1), "{late:?}");
    Ok(())
}

#[test]
fn rules_of_a_file_are_followed() -> Result<()> {
    let files = tempfile::tempdir()?;
    let file = files.path().join("portway.toml");
    let (open, hidden, elsewhere) = (free_port()?, free_port()?, free_port()?);
    std::fs::write(
        &file,
        format!(
            "[[auto-publish]]\nguest-address = \"any\"\nguest-ports = {hidden}\nignore = true\n\
             [[auto-publish]]\nguest-address = \"any\"\nguest-ports = {open}\nhost-ports = {elsewhere}\n"
        ),
    )?;
    let Some(lab) = Lab::start(&["--config", &file.display().to_string(), "--publish", "auto"])? else {
        return Ok(());
    };
    let _hidden = lab.listen(&format!("0.0.0.0:{hidden}"))?;
    let server = lab.listen(&format!("127.0.0.1:{open}"))?;
    until(SECOND, || answers(([127, 0, 0, 1], elsewhere), &server)).with_context(|| lab.context())?;
    let ports = lab.ports()?;
    ensure!(ports.len() == 1 && !connects(([127, 0, 0, 1], hidden).into()), "{ports:?}");
    Ok(())
}
