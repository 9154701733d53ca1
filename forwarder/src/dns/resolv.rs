//! resolv.conf(5): whom the host asks, and the domains it searches.
//!
//! Read are `nameserver` (IPv4, IPv6 with a scope), `search` and `domain`. `options` are left alone: time limits
//! and retries are the relay's own, and `ndots` is a matter of the guest's resolver. A line that makes no sense is
//! skipped, as the C library does.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The port resolvers listen on.
pub(super) const PORT: u16 = 53;
/// Servers used of a resolv.conf: the C library's `MAXNS`.
pub(super) const SERVERS_MAX: usize = 3;
/// Search domains kept; the C library has had no limit since 2.26, DHCP option 119 has.
const SEARCH_MAX: usize = 32;

/// What a resolv.conf says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvConf {
    /// The resolvers, in the order they are to be asked.
    pub servers: Vec<SocketAddr>,
    /// The domains to search, without a dot at the end.
    pub search: Vec<String>,
}

impl ResolvConf {
    /// Reads the text of a resolv.conf; the last `search` or `domain` line wins.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            // A comment starts the line (resolv.conf(5)); `#` behind a value is common and never part of one.
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    if let Some(server) = words.next().and_then(parse_server)
                        && conf.servers.len() < SERVERS_MAX
                    {
                        conf.servers.push(server);
                    }
                }
                Some("search") => conf.search = words.filter_map(domain).take(SEARCH_MAX).collect(),
                Some("domain") => conf.search = words.filter_map(domain).take(1).collect(),
                _ => {}
            }
        }
        conf
    }
}

/// A search domain; `search .` means none.
fn domain(word: &str) -> Option<String> {
    let name = word.strip_suffix('.').unwrap_or(word);
    super::wire::Name::from_text(name).map(|_| name.to_owned())
}

fn parse_server(word: &str) -> Option<SocketAddr> {
    if let Ok(address) = word.parse::<IpAddr>() {
        return Some(SocketAddr::new(address, PORT));
    }
    let (address, scope) = word.split_once('%')?;
    let address = address.parse::<Ipv6Addr>().ok()?;
    // A scope is an interface's name or its number; one that is gone leaves no way to the server.
    let scope = nix::net::if_::if_nametoindex(scope)
        .ok()
        .or_else(|| scope.parse().ok().filter(|&index| index != 0))?;
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_keep_their_order_and_the_last_search_line_wins() {
        let conf = ResolvConf::parse(
            "# made by hand\ndomain old.example\nnameserver 192.0.2.1\nnameserver 2001:db8::1 # office\n\
             options timeout:1 ndots:5\nsearch corp.example. lab.example\n; the end",
        );
        assert_eq!(conf.servers, ["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
        assert_eq!(conf.search, ["corp.example", "lab.example"]);
    }

    #[test]
    fn a_link_local_server_keeps_its_scope() {
        let conf =
            ResolvConf::parse("nameserver fe80::1%lo\nnameserver fe80::2%7\nnameserver fe80::3%nosuchif0");
        let scopes: Vec<u32> = conf
            .servers
            .iter()
            .map(|s| match s {
                SocketAddr::V6(s) => s.scope_id(),
                SocketAddr::V4(_) => 0,
            })
            .collect();
        assert_eq!(scopes, [nix::net::if_::if_nametoindex("lo").unwrap(), 7]);
    }

    #[test]
    fn nonsense_lines_are_skipped_and_the_fourth_server_too() {
        let conf = ResolvConf::parse(
            "nameserver\nnameserver dns.example\nnameservers 192.0.2.9\nnameserver 1.1.1.1\nnameserver 1.1.1.2\n\
             nameserver 1.1.1.3\nnameserver 1.1.1.4\nsearch .\n",
        );
        assert_eq!(conf.servers.len(), SERVERS_MAX);
        assert!(conf.search.is_empty());
    }
}
