//! ICMP for IPv4 (RFC 792): echo answered for our own addresses, and errors that tell the guest what happened.
//!
//! An error quotes the packet it is about, up to 576 bytes in all (RFC 1812 §4.3.2.3). There is none about an ICMP
//! error, a fragment but the first, or a broadcast (RFC 1122 §3.2.2). What one guest can cause is limited to
//! [`RateLimit::PER_SECOND`] answers a second.

use std::net::Ipv4Addr;

use crate::drop_reason::DropReason;
use crate::host::HostError;
use crate::time::{Duration, Instant};
use crate::wire::{checksum, ipv4};

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;

/// The codes of destination unreachable (RFC 792, RFC 1812 §5.2.7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unreachable {
    /// 0.
    Network = 0,
    /// 1.
    Host = 1,
    /// 3.
    Port = 3,
    /// 13.
    Prohibited = 13,
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

/// Whether the ICMP message `body` is an echo request.
///
/// # Errors
/// `BadIcmp` when it is cut off or its checksum is wrong.
pub fn is_echo_request(body: &[u8]) -> Result<bool, DropReason> {
    if body.len() < 8 || checksum(&[body]) != 0 {
        return Err(DropReason::BadIcmp);
    }
    Ok(body.first() == Some(&ECHO_REQUEST))
}

/// The whole IP packet that answers the echo request `body` that `guest` sent to `asked`.
#[must_use]
pub fn echo_reply(asked: Ipv4Addr, guest: Ipv4Addr, body: &[u8]) -> Vec<u8> {
    let mut reply = body.to_vec();
    if let Some(kind) = reply.first_mut() {
        *kind = ECHO_REPLY;
    }
    packet(asked, guest, reply)
}

/// The whole IP packet that tells the sender of `about` (an IPv4 packet) that its destination cannot be reached.
/// `None` where there must be no error.
#[must_use]
pub fn unreachable(from: Ipv4Addr, code: Unreachable, about: &[u8]) -> Option<Vec<u8>> {
    let parsed = ipv4::parse(about).ok()?;
    let header = parsed.header;
    let is_error =
        header.protocol == ipv4::ICMP && parsed.payload.first().is_none_or(|t| !matches!(t, 0 | 8 | 13..=18));
    let later_fragment = about.get(6..8).is_none_or(|f| u16::from_be_bytes([f[0], f[1]]) & 0x1fff != 0);
    let unicast = |a: Ipv4Addr| !a.is_multicast() && !a.is_broadcast() && !a.is_unspecified();
    if is_error || later_fragment || !unicast(header.src) || !unicast(header.dst) {
        return None;
    }
    let quoted = parsed.bytes.get(..576 - ipv4::HEADER - 8).unwrap_or(parsed.bytes);
    let mut body = vec![UNREACHABLE, code as u8, 0, 0, 0, 0, 0, 0];
    body.extend_from_slice(quoted);
    Some(packet(from, header.src, body))
}

/// The whole IP packet that tells the sender of `about` that it does not fit an MTU of `mtu` bytes (RFC 1191 §4: code 4,
/// "fragmentation needed and DF set"). `None` where there must be no error, or fragments would be allowed.
#[must_use]
pub fn too_big(from: Ipv4Addr, mtu: u16, about: &[u8]) -> Option<Vec<u8>> {
    const DONT_FRAGMENT: u8 = 0x40;
    const FRAGMENTATION_NEEDED: u8 = 4;
    if about.get(6).is_none_or(|b| b & DONT_FRAGMENT == 0) {
        return None;
    }
    let mut packet = unreachable(from, Unreachable::Port, about)?;
    let mut body = packet.split_off(ipv4::HEADER);
    if let Some([code, ..]) = body.get_mut(1..) {
        *code = FRAGMENTATION_NEEDED;
    }
    if let Some(field) = body.get_mut(6..8) {
        field.copy_from_slice(&mtu.to_be_bytes());
    }
    let to = ipv4::parse(about).ok()?.header.src;
    Some(self::packet(from, to, body))
}

/// An IPv4 packet around an ICMP message whose checksum is still to be filled in.
fn packet(src: Ipv4Addr, dst: Ipv4Addr, mut body: Vec<u8>) -> Vec<u8> {
    if let Some(sum) = body.get_mut(2..4) {
        sum.fill(0);
    }
    let sum = checksum(&[&body]).to_be_bytes();
    if let Some(field) = body.get_mut(2..4) {
        field.copy_from_slice(&sum);
    }
    let mut out = ipv4::header(src, dst, ipv4::ICMP, u16::try_from(body.len()).unwrap_or(u16::MAX)).to_vec();
    out.append(&mut body);
    out
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

    #[test]
    fn an_echo_reply_is_the_request_turned_round() {
        let request = packet(GUEST, FAR, vec![ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1, b'h', b'i']);
        let body = ipv4::parse(&request).unwrap().payload.to_vec();
        assert_eq!(is_echo_request(&body), Ok(true));
        let reply = echo_reply(FAR, GUEST, &body);
        let read = ipv4::parse(&reply).unwrap();
        assert_eq!((read.header.src, read.header.dst), (FAR, GUEST));
        assert_eq!(checksum(&[read.payload]), 0);
        assert_eq!((read.payload[0], &read.payload[4..]), (ECHO_REPLY, &body[4..]));
    }

    #[test]
    fn rfc_1122_3_2_2_no_error_about_an_error_or_a_multicast() {
        let mut syn = ipv4::header(GUEST, FAR, ipv4::TCP, 20).to_vec();
        syn.extend([0; 20]);
        let error = unreachable(FAR, Unreachable::Host, &syn).unwrap();
        assert_eq!(ipv4::parse(&error).unwrap().payload[..2], [3, 1]);
        assert_eq!(&error[28..], &syn[..]);
        assert_eq!(unreachable(GUEST, Unreachable::Host, &error), None);
        let multicast = ipv4::header(GUEST, Ipv4Addr::new(224, 0, 0, 251), ipv4::UDP, 0);
        assert_eq!(unreachable(FAR, Unreachable::Port, &multicast), None);
    }

    #[test]
    fn rfc_1812_4_3_2_3_an_error_is_at_most_576_bytes() {
        let mut big = ipv4::header(GUEST, FAR, ipv4::UDP, 1400).to_vec();
        big.extend([0; 1400]);
        assert_eq!(unreachable(FAR, Unreachable::Port, &big).unwrap().len(), 576);
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
