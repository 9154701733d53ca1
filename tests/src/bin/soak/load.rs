//! What guests and a client of the control API do in a soak, and what has to come of it.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use smoltcp::iface::SocketHandle;

const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
/// Flows a guest keeps open beside what it does.
const HELD: usize = 20;

/// Servers of the host.
pub(super) struct Host {
    echo: u16,
    datagrams: u16,
    /// Nobody listens there.
    closed: u16,
}

impl Host {
    pub(super) fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let echo = listener.local_addr()?.port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let datagrams = socket.local_addr()?.port();
        std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok((n, from)) = socket.recv_from(&mut buffer) {
                // One who has gone gets nothing.
                let _ = socket.send_to(&buffer[..n], from);
            }
        });
        let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Ok(Self { echo, datagrams, closed })
    }
}

/// Numbers that look random and are the same in every run (xorshift, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn size(&mut self, most: u64) -> usize {
        usize::try_from(self.below(most)).unwrap_or(0) + 1
    }
}

/// A guest's life: until `stop`, with load while `loading`.
pub(super) fn guest(
    path: &Path,
    n: u8,
    published: u16,
    host: &Host,
    loading: &AtomicBool,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> Result<()> {
    let mut life = Life::begin(path, n)?;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ u64::from(n) << 32 | 1);
    let mut was_loading = false;
    while !stop.load(Ordering::Relaxed) {
        if loading.load(Ordering::Relaxed) {
            was_loading = true;
            let step = dice.below(100);
            life.step(step, &mut dice, host, published).with_context(|| format!("guest {n}, step {step}"))?;
            done.fetch_add(1, Ordering::Relaxed);
        } else {
            if std::mem::take(&mut was_loading) {
                life.quiet()?;
            }
            life.guest.step();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// A guest and what it keeps open.
struct Life<'a> {
    path: &'a Path,
    n: u8,
    guest: Guest,
    held: VecDeque<SocketHandle>,
}

impl<'a> Life<'a> {
    fn begin(path: &'a Path, n: u8) -> Result<Self> {
        let mut guest = Guest::attach(path, n + 1)?;
        guest.dhcp()?;
        Ok(Self { path, n, guest, held: VecDeque::new() })
    }

    fn step(&mut self, step: u64, dice: &mut Dice, host: &Host, published: u16) -> Result<()> {
        match step {
            0..20 => self.short(dice, host),
            20..40 => self.long(dice, host),
            40..50 => {
                let refused = self.guest.connect((ALIAS, host.closed).into())?;
                ensure!(refused.is_none(), "a closed port was open");
                Ok(())
            }
            50..65 => {
                let bytes = vec![7; dice.size(8000)];
                let port = u16::try_from(20_000 + dice.below(20_000))?;
                let (_, back) = self.guest.ask_udp(port, (ALIAS, host.datagrams).into(), &bytes)?;
                ensure!(back == bytes, "{} bytes came back of {}", back.len(), bytes.len());
                Ok(())
            }
            65..80 => {
                // Some names are asked for again, and come from the cache.
                let name = ["a", "b", "nx", "none", "big"][dice.size(5) - 1];
                let name = format!("{name}{}.soak.test", if name.len() > 1 { "" } else { "x" });
                let (_, answer) = self.guest.ask_udp(5353, (GATEWAY, 53).into(), &query(&name))?;
                ensure!(answer.len() > 12, "{name}: {answer:?}");
                Ok(())
            }
            80..90 => self.inward(dice, published),
            90..96 => {
                // Frames of nothing: a runt, and one whose every field is a surprise.
                let size = dice.size(200);
                let junk: Vec<u8> = (0..size).map(|_| u8::try_from(dice.below(256)).unwrap_or(0)).collect();
                let length = u32::try_from(junk.len())?.to_be_bytes();
                self.guest.raw(&[&length[..], &junk].concat())
            }
            96..99 => {
                // Cut off in the middle of whatever it had open.
                let flow = self.guest.connect((ALIAS, host.echo).into())?.context("refused")?;
                self.guest.exchange(flow, b"cut", 3)?;
                self.guest.tcp(flow).abort();
                self.guest.step();
                self.guest.forget(flow);
                Ok(())
            }
            _ => {
                // The VM goes without a word and comes again.
                let Guest { link, .. } = &self.guest;
                link.shutdown(std::net::Shutdown::Both)?;
                let again = Self::begin_again(self.path, self.n)?;
                self.guest = again;
                self.held.clear();
                Ok(())
            }
        }
    }

    /// Where the link has not been seen to end yet, a further connection waits or is closed: it is tried again.
    fn begin_again(path: &Path, n: u8) -> Result<Guest> {
        let mut last = None;
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(50));
            match Guest::attach(path, n + 1).and_then(|mut g| g.dhcp().map(|_| g)) {
                Ok(guest) => return Ok(guest),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("never tried")?.context("coming again"))
    }

    fn short(&mut self, dice: &mut Dice, host: &Host) -> Result<()> {
        let flow = self.guest.connect((ALIAS, host.echo).into())?.context("refused")?;
        let bytes = vec![3; dice.size(100_000)];
        ensure!(self.guest.exchange(flow, &bytes, bytes.len())? == bytes, "bytes changed");
        self.close(flow)
    }

    fn close(&mut self, flow: SocketHandle) -> Result<()> {
        self.guest.tcp(flow).close();
        // smoltcp's own TIME_WAIT is of no interest here.
        self.guest.until("the end of a flow", |g| {
            let state = g.tcp(flow).state();
            use smoltcp::socket::tcp::State;
            matches!(state, State::Closed | State::TimeWait).then_some(())
        })?;
        self.guest.forget(flow);
        Ok(())
    }

    fn long(&mut self, dice: &mut Dice, host: &Host) -> Result<()> {
        let flow = self.guest.connect((ALIAS, host.echo).into())?.context("refused")?;
        self.held.push_back(flow);
        // An old one still carries bytes, or is the one that goes.
        let bytes = vec![9; dice.size(2000)];
        if let Some(old) = self.held.front().copied() {
            ensure!(self.guest.exchange(old, &bytes, bytes.len())? == bytes, "an old flow's bytes changed");
        }
        if self.held.len() > HELD
            && let Some(old) = self.held.pop_front()
        {
            self.close(old)?;
        }
        Ok(())
    }

    /// A client of the host comes to the published port.
    fn inward(&mut self, dice: &mut Dice, published: u16) -> Result<()> {
        let server = self.guest.listen(22)?;
        let bytes = vec![5; dice.size(20_000)];
        let sent = bytes.clone();
        let client = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
            let mut stream = TcpStream::connect(("127.0.0.1", published))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(&sent)?;
            let mut answer = [0; 4];
            stream.read_exact(&mut answer)?;
            Ok(answer.to_vec())
        });
        let got = self.guest.exchange(server, b"done", bytes.len())?;
        self.guest.until("the client", |_| client.is_finished().then_some(()))?;
        let answer = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        ensure!(got == bytes && answer == b"done", "bytes changed on the way in");
        self.close(server)
    }

    /// Ends everything it has open.
    fn quiet(&mut self) -> Result<()> {
        while let Some(flow) = self.held.pop_front() {
            self.close(flow)?;
        }
        Ok(())
    }
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

