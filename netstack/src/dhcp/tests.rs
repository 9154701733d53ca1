//! The server as its clients see it. `dhcproto` writes their messages and reads ours, as a second opinion.

use std::net::IpAddr;

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};

use super::leases::LEASES;
use super::*;

const A: Mac = Mac([2, 0, 0, 0, 0, 0xa]);
const B: Mac = Mac([2, 0, 0, 0, 0, 0xb]);
const LINK: PortId = PortId(0);
const LEASE: Duration = Duration::from_secs(3600);

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 127, last)
}

/// Leases of one link.
const PER_PORT: usize = 64;

fn server_of(prefix: u8, fixed: &[StaticLease]) -> DhcpServer {
    let subnet = Subnet::new(ip(0).into(), prefix).unwrap();
    let IpAddr::V4(broadcast) = subnet.broadcast().unwrap() else { unreachable!() };
    let settings = Settings {
        gateway: ip(1),
        dns: Some(ip(1)),
        pool: None,
        host_alias: if prefix <= 24 { ip(254) } else { Ipv4Addr::from(u32::from(broadcast) - 1) },
        mask: Ipv4Addr::from(u32::MAX << (32 - u32::from(prefix))),
        broadcast,
        domain: "portway.internal".into(),
        search: vec![],
        ntp: vec![],
        lease_time: LEASE,
    };
    DhcpServer::new(settings, subnet, PER_PORT, fixed)
}

fn message(kind: MessageType, mac: Mac, options: &[DhcpOption]) -> Message {
    let mut m = Message::new_with_id(7, ip(0), ip(0), ip(0), ip(0), &mac.0);
    m.clear_addrs();
    m.opts_mut().insert(DhcpOption::MessageType(kind));
    for o in options {
        m.opts_mut().insert(o.clone());
    }
    m
}

fn bytes(m: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    m.encode(&mut Encoder::new(&mut out)).unwrap();
    out
}

/// The bytes of a DISCOVER of `mac` with `options` as they are.
fn discover_with(mac: Mac, options: &[u8]) -> Vec<u8> {
    let mut raw = bytes(&message(MessageType::Discover, mac, &[]));
    raw.truncate(240);
    raw.extend([53, 1, 1]);
    raw.extend(options);
    raw.push(255);
    raw
}

/// A server, the time, and the link's name and MTU.
struct Lab {
    server: DhcpServer,
    now: Instant,
    mtu: u16,
    link_name: Option<&'static str>,
}

impl Lab {
    fn new(fixed: &[StaticLease]) -> Self {
        Self::of(24, fixed)
    }
    fn of(prefix: u8, fixed: &[StaticLease]) -> Self {
        Self { server: server_of(prefix, fixed), now: Instant::ZERO, mtu: 1500, link_name: None }
    }
    fn raw_on(&mut self, port: PortId, bytes: &[u8]) -> Result<Option<Reply>, DropReason> {
        let from = Mac([2, 0xee, 0, 0, 0, 1]);
        let arrival = Arrival { port, from, mtu: self.mtu, bytes, wish: None, link_name: self.link_name };
        self.server.handle(self.now, &arrival)
    }
    fn raw(&mut self, bytes: &[u8]) -> Result<Option<Reply>, DropReason> {
        self.raw_on(LINK, bytes)
    }
    fn says(&mut self, m: &Message) -> Result<Option<Message>, DropReason> {
        self.says_on(LINK, m)
    }
    fn says_on(&mut self, port: PortId, m: &Message) -> Result<Option<Message>, DropReason> {
        let reply = self.raw_on(port, &bytes(m))?;
        Ok(reply.map(|r| {
            assert!(r.bytes.len() >= 300);
            Message::decode(&mut Decoder::new(&r.bytes)).unwrap()
        }))
    }
    fn leases(&mut self, mac: Mac) -> Ipv4Addr {
        self.leases_with(mac, &[])
    }
    fn leases_with(&mut self, mac: Mac, options: &[DhcpOption]) -> Ipv4Addr {
        let offer = self.says(&message(MessageType::Discover, mac, options)).unwrap().unwrap();
        let mut request = options.to_vec();
        request.extend([DhcpOption::RequestedIpAddress(offer.yiaddr()), DhcpOption::ServerIdentifier(ip(1))]);
        let ack = self.says(&message(MessageType::Request, mac, &request)).unwrap().unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
        assert_eq!(ack.yiaddr(), offer.yiaddr());
        ack.yiaddr()
    }
    fn releases(&mut self, mac: Mac, address: Ipv4Addr) {
        let mut release = message(MessageType::Release, mac, &[]);
        release.set_ciaddr(address);
        self.says(&release).unwrap();
    }
    fn reports(&self) -> Vec<LeaseReport> {
        self.server.reports(self.now)
    }
}

