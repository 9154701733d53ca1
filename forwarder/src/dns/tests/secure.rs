//! Resolvers over TLS and HTTPS: a resolver with a certificate of the test's own authority.

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::{ServerConfig, crypto, version};
use tokio_rustls::server::TlsStream;

use super::*;
use crate::dns::secure::{BLOCK, IDLE};
use crate::dns::stream::{next_message, read_some, write_message};

/// The name in the resolvers' certificates, besides 127.0.0.1.
const NAME: &str = "dns.example";

/// Who signs certificates, and the file that says so.
struct Authority {
    params: CertificateParams,
    key: KeyPair,
    dir: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { params, key, dir }
    }

    fn acceptor(&self, protocol: &[u8]) -> TlsAcceptor {
        let params = CertificateParams::new(vec![NAME.into(), "127.0.0.1".into()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key)).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![signed.into()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        config.alpn_protocols = vec![protocol.to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    fn dns(&self, upstream: &str) -> Arc<Dns> {
        let upstreams = vec![upstream.parse().unwrap()];
        let authorities = Some(self.dir.path().join("ca.pem"));
        Dns::new(DnsConfig { upstreams, authorities, ..config() }).unwrap()
    }
}

/// What a resolver has seen.
#[derive(Default)]
struct Seen {
    connections: usize,
    /// Those that have ended.
    ended: usize,
    lengths: Vec<usize>,
}

/// A resolver that answers `answers` queries of each connection, the odd ones before the even ones, and then closes it.
struct Secure {
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
}

impl Secure {
    async fn tls(authority: &Authority, answers: usize) -> Self {
        Self::start(authority.acceptor(b"dot"), move |stream, seen| over_tls(stream, seen, answers)).await
    }

    async fn https(authority: &Authority) -> Self {
        Self::start(authority.acceptor(b"h2"), over_https).await
    }

    async fn start<F: Future<Output = ()> + Send + 'static>(
        acceptor: TlsAcceptor,
        serve: impl Fn(TlsStream<TcpStream>, Arc<Mutex<Seen>>) -> F + Clone + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let log = Arc::clone(&seen);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                log.lock().unwrap().connections += 1;
                let (acceptor, log, serve) = (acceptor.clone(), Arc::clone(&log), serve.clone());
                tokio::spawn(async move {
                    // A client that does not like the certificate goes.
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve(stream, Arc::clone(&log)).await;
                    }
                    log.lock().unwrap().ended += 1;
                });
            }
        });
        Self { address, seen }
    }

    fn seen<T>(&self, what: impl FnOnce(&Seen) -> T) -> T {
        what(&self.seen.lock().unwrap())
    }
}

async fn over_tls(mut stream: TlsStream<TcpStream>, seen: Arc<Mutex<Seen>>, mut answers: usize) {
    let mut received = Vec::new();
    let mut held: Option<Vec<u8>> = None;
    while answers > 0 && read_some(&mut stream, &mut received).await.is_ok_and(|n| n > 0) {
        while let Some(message) = next_message(&mut received) {
            seen.lock().unwrap().lengths.push(message.len());
            let asked = Message::from_vec(&message).unwrap();
            let reply = address_reply(&asked, "192.0.2.1", 60).to_vec().unwrap();
            if asked.queries[0].name().to_ascii().starts_with("second") {
                held = Some(reply);
                continue;
            }
            for reply in std::iter::once(reply).chain(held.take()) {
                write_message(&mut stream, &reply).await.unwrap();
                answers = answers.saturating_sub(1);
            }
        }
    }
    let _ = stream.shutdown().await;
}

async fn over_https(stream: TlsStream<TcpStream>, seen: Arc<Mutex<Seen>>) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let seen = Arc::clone(&seen);
        async move {
            assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/q"));
            assert_eq!(request.headers()["content-type"], "application/dns-message");
            let host = request.uri().authority().unwrap().host().to_owned();
            let message = request.into_body().collect().await.unwrap().to_bytes();
            seen.lock().unwrap().lengths.push(message.len());
            let asked = Message::from_vec(&message).unwrap();
            assert_eq!(asked.metadata.id, 0, "for caches");
            let name = asked.queries[0].name().to_ascii();
            let reply = address_reply(&asked, "192.0.2.2", 60).to_vec().unwrap();
            let kind = if name.starts_with("page.") { "text/html" } else { "application/dns-message" };
            let status = if name.starts_with("busy.") || host != NAME { 503 } else { 200 };
            Response::builder()
                .status(status)
                .header("content-type", kind)
                .body(Full::new(Bytes::from(reply)))
        }
    });
    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

