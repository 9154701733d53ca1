use std::io::Write;
use std::net::Ipv4Addr;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::net::{TcpListener, UdpSocket};

use super::*;

const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);

fn config(upstreams: Vec<SocketAddr>) -> DnsConfig {
    DnsConfig {
        domain: "portway.internal".into(),
        aliases: vec!["containers.internal".into()],
        gateway: vec![[192, 168, 127, 1].into()],
        host: vec![ALIAS.into()],
        records: vec![("registry.test".into(), [192, 0, 2, 9].into())],
        upstreams: Some(upstreams),
        resolv_conf: "/nonexistent".into(),
        hosts: None,
    }
}

fn query(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

async fn ask(dns: &Dns, name: &str, kind: RecordType) -> Message {
    let answer = dns.answer_datagram(&query(name, kind)).await.expect("an answer");
    let message = Message::from_vec(&answer).expect("a message");
    assert_eq!(message.metadata.id, 0x1234);
    message
}

fn addresses(message: &Message) -> Vec<String> {
    let text = |d: &RData| match d {
        RData::A(a) => a.to_string(),
        RData::AAAA(a) => a.to_string(),
        RData::PTR(p) => p.to_string(),
        other => format!("{other:?}"),
    };
    message.answers.iter().map(|r| text(&r.data)).collect()
}

/// A resolver on loopback; `answer` makes its reply of a query, or none.
async fn upstream(answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2000];
        while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
            if let Some(reply) = answer(&buffer[..len]) {
                let _ = socket.send_to(&reply, from).await;
            }
        }
    });
    address
}

/// The reply of a resolver that knows one address for every name, with a TTL.
fn knows(query: &[u8], last: u8, ttl: u32) -> Vec<u8> {
    let question = Question::read(query).unwrap();
    let mut reply = question.answer(query, &[message::Data::Address([192, 0, 2, last].into())]);
    let at = question.end + 6;
    reply[at..at + 4].copy_from_slice(&ttl.to_be_bytes());
    reply
}

#[tokio::test]
async fn our_names_are_known_in_every_domain_and_in_any_case() {
    let dns = Dns::new(config(vec![])).unwrap();
    assert_eq!(addresses(&ask(&dns, "gateway.portway.internal.", RecordType::A).await), ["192.168.127.1"]);
    assert_eq!(addresses(&ask(&dns, "HOST.Containers.Internal.", RecordType::A).await), ["192.168.127.254"]);
    assert_eq!(addresses(&ask(&dns, "Registry.TEST.", RecordType::A).await), ["192.0.2.9"]);
}

#[tokio::test]
async fn a_name_without_the_type_is_not_a_name_that_does_not_exist() {
    let dns = Dns::new(config(vec![])).unwrap();
    let nodata = ask(&dns, "host.portway.internal.", RecordType::AAAA).await;
    assert_eq!((nodata.metadata.response_code, nodata.answers.len()), (ResponseCode::NoError, 0));
    let nothing = ask(&dns, "nobody.portway.internal.", RecordType::A).await;
    assert_eq!(nothing.metadata.response_code, ResponseCode::NXDomain);
    for negative in [nodata, nothing] {
        assert!(negative.metadata.authoritative);
        assert!(negative.authorities.iter().any(|r| r.record_type() == RecordType::SOA));
    }
    assert_eq!(
        ask(&dns, "registry.test.", RecordType::AAAA).await.metadata.response_code,
        ResponseCode::NoError
    );
}