/// The options of an answer in the order they lie in.
fn codes(reply: &[u8]) -> Vec<u8> {
    let (mut codes, mut at) = (Vec::new(), &reply[240..]);
    while let [code, len, rest @ ..] = at
        && *code != 255
    {
        codes.push(*code);
        at = &rest[usize::from(*len)..];
    }
    codes
}

fn kind(answer: &Option<Message>) -> Option<MessageType> {
    answer.as_ref().and_then(|m| m.opts().msg_type())
}

#[test]
fn the_first_guest_gets_2_the_next_3_and_each_its_own_again() {
    let mut lab = Lab::new(&[]);
    assert_eq!(lab.leases(A), ip(2));
    assert_eq!(lab.leases(B), ip(3));
    lab.now += Duration::from_secs(4000);
    assert_eq!(lab.leases(B), ip(3));
    assert_eq!(lab.leases(A), ip(2));
}

#[test]
fn rfc_2131_4_3_2_init_reboot_with_a_wrong_address_is_naked() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    let wrong = [DhcpOption::RequestedIpAddress(Ipv4Addr::new(10, 0, 2, 15))];
    assert_eq!(kind(&lab.says(&message(MessageType::Request, B, &wrong)).unwrap()), Some(MessageType::Nak));
    let others = [DhcpOption::RequestedIpAddress(ip(2))];
    assert_eq!(kind(&lab.says(&message(MessageType::Request, B, &others)).unwrap()), Some(MessageType::Nak));
    for never in [0, 1, 254, 255] {
        let request = [DhcpOption::RequestedIpAddress(ip(never))];
        assert_eq!(
            kind(&lab.says(&message(MessageType::Request, B, &request)).unwrap()),
            Some(MessageType::Nak)
        );
    }
}

#[test]
fn rfc_2131_4_3_2_renewing_extends_the_lease() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    lab.now += Duration::from_secs(3000);
    let mut renew = message(MessageType::Request, A, &[]);
    renew.set_ciaddr(ip(2));
    assert_eq!(kind(&lab.says(&renew).unwrap()), Some(MessageType::Ack));
    assert_eq!(lab.reports()[0].remaining, Some(Duration::from_secs(3600)));
}

#[test]
fn rfc_2131_3_1_4_another_servers_offer_frees_ours() {
    let mut lab = Lab::new(&[]);
    lab.says(&message(MessageType::Discover, A, &[])).unwrap();
    let other = [DhcpOption::RequestedIpAddress(ip(9)), DhcpOption::ServerIdentifier(ip(200))];
    assert_eq!(lab.says(&message(MessageType::Request, A, &other)).map(|_| ()), Err(DropReason::DhcpIgnored));
    assert_eq!(lab.leases(B), ip(2));
}

#[test]
fn a_declined_address_is_left_alone_and_a_released_one_is_kept_for_its_client() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    lab.says(&message(MessageType::Decline, A, &[DhcpOption::RequestedIpAddress(ip(2))])).unwrap();
    assert_eq!(lab.leases(A), ip(3));
    lab.releases(A, ip(3));
    assert!(lab.reports().is_empty());
    assert_eq!(lab.leases(B), ip(4));
    assert_eq!(lab.leases(A), ip(3));
}

#[test]
fn a_full_pool_answers_nobody_until_a_lease_ends() {
    let mut lab = Lab::of(29, &[]);
    for n in 0..4 {
        assert_eq!(lab.leases(Mac([2, 0, 0, 0, 1, n])), ip(2 + n));
    }
    assert_eq!(lab.says(&message(MessageType::Discover, A, &[])).map(|_| ()), Err(DropReason::DhcpExhausted));
    lab.now += Duration::from_secs(3601);
    assert_eq!(lab.leases(A), ip(2));
}

fn many(n: usize) -> Mac {
    Mac([2, 0, 0, 0, 9, u8::try_from(n).unwrap()])
}

fn refused(answer: Result<Option<Message>, DropReason>) -> Option<DropReason> {
    answer.err()
}

#[test]
fn a_guest_that_asks_under_many_names_leaves_addresses_for_the_others() {
    let mut lab = Lab::of(25, &[]);
    for n in 0..PER_PORT {
        lab.leases(many(n));
    }
    let discover = message(MessageType::Discover, A, &[]);
    assert_eq!(refused(lab.says(&discover)), Some(DropReason::DhcpLimit));
    // Neither without an offer, after a reboot.
    let reboot = message(MessageType::Request, A, &[DhcpOption::RequestedIpAddress(ip(100))]);
    assert_eq!(refused(lab.says(&reboot)), Some(DropReason::DhcpLimit));
    // Who has a lease keeps it.
    assert_eq!(lab.leases(many(7)), ip(9));
    let other = lab.says_on(PortId(1), &discover).unwrap();
    assert_eq!(kind(&other), Some(MessageType::Offer));
    // A lease that is given back is another's to have.
    lab.releases(many(7), ip(9));
    assert_eq!(kind(&lab.says(&message(MessageType::Discover, B, &[])).unwrap()), Some(MessageType::Offer));
}

