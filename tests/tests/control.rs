//! The control API and the CLI of the real `portway`, with the clients people use: curl, tshark, tmux, a shell.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::host::{Ends, echo_server, started};
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::portway;

const ALIAS: [u8; 4] = [192, 168, 127, 254];

/// Status and body, as curl sees them.
fn curl(dir: &Path, args: &[&str]) -> Result<(u16, String)> {
    let api = dir.join("api");
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "10", "-w", "\n%{http_code}", "--unix-socket"]).arg(api).args(args);
    let out = command.output().context("curl")?;
    ensure!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout)?;
    let (body, status) = text.rsplit_once('\n').context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

#[test]
fn curl_reads_every_resource_and_the_document_names_them_all() -> Result<()> {
    let (dir, sidecar, mut guest) = started(&[])?;
    let port = echo_server()?;
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    ensure!(guest.exchange(socket, b"hello", 5)? == b"hello");
    let (status, text) = curl(dir.path(), &["http://portway/v1/openapi.json"])?;
    ensure!(status == 200);
    let document: serde_json::Value = serde_json::from_str(&text)?;
    for (path, methods) in document["paths"].as_object().context("paths")? {
        if methods.get("get").is_none() || path == "/v1/capture" {
            continue;
        }
        if path == "/v1/wait" {
            // There is no agent to wait for.
            let (status, body) = curl(dir.path(), &["http://portway/v1/wait"])?;
            ensure!(status == 409 && body.contains("no_agent"), "{body}");
            continue;
        }
        let url = match path.as_str() {
            "/v1/explain" => "http://portway/v1/explain?dest=host.portway.internal:80".into(),
            other => format!("http://portway{}", other.replace("{name}", "web")),
        };
        let (status, body) = curl(dir.path(), &[&url])?;
        ensure!(status == 200, "{url}: {status} {body}");
        if path != "/v1/metrics" {
            let _: serde_json::Value = serde_json::from_str(&body).context(url)?;
        }
    }
    let flows = sidecar.json(&["flows", "--vm", "web", "--proto", "tcp"])?;
    let flow = &flows[0];
    ensure!(flow["vm"] == "web" && flow["bytes_to_host"] == 5 && flow["bytes_to_guest"] == 5, "{flows}");
    let (status, body) =
        curl(dir.path(), &["-X", "POST", "-d", "{\"specs\":[\"0:22\",\"x\"]}", "http://portway/v1/ports"])?;
    let problem: serde_json::Value = serde_json::from_str(&body)?;
    ensure!(status == 400 && problem["code"] == "bad_spec" && problem["field"] == "specs[1]", "{body}");
    ensure!(sidecar.json(&["ports"])? == serde_json::json!([]), "nothing was changed");
    // gvproxy's routes are on the same socket.
    ensure!(curl(dir.path(), &["http://portway/services/forwarder/all"])? == (200, "[]\n".into()));
    Ok(())
}

#[test]
fn huge_and_endless_requests_are_refused_and_nobody_waits_for_a_silent_client() -> Result<()> {
    let (dir, mut sidecar, _guest) = started(&[])?;
    let huge = dir.path().join("huge");
    std::fs::write(&huge, vec![b'x'; 100_000])?;
    let data = format!("@{}", huge.display());
    for method in ["POST", "DELETE"] {
        let (status, body) =
            curl(dir.path(), &["-X", method, "--data-binary", &data, "http://portway/v1/ports"])?;
        ensure!(status == 413 && body.contains("too_large"), "{status} {body}");
    }
    let path = "y".repeat(60_000);
    let (status, _) = curl(dir.path(), &[&format!("http://portway/v1/{path}")])?;
    ensure!(status == 404 || status == 414, "{status}");
    // As many silent clients as may be, and one more that is served when they have been sent away.
    let silent: Vec<UnixStream> =
        (0..64).map(|_| UnixStream::connect(dir.path().join("api"))).collect::<Result<_, _>>()?;
    ensure!(sidecar.json(&["ports"])? == serde_json::json!([]));
    drop(silent);
    ensure!(sidecar.is_alive()?);
    Ok(())
}

