//! Names for real clients: dig, curl and dnsperf in a network namespace, the real `portway serve`, and a resolver of the
//! test's own in the place of the host's. It needs root; without, the tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::guest::Guest;
use portway_tests::namespace::Namespace;
use portway_tests::resolver::Resolver;
use portway_tests::secure::{self, Authority, SecureResolver};
use portway_tests::sidecar::{Sidecar, until};

const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 127, 1));
const BOX: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 127, 77));
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];
const ANSWER: [u8; 4] = [198, 51, 100, 7];

struct Lab {
    namespace: Namespace,
    sidecar: Sidecar,
    resolver: Resolver,
    dir: tempfile::TempDir,
}

impl Lab {
    /// `None` without root.
    fn new(options: &[&str]) -> Result<Option<Self>> {
        let Some(namespace) = Namespace::new()? else { return Ok(None) };
        let dir = tempfile::tempdir()?;
        let resolver = Resolver::start(SocketAddr::from((LOOPBACK, 0)), ANSWER)?;
        let link = format!("tap:tap0,netns={},name=box", namespace.path().display());
        let upstream = resolver.address.to_string();
        let fixed = ["--link", &link, "--dns-upstream", &upstream, "--hosts-file", "off"];
        let sidecar = Sidecar::start(dir.path(), &[&fixed[..], options].concat())?;
        namespace.configure("tap0", BOX, GATEWAY, 1500)?;
        namespace.resolve_with(GATEWAY)?;
        Ok(Some(Self { namespace, sidecar, resolver, dir }))
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let out = self.namespace.command(program).args(args).output().context(program.to_owned())?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "{program} {}: {text}{errors}", args.join(" "));
        Ok(text)
    }

    fn dig(&self, args: &[&str]) -> Result<String> {
        self.run("dig", &[&["@192.168.127.1", "+tries=1", "+time=6"][..], args].concat())
    }

    fn short(&self, args: &[&str]) -> Result<String> {
        Ok(self.dig(&[args, &["+short"]].concat())?.trim().to_owned())
    }
}

#[test]
fn dig_sees_right_answers_of_our_zones_and_right_negative_ones() -> Result<()> {
    let Some(lab) = Lab::new(&[])? else { return Ok(()) };
    let mut guest = Guest::attach(&lab.dir.path().join("vm"), 1)?;
    let (address, ..) = guest.dhcp()?;
    assert_eq!(lab.short(&["gateway.portway.internal"])?, "192.168.127.1");
    assert_eq!(lab.short(&["HOST.Docker.Internal"])?, "192.168.127.254");
    assert_eq!(lab.short(&["web.portway.internal"])?, address.to_string());
    assert_eq!(lab.short(&["-x", &address.to_string()])?, "web.portway.internal.");
    let whole = lab.dig(&["gAtEwAy.portway.INTERNAL"])?;
    ensure!(whole.contains(";gAtEwAy.portway.INTERNAL.") && whole.contains("flags: qr aa rd ra"), "{whole}");
    let nodata = lab.dig(&["gateway.portway.internal", "MX"])?;
    ensure!(nodata.contains("status: NOERROR") && nodata.contains("ANSWER: 0, AUTHORITY: 1"), "{nodata}");
    let nxdomain = lab.dig(&["nobody.portway.internal"])?;
    ensure!(nxdomain.contains("status: NXDOMAIN") && nxdomain.contains("IN\tSOA"), "{nxdomain}");
    let pointer = lab.dig(&["-x", "192.168.127.200"])?;
    ensure!(
        pointer.contains("status: NXDOMAIN") && pointer.contains("127.168.192.in-addr.arpa."),
        "{pointer}"
    );
    assert_eq!(lab.resolver.asked(), 0, "none of it is anybody else's to know");
    let soa = lab.short(&["portway.internal", "SOA"])?;
    ensure!(soa.starts_with("gateway.portway.internal. hostmaster.portway.internal."), "{soa}");
    Ok(())
}