#[test]
fn offers_nobody_takes_and_addresses_declined_count_as_leases_of_their_link() {
    let mut lab = Lab::of(25, &[]);
    for n in 0..PER_PORT {
        if n % 2 == 0 {
            lab.says(&message(MessageType::Discover, many(n), &[])).unwrap();
        } else {
            let declined = [DhcpOption::RequestedIpAddress(lab.leases(many(n)))];
            lab.says(&message(MessageType::Decline, many(n), &declined)).unwrap();
        }
    }
    let discover = message(MessageType::Discover, A, &[]);
    assert_eq!(refused(lab.says(&discover)), Some(DropReason::DhcpLimit));
    lab.now += OFFER;
    assert_eq!(kind(&lab.says(&discover).unwrap()), Some(MessageType::Offer));
}

#[test]
fn a_static_lease_is_had_by_a_link_without_any_left() {
    let mut lab = Lab::of(25, &[StaticLease { mac: A, ip: ip(100), name: None }]);
    for n in 0..PER_PORT {
        lab.leases(many(n));
    }
    assert_eq!(lab.leases(A), ip(100));
}

#[test]
fn a_static_lease_is_its_owners_and_nobody_elses() {
    let mut lab = Lab::new(&[StaticLease { mac: B, ip: ip(2), name: Some("db".into()) }]);
    assert_eq!(lab.leases(A), ip(3));
    assert_eq!(lab.leases(B), ip(2));
    assert_eq!(lab.reports()[0].name.as_deref(), Some("db"));
}

#[test]
fn a_lease_cannot_be_taken_from_another_link_while_that_is_up() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    let offer = lab.says_on(PortId(1), &message(MessageType::Discover, A, &[])).unwrap().unwrap();
    assert_ne!(offer.yiaddr(), ip(2));
    assert!(lab.server.is_elsewhere(lab.now, ip(2), PortId(1)));
    lab.server.port_down(LINK);
    let request = [DhcpOption::RequestedIpAddress(ip(2))];
    assert_eq!(
        kind(&lab.says_on(PortId(1), &message(MessageType::Request, A, &request)).unwrap()),
        Some(MessageType::Ack)
    );
}

#[test]
fn options_come_in_the_order_they_were_asked_for_and_the_mtu_always() {
    let mut lab = Lab::new(&[]);
    let list = [121u8, 6, 3, 15].map(OptionCode::from).to_vec();
    let discover = message(MessageType::Discover, A, &[DhcpOption::ParameterRequestList(list)]);
    let reply = lab.raw(&bytes(&discover)).unwrap().unwrap();
    assert_eq!(codes(&reply.bytes), [53, 54, 51, 58, 59, 1, 121, 6, 3, 15, 26]);
}

#[test]
fn inform_gets_options_and_no_address() {
    let mut lab = Lab::new(&[]);
    let mut inform = message(MessageType::Inform, A, &[]);
    inform.set_ciaddr(ip(77));
    let ack = lab.says(&inform).unwrap().unwrap();
    assert_eq!((ack.yiaddr(), ack.opts().get(OptionCode::AddressLeaseTime)), (Ipv4Addr::UNSPECIFIED, None));
}

#[test]
fn the_broadcast_flag_decides_how_an_offer_travels() {
    let mut lab = Lab::new(&[]);
    let mut discover = message(MessageType::Discover, A, &[]);
    let unicast = lab.raw(&bytes(&discover)).unwrap().unwrap();
    assert_eq!((unicast.dst_mac, unicast.dst), (A, ip(2)));
    discover.set_flags(Flags::default().set_broadcast());
    let broadcast = lab.raw(&bytes(&discover)).unwrap().unwrap();
    assert_eq!((broadcast.dst_mac, broadcast.dst), (Mac::BROADCAST, Ipv4Addr::BROADCAST));
}

#[test]
fn truncations_and_flipped_bytes_never_panic() {
    let mut lab = Lab::new(&[]);
    let good = bytes(&message(MessageType::Discover, A, &[DhcpOption::Hostname("x".into())]));
    for n in 0..good.len() {
        let _ = lab.raw(&good[..n]);
        let mut bad = good.clone();
        bad[n] = 0xff;
        let _ = lab.raw(&bad);
    }
}

