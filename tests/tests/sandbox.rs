//! What the running sidecar may not do, looked at from outside: `/proc`, strace, files it is led to.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::portway;

const NOBODY: u32 = 65_534;
const ALIAS: [u8; 4] = [192, 168, 127, 254];

/// The value of `field` in the status of every thread of `pid`.
fn of_every_thread(pid: u32, field: &str) -> Result<Vec<String>> {
    let mut values = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let value = status.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':').map(str::trim));
        values.push(value.with_context(|| format!("no {field}"))?.to_owned());
    }
    ensure!(values.len() >= 2, "the data and the control thread, and not {values:?}");
    Ok(values)
}

fn all_are(pid: u32, field: &str, wanted: &str) -> Result<()> {
    let values = of_every_thread(pid, field)?;
    ensure!(values.iter().all(|v| v == wanted), "{field}: {values:?}");
    Ok(())
}

fn has_given_up(sidecar: &Sidecar) -> Result<()> {
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        all_are(sidecar.pid(), set, "0000000000000000")?;
    }
    all_are(sidecar.pid(), "NoNewPrivs", "1")?;
    all_are(sidecar.pid(), "Seccomp", "2")?;
    let stats = sidecar.json(&["stats"])?;
    let parts = stats["sandbox"]["parts"].as_array().context("no parts")?.clone();
    ensure!(parts.len() == 6 && stats["sandbox"]["refused_calls"] == 0, "{stats}");
    for part in &parts {
        // A kernel without Landlock is the one thing a test machine may lack.
        ensure!(part["in_force"] == true || part["name"] == "landlock", "{part}");
    }
    // The same is shown wherever one looks.
    let network = get(&sidecar.dir.join("api"), "/v1/network")?;
    ensure!(network["sandbox"]["parts"] == stats["sandbox"]["parts"], "{network}");
    let doctor = sidecar.json(&["doctor"])?;
    let line = doctor.as_array().and_then(|all| all.iter().find(|c| c["check"] == "sandbox-in-force"));
    let line = line.with_context(|| format!("{doctor}"))?;
    let complete = parts.iter().all(|p| p["in_force"] == true);
    let found = line["found"].as_str().unwrap_or_default();
    ensure!(found.starts_with("complete") == complete && found.contains("seccomp") == complete, "{line}");
    Ok(())
}

/// What the control API says to a question.
fn get(api: &Path, route: &str) -> Result<serde_json::Value> {
    let mut client = UnixStream::connect(api)?;
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(client, "GET {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
    Ok(serde_json::from_str(body)?)
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A directory anybody may use, with the program in it.
fn anybodys() -> Result<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777))?;
    let program = dir.path().join("portway");
    // A link would do, were the way to the target open to everybody.
    // By another process: one of ours that was forked meanwhile would keep it open for writing, and then it cannot be run.
    ensure!(Command::new("cp").arg(portway()?).arg(&program).status()?.success());
    Ok((dir, program))
}

#[test]
fn an_ordinary_users_sidecar_has_nothing_left_on_any_thread() -> Result<()> {
    let (dir, program) = anybodys()?;
    let mut command = Command::new(&program);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let sidecar = Sidecar::start_by(command, dir.path(), &["--sandbox", "require"])?;
    has_given_up(&sidecar)?;
    // capabilities(7): only CAP_SETPCAP takes from the bounding set, and an ordinary user does not have it. What is in it can never be
    // had: no_new_privs, and execve ends the process. That is said, too.
    let mine = std::fs::read_to_string("/proc/self/status")?;
    let mine = mine.lines().find_map(|l| l.strip_prefix("CapBnd:")).context("CapBnd")?.trim().to_owned();
    all_are(sidecar.pid(), "CapBnd", &mine)?;
    let parts = sidecar.json(&["stats"])?["sandbox"]["parts"].clone();
    let empty = mine.bytes().all(|b| b == b'0');
    ensure!(parts[1]["detail"].to_string().contains("the bounding set stays") != empty, "{parts}");
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    // Threads that came with the traffic are no different.
    has_given_up(&sidecar)?;
    ensure!(sidecar.stop()?.code() == Some(0));
    Ok(())
}

