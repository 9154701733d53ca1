//! Resolvers over TLS and HTTPS, with certificates of an authority of the test's own. What they say is what
//! [`crate::resolver::Resolver`] says.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::{ServerConfig, crypto, version};
use tokio_rustls::server::TlsStream;

use crate::resolver::reply_to;

/// The name in the certificates.
pub const NAME: &str = "dns.example";

/// Who signs certificates.
#[derive(Debug)]
pub struct Authority {
    params: CertificateParams,
    key: KeyPair,
    file: PathBuf,
}

impl Authority {
    /// A new one, whose own certificate is written to `ca.pem` in `dir`.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn new(dir: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let file = dir.join("ca.pem");
        std::fs::write(&file, params.self_signed(&key)?.pem())?;
        Ok(Self { params, key, file })
    }

    /// Its certificate.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn acceptor(&self, protocol: &[u8]) -> Result<TlsAcceptor> {
        let params = CertificateParams::new(vec![NAME.into()])?;
        let key = KeyPair::generate()?;
        let signed = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_protocol_versions(&[&version::TLS12, &version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![signed.into()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// A resolver on loopback. Runs until the process ends.
#[derive(Debug, Clone)]
pub struct SecureResolver {
    /// Where it is.
    pub address: SocketAddr,
    asked: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
}

impl SecureResolver {
    /// One that is asked over TLS (RFC 7858).
    ///
    /// # Errors
    /// When there is no port left.
    pub fn tls(authority: &Authority, answer: [u8; 4]) -> Result<Self> {
        Self::start(authority.acceptor(b"dot")?, move |stream, asked| over_tls(stream, asked, answer))
    }

    /// One that is asked over HTTPS, at `/dns-query` (RFC 8484).
    ///
    /// # Errors
    /// When there is no port left.
    pub fn https(authority: &Authority, answer: [u8; 4]) -> Result<Self> {
        Self::start(authority.acceptor(b"h2")?, move |stream, asked| over_https(stream, asked, answer))
    }

    /// Queries it had.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Connections it had.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn start<F: Future<Output = ()> + Send + 'static>(
        acceptor: TlsAcceptor,
        serve: impl Fn(TlsStream<TcpStream>, Arc<AtomicUsize>) -> F + Send + 'static,
    ) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (asked, connections) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let resolver = Self { address, asked: Arc::clone(&asked), connections: Arc::clone(&connections) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                while let Ok((stream, _)) = listener.accept().await {
                    connections.fetch_add(1, Ordering::Relaxed);
                    // A client that does not like the certificate goes.
                    let Ok(stream) = acceptor.accept(stream).await else { continue };
                    tokio::spawn(serve(stream, Arc::clone(&asked)));
                }
            });
        });
        Ok(resolver)
    }
}

async fn over_tls(mut stream: TlsStream<TcpStream>, asked: Arc<AtomicUsize>, answer: [u8; 4]) {
    while let Ok(length) = stream.read_u16().await {
        let mut query = vec![0; usize::from(length)];
        if stream.read_exact(&mut query).await.is_err() {
            return;
        }
        asked.fetch_add(1, Ordering::Relaxed);
        let Some(reply) = reply_to(&query, answer, true) else { return };
        let length = u16::try_from(reply.len()).unwrap_or(0).to_be_bytes();
        if stream.write_all(&[&length[..], &reply].concat()).await.is_err() {
            return;
        }
    }
}

async fn over_https(stream: TlsStream<TcpStream>, asked: Arc<AtomicUsize>, answer: [u8; 4]) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let asked = Arc::clone(&asked);
        async move {
            let right = request.method() == "POST" && request.uri().path() == "/dns-query";
            let query = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            asked.fetch_add(1, Ordering::Relaxed);
            let reply = reply_to(&query, answer, true).unwrap_or_default();
            let mut response = Response::new(Full::new(Bytes::from(reply)));
            *response.status_mut() = if right { hyper::StatusCode::OK } else { hyper::StatusCode::NOT_FOUND };
            let kind = hyper::header::HeaderValue::from_static("application/dns-message");
            response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
            Ok::<_, Infallible>(response)
        }
    });
    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    // A client that goes is not a fault.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}
