//! Queries on their way to the host's resolvers, and the answers back: bytes in, bytes out, only the id changed.
//!
//! ```text
//! query ─► server 1 ──(2 s, or at once when it refuses)──► server 2 ──► … 5 s in all
//!            └───────────── the first good answer wins, late ones too ─────┘
//! ```
//! Each attempt has a socket of its own, thus a fresh source port from the kernel, and a fresh random id; an answer
//! counts only from the address asked (connected socket), with that id and question (RFC 5452). The server that
//! answered last is asked first. SERVFAIL, REFUSED and NOTIMP make us ask the next, and are passed on if none
//! is better. Silence of all is no answer: the caller says SERVFAIL, never NXDOMAIN.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, sleep_until};

use super::wire::{self, Query, Rcode};

/// Time after which a query has failed.
pub(super) const TOTAL: Duration = Duration::from_secs(5);
/// Time a server has before the next one is asked too (the only one: asked again, the datagram may be lost).
pub(super) const NEXT_SERVER: Duration = Duration::from_secs(2);
/// Largest datagram there is.
const DATAGRAM_MAX: usize = 65_535;

/// How a query came, and thus how it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Datagram,
    Stream,
}

/// Remembers which server works.
#[derive(Debug, Default)]
pub(super) struct Relay {
    preferred: Mutex<Option<SocketAddr>>,
}

type Attempt<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<u8>>> + Send + 'a>>;

impl Relay {
    /// Asks `servers`; the answer bears the client's id. `None` when none gave any.
    pub(super) async fn ask(
        &self,
        query: &Query<'_>,
        transport: Transport,
        servers: &[SocketAddr],
    ) -> Option<Vec<u8>> {
        let mut untried = self.order(servers);
        let mut running: Vec<(SocketAddr, Attempt<'_>)> = Vec::new();
        let mut poor_answer = None;
        let start = Instant::now();
        let deadline = start + TOTAL;
        let mut next_at = start;
        loop {
            if next_at <= Instant::now() {
                // With all of them asked, the one silent longest is asked again.
                let server = untried.pop_front().or_else(|| running.first().map(|(server, _)| *server));
                let Some(server) = server else { break };
                running.push((server, Box::pin(attempt(server, query, transport))));
                next_at = Instant::now() + NEXT_SERVER;
            }
            let finished = tokio::select! {
                finished = first_of(&mut running) => Some(finished),
                () = sleep_until(next_at) => None,
                () = sleep_until(deadline) => break,
            };
            let Some((server, result)) = finished else { continue };
            match result {
                Ok(reply) if is_poor(&reply) => {
                    tracing::debug!(%server, rcode = wire::rcode(&reply), "resolver does not answer this one");
                    poor_answer.get_or_insert(reply);
                }
                Ok(mut reply) => {
                    self.prefer(server);
                    wire::set_id(&mut reply, query.id());
                    return Some(reply);
                }
                Err(error) => tracing::debug!(%server, %error, "resolver cannot be asked"),
            }
            running.retain(|(other, _)| *other != server); // its repeats would fare no better
            if running.is_empty() || !untried.is_empty() {
                next_at = Instant::now();
            }
        }
        poor_answer.map(|mut reply| {
            wire::set_id(&mut reply, query.id());
            reply
        })
    }

    /// Forgets which server works; for a new list of servers.
    pub(super) fn reset(&self) {
        *self.preferred.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn prefer(&self, server: SocketAddr) {
        *self.preferred.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
    }

    fn order(&self, servers: &[SocketAddr]) -> VecDeque<SocketAddr> {
        let mut order: VecDeque<SocketAddr> = servers.iter().copied().collect();
        let preferred = *self.preferred.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = preferred.and_then(|server| order.iter().position(|s| *s == server))
            && let Some(server) = order.remove(at)
        {
            order.push_front(server);
        }
        order
    }
}

/// Another server may know better than this one.
fn is_poor(reply: &[u8]) -> bool {
    let rcode = wire::rcode(reply);
    [Rcode::ServFail, Rcode::Refused, Rcode::NotImp].iter().any(|r| *r as u8 == rcode)
}

/// The first attempt to end, taken out; for ever pending when there is none.
async fn first_of(running: &mut Vec<(SocketAddr, Attempt<'_>)>) -> (SocketAddr, io::Result<Vec<u8>>) {
    poll_fn(|context| {
        for at in 0..running.len() {
            if let Some((server, attempt)) = running.get_mut(at)
                && let Poll::Ready(result) = attempt.as_mut().poll(context)
            {
                let server = *server;
                drop(running.remove(at));
                return Poll::Ready((server, result));
            }
        }
        Poll::Pending
    })
    .await
}

async fn attempt(server: SocketAddr, query: &Query<'_>, transport: Transport) -> io::Result<Vec<u8>> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    let mut bytes = query.bytes().to_vec();
    wire::set_id(&mut bytes, id);
    match transport {
        Transport::Datagram => ask_by_datagram(server, query, id, &bytes).await,
        Transport::Stream => ask_by_stream(server, query, id, &bytes).await,
    }
}

async fn ask_by_datagram(
    server: SocketAddr,
    query: &Query<'_>,
    id: [u8; 2],
    bytes: &[u8],
) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
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
                if query.is_answered_by(id, &reply) {
                    reply.shrink_to_fit();
                    return Ok(reply);
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

async fn ask_by_stream(
    server: SocketAddr,
    query: &Query<'_>,
    id: [u8; 2],
    bytes: &[u8],
) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = Vec::with_capacity(bytes.len().saturating_add(2));
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    if query.is_answered_by(id, &reply) {
        Ok(reply)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question"))
    }
}
