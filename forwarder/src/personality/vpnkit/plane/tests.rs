//! The plane against a forwarder in the guest, played here: connections and datagrams, both generations, and bad ones.

use std::collections::HashMap;

use tokio::net::{TcpStream, UnixStream};

use super::*;

/// A guest's forwarder that echoes: bytes of each channel back, its shutdown too.
struct Echo {
    greets: bool,
    opened: mpsc::UnboundedSender<(Proto, End)>,
}

impl Echo {
    /// Serves one stream of `listener`.
    async fn serve(self, listener: &UnixListener) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = vec![0; FORWARDER.len()];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(line, FORWARDER);
        if self.greets {
            stream.write_all(GREETING).await.unwrap();
            let mut greeting = vec![0; GREETING.len()];
            stream.read_exact(&mut greeting).await.unwrap();
            assert_eq!(greeting, GREETING);
        }
        let (mut bytes, mut taken) = (Vec::new(), HashMap::<u32, u64>::new());
        // What may not be sent back yet, and how much may.
        let mut waiting = HashMap::<u32, (Vec<u8>, u64, u64, bool)>::new();
        while stream.read_buf(&mut bytes).await.unwrap() > 0 {
            while let Some((Frame { id, command }, n)) = Frame::parse(&bytes).unwrap() {
                bytes.drain(..n);
                let mut out = Vec::new();
                match command {
                    Command::Open(proto, end) => {
                        self.opened.send((proto, end)).unwrap();
                        waiting.insert(id, (Vec::new(), 0, 0, false));
                        out.push(Command::Window(WINDOW));
                    }
                    Command::Window(total) => waiting.get_mut(&id).unwrap().2 = total,
                    Command::Shutdown => waiting.get_mut(&id).unwrap().3 = true,
                    Command::Data(data) => {
                        let taken = taken.entry(id).or_default();
                        *taken += data.len() as u64;
                        out.push(Command::Window(*taken + WINDOW));
                        waiting.get_mut(&id).unwrap().0.extend(data);
                    }
                    Command::Close => {
                        waiting.remove(&id);
                        out.push(Command::Close);
                    }
                }
                if let Some((held, sent, limit, ending)) = waiting.get_mut(&id) {
                    let most = usize::try_from(*limit - *sent).unwrap().min(held.len());
                    if most > 0 {
                        *sent += most as u64;
                        out.push(Command::Data(held.drain(..most).collect()));
                    }
                    if *ending && held.is_empty() {
                        *ending = false;
                        out.push(Command::Shutdown);
                    }
                }
                for command in out {
                    stream.write_all(&Frame { id, command }.bytes()).await.unwrap();
                }
            }
        }
    }
}

fn forward(text: &str) -> Forward {
    text.parse().unwrap()
}

fn address(real: &Forward) -> SocketAddr {
    let End::Port(ip, port) = real.out else { panic!("{real}") };
    SocketAddr::new(ip, port)
}

/// A plane whose guest echoes, and what was opened there.
fn echoing(dir: &tempfile::TempDir, greets: bool) -> (Arc<Plane>, mpsc::UnboundedReceiver<(Proto, End)>) {
    let path = dir.path().join("connect");
    let listener = UnixListener::bind(&path).unwrap();
    let (opened, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move { Echo { greets, opened }.serve(&listener).await });
    (Plane::new(path, 16), seen)
}

async fn sends_and_gets_back(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) {
    let mut got = Vec::new();
    let (mut reading, mut writing) = tokio::io::split(&mut stream);
    let writes = async {
        writing.write_all(bytes).await.unwrap();
        writing.shutdown().await.unwrap();
    };
    let reads = async { reading.read_to_end(&mut got).await.unwrap() };
    tokio::join!(writes, reads);
    assert!(got == bytes, "{} of {} bytes came back, or others", got.len(), bytes.len());
}

#[tokio::test]
async fn bytes_many_times_the_window_come_back_from_forwarders_of_both_generations() {
    for greets in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (plane, mut opened) = echoing(&dir, greets);
        let (_listening, real) = plane.listen(&forward("tcp:127.0.0.1:0:tcp:172.17.0.2:80")).await.unwrap();
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
        for size in [0, 1, 65_535, 65_536, 65_537, 1_000_000] {
            let stream = TcpStream::connect(address(&real)).await.unwrap();
            sends_and_gets_back(stream, &bytes[..size]).await;
            let to = End::Port([172, 17, 0, 2].into(), 80);
            assert_eq!(opened.recv().await, Some((Proto::Tcp, to)));
        }
    }
}

