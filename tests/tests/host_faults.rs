//! A host that refuses: system calls of the running sidecar fail with EMFILE, ENFILE, ENOBUFS or ENOMEM, as strace(1) has them
//! fail (`--inject`), on every thread. While they do, what is open lives as far as the call lets it, and what is new is refused;
//! when they stop, everything is as before within a second.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portway_tests::attack::Lab;
use portway_tests::guest::Guest;
use portway_tests::host::echo_server;
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vhost::{Card, request};
use smoltcp::socket::tcp::State;

const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);

/// A tracer that makes calls of a process fail while it lives.
struct Injected(Child);

impl Injected {
    fn new(sidecar: &Sidecar, calls: &str, error: &str) -> Result<Self> {
        let fault = format!("--inject={calls}:error={error}");
        let log = std::fs::File::create(sidecar.dir.join("strace"))?;
        let child = Command::new("strace")
            .args(["-f", "-qq", "-e", &format!("trace={calls}"), &fault, "-p", &sidecar.pid().to_string()])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()?;
        let traced = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", sidecar.pid())).ok();
            let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status")).ok();
            tasks.is_some_and(|all| all.flatten().filter_map(status).all(|s| !s.contains("TracerPid:\t0\n")))
        };
        until(Duration::from_secs(10), traced).context("strace does not attach")?;
        Ok(Self(child))
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        // SIGINT: it lets go of what it traces.
        let told = i32::try_from(self.0.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGINT));
        if !matches!(told, Ok(Ok(()))) {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

/// A query for an A record.
fn query(name: &str) -> Vec<u8> {
    let mut q = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        q.push(u8::try_from(label.len()).unwrap_or(0));
        q.extend(label.as_bytes());
    }
    q.extend([0, 0, 1, 0, 1]);
    q
}

