//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo, and errors that tell the guest what happened.
//!
//! An error quotes the packet it is about, up to 576 bytes in all (RFC 1812 §4.3.2.3), or 1280 for IPv6 (RFC 4443 §2.4). There
//! is none about an ICMP error, a fragment but the first, or a broadcast (RFC 1122 §3.2.2, RFC 4443 §2.4). What one guest can
//! cause is limited to [`RateLimit::PER_SECOND`] answers a second.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::drop_reason::DropReason;
use crate::host::HostError;
use crate::time::{Duration, Instant};
use crate::wire::{checksum, ipv4, ipv6};

/// An echo request over IPv4.
pub const ECHO_REQUEST: u8 = 8;
/// An echo reply over IPv4.
pub const ECHO_REPLY: u8 = 0;
/// An echo request over IPv6.
pub const ECHO_REQUEST_V6: u8 = 128;
/// An echo reply over IPv6.
pub const ECHO_REPLY_V6: u8 = 129;
/// Bytes of an echo's header: type, code, checksum, identifier, sequence number.
pub const ECHO_HEADER: usize = 8;

const UNREACHABLE: u8 = 3;
const TIME_EXCEEDED: u8 = 11;
const FRAGMENTATION_NEEDED: u8 = 4;
const UNREACHABLE_V6: u8 = 1;
const TOO_BIG_V6: u8 = 2;
const TIME_EXCEEDED_V6: u8 = 3;
const PARAMETER_PROBLEM_V6: u8 = 4;
/// ICMPv6 types from here on are no errors (RFC 4443 §2.1).
const INFORMATIONAL_V6: u8 = 128;
const REDIRECT_V6: u8 = 137;

/// Why a destination cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unreachable {
    /// No route: code 0.
    Network,
    /// Nobody there: code 1, or 3 for IPv6.
    Host,
    /// Nobody speaks the protocol: code 2, or the parameter problem of an unknown next header for IPv6.
    Protocol,
    /// Nobody listens: code 3, or 4 for IPv6.
    Port,
    /// Policy: code 13, or 1 for IPv6.
    Prohibited,
}

impl From<HostError> for Unreachable {
    fn from(error: HostError) -> Self {
        match error {
            HostError::NetworkUnreachable => Self::Network,
            HostError::HostUnreachable => Self::Host,
            HostError::Prohibited => Self::Prohibited,
        }
    }
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Its destination cannot be reached.
    Unreachable(Unreachable),
    /// It does not fit an MTU of so many bytes, and nobody may fragment it (RFC 1191 §4, RFC 4443 §3.2).
    TooBig(u32),
    /// It passed as many routers as it may.
    HopLimit,
    /// Fragments were missing when the time was over.
    Reassembly,
}

/// Whether the ICMP message `body` is an echo request.
///
/// # Errors
/// `BadIcmp` when it is cut off or its checksum is wrong.
pub fn is_echo_request(body: &[u8]) -> Result<bool, DropReason> {
    if body.len() < ECHO_HEADER || checksum(&[body]) != 0 {
        return Err(DropReason::BadIcmp);
    }
    Ok(body.first() == Some(&ECHO_REQUEST))
}

/// What a guest's error "port unreachable" is about: its own end of the datagram that nobody there wanted, and where that came
/// from (RFC 792; RFC 4443 §3.1). `None` for any other message.
#[must_use]
pub fn refused_datagram(body: &[u8], v6: bool) -> Option<(SocketAddr, SocketAddr)> {
    let (&[kind, code, ..], quoted) = body.split_first_chunk::<8>()?;
    let (src, dst, udp): (IpAddr, IpAddr, &[u8]) = match (v6, kind, code) {
        (false, UNREACHABLE, 3) => {
            let &[version, _, _, _, _, _, f0, f1, _, ipv4::UDP, _, _, s0, s1, s2, s3, d0, d1, d2, d3] =
                quoted.first_chunk::<{ ipv4::HEADER }>()?
            else {
                return None;
            };
            let (length, offset) = (usize::from(version & 0xf) * 4, u16::from_be_bytes([f0, f1]) & 0x1fff);
            if version >> 4 != 4 || length < ipv4::HEADER || offset != 0 {
                return None;
            }
            let (src, dst) = (Ipv4Addr::new(s0, s1, s2, s3), Ipv4Addr::new(d0, d1, d2, d3));
            (src.into(), dst.into(), quoted.get(length..)?)
        }
        (true, UNREACHABLE_V6, 4) => {
            let (&[version, _, _, _, _, _, ipv4::UDP, _], rest) = quoted.split_first_chunk::<8>()? else {
                return None;
            };
            let ((src, rest), version) = (rest.split_first_chunk::<16>()?, version >> 4);
            let (dst, udp) = rest.split_first_chunk::<16>()?;
            if version != 6 {
                return None;
            }
            (Ipv6Addr::from(*src).into(), Ipv6Addr::from(*dst).into(), udp)
        }
        _ => return None,
    };
    let &[s0, s1, d0, d1] = udp.first_chunk()?;
    let (from, to) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
    Some((SocketAddr::new(dst, to), SocketAddr::new(src, from)))
}

