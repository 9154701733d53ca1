//! A guest with both versions of IP, seen through stock clients: ping, traceroute, rdisc6, dhclient, dig, curl, iperf3.
//!
//! The guest is a network namespace behind a tap; where routes of the host matter, the sidecar lives in a namespace too, with
//! routers behind it. All of it needs root; without, the tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::{Sidecar, until};

const PATIENCE: Duration = Duration::from_secs(20);
/// The guests' IPv6 network in these tests.
const SUBNET6: &str = "fd00:77::/64";
const GATEWAY: [&str; 2] = ["192.168.127.1", "fd00:77::1"];
const HOST: [&str; 2] = ["192.168.127.254", "fd00:77::254"];
const GUEST: &str = "192.168.127.77";

/// Attaches `guest` to a sidecar that runs in `host`, or here.
fn attach(dir: &Path, host: Option<&Namespace>, guest: &Namespace, options: &[&str]) -> Result<Sidecar> {
    let link = format!("tap:tap0,netns={},name=box", guest.path().display());
    let options = [&["--link", &link, "--subnet6", SUBNET6], options].concat();
    let sidecar = match host {
        Some(host) => Sidecar::start_in(host, dir, &options)?,
        None => Sidecar::start(dir, &options)?,
    };
    guest.up("tap0")?;
    Ok(sidecar)
}

/// Gives the guest its IPv4 address; the IPv6 one it makes itself.
fn address_v4(guest: &Namespace) -> Result<()> {
    guest.ip(&["address", "add", &format!("{GUEST}/24"), "dev", "tap0"])?;
    guest.ip(&["route", "add", "default", "via", GATEWAY[0]])
}

/// The address the guest made itself of the advertised prefix, when it may be used.
fn made_itself(guest: &Namespace) -> Result<IpAddr> {
    let mut found = None;
    until(PATIENCE, || {
        let (_, text) =
            guest.run("ip -6 -o address show dev tap0 scope global -tentative").unwrap_or_default();
        found = text.split_whitespace().find_map(|w| w.strip_suffix("/64")?.parse().ok());
        found.is_some()
    })
    .context("no address by SLAAC")?;
    found.context("no address")
}

/// Runs a command in the guest, which must succeed; what it printed.
fn run(guest: &Namespace, words: &str) -> Result<String> {
    let (good, text) = guest.run(words)?;
    ensure!(good, "{words}: {text}");
    Ok(text)
}

/// Answers every connection with one page.
fn serve_page(ip: &str) -> Result<u16> {
    let listener = TcpListener::bind((ip, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        }
    });
    Ok(port)
}

fn url(host: &str, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(host.parse().unwrap(), port))
}