#[tokio::test]
async fn a_unix_socket_is_carried_and_its_file_ends_with_the_forward() {
    let dir = tempfile::tempdir().unwrap();
    let (plane, mut opened) = echoing(&dir, true);
    let out = dir.path().join("docker.sock");
    let inner = End::Path("/run/docker.sock".into());
    let forward = Forward {
        proto: Proto::Unix,
        out: End::Path(out.clone()),
        inner: inner.clone(),
        annotation: String::new(),
    };
    let (listening, _) = plane.listen(&forward).await.unwrap();
    sends_and_gets_back(UnixStream::connect(&out).await.unwrap(), b"GET /").await;
    assert_eq!(opened.recv().await, Some((Proto::Unix, inner)));
    drop(listening);
    assert!(!out.exists());
}

#[tokio::test]
async fn datagrams_of_two_clients_find_their_ways_back_in_one_channel() {
    let dir = tempfile::tempdir().unwrap();
    let (plane, mut opened) = echoing(&dir, true);
    let (_listening, real) = plane.listen(&forward("udp:127.0.0.1:0:udp:192.168.65.3:53")).await.unwrap();
    let clients =
        [UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap()];
    let mut buffer = vec![0; 65_536];
    for (n, size) in [(0, 1), (1, 0), (0, 60_000), (1, 1400)] {
        let payload = vec![7; size];
        clients[n].send_to(&payload, address(&real)).await.unwrap();
        let (got, from) = clients[n].recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..got], from), (&payload[..], address(&real)));
    }
    assert!(opened.recv().await.is_some_and(|(proto, _)| proto == Proto::Udp));
    assert!(opened.try_recv().is_err());
}

#[tokio::test]
async fn a_stream_that_broke_is_made_anew_at_the_next_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect");
    let listener = UnixListener::bind(&path).unwrap();
    let (opened, mut seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        // The first ends at once, the second sends more than it may, the third is good.
        drop(listener.accept().await.unwrap());
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut first = vec![0; FORWARDER.len() + 17];
        stream.read_exact(&mut first).await.unwrap();
        let id = u32::from_le_bytes(first[FORWARDER.len() + 3..FORWARDER.len() + 7].try_into().unwrap());
        for _ in 0..2 {
            let frame = Frame { id, command: Command::Data(vec![0; 65_536]) };
            let _ = stream.write_all(&frame.bytes()).await;
        }
        Echo { greets: true, opened }.serve(&listener).await;
    });
    let plane = Plane::new(path, 16);
    let (_listening, real) = plane.listen(&forward("tcp:127.0.0.1:0:tcp:10.0.0.1:80")).await.unwrap();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address(&real)).await.unwrap();
        // Its end, or its reset when bytes were under way.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    sends_and_gets_back(TcpStream::connect(address(&real)).await.unwrap(), b"third").await;
    assert!(seen.recv().await.is_some());
}

#[tokio::test]
async fn what_a_guest_sends_without_being_asked_is_not_collected() {
    let (out, mut frames) = mpsc::channel(OUT);
    let mux = Arc::new(Mux {
        out,
        slots: StdMutex::default(),
        next: AtomicU32::new(9),
        broken: AtomicBool::new(false),
        spoke: watch::Sender::new(None),
    });
    let mut channel = mux.open(Proto::Tcp, End::Port([10, 0, 0, 1].into(), 80)).await.unwrap();
    assert_eq!((frames.len(), channel.id), (2, 9));
    while frames.try_recv().is_ok() {}
    let tell = |id, command| mux.handle(Frame { id, command });
    for _ in 0..1000 {
        assert_eq!(tell(9, Command::Data(Vec::new())).unwrap(), None);
        assert_eq!(tell(77, Command::Data(vec![1; 65_536])).unwrap(), None);
        assert_eq!(tell(9, Command::Shutdown).unwrap(), None);
        assert_eq!(tell(77, Command::Close).unwrap(), None);
    }
    assert!(matches!(channel.incoming.try_recv(), Ok(News::Shutdown)));
    assert!(channel.incoming.try_recv().is_err());
    let open = Command::Open(Proto::Tcp, End::Port([10, 0, 0, 1].into(), 80));
    assert_eq!(tell(5, open).unwrap(), Some(Command::Close));
    assert_eq!(tell(9, Command::Close).unwrap(), Some(Command::Close));
    assert_eq!(mux.slots().len(), 0);
    assert!(channel.incoming.recv().await.is_none());
}