/// The identifier of an echo.
#[must_use]
pub fn echo_id(body: &[u8]) -> u16 {
    body.get(4..6).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b))
}

/// The whole IP packet that answers the echo request `body` that `guest` sent to `asked`. `None` for two families.
#[must_use]
pub fn echo_reply(asked: IpAddr, guest: IpAddr, body: &[u8]) -> Option<Vec<u8>> {
    echo_message(asked, guest, body, echo_id(body))
}

/// The whole IP packet of an echo reply: `body` is a reply, or a request to be turned round, `id` its new identifier.
#[must_use]
pub fn echo_message(src: IpAddr, dst: IpAddr, body: &[u8], id: u16) -> Option<Vec<u8>> {
    let mut reply = body.to_vec();
    let v6 = src.is_ipv6();
    let kind = if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY };
    reply.get_mut(..2)?.copy_from_slice(&[kind, 0]);
    reply.get_mut(4..6)?.copy_from_slice(&id.to_be_bytes());
    message(src, dst, reply)
}

/// The whole IP packet that tells the sender of `about`, a packet as it left the guest, what became of it. `None` where there
/// must be no error, and for a `from` of the other family.
#[must_use]
pub fn error(from: IpAddr, fault: Fault, about: &[u8]) -> Option<Vec<u8>> {
    match (from, about.first().map(|b| b >> 4)) {
        (IpAddr::V4(from), Some(4)) => error_v4(from, fault, about),
        (IpAddr::V6(from), Some(6)) => error_v6(from, fault, about),
        _ => None,
    }
}

fn error_v4(from: Ipv4Addr, fault: Fault, about: &[u8]) -> Option<Vec<u8>> {
    let parsed = ipv4::parse(about).ok()?;
    let header = parsed.header;
    let is_error =
        header.protocol == ipv4::ICMP && parsed.payload.first().is_none_or(|t| !matches!(t, 0 | 8 | 13..=18));
    let unicast = |a: Ipv4Addr| !a.is_multicast() && !a.is_broadcast() && !a.is_unspecified();
    if is_error || parsed.fragment().offset > 0 || !unicast(header.src) || !unicast(header.dst) {
        return None;
    }
    let (kind, code, mtu) = match fault {
        Fault::Unreachable(Unreachable::Network) => (UNREACHABLE, 0, 0),
        Fault::Unreachable(Unreachable::Host) => (UNREACHABLE, 1, 0),
        Fault::Unreachable(Unreachable::Protocol) => (UNREACHABLE, 2, 0),
        Fault::Unreachable(Unreachable::Port) => (UNREACHABLE, 3, 0),
        Fault::Unreachable(Unreachable::Prohibited) => (UNREACHABLE, 13, 0),
        // One who allows fragments does not want to hear of it.
        Fault::TooBig(_) if !header.dont_fragment => return None,
        Fault::TooBig(mtu) => (UNREACHABLE, FRAGMENTATION_NEEDED, u16::try_from(mtu).unwrap_or(u16::MAX)),
        Fault::HopLimit => (TIME_EXCEEDED, 0, 0),
        Fault::Reassembly => (TIME_EXCEEDED, 1, 0),
    };
    let quoted = parsed.bytes.get(..576 - ipv4::HEADER - 8).unwrap_or(parsed.bytes);
    let [m0, m1] = mtu.to_be_bytes();
    let mut body = vec![kind, code, 0, 0, 0, 0, m0, m1];
    body.extend_from_slice(quoted);
    message(from.into(), header.src.into(), body)
}

