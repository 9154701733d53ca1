//! Published UDP ports that go through the agent: one carried stream per client.
//!
//! A client's datagrams wait for their stream, [`WAITING`] bytes of them at most, and are lost beyond that. A client that has said
//! nothing for [`IDLE`] is forgotten; at [`CLIENTS`] clients of one port the idlest is.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portway_api::agent::{DATAGRAM_MAX, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::shared::Shared;

/// RFC 4787 REQ-5.
const IDLE: Duration = Duration::from_secs(300);
/// Clients of one port.
pub(crate) const CLIENTS: usize = 256;
/// Bytes that wait while a stream is opened, or is full.
const WAITING: usize = 128 * 1024;

/// One client.
struct Client {
    heard: Instant,
    queue: Arc<Queue>,
    task: AbortHandle,
}

/// Its datagrams on the way to the guest, each with its length.
#[derive(Default)]
struct Queue {
    framed: Mutex<Vec<u8>>,
    news: Notify,
}

impl Queue {
    /// Adds one; at [`WAITING`] it is lost, as a network loses it.
    fn push(&self, datagram: &[u8]) {
        let Ok(len) = u16::try_from(datagram.len()) else { return };
        let mut framed = self.framed.lock().unwrap_or_else(PoisonError::into_inner);
        if framed.len() + datagram.len() <= WAITING {
            framed.extend_from_slice(&len.to_be_bytes());
            framed.extend_from_slice(datagram);
            drop(framed);
            self.news.notify_one();
        }
    }

    /// Waits for some, and takes them; `into` is empty before.
    async fn take(&self, into: &mut Vec<u8>) {
        loop {
            std::mem::swap(&mut *self.framed.lock().unwrap_or_else(PoisonError::into_inner), into);
            if !into.is_empty() {
                return;
            }
            self.news.notified().await;
        }
    }
}

/// Serves one socket until the task is aborted.
pub(super) async fn serve(socket: UdpSocket, target: Target, shared: Arc<Shared>, accepted: Arc<AtomicU64>) {
    let socket = Arc::new(socket);
    let mut clients = Clients(HashMap::new());
    let mut buffer = vec![0; DATAGRAM_MAX + 1];
    loop {
        let (len, from) = match socket.recv_from(&mut buffer).await {
            Ok(got) => got,
            // An error of an earlier answer (ICMP) says nothing about the socket.
            Err(error) => {
                tracing::debug!(%error, "a published UDP port");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let datagram = buffer.get(..len).unwrap_or_default();
        let now = Instant::now();
        match clients.0.get_mut(&from).filter(|c| !c.task.is_finished()) {
            Some(client) => {
                client.heard = now;
                client.queue.push(datagram);
            }
            None => {
                clients.make_room(now);
                accepted.fetch_add(1, Ordering::Relaxed);
                let queue = Arc::new(Queue::default());
                queue.push(datagram);
                let (to, theirs) = (Arc::clone(&socket), Arc::clone(&queue));
                let (target, shared) = (target.clone(), Arc::clone(&shared));
                let task = tokio::spawn(async move {
                    if let Err(error) = exchange(&to, from, &target, &shared, &theirs).await {
                        tracing::debug!(%error, %target, "a client's datagrams are lost");
                    }
                })
                .abort_handle();
                clients.0.insert(from, Client { heard: now, queue, task });
            }
        }
    }
}

struct Clients(HashMap<SocketAddr, Client>);

impl Clients {
    fn make_room(&mut self, now: Instant) {
        self.0.retain(|_, c| {
            let stays = !c.task.is_finished() && now.duration_since(c.heard) < IDLE;
            if !stays {
                c.task.abort();
            }
            stays
        });
        if self.0.len() >= CLIENTS
            && let Some(idlest) = self.0.iter().min_by_key(|(_, c)| c.heard).map(|(a, _)| *a)
            && let Some(client) = self.0.remove(&idlest)
        {
            client.task.abort();
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.0.values().for_each(|c| c.task.abort());
    }
}

/// One client's datagrams, both ways, until the stream ends or nothing has come for [`IDLE`].
async fn exchange(
    socket: &UdpSocket,
    client: SocketAddr,
    target: &Target,
    shared: &Arc<Shared>,
    queue: &Queue,
) -> Result<(), super::shared::CarryError> {
    let (stream, named) = shared.open(target).await?;
    let (from_guest, to_guest) = stream.into_split();
    tokio::select! {
        () = to_guest_all(to_guest, queue) => {}
        () = to_client_all(from_guest, socket, client) => {}
        () = named.reset.notified() => {}
    }
    Ok(())
}

async fn to_guest_all(mut stream: OwnedWriteHalf, queue: &Queue) {
    let mut framed = Vec::new();
    while tokio::time::timeout(IDLE, queue.take(&mut framed)).await.is_ok() {
        if stream.write_all(&framed).await.is_err() {
            return;
        }
        framed.clear();
    }
}

async fn to_client_all(mut stream: OwnedReadHalf, socket: &UdpSocket, client: SocketAddr) {
    let mut held = Vec::with_capacity(4096);
    while let Ok(1..) = stream.read_buf(&mut held).await {
        let mut rest = held.as_slice();
        while let Some((prefix, after)) = rest.split_first_chunk::<2>()
            && let Some(datagram) = after.get(..usize::from(u16::from_be_bytes(*prefix)))
        {
            // What the host's network does not take is lost.
            let _ = socket.send_to(datagram, client).await;
            rest = after.get(datagram.len()..).unwrap_or_default();
        }
        let taken = held.len() - rest.len();
        held.drain(..taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_queue_keeps_borders_and_loses_what_is_too_much() {
        let (queue, mut taken) = (Queue::default(), Vec::new());
        queue.push(b"one");
        queue.push(b"");
        queue.take(&mut taken).await;
        assert_eq!(taken, b"\0\x03one\0\0");
        taken.clear();
        for _ in 0..10 {
            queue.push(&vec![0; 60_000]);
        }
        queue.take(&mut taken).await;
        assert_eq!(taken.len(), 2 * 60_002);
    }
}
