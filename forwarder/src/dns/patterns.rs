//! Zones whose names may be patterns: those of gvproxy's file and of `/services/dns/add`.
//!
//! ```text
//!  name under a zone ─► its first record with that label, or whose pattern fits ─► the zone's default address ─► NXDOMAIN
//! ```
//! The label is all of the name that stands before the zone, `a.b` of `a.b.zone.test`. Zones are tried in their order, before everything
//! else that is known; the apex of a zone is not in it. A name that is there has NODATA for what is not its address. A zone that is also one
//! of the network's own, such as `docker.internal`, adds to that and hides none of its names.
//! Patterns are searched for in the label without regard to case, in time linear in its length. Answers are not to be kept: a zone may
//! change at any time.
//!
//! Limits: [`ZONES_MAX`], [`super::RECORDS_MAX`] records in all, [`PATTERN_SIZE`].

use std::net::IpAddr;

use regex_lite::{Regex, RegexBuilder};

use super::wire::{Data, Name, Query, Rcode, Source, kind};
use super::{DnsError, RECORDS_MAX};

/// Zones there may be.
pub const ZONES_MAX: usize = 256;
/// Bytes of a pattern as it is executed.
const PATTERN_SIZE: usize = 64 * 1024;

/// A zone as it is given, and listed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GivenZone {
    /// Its name; a dot at the end is optional.
    pub name: String,
    /// Its records, in the order they are tried.
    pub records: Vec<GivenRecord>,
    /// What every other name under it stands for.
    pub default: Option<IpAddr>,
}

/// A record of a zone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GivenRecord {
    /// The label, where there is no pattern.
    pub name: String,
    /// What it stands for; a record without an address says nothing.
    pub address: Option<IpAddr>,
    /// Labels it is about.
    pub pattern: Option<String>,
}

#[derive(Debug)]
struct Rule {
    given: GivenRecord,
    /// The name in lower case.
    label: String,
    pattern: Option<Regex>,
}

impl Rule {
    fn new(given: &GivenRecord) -> Result<Self, DnsError> {
        let compiled = given.pattern.as_deref().map(|text| {
            let built = RegexBuilder::new(text).case_insensitive(true).size_limit(PATTERN_SIZE).build();
            built.map_err(|e| DnsError::BadPattern(format!("{e}: `{text}`")))
        });
        Ok(Self {
            given: given.clone(),
            label: given.name.to_ascii_lowercase(),
            pattern: compiled.transpose()?,
        })
    }

    fn fits(&self, label: &str) -> bool {
        match &self.pattern {
            Some(pattern) => pattern.is_match(label),
            None => self.label == label,
        }
    }
}

#[derive(Debug)]
struct Zone {
    name: Name,
    rules: Vec<Rule>,
    default: Option<IpAddr>,
}

/// The zones, in their order.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    zones: Vec<Zone>,
}

impl Patterns {
    /// Adds a zone. Where there is one of its name, the new records come before the old ones and the new default, also none,
    /// replaces the old.
    ///
    /// # Errors
    /// A name that is none, a pattern that is none, or a limit; nothing has changed then.
    pub(super) fn add(&mut self, given: &GivenZone) -> Result<(), DnsError> {
        let name = Name::from_text(&given.name).ok_or_else(|| DnsError::BadName {
            setting: "dns zone",
            value: given.name.clone(),
            example: "crc.testing.",
        })?;
        let mut rules = given.records.iter().map(Rule::new).collect::<Result<Vec<_>, _>>()?;
        let there: usize = self.zones.iter().map(|z| z.rules.len()).sum();
        if there.saturating_add(rules.len()) > RECORDS_MAX {
            return Err(DnsError::TooManyRecords(given.name.clone()));
        }
        if let Some(zone) = self.zones.iter_mut().find(|z| z.name == name) {
            rules.append(&mut zone.rules);
            (zone.rules, zone.default) = (rules, given.default);
            return Ok(());
        }
        if self.zones.len() >= ZONES_MAX {
            return Err(DnsError::TooManyZones(given.name.clone()));
        }
        self.zones.push(Zone { name, rules, default: given.default });
        Ok(())
    }

