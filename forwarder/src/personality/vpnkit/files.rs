//! The files vpnkit's options name: resolvers, DHCP, forwards of the gateway.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use portway_netstack::{GatewayForward, Transport};
use serde::Deserialize;

use crate::dns::Upstream;
use crate::request::{Request, Requests};

/// How often a file that is followed is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes of a file.
const SIZE: u64 = 1 << 20;

/// The text of a file that an option names.
pub(super) fn read(option: &str, path: &Path) -> Result<String, String> {
    let fault = |e: &dyn std::fmt::Display| format!("{option} {}: {e}", path.display());
    let size = std::fs::metadata(path).map_err(|e| fault(&e))?.len();
    if size > SIZE {
        return Err(fault(&format!("larger than {SIZE} bytes")));
    }
    std::fs::read_to_string(path).map_err(|e| fault(&e))
}

/// What a `--dns` file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Resolvers {
    /// Whom to ask, about everything or one domain.
    pub(super) upstreams: Vec<Upstream>,
    /// Domains to search.
    pub(super) search: Vec<String>,
    /// What of it has no effect.
    pub(super) warnings: Vec<String>,
}

/// Reads a `--dns` file: `nameserver IP[#PORT]`, `search`; a server with `zone` is for those domains alone.
pub(super) fn resolvers(path: &Path) -> Result<Resolvers, String> {
    let known = parse_resolvers(&read("--dns", path)?);
    if known.upstreams.is_empty() {
        return Err(format!("--dns {}: no nameserver is in it", path.display()));
    }
    Ok(known)
}

fn parse_resolvers(text: &str) -> Resolvers {
    let mut known = Resolvers::default();
    // The server the lines are about, and the domains it is for.
    let mut server: Option<(SocketAddr, Vec<String>)> = None;
    let finish = |server: Option<(SocketAddr, Vec<String>)>, known: &mut Resolvers| {
        let Some((address, zones)) = server else { return };
        let upstream = |domain| Upstream { domain, server: address.into() };
        if zones.is_empty() {
            known.upstreams.push(upstream(None));
        }
        known.upstreams.extend(zones.into_iter().map(|zone| upstream(Some(zone))));
    };
    for line in text.lines() {
        let mut words = line.split_whitespace().take_while(|w| !w.starts_with(['#', ';']));
        let mut say = |text: String| known.warnings.push(format!("--dns: {text}"));
        match words.next() {
            Some("nameserver") => {
                let next = words.next().and_then(parse_server);
                if next.is_none() {
                    say(format!("{line:?} names no server"));
                }
                finish(std::mem::replace(&mut server, next.map(|a| (a, Vec::new()))), &mut known);
            }
            Some("zone") => match &mut server {
                Some((_, zones)) => {
                    zones.extend(words.map(|w| w.trim_end_matches('.').to_ascii_lowercase()));
                }
                None => say(format!("{line:?} stands behind no nameserver")),
            },
            Some("search") => known.search.extend(words.map(|w| w.trim_end_matches('.').to_owned())),
            Some(other @ ("timeout" | "order" | "assume-offline-after")) => {
                say(format!("{other} has no effect: servers are asked by how fast they answer"));
            }
            _ => {}
        }
    }
    finish(server, &mut known);
    known
}

fn parse_server(word: &str) -> Option<SocketAddr> {
    let (ip, port) = word.split_once('#').map_or((word, Some(53)), |(ip, port)| (ip, port.parse().ok()));
    Some(SocketAddr::new(ip.parse::<IpAddr>().ok()?, port.filter(|p| *p > 0)?))
}

/// What a `--dhcp-path` file says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Dhcp {
    /// Domains to search.
    pub(super) search_domains: Vec<String>,
    /// The domain.
    pub(super) domain_name: Option<String>,
}

/// Reads a `--dhcp-path` file.
pub(super) fn dhcp(path: &Path) -> Result<Dhcp, String> {
    let text = read("--dhcp-path", path)?;
    serde_json::from_str(&text).map_err(|e| format!("--dhcp-path {}: {e}", path.display()))
}

/// Reads a `--forwards` file.
pub(super) fn forwards(path: &Path) -> Result<Vec<super::Outgoing>, String> {
    super::outgoing::parse(&read("--forwards", path)?)
        .map_err(|e| format!("--forwards {}: {e}", path.display()))
}

/// One entry of a `--gateway-forwards` file.
#[derive(Debug, Deserialize)]
struct Entry {
    protocol: String,
    external_port: u16,
    internal_ip: Ipv4Addr,
    internal_port: u16,
}

