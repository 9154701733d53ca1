//! Which of a guest's listeners are published by themselves: the first rule that matches decides.
//!
//! Rules are `[[auto-publish]]` tables of the configuration file, in their order; `--publish auto` adds a last one that
//! matches everything. What no rule matches is not published.
//!
//! | key | means |
//! |---|---|
//! | `guest-address` | an address, `any`, or `unspecified` (0.0.0.0 and :: only) \[default: 127.0.0.1\] |
//! | `guest-ports` | `80` or `3000-3009` \[default: all\] |
//! | `proto` | `tcp`, `udp` or `any` \[default: any\] |
//! | `ignore` | matches, and publishes nothing |
//! | `host-bind` | where the host listens \[default: localhost, which is 127.0.0.1 and ::1\] |
//! | `host-ports` | as many as `guest-ports` \[default: the guest's\] |
//! | `host-socket` | a unix socket in the place of a TCP port |
//! | `next-free` | a port that is taken on the host is published at the next free one |
//!
//! An address is matched as Lima matches it, so that its users' rules mean what they meant: a listener on every address
//! is one of each address too, and ::1 counts as 127.0.0.1. An `ignore` for one address does not hide a listener on every
//! address.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use portway_api::agent::Listener;
use portway_api::control::Protocol;
use serde::Deserialize;

use crate::publish::spec::Bind;

/// Ports tried at most when the first is taken.
const NEXT_FREE: usize = 64;

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RuleText")]
pub struct Rule {
    address: Addresses,
    ports: RangeInclusive<u16>,
    tcp: bool,
    udp: bool,
    action: Action,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Addresses {
    Any,
    Unspecified,
    Exactly(IpAddr),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Ignore,
    Ports { bind: Bind, first: u16, next_free: bool },
    Socket(PathBuf),
}

/// Where a listener is published.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// A port of the host.
    Port {
        /// The address: `None` for localhost.
        bind: Option<IpAddr>,
        /// The port.
        port: u16,
        /// Whether another will do.
        next_free: bool,
    },
    /// A unix socket.
    Socket(PathBuf),
}

impl Place {
    /// The ports to try, in order.
    pub fn candidates(&self) -> Vec<u16> {
        match self {
            Self::Socket(_) => vec![0],
            Self::Port { port, next_free: false, .. } => vec![*port],
            Self::Port { port, .. } => {
                // A port that needs a privilege is followed by others that do: on from the first that does not.
                let next = if *port < 1024 { Some(1024 + *port) } else { port.checked_add(1) };
                let more = next.into_iter().flat_map(|next| (next..=u16::MAX).take(NEXT_FREE));
                std::iter::once(*port).chain(more).collect()
            }
        }
    }
}

/// A rule as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RuleText {
    guest_address: Option<String>,
    guest_ports: Option<Ports>,
    proto: Option<String>,
    #[serde(default)]
    ignore: bool,
    host_bind: Option<String>,
    host_ports: Option<Ports>,
    host_socket: Option<PathBuf>,
    #[serde(default)]
    next_free: bool,
}

/// A port as a number, or a range as text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ports {
    One(u16),
    Text(String),
}

impl Ports {
    fn range(&self) -> Result<RangeInclusive<u16>, String> {
        let (first, last) = match self {
            Self::One(port) => (Some(*port), Some(*port)),
            Self::Text(text) => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                (first.trim().parse().ok(), last.trim().parse().ok())
            }
        };
        match (first, last) {
            (Some(first), Some(last)) if first > 0 && first <= last => Ok(first..=last),
            _ => Err(format!("auto-publish: {self:?} are not ports: 80 or \"3000-3009\"")),
        }
    }
}

impl Rule {
    /// The host's socket it makes.
    pub(crate) fn socket(&self) -> Option<&std::path::Path> {
        match &self.action {
            Action::Socket(path) => Some(path),
            _ => None,
        }
    }
}

impl TryFrom<RuleText> for Rule {
    type Error = String;