#[test]
fn tshark_reads_a_capture_while_it_runs() -> Result<()> {
    let (dir, sidecar, mut guest) = started(&[])?;
    let port = echo_server()?;
    let file = dir.path().join("live.pcapng");
    let api = format!("unix:{}", dir.path().join("api").display());
    let mut command = Command::new(portway()?);
    command.args(["capture", "--api", &api, "--vm", "web", "--host", "192.168.127.254"]);
    command.args(["--port", &port.to_string(), "--proto", "tcp", "-w"]).arg(&file);
    let _capture = Ends(command.stdout(Stdio::null()).spawn()?);
    until(Duration::from_secs(10), || sidecar.json(&["stats"]).is_ok_and(|s| s["captures"] == 1))?;
    let other = guest.connect((ALIAS, echo_server()?).into())?.context("refused")?;
    ensure!(guest.exchange(other, b"not wanted", 10)? == b"not wanted");
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    ensure!(guest.exchange(socket, b"captured", 8)? == b"captured");
    let read = |fields: &[&str]| -> Result<String> {
        let mut tshark = Command::new("tshark");
        tshark.args(["-r"]).arg(&file).args(["-T", "fields"]);
        for field in fields {
            tshark.args(["-e", field]);
        }
        let out = tshark.stderr(Stdio::null()).output().context("tshark")?;
        ensure!(out.status.success());
        Ok(String::from_utf8(out.stdout)?)
    };
    // The payload of both directions, with the link's name, while the capture still runs.
    let payload = "6361707475726564";
    until(Duration::from_secs(20), || {
        read(&["tcp.payload"]).is_ok_and(|t| t.lines().filter(|l| *l == payload).count() >= 2)
    })
    .with_context(|| read(&["tcp.payload"]).unwrap_or_default())?;
    let seen = read(&["frame.interface_name", "tcp.port", "frame.packet_flags_direction", "_ws.malformed"])?;
    for line in seen.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        ensure!(fields[0] == "web" && fields[1].contains(&port.to_string()), "{seen}");
        ensure!(fields.get(3).is_none_or(|m| m.is_empty()), "{seen}");
    }
    let directions = |d: &str| seen.lines().any(|l| l.split('\t').nth(2).is_some_and(|f| f.ends_with(d)));
    ensure!(directions("1") && directions("2"), "{seen}");
    drop(_capture);
    until(Duration::from_secs(20), || sidecar.json(&["stats"]).is_ok_and(|s| s["captures"] == 0))?;
    Ok(())
}

#[test]
fn a_capture_goes_down_a_pipe_and_a_file_gets_everything() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let all = dir.path().join("all.pcapng");
    let sidecar = Sidecar::start(dir.path(), &["--pcap", all.to_str().context("path")?])?;
    let api = format!("unix:{}", dir.path().join("api").display());
    let mut command = Command::new(portway()?);
    let mut capture = Ends(
        command
            .args(["capture", "--api", &api, "-w", "-", "--proto", "udp"])
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let pipe = capture.0.stdout.take().context("no pipe")?;
    until(Duration::from_secs(10), || sidecar.json(&["stats"]).is_ok_and(|s| s["captures"] == 2))?;
    let mut command = Command::new("tshark");
    command.args(["-l", "-i", "-", "-Y", "dhcp", "-T", "fields", "-e", "dhcp.option.dhcp"]).stdin(pipe);
    let mut tshark = Ends(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("tshark")?);
    // Before tshark is told anything else it has the head: the guest may come now.
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let mut lines = BufReader::new(tshark.0.stdout.take().context("no pipe")?).lines();
    let kinds: Vec<String> = lines.by_ref().take(4).collect::<Result<_, _>>()?;
    ensure!(kinds == ["1", "2", "3", "5"], "DISCOVER, OFFER, REQUEST, ACK, and not {kinds:?}");
    drop(guest);
    ensure!(sidecar.stop()?.success());
    let out = Command::new("tshark").args(["-r"]).arg(&all).args(["-Y", "dhcp || arp"]).output()?;
    ensure!(String::from_utf8_lossy(&out.stdout).lines().count() >= 4, "{out:?}");
    Ok(())
}

#[test]
fn a_reader_that_does_not_read_loses_frames_and_stalls_nobody() -> Result<()> {
    let (dir, sidecar, mut guest) = started(&[])?;
    let mut idle = Vec::new();
    for route in ["/v1/capture", "/v1/events?follow=true"] {
        let mut stream = UnixStream::connect(dir.path().join("api"))?;
        write!(stream, "GET {route} HTTP/1.1\r\nHost: x\r\n\r\n")?;
        stream.read_exact(&mut [0; 12])?;
        idle.push(stream);
    }
    let port = echo_server()?;
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    let bytes = vec![7; 24 << 20];
    ensure!(guest.exchange(socket, &bytes, bytes.len())?.len() == bytes.len());
    let stats = sidecar.json(&["stats"])?;
    ensure!(stats["capture_lost"].as_u64().is_some_and(|n| n > 0), "{stats}");
    Ok(())
}