fn parse_forwards(text: &str) -> Result<Vec<GatewayForward>, String> {
    let entries: Vec<Entry> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let forward = |e: Entry| {
        let transport = match e.protocol.as_str() {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            other => return Err(format!("protocol {other:?}: tcp or udp is needed")),
        };
        if e.external_port == 0 || e.internal_port == 0 {
            return Err("a port is 0".to_owned());
        }
        let to = SocketAddr::new(e.internal_ip.into(), e.internal_port);
        Ok(GatewayForward { transport, port: e.external_port, to })
    };
    entries.into_iter().map(forward).collect()
}

/// A `--gateway-forwards` file, followed.
pub(super) struct GatewayForwards {
    path: PathBuf,
    /// Those of the command line, which come after the file's.
    fixed: Vec<GatewayForward>,
    text: String,
    all: Vec<GatewayForward>,
}

impl GatewayForwards {
    pub(super) fn read(path: &Path, fixed: Vec<GatewayForward>) -> Result<Self, String> {
        let text = read("--gateway-forwards", path)?;
        let known =
            parse_forwards(&text).map_err(|e| format!("--gateway-forwards {}: {e}", path.display()))?;
        Ok(Self { path: path.to_owned(), all: [known, fixed.clone()].concat(), fixed, text })
    }

    pub(super) fn all(&self) -> &[GatewayForward] {
        &self.all
    }

    /// Tells the network of changes, for ever. A file that cannot be used is said once and changes nothing.
    pub(super) async fn follow(mut self, requests: Requests) {
        let mut look = tokio::time::interval(LOOK);
        let mut said = String::new();
        loop {
            look.tick().await;
            let changed = match read("--gateway-forwards", &self.path) {
                Ok(text) if text == self.text => continue,
                Ok(text) => parse_forwards(&text).map(|known| (text, known)),
                Err(error) => Err(error),
            };
            match changed {
                Ok((text, known)) => {
                    let all = [known, self.fixed.clone()].concat();
                    // Another time when the queue is full.
                    if requests.send(Request::GatewayForwards(all)).is_ok() {
                        self.text = text;
                        said.clear();
                    }
                }
                Err(error) if error != said => {
                    tracing::warn!(%error, "--gateway-forwards stay as they are");
                    said = error;
                }
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dns_file_is_read_and_what_has_no_effect_is_said() {
        let known = parse_resolvers(
            "# ours\nnameserver 192.0.2.1#5353\nnameserver 192.0.2.2 # office\ntimeout 500\nnameserver 10.0.0.1\nzone Corp.test. lab.test\n\
             nameserver nowhere\nzone lost.test\nsearch corp.test. lab.test\n",
        );
        let shown = |u: &Upstream| (u.domain.clone().unwrap_or_default(), u.server.to_string());
        assert_eq!(
            known.upstreams.iter().map(shown).collect::<Vec<_>>(),
            [
                ("", "192.0.2.1:5353"),
                ("", "192.0.2.2:53"),
                ("corp.test", "10.0.0.1:53"),
                ("lab.test", "10.0.0.1:53")
            ]
            .map(|(domain, server)| (domain.to_owned(), server.to_owned()))
        );
        assert_eq!(known.search, ["corp.test", "lab.test"]);
        assert_eq!(known.warnings.len(), 3, "{:?}", known.warnings);
        assert_eq!(parse_server("::1"), Some("[::1]:53".parse().unwrap()));
        assert_eq!(parse_server("192.0.2.1#0"), None);
    }

    #[test]
    fn gateway_forwards_are_checked() {
        let text =
            r#"[{"protocol":"udp","external_port":123,"internal_ip":"127.0.0.1","internal_port":1123}]"#;
        let to = "127.0.0.1:1123".parse().unwrap();
        assert_eq!(
            parse_forwards(text),
            Ok(vec![GatewayForward { transport: Transport::Udp, port: 123, to }])
        );
        for bad in [
            "{}",
            r#"[{"protocol":"sctp","external_port":1,"internal_ip":"127.0.0.1","internal_port":1}]"#,
            r#"[{"protocol":"tcp","external_port":0,"internal_ip":"127.0.0.1","internal_port":1}]"#,
            r#"[{"protocol":"tcp","external_port":1,"internal_ip":"::1","internal_port":1}]"#,
            r#"[{"protocol":"tcp","external_port":1}]"#,
        ] {
            assert!(parse_forwards(bad).is_err(), "{bad}");
        }
    }
}
