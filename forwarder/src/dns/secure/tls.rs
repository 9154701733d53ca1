//! A line over TLS: messages with their length before them (RFC 7858 §3.3), each with an id of its own on the line.
//!
//! One task reads and writes. It ends when the server ends the connection, or when nobody holds the line any more and the last
//! answer is there. After [`SILENCE`] with messages out and not a byte come, the line takes no more of them, so that the next
//! opens another: a path that has gone says nothing.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, split};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::client::TlsStream;

use super::super::stream::{next_message, read_some, write_message};
use super::super::wire;

/// How long a server may say nothing at all while it owes answers.
const SILENCE: Duration = Duration::from_secs(2);
/// How long it may not take a message.
const WRITE: Duration = Duration::from_secs(5);
/// Messages that wait to be written.
const QUEUE: usize = 64;

#[derive(Clone)]
pub(super) struct Line(mpsc::Sender<Job>);

struct Job {
    message: Vec<u8>,
    answer: oneshot::Sender<Vec<u8>>,
}

/// A message that is out.
struct Waiting {
    /// Its own id, which its answer is to bear.
    id: [u8; 2],
    answer: oneshot::Sender<Vec<u8>>,
}

impl Line {
    pub(super) fn over(stream: TlsStream<TcpStream>) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUE);
        tokio::spawn(carry(stream, queue));
        Self(jobs)
    }

    pub(super) fn is_open(&self) -> bool {
        !self.0.is_closed()
    }

    pub(super) async fn ask(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        let ended = || io::Error::from(io::ErrorKind::ConnectionAborted);
        let (answer, answered) = oneshot::channel();
        self.0.send(Job { message: message.to_vec(), answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())
    }
}

async fn carry(stream: TlsStream<TcpStream>, mut queue: mpsc::Receiver<Job>) {
    let (mut reader, mut writer) = split(stream);
    let mut waiting: HashMap<u16, Waiting> = HashMap::new();
    let mut received = Vec::new();
    let mut next_id: u16 = 0;
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            job = queue.recv(), if !queue.is_closed() || !queue.is_empty() => {
                let Some(Job { mut message, answer }) = job else {
                    if waiting.is_empty() { break } else { continue }
                };
                if waiting.is_empty() {
                    heard = Instant::now();
                }
                // Far fewer are out than there are ids.
                while waiting.contains_key(&next_id) {
                    next_id = next_id.wrapping_add(1);
                }
                let id = message.first_chunk().copied().unwrap_or_default();
                wire::set_id(&mut message, next_id.to_be_bytes());
                waiting.insert(next_id, Waiting { id, answer });
                next_id = next_id.wrapping_add(1);
                match timeout(WRITE, write_message(&mut writer, &message)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => break,
                }
            }
            // A read that is dropped has read nothing; what was read is in `received`.
            read = read_some(&mut reader, &mut received) => match read {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    heard = Instant::now();
                    while let Some(mut message) = next_message(&mut received) {
                        let id = message.first_chunk().map(|id| u16::from_be_bytes(*id));
                        let Some(for_whom) = id.and_then(|id| waiting.remove(&id)) else { continue };
                        wire::set_id(&mut message, for_whom.id);
                        // Who asked may have given up.
                        let _ = for_whom.answer.send(message);
                    }
                }
            },
            () = sleep_until(heard + SILENCE), if !waiting.is_empty() => {
                queue.close();
                waiting.retain(|_, w| !w.answer.is_closed());
                heard = Instant::now();
            }
        }
        if queue.is_closed() && queue.is_empty() && waiting.is_empty() {
            break;
        }
    }
    // Those who wait are told by what is dropped here; the queue first, so that they find the line closed.
    drop(queue);
    drop(waiting);
    let _ = timeout(WRITE, writer.shutdown()).await;
}
