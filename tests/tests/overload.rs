//! Ten times too much of everything, by one guest and by API clients: what is open lives, what is new is refused as it is, memory
//! stays within DESIGN §6, and a second afterwards everything is as before. And how much of it a second guest feels.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, setrlimit};
use portway_tests::guest::Guest;
use portway_tests::host::echo_server;
use portway_tests::raw::{RST, RawGuest, SYN, Segment, tcp, udp};
use portway_tests::sidecar::Sidecar;
use portway_tests::vm::portway;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
/// DESIGN §6: by how much a guest may make the process grow beyond its flows.
const GROWTH: u64 = 64 << 20;
/// TCP flows of one link here; the default is larger than a test needs.
const FLOWS: usize = 256;
/// Pending connects of one link here.
const DIALING: usize = 200;
/// The issue's: everything is as before within this.
const RECOVERY: Duration = Duration::from_secs(1);
/// DNS queries in flight in all, and clients of the control socket (docs/reference/limits.md).
const QUERIES: u16 = 512;
const CLIENTS: usize = 64;

/// A query for the A record of `name`.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut q = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        q.push(u8::try_from(label.len()).unwrap_or(0));
        q.extend(label.as_bytes());
    }
    q.extend([0, 0, 1, 0, 1]);
    q
}

/// Two guests on one sidecar: one that does too much, by raw frames and by honest flows, and one that looks on.
struct Lab {
    dir: tempfile::TempDir,
    sidecar: Sidecar,
    bystander: Guest,
    flow: SocketHandle,
    echo: u16,
    /// Never answers.
    _silent: UdpSocket,
}

impl Lab {
    /// `descriptors`: the hard limit of the process.
    fn new(descriptors: Option<u64>) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let config = dir.path().join("config");
        std::fs::write(&config, format!("[limits]\nflows = {FLOWS}\ndialing-loopback = {DIALING}\n"))?;
        let silent = UdpSocket::bind("127.0.0.1:0")?;
        let (upstream, config) = (silent.local_addr()?.to_string(), config.display().to_string());
        let second = format!("qemu:unix:{},name=second", dir.path().join("second").display());
        let options = ["--link", &second, "--dns-upstream", &upstream, "--config", &config];
        let mut command = Command::new(portway()?);
        if let Some(n) = descriptors {
            // SAFETY: setrlimit(2) is all that happens between fork and exec.
            unsafe {
                command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, n, n)?));
            }
        }
        let sidecar = Sidecar::start_by(command, dir.path(), &options)?;
        let mut bystander = Guest::attach(&dir.path().join("second"), 9)?;
        bystander.dhcp()?;
        let echo = echo_server()?;
        let flow = bystander.connect((ALIAS, echo).into())?.context("refused")?;
        Ok(Self { dir, sidecar, bystander, flow, echo, _silent: silent })
    }

    fn vm(&self) -> std::path::PathBuf {
        self.dir.path().join("vm")
    }

    /// One round of what a guest does: bytes on an open flow, a new flow, a name.
    fn bystander_is_served(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let new = self.bystander.connect((ALIAS, self.echo).into())?.context("refused")?;
        ensure!(self.bystander.exchange(new, b"new", 3)? == b"new");
        self.bystander.tcp(new).abort();
        self.bystander.step();
        self.bystander.forget(new);
        self.bystanders_flow_and_names()?;
        Ok(began.elapsed())
    }

    /// What needs no further descriptor.
    fn bystanders_flow_and_names(&mut self) -> Result<()> {
        ensure!(self.bystander.exchange(self.flow, b"open", 4)? == b"open");
        let asked = query(7, "host.portway.internal");
        let (_, answer) = self.bystander.ask_udp(5353, (ROUTER, 53).into(), &asked)?;
        ensure!(answer.ends_with(&ALIAS.octets()), "{answer:?}");
        Ok(())
    }
}

