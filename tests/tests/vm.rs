//! A real VM whose whole network is Portway: one boot for each kind of network card, and all that a guest does with it.
//!
//! Needs QEMU, ssh, busybox and dropbear (`tests/setup.sh`); without QEMU it is skipped, with a line that says so.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use portway_tests::vm::{
    BlackHole, Vm, blob, fetch_file, first_word, resolver, send_file, serve_file, sha256, sink, udp_echo,
};

/// What is moved through each kind of connection, each way.
const BLOB_LEN: usize = 100 * 1000 * 1000;
/// The host, as the guest sees it.
const HOST: &str = "192.168.127.254";
/// The IPv6 network that goes with 192.168.127.0/24.
const PREFIX6: &str = "fd6b:420b:1fb5";
const OUTSIDE_NAME: &str = "outside.example";
const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
/// What counts as at once for a refusal under TCG, where a round trip takes some milliseconds.
const AT_ONCE_MS: u64 = 500;
/// What a good connect may take among 200 that hang.
const AMONG_HANGING_MS: u64 = 2000;

#[test]
fn a_vm_boots_with_portway_as_its_whole_network() -> Result<()> {
    match qemu_major() {
        None => eprintln!("SKIPPED: no qemu-system-x86_64 in PATH (tests/setup.sh says what to install)"),
        Some(_) => whole_network("socket")?,
    }
    Ok(())
}

#[test]
fn a_vm_boots_with_its_network_in_its_own_memory() -> Result<()> {
    match qemu_major() {
        // See vm-launcher's `net` for what is wrong with it.
        Some(major) if major < 8 => {
            eprintln!("SKIPPED: QEMU {major} under TCG does not bear vhost-user: 8 or newer is needed")
        }
        None => eprintln!("SKIPPED: no qemu-system-x86_64 in PATH (tests/setup.sh says what to install)"),
        Some(_) => whole_network("vhost-user")?,
    }
    Ok(())
}

/// Everything a guest does with its network, over one kind of network card.
fn whole_network(net: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("blob");
    blob(&file, BLOB_LEN)?;
    let sum = sha256(&file)?;
    let upstream = format!("127.0.0.1:{}", resolver(OUTSIDE_NAME, OUTSIDE_ADDRESS)?);
    let publish = ["-publish", "0:80", "-publish", "0:7001", "-publish", "0:7002", "-publish", "0:7003/udp"];
    let options = ["--net", net, "--dns-upstream", &upstream, "-vsock-ports", "7000,7003"];
    let vm = Vm::boot(dir.path(), &[&publish[..], &options].concat())?;

    let step = |what: &str, start: Instant| eprintln!("vm: {what}: {:.1} s", start.elapsed().as_secs_f32());
    let start = Instant::now();
    first_published_connection(&vm)?;
    step("ssh right after the boot", start);
    leases(&vm)?;
    names(&vm)?;
    refused(&vm)?;
    udp(&vm)?;
    vsock(&dir.path().join("state"))?;
    ipv6(&vm)?;
    let start = Instant::now();
    black_hole(&vm)?;
    step("200 hanging connects", start);

    let start = Instant::now();
    let web = serve_file(&file)?;
    let got =
        vm.guest(&format!("wget -qO /tmp/blob http://host.portway.internal:{web}/ && sha256sum /tmp/blob"))?;
    ensure!(first_word(&got) == sum, "outgoing, to the guest: {got}");
    step("100 MB to the guest, outgoing", start);

    let start = Instant::now();
    let kept = dir.path().join("uploaded");
    let port = sink(&kept)?;
    let got = vm.guest(&format!("nc {HOST} {port} < /tmp/blob"))?;
    ensure!(got.trim() == format!("got {BLOB_LEN} bytes"), "outgoing, to the host: {got:?}");
    ensure!(sha256(&kept)? == sum, "outgoing, to the host: other bytes");
    step("100 MB to the host, outgoing", start);

    let start = Instant::now();
    let got = send_file(vm.published(7001)?, &file)?;
    ensure!(first_word(&got) == sum, "published, to the guest: {got}");
    step("100 MB to the guest, published", start);

    let start = Instant::now();
    let fetched = dir.path().join("fetched");
    fetch_file(vm.published(7002)?, &fetched)?;
    ensure!(sha256(&fetched)? == sum, "published, to the host: other bytes");
    step("100 MB to the host, published", start);

    let (status, console) = vm.stop()?;
    ensure!(status.success(), "portway run ended with {status}:\n{console}");
    ensure!(!dir.path().join("state/guest.00001b58").exists(), "a vsock port's socket is left behind");
    ensure!(console.contains("portway-agent: powering off: power button"), "no clean power-down:\n{console}");
    Ok(())
}

