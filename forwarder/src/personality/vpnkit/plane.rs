//! The data plane through the guest's forwarder: host listeners, and one stream into the VM that carries them all.
//!
//! ```text
//!  client ─► Listening ─► channel ─► Mux ─► `connect` socket of hyperkit: "00000003.0000f3a5\n" ─► vpnkit-forwarder in the guest
//! ```
//! Forwarders of three generations are met: those that greet (current ones), those that do not, and that of 2017, which takes a
//! stream for each connection ([`single`]). One that says nothing for [`GREETS_WITHIN`] does not greet; one that then hangs up on the
//! first channel is of 2017. The stream is made at the first connection, and anew after it broke.
//! Limits: [`CHANNELS`] connections at a time, beyond which clients wait in the listener's queue; each side of a channel
//! holds at most a window of bytes; a forwarder that sends more than its window ends the stream.

mod single;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use self::single::Single;
use super::forward::{End, Forward, Proto};
use super::mux::{Command, DATAGRAM, Frame, GREETING, WINDOW, datagram, parse_datagram};

/// What hyperkit's socket is told: the guest's context id and the forwarder's port.
const FORWARDER: &[u8] = b"00000003.0000f3a5\n";
/// How long a forwarder that greets may take.
const GREETS_WITHIN: Duration = Duration::from_millis(500);
/// Connections at a time, when nobody says how many.
pub(super) const CHANNELS: usize = 2000;
/// Channels that one stream may have, those that only the forwarder has not ended included.
const SLOTS: usize = 65_536;
/// Frames that may wait for the stream.
const OUT: usize = 64;
/// Bytes read from a client at once.
const CHUNK: usize = 32 * 1024;

/// The way into the guest.
pub(super) struct Plane {
    path: PathBuf,
    known: Mutex<Known>,
    places: Arc<Semaphore>,
}

/// What is known of the forwarder in the guest.
#[derive(Default)]
enum Known {
    /// Nothing, or nothing any more.
    #[default]
    Nothing,
    /// It takes all connections in this stream.
    Channels(Arc<Mux>),
    /// It takes a stream for each.
    Singles,
}

/// One connection into the guest.
enum Way {
    Channel(Channel),
    Single(Single),
}

impl Way {
    async fn carry(self, stream: impl AsyncRead + AsyncWrite) {
        match self {
            Self::Channel(channel) => channel.carry(stream).await,
            Self::Single(single) => single.carry(stream).await,
        }
    }

    async fn carry_datagrams(self, socket: &UdpSocket, buffer: &mut [u8], first: usize, peer: SocketAddr) {
        match self {
            Self::Channel(channel) => channel.carry_datagrams(socket, buffer, first, peer).await,
            Self::Single(single) => single.carry_datagrams(socket, buffer, first, peer).await,
        }
    }
}

/// Where clients of a forward come in.
enum Entrance {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A client's connection, of either kind.
trait Client: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Client for T {}

impl Entrance {
    async fn accept(&self) -> io::Result<(Proto, Box<dyn Client>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Ok((Proto::Tcp, Box::new(stream)))
            }
            Self::Unix(listener) => Ok((Proto::Unix, Box::new(listener.accept().await?.0))),
        }
    }
}