#[test]
fn dig_sees_the_resolvers_answers_cut_ones_by_tcp_and_negative_ones_for_their_time() -> Result<()> {
    let Some(lab) = Lab::new(&[])? else { return Ok(()) };
    assert_eq!(lab.short(&["www.example"])?, "198.51.100.7");
    let before = lab.resolver.asked();
    assert_eq!(lab.short(&["WWW.example"])?, "198.51.100.7");
    assert_eq!(lab.resolver.asked(), before, "from the cache");
    let cut = lab.dig(&["big.example", "+noedns", "+ignore"])?;
    ensure!(cut.contains("flags: qr tc rd ra") && cut.contains("ANSWER: 0"), "{cut}");
    // dig follows TC by itself.
    assert_eq!(lab.short(&["big.example", "+noedns"])?.lines().count(), 40);
    assert_eq!(lab.short(&["big.example", "+tcp"])?.lines().count(), 40);
    let edns = lab.dig(&["big.example", "+bufsize=1232", "+ignore"])?;
    ensure!(edns.contains("ANSWER: 40") && edns.contains("; EDNS: version: 0"), "{edns}");
    let nxdomain = lab.dig(&["nx.example"])?;
    ensure!(nxdomain.contains("status: NXDOMAIN") && nxdomain.contains("\t5\tIN\tSOA"), "{nxdomain}");
    let nodata = lab.dig(&["none.example"])?;
    ensure!(nodata.contains("status: NOERROR") && nodata.contains("AUTHORITY: 1"), "{nodata}");
    let refused = lab.dig(&["version.bind", "CH", "TXT"])?;
    ensure!(refused.contains("status: REFUSED"), "{refused}");
    Ok(())
}

#[test]
fn names_come_and_go_by_the_command_line_and_curl_finds_the_host() -> Result<()> {
    let Some(lab) = Lab::new(&["--dns-host", "first.test=192.0.2.1"])? else { return Ok(()) };
    let cli = |args: &[&str]| -> Result<String> {
        let out = lab.sidecar.cli(args)?;
        ensure!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    };
    assert_eq!(lab.short(&["first.test"])?, "192.0.2.1");
    let added =
        cli(&["dns", "add", "app.test=192.168.127.254", "*.apps.test=192.0.2.9", "app.test=2001:db8::9"])?;
    ensure!(added.lines().count() == 3 && added.contains("added app.test=192.168.127.254"), "{added}");
    assert_eq!(lab.short(&["a.b.apps.test"])?, "192.0.2.9");
    assert_eq!(lab.short(&["app.test", "AAAA"])?, "2001:db8::9");
    let listed = lab.sidecar.json(&["dns", "ls"])?;
    let origin = |name: &str| {
        let all = listed.as_array().into_iter().flatten();
        all.filter(|r| r["name"] == name).map(|r| r["origin"].clone()).next()
    };
    assert_eq!((origin("app.test"), origin("first.test")), (Some("live".into()), Some("config".into())));

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept()?;
            let mut request = [0; 2048];
            let _ = stream.read(&mut request)?;
            stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")?;
        }
        Ok(())
    });
    for name in ["host.portway.internal", "app.test"] {
        let url = format!("http://{name}:{port}/");
        assert_eq!(lab.run("curl", &["-4", "-sS", "--noproxy", "*", "--max-time", "10", &url])?, "hello");
    }
    server.join().unwrap()?;

    cli(&["dns", "rm", "app.test", "first.test=192.0.2.1"])?;
    assert_eq!(lab.short(&["first.test"])?, "198.51.100.7", "the resolvers' to answer now");
    let gone = lab.sidecar.cli(&["dns", "rm", "app.test"])?;
    ensure!(gone.status.code() == Some(1), "{gone:?}");
    ensure!(String::from_utf8_lossy(&gone.stderr).contains("app.test is no record"), "{gone:?}");
    let bad = lab.sidecar.cli(&["dns", "add", "app.test"])?;
    ensure!(bad.status.code() == Some(2), "{bad:?}");
    Ok(())
}

