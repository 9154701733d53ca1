//! The gateway's DNS: names of ours, names of the host, and the host's resolvers for the rest.
//!
//! ```text
//! UDP 53 (a datagram the stack hands out) ─┐           ┌─ localhost            the guest itself (RFC 6761)
//!                                          │           ├─ patterns             zones of gvproxy's file and API
//!                                          ├─► parse ──┼─ zones                gateway. host. <vm>. and their PTRs
//! TCP 53 (socketpair, `serve_stream`) ─────┘    │      ├─ --dns-host records, hosts file
//!                                               │      ├─ cache
//!                                FORMERR NOTIMP ┘      └─ relay ─► resolvers of resolv.conf, or --dns-upstream (in clear, TLS, HTTPS)
//! ```
//! The order is the one above, the first that knows the name answers. hosts entries may add names under our domain,
//! as Docker Desktop's `kubernetes.docker.internal`; else a name in our zones that is not there is NXDOMAIN.
//! resolv.conf and hosts are read again when they change. When no resolver answers the guest gets SERVFAIL.
//!
//! Limits: `IN_FLIGHT_MAX` queries at the resolvers and `STREAMS_MAX` connections, which guests share ([`places`]); beyond
//! them a datagram is dropped (the client's own repeat is the back-off), a stream's query is REFUSED, a connection closed.
//! `GUESTS_MAX` names of guests, `RECORDS_MAX` records; further ones in `cache`, `stream`, `hosts`. RFC 1034, 1035, 2181,
//! 2308, 4343, 4592, 5452, 6303, 6761, 6891, 7766, 7858, 8484, 9619.
//! Left out: DNSSEC validation (DO, AD and CD are carried), zone transfers and classes other than IN (both
//! REFUSED).

mod ask;
pub(crate) mod cache;
mod flights;
mod health;
mod hosts;
mod lookup;
mod patterns;
mod places;
mod rebind;
mod records;
mod relay;
mod reply;
mod resolv;
mod secure;
mod server;
pub(crate) mod stream;
#[cfg(test)]
mod tests;
mod watch_file;
mod wire;
mod zones;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use portway_netstack::{PortId, Subnet};
use tokio::sync::watch;
use tokio::time::Instant;

use self::ask::{Question, Transport};
use self::cache::{Cache, Key};
use self::flights::Flights;
use self::hosts::{HostsFile, LoopbackAlias};
use self::patterns::Patterns;
pub use self::patterns::{GivenRecord, GivenZone, ZONES_MAX};
use self::places::{Place, Places};
use self::records::own_records;
pub use self::records::{Known, Origin};
use self::relay::Relay;
use self::reply::Reply;
pub use self::resolv::ResolvConf;
use self::secure::Lines;
pub use self::secure::TlsError;
use self::server::Routes;
pub use self::server::{Channel, Server, Upstream};
use self::watch_file::Watched;
use self::wire::{Data, Name, Query, Rcode, Rejected, Source, kind};
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
/// Records of the operator's.
pub const RECORDS_MAX: usize = 4096;
/// Where systemd-resolved listens. Its resolv.conf never changes; the servers it asks are told elsewhere.
const SYSTEMD_RESOLVED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54))];

/// Whether `text` is a domain name.
#[must_use]
pub fn is_name(text: &str) -> bool {
    Name::from_text(text).is_some()
}

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
    /// The guests' networks, whose reverse names are ours.
    pub subnets: Vec<Subnet>,
    /// The resolvers to ask; without one for every name, those of `resolv_conf` are asked.
    pub upstreams: Vec<Upstream>,
    /// A PEM file of the authorities for resolvers over TLS and HTTPS; `None`: the host's.
    pub authorities: Option<PathBuf>,
    /// Whether answers of resolvers that lead inside are kept from guests.
    pub rebind_protection: bool,
    /// Domains whose names may stand for addresses of the inside all the same.
    pub private_domains: Vec<String>,
    /// The host's resolv.conf, for resolvers and the search list.
    pub resolv_conf: PathBuf,
    /// Where systemd-resolved says whom it asks: when that changes, so may its answers.
    pub uplinks: Option<PathBuf>,
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
    /// There are `RECORDS_MAX` records.
    #[error("{0}: there are {RECORDS_MAX} records already")]
    TooManyRecords(String),
    /// There are `ZONES_MAX` zones of patterns.
    #[error("{0}: there are {ZONES_MAX} zones already")]
    TooManyZones(String),
    /// A pattern that is none, or too large.
    #[error("error parsing regexp: {0}")]
    BadPattern(String),
    /// Resolvers over TLS or HTTPS cannot be checked.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No record has the name, or not with that address.
    #[error("{0} is no record: `portway dns ls` lists what is")]
    NoRecord(String),
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
    /// Answers kept from guests because they led inside.
    pub rebinding: u64,
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
    rebinding: AtomicU64,
    truncated: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The DNS service of one network; shared by the threads that bring queries.
