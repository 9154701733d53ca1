//! The bytes of an answer (RFC 2131 §2, §4.3.1; RFC 2132).
//!
//! Options come in the order the client lists them in (RFC 2131 §4.3.1), after those every answer has; the mask always
//! before the router (RFC 2132 §3.3), the relay's option last (RFC 3046 §2.2). What does not fit into the size the client
//! takes goes to `file` and `sname` (option 52), and what fits nowhere is left out.

use std::net::Ipv4Addr;

use super::message::{self, COOKIE, FIXED, Kind, Message, code};
use crate::time::Duration;

/// What clients are told.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) gateway: Ipv4Addr,
    pub(crate) host_alias: Ipv4Addr,
    /// The resolver, if guests are told of one.
    pub(crate) dns: Option<Ipv4Addr>,
    /// The first and last address that is leased; `None`: the whole subnet.
    pub(crate) pool: Option<(Ipv4Addr, Ipv4Addr)>,
    pub(crate) mask: Ipv4Addr,
    pub(crate) broadcast: Ipv4Addr,
    pub(crate) domain: String,
    pub(crate) search: Vec<String>,
    pub(crate) ntp: Vec<Ipv4Addr>,
    /// The longest lease; a client may ask for a shorter one.
    pub(crate) lease_time: Duration,
}

/// What one client is told beside the settings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms<'a> {
    /// The address and for how long it is lent; `None` in an INFORM's answer (RFC 2131 §4.3.5) and a NAK.
    pub(super) lease: Option<(Ipv4Addr, Duration)>,
    /// The name the guest has.
    pub(super) name: Option<&'a str>,
    /// The largest packet of the link.
    pub(super) mtu: u16,
    /// Why not, in a NAK.
    pub(super) why: Option<&'a str>,
}

/// The shortest BOOTP message (RFC 951); some clients drop shorter ones.
const MINIMUM: usize = 300;
/// The largest message a client takes that says nothing (RFC 2131 §2), headers of IP and UDP included.
const USUAL_LARGEST: u16 = 576;
/// Headers of IP and UDP.
const HEADERS: usize = 28;
/// Where `sname` and `file` lie.
const SNAME: std::ops::Range<usize> = 44..108;
const FILE: std::ops::Range<usize> = 108..FIXED;

/// The options a client that asks for none in particular gets.
const USUAL: [u8; 10] = [
    code::MASK,
    code::ROUTER,
    code::DNS,
    code::DOMAIN,
    code::MTU,
    code::BROADCAST,
    code::NTP,
    code::SEARCH,
    code::ROUTES,
    code::HOST_NAME,
];