#[test]
fn a_domain_has_its_own_resolver_and_inside_addresses_are_kept_from_guests_elsewhere() -> Result<()> {
    let corp = Resolver::start(SocketAddr::from((LOOPBACK, 0)), [10, 9, 8, 7])?;
    let domain = format!("corp.test={}", corp.address);
    let options = ["--dns-upstream", &domain, "--dns-rebind-protection", "on", "--dns-private", "lan.test"];
    let Some(lab) = Lab::new(&options)? else { return Ok(()) };
    assert_eq!(lab.short(&["wiki.corp.test"])?, "10.9.8.7");
    assert_eq!((corp.asked(), lab.resolver.asked()), (1, 0));
    assert_eq!(lab.short(&["inside.evil.test"])?, "");
    assert_eq!(lab.short(&["inside.lan.test"])?, "10.0.0.1");
    assert_eq!(lab.short(&["www.test"])?, "198.51.100.7");
    Ok(())
}

/// systemd-resolved: the host's, or the one tests/setup.sh unpacked, since its package would take the host's resolv.conf.
fn systemd_resolved() -> Option<std::path::PathBuf> {
    let unpacked =
        portway_tests::vm::target_dir().ok().map(|dir| dir.join("tests/lib/systemd/systemd-resolved"));
    let places = ["/usr/lib/systemd/systemd-resolved", "/lib/systemd/systemd-resolved"].map(Into::into);
    places.into_iter().chain(unpacked).find(|path| path.exists())
}

#[test]
fn systemd_resolved_is_asked_at_127_0_0_53_and_whom_it_asks_instead_is_heard_at_once() -> Result<()> {
    let (Some(host), Some(world)) = (Namespace::new()?, Namespace::new()?) else { return Ok(()) };
    let Some(resolved) = systemd_resolved() else {
        eprintln!("SKIPPED: there is no systemd-resolved here (tests/setup.sh fetches it)");
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    // It asks nobody on a host without a network.
    host.connect(&world, Ipv4Addr::new(203, 0, 113, 1).into(), Ipv4Addr::new(203, 0, 113, 9).into())?;
    host.ip(&["route", "add", "default", "via", "203.0.113.9"])?;
    let upstream = |last| {
        world.ip(&["address", "replace", &format!("203.0.113.{last}/24"), "dev", "cable"])?;
        world.inside(|| Resolver::start(SocketAddr::from(([203, 0, 113, last], 53)), [198, 51, 100, last]))
    };
    let (first, second) = (upstream(9)?, upstream(10)?);
    // The user it becomes may not be there; its directories are to be its own.
    let passwd = dir.path().join("passwd");
    let users =
        std::fs::read_to_string("/etc/passwd")? + "\nsystemd-resolve:x:64991:64991::/:/usr/sbin/nologin\n";
    std::fs::write(&passwd, users)?;
    let group = dir.path().join("group");
    std::fs::write(&group, std::fs::read_to_string("/etc/group")? + "\nsystemd-resolve:x:64991:\n")?;
    let settings = dir.path().join("portway.conf");
    let write = |server: &Resolver| {
        let text = format!(
            "[Resolve]\nDNS={}\nDNSSEC=no\nLLMNR=no\nMulticastDNS=no\nFallbackDNS=\n",
            server.address
        );
        std::fs::write(&settings, text)
    };
    write(&first)?;
    let script = format!(
        "set -e; mount -t tmpfs none /run/systemd; mkdir -p /run/systemd/resolve /run/systemd/resolved.conf.d; \
         ln -s {0}/portway.conf /run/systemd/resolved.conf.d; mount --bind {0}/passwd /etc/passwd; \
         mount --bind {0}/group /etc/group; chown systemd-resolve:systemd-resolve /run/systemd/resolve; exec {1}",
        dir.path().display(),
        resolved.display()
    );
    let log = std::fs::File::create(dir.path().join("resolved.log"))?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let start = || -> Result<std::process::Child> {
        let mut command = host.command("unshare");
        command.args(["-m", "sh", "-c", &script]);
        Ok(command
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()?)
    };
    let mut daemon = start()?;
    let resolv = dir.path().join("resolv.conf");
    std::fs::write(&resolv, "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n")?;
    let options = ["--resolv-conf", resolv.to_str().context("path")?, "--hosts-file", "off"];
    let _sidecar = Sidecar::start_in(&host, dir.path(), &options)?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let ask = |guest: &mut Guest, id: u8, answer: [u8; 4]| -> Result<bool> {
        let mut query = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'w', b'w', b'w', 7];
        query.extend(b"example\x03com\0\0\x01\0\x01");
        let (_, reply) = guest.ask_udp(5000 + u16::from(id), SocketAddr::new(GATEWAY, 53), &query)?;
        ensure!(reply[1] == id, "{reply:02x?}");
        Ok(reply[3] & 15 == 0 && reply.windows(4).any(|w| w == answer))
    };
    let mut id = 0;
    let mut answered = |guest: &mut Guest, answer| {
        until(Duration::from_secs(20), || {
            id += 1;
            ask(guest, id, answer).is_ok_and(|right| right)
        })
    };
    let said = || std::fs::read_to_string(dir.path().join("resolved.log")).unwrap_or_default();
    let by_first = answered(&mut guest, [198, 51, 100, 9]);
    // It asks another now, and the host another way, which is what tells us.
    write(&second)?;
    daemon.kill()?;
    daemon.wait()?;
    let mut daemon = start()?;
    host.ip(&["route", "replace", "default", "via", "203.0.113.10"])?;
    let by_second = answered(&mut guest, [198, 51, 100, 10]);
    daemon.kill()?;
    daemon.wait()?;
    by_first.with_context(said)?;
    by_second.with_context(said)?;
    ensure!(first.asked() > 0 && second.asked() > 0);
    Ok(())
}

