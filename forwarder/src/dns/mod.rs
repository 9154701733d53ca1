//! The gateway's DNS: names of ours, names of the host, and the host's resolvers for the rest.
//!
//! ```text
//! UDP 53 (a datagram the stack hands out) ─┐           ┌─ localhost            the guest itself (RFC 6761)
//!                                          ├─► parse ──┼─ zones                gateway. host. <vm>. and their PTRs
//! TCP 53 (socketpair, `serve_stream`) ─────┘    │      ├─ --dns-host records, hosts file
//!                                               │      ├─ cache
//!                                FORMERR NOTIMP ┘      └─ relay ─► resolvers of resolv.conf, or --dns-upstream
//! ```
//! The order is the one above, the first that knows the name answers. hosts entries may add names under our domain,
//! as Docker Desktop's `kubernetes.docker.internal`; else a name in our zones that is not there is NXDOMAIN.
//! resolv.conf and hosts are read again when they change. When no resolver answers the guest gets SERVFAIL.
//!
//! Limits: `IN_FLIGHT_MAX` queries at the resolvers; beyond it a datagram is dropped (the client's own repeat is the
//! back-off) and a stream's query is REFUSED. `STREAMS_MAX` connections, `GUESTS_MAX` names of guests; further ones in
//! `cache`, `relay`, `stream`, `hosts`. RFC 1034, 1035, 2181, 2308, 4343, 5452, 6761, 6891, 7766, 9619.
//! Left out: DoT and DoH, servers per domain, DNSSEC validation (DO, AD and CD are carried), zone transfers and
//! classes other than IN (both REFUSED).

mod cache;
mod hosts;
mod relay;
mod resolv;
mod stream;
#[cfg(test)]
mod tests;
mod watch;
mod wire;
mod zones;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::time::Instant;

use self::cache::Cache;
use self::hosts::{HostsFile, LoopbackAlias};
use self::relay::{Relay, Transport};
pub use self::resolv::ResolvConf;
use self::watch::Watched;
use self::wire::{Data, Name, Query, Rcode, Rejected, kind};
use self::zones::{Book, Zones};

/// What the sandbox lets the resolver do: look whether resolv.conf and the hosts file have changed, and read them.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] =
    crate::sandbox::sandbox_calls![SYS_openat, SYS_statx, SYS_newfstatat];

/// Queries that wait for a resolver of the host at one time.
pub const IN_FLIGHT_MAX: usize = 512;
/// Connections served at one time.
pub const STREAMS_MAX: usize = 256;
/// Guests that have a name.
pub const GUESTS_MAX: usize = 1024;

/// What the DNS service is made of.
#[derive(Debug, Clone)]
pub struct DnsConfig {
    /// The domain of our names, such as `portway.internal`.
    pub domain: String,
    /// Further domains with the same names, such as `docker.internal`.
    pub aliases: Vec<String>,
    /// The gateway's addresses: `gateway.<domain>`.
    pub gateway: Vec<IpAddr>,
    /// The host alias, the addresses by which guests reach the host: `host.<domain>`.
    pub host: Vec<IpAddr>,
    /// Whether the host alias leads to the host's loopback: then hosts entries with a loopback address are
    /// answered with the alias, else they are left out.
    pub host_loopback: bool,
    /// The operator's own names, given to guests as they are; under our domain they replace what is there.
    pub records: Vec<(String, IpAddr)>,
    /// The resolvers to ask; `None` follows `resolv_conf`.
    pub upstreams: Option<Vec<SocketAddr>>,
    /// The host's resolv.conf, for resolvers and the search list.
    pub resolv_conf: PathBuf,
    /// The host's hosts file; `None` leaves it out.
    pub hosts: Option<PathBuf>,
}

