//! What ended, wedged or leaked in other programs of this kind, done to the real `portway serve` over its sockets, with a
//! second guest that is served before, during and after: frames, headers and TCP. Services and limits
//! are in `security_services.rs`, what is particular to gvproxy and to other links in `security_peers.rs`; docs/security.md has the
//! table.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::attack::{ALIAS, GROWTH, Lab, ROUTER, query};
use portway_tests::raw::{ACK, PSH, RST, RawGuest, SYN, Segment, URG, checksum, ethernet, ipv4, tcp, udp};
use portway_tests::sidecar::until;

// ---- frames and lengths ----

#[test]
fn runt_frames_and_lengths_of_nothing_are_counted() -> Result<()> {
    // gvproxy: one frame shorter than 14 bytes wedges it for good. libslirp CVE-2020-29129, -29130: reads past short frames.
    let mut lab = Lab::new(&[])?;
    for n in 0..14 {
        lab.attacker.frame(&vec![0x55; n])?;
    }
    for kind in [0x0806, 0x0800, 0x86dd, 0x88f8, 0x0000, 0xffff, 0x8100] {
        for n in 14..60 {
            let mac = lab.attacker.mac;
            lab.attacker.frame(&ethernet(mac, kind, &vec![0xff; n - 14]))?;
        }
        lab.bystander_is_served()?;
    }
    until(Duration::from_secs(5), || lab.stat(&["drops", "runt"]).is_ok_and(|n| n == 14))?;
    lab.everybody_is_served()
}

#[test]
fn a_stream_may_be_cut_at_every_byte_and_dripped() -> Result<()> {
    // gvisor-tap-vsock b843c673: the length of a guest was trusted for the size of a buffer.
    let mut lab = Lab::new(&[])?;
    let (ip, mac) = (lab.attacker.ip, lab.attacker.mac);
    let echo = UdpSocket::bind("127.0.0.1:0")?;
    echo.set_read_timeout(Some(Duration::from_secs(10)))?;
    let to = SocketAddrV4::new(ALIAS, echo.local_addr()?.port());
    let frame = ethernet(mac, 0x0800, &udp(SocketAddrV4::new(ip, 7), to, b"dripped"));
    let bytes = [&u32::try_from(frame.len())?.to_be_bytes()[..], &frame].concat();
    lab.attacker.link.set_nonblocking(false)?;
    for cut in 1..bytes.len() {
        lab.attacker.link.write_all(&bytes[..cut])?;
        lab.attacker.link.write_all(&bytes[cut..])?;
    }
    for byte in &bytes {
        lab.attacker.link.write_all(&[*byte])?;
    }
    let mut buffer = [0; 100];
    for _ in 0..bytes.len() {
        ensure!(echo.recv(&mut buffer)? == 7 && &buffer[..7] == b"dripped");
    }
    lab.everybody_is_served()
}

#[test]
fn a_length_no_frame_has_ends_that_link_alone_and_a_client_gone_in_mid_frame_leaves_it_usable() -> Result<()>
{
    // gvproxy: a client that closes in mid-frame leaves its socket unusable.
    let mut lab = Lab::new(&[])?;
    for last in
        [&[0xff, 0xff, 0xff, 0xff][..], &[0x00, 0x02, 0, 0], &[0, 0, 1, 0, 1, 2, 3], &[0], &[0, 0, 0, 0]]
    {
        lab.attacker.link.set_nonblocking(false)?;
        lab.attacker.link.write_all(last)?;
        lab.bystander_is_served()?;
        // Whether it was cut off or goes by itself: the socket takes the next.
        lab.attacker = RawGuest::attach(&lab.dir.path().join("vm"), 77)?;
        lab.everybody_is_served()?;
    }
    Ok(())
}

// ---- headers ----

