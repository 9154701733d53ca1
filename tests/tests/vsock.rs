//! A real guest with our own vsock device: `portway serve --vsock vhost-user:unix:…` and QEMU's `vhost-user-vsock-pci`.
//!
//! The guest has no network card: all it is asked goes through a shell on its vsock port 7000. Needs QEMU
//! (`tests/setup.sh`) and the demo's guest; without QEMU the tests say that they were skipped.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::launch::has_qemu;
use portway_tests::machine::{self, Machine, SHELL};
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::{blob, first_word, sha256};

/// A guest under TCG takes some seconds to its shell; on a busy machine some more.
const BOOT: Duration = Duration::from_secs(120);
/// How long anything else may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// What is moved each way, whoever opens the stream.
const BLOB_LEN: usize = 50_000_000;
/// What is moved once each way.
const GIGABYTE: usize = 1_000_000_000;
/// Streams at once.
const MANY: usize = 1000;
/// The guest's services.
const SHA256: u32 = 7001;
const FILE: u32 = 7002;
const ECHO: u32 = 7003;
/// Nobody listens there.
const CLOSED: u32 = 7009;
/// Ports of the host.
const GIVES: u32 = 9001;
const TAKES: u32 = 9002;
const ECHOES: u32 = 9003;

/// A stream to a port of the guest's.
fn port(dir: &Path, port: u32) -> Result<UnixStream> {
    machine::port(&dir.join("ports"), port)
}

/// Runs a command in the guest and answers what it printed; the shell is waited for.
fn guest(dir: &Path, command: &str, patience: Duration) -> Result<String> {
    let console = || std::fs::read_to_string(dir.join("console")).unwrap_or_default();
    machine::shell(&dir.join("ports"), command, patience).with_context(console)
}

/// The ports that the agent of the guest has published: those of these tests.
const RULES: &str = "[[auto-publish]]\nguest-address = \"any\"\nguest-ports = \"30000-31999\"\n";

/// The sidecar with the vsock device, and the sockets of the guest's ports in `dir/ports`.
fn serve(dir: &Path) -> Result<Sidecar> {
    let rules = dir.join("portway.toml");
    std::fs::write(&rules, RULES)?;
    let (vsock, ports) = (format!("vhost-user:unix:{}", dir.join("vsock").display()), dir.join("ports"));
    let numbers = [SHELL, SHA256, FILE, ECHO, CLOSED].map(|port| port.to_string()).join(",");
    let (ports, rules) = (ports.display().to_string(), rules.display().to_string());
    Sidecar::start(
        dir,
        &["--vsock", &vsock, "--vsock-ports", &numbers, "--vsock-dir", &ports, "--config", &rules],
    )
}

/// Where streams of the guest's to a port of the host arrive.
fn arrivals(dir: &Path, port: u32) -> Result<UnixListener> {
    Ok(UnixListener::bind(dir.join(format!("ports/00000002.{port:08x}")))?)
}

fn sha_of(dir: &Path, stream: &mut impl Read) -> Result<String> {
    let path: PathBuf = dir.join("received");
    std::io::copy(stream, &mut std::fs::File::create(&path)?)?;
    sha256(&path)
}