/// The major version of QEMU in `PATH`.
fn qemu_major() -> Option<u32> {
    let out = std::process::Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

/// The very first connection to a guest that has said nothing to the gateway but DHCP.
fn first_published_connection(vm: &Vm) -> Result<()> {
    ensure!(vm.guest("echo hello")? == "hello\n");
    Ok(())
}

fn leases(vm: &Vm) -> Result<()> {
    let lease = vm.guest("cat /run/portway/lease")?;
    for option in [
        "ip=192.168.127.2",
        "subnet=255.255.255.0",
        "broadcast=192.168.127.255",
        "router=192.168.127.1",
        "dns=192.168.127.1",
        "domain=portway.internal",
        "search=portway.internal",
        "serverid=192.168.127.1",
        "mtu=65520",
        "staticroutes=0.0.0.0/0 192.168.127.1",
    ] {
        ensure!(lease.lines().any(|line| line == option), "no {option} in the lease:\n{lease}");
    }
    let listed: serde_json::Value = serde_json::from_str(&vm.portway(&["leases", "--format", "json"])?)?;
    ensure!(listed[0]["ip"] == "192.168.127.2" && listed[0]["name"] == "demo", "{listed}");
    Ok(())
}

fn names(vm: &Vm) -> Result<()> {
    for (name, address) in [
        ("gateway.portway.internal", "192.168.127.1"),
        ("host.portway.internal", HOST),
        ("host.containers.internal", HOST),
        ("demo.portway.internal", "192.168.127.2"),
        (OUTSIDE_NAME, &OUTSIDE_ADDRESS.to_string()),
    ] {
        let answer = vm.guest(&format!("nslookup -type=a {name}"))?;
        ensure!(answer.contains(&format!("Address: {address}\n")), "{name} is not {address}:\n{answer}");
    }
    let answer = vm.guest("nslookup nobody.portway.internal; nslookup nobody.example; true")?;
    ensure!(answer.matches("NXDOMAIN").count() >= 2, "names that nobody has:\n{answer}");
    Ok(())
}

fn refused(vm: &Vm) -> Result<()> {
    // A port that was free a moment ago; nobody listens there.
    let closed = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let answer = vm.guest(&format!("guest-probe connect {HOST}:{closed}"))?;
    ensure!(answer.starts_with("refused ") && number(&answer)? < AT_ONCE_MS, "{answer}");
    Ok(())
}

fn udp(vm: &Vm) -> Result<()> {
    let echo = udp_echo()?;
    let answer = vm.guest(&format!("guest-probe udp-ping {HOST}:{echo}"))?;
    ensure!(answer.starts_with("echoed "), "outgoing: {answer}");
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect((Ipv4Addr::LOCALHOST, vm.published(7003)?))?;
    socket.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
    socket.send(b"hello")?;
    let mut buffer = [0; 16];
    let len = socket.recv(&mut buffer).context("published: no echo")?;
    ensure!(buffer.get(..len) == Some(b"hello".as_slice()), "published: other bytes");
    Ok(())
}

/// The sockets of vsock ports in the state directory, by both names that LinuxKit documents.
fn vsock(state: &Path) -> Result<()> {
    for name in ["guest.00001b58", "00000003.00001b58"] {
        let mut shell = UnixStream::connect(state.join(name)).context(name)?;
        shell.set_read_timeout(Some(std::time::Duration::from_secs(30)))?;
        shell.write_all(b"echo by $0\n")?;
        shell.shutdown(Shutdown::Write)?;
        let mut said = String::new();
        shell.read_to_string(&mut said)?;
        ensure!(said == "by /bin/sh\n", "{name}: {said:?}");
    }
    Ok(())
}

/// The guest's own address, the gateway, the host's loopback, names, and the published port of the IPv6 loopback.
fn ipv6(vm: &Vm) -> Result<()> {
    // Duplicate address detection takes a second.
    let mut addresses = String::new();
    let made = portway_tests::sidecar::until(std::time::Duration::from_secs(20), || {
        addresses = vm.guest("ip -6 addr show dev eth0 scope global").unwrap_or_default();
        addresses.contains(PREFIX6) && !addresses.contains("tentative")
    });
    made.with_context(|| format!("no address by SLAAC: {addresses}"))?;
    for last in ["1", "254"] {
        let answer = vm.guest(&format!("ping6 -c 1 -W 5 {PREFIX6}::{last}"))?;
        ensure!(answer.contains("1 packets received"), "{answer}");
    }
    let answer = vm.guest("nslookup -type=aaaa host.portway.internal")?;
    ensure!(answer.contains(&format!("Address: {PREFIX6}::254\n")), "{answer}");
    let echo = udp_echo()?;
    // The echo is of 127.0.0.1 alone; the host's loopback is meant, of either version.
    let answer = vm.guest(&format!("guest-probe udp-ping [{PREFIX6}::254]:{echo}"))?;
    ensure!(answer.starts_with("echoed "), "{answer}");
    // The guest's own web server, by way of the host's IPv6 loopback.
    let mut stream = std::net::TcpStream::connect(("::1", vm.published(80)?))?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    ensure!(page.contains("ask the guest"), "published on ::1: {page:?}");
    // A stock client of DHCPv6; what it got is what is listed, and has the guest's name.
    let client =
        "dhclient -6 -1 -v -sf /bin/true -cf /dev/null -lf /tmp/dhclient6.leases -pf /tmp/dhclient6.pid eth0";
    let lease =
        vm.guest(&format!("touch /tmp/dhclient6.leases; {client} 2>&1; cat /tmp/dhclient6.leases"))?;
    let ip = lease.lines().find_map(|l| l.trim().strip_prefix("iaaddr ")?.split(' ').next());
    let ip = ip.with_context(|| format!("no lease by DHCPv6: {lease}"))?;
    ensure!(
        ip.starts_with(PREFIX6) && lease.contains(&format!("dhcp6.name-servers {PREFIX6}::1")),
        "{lease}"
    );
    let listed = vm.portway(&["leases"])?;
    ensure!(listed.contains(ip), "{ip} is not listed: {listed}");
    // What nobody serves is refused at once. What this host has no way to is unreachable at once; where it has one, the
    // address of no network is silence or unreachable, and no test.
    let closed = std::net::TcpListener::bind("[::1]:0")?.local_addr()?.port();
    let answer = vm.guest(&format!("guest-probe connect [{PREFIX6}::254]:{closed}"))?;
    ensure!(answer.starts_with("refused ") && number(&answer)? < AT_ONCE_MS, "{answer}");
    if std::net::UdpSocket::bind("[::]:0").and_then(|s| s.connect("[2000::1]:9")).is_err() {
        let answer = vm.guest("guest-probe connect [2001:db8::1]:80")?;
        let took = answer.split_whitespace().nth(1).and_then(|ms| ms.parse::<u64>().ok());
        ensure!(answer.contains("nreachable") && took.is_some_and(|ms| ms < AT_ONCE_MS), "{answer}");
    }
    Ok(())
}

fn black_hole(vm: &Vm) -> Result<()> {
    let hole = BlackHole::new()?;
    let good = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let good_port = good.local_addr()?.port();
    let answer = vm.guest(&format!("guest-probe dial-many 200 {HOST}:{} {HOST}:{good_port}", hole.port))?;
    let pending: u64 = answer.split_whitespace().nth(1).context("a count")?.parse()?;
    ensure!(pending >= 190, "the hole is none, {pending} hang: {answer}");
    ensure!(number(&answer)? < AMONG_HANGING_MS, "delayed: {answer}");
    Ok(())
}

/// The last number of a line.
fn number(line: &str) -> Result<u64> {
    line.split_whitespace().filter_map(|word| word.parse().ok()).next_back().with_context(|| line.to_owned())
}
