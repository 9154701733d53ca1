//! Faults of the host: no descriptors, a full disk, a process killed or stopped at any moment, readers that do not read.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portway_tests::guest::Guest;
use portway_tests::raw::checksum;
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::portway;
use smoltcp::socket::tcp::State;

const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
/// Times the sidecar is killed; `make kills` does it a hundred times.
const KILLS: &str = "PORTWAY_KILLS";

fn echo_server() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    Ok(port)
}

fn signal(sidecar: &Sidecar, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(sidecar.pid())?), signal)?)
}

#[test]
fn with_128_descriptors_old_flows_live_new_ones_are_refused_and_the_api_answers() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(portway()?);
    // SAFETY: setrlimit(2) is all that happens between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, 128, 128)?));
    }
    let silent = UdpSocket::bind("127.0.0.1:0")?;
    let upstream = silent.local_addr()?.to_string();
    let sidecar =
        Sidecar::start_by(command, dir.path(), &["--publish", "0:22", "--dns-upstream", &upstream])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let echo = echo_server()?;
    let old = guest.connect((ALIAS, echo).into())?.context("refused")?;
    ensure!(guest.exchange(old, b"before", 6)? == b"before");
    // Ten times as many flows as there are descriptors.
    let (mut open, mut refused) = (Vec::new(), 0);
    for _ in 0..1280 {
        match guest.connect((ALIAS, echo).into())? {
            Some(flow) => open.push(flow),
            None => refused += 1,
        }
    }
    ensure!(open.len() > 50 && open.len() < 128 && refused > 1000, "{} open, {refused} refused", open.len());
    ensure!(guest.exchange(old, b"during", 6)? == b"during");
    // Datagrams and names beyond, and clients of a published port: none is heard, nothing breaks.
    let sink = UdpSocket::bind("127.0.0.1:0")?;
    let to = (ALIAS, sink.local_addr()?.port()).into();
    for port in 20_000..20_300 {
        let socket = guest.udp(port)?;
        guest.send_udp(socket, to, b"x")?;
        guest.send_udp(
            socket,
            (Ipv4Addr::new(192, 168, 127, 1), 53).into(),
            &[0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'x', 0, 0, 1, 0, 1],
        )?;
        guest.step();
        guest.forget(socket);
    }
    let port = sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("port")?;
    for _ in 0..50 {
        let mut client = std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port)?))?;
        client.set_nonblocking(true)?;
        let error = guest.until("a refusal", |_| match client.read(&mut [0; 1]) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => None,
            other => Some(other),
        })?;
        ensure!(error.is_err(), "accepted and ended");
    }
    ensure!(sidecar.json(&["stats"])?["tcp_flows"].as_u64().is_some_and(|n| n > 50));
    ensure!(guest.exchange(old, b"still", 5)? == b"still");
    // As soon as some end, others begin.
    let began = Instant::now();
    for flow in open {
        guest.tcp(flow).abort();
    }
    guest.until("recovery", |g| {
        let flow = g.dial((ALIAS, echo).into()).ok()?;
        for _ in 0..50 {
            g.step();
            match g.tcp(flow).state() {
                State::Established => return Some(()),
                State::Closed => return None,
                _ => std::thread::yield_now(),
            }
        }
        None
    })?;
    ensure!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    ensure!(guest.exchange(old, b"after", 5)? == b"after");
    Ok(())
}

