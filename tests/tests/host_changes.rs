//! The host changes under its guests: its network goes, another one comes, it sleeps. The host is a network namespace
//! with a cable to another one; it needs root, and without the tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::{Sidecar, until};
use smoltcp::socket::tcp::State;

const PATIENCE: Duration = Duration::from_secs(20);
/// The host's address, and a server's, in every network it comes to.
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// Starts a network's servers, once it has its cable: UDP on port 7, which answers with `name`, and TCP on 8080.
fn serve(world: &Namespace, name: &'static str) -> Result<TcpListener> {
    let datagrams = world.inside(|| Ok(UdpSocket::bind((SERVER, 7))?))?;
    std::thread::spawn(move || {
        let mut bytes = [0; 1500];
        while let Ok((_, from)) = datagrams.recv_from(&mut bytes) {
            let _ = datagrams.send_to(name.as_bytes(), from);
        }
    });
    world.inside(|| Ok(TcpListener::bind((SERVER, 8080))?))
}

#[test]
fn flows_and_datagrams_follow_the_host_to_another_network_and_what_the_old_one_held_is_reset() -> Result<()> {
    let (Some(host), Some(first), Some(second)) = (Namespace::new()?, Namespace::new()?, Namespace::new()?)
    else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    host.connect(&first, HOST.into(), SERVER.into())?;
    let listener = serve(&first, "first")?;
    let sidecar = Sidecar::start_in(&host, dir.path(), &["--hosts-file", "off"])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let (udp, tcp) = (SocketAddr::from((SERVER, 7)), SocketAddr::from((SERVER, 8080)));
    assert_eq!(guest.ask_udp(5000, udp, b"who?")?.1, b"first");
    let old = guest.connect(tcp)?.context("refused")?;
    let (mut server, _) = listener.accept()?;
    server.write_all(b"hello")?;
    assert_eq!(guest.exchange(old, b"hi", 5)?, b"hello");

    // The cable is pulled while a connection has bytes on their way and a binding is open. What cannot be sent costs nothing.
    host.ip(&["link", "delete", "cable"])?;
    guest.exchange(old, b"are you there?", 0)?;
    guest.send_udp(5000, udp, b"anybody?", 100)?;
    let before = sidecar.cpu_time()?;
    std::thread::sleep(Duration::from_secs(1));
    let used = sidecar.cpu_time()? - before;
    ensure!(used < Duration::from_millis(100), "{used:?} of CPU in a second without a network");

    // Another network, where nobody knows the old connection.
    host.connect(&second, HOST.into(), SERVER.into())?;
    let listener = serve(&second, "second")?;
    assert_eq!(guest.ask_udp(5001, udp, b"who?")?.1, b"second");
    assert_eq!(guest.ask_udp(5000, udp, b"who?")?.1, b"second", "the binding of the old network");
    let new = guest.connect(tcp)?.context("refused")?;
    let (mut server, _) = listener.accept()?;
    server.write_all(b"again")?;
    assert_eq!(guest.exchange(new, b"hi", 5)?, b"again");
    let mut got = [0; 2];
    server.read_exact(&mut got)?;
    assert_eq!(&got, b"hi");
    // The host's kernel sends the old bytes again, and is told that there is no such connection.
    guest.until("the end of the old connection", |g| (g.tcp(old).state() == State::Closed).then_some(()))?;
    Ok(())
}

#[test]
fn a_stopped_sidecar_goes_on_where_it_was() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), &["--hosts-file", "off"])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = SocketAddr::from(([192, 168, 127, 254], listener.local_addr()?.port()));
    let socket = guest.connect(to)?.context("refused")?;
    let (mut server, _) = listener.accept()?;
    let pid: i32 = std::fs::read_to_string(dir.path().join("pid"))?.trim().parse()?;
    let pid = nix::unistd::Pid::from_raw(pid);
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    until(PATIENCE, || state().rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T')))?;
    server.write_all(b"while it slept")?;
    guest.step();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT)?;
    assert_eq!(guest.exchange(socket, b"x", 14)?, b"while it slept");
    let before = sidecar.cpu_time()?;
    std::thread::sleep(Duration::from_secs(1));
    let used = sidecar.cpu_time()? - before;
    ensure!(used < Duration::from_millis(100), "{used:?} of CPU in a second after it");
    Ok(())
}
