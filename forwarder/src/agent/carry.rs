//! The bytes of one carried connection, on the host's side: between a client's socket and a stream from the agent.
//!
//! ```text
//! client ──recv──► shared buffer ──send──► stream        and back; what is not taken waits in a buffer of the way's own
//! ```
//! All connections share one buffer per thread, so an idle one holds none, and none is made per chunk. An end is passed
//! on as a half-close; an error of the client's socket is a reset, which the caller tells the agent.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;
use tokio::net::{TcpStream, UnixStream};

/// Bytes of the shared buffer, and at most of what one way of a connection holds.
const BUFFER: usize = 128 * 1024;

thread_local! {
    static SHARED: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
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
    let mut waiting: Vec<u8> = Vec::new();
    loop {
        if !waiting.is_empty() {
            drain(to, &waiting).await?;
            waiting = Vec::new();
        }
        from.readable().await.map_err(|_| Fault::From)?;
        // Read and passed on at once, without a point at which another connection could want the buffer.
        let moved = SHARED.with_borrow_mut(|buffer| -> Result<usize, Fault> {
            let read = match from.try_read(buffer) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(usize::MAX),
                Err(_) => return Err(Fault::From),
            };
            let mut bytes = buffer.get(..read).unwrap_or_default();
            while !bytes.is_empty() {
                match to.try_write(bytes) {
                    Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => return Err(Fault::To),
                }
            }
            waiting.extend_from_slice(bytes);
            Ok(read)
        })?;
        if moved == 0 {
            to.shutdown_write();
            return Ok(());
        }
        // A connection whose both ends are fast must not keep the others from their turn.
        tokio::task::consume_budget().await;
    }
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
