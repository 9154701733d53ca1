//! The grammar of `--publish`: `[BIND:]HOST[-END]:[GUEST_ADDR:]GUEST[-END][/tcp|udp]`.
//!
//! | spec | means |
//! |---|---|
//! | `2222:22` | port 2222 of 127.0.0.1 and ::1 to port 22 of the first link's VM |
//! | `0.0.0.0:8080:80/tcp` | port 8080 of every IPv4 address |
//! | `[::1]:5353:53/udp` | an IPv6 address stands in brackets |
//! | `8000-8009:8000-8009` | a range; both ends have the same length |
//! | `0:22`, `:22`, `22` | a free host port, printed |
//! | `2222:192.168.127.3:22`, `2222:db:22` | another guest, by address or by its link's name |
//! | `unix:/run/vm.sock:22` | a unix socket on the host |
//! | `8080:127.0.0.1:80` | a port of the guest's own loopback, through the guest agent |
//! | `unix:/run/docker.sock:/var/run/docker.sock` | a unix socket of the guest, through the guest agent |
//!
//! `--publish auto` is no spec but the last rule of [`crate::agent::rules`]; [`PublishArg`] is either.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use portway_api::control::Protocol;
use serde::{Deserialize, Serialize};

use crate::request::PublishError;
use crate::sandbox::paths::Paths;

/// What `--publish` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublishSpec {
    /// Where the host listens.
    pub host: HostEnd,
    /// Whose port.
    pub guest: GuestName,
    /// The guest's first port.
    pub guest_port: u16,
    /// How many ports, 1 for a single one.
    pub count: u16,
    /// TCP unless said otherwise.
    pub proto: Protocol,
}

/// Where the host listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostEnd {
    /// A port, or as many as the spec counts.
    Ports {
        /// The address.
        bind: Bind,
        /// The first port; 0: a free one.
        first: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// The host addresses of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bind {
    /// 127.0.0.1 and ::1.
    Localhost,
    /// One address; the unspecified one means all.
    Address(IpAddr),
}

/// The guest a port belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GuestName {
    /// The first link's VM.
    Default,
    /// By address.
    Address(IpAddr),
    /// By the name of its link.
    Name(String),
    /// A unix socket of the first guest that has an agent; the spec has no port then.
    Socket(PathBuf),
}

/// What `--publish` takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub enum PublishArg {
    /// A port.
    Port(PublishSpec),
    /// `auto`: every port on which the guest listens.
    Auto {
        /// `auto,next-free`: one that is taken on the host, at the next that is free.
        next_free: bool,
    },
}

impl FromStr for PublishArg {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text {
            "auto" => Ok(Self::Auto { next_free: false }),
            "auto,next-free" => Ok(Self::Auto { next_free: true }),
            _ if text.starts_with("auto,") => Err(SpecError {
                spec: text.to_owned(),
                fault: "auto has one option, next-free".into(),
                example: "auto,next-free",
            }),
            _ => text.parse().map(Self::Port),
        }
    }
}

impl TryFrom<String> for PublishArg {
    type Error = SpecError;
    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl fmt::Display for PublishArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(spec) => spec.fmt(f),
            Self::Auto { next_free: false } => f.write_str("auto"),
            Self::Auto { next_free: true } => f.write_str("auto,next-free"),
        }
    }
}

impl PublishSpec {
    /// Whether the guest's end can be reached from inside the guest alone, which takes its agent.
    #[must_use]
    pub fn needs_agent(&self) -> bool {
        match &self.guest {
            GuestName::Address(ip) => ip.is_loopback(),
            GuestName::Socket(_) => true,
            GuestName::Default | GuestName::Name(_) => false,
        }
    }

    /// Refuses a socket of the host outside of the directories where sockets may be made.
    ///
    /// # Errors
    /// [`PublishError::Outside`].
    pub(crate) fn within(&self, allowed: &Paths) -> Result<(), PublishError> {
        match &self.host {
            HostEnd::Unix(path) if !allowed.may_make(path) => Err(PublishError::Outside(path.clone())),
            _ => Ok(()),
        }
    }
}

/// What is wrong with a spec: the value, the fault, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad publish spec {spec:?}: {fault} (an example: {example})")]
pub struct SpecError {
    spec: String,
    fault: String,
    example: &'static str,
}

impl FromStr for PublishSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        parse(spec).map_err(|(fault, example)| SpecError { spec: spec.to_owned(), fault, example })
    }
}