/// The body of an answer of the control API.
pub(super) fn get(api: &Path, route: &str) -> Result<String> {
    ask(api, "GET", route, "")
}

fn ask(api: &Path, method: &str, route: &str, body: &str) -> Result<String> {
    let mut stream = UnixStream::connect(api)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let length = body.len();
    write!(
        stream,
        "{method} {route} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.starts_with("HTTP/1.1 2"), "{method} {route}: {head}");
    Ok(body.to_owned())
}

/// A client of the control API: until `stop`, with load while `loading`.
pub(super) fn client(api: &Path, loading: &AtomicBool, stop: &AtomicBool, done: &AtomicU64) -> Result<()> {
    let directory = api.parent().context("no directory")?;
    let mut round = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        if !loading.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        round += 1;
        for route in ["/v1/network", "/v1/links", "/v1/ports", "/v1/flows", "/v1/leases", "/v1/stats"] {
            get(api, route)?;
        }
        let socket = directory.join(format!("live{}", round % 7));
        let spec = format!("{{\"specs\":[\"unix:{}:80\",\"127.0.0.1:0:81\"]}}", socket.display());
        let published = ask(api, "POST", "/v1/ports", &spec)?;
        let published: serde_json::Value = serde_json::from_str(&published)?;
        let port = published["published"]
            .as_array()
            .and_then(|all| all.iter().find_map(|p| p["host_port"].as_u64().filter(|p| *p > 0)));
        let port = port.with_context(|| format!("{published}"))?;
        let spec = format!("{{\"specs\":[\"unix:{}:80\",\"127.0.0.1:{port}:81\"]}}", socket.display());
        ask(api, "DELETE", "/v1/ports", &spec)?;
        if round.is_multiple_of(5) {
            // One who follows events, and one who captures, and goes in the middle.
            for route in ["/v1/events", "/v1/capture"] {
                let mut follower = UnixStream::connect(api)?;
                follower.set_read_timeout(Some(Duration::from_millis(200)))?;
                write!(follower, "GET {route} HTTP/1.1\r\nHost: soak\r\n\r\n")?;
                let mut some = [0; 4096];
                while follower.read(&mut some).is_ok_and(|n| n > 0 && round.is_multiple_of(2)) {}
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
