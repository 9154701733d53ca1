//! The way to the host's resolvers and back.

use super::*;

#[tokio::test]
async fn a_query_goes_on_under_another_id_and_comes_back_under_its_own() {
    let server = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 0))).await;
    let dns = dns_with(&[&server]);
    for _ in 0..8 {
        let answer = lookup(&dns, "www.example.", RecordType::A).await;
        assert_eq!(data(&answer), ["198.51.100.1"]);
    }
    let seen = server.seen.lock().unwrap().clone();
    let ids: HashSet<u16> = seen.iter().map(|s| s.0).collect();
    let ports: HashSet<u16> = seen.iter().map(|s| s.1).collect();
    assert_eq!(seen.len(), 8, "TTL 0 is not kept");
    assert!(ids.len() >= 7 && !ids.iter().all(|id| *id == 0x1234), "{ids:?}");
    assert!(ports.len() >= 2, "{ports:?}");
}

#[tokio::test(start_paused = true)]
async fn answers_with_another_id_or_question_are_not_taken() {
    let server = Resolver::start(|q| {
        let mut wrong = address_reply(&q, "203.0.113.66", 60);
        if q.queries[0].name() == &name("id.example.") {
            wrong.metadata.id ^= 1;
        } else {
            wrong.queries[0].set_name(name("evil.example."));
        }
        bytes(&wrong)
    })
    .await;
    let dns = dns_with(&[&server]);
    for text in ["id.example.", "question.example."] {
        let start = Instant::now();
        assert_eq!(code(&lookup(&dns, text, RecordType::A).await), ResponseCode::ServFail);
        assert_eq!(start.elapsed().as_secs(), relay::TOTAL.as_secs());
    }
}

#[tokio::test]
async fn an_answer_from_a_foreign_address_is_not_taken() {
    let foreign = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let upstreams = asked(&[server.local_addr().unwrap()]);
    let dns = Dns::new(DnsConfig { upstreams, ..config() }).unwrap();
    tokio::spawn(async move {
        let mut bytes = [0; 512];
        let (length, from) = server.recv_from(&mut bytes).await.unwrap();
        let asked = Message::from_vec(&bytes[..length]).unwrap();
        let forged = address_reply(&asked, "203.0.113.66", 60).to_vec().unwrap();
        foreign.send_to(&forged, from).await.unwrap();
        let right = address_reply(&asked, "198.51.100.1", 60).to_vec().unwrap();
        server.send_to(&right, from).await.unwrap();
    });
    assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await), ["198.51.100.1"]);
}

#[tokio::test(start_paused = true)]
async fn silence_is_servfail_after_five_seconds_and_a_lost_datagram_is_sent_again() {
    let server = Resolver::start(|_| None).await;
    let dns = dns_with(&[&server]);
    let start = Instant::now();
    let answer = lookup(&dns, "www.example.", RecordType::A).await;
    assert_eq!(code(&answer), ResponseCode::ServFail);
    assert_eq!(answer.queries.len(), 1, "the question is there");
    assert_eq!(start.elapsed().as_secs(), 5);
    assert_eq!(server.asked(), 3, "at 0, 2 and 4 s");
    assert_eq!(dns.stats().failed, 1);
    assert_eq!(dns.stats().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn without_resolvers_the_answer_is_servfail_at_once() {
    let dns = Dns::new(config()).unwrap();
    let start = Instant::now();
    assert_eq!(code(&lookup(&dns, "www.example.", RecordType::A).await), ResponseCode::ServFail);
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_refused_or_failing_server_is_passed_over_at_once_and_the_working_one_remembered() {
    let failing = Resolver::start(|q| bytes(&reply_to(&q, ResponseCode::ServFail))).await;
    let good = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 0))).await;
    let upstreams = asked(&[closed_port().await, failing.address, good.address]);
    let dns = Dns::new(DnsConfig { upstreams, ..config() }).unwrap();
    let start = Instant::now();
    for _ in 0..2 {
        assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await), ["198.51.100.1"]);
    }
    assert_eq!(start.elapsed().as_secs(), 0);
    assert_eq!((failing.asked(), good.asked()), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_helped_out_by_the_next_after_two_seconds() {
    let silent = Resolver::start(|_| None).await;
    let good = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 0))).await;
    let dns = dns_with(&[&silent, &good]);
    let start = Instant::now();
    assert_eq!(data(&lookup(&dns, "www.example.", RecordType::A).await), ["198.51.100.1"]);
    assert_eq!(start.elapsed().as_secs(), relay::NEXT_SERVER.as_secs());
}

#[tokio::test]
async fn nxdomain_and_refused_by_all_are_passed_on_as_they_are() {
    let server = Resolver::start(|q| {
        let refused = q.queries[0].name() == &name("refused.example.");
        let code = if refused { ResponseCode::Refused } else { ResponseCode::NXDomain };
        bytes(&reply_to(&q, code))
    })
    .await;
    let dns = dns_with(&[&server]);
    assert_eq!(code(&lookup(&dns, "no.example.", RecordType::A).await), ResponseCode::NXDomain);
    assert_eq!(code(&lookup(&dns, "refused.example.", RecordType::A).await), ResponseCode::Refused);
}