#[test]
fn root_becomes_nobody_where_nobody_can_do_the_work_and_empties_the_bounding_set() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: only root can become somebody else");
        return Ok(());
    }
    let (dir, program) = anybodys()?;
    let state = dir.path().join("state");
    std::fs::create_dir(&state)?;
    nix::unistd::chown(&state, Some(NOBODY.into()), Some(NOBODY.into()))?;
    let options = ["--sandbox", "require", "--state-dir", state.to_str().context("path")?];
    let sidecar = Sidecar::start_by(Command::new(&program), dir.path(), &options)?;
    has_given_up(&sidecar)?;
    all_are(sidecar.pid(), "CapBnd", "0000000000000000")?;
    all_are(sidecar.pid(), "Uid", "65534\t65534\t65534\t65534")?;
    all_are(sidecar.pid(), "Groups", "65534")?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    // State is kept by who we are now, and nothing stays behind.
    until(Duration::from_secs(5), || state.join("leases.json").exists())?;
    ensure!(std::fs::metadata(state.join("leases.json"))?.uid() == NOBODY);
    drop(guest);
    ensure!(sidecar.stop()?.code() == Some(0));
    ensure!(!dir.path().join("api").exists() && !dir.path().join("vm").exists());
    Ok(())
}

#[test]
fn root_of_a_user_namespace_empties_the_bounding_set_too() -> Result<()> {
    let (dir, program) = anybodys()?;
    let namespace = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user"]);
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    if !namespace().arg("true").output().is_ok_and(|out| out.status.success()) {
        eprintln!("skipped: this host has no user namespaces for ordinary users");
        return Ok(());
    }
    let mut command = namespace();
    command.arg(&program);
    let sidecar = Sidecar::start_by(command, dir.path(), &["--sandbox", "require"])?;
    has_given_up(&sidecar)?;
    all_are(sidecar.pid(), "CapBnd", "0000000000000000")?;
    ensure!(sidecar.stop()?.code() == Some(0));
    Ok(())
}

#[test]
fn root_whose_directories_are_its_own_stays_but_without_capabilities() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: this is about root");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), &[])?;
    has_given_up(&sidecar)?;
    all_are(sidecar.pid(), "CapBnd", "0000000000000000")?;
    let detail = sidecar.json(&["stats"])?["sandbox"]["parts"][0]["detail"].to_string();
    ensure!(detail.contains("uid 0") && detail.contains("--runas"), "{detail}");
    ensure!(sidecar.stop()?.code() == Some(0));
    ensure!(!dir.path().join("api").exists() && !dir.path().join("vm").exists());
    Ok(())
}

#[test]
fn runas_names_the_user_and_hands_our_directory_over() -> Result<()> {
    if !is_root() {
        eprintln!("skipped: only root can become somebody else");
        return Ok(());
    }
    let (dir, program) = anybodys()?;
    let state = dir.path().join("state");
    let options = ["--runas", "daemon", "--state-dir", state.to_str().context("path")?];
    let sidecar = Sidecar::start_by(Command::new(&program), dir.path(), &options)?;
    let daemon = nix::unistd::User::from_name("daemon")?.context("no user daemon")?.uid.as_raw();
    all_are(
        sidecar.pid(),
        "Uid",
        &std::iter::repeat_n(daemon.to_string(), 4).collect::<Vec<_>>().join("\t"),
    )?;
    ensure!(std::fs::metadata(&state)?.uid() == daemon);
    let unknown = Command::new(&program)
        .args(["serve", "--link", "qemu:fd:0", "--runas", "no-such-user", "--api"])
        .arg(format!("unix:{}", dir.path().join("other").display()))
        .stdin(UnixStream::pair().map(|(a, _)| std::os::fd::OwnedFd::from(a))?)
        .output()?;
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(unknown.status.code() == Some(2) && said.contains("no-such-user"), "{said}");
    ensure!(!dir.path().join("other").exists());
    Ok(())
}