#[test]
fn options_that_are_not_read_may_have_any_length() {
    // dhcproto 0.15 asserts the lengths of 80, 81, 94 and 152 to 155 in builds with debug assertions.
    let mut lab = Lab::new(&[]);
    let good = bytes(&message(MessageType::Discover, A, &[]));
    for code in [80, 81, 94, 152, 153, 154, 155] {
        for len in 0..20_u8 {
            let mut odd = good[..240].to_vec();
            odd.extend([code, len]);
            odd.resize(odd.len() + usize::from(len), 0xff);
            odd.extend(&good[240..]);
            let offer = lab.raw(&odd).unwrap().unwrap();
            assert_eq!(offer.dst, ip(2), "option {code} of {len} bytes");
        }
    }
}

#[test]
fn an_option_of_any_length_hurts_nobody_else() {
    let mut lab = Lab::new(&[]);
    let good = bytes(&message(MessageType::Discover, A, &[]));
    for code in 1..=254 {
        for len in 0..20_u8 {
            let mut odd = good[..240].to_vec();
            odd.extend([code, len]);
            odd.resize(odd.len() + usize::from(len), 3);
            odd.extend(&good[240..]);
            let _ = lab.raw(&odd);
        }
    }
    lab.leases(B);
}

#[test]
fn a_lease_made_without_an_identifier_is_its_guests_though_that_sends_one_after_a_restart() {
    let mut lab = Lab::new(&[]);
    lab.leases(B);
    assert_eq!(lab.leases(A), ip(3));
    let kept = lab.reports();
    let mut again = Lab::new(&[]);
    again.server.restore(again.now, kept);
    let id = [DhcpOption::ClientIdentifier([&[1][..], &A.0].concat())];
    let offer = again.says(&message(MessageType::Discover, A, &id)).unwrap().unwrap();
    assert_eq!(offer.yiaddr(), ip(3));
}

#[test]
fn a_fixed_lease_in_use_is_in_use_again_after_a_restart_under_its_name_of_now() {
    let fixed = |name: &str| [StaticLease { mac: A, ip: ip(9), name: Some(name.into()) }];
    let mut lab = Lab::new(&fixed("db"));
    assert_eq!(lab.leases(A), ip(9));
    lab.now += Duration::from_secs(600);
    let mut again = Lab::new(&fixed("store"));
    again.server.restore(again.now, lab.reports());
    let back = &again.reports()[0];
    assert_eq!((back.ip, back.fixed, back.name.as_deref()), (ip(9), true, Some("store")));
    assert_eq!(back.remaining, Some(LEASE - Duration::from_secs(600)));
    again.server.leases.check();
    assert_eq!(again.leases(A), ip(9));
    // It is somebody else's now: what was kept does not take it from him.
    let mut other = Lab::new(&[StaticLease { mac: B, ip: ip(9), name: None }]);
    other.server.restore(other.now, lab.reports());
    assert_eq!(other.reports()[0].remaining, None);
}

#[test]
fn a_client_identifier_is_who_a_client_is_and_survives_a_restart() {
    let id = |n: u8| [DhcpOption::ClientIdentifier(vec![255, 0, n])];
    let mut lab = Lab::new(&[]);
    // Two clients behind one Ethernet address (RFC 2131 §4.2), and one that changes its Ethernet address.
    assert_eq!(lab.leases_with(A, &id(1)), ip(2));
    assert_eq!(lab.leases_with(A, &id(2)), ip(3));
    assert_eq!(lab.leases_with(B, &id(1)), ip(2));
    let mut again = Lab::new(&[]);
    again.server.restore(again.now, lab.reports());
    assert_eq!(again.leases_with(A, &id(2)), ip(3));
    assert_eq!(again.leases_with(A, &id(3)), ip(4));
    // RFC 2132 §9.14: two bytes at least; less is no identifier.
    assert_eq!(again.leases_with(B, &[DhcpOption::ClientIdentifier(vec![7])]), ip(5));
    assert_eq!(again.leases(B), ip(5));
}

#[test]
fn of_a_boot_loader_and_its_system_the_newer_lease_is_the_guests_address() {
    let mut lab = Lab::new(&[]);
    lab.link_name = Some("vm");
    lab.leases(A);
    lab.now += Duration::from_secs(9);
    lab.leases_with(A, &[DhcpOption::ClientIdentifier(vec![255, 1, 2])]);
    lab.leases_with(A, &[DhcpOption::ClientIdentifier(vec![255, 1, 2])]);
    // The first lease was the boot loader's, and is the system's too: made without an identifier.
    assert_eq!(lab.server.first_on(LINK), Some(ip(2)));
    lab.leases_with(A, &[DhcpOption::ClientIdentifier(vec![0, 9, 9])]);
    assert_eq!(lab.server.first_on(LINK), Some(ip(3)));
    lab.leases(B);
    assert_eq!(lab.server.first_on(LINK), Some(ip(3)), "another machine is not the first guest");
    let names: Vec<_> = lab.reports().into_iter().map(|l| (l.name, l.named)).collect();
    assert_eq!(names, [(Some("vm".into()), true), (Some("vm".into()), true), (None, false)]);
}

