//! What ended, wedged or leaked in other programs of this kind, done to the real `portway serve` over its sockets, with a
//! second guest that is served before, during and after: other kinds of links, and what guests of gvproxy see. docs/security.md has
//! the table.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::attack::{ALIAS, GROWTH, Lab, ROUTER, query};
use portway_tests::guest::Guest;
use portway_tests::raw::{checksum, ethernet, ipv4, udp};
use portway_tests::sidecar::until;
use portway_tests::vhost::{Card, Descriptor, FROM_GUEST, INDIRECT, MEMORY, NEXT, TO_GUEST, WRITE, request};

/// An ARP request for the gateway, to everybody.
fn who_has_the_gateway(mac: [u8; 6], last: u8) -> Vec<u8> {
    let mut frame =
        [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &[192, 168, 127, last]].concat();
    frame.extend([0; 6]);
    frame.extend(ROUTER.octets());
    frame
}

fn is_the_answer(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6])
        && frame.get(20..22) == Some(&[0, 2])
        && frame.get(28..32) == Some(&ROUTER.octets())
}

// ---- links ----

/// A card's guest asks for the gateway, and is answered.
fn card_is_served(card: &mut Card) -> Result<()> {
    card.send(&who_has_the_gateway([2, 0, 0, 0, 2, 1], 88))?;
    until(Duration::from_secs(10), || card.frames().is_ok_and(|all| all.iter().any(|f| is_the_answer(f))))
        .context("no answer over vhost-user")
}

#[test]
fn ipxes_descriptors_carry_frames_and_nonsense_in_a_ring_ends_that_session_at_most() -> Result<()> {
    // passt 2025-05-03: iPXE posts header and buffer as two descriptors, and the back end aborts.
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("card");
    let mut lab = Lab::in_dir(dir, &["--link", &format!("vhost-user:unix:{},name=card", path.display())])?;
    let buffer = 0x4_0000;
    let from: Vec<(Vec<Descriptor>, u16, u16)> = vec![
        (vec![(MEMORY, 100, 0, 0)], 0, 1),
        (vec![(MEMORY - 10, 100, 0, 0)], 0, 1),
        (vec![(u64::MAX - 10, 100, 0, 0)], 0, 1),
        (vec![(buffer, u32::MAX, 0, 0)], 0, 1),
        (vec![(buffer, 12, NEXT, 0)], 0, 1),
        (vec![(buffer, 12, NEXT, 1), (buffer, 12, NEXT, 0)], 0, 1),
        (vec![(buffer, 12, NEXT, 0xffff)], 0, 1),
        (vec![(buffer, 16, INDIRECT, 0)], 0, 1),
        (vec![(buffer, 7, INDIRECT, 0)], 0, 1),
        (vec![(buffer, 0, INDIRECT | NEXT, 0)], 0, 1),
        (vec![(buffer, 100, WRITE, 0)], 0, 1),
        (vec![(buffer, 5, 0, 0)], 0, 1),
        (vec![(buffer, 0, 0, 0)], 0, 1),
        (vec![(buffer, 0x10_0000, 0, 0)], 0, 1),
        (vec![(buffer, 12, 0xffff, 0)], 0, 1),
        (vec![], 0xffff, 1),
        (vec![], 0, 0x8000),
        (vec![], 0, 17),
    ];
    for (chain, head, ahead) in &from {
        let mut card = Card::start(&path)?;
        card_is_served(&mut card)?;
        card.describe(FROM_GUEST, 0, chain)?;
        card.post(FROM_GUEST, *head, *ahead)?;
        lab.bystander_is_served().with_context(|| format!("{chain:x?} {head} {ahead}"))?;
    }
    // The same for what the device is to write; a broadcast of the attacker makes it try.
    let to: [[Descriptor; 1]; 6] = [
        [(buffer, 100, 0, 0)],
        [(MEMORY, 1600, WRITE, 0)],
        [(u64::MAX - 10, 1600, WRITE, 0)],
        [(buffer, 12, WRITE | NEXT, 0)],
        [(buffer, 0, WRITE, 0)],
        [(buffer, 5, WRITE, 0)],
    ];
    for chain in &to {
        let mut card = Card::start(&path)?;
        card_is_served(&mut card)?;
        // Whichever chain comes next, it is one of these.
        for head in (0..16).step_by(2) {
            card.describe(TO_GUEST, head, chain)?;
        }
        let mac = lab.attacker.mac;
        for _ in 0..20 {
            lab.attacker.frame(&who_has_the_gateway(mac, 77))?;
        }
        lab.bystander_is_served().with_context(|| format!("to guest: {chain:x?}"))?;
    }
    let mut card = Card::start(&path)?;
    card_is_served(&mut card)?;
    lab.everybody_is_served()
}

