//! The service with agents that are tests: what a good one gets, and what a rogue one does not.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use portway_api::agent::{
    Decoder, DialError, Hello, Listener, MESSAGE_MAX, PROTOCOL, Part, Target, ToGuest, ToHost, encode, parse,
};
use portway_api::control::{PortInfo, Protocol};
use tokio::sync::oneshot;

use super::rules::Rule;
use super::*;
use crate::request::Request;

/// The service on a unix socket, and a data thread that publishes nothing.
struct Host {
    dir: tempfile::TempDir,
    requests: Requests,
    events: std::sync::mpsc::Receiver<crate::events::Event>,
    _files: Vec<Removed>,
}

impl Host {
    fn start(rules: Vec<Rule>) -> Self {
        Self::with(rules, &[], Vec::new())
    }

    fn with(rules: Vec<Rule>, publish: &[&str], sockets: Vec<SocketPair>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = AgentSpec { path: dir.path().join("agent"), name: None };
        let config = AgentConfig {
            agents: vec![agent],
            rules,
            sockets,
            binds: GuestBinds::Loopback,
            keep_alive: None,
        };
        let specs = publish.iter().map(|s| s.parse().unwrap());
        let (agents, files) = Agents::open(&config, specs).unwrap();
        let poll = mio::Poll::new().unwrap();
        let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
        let (requests, incoming) = Requests::new(waker);
        let (tell, events) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let _poll = poll;
            while let Ok(request) = incoming.recv() {
                match request {
                    Request::GuestAddress { reply, .. } => drop(reply.send(None)),
                    Request::Ports { reply } => drop(reply.send(Vec::new())),
                    Request::Note(event) => drop(tell.send(event)),
                    Request::Unpublish { spec, reply } => {
                        drop(reply.send(Err(PublishError::NotPublished(spec.to_string()))));
                    }
                    _ => {}
                }
            }
        });
        let theirs = requests.clone();
        let (up, is_up) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                agents.serve(&theirs, Vec::new(), &Arc::default());
                up.send(()).unwrap();
                std::future::pending::<()>().await;
            });
        });
        is_up.recv().unwrap();
        Self { dir, requests, events, _files: files }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> T {
        let (reply, answer) = oneshot::channel();
        self.requests.send(make(reply)).unwrap();
        answer.blocking_recv().unwrap()
    }

    fn ports(&self) -> Vec<PortInfo> {
        self.ask(|reply| Request::Ports { reply })
    }

    fn until(&self, what: &str, mut done: impl FnMut(&[PortInfo]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(&self.ports()) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.ports());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn agent(&self) -> Agent {
        self.agent_of("boot")
    }

    fn agent_of(&self, boot: &str) -> Agent {
        let mut agent = Agent::connect(&self.path());
        let hello = Hello {
            protocol: PROTOCOL,
            agent: "test".into(),
            boot_id: boot.into(),
            capabilities: Vec::new(),
        };
        agent.say(&ToHost::Hello(hello));
        let ToGuest::Welcome(welcome) = agent.hear() else { panic!("no welcome") };
        assert_eq!(welcome.protocol, PROTOCOL);
        agent.key = welcome.key;
        agent
    }
}

/// An agent.
struct Agent {
    path: PathBuf,
    stream: UnixStream,
    decoder: Decoder,
    key: u64,
}

