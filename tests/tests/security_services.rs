//! What ended, wedged or leaked in other programs of this kind, done to the real `portway serve` over its sockets, with a
//! second guest that is served before, during and after: what must not be reachable, tables,
//! the control socket.

use std::io::Read;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::attack::{ALIAS, GROWTH, Lab, ROUTER, query};
use portway_tests::guest::Guest;
use portway_tests::raw::{ACK, GATEWAY, RawGuest, SYN, ethernet, udp};
use portway_tests::sidecar::until;

// ---- what must not be reachable ----

#[test]
fn no_service_of_ours_is_where_a_guest_or_the_lan_could_drive_it() -> Result<()> {
    // CVE-2021-4024 (podman and gvproxy: the API on every interface), CVE-2025-9074 (the engine's API on the guest's subnet).
    let mut lab = Lab::new(&[])?;
    let api = lab.dir.path().join("api");
    ensure!(std::fs::metadata(&api)?.permissions().mode() & 0o777 == 0o600);
    // A sidecar that publishes nothing listens on no port at all.
    let inodes: Vec<String> = match std::fs::read_dir(format!("/proc/{}/fd", lab.sidecar.pid())) {
        Ok(open) => open
            .flatten()
            .filter_map(|e| Some(std::fs::read_link(e.path()).ok()?.display().to_string()))
            .collect(),
        Err(_) => Vec::new(),
    };
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table)?.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let ours = fields.get(9).is_some_and(|i| inodes.contains(&format!("socket:[{i}]")));
            ensure!(!(ours && fields.get(3) == Some(&"0A")), "listens: {line}");
        }
    }
    for port in [22, 443, 1024, 2375, 2376, 5555, 7777, 8080, 8081, 9090, 65_535] {
        let to = SocketAddrV4::new(ROUTER, port);
        ensure!(lab.attacker.open(to, &[])?.is_none(), "{to} is open");
    }
    // Whatever answers on port 80 is not the control API.
    if let Some(flow) = lab.bystander.connect((ROUTER, 80).into())? {
        for route in [
            "/v1/network",
            "/v1/ports",
            "/v1/stats",
            "/leases",
            "/cam",
            "/connect",
            "/tunnel?ip=127.0.0.1&port=22",
        ] {
            let request = format!("GET {route} HTTP/1.1\r\nHost: gateway\r\n\r\n");
            let answer = lab.bystander.exchange(flow, request.as_bytes(), 15)?;
            ensure!(answer.starts_with(b"HTTP/1.1 404"), "{route}: {}", String::from_utf8_lossy(&answer));
        }
    }
    lab.everybody_is_served()
}

#[test]
fn closed_ports_of_the_gateway_are_refused_and_never_dialled_on_the_hosts_network() -> Result<()> {
    // gvproxy dials the gateway's address on the host's own network for a closed port.
    let mut lab = Lab::new(&[])?;
    for port in [1, 81, 1234] {
        let began = Instant::now();
        ensure!(lab.attacker.open(SocketAddrV4::new(ROUTER, port), &[])?.is_none());
        ensure!(began.elapsed() < Duration::from_secs(2), "not refused but tried: {:?}", began.elapsed());
    }
    ensure!(
        lab.sidecar.json(&["flows"])?.as_array().is_some_and(|f| f.len() <= 1),
        "only the bystander's flow"
    );
    // UDP says so too (ICMP port unreachable), and TFTP is a closed port like any other.
    let from = lab.attacker.address();
    let request = b"\0\x01../../etc/passwd\0octet\0";
    lab.attacker.packet(&udp(from, SocketAddrV4::new(ROUTER, 69), request))?;
    let (kind, code) = lab
        .attacker
        .wait("ICMP", |f| (f.len() > 36 && f[12..14] == [8, 0] && f[23] == 1).then(|| (f[34], f[35])))?;
    ensure!((kind, code) == (3, 3), "type {kind} code {code}");
    lab.everybody_is_served()
}

#[test]
fn a_published_ports_client_never_looks_local_to_the_guest() -> Result<()> {
    // CVE-2021-20199 (rootlessport): the client appears as 127.0.0.1, and services in the guest trust it.
    let mut lab = Lab::new(&["--publish", "0:192.168.127.77:22"])?;
    lab.everybody_is_served()?;
    let port = lab.sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("port")?;
    let _client = TcpStream::connect(("127.0.0.1", u16::try_from(port)?))?;
    let source = lab.attacker.wait("SYN", |f| {
        (f.len() >= 54 && f[12..14] == [8, 0] && f[23] == 6 && f[47] & (SYN | ACK) == SYN)
            .then(|| f[26..30].to_vec())
    })?;
    ensure!(source == ALIAS.octets(), "{source:?}");
    Ok(())
}