#[test]
fn every_truncation_of_every_protocol_is_harmless() -> Result<()> {
    // libslirp CVE-2021-3592, -3593, -3594, -3595 (bootp, UDP, UDP over IPv6, TFTP), CVE-2020-10756 (echo over IPv6).
    let mut lab = Lab::new(&[])?;
    let (ip, mac) = (lab.attacker.ip, lab.attacker.mac);
    let at = |port| SocketAddrV4::new(ip, port);
    let mut discover = vec![1, 1, 6, 0, 1, 2, 3, 4];
    discover.resize(236, 0);
    discover[28..34].copy_from_slice(&mac);
    discover.extend([
        99, 130, 83, 99, 53, 1, 1, 61, 7, 1, 2, 3, 4, 5, 6, 7, 55, 3, 1, 3, 6, 12, 2, b'.', b'.', 255,
    ]);
    let zero = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68);
    let echo = [&[8, 0, 0, 0, 1, 1, 1, 1][..], &[7; 32]].concat();
    let syn = Segment { flags: SYN, options: vec![2, 4, 5, 180, 1, 3, 3, 7, 4, 2], ..Segment::default() };
    let packets = [
        udp(zero, SocketAddrV4::new(Ipv4Addr::BROADCAST, 67), &discover),
        udp(at(9), SocketAddrV4::new(ROUTER, 53), &query(&["a", "b"])),
        udp(at(9), SocketAddrV4::new(ROUTER, 69), b"\0\x01..\\..\\secret\0octet\0"),
        udp(at(9), SocketAddrV4::new(ALIAS, 9), &[1; 20]),
        tcp(at(9), SocketAddrV4::new(ALIAS, lab.echo), &syn, &[]),
        ipv4(ip, ROUTER, 1, 0, &echo),
        ipv4(ip, Ipv4Addr::new(192, 0, 2, 1), 47, 0, &[0; 20]),
    ];
    for packet in packets {
        for cut in 0..packet.len() {
            // As it is cut, and with headers that say it is whole: IPv4's length and sum, and UDP's length.
            lab.attacker.packet(&packet[..cut])?;
            if let Some(mut short) = packet.get(..cut).filter(|p| p.len() >= 20).map(<[u8]>::to_vec) {
                short[2..4].copy_from_slice(&u16::try_from(cut)?.to_be_bytes());
                short[10..12].fill(0);
                let sum = checksum(&[&short[..20]]);
                short[10..12].copy_from_slice(&sum);
                lab.attacker.packet(&short)?;
                if cut >= 28 && short[9] == 17 {
                    short[24..26].copy_from_slice(&u16::try_from(cut - 20)?.to_be_bytes());
                    short[26..28].fill(0);
                    lab.attacker.packet(&short)?;
                }
            }
        }
        lab.bystander_is_served()?;
    }
    lab.everybody_is_served()
}

#[test]
fn ipv6_that_lies_about_its_length_or_leads_to_mapped_addresses_is_harmless() -> Result<()> {
    // A current passt aborts on one IPv6 SYN to an IPv4-mapped address; libslirp CVE-2020-10756: a length beyond the frame.
    let mut lab = Lab::new(&[])?;
    let mac = lab.attacker.mac;
    let trap = TcpListener::bind("127.0.0.1:0")?;
    trap.set_nonblocking(true)?;
    let port = trap.local_addr()?.port().to_be_bytes();
    let source: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xfe, 0, 1, 77];
    let mapped = |v4: [u8; 4]| [&[0; 10][..], &[0xff, 0xff], &v4].concat();
    let compatible = |v4: [u8; 4]| [&[0; 12][..], &v4].concat();
    let nat64 = |v4: [u8; 4]| [&[0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0][..], &v4].concat();
    let local = [127, 0, 0, 1];
    let loopback = [&[0; 15][..], &[1]].concat();
    for destination in [
        mapped(local),
        mapped([0; 4]),
        mapped([8, 8, 8, 8]),
        compatible(local),
        nat64(local),
        loopback,
        vec![0; 16],
        vec![0xff; 16],
    ] {
        let mut syn = [&[0x9c, 0x40][..], &port, &[0; 8], &[0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]].concat();
        let datagram = [&[0x9c, 0x40][..], &port, &[0, 12, 0, 0], b"mapp"].concat();
        let echo = vec![128, 0, 0, 0, 0, 1, 0, 1, 9, 9];
        for (next, payload) in [(6, &mut syn), (17, &mut datagram.clone()), (58, &mut echo.clone())] {
            for length in [payload.len(), 0, 4, 0xffff] {
                for from in [&source[..], &mapped([192, 168, 127, 77]), &[0; 16]] {
                    let len = u16::try_from(length)?.to_be_bytes();
                    let head = [&[0x60, 0, 0, 0, len[0], len[1], next, 64][..], from, &destination].concat();
                    lab.attacker.frame(&ethernet(mac, 0x86dd, &[&head[..], payload].concat()))?;
                }
            }
        }
        lab.bystander_is_served()?;
    }
    lab.everybody_is_served()?;
    ensure!(trap.accept().is_err(), "a mapped address reached the host's loopback");
    Ok(())
}

