//! Outputs that take nothing, and a resolver that is not always there: what a fault of theirs costs is what goes there, and no frame.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use portway_tests::attack::{ALIAS, GROWTH, Lab, ROUTER, query};
use portway_tests::sidecar::until;

const PATIENCE: Duration = Duration::from_secs(10);

/// A small file system, gone with the value.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    /// `None`: only root may.
    fn new(at: &'a Path, size: &str) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can make a small file system");
            return Ok(None);
        }
        std::fs::create_dir(at)?;
        let options = format!("size={size},mode=777");
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(at).status()?;
        ensure!(made.success());
        Ok(Some(Self(at)))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Lines of the log that were not written, as the metrics say.
fn suppressed(lab: &Lab) -> Result<u64> {
    let mut client = UnixStream::connect(lab.dir.path().join("api"))?;
    client.set_read_timeout(Some(PATIENCE))?;
    write!(client, "GET /v1/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    client.read_to_string(&mut text)?;
    let line = text.lines().find_map(|l| l.strip_prefix("portway_log_suppressed_total "));
    Ok(line.context("no such metric")?.parse()?)
}

#[test]
fn a_log_nobody_reads_loses_lines_and_holds_no_frame_up() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o666))?;
    // Open for reading as well, so that opening waits for nobody; and then nothing is read.
    let mut reader = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(&fifo)?;
    let log = fifo.display().to_string();
    let mut lab = Lab::in_dir(dir, &["--log-file", &log, "--log-level", "trace"])?;
    // Every round is many lines; a pipe holds 64 KiB of them.
    let lost = |lab: &Lab| suppressed(lab).unwrap_or(0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while lost(&lab) == 0 {
        for _ in 0..10 {
            lab.bystander_is_served()?;
            lab.attacker_is_served()?;
        }
        ensure!(Instant::now() < deadline, "the pipe does not fill");
    }
    lab.bystander_is_served()?;
    // Somebody reads again: the log goes on, and says what is missing.
    let mut text = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut some = [0; 65_536];
        if let Ok(n) = reader.read(&mut some) {
            text.extend(&some[..n]);
        }
        if String::from_utf8_lossy(&text).contains("lines are lost: the log had no room") {
            break;
        }
        lab.bystander_is_served()?;
        ensure!(Instant::now() < deadline, "{} bytes, and no word of what is lost", text.len());
    }
    lab.everybody_is_served()
}

#[test]
fn a_disk_without_room_for_log_and_capture_costs_those_alone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let Some(small) = Small::new(&disk, "64k")? else { return Ok(()) };
    let (log, pcap) = (disk.join("log"), disk.join("pcap"));
    let options = ["--log-file", &log.display().to_string(), "--pcap", &pcap.display().to_string()];
    let mut lab = Lab::in_dir(dir, &options)?;
    let full = || std::fs::metadata(&pcap).is_ok_and(|m| m.len() > 40_000);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !full() {
        lab.bystander_is_served()?;
        ensure!(Instant::now() < deadline, "the disk does not fill");
    }
    // Beyond: everybody is served, and the process is there.
    for _ in 0..20 {
        lab.everybody_is_served()?;
    }
    ensure!(lab.stat(&["panics"])? == 0);
    let Lab { sidecar, bystander, attacker, .. } = lab;
    drop((bystander, attacker));
    ensure!(sidecar.stop()?.code() == Some(0));
    drop(small);
    Ok(())
}

#[test]
fn who_follows_and_does_not_read_is_left_behind() -> Result<()> {
    let mut lab = Lab::new(&["--metrics", "127.0.0.1:0"])?;
    lab.everybody_is_served()?;
    let before = lab.rss()?;
    let mut followers = Vec::new();
    for route in ["/v1/events", "/v1/events", "/v1/capture", "/v1/capture", "/v1/openapi.json", "/v1/flows"] {
        let mut client = UnixStream::connect(lab.dir.path().join("api"))?;
        write!(client, "GET {route} HTTP/1.1\r\nHost: x\r\n\r\n")?;
        followers.push(client);
    }
    // A server of the host that sends and a guest that takes, so that there is much to capture; flows, so that there are events.
    let source = TcpListener::bind("127.0.0.1:0")?;
    let port = source.local_addr()?.port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = source.accept() {
            // Whoever leaves early has had enough.
            let _ = stream.write_all(&vec![9; 8 << 20]);
        }
    });
    for _ in 0..4 {
        let flow = lab.bystander.connect((ALIAS, port).into())?.context("refused")?;
        ensure!(lab.bystander.exchange(flow, b"", 8 << 20)?.len() == 8 << 20);
        lab.bystander.tcp(flow).abort();
        lab.bystander.step();
        lab.bystander.forget(flow);
        lab.everybody_is_served()?;
    }
    let after = lab.rss()?;
    ensure!(after < before + GROWTH, "{before} bytes became {after}");
    drop(followers);
    until(PATIENCE, || lab.stat(&["captures"]).is_ok_and(|n| n == 0)).context("captures stay")?;
    lab.everybody_is_served()
}

/// A resolver at `address` that says 192.0.2.9 to everything until `stop`.
fn resolver(address: SocketAddr, stop: &Arc<AtomicBool>) -> Result<std::thread::JoinHandle<()>> {
    let socket = UdpSocket::bind(address)?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let stop = Arc::clone(stop);
    Ok(std::thread::spawn(move || {
        let mut query = [0; 1500];
        while !stop.load(Ordering::Relaxed) {
            let Ok((n, from)) = socket.recv_from(&mut query) else { continue };
            let Some(end) = query[..n].iter().skip(12).position(|b| *b == 0).map(|at| at + 12 + 5) else {
                continue;
            };
            let mut answer = query[..end.min(n)].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 9]);
            let _ = socket.send_to(&answer, from);
        }
    }))
}

#[test]
fn a_resolver_that_dies_is_servfail_and_one_that_returns_is_asked_again() -> Result<()> {
    // podman #21947: names are gone for good after the upstream was.
    let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    let mut lab = Lab::new(&["--dns-upstream", &address.to_string()])?;
    let ask = |lab: &mut Lab, name: &str| -> Result<Vec<u8>> {
        let answer = lab
            .bystander
            .ask_udp(5401, SocketAddr::from((ROUTER, 53)), &query(&[name, "outside", "test"]))?
            .1;
        ensure!(answer.len() > 12, "{answer:x?}");
        Ok(answer)
    };
    for round in 0..3 {
        let stop = Arc::new(AtomicBool::new(false));
        let running = resolver(address, &stop)?;
        // It is there again: asked by this query or by its repetition a second later, whatever was before.
        let began = Instant::now();
        let answer = ask(&mut lab, &format!("there{round}"))?;
        ensure!(
            answer.ends_with(&Ipv4Addr::new(192, 0, 2, 9).octets())
                && began.elapsed() < Duration::from_secs(3),
            "round {round}, after {:?}: {answer:x?}",
            began.elapsed()
        );
        stop.store(true, Ordering::Relaxed);
        running.join().map_err(|_| anyhow::anyhow!("the resolver panicked"))?;
        for n in 0..5 {
            let answer = ask(&mut lab, &format!("gone{round}n{n}"))?;
            ensure!(answer[3] & 15 == 2, "not SERVFAIL: {answer:x?}");
        }
        // What is remembered is known without it, and names of ours are.
        let answer = ask(&mut lab, &format!("there{round}"))?;
        ensure!(answer.ends_with(&[192, 0, 2, 9]), "{answer:x?}");
        lab.bystander_is_served()?;
    }
    lab.everybody_is_served()
}
