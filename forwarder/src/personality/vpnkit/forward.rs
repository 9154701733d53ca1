//! One forward, and the three ways it is written: vpnkit's 9P text, its HTTP body, and what is published.
//!
//! | protocol | 9P text |
//! |---|---|
//! | TCP, UDP | `tcp:OUT_IP:OUT_PORT:tcp:IN_IP:IN_PORT` |
//! | unix | `unix:BASE64(OUT_PATH):unix:BASE64(IN_PATH)` |
//!
//! *Out* is the host's end, *in* the guest's. IPv6 addresses stand in brackets in the text (vpnkit has none there).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of a path: what `sockaddr_un` holds, less the final zero (`unix(7)`).
const PATH: usize = 107;

/// The protocol of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Unix sockets.
    Unix,
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Unix => "unix",
        })
    }
}

/// Where one end is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// An address and a port; of the host's end 0 is a free one.
    Port(IpAddr, u16),
    /// A unix socket.
    Path(PathBuf),
}

/// One forward.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Forward {
    /// The protocol.
    pub proto: Proto,
    /// The host's end.
    pub out: End,
    /// The guest's end.
    pub inner: End,
    /// What the client noted beside it.
    pub annotation: String,
}

/// What is wrong with a forward's text or body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadForward(String);

fn bad(fault: impl Into<String>) -> BadForward {
    BadForward(fault.into())
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(IpAddr::V4(ip), port) => write!(f, "{ip}:{port}"),
            Self::Port(IpAddr::V6(ip), port) => write!(f, "[{ip}]:{port}"),
            Self::Path(path) => f.write_str(&base64(path.as_os_str().as_encoded_bytes())),
        }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{0}:{1}:{0}:{2}", self.proto, self.out, self.inner)
    }
}

impl FromStr for Forward {
    type Err = BadForward;

    fn from_str(text: &str) -> Result<Self, BadForward> {
        let fault = || {
            bad(format!(
                "cannot parse {text:?}: tcp:IP:PORT:tcp:IP:PORT, udp:… or unix:BASE64:unix:BASE64 is needed"
            ))
        };
        let (proto, rest) = text.trim_end_matches(['\n', '\0']).split_once(':').ok_or_else(fault)?;
        let proto = match proto {
            "tcp" => Proto::Tcp,
            "udp" => Proto::Udp,
            "unix" => Proto::Unix,
            _ => return Err(fault()),
        };
        let (out, rest) = end(rest, proto).ok_or_else(fault)?;
        let rest = rest.strip_prefix(':').ok_or_else(fault)?;
        let rest = rest.strip_prefix(&format!("{proto}:")).ok_or_else(fault)?;
        let (inner, rest) = end(rest, proto).ok_or_else(fault)?;
        let known = Self { proto, out, inner, annotation: String::new() };
        if rest.is_empty() && known.is_sound() { Ok(known) } else { Err(fault()) }
    }
}

impl Forward {
    fn is_sound(&self) -> bool {
        let path = |end: &End| match end {
            End::Path(path) => (1..=PATH).contains(&path.as_os_str().len()),
            End::Port(..) => true,
        };
        path(&self.out) && path(&self.inner) && !matches!(self.inner, End::Port(_, 0))
    }
}

/// The end `text` begins with, and what follows.
fn end(text: &str, proto: Proto) -> Option<(End, &str)> {
    if proto == Proto::Unix {
        let (word, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
        let path = String::from_utf8(unbase64(word)?).ok().filter(|p| !p.contains('\0'))?;
        return Some((End::Path(path.into()), rest));
    }
    let (ip, rest): (IpAddr, &str) = match text.strip_prefix('[') {
        Some(v6) => {
            let (ip, rest) = v6.split_once("]:")?;
            (IpAddr::V6(ip.parse().ok()?), rest)
        }
        None => {
            let (ip, rest) = text.split_once(':')?;
            (IpAddr::V4(ip.parse().ok()?), rest)
        }
    };
    let (port, rest) = rest.split_at(rest.find(':').unwrap_or(rest.len()));
    Some((End::Port(ip, port.parse().ok()?), rest))
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// RFC 4648 §4, with padding.
fn base64(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().enumerate().fold(0_u32, |bits, (n, b)| bits | u32::from(*b) << (16 - 8 * n));
        for n in 0..4 {
            let digit = usize::try_from(bits >> (18 - 6 * n) & 63).unwrap_or(0);
            out.push(if n <= chunk.len() { char::from(ALPHABET[digit]) } else { '=' });
        }
    }
    out
}

fn unbase64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let (mut out, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for byte in digits.bytes() {
        let digit = ALPHABET.iter().position(|a| *a == byte)?;
        bits = bits << 6 | u32::try_from(digit).ok()?;
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push(u8::try_from(bits >> held & 0xff).ok()?);
        }
    }
    // What is left over must be zero, or two texts would mean the same.
    (bits & ((1 << held) - 1) == 0).then_some(out)
}