/// Every sample of a text in the exposition format; an error for anything a strict reader would not take.
fn samples(text: &str) -> Result<Vec<(String, f64)>> {
    let name_ok = |n: &str| {
        n.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == ':')
            && n.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    ensure!(text.ends_with('\n'));
    let (mut family, mut seen, mut out) = (String::new(), Vec::<String>::new(), Vec::<(String, f64)>::new());
    let mut described = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').context("HELP without text")?;
            ensure!(name_ok(name) && !text.is_empty() && !seen.iter().any(|s| s == name), "{line}");
            described = name.to_owned();
            seen.push(name.to_owned());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').context("TYPE without a type")?;
            ensure!(name == described && ["counter", "gauge"].contains(&kind), "{line}");
            ensure!(kind == "gauge" || name.ends_with("_total"), "a counter's name ends in _total: {line}");
            family = name.to_owned();
        } else {
            let (sample, value) = line.rsplit_once(' ').context("no value")?;
            let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
            ensure!(name == family, "{line} is not in its family {family}");
            let labels = labels.strip_suffix('}').context("labels do not end")?;
            for label in labels.split("\",").filter(|l| !l.is_empty()) {
                let (key, value) = label.split_once("=\"").context("a label without a value")?;
                ensure!(name_ok(key) && !value.trim_end_matches('"').contains('\n'), "{line}");
            }
            ensure!(!out.iter().any(|(s, _)| s == sample), "twice: {sample}");
            out.push((sample.to_owned(), value.parse()?));
        }
    }
    Ok(out)
}

#[test]
fn prometheus_reads_the_metrics() -> Result<()> {
    let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let (dir, _sidecar, _guest) = started(&["--metrics", &free.to_string()])?;
    let mut stream = TcpStream::connect(free)?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
    ensure!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    let found = samples(body)?;
    let value = |name: &str| found.iter().find(|(n, _)| n == name).map(|(_, v)| *v).context(name.to_owned());
    ensure!(value("portway_link_up{link=\"web\",kind=\"qemu\"}")? == 1.0);
    ensure!(value("portway_link_frames_total{link=\"web\",direction=\"to_host\"}")? >= 2.0);
    ensure!(value("process_resident_memory_bytes")? > 1e6);
    // Prometheus' own judge of names and texts, where it is.
    let judge = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    if let Ok(mut judge) = judge {
        judge.stdin.take().context("no pipe")?.write_all(body.as_bytes())?;
        let out = judge.wait_with_output()?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    }
    let (_, same) = curl(dir.path(), &["http://portway/v1/metrics"])?;
    ensure!(samples(&same)?.len() == found.len());
    Ok(())
}

#[test]
fn the_supervisor_is_told_ready_and_stopping() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = UnixDatagram::bind(dir.path().join("notify"))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let told = || -> Result<String> {
        let mut bytes = [0; 1024];
        let n = socket.recv(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes[..n]).into_owned())
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut command = Command::new(portway()?);
    command.args([
        "serve",
        "--link",
        &format!("qemu:unix:{}", path("vm")),
        "--api",
        &format!("unix:{}", path("api")),
    ]);
    let mut child = Ends(command.env("NOTIFY_SOCKET", dir.path().join("notify")).spawn()?);
    ensure!(told()?.lines().any(|l| l == "READY=1"));
    ensure!(dir.path().join("api").exists(), "ready means that it can be used");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.0.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    ensure!(told()?.lines().any(|l| l == "STOPPING=1"));
    ensure!(child.0.wait()?.success());
    Ok(())
}

#[test]
fn systemd_may_hold_the_sockets_of_the_api_and_of_links() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let listen = |name: &str| -> Result<UnixListener> {
        let listener = UnixListener::bind(dir.path().join(name))?;
        nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
        Ok(listener)
    };
    let (api, vm) = (listen("api")?, listen("vm")?);
    // As systemd does: descriptors from 3 on, and LISTEN_PID the program's own.
    let script = format!(
        "exec 13<&{} 14<&{}; exec 3<&13 4<&14 13<&- 14<&-; \
         LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=api:vm exec \"$@\"",
        api.as_raw_fd(),
        vm.as_raw_fd()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script, "bash"]).arg(portway()?).args(["serve", "--link", "qemu:fd:vm,name=web"]);
    let _child = Ends(command.env("XDG_RUNTIME_DIR", dir.path()).spawn()?);
    // Both sockets were there before the program was: their clients just wait.
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let (status, body) = curl(dir.path(), &["http://portway/v1/links/web"])?;
    ensure!(status == 200 && body.contains("\"address\":\"fd:vm\""), "{body}");
    drop(guest);
    let mut next = Guest::attach(&dir.path().join("vm"), 2)?;
    next.dhcp()?;
    let out = Command::new(portway()?)
        .args(["serve", "--link", "qemu:fd:other"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.code() == Some(1) && said.contains("fd:other: nobody passed"), "{said}");
    Ok(())
}

