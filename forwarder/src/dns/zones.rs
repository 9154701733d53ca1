//! The zones we are the authority for: the domain and its aliases, and the reverse names of our addresses.
//!
//! ```text
//! Book (what is named) ─► Zones::build ─► hickory Catalog, never changed again ─► answer
//! ```
//! A change builds a new `Zones`; queries under way finish on the old one. Every zone has a SOA, so that "no such
//! name" (NXDOMAIN) and "no such type" (NODATA) are both answered as RFC 2308 wants them. Each of our addresses is
//! a reverse zone of its own: the rest of its network stays with the host's resolvers.
//! No transfers, no updates, no DNSSEC. ANY gives the records of one type (RFC 8482 §4.1).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{LowerName, Name as HickoryName, RData, Record};
use hickory_proto::serialize::binary::BinEncoder;
use hickory_server::net::NetError;
use hickory_server::net::runtime::{TokioRuntimeProvider, TokioTime};
use hickory_server::net::xfer::Protocol;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::store::in_memory::InMemoryZoneHandler;
use hickory_server::zone_handler::{AxfrPolicy, Catalog, MessageResponse, ZoneHandler, ZoneType};

use super::wire::{self, Name, Query, Rcode};

/// Seconds a guest may keep an address of ours.
pub(super) const TTL: u32 = 30;
/// Seconds a guest may remember that a name is not there; short, for a VM's name comes with the VM.
pub(super) const NEGATIVE_TTL: u32 = 5;

/// What is named.
#[derive(Debug, Clone)]
pub(super) struct Book {
    /// The domain first, then its aliases.
    pub(super) origins: Vec<Name>,
    pub(super) gateway: Vec<IpAddr>,
    pub(super) host: Vec<IpAddr>,
    /// Guests by the one label of their name, which is lower case.
    pub(super) guests: BTreeMap<String, Vec<IpAddr>>,
    /// The operator's records; those under an origin replace what is there.
    pub(super) records: Vec<(Name, IpAddr)>,
    pub(super) serial: u32,
}

/// The zones at one point in time.
pub(super) struct Zones {
    catalog: Catalog,
    origins: HashSet<Name>,
    names: HashSet<Name>,
}

impl Zones {
    /// The zones of `book`.
    pub(super) fn build(book: &Book) -> Self {
        let mut zones = Self { catalog: Catalog::new(), origins: HashSet::new(), names: HashSet::new() };
        let Some(domain) = book.origins.first() else { return zones };
        let server = child("gateway", domain);
        for origin in &book.origins {
            let mut addresses: HashMap<Name, Vec<IpAddr>> = HashMap::new();
            for (label, known) in &book.guests {
                addresses.extend(child(label, origin).map(|name| (name, known.clone())));
            }
            addresses.extend(child("gateway", origin).map(|name| (name, book.gateway.clone())));
            addresses.extend(child("host", origin).map(|name| (name, book.host.clone())));
            let under = |name: &Name| name.suffixes().any(|suffix| suffix == origin.wire());
            for (name, _) in book.records.iter().filter(|(name, _)| under(name)) {
                addresses.insert(name.clone(), Vec::new());
            }
            for (name, address) in book.records.iter().filter(|(name, _)| under(name)) {
                addresses.entry(name.clone()).or_default().push(*address);
            }
            let data = addresses.into_iter().flat_map(|(name, known)| {
                known.into_iter().map(move |address| {
                    let data = match address {
                        IpAddr::V4(a) => RData::A(A(a)),
                        IpAddr::V6(a) => RData::AAAA(AAAA(a)),
                    };
                    (name.clone(), data)
                })
            });
            zones.add(origin, server.as_ref(), book.serial, data.collect());
        }
        let mut reverse: HashMap<IpAddr, Option<Name>> = HashMap::new();
        for (label, known) in &book.guests {
            reverse.extend(known.iter().map(|&address| (address, child(label, domain))));
        }
        reverse.extend(book.host.iter().map(|&address| (address, child("host", domain))));
        reverse.extend(book.gateway.iter().map(|&address| (address, server.clone())));
        for (address, target) in reverse {
            let origin = Name::reverse(address);
            let Some(target) = target.as_ref().and_then(hickory_name) else { continue };
            zones.add(&origin, server.as_ref(), book.serial, vec![(origin.clone(), RData::PTR(PTR(target)))]);
        }
        zones
    }