#[tokio::test]
async fn a_large_answer_is_cut_to_what_the_client_takes() {
    let server = Resolver::start(|q| {
        let mut reply = address_reply(&q, "198.51.100.1", 60);
        let record = reply.answers[0].clone();
        for _ in 0..60 {
            reply.add_answer(record.clone());
        }
        bytes(&reply)
    })
    .await;
    let dns = dns_with(&[&server]);
    for _ in 0..2 {
        // From the resolver, then from the cache.
        let plain = lookup(&dns, "www.example.", RecordType::A).await;
        assert!(plain.metadata.truncation);
        assert_eq!((plain.queries.len(), plain.answers.len()), (1, 0));
        let edns = ask(&dns, &with_edns(query("www.example.", RecordType::A), 4096)).await;
        assert!(!edns.metadata.truncation);
        assert_eq!(edns.answers.len(), 61);
    }
}

#[tokio::test]
async fn an_answer_cut_by_the_resolver_is_fetched_by_tcp_and_stays_cut_where_there_is_none() {
    let cutting = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = cutting.local_addr().unwrap();
    tokio::spawn(async move {
        let mut bytes = [0; 512];
        loop {
            let (length, from) = cutting.recv_from(&mut bytes).await.unwrap();
            let mut cut = reply_to(&Message::from_vec(&bytes[..length]).unwrap(), ResponseCode::NoError);
            cut.metadata.truncation = true;
            cutting.send_to(&cut.to_vec().unwrap(), from).await.unwrap();
        }
    });
    let dns = Dns::new(DnsConfig { upstreams: asked(&[address]), ..config() }).unwrap();
    assert!(lookup(&dns, "www.example.", RecordType::A).await.metadata.truncation);
    assert_eq!(dns.stats().cached, 0);

    // One that cuts, and speaks TCP: everybody gets the whole, as far as it fits.
    let server = Resolver::start_with(|q, tcp| {
        let mut reply = address_reply(&q, "198.51.100.1", 60);
        reply.metadata.truncation = !tcp;
        for _ in 0..usize::from(tcp) * 20 {
            reply.add_answer(reply.answers[0].clone());
        }
        bytes(&reply)
    })
    .await;
    let dns = dns_with(&[&server]);
    let answer = ask(&dns, &with_edns(query("www.example.", RecordType::A), 1232)).await;
    assert_eq!((answer.answers.len(), answer.metadata.truncation), (21, false));
    let (mut guest, ours) = tokio::io::duplex(4096);
    tokio::spawn(Arc::clone(&dns).serve_stream(GUEST, ours));
    send(&mut guest, &query("www.example.", RecordType::A)).await;
    assert_eq!(receive(&mut guest).await.unwrap().answers.len(), 21, "from the cache");
    assert_eq!((*server.tcp.lock().unwrap(), server.asked()), (1, 1));
}

fn addresses(dns: &Dns) -> Vec<String> {
    dns.upstreams().iter().map(ToString::to_string).collect()
}

#[tokio::test(start_paused = true)]
async fn new_resolvers_in_resolv_conf_are_asked_and_the_cache_forgets_the_old_ones() {
    // Port 53 cannot be had here: what is followed is the list.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, "nameserver 127.0.0.53\nsearch corp.example\n").unwrap();
    let dns = Dns::new(DnsConfig { upstreams: Vec::new(), resolv_conf: path.clone(), ..config() }).unwrap();
    assert_eq!(addresses(&dns), ["127.0.0.53:53"]);
    assert_eq!(dns.search(), ["corp.example"]);
    let asked = query("www.example.", RecordType::A);
    let reply = address_reply(&asked, "198.51.100.1", 600).to_vec().unwrap();
    let asked = asked.to_vec().unwrap();
    {
        let mut cache = lock(&dns.cache);
        let generation = cache.generation();
        let key = Key::of(&Query::parse(&asked).unwrap()).unwrap();
        cache.store(&key, &Arc::new(Reply::read(kind::A, &reply).unwrap()), generation, Instant::now());
    }
    assert_eq!(dns.stats().cached, 1);
    let new = dir.path().join("new");
    std::fs::write(&new, "nameserver 192.0.2.53\n").unwrap();
    std::fs::rename(&new, &path).unwrap();
    advance(watch_file::INTERVAL).await;
    let mut search = dns.watch_search();
    assert!(dns.search().is_empty(), "whoever looks first");
    assert!(search.has_changed().unwrap() && search.borrow_and_update().is_empty(), "DHCP is told");
    assert_eq!(addresses(&dns), ["192.0.2.53:53"]);
    assert_eq!(dns.stats().cached, 0);
}
