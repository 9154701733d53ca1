//! The zones we are the authority for: the domain and its aliases, and the reverse names of our addresses.
//!
//! ```text
//! Book (what is named) ─► Zones::build ─► hickory Catalog, never changed again ─► answer
//! ```
//! A change builds a new `Zones`; queries under way finish on the old one. Every zone has a SOA, so that "no such
//! name" (NXDOMAIN) and "no such type" (NODATA) are both answered as RFC 2308 wants them. The reverse names of the guests'
//! networks are ours as a whole: what is not there is nowhere, and nobody outside is asked about it (RFC 6303).
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

use portway_netstack::Subnet;

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
    pub(super) records: Vec<OwnRecord>,
    /// The guests' networks.
    pub(super) subnets: Vec<Subnet>,
    pub(super) serial: u32,
}

/// One record of the operator's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OwnRecord {
    pub(super) name: Name,
    pub(super) address: IpAddr,
    /// Made while the network runs, and not in the configuration.
    pub(super) live: bool,
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
            let records = || book.records.iter().filter(|record| under(&record.name));
            for record in records() {
                addresses.insert(record.name.clone(), Vec::new());
            }
            for record in records() {
                addresses.entry(record.name.clone()).or_default().push(record.address);
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
        let covers: Vec<Name> = book.subnets.iter().flat_map(|subnet| reverse_zones(*subnet)).collect();
        let mut pointers: HashMap<&Name, Vec<(Name, RData)>> =
            covers.iter().map(|c| (c, Vec::new())).collect();
        for (address, target) in reverse {
            let name = Name::reverse(address);
            let Some(target) = target.as_ref().and_then(hickory_name) else { continue };
            let pointer = (name.clone(), RData::PTR(PTR(target)));
            match covers.iter().find(|cover| name.suffixes().any(|suffix| suffix == cover.wire())) {
                Some(cover) => pointers.entry(cover).or_default().push(pointer),
                None => zones.add(&name, server.as_ref(), book.serial, vec![pointer]),
            }
        }
        for (cover, data) in pointers {
            zones.add(cover, server.as_ref(), book.serial, data);
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

/// The zones that hold the reverse names of `subnet` and no others: reverse names are cut at whole octets (IPv4) or digits
/// (IPv6), so a prefix between two cuts takes up to 128 zones.
fn reverse_zones(subnet: Subnet) -> Vec<Name> {
    let (step, bits, labels) = if subnet.network().is_ipv4() { (8, 32, 4) } else { (4, 128, 32) };
    let prefix = u32::from(subnet.prefix());
    let cut = prefix.next_multiple_of(step);
    (0..1_u32 << (cut - prefix))
        .filter_map(|n| {
            let address = match subnet.network() {
                IpAddr::V4(a) => IpAddr::V4((u32::from(a) | n.checked_shl(bits - cut).unwrap_or(0)).into()),
                IpAddr::V6(a) => {
                    IpAddr::V6((u128::from(a) | u128::from(n).checked_shl(bits - cut).unwrap_or(0)).into())
                }
            };
            let kept = labels - usize::try_from((bits - cut) / step).ok()?;
            let name = Name::reverse(address);
            let zone = name.suffixes().nth(labels - kept)?;
            Some(Name::from_wire(zone))
        })
        .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reverse_names_of_a_subnet_are_zones_cut_at_octets_and_digits() {
        let zones =
            |subnet: &str| reverse_zones(subnet.parse().unwrap()).iter().map(Name::text).collect::<Vec<_>>();
        assert_eq!(zones("192.168.127.0/24"), ["127.168.192.in-addr.arpa"]);
        assert_eq!(zones("10.0.0.0/8"), ["10.in-addr.arpa"]);
        assert_eq!(zones("172.16.0.0/15"), ["16.172.in-addr.arpa", "17.172.in-addr.arpa"]);
        let small = zones("192.168.127.8/29");
        assert_eq!(
            (small.len(), &small[0][..], &small[7][..]),
            (8, "8.127.168.192.in-addr.arpa", "15.127.168.192.in-addr.arpa")
        );
        assert_eq!(zones("fd00:1:2:3::/64"), ["3.0.0.0.2.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa"]);
    }
}
