//! Links of the real `portway serve` beside the stream socket that `serve.rs` uses, and guests that speak with each other.
//!
//! A namespace's tap is the kernel's own stack with segmentation and checksum offload. It needs root; without, the tests say
//! that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
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
