//! Ports of containers in the guest: a harness that starts the agent as dockerd starts its proxy, and rules of nftables and
//! iptables as rootful docker, podman and kube-proxy leave them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portway_tests::agent::binary;
use portway_tests::agent_lab::{Lab, PATIENCE, SECOND, answers, connects, free_port};
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::until;

/// A proxy as dockerd has one: it ends with whoever started it.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Proxy {
    /// Ends it with a signal, as dockerd does.
    fn terminate(&mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.0.id())?), Signal::SIGTERM)?;
        self.0.wait()?;
        Ok(())
    }
}

/// Starts the agent as dockerd starts its proxy: a pipe on descriptor 3, and for `listener` a socket on 4.
fn as_dockerd(lab: &Lab, args: &[String], listener: Option<&TcpListener>) -> Result<(Proxy, File)> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut command = lab.agent.command(&binary()?);
    command.args(args).arg("-control").arg(lab.agent.socket()).stdin(Stdio::null());
    let (pipe, socket) = (theirs.as_raw_fd(), listener.map(AsRawFd::as_raw_fd));
    // SAFETY: between fork and exec only prctl(2), dup2(2) and fcntl(2) are called, which are async-signal-safe; the descriptors
    // live until then.
    unsafe {
        command.pre_exec(move || {
            // Dockerd's proxies get SIGTERM when it dies, however it dies.
            nix::libc::prctl(nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGTERM);
            // Out of the way first: either may have one of the two numbers.
            let away = |fd| nix::libc::fcntl(fd, nix::libc::F_DUPFD, 10);
            let (pipe, socket) = (away(pipe), socket.map(away));
            nix::libc::dup2(pipe, 3);
            if let Some(socket) = socket {
                nix::libc::dup2(socket, 4);
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    drop(theirs);
    Ok((Proxy(child), ours.into()))
}

#[test]
fn dockerds_contract_is_kept() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    // The container is an address of the guest that only the guest reaches.
    let container = lab.listen("127.0.0.9:80")?;
    let port = free_port()?;
    let args = |port: u16| -> Vec<String> {
        let line = format!(
            "-proto tcp -host-ip 0.0.0.0 -host-port {port} -container-ip 127.0.0.9 -container-port 80"
        );
        line.split(' ').map(str::to_owned).collect()
    };
    let (mut proxy, mut told) = as_dockerd(&lab, &args(port), None)?;
    let mut line = [0; 2];
    told.read_exact(&mut line)?;
    ensure!(&line == b"0\n", "{line:?}");
    ensure!(answers(([127, 0, 0, 1], port), &container), "on the host\n{}", lab.context());
    // And in the guest, as docker's own proxy has it.
    let there = lab.guest.inside(|| Ok(answers(([127, 0, 0, 1], port), &container)))?;
    ensure!(there, "in the guest");
    // Published once, though the proxy's socket is a listener too.
    let since = Instant::now();
    while since.elapsed() < SECOND {
        let same = lab.ports()?.iter().filter(|p| p["host_port"] == port).count();
        ensure!(same == 1, "{}", lab.context());
    }

    // What cannot be had is said on descriptor 3, and ends the proxy.
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let (mut refused, mut why) = as_dockerd(&lab, &args(taken.local_addr()?.port()), None)?;
    let mut text = String::new();
    why.read_to_string(&mut text)?;
    ensure!(text.starts_with("1\n") && text.contains("in use"), "{text:?}");
    ensure!(refused.0.wait()?.code() == Some(1));

    // dockerd ends it with a signal; the port goes with it.
    proxy.terminate()?;
    until(SECOND, || !connects(([127, 0, 0, 1], port).into())).with_context(|| lab.context())?;

    // dockerd 28 binds the port in the guest itself.
    let port = free_port()?;
    let bound = lab.listen(&format!("0.0.0.0:{port}"))?;
    let mut with_fd = args(port);
    with_fd.push("-use-listen-fd".into());
    let (_proxy, mut told) = as_dockerd(&lab, &with_fd, Some(&bound))?;
    told.read_exact(&mut line)?;
    ensure!(&line == b"0\n", "{line:?}");
    drop(bound);
    let there = lab.guest.inside(|| Ok(answers(([127, 0, 0, 1], port), &container)))?;
    ensure!(there && answers(([127, 0, 0, 1], port), &container), "{}", lab.context());
    Ok(())
}

/// A container in its own namespace: 172.17.0.2, behind the guest's 172.17.0.1.
fn container(lab: &Lab) -> Result<Option<Namespace>> {
    let Some(container) = Namespace::new()? else { return Ok(None) };
    lab.guest.connect(&container, "172.17.0.1".parse()?, "172.17.0.2".parse()?)?;
    container.ip(&["route", "add", "default", "via", "172.17.0.1"])?;
    lab.guest.sysctl("net.ipv4.ip_forward", "1")?;
    Ok(Some(container))
}

/// Whether the tool works in the guest; says that the test is skipped where it does not.
fn has(lab: &Lab, probe: &str) -> bool {
    let works = lab.guest.run(probe).is_ok_and(|(good, _)| good);
    if !works {
        eprintln!("SKIPPED: {probe:?} does not work here (tests/setup.sh says what to install)");
    }
    works
}

/// What netavark writes for `podman run -p PORT:80`.
fn netavark(port: u16) -> String {
    format!(
        "table inet netavark {{
  chain nv_dnat {{
    tcp dport {port} dnat ip to 172.17.0.2:80
  }}
  chain NETAVARK-HOSTPORT-DNAT {{
    tcp dport {port} jump nv_dnat
  }}
  chain PREROUTING {{
    type nat hook prerouting priority dstnat;
    fib daddr type local jump NETAVARK-HOSTPORT-DNAT
  }}
}}
"
    )
}

