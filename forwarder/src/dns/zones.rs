//! Our own names, by hickory-server's catalog.
//!
//! One zone for our domain and for each alias, one for each reverse name: a reverse zone holds one address only, so that
//! the rest of its network is still the host's to answer. Changed by building the catalog anew.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{LowerName, Name, RData, Record};
use hickory_proto::serialize::binary::BinEncoder;
use hickory_server::net::NetError;
use hickory_server::net::runtime::{TokioRuntimeProvider, TokioTime};
use hickory_server::net::xfer::Protocol;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::store::in_memory::InMemoryZoneHandler;
use hickory_server::zone_handler::{AxfrPolicy, Catalog, MessageResponse, ZoneType};

use super::{DnsConfig, DnsError};

const TTL: u32 = 30;

/// The catalog, and what it is made of.
pub(super) struct Zones {
    config: DnsConfig,
    built: RwLock<Arc<Built>>,
}

struct Built {
    catalog: Catalog,
    /// The zones' names, lower case, without the last dot.
    origins: HashSet<String>,
}

impl Zones {
    pub(super) fn new(config: &DnsConfig) -> Result<Self, DnsError> {
        let built = build(config, &[])?;
        Ok(Self { config: config.clone(), built: RwLock::new(Arc::new(built)) })
    }

    pub(super) fn set_guests(&self, guests: &[(String, IpAddr)]) {
        match build(&self.config, guests) {
            Ok(built) => *self.built.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(built),
            Err(error) => tracing::warn!(%error, "the guests' names stay as they were"),
        }
    }

    fn built(&self) -> Arc<Built> {
        Arc::clone(&self.built.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether `name` lies in one of our zones.
    pub(super) fn holds(&self, name: &str) -> bool {
        let built = self.built();
        let mut rest = name;
        loop {
            if built.origins.contains(rest) {
                return true;
            }
            match rest.split_once('.') {
                Some((_, parent)) => rest = parent,
                None => return false,
            }
        }
    }

    /// The catalog's answer.
    pub(super) async fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let nobody = SocketAddr::from(([0, 0, 0, 0], 0));
        // The size is the caller's matter: TCP has no truncation here.
        let request = Request::from_bytes(query.to_vec(), nobody, Protocol::Tcp).ok()?;
        let answer = Answer::default();
        self.built().catalog.handle_request::<_, TokioTime>(&request, answer.clone()).await;
        let mut bytes = answer.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some(std::mem::take(&mut *bytes)).filter(|b| !b.is_empty())
    }
}

/// Where the catalog's answer is left.
#[derive(Clone, Default)]
struct Answer(Arc<Mutex<Vec<u8>>>);

#[async_trait::async_trait]
impl ResponseHandler for Answer {
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
        let info = response.destructive_emit(&mut BinEncoder::new(&mut bytes))?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
        Ok(info)
    }
}

fn build(config: &DnsConfig, guests: &[(String, IpAddr)]) -> Result<Built, DnsError> {
    let mut built = Built { catalog: Catalog::new(), origins: HashSet::new() };
    let mut reverse: Vec<(IpAddr, String)> = Vec::new();
    let own = [("gateway", &config.gateway), ("host", &config.host)];
    for domain in std::iter::once(&config.domain).chain(&config.aliases) {
        let mut names: Vec<(String, IpAddr)> = Vec::new();
        for (label, addresses) in own {
            names.extend(addresses.iter().map(|ip| (format!("{label}.{domain}"), *ip)));
        }
        if *domain == config.domain {
            let free = |label: &str| own.iter().all(|(own, _)| *own != label);
            // A guest cannot become the gateway by calling itself so.
            names.extend(
                guests.iter().filter(|(l, _)| free(l)).map(|(label, ip)| (format!("{label}.{domain}"), *ip)),
            );
            reverse.extend(names.iter().map(|(name, ip)| (*ip, name.clone())));
        }
        let records = names.iter().map(|(n, ip)| {
            let data = match ip {
                IpAddr::V4(ip) => RData::A(A(*ip)),
                IpAddr::V6(ip) => RData::AAAA(AAAA(*ip)),
            };
            Ok(Record::from_rdata(name(n)?, TTL, data))
        });
        add(&mut built, domain, records.collect::<Result<_, DnsError>>()?)?;
    }
    for (ip, target) in reverse {
        let origin = reverse_name(ip);
        if !built.origins.contains(&origin) {
            let record = Record::from_rdata(name(&origin)?, TTL, RData::PTR(PTR(name(&target)?)));
            add(&mut built, &origin, vec![record])?;
        }
    }
    Ok(built)
}

fn add(built: &mut Built, origin: &str, records: Vec<Record>) -> Result<(), DnsError> {
    let apex = name(origin)?;
    let server = name("gateway.portway.internal")?;
    let mut zone =
        InMemoryZoneHandler::<TokioRuntimeProvider>::empty(apex.clone(), ZoneType::Primary, AxfrPolicy::Deny);
    let soa = SOA::new(server.clone(), name("hostmaster.portway.internal")?, 1, 3600, 600, 86_400, TTL);
    let base = [
        Record::from_rdata(apex.clone(), TTL, RData::SOA(soa)),
        Record::from_rdata(apex.clone(), TTL, RData::NS(NS(server))),
    ];
    for record in base.into_iter().chain(records) {
        zone.upsert_mut(record, 1);
    }
    built.catalog.upsert(LowerName::new(&apex), vec![Arc::new(zone)]);
    built.origins.insert(origin.to_ascii_lowercase());
    Ok(())
}

fn name(text: &str) -> Result<Name, DnsError> {
    let fault = |e: &dyn std::fmt::Display| DnsError { name: text.to_owned(), fault: e.to_string() };
    let mut name = Name::from_ascii(text).map_err(|e| fault(&e))?;
    name.set_fqdn(true);
    Ok(name)
}

fn reverse_name(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let digits = ip.octets().into_iter().rev().flat_map(|o| [o & 15, o >> 4]);
            digits.map(|d| format!("{d:x}.")).collect::<String>() + "ip6.arpa"
        }
    }
}
