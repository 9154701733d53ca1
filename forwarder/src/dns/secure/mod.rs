//! Resolvers that are asked where nobody on the way can read or change it: over TLS (RFC 7858) and over HTTPS (RFC 8484).
//!
//! ```text
//! message ─► the server's line ─┬─ open ─► many messages at once, answers in any order
//!                               └─ none ─► TCP ─► TLS, the certificate checked ─► HTTP/2, for HTTPS
//! ```
//! Strict (RFC 8310 §5): a server whose certificate is not good for the configured name is not asked, and nothing is ever
//! sent to it in clear. Each server has one line, opened by the first message; it is given up when nothing was sent for
//! [`IDLE`], when the server ends it, and when the host's network changes. A line that is found dead in the attempt is replaced
//! once: a server may end it at any time (RFC 7766 §6.2.1). Messages are filled up to [`BLOCK`] bytes, so that their length does
//! not tell the name (RFC 8467 §4.1).
//!
//! Servers are configured, so there are as many lines as are named; messages under way are bounded where queries come in. An
//! answer is at most 65 535 bytes. Left out: HTTP/1.1 and HTTP/3, DNS over QUIC, the opportunistic profile, which
//! would fall back to what anybody can read.

mod https;
mod tls;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep_until};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto, version};

use super::lock;
use super::server::{Channel, Server};

/// How long a line stays without a message (RFC 7858 §3.4: closed by the client when idle).
pub(super) const IDLE: Duration = Duration::from_secs(30);
/// Messages are filled up to a multiple of this.
pub(super) const BLOCK: usize = 128;
/// Largest answer there is: its length has two bytes.
const ANSWER_MAX: usize = 65_535;

/// Why no certificate can be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The operator's file of authorities.
    #[error("--dns-ca {path}: {reason}: a file of certificates in PEM form is needed")]
    BadAuthorities {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The host knows no authority.
    #[error(
        "--dns-upstream tls:// or https://: this host has no certificates of authorities ({0}): install the package \
         ca-certificates, or name a file with --dns-ca"
    )]
    NoAuthorities(String),
}

/// The lines to all servers that want one.
#[derive(Default)]
pub(super) struct Lines {
    connect: Option<Connect>,
    places: Mutex<HashMap<Server, Arc<Place>>>,
}

/// TLS as the two kinds of servers want it.
struct Connect {
    tls: TlsConnector,
    https: TlsConnector,
}

/// Where a server's line is. Who opens it holds the lock; the others wait for the same one.
#[derive(Default)]
struct Place(AsyncMutex<Option<Held>>);

struct Held {
    line: Line,
    /// Tells this line from one that took its place.
    number: u64,
    used: Instant,
}

#[derive(Clone)]
enum Line {
    Tls(tls::Line),
    Https(https::Line),
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines").field("places", &lock(&self.places).len()).finish_non_exhaustive()
    }
}

