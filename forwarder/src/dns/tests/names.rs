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
    let raw = dns.answer_datagram(GUEST, &asked.to_vec().unwrap()).await.unwrap();
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
async fn a_name_of_ours_that_resolvers_do_not_know_has_no_other_types_but_exists() {
    let nowhere = Resolver::start(|asked| bytes(&reply_to(&asked, ResponseCode::NXDomain))).await;
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("hosts");
    std::fs::write(&hosts, "192.0.2.9 store.example\n").unwrap();
    let upstreams = asked(&[nowhere.address]);
    let dns = Dns::new(DnsConfig { upstreams, hosts: Some(hosts), ..config() }).unwrap();
    for name in ["db.example.", "store.example."] {
        assert_eq!(data(&lookup(&dns, name, RecordType::A).await).len(), 1);
        for kind in [RecordType::MX, RecordType::TXT, RecordType::CAA] {
            let answer = lookup(&dns, name, kind).await;
            assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, 0), "{name} {kind}");
        }
    }
    assert_eq!(code(&lookup(&dns, "other.example.", RecordType::MX).await), ResponseCode::NXDomain);
}

#[tokio::test]
async fn our_addresses_have_pointers_and_their_neighbours_are_nowhere() {
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
    assert_eq!((code(&answer), answer.authorities.len()), (ResponseCode::NXDomain, 1), "RFC 6303");
    let elsewhere = lookup(&dns, "1.126.168.192.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(code(&elsewhere), ResponseCode::ServFail, "a matter of resolvers, and none is there");
}

#[tokio::test]
async fn a_guest_has_its_name_while_it_is_there() {
    let dns = Dns::new(config()).unwrap();
    assert_eq!(code(&lookup(&dns, "vm1.portway.internal.", RecordType::A).await), ResponseCode::NXDomain);
    dns.set_guests(&[("VM1".into(), ip("192.168.127.2"))]);
    assert_eq!(data(&lookup(&dns, "vm1.docker.internal.", RecordType::A).await), ["192.168.127.2"]);
    let pointer = lookup(&dns, "2.127.168.192.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(data(&pointer).len(), 1);
    dns.set_guests(&[("vm1".into(), ip("192.168.127.3")), ("vm2".into(), ip("192.168.127.4"))]);
    assert_eq!(data(&lookup(&dns, "vm1.portway.internal.", RecordType::A).await), ["192.168.127.3"]);
    dns.set_guests(&[("vm2".into(), ip("192.168.127.4"))]);
    assert_eq!(code(&lookup(&dns, "vm1.portway.internal.", RecordType::A).await), ResponseCode::NXDomain);
    let pointer = lookup(&dns, "3.127.168.192.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(code(&pointer), ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_guest_cannot_take_a_name_of_ours_nor_more_names_than_there_are() {
    let dns = Dns::new(config()).unwrap();
    let address = ip("192.168.127.2");
    let guests = || dns.known().into_iter().filter(|k| k.origin == Origin::Guest).count();
    for bad in ["Gateway", "host", "", "a.b", "a b", "*", "ä", &"x".repeat(64)] {
        dns.set_guests(&[(bad.into(), address)]);
        assert_eq!(guests(), 0, "{bad}");
    }
    assert_eq!(data(&lookup(&dns, "gateway.portway.internal.", RecordType::A).await), ["192.168.127.1"]);
    let many: Vec<_> = (0..=GUESTS_MAX).map(|n| (format!("vm{n}"), address)).collect();
    dns.set_guests(&many);
    assert_eq!(guests(), GUESTS_MAX);
}

#[tokio::test]
async fn records_come_and_go_while_the_network_runs() {
    let dns = Dns::new(config()).unwrap();
    let live = |text: &str, address: &str| (text.to_owned(), ip(address));
    dns.add_records(&[
        live("New.example", "192.0.2.9"),
        live("new.example", "2001:db8::9"),
        live("*.apps.example", "192.0.2.10"),
        live("own.apps.example", "192.0.2.11"),
        live("*.dev.portway.internal", "192.0.2.12"),
        live("web.portway.internal", "192.0.2.13"),
    ])
    .unwrap();
    for (text, kind, address) in [
        ("NEW.example.", RecordType::A, "192.0.2.9"),
        ("new.example.", RecordType::AAAA, "2001:db8::9"),
        ("a.b.apps.example.", RecordType::A, "192.0.2.10"),
        ("own.apps.example.", RecordType::A, "192.0.2.11"),
        ("x.dev.portway.internal.", RecordType::A, "192.0.2.12"),
        ("web.portway.internal.", RecordType::A, "192.0.2.13"),
    ] {
        assert_eq!(data(&lookup(&dns, text, kind).await), [address], "{text}");
    }
    let nodata = lookup(&dns, "x.apps.example.", RecordType::AAAA).await;
    assert_eq!((code(&nodata), nodata.authorities.len()), (ResponseCode::NoError, 1), "NODATA with its SOA");
    assert_eq!(
        code(&lookup(&dns, "apps.example.", RecordType::A).await),
        ResponseCode::ServFail,
        "not below it"
    );

    let rm = |text: &str, address: Option<&str>| dns.remove_records(&[(text.to_owned(), address.map(ip))]);
    rm("new.EXAMPLE", Some("192.0.2.9")).unwrap();
    assert!(data(&lookup(&dns, "new.example.", RecordType::A).await).is_empty());
    assert_eq!(data(&lookup(&dns, "new.example.", RecordType::AAAA).await), ["2001:db8::9"]);
    rm("*.apps.example", None).unwrap();
    assert_eq!(code(&lookup(&dns, "a.apps.example.", RecordType::A).await), ResponseCode::ServFail);
    rm("db.example", None).unwrap();
    assert_eq!(
        code(&lookup(&dns, "db.example.", RecordType::A).await),
        ResponseCode::ServFail,
        "a configured one"
    );
    let gone = rm("db.example", None).unwrap_err();
    assert_eq!(gone, DnsError::NoRecord("db.example".into()));
}

#[tokio::test]
async fn records_have_their_number_and_a_bad_one_changes_nothing() {
    let dns = Dns::new(config()).unwrap();
    let before = dns.known();
    let good = ("good.example".to_owned(), ip("192.0.2.1"));
    for bad in ["a..b", "*", ""] {
        assert!(dns.add_records(&[good.clone(), (bad.to_owned(), ip("192.0.2.1"))]).is_err(), "{bad}");
    }
    assert_eq!(dns.known(), before);
    let many: Vec<_> = (0..RECORDS_MAX).map(|n| (format!("n{n}.example"), ip("192.0.2.1"))).collect();
    let error = dns.add_records(&many).unwrap_err();
    assert!(matches!(error, DnsError::TooManyRecords(_)));
    dns.add_records(&many[..RECORDS_MAX - config().records.len()]).unwrap();
    dns.add_records(&many[..1]).unwrap(); // there already
    assert!(dns.add_records(&[good]).is_err());
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