#[test]
fn messages_no_front_end_sends_end_that_session_alone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("card");
    let mut lab = Lab::in_dir(dir, &["--link", &format!("vhost-user:unix:{},name=card", path.display())])?;
    // Bytes: nothing, half a header, noise, a size no message has, one that never comes.
    let head = |request: u32, size: u32| -> Vec<u8> {
        [request, 1, size].iter().flat_map(|w| w.to_ne_bytes()).collect()
    };
    for bytes in [
        vec![],
        head(1, 0)[..5].to_vec(),
        vec![0xff; 200],
        vec![0; 200],
        head(request::SET_FEATURES, u32::MAX),
        head(request::SET_FEATURES, 8),
        head(0xffff, 0),
        [head(request::SET_FEATURES, 8), vec![0xff; 8]].concat(),
        [head(request::SET_MEM_TABLE, 8), vec![0xff; 8]].concat(),
    ] {
        let mut card = Card::connect(&path)?;
        // It may have been closed already, which is an answer too.
        let _ = card.socket.write_all(&bytes);
        lab.bystander_is_served().with_context(|| format!("{bytes:x?}"))?;
    }
    // A good beginning, and then rings that cannot be.
    let places = |words: [u64; 4]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    let pair = |ring: u32, value: u32| [ring.to_ne_bytes(), value.to_ne_bytes()].concat();
    for (request, payload) in [
        (request::SET_VRING_NUM, pair(0, 0)),
        (request::SET_VRING_NUM, pair(0, 3)),
        (request::SET_VRING_NUM, pair(0, u32::MAX)),
        (request::SET_VRING_NUM, pair(200, 16)),
        (request::SET_VRING_BASE, pair(0, u32::MAX)),
        (request::SET_VRING_ADDR, [pair(0, 0), places([0; 4])].concat()),
        (request::SET_VRING_ADDR, [pair(0, 0), places([u64::MAX; 4])].concat()),
        (request::SET_VRING_ADDR, [pair(0, 0), places([0x7000_0000_0000 + MEMORY - 1; 4])].concat()),
        (request::SET_VRING_KICK, u64::MAX.to_ne_bytes().to_vec()),
        (request::SET_VRING_CALL, 7u64.to_ne_bytes().to_vec()),
        (request::SET_VRING_ENABLE, pair(99, 1)),
        (request::SET_VRING_ENABLE, pair(0, 7)),
        (request::SET_MEM_TABLE, [pair(200, 0), places([0; 4])].concat()),
        (request::SET_MEM_TABLE, [pair(1, 0), places([0, u64::MAX, 0, 0])].concat()),
    ] {
        let mut card = Card::connect(&path)?;
        card.negotiate()?;
        let _ = card.say(request, &payload, None);
        lab.bystander_is_served().with_context(|| format!("request {request}: {payload:x?}"))?;
        drop(card);
        let mut next = Card::start(&path)?;
        card_is_served(&mut next).with_context(|| format!("after request {request}: {payload:x?}"))?;
    }
    lab.everybody_is_served()
}

#[test]
fn a_datagram_link_hears_its_peer_alone_and_survives_one_that_does_not_read() -> Result<()> {
    // gvproxy (vfkit): a sender without a name ends the process, frames of any sender are taken, ENOBUFS is tried for ever.
    let dir = tempfile::tempdir()?;
    let (path, names) = (dir.path().join("gram"), dir.path().to_owned());
    let mut lab = Lab::in_dir(dir, &["--link", &format!("dgram:unix:{},name=gram", path.display())])?;
    let asks = |socket: &UnixDatagram, last: u8| -> Result<bool> {
        socket.send(&who_has_the_gateway([2, 0, 0, 0, 3, last], last))?;
        let mut frame = [0; 2000];
        loop {
            match socket.recv(&mut frame) {
                Ok(n) if is_the_answer(&frame[..n]) => return Ok(true),
                Ok(_) => {}
                Err(_) => return Ok(false),
            }
        }
    };
    let named = |name: &str| -> Result<UnixDatagram> {
        let socket = UnixDatagram::bind(names.join(name))?;
        socket.connect(&path)?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        Ok(socket)
    };
    let nameless = UnixDatagram::unbound()?;
    nameless.connect(&path)?;
    for len in [0, 1, 4, 13, 14, 60, 9000] {
        nameless.send(&vec![0xff; len])?;
    }
    lab.bystander_is_served()?;
    let first = named("first")?;
    first.send(b"VFKT")?;
    ensure!(asks(&first, 60)?, "the first sender with a name is the peer");
    let second = named("second-peer")?;
    second.set_read_timeout(Some(Duration::from_millis(200)))?;
    ensure!(!asks(&second, 61)?, "another is not heard while the first lives");
    for len in [0, 1, 4, 13, 14, 60, 9000] {
        first.send(&vec![0xff; len])?;
    }
    ensure!(asks(&first, 60)?);
    // The peer reads nothing, and everybody's broadcasts are for it too.
    let mac = lab.attacker.mac;
    for n in 0..5000 {
        lab.attacker.frame(&who_has_the_gateway(mac, 77))?;
        if n % 2500 == 0 {
            lab.bystander_is_served()?;
        }
    }
    ensure!(asks(&first, 60)?, "it reads again");
    drop(first);
    std::fs::remove_file(names.join("first"))?;
    second.set_read_timeout(Some(Duration::from_secs(2)))?;
    until(Duration::from_secs(5), || asks(&second, 61).unwrap_or(false)).context("the next takes over")?;
    lab.everybody_is_served()
}