#[test]
fn rfc_2131_4_3_2_selecting_naks_an_address_that_was_offered_to_another_since() {
    let mut lab = Lab::new(&[]);
    lab.says(&message(MessageType::Discover, A, &[])).unwrap();
    lab.now += OFFER;
    assert_eq!(lab.leases(B), ip(2));
    let late = [DhcpOption::RequestedIpAddress(ip(2)), DhcpOption::ServerIdentifier(ip(1))];
    let nak = lab.says(&message(MessageType::Request, A, &late)).unwrap();
    assert_eq!(kind(&nak), Some(MessageType::Nak));
    assert!(matches!(nak.unwrap().opts().get(OptionCode::Message), Some(DhcpOption::Message(_))));
}

#[test]
fn rfc_2131_4_3_2_rebinding_with_an_address_of_another_is_naked_to_everybody() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    let mut rebind = message(MessageType::Request, B, &[]);
    rebind.set_ciaddr(ip(2));
    let nak = lab.raw(&bytes(&rebind)).unwrap().unwrap();
    assert_eq!((nak.dst_mac, nak.dst, nak.dst_port), (Mac::BROADCAST, Ipv4Addr::BROADCAST, 68));
    assert_eq!(nak.bytes[12..20], [0; 8], "neither ciaddr nor yiaddr");
    // Table 3: a NAK has no lease time and no parameters.
    assert_eq!(codes(&nak.bytes), [53, 54, 56]);
}

#[test]
fn rfc_2131_4_3_2_renewing_is_answered_to_ciaddr_and_an_ended_lease_may_be_renewed() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    lab.now += LEASE + LEASE;
    assert!(lab.reports().is_empty());
    let mut renew = message(MessageType::Request, A, &[]);
    renew.set_ciaddr(ip(2));
    renew.set_flags(Flags::default().set_broadcast());
    let ack = lab.raw(&bytes(&renew)).unwrap().unwrap();
    assert_eq!((ack.dst_mac, ack.dst, ack.dst_port), (A, ip(2), 68));
    assert_eq!(ack.bytes[12..20], [192, 168, 127, 2, 192, 168, 127, 2], "ciaddr and yiaddr");
    assert_eq!(lab.reports().len(), 1);
}

#[test]
fn init_reboot_of_a_client_there_is_no_record_of_is_granted_by_the_only_server() {
    let mut lab = Lab::new(&[]);
    let request = [DhcpOption::RequestedIpAddress(ip(77))];
    assert_eq!(kind(&lab.says(&message(MessageType::Request, A, &request)).unwrap()), Some(MessageType::Ack));
    assert_eq!(lab.leases(A), ip(77));
}

#[test]
fn rfc_2131_4_3_1_the_lease_is_as_long_as_the_client_asks_within_bounds() {
    let mut lab = Lab::new(&[]);
    for (asked, given) in [(600, 600), (1, 60), (u32::MAX, 3600)] {
        let options = [DhcpOption::AddressLeaseTime(asked)];
        let offer = lab.says(&message(MessageType::Discover, A, &options)).unwrap().unwrap();
        let times: Vec<_> = [51, 58, 59].into_iter().map(|c| offer.opts().get(OptionCode::from(c))).collect();
        let expected = [
            DhcpOption::AddressLeaseTime(given),
            DhcpOption::Renewal(given / 2),
            DhcpOption::Rebinding(given / 8 * 7),
        ];
        let near = |a: Option<&DhcpOption>, b: &DhcpOption| match (a, b) {
            (Some(DhcpOption::Rebinding(a)), DhcpOption::Rebinding(b)) => a.abs_diff(*b) < 8,
            (a, b) => a == Some(b),
        };
        assert!(times.iter().zip(&expected).all(|(a, b)| near(*a, b)), "{times:?}");
    }
    lab.leases_with(A, &[DhcpOption::AddressLeaseTime(600)]);
    assert_eq!(lab.reports()[0].remaining, Some(Duration::from_secs(600)));
}

#[test]
fn rfc_2131_4_3_1_an_offer_takes_nothing_from_a_lease_that_runs() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    let offer = lab.says(&message(MessageType::Discover, A, &[])).unwrap().unwrap();
    assert_eq!(offer.yiaddr(), ip(2));
    lab.now += OFFER;
    assert_eq!(lab.reports().len(), 1);
}

