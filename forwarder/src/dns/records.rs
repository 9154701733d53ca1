//! The names an operator or a guest brings while the network runs: guests' names, and records.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::PoisonError;

use super::hosts::HostsFile;
use super::wire::Name;
use super::zones::{Book, OwnRecord};
use super::{Dns, DnsError, GUESTS_MAX, GivenRecord, GivenZone, RECORDS_MAX, lock};

/// Where a name comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The network's own: gateway and host alias.
    Network,
    /// A guest's lease.
    Guest,
    /// `--dns-host`.
    Config,
    /// `portway dns add`.
    Live,
}

/// One name and one address it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The name, without a dot at the end.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Where it comes from.
    pub origin: Origin,
}

/// The operator's records as a table to answer from.
pub(super) fn own_records(book: &Book) -> HostsFile {
    let mut table = HostsFile::default();
    for record in &book.records {
        table.insert(record.name.clone(), record.address);
    }
    table
}

impl Dns {
    /// Names the guests: `<name>.<domain>` for each, under every alias too, and the PTR of its address. Those named
    /// before and not in `names` have no name any more. A guest may call itself anything: a name that is none, is
    /// ours, or is beyond `GUESTS_MAX` is not given.
    pub fn set_guests(&self, names: &[(String, IpAddr)]) {
        let mut guests: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for (name, address) in names {
            match guest_label(name) {
                Ok(label) if guests.contains_key(&label) || guests.len() < GUESTS_MAX => {
                    guests.entry(label).or_default().push(*address);
                }
                Ok(_) => {
                    tracing::debug!(error = %DnsError::TooManyGuests(name.clone()), "a guest has no name")
                }
                Err(error) => tracing::debug!(%error, "a guest has no name"),
            }
        }
        let mut book = lock(&self.book);
        if book.guests != guests {
            book.guests = guests;
            self.publish(&mut book);
        }
    }

    /// Adds records `(name, address)`; those that are there already stay. A name may begin with `*.`: then it stands for
    /// every name under the rest that has no record of its own.
    ///
    /// # Errors
    /// A name that is none, or `RECORDS_MAX`; then nothing is added.
    pub fn add_records(&self, records: &[(String, IpAddr)]) -> Result<(), DnsError> {
        let mut book = lock(&self.book);
        let mut all = book.records.clone();
        for (text, address) in records {
            let name = record_name(text)?;
            if all.iter().any(|r| r.name == name && r.address == *address) {
                continue;
            }
            if all.len() >= RECORDS_MAX {
                return Err(DnsError::TooManyRecords(text.clone()));
            }
            all.push(OwnRecord { name, address: *address, live: true });
        }
        book.records = all;
        self.publish(&mut book);
        Ok(())
    }

    /// Takes records away, those of the configuration too: each `(name, address)`, or every address of a name.
    ///
    /// # Errors
    /// The first that is not there; then nothing is taken away.
    pub fn remove_records(&self, records: &[(String, Option<IpAddr>)]) -> Result<(), DnsError> {
        let mut book = lock(&self.book);
        let mut all = book.records.clone();
        for (text, address) in records {
            let name = record_name(text)?;
            let before = all.len();
            all.retain(|r| r.name != name || address.is_some_and(|a| a != r.address));
            if all.len() == before {
                let address = address.map(|a| format!("={a}")).unwrap_or_default();
                return Err(DnsError::NoRecord(format!("{text}{address}")));
            }
        }
        book.records = all;
        self.publish(&mut book);
        Ok(())
    }

    /// Adds a zone whose names may be patterns ([`super::patterns`]); it is tried before all that is known.
    ///
    /// # Errors
    /// A name or pattern that is none, or a limit; then nothing has changed.
    pub fn add_zone(&self, zone: &GivenZone) -> Result<(), DnsError> {
        self.patterns.write().unwrap_or_else(PoisonError::into_inner).add(zone)
    }

    /// The zones as gvproxy's clients know them: the domain's aliases with gateway and host, and those of [`Self::add_zone`].
    #[must_use]
    pub fn given_zones(&self) -> Vec<GivenZone> {
        let mut given: Vec<GivenZone> =
            self.patterns.read().unwrap_or_else(PoisonError::into_inner).list().collect();
        let book = lock(&self.book);
        let record = |name: &str, addresses: &[IpAddr]| {
            let address = addresses.iter().find(|a| a.is_ipv4()).copied();
            address.map(|_| GivenRecord { name: name.to_owned(), address, pattern: None })
        };
        let own = [record("gateway", &book.gateway), record("host", &book.host)];
        let mut all = Vec::new();
        for alias in book.origins.iter().skip(1) {
            let name = format!("{}.", alias.text());
            let at = given.iter().position(|zone| zone.name == name);
            let mut zone =
                at.map(|at| given.remove(at)).unwrap_or_else(|| GivenZone { name, ..GivenZone::default() });
            let hidden: Vec<String> = zone.records.iter().map(|r| r.name.to_ascii_lowercase()).collect();
            zone.records.extend(own.iter().flatten().filter(|r| !hidden.contains(&r.name)).cloned());
            all.push(zone);
        }
        all.append(&mut given);
        all
    }

    /// Every name that is ours to answer, by name; aliases of the domain are not repeated.
    #[must_use]
    pub fn known(&self) -> Vec<Known> {
        let book = lock(&self.book);
        let domain = book.origins.first();
        let under = |label: &str| domain.and_then(|d| Name::from_label(label, d)).map(|n| n.text());
        let mut all = Vec::new();
        let mut put = |name: Option<String>, addresses: &[IpAddr], origin| {
            let Some(name) = name else { return };
            all.extend(addresses.iter().map(|a| Known { name: name.clone(), address: *a, origin }));
        };
        put(under("gateway"), &book.gateway, Origin::Network);
        put(under("host"), &book.host, Origin::Network);
        for (label, addresses) in &book.guests {
            put(under(label), addresses, Origin::Guest);
        }
        for record in &book.records {
            let origin = if record.live { Origin::Live } else { Origin::Config };
            put(Some(record.name.text()), &[record.address], origin);
        }
        all.sort_by(|a, b| (&a.name, a.address, a.origin).cmp(&(&b.name, b.address, b.origin)));
        all
    }
}

fn record_name(text: &str) -> Result<Name, DnsError> {
    let bad = || DnsError::BadName {
        setting: "dns record",
        value: text.to_owned(),
        example: "db.example or *.apps.example",
    };
    Name::from_text(text).filter(|_| text != "*").ok_or_else(bad)
}

/// A guest's name as one label.
fn guest_label(name: &str) -> Result<String, DnsError> {
    let label = name.to_ascii_lowercase();
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if !(1..=63).contains(&label.len()) || !label.bytes().all(legal) {
        return Err(DnsError::BadGuestName(name.to_owned()));
    }
    if label == "gateway" || label == "host" {
        return Err(DnsError::Reserved(name.to_owned()));
    }
    Ok(label)
}