/// A listener of a forward; ends when dropped.
pub(super) struct Listening {
    task: JoinHandle<()>,
    path: Option<PathBuf>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Plane {
    pub(super) fn new(path: PathBuf, channels: usize) -> Arc<Self> {
        Arc::new(Self { path, known: Mutex::default(), places: Arc::new(Semaphore::new(channels)) })
    }

    /// Listens for `forward`; the second answer has the real port.
    pub(super) async fn listen(self: &Arc<Self>, forward: &Forward) -> io::Result<(Listening, Forward)> {
        let plane = Arc::clone(self);
        let inner = forward.inner.clone();
        let mut real = forward.clone();
        let mut file = None;
        let task = match (&forward.out, forward.proto) {
            (End::Path(path), _) => {
                let listener = UnixListener::from_std(crate::unix_path::listen(path, 0o600)?)?;
                file = Some(path.clone());
                tokio::spawn(plane.accept(inner, Entrance::Unix(listener)))
            }
            (End::Port(ip, port), Proto::Udp) => {
                let socket = UdpSocket::bind((*ip, *port)).await?;
                real.out = End::Port(*ip, socket.local_addr()?.port());
                tokio::spawn(async move { plane.datagrams(inner, socket).await })
            }
            (End::Port(ip, port), _) => {
                let listener = TcpListener::bind((*ip, *port)).await?;
                real.out = End::Port(*ip, listener.local_addr()?.port());
                tokio::spawn(plane.accept(inner, Entrance::Tcp(listener)))
            }
        };
        Ok((Listening { task, path: file }, real))
    }

    async fn accept(self: Arc<Self>, to: End, entrance: Entrance) {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
            match entrance.accept().await {
                Ok((proto, stream)) => {
                    let (plane, to) = (Arc::clone(&self), to.clone());
                    tokio::spawn(async move {
                        match plane.open(proto, to).await {
                            Ok(way) => way.carry(stream).await,
                            // The client sees its connection end.
                            Err(error) => {
                                tracing::warn!(%error, "the forwarder in the guest cannot be reached")
                            }
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept at a forward, trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Carries the datagrams of one socket, all peers in one channel, anew when the stream broke.
    async fn datagrams(self: Arc<Self>, to: End, socket: UdpSocket) {
        let mut buffer = vec![0; 65_536];
        loop {
            let (n, peer) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // An answer that could not be delivered (ICMP): nothing of ours.
                Err(_) => continue,
            };
            match self.open(Proto::Udp, to.clone()).await {
                Ok(way) => way.carry_datagrams(&socket, &mut buffer, n, peer).await,
                Err(error) => tracing::warn!(%error, "the forwarder in the guest cannot be reached"),
            }
        }
    }

    /// A connection to `to`, by what the forwarder in the guest understands.
    async fn open(self: &Arc<Self>, proto: Proto, to: End) -> io::Result<Way> {
        let mut known = self.known.lock().await;
        match &*known {
            Known::Channels(mux) if !mux.broken.load(Ordering::Acquire) => {
                let mux = Arc::clone(mux);
                drop(known);
                return mux.open(proto, to).await.map(Way::Channel);
            }
            Known::Singles => {}
            Known::Channels(_) | Known::Nothing => {
                *known = Known::Nothing;
                let mux = Mux::begin(self.connect().await?).await?;
                let opened = mux.open(proto, to.clone()).await;
                if mux.answers().await {
                    *known = Known::Channels(mux);
                    return opened.map(Way::Channel);
                }
                tracing::info!("the forwarder in the guest takes a stream for each connection");
                *known = Known::Singles;
            }
        }
        drop(known);
        Single::begin(self.connect().await?, proto, &to, Arc::clone(self)).await.map(Way::Single)
    }

    /// A stream to the forwarder.
    async fn connect(&self) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.path).await?;
        stream.write_all(FORWARDER).await?;
        Ok(stream)
    }

    /// The forwarder may be another by now: the next connection finds out.
    async fn forget(&self) {
        let mut known = self.known.lock().await;
        if matches!(*known, Known::Singles) {
            *known = Known::Nothing;
        }
    }
}

/// What a channel hears of its forwarder.
enum News {
    Data(Vec<u8>),
    Shutdown,
}

struct Slot {
    news: mpsc::UnboundedSender<News>,
    /// The total we may send.
    limit: watch::Sender<u64>,
    /// The total we take; the news never hold more than a window.
    advertised: Arc<AtomicU64>,
    received: u64,
    /// The other side has said that it sends no more.
    shut: bool,
    /// We have ended it, and wait for the other side to.
    closed: bool,
}

/// One stream to a forwarder.
struct Mux {
    out: mpsc::Sender<Vec<u8>>,
    slots: StdMutex<HashMap<u32, Slot>>,
    next: AtomicU32,
    broken: AtomicBool,
    /// Whether the other side has said anything; false when it ended before it did.
    spoke: watch::Sender<Option<bool>>,
}

impl Mux {
    async fn begin(mut stream: UnixStream) -> io::Result<Arc<Self>> {
        let mut first = vec![0; GREETING.len()];
        let (mut have, mut greeted) = (0, false);
        match tokio::time::timeout(GREETS_WITHIN, stream.read(&mut first)).await {
            Err(_) => {}
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Err(error)) => return Err(error),
            Ok(Ok(n)) if first[..n.min(2)] == GREETING[..n.min(2)] => {
                tokio::time::timeout(GREETS_WITHIN, stream.read_exact(&mut first[n..])).await??;
                // The last two bytes are the length of something more, which nobody sends yet.
                let [.., a, b] = first[..] else { return Err(io::ErrorKind::InvalidData.into()) };
                if !first.starts_with(&GREETING[..GREETING.len() - 2]) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the forwarder greets wrongly"));
                }
                let mut more = vec![0; usize::from(u16::from_le_bytes([a, b]))];
                tokio::time::timeout(GREETS_WITHIN, stream.read_exact(&mut more)).await??;
                stream.write_all(GREETING).await?;
                greeted = true;
            }
            // One that does not greet has begun already.
            Ok(Ok(n)) => have = n,
        }
        first.truncate(have);
        let (out, frames) = mpsc::channel(OUT);
        let mux = Arc::new(Self {
            out,
            slots: StdMutex::default(),
            next: AtomicU32::new(0x7fff_ffff),
            broken: AtomicBool::new(false),
            spoke: watch::Sender::new((greeted || have > 0).then_some(true)),
        });
        let (reading, writing) = stream.into_split();
        let reader = Arc::clone(&mux);
        tokio::spawn(async move {
            let ended = reader.read(reading, first).await;
            tracing::info!(
                reason = ended.err().map_or("its end".to_owned(), |e| e.to_string()),
                "the stream to the forwarder ended"
            );
            reader.end();
        });
        let writer = Arc::clone(&mux);
        tokio::spawn(async move {
            if let Err(error) = write(writing, frames).await {
                tracing::debug!(%error, "the stream to the forwarder is not written any more");
            }
            writer.end();
        });
        Ok(mux)
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<u32, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the other side takes channels: whether it answers the first with anything but its own end. One that is silent for
    /// long has not hung up.
    async fn answers(&self) -> bool {
        let mut spoke = self.spoke.subscribe();
        let heard = tokio::time::timeout(GREETS_WITHIN, spoke.wait_for(Option::is_some)).await;
        heard.map_or(true, |heard| heard.is_ok_and(|heard| *heard == Some(true)))
    }

    /// What is known of [`Self::answers`] stays as it was first.
    fn hear(&self, heard: bool) {
        self.spoke.send_if_modified(|spoke| spoke.is_none() && spoke.replace(heard).is_none());
    }

    fn end(&self) {
        self.hear(false);
        self.broken.store(true, Ordering::Release);
        self.slots().clear();
    }

    async fn send(&self, id: u32, command: Command) -> io::Result<()> {
        self.out.send(Frame { id, command }.bytes()).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    async fn read(&self, mut from: impl AsyncRead + Unpin, mut bytes: Vec<u8>) -> io::Result<()> {
        loop {
            let mut used = 0;
            while let Some((frame, n)) =
                Frame::parse(&bytes[used..]).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?
            {
                used += n;
                let id = frame.id;
                if let Some(answer) = self.handle(frame)? {
                    self.send(id, answer).await?;
                }
            }
            bytes.drain(..used);
            if from.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
            self.hear(true);
        }
    }

    /// Takes one frame; what it is answered with, if anything.
    fn handle(&self, frame: Frame) -> io::Result<Option<Command>> {
        let Frame { id, command } = frame;
        if let Command::Open(..) = command {
            // The guest has nothing to open here: its own connections go over its network.
            return Ok(Some(Command::Close));
        }
        let mut slots = self.slots();
        // What comes for a channel that is gone already was on its way.
        let Some(slot) = slots.get_mut(&id) else { return Ok(None) };
        match command {
            // These say nothing, and must not be collected.
            Command::Data(data) if data.is_empty() || slot.shut => {}
            Command::Data(data) => {
                slot.received += data.len() as u64;
                if slot.received > slot.advertised.load(Ordering::Acquire) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "more data than the window"));
                }
                // A channel that does not listen any more has closed, and says so.
                let _ = slot.news.send(News::Data(data));
            }
            Command::Shutdown => {
                if !std::mem::replace(&mut slot.shut, true) {
                    let _ = slot.news.send(News::Shutdown);
                }
            }
            Command::Window(total) => {
                slot.limit.send_if_modified(|limit| std::mem::replace(limit, total.max(*limit)) < total);
            }
            Command::Close => {
                let ours = slot.closed;
                // Its news end with the slot. Its id is free when both sides have closed.
                slots.remove(&id);
                return Ok((!ours).then_some(Command::Close));
            }
            Command::Open(..) => {}
        }
        Ok(None)
    }

    async fn open(self: &Arc<Self>, proto: Proto, to: End) -> io::Result<Channel> {
        let (news, incoming) = mpsc::unbounded_channel();
        let (limit, allowed) = watch::channel(0);
        let advertised = Arc::new(AtomicU64::new(WINDOW));
        let id = {
            let mut slots = self.slots();
            if slots.len() >= SLOTS {
                // A forwarder that never closes its side: with a new stream it begins anew.
                self.broken.store(true, Ordering::Release);
                return Err(io::Error::other("the forwarder does not end its channels"));
            }
            let free = || loop {
                // Downwards from the top of the half that guests do not use.
                let id = self.next.fetch_sub(1, Ordering::Relaxed) & 0x7fff_ffff;
                if !slots.contains_key(&id) {
                    return id;
                }
            };
            let id = free();
            let advertised = Arc::clone(&advertised);
            slots.insert(id, Slot { news, limit, advertised, received: 0, shut: false, closed: false });
            id
        };
        let channel = Channel { mux: Arc::clone(self), id, incoming, allowed, advertised };
        self.send(id, Command::Open(proto, to)).await?;
        self.send(id, Command::Window(WINDOW)).await?;
        Ok(channel)
    }
}

async fn write(mut to: impl AsyncWrite + Unpin, mut frames: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(frame) = frames.recv().await {
        to.write_all(&frame).await?;
    }
    Ok(())
}

/// One connection on a [`Mux`].
struct Channel {
    mux: Arc<Mux>,
    id: u32,
    incoming: mpsc::UnboundedReceiver<News>,
    allowed: watch::Receiver<u64>,
    advertised: Arc<AtomicU64>,
}

/// The two directions of a channel, to be used at the same time.
struct Sending<'a> {
    mux: &'a Mux,
    id: u32,
    allowed: &'a mut watch::Receiver<u64>,
    sent: u64,
}

