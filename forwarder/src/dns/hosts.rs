//! Names of the operator and of the host's hosts file (hosts(5)).

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use super::message::{A, AAAA, Data, PTR, Question};

/// How often the file is looked at, at the most.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes of the file that are read.
const LARGEST: u64 = 4 << 20;

/// Names and addresses.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    names: HashMap<String, Vec<IpAddr>>,
    addresses: HashMap<IpAddr, String>,
    file: Option<PathBuf>,
    /// What a loopback address of the file becomes.
    alias: Vec<IpAddr>,
    looked: Option<Instant>,
    seen: Option<(SystemTime, u64, u64)>,
}

impl Hosts {
    pub(super) fn fixed(records: &[(String, IpAddr)]) -> Self {
        let mut hosts = Self::default();
        for (name, ip) in records {
            hosts.names.entry(name.to_ascii_lowercase()).or_default().push(*ip);
            hosts.addresses.entry(*ip).or_insert_with(|| name.clone());
        }
        hosts
    }

    pub(super) fn file(file: Option<PathBuf>, alias: Vec<IpAddr>) -> Self {
        Self { file, alias, ..Self::default() }
    }

    /// The records for a question; an empty list is NODATA, `None` a name that is not here.
    pub(super) fn lookup(&self, question: &Question) -> Option<Vec<Data>> {
        if question.class != 1 {
            return None;
        }
        if question.kind == PTR {
            let name = self.addresses.get(&question.reverse()?)?;
            return Some(vec![Data::Name(name.clone())]);
        }
        let all = self.names.get(&question.name)?;
        let wanted = all.iter().filter(|ip| match question.kind {
            A => ip.is_ipv4(),
            AAAA => ip.is_ipv6(),
            _ => false,
        });
        Some(wanted.map(|ip| Data::Address(*ip)).collect())
    }

    /// The same, after the file was read again if it has changed.
    pub(super) fn lookup_fresh(&mut self, question: &Question) -> Option<Vec<Data>> {
        self.refresh(Instant::now());
        self.lookup(question)
    }

    fn refresh(&mut self, now: Instant) {
        use std::os::unix::fs::MetadataExt;
        let Some(path) = &self.file else { return };
        if self.looked.is_some_and(|at| now.duration_since(at) < LOOK) {
            return;
        }
        self.looked = Some(now);
        let meta = std::fs::metadata(path).ok();
        let seen = meta.and_then(|m| Some((m.modified().ok()?, m.len(), m.ino())));
        if seen == self.seen {
            return;
        }
        self.seen = seen;
        let text = match seen {
            Some((_, len, _)) if len <= LARGEST => std::fs::read_to_string(path).unwrap_or_default(),
            _ => String::new(),
        };
        self.read(&text);
    }

    fn read(&mut self, text: &str) {
        self.names.clear();
        self.addresses.clear();
        for line in text.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            // A scope (fe80::1%eth0) means nothing to a guest.
            let Some(ip) = words.next().and_then(|w| w.parse::<IpAddr>().ok()) else { continue };
            let given: Vec<IpAddr> = if ip.is_loopback() { self.alias.clone() } else { vec![ip] };
            for (n, name) in words.enumerate() {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                // localhost is the guest's own (RFC 6761 §6.3).
                if name == "localhost" || name.ends_with(".localhost") || name.is_empty() {
                    continue;
                }
                let all = self.names.entry(name.clone()).or_default();
                all.extend(given.iter().filter(|g| !all.contains(g)).copied().collect::<Vec<_>>());
                if n == 0 && !ip.is_loopback() {
                    self.addresses.entry(ip).or_insert(name);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names_become_the_host_alias_and_localhost_stays_the_guests() {
        let alias = IpAddr::from([192, 168, 127, 254]);
        let mut hosts = Hosts::file(None, vec![alias]);
        hosts.read("127.0.0.1 localhost\n127.0.1.1 Box box.lan # us\n192.0.2.7\tdb db2\nbad line\n::1 box\n");
        assert_eq!(hosts.names["box"], [alias]);
        assert_eq!(hosts.names["db2"], [IpAddr::from([192, 0, 2, 7])]);
        assert!(!hosts.names.contains_key("localhost"));
        assert_eq!(hosts.addresses[&IpAddr::from([192, 0, 2, 7])], "db");
    }
}
