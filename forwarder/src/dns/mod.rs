//! The gateway's DNS service, over UDP and TCP.
//!
//! ```text
//!  query ─► names of our own (zones) ─► names given by the operator ─► hosts file ─► cache ─► relay ─► host's resolvers
//! ```
//! Our zones are answered by hickory-server's `Catalog`, with authority and a SOA, so that a name without the asked type
//! (NODATA) is not a name that does not exist (NXDOMAIN). Everything else is relayed as the bytes it came in, so that
//! types, options and flags of the future pass as well; only the id is ours. When no upstream answers within
//! [`relay::PATIENCE`] the guest gets SERVFAIL, never NXDOMAIN.
//!
//! Loopback addresses of the host's hosts file would be the guest's own: they are answered with the host alias.
//!
//! Limits: [`IN_FLIGHT`] queries at once, beyond it a datagram is dropped (the guest asks again) and a stream gets
//! SERVFAIL; [`STREAMS`] connections; the cache's own. Not here: DNSSEC validation, which is the guest's or upstream's.

mod cache;
mod hosts;
mod message;
mod relay;
mod resolv;
mod zones;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};

use self::cache::Cache;
use self::hosts::Hosts;
use self::message::{Question, Rcode};
use self::relay::{Relay, Transport};
use self::zones::Zones;

/// Queries at once.
pub const IN_FLIGHT: usize = 512;
/// Connections at once.
pub const STREAMS: usize = 128;
/// Queries of one connection at once (RFC 7766 §6.2.1.1: pipelined, answered as they come).
const PIPELINED: usize = 64;
/// How long a connection may be silent (RFC 7766 §6.2.3).
const SILENCE: Duration = Duration::from_secs(30);

/// What the service is told when it is made.
#[derive(Debug, Clone)]
pub struct DnsConfig {
    /// The domain of our names.
    pub domain: String,
    /// Domains in which `gateway.` and `host.` are known as well.
    pub aliases: Vec<String>,
    /// The gateway's addresses.
    pub gateway: Vec<IpAddr>,
    /// The host alias's addresses.
    pub host: Vec<IpAddr>,
    /// The operator's names.
    pub records: Vec<(String, IpAddr)>,
    /// Resolvers; `None`: those of `resolv_conf`.
    pub upstreams: Option<Vec<SocketAddr>>,
    /// The host's resolver configuration, read again when it changes.
    pub resolv_conf: PathBuf,
    /// The hosts file, read again when it changes; `None`: none.
    pub hosts: Option<PathBuf>,
}

/// A name of the configuration cannot be one.
#[derive(Debug, thiserror::Error)]
#[error("{name:?} cannot be a name in DNS: {fault}")]
pub struct DnsError {
    name: String,
    fault: String,
}

/// The service.
pub struct Dns {
    zones: Zones,
    records: Hosts,
    hosts: Mutex<Hosts>,
    cache: Mutex<Cache>,
    relay: Relay,
    in_flight: Semaphore,
    streams: Arc<Semaphore>,
}

impl Dns {
    /// A service with our zones.
    ///
    /// # Errors
    /// When a name is none.
    pub fn new(config: DnsConfig) -> Result<Arc<Self>, DnsError> {
        let alias = config.host.clone();
        let relay = Relay::new(config.upstreams.clone(), config.resolv_conf.clone());
        Ok(Arc::new(Self {
            zones: Zones::new(&config)?,
            records: Hosts::fixed(&config.records),
            hosts: Mutex::new(Hosts::file(config.hosts, alias)),
            cache: Mutex::new(Cache::new()),
            relay,
            in_flight: Semaphore::new(IN_FLIGHT),
            streams: Arc::new(Semaphore::new(STREAMS)),
        }))
    }

    /// The host's search domains, for DHCP.
    #[must_use]
    pub fn search(&self) -> Vec<String> {
        self.relay.search()
    }

    /// The guests' names and addresses as they are now: `NAME.portway.internal`, and PTR.
    pub fn set_guests(&self, guests: &[(String, IpAddr)]) {
        self.zones.set_guests(guests);
    }

    /// The answer to one datagram; `None` when there is none to give.
    pub async fn answer_datagram(&self, query: &[u8]) -> Option<Vec<u8>> {
        let _place = self.in_flight.try_acquire().ok()?;
        let answer = self.answer(query, Transport::Udp).await?;
        Some(message::fit(answer, message::udp_size(query)))
    }

    /// Serves one connection until it ends.
    pub async fn serve_stream(self: Arc<Self>, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Ok(_place) = Arc::clone(&self.streams).try_acquire_owned() else { return };
        let (mut read, mut write) = tokio::io::split(stream);
        let (answers, mut ready) = mpsc::channel::<Vec<u8>>(PIPELINED);
        let pipelined = Arc::new(Semaphore::new(PIPELINED));
        let reader = async {
            loop {
                let Ok(place) = Arc::clone(&pipelined).acquire_owned().await else { return };
                let next = async {
                    let len = read.read_u16().await?;
                    let mut query = vec![0; usize::from(len)];
                    read.read_exact(&mut query).await.map(|_| query)
                };
                let Ok(Ok(query)) = tokio::time::timeout(SILENCE, next).await else { return };
                let (dns, answers) = (Arc::clone(&self), answers.clone());
                tokio::spawn(async move {
                    let _place = place;
                    let answer = match dns.in_flight.try_acquire() {
                        Ok(_place) => dns.answer(&query, Transport::Tcp).await,
                        Err(_) => Question::parse(&query).ok().map(|q| q.error(&query, Rcode::ServFail)),
                    };
                    if let Some(answer) = answer {
                        let _ = answers.send(answer).await;
                    }
                });
            }
        };
        let writer = async {
            while let Some(answer) = ready.recv().await {
                let Ok(len) = u16::try_from(answer.len()) else { continue };
                let framed = [&len.to_be_bytes()[..], &answer].concat();
                let sent = tokio::time::timeout(SILENCE, write.write_all(&framed)).await;
                if !matches!(sent, Ok(Ok(()))) {
                    return;
                }
            }
        };
        tokio::pin!(writer);
        tokio::select! {
            () = reader => {}
            () = &mut writer => return,
        }
        // Answers under way are still given when the guest has only ended its own direction.
        drop(answers);
        let _ = tokio::time::timeout(relay::PATIENCE, writer).await;
    }

    async fn answer(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let question = match Question::parse(query) {
            Ok(question) => question,
            Err(message::Fault::NoQuery) => return None,
            Err(message::Fault::Answer(answer)) => return Some(answer),
        };
        if self.zones.holds(&question.name) {
            return Some(
                self.zones.answer(query).await.unwrap_or_else(|| question.error(query, Rcode::ServFail)),
            );
        }
        if let Some(addresses) = self.records.lookup(&question) {
            return Some(question.answer(query, &addresses));
        }
        let from_hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner).lookup_fresh(&question);
        if let Some(addresses) = from_hosts {
            return Some(question.answer(query, &addresses));
        }
        let now = std::time::Instant::now();
        if let Some(answer) =
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(now, &question, query)
        {
            return Some(answer);
        }
        let Some(answer) = self.relay.ask(query, &question, transport).await else {
            return Some(question.error(query, Rcode::ServFail));
        };
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).put(now, &question, query, &answer);
        Some(answer)
    }
}

#[cfg(test)]
mod tests;