#[test]
fn rfc_2131_4_3_4_release_and_decline_for_another_server_or_of_anothers_address_change_nothing() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    let mut release = message(MessageType::Release, A, &[DhcpOption::ServerIdentifier(ip(9))]);
    release.set_ciaddr(ip(2));
    assert_eq!(refused(lab.says(&release)), Some(DropReason::DhcpIgnored));
    let mut foreign = message(MessageType::Release, B, &[]);
    foreign.set_ciaddr(ip(2));
    assert_eq!(refused(lab.says(&foreign)), Some(DropReason::DhcpIgnored));
    let declined = [DhcpOption::RequestedIpAddress(ip(2))];
    assert_eq!(
        refused(lab.says(&message(MessageType::Decline, B, &declined))),
        Some(DropReason::DhcpIgnored)
    );
    // Nor from another link, under a stolen name.
    let stolen = lab.says_on(PortId(1), &message(MessageType::Decline, A, &declined));
    assert_eq!(refused(stolen), Some(DropReason::DhcpIgnored));
    assert_eq!(lab.reports().len(), 1);
}

#[test]
fn rfc_2131_4_3_3_a_declined_address_comes_back_after_its_quarantine() {
    let mut lab = Lab::of(29, &[]);
    let first = lab.leases(A);
    lab.says(&message(MessageType::Decline, A, &[DhcpOption::RequestedIpAddress(first)])).unwrap();
    for n in 0..3 {
        assert_ne!(lab.leases(many(n)), first);
    }
    assert_eq!(refused(lab.says(&message(MessageType::Discover, A, &[]))), Some(DropReason::DhcpExhausted));
    lab.now += QUARANTINE;
    assert_eq!(lab.leases(A), first);
}

#[test]
fn a_static_address_that_is_declined_is_left_alone_for_a_while_and_its_owner_has_another() {
    let mut lab = Lab::new(&[StaticLease { mac: A, ip: ip(9), name: Some("db".into()) }]);
    assert_eq!(lab.leases(A), ip(9));
    lab.says(&message(MessageType::Decline, A, &[DhcpOption::RequestedIpAddress(ip(9))])).unwrap();
    assert_eq!(lab.leases(A), ip(2));
    lab.now += QUARANTINE + LEASE;
    assert_eq!(lab.leases(A), ip(9));
}

#[test]
fn rfc_4039_rapid_commit_is_a_lease_in_one_exchange() {
    let mut lab = Lab::new(&[]);
    let reply = lab.raw(&discover_with(A, &[80, 0])).unwrap().unwrap();
    assert_eq!(codes(&reply.bytes)[..6], [53, 54, 51, 58, 59, 80]);
    assert_eq!(reply.bytes[242], 5, "an ACK");
    assert_eq!(lab.reports()[0].ip, ip(2));
    // A REQUEST's ACK has none (RFC 4039 §3.2).
    let mut renew = message(MessageType::Request, A, &[]);
    renew.set_ciaddr(ip(2));
    assert!(!codes(&lab.raw(&bytes(&renew)).unwrap().unwrap().bytes).contains(&80));
}

#[test]
fn rfc_2131_4_1_and_rfc_3046_a_relays_message_is_answered_to_the_relay_with_its_option_last() {
    let mut lab = Lab::new(&[]);
    let mut raw = discover_with(A, &[82, 4, 1, 2, 0xab, 0xcd, 12, 1, b'x']);
    raw[24..28].copy_from_slice(&ip(40).octets());
    let offer = lab.raw(&raw).unwrap().unwrap();
    assert_eq!((offer.dst, offer.dst_port, offer.dst_mac), (ip(40), 67, Mac([2, 0xee, 0, 0, 0, 1])));
    assert_eq!(offer.bytes[24..28], ip(40).octets());
    assert_eq!(codes(&offer.bytes).last(), Some(&82));
    let at = offer.bytes.windows(6).position(|w| w == [82, 4, 1, 2, 0xab, 0xcd]);
    assert!(at.is_some());
    // A NAK goes there too, with the broadcast bit for the last hop (§4.3.2).
    let mut wrong = message(MessageType::Request, B, &[DhcpOption::RequestedIpAddress(ip(1))]);
    wrong.set_giaddr(ip(40));
    let nak = lab.raw(&bytes(&wrong)).unwrap().unwrap();
    assert_eq!((nak.dst, nak.dst_port, nak.bytes[10]), (ip(40), 67, 0x80));
    // A relay on a network we have no addresses of.
    raw[24..28].copy_from_slice(&[10, 0, 0, 1]);
    assert_eq!(lab.raw(&raw).err(), Some(DropReason::DhcpIgnored));
}