/// Why the service cannot be made, or a guest cannot have its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DnsError {
    /// Text that is not a domain name.
    #[error(
        "{setting}: {value:?} is not a domain name: labels of 1 to 63 characters with dots between, such as {example}"
    )]
    BadName {
        /// The setting, such as `--dns-host`.
        setting: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        example: &'static str,
    },
    /// The guest's name is not one label of letters, digits, `-` and `_`.
    #[error("guest name {0:?}: 1 to 63 letters, digits, `-` or `_` are needed, such as vm1")]
    BadGuestName(String),
    /// The guest's name is one of ours.
    #[error("guest name {0:?} is taken by the network itself: choose another")]
    Reserved(String),
    /// There are `GUESTS_MAX` guests with names.
    #[error("guest name {0:?}: {GUESTS_MAX} guests have names already")]
    TooManyGuests(String),
}

/// Counters since the start, and what is there now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DnsStats {
    /// Messages received, bad ones included.
    pub queries: u64,
    /// Messages that were no query and got no answer.
    pub ignored: u64,
    /// Queries answered with FORMERR, NOTIMP, BADVERS or REFUSED for what they are.
    pub rejected: u64,
    /// Answered from our zones.
    pub from_zones: u64,
    /// Answered from the hosts file, `--dns-host` records or as localhost.
    pub from_hosts: u64,
    /// Answered from the cache.
    pub from_cache: u64,
    /// Sent to the host's resolvers.
    pub relayed: u64,
    /// Of these, without any answer: SERVFAIL.
    pub failed: u64,
    /// Dropped or refused at `IN_FLIGHT_MAX`.
    pub over_limit: u64,
    /// Answers cut to the size the client takes.
    pub truncated: u64,
    /// Queries at the resolvers now.
    pub in_flight: usize,
    /// Connections now.
    pub streams: usize,
    /// Answers in the cache now.
    pub cached: usize,
    /// Bytes they take.
    pub cached_bytes: usize,
}

