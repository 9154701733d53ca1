//! What makes a forger's life hard, and what is kept from guests.

use super::*;

#[tokio::test]
async fn the_letters_of_names_go_out_by_chance_and_come_back_as_the_client_wrote_them() {
    let server = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 0))).await;
    let dns = dns_with(&[&server]);
    for _ in 0..6 {
        let answer = lookup(&dns, "a-rather-long-name.example.", RecordType::A).await;
        assert_eq!(answer.queries[0].name().to_ascii(), "a-rather-long-name.example.");
    }
    let seen: HashSet<String> = server.seen.lock().unwrap().iter().map(|s| s.2.clone()).collect();
    assert_eq!(seen.len(), 6, "{seen:?}");
    assert!(seen.iter().all(|s| s.eq_ignore_ascii_case("a-rather-long-name.example.")));
}

/// An answer whose question is in small letters.
fn lowered(q: &Message) -> Message {
    let mut reply = address_reply(q, "198.51.100.1", 0);
    let small = reply.queries[0].name().to_lowercase();
    reply.queries[0].set_name(small);
    reply
}

#[tokio::test]
async fn other_letters_are_asked_about_by_tcp_and_a_server_that_changes_them_there_too_is_known_for_it() {
    let forged = Resolver::start_with(|q, tcp| {
        let (right, wrong) = (address_reply(&q, "198.51.100.1", 0), {
            let mut wrong = lowered(&q);
            wrong.answers[0].data = RData::A(A::new(203, 0, 113, 66));
            wrong
        });
        bytes(if tcp { &right } else { &wrong })
    })
    .await;
    let dns = dns_with(&[&forged]);
    for n in 1..=2 {
        assert_eq!(data(&lookup(&dns, "some-long-name.example.", RecordType::A).await), ["198.51.100.1"]);
        assert_eq!(*forged.tcp.lock().unwrap(), n, "what came by datagram is not believed");
    }

    let changes = Resolver::start(|q| bytes(&lowered(&q))).await;
    let dns = dns_with(&[&changes]);
    for _ in 0..3 {
        assert_eq!(data(&lookup(&dns, "some-long-name.example.", RecordType::A).await), ["198.51.100.1"]);
    }
    assert_eq!(*changes.tcp.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_server_that_does_not_know_edns_is_asked_without() {
    let old = Resolver::start(|q| {
        bytes(&if q.edns.is_some() {
            reply_to(&q, ResponseCode::FormErr)
        } else {
            address_reply(&q, "198.51.100.1", 0)
        })
    })
    .await;
    let dns = dns_with(&[&old]);
    for asked in [2, 3] {
        let answer = ask(&dns, &with_edns(query("www.example.", RecordType::A), 1232)).await;
        assert_eq!((data(&answer), answer.edns.is_some()), (vec!["198.51.100.1".to_owned()], true));
        assert_eq!(old.asked(), asked, "it is remembered");
    }
}

#[tokio::test]
async fn a_clients_own_edns_options_go_on_as_they_are_and_their_answers_are_nobody_elses() {
    use hickory_proto::rr::rdata::opt::{ClientSubnet, EdnsOption};
    let server = Resolver::start(|q| {
        let subnet = q.edns.as_ref().is_some_and(|e| e.options().as_ref().len() == 1);
        bytes(&address_reply(&q, if subnet { "198.51.100.2" } else { "198.51.100.1" }, 60))
    })
    .await;
    let dns = dns_with(&[&server]);
    let mut own = with_edns(query("www.example.", RecordType::A), 1232);
    let subnet = ClientSubnet::new("192.0.2.0".parse().unwrap(), 24, 0);
    own.edns.as_mut().unwrap().options_mut().insert(EdnsOption::Subnet(subnet));
    assert_eq!(data(&ask(&dns, &own).await), ["198.51.100.2"]);
    assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await), ["198.51.100.1"]);
    assert_eq!(dns.stats().cached, 1);
}

#[tokio::test]
async fn rebinding_protection_keeps_inside_addresses_from_guests_but_where_they_belong() {
    let inside = Resolver::start(|q| bytes(&address_reply(&q, "192.168.1.1", 60))).await;
    let outside = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 60))).await;
    let mut upstreams = asked(&[inside.address]);
    let server = Server::from(inside.address);
    upstreams.push(Upstream { domain: Some("corp.example".into()), server });
    let protected = DnsConfig {
        upstreams: upstreams.clone(),
        rebind_protection: true,
        private_domains: vec!["lan.example".into()],
        ..config()
    };
    let dns = Dns::new(protected.clone()).unwrap();
    for _ in 0..2 {
        let answer = lookup(&dns, "evil.example.", RecordType::A).await;
        assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, 0));
        assert_eq!(answer.queries[0].name().to_ascii(), "evil.example.");
    }
    assert_eq!(dns.stats().rebinding, 2, "not kept either");
    for right in ["wiki.corp.example.", "nas.lan.example.", "lan.example."] {
        assert_eq!(data(&lookup(&dns, right, RecordType::A).await), ["192.168.1.1"], "{right}");
    }
    assert_eq!(data(&lookup(&dns, "host.portway.internal.", RecordType::A).await), ["192.168.127.254"]);

    let dns = Dns::new(DnsConfig { upstreams: asked(&[outside.address]), ..protected }).unwrap();
    assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await), ["198.51.100.1"]);
    let dns = Dns::new(DnsConfig { upstreams, ..config() }).unwrap();
    assert_eq!(data(&lookup(&dns, "evil.example.", RecordType::A).await), ["192.168.1.1"], "off by default");
}