type Fault = (String, &'static str);

const EXAMPLE: &str = "2222:22/tcp";
/// `sun_path` of unix(7), with its end.
const SOCKET_PATH: usize = 107;

fn parse(spec: &str) -> Result<PublishSpec, Fault> {
    if spec == "auto" || spec.starts_with("auto,") {
        return Err(("auto is for the start: `portway serve --publish auto`".into(), EXAMPLE));
    }
    if let Some(spec) = parse_guest_socket(spec)? {
        return Ok(spec);
    }
    let (body, proto) = match spec.rsplit_once('/') {
        Some((body, "tcp")) => (body, Protocol::Tcp),
        Some((body, "udp")) => (body, Protocol::Udp),
        Some((_, other)) if !spec.starts_with("unix:") => {
            return Err((format!("{other:?} is not a protocol: tcp or udp"), "5353:53/udp"));
        }
        _ => (spec, Protocol::Tcp),
    };
    let parts = split(body)?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let Some((guest_ports, left)) = parts.split_last() else { return Err(("it is empty".into(), EXAMPLE)) };
    let (guest_port, guest_end) = range(guest_ports, false)?;
    if let ["unix", path @ ..] = left {
        let ([path] | [path, _]) = path else {
            return Err(("a unix socket is unix:PATH:GUEST".into(), "unix:/run/user/1000/vm.sock:22"));
        };
        if proto == Protocol::Udp || guest_end != guest_port {
            return Err(("a unix socket carries one TCP port".into(), "unix:/run/user/1000/vm.sock:22"));
        }
        if !path.starts_with('/') {
            return Err((format!("the path {path:?} is not absolute"), "unix:/run/user/1000/vm.sock:22"));
        }
        let guest = left.get(2).map_or(Ok(GuestName::Default), |g| guest_name(g))?;
        return Ok(PublishSpec { host: HostEnd::Unix(path.into()), guest, guest_port, count: 1, proto });
    }
    // `22` alone and `:22`: a free port, as Docker means it.
    let (bind, host, guest) = match left {
        [] => (Bind::Localhost, "", GuestName::Default),
        [host] => (Bind::Localhost, *host, GuestName::Default),
        // Two parts before the guest's port: the one that is a port (or empty) is the host's.
        [a, b] if is_address(a) => (bind_of(a)?, *b, GuestName::Default),
        [a, b] => (Bind::Localhost, *a, guest_name(b)?),
        [a, b, c] => (bind_of(a)?, *b, guest_name(c)?),
        _ => return Err(("it has too many parts".into(), "127.0.0.1:2222:192.168.127.2:22/tcp")),
    };
    let (first, end) = range(host, true)?;
    let (host_len, guest_len) = (u32::from(end - first) + 1, u32::from(guest_end - guest_port) + 1);
    if first != 0 && host_len != guest_len {
        return Err((
            format!("{host_len} host ports do not go to {guest_len} guest ports"),
            "8000-8009:8000-8009",
        ));
    }
    let count = u16::try_from(guest_len).map_err(|_| ("the range has 65536 ports".to_owned(), EXAMPLE))?;
    Ok(PublishSpec { host: HostEnd::Ports { bind, first }, guest, guest_port, count, proto })
}

/// `HOST:/path/in/the/guest`, where HOST is as elsewhere.
fn parse_guest_socket(spec: &str) -> Result<Option<PublishSpec>, Fault> {
    const SOCKET: &str = "unix:/run/user/1000/docker.sock:/var/run/docker.sock";
    // The first `:/` of `unix:/path` is not the guest's.
    let Some(at) = spec.rfind(":/").filter(|at| !(*at == 4 && spec.starts_with("unix:"))) else {
        return Ok(None);
    };
    let (host, path) = (spec.get(..at).unwrap_or_default(), spec.get(at + 1..).unwrap_or_default());
    if path.len() < 2 || path.contains('\0') || path.len() > SOCKET_PATH {
        return Err((format!("{path:?} is not the path of a socket in the guest"), SOCKET));
    }
    let host = match host.strip_prefix("unix:") {
        Some(path) if path.starts_with('/') => HostEnd::Unix(path.into()),
        Some(path) => return Err((format!("the path {path:?} is not absolute"), SOCKET)),
        None => {
            let parts = split(host)?;
            let (bind, port) = match parts.as_slice() {
                [port] => (Bind::Localhost, port),
                [bind, port] => (bind_of(bind)?, port),
                _ => return Err(("it has too many parts".into(), "2375:/var/run/docker.sock")),
            };
            let (first, end) = range(port, true)?;
            if first != end {
                return Err(("a socket goes to one port".into(), "2375:/var/run/docker.sock"));
            }
            HostEnd::Ports { bind, first }
        }
    };
    let guest = GuestName::Socket(path.into());
    Ok(Some(PublishSpec { host, guest, guest_port: 0, count: 1, proto: Protocol::Tcp }))
}

/// Cuts at colons outside brackets; the brackets go.
fn split(body: &str) -> Result<Vec<String>, Fault> {
    let (mut parts, mut part, mut bracketed) = (Vec::new(), String::new(), false);
    for c in body.chars() {
        match c {
            '[' if part.is_empty() && !bracketed => bracketed = true,
            ']' if bracketed => bracketed = false,
            ':' if !bracketed => parts.push(std::mem::take(&mut part)),
            '[' | ']' => return Err(("brackets stand around a whole IPv6 address".into(), "[::1]:8080:80")),
            c => part.push(c),
        }
    }
    if bracketed {
        return Err(("a bracket is not closed".into(), "[::1]:8080:80"));
    }
    parts.push(part);
    Ok(parts)
}

/// `PORT` or `FIRST-LAST`; a host port may be 0 or empty.
fn range(text: &str, host: bool) -> Result<(u16, u16), Fault> {
    if host && (text.is_empty() || text == "0") {
        return Ok((0, 0));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |t: &str| {
        let digits = !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
        let port: Option<u16> = digits.then(|| t.parse().ok()).flatten();
        port.filter(|p| *p > 0).ok_or_else(|| (format!("{t:?} is not a port: 1 to 65535"), EXAMPLE))
    };
    let (first, last) = (port(first)?, port(last)?);
    if last < first {
        return Err((format!("the range {text} ends before it begins"), "8000-8009:8000-8009"));
    }
    Ok((first, last))
}

fn is_address(text: &str) -> bool {
    text == "localhost" || text == "*" || text.parse::<IpAddr>().is_ok()
}

fn bind_of(text: &str) -> Result<Bind, Fault> {
    match text {
        "" | "localhost" => Ok(Bind::Localhost),
        "*" => Ok(Bind::Address(IpAddr::from([0; 16]))),
        _ => text.parse().map(Bind::Address).map_err(|_| {
            (
                format!("{text:?} is not an address to listen on (IPv6 stands in brackets)"),
                "127.0.0.1:8080:80",
            )
        }),
    }
}

fn guest_name(text: &str) -> Result<GuestName, Fault> {
    if let Ok(ip) = text.parse() {
        return Ok(GuestName::Address(ip));
    }
    let label =
        !text.is_empty() && text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if label && !text.bytes().all(|b| b.is_ascii_digit()) {
        Ok(GuestName::Name(text.to_owned()))
    } else {
        Err((format!("{text:?} is neither a guest's address nor a VM's name"), "2222:192.168.127.3:22"))
    }
}

impl fmt::Display for PublishSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bracketed = |ip: &IpAddr| if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
        let last = |first: u16| first.saturating_add(self.count - 1);
        match &self.host {
            HostEnd::Unix(path) => write!(f, "unix:{}:", path.display())?,
            HostEnd::Ports { bind, first } => {
                if let Bind::Address(ip) = bind {
                    write!(f, "{}:", bracketed(ip))?;
                }
                write!(f, "{first}")?;
                if self.count > 1 && *first != 0 {
                    write!(f, "-{}", last(*first))?;
                }
                write!(f, ":")?;
            }
        }
        match &self.guest {
            GuestName::Default => {}
            GuestName::Address(ip) => write!(f, "{}:", bracketed(ip))?,
            GuestName::Name(name) => write!(f, "{name}:")?,
            GuestName::Socket(path) => return write!(f, "{}", path.display()),
        }
        write!(f, "{}", self.guest_port)?;
        if self.count > 1 {
            write!(f, "-{}", last(self.guest_port))?;
        }
        match self.host {
            HostEnd::Unix(_) => Ok(()),
            HostEnd::Ports { .. } => write!(f, "/{}", self.proto),
        }
    }
}

