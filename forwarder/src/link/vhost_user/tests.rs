//! What a guest and its VMM see, over real sockets, eventfds and shared memory.

mod lab;

use portway_netstack::{PartialChecksum, SegmentKind, Segments};
use proptest::prelude::*;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use self::lab::{ALL, BUFFERS, GUEST, Lab, Piece, REGION, SIZE, talk};
use super::*;

/// A segment that stands for many.
const SUPER: Offload = Offload {
    checksum: Some(PartialChecksum { start: 34, offset: 16 }),
    segments: Some(Segments { kind: SegmentKind::Tcp4, size: 1460, headers: 66 }),
};

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

/// Bytes cut into pieces of the given sizes, the last one taking the rest, each somewhere else in memory.
fn cut(start: u64, len: usize, sizes: &[usize], writable: bool) -> Vec<Piece> {
    let (mut pieces, mut left, mut at) = (Vec::new(), len, start);
    for size in sizes.iter().copied().chain([len]) {
        let n = size.min(left);
        pieces.push((at, u32::try_from(n).unwrap(), writable));
        left -= n;
        at += n as u64 + 7;
        if left == 0 {
            break;
        }
    }
    pieces
}

/// Writes `bytes` where the pieces are.
fn scatter(lab: &Lab, pieces: &[Piece], bytes: &[u8]) {
    let mut done = 0;
    for (address, len, _) in pieces {
        lab.put(*address, &bytes[done..done + *len as usize]);
        done += *len as usize;
    }
}

/// The first `len` bytes where the pieces are.
fn gather(lab: &Lab, pieces: &[Piece], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = pieces.iter().flat_map(|(at, len, _)| lab.get(*at, *len as usize)).collect();
    bytes.truncate(len);
    bytes
}

fn with_header(offload: Offload, frame: &[u8]) -> Vec<u8> {
    [&vnet::bytes(offload)[..], frame].concat()
}

#[test]
fn a_frame_of_any_layout_arrives_as_it_was_sent() {
    let mut lab = Lab::new(ALL);
    assert!(lab.link.offloads().tcp);
    let bytes = with_header(SUPER, &pattern(60));
    let layouts: [&[usize]; 5] = [&[], &[12], &[10, 2, 14], &[1; 71], &[0, 12, 0, 0, 20]];
    for sizes in layouts {
        for indirect in [false, true] {
            let pieces = cut(BUFFERS, bytes.len(), sizes, false);
            scatter(&lab, &pieces, &bytes);
            lab.post(1, &pieces, indirect);
            lab.kick(1);
            assert_eq!(lab.received(), [(pattern(60), SUPER)], "{sizes:?} indirect={indirect}");
            assert_eq!(lab.used(1).len(), 1);
        }
    }
    assert_eq!(lab.link.dropped(), (0, 0));
}

#[test]
fn a_frame_across_two_regions_and_one_of_the_largest_size_arrive() {
    let mut lab = Lab::new(ALL);
    for (at, len) in [(GUEST + REGION - 30, 1514), (BUFFERS, LARGEST)] {
        let bytes = with_header(Offload::default(), &pattern(len));
        let pieces = [(at, u32::try_from(bytes.len()).unwrap(), false)];
        scatter(&lab, &pieces, &bytes);
        lab.post(1, &pieces, false);
        lab.kick(1);
        assert_eq!(lab.received(), [(pattern(len), Offload::default())]);
    }
}

/// Posts `n` buffers of `len` bytes each for frames to the guest.
fn post_buffers(lab: &mut Lab, n: u16, len: u32) -> Vec<Piece> {
    let piece = |i: u16| (BUFFERS + u64::from(i) * u64::from(len + 64), len, true);
    let pieces: Vec<Piece> = (0..n).map(piece).collect();
    for piece in &pieces {
        lab.post(0, &[*piece], false);
    }
    lab.kick(0);
    pieces
}

fn send(lab: &mut Lab, frame: &[u8], offload: Offload) -> bool {
    lab.link.frame(frame.len(), offload, |out| out.copy_from_slice(frame)).is_some()
}

