//! The proxy itself: requests of one guest's connection, and whom each goes to.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use portway_netstack::{Reach, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use super::settings::{Settings, Upstream};
use crate::request::Request as Ask;
use crate::sidecar::DoorContext;

/// How long a proxy or server may take to be connected, and a proxy to answer CONNECT.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest may take over the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the answer to CONNECT.
const HEAD: usize = 8192;
/// What is between two hops alone (RFC 9110 §7.6.1). `Upgrade` goes on, with the `Connection` that belongs to it.
const HOP: [&str; 5] = ["connection", "keep-alive", "proxy-connection", "proxy-authenticate", "te"];

type Body = BoxBody<Bytes, hyper::Error>;

/// Where a guest wanted to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The host's own address for it, which the stack has allowed.
    pub(super) to: SocketAddr,
    /// The guest's.
    pub(super) seen: IpAddr,
}

impl Place {
    /// Whether it is the host itself, to which no proxy knows a way.
    fn is_host(&self) -> bool {
        self.to.ip().is_loopback()
    }
}

/// Serves the requests of a guest's connection; `to` is where it wanted to go, when it does not know of the proxy. The answer is the
/// end its bytes go to.
///
/// # Errors
/// When there is no descriptor left.
pub(super) fn serve(
    settings: Arc<Settings>,
    to: Option<Place>,
    context: DoorContext,
) -> io::Result<StdUnixStream> {
    let (ours, guests) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    guests.set_nonblocking(true)?;
    let stream = UnixStream::from_std(ours)?;
    let next = Arc::new(Next { settings, to, context, open: Mutex::default() });
    tokio::spawn(async move {
        let service = service_fn(move |request| {
            let next = Arc::clone(&next);
            async move { Ok::<_, Infallible>(next.answer(request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .half_close(true)
            .preserve_header_case(true)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a guest's HTTP connection ended");
        }
    });
    Ok(guests)
}

/// Has the `https` proxy carry a connection to `to`; without one, or where it is excluded, it goes there itself.
///
/// # Errors
/// When it is not allowed, or refused, or nobody answers in time.
pub(super) async fn tunnel(
    settings: &Settings,
    place: Place,
    context: &DoorContext,
) -> io::Result<StdUnixStream> {
    let Place { to, seen } = place;
    let host = seen.to_string();
    if !settings.allows(&host) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let proxy = settings.https.as_ref().filter(|_| !place.is_host() && !settings.excludes(&host));
    let stream = match proxy {
        Some(proxy) => connect_through(proxy, &to.to_string(), context).await?,
        None => connect(to).await?,
    };
    // Of a stream nothing but reading, writing and its end is used.
    Ok(StdUnixStream::from(OwnedFd::from(stream.into_std()?)))
}

/// A connection to `authority` through `proxy`, whose answer has been read.
async fn connect_through(proxy: &Upstream, authority: &str, context: &DoorContext) -> io::Result<TcpStream> {
    let asked = async {
        let mut stream = dial_proxy(proxy, context).await?;
        let login = proxy.authorization.as_ref();
        let login = login.map(|a| format!("Proxy-Authorization: {a}\r\n")).unwrap_or_default();
        let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{login}\r\n");
        stream.write_all(head.as_bytes()).await?;
        let answer = read_head(&mut stream).await?;
        // `HTTP/1.1 200 …`: any 2xx is content (RFC 9110 §9.3.6).
        match answer.split(|b| *b == b' ').nth(1) {
            Some([b'2', _, _]) => Ok(stream),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    };
    timeout(PATIENCE, asked).await?
}

/// The head of an answer, and nothing behind it.
async fn read_head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut ahead = [0; 1024];
    while !head.ends_with(b"\r\n\r\n") {
        let n = stream.peek(&mut ahead).await?;
        if n == 0 || head.len() > HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // Byte for byte over what is there: the head ends where it ends.
        let mut take = 0;
        while take < n && !head.ends_with(b"\r\n\r\n") {
            head.extend(ahead.get(take));
            take += 1;
        }
        let taken = ahead.get_mut(..take).unwrap_or_default();
        stream.read_exact(taken).await?;
    }
    Ok(head)
}

/// Connects to a proxy that the settings name. Its name is resolved as guests' are, and the host alias is the host.
async fn dial_proxy(proxy: &Upstream, context: &DoorContext) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{proxy:?} has no address"));
    for ip in addresses(&proxy.host, context).await {
        let to = SocketAddr::new(ip, proxy.port);
        let to = match reach(to, context).await {
            Some(Reach::Host(host) | Reach::Forwarded(host)) => host,
            _ => to,
        };
        match connect(to).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Connects to `host` for a guest: names as guests are answered, addresses as far as guests may go.
async fn dial_for_guest(host: &str, port: u16, context: &DoorContext) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for ip in addresses(host, context).await {
        let Some(Reach::Host(to) | Reach::Forwarded(to)) = reach(SocketAddr::new(ip, port), context).await
        else {
            last = io::Error::new(io::ErrorKind::PermissionDenied, format!("{ip} is not reached from here"));
            continue;
        };
        match connect(to).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    timeout(PATIENCE, TcpStream::connect(to)).await?
}

async fn addresses(host: &str, context: &DoorContext) -> Vec<IpAddr> {
    match host.parse() {
        Ok(ip) => vec![ip],
        Err(_) => context.dns.addresses(host).await,
    }
}

/// What stands behind an address for a guest; `None` when the network is ending.
async fn reach(to: SocketAddr, context: &DoorContext) -> Option<Reach> {
    let (reply, answer) = oneshot::channel();
    context.requests.send(Ask::Reach { to, transport: Transport::Tcp, reply }).ok()?;
    answer.await.ok().map(|reached| reached.reach)
}

/// Where one connection's requests go.
struct Next {
    settings: Arc<Settings>,
    /// Where the guest wanted to go, when it does not know of the proxy.
    to: Option<Place>,
    context: DoorContext,
    /// The connection of the last request, for the next one to the same place.
    open: Mutex<Option<(String, SendRequest<Incoming>)>>,
}

/// Why a request is answered here.
enum Refused {
    /// 400.
    NoHost,
    /// 403: the host that is not allowed.
    Forbidden(String),
    /// 503: who is not reached, and why.
    Unreachable(String, io::Error),
    /// 502: the answer was none.
    NoAnswer(hyper::Error),
    /// 502: the connection was closed before the request was on its way.
    Closed,
}

/// A request without an answer.
enum Unsent {
    /// Nothing of it has left.
    Whole(Box<Request<Incoming>>),
    /// It may have been heard.
    Partly(hyper::Error),
}

/// Sends `request`; the connection comes back with the answer.
async fn send(
    mut sender: SendRequest<Incoming>,
    request: Request<Incoming>,
) -> Result<(SendRequest<Incoming>, Response<Incoming>), Unsent> {
    if sender.ready().await.is_err() {
        return Err(Unsent::Whole(Box::new(request)));
    }
    match sender.try_send_request(request).await {
        Ok(answer) => Ok((sender, answer)),
        Err(mut error) => Err(match error.take_message() {
            Some(request) => Unsent::Whole(Box::new(request)),
            None => Unsent::Partly(error.into_error()),
        }),
    }
}

impl Next {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let done = match (request.method() == Method::CONNECT, self.to) {
            (true, None) => self.connect(request).await,
            _ => self.forward(request).await,
        };
        done.unwrap_or_else(|refused| self.page(&refused))
    }

    /// `CONNECT host:port` from a guest that knows of the proxy.
    async fn connect(&self, request: Request<Incoming>) -> Result<Response<Body>, Refused> {
        let authority = request.uri().authority().cloned().ok_or(Refused::NoHost)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(443);
        if !self.settings.allows(&host) {
            return Err(Refused::Forbidden(host));
        }
        let proxy = self.settings.https.as_ref().filter(|_| !self.settings.excludes(&host));
        let stream = match proxy {
            Some(proxy) => connect_through(proxy, authority.as_str(), &self.context).await,
            None => dial_for_guest(&host, port, &self.context).await,
        };
        let mut stream = stream.map_err(|error| Refused::Unreachable(host, error))?;
        tokio::spawn(async move {
            match hyper::upgrade::on(request).await {
                Ok(upgraded) => carry(TokioIo::new(upgraded), &mut stream).await,
                Err(error) => tracing::debug!(%error, "a guest left before its CONNECT was answered"),
            }
        });
        Ok(Response::new(empty()))
    }

    async fn forward(&self, mut request: Request<Incoming>) -> Result<Response<Body>, Refused> {
        let named = request.headers().get(header::HOST).and_then(|h| h.to_str().ok());
        let authority = match request.uri().authority() {
            Some(authority) => authority.clone(),
            None => named.and_then(|h| h.parse().ok()).ok_or(Refused::NoHost)?,
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if !self.settings.allows(&host) {
            return Err(Refused::Forbidden(host));
        }
        let path = request.uri().path_and_query().map_or("/", |p| p.as_str()).to_owned();
        let proxy = self.settings.http.as_ref().filter(|_| !self.settings.excludes(&host));
        let past = |place: Place| place.is_host() || self.settings.excludes(&place.seen.to_string());
        let proxy = proxy.filter(|_| !self.to.is_some_and(past));
        let port = authority.port_u16().or(self.to.map(|place| place.to.port())).unwrap_or(80);
        let (place, target) = match proxy {
            Some(proxy) => (format!("{proxy:?}"), format!("http://{authority}{path}")),
            // Where the guest itself has found the address, it is gone there.
            None => (self.to.map_or_else(|| format!("{host}:{port}"), |place| place.to.to_string()), path),
        };
        *request.uri_mut() = target.parse::<Uri>().map_err(|_| Refused::NoHost)?;
        let upgrade = hop_by_hop(request.headers_mut());
        if request.headers().get(header::HOST).is_none()
            && let Ok(value) = HeaderValue::from_str(authority.as_str())
        {
            request.headers_mut().insert(header::HOST, value);
        }
        match proxy.and_then(|p| p.authorization.as_ref()).map(|a| HeaderValue::from_str(a)) {
            Some(Ok(login)) => drop(request.headers_mut().insert(header::PROXY_AUTHORIZATION, login)),
            // The guest's own words to a proxy are for that proxy, not for a server.
            _ if proxy.is_none() => drop(request.headers_mut().remove(header::PROXY_AUTHORIZATION)),
            _ => {}
        }
        let from_guest = upgrade.then(|| hyper::upgrade::on(&mut request));
        let mut open = self.open.lock().await;
        let kept = open.take().filter(|(there, sender)| *there == place && !sender.is_closed());
        let done = match kept {
            Some((_, sender)) => send(sender, request).await,
            None => Err(Unsent::Whole(Box::new(request))),
        };
        let (sender, mut answer) = match done {
            Ok(done) => done,
            Err(Unsent::Partly(error)) => return Err(Refused::NoAnswer(error)),
            // There is no connection yet, or its server has closed it in the moment it was to be used again (RFC 9112 §9.3.1).
            Err(Unsent::Whole(request)) => {
                let stream = match (proxy, self.to) {
                    (Some(proxy), _) => dial_proxy(proxy, &self.context).await,
                    (None, Some(place)) => connect(place.to).await,
                    (None, None) => dial_for_guest(&host, port, &self.context).await,
                };
                let stream = stream.map_err(|error| Refused::Unreachable(host, error))?;
                let (sender, connection) = http1::Builder::new()
                    .preserve_header_case(true)
                    .handshake(TokioIo::new(stream))
                    .await
                    .map_err(Refused::NoAnswer)?;
                tokio::spawn(async move {
                    if let Err(error) = connection.with_upgrades().await {
                        tracing::debug!(%error, "the far side of a guest's HTTP connection ended");
                    }
                });
                send(sender, *request).await.map_err(|unsent| match unsent {
                    Unsent::Whole(_) => Refused::Closed,
                    Unsent::Partly(error) => Refused::NoAnswer(error),
                })?
            }
        };
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let (Some(from_guest), from_far) = (from_guest, hyper::upgrade::on(&mut answer)) else {
                return Err(Refused::NoHost);
            };
            tokio::spawn(async move {
                if let (Ok(guest), Ok(far)) = tokio::join!(from_guest, from_far) {
                    carry(TokioIo::new(guest), &mut TokioIo::new(far)).await;
                }
            });
        } else {
            *open = Some((place, sender));
            hop_by_hop(answer.headers_mut());
        }
        Ok(answer.map(BodyExt::boxed))
    }

    /// What the guest is told instead.
    fn page(&self, refused: &Refused) -> Response<Body> {
        let (status, text) = match refused {
            Refused::NoHost => (StatusCode::BAD_REQUEST, "The request names no host.".to_owned()),
            Refused::Forbidden(host) => (StatusCode::FORBIDDEN, self.settings.refusal(host)),
            Refused::Unreachable(host, error) => {
                (StatusCode::SERVICE_UNAVAILABLE, format!("No connection for {host}: {error}"))
            }
            Refused::NoAnswer(error) => (StatusCode::BAD_GATEWAY, format!("No answer: {error}")),
            Refused::Closed => (StatusCode::BAD_GATEWAY, "No answer: the connection was closed".into()),
        };
        tracing::debug!(%status, text, "a guest's HTTP request was answered by the proxy");
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let page = format!("<html><head><title>{status}</title></head><body><p>{text}</p></body></html>\n");
        let mut answer = Response::new(Full::from(page).map_err(|never| match never {}).boxed());
        *answer.status_mut() = status;
        let html = HeaderValue::from_static("text/html; charset=utf-8");
        answer.headers_mut().insert(header::CONTENT_TYPE, html);
        answer
    }
}

/// Takes out what is for this hop alone; whether another protocol is asked for, which goes on.
fn hop_by_hop(headers: &mut hyper::HeaderMap) -> bool {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let upgrade = named.contains(&header::UPGRADE) && headers.contains_key(header::UPGRADE);
    for name in named.iter().filter(|n| **n != header::UPGRADE) {
        headers.remove(name);
    }
    for name in HOP {
        headers.remove(name);
    }
    if upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(header::UPGRADE);
    }
    upgrade
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

async fn carry<A, B>(mut guest: A, far: &mut B)
where
    A: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    if let Err(error) = tokio::io::copy_bidirectional(&mut guest, far).await {
        tracing::debug!(%error, "a connection through the proxy broke");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_two_hops_goes_and_an_upgrade_stays() {
        let headers = |list: &[(&'static str, &'static str)]| {
            let pair = |(k, v): &(&'static str, &'static str)| {
                (HeaderName::from_static(k), HeaderValue::from_static(v))
            };
            list.iter().map(pair).collect::<hyper::HeaderMap>()
        };
        let mut plain = headers(&[
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("upgrade", "h2c"),
            ("accept", "*/*"),
        ]);
        assert!(!hop_by_hop(&mut plain));
        assert_eq!(plain, headers(&[("accept", "*/*")]));
        let mut socket = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(hop_by_hop(&mut socket));
        assert_eq!(socket, headers(&[("connection", "upgrade"), ("upgrade", "websocket")]));
    }

    #[tokio::test]
    async fn the_head_of_an_answer_is_taken_and_no_byte_more() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nbytes").await.unwrap();
        assert_eq!(read_head(&mut client).await.unwrap(), b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n");
        let mut rest = [0; 5];
        client.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"bytes");
        server.write_all(&[b'x'; 3 * HEAD]).await.unwrap();
        assert!(read_head(&mut client).await.is_err());
    }
}