#[test]
fn killed_at_any_moment_it_comes_back_with_its_leases_and_over_its_own_sockets() -> Result<()> {
    let times: u64 = std::env::var(KILLS).ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let options = ["--state-dir", state.to_str().context("path")?, "--publish", "0:22"];
    let (mut known, mut known_port) = (None, None);
    for n in 0..times {
        // The first is left alone until its lease is kept; the others die somewhere between start, lease and traffic.
        let mut sidecar = Sidecar::start(dir.path(), &options)?;
        let mut guest = Guest::attach(&dir.path().join("vm"), 7)?;
        let (ip, ..) = guest.dhcp()?;
        ensure!(*known.get_or_insert(ip) == ip, "run {n}: the guest had {known:?} and got {ip}");
        let kept = || {
            std::fs::read(state.join("leases.json")).is_ok_and(|t| {
                serde_json::from_slice::<serde_json::Value>(&t)
                    .is_ok_and(|v| v.as_array().is_some_and(|l| !l.is_empty()))
            })
        };
        if n == 0 {
            until(Duration::from_secs(5), kept)?;
            ensure!(sidecar.cli(&["publish", "127.0.0.1:0:80"])?.status.success());
        }
        // What was published live is back with the port it had.
        let ports = sidecar.json(&["ports"])?;
        let live = ports.as_array().and_then(|all| all.iter().find(|p| p["guest_port"] == 80));
        let live = live.and_then(|p| p["host_port"].as_u64()).with_context(|| format!("run {n}: {ports}"))?;
        ensure!(*known_port.get_or_insert(live) == live, "run {n}: port {known_port:?} became {live}");
        // More leases, so that the file is being written when the end comes.
        let mut others: Vec<[u8; 6]> = Vec::new();
        for other in 0..(n * 7) % 40 {
            let mac = [2, 5, 5, 5, u8::try_from(n % 256)?, u8::try_from(other)?];
            guest.raw(&framed(&request(mac, u8::try_from(100 + other)?)))?;
            others.push(mac);
        }
        signal(&sidecar, Signal::SIGKILL)?;
        until(Duration::from_secs(5), || !sidecar.is_alive().unwrap_or(true))?;
        ensure!(
            dir.path().join("api").exists() && dir.path().join("vm").exists(),
            "they are stale, and not gone"
        );
        // Whole, if perhaps without this guest: from its DISCOVER to its REQUEST its lease is an offer, and offers are not kept. The
        // next run shows that the address is its own all the same.
        let text = std::fs::read_to_string(state.join("leases.json"))?;
        let whole = serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|v| v.is_array());
        ensure!(whole, "run {n}: the state is torn: {text:?}");
    }
    Ok(())
}

/// A DHCP request for an address, in a frame.
fn request(mac: [u8; 6], last: u8) -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0, 1, 2, 3, last];
    bootp.resize(236, 0);
    bootp[28..34].copy_from_slice(&mac);
    bootp.extend([99, 130, 83, 99, 53, 1, 3, 50, 4, 192, 168, 127, last, 255]);
    let udp =
        [&[0, 68, 0, 67][..], &u16::try_from(8 + bootp.len()).unwrap_or(0).to_be_bytes(), &[0, 0], &bootp]
            .concat();
    let total = u16::try_from(20 + udp.len()).unwrap_or(0).to_be_bytes();
    let mut head = [0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let sum = checksum(&[&head]);
    head[10..12].copy_from_slice(&sum);
    [&[0xff; 6][..], &mac, &[8, 0], &head, &udp].concat()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap_or(0).to_be_bytes()[..], frame].concat()
}

#[test]
fn a_stopped_process_goes_on_where_it_was() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), &[])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let flow = guest.connect((ALIAS, echo_server()?).into())?.context("refused")?;
    ensure!(guest.exchange(flow, b"before", 6)? == b"before");
    signal(&sidecar, Signal::SIGSTOP)?;
    let stopped = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", sidecar.pid())).unwrap_or_default();
        stat.contains(") T ")
    };
    until(Duration::from_secs(5), stopped)?;
    // What is sent meanwhile waits in the sockets.
    guest.tcp(flow).send_slice(b"while stopped").map_err(|e| anyhow::anyhow!("{e:?}"))?;
    guest.step();
    signal(&sidecar, Signal::SIGCONT)?;
    ensure!(guest.exchange(flow, b"", 13)? == b"while stopped");
    ensure!(sidecar.json(&["flows"])?.as_array().is_some_and(|f| f.len() == 1));
    Ok(())
}

#[test]
fn a_full_disk_is_said_and_leases_go_on() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make a small file system");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    std::fs::create_dir(&state)?;
    let mount = |args: &[&str]| Command::new("mount").args(args).arg(&state).status();
    ensure!(mount(&["-t", "tmpfs", "-o", "size=16k,mode=700", "none"])?.success());
    let unmounted = Unmounted(&state);
    // Not a byte is left.
    let mut file = std::fs::File::create(state.join("filling"))?;
    while file.write_all(&[1; 1024]).is_ok() {}
    drop(file);
    let sidecar = Sidecar::start(dir.path(), &["--state-dir", state.to_str().context("path")?])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    until(Duration::from_secs(5), || sidecar.log().contains("leases could not be kept"))?;
    let flow = guest.connect((ALIAS, echo_server()?).into())?.context("refused")?;
    ensure!(guest.exchange(flow, b"alive", 5)? == b"alive");
    // With room again the next change is kept.
    std::fs::remove_file(state.join("filling"))?;
    guest.raw(&framed(&request([2, 5, 5, 5, 5, 5], 99)))?;
    until(Duration::from_secs(5), || {
        guest.step();
        std::fs::read_to_string(state.join("leases.json")).is_ok_and(|t| t.contains("192.168.127.2"))
    })?;
    drop((sidecar, unmounted));
    Ok(())
}