#[test]
fn resolvers_over_tls_and_https_answer_dig_and_one_that_nobody_vouches_for_is_told_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let authority = Authority::new(dir.path())?;
    let (tls, https) = (
        SecureResolver::tls(&authority, [198, 51, 100, 53])?,
        SecureResolver::https(&authority, [198, 51, 100, 43])?,
    );
    let by_tls = format!("secret.test=tls://{}#{}", tls.address, secure::NAME);
    let by_https = format!("web.test=https://{}/dns-query#{}", https.address, secure::NAME);
    let ca = authority.file().to_str().context("path")?;
    let options = ["--dns-upstream", &by_tls, "--dns-upstream", &by_https];
    let Some(lab) = Lab::new(&[&options[..], &["--dns-ca", ca]].concat())? else { return Ok(()) };
    for n in 0..10 {
        assert_eq!(lab.short(&[&format!("n{n}.secret.test")])?, "198.51.100.53");
        assert_eq!(lab.short(&[&format!("n{n}.web.test")])?, "198.51.100.43");
    }
    ensure!(lab.dig(&["nx.web.test"])?.contains("status: NXDOMAIN"));
    // What a datagram could not carry comes as a whole, and the guest fetches it by TCP.
    assert_eq!(lab.short(&["big.secret.test"])?.lines().count(), 40);
    assert_eq!((tls.asked(), tls.connections()), (11, 1));
    assert_eq!((https.asked(), https.connections()), (11, 1));
    assert_eq!(lab.resolver.asked(), 0, "nothing of it in clear");

    // The host's own authorities have never heard of this one.
    let Some(lab) = Lab::new(&options)? else { return Ok(()) };
    for name in ["www.secret.test", "www.web.test"] {
        ensure!(lab.dig(&[name])?.contains("status: SERVFAIL"), "{name}");
    }
    assert_eq!((tls.asked(), https.asked(), lab.resolver.asked()), (11, 11, 0));
    Ok(())
}