/// One answer to `message`.
pub(super) fn write(settings: &Settings, message: &Message, kind: Kind, terms: Terms<'_>) -> Vec<u8> {
    let nak = kind == Kind::Nak;
    let mut out = vec![2, 1, 6, 0];
    out.extend(message.xid);
    out.extend([0, 0]);
    // RFC 2131 §4.3.2: a NAK through a relay has the broadcast bit set.
    out.extend((message.flags | if nak { 0x8000 } else { 0 }).to_be_bytes());
    // Table 3: an ACK repeats the client's address, an OFFER and a NAK have none.
    let ciaddr = message.ciaddr.filter(|_| kind == Kind::Ack).unwrap_or(Ipv4Addr::UNSPECIFIED);
    out.extend(ciaddr.octets());
    out.extend(terms.lease.map_or(Ipv4Addr::UNSPECIFIED, |(ip, _)| ip).octets());
    out.extend([0; 4]);
    out.extend(message.giaddr.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
    out.extend(message.mac.0);
    out.resize(FIXED, 0);
    out.extend(COOKIE);

    let largest = message.largest().unwrap_or(0).max(USUAL_LARGEST).min(terms.mtu.max(USUAL_LARGEST));
    let relay = message.raw(code::RELAY);
    // Room for the options field; the end option, option 52 and the relay's always have theirs.
    let kept = 1 + 3 + relay.map_or(0, encoded_len);
    let room = usize::from(largest).saturating_sub(HEADERS + out.len() + kept);
    let mut fields = Fields { main: Vec::new(), room, file: Vec::new(), sname: Vec::new() };
    for (code, value) in options(settings, message, kind, terms) {
        fields.put(code, &value);
    }
    let Fields { mut main, file, sname, .. } = fields;
    let used = u8::from(!file.is_empty()) | u8::from(!sname.is_empty()) << 1;
    if used != 0 {
        encode(code::OVERLOAD, &[used], &mut main);
        for (field, options) in [(FILE, &file), (SNAME, &sname)] {
            let bytes = options.iter().copied().chain(std::iter::once(code::END));
            if let Some(place) = out.get_mut(field).filter(|_| !options.is_empty()) {
                place.iter_mut().zip(bytes).for_each(|(slot, byte)| *slot = byte);
            }
        }
    }
    if let Some(relay) = relay {
        encode(code::RELAY, relay, &mut main);
    }
    out.extend(main);
    out.push(code::END);
    out.resize(out.len().max(MINIMUM), 0);
    out
}

/// The options of an answer, in their order.
fn options(settings: &Settings, message: &Message, kind: Kind, terms: Terms<'_>) -> Vec<(u8, Vec<u8>)> {
    let mut all = vec![(code::KIND, vec![kind as u8]), (code::SERVER, settings.gateway.octets().to_vec())];
    if let Some((_, time)) = terms.lease {
        let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        all.push((code::LEASE_TIME, seconds(time)));
        all.push((code::T1, seconds(time / 2)));
        all.push((code::T2, seconds(time / 8 * 7)));
        if message.rapid_commit() && message.kind == Kind::Discover && kind == Kind::Ack {
            all.push((code::RAPID_COMMIT, Vec::new()));
        }
    }
    // RFC 6842 §3: the client's identifier goes back to it, in a NAK too.
    all.extend(message.raw(code::CLIENT).map(|id| (code::CLIENT, id.to_vec())));
    if kind == Kind::Nak {
        all.extend(terms.why.map(|why| (code::TEXT, why.as_bytes().to_vec())));
        return all;
    }
    let wanted = message.raw(code::PARAMETERS).unwrap_or(&USUAL);
    let mut sent = [false; 256];
    // The MTU matters too much to be left to those who ask: a link with a large one must be known.
    for code in std::iter::once(code::MASK).chain(wanted.iter().copied()).chain([code::MTU, code::FQDN]) {
        let sent = sent.get_mut(usize::from(code)).map(|s| std::mem::replace(s, true));
        if sent == Some(false) {
            all.extend(option(settings, message, code, terms).map(|value| (code, value)));
        }
    }
    all
}

/// The content of one option; `None` for what we do not have.
fn option(settings: &Settings, message: &Message, code: u8, terms: Terms<'_>) -> Option<Vec<u8>> {
    let gateway = settings.gateway.octets();
    Some(match code {
        code::MASK => settings.mask.octets().to_vec(),
        code::ROUTER => gateway.to_vec(),
        code::DNS => settings.dns?.octets().to_vec(),
        code::HOST_NAME => terms.name?.as_bytes().to_vec(),
        code::DOMAIN => settings.domain.clone().into_bytes(),
        code::MTU => terms.mtu.to_be_bytes().to_vec(),
        code::BROADCAST => settings.broadcast.octets().to_vec(),
        code::NTP if !settings.ntp.is_empty() => settings.ntp.iter().flat_map(|ip| ip.octets()).collect(),
        code::FQDN => full_name(settings, message.raw(code::FQDN)?, terms.name),
        code::SEARCH => search_list(std::iter::once(&settings.domain).chain(&settings.search)),
        // RFC 3442: a client that takes this ignores option 3, so the default route is in here as well.
        code::ROUTES => [&[0], &gateway[..]].concat(),
        _ => return None,
    })
}

/// The answer to an option 81 (RFC 4702 §3.1, §4): the A record is ours to write, whatever the client wanted.
fn full_name(settings: &Settings, asked: &[u8], name: Option<&str>) -> Vec<u8> {
    let theirs = asked.first().copied().unwrap_or(0);
    let mut flags = theirs & message::FQDN_ENCODED;
    if name.is_some() {
        flags |= message::FQDN_SERVER;
        if theirs & message::FQDN_SERVER == 0 {
            flags |= message::FQDN_OVERRIDE;
        }
    }
    let full = name.map_or_else(String::new, |label| format!("{label}.{}", settings.domain));
    let mut value = vec![flags, 255, 255];
    if theirs & message::FQDN_ENCODED == 0 {
        value.extend(full.bytes());
    } else if !full.is_empty() {
        value.extend(search_list(std::iter::once(&full)));
    }
    value
}

/// Domains as DNS labels (RFC 3397), without compression; a name with an empty or overlong label is left out.
fn search_list<'a>(domains: impl Iterator<Item = &'a String>) -> Vec<u8> {
    let mut out = Vec::new();
    for domain in domains {
        let labels: Vec<&str> = domain.trim_end_matches('.').split('.').collect();
        if labels.iter().all(|l| (1..=63).contains(&l.len())) {
            for label in labels {
                out.push(u8::try_from(label.len()).unwrap_or(63));
                out.extend(label.as_bytes());
            }
            out.push(0);
        }
    }
    out
}

/// Where options go.
struct Fields {
    main: Vec<u8>,
    room: usize,
    file: Vec<u8>,
    sname: Vec<u8>,
}

impl Fields {
    /// Puts an option where it fits whole. Clients that know the search list join its parts (RFC 3397 §2), so it may lie in
    /// several fields.
    fn put(&mut self, code: u8, value: &[u8]) {
        let len = encoded_len(value);
        // One byte of each field is its end.
        let mut rooms = [
            (&mut self.main, self.room),
            (&mut self.file, FILE.len() - 1),
            (&mut self.sname, SNAME.len() - 1),
        ];
        if let Some((field, _)) = rooms.iter_mut().find(|(field, room)| field.len() + len <= *room) {
            encode(code, value, field);
            return;
        }
        // Each part costs a code and a length.
        let parts = rooms.each_ref().map(|(field, room)| room.saturating_sub(field.len() + 2).min(255));
        if code == code::SEARCH && parts.iter().sum::<usize>() >= value.len() {
            let mut rest = value;
            for ((field, _), part) in rooms.iter_mut().zip(parts) {
                let (here, after) = rest.split_at(part.min(rest.len()));
                if !here.is_empty() {
                    encode(code, here, field);
                }
                rest = after;
            }
        }
    }
}

/// Bytes of an option with its codes and lengths.
fn encoded_len(value: &[u8]) -> usize {
    value.len() + 2 * value.len().div_ceil(255).max(1)
}

fn encode(code: u8, value: &[u8], out: &mut Vec<u8>) {
    if value.is_empty() {
        out.extend([code, 0]);
    }
    // RFC 3396: an option beyond 255 bytes is split.
    for part in value.chunks(255) {
        out.extend([code, u8::try_from(part.len()).unwrap_or(255)]);
        out.extend(part);
    }
}