#[test]
fn fragments_that_overlap_repeat_overflow_or_never_end_take_no_memory_and_no_one_down() -> Result<()> {
    // libslirp CVE-2019-14378, CVE-2019-15890, CVE-2020-1983.
    let mut lab = Lab::new(&[])?;
    let ip = lab.attacker.ip;
    lab.everybody_is_served()?;
    let before = lab.rss()?;
    let more = 0x2000;
    let to = Ipv4Addr::new(192, 0, 2, 1);
    let fragment = |protocol, field: u16, len: usize| ipv4(ip, to, protocol, field, &vec![0x41; len]);
    for protocol in [1, 6, 17] {
        for field in [more, more | 1, 1, 0x1fff, more | 0x1fff, 0x3fff, more | 2] {
            for len in [0, 1, 7, 8, 16, 1480] {
                lab.attacker.packet(&fragment(protocol, field, len))?;
                lab.attacker.packet(&fragment(protocol, field, len))?;
            }
        }
    }
    // Fifty thousand first fragments of datagrams whose rest never comes: some 70 MiB.
    for id in 0..50_000u16 {
        let mut packet = fragment(17, more, 1400);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&sum);
        lab.attacker.packet(&packet)?;
        if id % 10_000 == 0 {
            lab.bystander_is_served()?;
        }
    }
    lab.everybody_is_served()?;
    let after = lab.rss()?;
    ensure!(after < before + GROWTH, "{before} bytes became {after}");
    Ok(())
}

// ---- TCP ----

#[test]
fn urgent_pointers_anywhere_change_no_byte_and_leak_nothing() -> Result<()> {
    // libslirp CVE-2026-9539: a pointer beyond the data leaks gigabytes.
    let mut lab = Lab::new(&[])?;
    let to = SocketAddrV4::new(ALIAS, lab.echo);
    lab.everybody_is_served()?;
    let before = lab.rss()?;
    let (from, mut seq, ack) = lab.attacker.open(to, &[])?.context("refused")?;
    let mut sent = Vec::new();
    for (n, urgent) in [0, 1, 3, 4, 5, 100, 0x7fff, 0xffff].into_iter().cycle().take(400).enumerate() {
        let bytes = [u8::try_from(n % 251)?; 4];
        let segment = Segment { seq, ack, flags: ACK | PSH | URG, urgent, options: Vec::new() };
        // Twice, for a repetition has the pointer too.
        lab.attacker.packet(&tcp(from, to, &segment, &bytes))?;
        lab.attacker.packet(&tcp(from, to, &segment, &bytes))?;
        lab.attacker.packet(&tcp(from, to, &segment, &[]))?;
        seq += 4;
        sent.extend(bytes);
    }
    let got = lab.attacker.read(from, to, (seq, ack), sent.len())?;
    ensure!(got == sent);
    lab.everybody_is_served()?;
    let after = lab.rss()?;
    ensure!(after < before + GROWTH, "{before} bytes became {after}");
    Ok(())
}

#[test]
fn syns_with_strange_options_are_answered_or_dropped_and_their_flows_work() -> Result<()> {
    // A current passt divides by an MSS of zero.
    let mut lab = Lab::new(&[])?;
    let to = SocketAddrV4::new(ALIAS, lab.echo);
    let cases: [&[u8]; 16] = [
        &[2, 4, 0, 0],
        &[2, 4, 0, 1],
        &[2, 4, 0, 2],
        &[2, 4, 0, 47],
        &[2, 4, 0xff, 0xff],
        &[2, 0],
        &[2, 1],
        &[2, 3, 5],
        &[2, 255, 5, 180],
        &[2],
        &[3, 3, 255, 0],
        &[3, 3, 14, 0],
        &[5, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        &[4, 2, 4, 2, 4, 2, 2, 4, 0, 1, 2, 4, 5, 180],
        &[8, 10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        &[0; 40],
    ];
    for options in cases {
        let from = lab.attacker.address();
        let syn = Segment { seq: 1000, flags: SYN, options: options.to_vec(), ..Segment::default() };
        lab.attacker.packet(&tcp(from, to, &syn, &[]))?;
        lab.bystander_is_served()?;
        // What is answered works: 20 bytes, with the smallest of segments as well.
        let reply = lab.attacker.frames()?;
        let answered = reply.iter().find(|f| {
            f.len() >= 54 && f[36..38] == from.port().to_be_bytes() && f[47] & (SYN | ACK) == SYN | ACK
        });
        if let Some(frame) = answered {
            let ack = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]).wrapping_add(1);
            let segment = Segment { seq: 1001, ack, flags: ACK | PSH, ..Segment::default() };
            lab.attacker.packet(&tcp(from, to, &segment, b"twenty bytes of data"))?;
            let got = lab.attacker.read(from, to, (1021, ack), 20)?;
            ensure!(got == b"twenty bytes of data", "{options:?}");
        }
    }
    // Every combination of flags, on a tuple of its own and on one that is open.
    let (open, seq, ack) = lab.attacker.open(to, &[])?.context("refused")?;
    for flags in 0..=255u8 {
        for from in [lab.attacker.address(), open] {
            let segment = Segment {
                seq: seq.wrapping_add(70_000),
                ack: ack.wrapping_sub(9),
                flags,
                urgent: 7,
                options: Vec::new(),
            };
            lab.attacker.packet(&tcp(from, to, &segment, &[1; 9]))?;
        }
    }
    lab.everybody_is_served()
}