    fn try_from(text: RuleText) -> Result<Self, String> {
        let fault = |fault: String| format!("auto-publish: {fault}");
        let address = match text.guest_address.as_deref() {
            None => Addresses::Exactly(Ipv4Addr::LOCALHOST.into()),
            Some("any") => Addresses::Any,
            Some("unspecified") => Addresses::Unspecified,
            Some(other) => match other.parse::<IpAddr>() {
                Ok(ip) if ip.is_unspecified() => {
                    return Err(fault(format!(
                        "guest-address {other}: say \"unspecified\" for listeners on every address alone, \"any\" for all listeners"
                    )));
                }
                Ok(ip) => Addresses::Exactly(ip),
                Err(_) => {
                    return Err(fault(format!(
                        "guest-address {other:?} is not an address, any or unspecified"
                    )));
                }
            },
        };
        let (tcp, udp) = match text.proto.as_deref() {
            None | Some("any") => (true, true),
            Some("tcp") => (true, false),
            Some("udp") => (false, true),
            Some(other) => return Err(fault(format!("proto {other:?} is not tcp, udp or any"))),
        };
        let ports = text.guest_ports.as_ref().map_or(Ok(1..=u16::MAX), Ports::range)?;
        let host = text.host_ports.as_ref().map(Ports::range).transpose()?;
        let says_host = host.is_some() || text.host_bind.is_some() || text.host_socket.is_some();
        let action = match text.host_socket {
            _ if text.ignore && (says_host || text.next_free) => {
                return Err(fault("a rule that ignores publishes nowhere".into()));
            }
            _ if text.ignore => Action::Ignore,
            Some(_)
                if host.is_some()
                    || text.host_bind.is_some()
                    || text.next_free
                    || udp
                    || ports.len() != 1 =>
            {
                return Err(fault(
                    "host-socket takes one TCP port: guest-ports = 80, proto = \"tcp\"".into(),
                ));
            }
            Some(path) if !path.is_absolute() => {
                return Err(fault(format!("host-socket {} is not absolute", path.display())));
            }
            Some(path) => Action::Socket(path),
            None => {
                let bind = text.host_bind.as_deref().map_or(Ok(Bind::Localhost), |text| match text {
                    "localhost" => Ok(Bind::Localhost),
                    _ => text
                        .parse()
                        .map(Bind::Address)
                        .map_err(|_| fault(format!("host-bind {text:?} is not an address or localhost"))),
                })?;
                let host = host.unwrap_or_else(|| ports.clone());
                if host.len() != ports.len() {
                    return Err(fault(format!(
                        "{} guest ports do not go to {} host ports",
                        ports.len(),
                        host.len()
                    )));
                }
                Action::Ports { bind, first: *host.start(), next_free: text.next_free }
            }
        };
        Ok(Self { address, ports, tcp, udp, action })
    }
}

impl Rule {
    /// `--publish auto`: everything, to the same port of localhost.
    #[must_use]
    pub const fn everything(next_free: bool) -> Self {
        let action = Action::Ports { bind: Bind::Localhost, first: 1, next_free };
        Self { address: Addresses::Any, ports: 1..=u16::MAX, tcp: true, udp: true, action }
    }

    fn matches(&self, listener: &Listener) -> bool {
        let proto = match listener.proto {
            Protocol::Tcp => self.tcp,
            Protocol::Udp => self.udp,
        };
        let everywhere = listener.address.is_unspecified();
        let address = match &self.address {
            Addresses::Any => true,
            Addresses::Unspecified => everywhere,
            Addresses::Exactly(ip) => {
                let same = listener.address == *ip
                    || (listener.address.is_ipv6()
                        && listener.address.is_loopback()
                        && *ip == Ipv4Addr::LOCALHOST);
                same || (everywhere && self.action != Action::Ignore)
            }
        };
        proto && address && self.ports.contains(&listener.port)
    }
}