#[test]
fn a_guest_makes_itself_an_address_and_reaches_gateway_and_host_over_both() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = attach(dir.path(), None, &guest, &["--ipv6", "on", "--publish", "0:box:5000"])?;
    address_v4(&guest)?;
    let made = made_itself(&guest)?;
    assert!(made.to_string().starts_with("fd00:77:"), "{made}");
    for address in [GATEWAY, HOST].concat() {
        run(&guest, &format!("ping -n -c 2 -i 0.2 -W 5 {address}"))?;
        // In fragments, both ways.
        run(&guest, &format!("ping -n -c 1 -W 5 -s 40000 {address}"))?;
    }
    let (v4, v6) = (serve_page("127.0.0.1")?, serve_page("::1")?);
    for (version, host, port) in [("-4", HOST[0], v4), ("-6", HOST[1], v6), ("-6", HOST[1], v4)] {
        // The last: the host alias over IPv6 finds what listens on 127.0.0.1 alone, too.
        let text = run(&guest, &format!("curl -gsS {version} -m 10 {}", url(host, port)))?;
        assert_eq!(text, "hello");
    }
    let (good, text) = guest.run(&format!("curl -gsS -m 10 {}", url(HOST[1], 1)))?;
    ensure!(!good && text.contains("refused") || text.contains("connect"), "{text}");

    let advertised = run(&guest, "rdisc6 -1 -q tap0")?;
    assert_eq!(advertised.trim(), SUBNET6);
    let advertised = run(&guest, "rdisc6 -1 tap0")?;
    for part in [
        "Recursive DNS server     : fd00:77::1",
        "portway.internal",
        "1800 (0x00000708) seconds",
        "1500 bytes",
    ] {
        ensure!(advertised.contains(part), "{part:?} is not in {advertised}");
    }
    let asked = run(&guest, "ndisc6 -1 -q fd00:77::254 tap0")?;
    assert_eq!(asked.trim().to_lowercase(), "5a:94:ef:e4:0c:dd");

    for (name, addresses) in [("gateway", GATEWAY), ("host", HOST)] {
        for (kind, address) in ["A", "AAAA"].into_iter().zip(addresses) {
            for server in GATEWAY {
                let question = format!("dig +short +time=5 @{server} {name}.portway.internal {kind}");
                assert_eq!(run(&guest, &question)?.trim(), address, "{question}");
            }
        }
    }
    // The guest leased nothing: it goes by the addresses it uses.
    for (kind, address) in [("A", GUEST.to_owned()), ("AAAA", made.to_string())] {
        let question = format!("dig +short +time=5 @{} box.portway.internal {kind}", GATEWAY[0]);
        until(PATIENCE, || run(&guest, &question).is_ok_and(|answer| answer.trim() == address))
            .with_context(|| question.clone())?;
        let back = run(&guest, &format!("dig +short +time=5 @{} -x {address}", GATEWAY[0]))?;
        assert_eq!(back.trim(), "box.portway.internal.");
    }
    assert_eq!(
        run(&guest, "dig +short +tcp +time=5 @fd00:77::1 host.portway.internal AAAA")?.trim(),
        HOST[1]
    );
    drop(sidecar);
    Ok(())
}

#[test]
fn domains_the_host_begins_to_search_are_advertised_and_those_it_does_not_withdrawn() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let resolv = dir.path().join("resolv.conf");
    let says = |domain: &str| std::fs::write(&resolv, format!("nameserver 127.0.0.1\nsearch {domain}\n"));
    says("office.example")?;
    let path = resolv.display().to_string();
    let sidecar = attach(dir.path(), None, &guest, &["--ipv6", "on", "--resolv-conf", &path])?;
    made_itself(&guest)?;
    // Advertisements are asked for here, and no name: nothing else has the file looked at.
    let advertised = |domain: &str| run(&guest, "rdisc6 -1 tap0").is_ok_and(|said| said.contains(domain));
    until(PATIENCE, || advertised("office.example"))?;
    says("home.example")?;
    until(Duration::from_secs(90), || advertised("home.example") && !advertised("office.example"))?;
    drop(sidecar);
    Ok(())
}

#[test]
fn a_stock_dhcpv6_client_gets_a_lease_that_is_listed_and_named() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = attach(dir.path(), None, &guest, &["--lease-time", "600"])?;
    made_itself(&guest)?;
    let (leases, pid) = (dir.path().join("dhclient.leases"), dir.path().join("dhclient.pid"));
    // Never with its own script, which rewrites /etc/resolv.conf of the whole machine: a network namespace has no files of its own.
    // What it got stands in the file.
    let client = format!("dhclient -6 -1 -sf /bin/true -lf {} -pf {} tap0", leases.display(), pid.display());
    let (_, text) = guest.run(&client)?;
    let kept = std::fs::read_to_string(&leases).with_context(|| text.clone())?;
    let ip =
        kept.lines().find_map(|l| l.trim().strip_prefix("iaaddr ")?.split(' ').next()).context("no lease")?;
    ensure!(kept.contains("dhcp6.name-servers fd00:77::1"), "{kept}");
    ensure!(kept.contains("max-life 600;"), "{kept}");
    let events = sidecar.json(&["events"])?;
    let is = |event: &serde_json::Value, kind: &str| event["type"] == kind;
    ensure!(events.as_array().is_some_and(|e| e.iter().any(|e| is(e, "link_up"))), "{events}");
    ensure!(events.as_array().is_some_and(|e| e.iter().any(|e| is(e, "lease") && e["ip"] == ip)), "{events}");
    let listed = sidecar.json(&["leases"])?;
    let ours = listed.as_array().into_iter().flatten().find(|l| l["ip"] == ip).context("it is not listed")?;
    assert_eq!(ours["name"], "box");
    // gvproxy's listing knows IPv4 alone: its callers look a MAC up, and would find this address.
    for route in ["leases", "services/dhcp/leases"] {
        let api = dir.path().join("api").display().to_string();
        let url = format!("http://portway/{route}");
        let out = std::process::Command::new("curl").args(["-fsS", "--unix-socket", &api, &url]).output()?;
        let leases: serde_json::Map<_, _> = serde_json::from_slice(&out.stdout)?;
        ensure!(leases.keys().all(|ip| ip.parse::<std::net::Ipv4Addr>().is_ok()), "{leases:?}");
    }
    until(PATIENCE, || {
        let answer = guest.run("dig +short +time=5 @fd00:77::1 box.portway.internal AAAA");
        answer.is_ok_and(|(_, text)| text.trim() == ip)
    })?;
    let (_, text) = guest.run(&client.replace("-1", "-r"))?;
    let listed = sidecar.json(&["leases"])?;
    ensure!(!listed.as_array().into_iter().flatten().any(|l| l["ip"] == ip), "not released: {text}");
    Ok(())
}