// ---- resources ----

#[test]
fn one_guest_cannot_lease_the_pool_empty_nor_be_given_an_address_of_ours() -> Result<()> {
    // gvproxy: leases are never freed, and .254 and .255 may be handed out.
    let mut lab = Lab::new(&[])?;
    let mut offered = std::collections::BTreeSet::new();
    for n in 0..400u16 {
        let [a, b] = n.to_be_bytes();
        let mac = [2, 9, 9, 9, a, b];
        let mut discover = vec![1, 1, 6, 0, a, b, 3, 4];
        discover.resize(236, 0);
        discover[28..34].copy_from_slice(&mac);
        discover.extend([99, 130, 83, 99, 53, 1, 1, 255]);
        let zero = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68);
        let packet = udp(zero, SocketAddrV4::new(Ipv4Addr::BROADCAST, 67), &discover);
        let frame = [&[0xff; 6][..], &mac, &[8, 0], &packet].concat();
        lab.attacker.frame(&frame)?;
        for frame in lab.attacker.frames()? {
            if frame.len() > 62 && frame[23] == 17 && frame[34..36] == [0, 67] {
                offered.insert(frame[58..62].to_vec());
            }
        }
    }
    until(Duration::from_secs(5), || lab.stat(&["drops", "dhcp_limit"]).is_ok_and(|n| n > 0))?;
    // Its share and, while others do not need them, at most half of the pool of 252.
    ensure!(offered.len() <= 126, "{} addresses for one link", offered.len());
    for last in [0, 1, 254, 255] {
        ensure!(!offered.contains(&vec![192, 168, 127, last]), ".{last} was offered");
    }
    drop(lab.bystander);
    let mut bystander = Guest::attach(&lab.dir.path().join("second"), 10)?;
    bystander.dhcp()?;
    Ok(())
}

#[test]
fn datagrams_from_every_port_take_little_memory_and_the_idlest_binding_goes() -> Result<()> {
    // gvproxy: 131 KB and two goroutines for each UDP flow, 100 % of a CPU in a reply loop.
    let mut lab = Lab::new(&[])?;
    lab.everybody_is_served()?;
    let sink = UdpSocket::bind("127.0.0.1:0")?;
    let to = SocketAddrV4::new(ALIAS, sink.local_addr()?.port());
    let before = lab.rss()?;
    let ip = lab.attacker.ip;
    for port in 1..=6000 {
        lab.attacker.packet(&udp(SocketAddrV4::new(ip, port), to, b"x"))?;
        if port % 2000 == 0 {
            lab.bystander_is_served()?;
        }
    }
    until(Duration::from_secs(10), || lab.stat(&["udp_bindings"]).is_ok_and(|n| n >= 4000))?;
    ensure!(lab.stat(&["udp_bindings"])? <= 4096 + 16);
    lab.everybody_is_served()?;
    let after = lab.rss()?;
    ensure!(after < before + GROWTH, "{before} bytes became {after}");
    Ok(())
}