#[test]
fn a_vpnkit_client_that_says_nonsense_is_gone_and_the_next_is_served() -> Result<()> {
    // gvproxy echoes any 49 bytes, and goes on with a connection whose handshake failed.
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("vpnkit");
    let mut lab = Lab::in_dir(dir, &["--link", &format!("vpnkit:unix:{},name=many", path.display())])?;
    let hello = [&b"VMN3T"[..], &22_u32.to_le_bytes(), &[b'0'; 40]].concat();
    let uuid = b"d7a1e0c6-8a5c-4b6e-9f0e-0000000000aa";
    let command = |n: u8, uuid: &[u8]| [&hello[..], &[n], uuid, &[0; 4]].concat();
    let mut waiting = Vec::new();
    for (bytes, is_over) in [
        (vec![0; 49], true),
        (vec![0xff; 200], true),
        (b"GET /services/forwarder/all HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n".to_vec(), true),
        (command(0, uuid), true),
        (command(200, uuid), true),
        (hello[..20].to_vec(), false),
        (hello.clone(), false),
        (command(1, uuid)[..70].to_vec(), false),
    ] {
        let mut client = UnixStream::connect(&path)?;
        client.set_read_timeout(Some(Duration::from_secs(10)))?;
        client.write_all(&bytes)?;
        lab.bystander_is_served().with_context(|| format!("{bytes:x?}"))?;
        if is_over {
            // Perhaps it is told why; and then it is over.
            let mut answer = Vec::new();
            let ended = client.read_to_end(&mut answer);
            ensure!(ended.is_ok(), "{bytes:x?}: {ended:?}, {answer:x?}");
            ensure!(answer.get(49) != Some(&1), "{bytes:x?} was taken for a handshake");
        } else {
            waiting.push(client);
        }
    }
    let mut guest = Guest::attach_vpnkit(&path, uuid)?;
    guest.dhcp()?;
    let flow = guest.connect((ALIAS, lab.echo).into())?.context("refused")?;
    ensure!(guest.exchange(flow, b"vpnkit", 6)? == b"vpnkit");
    drop(waiting);
    lab.everybody_is_served()?;
    ensure!(guest.exchange(flow, b"still", 5)? == b"still");
    Ok(())
}

#[test]
fn a_flood_of_ethernet_addresses_is_bounded_and_nobodys_place_is_taken() -> Result<()> {
    // gvproxy learns any address, for ever, the gateway's own included.
    let mut lab = Lab::new(&[])?;
    lab.everybody_is_served()?;
    let before = lab.rss()?;
    for n in 0..20_000u16 {
        let [a, b] = n.to_be_bytes();
        lab.attacker.frame(&who_has_the_gateway([2, 7, 7, 7, a, b], 78))?;
        if n % 5000 == 0 {
            lab.bystander_is_served()?;
        }
    }
    // The bystander's own address, as the source of another's frames.
    for _ in 0..1000 {
        lab.attacker.frame(&who_has_the_gateway([0x52, 0x54, 0, 0, 0, 9], 9))?;
    }
    lab.bystander_is_served()?;
    ensure!(lab.stat(&["drops", "mac_limit"])? > 0, "{}", lab.sidecar.json(&["stats"])?);
    let after = lab.rss()?;
    ensure!(after < before + GROWTH, "{before} bytes became {after}");
    lab.everybody_is_served()
}

// ---- fragments ----

