use proptest::prelude::*;

use super::*;

const GATEWAY: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn ip(v6: bool, last: u8) -> IpAddr {
    if v6 {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)])
    } else {
        IpAddr::from([10, 0, 0, last])
    }
}

struct Table(Fragments, Instant);

impl Table {
    fn new() -> Self {
        Self(Fragments::new(1), Instant::ZERO)
    }

    fn piece(
        &mut self,
        port: u16,
        v6: bool,
        id: u32,
        offset: usize,
        more: bool,
        bytes: &[u8],
    ) -> Result<Option<Vec<u8>>, DropReason> {
        let place = Fragment { id, offset, more };
        let (src, dst) = (ip(v6, 2), ip(v6, 7));
        let piece = Piece { port: PortId(port), mac: MAC, src, dst, protocol: 17, place, bytes };
        self.0.add(self.1, &piece, GATEWAY)
    }
}

/// What the packet in a frame carries.
fn carried(frame: &[u8]) -> Vec<u8> {
    let (header, packet) = ethernet::parse(frame).unwrap();
    assert_eq!((header.dst, header.src), (GATEWAY, MAC));
    if header.kind == ethernet::IPV4 {
        let read = ipv4::parse(packet).unwrap();
        assert!(!read.header.fragment && !read.header.dont_fragment);
        return read.payload.to_vec();
    }
    let read = ipv6::parse(packet).unwrap();
    assert!(read.header.fragment.is_some_and(|f| !f.is_part()));
    read.payload.to_vec()
}

#[test]
fn pieces_in_any_order_make_the_packet() {
    for v6 in [false, true] {
        let mut t = Table::new();
        assert_eq!(t.piece(0, v6, 1, 16, false, &[3; 5]), Ok(None));
        assert_eq!(t.piece(0, v6, 1, 0, true, &[1; 8]), Ok(None));
        let whole = t.piece(0, v6, 1, 8, true, &[2; 8]).unwrap().unwrap();
        assert_eq!(carried(&whole), [&[1; 8][..], &[2; 8], &[3; 5]].concat());
        assert_eq!(t.0.held(), (0, 0));
    }
}

#[test]
fn packets_with_other_ids_or_from_other_ports_do_not_mix() {
    let mut t = Table::new();
    assert_eq!(t.piece(0, false, 1, 0, true, &[1; 8]), Ok(None));
    assert_eq!(t.piece(0, false, 2, 8, false, &[2; 8]), Ok(None));
    assert_eq!(t.piece(1, false, 1, 8, false, &[3; 8]), Ok(None));
    let whole = t.piece(0, false, 1, 8, false, &[4; 8]).unwrap().unwrap();
    assert_eq!(carried(&whole)[8..], [4; 8]);
}

#[test]
fn rfc_5722_an_overlap_ends_the_packet_and_what_still_comes_of_it() {
    for v6 in [false, true] {
        let mut t = Table::new();
        t.piece(0, v6, 1, 0, true, &[1; 16]).unwrap();
        assert_eq!(t.piece(0, v6, 1, 8, false, &[2; 16]), Err(DropReason::FragmentOverlap));
        assert_eq!(t.0.held().1, 0);
        for (offset, more) in [(0, true), (16, false)] {
            assert_eq!(t.piece(0, v6, 1, offset, more, &[3; 16]), Err(DropReason::FragmentOverlap));
        }
    }
}

#[test]
fn rfc_8200_4_5_a_repeated_piece_is_no_overlap_and_one_with_other_bytes_is() {
    let mut t = Table::new();
    for _ in 0..3 {
        assert_eq!(t.piece(0, true, 1, 0, true, &[1; 16]), Ok(None));
    }
    assert_eq!(t.piece(0, true, 1, 8, true, &[1; 8]), Ok(None));
    assert_eq!(t.piece(0, true, 1, 0, true, &[9; 16]), Err(DropReason::FragmentOverlap));
}

#[test]
fn two_ends_or_bytes_behind_the_end_are_an_overlap() {
    for second in [(24, false), (8, false), (32, true)] {
        let mut t = Table::new();
        t.piece(0, false, 1, 16, false, &[1; 8]).unwrap();
        let (offset, more) = second;
        assert_eq!(
            t.piece(0, false, 1, offset, more, &[1; 8]),
            Err(DropReason::FragmentOverlap),
            "{second:?}"
        );
    }
    let mut t = Table::new();
    t.piece(0, false, 1, 64, true, &[1; 8]).unwrap();
    assert_eq!(t.piece(0, false, 1, 16, false, &[1; 8]), Err(DropReason::FragmentOverlap));
}

