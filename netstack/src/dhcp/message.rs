//! What a client's message says (RFC 2131 §2): the fixed fields and those options that are read here.
//!
//! Options lie in their own field and, when option 52 says so, in `file` and `sname` too (RFC 2131 §4.1); an option
//! that comes in several parts is one (RFC 3396). The parser is total, and stops at nothing but an option that is cut off
//! or has a length its meaning does not allow: such a message is malformed, and nobody guesses what was meant.
//!
//! `dhcproto` reads these messages in the tests, where a second opinion is wanted, and not here: it turns host names into
//! UTF-8 or refuses the message, and in builds with debug assertions it asserts the lengths of some options.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::time::Duration;
use crate::types::Mac;

/// Codes of options (RFC 2132, and where said).
pub(super) mod code {
    pub(in crate::dhcp) const PAD: u8 = 0;
    pub(in crate::dhcp) const MASK: u8 = 1;
    pub(in crate::dhcp) const ROUTER: u8 = 3;
    pub(in crate::dhcp) const DNS: u8 = 6;
    pub(in crate::dhcp) const HOST_NAME: u8 = 12;
    pub(in crate::dhcp) const DOMAIN: u8 = 15;
    pub(in crate::dhcp) const MTU: u8 = 26;
    pub(in crate::dhcp) const BROADCAST: u8 = 28;
    pub(in crate::dhcp) const NTP: u8 = 42;
    pub(in crate::dhcp) const REQUESTED: u8 = 50;
    pub(in crate::dhcp) const LEASE_TIME: u8 = 51;
    pub(in crate::dhcp) const OVERLOAD: u8 = 52;
    pub(in crate::dhcp) const KIND: u8 = 53;
    pub(in crate::dhcp) const SERVER: u8 = 54;
    pub(in crate::dhcp) const PARAMETERS: u8 = 55;
    pub(in crate::dhcp) const TEXT: u8 = 56;
    pub(in crate::dhcp) const LARGEST: u8 = 57;
    pub(in crate::dhcp) const T1: u8 = 58;
    pub(in crate::dhcp) const T2: u8 = 59;
    pub(in crate::dhcp) const CLIENT: u8 = 61;
    /// RFC 4039.
    pub(in crate::dhcp) const RAPID_COMMIT: u8 = 80;
    /// RFC 4702.
    pub(in crate::dhcp) const FQDN: u8 = 81;
    /// RFC 3046.
    pub(in crate::dhcp) const RELAY: u8 = 82;
    /// RFC 3397.
    pub(in crate::dhcp) const SEARCH: u8 = 119;
    /// RFC 3442.
    pub(in crate::dhcp) const ROUTES: u8 = 121;
    pub(in crate::dhcp) const END: u8 = 255;
}

/// Bytes of the fixed fields (RFC 2131 §2), the magic cookie not counted.
pub(super) const FIXED: usize = 236;
pub(super) const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// What a message is (RFC 2132 §9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Decline = 4,
    Ack = 5,
    Nak = 6,
    Release = 7,
    Inform = 8,
}

impl Kind {
    /// What a client sends; `None` for the rest.
    const fn from_client(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Discover),
            3 => Some(Self::Request),
            4 => Some(Self::Decline),
            7 => Some(Self::Release),
            8 => Some(Self::Inform),
            _ => None,
        }
    }
}

/// One message of a client.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) xid: [u8; 4],
    pub(super) flags: u16,
    /// The client's address, when it has one that it may use.
    pub(super) ciaddr: Option<Ipv4Addr>,
    /// The relay the message came through.
    pub(super) giaddr: Option<Ipv4Addr>,
    pub(super) mac: Mac,
    options: BTreeMap<u8, Vec<u8>>,
}