#[tokio::test]
async fn guests_have_names_and_reverse_names_and_cannot_be_the_gateway() {
    let dns = Dns::new(config(vec![])).unwrap();
    dns.set_guests(&[
        ("web".into(), [192, 168, 127, 2].into()),
        ("gateway".into(), [192, 168, 127, 3].into()),
    ]);
    assert_eq!(addresses(&ask(&dns, "web.portway.internal.", RecordType::A).await), ["192.168.127.2"]);
    assert_eq!(
        addresses(&ask(&dns, "2.127.168.192.in-addr.arpa.", RecordType::PTR).await),
        ["web.portway.internal."]
    );
    assert_eq!(addresses(&ask(&dns, "gateway.portway.internal.", RecordType::A).await), ["192.168.127.1"]);
    dns.set_guests(&[]);
    let gone = ask(&dns, "web.portway.internal.", RecordType::A).await;
    assert_eq!(gone.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn other_names_are_relayed_with_an_id_of_our_own_and_the_guests_spelling() {
    let server = upstream(|q| (q[..2] != [0x12, 0x34]).then(|| knows(q, 7, 60))).await;
    let dns = Dns::new(config(vec![server])).unwrap();
    let asked = query("ExAmPlE.com.", RecordType::A);
    // One time in 65536 the fresh id is the guest's and this test's upstream says nothing.
    let answer = dns.answer_datagram(&asked).await.unwrap();
    assert_eq!(addresses(&Message::from_vec(&answer).unwrap()), ["192.0.2.7"]);
    assert_eq!(answer[12..29], asked[12..29]);
}

#[tokio::test]
async fn answers_with_a_wrong_id_or_question_are_not_believed() {
    for fault in [0usize, 14] {
        let server = upstream(move |q| {
            let mut reply = knows(q, 7, 60);
            reply[fault] ^= 0x01;
            Some(reply)
        })
        .await;
        let dns = Dns::new(config(vec![server])).unwrap();
        let answer = ask(&dns, "example.com.", RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
}

#[tokio::test]
async fn failure_is_servfail_and_never_nxdomain() {
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for upstreams in [vec![], vec![dead]] {
        let dns = Dns::new(config(upstreams)).unwrap();
        let answer = ask(&dns, "example.com.", RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_fails_and_the_good_one_is_asked_first_then() {
    let poor = upstream(|q| Some(Question::read(q).unwrap().error(q, Rcode::ServFail))).await;
    let good = upstream(|q| Some(knows(q, 8, 0))).await;
    let dns = Dns::new(config(vec![poor, good])).unwrap();
    for _ in 0..2 {
        assert_eq!(addresses(&ask(&dns, "example.com.", RecordType::A).await), ["192.0.2.8"]);
    }
    let alone = Dns::new(config(vec![poor])).unwrap();
    assert_eq!(
        ask(&alone, "example.com.", RecordType::A).await.metadata.response_code,
        ResponseCode::ServFail
    );
}

#[tokio::test]
async fn an_answer_is_kept_for_its_ttl_and_given_again_with_what_is_left() {
    let mut cache = Cache::new();
    let q = query("example.com.", RecordType::A);
    let question = Question::parse(&q).unwrap();
    let now = std::time::Instant::now();
    cache.put(now, &question, &q, &knows(&q, 7, 60));
    let later = cache.get(now + Duration::from_secs(20), &question, &q).unwrap();
    assert_eq!(Message::from_vec(&later).unwrap().answers[0].ttl, 40);
    assert_eq!(cache.get(now + Duration::from_secs(60), &question, &q), None);
    // Failures, and negative answers without a SOA, are not kept.
    cache.put(now, &question, &q, &question.error(&q, Rcode::ServFail));
    cache.put(now, &question, &q, &question.answer(&q, &[]));
    assert_eq!(cache.get(now + Duration::from_secs(61), &question, &q), None);
}

#[tokio::test]
async fn the_cache_never_holds_more_than_its_limit() {
    let mut cache = Cache::new();
    let now = std::time::Instant::now();
    for n in 0..cache::ENTRIES + 10 {
        let q = query(&format!("n{n}.test."), RecordType::A);
        cache.put(now, &Question::parse(&q).unwrap(), &q, &knows(&q, 7, 60));
    }
    assert_eq!(cache.len(), cache::ENTRIES);
}

#[tokio::test]
async fn a_large_answer_is_cut_for_udp_and_whole_over_tcp() {
    let long = |q: &[u8]| {
        let records: Vec<_> = (0..100).map(|n| message::Data::Address([192, 0, 2, n].into())).collect();
        Question::read(q).unwrap().answer(q, &records)
    };
    let udp = upstream(move |q| Some(long(q))).await;
    let tcp = TcpListener::bind(udp).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let len = stream.read_u16().await.unwrap();
            let mut q = vec![0; usize::from(len)];
            stream.read_exact(&mut q).await.unwrap();
            let reply = long(&q);
            stream.write_u16(u16::try_from(reply.len()).unwrap()).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    });
    let dns = Dns::new(config(vec![udp])).unwrap();
    let cut = ask(&dns, "many.test.", RecordType::A).await;
    assert!(cut.metadata.truncation && cut.answers.is_empty());

    let (mut guest, theirs) = tokio::io::duplex(65_536);
    tokio::spawn(Arc::clone(&dns).serve_stream(theirs));
    // Two queries at once (RFC 7766 §6.2.1.1).
    for name in ["many.test.", "host.portway.internal."] {
        let q = query(name, RecordType::A);
        guest.write_u16(u16::try_from(q.len()).unwrap()).await.unwrap();
        guest.write_all(&q).await.unwrap();
    }
    let mut counts = Vec::new();
    for _ in 0..2 {
        let len = guest.read_u16().await.unwrap();
        let mut answer = vec![0; usize::from(len)];
        guest.read_exact(&mut answer).await.unwrap();
        counts.push(Message::from_vec(&answer).unwrap().answers.len());
    }
    counts.sort_unstable();
    assert_eq!(counts, [1, 100]);
}

#[tokio::test]
async fn the_hosts_file_is_read_again_when_it_changes() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "127.0.0.1 box\n192.0.2.33 db").unwrap();
    let dns = Dns::new(DnsConfig { hosts: Some(file.path().into()), ..config(vec![]) }).unwrap();
    assert_eq!(addresses(&ask(&dns, "box.", RecordType::A).await), [ALIAS.to_string()]);
    assert_eq!(addresses(&ask(&dns, "33.2.0.192.in-addr.arpa.", RecordType::PTR).await), ["db."]);
    writeln!(file, "192.0.2.34 db2").unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while addresses(&ask(&dns, "db2.", RecordType::A).await).is_empty() {
        assert!(std::time::Instant::now() < deadline, "the change was not seen");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn beyond_the_queries_in_flight_a_datagram_is_dropped() {
    let silent = upstream(|_| None).await;
    let dns = Dns::new(config(vec![silent])).unwrap();
    let waiting: Vec<_> = (0..IN_FLIGHT)
        .map(|n| {
            let dns = Arc::clone(&dns);
            tokio::spawn(
                async move { dns.answer_datagram(&query(&format!("n{n}.test."), RecordType::A)).await },
            )
        })
        .collect();
    while dns.in_flight.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(dns.answer_datagram(&query("host.portway.internal.", RecordType::A)).await, None);
    for task in &waiting {
        task.abort();
    }
    for task in waiting {
        let _ = task.await;
    }
    assert_eq!(addresses(&ask(&dns, "host.portway.internal.", RecordType::A).await).len(), 1);
}

#[tokio::test]
async fn malformed_queries_are_answered_with_an_error_or_not_at_all() {
    let dns = Dns::new(config(vec![])).unwrap();
    let good = query("example.com.", RecordType::A);
    let code = async |bytes: &[u8]| dns.answer_datagram(bytes).await.map(|a| a[3] & 0x0f);
    assert_eq!(code(&good[..11]).await, None);
    assert_eq!(code(&good[..14]).await, Some(1));
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    assert_eq!(code(&changed(2, 0x81)).await, None, "an answer is no query");
    assert_eq!(code(&changed(2, 0x29)).await, Some(4), "UPDATE");
    assert_eq!(code(&changed(5, 2)).await, Some(1), "two questions");
    assert_eq!(code(&changed(12, 0xc0)).await, Some(1), "a pointer in the question");
}

#[test]
fn no_bytes_panic() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dns = Dns::new(config(vec![])).unwrap();
    let good = query("www.portway.internal.", RecordType::ANY);
    proptest::proptest!(|(noise in proptest::collection::vec((0usize..60, proptest::prelude::any::<u8>()), 0..8), cut in 0usize..60)| {
        let mut bytes = good.clone();
        bytes.truncate(cut.max(1));
        for (at, value) in noise {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        let _ = runtime.block_on(dns.answer_datagram(&bytes));
        let _ = message::records(&bytes);
        let _ = message::fit(bytes, 12);
    });
}