/// Ten times too much of one thing after the other, on top of each other, with at most `descriptors` for the process.
fn ten_times_too_much(descriptors: Option<u64>) -> Result<()> {
    let mut lab = Lab::new(descriptors)?;
    let mut guest = Guest::attach(&lab.vm(), 1)?;
    let (ip, ..) = guest.dhcp()?;
    let mac = [0x52, 0x54, 0, 0, 0, 1];
    let send = |guest: &mut Guest, packet: &[u8]| -> Result<()> {
        let frame = portway_tests::raw::ethernet(mac, 0x0800, packet);
        guest.raw(&[&u32::try_from(frame.len())?.to_be_bytes()[..], &frame].concat())?;
        guest.step();
        Ok(())
    };
    let to = (ALIAS, lab.echo).into();
    let old = guest.connect(to)?.context("refused")?;
    ensure!(guest.exchange(old, b"before", 6)? == b"before");
    lab.bystander_is_served()?;
    let before = lab.sidecar.resident()?;

    // SYNs to where nobody answers: so many are pending, those beyond wait for their guest to ask again, or are refused.
    let hole = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    hole.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    hole.listen(0)?;
    let nowhere = SocketAddrV4::new(ALIAS, hole.local_addr()?.as_socket().context("port")?.port());
    let syns = 10_000..10_000 + u16::try_from(DIALING * 10)?;
    for port in syns.clone() {
        let syn = Segment { seq: 1000, flags: SYN, ..Segment::default() };
        send(&mut guest, &tcp(SocketAddrV4::new(ip, port), nowhere, &syn, &[]))?;
    }
    let dialing = lab.sidecar.json(&["stats"])?["tcp_dialing"].as_u64().context("tcp_dialing")?;
    ensure!((30..=DIALING as u64).contains(&dialing), "{dialing} pending connects");
    ensure!(guest.exchange(old, b"during", 6)? == b"during", "the old flow beside SYNs");
    match descriptors {
        None => drop(lab.bystander_is_served().context("beside SYNs")?),
        Some(_) => lab.bystanders_flow_and_names().context("beside SYNs")?,
    }
    let began = Instant::now();
    for port in syns {
        let reset = Segment { seq: 1001, flags: RST, ..Segment::default() };
        send(&mut guest, &tcp(SocketAddrV4::new(ip, port), nowhere, &reset, &[]))?;
    }
    connects_again(&mut guest, to)?;
    let after_syns = began.elapsed();

    // Flows: the first are open, those beyond the limit are refused at once.
    let (mut open, mut refused) = (Vec::new(), 0);
    for _ in 0..FLOWS * 10 {
        match guest.connect(to)? {
            Some(flow) => open.push(flow),
            None => refused += 1,
        }
    }
    let most_flows = descriptors.map_or(FLOWS, |n| usize::try_from(n).unwrap_or(FLOWS));
    ensure!(
        open.len() + refused == FLOWS * 10 && open.len() < most_flows && open.len() > 50,
        "{} open",
        open.len()
    );
    ensure!(descriptors.is_some() || open.len() == FLOWS - 1, "{} open", open.len());
    let open_flows = lab.sidecar.resident()?;
    // SYNs once more, from a thousand ports and no answer to any: each is refused.
    for n in 0..u16::try_from(FLOWS * 10)? {
        let syn = Segment { seq: 1000, flags: SYN, ..Segment::default() };
        let to = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), 9);
        send(&mut guest, &tcp(SocketAddrV4::new(ip, 10_000 + n), to, &syn, &[]))?;
    }
    // Names nobody answers.
    for n in 0..QUERIES * 10 {
        let from = SocketAddrV4::new(ip, 40_000 + n % 5000);
        send(
            &mut guest,
            &udp(from, SocketAddrV4::new(ROUTER, 53), &query(n, &format!("n{n}.outside.test"))),
        )?;
    }
    // Clients of the API that say half a request.
    let mut clients = Vec::new();
    for _ in 0..CLIENTS * 10 {
        // Beyond its backlog the kernel says no, which is an answer too.
        let Ok(mut client) = UnixStream::connect(lab.dir.path().join("api")) else { break };
        client.set_nonblocking(true)?;
        let _ = client.write_all(b"GET /v1/stats HTTP/1.1\r\n");
        clients.push(client);
    }
    ensure!(clients.len() >= CLIENTS, "{} clients", clients.len());
    // Meanwhile: the guest's own flow, and the flow and names of the other guest. Where there are descriptors, its new flows too.
    ensure!(guest.exchange(old, b"during", 6)? == b"during");
    for _ in 0..5 {
        if descriptors.is_none() {
            lab.bystander_is_served().context("during")?;
        } else {
            lab.bystanders_flow_and_names().context("during")?;
        }
    }
    let most = lab.sidecar.resident()?;
    // Of the flows each has up to 2 MiB of rings, of which it touched next to nothing.
    ensure!(most < before + GROWTH, "{before} bytes before, {open_flows} with its flows, {most} at the most");

    let began = Instant::now();
    drop(clients);
    for flow in open {
        guest.tcp(flow).abort();
    }
    connects_again(&mut guest, to)?;
    let flows = began.elapsed();
    lab.bystander_is_served().context("after")?;
    let names = began.elapsed();
    let stats = lab.sidecar.json(&["stats"])?;
    let took = began.elapsed();
    ensure!(
        took < RECOVERY && after_syns < RECOVERY,
        "{after_syns:?} after SYNs; at the end {flows:?} until new flows, {names:?} until the other guest, {took:?} until the API was there"
    );
    // With few descriptors it may be the host that refuses, before a limit is reached.
    let counted = |path: [&str; 2]| stats[path[0]][path[1]].as_u64().is_some_and(|n| n > 0);
    ensure!(counted(["drops", "flow_limit"]) || descriptors.is_some(), "{stats}");
    ensure!(counted(["dns", "over_limit"]) || descriptors.is_some() && counted(["dns", "failed"]), "{stats}");
    ensure!(guest.exchange(old, b"after", 5)? == b"after");
    eprintln!(
        "resident: {} KiB before, {} at the most; recovered from SYNs in {after_syns:?}, from everything in {took:?}",
        before / 1024,
        most / 1024
    );
    Ok(())
}