#[test]
fn a_datagram_in_pieces_arrives_whole_in_any_order_and_one_whose_pieces_overlap_never() -> Result<()> {
    // libslirp 4.8.0 (which is the last fragment), CVE-2019-14378, CVE-2019-15890, CVE-2020-1983.
    let mut lab = Lab::new(&[])?;
    let sink = UdpSocket::bind("127.0.0.1:0")?;
    sink.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (ip, to) = (lab.attacker.ip, SocketAddrV4::new(ALIAS, sink.local_addr()?.port()));
    let send = |lab: &mut Lab, id: u16, pieces: &[(u16, bool, &[u8])]| -> Result<()> {
        for (at, more, bytes) in pieces {
            let mut packet = ipv4(ip, ALIAS, 17, (at / 8) | (u16::from(*more) << 13), bytes);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum(&[&packet[..20]]);
            packet[10..12].copy_from_slice(&sum);
            lab.attacker.packet(&packet)?;
        }
        Ok(())
    };
    let bytes: Vec<u8> = (0..3000u16).map(|n| n.to_be_bytes()[1] ^ 0x5a).collect();
    let datagram = udp(SocketAddrV4::new(ip, 900), to, &bytes)[20..].to_vec();
    let part = |from: usize, end: usize| -> (u16, bool, &[u8]) {
        (u16::try_from(from).unwrap_or(0), end < datagram.len(), &datagram[from..end])
    };
    let end = datagram.len();
    let orders: [Vec<(u16, bool, &[u8])>; 4] = [
        vec![part(0, 1480), part(1480, end)],
        vec![part(2400, end), part(0, 800), part(800, 2400)],
        vec![part(800, 1600), part(800, 1600), part(0, 800), part(1600, end)],
        (0..=end / 8).map(|n| part(n * 8, (n * 8 + 8).min(end))).filter(|p| !p.2.is_empty()).collect(),
    ];
    for (id, pieces) in (1..).zip(&orders) {
        send(&mut lab, id, pieces)?;
        lab.bystander_is_served()?;
        let mut got = [0; 4000];
        let n = sink.recv(&mut got).with_context(|| format!("order {id}"))?;
        ensure!(got[..n] == bytes, "order {id}: {n} bytes");
    }
    // Pieces that overlap with other bytes, that go beyond 64 KiB, whose end moves: nothing of these arrives.
    let other = vec![0xee; 1480];
    for (id, pieces) in (100..).zip([
        vec![part(0, 1480), (736, true, &other[..]), part(1480, end)],
        vec![(736, true, &other[..]), part(0, 1480), part(1480, end)],
        vec![part(0, 1480), (0xfff8, false, &other[..]), part(1480, end)],
        vec![part(0, 1480), (1480, false, &other[..8]), part(1480, end)],
    ]) {
        send(&mut lab, id, &pieces)?;
    }
    lab.everybody_is_served()?;
    // Of the third, whose piece beyond 64 KiB is none, the rest is whole; nothing is a mixture.
    sink.set_nonblocking(true)?;
    let mut got = [0; 4000];
    let mut arrived = 0;
    while let Ok(n) = sink.recv(&mut got) {
        ensure!(got[..n] == bytes, "a mixture of {n} bytes arrived");
        arrived += 1;
    }
    ensure!(arrived <= 1, "{arrived} of those that overlapped arrived");
    // Of IPv6 as well: tiny, atomic, overlapping, too long, in a row of headers, to the gateway's link-local address.
    let mac = lab.attacker.mac;
    let source: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xfe, 0, 1, 77];
    let group = [0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    for next in [0, 6, 17, 43, 44, 58, 59, 60, 255] {
        for field in [0u16, 1, 8, 9, 0xfff8, 0xfff9, 0x0010] {
            for len in [0, 1, 7, 8, 40, 1400] {
                let fragment =
                    [&[next, 0][..], &field.to_be_bytes(), &[0, 0, 0, 7], &vec![0x41; len]].concat();
                let size = u16::try_from(fragment.len())?.to_be_bytes();
                let head = [&[0x60, 0, 0, 0, size[0], size[1], 44, 64][..], &source, &group].concat();
                lab.attacker.frame(&ethernet(mac, 0x86dd, &[head, fragment].concat()))?;
            }
        }
        lab.bystander_is_served()?;
    }
    lab.everybody_is_served()
}

// ---- what guests are told ----

