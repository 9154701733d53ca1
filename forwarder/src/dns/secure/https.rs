//! A line over HTTPS: each message is the body of a POST on one HTTP/2 connection (RFC 8484 §4.1, §5.2).
//!
//! A connection whose server does not answer a ping for [`PING`] while it owes answers has gone.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;

use super::ANSWER_MAX;

/// The body's type (RFC 8484 §6).
const MESSAGE: &str = "application/dns-message";
/// How often a server that owes answers is asked whether it is there, and how long it has to say so.
const PING: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(super) struct Line {
    requests: SendRequest<Full<Bytes>>,
    uri: Uri,
}

impl Line {
    pub(super) async fn over(
        stream: TlsStream<TcpStream>,
        name: &ServerName<'static>,
        path: &str,
        port: u16,
    ) -> io::Result<Self> {
        let host = match name {
            ServerName::IpAddress(ip) => match std::net::IpAddr::from(*ip) {
                std::net::IpAddr::V4(ip) => ip.to_string(),
                std::net::IpAddr::V6(ip) => format!("[{ip}]"),
            },
            name => name.to_str().into_owned(),
        };
        let authority =
            if port == super::super::server::HTTPS_PORT { host } else { format!("{host}:{port}") };
        let uri = Uri::builder().scheme("https").authority(authority).path_and_query(path);
        let uri = uri.build().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let (requests, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // It ends with the last request when nobody holds the line any more.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a resolver's HTTPS connection has ended");
            }
        });
        Ok(Self { requests, uri })
    }

    pub(super) fn is_open(&self) -> bool {
        !self.requests.is_closed()
    }

    pub(super) async fn ask(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        let mut requests = self.requests.clone();
        requests.ready().await.map_err(io::Error::other)?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(header::CONTENT_TYPE, MESSAGE)
            .header(header::ACCEPT, MESSAGE)
            .body(Full::new(Bytes::copy_from_slice(message)))
            .map_err(io::Error::other)?;
        let response = requests.send_request(request).await.map_err(io::Error::other)?;
        let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if response.status() != StatusCode::OK {
            return wrong(format!("the server says {}", response.status()));
        }
        // RFC 8484 §5.1: what is not said to be a DNS message is none.
        if response.headers().get(header::CONTENT_TYPE).is_none_or(|kind| kind != MESSAGE) {
            return wrong("the answer is not a DNS message".into());
        }
        let body =
            Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(io::Error::other)?;
        Ok(body.to_bytes().into())
    }
}