    /// Whether `name` itself is one of ours.
    pub(super) fn names(&self, name: &Name) -> bool {
        self.names.contains(name)
    }

    /// Whether `name` lies in a zone of ours, there or not.
    pub(super) fn contain(&self, name: &Name) -> bool {
        name.suffixes().any(|suffix| self.origins.contains(suffix))
    }

    /// The answer of the zone `query` lies in.
    pub(super) async fn answer(&self, query: &Query<'_>) -> Vec<u8> {
        // hickory never sees the guest's bytes, only the question, which is whole, in a message of our making.
        let source = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
        let Ok(request) = Request::from_bytes(query.canonical(), source, Protocol::Tcp) else {
            return query.error(Rcode::FormErr);
        };
        let capture = Capture::default();
        self.catalog.handle_request::<_, TokioTime>(&request, capture.clone()).await;
        let mut answer = std::mem::take(&mut *capture.0.lock().unwrap_or_else(PoisonError::into_inner));
        if answer.len() < wire::HEADER {
            return query.error(Rcode::ServFail);
        }
        wire::set_recursion_available(&mut answer);
        query.push_opt(&mut answer, 0);
        answer
    }

    fn add(&mut self, origin: &Name, server: Option<&Name>, serial: u32, data: Vec<(Name, RData)>) {
        let (Some(apex), Some(server)) = (hickory_name(origin), server.and_then(hickory_name)) else {
            return;
        };
        let mut zone = InMemoryZoneHandler::<TokioRuntimeProvider>::empty(
            apex.clone(),
            ZoneType::Primary,
            AxfrPolicy::Deny,
        );
        let contact = HickoryName::from_ascii("hostmaster")
            .and_then(|label| label.append_domain(&server.base_name()))
            .unwrap_or_else(|_| server.clone());
        let soa = SOA::new(server.clone(), contact, serial, 3600, 600, 86400, NEGATIVE_TTL);
        zone.upsert_mut(Record::from_rdata(apex.clone(), NEGATIVE_TTL, RData::SOA(soa)), serial);
        zone.upsert_mut(Record::from_rdata(apex.clone(), TTL, RData::NS(NS(server))), serial);
        for (name, data) in data {
            if let Some(owner) = hickory_name(&name) {
                zone.upsert_mut(Record::from_rdata(owner, TTL, data), serial);
                self.names.insert(name);
            }
        }
        self.names.insert(origin.clone());
        self.origins.insert(origin.clone());
        let zone: Arc<dyn ZoneHandler> = Arc::new(zone);
        self.catalog.upsert(LowerName::new(&apex), vec![zone]);
    }
}

/// `label` under `parent`; `None` when that is too long for a name.
fn child(label: &str, parent: &Name) -> Option<Name> {
    Name::from_label(label, parent)
}

fn hickory_name(name: &Name) -> Option<HickoryName> {
    let labels = name
        .suffixes()
        .filter_map(|s| s.split_first().and_then(|(n, rest)| rest.get(..usize::from(*n))))
        .filter(|label| !label.is_empty());
    let mut name = HickoryName::from_labels(labels).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// Keeps the bytes of the one answer the catalog gives.
#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<u8>>>);

#[async_trait::async_trait]
impl ResponseHandler for Capture {
    async fn send_response<'a>(
        &mut self,
        response: MessageResponse<
            '_,
            'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
        >,
    ) -> Result<ResponseInfo, NetError> {
        let mut bytes = Vec::with_capacity(512);
        let mut encoder = BinEncoder::new(&mut bytes);
        encoder.set_max_size(u16::MAX);
        let info = response.destructive_emit(&mut encoder)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
        Ok(info)
    }
}
