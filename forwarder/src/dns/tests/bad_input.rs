//! What guests must not be able to do.

use super::*;

async fn answer_to(raw: &[u8]) -> Option<Message> {
    let dns = Dns::new(config()).unwrap();
    dns.answer_datagram(GUEST, raw).await.map(|raw| Message::from_vec(&raw).unwrap())
}

#[tokio::test]
async fn what_is_no_query_gets_no_answer_and_what_is_malformed_formerr() {
    let good = query("www.example.", RecordType::A).to_vec().unwrap();
    assert!(answer_to(&[]).await.is_none());
    assert!(answer_to(&good[..11]).await.is_none());
    let mut response = good.clone();
    response[2] |= 0x80;
    assert!(answer_to(&response).await.is_none(), "two servers would answer each other for ever");
    for cut in 12..good.len() {
        assert_eq!(code(&answer_to(&good[..cut]).await.unwrap()), ResponseCode::FormErr, "cut at {cut}");
    }
    let mut trailing = good.clone();
    trailing.push(0);
    let mut none = good.clone();
    none[5] = 0;
    let mut two = good.clone();
    two[5] = 2;
    let mut pointer = good.clone();
    pointer[12] = 0xc0;
    for bad in [trailing, none, two, pointer] {
        assert_eq!(code(&answer_to(&bad).await.unwrap()), ResponseCode::FormErr);
    }
    let mut update = good;
    update[2] = 0x28;
    assert_eq!(code(&answer_to(&update).await.unwrap()), ResponseCode::NotImp);
}

#[tokio::test]
async fn transfers_and_other_classes_are_refused_and_newer_edns_is_badvers() {
    let dns = Dns::new(config()).unwrap();
    for text in ["portway.internal.", "example."] {
        for kind in [RecordType::AXFR, RecordType::IXFR] {
            assert_eq!(code(&lookup(&dns, text, kind).await), ResponseCode::Refused);
        }
    }
    let mut chaos = query("version.bind.", RecordType::TXT);
    chaos.queries[0].set_query_class(hickory_proto::rr::DNSClass::CH);
    assert_eq!(code(&ask(&dns, &chaos).await), ResponseCode::Refused);
    let mut newer = with_edns(query("host.portway.internal.", RecordType::A), 1232);
    newer.edns.as_mut().unwrap().set_version(1);
    let answer = ask(&dns, &newer).await;
    assert_eq!(u16::from(code(&answer)), 16, "BADVERS");
    assert_eq!(answer.edns.unwrap().version(), 0);
    let any = lookup(&dns, "gateway.portway.internal.", RecordType::ANY).await;
    assert_eq!(code(&any), ResponseCode::NoError);
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #[test]
    fn any_bytes_are_survived_and_every_answer_is_well_formed(raw in prop::collection::vec(any::<u8>(), 0..600)) {
        let dns = Dns::new(config()).unwrap();
        if let Some(answer) = block_on(dns.answer_datagram(GUEST, &raw)) {
            prop_assert!(answer.len() <= usize::from(wire::DATAGRAM_MAX));
            prop_assert_eq!(&answer[..2], &raw[..2]);
            prop_assert!(answer[2] & 0x80 != 0);
        }
    }

    #[test]
    fn mutated_queries_are_survived(
        text in prop::sample::select(vec![
            "gateway.portway.internal.", "1.127.168.192.in-addr.arpa.", "localhost.", "db.example.", "x.example.",
        ]),
        kind in any::<u16>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let mut raw = with_edns(query(text, RecordType::from(kind)), 1232).to_vec().unwrap();
        for (at, byte) in changes {
            let at = at.index(raw.len());
            raw[at] = byte;
        }
        let dns = Dns::new(config()).unwrap();
        if let Some(answer) = block_on(dns.answer_datagram(GUEST, &raw)) {
            prop_assert_eq!(&answer[..2], &raw[..2]);
            prop_assert!(answer.len() == wire::HEADER || wire::records(&answer).is_some());
        }
    }

    #[test]
    fn any_reply_is_survived(raw in prop::collection::vec(any::<u8>(), 0..300)) {
        let asked = query("www.example.", RecordType::A).to_vec().unwrap();
        let asked = Query::parse(&asked).unwrap();
        let mut reply = asked.bytes().to_vec();
        reply.truncate(raw.first().map_or(0, |n| usize::from(*n)));
        reply.extend_from_slice(&raw);
        wire::answers(asked.bytes(), asked.id(), &reply);
        rebind::leads_inside(&reply);
        if let Some(reply) = Reply::read(asked.kind, &reply) {
            reply.made_out(&asked, 7);
        }
    }
}
