//! hosts(5): names of the host's own, A, AAAA and PTR; and the operator's `--dns-host` records.
//!
//! A name found here is answered here: its other address family is NODATA, so are HTTPS and SVCB, whose address
//! hints would lead past the entry; further types are left to the resolvers.
//!
//! **Loopback.** `127.0.0.1 db` on the host means a service of the host, but 127.0.0.1 in a guest is the guest. Such
//! an entry is answered with the host alias (of the same family), the guest's way to the host's loopback; without
//! one it is left out. The names of loopback itself (`localhost` …) are never taken from the file: a guest's
//! localhost is the guest (RFC 6761 §6.3). The operator's records are given to guests as they are written; `*.NAME` stands
//! for every name under NAME that has no record of its own.

use std::collections::HashMap;
use std::net::IpAddr;

use super::wire::{Data, Name, Query, Source, kind};

/// Seconds a guest may keep an answer from here.
pub(super) const TTL: u32 = 10;
/// Entries kept of a file.
const ENTRIES_MAX: usize = 500_000;

/// The lines of a hosts file that say something.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct HostsFile {
    names: HashMap<Name, Vec<IpAddr>>,
    /// Addresses of every name under one, by that one.
    wildcards: HashMap<Name, Vec<IpAddr>>,
    addresses: HashMap<IpAddr, Name>,
}

/// What stands for the host's loopback in answers to guests; empty: nothing does.
#[derive(Debug, Default)]
pub(super) struct LoopbackAlias(pub(super) Vec<IpAddr>);

impl LoopbackAlias {
    fn translate(&self, address: IpAddr) -> Option<IpAddr> {
        if !address.to_canonical().is_loopback() {
            return Some(address);
        }
        self.0.iter().copied().find(|alias| alias.is_ipv4() == address.is_ipv4())
    }
}

impl HostsFile {
    /// Reads the text of a hosts file; lines and names that make no sense are skipped.
    pub(super) fn parse(text: &str) -> Self {
        let mut hosts = Self::default();
        let mut entries = 0_usize;
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            // An address with a scope (fe80::1%lo0) means nothing in another network.
            let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
            for name in
                words.filter(|name| !is_local(name) && !name.starts_with('*')).filter_map(Name::from_text)
            {
                if entries >= ENTRIES_MAX {
                    tracing::warn!(limit = ENTRIES_MAX, "hosts file has more names; the rest is not used");
                    return hosts;
                }
                entries = entries.saturating_add(1);
                hosts.insert(name, address);
            }
        }
        hosts
    }

    /// Adds one record; the first name of an address is the one its PTR gives.
    pub(super) fn insert(&mut self, name: Name, address: IpAddr) {
        if let Some(parent) = name.below_wildcard() {
            let addresses = self.wildcards.entry(parent).or_default();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
            return;
        }
        self.addresses.entry(address).or_insert_with(|| name.clone());
        let addresses = self.names.entry(name).or_default();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }

    /// Whether `name` has addresses here that a guest is told.
    pub(super) fn knows(&self, name: &Name, loopback: Option<&LoopbackAlias>) -> bool {
        let told = |ip: &IpAddr| loopback.is_none_or(|alias| alias.translate(*ip).is_some());
        self.find(name).is_some_and(|known| known.iter().any(told))
    }

    /// The answer to `query` from here; `None` when the file does not say.
    pub(super) fn answer(
        &self,
        query: &Query<'_>,
        loopback: Option<&LoopbackAlias>,
        source: &Source,
    ) -> Option<Vec<u8>> {
        if query.kind == kind::PTR
            && let Some(name) = self.pointer(&query.name)
        {
            return Some(query.answer(TTL, &[Data::Pointer(name)], source));
        }
        let known: Vec<IpAddr> = self
            .find(&query.name)?
            .iter()
            .filter_map(|&address| loopback.map_or(Some(address), |alias| alias.translate(address)))
            .collect();
        let wanted = |address: &&IpAddr| match query.kind {
            kind::A => address.is_ipv4(),
            kind::AAAA => address.is_ipv6(),
            kind::ANY => true,
            _ => false,
        };
        match query.kind {
            _ if known.is_empty() => None,
            kind::A | kind::AAAA | kind::ANY | kind::HTTPS | kind::SVCB => {
                let mut data: Vec<Data<'_>> = Vec::new();
                for address in known.iter().filter(wanted) {
                    // 127.0.0.1 and 127.0.1.1 both become the alias; say it once.
                    if !data.contains(&Data::Address(*address)) {
                        data.push(Data::Address(*address));
                    }
                }
                Some(query.answer(TTL, &data, source))
            }
            _ => None,
        }
    }

    /// The addresses of `name`, or of the nearest `*` above it (RFC 4592 §3.3), which only the operator's records have.
    fn find(&self, name: &Name) -> Option<&Vec<IpAddr>> {
        let wildcard = |parent: &[u8]| self.wildcards.get(parent);
        let above = || name.suffixes().skip(1).find_map(wildcard);
        self.names.get(name).or_else(|| if self.wildcards.is_empty() { None } else { above() })
    }

    fn pointer(&self, name: &Name) -> Option<&Name> {
        let address = reversed(name)?;
        // Loopback is each machine's own.
        if address.is_loopback() { None } else { self.addresses.get(&address) }
    }
}

