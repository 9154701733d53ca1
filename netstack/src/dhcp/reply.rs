//! The bytes of an answer (RFC 2131 §2, RFC 2132).

use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, Message, MessageType, OptionCode};

use crate::time::Duration;
use crate::types::Mac;

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
    pub(crate) lease_time: Duration,
}

/// The shortest BOOTP message (RFC 951); some clients drop shorter ones.
const MINIMUM: usize = 300;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// The options a client that asks for none in particular gets.
const USUAL: [u8; 9] = [1, 3, 6, 15, 26, 28, 119, 121, 12];

/// One answer to `message`. `lease`: whether it gives an address (an INFORM's does not, RFC 2131 §4.3.5).
pub(super) fn write(
    settings: &Settings,
    message: &Message,
    mac: Mac,
    kind: MessageType,
    ip: Ipv4Addr,
    mtu: u16,
    lease: bool,
) -> Vec<u8> {
    let yiaddr = if lease { ip } else { Ipv4Addr::UNSPECIFIED };
    let nak = kind == MessageType::Nak;
    let ciaddr = if nak { Ipv4Addr::UNSPECIFIED } else { message.ciaddr() };
    let mut out = vec![2, 1, 6, 0];
    out.extend(message.xid().to_be_bytes());
    out.extend([0, 0]);
    // RFC 2131 §4.3.2: a NAK through a relay has the broadcast bit set.
    out.extend((u16::from(message.flags()) | if nak { 0x8000 } else { 0 }).to_be_bytes());
    out.extend(ciaddr.octets());
    out.extend(yiaddr.octets());
    out.extend([0; 4]);
    out.extend(message.giaddr().octets());
    out.extend(mac.0);
    out.resize(236, 0);
    out.extend(COOKIE);
    let mut put = |code: u8, data: &[u8]| {
        // RFC 3396: an option beyond 255 bytes is split.
        for part in data.chunks(255) {
            out.extend([code, u8::try_from(part.len()).unwrap_or(255)]);
            out.extend(part);
        }
    };
    put(53, &[u8::from(kind)]);
    put(54, &settings.gateway.octets());
    if lease {
        let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX).to_be_bytes();
        put(51, &seconds(settings.lease_time));
        put(58, &seconds(settings.lease_time / 2));
        put(59, &seconds(settings.lease_time / 8 * 7));
    }
    if !nak {
        let wanted = match message.opts().get(OptionCode::ParameterRequestList) {
            Some(DhcpOption::ParameterRequestList(list)) => list.iter().map(|c| u8::from(*c)).collect(),
            _ => USUAL.to_vec(),
        };
        // RFC 2132 §3.3: the mask comes before the router.
        let mut sent = [false; 256];
        for code in std::iter::once(1).chain(wanted) {
            if !std::mem::replace(&mut sent[usize::from(code)], true)
                && let Some(data) = option(settings, message, code, mtu)
            {
                put(code, &data);
            }
        }
        // The MTU matters too much to be left to those who ask: a link with a large one must be known.
        if !sent[26]
            && let Some(data) = option(settings, message, 26, mtu)
        {
            put(26, &data);
        }
    }
    out.push(255);
    out.resize(out.len().max(MINIMUM), 0);
    out
}

/// The content of one option; `None` for what we do not have.
fn option(settings: &Settings, message: &Message, code: u8, mtu: u16) -> Option<Vec<u8>> {
    let gateway = settings.gateway.octets();
    Some(match code {
        1 => settings.mask.octets().to_vec(),
        3 => gateway.to_vec(),
        6 => settings.dns?.octets().to_vec(),
        12 => match message.opts().get(OptionCode::Hostname)? {
            DhcpOption::Hostname(name) => super::host_label(name)?.into_bytes(),
            _ => return None,
        },
        15 => settings.domain.clone().into_bytes(),
        26 => mtu.to_be_bytes().to_vec(),
        28 => settings.broadcast.octets().to_vec(),
        119 => search_list(std::iter::once(&settings.domain).chain(&settings.search)),
        // RFC 3442: a client that takes this ignores option 3, so the default route is in here as well.
        121 => [&[0], &gateway[..]].concat(),
        _ => return None,
    })
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
