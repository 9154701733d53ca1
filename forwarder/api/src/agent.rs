//! The agent protocol: what the agent in a guest and the sidecar on the host say to each other.
//!
//! ```text
//!  agent (guest)                                        sidecar (host)
//!  control stream   Hello ─────────────────────────────►  one session per guest
//!                   ◄──────────────────────── Welcome, or Bye and the end
//!                   Publish…  Listeners ───────────────►  rules, policy ─► published ports
//!                   ◄─────────────── Open { stream, key }  a client has come to a published port
//!  carried stream   Stream { stream, key } ────────────►  then the bytes of the connection, both ways
//! ```
//! Every stream is opened by the agent, toward [`PORT`] of the host: the guest listens nowhere, and one rule of a
//! hypervisor or one unix socket is enough for any number of connections. The first message of a stream says what it
//! is. On a control stream further messages follow; on a carried one the connection's own bytes do, with the stream's
//! own half-close. A reset has no picture there: it is said on the control stream (`StreamReset`, `Reset`), and the one
//! who is told closes the carried stream. Datagrams are carried with a u16 big-endian length before each.
//!
//! A message is a u32 big-endian length and that many bytes of JSON, at most [`MESSAGE_MAX`]. The `type` says which it
//! is; one that is not known is answered with `Unknown` and changes nothing, so that either side may be newer. Fields are
//! only ever added. What is not JSON, or is longer, ends the stream.

use std::net::{IpAddr, SocketAddr};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::{PortInfo, Protocol};

/// The vsock port of the host on which the sidecar waits for agents.
pub const PORT: u32 = 7927;
/// The version of this protocol. A host that does not speak the agent's says so in `Bye`.
pub const PROTOCOL: u16 = 1;
/// Bytes of one message at most, without its length.
pub const MESSAGE_MAX: usize = 64 * 1024;
/// Bytes of the first message of a stream at most: nobody is trusted with more before it is known who he is.
pub const FIRST_MESSAGE_MAX: usize = 4 * 1024;
/// Listeners in one message: with room to spare in [`MESSAGE_MAX`].
pub const LISTENERS_PER_MESSAGE: usize = 256;
/// Ports in one message.
pub const PORTS_PER_MESSAGE: usize = 64;
/// Bytes of a carried datagram at most: the largest UDP payload over IPv4.
pub const DATAGRAM_MAX: usize = 65_507;

/// From the agent to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToHost {
    /// The first message of a control stream.
    Hello(Hello),
    /// The first message of a carried stream: the answer to [`ToGuest::Open`].
    Stream {
        /// Which.
        stream: u64,
        /// What `Open` gave, so that no other process of the guest can take the connection.
        key: u64,
    },
    /// The first message of a stream from a client of a unix socket that the host asked for in `Welcome`.
    Client {
        /// The place of the socket in [`Welcome::sockets`].
        socket: u32,
        /// [`Welcome::key`].
        key: u64,
    },
    /// What listens in the guest. A snapshot comes in parts; deltas after it.
    Listeners {
        /// Which part this is.
        part: Part,
        /// What listens now and did not.
        added: Vec<Listener>,
        /// What does not any more; empty in a snapshot.
        removed: Vec<Listener>,
    },
    /// Somebody in the guest wants a port published.
    Publish {
        /// Comes back in the answer.
        id: u32,
        /// In the grammar of `portway publish`.
        spec: String,
    },
    /// And not any more.
    Unpublish {
        /// Comes back in the answer.
        id: u32,
        /// As it was published.
        spec: String,
    },
    /// Which ports of this guest are published?
    Ports {
        /// Comes back in the answer.
        id: u32,
    },
    /// A connection [`ToGuest::Open`] asked for could not be made.
    StreamFailed {
        /// Which.
        stream: u64,
        /// Why.
        error: DialError,
    },
    /// The guest's end of a carried connection was reset.
    StreamReset {
        /// Which.
        stream: u64,
    },
    /// What came of [`ToGuest::Time`].
    Clock {
        /// How far the guest's clock was behind, in milliseconds; negative: ahead.
        behind_ms: i64,
        /// Whether it was set.
        set: bool,
        /// Why it could not be.
        error: Option<String>,
    },
    /// The guest has an address and its services can be asked.
    Ready,
    /// The host said something this agent does not know.
    Unknown {
        /// Its `type`.
        kind: String,
    },
    /// A message of a newer agent.
    #[serde(other, skip_serializing)]
    Other,
}