#[test]
fn a_ping_is_answered_by_whom_it_was_sent_to_and_icmp_nonsense_takes_nothing() -> Result<()> {
    // gvproxy: a ping of the host alias is answered from 127.0.0.1; 0.8.1 answers every ping itself; other ICMP leaks its packet.
    let mut lab = Lab::new(&[])?;
    lab.everybody_is_served()?;
    let ip = lab.attacker.ip;
    let echo = |id: u16| {
        let mut bytes = [&[8, 0, 0, 0][..], &id.to_be_bytes(), &[0, 1], b"ping"].concat();
        let sum = checksum(&[&bytes]);
        bytes[2..4].copy_from_slice(&sum);
        bytes
    };
    for (id, to) in [(1, ROUTER), (2, ALIAS)] {
        lab.attacker.packet(&ipv4(ip, to, 1, 0, &echo(id)))?;
        let source = lab.attacker.wait("an answer", |f| {
            (f.len() >= 46
                && f[12..14] == [8, 0]
                && f[23] == 1
                && f[34] == 0
                && f[38..40] == id.to_be_bytes())
            .then(|| f[26..30].to_vec())
        })?;
        ensure!(source == to.octets(), "{to} was asked and {source:?} answered");
    }
    // Nobody is there (RFC 5737), and nobody answers in their name.
    lab.attacker.packet(&ipv4(ip, Ipv4Addr::new(203, 0, 113, 7), 1, 0, &echo(3)))?;
    let before = lab.rss()?;
    for kind in 0..=255u8 {
        for len in [0, 3, 4, 7, 8, 28, 64, 1400] {
            let mut bytes = vec![kind; len];
            for code in [0, 3, 255] {
                if let Some(at) = bytes.get_mut(1) {
                    *at = code;
                }
                for to in [ROUTER, ALIAS, Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::BROADCAST] {
                    lab.attacker.packet(&ipv4(ip, to, 1, 0, &bytes))?;
                }
            }
        }
        if kind % 64 == 0 {
            lab.bystander_is_served()?;
        }
    }
    lab.bystander_is_served()?;
    let faked = lab.attacker.frames()?.into_iter().any(|f| {
        f.len() >= 40 && f[12..14] == [8, 0] && f[23] == 1 && f[34] == 0 && f[26..30] == [203, 0, 113, 7]
    });
    ensure!(!faked, "a ping nobody got was answered");
    let after = lab.rss()?;
    ensure!(after < before + GROWTH, "{before} bytes became {after}");
    lab.everybody_is_served()
}

#[test]
fn a_refused_datagram_is_told_and_takes_no_time_afterwards() -> Result<()> {
    // gvproxy: no ICMP for a closed port, and a read that fails is tried again at once, for ever (#584: 100 to 1100 % of a CPU);
    // podman #25959, #26073: passt ends on a flow whose socket failed.
    let mut lab = Lab::new(&[])?;
    let ip = lab.attacker.ip;
    // None of those the kernel hands out (ip_local_port_range): the sidecar's own sockets are given many of them below.
    let closed = (10_000..20_000).find(|port| UdpSocket::bind(("127.0.0.1", *port)).is_ok());
    let closed = closed.context("no free port")?;
    for n in 0..3000u16 {
        // From one port and from many, to one closed port and to many.
        let from = SocketAddrV4::new(ip, if n % 2 == 0 { 900 } else { 1000 + n });
        let to = SocketAddrV4::new(ALIAS, if n % 3 == 0 { closed } else { closed ^ (n & 0xff) });
        lab.attacker.packet(&udp(from, to, b"anybody?"))?;
        if n % 1000 == 0 {
            lab.bystander_is_served()?;
        }
    }
    let from = lab.attacker.address();
    let mut told = None;
    // Some of the first may have been answers of the kernel's limit; what is asked again is told.
    for _ in 0..50 {
        lab.attacker.packet(&udp(from, SocketAddrV4::new(ALIAS, closed), b"anybody?"))?;
        let deadline = Instant::now() + Duration::from_millis(200);
        while told.is_none() && Instant::now() < deadline {
            told = lab.attacker.frames()?.into_iter().find(|f| {
                f.len() >= 70 && f[12..14] == [8, 0] && f[23] == 1 && f[62..64] == from.port().to_be_bytes()
            });
        }
        if told.is_some() {
            break;
        }
    }
    let told = told.context("no ICMP for a closed port")?;
    ensure!(told[34..36] == [3, 3] && told[26..30] == ALIAS.octets(), "{told:x?}");
    lab.everybody_is_served()?;
    // Nobody says anything now, and nothing is computed.
    let (began, cpu) = (Instant::now(), lab.sidecar.cpu_time()?);
    until(Duration::from_secs(5), || began.elapsed() >= Duration::from_secs(1))?;
    let used = lab.sidecar.cpu_time()?.saturating_sub(cpu);
    ensure!(used < Duration::from_millis(200), "{used:?} of a CPU in a second of silence");
    lab.everybody_is_served()
}

#[test]
fn one_port_of_a_guest_is_one_port_of_the_host_whomever_it_speaks_to() -> Result<()> {
    // gvproxy: a new host port for every destination, which breaks STUN (RFC 4787 REQ-1).
    let mut lab = Lab::new(&[])?;
    let from = lab.attacker.address();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let sink = UdpSocket::bind("127.0.0.1:0")?;
        sink.set_read_timeout(Some(Duration::from_secs(10)))?;
        lab.attacker.packet(&udp(from, SocketAddrV4::new(ALIAS, sink.local_addr()?.port()), b"x"))?;
        seen.push(sink.recv_from(&mut [0; 10])?.1);
        lab.bystander_is_served()?;
    }
    ensure!(seen.windows(2).all(|w| w[0] == w[1]), "{seen:?}");
    lab.everybody_is_served()
}