#[test]
fn a_batch_far_beyond_the_window_right_after_the_handshake_is_harmless() -> Result<()> {
    // smoltcp 0.14: the window after SYN|ACK is not scaled yet, and a batch beyond it panics.
    let mut lab = Lab::new(&[])?;
    // Nobody reads at the other end, so that the rings fill.
    let deaf = TcpListener::bind("127.0.0.1:0")?;
    let to = SocketAddrV4::new(ALIAS, deaf.local_addr()?.port());
    for jump in [0, 1, 60_000, 1 << 20, 1 << 30, u32::MAX - 60_000] {
        let (from, seq, ack) = lab.attacker.open(to, &[2, 4, 0xff, 0xff, 3, 3, 7])?.context("refused")?;
        let mut batch = Vec::new();
        for n in 0..20u32 {
            let seq = seq.wrapping_add(n * 60_000).wrapping_add(jump);
            let segment = Segment { seq, ack, flags: ACK, ..Segment::default() };
            let frame = ethernet(lab.attacker.mac, 0x0800, &tcp(from, to, &segment, &vec![3; 60_000]));
            batch.extend(u32::try_from(frame.len())?.to_be_bytes());
            batch.extend(frame);
        }
        lab.attacker.link.set_nonblocking(false)?;
        lab.attacker.link.write_all(&batch)?;
        lab.bystander_is_served()?;
    }
    lab.everybody_is_served()
}

#[test]
fn a_reset_reaches_the_host_and_pending_connects_leave_nothing_behind() -> Result<()> {
    // gvproxy: a RST right after the handshake leaks the host's connection; SYN, then RST leaked pending slots.
    let mut lab = Lab::new(&[])?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let to = SocketAddrV4::new(ALIAS, listener.local_addr()?.port());
    for _ in 0..50 {
        let (from, seq, ack) = lab.attacker.open(to, &[])?.context("refused")?;
        let reset = Segment { seq, ack, flags: RST, ..Segment::default() };
        lab.attacker.packet(&tcp(from, to, &reset, &[]))?;
        let (mut host, _) = listener.accept()?;
        host.set_read_timeout(Some(Duration::from_secs(10)))?;
        let error = host.read(&mut [0; 1]).err().context("the reset became an end")?;
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}");
    }
    // Connects that hang, given up by the guest: a listener whose backlog is full answers nobody.
    let hole = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    hole.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    hole.listen(0)?;
    let nowhere = SocketAddrV4::new(ALIAS, hole.local_addr()?.as_socket().context("port")?.port());
    let mut pending = Vec::new();
    for _ in 0..300 {
        let from = lab.attacker.address();
        let syn = Segment { seq: 1000, flags: SYN, ..Segment::default() };
        lab.attacker.packet(&tcp(from, nowhere, &syn, &[]))?;
        pending.push(from);
    }
    until(Duration::from_secs(5), || lab.stat(&["tcp_dialing"]).is_ok_and(|n| n >= 250))?;
    lab.everybody_is_served()?;
    for from in pending {
        let reset = Segment { seq: 1001, flags: RST, ..Segment::default() };
        lab.attacker.packet(&tcp(from, nowhere, &reset, &[]))?;
    }
    until(Duration::from_secs(5), || lab.stat(&["tcp_dialing"]).is_ok_and(|n| n == 0))?;
    lab.everybody_is_served()
}

#[test]
fn text_that_looks_like_ftp_irc_or_ident_is_text() -> Result<()> {
    // libslirp's tcp_emu: CVE-2019-6778, CVE-2019-9824, CVE-2020-7039, CVE-2020-8608. Here no payload is looked at.
    let mut lab = Lab::new(&[])?;
    let lines = [
        b"PORT 192,168,127,77,4,1\r\n".to_vec(),
        b"227 Entering Passive Mode (192,168,127,77,4,1)\r\n".to_vec(),
        [&b"\x01DCC SEND "[..], &[b'A'; 3000], b" 3232267085 1025 1\x01\r\n"].concat(),
        [&b"6193, 23\r\n"[..], &[b'9'; 2000]].concat(),
        b"MOVE 1,2\r\n".to_vec(),
    ];
    // On the ports that were special there, where this host has them free.
    let mut ports = vec![lab.echo];
    for port in [21, 113, 514, 544, 6667, 6668, 7070] {
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            ports.push(port);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
                }
            });
        }
    }
    for port in ports {
        let flow = lab.bystander.connect((ALIAS, port).into())?.context("refused")?;
        for line in &lines {
            ensure!(lab.bystander.exchange(flow, line, line.len())? == *line, "port {port}");
        }
        lab.bystander.tcp(flow).abort();
        lab.bystander.step();
    }
    lab.everybody_is_served()
}
