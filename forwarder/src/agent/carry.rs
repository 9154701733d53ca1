//! The bytes of one carried connection, on the host's side: between a client's socket and a stream from the agent.
//!
//! ```text
//! client ──recv──► shared buffer ──send──► stream        and back; what is not taken waits in a buffer of the way's own
//! ```
//! All connections share one buffer per thread, so an idle one holds none; the buffers of slow receivers are used again, so
//! none is made per chunk. When [`HELD`] receivers are slow, others are read in chunks of [`SMALL`] bytes: what all of them
//! hold is bounded. An end is passed on as a half-close; an error of the client's socket is a reset, which the caller tells
//! the agent.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;
use tokio::net::{TcpStream, UnixStream};

/// Bytes of the shared buffer, and at most of what one way of a connection holds.
const BUFFER: usize = 128 * 1024;
/// Slow receivers that hold a buffer of this size.
pub(crate) const HELD: usize = 64;
/// Bytes at most of what a slow receiver beyond those holds.
const SMALL: usize = 4 * 1024;

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers::new());
}

/// The buffers of a thread.
struct Buffers {
    /// What is read into.
    shared: Vec<u8>,
    /// Given back by receivers that are not slow any more.
    spare: Vec<Vec<u8>>,
    /// Those that slow receivers have.
    held: usize,
}

impl Buffers {
    fn new() -> Self {
        Self { shared: vec![0; BUFFER], spare: Vec::new(), held: 0 }
    }

    /// Bytes that may be read at once.
    const fn chunk(&self) -> usize {
        if self.held < HELD { BUFFER } else { SMALL }
    }

    /// Keeps the bytes `from..to` of the shared buffer.
    fn keep(&mut self, from: usize, to: usize) -> Waiting {
        let bytes = self.shared.get(from..to).unwrap_or_default();
        if self.held >= HELD {
            return Waiting(bytes.to_vec());
        }
        self.held += 1;
        let mut buffer = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BUFFER));
        buffer.extend_from_slice(bytes);
        Waiting(buffer)
    }

    fn give_back(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() >= BUFFER {
            self.held = self.held.saturating_sub(1);
            buffer.clear();
            self.spare.push(buffer);
        }
    }
}

/// What a slow receiver has not taken.
struct Waiting(Vec<u8>);

impl Drop for Waiting {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // A thread that ends has nothing to give it back to.
        let _ = BUFFERS.try_with(|buffers| buffers.borrow_mut().give_back(buffer));
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(super) enum Stream {
    /// A client of a published TCP port.
    Tcp(TcpStream),
    /// A client of a unix socket, or a stream from the agent.
    Unix(UnixStream),
}

impl Stream {
    async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.readable().await,
            Self::Unix(s) => s.readable().await,
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.writable().await,
            Self::Unix(s) => s.writable().await,
        }
    }

    fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.try_read(into),
            Self::Unix(s) => s.try_read(into),
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.try_write(bytes),
            Self::Unix(s) => s.try_write(bytes),
        }
    }

    fn shutdown_write(&self) {
        let fd = match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
        };
        // A peer that is gone already says so at the next write.
        let _ = shutdown(fd.as_raw_fd(), Shutdown::Write);
    }

    /// Closes with RST.
    pub(super) fn reset(self) {
        if let Self::Tcp(s) = &self {
            let _ = socket2::SockRef::from(s).set_linger(Some(std::time::Duration::ZERO));
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both directions came to their end.
    Done,
    /// The first stream failed.
    NearReset,
    /// The second did.
    FarReset,
}

enum Fault {
    From,
    To,
}

/// Carries until both directions have ended, or one end fails.
pub(super) async fn carry(near: &Stream, far: &Stream) -> Ended {
    let there = async {
        way(near, far).await.map_err(|f| match f {
            Fault::From => Ended::NearReset,
            Fault::To => Ended::FarReset,
        })
    };
    let back = async {
        way(far, near).await.map_err(|f| match f {
            Fault::From => Ended::FarReset,
            Fault::To => Ended::NearReset,
        })
    };
    match tokio::try_join!(there, back) {
        Ok(_) => Ended::Done,
        Err(ended) => ended,
    }
}

/// One direction.
async fn way(from: &Stream, to: &Stream) -> Result<(), Fault> {
    loop {
        from.readable().await.map_err(|_| Fault::From)?;
        // Read and passed on at once, without a point at which another connection could want the buffer.
        let Some(moved) = BUFFERS.with_borrow_mut(|buffers| pass(from, to, buffers))? else { continue };
        match moved {
            Moved::End => {
                to.shutdown_write();
                return Ok(());
            }
            Moved::All => {}
            Moved::Some(waiting) => drain(to, &waiting.0).await?,
        }
        // A connection whose both ends are fast must not keep the others from their turn.
        tokio::task::consume_budget().await;
    }
}

/// What one chunk came to.
enum Moved {
    End,
    All,
    /// The receiver did not take this.
    Some(Waiting),
}

/// Reads one chunk and writes what is taken of it; nothing when there is none.
fn pass(from: &Stream, to: &Stream, buffers: &mut Buffers) -> Result<Option<Moved>, Fault> {
    let chunk = buffers.chunk();
    let read = match from.try_read(buffers.shared.get_mut(..chunk).unwrap_or_default()) {
        Ok(0) => return Ok(Some(Moved::End)),
        Ok(n) => n,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(_) => return Err(Fault::From),
    };
    let mut taken = 0;
    while taken < read {
        match to.try_write(buffers.shared.get(taken..read).unwrap_or_default()) {
            Ok(n) => taken += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Some(Moved::Some(buffers.keep(taken, read))));
            }
            Err(_) => return Err(Fault::To),
        }
    }
    Ok(Some(Moved::All))
}