#[test]
fn names_have_no_case_failures_are_servfail_and_edns_is_answered() -> Result<()> {
    // gvproxy: zones are case-sensitive, every failure is NXDOMAIN, there is no OPT in an answer, EDNS sizes below 512 are believed.
    let dead = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let mut lab = Lab::new(&["--dns-upstream", &dead])?;
    let ask = |lab: &mut Lab, q: &[u8]| lab.bystander.ask_udp(5400, (ROUTER, 53).into(), q).map(|a| a.1);
    for labels in
        [["HOST", "portway", "internal"], ["host", "PORTWAY", "Internal"], ["hOsT", "pOrTwAy", "iNtErNaL"]]
    {
        let answer = ask(&mut lab, &query(&labels))?;
        ensure!(answer[3] & 15 == 0 && answer.ends_with(&ALIAS.octets()), "{labels:?}: {answer:x?}");
    }
    let answer = ask(&mut lab, &query(&["nobody", "knows", "test"]))?;
    ensure!(answer[3] & 15 == 2, "a dead resolver is SERVFAIL: {answer:x?}");
    // A name of ours that is not there is NXDOMAIN, and one of which this kind is not there is not.
    let answer = ask(&mut lab, &query(&["nobody", "portway", "internal"]))?;
    ensure!(answer[3] & 15 == 3, "{answer:x?}");
    let mut txt = query(&["host", "portway", "internal"]);
    let at = txt.len() - 3;
    txt[at] = 16;
    let answer = ask(&mut lab, &txt)?;
    ensure!(answer[3] & 15 == 0 && answer[6..8] == [0, 0], "NODATA: {answer:x?}");
    for size in [0u16, 1, 511, 512, 4096, 0xffff] {
        let mut with = query(&["host", "portway", "internal"]);
        with[11] = 1;
        with.extend([0, 0, 41]);
        with.extend(size.to_be_bytes());
        with.extend([0; 6]);
        let answer = ask(&mut lab, &with)?;
        let additional = u16::from_be_bytes([answer[10], answer[11]]);
        ensure!(answer[3] & 15 == 0 && answer[7] == 1 && additional == 1, "EDNS {size}: {answer:x?}");
    }
    lab.everybody_is_served()
}

#[test]
fn a_wrong_address_is_refused_a_released_one_is_free_and_no_option_is_empty() -> Result<()> {
    // gvproxy: a REQUEST for a wrong address is acknowledged, RELEASE is passed over, option 119 has no bytes when there is nothing in it.
    let dir = tempfile::tempdir()?;
    let resolv = dir.path().join("resolv.conf");
    std::fs::write(&resolv, "nameserver 127.0.0.1\n")?;
    let mut lab = Lab::in_dir(dir, &["--resolv-conf", resolv.to_str().context("path")?])?;
    let mac = [2, 8, 8, 8, 8, 8];
    let message = |kind: u8, client: Ipv4Addr, options: &[u8]| {
        let mut bootp = vec![1, 1, 6, 0, 7, 7, 7, 7];
        bootp.resize(236, 0);
        bootp[12..16].copy_from_slice(&client.octets());
        bootp[28..34].copy_from_slice(&mac);
        bootp.extend([99, 130, 83, 99, 53, 1, kind]);
        bootp.extend(options);
        bootp.push(255);
        let source = SocketAddrV4::new(client, 68);
        let to = if client.is_unspecified() { Ipv4Addr::BROADCAST } else { ROUTER };
        let packet = udp(source, SocketAddrV4::new(to, 67), &bootp);
        [&[0xff; 6][..], &mac, &[8, 0], &packet].concat()
    };
    // The kind of an answer, its address, and every option.
    type Answer = (u8, Vec<u8>, Vec<(u8, usize)>);
    let answer = |lab: &mut Lab| -> Result<Answer> {
        lab.attacker.wait("an answer of DHCP", |f| {
            (f.len() > 282 && f[23] == 17 && f[34..36] == [0, 67] && f[46..50] == [7; 4]).then_some(())?;
            let (mut at, mut options, mut kind) = (282, Vec::new(), 0);
            while let (Some(code), Some(len)) = (f.get(at), f.get(at + 1)) {
                if *code == 255 {
                    break;
                }
                if *code == 53 {
                    kind = *f.get(at + 2)?;
                }
                options.push((*code, usize::from(*len)));
                at += 2 + usize::from(*len);
            }
            Some((kind, f[58..62].to_vec(), options))
        })
    };
    let none = Ipv4Addr::UNSPECIFIED;
    lab.attacker.frame(&message(1, none, &[55, 6, 1, 3, 6, 15, 119, 121]))?;
    let (kind, offered, options) = answer(&mut lab)?;
    ensure!(kind == 2 && options.iter().all(|(_, len)| *len > 0), "{kind}: {options:?}");
    for wrong in [[10, 0, 0, 1], [192, 168, 127, 1], [192, 168, 127, 254], [192, 168, 127, 255]] {
        lab.attacker.frame(&message(3, none, &[&[50, 4][..], &wrong].concat()))?;
        ensure!(answer(&mut lab)?.0 == 6, "{wrong:?} is not refused");
        lab.bystander_is_served()?;
    }
    let mut wish = vec![50, 4];
    wish.extend(&offered);
    wish.extend([54, 4]);
    wish.extend(ROUTER.octets());
    // What was refused ended the offer, so it begins anew.
    lab.attacker.frame(&message(1, none, &[]))?;
    ensure!(answer(&mut lab)?.0 == 2);
    lab.attacker.frame(&message(3, none, &wish))?;
    let (kind, given, _) = answer(&mut lab)?;
    ensure!(kind == 5 && given == offered, "{kind}: {given:?}, and not {offered:?}");
    let address = Ipv4Addr::from(<[u8; 4]>::try_from(&given[..])?);
    let listed = |lab: &Lab| {
        lab.sidecar.json(&["leases"]).is_ok_and(|l| l.to_string().contains(&format!("\"{address}\"")))
    };
    until(Duration::from_secs(5), || listed(&lab)).context("the lease is not listed")?;
    lab.attacker.frame(&message(7, address, &[54, 4, 192, 168, 127, 1]))?;
    until(Duration::from_secs(5), || !listed(&lab)).context("the lease is not free")?;
    lab.everybody_is_served()
}