/// From the host to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// The answer to [`ToHost::Hello`].
    Welcome(Welcome),
    /// The session ends; the last message of a control stream.
    Bye {
        /// Why, for the guest's log.
        reason: String,
        /// Whether it is of no use to come again.
        stay_away: bool,
    },
    /// A client has come: connect to `target` and bring a stream, or say `StreamFailed`.
    Open {
        /// Comes back in the stream's first message.
        stream: u64,
        /// Likewise.
        key: u64,
        /// Where to.
        target: Target,
    },
    /// The host's end of a carried connection was reset.
    Reset {
        /// Which.
        stream: u64,
    },
    /// The answer to [`ToHost::Publish`] and [`ToHost::Unpublish`]: what was, or what is not any more.
    Done {
        /// The request's.
        id: u32,
        /// The ports.
        ports: Vec<PortInfo>,
        /// One line for each that failed; the others stay.
        errors: Vec<String>,
    },
    /// The answer to [`ToHost::Ports`], in parts.
    Ports {
        /// The request's.
        id: u32,
        /// Some ports.
        ports: Vec<PortInfo>,
        /// Whether another part follows.
        more: bool,
    },
    /// A listener was not published, though a rule wants it to be.
    Refused {
        /// Which.
        listener: Listener,
        /// Why, for the guest's log.
        reason: String,
    },
    /// The host's time.
    Time {
        /// Microseconds since 1970.
        unix_us: u64,
    },
    /// The agent said something this host does not know.
    Unknown {
        /// Its `type`.
        kind: String,
    },
    /// A message of a newer host.
    #[serde(other, skip_serializing)]
    Other,
}

/// Who the agent is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u16,
    /// The agent's version.
    pub agent: String,
    /// The kernel's `boot_id`: another one means that the guest has rebooted.
    pub boot_id: String,
    /// What it can do: `tcp`, `udp`, `unix`, `sockets`, `clock`.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

/// Who the host is, and what it wants of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROTOCOL`].
    pub protocol: u16,
    /// The sidecar's version.
    pub host: String,
    /// Proves in [`ToHost::Client`] that a stream is of this session.
    pub key: u64,
    /// Unix sockets to listen on in the guest; their clients are carried to the host.
    #[serde(default)]
    pub sockets: Vec<String>,
    /// Whether to tell what listens: off when no rule publishes by itself.
    #[serde(default)]
    pub listeners: bool,
}

/// Which part of the listeners a message has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The first of a snapshot: what was known before is void once `Last` has come.
    First,
    /// One between.
    Middle,
    /// The last of a snapshot.
    Last,
    /// The only one of a snapshot.
    Whole,
    /// A change since the snapshot.
    Delta,
}

/// A port of the guest on which somebody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Listener {
    /// TCP or UDP.
    pub proto: Protocol,
    /// The address it is bound to.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// Whether an unspecified IPv6 address means IPv6 alone (`IPV6_V6ONLY`).
    #[serde(default)]
    pub v6_only: bool,
    /// Whether the kernel sends connections on (DNAT): there is no socket on the port itself.
    #[serde(default)]
    pub redirected: bool,
}

impl std::fmt::Display for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.proto, SocketAddr::new(self.address, self.port))
    }
}

impl Listener {
    /// Whether it is one that nobody wants on the host: clients that wait for their server's answer, and services that
    /// speak to the guest's own network. Both sides ask: the agent to spare the host the message, the host because it
    /// trusts no agent.
    ///
    /// DHCP clients (68, 546) above all: forwarded, they take the *host's* lease renewals. NTP (123) and chrony's command
    /// port (323), mDNS (5353), LLMNR (5355); and systemd-resolved's stubs, which are the guest's own resolver.
    #[must_use]
    pub fn is_private(&self) -> bool {
        let stub = [IpAddr::from([127, 0, 0, 53]), IpAddr::from([127, 0, 0, 54])];
        match (self.proto, self.port) {
            (_, 0) | (Protocol::Udp, 68 | 546 | 123 | 323 | 5353) | (_, 5355) => true,
            (_, 53) => stub.contains(&self.address),
            _ => self.address.is_multicast(),
        }
    }
}

