//! One server asked once: by datagram, and by TCP when the answer does not fit.
//!
//! What is hard to guess for one who is not on the way: the id and the source port, fresh and random for every attempt (the
//! socket is one attempt's own and connected, so that only the server's address is heard at all), and the letters of the
//! name, each large or small by chance, which servers give back as they came (RFC 5452 §9; draft-vixie-dnsext-dns0x20).
//! Other letters are no answer: the server is asked by TCP, and only if that changes them too is it taken for one that does.
//!
//! A server over TLS or HTTPS is asked by its line ([`super::secure`]) and by nothing else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;

use super::cache::Key;
use super::health::Health;
use super::secure::{BLOCK, Lines};
use super::server::{Channel, Server};
use super::wire::{self, Match, Query, Rcode};

/// Largest datagram there is.
const DATAGRAM_MAX: usize = 65_535;

/// How a query came to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Datagram,
    Stream,
}

/// What is asked.
#[derive(Debug, Clone)]
pub(super) enum Question {
    /// The question alone, in a message of our own; the answer may serve many.
    Ours(Key),
    /// A client's message as it came, but for its id: its answer is made for it alone.
    Theirs(Vec<u8>, Transport),
}

/// A message on its way, and what its answer must bear.
struct Sent {
    id: [u8; 2],
    bytes: Vec<u8>,
}

impl Question {
    fn message(&self, letters: bool, edns: bool) -> io::Result<Sent> {
        let random = |bytes: &mut [u8]| {
            getrandom::fill(bytes).map_err(|_| io::Error::other("the system gives no random bytes"))
        };
        let mut id = [0; 2];
        random(&mut id)?;
        let bytes = match self {
            Self::Ours(key) => {
                let mut mix = [0; 32];
                if letters {
                    random(&mut mix)?;
                }
                wire::recursive(id, &key.name, (key.kind, key.class), key.variant, &mix, edns)
            }
            Self::Theirs(bytes, _) => {
                let mut bytes = bytes.clone();
                wire::set_id(&mut bytes, id);
                bytes
            }
        };
        Ok(Sent { id, bytes })
    }
}

/// Asks `server`; the answer still bears our id.
pub(super) async fn ask(
    server: Server,
    question: &Question,
    health: &Health,
    lines: &Lines,
) -> io::Result<Vec<u8>> {
    if server.channel != Channel::Clear {
        return by_line(&server, question, lines).await;
    }
    let server = &server;
    if let Question::Theirs(_, transport) = question {
        let sent = question.message(false, false)?;
        return match transport {
            Transport::Datagram => by_datagram(server, &sent).await.map(|(reply, _)| reply),
            Transport::Stream => by_stream(server, &sent).await.map(|(reply, _)| reply),
        };
    }
    let now = Instant::now();
    let mut letters = health.keeps_letters(server, now);
    let mut edns = health.knows_edns(server, now);
    loop {
        let (reply, found) = by_datagram(server, &question.message(letters, edns)?).await?;
        if found == Match::OtherLetters && letters {
            match by_stream(server, &question.message(true, edns)?).await {
                Ok((reply, Match::Exact)) => return Ok(reply),
                Ok((reply, _)) => {
                    health.changes_letters(server, now);
                    return Ok(reply);
                }
                // No TCP there: what is left to make an answer hard to guess are id and port.
                Err(error) => {
                    tracing::debug!(%server, %error, "resolver changes the letters of names");
                    health.changes_letters(server, now);
                    letters = false;
                    continue;
                }
            }
        }
        let code = wire::rcode(&reply);
        let refuses_edns = code == Rcode::FormErr as u8 || code == Rcode::NotImp as u8;
        if edns && refuses_edns && !wire::has_opt(&reply) {
            health.has_no_edns(server, now);
            edns = false;
            continue;
        }
        if wire::is_truncated(&reply) {
            return match by_stream(server, &question.message(false, edns)?).await {
                Ok((whole, _)) => Ok(whole),
                // Cut is better than nothing: the client may try itself.
                Err(error) => {
                    tracing::debug!(%server, %error, "resolver cut its answer and does not speak TCP");
                    Ok(reply)
                }
            };
        }
        return Ok(reply);
    }
}

/// Over TLS or HTTPS, where nobody can guess anything, and where nothing is cut.
async fn by_line(server: &Server, question: &Question, lines: &Lines) -> io::Result<Vec<u8>> {
    let mut sent = question.message(false, true)?;
    if matches!(server.channel, Channel::Https { .. }) {
        // RFC 8484 §4.1: what is asked the same is to look the same, for caches.
        sent.id = [0, 0];
        wire::set_id(&mut sent.bytes, sent.id);
    }
    if matches!(question, Question::Ours(_)) {
        wire::pad(&mut sent.bytes, BLOCK);
    }
    let reply = lines.ask(server, &sent.bytes).await?;
    match wire::answers(&sent.bytes, sent.id, &reply) {
        Some(_) => Ok(reply),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question")),
    }
}

async fn by_datagram(server: &Server, sent: &Sent) -> io::Result<(Vec<u8>, Match)> {
    let any: IpAddr =
        if server.address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server.address).await?;
    socket.send(&sent.bytes).await?;
    loop {
        // A refusal by ICMP makes a socket ready for nothing but its error.
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error() {
            match socket.try_io(Interest::ERROR, || pending_error(&socket)) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        // Made only when there is something to read: hundreds of queries may be waiting.
        let mut reply = vec![0; DATAGRAM_MAX];
        match socket.try_recv(&mut reply) {
            Ok(length) => {
                reply.truncate(length);
                if let Some(found) = wire::answers(&sent.bytes, sent.id, &reply) {
                    reply.shrink_to_fit();
                    return Ok((reply, found));
                }
                tracing::debug!(%server, "datagram is no answer to what was asked");
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// The error the socket holds; "would block" when it holds none, which clears the readiness.
fn pending_error(socket: &UdpSocket) -> io::Result<()> {
    Err(socket.take_error()?.unwrap_or_else(|| io::ErrorKind::WouldBlock.into()))
}

async fn by_stream(server: &Server, sent: &Sent) -> io::Result<(Vec<u8>, Match)> {
    let mut stream = TcpStream::connect(server.address).await?;
    let length = u16::try_from(sent.bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = Vec::with_capacity(sent.bytes.len().saturating_add(2));
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(&sent.bytes);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    match wire::answers(&sent.bytes, sent.id, &reply) {
        Some(found) => Ok((reply, found)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question")),
    }
}

/// What to ask for `query`: the question alone where that is all it is.
pub(super) fn question_of(query: &Query<'_>, transport: Transport) -> Question {
    match Key::of(query) {
        Some(key) => Question::Ours(key),
        None => Question::Theirs(query.bytes().to_vec(), transport),
    }
}
