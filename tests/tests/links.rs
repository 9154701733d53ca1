//! Links of the real `portway serve` beside the stream socket that `serve.rs` uses, and guests that speak with each other.
//!
//! A namespace's tap is the kernel's own stack with segmentation and checksum offload. It needs root; without, the tests say
//! that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use portway_tests::guest::Guest;
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::Sidecar;

const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 127, 1));
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 127, 254));
const BOX: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 127, 77));
/// Bytes of a bulk transfer: hundreds of super-segments.
const BULK: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from((n ^ n >> 8 ^ n >> 16) & 0xff).unwrap()).collect()
}

/// Echoes what comes over one connection, until its end.
fn echo(listener: TcpListener) -> std::thread::JoinHandle<std::io::Result<u64>> {
    std::thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        std::io::copy(&mut &stream, &mut &stream)
    })
}

/// Sends `bytes`, ends, and returns what comes back.
fn exchange(to: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = (&stream).write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
        });
        let mut got = Vec::new();
        (&stream).read_to_end(&mut got)?;
        Ok(got)
    })
}

/// A sidecar with a stream link and the namespace's tap.
fn with_tap(dir: &std::path::Path, namespace: &Namespace, options: &str) -> Result<Sidecar> {
    let link = format!("tap:tap0,netns={},name=box{options}", namespace.path().display());
    let sidecar = Sidecar::start(dir, &["--link", &link, "--publish", "0:192.168.127.77:5000"])?;
    namespace.configure("tap0", BOX, GATEWAY, 1500)?;
    Ok(sidecar)
}

/// Frames and bytes that link `name` brought from the guest, and to it.
fn counted(sidecar: &Sidecar, name: &str) -> Result<[u64; 4]> {
    let stats = sidecar.json(&["stats"])?;
    let link = stats["links"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|l| l["name"] == name)
        .context("no such link")?;
    let n = |key: &str| link[key].as_u64().unwrap_or(0);
    Ok([n("frames_from_guest"), n("bytes_from_guest"), n("frames_to_guest"), n("bytes_to_guest")])
}

#[test]
fn a_namespace_moves_megabytes_both_ways_in_frames_much_larger_than_its_mtu() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = with_tap(dir.path(), &namespace, "")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let to = SocketAddr::new(HOST, listener.local_addr()?.port());
    let server = echo(listener);
    let bytes = pattern(BULK);
    let got = namespace.inside(|| exchange(to, &bytes))?;
    ensure!(got == bytes, "{} bytes came back, or others", got.len());
    assert_eq!(server.join().unwrap()?, BULK as u64);
    let [frames_out, bytes_out, frames_in, bytes_in] = counted(&sidecar, "box")?;
    ensure!(bytes_out / frames_out > 5000, "from the guest: {frames_out} frames for {bytes_out} bytes");
    ensure!(bytes_in / frames_in > 2000, "to the guest: {frames_in} frames for {bytes_in} bytes");
    Ok(())
}

#[test]
fn megabytes_cross_both_ways_over_ipv6_too() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let link = format!("tap:tap0,netns={},name=box", namespace.path().display());
    let sidecar = Sidecar::start(dir.path(), &["--link", &link, "--subnet6", "2001:db8:77::/64"])?;
    namespace.configure("tap0", BOX, GATEWAY, 1500)?;
    namespace.ip(&["address", "add", "2001:db8:77::77/64", "dev", "tap0", "nodad"])?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let host: IpAddr = "2001:db8:77::254".parse()?;
    let to = SocketAddr::new(host, listener.local_addr()?.port());
    let server = echo(listener);
    let bytes = pattern(BULK);
    let got = namespace.inside(|| exchange(to, &bytes))?;
    ensure!(got == bytes, "{} bytes came back, or others", got.len());
    assert_eq!(server.join().unwrap()?, BULK as u64);
    let [frames_out, bytes_out, frames_in, bytes_in] = counted(&sidecar, "box")?;
    ensure!(bytes_out / frames_out > 5000, "from the guest: {frames_out} frames for {bytes_out} bytes");
    ensure!(bytes_in / frames_in > 2000, "to the guest: {frames_in} frames for {bytes_in} bytes");
    Ok(())
}

