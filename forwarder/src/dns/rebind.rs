//! Protection of guests' browsers against DNS rebinding: a page of somebody's site whose name suddenly stands for an address
//! of the inside.
//!
//! With it on, an answer of a resolver that holds such an address (A, AAAA, or a hint of HTTPS and SVCB) is taken for one
//! without records. Let through are names of domains that have servers of their own (`--dns-upstream DOMAIN=…`) and of
//! `--dns-private DOMAIN`: there inside addresses are what is asked for. Records and hosts entries of the operator's are
//! never looked at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::wire::{self, Section, kind};

/// Whether `message`, an answer, leads inside.
pub(super) fn leads_inside(message: &[u8]) -> bool {
    let Some(records) = wire::records(message) else { return false };
    records.iter().filter(|r| r.section != Section::Authority).any(|r| {
        let data = message.get(r.data.clone()).unwrap_or_default();
        match r.kind {
            kind::A => data.first_chunk::<4>().is_some_and(|a| is_inside(IpAddr::from(*a))),
            kind::AAAA => data.first_chunk::<16>().is_some_and(|a| is_inside(IpAddr::from(*a))),
            kind::HTTPS | kind::SVCB => hints(data).any(is_inside),
            _ => false,
        }
    })
}

/// Addresses that mean something to who is inside only: private, loopback, link-local, shared and unspecified ones, in IPv6
/// forms too (RFC 1918, 6598, 4193, 6890).
fn is_inside(address: IpAddr) -> bool {
    fn v4(a: Ipv4Addr) -> bool {
        let [first, second, ..] = a.octets();
        a.is_private()
            || a.is_loopback()
            || a.is_link_local()
            || a.is_broadcast()
            || first == 0
            || (first == 100 && second & 0xc0 == 64)
    }
    fn v6(a: Ipv6Addr) -> bool {
        let segments = a.segments();
        let [first, second, ..] = segments;
        // RFC 6052: IPv4 addresses as NAT64 writes them.
        let [.., hi, lo] = segments;
        let nat64 =
            first == 0x64 && second == 0xff9b && v4(Ipv4Addr::from(u32::from(hi) << 16 | u32::from(lo)));
        a.is_loopback()
            || a.is_unspecified()
            || first & 0xfe00 == 0xfc00
            || first & 0xffc0 == 0xfe80
            || nat64
            || a.to_ipv4_mapped().is_some_and(v4)
    }
    match address {
        IpAddr::V4(a) => v4(a),
        IpAddr::V6(a) => v6(a),
    }
}

/// The address hints in the data of an SVCB record (RFC 9460 §2.2, §7.3). Data that is malformed has those before the fault.
fn hints(data: &[u8]) -> impl Iterator<Item = IpAddr> {
    const IPV4: u16 = 4;
    const IPV6: u16 = 6;
    let after_name = data.get(2..).and_then(|rest| {
        let mut at = 0_usize;
        loop {
            match rest.get(at)? {
                0 => return rest.get(at.checked_add(1)?..),
                n => at = at.checked_add(1)?.checked_add(usize::from(*n))?,
            }
        }
    });
    let mut rest = after_name.unwrap_or_default();
    let mut found = Vec::new();
    while let Some((&[k0, k1, l0, l1], after)) = rest.split_first_chunk() {
        let Some((value, next)) = after.split_at_checked(usize::from(u16::from_be_bytes([l0, l1]))) else {
            break;
        };
        match u16::from_be_bytes([k0, k1]) {
            IPV4 => found.extend(value.as_chunks::<4>().0.iter().map(|a| IpAddr::from(*a))),
            IPV6 => found.extend(value.as_chunks::<16>().0.iter().map(|a| IpAddr::from(*a))),
            _ => {}
        }
        rest = next;
    }
    found.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_inside_are_known_in_all_their_forms() {
        let inside = [
            "10.1.2.3",
            "172.31.0.1",
            "192.168.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "100.64.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fd00::1",
            "fe80::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
        ];
        for address in inside {
            assert!(is_inside(address.parse().unwrap()), "{address}");
        }
        for address in
            ["8.8.8.8", "100.128.0.1", "172.32.0.1", "2001:db8::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
        {
            assert!(!is_inside(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn hints_of_https_records_are_read_and_malformed_ones_survived() {
        let mut data = vec![0, 1, 3, b'w', b'w', b'w', 0];
        data.extend([0, 1, 0, 3, 2, b'h', b'2']);
        data.extend([0, 4, 0, 8, 8, 8, 8, 8, 10, 0, 0, 1]);
        let found: Vec<String> = hints(&data).map(|a| a.to_string()).collect();
        assert_eq!(found, ["8.8.8.8", "10.0.0.1"]);
        for cut in 0..data.len() {
            let _ = hints(&data[..cut]).count();
        }
    }
}
