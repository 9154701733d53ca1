//! What is shared among guests, and what one of them can take.

use super::*;

const OTHER: PortId = PortId(1);

async fn datagram(dns: &Dns, guest: PortId, text: &str) -> Option<Vec<u8>> {
    dns.answer_datagram(guest, &query(text, RecordType::A).to_vec().unwrap()).await
}

#[tokio::test(start_paused = true)]
async fn at_the_limit_a_datagram_is_dropped_and_a_stream_is_refused_and_our_own_names_are_answered() {
    let server = Resolver::start(|_| None).await;
    let dns = dns_with(&[&server]);
    let taken: Vec<_> = (0..IN_FLIGHT_MAX).map(|_| dns.in_flight.take(GUEST)).collect();
    assert!(taken.iter().all(Option::is_some));
    assert_eq!(datagram(&dns, GUEST, "www.example.").await, None);
    let asked = query("www.example.", RecordType::A).to_vec().unwrap();
    let refused = dns.answer(GUEST, &asked, Transport::Stream).await.unwrap();
    assert_eq!(code(&Message::from_vec(&refused).unwrap()), ResponseCode::Refused);
    assert_eq!(data(&lookup(&dns, "gateway.portway.internal.", RecordType::A).await).len(), 1);
    assert_eq!(dns.stats().over_limit, 2);
    drop(taken);
    assert_eq!(dns.stats().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn a_guest_with_all_places_makes_room_for_another_and_its_oldest_query_goes() {
    let server = Resolver::start(|q| {
        let good = q.queries[0].name().to_ascii().eq_ignore_ascii_case("good.example.");
        if good { bytes(&address_reply(&q, "198.51.100.1", 60)) } else { None }
    })
    .await;
    let dns = dns_with(&[&server]);
    let mut flood = Vec::new();
    for n in 0..IN_FLIGHT_MAX {
        let dns = Arc::clone(&dns);
        flood.push(tokio::spawn(async move { datagram(&dns, GUEST, &format!("n{n}.example.")).await }));
    }
    while dns.stats().in_flight < IN_FLIGHT_MAX {
        tokio::task::yield_now().await;
    }
    assert!(datagram(&dns, OTHER, "good.example.").await.is_some());
    assert_eq!(flood.remove(0).await.unwrap(), None, "dropped, not answered");
    assert_eq!(dns.stats().over_limit, 1);
    for query in flood {
        assert!(query.await.unwrap().is_some(), "SERVFAIL after its time");
    }
    assert_eq!((dns.stats().in_flight, dns.flights.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_asks_the_same_at_one_time_shares_one_query_and_has_an_answer_of_his_own() {
    let server = Resolver::start(|q| bytes(&address_reply(&q, "198.51.100.1", 0))).await;
    let dns = dns_with(&[&server]);
    let spelt = ["www.example.", "WWW.example.", "wWw.example."];
    let asked: Vec<Message> = (0..3_u16)
        .map(|n| {
            let mut message = query(spelt[usize::from(n)], RecordType::A);
            message.metadata.id = 100 + n;
            message
        })
        .collect();
    let answers = tokio::join!(ask(&dns, &asked[0]), ask(&dns, &asked[1]), ask(&dns, &asked[2]));
    for (answer, text) in [answers.0, answers.1, answers.2].iter().zip(spelt) {
        assert_eq!(data(answer), ["198.51.100.1"]);
        assert_eq!(answer.queries[0].name().to_ascii(), text);
    }
    assert_eq!((server.asked(), dns.stats().relayed), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_query_nobody_waits_for_any_more_is_given_up() {
    let server = Resolver::start(|_| None).await;
    let dns = dns_with(&[&server]);
    let ask = tokio::time::timeout(Duration::from_millis(10), datagram(&dns, GUEST, "www.example.")).await;
    assert!(ask.is_err());
    while dns.flights.len() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(dns.stats().in_flight, 0);
}