impl Agent {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { path: path.to_owned(), stream, decoder: Decoder::default(), key: 0 }
    }

    fn say(&mut self, message: &ToHost) {
        self.stream.write_all(&encode(message).unwrap()).unwrap();
    }

    /// The next message that is not about the time; `None` at the end.
    fn try_hear(&mut self) -> Option<ToGuest> {
        let mut buffer = [0; 4096];
        loop {
            while let Some(bytes) = self.decoder.message().unwrap() {
                match parse(bytes).unwrap() {
                    ToGuest::Time { .. } => {}
                    other => return Some(other),
                }
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(n) => self.decoder.feed(&buffer[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("nothing heard: {e}"),
            }
        }
    }

    fn hear(&mut self) -> ToGuest {
        self.try_hear().expect("the session has ended")
    }

    fn listens(&mut self, added: &[Listener]) {
        self.say(&ToHost::Listeners { part: Part::Whole, added: added.to_vec(), removed: Vec::new() });
    }

    fn publish(&mut self, spec: &str) -> (Vec<PortInfo>, Vec<String>) {
        self.say(&ToHost::Publish { id: 7, spec: spec.into() });
        match self.hear() {
            ToGuest::Done { id: 7, ports, errors } => (ports, errors),
            other => panic!("{other:?}"),
        }
    }

    /// A stream of this agent, with its first message said.
    fn bring(&self, first: &ToHost) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(&encode(first).unwrap()).unwrap();
        stream
    }

    /// Waits for an `Open` and brings its stream.
    fn carry(&mut self) -> (u64, Target, UnixStream) {
        match self.hear() {
            ToGuest::Open { stream, key, target } => {
                (stream, target, self.bring(&ToHost::Stream { stream, key }))
            }
            other => panic!("{other:?}"),
        }
    }
}

fn listener(proto: Protocol, at: &str) -> Listener {
    let at: SocketAddr = at.parse().unwrap();
    Listener { proto, address: at.ip(), port: at.port(), v6_only: false, redirected: false }
}

/// A port that is free now.
fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn auto() -> Vec<Rule> {
    vec![Rule::everything(false)]
}

fn tcp(port: u16) -> Listener {
    listener(Protocol::Tcp, &format!("127.0.0.1:{port}"))
}

#[test]
fn a_listener_is_published_and_a_client_reaches_it_through_the_agent() {
    let host = Host::start(auto());
    let port = free();
    let mut agent = host.agent();
    agent.listens(&[tcp(port)]);
    host.until("published", |ports| ports.len() == 1);
    let info = &host.ports()[0];
    assert_eq!((info.host_port, info.guest.as_str(), info.guest_port), (port, "127.0.0.1", port));
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.write_all(b"hello").unwrap();
    let (_, target, mut stream) = agent.carry();
    assert_eq!(target, Target::Tcp { address: ([127, 0, 0, 1], port).into() });
    let mut got = [0; 5];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut got).unwrap(), 0, "the client's end");
    stream.write_all(b"late").unwrap();
    drop(stream);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "late");
    agent.say(&ToHost::Listeners { part: Part::Delta, added: Vec::new(), removed: vec![tcp(port)] });
    host.until("gone", <[_]>::is_empty);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    // The port can be taken at once by another.
    TcpListener::bind(("127.0.0.1", port)).unwrap();
}

#[test]
fn a_refusal_and_a_reset_in_the_guest_reset_the_client_and_the_other_way_round() {
    let host = Host::start(auto());
    let port = free();
    let mut agent = host.agent();
    agent.listens(&[tcp(port)]);
    host.until("published", |ports| ports.len() == 1);
    let reset = |client: &mut TcpStream| match client.read(&mut [0]) {
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    };

    let mut refused = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let ToGuest::Open { stream, .. } = agent.hear() else { panic!("no open") };
    agent.say(&ToHost::StreamFailed { stream, error: DialError::Refused });
    assert!(reset(&mut refused));

    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (stream, _, far) = agent.carry();
    agent.say(&ToHost::StreamReset { stream });
    assert!(reset(&mut client));
    drop(far);

    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (stream, _, mut far) = agent.carry();
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(agent.hear(), ToGuest::Reset { stream });
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
}

#[test]
fn datagrams_of_each_client_have_a_stream() {
    let host = Host::start(auto());
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut agent = host.agent();
    agent.listens(&[listener(Protocol::Udp, &format!("127.0.0.1:{port}"))]);
    host.until("published", |ports| ports.len() == 1 && ports[0].proto == Protocol::Udp);
    for n in 0..2u8 {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.send_to(&[n; 3], ("127.0.0.1", port)).unwrap();
        let (_, target, mut stream) = agent.carry();
        assert_eq!(target, Target::Udp { address: ([127, 0, 0, 1], port).into() });
        let mut framed = [0; 5];
        stream.read_exact(&mut framed).unwrap();
        assert_eq!(framed, [0, 3, n, n, n]);
        stream.write_all(&[0, 2, b'o', b'k', 0, 0]).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(client.recv(&mut buffer).unwrap(), 2);
        assert_eq!(client.recv(&mut buffer).unwrap(), 0, "an empty datagram is one");
    }
    assert_eq!(host.ports()[0].accepted, 2);
}