/// The body of the HTTP API's requests, and an entry of its list. What is empty is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Body {
    /// `tcp`, `udp` or `unix`.
    pub proto: String,
    /// The host's address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub out_ip: String,
    /// The host's port.
    #[serde(skip_serializing_if = "is_zero")]
    pub out_port: u16,
    /// The host's socket.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub out_path: String,
    /// The guest's address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub in_ip: String,
    /// The guest's port.
    #[serde(skip_serializing_if = "is_zero")]
    pub in_port: u16,
    /// The guest's socket.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub in_path: String,
    /// What the client notes beside it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub annotation: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(port: &u16) -> bool {
    *port == 0
}

impl TryFrom<Body> for Forward {
    type Error = BadForward;

    fn try_from(body: Body) -> Result<Self, BadForward> {
        let proto = match body.proto.as_str() {
            "tcp" => Proto::Tcp,
            "udp" => Proto::Udp,
            "unix" => Proto::Unix,
            other => return Err(bad(format!("unknown protocol {other:?}: tcp, udp or unix is needed"))),
        };
        let ip = |what: &str, text: &str| -> Result<IpAddr, BadForward> {
            if text.is_empty() {
                return Ok(Ipv4Addr::UNSPECIFIED.into());
            }
            text.parse().map_err(|_| bad(format!("{what} {text:?} is not an IP address")))
        };
        let (out, inner) = match proto {
            Proto::Unix => (End::Path(body.out_path.into()), End::Path(body.in_path.into())),
            Proto::Tcp | Proto::Udp => (
                End::Port(ip("out_ip", &body.out_ip)?, body.out_port),
                End::Port(ip("in_ip", &body.in_ip)?, body.in_port),
            ),
        };
        let forward = Self { proto, out, inner, annotation: body.annotation };
        if forward.is_sound() {
            return Ok(forward);
        }
        Err(bad(match proto {
            Proto::Unix => format!("out_path and in_path of 1 to {PATH} bytes are needed"),
            Proto::Tcp | Proto::Udp => "in_port is needed".to_owned(),
        }))
    }
}

impl From<&Forward> for Body {
    fn from(forward: &Forward) -> Self {
        let mut body = Self {
            proto: forward.proto.to_string(),
            annotation: forward.annotation.clone(),
            ..Self::default()
        };
        match &forward.out {
            End::Port(ip, port) => (body.out_ip, body.out_port) = (ip.to_string(), *port),
            End::Path(path) => body.out_path = path.to_string_lossy().into_owned(),
        }
        match &forward.inner {
            End::Port(ip, port) => (body.in_ip, body.in_port) = (ip.to_string(), *port),
            End::Path(path) => body.in_path = path.to_string_lossy().into_owned(),
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forwards_text_is_read_and_written_the_same() {
        for text in [
            "tcp:127.0.0.1:8080:tcp:192.168.65.3:80",
            "udp:0.0.0.0:0:udp:172.17.0.2:53",
            "tcp:[::1]:8080:tcp:[fd00::2]:80",
            "unix:L3RtcC9h:unix:L3J1bi9kb2NrZXIuc29jaw==",
        ] {
            assert_eq!(text.parse::<Forward>().expect(text).to_string(), text);
        }
        let unix: Forward = "unix:L3RtcC9h:unix:L3J1bi9kb2NrZXIuc29jaw==\n".parse().unwrap();
        assert_eq!(unix.inner, End::Path("/run/docker.sock".into()));
    }

    #[test]
    fn texts_that_are_none_are_refused() {
        let long = format!("unix:{}:unix:L3RtcC9h", base64(&[b'x'; 108]));
        for text in [
            "",
            "tcp",
            "tcp:1.2.3.4:80",
            "tcp:1.2.3.4:80:udp:1.2.3.4:80",
            "tcp:1.2.3.4:80:tcp:1.2.3.4:0",
            "tcp:1.2.3.4:80:tcp:1.2.3.4:80:x",
            "tcp:1.2.3.4:65536:tcp:1.2.3.4:80",
            "tcp:::1:80:tcp:::1:80",
            "sctp:1.2.3.4:80:sctp:1.2.3.4:80",
            "unix::unix:",
            "unix:L3RtcC9h:unix:L3RtcC9",
            "unix:L3RtcC9h:unix:AA==",
            &long,
        ] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
    }

    #[test]
    fn base64_is_rfc_4648s() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
            assert_eq!(unbase64(text).as_deref(), Some(bytes.as_bytes()));
        }
        for bad in ["Zg", "Zh==", "Z===", "Zm9v!", "Zm=v"] {
            assert_eq!(unbase64(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_body_becomes_a_forward_and_back() {
        let body: Body = serde_json::from_str(
            r#"{"proto":"tcp","out_ip":"127.0.0.1","out_port":80,"in_ip":"192.168.65.3","in_port":8080}"#,
        )
        .unwrap();
        let forward = Forward::try_from(body.clone()).unwrap();
        assert_eq!(forward.to_string(), "tcp:127.0.0.1:80:tcp:192.168.65.3:8080");
        assert_eq!(Body::from(&forward), body);
        let text = serde_json::to_string(&body).unwrap();
        assert!(!text.contains("path") && !text.contains("annotation"), "{text}");
    }
}