#[test]
fn a_published_port_on_either_loopback_reaches_a_guest_that_has_ipv6_alone() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar =
        attach(dir.path(), None, &guest, &["--publish", "0:box:5000", "--publish", "0:box:5001/udp"])?;
    let address = made_itself(&guest)?;
    let listener = guest.inside(|| Ok(TcpListener::bind((address, 5000))?))?;
    let datagrams = guest.inside(|| Ok(UdpSocket::bind((address, 5001))?))?;
    let ports = sidecar.json(&["ports"])?;
    let port = |n: usize| u16::try_from(ports[n]["host_port"].as_u64().unwrap()).unwrap();
    for loopback in ["127.0.0.1", "::1"] {
        let loopback: IpAddr = loopback.parse()?;
        let mut client = TcpStream::connect_timeout(&SocketAddr::new(loopback, port(0)), PATIENCE)?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.write_all(b"hello")?;
        let (mut server, from) = listener.accept()?;
        assert_eq!(from.ip(), HOST[1].parse::<IpAddr>()?);
        let mut bytes = [0; 5];
        server.read_exact(&mut bytes)?;
        server.write_all(b"world")?;
        client.read_exact(&mut bytes)?;
        assert_eq!(&bytes, b"world");

        let client = UdpSocket::bind((loopback, 0))?;
        client.set_read_timeout(Some(PATIENCE))?;
        datagrams.set_read_timeout(Some(PATIENCE))?;
        client.send_to(b"ping", (loopback, port(1)))?;
        let (n, from) = datagrams.recv_from(&mut bytes)?;
        datagrams.send_to(&bytes[..n], from)?;
        let (n, _) = client.recv_from(&mut bytes)?;
        assert_eq!(&bytes[..n], b"ping");
    }
    Ok(())
}