impl Message {
    /// Reads a message; `None` when it is malformed, or none of a client with an Ethernet address.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (fixed, rest) = bytes.split_at_checked(FIXED)?;
        let &[op, htype, hlen, _hops, x0, x1, x2, x3, _, _, f0, f1, ref addresses @ ..] = fixed else {
            return None;
        };
        if (op, htype, hlen) != (1, 1, 6) {
            return None;
        }
        let address = |at: usize| {
            let octets: [u8; 4] = *addresses.get(at..)?.first_chunk()?;
            Some(Some(Ipv4Addr::from(octets)).filter(|a| !a.is_unspecified()))
        };
        let (ciaddr, giaddr) = (address(0)?, address(12)?);
        let mac = Mac(*addresses.get(16..)?.first_chunk()?);
        if mac.is_group() {
            return None;
        }
        let (cookie, options) = rest.split_first_chunk()?;
        if *cookie != COOKIE {
            return None;
        }
        let options = read_options(options, fixed.get(108..FIXED)?, fixed.get(44..108)?)?;
        let kind = match options.get(&code::KIND).map(Vec::as_slice) {
            Some(&[byte]) => Kind::from_client(byte)?,
            _ => return None,
        };
        let flags = u16::from_be_bytes([f0, f1]);
        Some(Self { kind, xid: [x0, x1, x2, x3], flags, ciaddr, giaddr, mac, options })
    }

    /// Whether answers are to be broadcast: the client cannot take a datagram to an address it does not have yet.
    pub(super) const fn broadcast(&self) -> bool {
        self.flags & 0x8000 != 0
    }

    /// An option's bytes as they came.
    pub(super) fn raw(&self, code: u8) -> Option<&[u8]> {
        self.options.get(&code).map(Vec::as_slice)
    }

    /// The address the client asks for (option 50).
    pub(super) fn requested(&self) -> Option<Ipv4Addr> {
        self.address(code::REQUESTED)
    }

    /// The server the client speaks to (option 54).
    pub(super) fn server(&self) -> Option<Ipv4Addr> {
        self.address(code::SERVER)
    }

    /// How long the client would like to have the address (option 51).
    pub(super) fn lease_time(&self) -> Option<Duration> {
        let seconds = self.raw(code::LEASE_TIME)?.first_chunk()?;
        Some(Duration::from_secs(u32::from_be_bytes(*seconds).into()))
    }

    /// The largest message the client takes, IP header included (option 57).
    pub(super) fn largest(&self) -> Option<u16> {
        self.raw(code::LARGEST)?.first_chunk().map(|n| u16::from_be_bytes(*n))
    }

    /// What the client calls itself; `None` when it uses its Ethernet address. RFC 2132 §9.14: two bytes at least.
    pub(super) fn client_id(&self) -> Option<&[u8]> {
        self.raw(code::CLIENT).filter(|id| id.len() >= 2)
    }

    /// Whether the client takes a lease without asking twice (RFC 4039).
    pub(super) fn rapid_commit(&self) -> bool {
        self.raw(code::RAPID_COMMIT).is_some()
    }

    /// The guest's name for itself as one DNS label: of option 81, which says more, else of option 12.
    pub(super) fn host_label(&self) -> Option<String> {
        let full = self.raw(code::FQDN).and_then(fqdn_label);
        full.or_else(|| self.raw(code::HOST_NAME).and_then(host_label))
    }

    fn address(&self, code: u8) -> Option<Ipv4Addr> {
        self.raw(code)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets))
    }
}

/// The options that are read here, from every field they lie in.
fn read_options(main: &[u8], file: &[u8], sname: &[u8]) -> Option<BTreeMap<u8, Vec<u8>>> {
    let mut options = BTreeMap::new();
    collect(main, &mut options)?;
    let overload = match options.get(&code::OVERLOAD).map(Vec::as_slice) {
        None => 0,
        Some(&[fields @ 1..=3]) => fields,
        Some(_) => return None,
    };
    // RFC 3396 §5: the options field, then file, then sname.
    if overload & 1 != 0 {
        collect(file, &mut options)?;
    }
    if overload & 2 != 0 {
        collect(sname, &mut options)?;
    }
    let sound = |(code, value): (&u8, &Vec<u8>)| match *code {
        code::REQUESTED | code::SERVER | code::LEASE_TIME => value.len() == 4,
        code::LARGEST => value.len() == 2,
        code::KIND => value.len() == 1,
        _ => true,
    };
    options.iter().all(sound).then_some(options)
}

/// Adds the options of one field to `into`; `None` when one is cut off.
fn collect(field: &[u8], into: &mut BTreeMap<u8, Vec<u8>>) -> Option<()> {
    const READ: [u8; 13] = [
        code::HOST_NAME,
        code::REQUESTED,
        code::LEASE_TIME,
        code::OVERLOAD,
        code::KIND,
        code::SERVER,
        code::PARAMETERS,
        code::LARGEST,
        code::CLIENT,
        code::RAPID_COMMIT,
        code::FQDN,
        code::RELAY,
        code::TEXT,
    ];
    let mut rest = field;
    while let Some((&code, after)) = rest.split_first() {
        match code {
            code::PAD => rest = after,
            code::END => break,
            _ => {
                let (&len, after) = after.split_first()?;
                let (value, after) = after.split_at_checked(usize::from(len))?;
                if READ.contains(&code) {
                    into.entry(code).or_default().extend_from_slice(value);
                }
                rest = after;
            }
        }
    }
    Some(())
}