/// One guest agent, as `GET /v1/agents` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct AgentInfo {
    /// The VM's name; null where the only one has none.
    pub name: Option<String>,
    /// Whether there is a session.
    pub connected: bool,
    /// Whether the guest has said that it is ready, in this session.
    pub ready: bool,
    /// The agent's version, in this session or the last.
    pub version: Option<String>,
    /// Listeners of the guest.
    pub listeners: usize,
    /// Ports that are published by rule or at the guest's wish.
    pub ports: usize,
    /// Ports that a rule wants and that could not be published.
    pub refused: usize,
    /// Connections carried now.
    pub streams: usize,
    /// Sessions since the start.
    pub sessions: u64,
}

/// Where a carried connection goes in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "proto", rename_all = "snake_case")]
pub enum Target {
    /// A TCP connection.
    Tcp {
        /// To here.
        address: SocketAddr,
    },
    /// A connected UDP socket; datagrams are framed on the stream.
    Udp {
        /// To here.
        address: SocketAddr,
    },
    /// A unix stream socket.
    Unix {
        /// Its path.
        path: String,
    },
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp { address } => write!(f, "tcp {address}"),
            Self::Udp { address } => write!(f, "udp {address}"),
            Self::Unix { path } => write!(f, "unix:{path}"),
        }
    }
}

/// Why the guest's end could not be connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DialError {
    /// Nobody listens there.
    Refused,
    /// There is no way there.
    Unreachable,
    /// No answer.
    TimedOut,
    /// The agent may not.
    Denied,
    /// It has no room for another stream.
    Exhausted,
    /// Something else, or a newer word.
    #[serde(other)]
    Failed,
}

/// A message that cannot be sent or taken; the stream it was on is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Beyond [`MESSAGE_MAX`].
    #[error("a message of {0} bytes: at most {MESSAGE_MAX} are taken")]
    TooLong(usize),
    /// Not JSON, or not a message.
    #[error("not a message: {0}")]
    Malformed(String),
}

/// A message with its length, ready to be written.
///
/// # Errors
/// `TooLong`; `Malformed` cannot come of the types of this module.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, MessageError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(|e| MessageError::Malformed(e.to_string()))?;
    let len = bytes.len() - 4;
    match u32::try_from(len) {
        Ok(prefix) if len <= MESSAGE_MAX => {
            bytes[..4].copy_from_slice(&prefix.to_be_bytes());
            Ok(bytes)
        }
        _ => Err(MessageError::TooLong(len)),
    }
}

/// One message's bytes, without the length.
///
/// # Errors
/// `Malformed`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    serde_json::from_slice(bytes).map_err(|e| MessageError::Malformed(e.to_string()))
}

/// The `type` of a message, for the answer to one that is not known; at most 64 bytes of it.
#[must_use]
pub fn kind_of(bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Tagged {
        r#type: String,
    }
    parse::<Tagged>(bytes).map_or_else(|_| String::new(), |t| t.r#type.chars().take(64).collect())
}

/// Cuts a stream of bytes into messages. It holds what it was fed and not asked for yet: ask until there is none before
/// feeding more, and it never holds more than one message and one read.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    at: usize,
}

impl Decoder {
    /// Adds bytes as they were read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The bytes of the next message; `None` when it is not complete yet.
    ///
    /// # Errors
    /// `TooLong`. There is no way on from it: where the next message begins is not known.
    pub fn message(&mut self) -> Result<Option<&[u8]>, MessageError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some((prefix, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if len > MESSAGE_MAX {
            return Err(MessageError::TooLong(len));
        }
        let Some(message) = rest.get(..len) else { return Ok(None) };
        self.at += 4 + len;
        Ok(Some(message))
    }

    /// Bytes that are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.bytes.len() - self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(text: &str, proto: Protocol) -> Listener {
        let at: SocketAddr = text.parse().expect("an address");
        Listener { proto, address: at.ip(), port: at.port(), v6_only: false, redirected: false }
    }

    fn through(message: &ToHost) -> ToHost {
        let mut decoder = Decoder::default();
        // One byte at a time: the cut between two reads can be anywhere.
        for byte in encode(message).expect("short") {
            assert_eq!(decoder.message(), Ok(None));
            decoder.feed(&[byte]);
        }
        parse(decoder.message().expect("a message").expect("complete")).expect("well-formed")
    }

    #[test]
    fn what_is_written_is_read() {
        let hello = Hello {
            protocol: PROTOCOL,
            agent: "0.1.0".into(),
            boot_id: "b".into(),
            capabilities: vec!["tcp".into()],
        };
        for message in [
            ToHost::Hello(hello),
            ToHost::Stream { stream: u64::MAX, key: 1 },
            ToHost::Listeners {
                part: Part::Whole,
                added: vec![listener("[::1]:80", Protocol::Tcp)],
                removed: Vec::new(),
            },
            ToHost::StreamFailed { stream: 3, error: DialError::Refused },
            ToHost::Clock { behind_ms: -4, set: false, error: None },
            ToHost::Ready,
        ] {
            assert_eq!(through(&message), message);
        }
    }