#[test]
fn datagrams_of_64_kib_cross_both_ways_and_a_refused_one_is_an_error_of_the_guests_socket() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = attach(dir.path(), None, &guest, &["--ipv6", "on"])?;
    address_v4(&guest)?;
    let made = made_itself(&guest)?;
    for (loopback, guest_ip, alias) in [("127.0.0.1", GUEST.parse()?, HOST[0]), ("::1", made, HOST[1])] {
        let host = UdpSocket::bind((loopback, 0))?;
        host.set_read_timeout(Some(PATIENCE))?;
        let alias: IpAddr = alias.parse()?;
        let to = SocketAddr::new(alias, host.local_addr()?.port());
        let socket = guest.inside(|| Ok(UdpSocket::bind((guest_ip, 0))?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(to)?;
        let mut buffer = vec![0; 70_000];
        for size in [1, 1472, 1473, 9000, 65_507] {
            let bytes: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
            socket.send(&bytes)?;
            let (n, from) =
                host.recv_from(&mut buffer).with_context(|| format!("{size} bytes to the host"))?;
            ensure!(buffer[..n] == bytes, "{size} bytes became others");
            host.send_to(&bytes, from)?;
            let n = socket.recv(&mut buffer).with_context(|| format!("{size} bytes to the guest"))?;
            ensure!(buffer[..n] == bytes, "{size} bytes became others on their way back");
        }
        drop(host);
        socket.send(b"anybody?")?;
        let error = socket.recv(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
    }
    // What listens on 127.0.0.1 alone is the host's loopback to a guest that comes over IPv6, too.
    let host = UdpSocket::bind("127.0.0.1:0")?;
    host.set_read_timeout(Some(PATIENCE))?;
    let socket = guest.inside(|| Ok(UdpSocket::bind((made, 0))?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect((HOST[1], host.local_addr()?.port()))?;
    for bytes in [&b"first"[..], b"second", b""] {
        socket.send(bytes)?;
        let mut buffer = [0; 16];
        let (n, from) = host.recv_from(&mut buffer)?;
        assert_eq!(&buffer[..n], bytes);
        host.send_to(&buffer[..n], from)?;
        assert_eq!(socket.recv(&mut buffer)?, bytes.len());
    }
    let stats = sidecar.json(&["stats"])?;
    assert!(stats["drops"]["fragment_overlap"].is_null(), "{stats}");
    Ok(())
}

#[test]
fn a_port_that_the_guest_has_closed_is_refused_at_the_host() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = attach(dir.path(), None, &guest, &["--ipv6", "on"])?;
    address_v4(&guest)?;
    let made = made_itself(&guest)?;
    for (loopback, guest_ip, alias) in [("127.0.0.1", GUEST.parse()?, HOST[0]), ("::1", made, HOST[1])] {
        let alias: IpAddr = alias.parse()?;
        let host = UdpSocket::bind((loopback, 0))?;
        host.set_read_timeout(Some(PATIENCE))?;
        let socket = guest.inside(|| Ok(UdpSocket::bind((guest_ip, 0))?))?;
        socket.send_to(b"out", (alias, host.local_addr()?.port()))?;
        let mut buffer = [0; 16];
        let (_, seen) = host.recv_from(&mut buffer)?;
        drop(socket);
        host.connect(seen)?;
        host.set_read_timeout(Some(Duration::from_millis(20)))?;
        // The first tells the guest's kernel, which refuses; then the host's does.
        let mut error = None;
        until(PATIENCE, || {
            error = host.send(b"anybody?").and_then(|_| host.recv(&mut buffer)).err().map(|e| e.kind());
            error == Some(std::io::ErrorKind::ConnectionRefused)
        })
        .with_context(|| format!("{loopback}: {error:?}"))?;
    }
    assert_eq!(sidecar.json(&["stats"])?["udp_bindings"], 0);
    Ok(())
}

#[test]
fn who_may_answer_a_guests_datagrams_is_the_operators_choice() -> Result<()> {
    // Of three of the host: the one the guest has sent to, another port of the same address, and another address.
    for (filter, heard) in
        [("endpoint", [true, false, false]), ("address", [true, true, false]), ("any", [true; 3])]
    {
        let Some(guest) = Namespace::new()? else { return Ok(()) };
        let Some(host) = Namespace::new()? else { return Ok(()) };
        for address in ["10.61.1.1/32", "10.61.1.2/32"] {
            host.ip(&["address", "add", address, "dev", "lo"])?;
        }
        let dir = tempfile::tempdir()?;
        let sidecar = attach(dir.path(), Some(&host), &guest, &["--udp-filter", filter, "--udp-idle", "30"])?;
        address_v4(&guest)?;
        let socket = guest.inside(|| Ok(UdpSocket::bind((GUEST, 0))?))?;
        let [known, same, other] = ["10.61.1.1", "10.61.1.1", "10.61.1.2"]
            .map(|address| host.inside(|| Ok(UdpSocket::bind((address, 0))?)));
        let (known, same, other) = (known?, same?, other?);
        known.set_read_timeout(Some(PATIENCE))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = [0; 16];
        socket.send_to(b"out", known.local_addr()?)?;
        let (_, seen) = known.recv_from(&mut buffer)?;
        for (from, heard) in [(&same, heard[1]), (&other, heard[2]), (&known, heard[0])] {
            from.send_to(b"in", seen)?;
            if heard {
                let (_, shown) = socket.recv_from(&mut buffer).with_context(|| filter.to_owned())?;
                assert_eq!(shown, from.local_addr()?, "{filter}: the true source");
            }
        }
        // What was not to be heard came before the last, which was: it is not on its way any more.
        socket.set_nonblocking(true)?;
        ensure!(socket.recv_from(&mut buffer).is_err(), "{filter}: more was heard");
        // The mapping is the same whomever the guest sends to, whatever the filter (RFC 4787 REQ-1).
        socket.set_nonblocking(false)?;
        other.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"out", other.local_addr()?)?;
        assert_eq!(other.recv_from(&mut buffer)?.1.port(), seen.port(), "{filter}");
        assert_eq!(sidecar.json(&["stats"])?["udp_bindings"], 1, "{filter}");
    }
    Ok(())
}

/// A second of datagrams between the guest and the host's `bind`: how many were sent, how many lost, and the client's report.
fn iperf3(guest: &Namespace, bind: &str, alias: &str, direction: &str) -> Result<(f64, f64, String)> {
    let port = TcpListener::bind((bind, 0))?.local_addr()?.port();
    let mut server = std::process::Command::new("iperf3")
        .args(["-s", "-1", "-B", bind, "-p", &port.to_string()])
        .stdout(std::process::Stdio::null())
        .spawn()
        .context("iperf3")?;
    let client = format!("iperf3 -u -b 50M -t 1 --json {direction} -c {alias} -p {port}");
    let mut report = String::new();
    let done = until(PATIENCE, || {
        // The server may not listen yet; with --json a client that failed is content all the same.
        guest.run(&client).is_ok_and(|(good, text)| {
            report = text;
            good && report.contains("lost_packets")
        })
    });
    let _ = server.kill();
    server.wait()?;
    done.with_context(|| report.clone())?;
    let value: serde_json::Value = serde_json::from_str(&report)?;
    let number = |key: &str| value["end"]["sum"][key].as_f64().unwrap_or(0.0);
    Ok((number("packets"), number("lost_packets"), report))
}

#[test]
fn iperf3_sends_datagrams_both_ways() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let _sidecar = attach(dir.path(), None, &guest, &["--ipv6", "on"])?;
    address_v4(&guest)?;
    made_itself(&guest)?;
    for (bind, alias) in [("127.0.0.1", HOST[0]), ("::1", HOST[1])] {
        for direction in ["", "-R"] {
            // On a busy machine the receiver is not there in time for all: once out of three it is.
            let mut last = String::new();
            let few = (0..3).any(|_| match iperf3(&guest, bind, alias, direction) {
                Ok((sent, lost, report)) => {
                    last = report;
                    sent > 1000.0 && lost < sent / 5.0
                }
                Err(error) => {
                    last = format!("{error:#}");
                    false
                }
            });
            ensure!(few, "{bind} {direction}: {last}");
        }
    }
    Ok(())
}

/// host ─ first ─ second ─ far: each a namespace, the link in the middle with a smaller MTU. The guest's sidecar is to live in
/// the first.
struct Chain {
    host: Namespace,
    _routers: [Namespace; 2],
    _far: Namespace,
}

/// The hops of a chain behind the gateway, and their addresses of each version.
const HOPS: [[&str; 2]; 3] =
    [["10.61.1.2", "2001:db8:1::2"], ["10.61.2.2", "2001:db8:2::2"], ["10.61.3.2", "2001:db8:3::2"]];
const NARROW: u16 = 1400;

fn chain() -> Result<Option<Chain>> {
    let (Some(host), Some(first), Some(second), Some(far)) =
        (Namespace::new()?, Namespace::new()?, Namespace::new()?, Namespace::new()?)
    else {
        return Ok(None);
    };
    host.cable(
        "east",
        ["10.61.1.1/24", "2001:db8:1::1/64"],
        &first,
        ["10.61.1.2/24", "2001:db8:1::2/64"],
        1500,
    )?;
    first.cable(
        "mid",
        ["10.61.2.1/24", "2001:db8:2::1/64"],
        &second,
        ["10.61.2.2/24", "2001:db8:2::2/64"],
        NARROW,
    )?;
    second.cable(
        "west",
        ["10.61.3.1/24", "2001:db8:3::1/64"],
        &far,
        ["10.61.3.2/24", "2001:db8:3::2/64"],
        1500,
    )?;
    for router in [&first, &second] {
        router.sysctl("net.ipv4.ip_forward", "1")?;
        router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        // Routers answer a burst of probes.
        router.sysctl("net.ipv6.icmp.ratelimit", "0")?;
        router.sysctl("net.ipv4.icmp_ratelimit", "0")?;
    }
    far.sysctl("net.ipv4.icmp_ratelimit", "0")?;
    far.sysctl("net.ipv6.icmp.ratelimit", "0")?;
    for (at, to) in [
        (&host, ["10.61.1.2", "2001:db8:1::2"]),
        (&first, ["10.61.2.2", "2001:db8:2::2"]),
        (&second, ["10.61.2.1", "2001:db8:2::1"]),
        (&far, ["10.61.3.1", "2001:db8:3::1"]),
    ] {
        for gateway in to {
            let version = if gateway.contains(':') { "-6" } else { "-4" };
            at.ip(&[version, "route", "add", "default", "via", gateway])?;
        }
    }
    Ok(Some(Chain { host, _routers: [first, second], _far: far }))
}

#[test]
fn traceroute_by_udp_and_icmp_shows_every_hop_and_the_mtu_of_the_path_is_told() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let Some(chain) = chain()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let _sidecar = attach(dir.path(), Some(&chain.host), &guest, &[])?;
    address_v4(&guest)?;
    made_itself(&guest)?;
    // Nobody may have ping sockets at first, but the process may have raw ones; then by ping sockets.
    for range in ["1 0", "0 2147483647"] {
        chain.host.sysctl("net.ipv4.ping_group_range", range)?;
        for (n, version) in ["-4", "-6"].into_iter().enumerate() {
            let to = HOPS[2][n];
            for method in ["-U", "-I"] {
                let text = run(&guest, &format!("traceroute {version} {method} -n -q 1 -w 5 {to}"))?;
                let seen: Vec<&str> =
                    text.lines().skip(1).filter_map(|l| l.split_whitespace().nth(1)).collect();
                let expected: Vec<&str> = std::iter::once(GATEWAY[n]).chain(HOPS.map(|h| h[n])).collect();
                assert_eq!(seen, expected, "{version} {method}, ping_group_range {range}: {text}");
            }
            run(&guest, &format!("ping {version} -n -c 2 -i 0.2 -W 5 {to}"))?;
            let (_, text) = guest.run(&format!("ping {version} -n -c 1 -t 2 -W 5 {to}"))?;
            ensure!(text.contains("Time to live exceeded") || text.contains("Hop limit"), "{text}");
        }
    }
    // A packet too large for the middle, which nobody may fragment.
    let (_, text) = guest.run(&format!("ping -4 -n -c 1 -W 5 -M do -s 1450 {}", HOPS[2][0]))?;
    ensure!(text.contains("mtu = 1400") || text.contains("mtu=1400"), "{text}");
    let (_, text) = guest.run(&format!("ping -6 -n -c 1 -W 5 -M do -s 1440 {}", HOPS[2][1]))?;
    ensure!(text.contains("mtu = 1400") || text.contains("mtu=1400") || text.contains("too big"), "{text}");
    Ok(())
}