#[test]
fn rfc_6842_the_clients_identifier_comes_back_in_every_answer() {
    let mut lab = Lab::new(&[]);
    let id = [DhcpOption::ClientIdentifier(vec![255, 1, 2, 3])];
    for mac in [A, B] {
        let mut request = message(MessageType::Request, mac, &id);
        request.opts_mut().insert(DhcpOption::RequestedIpAddress(if mac == A { ip(5) } else { ip(1) }));
        let answer = lab.says(&request).unwrap().unwrap();
        assert_eq!(answer.opts().get(OptionCode::ClientIdentifier), Some(&id[0]));
    }
}

#[test]
fn rfc_4702_a_full_name_is_answered_with_the_one_we_give() {
    let mut lab = Lab::new(&[]);
    let mut option = vec![81, 3 + 3, 0, 0, 0];
    option.extend(b"web");
    let offer = lab.raw(&discover_with(A, &option)).unwrap().unwrap();
    let full = [&[81, 3 + 20, 1 | 2, 255, 255][..], b"web.portway.internal"].concat();
    assert!(offer.bytes.windows(full.len()).any(|w| w == full));
    let wire = [81, 8, 4 | 1, 0, 0, 3, b'w', b'e', b'b', 0];
    let offer = lab.raw(&discover_with(A, &wire)).unwrap().unwrap();
    let full = [&[81, 3 + 22, 4 | 1, 255, 255, 3][..], b"web\x07portway\x08internal\0"].concat();
    assert!(offer.bytes.windows(full.len()).any(|w| w == full));
}

#[test]
fn a_guest_is_told_the_name_it_has_and_keeps_it_when_it_renews_without_one() {
    let mut lab = Lab::new(&[StaticLease { mac: B, ip: ip(9), name: Some("db".into()) }]);
    let name = |answer: Option<Message>| match answer.unwrap().opts().get(OptionCode::Hostname) {
        Some(DhcpOption::Hostname(name)) => Some(name.clone()),
        _ => None,
    };
    let options = [DhcpOption::Hostname("Web.lan".into())];
    assert_eq!(name(lab.says(&message(MessageType::Discover, A, &options)).unwrap()).as_deref(), Some("web"));
    assert_eq!(name(lab.says(&message(MessageType::Discover, B, &options)).unwrap()).as_deref(), Some("db"));
    lab.leases_with(A, &options);
    let mut renew = message(MessageType::Request, A, &[]);
    renew.set_ciaddr(ip(2));
    lab.says(&renew).unwrap();
    assert_eq!(lab.reports()[0].name.as_deref(), Some("web"));
}

#[test]
fn what_does_not_fit_goes_to_file_and_sname_and_a_client_that_takes_more_gets_one_field() {
    let mut lab = Lab::new(&[]);
    let domains: Vec<String> = (0..8).map(|n| format!("x{n}.a-domain.example")).collect();
    lab.server.set_search(domains.clone());
    lab.server.settings.ntp = vec![ip(3); 20];
    let reply = lab.raw(&discover_with(A, &[])).unwrap().unwrap();
    assert!(reply.bytes.len() <= 576 - 28, "{}", reply.bytes.len());
    let main = codes(&reply.bytes);
    assert!(main.contains(&52) && main.last() == Some(&52), "{main:?}");
    // RFC 3396 §5: the fields together, and their parts of one option.
    let (mut search, mut all) = (Vec::new(), Vec::new());
    for field in [240..reply.bytes.len(), 108..236, 44..108] {
        let mut rest = &reply.bytes[field];
        while let [code, len, after @ ..] = rest
            && *code != 255
            && *code != 0
        {
            let (value, after) = after.split_at(usize::from(*len));
            if *code == 119 {
                search.extend_from_slice(value);
            }
            all.push(*code);
            rest = after;
        }
    }
    for domain in domains {
        let first = domain.split('.').next().unwrap().as_bytes();
        assert!(search.windows(2).any(|w| w == first), "{domain}");
    }
    assert!([3, 6, 12, 15, 26, 28, 42, 119, 121].iter().all(|c| *c == 12 || all.contains(c)), "{all:?}");
    let large = lab.raw(&discover_with(A, &[57, 2, 0x05, 0xdc])).unwrap().unwrap();
    assert!(!codes(&large.bytes).contains(&52));
    assert!(codes(&large.bytes).contains(&119) && large.bytes.len() <= 1500 - 28);
}