#[test]
fn ports_that_rules_send_to_containers_are_on_the_host_and_go_with_the_rules() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let Some(container) = container(&lab)? else { return Ok(()) };
    let server = container.inside(|| Ok(TcpListener::bind("172.17.0.2:80")?))?;
    let run = |words: &str| -> Result<()> {
        let (good, said) = lab.guest.run(words)?;
        ensure!(good, "{words}: {said}");
        Ok(())
    };
    let follows = |what: &str, port: u16, undo: &dyn Fn() -> Result<()>| -> Result<()> {
        let here = ([127, 0, 0, 1], port);
        let since = Instant::now();
        until(PATIENCE, || answers(here, &server)).with_context(|| format!("{what}\n{}", lab.context()))?;
        eprintln!("{what}: reachable after {:.2?}", since.elapsed());
        undo()?;
        let since = Instant::now();
        until(PATIENCE, || !connects(here.into())).with_context(|| format!("{what}\n{}", lab.context()))?;
        eprintln!("{what}: gone after {:.2?}", since.elapsed());
        Ok(())
    };

    if has(&lab, "nft list ruleset") {
        let port = free_port()?;
        let file = lab.dir.path().join("netavark.nft");
        std::fs::write(&file, netavark(port))?;
        run(&format!("nft -f {}", file.display()))?;
        follows("podman's nftables", port, &|| run("nft delete table inet netavark"))?;
    }
    if has(&lab, "iptables -t nat -N DOCKER") {
        let port = free_port()?;
        run("iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER")?;
        let rule = format!("DOCKER -p tcp -m tcp --dport {port} -j DNAT --to-destination 172.17.0.2:80");
        run(&format!("iptables -t nat -A {rule}"))?;
        follows("docker's iptables", port, &|| run(&format!("iptables -t nat -D {rule}")))?;
    }
    Ok(())
}