#[test]
fn where_the_host_forbids_pings_guests_are_told_so_and_the_log_and_doctor_name_the_sysctl() -> Result<()> {
    let (Some(guest), Some(host), Some(other)) = (Namespace::new()?, Namespace::new()?, Namespace::new()?)
    else {
        return Ok(());
    };
    host.cable(
        "east",
        ["10.61.1.1/24", "2001:db8:1::1/64"],
        &other,
        ["10.61.1.2/24", "2001:db8:1::2/64"],
        1500,
    )?;
    host.sysctl("net.ipv4.ping_group_range", "1 0")?;
    let dir = tempfile::tempdir()?;
    let portway = portway_tests::vm::portway()?;
    // As a user's process: without the capability for raw sockets.
    let mut command = host.command("setpriv");
    command.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"]).arg(&portway);
    let link = format!("tap:tap0,netns={},name=box", guest.path().display());
    let options = ["--link", &link, "--subnet6", SUBNET6, "--ipv6", "on"];
    let sidecar = Sidecar::start_by(command, dir.path(), &options)?;
    guest.up("tap0")?;
    address_v4(&guest)?;
    made_itself(&guest)?;
    for to in ["10.61.1.2", "2001:db8:1::2"] {
        let start = Instant::now();
        let (good, text) = guest.run(&format!("ping -n -c 1 -W 10 {to}"))?;
        ensure!(!good && start.elapsed() < Duration::from_secs(5), "{to}, {:?}: {text}", start.elapsed());
        let text = text.to_lowercase();
        ensure!(text.contains("filtered") || text.contains("prohibited"), "{to}: {text}");
    }
    let log = sidecar.log();
    assert_eq!(log.matches("net.ipv4.ping_group_range").count(), 1, "{log}");
    // The gateway answers by itself.
    run(&guest, &format!("ping -n -c 1 -W 5 {}", GATEWAY[0]))?;
    let mut doctor = host.command("setpriv");
    doctor.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&portway).arg("doctor");
    let said = doctor.arg("--api").arg(format!("unix:{}", dir.path().join("api").display())).output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.contains("may not open ping sockets") && said.contains("ping_group_range"), "{said}");
    Ok(())
}