/// A forwarder of 2017: `connections` streams, each echoed to its end; what is no header of its own ends.
async fn of_2017(listener: &UnixListener, connections: usize, seen: mpsc::UnboundedSender<Vec<u8>>) {
    for _ in 0..connections {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = vec![0; FORWARDER.len()];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(line, FORWARDER);
        let seen = seen.clone();
        tokio::spawn(async move {
            let mut header = vec![0; 9];
            stream.read_exact(&mut header).await.unwrap();
            let known = matches!(header[0], 1 | 2);
            seen.send(header).unwrap();
            if known {
                let (mut reading, mut writing) = stream.split();
                tokio::io::copy(&mut reading, &mut writing).await.unwrap();
            }
        });
    }
}

#[tokio::test]
async fn the_forwarder_of_2017_has_a_stream_for_each_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect");
    let listener = UnixListener::bind(&path).unwrap();
    let (seen, mut headers) = mpsc::unbounded_channel();
    tokio::spawn(async move { of_2017(&listener, usize::MAX, seen).await });
    let plane = Plane::new(path, 16);
    let (_listening, real) = plane.listen(&forward("tcp:127.0.0.1:0:tcp:172.17.0.2:80")).await.unwrap();
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    for size in [1, 65_537, 1_000_000] {
        sends_and_gets_back(TcpStream::connect(address(&real)).await.unwrap(), &bytes[..size]).await;
    }
    // The question what it is costs one stream, and no client.
    assert_eq!(headers.recv().await.unwrap()[0], 17, "an Open, whose header has 17 bytes");
    for _ in 0..3 {
        assert_eq!(headers.recv().await.unwrap(), [1, 4, 0, 172, 17, 0, 2, 80, 0]);
    }
    let (_listening, real) = plane.listen(&forward("udp:127.0.0.1:0:udp:192.168.65.3:53")).await.unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut buffer = vec![0; 65_536];
    for size in [1, 60_000, 0] {
        client.send_to(&bytes[..size], address(&real)).await.unwrap();
        let (got, from) = client.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..got], from), (&bytes[..size], address(&real)));
    }
    assert_eq!(headers.recv().await.unwrap(), [2, 4, 0, 192, 168, 65, 3, 53, 0]);
    // It has no word for unix sockets: the client sees its connection end.
    let out = dir.path().join("out.sock");
    let inner = End::Path("/run/docker.sock".into());
    let unix = Forward { proto: Proto::Unix, out: End::Path(out.clone()), inner, annotation: String::new() };
    let (_listening, _) = plane.listen(&unix).await.unwrap();
    let got = UnixStream::connect(&out).await.unwrap().read(&mut [0; 1]).await;
    assert_eq!(got.unwrap(), 0);
}

#[tokio::test]
async fn a_guest_that_comes_back_with_another_forwarder_is_understood_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect");
    let listener = UnixListener::bind(&path).unwrap();
    let (seen, _headers) = mpsc::unbounded_channel();
    let (opened, mut channels) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        of_2017(&listener, 2, seen).await;
        // The current one, spoken to as if it were the old one.
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(GREETING).await.unwrap();
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all).await;
        drop(stream);
        Echo { greets: true, opened }.serve(&listener).await;
    });
    let plane = Plane::new(path, 16);
    let (_listening, real) = plane.listen(&forward("tcp:127.0.0.1:0:tcp:172.17.0.2:80")).await.unwrap();
    sends_and_gets_back(TcpStream::connect(address(&real)).await.unwrap(), b"old").await;
    let mut lost = TcpStream::connect(address(&real)).await.unwrap();
    let _ = lost.read(&mut [0; 1]).await;
    drop(lost);
    sends_and_gets_back(TcpStream::connect(address(&real)).await.unwrap(), b"new").await;
    assert!(channels.recv().await.is_some());
}