async fn drain(to: &Stream, mut bytes: &[u8]) -> Result<(), Fault> {
    while !bytes.is_empty() {
        to.writable().await.map_err(|_| Fault::To)?;
        match to.try_write(bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Err(Fault::To),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// The client's end, the agent's end, and the task between.
    async fn lab() -> (TcpStream, UnixStream, tokio::task::JoinHandle<Ended>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (near, _) = listener.accept().await.unwrap();
        let (agent, far) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { carry(&Stream::Tcp(near), &Stream::Unix(far)).await });
        (client, agent, task)
    }

    #[tokio::test]
    async fn megabytes_cross_both_ways_and_ends_are_passed_on_one_by_one() {
        let (client, agent, task) = lab().await;
        let sent: Vec<u8> = (0..2_000_000u32).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
        let (mut client_in, mut client_out) = client.into_split();
        let (mut agent_in, mut agent_out) = agent.into_split();
        let copy = sent.clone();
        let writer = tokio::spawn(async move {
            client_out.write_all(&copy).await.unwrap();
            client_out.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        agent_in.read_to_end(&mut got).await.unwrap();
        assert!(got == sent, "what was sent, and then the end");
        agent_out.write_all(&got).await.unwrap();
        agent_out.shutdown().await.unwrap();
        let mut back = Vec::new();
        client_in.read_to_end(&mut back).await.unwrap();
        assert!(back == sent);
        writer.await.unwrap();
        assert_eq!(task.await.unwrap(), Ended::Done);
    }

    #[tokio::test]
    async fn a_client_that_resets_is_told_from_one_that_ends() {
        let (client, mut agent, task) = lab().await;
        socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(task.await.unwrap(), Ended::NearReset);
        assert_eq!(agent.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_slow_receivers_hold_is_bounded_and_its_buffers_are_used_again() {
        const SLOW: usize = HELD + 16;
        let sent: Vec<u8> = (0..300_000u32).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
        let held = || BUFFERS.with_borrow(|b| (b.held, b.spare.len()));
        for _ in 0..2 {
            let mut receivers = Vec::new();
            for _ in 0..SLOW {
                let ((mut client, near), (agent, far)) =
                    (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
                // So small that no chunk fits.
                socket2::SockRef::from(&far).set_send_buffer_size(4096).unwrap();
                let sent = sent.clone();
                tokio::spawn(async move { client.write_all(&sent).await.unwrap() });
                tokio::spawn(async move { carry(&Stream::Unix(near), &Stream::Unix(far)).await });
                receivers.push(agent);
            }
            let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
            while held().0 < HELD {
                assert!(tokio::time::Instant::now() < deadline, "{:?}", held());
                tokio::task::yield_now().await;
            }
            for agent in &mut receivers {
                let mut got = vec![0; sent.len()];
                agent.read_exact(&mut got).await.unwrap();
                assert!(got == sent, "what was sent");
            }
            drop(receivers);
            while held().0 > 0 {
                assert!(tokio::time::Instant::now() < deadline, "{:?}", held());
                tokio::task::yield_now().await;
            }
            assert!(held().1 <= HELD, "{:?}: no more are ever made", held());
        }
    }

    #[tokio::test]
    async fn an_agent_that_is_gone_is_a_fault_of_the_far_end() {
        let (mut client, agent, task) = lab().await;
        drop(agent);
        // The kernel tells at the second write at the latest.
        while client.write_all(b"x").await.is_ok() && !task.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(task.await.unwrap(), Ended::FarReset);
    }
}
