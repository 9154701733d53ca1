//! What holds for the packets of a link, whichever system calls carry them.

use super::*;

fn frames(packets: &mut Packets<impl Calls>) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    packets.note(true, false, false);
    while packets.receive(|f| got.push(f.to_vec())).unwrap().more {}
    got
}

fn send(packets: &mut Packets<impl Calls>, len: usize, byte: u8) -> Option<()> {
    packets.frame(len, Offload::default(), |f| f.fill(byte))
}

fn named(dir: &Path, name: &str) -> UnixDatagram {
    UnixDatagram::bind(dir.join(name)).unwrap()
}

fn the_first_sender_with_a_name_is_the_peer_until_it_is_gone<C: Calls>() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("link");
    let mut packets = Packets::<C>::bound(&path).unwrap();
    let (first, second) = (named(dir.path(), "first"), named(dir.path(), "second"));
    let nameless = UnixDatagram::unbound().unwrap();
    nameless.send_to(&[9; 60], &path).unwrap();
    assert_eq!(frames(&mut packets), Vec::<Vec<u8>>::new());
    first.send_to(b"VFKT", &path).unwrap();
    first.send_to(&[1; 60], &path).unwrap();
    second.send_to(&[2; 60], &path).unwrap();
    assert_eq!(frames(&mut packets), [vec![1; 60]]);
    assert_eq!(packets.ignored(), 2);

    send(&mut packets, 60, 7).unwrap();
    packets.flush().unwrap();
    let mut buffer = [0; 100];
    assert_eq!((first.recv(&mut buffer).unwrap(), buffer[0]), (60, 7));

    drop(first);
    send(&mut packets, 60, 8).unwrap();
    packets.flush().unwrap();
    second.send_to(&[2; 60], &path).unwrap();
    assert_eq!(frames(&mut packets), [vec![2; 60]]);
    send(&mut packets, 60, 9).unwrap();
    packets.flush().unwrap();
    assert_eq!((second.recv(&mut buffer).unwrap(), buffer[0]), (60, 9));

    // It goes, and nothing was on its way to it: the next is heard all the same, from its second frame on.
    drop(second);
    let third = named(dir.path(), "third");
    for byte in [3, 4] {
        third.send_to(&[byte; 60], &path).unwrap();
        packets.note(true, false, false);
        assert_eq!(frames(&mut packets).len(), usize::from(byte == 4));
        assert_eq!(packets.take_lost(), byte == 3);
    }
    drop(packets);
    assert!(!path.exists());
}

fn a_peer_that_does_not_read_makes_the_stack_wait_and_loses_nothing<C: Calls>() {
    for kind in [socket2::Type::DGRAM, socket2::Type::SEQPACKET] {
        let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, kind, None).unwrap();
        let mut packets = Packets::<C>::connected(ours.into(), kind).unwrap();
        let mut sent = 0u64;
        while !packets.is_blocked() || packets.has_room() {
            send(&mut packets, 60_000, u8::try_from(sent % 251).unwrap()).unwrap();
            sent += 1;
            packets.flush().unwrap();
        }
        let mut theirs = std::fs::File::from(OwnedFd::from(theirs));
        let mut buffer = vec![0; 70_000];
        for n in 0..sent {
            let len = io::Read::read(&mut theirs, &mut buffer).unwrap();
            assert_eq!((len, u64::from(buffer[0])), (60_000, n % 251));
            packets.note(false, true, false);
            packets.flush().unwrap();
        }
    }
}

fn the_end_of_a_seqpacket_peer_is_an_error_and_too_long_a_frame_is_ignored<C: Calls>() {
    let kind = socket2::Type::SEQPACKET;
    let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, kind, None).unwrap();
    let mut packets = Packets::<C>::connected(ours.into(), kind).unwrap();
    theirs.send(&[1; LARGEST]).unwrap();
    theirs.send(&[1; LARGEST + 1]).unwrap();
    assert_eq!(frames(&mut packets), [vec![1; LARGEST]]);
    assert_eq!(packets.ignored(), 1);
    drop(theirs);
    packets.note(true, false, false);
    assert!(packets.receive(|_| panic!()).is_err());
    let (stream, _keep) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(Packets::<C>::connected(stream.into(), kind).is_err());
}

fn frames_stay_apart_and_in_order<C: Calls>(sizes: &[usize]) {
    let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, socket2::Type::DGRAM, None).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut packets = Packets::<C>::connected(ours.into(), socket2::Type::DGRAM).unwrap();
    let mut theirs = std::fs::File::from(OwnedFd::from(theirs));
    let (mut buffer, mut got) = (vec![0; 70_000], Vec::new());
    let mut queue = sizes.to_vec();
    queue.reverse();
    while got.len() < sizes.len() {
        while packets.has_room()
            && let Some(len) = queue.pop()
        {
            send(&mut packets, len, 1).unwrap();
        }
        packets.note(false, true, false);
        packets.flush().unwrap();
        while let Ok(n) = io::Read::read(&mut theirs, &mut buffer) {
            got.push(n);
        }
    }
    assert_eq!(got, sizes);
}

/// The tests of this file with one kind of calls.
macro_rules! with {
    ($name:ident, $calls:ty) => {
        mod $name {
            #[test]
            fn the_first_sender_with_a_name_is_the_peer_until_it_is_gone() {
                super::the_first_sender_with_a_name_is_the_peer_until_it_is_gone::<$calls>();
            }

            #[test]
            fn a_peer_that_does_not_read_makes_the_stack_wait_and_loses_nothing() {
                super::a_peer_that_does_not_read_makes_the_stack_wait_and_loses_nothing::<$calls>();
            }

            #[test]
            fn the_end_of_a_seqpacket_peer_is_an_error_and_too_long_a_frame_is_ignored() {
                super::the_end_of_a_seqpacket_peer_is_an_error_and_too_long_a_frame_is_ignored::<$calls>();
            }

            proptest::proptest! {
                #[test]
                fn frames_stay_apart_and_in_order(sizes in proptest::collection::vec(14usize..65_551, 1..40)) {
                    super::frames_stay_apart_and_in_order::<$calls>(&sizes);
                }
            }
        }
    };
}

#[cfg(target_os = "linux")]
with!(batched, super::super::batched::Batched);
with!(single, super::super::single::Single);
