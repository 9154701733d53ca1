//! A 9P client of a few lines, as `mkdir`, `echo` and `cat` under a mount would use it.

use std::sync::mpsc::Receiver;

use tokio::io::DuplexStream;

use super::*;
use crate::request::{PublishError, Request as Asked, Requests};

/// The data thread, played: publishes everything but port 7, which is taken.
fn publishes(requests: Receiver<Asked>) {
    std::thread::spawn(move || {
        while let Ok(request) = requests.recv() {
            match request {
                Asked::Publish { spec, reply } => {
                    let crate::publish::spec::HostEnd::Ports { first, .. } = spec.host else {
                        panic!("{spec}")
                    };
                    let info = portway_api::control::PortInfo {
                        proto: spec.proto,
                        bind: vec!["127.0.0.1".into()],
                        host_port: if first == 0 { 40_000 } else { first },
                        guest: "g".into(),
                        guest_port: spec.guest_port,
                        state: "listening".into(),
                        accepted: 0,
                    };
                    let taken = PublishError::Bind {
                        address: "tcp 127.0.0.1:7".into(),
                        reason: format!("{}: take another", crate::publish::IN_USE),
                    };
                    let _ = reply.send(vec![if first == 7 { Err(taken) } else { Ok(info) }]);
                }
                Asked::Unpublish { reply, .. } => drop(reply.send(Ok(Vec::new()))),
                other => panic!("{other:?}"),
            }
        }
    });
}

fn exposer() -> Arc<Exposer> {
    let poll = mio::Poll::new().unwrap();
    let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
    let (requests, incoming) = Requests::new(waker);
    publishes(incoming);
    // The waker must find its poll as long as the test runs.
    std::mem::forget(poll);
    Arc::new(Exposer::new(requests, Arc::default(), "192.168.65.0/24".parse().unwrap(), Vec::new(), None))
}

struct Client {
    stream: DuplexStream,
}

/// An answer: its type and what follows the tag.
type Heard = (u8, Vec<u8>);

impl Client {
    async fn new(exposer: &Arc<Exposer>) -> Self {
        let (stream, theirs) = tokio::io::duplex(65_536);
        let (reading, writing) = tokio::io::split(theirs);
        tokio::spawn(serve(reading, writing, Arc::clone(exposer)));
        let mut client = Self { stream };
        let version = [&8192_u32.to_le_bytes()[..], &text("9P2000.u")].concat();
        let (kind, body) = client.ask(100, &version).await;
        assert_eq!((kind, &body[..4], &body[6..]), (101, &8192_u32.to_le_bytes()[..], &b"9P2000"[..]));
        let attach = [&number(0)[..], &number(NO_FID), &text("root"), &text("/")].concat();
        assert_eq!(client.ask(104, &attach).await.0, 105);
        client
    }

    async fn ask(&mut self, kind: u8, body: &[u8]) -> Heard {
        let size = u32::try_from(body.len() + HEADER).unwrap();
        let message = [&size.to_le_bytes()[..], &[kind, 1, 0], body].concat();
        self.stream.write_all(&message).await.unwrap();
        let mut size = [0; 4];
        self.stream.read_exact(&mut size).await.unwrap();
        let mut answer = vec![0; u32::from_le_bytes(size) as usize - 4];
        self.stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[1..3], [1, 0]);
        (answer[0], answer[3..].to_vec())
    }

    async fn walk(&mut self, from: u32, to: u32, names: &[&str]) -> Heard {
        let count = u16::try_from(names.len()).unwrap().to_le_bytes();
        let names: Vec<u8> = names.iter().flat_map(|n| text(n)).collect();
        self.ask(110, &[&number(from)[..], &number(to), &count, &names].concat()).await
    }

    async fn mkdir(&mut self, fid: u32, name: &str) -> u8 {
        assert_eq!(self.walk(0, fid, &[]).await.0, 111);
        let permissions = (DMDIR | 0o755).to_le_bytes();
        let (kind, _) = self.ask(114, &[&number(fid)[..], &text(name), &permissions, &[0]].concat()).await;
        assert_eq!(self.ask(120, &number(fid)).await.0, 121);
        kind
    }

    async fn open_ctl(&mut self, fid: u32, name: &str) {
        assert_eq!(self.walk(0, fid, &[name, CTL]).await.0, 111);
        assert_eq!(self.ask(112, &[&number(fid)[..], &[2]].concat()).await.0, 113);
    }

    async fn write(&mut self, fid: u32, data: &str) -> u8 {
        let count = u32::try_from(data.len()).unwrap().to_le_bytes();
        self.ask(118, &[&number(fid)[..], &[0; 8], &count, data.as_bytes()].concat()).await.0
    }

    async fn read(&mut self, fid: u32) -> String {
        let body = [&number(fid)[..], &[0; 8], &8000_u32.to_le_bytes()].concat();
        let (kind, body) = self.ask(116, &body).await;
        assert_eq!(kind, 117);
        String::from_utf8_lossy(&body[4..]).into_owned()
    }

    /// The names in the root.
    async fn names(&mut self) -> Vec<String> {
        assert_eq!(self.walk(0, 90, &[]).await.0, 111);
        let body = [&number(90)[..], &[0; 8], &8000_u32.to_le_bytes()].concat();
        let (_, body) = self.ask(116, &body).await;
        assert_eq!(self.ask(120, &number(90)).await.0, 121);
        let (mut rest, mut names) = (&body[4..], Vec::new());
        while let [a, b, ..] = rest {
            let (entry, after) = rest.split_at(2 + usize::from(u16::from_le_bytes([*a, *b])));
            let len = usize::from(u16::from_le_bytes([entry[41], entry[42]]));
            names.push(String::from_utf8(entry[43..43 + len].to_vec()).unwrap());
            rest = after;
        }
        names
    }
}