#[test]
fn off_is_off_and_says_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), &["--sandbox", "off"])?;
    all_are(sidecar.pid(), "Seccomp", "0")?;
    let stats = sidecar.json(&["stats"])?;
    ensure!(
        stats["sandbox"]["mode"] == "off" && stats["sandbox"]["parts"][5]["in_force"] == false,
        "{stats}"
    );
    Ok(())
}

#[test]
fn descriptors_nobody_named_are_closed_before_anything_is_opened() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let secret = std::fs::File::create(dir.path().join("secret"))?;
    let leaked = nix::unistd::dup(&secret)?;
    let mut command = Command::new(portway()?);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&leaked);
    nix::fcntl::fcntl(&leaked, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    command.env("LEAKED", fd.to_string());
    let sidecar = Sidecar::start_by(command, dir.path(), &[])?;
    let open = std::fs::read_dir(format!("/proc/{}/fd", sidecar.pid()));
    let Ok(open) = open else {
        eprintln!("skipped: only root may look at a process that is not dumpable");
        return Ok(());
    };
    let secret = dir.path().join("secret");
    let kept = open.flatten().any(|e| std::fs::read_link(e.path()).is_ok_and(|to| to == secret));
    ensure!(!kept, "the sidecar kept {}", secret.display());
    Ok(())
}

/// A query for the A record of `name`.
fn query(name: &str) -> Vec<u8> {
    let mut q = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        q.push(u8::try_from(label.len()).unwrap_or(0));
        q.extend(label.as_bytes());
    }
    q.extend([0, 0, 1, 0, 1]);
    q
}

#[test]
fn a_file_outside_of_the_directories_cannot_be_opened() -> Result<()> {
    reads_nothing_outside(Command::new(portway()?), tempfile::tempdir()?)
}

#[test]
fn an_ordinary_user_cannot_open_a_file_outside_that_everybody_may_read() -> Result<()> {
    let (run, program) = anybodys()?;
    let mut command = Command::new(program);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    reads_nothing_outside(command, run)
}

fn reads_nothing_outside(command: Command, run: tempfile::TempDir) -> Result<()> {
    let (inside, outside) = (tempfile::tempdir()?, tempfile::tempdir()?);
    for directory in [&inside, &outside] {
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
    }
    let hosts = inside.path().join("hosts");
    std::fs::write(inside.path().join("first"), "192.0.2.1 name.test\n")?;
    std::fs::write(outside.path().join("second"), "192.0.2.2 name.test\n")?;
    symlink(inside.path().join("first"), &hosts)?;
    let silent = UdpSocket::bind("127.0.0.1:0")?;
    let options = [
        "--hosts-file",
        hosts.to_str().context("path")?,
        "--dns-upstream",
        &silent.local_addr()?.to_string(),
    ];
    let sidecar = Sidecar::start_by(command, run.path(), &options)?;
    let landlock = sidecar.json(&["stats"])?["sandbox"]["parts"][4]["in_force"] == true;
    if !landlock {
        eprintln!("skipped: this kernel has no Landlock");
        return Ok(());
    }
    let mut guest = Guest::attach(&run.path().join("vm"), 1)?;
    guest.dhcp()?;
    let gateway = SocketAddr::from(([192, 168, 127, 1], 53));
    let (_, answer) = guest.ask_udp(5353, gateway, &query("name.test"))?;
    ensure!(answer.ends_with(&[192, 0, 2, 1]), "{answer:?}");
    // The same name now leads out of what the sidecar may read: what was known stays, and the log says why.
    let other = inside.path().join("other");
    symlink(outside.path().join("second"), &other)?;
    std::fs::rename(&other, &hosts)?;
    until(Duration::from_secs(10), || {
        let _ = guest.ask_udp(5353, gateway, &query("name.test"));
        sidecar.log().contains("cannot read; what it said before stays")
    })?;
    let (_, answer) = guest.ask_udp(5353, gateway, &query("name.test"))?;
    ensure!(answer.ends_with(&[192, 0, 2, 1]), "{answer:?}");
    Ok(())
}

