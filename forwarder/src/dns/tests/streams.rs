//! Queries over a byte stream.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_quick_answer_overtakes_a_slow_one() {
    let server = Resolver::start(|_| None).await;
    let dns = dns_with(&[&server]);
    let (mut guest, ours) = tokio::io::duplex(4096);
    tokio::spawn(dns.serve_stream(GUEST, ours));
    send(&mut guest, &query("slow.example.", RecordType::A)).await;
    send(&mut guest, &query("gateway.portway.internal.", RecordType::A)).await;
    assert_eq!(data(&receive(&mut guest).await.unwrap()), ["192.168.127.1"]);
    assert_eq!(code(&receive(&mut guest).await.unwrap()), ResponseCode::ServFail);
}

#[tokio::test(start_paused = true)]
async fn a_query_may_come_in_pieces_and_after_its_end_the_answer_still_comes() {
    let dns = Dns::new(config()).unwrap();
    let (mut guest, ours) = tokio::io::duplex(4096);
    tokio::spawn(Arc::clone(&dns).serve_stream(GUEST, ours));
    let asked = query("host.portway.internal.", RecordType::A).to_vec().unwrap();
    let mut framed = u16::try_from(asked.len()).unwrap().to_be_bytes().to_vec();
    framed.extend_from_slice(&asked);
    for byte in framed {
        guest.write_all(&[byte]).await.unwrap();
        sleep(Duration::from_millis(1)).await;
    }
    guest.shutdown().await.unwrap();
    assert_eq!(data(&receive(&mut guest).await.unwrap()), ["192.168.127.254"]);
    assert!(receive(&mut guest).await.is_none(), "then the stream ends");
    assert_eq!(dns.stats().streams, 0);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_and_one_that_takes_no_answers_are_closed() {
    let dns = Dns::new(config()).unwrap();
    let (mut guest, ours) = tokio::io::duplex(4096);
    let start = Instant::now();
    tokio::spawn(Arc::clone(&dns).serve_stream(GUEST, ours));
    assert!(receive(&mut guest).await.is_none());
    assert_eq!(start.elapsed().as_secs(), stream::IDLE.as_secs());

    let (mut guest, ours) = tokio::io::duplex(64);
    let served = tokio::spawn(Arc::clone(&dns).serve_stream(GUEST, ours));
    for _ in 0..3 {
        send(&mut guest, &query("host.portway.internal.", RecordType::A)).await;
    }
    served.await.unwrap();
    assert_eq!(dns.stats().streams, 0);
}

#[tokio::test(start_paused = true)]
async fn queries_in_flight_and_connections_are_limited() {
    let server = Resolver::start(|_| None).await;
    let dns = dns_with(&[&server]);
    let (mut guest, ours) = tokio::io::duplex(1 << 16);
    tokio::spawn(Arc::clone(&dns).serve_stream(GUEST, ours));
    for n in 0..stream::IN_FLIGHT_MAX * 2 {
        send(&mut guest, &query(&format!("n{n}.example."), RecordType::A)).await;
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(dns.stats().in_flight, stream::IN_FLIGHT_MAX);
    for _ in 0..stream::IN_FLIGHT_MAX * 2 {
        assert_eq!(code(&receive(&mut guest).await.unwrap()), ResponseCode::ServFail);
    }
    let taken: Vec<_> = std::iter::from_fn(|| dns.take_stream_place(GUEST)).collect();
    assert_eq!(taken.len(), STREAMS_MAX - 1);
    let (mut late, ours) = tokio::io::duplex(4096);
    Arc::clone(&dns).serve_stream(GUEST, ours).await;
    assert!(receive(&mut late).await.is_none());
}