fn error_v6(from: Ipv6Addr, fault: Fault, about: &[u8]) -> Option<Vec<u8>> {
    let header = ipv6::parse(about).ok()?;
    let (header, payload) = (header.header, header.payload);
    let is_error = header.protocol == ipv6::ICMP
        && payload.first().is_none_or(|t| *t < INFORMATIONAL_V6 || *t == REDIRECT_V6);
    let later = header.fragment.is_some_and(|f| f.offset > 0);
    let too_big = matches!(fault, Fault::TooBig(_));
    if is_error || later || header.src.is_unspecified() || (header.dst.is_multicast() && !too_big) {
        return None;
    }
    /// Where the first next-header number stands: what an unknown one points to is mostly this.
    const NEXT_HEADER: u32 = 6;
    let (kind, code, value) = match fault {
        Fault::Unreachable(Unreachable::Network) => (UNREACHABLE_V6, 0, 0),
        Fault::Unreachable(Unreachable::Prohibited) => (UNREACHABLE_V6, 1, 0),
        Fault::Unreachable(Unreachable::Host) => (UNREACHABLE_V6, 3, 0),
        Fault::Unreachable(Unreachable::Port) => (UNREACHABLE_V6, 4, 0),
        Fault::Unreachable(Unreachable::Protocol) => (PARAMETER_PROBLEM_V6, 1, NEXT_HEADER),
        Fault::TooBig(mtu) => (TOO_BIG_V6, 0, mtu),
        Fault::HopLimit => (TIME_EXCEEDED_V6, 0, 0),
        Fault::Reassembly => (TIME_EXCEEDED_V6, 1, 0),
    };
    let most = usize::from(ipv6::MIN_MTU) - ipv6::HEADER - 8;
    let [a, b, c, d] = value.to_be_bytes();
    let mut body = vec![kind, code, 0, 0, a, b, c, d];
    body.extend_from_slice(about.get(..most).unwrap_or(about));
    message(from.into(), header.src.into(), body)
}

/// An IP packet around an ICMP message whose checksum is still to be filled in.
fn message(src: IpAddr, dst: IpAddr, mut body: Vec<u8>) -> Option<Vec<u8>> {
    let (src, dst) = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => (src, dst),
        (IpAddr::V6(src), IpAddr::V6(dst)) => return Some(ipv6::icmp_packet(src, dst, 64, body)),
        _ => return None,
    };
    body.get_mut(2..4)?.fill(0);
    let sum = checksum(&[&body]).to_be_bytes();
    body.get_mut(2..4)?.copy_from_slice(&sum);
    let mut out = ipv4::header(src, dst, ipv4::ICMP, u16::try_from(body.len()).ok()?).to_vec();
    out.append(&mut body);
    Some(out)
}

/// A token bucket for answers one port may cause.
#[derive(Debug, Clone, Copy)]
pub struct RateLimit {
    tokens: u32,
    filled: Instant,
}

impl RateLimit {
    /// Answers a second, and the most at once.
    pub const PER_SECOND: u32 = 1000;

