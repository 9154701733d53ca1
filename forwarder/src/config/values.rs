//! Values of settings that are text with a grammar of their own, or one of a few words.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use portway_netstack::dhcp::StaticLease;
use portway_netstack::{Mac, UdpFilter};
use serde::Deserialize;

use super::LinkSpec;

/// `NAME=IP` of a record.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct DnsHost(pub String, pub IpAddr);

impl FromStr for DnsHost {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is not NAME=IP; an example: registry.test=192.0.2.7");
        let (name, ip) = text.split_once('=').ok_or_else(fault)?;
        let ip = ip.parse().map_err(|_| fault())?;
        let name = name.trim_end_matches('.');
        // `*` for every name below is the first label, and not the only one.
        let below = name.strip_prefix("*.").unwrap_or(name);
        let labels = below.split('.').all(|l| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        });
        if labels && name.len() <= 253 { Ok(Self(name.to_ascii_lowercase(), ip)) } else { Err(fault()) }
    }
}

/// `MAC=IP[,NAME]` of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct LeaseSpec(pub(super) StaticLease);

impl FromStr for LeaseSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fault =
            || format!("{text:?} is not MAC=IP[,NAME]; an example: 52:54:00:12:34:56=192.168.127.9,db");
        let (mac, rest) = text.split_once('=').ok_or_else(fault)?;
        let (ip, name) = rest.split_once(',').map_or((rest, None), |(ip, name)| (ip, Some(name)));
        let mac: Mac = mac.parse().map_err(|_| fault())?;
        let ip = ip.parse().map_err(|_| fault())?;
        if mac.is_group() || mac.0 == [0; 6] {
            return Err(format!("{text:?}: {mac} is no guest's Ethernet address, but a group's or nobody's"));
        }
        Ok(Self(StaticLease { mac, ip, name: name.map(label).transpose()? }))
    }
}

/// `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct UnixPath(pub PathBuf);

impl FromStr for UnixPath {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix:").ok_or_else(|| format!("{text:?} is not unix:PATH"))?;
        absolute(path.strip_prefix("//").unwrap_or(path)).map(Self)
    }
}

/// A directory, made absolute.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Directory(pub PathBuf);

impl FromStr for Directory {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        absolute(text).map(Self)
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Word;
        impl serde::de::Visitor<'_> for Word {
            type Value = Switch;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"on\" or \"off\"")
            }
            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Switch, E> {
                match word {
                    "on" => Ok(Switch::On),
                    "off" => Ok(Switch::Off),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                }
            }
        }
        // A word that stands without quotes elsewhere, such as true, is told the words as well.
        from.deserialize_any(Word)
    }
}

/// Block or allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metadata {
    /// Not reachable.
    Block,
    /// Reachable.
    Allow,
}

/// On, off, or as the host has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ipv6Switch {
    /// With a default route.
    On,
    /// Not at all.
    Off,
    /// With a default route while the host has one.
    #[default]
    Auto,
}

/// Who may answer a guest's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// Any port of an address it has sent to.
    Address,
    /// The port it has sent to.
    Endpoint,
    /// Anybody.
    Any,
}

impl From<Filter> for UdpFilter {
    fn from(filter: Filter) -> Self {
        match filter {
            Filter::Address => Self::Address,
            Filter::Endpoint => Self::Endpoint,
            Filter::Any => Self::Any,
        }
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What ended something.
    Error,
    /// What an operator should look at.
    Warn,
    /// What a running network says of itself.
    #[default]
    Info,
    /// Every decision.
    Debug,
    /// Everything.
    Trace,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// `HOST:PORT` to listen on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct MetricsAddress(pub(super) String);

impl FromStr for MetricsAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is not HOST:PORT; an example: 127.0.0.1:9110");
        let (host, port) = text.rsplit_once(':').ok_or_else(fault)?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let good = match bare {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains(':'),
        };
        let port: Option<u16> = port.parse().ok();
        if good && port.is_some() { Ok(Self(text.to_owned())) } else { Err(fault()) }
    }
}

pub(super) fn absolute(path: &str) -> Result<PathBuf, String> {
    if path.is_empty() {
        return Err("the path is empty".into());
    }
    std::path::absolute(path).map_err(|e| format!("{path:?}: {e}"))
}

pub(super) fn label(text: &str) -> Result<String, String> {
    let good = (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.bytes().all(|b| b.is_ascii_digit());
    if good && matches!(text.to_ascii_lowercase().as_str(), "host" | "gateway") {
        Err(format!("{text:?} is the network's own name: a guest has another"))
    } else if good {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(format!("{text:?} is not a name: letters, digits and inner hyphens"))
    }
}

macro_rules! from_string {
    ($($type:ty),+) => {$(
        impl TryFrom<String> for $type {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
    )+};
}
from_string!(LinkSpec, DnsHost, LeaseSpec, UnixPath, MetricsAddress, Directory);

pub(super) fn from_text<'de, D: serde::Deserializer<'de>, T: FromStr<Err: std::fmt::Display>>(
    d: D,
) -> Result<Option<T>, D::Error> {
    let text = Option::<String>::deserialize(d)?;
    text.map(|t| t.parse().map_err(serde::de::Error::custom)).transpose()
}