#[test]
fn node_ports_of_kubernetes_are_published_when_they_are_asked_for() -> Result<()> {
    for wanted in [true, false] {
        let option: &[&str] = if wanted { &["--node-ports"] } else { &[] };
        let Some(lab) = Lab::start_with(&["--publish", "auto"], option)? else { return Ok(()) };
        let Some(container) = container(&lab)? else { return Ok(()) };
        if !has(&lab, "iptables -t nat -N KUBE-NODEPORTS") {
            return Ok(());
        }
        let server = container.inside(|| Ok(TcpListener::bind("172.17.0.2:80")?))?;
        let port = free_port()?;
        for rule in [
            "-N KUBE-SEP-WEB".to_owned(),
            // A service's own endpoint is no port of the node.
            "-A KUBE-SEP-WEB -p tcp -m tcp -j DNAT --to-destination 172.17.0.2:80".to_owned(),
            format!("-A KUBE-NODEPORTS -p tcp -m tcp --dport {port} -j KUBE-SEP-WEB"),
            "-A PREROUTING -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS".to_owned(),
        ] {
            let (good, said) = lab.guest.run(&format!("iptables -t nat {rule}"))?;
            ensure!(good, "{rule}: {said}");
        }
        // A listener that is opened after the rules: when it is seen, the rules have been looked at.
        let marker = free_port()?;
        let _open = lab.listen(&format!("127.0.0.1:{marker}"))?;
        if wanted {
            until(PATIENCE, || answers(([127, 0, 0, 1], port), &server)).with_context(|| lab.context())?;
        } else {
            until(PATIENCE, || connects(([127, 0, 0, 1], marker).into())).with_context(|| lab.context())?;
            // Longer than it takes to see rules.
            let since = Instant::now();
            while since.elapsed() < SECOND {
                ensure!(!connects(([127, 0, 0, 1], port).into()), "{}", lab.context());
            }
        }
    }
    Ok(())
}

/// What kube-proxy's nftables mode writes for a NodePort, as far as it matters here.
fn kube_proxy(port: u16) -> String {
    format!(
        "table ip kube-proxy {{
  chain endpoint-WEB {{
    meta l4proto tcp dnat to 172.17.0.2:80
  }}
  chain external-WEB {{
    jump endpoint-WEB
  }}
  map service-nodeports {{
    type inet_proto . inet_service : verdict
    elements = {{ tcp . {port} comment \"default/web:http\" : goto external-WEB }}
  }}
  chain services {{
    fib daddr type local meta l4proto . th dport vmap @service-nodeports
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority dstnat
    jump services
  }}
}}
"
    )
}

#[test]
fn node_ports_of_kube_proxys_nftables_mode_come_and_go_with_their_elements() -> Result<()> {
    let Some(lab) = Lab::start_with(&["--publish", "auto"], &["--node-ports"])? else { return Ok(()) };
    let Some(container) = container(&lab)? else { return Ok(()) };
    if !has(&lab, "nft list ruleset") {
        return Ok(());
    }
    let server = container.inside(|| Ok(TcpListener::bind("172.17.0.2:80")?))?;
    let port = free_port()?;
    let file = lab.dir.path().join("kube-proxy.nft");
    std::fs::write(&file, kube_proxy(port))?;
    let (good, said) = lab.guest.run(&format!("nft -f {}", file.display()))?;
    ensure!(good, "{said}");
    until(PATIENCE, || answers(([127, 0, 0, 1], port), &server)).with_context(|| lab.context())?;
    let element = format!("nft delete element ip kube-proxy service-nodeports {{ tcp . {port} }}");
    let (good, said) = lab.guest.run(&element)?;
    ensure!(good, "{said}");
    until(PATIENCE, || !connects(([127, 0, 0, 1], port).into())).with_context(|| lab.context())?;
    Ok(())
}

/// A dockerd in the guest; ended, with its containers, when dropped.
struct Dockerd {
    daemon: Child,
    dir: PathBuf,
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        let _ = self.docker(&["rm", "-f", "web"]);
        let pid = i32::try_from(self.daemon.id()).unwrap_or_default();
        // SIGTERM: it ends its containerd too.
        if kill(Pid::from_raw(pid), Signal::SIGTERM).is_err() {
            let _ = self.daemon.kill();
        }
        let _ = self.daemon.wait();
    }
}