pub struct Dns {
    book: Mutex<Book>,
    zones: RwLock<Arc<Zones>>,
    records: RwLock<Arc<HostsFile>>,
    patterns: RwLock<Patterns>,
    loopback: LoopbackAlias,
    source: Source,
    hosts: Option<Watched<HostsFile>>,
    resolv: Watched<ResolvConf>,
    uplinks: Option<Watched<ResolvConf>>,
    search: watch::Sender<Vec<String>>,
    routes: Routes,
    /// Domains whose names may lead inside; `None`: every name may.
    inside: Option<Vec<Name>>,
    relay: Arc<Relay>,
    flights: Arc<Flights>,
    cache: Arc<Mutex<Cache>>,
    in_flight: Arc<Places>,
    streams: Arc<Places>,
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Dns {
    /// The service `config` describes. Of the files resolv.conf alone is read here.
    ///
    /// # Errors
    /// `DnsError::BadName` for a domain, alias or record whose name is none; `DnsError::Tls` when a resolver wants TLS and
    /// there is nobody whose certificates are trusted.
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
            let name = name("--dns-host", text, "db.example=192.0.2.7")?;
            records.push(zones::OwnRecord { name, address: *address, live: false });
        }
        let example = "corp.example";
        let routes = Routes::new(&config.upstreams).map_err(|value| DnsError::BadName {
            setting: "--dns-upstream",
            value,
            example,
        })?;
        // Reading certificates takes a while, and is for nothing where nobody is asked that way.
        let wants_tls = config.upstreams.iter().any(|u| u.server.channel != Channel::Clear);
        let lines = if wants_tls { Lines::new(config.authorities.as_deref())? } else { Lines::default() };
        let private = config.private_domains.iter().map(|text| name("--dns-private", text, example));
        let private = private.collect::<Result<Vec<Name>, _>>()?;
        let loopback = LoopbackAlias(if config.host_loopback { config.host.clone() } else { Vec::new() });
        let child = |label| Name::from_label(label, &origins[0]).unwrap_or_else(|| origins[0].clone());
        let source = Source::new(&child("gateway"), &child("hostmaster"), zones::NEGATIVE_TTL);
        let book = Book {
            origins,
            gateway: config.gateway,
            host: config.host,
            guests: BTreeMap::new(),
            records,
            subnets: config.subnets,
            serial: 1,
        };
        let watched = |path| Watched::new(path, ResolvConf::parse);
        let dns = Self {
            zones: RwLock::new(Arc::new(Zones::build(&book))),
            records: RwLock::new(Arc::new(own_records(&book))),
            patterns: RwLock::default(),
            book: Mutex::new(book),
            loopback,
            source,
            hosts: config.hosts.map(|path| Watched::new(path, HostsFile::parse)),
            resolv: watched(config.resolv_conf),
            uplinks: config.uplinks.map(watched),
            search: watch::Sender::default(),
            routes,
            inside: config.rebind_protection.then_some(private),
            relay: Arc::new(Relay::over(lines)),
            flights: Arc::default(),
            cache: Arc::default(),
            in_flight: Places::new(IN_FLIGHT_MAX),
            streams: Places::new(STREAMS_MAX),
            counters: Arc::default(),
        };
        dns.resolv_conf();
        Ok(Arc::new(dns))
    }

    /// The answer to one datagram; `None` when none is to be sent: it is no query, or `IN_FLIGHT_MAX` is reached.
    /// `guest` is the port it came from. Runs on tokio, for at most 5 s; dropping the future gives the query up.
    pub async fn answer_datagram(&self, guest: PortId, query: &[u8]) -> Option<Vec<u8>> {
        self.answer(guest, query, Transport::Datagram).await
    }

    /// The host's search domains now, for DHCP option 119.
    #[must_use]
    pub fn search(&self) -> Vec<String> {
        self.resolv_conf().search.clone()
    }

    /// Where the search domains are told when they change.
    pub fn watch_search(&self) -> watch::Receiver<Vec<String>> {
        self.search.subscribe()
    }

    /// The resolvers that are asked now about names that no domain's resolvers know.
    #[must_use]
    pub fn upstreams(&self) -> Vec<Server> {
        self.servers_for(None).to_vec()
    }

    /// The host is in another network, or in none: what was learned of resolvers and from them may be wrong now.
    pub fn network_changed(&self) {
        self.relay.reset();
        lock(&self.cache).clear();
        self.resolv.look_again();
        self.resolv_conf();
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
            rebinding: get(&self.counters.rebinding),
            truncated: get(&self.counters.truncated),
            in_flight: self.in_flight.len(),
            streams: self.streams.len(),
            cached,
            cached_bytes,
        }
    }

    fn resolv_conf(&self) -> Arc<ResolvConf> {
        let now = Instant::now();
        let (conf, mut changed) = self.resolv.current(now);
        if conf.servers.iter().any(|s| SYSTEMD_RESOLVED.contains(&s.ip()))
            && let Some(uplinks) = &self.uplinks
        {
            changed |= uplinks.current(now).1;
        }
        if changed {
            // Another network, or a VPN came or went: what was learned may be wrong now.
            self.relay.reset();
            lock(&self.cache).clear();
            self.search.send_if_modified(|search| {
                let new = *search != conf.search;
                search.clone_from(&conf.search);
                new
            });
        }
        conf
    }

    /// The servers to ask about `name`.
    fn servers_for(&self, name: Option<&Name>) -> Arc<[Server]> {
        // First, in any case: new servers empty the cache.
        let conf = self.resolv_conf();
        if let Some(servers) =
            name.and_then(|name| self.routes.of_domain(name)).or(self.routes.default.clone())
        {
            return servers;
        }
        if conf.servers.is_empty() {
            // resolv.conf(5): the name server on the local machine.
            return Arc::new([Server::from(SocketAddr::from((Ipv4Addr::LOCALHOST, resolv::PORT)))]);
        }
        conf.servers.iter().copied().map(Server::from).collect()
    }

    async fn answer(&self, guest: PortId, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
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
                None => self.answer_from_upstream(guest, &query, transport).await?,
            },
        };
        let answer = if self.knows(&query.name) { wire::without_nxdomain(answer) } else { answer };
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

    /// Whether the operator's records or the hosts file have addresses of `name`: whoever is asked for its other types may not
    /// know it, but it exists, and a client that heard otherwise would not ask for its addresses (RFC 8020).
    fn knows(&self, name: &Name) -> bool {
        let records = Arc::clone(&self.records.read().unwrap_or_else(PoisonError::into_inner));
        records.knows(name, None)
            || self
                .hosts
                .as_ref()
                .is_some_and(|h| h.current(Instant::now()).0.knows(name, Some(&self.loopback)))
    }

    async fn answer_locally(&self, query: &Query<'_>) -> Option<Vec<u8>> {
        if let Some(answer) = self.localhost(query) {
            count(&self.counters.from_hosts);
            return Some(answer);
        }
        let zones = Arc::clone(&self.zones.read().unwrap_or_else(PoisonError::into_inner));
        let given = {
            let patterns = self.patterns.read().unwrap_or_else(PoisonError::into_inner);
            patterns.answer(query, |zone| zones.contain(zone), &self.source)
        };
        if given.is_some() {
            count(&self.counters.from_zones);
            return given;
        }
        if !zones.names(&query.name) {
            let from_file = || {
                let (file, _) = self.hosts.as_ref()?.current(Instant::now());
                file.answer(query, Some(&self.loopback), &self.source)
            };
            let records = Arc::clone(&self.records.read().unwrap_or_else(PoisonError::into_inner));
            if let Some(answer) = records.answer(query, None, &self.source).or_else(from_file) {
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

    async fn answer_from_upstream(
        &self,
        guest: PortId,
        query: &Query<'_>,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let servers = self.servers_for(Some(&query.name));
        let question = ask::question_of(query, transport);
        if let Question::Ours(key) = &question
            && let Some((reply, age)) = lock(&self.cache).lookup(key, Instant::now())
        {
            count(&self.counters.from_cache);
            return Some(reply.made_out(query, age));
        }
        let refused = || {
            count(&self.counters.over_limit);
            (transport == Transport::Stream).then(|| query.error(Rcode::Refused))
        };
        let Some(mut place) = self.in_flight.take(guest) else { return refused() };
        let answer = async {
            match question {
                Question::Ours(key) => {
                    let reply = self.flights.join(&key, || self.ask_for_all(key.clone(), servers)).await?;
                    Some(reply.made_out(query, 0))
                }
                Question::Theirs(..) => {
                    count(&self.counters.relayed);
                    let mut reply = self.relay.ask(&question, &servers).await?;
                    wire::set_id(&mut reply, query.id());
                    if self.leads_astray(&query.name, &reply) { None } else { Some(reply) }
                }
            }
        };
        let answer = tokio::select! {
            answer = answer => answer,
            () = place.lost() => return refused(),
        };
        Some(answer.unwrap_or_else(|| {
            count(&self.counters.failed);
            query.error(Rcode::ServFail)
        }))
    }

    /// Asks the resolvers, for whoever waits for the answer.
    fn ask_for_all(&self, key: Key, servers: Arc<[Server]>) -> flights::Boxed {
        count(&self.counters.relayed);
        let (relay, cache, counters) =
            (Arc::clone(&self.relay), Arc::clone(&self.cache), Arc::clone(&self.counters));
        let generation = lock(&cache).generation();
        let guarded = self.is_guarded(&key.name);
        Box::pin(async move {
            let question = Question::Ours(key.clone());
            let bytes = relay.ask(&question, &servers).await?;
            let reply = if guarded && rebind::leads_inside(&bytes) {
                tracing::info!(
                    name = key.name.text(),
                    "an answer with an address of the inside is kept from guests"
                );
                count(&counters.rebinding);
                Reply::empty(&key)
            } else {
                Reply::read(key.kind, &bytes)?
            };
            let reply = Arc::new(reply);
            lock(&cache).store(&key, &reply, generation, Instant::now());
            Some(reply)
        })
    }

    /// Whether answers about `name` must not lead inside.
    fn is_guarded(&self, name: &Name) -> bool {
        let Some(inside) = &self.inside else { return false };
        let allowed = inside.iter().any(|domain| name.suffixes().any(|suffix| suffix == domain.wire()));
        !allowed && self.routes.of_domain(name).is_none()
    }

    fn leads_astray(&self, name: &Name, reply: &[u8]) -> bool {
        let astray = self.is_guarded(name) && rebind::leads_inside(reply);
        if astray {
            count(&self.counters.rebinding);
        }
        astray
    }

    fn take_stream_place(&self, guest: PortId) -> Option<Place> {
        self.streams.take(guest)
    }

    fn publish(&self, book: &mut Book) {
        book.serial = book.serial.wrapping_add(1);
        let (zones, records) = (Arc::new(Zones::build(book)), Arc::new(own_records(book)));
        *self.zones.write().unwrap_or_else(PoisonError::into_inner) = zones;
        *self.records.write().unwrap_or_else(PoisonError::into_inner) = records;
    }

    /// `localhost` and what is under it is the guest's own, whatever a resolver says (RFC 6761 §6.3).
    fn localhost(&self, query: &Query<'_>) -> Option<Vec<u8>> {
        if query.name.ends_in("localhost") {
            let v4 = Data::Address(Ipv4Addr::LOCALHOST.into());
            let v6 = Data::Address(Ipv6Addr::LOCALHOST.into());
            let data: &[Data<'_>] = match query.kind {
                kind::A => &[v4],
                kind::AAAA => &[v6],
                kind::ANY => &[v4, v6],
                _ => &[],
            };
            return Some(query.answer(hosts::TTL, data, &self.source));
        }
        let address = hosts::reversed(&query.name).filter(IpAddr::is_loopback)?;
        let name = Name::from_text("localhost").filter(|_| address.is_loopback())?;
        let data = [Data::Pointer(&name)];
        Some(query.answer(hosts::TTL, if query.kind == kind::PTR { &data } else { &[] }, &self.source))
    }
}

/// A lock whose holder panicked still guards whole data: every critical section here is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads `text` as a hosts file. For the fuzzer.
#[cfg(fuzzing)]
pub fn read_any_hosts(text: &str) {
    let _ = HostsFile::parse(text);
}

/// Does with `reply` what is done with a resolver's answer to `query`. For the fuzzer, which knows no private names.
#[cfg(fuzzing)]
pub fn read_any_reply(query: &[u8], reply: &[u8]) {
    let Ok(query) = Query::parse(query) else { return };
    let mut reply = reply.to_vec();
    wire::set_id(&mut reply, query.id()); // guessed by a forger
    let _ = rebind::leads_inside(&reply);
    let found = wire::answers(query.bytes(), query.id(), &reply).is_some();
    if let Some(read) = Reply::read(query.kind, &reply).filter(|_| found) {
        let answer = read.made_out(&query, 1);
        assert!(answer.starts_with(&query.id()) && wire::records(&answer).is_some());
        let _ = query.fit(answer, 512);
    }
}