struct Unmounted<'a>(&'a std::path::Path);

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn readers_that_do_not_read_keep_nobody_waiting() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let second = format!("qemu:unix:{},name=second", dir.path().join("second").display());
    let sidecar = Sidecar::start(dir.path(), &["--link", &second])?;
    let echo = echo_server()?;
    // A guest that asks for much and reads nothing of its link.
    let mut deaf = Guest::attach(&dir.path().join("vm"), 1)?;
    deaf.dhcp()?;
    let source = TcpListener::bind("127.0.0.1:0")?;
    let port = source.local_addr()?.port();
    std::thread::spawn(move || {
        let (mut stream, _) = source.accept()?;
        stream.write_all(&vec![9; 64 << 20])
    });
    deaf.connect((ALIAS, port).into())?.context("refused")?;
    // API clients that ask and do not read.
    let mut silent = Vec::new();
    for _ in 0..40 {
        let mut client = UnixStream::connect(dir.path().join("api"))?;
        for _ in 0..50 {
            client.write_all(b"GET /v1/stats HTTP/1.1\r\nHost: x\r\n\r\n")?;
        }
        silent.push(client);
    }
    let mut guest = Guest::attach(&dir.path().join("second"), 2)?;
    guest.dhcp()?;
    for _ in 0..20 {
        let flow = guest.connect((ALIAS, echo).into())?.context("refused")?;
        ensure!(guest.exchange(flow, &[3; 100_000], 100_000)?.len() == 100_000);
        guest.tcp(flow).abort();
    }
    ensure!(sidecar.json(&["stats"])?["links"].as_array().is_some_and(|l| l.len() == 2));
    Ok(())
}

/// What a debug build of the program panics at when it is told to (forwarder/src/last_net.rs).
const PANIC: &str = "panic on purpose";

#[test]
fn a_panic_costs_the_flow_or_the_link_it_was_about_and_no_other() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(portway()?);
    command.env("PORTWAY_TEST_PANIC", PANIC);
    let second = format!("qemu:unix:{},name=second", dir.path().join("second").display());
    let mut sidecar = Sidecar::start_by(command, dir.path(), &["--link", &second])?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let mut bystander = Guest::attach(&dir.path().join("second"), 2)?;
    bystander.dhcp()?;
    let to = (ALIAS, echo_server()?).into();
    let bystanders = bystander.connect(to)?.context("refused")?;
    let (bad, good) = (guest.connect(to)?.context("refused")?, guest.connect(to)?.context("refused")?);
    // A flow: the guest's other flow goes on, and so does everybody else.
    guest.tcp(bad).send_slice(PANIC.as_bytes()).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    guest.until("the end of the flow", |g| (g.tcp(bad).state() == State::Closed).then_some(()))?;
    ensure!(guest.exchange(good, b"good", 4)? == b"good");
    ensure!(bystander.exchange(bystanders, b"other", 5)? == b"other");
    ensure!(sidecar.json(&["stats"])?["panics"] == 1);
    // A frame: its link is closed, and the VMM may come again.
    let socket = guest.udp(7000)?;
    guest.send_udp(socket, to, PANIC.as_bytes())?;
    until(Duration::from_secs(5), || guest.step())?;
    ensure!(bystander.exchange(bystanders, b"still", 5)? == b"still");
    let mut again = Guest::attach(&dir.path().join("vm"), 1)?;
    again.dhcp()?;
    let flow = again.connect(to)?.context("refused")?;
    ensure!(again.exchange(flow, b"again", 5)? == b"again");
    ensure!(sidecar.json(&["stats"])?["panics"] == 2 && sidecar.is_alive()?);
    ensure!(sidecar.log().matches("panicked; this is a fault of portway").count() == 2, "{}", sidecar.log());
    ensure!(sidecar.stop()?.code() == Some(0));
    Ok(())
}