/// The address a name under in-addr.arpa or ip6.arpa stands for.
pub(super) fn reversed(name: &Name) -> Option<IpAddr> {
    let labels: Vec<&str> = name
        .suffixes()
        .filter_map(|s| s.split_first().and_then(|(n, rest)| rest.get(..usize::from(*n))))
        .map(|label| std::str::from_utf8(label).unwrap_or_default())
        .collect();
    let address = match labels.as_slice() {
        [d, c, b, a, "in-addr", "arpa", ""] => format!("{a}.{b}.{c}.{d}").parse().ok().map(IpAddr::V4)?,
        [nibbles @ .., "ip6", "arpa", ""] if nibbles.len() == 32 => {
            let mut bits = 0_u128;
            for nibble in nibbles.iter().rev() {
                let digit = u128::from_str_radix(nibble, 16).ok().filter(|_| nibble.len() == 1)?;
                bits = (bits << 4) | digit;
            }
            IpAddr::V6(bits.into())
        }
        _ => return None,
    };
    // One spelling only: `01.0.0.127.in-addr.arpa` is another name.
    (Name::reverse(address) == *name).then_some(address)
}

/// Names of the machine's own loopback, which a hosts file holds on every system.
fn is_local(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    name.ends_with(".localhost")
        || matches!(
            name,
            "localhost"
                | "localhost4"
                | "localhost6"
                | "localhost.localdomain"
                | "localhost4.localdomain4"
                | "localhost6.localdomain6"
                | "ip6-localhost"
                | "ip6-loopback"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reverse_name_and_its_address_belong_together() {
        for address in ["192.0.2.7", "2001:db8::1f", "::"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(reversed(&Name::reverse(address)), Some(address));
        }
        for name in ["1.2.3.in-addr.arpa", "01.2.3.4.in-addr.arpa", "f.ip6.arpa", "in-addr.arpa", "x.example"]
        {
            assert_eq!(reversed(&Name::from_text(name).unwrap()), None, "{name}");
        }
    }

    #[test]
    fn comments_scopes_and_loopback_names_are_skipped() {
        let hosts = HostsFile::parse(
            "127.0.0.1 localhost LOCALHOST.localdomain\n::1 ip6-localhost\nfe80::1%lo0 scoped\n\
             192.0.2.1 db.example DB # 192.0.2.2 not\nnot-an-address x\n192.0.2.3 bad..name\n",
        );
        let mut names: Vec<_> = hosts.names.keys().cloned().collect();
        names.sort();
        assert_eq!(names, [Name::from_text("db").unwrap(), Name::from_text("db.example").unwrap()]);
    }
}