#[derive(Debug, Default)]
struct Counters {
    queries: AtomicU64,
    ignored: AtomicU64,
    rejected: AtomicU64,
    from_zones: AtomicU64,
    from_hosts: AtomicU64,
    from_cache: AtomicU64,
    relayed: AtomicU64,
    failed: AtomicU64,
    over_limit: AtomicU64,
    truncated: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The DNS service of one network; shared by the threads that bring queries.
pub struct Dns {
    book: Mutex<Book>,
    zones: RwLock<Arc<Zones>>,
    records: HostsFile,
    loopback: LoopbackAlias,
    hosts: Option<Watched<HostsFile>>,
    resolv: Watched<ResolvConf>,
    upstreams: Option<Vec<SocketAddr>>,
    relay: Relay,
    cache: Mutex<Cache>,
    in_flight: AtomicUsize,
    streams: AtomicUsize,
    counters: Counters,
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Dns {
    /// The service `config` describes. Files are read at the first query, not here.
    ///
    /// # Errors
    /// `DnsError::BadName` for a domain, alias or record whose name is none.
    pub fn new(config: DnsConfig) -> Result<Arc<Self>, DnsError> {
        let name = |setting, value: &str, example| {
            Name::from_text(value).ok_or_else(|| DnsError::BadName {
                setting,
                value: value.to_owned(),
                example,
            })
        };
        let mut origins = vec![name("dns domain", &config.domain, "portway.internal")?];
        for alias in &config.aliases {
            let alias = name("dns alias", alias, "docker.internal")?;
            if !origins.contains(&alias) {
                origins.push(alias);
            }
        }
        let mut records = Vec::with_capacity(config.records.len());
        for (text, address) in &config.records {
            records.push((name("--dns-host", text, "db.example=192.0.2.7")?, *address));
        }
        let mut table = HostsFile::default();
        for (name, address) in &records {
            table.insert(name.clone(), *address);
        }
        let loopback = LoopbackAlias(if config.host_loopback { config.host.clone() } else { Vec::new() });
        let book = Book {
            origins,
            gateway: config.gateway,
            host: config.host,
            guests: BTreeMap::new(),
            records,
            serial: 1,
        };
        Ok(Arc::new(Self {
            zones: RwLock::new(Arc::new(Zones::build(&book))),
            book: Mutex::new(book),
            records: table,
            loopback,
            hosts: config.hosts.map(|path| Watched::new(path, HostsFile::parse)),
            resolv: Watched::new(config.resolv_conf, ResolvConf::parse),
            upstreams: config.upstreams,
            relay: Relay::default(),
            cache: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            streams: AtomicUsize::new(0),
            counters: Counters::default(),
        }))
    }

    /// The answer to one datagram; `None` when none is to be sent: it is no query, or `IN_FLIGHT_MAX` is reached.
    /// Runs on tokio, for at most 5 s; dropping the future gives the query up.
    pub async fn answer_datagram(&self, query: &[u8]) -> Option<Vec<u8>> {
        self.answer(query, Transport::Datagram).await
    }

    /// Names a guest: `<name>.<domain>`, under every alias too, and the PTR of each address. What the name stood
    /// for before is replaced; no addresses take it away.
    ///
    /// # Errors
    /// The name is none, is ours (`gateway`, `host`), or there are `GUESTS_MAX`.
    pub fn set_guest(&self, name: &str, addresses: &[IpAddr]) -> Result<(), DnsError> {
        let label = name.to_ascii_lowercase();
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if !(1..=63).contains(&label.len()) || !label.bytes().all(legal) {
            return Err(DnsError::BadGuestName(name.to_owned()));
        }
        if label == "gateway" || label == "host" {
            return Err(DnsError::Reserved(name.to_owned()));
        }
        let mut book = lock(&self.book);
        if addresses.is_empty() {
            book.guests.remove(&label);
        } else {
            if !book.guests.contains_key(&label) && book.guests.len() >= GUESTS_MAX {
                return Err(DnsError::TooManyGuests(name.to_owned()));
            }
            book.guests.insert(label, addresses.to_vec());
        }
        self.publish(&mut book);
        Ok(())
    }

    /// Takes a guest's name and PTRs away; an unknown name changes nothing.
    pub fn remove_guest(&self, name: &str) {
        let mut book = lock(&self.book);
        if book.guests.remove(&name.to_ascii_lowercase()).is_some() {
            self.publish(&mut book);
        }
    }

    /// The host's search domains now, for DHCP option 119.
    #[must_use]
    pub fn search(&self) -> Vec<String> {
        self.resolv_conf().search.clone()
    }

    /// The resolvers that are asked now.
    #[must_use]
    pub fn upstreams(&self) -> Vec<SocketAddr> {
        if let Some(configured) = &self.upstreams {
            return configured.clone();
        }
        self.resolv_conf().servers.clone()
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> DnsStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (cached, cached_bytes) = lock(&self.cache).size();
        DnsStats {
            queries: get(&self.counters.queries),
            ignored: get(&self.counters.ignored),
            rejected: get(&self.counters.rejected),
            from_zones: get(&self.counters.from_zones),
            from_hosts: get(&self.counters.from_hosts),
            from_cache: get(&self.counters.from_cache),
            relayed: get(&self.counters.relayed),
            failed: get(&self.counters.failed),
            over_limit: get(&self.counters.over_limit),
            truncated: get(&self.counters.truncated),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            streams: self.streams.load(Ordering::Relaxed),
            cached,
            cached_bytes,
        }
    }

    fn resolv_conf(&self) -> Arc<ResolvConf> {
        let (conf, changed) = self.resolv.current(Instant::now());
        if changed {
            // Another network, or a VPN came or went: what was learned may be wrong now.
            self.relay.reset();
            lock(&self.cache).clear();
        }
        conf
    }

    async fn answer(&self, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        count(&self.counters.queries);
        let query = match Query::parse(bytes) {
            Ok(query) => query,
            Err(Rejected::Silently) => {
                count(&self.counters.ignored);
                return None;
            }
            Err(Rejected::With(answer)) => {
                count(&self.counters.rejected);
                return Some(answer);
            }
        };
        let answer = match self.reject(&query) {
            Some(rcode) => {
                count(&self.counters.rejected);
                query.error(rcode)
            }
            None => match self.answer_locally(&query).await {
                Some(answer) => answer,
                None => self.answer_from_upstream(&query, transport).await?,
            },
        };
        let limit = match transport {
            Transport::Datagram => query.datagram_limit(),
            Transport::Stream => usize::from(u16::MAX),
        };
        if answer.len() > limit {
            count(&self.counters.truncated);
        }
        Some(query.fit(answer, limit))
    }

    /// The code for well-formed queries nobody is to answer.
    fn reject(&self, query: &Query<'_>) -> Option<Rcode> {
        match query {
            q if q.newer_edns() => Some(Rcode::BadVers),
            // A transfer is many messages, and other classes ask about the server itself (RFC 4892).
            q if q.class != kind::IN || matches!(q.kind, kind::AXFR | kind::IXFR) => Some(Rcode::Refused),
            _ => None,
        }
    }

    async fn answer_locally(&self, query: &Query<'_>) -> Option<Vec<u8>> {
        if let Some(answer) = localhost(query) {
            count(&self.counters.from_hosts);
            return Some(answer);
        }
        let zones = Arc::clone(&self.zones.read().unwrap_or_else(PoisonError::into_inner));
        if !zones.names(&query.name) {
            let from_file = || {
                let (file, _) = self.hosts.as_ref()?.current(Instant::now());
                file.answer(query, Some(&self.loopback))
            };
            if let Some(answer) = self.records.answer(query, None).or_else(from_file) {
                count(&self.counters.from_hosts);
                return Some(answer);
            }
            if !zones.contain(&query.name) {
                return None;
            }
        }
        count(&self.counters.from_zones);
        Some(zones.answer(query).await)
    }

    async fn answer_from_upstream(&self, query: &Query<'_>, transport: Transport) -> Option<Vec<u8>> {
        let servers = self.upstreams(); // first: new servers empty the cache
        let generation = {
            let mut cache = lock(&self.cache);
            if let Some(answer) = cache.lookup(query, Instant::now()) {
                count(&self.counters.from_cache);
                return Some(answer);
            }
            cache.generation()
        };
        let Some(_place) = Place::take(&self.in_flight, IN_FLIGHT_MAX) else {
            count(&self.counters.over_limit);
            return (transport == Transport::Stream).then(|| query.error(Rcode::Refused));
        };
        count(&self.counters.relayed);
        match self.relay.ask(query, transport, &servers).await {
            Some(reply) => {
                lock(&self.cache).store(query, &reply, generation, Instant::now());
                Some(reply)
            }
            None => {
                count(&self.counters.failed);
                Some(query.error(Rcode::ServFail))
            }
        }
    }

    fn take_stream_place(&self) -> Option<Place<'_>> {
        Place::take(&self.streams, STREAMS_MAX)
    }

