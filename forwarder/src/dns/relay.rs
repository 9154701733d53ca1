//! Queries to the host's resolvers, as the bytes they came in.
//!
//! Every query goes out with a fresh id from a fresh port, on a connected socket: an answer must come from the server,
//! bear the id and repeat the question (RFC 5452 §9). The server that answered last is asked first; the next one after
//! [`EACH`], or at once on an error. SERVFAIL, REFUSED and NOTIMP of one server let the next one try; the last such answer
//! stands when nobody knows better.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::message::Question;
use super::resolv::Watched;

/// How long a guest waits at the most.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long one server is given.
const EACH: Duration = Duration::from_secs(2);

/// How a query came, and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

pub(super) struct Relay {
    fixed: Option<Vec<SocketAddr>>,
    watched: Mutex<Watched>,
    /// The server that answered last.
    good: AtomicUsize,
}

impl Relay {
    pub(super) fn new(fixed: Option<Vec<SocketAddr>>, resolv_conf: PathBuf) -> Self {
        Self { fixed, watched: Mutex::new(Watched::new(resolv_conf)), good: AtomicUsize::new(0) }
    }

    pub(super) fn search(&self) -> Vec<String> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).resolv.search.clone()
    }

    fn servers(&self) -> Vec<SocketAddr> {
        if let Some(fixed) = &self.fixed {
            return fixed.clone();
        }
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.refresh();
        watched.resolv.servers.clone()
    }

    /// An upstream's answer, with the guest's id; `None` when there is none.
    pub(super) async fn ask(
        &self,
        query: &[u8],
        question: &Question,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        tokio::time::timeout(PATIENCE, self.ask_all(query, question, transport)).await.ok().flatten()
    }

    async fn ask_all(&self, query: &[u8], question: &Question, transport: Transport) -> Option<Vec<u8>> {
        let servers = self.servers();
        let first = self.good.load(Ordering::Relaxed);
        let mut poor = None;
        for n in 0..servers.len() {
            let at = (first + n) % servers.len();
            let asked = ask_one(servers[at], query, question, transport);
            match tokio::time::timeout(EACH, asked).await {
                Ok(Ok(answer)) => {
                    let code = answer.get(3).map_or(2, |b| b & 0x0f);
                    if matches!(code, 2 | 4 | 5) && n + 1 < servers.len() {
                        poor = Some(answer);
                        continue;
                    }
                    self.good.store(at, Ordering::Relaxed);
                    return Some(answer);
                }
                Ok(Err(error)) => tracing::debug!(%error, server = %servers[at], "a resolver did not answer"),
                Err(_) => tracing::debug!(server = %servers[at], "a resolver is silent"),
            }
        }
        poor
    }
}

async fn ask_one(
    server: SocketAddr,
    query: &[u8],
    question: &Question,
    transport: Transport,
) -> std::io::Result<Vec<u8>> {
    let id = getrandom::u32().map_err(|e| std::io::Error::other(e.to_string()))?.to_be_bytes();
    let id = [id[0], id[1]];
    let mut asked = query.to_vec();
    asked[..2].copy_from_slice(&id);
    let mut answer = match transport {
        Transport::Udp => over_udp(server, &asked, id, question).await?,
        Transport::Tcp => over_tcp(server, &asked, id, question).await?,
    };
    answer[..2].copy_from_slice(&query[..2]);
    // The question as the guest wrote it.
    let end = question.end;
    answer[12..end].copy_from_slice(&query[12..end]);
    Ok(answer)
}

/// Whether `answer` answers what was asked.
fn is_ours(answer: &[u8], id: [u8; 2], question: &Question) -> bool {
    answer.len() >= question.end
        && answer[..2] == id
        && answer[2] & 0x80 != 0
        && Question::read(answer).is_some_and(|q| q == *question)
}

async fn over_udp(
    server: SocketAddr,
    query: &[u8],
    id: [u8; 2],
    question: &Question,
) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 65_535];
    loop {
        let len = socket.recv(&mut buffer).await?;
        if is_ours(&buffer[..len], id, question) {
            buffer.truncate(len);
            buffer.shrink_to_fit();
            return Ok(buffer);
        }
    }
}

async fn over_tcp(
    server: SocketAddr,
    query: &[u8],
    id: [u8; 2],
    question: &Question,
) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let len = u16::try_from(query.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes()[..], query].concat()).await?;
    loop {
        let len = stream.read_u16().await?;
        let mut answer = vec![0; usize::from(len)];
        stream.read_exact(&mut answer).await?;
        if is_ours(&answer, id, question) {
            return Ok(answer);
        }
    }
}
