use proptest::prelude::*;

use super::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OURS: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);

const SOLICIT: u8 = 1;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION: u8 = 11;

/// How long a lease is here.
const VALID: Duration = Duration::from_secs(7200);

struct Server(Dhcp6Server, Instant);

fn option(code: u16, value: &[u8]) -> Vec<u8> {
    [&code.to_be_bytes()[..], &u16::try_from(value.len()).unwrap().to_be_bytes(), value].concat()
}

fn client(n: u8) -> Vec<u8> {
    option(1, &[0, 3, 0, 1, 2, 0, 0, 0, 0, n])
}

fn server() -> Vec<u8> {
    option(2, &message::duid(OURS))
}

fn ia(id: u32, addresses: &[Ipv6Addr]) -> Vec<u8> {
    let mut value = [&id.to_be_bytes()[..], &[0; 8]].concat();
    for ip in addresses {
        value.extend(option(5, &[&ip.octets()[..], &[0; 8]].concat()));
    }
    option(3, &value)
}

/// An answer, taken apart.
#[derive(Debug, Default)]
struct Answer {
    kind: u8,
    /// Of the first IA, with their valid lifetimes.
    addresses: Vec<(Ipv6Addr, u32)>,
    /// Of the IA, else of the message.
    status: Option<u8>,
    codes: Vec<u16>,
}

fn read(bytes: &[u8]) -> Answer {
    fn walk(bytes: &[u8], answer: &mut Answer, top: bool) {
        let mut rest = bytes;
        while let [c0, c1, l0, l1, after @ ..] = rest {
            let code = u16::from_be_bytes([*c0, *c1]);
            let (value, after) = after.split_at(usize::from(u16::from_be_bytes([*l0, *l1])));
            rest = after;
            if top {
                answer.codes.push(code);
            }
            match code {
                3 => walk(&value[12..], answer, false),
                5 => {
                    let ip: [u8; 16] = value[..16].try_into().unwrap();
                    answer.addresses.push((ip.into(), u32::from_be_bytes(value[20..24].try_into().unwrap())));
                }
                13 => answer.status = answer.status.or(Some(value[1])),
                _ => {}
            }
        }
    }
    let mut answer = Answer { kind: bytes[0], ..Answer::default() };
    assert_eq!(bytes[1..4], [7, 8, 9]);
    walk(&bytes[4..], &mut answer, true);
    answer
}

impl Server {
    fn new(per_port: usize) -> Self {
        let settings = Settings6 {
            mac: OURS,
            subnet: "fd00:1::/64".parse().unwrap(),
            resolver: "fd00:1::1".parse().unwrap(),
            domains: vec!["portway.internal".into()],
            lease_time: VALID,
        };
        Self(Dhcp6Server::new(settings, per_port), Instant::ZERO)
    }

    fn on(&mut self, port: u16, kind: u8, options: &[Vec<u8>]) -> Result<Answer, DropReason> {
        let bytes = [&[kind, 7, 8, 9][..], &options.concat()].concat();
        self.0.handle(self.1, PortId(port), MAC, true, &bytes).map(|r| read(&r.unwrap().bytes))
    }

    fn says(&mut self, kind: u8, options: &[Vec<u8>]) -> Answer {
        self.on(0, kind, options).unwrap()
    }

    /// The whole exchange of a client.
    fn leases(&mut self, n: u8) -> Ipv6Addr {
        self.says(SOLICIT, &[client(n), ia(1, &[])]);
        self.says(REQUEST, &[client(n), server(), ia(1, &[])]).addresses[0].0
    }
}

#[test]
fn rfc_8415_18_3_1_a_solicit_is_advertised_and_a_request_leased_the_same_address() {
    let mut s = Server::new(8);
    let offer = s.says(SOLICIT, &[client(1), ia(1, &[])]);
    assert_eq!((offer.kind, offer.codes), (2, vec![1, 2, 3, 23, 24, 7]));
    assert!(s.0.reports(s.1).is_empty());
    let lease = s.says(REQUEST, &[client(1), server(), ia(1, &[])]);
    assert_eq!((lease.kind, &lease.addresses), (7, &offer.addresses));
    assert_eq!((lease.addresses[0].1, s.0.reports(s.1)[0].remaining), (7200, VALID));
    s.0.set_domains(Vec::new());
    assert_eq!(s.says(RENEW, &[client(1), server(), ia(1, &[])]).codes, [1, 2, 3, 23]);
    assert!(s.0.settings.subnet.contains(IpAddr::V6(lease.addresses[0].0)));
    assert_eq!(s.0.reports(s.1)[0].ip, lease.addresses[0].0);
}

