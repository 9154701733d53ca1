//! TCP toward a guest that takes segments and checksums unfinished (`VIRTIO_NET_F_GUEST_TSO4`, `_TSO6`, `_CSUM`).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod lab;

use lab::{Lab, Seen, Unfinished, mac_of, segment, syn};
use portway_netstack::{HostEvent, Offloads, SegmentKind, segments, wire};

/// Guest and destination of either version, and what the IP and TCP headers of a segment have together.
const ENDS: [(&str, &str, SegmentKind, u16); 2] = [
    ("192.168.127.2:40000", "203.0.113.7:443", SegmentKind::Tcp4, 40),
    ("[fd00:77::2]:40000", "[2001:db8::7]:443", SegmentKind::Tcp6, 60),
];
const MTU: u16 = 1500;
const BYTES: usize = 40_000;

fn transmit(lab: &mut Lab) -> Unfinished {
    let mut link = Unfinished::default();
    while lab.stack.poll_transmit(lab.now, lab.ports[0], &mut link) {}
    link
}

/// What a guest that told `mss` is sent: the MSS it is told, and the frames of [`BYTES`] bytes.
fn sent(from: &str, to: &str, mss: Option<u16>) -> (Lab, Option<u16>, Unfinished) {
    let mut lab = Lab::new();
    let port = lab.ports[0];
    lab.stack.set_offloads(lab.now, port, Offloads { tcp: true, udp: false });
    let opening = lab::Segment { mss, ..syn(from, to) };
    lab.stack.handle_frame(lab.now, port, &opening.frame(mac_of(0)));
    let flow = lab.connect();
    lab.stack.handle_host(lab.now, HostEvent::Connected { flow });
    let answer = transmit(&mut lab).0.remove(0).0;
    let header = wire::transport(&answer[14..]);
    let told = wire::tcp::mss(header);
    let isn = wire::tcp::parse(header).unwrap().seq.0;
    lab.stack.handle_frame(lab.now, port, &segment("A", from, to, 1001, isn + 1).frame(mac_of(0)));
    let put = lab.stack.from_host(lab.now, flow, |space| {
        space[..BYTES].fill(7);
        BYTES
    });
    assert_eq!(put, Some(BYTES));
    let link = transmit(&mut lab);
    (lab, told, link)
}

#[test]
fn a_burst_of_either_version_leaves_as_one_frame_with_the_size_its_segments_are_to_have() {
    for (from, to, kind, headers) in ENDS {
        let (mut lab, told, link) = sent(from, to, Some(MTU - headers));
        assert_eq!(told, Some(MTU - headers), "what the guest may send fits the link");
        let [(frame, offload)] = &link.0[..] else { panic!("{} frames", link.0.len()) };
        let cut = offload.segments.unwrap();
        assert_eq!((cut.kind, cut.size), (kind, MTU - headers));
        let offload = segments::checked(frame, *offload).unwrap();
        segments::whole(frame, offload, &mut lab.wires[0]).unwrap();
        assert!(lab.wires[0].frames.iter().all(|f| f.len() <= usize::from(MTU) + 14));
        // The Lab checks every sum.
        let payload: usize = lab
            .guest_sees()
            .iter()
            .map(|s| if let Seen::Tcp { payload, .. } = s { payload.len() } else { 0 })
            .sum();
        assert_eq!(payload, BYTES);
    }
}

#[test]
fn the_guests_own_mss_is_kept_to_where_it_is_smaller_and_the_links_where_it_is_larger() {
    for (from, to, _, headers) in ENDS {
        let everybody = if headers == 60 { 1220 } else { 536 };
        for (told, kept) in [(Some(1000), 1000), (Some(9000), MTU - headers), (None, everybody)] {
            let (_, _, link) = sent(from, to, told);
            assert_eq!(link.0[0].1.segments.unwrap().size, kept, "{told:?} {from}");
        }
    }
}

#[test]
fn a_guest_that_tells_an_mss_of_nothing_gets_segments_of_some_size() {
    for (from, to, ..) in ENDS {
        for mss in [0, 1] {
            let (_, _, link) = sent(from, to, Some(mss));
            assert!(link.0.iter().all(|(_, o)| o.segments.is_none_or(|s| s.size >= 1)), "{mss} {from}");
        }
    }
}
