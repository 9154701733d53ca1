use dhcproto::v4::{Flags, Message};
use dhcproto::{Encodable, Encoder};

use super::*;

const A: Mac = Mac([2, 0, 0, 0, 0, 0xa]);
const B: Mac = Mac([2, 0, 0, 0, 0, 0xb]);
const LINK: PortId = PortId(0);

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 127, last)
}

/// Leases of one link.
const PER_PORT: usize = 64;

fn server_of(prefix: u8, fixed: &[StaticLease]) -> DhcpServer {
    let subnet = Subnet::new(ip(0).into(), prefix).unwrap();
    let settings = Settings {
        gateway: ip(1),
        dns: Some(ip(1)),
        pool: None,
        host_alias: ip(254),
        mask: Ipv4Addr::from(u32::MAX << (32 - u32::from(prefix))),
        broadcast: match subnet.broadcast().unwrap() {
            IpAddr::V4(b) => b,
            IpAddr::V6(_) => unreachable!(),
        },
        domain: "portway.internal".into(),
        search: vec![],
        lease_time: Duration::from_secs(3600),
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

struct Lab(DhcpServer, Instant);

impl Lab {
    fn new(fixed: &[StaticLease]) -> Self {
        Self(server_of(24, fixed), Instant::ZERO)
    }
    fn says(&mut self, m: &Message) -> Result<Option<Message>, DropReason> {
        self.says_on(LINK, m)
    }
    fn says_on(&mut self, port: PortId, m: &Message) -> Result<Option<Message>, DropReason> {
        let reply = self.0.handle(self.1, port, 1500, &bytes(m), None)?;
        Ok(reply.map(|r| {
            assert!(r.bytes.len() >= 300);
            Message::decode(&mut Decoder::new(&r.bytes)).unwrap()
        }))
    }
    fn leases(&mut self, mac: Mac) -> Ipv4Addr {
        let offer = self.says(&message(MessageType::Discover, mac, &[])).unwrap().unwrap();
        let request = [DhcpOption::RequestedIpAddress(offer.yiaddr()), DhcpOption::ServerIdentifier(ip(1))];
        let ack = self.says(&message(MessageType::Request, mac, &request)).unwrap().unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
        assert_eq!(ack.yiaddr(), offer.yiaddr());
        ack.yiaddr()
    }
}

fn kind(answer: &Option<Message>) -> Option<MessageType> {
    answer.as_ref().and_then(|m| m.opts().msg_type())
}

#[test]
fn the_first_guest_gets_2_the_next_3_and_each_its_own_again() {
    let mut lab = Lab::new(&[]);
    assert_eq!(lab.leases(A), ip(2));
    assert_eq!(lab.leases(B), ip(3));
    lab.1 += Duration::from_secs(4000);
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
    lab.1 += Duration::from_secs(3000);
    let mut renew = message(MessageType::Request, A, &[]);
    renew.set_ciaddr(ip(2));
    assert_eq!(kind(&lab.says(&renew).unwrap()), Some(MessageType::Ack));
    assert_eq!(lab.0.reports(lab.1)[0].remaining, Some(Duration::from_secs(3600)));
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
    let mut release = message(MessageType::Release, A, &[]);
    release.set_ciaddr(ip(3));
    lab.says(&release).unwrap();
    assert!(lab.0.reports(lab.1).is_empty());
    assert_eq!(lab.leases(B), ip(4));
    assert_eq!(lab.leases(A), ip(3));
}

#[test]
fn a_full_pool_answers_nobody_until_a_lease_ends() {
    let mut lab = Lab(server_of(29, &[]), Instant::ZERO);
    for n in 0..5 {
        assert_eq!(lab.leases(Mac([2, 0, 0, 0, 1, n])), ip(2 + n));
    }
    assert_eq!(lab.says(&message(MessageType::Discover, A, &[])).map(|_| ()), Err(DropReason::DhcpExhausted));
    lab.1 += Duration::from_secs(3601);
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
    let mut lab = Lab::new(&[]);
    for n in 0..PER_PORT {
        lab.leases(many(n));
    }
    let discover = message(MessageType::Discover, A, &[]);
    assert_eq!(refused(lab.says(&discover)), Some(DropReason::DhcpLimit));
    // Neither without an offer, after a reboot.
    let reboot = message(MessageType::Request, A, &[DhcpOption::RequestedIpAddress(ip(200))]);
    assert_eq!(refused(lab.says(&reboot)), Some(DropReason::DhcpLimit));
    // Who has a lease keeps it.
    assert_eq!(lab.leases(many(7)), ip(9));
    let other = lab.says_on(PortId(1), &discover).unwrap();
    assert_eq!(kind(&other), Some(MessageType::Offer));
    // A lease that is given back is another's to have.
    let mut release = message(MessageType::Release, many(7), &[]);
    release.set_ciaddr(ip(9));
    lab.says(&release).unwrap();
    assert_eq!(kind(&lab.says(&message(MessageType::Discover, B, &[])).unwrap()), Some(MessageType::Offer));
}

#[test]
fn offers_nobody_takes_and_addresses_declined_count_as_leases_of_their_link() {
    let mut lab = Lab::new(&[]);
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
    lab.1 += OFFER;
    assert_eq!(kind(&lab.says(&discover).unwrap()), Some(MessageType::Offer));
}

#[test]
fn a_static_lease_is_had_by_a_link_without_any_left() {
    let mut lab = Lab::new(&[StaticLease { mac: A, ip: ip(200), name: None }]);
    for n in 0..PER_PORT {
        lab.leases(many(n));
    }
    assert_eq!(lab.leases(A), ip(200));
}

#[test]
fn a_static_lease_is_its_owners_and_nobody_elses() {
    let mut lab = Lab::new(&[StaticLease { mac: B, ip: ip(2), name: Some("db".into()) }]);
    assert_eq!(lab.leases(A), ip(3));
    assert_eq!(lab.leases(B), ip(2));
    assert_eq!(lab.0.reports(lab.1)[0].name.as_deref(), Some("db"));
}

#[test]
fn a_lease_cannot_be_taken_from_another_link_while_that_is_up() {
    let mut lab = Lab::new(&[]);
    lab.leases(A);
    let offer = lab.says_on(PortId(1), &message(MessageType::Discover, A, &[])).unwrap().unwrap();
    assert_ne!(offer.yiaddr(), ip(2));
    assert!(lab.0.is_elsewhere(lab.1, ip(2), PortId(1)));
    lab.0.port_down(LINK);
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
    let reply = lab.0.handle(lab.1, LINK, 65520, &bytes(&discover), None).unwrap().unwrap();
    let (mut codes, mut at) = (Vec::new(), &reply.bytes[240..]);
    while let [code, len, rest @ ..] = at
        && *code != 255
    {
        codes.push(*code);
        at = &rest[usize::from(*len)..];
    }
    assert_eq!(codes, [53, 54, 51, 58, 59, 1, 121, 6, 3, 15, 26]);
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
    let unicast = lab.0.handle(lab.1, LINK, 1500, &bytes(&discover), None).unwrap().unwrap();
    assert_eq!((unicast.dst_mac, unicast.dst), (A, ip(2)));
    discover.set_flags(Flags::default().set_broadcast());
    let broadcast = lab.0.handle(lab.1, LINK, 1500, &bytes(&discover), None).unwrap().unwrap();
    assert_eq!((broadcast.dst_mac, broadcast.dst), (Mac::BROADCAST, Ipv4Addr::BROADCAST));
}

#[test]
fn truncations_and_flipped_bytes_never_panic() {
    let mut lab = Lab::new(&[]);
    let good = bytes(&message(MessageType::Discover, A, &[DhcpOption::Hostname("x".into())]));
    for n in 0..good.len() {
        let _ = lab.0.handle(lab.1, LINK, 1500, &good[..n], None);
        let mut bad = good.clone();
        bad[n] = 0xff;
        let _ = lab.0.handle(lab.1, LINK, 1500, &bad, None);
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
            let offer = lab.0.handle(lab.1, LINK, 1500, &odd, None).unwrap().unwrap();
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
            let _ = lab.0.handle(lab.1, LINK, 1500, &odd, None);
        }
    }
    lab.leases(B);
}

#[test]
fn a_hostname_becomes_one_label_or_nothing() {
    assert_eq!(host_label("Web_1.example.com").as_deref(), Some("web1"));
    assert_eq!(host_label("--..--"), None);
}

#[test]
fn a_lease_kept_over_a_restart_is_its_guests_though_that_sends_an_identifier() {
    let mut lab = Lab::new(&[]);
    lab.leases(B);
    assert_eq!(lab.leases(A), ip(3));
    let kept = lab.0.reports(lab.1);
    let mut again = Lab::new(&[]);
    again.0.restore(again.1, kept);
    let id = [DhcpOption::ClientIdentifier([&[1][..], &A.0].concat())];
    let offer = again.says(&message(MessageType::Discover, A, &id)).unwrap().unwrap();
    assert_eq!(offer.yiaddr(), ip(3));
}