#[test]
fn rfc_8415_18_3_1_rapid_commit_leases_at_once() {
    let mut s = Server::new(8);
    let lease = s.says(SOLICIT, &[client(1), ia(1, &[]), option(14, &[])]);
    assert_eq!((lease.kind, lease.codes.contains(&14), s.0.reports(s.1).len()), (7, true, 1));
}

#[test]
fn an_address_follows_from_the_client_alone_also_after_a_restart() {
    let ip = Server::new(8).leases(1);
    let mut s = Server::new(8);
    assert_ne!(s.leases(2), ip);
    assert_eq!(s.leases(1), ip);
    // One that renews with a server that knows nothing of it keeps its address as well.
    let mut fresh = Server::new(8);
    assert_eq!(fresh.says(RENEW, &[client(1), server(), ia(1, &[ip])]).addresses, [(ip, 7200)]);
}

#[test]
fn rfc_8415_18_3_4_a_foreign_address_ends_when_it_is_renewed() {
    let mut s = Server::new(8);
    let ip = s.leases(1);
    let foreign: Ipv6Addr = "2001:db8::9".parse().unwrap();
    for (kind, server) in [(RENEW, server()), (REBIND, vec![])] {
        let renewed = s.says(kind, &[client(1), server, ia(1, &[foreign, ip])]);
        assert_eq!(renewed.addresses, [(ip, 7200), (foreign, 0)]);
    }
}

#[test]
fn rfc_8415_18_3_3_confirm_says_whether_the_addresses_are_of_this_link() {
    let mut s = Server::new(8);
    let here = "fd00:1::77".parse().unwrap();
    assert_eq!(s.says(CONFIRM, &[client(1), ia(1, &[here])]).status, Some(0));
    let elsewhere = "2001:db8::1".parse().unwrap();
    assert_eq!(s.says(CONFIRM, &[client(1), ia(1, &[here, elsewhere])]).status, Some(4));
    assert_eq!(s.on(0, CONFIRM, &[client(1), ia(1, &[])]).unwrap_err(), DropReason::DhcpIgnored);
}

#[test]
fn rfc_8415_18_3_7_a_released_address_is_free_and_8_a_declined_one_is_not() {
    let mut s = Server::new(8);
    let ip = s.leases(1);
    assert_eq!(s.says(RELEASE, &[client(2), server(), ia(1, &[ip])]).status, Some(3));
    assert_eq!(s.0.reports(s.1).len(), 1);
    assert_eq!(s.says(RELEASE, &[client(1), server(), ia(1, &[ip])]).status, Some(0));
    assert!(s.0.reports(s.1).is_empty());
    assert_eq!(s.leases(1), ip);
    s.says(DECLINE, &[client(1), server(), ia(1, &[ip])]);
    assert_ne!(s.leases(1), ip);
}

#[test]
fn rfc_8415_18_3_6_an_information_request_gets_options_and_no_address() {
    let mut s = Server::new(8);
    let info = s.says(INFORMATION, &[]);
    assert_eq!((info.kind, info.codes), (7, vec![2, 23, 24]));
}

#[test]
fn rfc_8415_16_messages_for_other_servers_or_without_a_client_get_no_answer() {
    let mut s = Server::new(8);
    let other = option(2, &[0, 3, 0, 1, 9, 9, 9, 9, 9, 9]);
    assert!(s.on(0, REQUEST, &[client(1), other, ia(1, &[])]).is_err());
    assert!(s.on(0, REQUEST, &[client(1), ia(1, &[])]).is_err());
    assert!(s.on(0, SOLICIT, &[client(1), server(), ia(1, &[])]).is_err());
    assert!(s.on(0, SOLICIT, &[ia(1, &[])]).is_err());
    let bytes = [&[REQUEST, 7, 8, 9][..], &client(1), &server(), &ia(1, &[])].concat();
    let told = s.0.handle(s.1, PortId(0), MAC, false, &bytes).unwrap().unwrap();
    assert_eq!(read(&told.bytes).status, Some(5));
}

