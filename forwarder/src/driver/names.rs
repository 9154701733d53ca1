//! Which names of guests stand for which addresses.
//!
//! A name the operator gave (a link's, a static lease's) is its owner's, whoever else calls himself so, and before the
//! owner is there; a name a guest gave itself is the first guest's that has it. Of two leases of one machine under one name,
//! its boot loader's and its system's, the newer one counts.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use portway_netstack::dhcp::LeaseReport;

/// The names of `leases`, in the order of the leases. `links` are the names of the configured links.
pub(super) fn of<'a>(
    leases: &'a [LeaseReport],
    links: impl Iterator<Item = &'a str>,
) -> Vec<(String, IpAddr)> {
    let fixed = leases.iter().filter(|l| l.fixed && l.named).filter_map(|l| l.name.as_deref());
    let reserved: HashSet<&str> = links.chain(fixed).collect();
    let mut owners: HashMap<&str, &LeaseReport> = HashMap::new();
    for lease in leases.iter().filter(|l| l.remaining.is_some()) {
        let Some(name) = lease.name.as_deref() else { continue };
        if !lease.named && reserved.contains(name) {
            continue;
        }
        let owner = owners.entry(name).or_insert(lease);
        let newer = lease.age < owner.age;
        let better = match (lease.named, owner.named) {
            (true, false) => true,
            (false, true) => false,
            _ if lease.mac == owner.mac => newer,
            _ => !newer && lease.age > owner.age,
        };
        if better {
            *owner = lease;
        }
    }
    let mut names: Vec<_> = owners.into_iter().map(|(name, l)| (name.to_owned(), IpAddr::V4(l.ip))).collect();
    names.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    names
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use portway_netstack::Mac;

    use super::*;

    fn lease(last: u8, mac: u8, name: &str, named: bool, age: u64) -> LeaseReport {
        LeaseReport {
            ip: [192, 168, 127, last].into(),
            mac: Mac([2, 0, 0, 0, 0, mac]),
            client_id: None,
            port: None,
            name: Some(name.to_owned()),
            named,
            remaining: Some(Duration::from_secs(60)),
            age: Duration::from_secs(age),
            fixed: false,
        }
    }

    fn owners(leases: &[LeaseReport], links: &[&str]) -> Vec<(String, u8)> {
        let last = |ip: IpAddr| if let IpAddr::V4(ip) = ip { ip.octets()[3] } else { 0 };
        of(leases, links.iter().copied()).into_iter().map(|(name, ip)| (name, last(ip))).collect()
    }

    #[test]
    fn a_name_is_its_first_owners_though_another_has_a_lower_address() {
        let leases = [lease(3, 1, "web", false, 5), lease(9, 2, "web", false, 50)];
        assert_eq!(owners(&leases, &[]), [("web".to_owned(), 9)]);
    }

    #[test]
    fn a_name_the_operator_gave_is_nobody_elses_even_before_its_owner_is_there() {
        let thief = lease(3, 1, "db", false, 500);
        assert_eq!(owners(std::slice::from_ref(&thief), &["db"]), []);
        let owner = lease(9, 2, "db", true, 1);
        assert_eq!(owners(&[thief.clone(), owner.clone()], &["db"]), [("db".to_owned(), 9)]);
        let absent = LeaseReport { fixed: true, remaining: None, ..owner };
        assert_eq!(owners(&[thief, absent], &[]), []);
    }

    #[test]
    fn of_two_leases_of_one_machine_the_newer_has_the_name() {
        let leases = [lease(2, 1, "vm", true, 60), lease(3, 1, "vm", true, 10)];
        assert_eq!(owners(&leases, &["vm"]), [("vm".to_owned(), 3)]);
    }
}