#[test]
fn ports_that_were_added_live_survive_a_restart() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let options = ["--state-dir", state.to_str().context("path")?];
    let sidecar = Sidecar::start(dir.path(), &options)?;
    let out = sidecar.cli(&["publish", ":22", ":5353/udp"])?;
    ensure!(out.status.success(), "{out:?}");
    let before = sidecar.json(&["ports"])?;
    ensure!(sidecar.cli(&["unpublish", ":5353/udp"])?.status.success());
    ensure!(sidecar.stop()?.success());
    let again = Sidecar::start(dir.path(), &options)?;
    let after = again.json(&["ports"])?;
    ensure!(after.as_array().is_some_and(|p| p.len() == 1), "{after}");
    ensure!(after[0]["host_port"] == before[0]["host_port"], "{after}");
    // Taken meanwhile: said, and no reason not to start.
    let port = before[0]["host_port"].as_u64().context("no port")?;
    ensure!(again.stop()?.success());
    let taken = TcpListener::bind(("127.0.0.1", u16::try_from(port)?))?;
    let third = Sidecar::start(dir.path(), &options)?;
    ensure!(
        third.json(&["ports"])? == serde_json::json!([])
            && third.log().contains("a kept port is not published")
    );
    drop(taken);
    Ok(())
}

#[test]
fn events_are_followed_as_they_happen() -> Result<()> {
    let (dir, sidecar, _guest) = started(&[])?;
    let api = format!("unix:{}", dir.path().join("api").display());
    let mut command = Command::new(portway()?);
    let mut child = Ends(
        command.args(["events", "-f", "--format", "json", "--api", &api]).stdout(Stdio::piped()).spawn()?,
    );
    let mut lines = BufReader::new(child.0.stdout.take().context("no pipe")?).lines();
    let mut next =
        || -> Result<serde_json::Value> { Ok(serde_json::from_str(&lines.next().context("ended")??)?) };
    ensure!(next()?["type"] == "link_up");
    let lease = next()?;
    ensure!(lease["type"] == "lease" && lease["ip"] == "192.168.127.2", "{lease}");
    ensure!(sidecar.cli(&["publish", "0:22"])?.status.success());
    let published = next()?;
    ensure!(published["type"] == "port_published" && published["port"]["guest_port"] == 22, "{published}");
    let out = sidecar.cli(&["events"])?;
    ensure!(String::from_utf8_lossy(&out.stdout).lines().count() == 3, "{out:?}");
    Ok(())
}

#[test]
fn top_shows_flows_in_a_terminal() -> Result<()> {
    let (dir, sidecar, mut guest) = started(&[])?;
    let port = echo_server()?;
    let socket = guest.connect((ALIAS, port).into())?.context("refused")?;
    ensure!(guest.exchange(socket, b"hello", 5)? == b"hello");
    let server = dir.path().join("tmux");
    let tmux = |args: &[&str]| -> Result<String> {
        let out = Command::new("tmux").arg("-S").arg(&server).args(args).output().context("tmux")?;
        ensure!(out.status.success(), "tmux {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8(out.stdout)?)
    };
    let top = format!("{} top --api unix:{}", portway()?.display(), dir.path().join("api").display());
    tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "30", &format!("{top}; sleep 600")])?;
    let shows = |text: &str| -> Result<String> {
        let mut screen = String::new();
        until(Duration::from_secs(15), || {
            screen = tmux(&["capture-pane", "-p"]).unwrap_or_default();
            screen.contains(text)
        })
        .with_context(|| format!("{text:?} is not in\n{screen}"))?;
        Ok(screen)
    };
    let flow = format!("-> 192.168.127.254:{port}");
    let screen = shows(&flow)?;
    ensure!(
        screen.contains("sorted by rate") && screen.contains("web") && screen.contains("qemu"),
        "{screen}"
    );
    tmux(&["send-keys", "s"])?;
    shows("sorted by total")?;
    tmux(&["send-keys", "p"])?;
    shows("PAUSED")?;
    tmux(&["send-keys", "/", "udp"])?;
    let screen = shows("filter: udp")?;
    ensure!(screen.contains(" 0 flows"), "{screen}");
    tmux(&["send-keys", "Escape"])?;
    shows("q quit")?;
    tmux(&["send-keys", "q"])?;
    // The screen is given back as it was.
    until(Duration::from_secs(10), || {
        !tmux(&["capture-pane", "-p"]).unwrap_or_default().contains("sorted by")
    })?;
    tmux(&["kill-server"])?;
    let out = sidecar.cli(&["top"])?;
    ensure!(
        out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("needs a terminal")
    );
    Ok(())
}