#[test]
fn a_lease_ends_with_its_lifetime_and_an_offer_after_a_minute() {
    let mut s = Server::new(1);
    s.says(SOLICIT, &[client(1), ia(1, &[])]);
    assert_eq!(s.says(SOLICIT, &[client(2), ia(1, &[])]).status, Some(2));
    s.1 = Instant::from_millis(60_000);
    s.leases(2);
    s.1 += VALID;
    assert!(s.0.reports(s.1).is_empty());
    s.leases(1);
}

#[test]
fn at_the_limit_of_a_link_its_clients_are_told_and_those_of_others_are_not_touched() {
    let mut s = Server::new(2);
    for n in 1..=2 {
        s.leases(n);
    }
    let none = s.says(SOLICIT, &[client(3), ia(1, &[])]);
    assert_eq!((none.status, none.addresses), (Some(2), vec![]));
    assert_eq!(s.on(1, SOLICIT, &[client(4), ia(1, &[])]).unwrap().addresses.len(), 1);
    // Many IAs in one message are many leases.
    let many: Vec<_> = std::iter::once(client(5)).chain((0..20).map(|n| ia(n, &[]))).collect();
    s.on(1, SOLICIT, &many).unwrap();
    assert!(s.0.leases.values().filter(|l| l.port == Some(PortId(1))).count() <= 2);
}

#[test]
fn at_the_limit_of_all_a_new_client_is_told_and_who_has_a_lease_keeps_it() {
    let mut s = Server::new(LEASES);
    let all = u32::try_from(LEASES).unwrap();
    for n in 0..all {
        let answer = s.says(SOLICIT, &[client(1), ia(n, &[])]);
        assert_eq!(answer.addresses.len(), 1, "the {n}th");
    }
    assert_eq!(s.says(SOLICIT, &[client(2), ia(1, &[])]).status, Some(2));
    assert_eq!(s.on(1, SOLICIT, &[client(3), ia(1, &[])]).unwrap().status, Some(2));
    let kept = s.says(SOLICIT, &[client(1), ia(all - 1, &[])]);
    assert_eq!((kept.addresses.len(), s.0.leases.len()), (1, LEASES));
    s.1 += VALID;
    assert_eq!(s.says(SOLICIT, &[client(2), ia(1, &[])]).addresses.len(), 1, "when others have ended");
}

#[test]
fn a_lease_belongs_to_its_link_until_that_goes_down() {
    let mut s = Server::new(8);
    let ip = s.leases(1);
    assert!(s.0.is_elsewhere(s.1, ip, PortId(1)) && !s.0.is_elsewhere(s.1, ip, PortId(0)));
    assert_eq!(s.on(1, SOLICIT, &[client(1), ia(1, &[])]).unwrap().status, Some(2));
    s.0.port_down(PortId(0));
    assert!(!s.0.is_elsewhere(s.1, ip, PortId(1)));
    assert_eq!(s.on(1, SOLICIT, &[client(1), ia(1, &[])]).unwrap().addresses[0].0, ip);
}

#[test]
fn rfc_4704_4_the_name_a_client_sends_is_the_leases() {
    let mut s = Server::new(8);
    s.says(SOLICIT, &[client(1), ia(1, &[]), option(14, &[]), option(39, b"\0\x03Web\x03lan\0")]);
    assert_eq!(s.0.reports(s.1)[0].name.as_deref(), Some("web"));
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_refused(kind in 0u8..15, rest in prop::collection::vec(any::<u8>(), 0..150)) {
        let mut s = Server::new(4);
        let _ = s.0.handle(s.1, PortId(0), MAC, true, &[&[kind, 7, 8, 9][..], &rest].concat());
        let _ = s.0.handle(s.1, PortId(0), MAC, true, &rest);
        prop_assert!(s.0.leases.len() <= 4);
    }
}
