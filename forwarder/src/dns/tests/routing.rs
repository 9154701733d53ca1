//! Which servers are asked, and when others are.

use super::*;

#[tokio::test]
async fn a_domains_servers_are_asked_about_its_names_and_no_others() {
    let corp = Resolver::start(|q| bytes(&address_reply(&q, "10.0.0.1", 60))).await;
    let rest = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 60))).await;
    let mut upstreams = asked(&[rest.address]);
    upstreams.push(Upstream { domain: Some("corp.example".into()), server: Server::from(corp.address) });
    let dns = Dns::new(DnsConfig { upstreams, ..config() }).unwrap();
    for (text, address) in [
        ("wiki.Corp.example.", "10.0.0.1"),
        ("corp.example.", "10.0.0.1"),
        ("notcorp.example.", "198.51.100.1"),
    ] {
        assert_eq!(data(&lookup(&dns, text, RecordType::A).await), [address], "{text}");
    }
    assert_eq!((corp.asked(), rest.asked()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_costs_its_time_once_and_has_its_place_back_when_it_answers() {
    let answers = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = Arc::clone(&answers);
    let first = Resolver::start(move |q| {
        let well = flag.load(Ordering::Relaxed);
        if well { bytes(&address_reply(&q, "198.51.100.1", 0)) } else { None }
    })
    .await;
    let second = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.2", 0))).await;
    let dns = dns_with(&[&first, &second]);
    let took = async |text: &str| {
        let start = Instant::now();
        let answer = data(&lookup(&dns, text, RecordType::A).await);
        (answer, start.elapsed().as_secs())
    };
    let second_says = vec!["198.51.100.2".to_owned()];
    assert_eq!(took("a.example.").await, (second_says.clone(), relay::NEXT_SERVER.as_secs()));
    for n in 0..5 {
        assert_eq!(
            took(&format!("n{n}.example.")).await,
            (second_says.clone(), 0),
            "nobody waits for it again"
        );
    }
    assert_eq!(first.asked(), 1);
    // Later one query goes to it too, which nobody waits for.
    advance(health::FIRST_REST).await;
    assert_eq!(took("b.example.").await, (second_says.clone(), 0));
    answers.store(true, Ordering::Relaxed);
    advance(health::FIRST_REST * 2).await;
    while first.asked() < 3 {
        took("c.example.").await;
        advance(Duration::from_secs(1)).await;
    }
    while took("d.example.").await.0 == second_says {
        advance(Duration::from_secs(1)).await;
    }
}

#[tokio::test]
async fn without_a_nameserver_line_the_local_machine_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    std::fs::write(&path, "search corp.example\n").unwrap();
    let dns = Dns::new(DnsConfig { upstreams: Vec::new(), resolv_conf: path, ..config() }).unwrap();
    assert_eq!(dns.upstreams(), [Server::from(SocketAddr::from(([127, 0, 0, 1], 53)))]);
}

#[tokio::test(start_paused = true)]
async fn systemd_resolved_stays_the_server_while_its_uplinks_change_and_what_it_said_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let (path, uplinks) = (dir.path().join("resolv.conf"), dir.path().join("uplinks"));
    std::fs::write(&path, "nameserver 127.0.0.53\noptions edns0 trust-ad\n").unwrap();
    std::fs::write(&uplinks, "nameserver 192.0.2.1\n").unwrap();
    let config =
        DnsConfig { upstreams: Vec::new(), resolv_conf: path, uplinks: Some(uplinks.clone()), ..config() };
    let dns = Dns::new(config).unwrap();
    assert_eq!(dns.upstreams(), [Server::from(SocketAddr::from(([127, 0, 0, 53], 53)))]);
    let before = lock(&dns.cache).generation();
    std::fs::write(dir.path().join("new"), "nameserver 10.8.0.1\n").unwrap();
    std::fs::rename(dir.path().join("new"), &uplinks).unwrap();
    advance(watch_file::INTERVAL).await;
    assert_eq!(dns.upstreams(), [Server::from(SocketAddr::from(([127, 0, 0, 53], 53)))]);
    assert_ne!(lock(&dns.cache).generation(), before);
}

#[tokio::test]
async fn in_another_network_nothing_that_was_learned_counts() {
    let server = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 600))).await;
    let dns = dns_with(&[&server]);
    lookup(&dns, "www.example.", RecordType::A).await;
    assert_eq!(dns.stats().cached, 1);
    dns.network_changed();
    assert_eq!(dns.stats().cached, 0);
    lookup(&dns, "www.example.", RecordType::A).await;
    assert_eq!(server.asked(), 2);
}
