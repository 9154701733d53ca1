//! What the VM test does inside the guest and busybox cannot: timed connects, many dials at once, UDP echo.
//!
//! Only the standard library is used, because `tests/guest/build.sh` compiles this one file with `rustc` into a
//! static binary of the guest image. Each command prints one line for the test to read and exits 0, or says on
//! stderr what went wrong and exits 1.
#![allow(clippy::print_stdout, reason = "its output is what the test reads")]

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: guest-probe connect ADDR:PORT
       guest-probe dial-many N BLACK-HOLE-ADDR:PORT GOOD-ADDR:PORT
       guest-probe udp-ping ADDR:PORT
       guest-probe udp-echo PORT";

/// A connect that takes longer is reported as `timeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// One echo that takes longer is a lost one; the link loses nothing, so neither may an echo.
const ECHO_TIMEOUT: Duration = Duration::from_secs(5);
/// Payloads of `udp-ping`: empty, tiny, one Ethernet frame's worth, larger than one.
const ECHO_SIZES: [usize; 5] = [0, 1, 512, 1472, 9000];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["connect", address] => connect(address),
        ["dial-many", count, black_hole, good] => dial_many(count, black_hole, good),
        ["udp-ping", address] => udp_ping(address),
        ["udp-echo", port] => udp_echo(port),
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::other(format!("cannot read {word:?}\n{USAGE}")))
}

/// Prints `connected MS`, `refused MS`, `timeout MS` or `failed MS REASON`.
fn connect(address: &str) -> io::Result<()> {
    let address: SocketAddr = parse(address)?;
    let start = Instant::now();
    let outcome = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT);
    let took = start.elapsed().as_millis();
    match outcome {
        Ok(_) => println!("connected {took}"),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => println!("refused {took}"),
        Err(error) if error.kind() == ErrorKind::TimedOut => println!("timeout {took}"),
        Err(error) => println!("failed {took} {error}"),
    }
    Ok(())
}

/// Starts `count` connects to an address that never answers, then one to an address that does, and prints
/// `pending N connected MS`: how many were still undecided when the good one was through.
fn dial_many(count: &str, black_hole: &str, good: &str) -> io::Result<()> {
    let (count, black_hole, good): (usize, SocketAddr, SocketAddr) =
        (parse(count)?, parse(black_hole)?, parse(good)?);
    let begun = Arc::new(AtomicUsize::new(0));
    let decided = Arc::new(AtomicUsize::new(0));
    for _ in 0..count {
        let (begun, decided) = (Arc::clone(&begun), Arc::clone(&decided));
        thread::Builder::new().stack_size(64 * 1024).spawn(move || {
            begun.fetch_add(1, Ordering::SeqCst);
            let _ = TcpStream::connect_timeout(&black_hole, CONNECT_TIMEOUT);
            decided.fetch_add(1, Ordering::SeqCst);
        })?;
    }
    while begun.load(Ordering::SeqCst) < count {
        thread::yield_now();
    }
    let start = Instant::now();
    TcpStream::connect_timeout(&good, CONNECT_TIMEOUT)?;
    let took = start.elapsed().as_millis();
    println!("pending {} connected {took}", count - decided.load(Ordering::SeqCst));
    Ok(())
}

/// Sends datagrams of several sizes and waits for each to come back unchanged; prints `echoed N`.
fn udp_ping(address: &str) -> io::Result<()> {
    let address: SocketAddr = parse(address)?;
    let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(ECHO_TIMEOUT))?;
    let mut buffer = vec![0; 65536];
    for size in ECHO_SIZES {
        let sent: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
        socket.send(&sent)?;
        let len = socket.recv(&mut buffer).map_err(|e| io::Error::other(format!("{size} bytes: {e}")))?;
        if buffer.get(..len) != Some(sent.as_slice()) {
            return Err(io::Error::other(format!("{size} bytes came back as {len} others")));
        }
    }
    println!("echoed {}", ECHO_SIZES.len());
    Ok(())
}

/// Sends every datagram back to where it came from, for ever.
fn udp_echo(port: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", parse(port)?))?;
    let mut buffer = vec![0; 65536];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        // An error here belongs to one client (ICMP unreachable of an earlier answer), not to the service.
        if let Err(error) = socket.send_to(buffer.get(..len).unwrap_or_default(), from) {
            eprintln!("guest-probe: udp-echo to {from}: {error}");
        }
    }
}