#[test]
fn a_port_that_is_taken_is_refused_and_said_or_published_at_the_next_free_one() {
    let squatter = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = squatter.local_addr().unwrap().port();
    let host = Host::start(auto());
    let mut agent = host.agent();
    agent.listens(&[tcp(port)]);
    let ToGuest::Refused { listener, reason } = agent.hear() else { panic!("not told") };
    assert!(listener == tcp(port) && reason.contains("in use"), "{reason}");
    let info = &host.ports()[0];
    assert!(info.state.starts_with("not published: ") && info.host_port == port, "{info:?}");
    let told = std::iter::from_fn(|| host.events.recv_timeout(Duration::from_secs(10)).ok());
    assert!(told.into_iter().any(|e| matches!(e, crate::events::Event::NotPublished(..))));

    let free = Host::start(vec![Rule::everything(true)]);
    // Kept: its ports go with it.
    let mut agent = free.agent();
    agent.listens(&[tcp(port)]);
    free.until("published elsewhere", |ports| ports.len() == 1 && ports[0].host_port > port);
    assert_eq!(free.ports()[0].guest_port, port);
}

#[test]
fn a_guest_asks_for_ports_within_its_policy_and_gives_them_back() {
    let host = Host::start(Vec::new());
    let mut agent = host.agent();
    let (ports, errors) = agent.publish("0.0.0.0:0:172.17.0.2:80");
    assert!(errors.is_empty() && ports[0].guest == "172.17.0.2", "{ports:?} {errors:?}");
    assert!(ports[0].bind.iter().all(|b| b == "127.0.0.1" || b == "::1"), "loopback alone: {ports:?}");
    for spec in ["192.0.2.9:8080:80", "unix:/tmp/x:80", "8080:other:80", "junk"] {
        assert!(agent.publish(spec).0.is_empty(), "{spec}");
    }
    assert_eq!(agent.publish("0.0.0.0:0:172.17.0.2:80").0, ports, "asked twice, published once");
    agent.say(&ToHost::Ports { id: 3 });
    assert!(matches!(agent.hear(), ToGuest::Ports { id: 3, ports, more: false } if ports.len() == 1));
    agent.say(&ToHost::Unpublish { id: 9, spec: "0.0.0.0:0:172.17.0.2:80".into() });
    assert!(matches!(agent.hear(), ToGuest::Done { id: 9, ports, .. } if ports.len() == 1));
    assert!(host.ports().is_empty());
}

#[test]
fn a_guest_has_so_many_ports_and_no_more() {
    let host = Host::start(Vec::new());
    let mut agent = host.agent();
    for n in 0..guest::PORTS {
        let (ports, errors) = agent.publish(&format!("0:127.0.0.1:{}", n + 1));
        assert_eq!((ports.len(), errors.len()), (1, 0), "{errors:?}");
    }
    let (ports, errors) = agent.publish("0:127.0.0.1:60000");
    assert!(ports.is_empty() && errors[0].contains("limit reached"), "{errors:?}");
    let (ports, errors) = agent.publish("1-65535:127.0.0.1:1-65535");
    assert!(ports.is_empty() && errors.len() == 1, "one line for a range: {errors:?}");
}

#[test]
fn an_agent_that_is_started_again_finds_its_ports_and_one_that_stays_away_loses_them() {
    let host = Host::start(auto());
    let port = free();
    let mut agent = host.agent();
    agent.listens(&[tcp(port)]);
    host.until("published", |ports| ports.len() == 1);
    drop(agent);
    // A client that comes meanwhile waits for the next agent.
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut agent = host.agent();
    agent.listens(&[tcp(port)]);
    let (_, _, mut stream) = agent.carry();
    stream.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    assert_eq!(host.ports().len(), 1);
    // What it does not report any more is gone with the snapshot.
    let other = free();
    agent.listens(&[tcp(other)]);
    host.until("the other", |ports| ports.len() == 1 && ports[0].host_port == other);
    drop(agent);
    host.until("no agent, no port", <[_]>::is_empty);
    assert!(TcpStream::connect(("127.0.0.1", other)).is_err());
}

