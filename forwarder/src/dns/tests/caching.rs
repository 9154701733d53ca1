//! What is kept, how long, and how much.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_answer_is_kept_for_its_ttl_which_runs_down() {
    let server = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 60))).await;
    let dns = dns_with(&[&server]);
    assert_eq!(lookup(&dns, "www.example.", RecordType::A).await.answers[0].ttl, 60);
    advance(Duration::from_secs(20)).await;
    let mut other = query("WWW.example.", RecordType::A);
    other.metadata.id = 0x4321;
    let answer = ask(&dns, &other).await;
    assert_eq!(answer.answers[0].ttl, 40);
    assert_eq!(server.asked(), 1);
    advance(Duration::from_secs(41)).await;
    assert_eq!(lookup(&dns, "www.example.", RecordType::A).await.answers[0].ttl, 60);
    assert_eq!((server.asked(), dns.stats().from_cache), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_negative_answer_is_kept_as_the_soa_says_and_not_without_one() {
    let server = Resolver::start(|q| {
        let nxdomain = q.queries[0].query_type() == RecordType::A;
        let mut reply = reply_to(&q, if nxdomain { ResponseCode::NXDomain } else { ResponseCode::NoError });
        if q.queries[0].name() != &name("bare.example.") {
            let soa = SOA::new(name("ns.example."), name("root.example."), 1, 2, 3, 4, 10);
            reply.add_authority(Record::from_rdata(name("example."), 3000, RData::SOA(soa)));
        }
        bytes(&reply)
    })
    .await;
    let dns = dns_with(&[&server]);
    for kind in [RecordType::A, RecordType::AAAA] {
        let before = server.asked();
        let fresh = lookup(&dns, "no.example.", kind).await;
        assert_eq!(fresh.authorities[0].ttl, 10, "RFC 2308 §5: the least of TTL and minimum");
        advance(Duration::from_secs(9)).await;
        let kept = lookup(&dns, "no.example.", kind).await;
        assert_eq!((kept.authorities[0].ttl, server.asked() - before), (1, 1), "and it runs down");
        advance(Duration::from_secs(2)).await;
        lookup(&dns, "no.example.", kind).await;
        assert_eq!(server.asked() - before, 2);
    }
    let before = server.asked();
    lookup(&dns, "bare.example.", RecordType::A).await;
    lookup(&dns, "bare.example.", RecordType::A).await;
    assert_eq!(server.asked() - before, 2);
}

#[tokio::test]
async fn an_alias_without_the_wanted_type_is_a_negative_answer() {
    let server = Resolver::start(|q| {
        let mut reply = reply_to(&q, ResponseCode::NoError);
        let target = RData::CNAME(CNAME(name("target.example.")));
        reply.add_answer(Record::from_rdata(q.queries[0].name().clone(), 600, target));
        bytes(&reply)
    })
    .await;
    let dns = dns_with(&[&server]);
    lookup(&dns, "alias.example.", RecordType::AAAA).await;
    assert_eq!(dns.stats().cached, 0, "no SOA says how long");
    lookup(&dns, "alias.example.", RecordType::CNAME).await;
    assert_eq!(dns.stats().cached, 1);
}

#[tokio::test(start_paused = true)]
async fn a_chain_of_aliases_is_passed_on_whole_and_kept_for_its_shortest_ttl() {
    let address = || RData::A(A("198.51.100.1".parse().unwrap()));
    let server = Resolver::start(move |q| {
        let mut reply = reply_to(&q, ResponseCode::NoError);
        let alias =
            |from: &str, to: &str, ttl| Record::from_rdata(name(from), ttl, RData::CNAME(CNAME(name(to))));
        reply.add_answer(alias("www.example.", "edge.example.", 30));
        reply.add_answer(alias("edge.example.", "node.cdn.example.", 300));
        reply.add_answer(Record::from_rdata(name("node.cdn.example."), 600, address()));
        bytes(&reply)
    })
    .await;
    let dns = dns_with(&[&server]);
    for ttls in [[30, 300, 600], [10, 280, 580]] {
        let answer = lookup(&dns, "www.example.", RecordType::A).await;
        assert_eq!(answer.answers.iter().map(|r| r.ttl).collect::<Vec<_>>(), ttls);
        assert_eq!(answer.answers[2].data, address());
        advance(Duration::from_secs(20)).await;
    }
    assert_eq!(server.asked(), 1);
    lookup(&dns, "www.example.", RecordType::A).await;
    assert_eq!(server.asked(), 2, "the first alias has ended");
}

#[tokio::test]
async fn servfail_is_not_kept() {
    let server = Resolver::start(|q| bytes(&reply_to(&q, ResponseCode::ServFail))).await;
    let dns = dns_with(&[&server]);
    lookup(&dns, "www.example.", RecordType::A).await;
    lookup(&dns, "www.example.", RecordType::A).await;
    assert_eq!((server.asked(), dns.stats().cached), (2, 0));
}

#[tokio::test]
async fn dnssec_clients_have_answers_of_their_own_and_every_edns_client_gets_an_opt() {
    let server = Resolver::start(|q| {
        let mut reply = address_reply(&q, "198.51.100.1", 60);
        reply.edns = q.edns.clone();
        bytes(&reply)
    })
    .await;
    let dns = dns_with(&[&server]);
    let edns = with_edns(query("www.example.", RecordType::A), 1232);
    let mut secure = edns.clone();
    secure.edns.as_mut().unwrap().set_dnssec_ok(true);
    assert!(ask(&dns, &edns).await.edns.is_some());
    assert!(ask(&dns, &edns).await.edns.is_some(), "from the cache");
    assert!(lookup(&dns, "www.example.", RecordType::A).await.edns.is_none());
    assert_eq!(server.asked(), 1);
    ask(&dns, &secure).await;
    assert!(ask(&dns, &secure).await.edns.unwrap().flags().dnssec_ok);
    assert_eq!(server.asked(), 2);
}

/// What an address of `text` is kept under.
fn key_of(text: &str) -> Key {
    let asked = query(text, RecordType::A).to_vec().unwrap();
    Key::of(&Query::parse(&asked).unwrap()).unwrap()
}

#[test]
fn it_stays_within_its_entries_and_bytes_and_the_longest_unused_goes_first() {
    let now = Instant::now();
    let mut cache = Cache::default();
    let put = |cache: &mut Cache, text: &str, answers: u16| {
        let asked = query(text, RecordType::A);
        let mut reply = address_reply(&asked, "198.51.100.1", 600);
        for n in 1..answers {
            let [hi, lo] = n.to_be_bytes();
            reply.add_answer(Record::from_rdata(name(text), 600, RData::A(A::new(10, 0, hi, lo))));
        }
        let reply = Reply::read(kind::A, &reply.to_vec().unwrap()).unwrap();
        cache.store(&key_of(text), &Arc::new(reply), 0, now);
    };
    let has = |cache: &mut Cache, text: &str| cache.lookup(&key_of(text), now).is_some();
    for n in 0..cache::ENTRIES_MAX {
        put(&mut cache, &format!("n{n}.example."), 1);
    }
    assert!(has(&mut cache, "n0.example."));
    put(&mut cache, "one-more.example.", 1);
    assert_eq!(cache.size().0, cache::ENTRIES_MAX);
    assert!(has(&mut cache, "n0.example.") && !has(&mut cache, "n1.example."));
    for n in 0..100 {
        put(&mut cache, &format!("large{n}.example."), 1500);
    }
    assert!(cache.size().1 <= cache::BYTES_MAX);
    assert!(has(&mut cache, "large99.example.") && !has(&mut cache, "n0.example."));
}