#[test]
fn explain_doctor_and_support_tell_what_is() -> Result<()> {
    let (dir, sidecar, _guest) = started(&[])?;
    let port = echo_server()?;
    let dest = format!("host.portway.internal:{port}");
    let out = sidecar.cli(&["explain", &dest, "--probe"])?;
    let said = String::from_utf8_lossy(&out.stdout);
    ensure!(out.status.success() && said.contains("the host's own 127.0.0.1"), "{said}");
    ensure!(said.contains("tried now: open"), "{said}");
    let out = sidecar.cli(&["explain", "169.254.169.254:80"])?;
    let said = String::from_utf8_lossy(&out.stdout);
    ensure!(out.status.code() == Some(1) && said.contains("--metadata allow"), "{said}");
    let told = sidecar.json(&["explain", "192.168.127.2:22"])?;
    ensure!(told["addresses"][0]["target"] == "guest", "{told}");
    // What the data path does: over IPv6 the host's 127.0.0.1 is found too, DHCP is served, and groups are nobody.
    let network: serde_json::Value =
        serde_json::from_str(&curl(dir.path(), &["http://portway/v1/network"])?.1)?;
    let of = |name: &str| Ok::<_, anyhow::Error>(network[name].as_str().context("no IPv6")?.to_owned());
    let (alias6, gateway6) = (of("host_alias6")?, of("gateway6")?);
    for (dest, proto, allowed, why) in [
        (format!("[{alias6}]:{port}"), "tcp", true, "the host alias"),
        ("192.168.127.1:67".into(), "udp", true, "DHCP server"),
        (format!("[{gateway6}]:547"), "udp", true, "DHCP server"),
        (format!("[{gateway6}]:80"), "tcp", true, "--guest-api on"),
        ("192.168.127.1:67".into(), "tcp", false, "nothing serves tcp port 67"),
        ("192.168.127.255:9".into(), "udp", false, "everybody's address"),
        ("224.0.0.251:5353".into(), "udp", false, "group's"),
        ("[ff02::fb]:5353".into(), "udp", false, "group's"),
        ("[fd00:ec2::254]:80".into(), "tcp", false, "--metadata allow"),
        (gateway6.trim_end_matches('1').to_owned() + "dead", "tcp", false, "in the guests' subnet fd"),
    ] {
        // The exit code is 1 for what is not allowed.
        let how = if proto == "udp" { "--udp" } else { "--probe" };
        let out = sidecar.cli(&["explain", &dest, how, "--format", "json"])?;
        let told: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        let first = &told["addresses"][0];
        ensure!(
            first["allowed"] == allowed && first["why"].to_string().contains(why),
            "{dest} {proto}: {told}"
        );
        let found = first["probe"].as_str().unwrap_or("open");
        ensure!(found == "open" || found == format!("open at 127.0.0.1:{port}"), "{dest}: {told}");
    }
    let checks = sidecar.json(&["doctor"])?;
    let network = checks.as_array().into_iter().flatten().find(|c| c["check"] == "network");
    ensure!(network.is_some_and(|c| c["outcome"] == "ok"), "{checks}");
    let archive = dir.path().join("support.tar.gz");
    let out = sidecar.cli(&["support", "-o", archive.to_str().context("path")?])?;
    ensure!(out.status.success(), "{out:?}");
    let list = Command::new("tar").arg("tzf").arg(&archive).output()?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    for file in [
        "README",
        "network.json",
        "stats.json",
        "doctor.json",
        "cmdline.txt",
        "flows.json",
        "dns.json",
        "agents.json",
    ] {
        ensure!(list.contains(file), "{file} is not in {list}");
    }
    Ok(())
}

