//! gvproxy's `/connect` and `/tunnel`: requests whose connection becomes something else, without an HTTP answer.
//!
//! A connection's first bytes are looked at and left where they are; only when they ask for one of the two is the head
//! taken, byte for byte, so that what the client sent behind it is there for the next reader.

use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UnixStream};

use super::{App, PATIENCE};
use crate::request::{Request, TunnelEnd};

/// Bytes of a head; a longer one is no request of these.
const HEAD: usize = 8192;
/// How long the first bytes may take to say what is asked.
const MOMENT: Duration = Duration::from_millis(5);

/// What a connection asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asks {
    Connect,
    Tunnel,
    /// HTTP as usual.
    Http,
    /// Not known yet.
    Unclear,
}

fn asks(bytes: &[u8]) -> Asks {
    let Some(space) = bytes.iter().position(|b| *b == b' ') else {
        return if bytes.len() < 8 { Asks::Unclear } else { Asks::Http };
    };
    let target = &bytes[space + 1..];
    for (path, asks) in [(&b"/connect"[..], Asks::Connect), (b"/tunnel", Asks::Tunnel)] {
        match target.strip_prefix(path) {
            Some([b' ' | b'?', ..]) => return asks,
            Some([]) => return Asks::Unclear,
            None if path.starts_with(target) => return Asks::Unclear,
            _ => {}
        }
    }
    Asks::Http
}

/// A socket whose first bytes can be looked at.
pub(super) trait Client:
    tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + AsRawFd + Sized + 'static
{
    /// Runs `io` when there is something to read.
    fn when_readable<R>(
        &self,
        io: impl FnMut() -> io::Result<R> + Send,
    ) -> impl Future<Output = io::Result<R>> + Send;
    /// The socket, without tokio.
    fn into_end(self) -> io::Result<TunnelEnd>;
}

impl Client for UnixStream {
    async fn when_readable<R>(&self, io: impl FnMut() -> io::Result<R> + Send) -> io::Result<R> {
        self.async_io(Interest::READABLE, io).await
    }

    fn into_end(self) -> io::Result<TunnelEnd> {
        self.into_std().map(TunnelEnd::Unix)
    }
}

impl Client for TcpStream {
    async fn when_readable<R>(&self, io: impl FnMut() -> io::Result<R> + Send) -> io::Result<R> {
        self.async_io(Interest::READABLE, io).await
    }

    fn into_end(self) -> io::Result<TunnelEnd> {
        self.into_std().map(TunnelEnd::Tcp)
    }
}

fn receive(fd: RawFd, into: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
    recv(fd, into, flags | MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
}

/// What a connection may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allowed {
    /// A VM, by `/connect`.
    pub(super) connect: bool,
    /// A connection to a guest, by `/tunnel`.
    pub(super) tunnel: bool,
}

/// Serves `/connect` and `/tunnel` as far as they are `allowed`; any other connection is given back, untouched.
pub(super) async fn serve<C: Client>(client: C, allowed: Allowed, app: &App) -> Option<C> {
    let looked = tokio::time::timeout(PATIENCE, look(&client)).await;
    match looked {
        Ok(Ok(Asks::Connect)) if allowed.connect => {
            if let Ok(Ok(_)) = tokio::time::timeout(PATIENCE, head(&client)).await
                && let Ok(end) = client.into_end()
            {
                let fd = match end {
                    TunnelEnd::Unix(s) => OwnedFd::from(s),
                    TunnelEnd::Tcp(s) => OwnedFd::from(s),
                };
                // When the data thread is overloaded the client sees its end, and comes again.
                let _ = app.requests.send(Request::Attach { fd });
            }
            None
        }
        Ok(Ok(Asks::Tunnel)) if allowed.tunnel => {
            tunnel(client, app).await;
            None
        }
        Ok(Ok(Asks::Connect | Asks::Tunnel | Asks::Http | Asks::Unclear)) => Some(client),
        // Silent, or gone.
        Ok(Err(_)) | Err(_) => None,
    }
}