/// Dials until a connection opens.
fn connects_again(guest: &mut Guest, to: SocketAddr) -> Result<()> {
    guest.until("recovery", |g| {
        let flow = g.dial(to).ok()?;
        for _ in 0..100 {
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
    })
}

#[test]
fn ten_times_the_flows_syns_queries_and_clients_cost_nobody_else_and_pass_within_a_second() -> Result<()> {
    ten_times_too_much(None)
}

#[test]
fn with_128_descriptors_ten_times_of_everything_leaves_old_flows_and_passes_within_a_second() -> Result<()> {
    ten_times_too_much(Some(128))
}

/// The middle one, and the one that only a twentieth exceeds.
fn middle_and_late(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default();
    (at(50), at(95))
}

#[test]
fn a_guest_at_its_limits_is_hardly_felt_by_another() -> Result<()> {
    const ROUNDS: usize = 60;
    let mut lab = Lab::new(None)?;
    let quiet = (0..ROUNDS).map(|_| lab.bystander_is_served()).collect::<Result<Vec<_>>>()?;
    // As fast as the link takes them: SYNs beyond the limit, datagrams from ever new ports, names nobody answers.
    let stop = Arc::new(AtomicBool::new(false));
    let sent = {
        let (path, stop) = (lab.vm(), Arc::clone(&stop));
        std::thread::spawn(move || -> Result<u64> {
            let mut attacker = RawGuest::attach(&path, 77)?;
            let (mut n, mut sent) = (0_u16, 0);
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_add(1);
                let from = SocketAddrV4::new(attacker.ip, n.max(1));
                let syn = Segment { seq: 1, flags: SYN, ..Segment::default() };
                attacker.packet(&tcp(
                    from,
                    SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), 9),
                    &syn,
                    &[],
                ))?;
                attacker.packet(&udp(from, SocketAddrV4::new(ALIAS, 9), b"x"))?;
                attacker.packet(&udp(
                    from,
                    SocketAddrV4::new(ROUTER, 53),
                    &query(n, &format!("n{n}.test")),
                ))?;
                sent += 3;
                if n.is_multiple_of(64) {
                    attacker.frames()?;
                }
            }
            Ok(sent)
        })
    };
    let began = Instant::now();
    let loud = (0..ROUNDS).map(|_| lab.bystander_is_served()).collect::<Result<Vec<_>>>();
    let time = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let sent = sent.join().map_err(|_| anyhow::anyhow!("the attacker panicked"))??;
    let ((middle, late), (loud_middle, loud_late)) = (middle_and_late(quiet), middle_and_late(loud?));
    eprintln!(
        "a round of the other guest: {middle:?} (95 %: {late:?}) alone, {loud_middle:?} ({loud_late:?}) beside {:.0} frames a second",
        sent as f64 / time.as_secs_f64()
    );
    ensure!(sent > 1000, "{sent} frames are no attack");
    // A round takes a dozen turns of the data thread, each of which now has the attacker's share in it: 10 to 20 ms together.
    // Without shares it was half a second; what is allowed here leaves room for a busy machine.
    ensure!(
        loud_middle < Duration::from_millis(150),
        "{middle:?} alone and {loud_middle:?} beside an attack"
    );
    ensure!(loud_late < Duration::from_secs(1), "{late:?} alone and {loud_late:?} beside an attack");
    Ok(())
}