    #[test]
    fn a_full_message_of_listeners_and_one_of_ports_fit() {
        let mut one = listener("[2001:db8:1111:2222:3333:4444:5555:6666]:65535", Protocol::Tcp);
        (one.v6_only, one.redirected) = (true, true);
        let added = vec![one; LISTENERS_PER_MESSAGE];
        let message = ToHost::Listeners { part: Part::Middle, added, removed: Vec::new() };
        assert!(encode(&message).is_ok());
        let port = PortInfo {
            proto: Protocol::Tcp,
            bind: vec!["2001:db8:1111:2222:3333:4444:5555:6666".into(); 2],
            host_port: 65_535,
            guest: "2001:db8:1111:2222:3333:4444:5555:6666".into(),
            guest_port: 65_535,
            state: "x".repeat(256),
            accepted: u64::MAX,
        };
        let ports = vec![port; PORTS_PER_MESSAGE];
        assert!(encode(&ToGuest::Ports { id: 1, ports, more: true }).is_ok());
    }

    #[test]
    fn a_message_of_a_newer_peer_is_known_by_its_kind() {
        let newer = br#"{"type":"teleport","where":{"planet":4}}"#;
        assert_eq!(parse(newer), Ok(ToHost::Other));
        assert_eq!(parse(newer), Ok(ToGuest::Other));
        assert_eq!(kind_of(newer), "teleport");
        let more = br#"{"type":"stream","stream":1,"key":2,"color":"red"}"#;
        assert_eq!(parse(more), Ok(ToHost::Stream { stream: 1, key: 2 }), "a field more is no fault");
        assert_eq!(parse(br#""abolished""#), Ok(DialError::Failed));
    }

    #[test]
    fn garbage_and_endless_messages_are_errors() {
        for garbage in [&b""[..], b"{}", b"[]", b"\xff\xfe", br#"{"type":7}"#, br#"{"type":"stream"}"#] {
            assert!(matches!(parse::<ToHost>(garbage), Err(MessageError::Malformed(_))), "{garbage:?}");
        }
        let deep = [br#"{"type":"hello","x":"#.as_slice(), &b"[".repeat(10_000)].concat();
        assert!(parse::<ToHost>(&deep).is_err());
        let mut decoder = Decoder::default();
        decoder.feed(&u32::try_from(MESSAGE_MAX + 1).expect("small").to_be_bytes());
        assert_eq!(decoder.message(), Err(MessageError::TooLong(MESSAGE_MAX + 1)));
        assert!(encode(&ToHost::Unknown { kind: "x".repeat(MESSAGE_MAX) }).is_err());
    }

    #[test]
    fn several_messages_of_one_read_come_one_by_one() {
        let both = [encode(&ToHost::Ready).unwrap(), encode(&ToHost::Ports { id: 1 }).unwrap()].concat();
        let mut decoder = Decoder::default();
        decoder.feed(&both);
        assert_eq!(parse(decoder.message().unwrap().unwrap()), Ok(ToHost::Ready));
        assert_eq!(parse(decoder.message().unwrap().unwrap()), Ok(ToHost::Ports { id: 1 }));
        assert_eq!(decoder.message(), Ok(None));
        assert_eq!(decoder.held(), 0);
    }

    #[test]
    fn clients_and_the_guests_own_services_are_private() {
        use Protocol::{Tcp, Udp};
        for (text, proto) in [
            ("0.0.0.0:68", Udp),
            ("[::]:546", Udp),
            ("0.0.0.0:5353", Udp),
            ("0.0.0.0:5355", Udp),
            ("0.0.0.0:5355", Tcp),
            ("0.0.0.0:123", Udp),
            ("127.0.0.1:323", Udp),
            ("127.0.0.53:53", Tcp),
            ("224.0.0.251:7000", Udp),
        ] {
            assert!(listener(text, proto).is_private(), "{text}");
        }
        for (text, proto) in [("0.0.0.0:53", Udp), ("127.0.0.1:123", Tcp), ("0.0.0.0:80", Tcp)] {
            assert!(!listener(text, proto).is_private(), "{text}");
        }
    }
}