#[test]
fn streams_of_a_real_guest() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let file = dir.join("blob");
    blob(&file, BLOB_LEN)?;
    let sum = sha256(&file)?;
    let mut sidecar = serve(dir)?;
    let chardev = format!("socket,id=vsock,path={}", dir.join("vsock").display());
    let device = ["-chardev", &chardev, "-device", "vhost-user-vsock-pci,chardev=vsock,vectors=0"];
    let mut machine = Machine::boot(dir, &device)?;
    let step =
        |what: &str, start: Instant| eprintln!("vsock: {what}: {:.1} s", start.elapsed().as_secs_f32());
    let start = Instant::now();
    ensure!(guest(dir, "echo hello", BOOT)? == "hello\n");
    step("boot", start);

    let start = Instant::now();
    let gives = arrivals(dir, GIVES)?;
    let giver = thread::spawn({
        let file = file.clone();
        move || -> Result<()> {
            let (mut stream, _) = gives.accept()?;
            std::io::copy(&mut std::fs::File::open(file)?, &mut stream)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        }
    });
    let fetch = format!("guest-probe vsock-send {GIVES} < /dev/null > /tmp/blob; sha256sum /tmp/blob");
    let said = guest(dir, &fetch, PATIENCE)?;
    giver.join().expect("no panic")?;
    ensure!(first_word(&said) == sum, "to the guest, which asked: {said}");
    step("50 MB to the guest, which opened the stream", start);

    let start = Instant::now();
    ensure!(sha_of(dir, &mut port(dir, FILE)?)? == sum, "to the host, which asked: other bytes");
    step("50 MB to the host, which opened the stream", start);

    let start = Instant::now();
    let mut stream = port(dir, SHA256)?;
    std::io::copy(&mut std::fs::File::open(&file)?, &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(first_word(&said) == sum, "to the guest, asked by the host: {said}");
    step("50 MB to the guest, the host opened the stream", start);

    let start = Instant::now();
    let takes = arrivals(dir, TAKES)?;
    let taker = thread::spawn({
        let dir = dir.to_owned();
        move || -> Result<String> {
            let (mut stream, _) = takes.accept()?;
            let sum = sha_of(&dir, &mut stream)?;
            stream.write_all(b"got it\n")?;
            Ok(sum)
        }
    });
    let said = guest(dir, &format!("guest-probe vsock-send {TAKES} < /tmp/blob"), PATIENCE)?;
    ensure!(said == "got it\n", "the answer after the end of the other direction: {said:?}");
    ensure!(taker.join().expect("no panic")? == sum, "to the host, asked by the guest: other bytes");
    step("50 MB to the host, the guest opened the stream", start);

    refused(dir)?;
    let start = Instant::now();
    many(dir)?;
    step("1000 streams at once, each way", start);

    // The guest reboots: what was open ends, and the next guest is served.
    let mut held = port(dir, ECHO)?;
    held.write_all(b"x")?;
    held.read_exact(&mut [0])?;
    machine.command(r#"{"execute":"system_reset"}"#)?;
    ensure!(held.read(&mut [0])? == 0, "a stream outlives its guest");
    let start = Instant::now();
    ensure!(guest(dir, "cat /tmp/blob 2>/dev/null | wc -c", BOOT)? == "0\n", "it did not reboot");
    step("reboot", start);
    ensure!(sidecar.is_alive()?);
    ensure!(sidecar.stop()?.success());
    let left: Vec<_> =
        std::fs::read_dir(dir.join("ports"))?.filter_map(|f| Some(f.ok()?.file_name())).collect();
    ensure!(left.len() == 3, "names of sockets that nobody serves: {left:?}");
    Ok(())
}

#[test]
fn a_gigabyte_arrives_as_it_was_sent_each_way() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let file = dir.join("blob");
    blob(&file, GIGABYTE)?;
    let sum = sha256(&file)?;
    let sidecar = serve(dir)?;
    let chardev = format!("socket,id=vsock,path={}", dir.join("vsock").display());
    let device = ["-chardev", &chardev, "-device", "vhost-user-vsock-pci,chardev=vsock,vectors=0"];
    let _machine = Machine::boot(dir, &device)?;
    ensure!(guest(dir, "echo hello", BOOT)? == "hello\n");
    // The shell may be there before the others are.
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    until(PATIENCE, || {
        port(dir, SHA256).is_ok_and(|mut stream| {
            let mut said = String::new();
            let asked = stream.shutdown(Shutdown::Write).and_then(|()| stream.read_to_string(&mut said));
            asked.is_ok() && first_word(&said) == empty
        })
    })?;
    let rate = |start: Instant| 8.0 / start.elapsed().as_secs_f32();

    let start = Instant::now();
    let mut stream = port(dir, SHA256)?;
    std::io::copy(&mut std::fs::File::open(&file)?, &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(first_word(&said) == sum, "to the guest: {said}");
    eprintln!("vsock: 1 GB to the guest and through its sha256sum: {:.2} Gbit/s", rate(start));

    let start = Instant::now();
    let mut shell = port(dir, SHELL)?;
    writeln!(shell, "exec guest-probe give {GIGABYTE}")?;
    shell.shutdown(Shutdown::Write)?;
    ensure!(sha_of(dir, &mut shell)? == sum, "to the host: other bytes");
    eprintln!("vsock: 1 GB to the host, into a file: {:.2} Gbit/s", rate(start));
    ensure!(sidecar.stop()?.success());
    Ok(())
}

/// Ports that nobody listens on, either way.
fn refused(dir: &Path) -> Result<()> {
    ensure!(port(dir, CLOSED)?.read(&mut [0])? == 0, "a closed port of the guest's");
    let said = guest(dir, "guest-probe vsock-send 9999 < /dev/null 2>&1", PATIENCE)?;
    ensure!(said.contains("reset"), "a closed port of the host's: {said}");
    Ok(())
}

/// A thousand streams open at once, from each side, and bytes on each of them.
fn many(dir: &Path) -> Result<()> {
    let mut streams = (0..MANY).map(|_| port(dir, ECHO)).collect::<Result<Vec<_>>>()?;
    for (n, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&n.to_le_bytes())?;
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        let mut echo = [0; 8];
        stream.read_exact(&mut echo).with_context(|| format!("stream {n}"))?;
        ensure!(echo == n.to_le_bytes(), "stream {n} has the bytes of another");
    }
    drop(streams);
    let listener = arrivals(dir, ECHOES)?;
    let echo = thread::spawn(move || -> Result<()> {
        let mut streams = Vec::new();
        while streams.len() < MANY {
            streams.push(listener.accept()?.0);
        }
        for stream in &mut streams {
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes)?;
            stream.write_all(&bytes)?;
        }
        Ok(())
    });
    let said = guest(dir, &format!("guest-probe vsock-dial-many {MANY} {ECHOES} 2>&1"), PATIENCE)?;
    ensure!(said == format!("held {MANY}\n"), "{said}");
    echo.join().expect("no panic")
}

