//! Names for the host's own side of a guest's business: answered as the guest would be.

use std::net::IpAddr;

use hickory_proto::op::{Message, Query as DnsQuery};
use hickory_proto::rr::{Name, RData, RecordType};
use portway_netstack::PortId;

use super::Dns;

/// Addresses of one name that are told.
const ADDRESSES: usize = 8;

impl Dns {
    /// The addresses of `name` as guests are told them, IPv4 first; none when it has none, or nobody answers.
    pub async fn addresses(&self, name: &str) -> Vec<IpAddr> {
        let Ok(name) = Name::from_ascii(name) else { return Vec::new() };
        let mut found = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            let mut message = Message::query();
            message.metadata.recursion_desired = true;
            message.add_query(DnsQuery::query(name.clone(), kind));
            let Ok(bytes) = message.to_vec() else { continue };
            // Nobody's port: it is not a guest that asks.
            let Some(bytes) = self.answer_datagram(PortId(u16::MAX), &bytes).await else { continue };
            let Ok(answer) = Message::from_vec(&bytes) else { continue };
            found.extend(answer.answers.iter().filter_map(|record| match &record.data {
                RData::A(ip) => Some(IpAddr::V4(ip.0)),
                RData::AAAA(ip) => Some(IpAddr::V6(ip.0)),
                _ => None,
            }));
        }
        found.truncate(ADDRESSES);
        found
    }
}