fn number(n: u32) -> [u8; 4] {
    n.to_le_bytes()
}

fn text(text: &str) -> Vec<u8> {
    [&u16::try_from(text.len()).unwrap().to_le_bytes()[..], text.as_bytes()].concat()
}

const SPEC: &str = "tcp:127.0.0.1:0:tcp:192.168.65.3:80";

#[tokio::test]
async fn a_directory_is_a_forward_as_long_as_its_ctl_is_open() {
    let exposer = exposer();
    let mut client = Client::new(&exposer).await;
    assert_eq!(client.names().await, ["README"]);
    assert_eq!(client.mkdir(1, "web").await, 115);
    client.open_ctl(2, "web").await;
    assert_eq!(client.read(2).await, NOTHING_YET);
    assert_eq!(client.write(2, SPEC).await, 119);
    let real = "tcp:127.0.0.1:40000:tcp:192.168.65.3:80";
    assert_eq!(client.read(2).await, format!("OK {real}\n"));
    assert_eq!(client.write(2, SPEC).await, 107, "a second request");
    assert_eq!(exposer.list().await.len(), 1);
    // It is a file now, with the forward in it.
    assert_eq!(client.names().await, ["README", "web"]);
    assert_eq!(client.walk(0, 3, &["web"]).await.1[2], 0);
    assert_eq!(client.read(3).await, real);
    assert_eq!(client.ask(120, &number(2)).await.0, 121);
    assert!(exposer.list().await.is_empty());
    assert_eq!(client.names().await, ["README"]);
}

#[tokio::test]
async fn a_forward_ends_with_its_client() {
    let exposer = exposer();
    let mut client = Client::new(&exposer).await;
    client.mkdir(1, "web").await;
    client.open_ctl(2, "web").await;
    client.write(2, SPEC).await;
    assert_eq!(exposer.list().await.len(), 1);
    drop(client);
    while !exposer.list().await.is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_cannot_be_is_said_in_the_ctl_file() {
    let exposer = exposer();
    let mut client = Client::new(&exposer).await;
    for (n, spec, answer) in [
        (
            0,
            "tcp:127.0.0.1:7:tcp:192.168.65.3:80",
            "ERROR Bind for 127.0.0.1:7 failed: port is already allocated\n",
        ),
        (1, "tcp:127.0.0.1:0:tcp:172.17.0.2:80", "ERROR 172.17.0.2 is not an address of the guests' network"),
        (2, "unix:L3RtcC9h:unix:L3RtcC9i", "ERROR unix sockets of the guest need --vsock-path\n"),
        (3, "nonsense", "ERROR cannot parse"),
    ] {
        let name = format!("f{n}");
        assert_eq!(client.mkdir(1, &name).await, 115);
        client.open_ctl(2, &name).await;
        assert_eq!(client.write(2, spec).await, 119);
        let said = client.read(2).await;
        assert!(said.starts_with(answer), "{said}");
        assert_eq!(client.ask(120, &number(2)).await.0, 121);
    }
    assert!(exposer.list().await.is_empty());
}

#[tokio::test]
async fn a_removed_file_ends_its_forward_and_nothing_else_can_be_removed_or_written() {
    let exposer = exposer();
    let mut client = Client::new(&exposer).await;
    client.mkdir(1, "web").await;
    client.open_ctl(2, "web").await;
    client.write(2, SPEC).await;
    assert_eq!(client.walk(0, 3, &["web"]).await.0, 111);
    assert_eq!(client.ask(122, &number(3)).await.0, 123);
    assert!(exposer.list().await.is_empty());
    assert_eq!(client.walk(0, 3, &["README"]).await.0, 111);
    assert!(client.read(3).await.contains("mkdir NAME"));
    assert_eq!(client.write(3, "x").await, 107);
    assert_eq!(client.ask(122, &number(3)).await.0, 107);
    for (name, why) in
        [("", "empty"), ("..", "a step"), ("a/b", "two"), ("README", "there"), (&"n".repeat(256), "long")]
    {
        assert_eq!(client.mkdir(1, name).await, 107, "{why}");
    }
}

#[tokio::test]
async fn every_table_of_a_client_has_its_end() {
    let exposer = exposer();
    let mut client = Client::new(&exposer).await;
    for n in 0..ENTRIES {
        assert_eq!(client.mkdir(1, &format!("d{n}")).await, 115);
    }
    assert_eq!(client.mkdir(1, "one more").await, 107);
    for fid in 1..u32::try_from(FIDS).unwrap() {
        assert_eq!(client.walk(0, fid, &[]).await.0, 111);
    }
    assert_eq!(client.walk(0, 5000, &[]).await.0, 107);
    // A message that claims more than was agreed ends the connection.
    client.stream.write_all(&[0xff, 0xff, 0xff, 0xff, 116]).await.unwrap();
    assert_eq!(client.stream.read(&mut [0; 8]).await.unwrap(), 0);
}

#[test]
fn nine_p_and_http_are_told_apart_by_their_first_bytes() {
    assert!(begins([19, 0, 0, 0, 100]) && begins([21, 0, 0, 0, 100]));
    for http in [*b"GET /", *b"PUT /", *b"POST ", *b"DELET"] {
        assert!(!begins(http));
    }
}