#[test]
fn a_guest_that_has_rebooted_begins_with_nothing() {
    let host = Host::start(auto());
    let port = free();
    let mut before = host.agent_of("one");
    before.listens(&[tcp(port)]);
    host.until("published", |ports| ports.len() == 1);
    let _after = host.agent_of("two");
    assert!(host.ports().is_empty());
    assert!(matches!(before.try_hear(), Some(ToGuest::Bye { stay_away: false, .. }) | None));
}

#[test]
fn a_wish_that_is_not_claimed_again_is_closed() {
    let host = Host::start(Vec::new());
    let mut agent = host.agent();
    agent.publish("0:127.0.0.1:1");
    agent.publish("0:127.0.0.1:2");
    drop(agent);
    let mut agent = host.agent();
    let (ports, _) = agent.publish("0:127.0.0.1:2");
    assert_eq!(ports.len(), 1);
    host.until("the unclaimed one is closed", |ports| ports.len() == 1 && ports[0].guest_port == 2);
}

#[test]
fn dockers_two_wishes_for_every_address_share_a_port_until_both_are_taken_back() {
    let host = Host::start(Vec::new());
    let mut agent = host.agent();
    let port = free();
    let (v4, v6) = (format!("0.0.0.0:{port}:172.17.0.2:80/tcp"), format!("[::]:{port}:172.17.0.2:80/tcp"));
    let (ports, errors) = agent.publish(&v4);
    assert!(errors.is_empty() && ports.len() == 1, "{errors:?}");
    assert_eq!(agent.publish(&v6), (ports, Vec::new()));
    assert_eq!(host.ports().len(), 1);
    // Twice, and no more: another container has another port.
    let (none, errors) = agent.publish(&format!("[::]:{port}:172.17.0.3:80/tcp"));
    assert!(none.is_empty() && errors.len() == 1, "{none:?}");
    for (spec, left) in [(&v4, 1), (&v6, 0)] {
        agent.say(&ToHost::Unpublish { id: 9, spec: spec.clone() });
        assert!(matches!(agent.hear(), ToGuest::Done { id: 9, ports, .. } if ports.len() == 1));
        assert_eq!(host.ports().len(), left);
    }
}

#[test]
fn the_operators_own_ports_stay_whatever_the_agent_does() {
    let port = free();
    let host = Host::with(Vec::new(), &[&format!("{port}:127.0.0.1:80")], Vec::new());
    assert_eq!(host.ports().len(), 1);
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut agent = host.agent();
    let (_, target, stream) = agent.carry();
    assert_eq!(target, Target::Tcp { address: ([127, 0, 0, 1], 80).into() });
    drop(stream);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(agent);
    let spec: PublishSpec = "0:127.0.0.1:81".parse().unwrap();
    let live = host.ask(|reply| Request::Publish { spec, reply });
    assert!(live[0].is_ok());
    let spec: PublishSpec = format!("{port}:127.0.0.1:80").parse().unwrap();
    let gone = host.ask(|reply| Request::Unpublish { spec, reply });
    assert_eq!(gone.unwrap().len(), 1);
    assert_eq!(host.ports().len(), 1);
}