impl Lines {
    /// Lines to servers whose certificates come from an authority in the PEM file `authorities`; `None`: one of the host's.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn new(authorities: Option<&Path>) -> Result<Self, TlsError> {
        let roots = match authorities {
            Some(path) => roots_of(path)?,
            None => roots_of_the_host()?,
        };
        let roots = Arc::new(roots);
        let connector = |protocol: &[u8]| {
            let provider = Arc::new(crypto::ring::default_provider());
            // The versions are this provider's own, so that it cannot refuse them.
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&version::TLS13, &version::TLS12])
                .expect("ring has the ciphers of TLS 1.2 and 1.3")
                .with_root_certificates(Arc::clone(&roots))
                .with_no_client_auth();
            config.alpn_protocols = vec![protocol.to_vec()];
            TlsConnector::from(Arc::new(config))
        };
        // RFC 7858 §3.1 knows no name for ALPN, "dot" was registered later (IANA); a server that has no ALPN ignores it.
        let connect = Connect { tls: connector(b"dot"), https: connector(b"h2") };
        Ok(Self { connect: Some(connect), places: Mutex::default() })
    }

    /// Sends `message` to `server`; its answer, whatever it says.
    ///
    /// # Errors
    /// When the server cannot be reached, does not show a good certificate, or ends the line twice.
    pub(super) async fn ask(&self, server: &Server, message: &[u8]) -> io::Result<Vec<u8>> {
        let place = Arc::clone(lock(&self.places).entry(server.clone()).or_default());
        let mut tried_again = false;
        loop {
            let (line, number, was_open) = self.line(server, &place).await?;
            let answer = match &line {
                Line::Tls(line) => line.ask(message).await,
                Line::Https(line) => line.ask(message).await,
            };
            match answer {
                // What is no DNS message was said by a server that is there.
                Err(error) if was_open && !tried_again && error.kind() != io::ErrorKind::InvalidData => {
                    tracing::debug!(%server, %error, "the line is dead: another is opened");
                    place.forget(number).await;
                    tried_again = true;
                }
                answer => return answer,
            }
        }
    }

    /// Gives every line up: the host is in another network.
    pub(super) fn reset(&self) {
        lock(&self.places).clear();
    }

    /// The line to `server`, and whether it was there before.
    async fn line(&self, server: &Server, place: &Arc<Place>) -> io::Result<(Line, u64, bool)> {
        let mut held = place.0.lock().await;
        if let Some(held) = held.as_mut().filter(|held| held.line.is_open()) {
            held.used = Instant::now();
            return Ok((held.line.clone(), held.number, true));
        }
        let line = self.open(server).await?;
        let number = held.as_ref().map_or(0, |old| old.number.wrapping_add(1));
        *held = Some(Held { line: line.clone(), number, used: Instant::now() });
        tokio::spawn(close_when_idle(Arc::downgrade(place), number));
        Ok((line, number, false))
    }

    async fn open(&self, server: &Server) -> io::Result<Line> {
        let connect = self.connect.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        match &server.channel {
            Channel::Clear => Err(io::ErrorKind::Unsupported.into()),
            Channel::Tls { name } => {
                let stream = connected(&connect.tls, server, name).await?;
                Ok(Line::Tls(tls::Line::over(stream)))
            }
            Channel::Https { name, path } => {
                let stream = connected(&connect.https, server, name).await?;
                if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        "the server does not speak HTTP/2",
                    ));
                }
                Ok(Line::Https(https::Line::over(stream, name, path, server.address.port()).await?))
            }
        }
    }
}

impl Line {
    fn is_open(&self) -> bool {
        match self {
            Self::Tls(line) => line.is_open(),
            Self::Https(line) => line.is_open(),
        }
    }
}

impl Place {
    async fn forget(&self, number: u64) {
        self.0.lock().await.take_if(|held| held.number == number);
    }
}

/// Lets a line go when it was not used for [`IDLE`]; with it goes its connection, when its last answer is there.
async fn close_when_idle(place: Weak<Place>, number: u64) {
    let mut at = Instant::now() + IDLE;
    loop {
        sleep_until(at).await;
        let Some(place) = place.upgrade() else { return };
        let mut held = place.0.lock().await;
        let Some(line) = held.as_ref().filter(|held| held.number == number) else { return };
        at = line.used + IDLE;
        if at <= Instant::now() || !line.line.is_open() {
            *held = None;
            return;
        }
    }
}

async fn connected(
    connector: &TlsConnector,
    server: &Server,
    name: &ServerName<'static>,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(server.address).await?;
    // Messages are small and each waits for its answer.
    stream.set_nodelay(true)?;
    connector.connect(name.clone(), stream).await
}

fn roots_of(path: &Path) -> Result<RootCertStore, TlsError> {
    let bad = |reason: String| TlsError::BadAuthorities { path: path.to_owned(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))? {
        let certificate = certificate.map_err(|error| bad(error.to_string()))?;
        roots.add(certificate).map_err(|error| bad(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(bad("no certificate is in it".into()));
    }
    Ok(roots)
}

fn roots_of_the_host() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // A host's store may hold some that are too old to be read; the others serve.
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let reason = found.errors.first().map_or_else(|| "none found".into(), ToString::to_string);
        return Err(TlsError::NoAuthorities(reason));
    }
    Ok(roots)
}