#[test]
fn a_namespaces_port_is_published_and_its_datagrams_find_their_way() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = with_tap(dir.path(), &namespace, "")?;
    let listener = namespace.inside(|| Ok(TcpListener::bind((BOX, 5000))?))?;
    let server = echo(listener);
    let ports = sidecar.json(&["ports"])?;
    let port = u16::try_from(ports[0]["host_port"].as_u64().context("no port")?)?;
    let bytes = pattern(BULK);
    let got = exchange(SocketAddr::from(([127, 0, 0, 1], port)), &bytes)?;
    ensure!(got == bytes, "{} bytes came back, or others", got.len());
    assert_eq!(server.join().unwrap()?, BULK as u64);

    let host = UdpSocket::bind("127.0.0.1:0")?;
    host.set_read_timeout(Some(PATIENCE))?;
    let to = SocketAddr::new(HOST, host.local_addr()?.port());
    let guest = namespace.inside(|| Ok(UdpSocket::bind((BOX, 0))?))?;
    guest.set_read_timeout(Some(PATIENCE))?;
    // Of one size, so that they leave together; the sizes around are empty and small.
    for size in [0, 1, 1000, 1000, 1000, 1400, 1400, 3] {
        guest.send_to(&pattern(size), to)?;
    }
    let mut buffer = [0; 2000];
    for size in [0, 1, 1000, 1000, 1000, 1400, 1400, 3] {
        let (n, from) = host.recv_from(&mut buffer)?;
        assert_eq!(buffer[..n], pattern(size));
        host.send_to(&buffer[..n], from)?;
        let (n, from) = guest.recv_from(&mut buffer)?;
        assert_eq!((&buffer[..n], from), (&pattern(size)[..], to));
    }
    Ok(())
}

/// Sends 32 datagrams of 1000 bytes by one system call.
fn send_together(socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    let size = 1000;
    let segments = [ControlMessage::UdpGsoSegments(&size)];
    let bytes = pattern(32_000);
    let to = SockaddrStorage::from(to);
    let sent = sendmsg(
        socket.as_raw_fd(),
        &[std::io::IoSlice::new(&bytes)],
        &segments,
        MsgFlags::empty(),
        Some(&to),
    )?;
    ensure!(sent == bytes.len());
    Ok(())
}

/// Takes what [`send_together`] sent, datagram by datagram; where it came from.
fn receive_each(socket: &UdpSocket) -> Result<SocketAddr> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let (mut buffer, mut sender) = (vec![0; 2000], None);
    for (n, datagram) in pattern(32_000).chunks(1000).enumerate() {
        let (len, from) = socket.recv_from(&mut buffer).with_context(|| format!("datagram {n}"))?;
        ensure!(buffer[..len] == *datagram, "datagram {n}: {len} bytes");
        sender = Some(from);
    }
    sender.context("no datagram")
}

/// Whether taps carry datagrams in one piece: since Linux 6.2.
fn has_datagram_segments() -> Result<bool> {
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    Ok((numbers.next(), numbers.next()) >= (Some(6), Some(2)))
}

#[test]
fn datagrams_that_leave_together_cross_the_link_in_one_frame_and_arrive_each_by_itself() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = with_tap(dir.path(), &namespace, "")?;
    let published = sidecar.cli(&["publish", "0:192.168.127.77:5001/udp"])?;
    ensure!(published.status.success());
    let ports = sidecar.json(&["ports"])?;
    let port = ports.as_array().into_iter().flatten().find(|p| p["guest_port"] == 5001);
    let port = u16::try_from(port.and_then(|p| p["host_port"].as_u64()).context("no port")?)?;

    let (host, guest) =
        (UdpSocket::bind("127.0.0.1:0")?, namespace.inside(|| Ok(UdpSocket::bind((BOX, 5001))?))?);
    let before = counted(&sidecar, "box")?;
    // Out and back through a binding, in and back through a published port.
    send_together(&guest, SocketAddr::new(HOST, host.local_addr()?.port()))?;
    let seen = receive_each(&host)?;
    send_together(&host, seen)?;
    receive_each(&guest)?;
    send_together(&host, SocketAddr::from(([127, 0, 0, 1], port)))?;
    let client = receive_each(&guest)?;
    send_together(&guest, client)?;
    receive_each(&host)?;
    let after = counted(&sidecar, "box")?;
    let [frames_out, bytes_out, frames_in, bytes_in] = std::array::from_fn(|n| after[n] - before[n]);
    ensure!(bytes_out >= 64_000 && bytes_in >= 64_000);
    if has_datagram_segments()? {
        ensure!(frames_out < 20 && frames_in < 20, "{frames_out} frames came, {frames_in} went");
    }
    Ok(())
}