#[test]
fn an_expired_lease_is_told_and_its_timer_is_known() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    assert!(lab.server.take_changed() && !lab.server.take_changed());
    assert_eq!(lab.server.poll_timeout(), Some(lab.now + LEASE));
    lab.now += LEASE;
    lab.server.handle_timeout(lab.now);
    assert!(lab.server.take_changed());
    assert_eq!((lab.server.poll_timeout(), lab.reports().len()), (None, 0));
    lab.leases(A);
    lab.server.take_changed();
    lab.releases(A, ip(2));
    assert!(lab.server.take_changed(), "a release is a change");
}

#[test]
fn leases_whose_link_is_gone_are_kept_as_long_as_there_are_others_and_the_one_gone_longest_goes_first() {
    let mut lab = Lab::of(29, &[]);
    for n in 0..4 {
        let on = PortId(u16::try_from(n).unwrap());
        let discover = message(MessageType::Discover, many(n), &[]);
        let offer = lab.says_on(on, &discover).unwrap().unwrap().yiaddr();
        let request = message(MessageType::Request, many(n), &[DhcpOption::RequestedIpAddress(offer)]);
        assert_eq!(kind(&lab.says_on(on, &request).unwrap()), Some(MessageType::Ack));
    }
    let discover = message(MessageType::Discover, A, &[]);
    assert_eq!(refused(lab.says_on(PortId(7), &discover)), Some(DropReason::DhcpExhausted));
    lab.server.port_down(PortId(3));
    lab.server.port_down(PortId(1));
    let offer = lab.says_on(PortId(7), &discover).unwrap().unwrap();
    assert_eq!(offer.yiaddr(), ip(5), "the guest of link 3 has been gone longest");
    // The other one is back in time, on a link of another number.
    let back = message(MessageType::Request, many(1), &[DhcpOption::RequestedIpAddress(ip(3))]);
    assert_eq!(kind(&lab.says_on(PortId(9), &back).unwrap()), Some(MessageType::Ack));
    assert_eq!(
        refused(lab.says_on(PortId(7), &message(MessageType::Discover, B, &[]))),
        Some(DropReason::DhcpExhausted)
    );
}

#[test]
fn one_link_may_have_hundreds_of_leases_as_long_as_half_of_the_pool_is_free() {
    let mut lab = Lab::of(20, &[]);
    let mac = |n: usize| Mac([2, 1, 0, 0, u8::try_from(n >> 8).unwrap(), u8::try_from(n & 0xff).unwrap()]);
    let mut seen = std::collections::BTreeSet::new();
    for n in 0..500 {
        assert!(seen.insert(lab.leases(mac(n))), "no address twice");
    }
    assert_eq!(lab.reports().len(), 500);
    for n in 500..2046 {
        lab.leases(mac(n));
    }
    assert_eq!(refused(lab.says(&message(MessageType::Discover, A, &[]))), Some(DropReason::DhcpLimit));
    assert!(lab.says_on(PortId(1), &message(MessageType::Discover, A, &[])).is_ok());
}

#[test]
fn the_table_has_its_places_and_the_lease_that_ended_longest_ago_is_forgotten() {
    let mut lab = Lab::of(16, &[]);
    let mac = |n: usize| Mac([2, 1, 0, 0, u8::try_from(n >> 8).unwrap(), u8::try_from(n & 0xff).unwrap()]);
    for n in 0..LEASES {
        let port = PortId(u16::try_from(n / PER_PORT).unwrap());
        assert!(lab.says_on(port, &message(MessageType::Discover, mac(n), &[])).is_ok(), "{n}");
    }
    assert_eq!(
        refused(lab.says_on(PortId(999), &message(MessageType::Discover, A, &[]))),
        Some(DropReason::DhcpExhausted)
    );
    lab.now += OFFER;
    assert!(lab.says_on(PortId(999), &message(MessageType::Discover, A, &[])).is_ok());
}

proptest::proptest! {
    /// Whatever clients say, the lists beside the table say what the table says.
    #[test]
    fn the_lists_and_the_table_agree(script in proptest::collection::vec((0..6_u8, 0..5_u8, 0..3_u16, 0..8_u8, 0..200_u64), 0..80)) {
        let mut lab = Lab::of(29, &[StaticLease { mac: many(0), ip: ip(4), name: None }]);
        for (what, client, port, last, seconds) in script {
            let kind = [MessageType::Discover, MessageType::Request, MessageType::Decline, MessageType::Release];
            let port = PortId(port);
            match kind.get(usize::from(what)) {
                Some(kind) => {
                    let mut m = message(*kind, many(client.into()), &[DhcpOption::RequestedIpAddress(ip(last))]);
                    if *kind == MessageType::Release {
                        m.set_ciaddr(ip(last));
                    }
                    let _ = lab.says_on(port, &m);
                }
                None if what == 4 => lab.server.port_down(port),
                None => lab.now += Duration::from_secs(seconds * 10),
            }
            lab.server.leases.check();
        }
    }
}
