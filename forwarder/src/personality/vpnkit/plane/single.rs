//! The forwarder of 2017, which linuxkit's package pins: every connection is a stream of its own through the `connect` socket.
//!
//! ```text
//!  protocol u8 · length of the address u16 · address · port u16 ─► bytes both ways, until both ends        (little-endian)
//!                                                              └─► of UDP: datagrams as in a channel, see `mux`
//! ```
//! It says nothing of its own, so that a connection that it cannot make is one that ends. Unix sockets it does not know.
//! Source: the bytes that forwarders of that time exchange with vpnkit.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UdpSocket, UnixStream};

use super::super::forward::{End, Proto};
use super::super::mux::{DATAGRAM, GREETING, datagram, destination, parse_datagram};
use super::{CHUNK, Plane};

/// One connection.
pub(super) struct Single {
    stream: UnixStream,
    plane: Arc<Plane>,
}

impl Single {
    /// Says on `stream` where it leads.
    pub(super) async fn begin(
        mut stream: UnixStream,
        proto: Proto,
        to: &End,
        plane: Arc<Plane>,
    ) -> io::Result<Self> {
        let fault =
            || io::Error::other("the forwarder in the guest is that of 2017, which knows no unix sockets");
        stream.write_all(&destination(proto, to).ok_or_else(fault)?).await?;
        Ok(Self { stream, plane })
    }

    /// Carries `client` until both directions have ended, or either broke.
    pub(super) async fn carry(self, client: impl AsyncRead + AsyncWrite) {
        let Self { mut stream, plane } = self;
        let (mut from_guest, mut to_guest) = stream.split();
        let (mut reading, mut writing) = tokio::io::split(client);
        let sends = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                let n = reading.read(&mut buffer).await?;
                if n == 0 {
                    return to_guest.shutdown().await;
                }
                to_guest.write_all(&buffer[..n]).await?;
            }
        };
        let takes = async {
            let mut buffer = vec![0; CHUNK];
            let mut heard = false;
            loop {
                let n = from_guest.read(&mut buffer).await?;
                if n == 0 {
                    // A server may end without a word; a forwarder of another generation does, when it is spoken to so.
                    if !heard {
                        plane.forget().await;
                    }
                    return writing.shutdown().await;
                }
                if !heard && greets(&buffer[..n]) {
                    plane.forget().await;
                    return Err(io::Error::other("the guest has another forwarder now"));
                }
                heard = true;
                writing.write_all(&buffer[..n]).await?;
            }
        };
        if let Err(error) = tokio::try_join!(sends, takes) {
            tracing::debug!(%error, "a forwarded connection ended");
        }
    }

    /// Carries datagrams until the stream ends; the first is in `buffer` already.
    pub(super) async fn carry_datagrams(
        self,
        socket: &UdpSocket,
        buffer: &mut [u8],
        first: usize,
        peer: SocketAddr,
    ) {
        let Self { mut stream, plane } = self;
        let (mut from_guest, mut to_guest) = stream.split();
        let sends = async {
            let (mut n, mut peer) = (first, peer);
            loop {
                if n <= DATAGRAM {
                    to_guest.write_all(&datagram(peer, &buffer[..n])).await?;
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
        let takes = async {
            let (mut bytes, mut heard) = (Vec::<u8>::new(), false);
            loop {
                if from_guest.read_buf(&mut bytes).await? == 0 {
                    return Err::<(), io::Error>(io::ErrorKind::UnexpectedEof.into());
                }
                if !heard && greets(&bytes) {
                    return Err(io::Error::other("the guest has another forwarder now"));
                }
                heard = true;
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
            }
        };
        if let Err(error) = tokio::try_join!(sends, takes) {
            tracing::debug!(%error, "a stream of datagrams ended");
        }
        // It has no end of its own: the guest went, or its forwarder is another.
        plane.forget().await;
    }
}

/// Whether `bytes` are a current forwarder's first.
fn greets(bytes: &[u8]) -> bool {
    let text = &GREETING[..GREETING.len() - 2];
    bytes.get(..text.len()).is_some_and(|b| b == text)
}