#[test]
fn names_with_empty_labels_pointers_in_circles_and_other_nonsense_are_answered_or_dropped() -> Result<()> {
    // libslirp 4.8.0: search domains with "..". gvproxy: an over-long search list breaks the guest.
    let dir = tempfile::tempdir()?;
    let resolv = dir.path().join("resolv.conf");
    let long: Vec<String> = (0..60).map(|n| format!("{}.{n}.example", "x".repeat(60))).collect();
    std::fs::write(&resolv, format!("nameserver 127.0.0.1\nsearch .. a..b . {}\n", long.join(" ")))?;
    let mut lab = Lab::new(&["--resolv-conf", resolv.to_str().context("path")?])?;
    let ip = lab.attacker.ip;
    let header = [0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let mut nonsense = vec![
        query(&["", "", ""]),
        query(&[".."]),
        query(&["a.b", "\0", "internal"]),
        query(&["x".repeat(63).as_str(); 20]),
        [&header[..], &[0xc0, 12, 0, 1, 0, 1]].concat(),
        [&header[..], &[0xc0, 0xff, 0, 1, 0, 1]].concat(),
        [&header[..], &[1, b'a', 0xc0, 12, 0, 1, 0, 1]].concat(),
        [&header[..4], &[0xff; 8]].concat(),
        [&header[..], &[0xff; 400]].concat(),
        vec![0; 12],
        vec![],
    ];
    let good = query(&["host", "portway", "internal"]);
    nonsense.extend((0..good.len()).map(|n| good[..n].to_vec()));
    nonsense.extend((0..good.len()).map(|n| [&good[..n], &[good[n] ^ 0xff], &good[n + 1..]].concat()));
    for bytes in nonsense {
        let from = SocketAddrV4::new(ip, 9);
        lab.attacker.packet(&udp(from, SocketAddrV4::new(ROUTER, 53), &bytes))?;
    }
    lab.everybody_is_served()
}

#[test]
fn the_source_addresses_of_others_are_not_a_guests_to_use() -> Result<()> {
    let mut lab = Lab::new(&[])?;
    let victim = Ipv4Addr::new(192, 168, 127, 2);
    let sink = UdpSocket::bind("127.0.0.1:0")?;
    sink.set_nonblocking(true)?;
    let to = SocketAddrV4::new(ALIAS, sink.local_addr()?.port());
    let mac = lab.attacker.mac;
    lab.everybody_is_served()?;
    for source in
        [victim, ROUTER, ALIAS, Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST, Ipv4Addr::new(224, 0, 0, 1)]
    {
        lab.attacker.packet(&udp(SocketAddrV4::new(source, 5), to, b"spoofed"))?;
        // And by ARP, announced and answered.
        for operation in [1, 2] {
            let mut arp = vec![0, 1, 8, 0, 6, 4, 0, operation];
            arp.extend(mac);
            arp.extend(source.octets());
            arp.extend([0; 6]);
            arp.extend(source.octets());
            lab.attacker.frame(&ethernet(mac, 0x0806, &arp))?;
        }
    }
    // With the gateway's own Ethernet address, and a group's, as the source.
    for from in [GATEWAY, [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let packet = udp(SocketAddrV4::new(lab.attacker.ip, 5), to, b"spoofed");
        lab.attacker.frame(&ethernet(from, 0x0800, &packet))?;
    }
    lab.everybody_is_served()?;
    ensure!(sink.recv(&mut [0; 10]).is_err(), "a spoofed datagram reached the host");
    Ok(())
}

// ---- the control socket ----

#[test]
fn an_api_client_cannot_hurt_by_names_lengths_or_silence() -> Result<()> {
    // gvproxy panics on a host name in `expose`.
    let mut lab = Lab::new(&[])?;
    let api = lab.dir.path().join("api");
    let say = |bytes: &[u8]| -> Result<String> {
        let mut client = UnixStream::connect(&api)?;
        client.set_read_timeout(Some(Duration::from_secs(15)))?;
        // A server that has had enough may close while we still write.
        let _ = client.write_all(bytes);
        let _ = client.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let post = |route: &str, body: &str| {
        format!(
            "POST {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    for remote in
        ["name:80", "name", ":", "", "[::1", "192.168.127.2:99999", "192.168.127.2:-1", "\\u0000:1", "a:b:c"]
    {
        let body = format!(r#"{{"local":"127.0.0.1:0","remote":"{remote}"}}"#);
        let answer = say(post("/services/forwarder/expose", &body).as_bytes())?;
        ensure!(answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"), "{remote}: {answer}");
    }
    for body in [
        "",
        "{",
        "null",
        "[]",
        "{\"specs\":[\"99999:1\"]}",
        "{\"specs\":[]}",
        "{\"specs\":1}",
        &"[".repeat(60_000),
    ] {
        let answer = say(post("/v1/ports", body).as_bytes())?;
        ensure!(answer.starts_with("HTTP/1.1 4"), "{}: {answer}", &body[..body.len().min(30)]);
    }
    let large = say(post("/v1/ports", &"x".repeat(1 << 20)).as_bytes())?;
    ensure!(large.is_empty() || large.starts_with("HTTP/1.1 4"), "{large}");
    say(&[0; 10_000])?;
    say(format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20)).as_bytes())?;
    say(format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(100_000)).as_bytes())?;
    // Sixty clients that say nothing, and one that says half a request: the next is served.
    let silent: Vec<UnixStream> = (0..60).map(|_| UnixStream::connect(&api)).collect::<Result<_, _>>()?;
    let mut half = UnixStream::connect(&api)?;
    half.write_all(b"GET /v1/st")?;
    lab.everybody_is_served()?;
    ensure!(lab.sidecar.json(&["stats"])?["uptime_s"].is_u64());
    drop((silent, half));
    lab.everybody_is_served()
}

#[test]
fn an_idle_sidecar_ends_at_once_and_a_lost_vmm_does_not_end_it() -> Result<()> {
    // gvproxy dies with the VM's link, exits with 0 after errors, and does not hear SIGTERM while idle.
    let mut lab = Lab::new(&[])?;
    let path = lab.dir.path().join("vm");
    lab.attacker = RawGuest::attach(&path, 77)?;
    lab.everybody_is_served()?;
    let Lab { sidecar, bystander, attacker, dir, .. } = lab;
    drop((bystander, attacker));
    let began = Instant::now();
    ensure!(sidecar.stop()?.code() == Some(0));
    ensure!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    ensure!(!dir.path().join("api").exists());
    Ok(())
}