#[test]
fn a_guest_on_a_host_without_ipv6_has_no_default_route_and_follows_when_the_host_gets_one() -> Result<()> {
    let (Some(guest), Some(host), Some(other)) = (Namespace::new()?, Namespace::new()?, Namespace::new()?)
    else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let _sidecar = attach(dir.path(), Some(&host), &guest, &[])?;
    address_v4(&guest)?;
    made_itself(&guest)?;
    let default_route =
        || guest.run("ip -6 route show default").is_ok_and(|(_, text)| text.contains("default"));
    assert!(!default_route());
    // The gateway is there all the same.
    run(&guest, "ping -n -c 1 -W 5 fd00:77::1")?;
    // One that has a route of its own making is told at once, by ICMPv6.
    guest.ip(&["-6", "route", "add", "2001:db8:9::/64", "via", "fe80::5894:efff:fee4:cdd", "dev", "tap0"])?;
    let start = Instant::now();
    let (good, text) = guest.run("curl -gsS -6 -m 10 http://[2001:db8:9::1]/")?;
    ensure!(!good && start.elapsed() < Duration::from_secs(5), "{text}, after {:?}", start.elapsed());
    let (_, text) = guest.run("ping -n -c 1 -W 5 2001:db8:9::1")?;
    ensure!(text.contains("unreachable"), "{text}");

    host.cable(
        "east",
        ["10.61.1.1/24", "2001:db8:1::1/64"],
        &other,
        ["10.61.1.2/24", "2001:db8:1::2/64"],
        1500,
    )?;
    host.ip(&["-6", "route", "add", "default", "via", "2001:db8:1::2"])?;
    until(PATIENCE, default_route).context("no default route after the host got one")?;
    run(&guest, "ping -n -c 1 -W 5 2001:db8:1::2")?;
    host.ip(&["-6", "route", "delete", "default"])?;
    until(PATIENCE, || !default_route()).context("the default route stayed")
}