/// Tries everything at once, for a moment, without asking that any of it works.
fn try_everything(guest: &mut Guest, sidecar: &Sidecar, to: u16, published: u16, round: u16) -> Result<()> {
    let dialled: Vec<_> = (0..5).filter_map(|_| guest.dial((ALIAS, to).into()).ok()).collect();
    let socket = guest.udp(20_000 + round)?;
    guest.send_udp(socket, (ALIAS, to).into(), b"datagram")?;
    guest.send_udp(socket, (GATEWAY, 53).into(), &query(&format!("n{round}.outside.test")))?;
    let client = std::net::TcpStream::connect(("127.0.0.1", published));
    let live = format!("unix:{}:80", sidecar.dir.join(format!("live{round}")).display());
    let mut cli = Command::new(portway_tests::vm::portway()?)
        .args(["publish", &live, "--api", &format!("unix:{}", sidecar.dir.join("api").display())])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let until = Instant::now() + Duration::from_millis(400);
    while Instant::now() < until {
        ensure!(!guest.step(), "the link ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(client);
    let _ = cli.kill();
    let _ = cli.wait();
    for flow in dialled {
        guest.tcp(flow).abort();
        guest.step();
        guest.forget(flow);
    }
    guest.forget(socket);
    Ok(())
}

/// Whether calls of another process can be made to fail here.
fn may_inject() -> bool {
    let may_trace = Command::new("strace").args(["-qq", "true"]).stderr(Stdio::null()).status();
    let may = may_trace.is_ok_and(|s| s.success()) && nix::unistd::geteuid().is_root();
    if !may {
        eprintln!("skipped: strace, and root to attach it to a process that is not dumpable, are needed");
    }
    may
}

#[test]
fn links_that_come_while_the_host_refuses_are_there_a_second_after_it_does_not() -> Result<()> {
    if !may_inject() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let (card, third, many) = (at("card"), at("third"), at("many"));
    let links = [
        format!("vhost-user:unix:{},name=card", card.display()),
        format!("qemu:unix:{},name=third", third.display()),
        format!("vpnkit:unix:{},name=many", many.display()),
    ];
    let options: Vec<&str> = links.iter().flat_map(|l| ["--link", l]).collect();
    let uuid = b"d7a1e0c6-8a5c-4b6e-9f0e-0000000000bb";
    let mut lab = Lab::in_dir(dir, &options)?;
    for (calls, error) in [
        ("accept4", "EMFILE"),
        ("accept4", "ENFILE"),
        ("accept4", "ENOBUFS"),
        ("epoll_ctl", "ENOMEM"),
        ("recvmsg", "ENOBUFS"),
        ("setsockopt,getsockopt", "ENOMEM"),
        ("eventfd2,fcntl", "EMFILE"),
    ] {
        let fault = format!("{calls} → {error}");
        {
            let _injected = Injected::new(&lab.sidecar, calls, error)?;
            // They may come in or not; what they must not do is hurt.
            let came = (Card::connect(&card), UnixStream::connect(&third), UnixStream::connect(&many));
            if let (Ok(card), ..) = &came {
                let _ = card.say(request::GET_FEATURES, &[], None);
            }
            for _ in 0..5 {
                lab.open_flow_lives().context(fault.clone())?;
            }
            ensure!(lab.sidecar.is_alive()?, "{fault}: it ended: {}", lab.sidecar.log());
        }
        let began = Instant::now();
        until(Duration::from_secs(1), || {
            let frame = [&[0xff; 6][..], &[2, 0, 0, 0, 4, 1, 8, 6], &[0; 46]].concat();
            Card::start(&card).and_then(|mut c| c.send(&frame)).is_ok()
        })
        .with_context(|| format!("{fault}: vhost-user after {:?}", began.elapsed()))?;
        let mut guest = Guest::attach(&third, 34)?;
        guest.dhcp().with_context(|| format!("{fault}: the stream link"))?;
        let mut guest = Guest::attach_vpnkit(&many, uuid).with_context(|| format!("{fault}: vpnkit"))?;
        guest.dhcp().with_context(|| format!("{fault}: vpnkit"))?;
        lab.everybody_is_served().context(fault)?;
    }
    ensure!(lab.stat(&["panics"])? == 0, "{}", lab.sidecar.log());
    Ok(())
}

#[test]
fn calls_that_fail_refuse_what_is_new_and_leave_what_is_open_and_pass_within_a_second() -> Result<()> {
    if !may_inject() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let silent = UdpSocket::bind("127.0.0.1:0")?;
    let (state, upstream) = (dir.path().join("state"), silent.local_addr()?.to_string());
    let options =
        ["--publish", "0:22", "--dns-upstream", &upstream, "--state-dir", state.to_str().context("path")?];
    let mut sidecar = Sidecar::start(dir.path(), &options)?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let echo = echo_server()?;
    let published = u16::try_from(sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("port")?)?;
    let old = guest.connect((ALIAS, echo).into())?.context("refused")?;
    for (round, (calls, error)) in [
        // No descriptors, for this process and for the host.
        ("socket,socketpair,accept4,openat,eventfd2", "EMFILE"),
        ("socket,socketpair,accept4,openat,eventfd2", "ENFILE"),
        // No memory in the kernel, at each step of a connection.
        ("socket", "ENOBUFS"),
        ("connect", "ENOBUFS"),
        ("connect", "ENOMEM"),
        ("bind,listen", "ENOMEM"),
        ("setsockopt,getsockopt", "ENOBUFS"),
        ("epoll_ctl", "ENOMEM"),
        ("accept4", "ENOMEM"),
        ("sendmsg,sendmmsg", "ENOBUFS"),
        ("recvmsg,recvmmsg", "ENOMEM"),
        // A disk and an address space that are used up.
        ("openat,fsync,rename,renameat", "ENOSPC"),
        ("mmap,mremap,brk", "ENOMEM"),
        ("getrandom", "ENOSYS"),
    ]
    .into_iter()
    .enumerate()
    {
        let fault = format!("{calls} → {error}");
        {
            let _injected = Injected::new(&sidecar, calls, error)?;
            try_everything(&mut guest, &sidecar, echo, published, u16::try_from(round)?)
                .context(fault.clone())?;
            ensure!(sidecar.is_alive()?, "{fault}: it ended: {}", sidecar.log());
            // A flow that is open needs none of these.
            let during = guest.exchange(old, b"during", 6).with_context(|| fault.clone())?;
            ensure!(during == b"during", "{fault}");
        }
        let began = Instant::now();
        guest.until(&format!("recovery from {fault}"), |g| {
            let flow = g.dial((ALIAS, echo).into()).ok()?;
            for _ in 0..200 {
                g.step();
                match g.tcp(flow).state() {
                    State::Established => {
                        g.tcp(flow).abort();
                        g.step();
                        return Some(());
                    }
                    State::Closed => return None,
                    _ => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            None
        })?;
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(1), "{fault}: {took:?} until connections opened again");
        ensure!(guest.exchange(old, b"after", 5)? == b"after", "{fault}");
        let (_, answer) = guest.ask_udp(5353, (GATEWAY, 53).into(), &query("host.portway.internal"))?;
        ensure!(answer.ends_with(&ALIAS.octets()), "{fault}: {answer:?}");
        ensure!(sidecar.json(&["stats"])?["panics"] == 0, "{fault}: {}", sidecar.log());
    }
    ensure!(sidecar.stop()?.code() == Some(0));
    Ok(())
}