async fn look<C: Client>(client: &C) -> io::Result<Asks> {
    let fd = client.as_raw_fd();
    loop {
        let mut bytes = [0; 64];
        let n = client.when_readable(|| receive(fd, &mut bytes, MsgFlags::MSG_PEEK)).await?;
        match asks(&bytes[..n]) {
            _ if n == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            // What is there stays there, so that the kernel says again and again that there is something.
            Asks::Unclear => tokio::time::sleep(MOMENT).await,
            asks => return Ok(asks),
        }
    }
}

/// Takes the head of a request, and nothing behind it; gives its first line.
async fn head<C: Client>(client: &C) -> io::Result<String> {
    let fd = client.as_raw_fd();
    let mut head: Vec<u8> = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = [0; 1024];
        let n = client.when_readable(|| receive(fd, &mut bytes, MsgFlags::MSG_PEEK)).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let from = head.len().saturating_sub(3);
        let before = head.len() - from;
        let seen = [&head[from..], &bytes[..n]].concat();
        let end = seen.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4 - before);
        let take = end.unwrap_or(n);
        let taken = client.when_readable(|| receive(fd, &mut bytes[..take], MsgFlags::empty())).await?;
        head.extend_from_slice(&bytes[..taken]);
    }
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}

/// The guest's address and port of `/tunnel?ip=A&port=P`.
fn destination(line: &str) -> Result<SocketAddr, String> {
    let target = line.split(' ').nth(1).unwrap_or_default();
    let query = target.split_once('?').map_or("", |(_, q)| q);
    let value = |key: &str| {
        form_urlencoded::parse(query.as_bytes())
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.into_owned())
            .unwrap_or_default()
    };
    let (ip, port) = (value("ip"), value("port"));
    if ip.is_empty() {
        return Err("ip is mandatory".into());
    }
    let port = port.parse::<u16>().map_err(|_| format!("strconv.Atoi: parsing {port:?}: invalid syntax"))?;
    let ip: IpAddr = ip.parse().map_err(|_| format!("{ip:?} is not an address"))?;
    Ok(SocketAddr::new(ip, port))
}

async fn tunnel<C: Client>(mut client: C, app: &App) {
    let Ok(Ok(line)) = tokio::time::timeout(PATIENCE, head(&client)).await else { return };
    let answer = match destination(&line) {
        Ok(to) => {
            // gvproxy's callers wait for these two bytes, and get no other answer.
            if client.write_all(b"OK").await.is_ok()
                && let Ok(stream) = client.into_end()
            {
                let _ = app.requests.send(Request::Tunnel { to, stream });
            }
            return;
        }
        Err(text) => format!(
            "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{text}\n",
            text.len() + 1
        ),
    };
    let _ = client.write_all(answer.as_bytes()).await;
    let _ = client.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_say_what_is_asked() {
        for (bytes, asked) in [
            ("", Asks::Unclear),
            ("POST", Asks::Unclear),
            ("POST /con", Asks::Unclear),
            ("POST /connect", Asks::Unclear),
            ("POST /connect HTTP/1.1\r\n", Asks::Connect),
            ("GET /tunnel?ip=1", Asks::Tunnel),
            ("GET /connected HTTP", Asks::Http),
            ("GET /v1/ports HTTP", Asks::Http),
            ("a-method-that-is-none", Asks::Http),
        ] {
            assert_eq!(asks(bytes.as_bytes()), asked, "{bytes}");
        }
    }

    #[test]
    fn a_tunnel_needs_an_address_and_a_port() {
        let to = |query: &str| destination(&format!("POST /tunnel{query} HTTP/1.1"));
        assert_eq!(to("?ip=192.168.127.2&port=22"), Ok(([192, 168, 127, 2], 22).into()));
        for (query, text) in [
            ("", "ip is mandatory"),
            ("?ip=&port=1", "ip is mandatory"),
            ("?ip=1.2.3.4", "strconv.Atoi: parsing \"\": invalid syntax"),
            ("?ip=1.2.3.4&port=x", "strconv.Atoi: parsing \"x\": invalid syntax"),
            ("?ip=1.2.3.4&port=70000", "strconv.Atoi: parsing \"70000\": invalid syntax"),
            ("?ip=a.name&port=1", "\"a.name\" is not an address"),
        ] {
            assert_eq!(to(query), Err(text.into()), "{query}");
        }
    }
}