#[test]
fn rfc_8200_4_5_odd_middles_empty_pieces_and_packets_beyond_64_kib_are_refused() {
    let mut t = Table::new();
    assert_eq!(t.piece(0, true, 1, 0, true, &[1; 7]), Err(DropReason::BadFragment));
    assert_eq!(t.piece(0, true, 1, 0, false, &[]), Err(DropReason::BadFragment));
    assert_eq!(t.piece(0, true, 1, 65_528, false, &[1; 8]), Err(DropReason::BadFragment));
    assert_eq!(t.0.held(), (0, 0));
}

#[test]
fn after_30_seconds_the_packet_is_gone_and_its_first_piece_is_handed_out() {
    let mut t = Table::new();
    t.piece(0, false, 1, 0, true, &[1; 16]).unwrap();
    t.1 = Instant::from_millis(1000);
    t.piece(0, false, 2, 16, true, &[1; 16]).unwrap();
    assert_eq!(t.0.poll_timeout(), Some(Instant::from_millis(30_000)));
    assert!(t.0.pop_expired(Instant::from_millis(29_999)).is_none());
    let first = t.0.pop_expired(Instant::from_millis(31_000)).unwrap().first.unwrap();
    assert_eq!(ipv4::parse(&first).unwrap().payload, [1; 16]);
    assert!(t.0.pop_expired(Instant::from_millis(31_000)).unwrap().first.is_none());
    assert_eq!((t.0.held(), t.0.poll_timeout()), ((0, 0), None));
}

#[test]
fn at_a_ports_limits_its_oldest_packet_goes_and_other_ports_do_not_notice() {
    let mut t = Table::new();
    t.piece(1, false, 0, 0, true, &[7; 8]).unwrap();
    let limit = u32::try_from(PORT_PACKETS).unwrap();
    for id in 0..=limit {
        t.piece(0, false, id, 0, true, &[1; 8]).unwrap();
    }
    assert_eq!(t.0.held().0, PORT_PACKETS + 1);
    // The first went: its end begins anew. The second is there.
    assert_eq!(t.piece(0, false, 0, 8, false, &[1; 8]), Ok(None));
    assert!(t.piece(0, false, 2, 8, false, &[1; 8]).unwrap().is_some());
    assert!(t.piece(1, false, 0, 8, false, &[1; 8]).unwrap().is_some());
    // A few bytes far behind take as much as all before them.
    for id in 1000..1200 {
        t.piece(0, false, id, 65_000, true, &[1; 8]).unwrap();
    }
    assert!(t.0.held().1 <= PORT_BYTES);
    t.0.port_down(PortId(0));
    assert_eq!(t.0.held(), (0, 0));
}

#[test]
fn at_the_common_limit_further_pieces_are_dropped_until_there_is_room() {
    let mut t = Table::new();
    let mut refused = 0;
    for port in 0..6 {
        for id in 0..120 {
            refused += usize::from(t.piece(port, false, id, 65_000, true, &[1; 8]).is_err());
        }
    }
    assert!(refused > 0 && t.0.held().1 <= BYTES);
    t.0.port_down(PortId(0));
    assert_eq!(t.piece(5, false, 999, 65_000, true, &[1; 8]), Ok(None));
}

#[test]
fn a_packet_in_too_many_scattered_pieces_is_given_up() {
    let mut t = Table::new();
    for n in 0..PIECES {
        t.piece(0, false, 1, n * 16, true, &[1; 8]).unwrap();
    }
    assert_eq!(t.piece(0, false, 1, PIECES * 16, true, &[1; 8]), Err(DropReason::FragmentLimit));
}

proptest! {
    #[test]
    fn whatever_the_order_and_the_repeats_the_bytes_are_those_that_were_cut(
        v6 in any::<bool>(),
        len in 9usize..20_000,
        size in 1usize..180,
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let size = size * 8;
        let mut pieces: Vec<usize> = (0..len).step_by(size).collect();
        prop_assume!(pieces.len() > 1);
        for (n, other) in order.iter().enumerate() {
            let (a, b) = (n % pieces.len(), other.index(pieces.len()));
            pieces.swap(a, b);
        }
        // The first comes twice.
        pieces.insert(1, pieces[0]);
        let mut t = Table::new();
        let (mut whole, mut refused) = (None, 0);
        for at in &pieces {
            let end = (at + size).min(len);
            match t.piece(0, v6, 9, *at, end < len, &bytes[*at..end]) {
                Ok(done) => whole = whole.or(done),
                Err(DropReason::FragmentLimit) => refused += 1,
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
        if refused == 0 {
            prop_assert_eq!(carried(&whole.unwrap()), bytes);
        }
    }
}