/// A host name as one DNS label (RFC 1123 §2.1); `None` when nothing is left of it.
pub(super) fn host_label(name: &[u8]) -> Option<String> {
    let first = name.split(|b| *b == b'.').next().unwrap_or_default();
    let legal = first.iter().filter(|b| b.is_ascii_alphanumeric() || **b == b'-').take(63);
    let label: String = legal.map(|b| char::from(b.to_ascii_lowercase())).collect();
    let label = label.trim_matches('-');
    (!label.is_empty()).then(|| label.to_owned())
}

/// Flag of option 81: the name is in DNS's wire form (RFC 4702 §2.1).
pub(super) const FQDN_ENCODED: u8 = 4;
/// The client leaves its A record to us.
pub(super) const FQDN_SERVER: u8 = 1;
/// We do what the client did not ask for.
pub(super) const FQDN_OVERRIDE: u8 = 2;

/// The first label of an option 81.
fn fqdn_label(option: &[u8]) -> Option<String> {
    let (&[flags, _, _], name) = option.split_first_chunk()?;
    if flags & FQDN_ENCODED == 0 {
        return host_label(name);
    }
    let (&len, rest) = name.split_first()?;
    host_label(rest.get(..usize::from(len)).filter(|_| len <= 63)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test that cannot go on ends")]

    use super::*;

    fn discover(options: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, 1, 6, 0, 9, 8, 7, 6];
        bytes.resize(28, 0);
        bytes.extend([2, 0, 0, 0, 0, 1]);
        bytes.resize(FIXED, 0);
        bytes.extend(COOKIE);
        bytes.extend(options);
        bytes
    }

    #[test]
    fn rfc_2131_4_1_options_lie_in_file_and_sname_too() {
        let mut bytes = discover(&[53, 1, 1, 52, 1, 3, 255]);
        bytes[108..113].copy_from_slice(&[12, 3, b'w', b'e', b'b']);
        bytes[113] = 255;
        bytes[44..50].copy_from_slice(&[50, 4, 192, 168, 127, 9]);
        let message = Message::parse(&bytes).unwrap();
        assert_eq!(message.host_label().as_deref(), Some("web"));
        assert_eq!(message.requested(), Some(Ipv4Addr::new(192, 168, 127, 9)));
        // Without option 52 they are a server's name and a boot file.
        bytes[243] = 0;
        bytes[244] = 0;
        bytes[245] = 0;
        assert_eq!(Message::parse(&bytes).unwrap().host_label(), None);
    }

    #[test]
    fn rfc_3396_an_option_in_parts_is_one_across_fields() {
        let mut bytes = discover(&[53, 1, 1, 61, 2, 1, 2, 52, 1, 1, 61, 1, 3, 255]);
        bytes[108..112].copy_from_slice(&[61, 1, 4, 255]);
        assert_eq!(Message::parse(&bytes).unwrap().client_id(), Some(&[1, 2, 3, 4][..]));
    }

    #[test]
    fn what_is_cut_off_or_has_a_wrong_length_is_malformed() {
        for bad in [
            &[53, 1][..],
            &[53, 1, 1, 61],
            &[53, 1, 1, 61, 9, 1],
            &[53, 2, 1, 1, 255],
            &[53, 1, 1, 53, 1, 3, 255],
            &[53, 1, 1, 50, 3, 1, 2, 3, 255],
            &[53, 1, 1, 52, 1, 4, 255],
            &[53, 1, 2, 255],
            &[255],
        ] {
            assert!(Message::parse(&discover(bad)).is_none(), "{bad:?}");
        }
        assert!(Message::parse(&discover(&[53, 1, 1])).is_some(), "the end option may be missing");
    }

    #[test]
    fn rfc_4702_a_full_name_is_read_in_both_encodings() {
        let mut text = vec![53, 1, 1, 81, 3 + 13, 0, 0, 0];
        text.extend(b"Web.lab.local");
        assert_eq!(Message::parse(&discover(&text)).unwrap().host_label().as_deref(), Some("web"));
        let wire = [53, 1, 1, 12, 1, b'x', 81, 8, FQDN_ENCODED, 0, 0, 3, b'd', b'b', b'1', 0];
        assert_eq!(Message::parse(&discover(&wire)).unwrap().host_label().as_deref(), Some("db1"));
        let cut = [53, 1, 1, 12, 1, b'x', 81, 6, FQDN_ENCODED, 0, 0, 9, b'd', b'b'];
        assert_eq!(Message::parse(&discover(&cut)).unwrap().host_label().as_deref(), Some("x"));
    }

    #[test]
    fn a_hostname_becomes_one_label_or_nothing() {
        assert_eq!(host_label(b"Web_1.example.com").as_deref(), Some("web1"));
        assert_eq!(host_label(b"\xff\xfeb\xc3\xa4r").as_deref(), Some("br"));
        assert_eq!(host_label(b"--..--"), None);
    }
}