#[test]
fn the_metadata_address_is_refused_and_not_swallowed() -> Result<()> {
    // gvproxy: TCP is reset, UDP goes nowhere.
    let mut lab = Lab::new(&[])?;
    let metadata = Ipv4Addr::new(169, 254, 169, 254);
    let from = lab.attacker.address();
    lab.attacker.packet(&udp(from, SocketAddrV4::new(metadata, 123), b"time?"))?;
    let told = lab.attacker.wait("ICMP", |f| {
        (f.len() >= 70 && f[12..14] == [8, 0] && f[23] == 1 && f[62..64] == from.port().to_be_bytes())
            .then(|| (f[34], f[35]))
    })?;
    ensure!(told == (3, 13), "type {} code {}", told.0, told.1);
    lab.bystander_is_served()?;
    ensure!(lab.bystander.connect((metadata, 80).into())?.is_none());
    lab.everybody_is_served()
}

// ---- gvproxy's own doors ----

/// What the API says to `request`, and whatever comes behind it until `until_bytes` are there or it ends.
fn say(lab: &Lab, request: &str, body: &[u8], len: usize) -> Result<(UnixStream, Vec<u8>)> {
    let mut client = UnixStream::connect(lab.dir.path().join("api"))?;
    client.set_read_timeout(Some(Duration::from_secs(15)))?;
    client.write_all(&[request.as_bytes(), body].concat())?;
    let mut answer = vec![0; len];
    let mut n = 0;
    while n < len {
        match client.read(&mut answer[n..])? {
            0 => break,
            more => n += more,
        }
    }
    answer.truncate(n);
    Ok((client, answer))
}

#[test]
fn a_tunnel_to_nowhere_is_refused_and_no_byte_behind_a_request_is_lost() -> Result<()> {
    // gvproxy: an address that is not IPv4 is OK and then a panic; bytes that come with the request are lost.
    let mut lab = Lab::new(&[])?;
    for asked in [
        "",
        "?ip=",
        "?ip=name&port=22",
        "?ip=192.168.127.2",
        "?ip=192.168.127.2&port=99999",
        "?ip=[::1]&port=-1",
    ] {
        let request = format!("POST /tunnel{asked} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let (_, answer) = say(&lab, &request, b"", 12)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        ensure!(answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"), "{asked}: {answer:?}");
        lab.bystander_is_served()?;
    }
    let leases = lab.sidecar.json(&["leases"])?;
    let ip = leases
        .as_array()
        .and_then(|all| all.iter().find(|l| l["mac"] == "52:54:00:00:00:09"))
        .and_then(|l| l["ip"].as_str().or(l["address"].as_str()))
        .with_context(|| format!("{leases}"))?
        .to_owned();
    let server = lab.bystander.listen(2022)?;
    let request = format!("POST /tunnel?ip={ip}&port=2022 HTTP/1.1\r\nHost: x\r\n\r\n");
    let (client, answer) = say(&lab, &request, b"early", 2)?;
    ensure!(answer == b"OK", "{answer:?}");
    ensure!(lab.bystander.exchange(server, b"", 5)? == b"early");
    drop(client);
    // A tunnel to a port nobody serves ends; it does not hang, and takes nobody with it.
    let request = format!("POST /tunnel?ip={ip}&port=1 HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut client = UnixStream::connect(lab.dir.path().join("api"))?;
    client.write_all(request.as_bytes())?;
    client.set_nonblocking(true)?;
    let mut got = Vec::new();
    lab.bystander.until("the end of the tunnel", |_| match client.read(&mut [0; 100]) {
        Ok(0) => Some(()),
        Ok(n) => {
            got.push(n);
            None
        }
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => None,
        Err(_) => Some(()),
    })?;
    lab.everybody_is_served()
}