/// A name with an address of each version, and a client that would wait a minute before it tried the other.
#[test]
fn a_client_goes_on_to_ipv4_at_once_when_ipv6_is_unreachable_or_refused_at_the_host() -> Result<()> {
    let (Some(guest), Some(host), Some(far)) = (Namespace::new()?, Namespace::new()?, Namespace::new()?)
    else {
        return Ok(());
    };
    let (near4, far4, far6) = ("10.61.1.1/24", "10.61.1.2", "2001:db8:1::2");
    let far_ends = [&format!("{far4}/24")[..], &format!("{far6}/64")[..]];
    host.cable("east", [near4, "2001:db8:1::1/64"], &far, far_ends, 1500)?;
    let dir = tempfile::tempdir()?;
    let link = format!("tap:tap0,netns={},name=box", guest.path().display());
    let mut names = Vec::new();
    // Nowhere: the host has no route to it. Refused: a host that is there, and serves IPv4 alone.
    for (name, v6) in [("nowhere.test", "2001:db8:9::1"), ("refused.test", far6)] {
        names.extend([format!("{name}={v6}"), format!("{name}={far4}")]);
    }
    let hosts = names.iter().flat_map(|name| ["--dns-host", name]);
    // A network whose addresses are global: from one of a ULA, IPv4 goes first (RFC 6724).
    let fixed = ["--link", &link, "--subnet6", "2001:db8:77::/64", "--ipv6", "on", "--hosts-file", "off"];
    let options: Vec<&str> = fixed.into_iter().chain(hosts).collect();
    let _sidecar = Sidecar::start_in(&host, dir.path(), &options)?;
    guest.up("tap0")?;
    address_v4(&guest)?;
    made_itself(&guest)?;
    guest.resolve_with(GATEWAY[0].parse()?)?;
    let listener = far.inside(|| Ok(TcpListener::bind((far4, 80))?))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        }
    });
    for name in ["nowhere.test", "refused.test"] {
        let asked = run(&guest, &format!("dig +short +time=5 {name} AAAA"))?;
        ensure!(asked.starts_with("2001:db8:"), "{asked}");
        // -v tells that IPv6 was tried first.
        let curl = "curl -sS -v -m 30 --happy-eyeballs-timeout-ms 60000 --noproxy *";
        let start = Instant::now();
        let text = run(&guest, &format!("{curl} http://{name}/"))?;
        ensure!(text.contains("hello") && text.contains("2001:db8:"), "{text}");
        ensure!(start.elapsed() < Duration::from_secs(5), "{name} took {:?}: {text}", start.elapsed());
        let start = Instant::now();
        let (good, text) = guest.run(&format!("curl -6 -sS -m 30 --noproxy * http://{name}/"))?;
        ensure!(!good && start.elapsed() < Duration::from_secs(5), "{name}, {:?}: {text}", start.elapsed());
    }
    Ok(())
}