/// Until `done`, in true time: TLS and its sockets know no other.
async fn until(done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "not in time");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn queries_share_one_tls_connection_padded_and_answers_may_overtake_each_other() {
    let authority = Authority::new();
    let server = Secure::tls(&authority, usize::MAX).await;
    let dns = authority.dns(&format!("tls://{}#{NAME}", server.address));
    assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await), ["192.0.2.1"]);
    let (second, first) = tokio::join!(lookup(&dns, "second.example.", RecordType::A), async {
        until(|| server.seen(|s| s.lengths.len()) == 2).await;
        lookup(&dns, "first.example.", RecordType::A).await
    });
    assert_eq!((data(&first), data(&second)), (vec!["192.0.2.1".into()], vec!["192.0.2.1".into()]));
    server.seen(|s| {
        assert_eq!((s.connections, s.lengths.len()), (1, 3));
        assert!(s.lengths.iter().all(|n| n % BLOCK == 0), "{:?}", s.lengths);
    });
}

#[tokio::test]
async fn a_tls_connection_that_the_server_closed_is_opened_again() {
    let authority = Authority::new();
    let server = Secure::tls(&authority, 1).await;
    let dns = authority.dns(&format!("tls://{}", server.address));
    for n in 1..=3 {
        let answer = lookup(&dns, &format!("n{n}.example."), RecordType::A).await;
        assert_eq!(data(&answer), ["192.0.2.1"], "the certificate has the address as well");
        until(|| server.seen(|s| s.ended) == n).await;
    }
    assert_eq!(server.seen(|s| s.connections), 3);
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let authority = Authority::new();
    for https in [false, true] {
        let server = if https { Secure::https(&authority).await } else { Secure::tls(&authority, 9).await };
        let scheme = if https { "https" } else { "tls" };
        let path = if https { "/q" } else { "" };
        let dns = authority.dns(&format!("{scheme}://{}{path}#{NAME}", server.address));
        assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await).len(), 1);
        assert_eq!(server.seen(|s| s.ended), 0);
        tokio::time::pause();
        advance(IDLE + Duration::from_secs(1)).await;
        tokio::time::resume();
        until(|| server.seen(|s| s.ended) == 1).await;
    }
}

#[tokio::test]
async fn a_server_with_another_name_or_authority_is_told_nothing_and_the_guest_gets_servfail() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for (who, name) in [(&authority, "other.example"), (&stranger, NAME)] {
        let server = Secure::tls(&authority, 9).await;
        let dns = who.dns(&format!("tls://{}#{name}", server.address));
        assert_eq!(code(&lookup(&dns, "www.example.", RecordType::A).await), ResponseCode::ServFail);
        server.seen(|s| assert!(s.connections > 0 && s.lengths.is_empty()));
    }
}

#[tokio::test]
async fn https_carries_queries_as_posts_and_what_is_no_dns_message_is_no_answer() {
    let authority = Authority::new();
    let server = Secure::https(&authority).await;
    let dns = authority.dns(&format!("https://{}/q#{NAME}", server.address));
    let (one, two) = tokio::join!(
        lookup(&dns, "one.example.", RecordType::A),
        lookup(&dns, "two.example.", RecordType::A)
    );
    assert_eq!((data(&one), data(&two)), (vec!["192.0.2.2".into()], vec!["192.0.2.2".into()]));
    for name in ["page.example.", "busy.example."] {
        assert_eq!(code(&lookup(&dns, name, RecordType::A).await), ResponseCode::ServFail);
    }
    // A message of a client's own, with an option that is for it alone, goes as it is.
    let mut asked = with_edns(query("www.example.", RecordType::A), 1232);
    let option = hickory_proto::rr::rdata::opt::EdnsOption::Unknown(65001, vec![1, 2, 3]);
    asked.edns.as_mut().unwrap().options_mut().insert(option);
    assert_eq!(data(&ask(&dns, &asked).await), ["192.0.2.2"]);
    assert_eq!(server.seen(|s| s.connections), 1);
}

#[tokio::test]
async fn a_server_that_does_not_speak_the_protocol_is_no_resolver() {
    let authority = Authority::new();
    let server = Secure::tls(&authority, 9).await;
    let dns = authority.dns(&format!("https://{}/q#{NAME}", server.address));
    assert_eq!(code(&lookup(&dns, "www.example.", RecordType::A).await), ResponseCode::ServFail);
    assert!(server.seen(|s| s.lengths.is_empty()));
}

#[tokio::test]
async fn a_file_without_certificates_is_the_operators_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    let error = || {
        let upstreams = vec!["tls://192.0.2.53".parse().unwrap()];
        let made = Dns::new(DnsConfig { upstreams, authorities: Some(file.clone()), ..config() });
        made.map(drop).unwrap_err().to_string()
    };
    assert!(error().starts_with("--dns-ca "), "{}", error());
    std::fs::write(&file, "nothing of the kind").unwrap();
    assert!(error().contains("no certificate is in it"), "{}", error());
    std::fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    assert!(error().contains("PEM form is needed"), "{}", error());
}
