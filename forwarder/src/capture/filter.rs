//! Which frames a capture wants. The parser is total: what it cannot read matches no host, port or protocol.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a capture wants: everything that is set has to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Only this link.
    pub vm: Option<String>,
    /// Only frames from or to this address; of ARP those that speak of it.
    pub host: Option<IpAddr>,
    /// Only TCP and UDP from or to this port.
    pub port: Option<u16>,
    /// Only this protocol.
    pub proto: Option<Layer4>,
    /// Bytes kept of a frame.
    pub snaplen: usize,
}

/// A protocol that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer4 {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, of both IP versions.
    Icmp,
    /// ARP.
    Arp,
}

/// A filter that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {what}")]
pub struct FilterError {
    /// The parameter.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What it should be.
    pub what: &'static str,
}

impl Default for Filter {
    fn default() -> Self {
        Self { vm: None, host: None, port: None, proto: None, snaplen: Self::SNAPLEN }
    }
}

impl Filter {
    /// The most that is kept of a frame, and the default: every frame whole.
    pub const SNAPLEN: usize = 262_144;

    /// Sets one parameter, `vm`, `host`, `port`, `proto` or `snaplen`. False for another name.
    ///
    /// # Errors
    /// A value that is none for the parameter.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, FilterError> {
        let fault = |field, what| FilterError { field, value: value.to_owned(), what };
        match key {
            "vm" => self.vm = Some(value.to_owned()),
            "host" => {
                self.host =
                    Some(value.parse().map_err(|_| fault("host", "an IP address, such as 192.168.127.2"))?)
            }
            "port" => {
                let port = value.parse().ok().filter(|p| *p > 0);
                self.port = Some(port.ok_or_else(|| fault("port", "a port from 1 to 65535"))?);
            }
            "proto" => {
                self.proto = Some(match value {
                    "tcp" => Layer4::Tcp,
                    "udp" => Layer4::Udp,
                    "icmp" => Layer4::Icmp,
                    "arp" => Layer4::Arp,
                    _ => return Err(fault("proto", "tcp, udp, icmp or arp")),
                })
            }
            "snaplen" => {
                let len = value.parse().ok().filter(|n| (14..=Self::SNAPLEN).contains(n));
                self.snaplen = len.ok_or_else(|| fault("snaplen", "a number of bytes from 14 to 262144"))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether `frame` matches; the link has been looked at before.
    #[must_use]
    pub fn wants(&self, frame: &[u8]) -> bool {
        if self.host.is_none() && self.port.is_none() && self.proto.is_none() {
            return true;
        }
        let Some(seen) = Seen::parse(frame) else { return false };
        self.proto.is_none_or(|p| seen.proto == Some(p))
            && self.host.is_none_or(|h| seen.hosts.contains(&h))
            && self.port.is_none_or(|p| seen.ports.is_some_and(|ports| ports.contains(&p)))
    }
}

/// What a filter can ask about a frame.
struct Seen {
    hosts: [IpAddr; 2],
    proto: Option<Layer4>,
    /// Not of fragments after the first.
    ports: Option<[u16; 2]>,
}

impl Seen {
    fn parse(frame: &[u8]) -> Option<Self> {
        let (header, packet) = frame.split_first_chunk::<14>()?;
        match [header[12], header[13]] {
            [0x08, 0x00] => Self::ipv4(packet),
            [0x86, 0xdd] => Self::ipv6(packet),
            [0x08, 0x06] => {
                let v4 =
                    |at: usize| packet.get(at..)?.first_chunk::<4>().map(|b| IpAddr::V4(Ipv4Addr::from(*b)));
                // RFC 826: sender's and target's protocol addresses.
                Some(Self { hosts: [v4(14)?, v4(24)?], proto: Some(Layer4::Arp), ports: None })
            }
            _ => None,
        }
    }

    fn ipv4(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<20>()?;
        let address = |at: usize| header.get(at..)?.first_chunk::<4>().map(|b| Ipv4Addr::from(*b));
        let hosts = [address(12)?.into(), address(16)?.into()];
        let first = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
        let payload = packet.get(usize::from(header[0] & 15) * 4..).filter(|_| first);
        Some(Self::transport(hosts, header[9], payload))
    }

    /// Extension headers are not walked: what has some is seen by its hosts alone.
    fn ipv6(packet: &[u8]) -> Option<Self> {
        let (header, payload) = packet.split_first_chunk::<40>()?;
        let address = |at: usize| header.get(at..)?.first_chunk::<16>().map(|b| Ipv6Addr::from(*b));
        Some(Self::transport([address(8)?.into(), address(24)?.into()], header[6], Some(payload)))
    }

    fn transport(hosts: [IpAddr; 2], protocol: u8, payload: Option<&[u8]>) -> Self {
        let proto = match protocol {
            6 => Some(Layer4::Tcp),
            17 => Some(Layer4::Udp),
            1 | 58 => Some(Layer4::Icmp),
            _ => None,
        };
        let ports = payload
            .filter(|_| matches!(proto, Some(Layer4::Tcp | Layer4::Udp)))
            .and_then(|p| p.first_chunk::<4>())
            .map(|[a, b, c, d]| [u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])]);
        Self { hosts, proto, ports }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(src: [u8; 4], sport: u16, dst: [u8; 4], dport: u16) -> Vec<u8> {
        let mut out = Vec::new();
        let frame = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(src, dst, 64).udp(sport, dport);
        frame.write(&mut out, b"x").unwrap();
        out
    }

    fn filter(pairs: &[(&str, &str)]) -> Filter {
        let mut filter = Filter::default();
        for (key, value) in pairs {
            assert!(filter.set(key, value).unwrap(), "{key}");
        }
        filter
    }

    #[test]
    fn everything_that_is_set_has_to_match() {
        let seen = udp([192, 168, 127, 2], 4000, [192, 0, 2, 7], 53);
        for (pairs, wanted) in [
            (&[][..], true),
            (&[("host", "192.0.2.7")], true),
            (&[("host", "192.168.127.2"), ("port", "53")], true),
            (&[("port", "4000"), ("proto", "udp")], true),
            (&[("host", "192.0.2.8")], false),
            (&[("port", "54")], false),
            (&[("proto", "tcp")], false),
            (&[("host", "192.0.2.7"), ("port", "54")], false),
        ] {
            assert_eq!(filter(pairs).wants(&seen), wanted, "{pairs:?}");
        }
    }

    #[test]
    fn torn_frames_match_nothing_and_hurt_nobody() {
        let whole = udp([10, 0, 0, 1], 1, [10, 0, 0, 2], 2);
        let wants_port = filter(&[("port", "2")]);
        for n in 0..whole.len() {
            let _ = wants_port.wants(&whole[..n]);
        }
        assert!(!wants_port.wants(&whole[..20]) && wants_port.wants(&whole));
    }

    #[test]
    fn a_bad_value_names_its_parameter() {
        for (key, value) in
            [("host", "a.name"), ("port", "0"), ("port", "70000"), ("proto", "sctp"), ("snaplen", "1")]
        {
            let error = Filter::default().set(key, value).unwrap_err();
            assert_eq!((error.field, error.value.as_str()), (key, value));
        }
        assert_eq!(Filter::default().set("colour", "red"), Ok(false));
    }
}