#[test]
fn a_socket_is_published_live_in_the_allowed_directories_and_nowhere_else() -> Result<()> {
    let (run, allowed, outside) = (tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?);
    let sidecar = Sidecar::start(run.path(), &["--allow-path", allowed.path().to_str().context("path")?])?;
    let mut guest = Guest::attach(&run.path().join("vm"), 1)?;
    guest.dhcp()?;
    for (directory, good) in [(run.path(), true), (allowed.path(), true), (outside.path(), false)] {
        let spec = format!("unix:{}:22", directory.join("published").display());
        let out = sidecar.cli(&["publish", &spec])?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success() == good, "{spec}: {said}");
        ensure!(directory.join("published").exists() == good, "{spec}");
        ensure!(good || said.contains("--allow-path"), "{said}");
    }
    // It works, and goes when it is told to.
    let server = guest.listen(22)?;
    let mut client = UnixStream::connect(allowed.path().join("published"))?;
    client.write_all(b"hello")?;
    ensure!(guest.exchange(server, b"", 5)? == b"hello");
    let spec = format!("unix:{}:22", allowed.path().join("published").display());
    ensure!(sidecar.cli(&["unpublish", &spec])?.status.success());
    ensure!(!allowed.path().join("published").exists());
    Ok(())
}

/// Names of the calls of a trace that were made after the sandbox was complete, and signals that say one was refused.
fn traced(trace: &Path) -> Result<(Vec<String>, usize)> {
    let text = String::from_utf8_lossy(&std::fs::read(trace)?).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.iter().rposition(|l| l.contains(" seccomp(")).context("no filter was installed")?;
    let after = lines.get(last + 1..).unwrap_or_default();
    let calls = after.iter().filter_map(|l| {
        let (_, call) = l.split_once(char::is_whitespace)?;
        let name = call.trim_start().split_once('(')?.0;
        (!name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'))
            .then(|| name.to_owned())
    });
    Ok((calls.collect(), after.iter().filter(|l| l.contains("SIGSYS")).count()))
}

#[test]
fn strace_of_a_run_shows_no_call_outside_of_the_list() -> Result<()> {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("skipped: there is no strace");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let trace = dir.path().join("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&trace).arg(portway()?);
    let state = dir.path().join("state");
    let resolver = UdpSocket::bind("127.0.0.1:0")?;
    let upstream = resolver.local_addr()?.to_string();
    let options = [
        "--publish",
        "0:22",
        "--publish",
        "0:53/udp",
        "--dns-upstream",
        &upstream,
        "--state-dir",
        state.to_str().context("path")?,
    ];
    let sidecar = Sidecar::start_by(command, dir.path(), &options)?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    // Out: a flow, a refusal, datagrams, names.
    let echo = TcpListener::bind("127.0.0.1:0")?;
    let to = SocketAddr::from((ALIAS, echo.local_addr()?.port()));
    let server = std::thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = echo.accept()?;
        let mut back = stream.try_clone()?;
        std::io::copy(&mut stream, &mut back)
    });
    let flow = guest.connect(to)?.context("refused")?;
    ensure!(guest.exchange(flow, &[7; 300_000], 300_000)?.len() == 300_000);
    guest.tcp(flow).close();
    guest.until("end", |g| (!g.tcp(flow).is_active() || !g.tcp(flow).may_recv()).then_some(()))?;
    ensure!(server.join().is_ok_and(|r| r.is_ok()));
    ensure!(guest.connect((ALIAS, to.port()).into())?.is_none());
    let gateway = SocketAddr::from(([192, 168, 127, 1], 53));
    guest.ask_udp(5353, gateway, &query("host.portway.internal"))?;
    guest.udp(6000)?;
    let datagrams = UdpSocket::bind("127.0.0.1:0")?;
    let at = SocketAddr::from((ALIAS, datagrams.local_addr()?.port()));
    std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((n, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(&buffer[..n], from);
        }
    });
    guest.ask_udp(6001, at, b"datagram")?;
    // In: published ports, live ones too, and every listing.
    let port = sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("port")?;
    let server = guest.listen(22)?;
    let mut client = std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port)?))?;
    client.write_all(b"in")?;
    ensure!(guest.exchange(server, b"", 2)? == b"in");
    let spec = format!("unix:{}:80", dir.path().join("published").display());
    ensure!(sidecar.cli(&["publish", &spec])?.status.success());
    ensure!(sidecar.cli(&["unpublish", &spec])?.status.success());
    for listing in ["ports", "leases", "flows", "stats"] {
        sidecar.json(&[listing])?;
    }
    // The link goes and comes, and a length no frame has ends it.
    guest.raw(&0xffff_ffffu32.to_be_bytes())?;
    until(Duration::from_secs(5), || guest.step())?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    until(Duration::from_secs(5), || state.join("leases.json").exists())?;
    let stats = sidecar.json(&["stats"])?;
    ensure!(stats["sandbox"]["refused_calls"] == 0, "{stats}");
    let pid: i32 = std::fs::read_to_string(dir.path().join("pid"))?.parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)?;
    until(Duration::from_secs(10), || !dir.path().join("api").exists())?;
    drop(sidecar);

    let (calls, refused) = traced(&trace)?;
    ensure!(refused == 0, "{refused} calls were refused");
    ensure!(calls.len() > 100, "only {} calls in the trace", calls.len());
    let others = not_listed(&calls);
    ensure!(others.is_empty(), "not in the list: {others:?}");
    Ok(())
}