#[test]
fn a_guest_that_drops_five_of_a_hundred_frames_gets_and_sends_every_byte() -> Result<()> {
    const LEN: usize = 6_000_000;
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = attach(dir.path(), None, &guest, &["--publish", "0:box:5000"])?;
    address_v4(&guest)?;
    // Small frames, so that many are lost; those to the guest are segments of up to 64 KiB all the same.
    guest.ip(&["link", "set", "dev", "tap0", "gso_max_segs", "1"])?;
    for (chain, device) in [("INPUT", "-i"), ("OUTPUT", "-o")] {
        let drop = format!("-A {chain} {device} tap0 -m statistic --mode random --probability 0.05 -j DROP");
        run(&guest, &format!("iptables {drop}"))?;
    }
    let data: Vec<u8> = (0..LEN).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[4]).collect();
    let port = u16::try_from(sidecar.json(&["ports"])?[0]["host_port"].as_u64().context("a port")?)?;
    let served = TcpListener::bind("127.0.0.1:0")?;
    let listener = guest.inside(|| Ok(TcpListener::bind((GUEST, 5000))?))?;
    let to = SocketAddr::new(HOST[0].parse()?, served.local_addr()?.port());
    let out = guest.inside(|| Ok(TcpStream::connect(to)?))?;
    let pairs = [(out, served.accept()?.0), {
        let client = TcpStream::connect(("127.0.0.1", port))?;
        (listener.accept()?.0, client)
    }];
    // Both ways at once, over the outgoing connection and the published one.
    let (data, mut ends) = (std::sync::Arc::new(data), Vec::new());
    for stream in pairs.into_iter().flat_map(|(a, b)| [a, b]) {
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let (mut writer, bytes) = (stream.try_clone()?, std::sync::Arc::clone(&data));
        let sender = std::thread::spawn(move || {
            writer.write_all(&bytes)?;
            writer.shutdown(std::net::Shutdown::Write)
        });
        let mut reader = stream;
        let receiver = std::thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).map(|_| got)
        });
        ends.push((sender, receiver));
    }
    for (sender, receiver) in ends {
        let got = receiver.join().unwrap().context("a reader")?;
        ensure!(got == **data, "{} bytes of {LEN}, or others", got.len());
        sender.join().unwrap().context("a writer")?;
    }
    let (_, rules) = guest.run("iptables -L -v -n -x")?;
    let dropped: u64 = rules
        .lines()
        .filter(|l| l.contains("DROP"))
        .filter_map(|l| l.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    ensure!(dropped > 50, "next to nothing was lost: {rules}");
    Ok(())
}