impl Sending<'_> {
    /// Waits until the other side takes bytes, and says how many.
    async fn room(&mut self) -> io::Result<usize> {
        let sent = self.sent;
        let limit =
            *self.allowed.wait_for(|limit| *limit > sent).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(usize::try_from(limit - sent).unwrap_or(usize::MAX))
    }

    async fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(self.room().await?.min(bytes.len()).min(CHUNK));
            self.sent += now.len() as u64;
            self.mux.send(self.id, Command::Data(now.to_vec())).await?;
            bytes = later;
        }
        Ok(())
    }
}

struct Taking<'a> {
    mux: &'a Mux,
    id: u32,
    incoming: &'a mut mpsc::UnboundedReceiver<News>,
    advertised: &'a AtomicU64,
    taken: u64,
}

impl Taking<'_> {
    /// The next bytes; `None`: the other side sends no more.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        match self.incoming.recv().await {
            Some(News::Data(data)) => Ok(Some(data)),
            Some(News::Shutdown) => Ok(None),
            None => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// `bytes` were delivered: when half the window is used, the other side may send more.
    async fn took(&mut self, bytes: usize) -> io::Result<()> {
        self.taken += bytes as u64;
        if self.advertised.load(Ordering::Acquire) - self.taken < WINDOW / 2 {
            let total = self.taken + WINDOW;
            self.advertised.store(total, Ordering::Release);
            self.mux.send(self.id, Command::Window(total)).await?;
        }
        Ok(())
    }
}