#[test]
fn waiting_for_what_cannot_come_is_told_at_once_and_for_what_does_not_in_time() -> Result<()> {
    let (_dir, sidecar, _guest) = started(&[])?;
    let wait = |words: &[&str]| -> Result<(Option<i32>, String)> {
        let out = sidecar.cli(&[&["wait"], words].concat())?;
        Ok((out.status.code(), String::from_utf8(out.stderr)?))
    };
    let (code, said) = wait(&["--port", "9", "--timeout", "60"])?;
    ensure!(code == Some(1) && said.contains("guest agent"), "{said}");
    let start = std::time::Instant::now();
    let (code, said) = wait(&["--ready", "--timeout", "1"])?;
    ensure!(code == Some(1) && (said.contains("agent") || said.contains("within 1 s")), "{said}");
    ensure!(start.elapsed() < Duration::from_secs(7), "it took {:?}", start.elapsed());
    Ok(())
}

#[test]
fn what_supporters_get_has_no_secret_in_it() -> Result<()> {
    let (dir, sidecar, _guest) = started(&["--dns-host", "passphrase.test=192.0.2.9"])?;
    let config = dir.path().join("portway.toml");
    let text = "mtu = 1500\n# ssh-tunnel://u@h/s?key=k&passphrase=hunter2\nhttp = \"http://me:hunter2@proxy:1\"\n\
                url = \"http://plain/ https://me:hunter2@other/\"\napi-token = \"hunter2\"\n{\"password\":\"hunter2\",\"x\":1}\n--secret\nhunter2\nkept = 1\n";
    std::fs::write(&config, text)?;
    let archive = dir.path().join("support.tar.gz");
    let (archive, config) = (archive.to_str().context("path")?, config.to_str().context("path")?);
    let out = sidecar.cli(&["support", "--config", config, "-o", archive])?;
    ensure!(out.status.success(), "{out:?}");
    let all = Command::new("tar").args(["xzOf", archive]).output()?;
    let all = String::from_utf8_lossy(&all.stdout).into_owned();
    ensure!(!all.contains("hunter2"), "{all}");
    ensure!(all.contains("mtu = 1500") && all.contains("kept = 1") && all.contains("(left out)"), "{all}");
    // A network that does not run, and is named, is a slip.
    let slip =
        Command::new(portway()?).args(["support", "--network", "no-such-network", "-o", "x"]).output()?;
    ensure!(slip.status.code() == Some(1) && !Path::new("x").exists(), "{slip:?}");
    // For its owner alone, and never over a file that is there.
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(archive)?.permissions());
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    ensure!(sidecar.cli(&["support", "-o", archive])?.status.code() == Some(1));
    Ok(())
}

#[test]
fn a_configuration_is_checked_and_a_slip_is_told() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("portway.toml");
    let run = |args: &[&str], env: &[(&str, &str)]| -> Result<(Option<i32>, String)> {
        let mut command = Command::new(portway()?);
        command.arg("serve").arg("--check-config").args(args).envs(env.iter().copied());
        let out = command.env("XDG_RUNTIME_DIR", dir.path()).output()?;
        Ok((out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
    };
    let config = ["--config", file.to_str().context("path")?];
    std::fs::write(&file, "link = [\"qemu:unix:/tmp/x\"]\npublsh = [\"1:1\"]\n")?;
    let (code, said) = run(&config, &[])?;
    ensure!(
        code == Some(2) && said.contains("line 2") && said.contains("did you mean \"publish\"?"),
        "{said}"
    );
    std::fs::write(&file, "link = [\"qemu:unix:/tmp/x\"]\n")?;
    ensure!(run(&config, &[])? == (Some(0), "the settings are good\n".into()));
    let (code, said) = run(&[], &[("PORTWAY_CONFIG", config[1]), ("PORTWAY_MTU", "12")])?;
    ensure!(code == Some(2) && said.contains("576 to 65535"), "{said}");
    let (code, said) = run(&["--mtu", "1500"], &[("PORTWAY_CONFIG", config[1]), ("PORTWAY_MTU", "12")])?;
    ensure!(code == Some(0), "the command line wins: {said}");
    Ok(())
}

#[test]
fn the_log_is_json_when_asked() -> Result<()> {
    let (_dir, sidecar, _guest) = started(&["--log-format", "json", "--log-level", "debug"])?;
    let log = sidecar.log();
    for line in log.lines() {
        let entry: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(entry["level"].is_string() && entry["timestamp"].is_string(), "{line}");
    }
    ensure!(log.lines().any(|l| l.contains("\"message\":\"ready\"")), "{log}");
    Ok(())
}