#[test]
fn a_guest_that_drives_the_gateways_door_gets_ports_of_its_own_and_not_more_than_its_share() -> Result<()> {
    // gvproxy #78: a guest may bind any port and path of the host, and remove what others have published.
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("third");
    let mut lab = Lab::in_dir(
        dir,
        &[
            "--link",
            &format!("qemu:unix:{},name=third", path.display()),
            "--publish",
            "0:9",
            "--publish",
            "0:third:22",
        ],
    )?;
    let mut guest = Guest::attach(&path, 33)?;
    let (ip, ..) = guest.dhcp()?;
    let theirs = lab.sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("port")?;
    // What the operator publishes for this very guest is his too, whether he did it at the start or since.
    let live =
        lab.sidecar.json(&["publish", &format!("0:{ip}:80")])?[0]["host_port"].as_u64().context("port")?;
    let ssh = lab.sidecar.json(&["ports"])?[1]["host_port"].as_u64().context("port")?;
    let ask = |guest: &mut Guest, route: &str, body: &str| -> Result<String> {
        let flow = guest.connect((ROUTER, 80).into())?.context("the gateway's port 80")?;
        let request = format!(
            "POST /services/forwarder/{route} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = guest.exchange(flow, request.as_bytes(), 12)?;
        guest.tcp(flow).abort();
        guest.step();
        guest.forget(flow);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let file = lab.dir.path().join("made");
    for (route, body) in [
        ("expose", format!(r#"{{"local":"0.0.0.0:0","remote":"{ip}:1"}}"#)),
        ("expose", r#"{"local":"192.0.2.1:1","remote":":1"}"#.to_owned()),
        ("expose", r#"{"local":"127.0.0.1:0","remote":"192.168.127.2:22"}"#.to_owned()),
        ("expose", format!(r#"{{"local":"{}","remote":"tcp://{ip}:22","protocol":"unix"}}"#, file.display())),
        ("expose", format!(r#"{{"local":"127.0.0.1:{theirs}","remote":"{ip}:22"}}"#)),
        ("unexpose", format!(r#"{{"local":"127.0.0.1:{theirs}","protocol":"tcp"}}"#)),
        ("unexpose", format!(r#"{{"local":"127.0.0.1:{ssh}","protocol":"tcp"}}"#)),
        ("unexpose", format!(r#"{{"local":"localhost:{ssh}","protocol":"tcp"}}"#)),
        ("unexpose", format!(r#"{{"local":"127.0.0.1:{live}","protocol":"tcp"}}"#)),
        ("unexpose", format!(r#"{{"local":"localhost:{live}","protocol":"tcp"}}"#)),
        ("unexpose", r#"{"local":"localhost:0","protocol":"tcp"}"#.to_owned()),
        ("expose", "{".repeat(10_000)),
    ] {
        let answer = ask(&mut guest, route, &body)?;
        ensure!(
            answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"),
            "{route} {}: {answer}",
            &body[..body.len().min(90)]
        );
    }
    ensure!(!file.exists());
    // Its own it takes away, by the words it asked with, the free port's too.
    for _ in 0..2 {
        let body = format!(r#"{{"local":"127.0.0.1:0","remote":"{ip}:1"}}"#);
        ensure!(ask(&mut guest, "expose", &body)?.starts_with("HTTP/1.1 200"));
        let gone = ask(&mut guest, "unexpose", r#"{"local":"127.0.0.1:0","protocol":"tcp"}"#)?;
        ensure!(gone.starts_with("HTTP/1.1 200"), "{gone}");
    }
    let mut given = 0;
    for n in 0..300 {
        let body = format!(r#"{{"local":"127.0.0.1:0","remote":"{ip}:{}"}}"#, 1000 + n);
        given += usize::from(ask(&mut guest, "expose", &body)?.starts_with("HTTP/1.1 200"));
        if n % 100 == 0 {
            lab.bystander_is_served()?;
        }
    }
    ensure!(given == 256, "{given} ports");
    let ports = lab.sidecar.json(&["ports"])?;
    let kept = [&ports[0], &ports[1], &ports[2]].map(|p| p["host_port"].as_u64());
    ensure!(kept == [Some(theirs), Some(ssh), Some(live)], "{ports}");
    lab.everybody_is_served()
}