impl Dockerd {
    /// `None`, said on standard error, where there is none.
    fn start(lab: &Lab) -> Result<Option<Self>> {
        let found = Command::new("dockerd").arg("--version").stdout(Stdio::null()).status().is_ok();
        let busybox = Command::new("busybox").arg("true").status().is_ok_and(|s| s.success());
        if !found || !busybox {
            eprintln!("SKIPPED: no dockerd or no busybox in PATH (Debian: docker.io, busybox-static)");
            return Ok(None);
        }
        let dir = lab.dir.path().join("docker");
        std::fs::create_dir(&dir)?;
        let at = |name: &str| dir.join(name).display().to_string();
        // The agent of this guest is not where agents usually are.
        let proxy = format!(
            "#!/bin/sh\nexec {} \"$@\" -control {}\n",
            binary()?.display(),
            lab.agent.socket().display()
        );
        std::fs::write(at("proxy"), proxy)?;
        std::fs::set_permissions(at("proxy"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let log = File::create(at("log"))?;
        let daemon = lab
            .agent
            .command(Path::new("dockerd"))
            .args(["--host", &format!("unix://{}", at("docker.sock")), "--pidfile", &at("pid")])
            .args(["--data-root", &at("data"), "--exec-root", &at("exec"), "--storage-driver", "vfs"])
            .args(["--userland-proxy-path", &at("proxy")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut docker = Self { daemon, dir };
        until(Duration::from_secs(60), || {
            docker.docker(&["version"]).is_ok() || docker.daemon.try_wait().is_ok_and(|s| s.is_some())
        })?;
        docker.docker(&["version"])?;
        let image = "mkdir -p root/bin && cp \"$(command -v busybox)\" root/bin/busybox && tar -C root -cf image.tar .";
        ensure!(Command::new("sh").args(["-c", image]).current_dir(&docker.dir).status()?.success());
        docker.docker(&["import", &docker.dir.join("image.tar").display().to_string(), "box"])?;
        Ok(Some(docker))
    }

    fn docker(&self, words: &[&str]) -> Result<String> {
        let host = format!("unix://{}", self.dir.join("docker.sock").display());
        let out = Command::new("docker").args(["--host", &host]).args(words).output()?;
        let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        let log = || std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        ensure!(out.status.success(), "docker {}: {text}\n{}", words.join(" "), log());
        Ok(text)
    }

    /// `docker run -p PORT:80` of a server that echoes.
    fn run(&self, port: u16) -> Result<String> {
        let publish = format!("{port}:80");
        let serve = ["/bin/busybox", "nc", "-ll", "-p", "80", "-e", "/bin/busybox", "cat"];
        self.docker(
            &[&["run", "--name", "web", "--detach", "--publish", &publish, "box"][..], &serve].concat(),
        )
    }
}

#[test]
fn a_real_dockerd_publishes_its_containers_ports_on_the_host() -> Result<()> {
    let Some(lab) = Lab::start(&["--publish", "auto"])? else { return Ok(()) };
    let Some(docker) = Dockerd::start(&lab)? else { return Ok(()) };
    let port = free_port()?;
    docker.run(port)?;
    let echoes = || -> Result<bool> {
        let mut client = TcpStream::connect(("127.0.0.1", port))?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.write_all(b"x")?;
        Ok(client.read(&mut [0])? == 1)
    };
    until(PATIENCE, || echoes().unwrap_or(false)).with_context(|| lab.context())?;
    let listed = lab.ports()?.iter().filter(|p| p["host_port"] == port).count();
    ensure!(listed == 1, "{}", lab.context());
    docker.docker(&["rm", "-f", "web"])?;
    until(SECOND, || !connects(([127, 0, 0, 1], port).into())).with_context(|| lab.context())?;

    // A port that somebody on the host has: docker run says why, and there is no container.
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let refused = docker.run(taken.local_addr()?.port()).map_err(|e| e.to_string());
    ensure!(refused.as_ref().is_err_and(|e| e.contains("in use")), "{refused:?}");
    Ok(())
}