#[test]
fn unix_sockets_lead_both_ways() {
    let files = tempfile::tempdir().unwrap();
    let (ours, hosts) = (files.path().join("docker.sock"), files.path().join("ssh.sock"));
    let server = std::os::unix::net::UnixListener::bind(&hosts).unwrap();
    let pair = SocketPair { guest: "/run/ssh.sock".into(), host: hosts };
    let spec = format!("unix:{}:/var/run/docker.sock", ours.display());
    let host = Host::with(Vec::new(), &[&spec], vec![pair]);
    let mut agent = host.agent();
    let mut client = UnixStream::connect(&ours).unwrap();
    let (_, target, mut stream) = agent.carry();
    assert_eq!(target, Target::Unix { path: "/var/run/docker.sock".into() });
    stream.write_all(b"from the guest").unwrap();
    client.read_exact(&mut [0; 14]).unwrap();

    let mut guest = agent.bring(&ToHost::Client { socket: 0, key: agent.key });
    guest.write_all(b"sign").unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    accepted.read_exact(&mut [0; 4]).unwrap();
    accepted.write_all(b"ed").unwrap();
    guest.read_exact(&mut [0; 2]).unwrap();
    // Without the session's key, or of another socket, a client is nobody.
    for first in [ToHost::Client { socket: 0, key: 0 }, ToHost::Client { socket: 9, key: agent.key }] {
        assert_eq!(agent.bring(&first).read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn one_who_waits_is_told_when_the_guest_is_ready_and_when_its_port_is() {
    let host = Host::start(auto());
    let wait = |port| {
        let (reply, answer) = oneshot::channel();
        host.requests.send(Request::Await { port, reply }).unwrap();
        answer
    };
    let port = free();
    let (ready, reachable) = (wait(None), wait(Some(port)));
    let mut agent = host.agent();
    agent.say(&ToHost::Ready);
    assert!(ready.blocking_recv().unwrap().is_ok());
    agent.listens(&[tcp(port)]);
    assert!(reachable.blocking_recv().unwrap().is_ok());
    let agents = host.ask(|reply| Request::Agents { reply });
    assert!(agents[0].ready && agents[0].ports == 1 && agents[0].listeners == 1, "{agents:?}");
}

// ---- rogues ----

#[test]
fn garbage_ends_its_stream_and_nobody_elses() {
    let host = Host::start(auto());
    let port = free();
    let mut good = host.agent();
    good.listens(&[tcp(port)]);
    host.until("published", |ports| ports.len() == 1);
    let too_long = u32::try_from(MESSAGE_MAX + 1).unwrap().to_be_bytes();
    let bodies: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 64],
        &[0, 0, 0, 2, b'{', b'}'],
        &[0, 0, 0, 0],
        &too_long,
        b"\0\0\0\x10{\"type\":\"ready\"}",
        b"\0\0\0\x26{\"type\":\"stream\",\"stream\":1,\"key\":12345}",
    ];
    for body in bodies {
        let mut rogue = UnixStream::connect(host.path()).unwrap();
        rogue.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = rogue.write_all(body);
        // The end, or a reset because bytes were left unread.
        assert!(!matches!(rogue.read(&mut [0]), Ok(1..)), "{body:?}");
    }
    assert_eq!(host.ports().len(), 1);
    // In a session too.
    let mut rogue = host.agent();
    rogue.stream.write_all(b"\0\0\0\x05{oops").unwrap();
    assert!(std::iter::from_fn(|| rogue.try_hear()).all(|m| matches!(m, ToGuest::Bye { .. })));
}

#[test]
fn a_message_that_is_not_known_is_answered_and_changes_nothing() {
    let host = Host::start(auto());
    let mut agent = host.agent();
    let newer = br#"{"type":"teleport"}"#;
    agent.stream.write_all(&u32::try_from(newer.len()).unwrap().to_be_bytes()).unwrap();
    agent.stream.write_all(newer).unwrap();
    assert_eq!(agent.hear(), ToGuest::Unknown { kind: "teleport".into() });
    agent.say(&ToHost::Ports { id: 1 });
    assert!(matches!(agent.hear(), ToGuest::Ports { .. }), "and the session goes on");
}

#[test]
fn another_protocol_is_sent_away_with_a_reason() {
    let host = Host::start(auto());
    let mut agent = Agent::connect(&host.path());
    let hello = Hello { protocol: 99, agent: "9".into(), boot_id: String::new(), capabilities: Vec::new() };
    agent.say(&ToHost::Hello(hello));
    let ToGuest::Bye { reason, stay_away: true } = agent.hear() else { panic!("no good-bye") };
    assert!(reason.contains("version 1"), "{reason}");
    assert_eq!(agent.try_hear(), None);
}

#[test]
fn ten_thousand_silent_streams_keep_no_agent_out_and_are_closed() {
    let host = Host::start(auto());
    let port = free();
    let mut held = std::collections::VecDeque::new();
    for n in 0..10_000 {
        held.push_back(UnixStream::connect(host.path()).unwrap());
        // Half of them are held until they are closed; the rest go by themselves.
        if n % 2 == 0 || held.len() > 200 {
            held.pop_front();
        }
    }
    let mut agent = host.agent();
    agent.listens(&[tcp(port)]);
    host.until("published", |ports| ports.len() == 1);
    let mut closed = 0;
    for mut stream in held {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        closed += usize::from(
            !matches!(stream.read(&mut [0]), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock),
        );
    }
    assert!(closed >= 100, "{closed}: the flood is let go");
}

#[test]
fn listeners_beyond_the_limit_are_not_seen_and_half_a_message_delays_nobody() {
    let host = Host::start(Vec::new());
    let mut rogue = host.agent();
    let mut half = UnixStream::connect(host.path()).unwrap();
    half.write_all(&[0, 0]).unwrap();
    for block in 0..40u16 {
        let added = (0..200).map(|n| listener(Protocol::Tcp, &format!("10.0.{block}.{n}:80"))).collect();
        rogue.say(&ToHost::Listeners { part: Part::Delta, added, removed: Vec::new() });
    }
    rogue.say(&ToHost::Ports { id: 1 });
    assert!(matches!(rogue.hear(), ToGuest::Ports { .. }));
    let agents = host.ask(|reply| Request::Agents { reply });
    assert_eq!(agents[0].listeners, guest::auto::LISTENERS);
}

#[test]
fn at_the_limit_of_a_ports_clients_the_idlest_goes() {
    let host = Host::start(auto());
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut agent = host.agent();
    agent.listens(&[listener(Protocol::Udp, &format!("127.0.0.1:{port}"))]);
    host.until("published", |ports| ports.len() == 1);
    let mut flows = Vec::new();
    for n in 0..=udp::CLIENTS {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"x", ("127.0.0.1", port)).unwrap();
        let (_, _, stream) = agent.carry();
        flows.push((n, client, stream));
    }
    let (_, first, mut stream) = flows.swap_remove(0);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [0, 1, b'x'], "the first had its datagram, and then its end");
    let connections = |host: &Host| host.ask(|reply| Request::Agents { reply })[0].streams;
    assert_eq!(connections(&host), udp::CLIENTS);
    // It is a new client when it comes again.
    first.send_to(b"y", ("127.0.0.1", port)).unwrap();
    agent.carry();
    assert_eq!(host.ports()[0].accepted, udp::CLIENTS as u64 + 2);
}

