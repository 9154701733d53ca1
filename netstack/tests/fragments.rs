//! Fragments through the whole stack; the rules of putting them together are tested beside the code.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use lab::{Lab, Seen, addr, mac_of, secs};
use portway_netstack::{DropReason, Handled};

/// The frame of a datagram, cut into frames whose packets are at most `mtu` bytes long.
fn cut(frame: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let v6 = frame[12..14] == [0x86, 0xdd];
    let header = if v6 { 40 } else { 20 };
    let (head, body) = frame.split_at(14 + header);
    let room = (mtu - header - if v6 { 8 } else { 0 }) & !7;
    let last = body.chunks(room).count() - 1;
    let piece = |(n, chunk): (usize, &[u8])| {
        let (mut out, more) = (head.to_vec(), u16::from(n < last));
        let offset = u16::try_from(n * room).unwrap();
        if v6 {
            out[18..20].copy_from_slice(&u16::try_from(8 + chunk.len()).unwrap().to_be_bytes());
            let next = std::mem::replace(&mut out[14 + 6], 44);
            out.extend([next, 0]);
            out.extend((offset | more).to_be_bytes());
            out.extend([0, 0, 0, 9]);
        } else {
            out[16..18].copy_from_slice(&u16::try_from(20 + chunk.len()).unwrap().to_be_bytes());
            out[18..20].copy_from_slice(&[0, 9]);
            out[20..22].copy_from_slice(&((offset / 8) | (more << 13)).to_be_bytes());
            out[24..26].fill(0);
            let sum = portway_netstack::wire::checksum(&[&out[14..34]]).to_be_bytes();
            out[24..26].copy_from_slice(&sum);
        }
        out.extend(chunk);
        out
    };
    body.chunks(room).enumerate().map(piece).collect()
}

/// The frame of a datagram that is as large as one can be.
fn large(from: &str, to: &str, len: usize) -> Vec<u8> {
    let (from, to) = (addr(from), addr(to));
    let mut frame = Vec::new();
    let payload: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let b = lab::ip(mac_of(0), from.ip(), to.ip(), 64).udp(from.port(), to.port());
    b.write(&mut frame, &payload).unwrap();
    frame
}

const V4: (&str, &str) = ("192.168.127.2:5000", "192.0.2.7:9000");
const V6: (&str, &str) = ("[fd00:77::2]:5000", "[2001:db8::7]:9000");

#[test]
fn a_datagram_of_64_kib_in_fragments_goes_out_whole() {
    for ((from, to), most) in [(V4, 65_507), (V6, 65_519)] {
        let mut lab = Lab::new();
        let pieces = cut(&large(from, to, most), 1500);
        let (last, first) = pieces.split_last().unwrap();
        for piece in first {
            assert_eq!(lab.frame(0, piece), Handled::Done);
        }
        let Handled::Whole(whole) = lab.frame(0, last) else { panic!("not whole") };
        let Handled::Datagram(d) = lab.frame(0, &whole) else { panic!("no datagram") };
        assert_eq!(
            (d.payload.len(), d.payload[1000], d.remote),
            (most, u8::try_from(1000 % 251).unwrap(), addr(to))
        );
        // One who fragments may be fragmented further on.
        assert!(!d.dont_fragment);
    }
}

#[test]
fn a_large_echo_to_the_gateway_comes_back_in_fragments() {
    let mut lab = Lab::new();
    let mut frame = Vec::new();
    let b = lab::ip(mac_of(0), [192, 168, 127, 2].into(), [192, 168, 127, 1].into(), 64);
    b.icmpv4_echo_request(7, 1).write(&mut frame, &[7; 5000]).unwrap();
    let mut whole = Vec::new();
    for piece in cut(&frame, 1500) {
        if let Handled::Whole(w) = lab.frame(0, &piece) {
            whole = w;
        }
    }
    lab.frame(0, &whole);
    let lens = lab
        .guest_sees()
        .iter()
        .map(|s| if let Seen::Fragment { len, .. } = s { *len } else { 0 })
        .sum::<usize>();
    assert_eq!(lens, 5008);
}

#[test]
fn rfc_792_and_rfc_8200_4_5_missing_fragments_are_told_when_the_first_came() {
    for ((from, to), kind) in [(V4, 11), (V6, 3)] {
        let mut lab = Lab::new();
        let pieces = cut(&large(from, to, 3000), 1500);
        lab.frame(0, &pieces[0]);
        lab.after(secs(29));
        assert_eq!(lab.guest_sees(), []);
        lab.after(secs(2));
        let seen = lab.guest_sees();
        assert!(matches!(&seen[..], [Seen::Icmp { kind: k, code: 1, .. }] if *k == kind), "{seen:?}");
        lab.frame(0, &pieces[1]);
        lab.after(secs(31));
        assert_eq!((lab.guest_sees(), lab.dropped(DropReason::FragmentTimeout)), (vec![], 2));
    }
}

#[test]
fn a_fragment_from_an_address_that_is_not_the_guests_is_dropped() {
    let mut lab = Lab::new();
    for piece in cut(&large("10.9.9.9:5000", V4.1, 3000), 1500) {
        assert_eq!(lab.frame(0, &piece), Handled::Done);
    }
    for piece in cut(&large("[2001:db8::1]:5000", V6.1, 3000), 1500) {
        assert_eq!(lab.frame(0, &piece), Handled::Done);
    }
    assert_eq!(lab.dropped(DropReason::SourceSpoofed), 6);
}