#[test]
fn a_large_frame_spreads_over_mergeable_buffers_that_become_used_together() {
    let mut lab = Lab::new(ALL);
    assert!(lab.link.is_blocked());
    let pieces = post_buffers(&mut lab, 100, 1526);
    assert!(lab.link.has_room());
    let frame = pattern(65_000);
    assert!(send(&mut lab, &frame, SUPER));
    assert_eq!(lab.used(0), [], "nothing is shown before the flush");
    lab.link.flush().unwrap();
    let used = lab.used(0);
    let buffers = 65_012usize.div_ceil(1526);
    assert_eq!(used.len(), buffers);
    assert!(used[..buffers - 1].iter().all(|(_, len)| *len == 1526));
    let got = gather(&lab, &pieces, 65_012);
    assert_eq!(got[12..], frame);
    assert_eq!(got[10..12], u16::try_from(buffers).unwrap().to_le_bytes());
    assert_eq!(got[..10], vnet::bytes(SUPER)[..10]);
    assert!(lab.interrupted(0));
    assert_eq!(lab.link.written(), (1, 65_000));
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_chain_or_is_dropped() {
    for features in [feature::VERSION_1 | feature::PROTOCOL, feature::PROTOCOL] {
        let mut lab = Lab::new(features);
        assert!(!lab.link.offloads().tcp);
        let header = if features & feature::VERSION_1 == 0 { 10 } else { 12 };
        // As iPXE posts it: the header in a descriptor of its own.
        let chain = [(BUFFERS, header, true), (BUFFERS + 64, 1514, true)];
        lab.post(0, &chain, false);
        lab.kick(0);
        assert!(lab.link.has_room());
        assert!(!send(&mut lab, &pattern(1515), Offload::default()));
        assert_eq!(lab.link.dropped(), (0, 1));
        assert!(send(&mut lab, &pattern(1514), Offload::default()));
        assert!(lab.link.is_blocked());
        lab.link.flush().unwrap();
        assert_eq!(lab.used(0), [(0, 1514 + header)]);
        assert_eq!(lab.get(BUFFERS + 64, 1514), pattern(1514));
    }
}

#[test]
fn who_waits_for_buffers_is_told_when_they_come() {
    for features in [ALL, ALL & !feature::EVENT_IDX] {
        let mut lab = Lab::new(features);
        assert!(lab.link.is_blocked());
        let chain = lab.chain(0, &[(BUFFERS, 70_000, true)], false);
        assert!(lab.offer(0, chain), "a link that is blocked wants a kick");
        assert!(lab.link.is_blocked());
        lab.kick(0);
        assert!(!lab.link.is_blocked());
        let chain = lab.chain(0, &[(BUFFERS, 70_000, true)], false);
        assert!(!lab.offer(0, chain), "a link that is not blocked wants none");
        assert!(send(&mut lab, &pattern(100), Offload::default()));
        assert!(lab.link.has_room(), "the second buffer is found without a kick");
        assert!(send(&mut lab, &pattern(100), Offload::default()));
        assert!(lab.link.is_blocked());
        lab.link.flush().unwrap();
        let chain = lab.chain(0, &[(BUFFERS, 70_000, true)], false);
        assert!(lab.offer(0, chain));
    }
}

#[test]
fn the_guest_is_notified_once_per_flush_and_only_when_it_wants() {
    let mut lab = Lab::new(ALL);
    post_buffers(&mut lab, 200, 1526);
    for _ in 0..3 {
        assert!(send(&mut lab, &pattern(100), Offload::default()));
    }
    assert!(!lab.interrupted(0));
    lab.link.flush().unwrap();
    assert!(lab.interrupted(0));
    // The driver has not looked at what is used: its used_event lies behind.
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    lab.link.flush().unwrap();
    assert!(!lab.interrupted(0));
    assert_eq!(lab.used(0).len(), 4);
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    lab.link.flush().unwrap();
    assert!(lab.interrupted(0));
}

#[test]
fn without_event_idx_a_flag_asks_for_silence() {
    let mut lab = Lab::new(ALL & !feature::EVENT_IDX);
    post_buffers(&mut lab, 200, 1526);
    for silence in [true, false] {
        lab.set_silence(0, silence);
        assert!(send(&mut lab, &pattern(100), Offload::default()));
        lab.link.flush().unwrap();
        assert_eq!(lab.interrupted(0), !silence);
    }
}

#[test]
fn while_frames_are_read_the_guest_need_not_kick() {
    for features in [ALL, ALL & !feature::EVENT_IDX] {
        let mut lab = Lab::new(features);
        assert!(lab.received().is_empty());
        let bytes = with_header(Offload::default(), &pattern(60));
        lab.put(BUFFERS, &bytes);
        let piece = [(BUFFERS, 72, false)];
        assert!(lab.post(1, &piece, false), "an idle ring wants a kick");
        assert!(!lab.link.wants_receive());
        lab.kick(1);
        for _ in 0..70 {
            lab.post(1, &piece, false);
        }
        let batch = lab.link.receive(|_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!((batch.frames, batch.more), (64, true));
        assert!(!lab.post(1, &piece, false), "a ring in work wants none");
        assert_eq!(lab.received().len(), 71 + 1 - 64);
        assert!(lab.post(1, &piece, false));
    }
}

#[test]
fn news_that_nobody_told_of_are_found_by_looking_again() {
    let mut lab = Lab::new(ALL);
    lab.put(BUFFERS, &with_header(Offload::default(), &pattern(60)));
    assert!(lab.received().is_empty());
    assert_eq!(lab.link.wants_look(), None, "nothing has moved");
    lab.post(1, &[(BUFFERS, 72, false)], false);
    lab.kick(1);
    assert_eq!(lab.received().len(), 1);
    assert!(lab.link.wants_look().is_some());
    // The kicks for these are lost.
    lab.post(1, &[(BUFFERS, 72, false)], false);
    lab.post(0, &[(BUFFERS + 100, 70_000, true)], false);
    lab.link.look_again().unwrap();
    assert!(lab.link.has_room());
    assert_eq!(lab.received().len(), 1);
    assert_eq!(lab.used(1).len(), 2);
    lab.link.look_again().unwrap();
    assert_eq!(lab.link.wants_look(), None, "nothing moves any more, and the process can sleep");
}

#[test]
fn a_guest_that_waits_for_what_it_could_have_is_told_again() {
    let mut lab = Lab::new(ALL);
    lab.wants_interrupts = false;
    post_buffers(&mut lab, 200, 1526);
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    lab.link.flush().unwrap();
    assert!(lab.interrupted(0), "the first time");
    lab.used(0);
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    lab.link.flush().unwrap();
    assert!(!lab.interrupted(0));
    // Meanwhile the guest has written its wish, too late to be read.
    lab.wish(0, 1);
    lab.link.look_again().unwrap();
    assert!(lab.interrupted(0));
    lab.link.look_again().unwrap();
    assert!(!lab.interrupted(0), "once is enough");
}

#[test]
fn a_pause_is_no_other_device_and_a_reset_is() {
    let mut lab = Lab::new(ALL);
    post_buffers(&mut lab, 100, 1526);
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    let (bases, changes) = lab.stop();
    // One of a hundred buffers is used; those only taken are given back.
    assert_eq!(bases, [1, 0]);
    assert_eq!(lab.used(0).len(), 1, "what was used is shown before the ring stops");
    assert_eq!(changes, Changes { kicks: true, device: false, more: false });
    assert_eq!(lab.link.kick_fds().count(), 0);
    assert!(lab.link.is_blocked() && !lab.link.wants_receive());
    assert!(!send(&mut lab, &pattern(100), Offload::default()));
    let changes = lab.start(bases);
    assert_eq!(changes, Changes { kicks: true, device: false, more: false });
    assert_eq!(lab.link.kick_fds().map(|(queue, _)| queue).collect::<Vec<_>>(), [0, 1]);
    assert!(lab.link.has_room());
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    lab.link.flush().unwrap();
    assert_eq!(lab.used(0), [(1, 112)]);
    lab.stop();
    assert!(lab.start([0, 0]).device);
}

#[test]
fn memory_that_is_shared_again_or_in_slots_does_not_lose_a_buffer() {
    let mut lab = Lab::new(ALL);
    post_buffers(&mut lab, 100, 1526);
    let infos = lab.infos();
    let (said, changes) = talk(&mut lab.link, &mut lab.driver.front, |front| front.set_mem_table(&infos));
    said.unwrap();
    assert_eq!(changes.unwrap(), Changes::default());
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    let (said, changes) = talk(&mut lab.link, &mut lab.driver.front, |front| {
        assert_eq!(front.get_max_mem_slots()?, 32);
        front.remove_mem_region(&infos[1])?;
        front.add_mem_region(&infos[1])
    });
    said.unwrap();
    assert_eq!(changes.unwrap(), Changes::default());
    assert!(send(&mut lab, &pattern(100), Offload::default()));
    lab.link.flush().unwrap();
    assert_eq!(lab.used(0), [(0, 112), (1, 112)]);
}

#[test]
fn a_chain_that_is_no_frame_is_given_back_and_counted() {
    let mut lab = Lab::new(ALL);
    let table = Lab::table(1);
    let mut heads = Vec::new();
    let good = (BUFFERS, 72, false);
    lab.put(BUFFERS, &[0; 100]);
    // Flags: 1 next, 2 write, 4 indirect.
    let mut bad = |lab: &mut Lab, piece, flags, next: Option<u16>| {
        let head = lab.chain(1, &[good], false);
        lab.describe(table, head, piece, flags, next.unwrap_or(head));
        lab.offer(1, head);
        heads.push(head);
    };
    bad(&mut lab, good, 1, None); // points at itself
    bad(&mut lab, (BUFFERS, 0, false), 1, None); // the same, without bytes
    bad(&mut lab, good, 1, Some(SIZE)); // the next one is none
    bad(&mut lab, (BUFFERS, 72, true), 2, None); // ours to write
    bad(&mut lab, (BUFFERS, u32::MAX, false), 0, None);
    bad(&mut lab, (BUFFERS, 65_563, false), 0, None);
    bad(&mut lab, (GUEST - 10, 72, false), 0, None);
    bad(&mut lab, (GUEST + 2 * REGION - 71, 72, false), 0, None);
    bad(&mut lab, (u64::MAX - 5, 72, false), 0, None);
    bad(&mut lab, (BUFFERS, 11, false), 0, None); // less than a header
    bad(&mut lab, (BUFFERS, 12, false), 0, None); // a header and no frame
    bad(&mut lab, (table, 16 * 256, false), 4, None); // a table that has itself
    bad(&mut lab, (BUFFERS, 0, false), 4, None);
    bad(&mut lab, (BUFFERS, 17, false), 4, None);
    bad(&mut lab, (u64::MAX - 31, 32, false), 4, None);
    bad(&mut lab, (BUFFERS, 32, false), 5, None); // a table and a next one
    lab.put(BUFFERS + 200, &[0, 3]);
    bad(&mut lab, (BUFFERS + 200, 72, false), 0, None); // a header nobody negotiated
    let count = heads.len();
    lab.kick(1);
    assert_eq!(lab.received(), []);
    assert_eq!(lab.link.dropped(), (count as u64, 0));
    let used = lab.used(1);
    assert_eq!(used, heads.iter().map(|h| (u32::from(*h), 0)).collect::<Vec<_>>());
    // And the next frame comes.
    lab.post(1, &[good], false);
    lab.kick(1);
    assert_eq!(lab.received().len(), 1);
}

#[test]
fn bad_chains_among_buffers_are_given_back_and_frames_go_around_them() {
    let mut lab = Lab::new(ALL);
    let good = |i: u64| [(BUFFERS + 0x1000 * i, 2000, true)];
    lab.post(0, &[(BUFFERS, 2000, false)], false); // not ours to write
    lab.post(0, &good(1), false);
    lab.post(0, &[(GUEST + 2 * REGION, 2000, true)], false); // outside
    lab.post(0, &good(3), false);
    lab.post(0, &[(BUFFERS, 3, true)], false); // less than a header
    for i in 5..60 {
        lab.post(0, &good(i), false);
    }
    lab.kick(0);
    assert!(send(&mut lab, &pattern(3000), SUPER));
    lab.link.flush().unwrap();
    assert_eq!(lab.used(0), [(0, 0), (2, 0), (1, 2000), (3, 1012), (4, 0)]);
    let mut got = lab.get(good(1)[0].0, 2000);
    got.extend(lab.get(good(3)[0].0, 1012));
    assert_eq!(got[12..], pattern(3000));
    assert_eq!(got[10..12], [2, 0]);
}

#[test]
fn small_buffers_block_no_small_frames() {
    let mut lab = Lab::new(ALL);
    post_buffers(&mut lab, SIZE, 64);
    // 16 KiB in all, never 64: what fits goes, what does not is dropped.
    assert!(lab.link.has_room());
    assert!(send(&mut lab, &pattern(1500), Offload::default()));
    assert!(!send(&mut lab, &pattern(65_000), SUPER));
}

#[test]
fn an_impossible_index_or_head_ends_the_link() {
    for queue in [0, 1] {
        let mut lab = Lab::new(ALL);
        lab.lie_about_index(queue, SIZE + 1);
        lab.kick(queue);
        let ended = if queue == 0 {
            lab.link.flush().err()
        } else {
            lab.link.receive(|_, _| ControlFlow::Continue(())).err()
        };
        assert_eq!(ended.unwrap().to_string(), "the guest offers 257 chains on a ring of 256");
        let mut lab = Lab::new(ALL);
        lab.offer(queue, SIZE);
        lab.kick(queue);
        let ended = if queue == 0 {
            lab.link.flush().err()
        } else {
            lab.link.receive(|_, _| ControlFlow::Continue(())).err()
        };
        assert_eq!(ended.unwrap().to_string(), "the guest offers descriptor 256 on a ring of 256");
    }
}

#[test]
fn what_a_front_end_must_not_ask_ends_the_link_and_says_why() {
    type Say = fn(&mut vhost::vhost_user::Frontend) -> vhost::Result<()>;
    let cases: [(Say, &str); 5] = [
        (|f| f.set_features(1 << 60), "features that were not offered"),
        (|f| f.set_vring_num(0, 100), "a ring of 100 entries"),
        (|f| f.set_vring_num(0, 512), "the size of a ring that runs"),
        (|f| f.set_vring_base(1, 3), "the base of a ring that runs"),
        (
            |f| {
                let mut config = Lab::config(1);
                config.used_ring_addr = 0x1000;
                f.set_vring_addr(1, &config)
            },
            "a ring lies outside of the guest's memory",
        ),
    ];
    for (say, text) in cases {
        let mut lab = Lab::new(ALL);
        let error = talk(&mut lab.link, &mut lab.driver.front, |front| drop(say(front))).1.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_torn_message_waits_for_its_rest_and_frames_go_on() {
    use std::io::{Read, Write};
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut link = VhostUser::new(ours, 1500).unwrap();
    // GET_FEATURES, and SET_VRING_NUM with its 8 bytes.
    let ask: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let set: [u8; 20] = [8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    for part in [&ask[..5], &ask[5..], &set[..12], &set[12..19]] {
        theirs.write_all(part).unwrap();
        assert_eq!(link.handle_control().unwrap(), Changes::default());
    }
    let mut answer = [0; 20];
    theirs.read_exact(&mut answer).unwrap();
    assert_eq!(answer[12..], feature::OFFERED.to_le_bytes());
    drop(theirs);
    assert_eq!(link.handle_control().unwrap_err().to_string(), "end of file in the midst of a message");
}

#[test]
fn a_front_end_that_reads_no_answers_or_announces_too_much_loses_the_link() {
    use std::io::Write;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut link = VhostUser::new(ours, 1500).unwrap();
    let error = (0..100_000).find_map(|_| {
        theirs.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        link.handle_control().err()
    });
    assert_eq!(error.unwrap().to_string(), "the front end asks and does not read the answers");
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut link = VhostUser::new(ours, 1500).unwrap();
    theirs.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 1, 0x10, 0, 0]).unwrap();
    assert!(link.handle_control().is_err());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut link = VhostUser::new(ours, 1500).unwrap();
    drop(theirs);
    assert_eq!(link.handle_control().unwrap_err().to_string(), "end of file");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_survive_every_layout_both_ways(
        frames in prop::collection::vec(
            (14usize..20_000, prop::collection::vec(0usize..3000, 0..12), any::<bool>()), 1..12),
        buffers in prop::collection::vec((prop::collection::vec(1u32..3000, 1..4), any::<bool>()), 1..20),
    ) {
        let mut lab = Lab::new(ALL);
        for (len, sizes, indirect) in &frames {
            let bytes = with_header(SUPER, &pattern(*len));
            let pieces = cut(BUFFERS, bytes.len(), sizes, false);
            scatter(&lab, &pieces, &bytes);
            lab.post(1, &pieces, *indirect);
            lab.kick(1);
            prop_assert_eq!(lab.received(), [(pattern(*len), SUPER)]);
            prop_assert_eq!(lab.used(1).len(), 1);
        }
        // As many chains as the ring has room for, then frames until one does not fit.
        let (mut chains, mut slots, mut at) = (Vec::new(), 0, BUFFERS);
        for (sizes, indirect) in buffers.iter().cycle() {
            slots += if *indirect { 1 } else { sizes.len() };
            if slots > usize::from(SIZE) {
                break;
            }
            let mut pieces = Vec::new();
            for size in sizes {
                pieces.push((at, *size, true));
                at += u64::from(*size) + 5;
            }
            if at > GUEST + 2 * REGION - 10_000 {
                break;
            }
            lab.post(0, &pieces, *indirect);
            chains.push(pieces);
        }
        lab.kick(0);
        prop_assume!(lab.link.has_room());
        let (mut sent, mut used) = (0, 0);
        for (len, ..) in frames.iter().cycle().take(200) {
            let frame = pattern(*len);
            if !lab.link.has_room() || !send(&mut lab, &frame, SUPER) {
                break;
            }
            sent += 1;
            lab.link.flush().unwrap();
            let entries = lab.used(0);
            let taken: Vec<_> = entries.iter().filter(|(_, len)| *len > 0).collect();
            let mut got = Vec::new();
            let mut which = Vec::new();
            for (i, pieces) in chains.iter().enumerate().skip(used).take(entries.len()) {
                let total: u32 = pieces.iter().map(|p| p.1).sum();
                if total >= 12 {
                    which.push(i);
                }
            }
            prop_assert!(which.len() >= taken.len());
            for (i, (_, len)) in which.iter().zip(&taken) {
                got.extend(gather(&lab, &chains[*i], *len as usize));
            }
            prop_assert_eq!(&got[12..], &frame[..]);
            prop_assert_eq!(usize::from(u16::from_le_bytes([got[10], got[11]])), taken.len());
            used += entries.len();
        }
        prop_assert_eq!(lab.link.written().0, sent);
    }

    #[test]
    fn no_bytes_in_the_rings_do_more_than_end_the_link(
        bytes in prop::collection::vec(any::<u8>(), 4096), seed in any::<u64>(), index in any::<u16>(), queue in 0usize..2,
    ) {
        let mut lab = Lab::new(ALL);
        // Descriptors and heads of noise, with addresses that are in memory half of the time.
        for i in 0..SIZE {
            let b = &bytes[usize::from(i) * 16..][..16];
            let address = if b[0] & 1 == 0 { BUFFERS + u64::from(b[1]) * 300 } else { seed.rotate_left(u32::from(b[2])) };
            let len = if b[3] & 3 == 0 { u32::from_le_bytes([b[4], b[5], b[6], b[7]]) } else { u32::from(b[4]) * 8 };
            let flags = u16::from(b[8] & 7);
            lab.describe(Lab::table(queue), i, (address, len, false), flags, u16::from(b[9]));
            let head = u16::from(b[10]);
            lab.offer(queue, head);
        }
        lab.kick(queue);
        for _ in 0..20 {
            if lab.link.receive(|_, _| ControlFlow::Continue(())).is_err() || lab.link.flush().is_err() {
                return Ok(());
            }
            while lab.link.has_room() {
                if !send(&mut lab, &pattern(usize::from(bytes[0]) * 100), Offload::default()) {
                    break;
                }
            }
        }
        lab.lie_about_index(queue, index);
        lab.kick(queue);
        let _ = (lab.link.receive(|_, _| ControlFlow::Continue(())), lab.link.flush());
    }
}