    /// The zones as they were given.
    pub(super) fn list(&self) -> impl Iterator<Item = GivenZone> + '_ {
        self.zones.iter().map(|zone| GivenZone {
            name: format!("{}.", zone.name.text()),
            records: zone.rules.iter().map(|rule| rule.given.clone()).collect(),
            default: zone.default,
        })
    }

    /// The answer to `query`; `None` when no zone says anything about it. `ours`: whether a zone is one of the network's.
    pub(super) fn answer(
        &self,
        query: &Query<'_>,
        ours: impl Fn(&Name) -> bool,
        source: &Source,
    ) -> Option<Vec<u8>> {
        if self.zones.is_empty() {
            return None;
        }
        let name = query.name.text();
        let mut beyond = false;
        for zone in &self.zones {
            let under = || name.strip_suffix(&zone.name.text())?.strip_suffix('.').filter(|l| !l.is_empty());
            if !query.name.suffixes().skip(1).any(|suffix| suffix == zone.name.wire()) {
                continue;
            }
            let Some(label) = under() else { continue };
            let found = zone.rules.iter().filter(|rule| rule.fits(label)).find_map(|rule| rule.given.address);
            let Some(address) = found.or(zone.default) else {
                beyond |= !ours(&zone.name);
                continue;
            };
            let wanted = match query.kind {
                kind::A => address.is_ipv4(),
                kind::AAAA => address.is_ipv6(),
                kind => kind == kind::ANY,
            };
            let data = [Data::Address(address)];
            return Some(query.answer(0, if wanted { &data } else { &[] }, source));
        }
        // Without a SOA, so that nobody keeps it (RFC 2308 §5).
        beyond.then(|| query.error(Rcode::NxDomain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(name: &str, records: &[(&str, &str, Option<&str>)], default: Option<&str>) -> GivenZone {
        let record = |(name, address, pattern): &(&str, &str, Option<&str>)| GivenRecord {
            name: (*name).into(),
            address: address.parse().ok(),
            pattern: pattern.map(str::to_owned),
        };
        GivenZone {
            name: name.into(),
            records: records.iter().map(record).collect(),
            default: default.map(|d| d.parse().unwrap()),
        }
    }

    /// What `patterns` say of `name`: the code, and the address if there is one.
    fn asked(patterns: &Patterns, name: &str, kind: u16) -> Option<(u8, Option<IpAddr>)> {
        let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(u8::try_from(label.len()).unwrap());
            bytes.extend(label.bytes());
        }
        bytes.extend([0, 0, u8::try_from(kind).unwrap(), 0, 1]);
        let query = Query::parse(&bytes).unwrap();
        let name = Name::from_text("gateway.test").unwrap();
        let source = Source::new(&name, &name, 5);
        let answer = patterns.answer(&query, |zone| zone.text() == "docker.internal", &source)?;
        let address = (answer[7] == 1).then(|| match answer.len() {
            n if kind == kind::A => IpAddr::from(<[u8; 4]>::try_from(&answer[n - 4..]).unwrap()),
            n => IpAddr::from(<[u8; 16]>::try_from(&answer[n - 16..]).unwrap()),
        });
        Some((answer[3] & 15, address))
    }

    fn is(text: &str) -> Option<(u8, Option<IpAddr>)> {
        Some((0, Some(text.parse().unwrap())))
    }

    #[test]
    fn names_then_patterns_then_the_default_and_nothing_else() {
        let mut patterns = Patterns::default();
        let records = [
            ("api", "10.0.0.1", None),
            ("", "10.0.0.2", Some("^crc-.*-0$")),
            ("Six", "fd00::6", None),
            ("void", "", None),
        ];
        patterns.add(&zone("crc.testing.", &records, None)).unwrap();
        patterns.add(&zone("apps-crc.testing", &[], Some("10.0.0.9"))).unwrap();
        for (name, kind, answer) in [
            ("api.crc.testing", kind::A, is("10.0.0.1")),
            // Names have no case (RFC 4343), unlike in gvproxy.
            ("API.Crc.Testing", kind::A, is("10.0.0.1")),
            ("crc-x.y-0.crc.testing", kind::A, is("10.0.0.2")),
            ("six.crc.testing", kind::AAAA, is("fd00::6")),
            ("six.crc.testing", kind::A, Some((0, None))),
            ("api.crc.testing", kind::AAAA, Some((0, None))),
            ("void.crc.testing", kind::A, Some((3, None))),
            ("other.crc.testing", kind::A, Some((3, None))),
            ("any.name.apps-crc.testing", kind::A, is("10.0.0.9")),
            ("crc.testing", kind::A, None),
            ("notcrc.testing", kind::A, None),
        ] {
            assert_eq!(asked(&patterns, name, kind), answer, "{name}");
        }
    }

    #[test]
    fn a_zone_that_is_there_gets_new_records_first_and_a_new_default() {
        let mut patterns = Patterns::default();
        patterns.add(&zone("a.test.", &[("x", "10.0.0.1", None)], Some("10.0.0.5"))).unwrap();
        patterns.add(&zone("A.test", &[("x", "10.0.0.2", None)], None)).unwrap();
        assert_eq!(asked(&patterns, "x.a.test", kind::A), is("10.0.0.2"));
        assert_eq!(asked(&patterns, "y.a.test", kind::A), Some((3, None)));
        let listed: Vec<GivenZone> = patterns.list().collect();
        let both = [("x", "10.0.0.2", None), ("x", "10.0.0.1", None)];
        assert_eq!(listed, [zone("a.test.", &both, None)]);
    }

    #[test]
    fn a_zone_of_the_network_keeps_its_names() {
        let mut patterns = Patterns::default();
        patterns.add(&zone("docker.internal.", &[("kubernetes", "10.0.0.1", None)], None)).unwrap();
        assert_eq!(asked(&patterns, "kubernetes.docker.internal", kind::A), is("10.0.0.1"));
        assert_eq!(asked(&patterns, "host.docker.internal", kind::A), None);
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut patterns = Patterns::default();
        for bad in [
            zone("", &[], None),
            zone("a..b", &[], None),
            zone("a.test", &[("", "10.0.0.1", Some("("))], None),
            zone("a.test", &[("", "10.0.0.1", Some("(a{999}){999}"))], None),
            zone("a.test", &vec![("x", "10.0.0.1", None); RECORDS_MAX + 1], None),
        ] {
            assert!(patterns.add(&bad).is_err(), "{}", bad.name);
        }
        assert_eq!(patterns.list().count(), 0);
        for n in 0..ZONES_MAX {
            patterns.add(&zone(&format!("z{n}.test"), &[], None)).unwrap();
        }
        assert!(matches!(patterns.add(&zone("more.test", &[], None)), Err(DnsError::TooManyZones(_))));
        patterns.add(&zone("z0.test", &[], None)).unwrap();
    }
}
