//! A resolver to ask, and which names it is asked about.
//!
//! ```text
//!  [DOMAIN=]IP[:PORT]                       192.0.2.53   corp.example=10.0.0.53   [2001:db8::1]:5353
//!  [DOMAIN=]tls://IP[:PORT][#NAME]          tls://192.0.2.53#dns.example
//!  [DOMAIN=]https://IP[:PORT][/PATH][#NAME] https://192.0.2.53/dns-query#dns.example
//! ```
//! `#NAME` is the name in the server's certificate, as systemd-resolved writes it; without it the address has to be there. The
//! server itself is named by its address, for a name would have to be asked of somebody who is not asked in secret.
//!
//! The servers of the longest domain that a name lies in are asked about it, and no others: names of a company's network do
//! not leak to the resolvers of the outside, and its resolvers are not asked about the rest of the world.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;
use tokio_rustls::rustls::pki_types::ServerName;

use super::wire::Name;

/// The port resolvers listen on.
const PORT: u16 = 53;
/// The same for TLS (RFC 7858 §3.1).
const TLS_PORT: u16 = 853;
/// The same for HTTPS.
pub(super) const HTTPS_PORT: u16 = 443;
/// The path that most servers have (RFC 8484 §4.1.1's example).
const PATH: &str = "/dns-query";

/// One resolver.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// How messages go there.
    pub channel: Channel,
}

/// How messages go to a resolver and come back.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Channel {
    /// As datagrams, and by TCP where one is too small (RFC 1035).
    Clear,
    /// Over TLS (RFC 7858).
    Tls {
        /// Whom the certificate has to be for.
        name: ServerName<'static>,
    },
    /// Over HTTPS (RFC 8484).
    Https {
        /// Whom the certificate has to be for.
        name: ServerName<'static>,
        /// The path, and a query if it has one.
        path: Arc<str>,
    },
}

impl From<SocketAddr> for Server {
    fn from(address: SocketAddr) -> Self {
        Self { address, channel: Channel::Clear }
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = self.address;
        let named = |name: &ServerName<'_>| match name {
            name if *name == ServerName::from(address.ip()) => String::new(),
            name => format!("#{}", name.to_str()),
        };
        match &self.channel {
            Channel::Clear => address.fmt(f),
            Channel::Tls { name } => write!(f, "tls://{address}{}", named(name)),
            Channel::Https { name, path } => write!(f, "https://{address}{path}{}", named(name)),
        }
    }
}

impl FromStr for Server {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, scheme) = match text.split_once("://") {
            None => {
                let example = "192.0.2.53 or [2001:db8::1]:53";
                let found = address(text, PORT);
                return found
                    .map(Self::from)
                    .ok_or_else(|| format!("{text:?} is not IP[:PORT]; an example: {example}"));
            }
            Some(("tls", rest)) => (rest, TLS_PORT),
            Some(("https", rest)) => (rest, HTTPS_PORT),
            Some(_) => {
                return Err(format!(
                    "{text:?}: resolvers are asked by IP[:PORT], tls:// and https://; an example: \
                     tls://192.0.2.53#dns.example"
                ));
            }
        };
        let (rest, name) = rest.split_once('#').map_or((rest, None), |(rest, name)| (rest, Some(name)));
        let (place, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let address = address(place, scheme).ok_or_else(|| {
            format!(
                "{text:?}: {place:?} is not IP[:PORT]: the server is given by its address and the name in its \
                 certificate; an example: https://192.0.2.53/dns-query#dns.example"
            )
        })?;
        let name = match name {
            None => ServerName::from(address.ip()),
            Some(name) => ServerName::try_from(name.to_owned())
                .map_err(|_| format!("{text:?}: {name:?} is no name of a server; an example: dns.example"))?,
        };
        let channel = match (scheme, path) {
            (TLS_PORT, "") => Channel::Tls { name },
            (TLS_PORT, _) => {
                return Err(format!("{text:?}: tls:// has no path; an example: tls://192.0.2.53"));
            }
            (_, "" | "/") => Channel::Https { name, path: PATH.into() },
            (_, path) if path.parse::<hyper::http::uri::PathAndQuery>().is_ok() => {
                Channel::Https { name, path: path.into() }
            }
            (_, path) => return Err(format!("{text:?}: {path:?} is no path; an example: {PATH}")),
        };
        Ok(Self { address, channel })
    }
}

fn address(text: &str, port: u16) -> Option<SocketAddr> {
    let bare = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let found = bare.map(|ip| SocketAddr::new(ip, port)).or_else(|_| text.parse::<SocketAddr>());
    found.ok().filter(|at| at.port() != 0)
}

/// `[DOMAIN=]SERVER`: a resolver for every name, or for those of one domain.
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
        // A path may have a sign of equality, too.
        let parts = text.split_once('=').filter(|(domain, _)| !domain.contains("://"));
        let Some((domain, server)) = parts else {
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
                upstreams.iter().filter(|u| u.domain.as_ref() == domain).map(|u| u.server.clone()).collect();
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
    fn a_server_may_be_asked_over_tls_or_https_and_is_shown_as_it_is_written() {
        for (text, shown) in [
            ("tls://192.0.2.53", "tls://192.0.2.53:853"),
            ("tls://[2001:db8::1]:8853#Dns.example", "tls://[2001:db8::1]:8853#Dns.example"),
            ("tls://2001:db8::1", "tls://[2001:db8::1]:853"),
            ("tls://127.0.0.1#192.0.2.53", "tls://127.0.0.1:853#192.0.2.53"),
            ("https://192.0.2.53", "https://192.0.2.53:443/dns-query"),
            ("https://192.0.2.53:444/q?a=b#dns.example", "https://192.0.2.53:444/q?a=b#dns.example"),
        ] {
            let upstream: Upstream = text.parse().unwrap();
            assert_eq!((upstream.domain, upstream.server.to_string()), (None, shown.into()));
            let upstream: Upstream = format!("corp.example={text}").parse().unwrap();
            assert_eq!(
                (upstream.domain.unwrap(), upstream.server.to_string()),
                ("corp.example".into(), shown.into())
            );
            assert_eq!(shown.parse::<Server>().unwrap(), text.parse().unwrap());
        }
        for (bad, why) in [
            ("tls://dns.example", "is not IP[:PORT]"),
            ("tls://192.0.2.53/dns-query", "has no path"),
            ("tls://192.0.2.53#", "no name of a server"),
            ("https://192.0.2.53/a b", "no path"),
            ("quic://192.0.2.53", "tls:// and https://"),
            ("https://", "is not IP[:PORT]"),
        ] {
            let error = bad.parse::<Server>().unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
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