    /// A full bucket.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self { tokens: Self::PER_SECOND, filled: now }
    }

    /// Takes one token.
    ///
    /// # Errors
    /// `RateLimited` when there is none.
    pub fn take(&mut self, now: Instant) -> Result<(), DropReason> {
        let each = Duration::from_secs(1) / Self::PER_SECOND;
        let new = u32::try_from(now.since(self.filled).as_micros() / each.as_micros()).unwrap_or(u32::MAX);
        if new > 0 {
            self.tokens = self.tokens.saturating_add(new).min(Self::PER_SECOND);
            self.filled = if self.tokens == Self::PER_SECOND { now } else { self.filled + each * new };
        }
        self.tokens = self.tokens.checked_sub(1).ok_or(DropReason::RateLimited)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);
    const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
    const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

    fn v4(protocol: u8, payload: usize) -> Vec<u8> {
        let mut packet = ipv4::header(GUEST, FAR, protocol, u16::try_from(payload).unwrap()).to_vec();
        packet.extend(vec![0; payload]);
        packet
    }

    fn v6(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet =
            ipv6::header(GUEST6, FAR6, protocol, 64, u16::try_from(payload.len()).unwrap()).to_vec();
        packet.extend(payload);
        packet
    }

    #[test]
    fn an_echo_reply_is_the_request_turned_round() {
        let body = [ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1, b'h', b'i'];
        let request = message(GUEST.into(), FAR.into(), body.to_vec()).unwrap();
        let body = ipv4::parse(&request).unwrap().payload.to_vec();
        assert_eq!((is_echo_request(&body), echo_id(&body)), (Ok(true), 0x1234));
        let reply = echo_reply(FAR.into(), GUEST.into(), &body).unwrap();
        let read = ipv4::parse(&reply).unwrap();
        assert_eq!((read.header.src, read.header.dst), (FAR, GUEST));
        assert_eq!(checksum(&[read.payload]), 0);
        assert_eq!((read.payload[0], &read.payload[4..]), (ECHO_REPLY, &body[4..]));
        let reply = echo_message(FAR6.into(), GUEST6.into(), &body, 9).unwrap();
        let read = ipv6::parse(&reply).unwrap();
        assert_eq!((read.payload[0], &read.payload[4..6]), (ECHO_REPLY_V6, &[0, 9][..]));
        assert_eq!(ipv6::icmp_checksum(FAR6, GUEST6, &[read.payload]), 0);
    }

    #[test]
    fn rfc_1122_3_2_2_no_error_about_an_error_or_a_multicast() {
        let host = Fault::Unreachable(Unreachable::Host);
        let syn = v4(ipv4::TCP, 20);
        let told = error(FAR.into(), host, &syn).unwrap();
        assert_eq!(ipv4::parse(&told).unwrap().payload[..2], [3, 1]);
        assert_eq!(&told[28..], &syn[..]);
        assert_eq!(error(GUEST.into(), host, &told), None);
        let multicast = ipv4::header(GUEST, Ipv4Addr::new(224, 0, 0, 251), ipv4::UDP, 0);
        assert_eq!(error(FAR.into(), host, &multicast), None);
    }

    #[test]
    fn rfc_1812_4_3_2_3_an_error_is_at_most_576_bytes() {
        let told = error(FAR.into(), Fault::HopLimit, &v4(ipv4::UDP, 1400)).unwrap();
        assert_eq!((told.len(), &ipv4::parse(&told).unwrap().payload[..2]), (576, &[11, 0][..]));
    }

    #[test]
    fn rfc_1191_4_the_next_hops_mtu_stands_in_the_error_and_only_df_gets_one() {
        let told = error(FAR.into(), Fault::TooBig(1280), &v4(ipv4::UDP, 1400)).unwrap();
        assert_eq!(ipv4::parse(&told).unwrap().payload[..8][4..], [0, 0, 5, 0]);
        let place = ipv4::Fragment { id: 1, offset: 0, more: false };
        let may = ipv4::fragment_header(GUEST, FAR, ipv4::UDP, 0, place);
        assert_eq!(error(FAR.into(), Fault::TooBig(1280), &may), None);
    }

    #[test]
    fn rfc_4443_2_4_an_error_is_at_most_1280_bytes_and_none_is_about_an_error() {
        let told = error(FAR6.into(), Fault::TooBig(1400), &v6(17, &[0; 1400])).unwrap();
        let read = ipv6::parse(&told).unwrap();
        assert_eq!(
            (told.len(), &read.payload[..2], &read.payload[4..8]),
            (1280, &[2, 0][..], &[0, 0, 5, 120][..])
        );
        assert_eq!(ipv6::icmp_checksum(FAR6, GUEST6, &[read.payload]), 0);
        assert_eq!(error(GUEST6.into(), Fault::HopLimit, &told), None);
        let redirect = v6(ipv6::ICMP, &[137, 0, 0, 0]);
        assert_eq!(error(FAR6.into(), Fault::HopLimit, &redirect), None);
    }

    #[test]
    fn rfc_4443_3_1_each_reason_has_its_code() {
        for (why, kind, code) in [
            (Unreachable::Network, 1, 0),
            (Unreachable::Prohibited, 1, 1),
            (Unreachable::Host, 1, 3),
            (Unreachable::Port, 1, 4),
            (Unreachable::Protocol, 4, 1),
        ] {
            let told = error(FAR6.into(), Fault::Unreachable(why), &v6(17, &[0; 8])).unwrap();
            assert_eq!(ipv6::parse(&told).unwrap().payload[..2], [kind, code]);
        }
    }

    #[test]
    fn the_rate_limit_refills_with_time() {
        let mut limit = RateLimit::new(Instant::ZERO);
        for _ in 0..RateLimit::PER_SECOND {
            limit.take(Instant::ZERO).unwrap();
        }
        assert_eq!(limit.take(Instant::ZERO), Err(DropReason::RateLimited));
        assert_eq!(limit.take(Instant::from_millis(1)), Ok(()));
        assert_eq!(limit.take(Instant::from_millis(1)), Err(DropReason::RateLimited));
    }
}