#[test]
fn dnsperf_loses_no_query_at_five_thousand_a_second() -> Result<()> {
    let Some(lab) = Lab::new(&[])? else { return Ok(()) };
    let names: String = (0..100).map(|n| format!("n{n}.example A\n")).collect();
    let file = lab.dir.path().join("names");
    std::fs::write(&file, names + "gateway.portway.internal A\nnobody.portway.internal AAAA\n")?;
    let file = file.to_str().context("path")?;
    // First each name once, so that what follows is answered from the cache.
    lab.run("dnsperf", &["-s", "192.168.127.1", "-d", file, "-n", "1", "-c", "4"])?;
    let asked = lab.resolver.asked();
    let mut report = String::new();
    // On a machine busy with other things a run may not get at its 5000 a second; none may ever lose one.
    for _ in 0..5 {
        report =
            lab.run("dnsperf", &["-s", "192.168.127.1", "-d", file, "-l", "5", "-Q", "5000", "-c", "10"])?;
        let number = |label: &str| -> Result<f64> {
            let line = report.lines().find(|l| l.trim().starts_with(label)).context(report.clone())?;
            line.split_whitespace().find_map(|w| w.parse().ok()).context(report.clone())
        };
        eprintln!("{report}");
        assert_eq!(number("Queries lost:")?, 0.0, "{report}");
        assert_eq!(lab.resolver.asked(), asked, "answered from the cache");
        if number("Queries completed:")? > 20_000.0 {
            return Ok(());
        }
    }
    anyhow::bail!("not one run of five was at its rate: {report}")
}

#[test]
fn a_host_without_a_network_says_servfail_at_once_and_what_comes_up_is_used_at_once() -> Result<()> {
    let (Some(host), Some(world)) = (Namespace::new()?, Namespace::new()?) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let resolv = dir.path().join("resolv.conf");
    let options = ["--resolv-conf", resolv.to_str().context("path")?, "--hosts-file", "off"];
    let sidecar = host.inside(|| Sidecar::start(dir.path(), &options))?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    let ask = |guest: &mut Guest, id: u8| -> Result<(u8, bool)> {
        let mut query = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'w', b'w', b'w', 4];
        query.extend(b"test\0\0\x01\0\x01");
        let (_, answer) = guest.ask_udp(5000 + u16::from(id), SocketAddr::new(GATEWAY, 53), &query)?;
        ensure!(answer[1] == id, "{answer:02x?}");
        Ok((answer[3] & 15, answer.windows(4).any(|w| w == ANSWER)))
    };
    let start = std::time::Instant::now();
    assert_eq!(ask(&mut guest, 1)?, (2, false), "SERVFAIL");
    ensure!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());

    // A cable is plugged in, and somebody writes resolv.conf as NetworkManager does: a new file in the place of the old.
    let server = Ipv4Addr::new(203, 0, 113, 9);
    host.connect(&world, Ipv4Addr::new(203, 0, 113, 1).into(), server.into())?;
    let resolver = world.inside(|| Resolver::start(SocketAddr::from((server, 53)), ANSWER))?;
    let listener = world.inside(|| Ok(TcpListener::bind((server, 8080))?))?;
    std::fs::write(dir.path().join("new"), format!("nameserver {server}\n"))?;
    std::fs::rename(dir.path().join("new"), &resolv)?;
    let mut id = 1;
    until(Duration::from_secs(5), || {
        id += 1;
        ask(&mut guest, id).is_ok_and(|answer| answer == (0, true))
    })?;
    ensure!(resolver.asked() > 0);
    // A connection goes out over what is there now.
    let socket = guest.connect(SocketAddr::from((server, 8080)))?.context("refused")?;
    let (mut stream, _) = listener.accept()?;
    stream.write_all(b"up")?;
    ensure!(guest.exchange(socket, b"", 2)? == b"up");

    // And gone: refused truthfully, the process at rest.
    host.ip(&["link", "delete", "cable"])?;
    id += 1;
    let start = std::time::Instant::now();
    let mut other = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 5, b'o', b't', b'h', b'e', b'r', 4];
    other.extend(b"test\0\0\x01\0\x01");
    let (_, answer) = guest.ask_udp(5000 + u16::from(id), SocketAddr::new(GATEWAY, 53), &other)?;
    assert_eq!(answer[3] & 15, 2, "SERVFAIL");
    ensure!(start.elapsed() < Duration::from_secs(6));
    let before = sidecar.cpu_time()?;
    std::thread::sleep(Duration::from_secs(1));
    let used = sidecar.cpu_time()? - before;
    ensure!(used < Duration::from_millis(100), "{used:?} of CPU in a second without work");
    Ok(())
}