#[test]
fn large_segments_of_one_guest_are_cut_and_summed_for_another_without_offload() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = with_tap(dir.path(), &namespace, "")?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    let (address, ..) = guest.dhcp()?;
    // smoltcp verifies every checksum, and its frames are not finished by anybody else.
    let listener = guest.listen(7000)?;
    let bytes = pattern(BULK);
    let got = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            namespace.inside(|| {
                let mut stream =
                    TcpStream::connect_timeout(&SocketAddr::new(address.into(), 7000), PATIENCE)?;
                stream.write_all(&bytes)?;
                let mut answer = [0; 4];
                stream.read_exact(&mut answer)?;
                Ok(answer)
            })
        });
        let got = guest.exchange(listener, b"", BULK)?;
        guest.exchange(listener, b"done", 0)?;
        guest.until("the answer", |_| client.is_finished().then_some(()))?;
        let answer = client.join().unwrap()?;
        ensure!(&answer == b"done");
        Ok(got)
    })?;
    ensure!(got == bytes, "{} bytes came, or others", got.len());
    let [frames_out, bytes_out, ..] = counted(&sidecar, "box")?;
    let [.., frames_in, bytes_in] = counted(&sidecar, "web")?;
    ensure!(bytes_out / frames_out > 5000, "{frames_out} frames for {bytes_out} bytes came");
    ensure!(bytes_in / frames_in <= 1514, "{frames_in} frames for {bytes_in} bytes went on");
    Ok(())
}

#[test]
fn an_isolated_guest_reaches_the_host_and_no_other_guest() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = with_tap(dir.path(), &namespace, ",isolate=on")?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    let (address, ..) = guest.dhcp()?;
    guest.listen(7000)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let to = SocketAddr::new(HOST, listener.local_addr()?.port());
    let server = echo(listener);
    assert_eq!(namespace.inside(|| exchange(to, b"hello"))?, b"hello");
    server.join().unwrap()?;
    let tried = namespace.inside(|| {
        Ok(TcpStream::connect_timeout(&SocketAddr::new(address.into(), 7000), Duration::from_millis(300)))
    })?;
    assert!(tried.is_err());
    let drops = sidecar.json(&["stats"])?["drops"]["isolated"].as_u64();
    ensure!(drops.is_some_and(|n| n > 0), "drops: {drops:?}");
    Ok(())
}

#[test]
fn a_tap_that_is_deleted_ends_its_link_and_nothing_else() -> Result<()> {
    let Some(namespace) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = with_tap(dir.path(), &namespace, "")?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    namespace.delete("tap0")?;
    portway_tests::sidecar::until(PATIENCE, || sidecar.log().contains("VMM detached"))?;
    guest.dhcp()?;
    Ok(())
}

/// An ARP request of `mac` at `ip` for the gateway, as a frame.
fn who_has_gateway(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip);
    frame.extend([0; 6]);
    frame.extend([192, 168, 127, 1]);
    frame
}

fn is_answer(frame: &[u8], mac: [u8; 6]) -> bool {
    frame.len() == 42 && frame[..6] == mac && frame[20..22] == [0, 2] && frame[28..32] == [192, 168, 127, 1]
}

/// Asks for the gateway over a byte stream with u16 lengths, and expects the answer.
fn ask_over(mut to: impl Write, mut from: impl Read, mac: [u8; 6], ip: [u8; 4]) -> Result<()> {
    let frame = who_has_gateway(mac, ip);
    to.write_all(&u16::try_from(frame.len())?.to_le_bytes())?;
    to.write_all(&frame)?;
    loop {
        let mut length = [0; 2];
        from.read_exact(&mut length)?;
        let mut frame = vec![0; usize::from(u16::from_le_bytes(length))];
        from.read_exact(&mut frame)?;
        // Other guests' broadcasts come too.
        if frame[..6] != [0xff; 6] {
            ensure!(is_answer(&frame, mac), "{frame:02x?}");
            return Ok(());
        }
    }
}

