//! A resolver to ask, and which names it is asked about.
//!
//! ```text
//!  [DOMAIN=]IP[:PORT]          192.0.2.53   corp.example=10.0.0.53   [2001:db8::1]:5353
//! ```
//! The servers of the longest domain that a name lies in are asked about it, and no others: names of a company's network do
//! not leak to the resolvers of the outside, and its resolvers are not asked about the rest of the world.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;

use super::wire::Name;

/// The port resolvers listen on.
const PORT: u16 = 53;

/// One resolver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
}

impl From<SocketAddr> for Server {
    fn from(address: SocketAddr) -> Self {
        Self { address }
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.address.fmt(f)
    }
}

impl FromStr for Server {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let address = bare.map(|ip| SocketAddr::new(ip, PORT)).or_else(|_| text.parse::<SocketAddr>());
        address
            .map(Self::from)
            .map_err(|_| format!("{text:?} is not IP[:PORT]; an example: 192.0.2.53 or [2001:db8::1]:53"))
    }
}

/// `[DOMAIN=]IP[:PORT]`: a resolver for every name, or for those of one domain.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Upstream {
    /// The domain; `None`: every name that no domain has.
    pub domain: Option<String>,
    /// The resolver.
    pub server: Server,
}

impl FromStr for Upstream {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((domain, server)) = text.split_once('=') else {
            return Ok(Self { domain: None, server: text.parse()? });
        };
        if Name::from_text(domain).is_none() {
            return Err(format!("{domain:?} is not a domain; an example: corp.example=10.0.0.53"));
        }
        Ok(Self { domain: Some(domain.to_ascii_lowercase()), server: server.parse()? })
    }
}

impl TryFrom<String> for Upstream {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Which servers know about which names, as far as it was configured.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// For every name without a domain in here; `None` follows the host's resolv.conf.
    pub(super) default: Option<Arc<[Server]>>,
    domains: Vec<(Name, Arc<[Server]>)>,
}

impl Routes {
    /// The routes of `upstreams`; a text that is no domain is returned.
    pub(super) fn new(upstreams: &[Upstream]) -> Result<Self, String> {
        let of = |domain: Option<&String>| -> Option<Arc<[Server]>> {
            let servers: Vec<Server> =
                upstreams.iter().filter(|u| u.domain.as_ref() == domain).map(|u| u.server).collect();
            (!servers.is_empty()).then(|| servers.into())
        };
        let mut domains: Vec<(Name, Arc<[Server]>)> = Vec::new();
        for text in upstreams.iter().filter_map(|u| u.domain.as_ref()) {
            let name = Name::from_text(text).ok_or_else(|| text.clone())?;
            if let Some(servers) = of(Some(text)).filter(|_| domains.iter().all(|(known, _)| *known != name))
            {
                domains.push((name, servers));
            }
        }
        Ok(Self { default: of(None), domains })
    }

    /// The servers of the domain `name` lies in, the longest one.
    pub(super) fn of_domain(&self, name: &Name) -> Option<Arc<[Server]>> {
        let lies_in = |domain: &Name| name.suffixes().any(|suffix| suffix == domain.wire());
        let mine = self.domains.iter().filter(|(domain, _)| lies_in(domain));
        mine.max_by_key(|(domain, _)| domain.wire().len()).map(|(_, servers)| Arc::clone(servers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_may_stand_behind_a_domain() {
        let upstream = |text: &str| text.parse::<Upstream>().map(|u| (u.domain, u.server.to_string()));
        assert_eq!(upstream("192.0.2.53"), Ok((None, "192.0.2.53:53".into())));
        assert_eq!(upstream("[2001:db8::1]:5353"), Ok((None, "[2001:db8::1]:5353".into())));
        assert_eq!(upstream("2001:db8::1"), Ok((None, "[2001:db8::1]:53".into())));
        assert_eq!(
            upstream("Corp.example=10.0.0.53:54"),
            Ok((Some("corp.example".into()), "10.0.0.53:54".into()))
        );
        for bad in ["", "=1.1.1.1", "a..b=1.1.1.1", "corp.example=", "dns.example", "1.1.1.1=corp"] {
            assert!(upstream(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_longest_domain_wins_and_has_all_its_servers() {
        let upstreams =
            ["corp.example=10.0.0.1", "corp.example=10.0.0.2", "eu.corp.example=10.0.0.3", "1.1.1.1"];
        let upstreams: Vec<Upstream> = upstreams.iter().map(|t| t.parse().unwrap()).collect();
        let routes = Routes::new(&upstreams).unwrap();
        let servers = |text: &str| {
            let of = routes.of_domain(&Name::from_text(text).unwrap());
            of.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(servers("a.CORP.example").unwrap(), ["10.0.0.1:53", "10.0.0.2:53"]);
        assert_eq!(servers("eu.corp.example").unwrap(), ["10.0.0.3:53"]);
        assert_eq!(servers("notcorp.example"), None);
        assert_eq!(routes.default.unwrap().len(), 1);
    }
}