    fn publish(&self, book: &mut Book) {
        book.serial = book.serial.wrapping_add(1);
        let zones = Arc::new(Zones::build(book));
        *self.zones.write().unwrap_or_else(PoisonError::into_inner) = zones;
    }
}

/// `localhost` and what is under it is the guest's own, whatever a resolver says (RFC 6761 §6.3).
fn localhost(query: &Query<'_>) -> Option<Vec<u8>> {
    if query.name.ends_in("localhost") {
        let v4 = Data::Address(Ipv4Addr::LOCALHOST.into());
        let v6 = Data::Address(Ipv6Addr::LOCALHOST.into());
        let data: &[Data<'_>] = match query.kind {
            kind::A => &[v4],
            kind::AAAA => &[v6],
            kind::ANY => &[v4, v6],
            _ => &[],
        };
        return Some(query.answer(hosts::TTL, data));
    }
    let address = hosts::reversed(&query.name).filter(IpAddr::is_loopback)?;
    let name = Name::from_text("localhost").filter(|_| address.is_loopback())?;
    let data = [Data::Pointer(&name)];
    Some(query.answer(hosts::TTL, if query.kind == kind::PTR { &data } else { &[] }))
}

/// One of a limited number of places, given back when dropped.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(taken: &'a AtomicUsize, limit: usize) -> Option<Self> {
        let next = |n: usize| (n < limit).then(|| n.saturating_add(1));
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok().map(|_| Self(taken))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A lock whose holder panicked still guards whole data: every critical section here is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