impl Channel {
    fn split(&mut self) -> (Sending<'_>, Taking<'_>) {
        let (mux, id) = (&*self.mux, self.id);
        (
            Sending { mux, id, allowed: &mut self.allowed, sent: 0 },
            Taking { mux, id, incoming: &mut self.incoming, advertised: &self.advertised, taken: 0 },
        )
    }

    /// Carries `stream` until both directions have ended, or either broke.
    async fn carry(mut self, stream: impl AsyncRead + AsyncWrite) {
        let (mut reading, mut writing) = tokio::io::split(stream);
        let (mut sending, mut taking) = self.split();
        let to_guest = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                let most = sending.room().await?.min(CHUNK);
                let n = reading.read(&mut buffer[..most]).await?;
                if n == 0 {
                    return sending.mux.send(sending.id, Command::Shutdown).await;
                }
                sending.send(&buffer[..n]).await?;
            }
        };
        let from_guest = async {
            while let Some(data) = taking.next().await? {
                writing.write_all(&data).await?;
                taking.took(data.len()).await?;
            }
            writing.shutdown().await
        };
        if let Err(error) = tokio::try_join!(to_guest, from_guest) {
            tracing::debug!(%error, "a forwarded connection ended");
        }
        self.close().await;
    }

    /// Carries datagrams until the channel breaks; the first is in `buffer` already.
    async fn carry_datagrams(
        mut self,
        socket: &UdpSocket,
        buffer: &mut [u8],
        first: usize,
        peer: SocketAddr,
    ) {
        let (mut sending, mut taking) = self.split();
        let to_guest = async {
            let (mut n, mut peer) = (first, peer);
            loop {
                // What is larger than the framing can say is lost, as a datagram may be.
                if n <= DATAGRAM {
                    sending.send(&datagram(peer, &buffer[..n])).await?;
                }
                (n, peer) = loop {
                    match socket.recv_from(buffer).await {
                        Ok(received) => break received,
                        Err(error) => tracing::debug!(%error, "a datagram was not received"),
                    }
                };
            }
            #[expect(unreachable_code, reason = "it gives the block its type")]
            Ok::<(), io::Error>(())
        };
        let from_guest = async {
            let mut bytes = Vec::new();
            while let Some(data) = taking.next().await? {
                bytes.extend_from_slice(&data);
                let mut used = 0;
                while let Some((peer, payload, n)) = parse_datagram(&bytes[used..])
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?
                {
                    used += n;
                    if let Err(error) = socket.send_to(payload, peer).await {
                        tracing::debug!(%error, %peer, "a datagram was not sent");
                    }
                }
                bytes.drain(..used);
                taking.took(data.len()).await?;
            }
            Err::<(), io::Error>(io::ErrorKind::UnexpectedEof.into())
        };
        if let Err(error) = tokio::try_join!(to_guest, from_guest) {
            tracing::debug!(%error, "a channel of datagrams ended");
        }
        self.close().await;
    }

    async fn close(self) {
        let known = self.mux.slots().get_mut(&self.id).map(|slot| slot.closed = true).is_some();
        if known && self.mux.send(self.id, Command::Close).await.is_err() {
            tracing::debug!("a channel ended with its stream");
        }
    }
}

#[cfg(test)]
mod tests;
