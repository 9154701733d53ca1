//! DNS over a byte stream (RFC 7766): messages with their length before them, answered as they are ready.
//!
//! The stream is one end of a socketpair; the guest's TCP connection is at the other. Answers may overtake each
//! other (RFC 7766 §6.2.1.1); at `IN_FLIGHT_MAX` queries reading stops until one is answered. A client that sends
//! nothing for `IDLE`, or does not take an answer for as long, loses its connection; after its end of stream what it
//! asked is still answered.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use portway_netstack::PortId;

use super::Dns;
use super::ask::Transport;

/// Queries of one connection that wait for their answers.
pub(crate) const IN_FLIGHT_MAX: usize = 32;
/// Time without a query after which a connection is closed (RFC 7766 §6.2.3: a few seconds).
pub(super) const IDLE: Duration = Duration::from_secs(10);
/// Bytes read at a time.
const READ: usize = 4096;

impl Dns {
    /// Answers the queries of one connection of `guest` until it ends. At `STREAMS_MAX` connections it is closed, or another
    /// of the guest that has most.
    pub async fn serve_stream<S: AsyncRead + AsyncWrite + Unpin>(
        self: Arc<Self>,
        guest: PortId,
        mut stream: S,
    ) {
        let Some(mut place) = self.take_stream_place(guest) else { return };
        let mut received: Vec<u8> = Vec::new();
        let mut answers: JoinSet<Option<Vec<u8>>> = JoinSet::new();
        let mut open = true;
        let mut idle_at = Instant::now() + IDLE;
        loop {
            while answers.len() < IN_FLIGHT_MAX
                && let Some(query) = next_message(&mut received)
            {
                let dns = Arc::clone(&self);
                answers.spawn(async move { dns.answer(guest, &query, Transport::Stream).await });
                idle_at = Instant::now() + IDLE;
            }
            if !open && answers.is_empty() {
                break;
            }
            tokio::select! {
                Some(answer) = answers.join_next() => {
                    // What is no query at all has no answer, and nobody who sends it is a DNS client.
                    let Ok(Some(answer)) = answer else { break };
                    match timeout(IDLE, write_message(&mut stream, &answer)).await {
                        Ok(Ok(())) => idle_at = Instant::now() + IDLE,
                        Ok(Err(_)) | Err(_) => break,
                    }
                }
                // A read that is dropped has read nothing; what was read is in `received`.
                read = read_some(&mut stream, &mut received), if open && answers.len() < IN_FLIGHT_MAX => match read {
                    Ok(0) => open = false,
                    Ok(_) => {}
                    Err(_) => break,
                },
                () = sleep_until(idle_at), if answers.is_empty() => break,
                () = place.lost() => break,
            }
        }
        // The other end is going or gone; a failed goodbye changes nothing.
        drop(stream.shutdown().await);
    }
}

pub(super) async fn read_some<S: AsyncRead + Unpin>(
    stream: &mut S,
    received: &mut Vec<u8>,
) -> std::io::Result<usize> {
    received.reserve(READ);
    stream.read_buf(received).await
}

/// The first whole message, taken out of `received`.
pub(super) fn next_message(received: &mut Vec<u8>) -> Option<Vec<u8>> {
    let (length, rest) = received.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_be_bytes(*length));
    let message = rest.get(..length)?.to_vec();
    received.drain(..length.saturating_add(2));
    Some(message)
}

pub(super) async fn write_message<S: AsyncWrite + Unpin>(
    stream: &mut S,
    message: &[u8],
) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| std::io::ErrorKind::InvalidData)?;
    // One write: length and message in one segment (RFC 7766 §8).
    let mut framed = Vec::with_capacity(message.len().saturating_add(2));
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await?;
    stream.flush().await
}