#[test]
fn listeners_that_find_no_port_are_listed_up_to_a_limit() {
    let host = Host::start(auto());
    let mut agent = host.agent();
    // One port after the other: those of a test beside this one are refused, and count as well.
    let many: Vec<Listener> = (20_000..).map(tcp).take(guest::PORTS + guest::auto::REFUSED + 50).collect();
    for added in many.chunks(200) {
        agent.say(&ToHost::Listeners { part: Part::Delta, added: added.to_vec(), removed: Vec::new() });
    }
    host.until("all are looked at", |ports| ports.len() == guest::PORTS + guest::auto::REFUSED);
    let refused = host.ports().iter().filter(|p| p.state.starts_with("not published: ")).count();
    assert!(refused >= guest::auto::REFUSED, "{refused}");
}

#[test]
fn an_agent_that_does_not_read_loses_its_session() {
    let host = Host::start(Vec::new());
    let mut rogue = host.agent();
    // Each question has an answer; nobody takes them.
    let question = encode(&ToHost::Publish { id: 1, spec: "x".repeat(1000) }).unwrap();
    rogue.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while rogue.stream.write_all(&question).is_ok() {
        assert!(Instant::now() < deadline, "it is read for ever");
    }
    host.until("alive", <[_]>::is_empty);
}