impl TryFrom<String> for PublishSpec {
    type Error = SpecError;
    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<PublishSpec> for String {
    fn from(spec: PublishSpec) -> Self {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ports(
        bind: Bind,
        first: u16,
        guest: GuestName,
        guest_port: u16,
        count: u16,
        proto: Protocol,
    ) -> PublishSpec {
        PublishSpec { host: HostEnd::Ports { bind, first }, guest, guest_port, count, proto }
    }

    #[test]
    fn the_forms_of_the_table_mean_what_it_says() {
        use Protocol::{Tcp, Udp};
        let address = |a: &str| Bind::Address(a.parse().unwrap());
        let guest = |a: &str| GuestName::Address(a.parse().unwrap());
        for (text, spec) in [
            ("2222:22/tcp", ports(Bind::Localhost, 2222, GuestName::Default, 22, 1, Tcp)),
            ("8080:80", ports(Bind::Localhost, 8080, GuestName::Default, 80, 1, Tcp)),
            ("0.0.0.0:8080:80/tcp", ports(address("0.0.0.0"), 8080, GuestName::Default, 80, 1, Tcp)),
            ("[::1]:5353:53/udp", ports(address("::1"), 5353, GuestName::Default, 53, 1, Udp)),
            ("8000-8009:9000-9009", ports(Bind::Localhost, 8000, GuestName::Default, 9000, 10, Tcp)),
            ("0:22", ports(Bind::Localhost, 0, GuestName::Default, 22, 1, Tcp)),
            (":22", ports(Bind::Localhost, 0, GuestName::Default, 22, 1, Tcp)),
            ("22", ports(Bind::Localhost, 0, GuestName::Default, 22, 1, Tcp)),
            ("127.0.0.1::22", ports(address("127.0.0.1"), 0, GuestName::Default, 22, 1, Tcp)),
            ("2222:192.168.127.3:22", ports(Bind::Localhost, 2222, guest("192.168.127.3"), 22, 1, Tcp)),
            ("2222:db:22", ports(Bind::Localhost, 2222, GuestName::Name("db".into()), 22, 1, Tcp)),
            ("127.0.0.1:2222:[fd00::2]:22", ports(address("127.0.0.1"), 2222, guest("fd00::2"), 22, 1, Tcp)),
        ] {
            assert_eq!(text.parse(), Ok(spec), "{text}");
        }
        let unix: PublishSpec = "unix:/run/a.sock:22".parse().unwrap();
        assert_eq!((unix.host, unix.guest_port), (HostEnd::Unix("/run/a.sock".into()), 22));
        let both: PublishSpec = "unix:/run/a.sock:/run/b.sock".parse().unwrap();
        assert_eq!(both.host, HostEnd::Unix("/run/a.sock".into()));
        assert_eq!(both.guest, GuestName::Socket("/run/b.sock".into()));
        assert!(both.needs_agent() && both.to_string() == "unix:/run/a.sock:/run/b.sock");
        let tcp: PublishSpec = "127.0.0.1:2375:/run/b.sock".parse().unwrap();
        assert_eq!(tcp.host, HostEnd::Ports { bind: address("127.0.0.1"), first: 2375 });
        assert!("8080:127.0.0.1:80".parse::<PublishSpec>().unwrap().needs_agent());
        assert!(!"8080:80".parse::<PublishSpec>().unwrap().needs_agent());
    }

    #[test]
    fn auto_is_an_argument_and_no_spec() {
        for text in ["auto", "auto,next-free", "2222:22/tcp"] {
            assert_eq!(text.parse::<PublishArg>().unwrap().to_string(), text);
        }
        let error = "auto,everywhere".parse::<PublishArg>().unwrap_err().to_string();
        assert!(error.contains("one option, next-free"), "{error}");
    }

    #[test]
    fn a_bad_spec_names_the_value_the_fault_and_an_example() {
        for (text, fault) in [
            ("", "is not a port"),
            ("2222:22/sctp", "\"sctp\" is not a protocol"),
            ("99999:22", "\"99999\" is not a port"),
            ("8000-8005:80-81", "6 host ports do not go to 2 guest ports"),
            ("9-8:9-8", "ends before it begins"),
            ("1:2:3:4:5", "too many parts"),
            ("[::1:80:80", "bracket is not closed"),
            ("nowhere:1:2:3", "not an address to listen on"),
            ("2222:a_b:22", "neither a guest's address nor a VM's name"),
            ("unix:vm.sock:22", "is not absolute"),
            ("unix:/a:22/udp", "one TCP port"),
            ("unix:", "is not a port"),
            ("auto", "auto is for the start"),
            ("unix:a:/b", "is not absolute"),
            ("1-2:/b", "a socket goes to one port"),
            ("2375:/", "is not the path of a socket"),
            ("2222:-22", "is not a port"),
            ("+80:80", "is not a port"),
        ] {
            let error = text.parse::<PublishSpec>().expect_err(text).to_string();
            assert!(
                error.contains(fault) && error.contains("an example") && error.contains(&format!("{text:?}")),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_read_is_written_the_same(text in "(unix:)?[0-9a-z:/\\[\\].*-]{0,40}") {
            if let Ok(spec) = text.parse::<PublishSpec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
    }
}