/// Where `listener` is published: what the first rule that matches says.
#[must_use]
pub fn place(rules: &[Rule], listener: &Listener) -> Option<Place> {
    let rule = rules.iter().find(|r| r.matches(listener))?;
    match &rule.action {
        Action::Ignore => None,
        Action::Socket(path) => Some(Place::Socket(path.clone())),
        Action::Ports { bind, first, next_free } => {
            let bind = match bind {
                Bind::Localhost => None,
                Bind::Address(ip) => Some(*ip),
            };
            // Within the range, which has as many ports as the guest's.
            let port = first.saturating_add(listener.port - rule.ports.start());
            Some(Place::Port { bind, port, next_free: *next_free })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct File {
        auto_publish: Vec<Rule>,
    }

    fn rules(toml: &str) -> Vec<Rule> {
        toml::from_str::<File>(toml).expect("good rules").auto_publish
    }

    fn listener(text: &str) -> Listener {
        let (proto, at) = text.split_once(' ').unwrap_or(("tcp", text));
        let proto = if proto == "udp" { Protocol::Udp } else { Protocol::Tcp };
        let at: SocketAddr = at.parse().expect("an address");
        Listener { proto, address: at.ip(), port: at.port(), v6_only: false, redirected: false }
    }

    /// Where it goes, as Lima's test writes it: `127.0.0.1 2001`, or `ignored`.
    fn goes(rules: &[Rule], text: &str) -> String {
        match place(rules, &listener(text)) {
            None => "ignored".into(),
            Some(Place::Socket(path)) => path.display().to_string(),
            Some(Place::Port { bind, port, .. }) => {
                format!("{} {port}", bind.map_or_else(|| "localhost".into(), |ip| ip.to_string()))
            }
        }
    }

    /// The cases of Lima's hack/test-port-forwarding.pl, by their behaviour (its numbers are kept).
    const LIMA: &str = r#"
        [[auto-publish]] # 1
        guest-address = "127.0.0.2"
        guest-ports = "3000-3009"
        ignore = true
        [[auto-publish]]
        guest-address = "any"
        guest-ports = "3010-3019"
        ignore = true
        [[auto-publish]]
        guest-address = "any"
        guest-ports = "3000-3029"
        host-ports = "2000-2029"
        [[auto-publish]] # 2: shadowed by the one before
        guest-address = "any"
        guest-ports = "3020-3029"
        ignore = true
        [[auto-publish]] # 4
        guest-ports = "3030-3033"
        host-bind = "192.0.2.7"
        [[auto-publish]]
        guest-ports = "310-318"
        host-bind = "0.0.0.0"
        [[auto-publish]] # 5
        guest-address = "192.168.5.15"
        guest-ports = "4000-4009"
        [[auto-publish]] # 6
        guest-address = "::1"
        guest-ports = "4010-4019"
        host-bind = "::"
        [[auto-publish]]
        guest-address = "any"
        guest-ports = "4020-4029"
        [[auto-publish]] # 7
        guest-address = "unspecified"
        guest-ports = "4040-4049"
        [[auto-publish]]
        guest-address = "any"
        guest-ports = "4040-4049"
        ignore = true
        [[auto-publish]]
        guest-address = "unspecified"
        guest-ports = 8888
        host-bind = "0.0.0.0"
        [[auto-publish]] # 8
        guest-ports = 5000
        proto = "tcp"
        host-socket = "/run/port5000.sock"
        [[auto-publish]] # Lima's implicit last rule
        guest-address = "127.0.0.1"
    "#;

    #[test]
    fn limas_case_table() {
        let rules = rules(LIMA);
        for (from, to) in [
            // 1: an ignore for one address, and the wildcard rule behind it.
            ("127.0.0.2:3000", "ignored"),
            ("127.0.0.3:3001", "localhost 2001"),
            ("0.0.0.0:3002", "localhost 2002"),
            // 2: an ignore for every address; a later ignore has no effect.
            ("0.0.0.0:3010", "ignored"),
            ("127.0.0.1:3011", "ignored"),
            // 3: the wildcard rule takes every address.
            ("127.0.0.2:3020", "localhost 2020"),
            ("127.0.0.1:3021", "localhost 2021"),
            ("0.0.0.0:3022", "localhost 2022"),
            ("[::]:3023", "localhost 2023"),
            ("[::1]:3024", "localhost 2024"),
            // 4: where the host listens.
            ("127.0.0.1:3030", "192.0.2.7 3030"),
            ("0.0.0.0:3031", "192.0.2.7 3031"),
            ("[::]:3032", "192.0.2.7 3032"),
            ("[::1]:3033", "192.0.2.7 3033"),
            ("127.0.0.1:310", "0.0.0.0 310"),
            // 5: the default is loopback; the network card's address needs a rule that names it.
            ("192.168.5.15:304", "ignored"),
            ("192.168.5.15:314", "ignored"),
            ("192.168.5.15:4000", "localhost 4000"),
            ("127.0.0.1:325", "localhost 325"),
            ("0.0.0.0:326", "localhost 326"),
            ("[::]:327", "localhost 327"),
            ("[::1]:328", "localhost 328"),
            // 6: IPv6 on either side.
            ("[::1]:4010", ":: 4010"),
            ("127.0.0.1:4020", "localhost 4020"),
            ("127.0.0.2:4021", "localhost 4021"),
            ("192.168.5.15:4022", "localhost 4022"),
            ("0.0.0.0:4023", "localhost 4023"),
            ("[::]:4024", "localhost 4024"),
            ("[::1]:4025", "localhost 4025"),
            // 7: listeners on every address alone, then an ignore for the rest.
            ("0.0.0.0:4040", "localhost 4040"),
            ("[::]:4041", "localhost 4041"),
            ("127.0.0.1:4042", "ignored"),
            ("192.168.5.15:4043", "ignored"),
            ("0.0.0.0:8888", "0.0.0.0 8888"),
            // 8: a unix socket on the host.
            ("127.0.0.1:5000", "/run/port5000.sock"),
            ("192.168.5.15:5001", "ignored"),
            // The two gaps of Lima's table: UDP, and IPv6 that no rule names.
            ("udp 127.0.0.1:3001", "localhost 2001"),
            ("udp 0.0.0.0:3010", "ignored"),
            ("udp [::]:3023", "localhost 2023"),
            ("udp 127.0.0.1:5000", "localhost 5000"),
            ("[fd00::15]:4022", "localhost 4022"),
            ("[fd00::15]:4000", "ignored"),
            ("[fe80::1]:80", "ignored"),
        ] {
            assert_eq!(goes(&rules, from), to, "{from}");
        }
    }

    #[test]
    fn without_rules_nothing_and_with_auto_everything_is_published() {
        assert_eq!(goes(&[], "0.0.0.0:80"), "ignored");
        let auto = [Rule::everything(false)];
        for text in ["127.0.0.1:80", "[::1]:80", "0.0.0.0:80", "192.168.5.15:80", "udp [::]:80"] {
            assert_eq!(goes(&auto, text), "localhost 80");
        }
        assert_eq!(goes(&auto, "0.0.0.0:65535"), "localhost 65535");
    }

    #[test]
    fn the_next_free_port_of_a_privileged_one_is_not_privileged() {
        let auto = [Rule::everything(true)];
        let candidates = |text: &str| place(&auto, &listener(text)).expect("published").candidates();
        assert_eq!(candidates("0.0.0.0:80")[..3], [80, 1104, 1105]);
        assert_eq!(candidates("0.0.0.0:8080")[..3], [8080, 8081, 8082]);
        assert_eq!(candidates("0.0.0.0:65535"), [65_535]);
        let fixed = place(&[Rule::everything(false)], &listener("0.0.0.0:80")).expect("published");
        assert_eq!(fixed.candidates(), [80]);
    }

    #[test]
    fn a_bad_rule_says_what_is_wrong() {
        for (rule, fault) in [
            ("guest-address = \"here\"", "is not an address, any or unspecified"),
            ("guest-address = \"0.0.0.0\"", "say \"unspecified\""),
            ("guest-ports = \"9-8\"", "are not ports"),
            ("guest-ports = 0", "are not ports"),
            ("proto = \"sctp\"", "is not tcp, udp or any"),
            ("guest-ports = \"1-3\"\nhost-ports = \"1-2\"", "3 guest ports do not go to 2 host ports"),
            ("ignore = true\nhost-ports = 80", "publishes nowhere"),
            ("host-socket = \"/run/x\"", "host-socket takes one TCP port"),
            ("host-socket = \"x\"\nguest-ports = 80\nproto = \"tcp\"", "is not absolute"),
            ("host-bind = \"all\"", "is not an address or localhost"),
            ("color = \"red\"", "unknown field `color`"),
        ] {
            let text = format!("[[auto-publish]]\n{rule}\n");
            let error = toml::from_str::<File>(&text).map(|_| ()).expect_err(rule).to_string();
            assert!(error.contains(fault), "{rule}: {error}");
        }
    }
}