/// Those of `calls` that are in no table.
fn not_listed(calls: &[String]) -> BTreeSet<&str> {
    let allowed: BTreeSet<&str> =
        portway::sandbox::allowed_calls().into_iter().map(|(_, name)| name).collect();
    calls.iter().map(String::as_str).filter(|name| !allowed.contains(name)).collect()
}

#[test]
#[ignore = "`make calls` gives it the traces of the whole suite"]
fn the_suites_traces_show_no_call_outside_of_the_list() -> Result<()> {
    let traces = std::env::var_os("PORTWAY_TRACES").context("PORTWAY_TRACES: run `make calls`")?;
    let (mut all, mut runs, mut without, mut refusals) = (Vec::new(), 0, 0, Vec::new());
    for file in std::fs::read_dir(traces)?.flatten() {
        if !file.file_name().to_string_lossy().starts_with("trace.") {
            continue;
        }
        // A run that had nothing to serve, or was told to be without, has no filter.
        let Ok((calls, refused)) = traced(&file.path()) else {
            without += 1;
            continue;
        };
        runs += 1;
        all.extend(calls);
        if refused > 0 {
            refusals.push(file.path());
        }
    }
    let used: BTreeSet<&str> = all.iter().map(String::as_str).collect();
    let listed: BTreeSet<&str> =
        portway::sandbox::allowed_calls().into_iter().map(|(_, name)| name).collect();
    let unused: Vec<&&str> = listed.difference(&used).collect();
    eprintln!(
        "{runs} runs behind the sandbox ({without} without), {} calls of {} kinds; listed and not seen: {unused:?}",
        all.len(),
        used.len()
    );
    ensure!(runs > 20, "{runs} traces are not the suite's");
    let others = not_listed(&all);
    ensure!(others.is_empty(), "not in the list: {others:?}");
    ensure!(refusals.is_empty(), "calls were refused: {refusals:?}");
    Ok(())
}
