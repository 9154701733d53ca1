//! Names of ours: zones, pointers, guests, the operator's records, localhost.

use super::*;

#[tokio::test]
async fn gateway_and_host_have_addresses_under_the_domain_and_every_alias() {
    let dns = Dns::new(config()).unwrap();
    for domain in ["portway.internal", "docker.internal"] {
        let answer = lookup(&dns, &format!("gateway.{domain}."), RecordType::A).await;
        assert_eq!(data(&answer), ["192.168.127.1"]);
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
        assert_eq!(answer.answers[0].ttl, zones::TTL);
        let answer = lookup(&dns, &format!("gateway.{domain}."), RecordType::AAAA).await;
        assert_eq!(data(&answer), ["fd00::1"]);
        let answer = lookup(&dns, &format!("host.{domain}."), RecordType::A).await;
        assert_eq!(data(&answer), ["192.168.127.254"]);
    }
}

#[tokio::test]
async fn case_does_not_matter_and_the_question_comes_back_as_it_was_spelt() {
    let dns = Dns::new(config()).unwrap();
    let asked = query("GateWay.PORTWAY.internal.", RecordType::A);
    let raw = dns.answer_datagram(&asked.to_vec().unwrap()).await.unwrap();
    assert!(raw.windows(8).any(|w| w == b"\x07GateWay"), "0x20 spelling is kept");
    assert_eq!(data(&Message::from_vec(&raw).unwrap()), ["192.168.127.1"]);
}

#[tokio::test]
async fn a_missing_type_is_nodata_and_a_missing_name_is_nxdomain_both_with_the_soa() {
    let dns = Dns::new(config()).unwrap();
    for (text, kind, expected) in [
        ("host.portway.internal.", RecordType::AAAA, ResponseCode::NoError),
        ("host.portway.internal.", RecordType::TXT, ResponseCode::NoError),
        ("portway.internal.", RecordType::A, ResponseCode::NoError),
        ("down.portway.internal.", RecordType::A, ResponseCode::NoError), // empty, but not without names below
        ("nobody.portway.internal.", RecordType::A, ResponseCode::NXDomain),
        ("x.host.portway.internal.", RecordType::A, ResponseCode::NXDomain),
    ] {
        let answer = lookup(&dns, text, kind).await;
        assert_eq!(code(&answer), expected, "{text} {kind}");
        assert!(answer.answers.is_empty());
        assert!(answer.metadata.authoritative);
        assert_eq!(answer.authorities.len(), 1, "{text} {kind}");
        assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
        assert_eq!(answer.authorities[0].ttl, zones::NEGATIVE_TTL);
    }
    assert_eq!(data(&lookup(&dns, "deep.down.portway.internal.", RecordType::A).await), ["192.0.2.8"]);
    let soa = lookup(&dns, "portway.internal.", RecordType::SOA).await;
    assert_eq!(soa.answers.len(), 1);
}

#[tokio::test]
async fn our_addresses_have_pointers_and_their_neighbours_go_to_the_resolvers() {
    let dns = Dns::new(config()).unwrap();
    let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.";
    for (text, target) in [
        ("1.127.168.192.in-addr.arpa.", "gateway.portway.internal."),
        ("254.127.168.192.in-addr.arpa.", "host.portway.internal."),
        (v6, "gateway.portway.internal."),
        ("7.2.0.192.in-addr.arpa.", "db.example."),
        ("1.0.0.127.in-addr.arpa.", "localhost."),
    ] {
        let answer = lookup(&dns, text, RecordType::PTR).await;
        assert_eq!(
            data(&answer).iter().map(|d| format!("{}.", d.trim_end_matches('.'))).collect::<Vec<_>>(),
            [target]
        );
    }
    let answer = lookup(&dns, "77.127.168.192.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(code(&answer), ResponseCode::ServFail, "no resolver is configured");
}

#[tokio::test]
async fn a_guest_has_its_name_while_it_is_there() {
    let dns = Dns::new(config()).unwrap();
    assert_eq!(code(&lookup(&dns, "vm1.portway.internal.", RecordType::A).await), ResponseCode::NXDomain);
    dns.set_guest("VM1", &[ip("192.168.127.2")]).unwrap();
    assert_eq!(data(&lookup(&dns, "vm1.docker.internal.", RecordType::A).await), ["192.168.127.2"]);
    let pointer = lookup(&dns, "2.127.168.192.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(data(&pointer).len(), 1);
    dns.set_guest("vm1", &[ip("192.168.127.3")]).unwrap();
    assert_eq!(data(&lookup(&dns, "vm1.portway.internal.", RecordType::A).await), ["192.168.127.3"]);
    dns.remove_guest("vm1");
    assert_eq!(code(&lookup(&dns, "vm1.portway.internal.", RecordType::A).await), ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_guest_cannot_take_a_name_of_ours_nor_more_names_than_there_are() {
    let dns = Dns::new(config()).unwrap();
    let address = [ip("192.168.127.2")];
    assert_eq!(dns.set_guest("Gateway", &address), Err(DnsError::Reserved("Gateway".into())));
    for bad in ["", "a.b", "a b", "*", "ä", &"x".repeat(64)] {
        assert_eq!(dns.set_guest(bad, &address), Err(DnsError::BadGuestName(bad.into())));
    }
    lock(&dns.book).guests = (0..GUESTS_MAX).map(|n| (format!("vm{n}"), address.to_vec())).collect();
    assert_eq!(dns.set_guest("late", &address), Err(DnsError::TooManyGuests("late".into())));
    dns.set_guest("vm7", &address).unwrap();
}

#[tokio::test]
async fn an_operators_record_wins_over_a_name_of_ours() {
    let records = vec![("host.docker.internal".to_owned(), ip("10.0.0.9"))];
    let dns = Dns::new(DnsConfig { records, ..config() }).unwrap();
    assert_eq!(data(&lookup(&dns, "host.docker.internal.", RecordType::A).await), ["10.0.0.9"]);
    assert_eq!(data(&lookup(&dns, "host.portway.internal.", RecordType::A).await), ["192.168.127.254"]);
}

#[tokio::test]
async fn localhost_is_the_guest_itself() {
    let dns = Dns::new(config()).unwrap();
    assert_eq!(data(&lookup(&dns, "localhost.", RecordType::A).await), ["127.0.0.1"]);
    assert_eq!(data(&lookup(&dns, "a.LocalHost.", RecordType::AAAA).await), ["::1"]);
}

#[test]
fn a_bad_name_in_the_settings_says_which() {
    let records = vec![("a..b".to_owned(), ip("192.0.2.1"))];
    let error = Dns::new(DnsConfig { records, ..config() }).unwrap_err().to_string();
    assert!(error.contains("--dns-host") && error.contains("a..b") && error.contains("db.example"));
}