/// Comes to a `vpnkit` link as hyperkit does: the MAC it is given, or the reason why not.
fn come(
    path: &std::path::Path,
    uuid: &str,
    address: Option<[u8; 4]>,
) -> Result<(std::os::unix::net::UnixStream, std::result::Result<[u8; 6], String>)> {
    let mut stream = std::os::unix::net::UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut init = b"VMN3T".to_vec();
    init.extend(22u32.to_le_bytes());
    init.extend([b'0'; 40]);
    stream.write_all(&init)?;
    let mut theirs = [0; 49];
    stream.read_exact(&mut theirs)?;
    assert_eq!(theirs[..9], init[..9]);
    let mut command = vec![if address.is_some() { 8 } else { 1 }];
    command.extend(uuid.as_bytes());
    command.extend(address.unwrap_or_default().iter().rev());
    stream.write_all(&command)?;
    let mut response = [0; 258];
    stream.read_exact(&mut response)?;
    if response[0] == 2 {
        let reason = String::from_utf8_lossy(&response[2..2 + usize::from(response[1])]).into_owned();
        return Ok((stream, Err(reason)));
    }
    assert_eq!((response[0], u16::from_le_bytes([response[1], response[2]])), (1, 1500));
    let mac = <[u8; 6]>::try_from(&response[5..11])?;
    Ok((stream, Ok(mac)))
}

#[test]
fn several_vms_come_to_one_vpnkit_socket_and_a_uuid_keeps_its_mac() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("vpnkit");
    let _sidecar = Sidecar::start(dir.path(), &["--link", &format!("vpnkit:unix:{}", path.display())])?;
    let (a, b) = ("d7a1e0c6-8a5c-4b6e-9f0e-00000000000a", "d7a1e0c6-8a5c-4b6e-9f0e-00000000000b");
    let (first, mac_a) = come(&path, a, Some([192, 168, 127, 40]))?;
    let (second, mac_b) = come(&path, b, None)?;
    let (mac_a, mac_b) = (mac_a.unwrap(), mac_b.unwrap());
    assert_ne!(mac_a, mac_b);
    for (stream, mac, last) in [(&first, mac_a, 40), (&second, mac_b, 41), (&first, mac_a, 40)] {
        ask_over(stream, stream, mac, [192, 168, 127, last])?;
    }
    let refused = |uuid, address| come(&path, uuid, Some(address)).unwrap().1.unwrap_err();
    assert_eq!(refused(b, [192, 168, 127, 40]), "Preferred IP address already used.");
    assert_eq!(refused(b, [10, 0, 0, 1]), "Preferred IP address out of range.");
    drop(first);
    let (again, mac) = come(&path, a, None)?;
    assert_eq!(mac.unwrap(), mac_a);
    ask_over(&again, &again, mac_a, [192, 168, 127, 40])?;
    ask_over(&second, &second, mac_b, [192, 168, 127, 41])
}

#[test]
fn frames_cross_standard_input_and_output() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut child = std::process::Command::new(portway_tests::vm::portway()?)
        .args(["serve", "--link", "stdio", "--api", &format!("unix:{}", dir.path().join("api").display())])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    ask_over(&stdin, stdout, [2, 0, 0, 0, 0, 9], [192, 168, 127, 9])?;
    // The end of its input is the end of the only link, and so of the process.
    drop(stdin);
    portway_tests::sidecar::until(PATIENCE, || child.try_wait().is_ok_and(|s| s.is_some()))?;
    assert!(child.wait()?.success());
    Ok(())
}

#[test]
fn a_seqpacket_guest_comes_goes_and_comes_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("seq");
    let sidecar =
        Sidecar::start(dir.path(), &["--link", &format!("seqpacket:unix:{},name=uml", path.display())])?;
    for last in [30, 31] {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None)?;
        socket.connect(&socket2::SockAddr::unix(&path)?)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mac = [2, 0, 0, 0, 0, last];
        socket.send(&who_has_gateway(mac, [192, 168, 127, last]))?;
        let mut answer = [0; 100];
        let n = (&socket).read(&mut answer)?;
        ensure!(is_answer(&answer[..n], mac), "{:02x?}", &answer[..n]);
    }
    portway_tests::sidecar::until(PATIENCE, || sidecar.log().matches("VMM detached").count() == 2)
}