#[test]
fn a_sidecar_that_was_killed_comes_back_to_a_running_guest() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let sidecar = serve(dir)?;
    // QEMU connects again by itself, but its vsock device never negotiates again: so it is plugged in anew. And it must be
    // plugged in, for at the start QEMU does not wait for a socket that reconnects.
    let chardev = format!("socket,id=vsock,path={},reconnect=1", dir.join("vsock").display());
    let mut machine = Machine::boot(dir, &["-chardev", &chardev, "-device", "pcie-root-port,id=slot0"])?;
    let plug = r#"{"execute":"device_add","arguments":{"driver":"vhost-user-vsock-pci","chardev":"vsock","id":"vsock0","bus":"slot0","vectors":0}}"#;
    let attached = |sidecar: &Sidecar| until(PATIENCE, || sidecar.log().contains("vsock: VMM attached"));
    attached(&sidecar)?;
    // We have its connection before QEMU itself takes notice of it; until then it refuses the device.
    let plugged = |machine: &mut Machine| until(PATIENCE, || machine.command(plug).is_ok());
    plugged(&mut machine)?;
    ensure!(guest(dir, "echo before > /tmp/mark; cat /tmp/mark", BOOT)? == "before\n");
    // The shell may be there before the echo is.
    let echo = || -> Result<UnixStream> {
        let mut held = port(dir, ECHO)?;
        held.write_all(b"x")?;
        held.read_exact(&mut [0])?;
        Ok(held)
    };
    until(PATIENCE, || echo().is_ok())?;
    let mut held = echo()?;

    // The agent of the guest is there, with a port of the guest's loopback.
    let published = 30_000 + u16::try_from(std::process::id() % 1900)?;
    let listen =
        format!("guest-probe listen tcp 127.0.0.1:{published} < /dev/null > /dev/null 2>&1 & echo up");
    ensure!(guest(dir, &listen, PATIENCE)? == "up\n");
    until(PATIENCE, || echoes(published)).with_context(|| sidecar.log())?;

    drop(sidecar);
    ensure!(!echoes(published), "a listener of a sidecar that was killed");
    ensure!(!matches!(held.read(&mut [0]), Ok(n) if n > 0), "a stream outlives the sidecar");
    let sidecar = serve(dir)?;
    attached(&sidecar)?;
    ensure!(
        port(dir, SHELL)?.read(&mut [0]).unwrap_or(0) == 0,
        "nobody is there yet, and nobody is kept waiting"
    );
    machine.command(r#"{"execute":"device_del","arguments":{"id":"vsock0"}}"#)?;
    machine.unplugged("vsock0")?;
    plugged(&mut machine)?;
    ensure!(guest(dir, "cat /tmp/mark", BOOT)? == "before\n", "another guest");
    // The same agent has come again, and the same listener is published again; nothing else is.
    until(PATIENCE, || echoes(published)).with_context(|| sidecar.log())?;
    let ports = sidecar.json(&["ports"])?;
    ensure!(ports.as_array().is_some_and(|p| p.len() == 1), "{ports}");

    // A guest whose machine slept: its clock stood still, and is set; its session and its port go on.
    let said = sidecar.log().matches("clock was off").count();
    machine.command(r#"{"execute":"stop"}"#)?;
    let asleep = Instant::now();
    until(PATIENCE, || asleep.elapsed() > Duration::from_secs(4))?;
    machine.command(r#"{"execute":"cont"}"#)?;
    until(PATIENCE, || sidecar.log().matches("clock was off").count() > said)
        .with_context(|| sidecar.log())?;
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map(|d| d.as_secs());
    let before = now()?;
    let there: u64 = guest(dir, "date +%s", PATIENCE)?.trim().parse()?;
    ensure!((before - 2..=now()? + 2).contains(&there), "{before} here, {there} in the guest");
    ensure!(echoes(published) && sidecar.json(&["agents"])?[0]["sessions"] == 1, "{}", sidecar.log());
    Ok(())
}

/// Whether a byte comes back from a published port.
fn echoes(port: u16) -> bool {
    let Ok(mut client) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut byte = [0];
    client.set_read_timeout(Some(Duration::from_secs(10))).is_ok()
        && client.write_all(b"x").is_ok()
        && client.read_exact(&mut byte).is_ok()
}
