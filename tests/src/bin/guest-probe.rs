//! What the VM test does inside the guest and busybox cannot: timed connects, many dials at once, UDP echo, vsock.
//!
//! Only the standard library is used, because `tests/guest/build.sh` compiles this one file with `rustc` into a
//! static binary of the guest image. Each command prints one line for the test to read and exits 0, or says on
//! stderr what went wrong and exits 1.
#![allow(clippy::print_stdout, reason = "its output is what the test reads")]

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: guest-probe connect ADDR:PORT
       guest-probe dial-many N BLACK-HOLE-ADDR:PORT GOOD-ADDR:PORT
       guest-probe udp-ping ADDR:PORT
       guest-probe udp-echo PORT
       guest-probe listen tcp|udp|udp-nc ADDR:PORT
       guest-probe unix-echo PATH
       guest-probe unix-exec PATH PROGRAM [ARGUMENT…]
       guest-probe unix-send PATH
       guest-probe give LEN
       guest-probe vsock-exec PORT PROGRAM [ARGUMENT…]
       guest-probe vsock-echo PORT
       guest-probe vsock-send PORT
       guest-probe vsock-dial-many N PORT
       guest-probe vsock-rogue N PORT";

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
        ["listen", kind, address] => listen(kind, address),
        ["unix-echo", path] => unix_echo(path),
        ["unix-exec", path, program, arguments @ ..] => unix_exec(path, program, arguments),
        ["unix-send", path] => unix_send(path),
        ["give", len] => give(len),
        ["vsock-exec", port, program, arguments @ ..] => vsock_exec(port, program, arguments),
        ["vsock-echo", port] => vsock_echo(port),
        ["vsock-send", port] => vsock_send(port),
        ["vsock-dial-many", count, port] => vsock_dial_many(count, port),
        ["vsock-rogue", count, port] => vsock_rogue(count, port),
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

/// Echoes on one address until it is killed. `udp-nc` belongs to its first client, as `nc -lu` does.
fn listen(kind: &str, address: &str) -> io::Result<()> {
    let address: SocketAddr = parse(address)?;
    match kind {
        "tcp" => {
            for stream in TcpListener::bind(address)?.incoming() {
                let stream = stream?;
                thread::Builder::new()
                    .stack_size(64 * 1024)
                    .spawn(move || echo(&mut &stream, &mut &stream))?;
            }
            Ok(())
        }
        "udp" => echo_datagrams(&UdpSocket::bind(address)?),
        "udp-nc" => {
            let socket = UdpSocket::bind(address)?;
            let (_, client) = socket.peek_from(&mut [0])?;
            socket.connect(client)?;
            echo_datagrams(&socket)
        }
        _ => Err(io::Error::other(USAGE)),
    }
}

/// The same on a unix socket.
fn unix_echo(path: &str) -> io::Result<()> {
    for stream in UnixListener::bind(path)?.incoming() {
        let stream = stream?;
        thread::Builder::new().stack_size(64 * 1024).spawn(move || echo(&mut &stream, &mut &stream))?;
    }
    Ok(())
}

/// Runs a program for each client of a unix socket, which is its input and its output.
fn unix_exec(path: &str, program: &str, arguments: &[&str]) -> io::Result<()> {
    for stream in UnixListener::bind(path)?.incoming() {
        let stream: OwnedFd = stream?.into();
        let (input, output) = (Stdio::from(stream.try_clone()?), Stdio::from(stream));
        let mut child = Command::new(program).args(arguments).stdin(input).stdout(output).spawn()?;
        thread::spawn(move || child.wait());
    }
    Ok(())
}

/// Sends its input to a unix socket, and prints what comes back.
fn unix_send(path: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    io::copy(&mut io::stdin(), &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    io::copy(&mut stream, &mut io::stdout()).map(drop)
}

/// Prints so many bytes: those of `portway_tests::vm::blob`.
fn give(len: &str) -> io::Result<()> {
    let (mut left, mut state) = (parse::<usize>(len)?, 0x9e37_79b9_7f4a_7c15_u64);
    let (mut bytes, mut output) = (Vec::with_capacity(65_536), io::stdout().lock());
    while left > 0 {
        bytes.clear();
        while bytes.len() < 65_536 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_ne_bytes());
        }
        bytes.truncate(left);
        output.write_all(&bytes)?;
        left -= bytes.len();
    }
    output.flush()
}

/// Sends every byte back; the end too, by dropping both. Not `io::copy`: it would try splice and the like, which is not what
/// is tested.
fn echo(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(buffer.get(..n).unwrap_or_default())?,
        }
    }
}

/// Sends every datagram back to where it came from, for ever.
fn udp_echo(port: &str) -> io::Result<()> {
    echo_datagrams(&UdpSocket::bind(("0.0.0.0", parse(port)?))?)
}

fn echo_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        // An error here belongs to one client (ICMP unreachable of an earlier answer), not to the service.
        if let Err(error) = socket.send_to(buffer.get(..len).unwrap_or_default(), from) {
            eprintln!("guest-probe: an echo to {from}: {error}");
        }
    }
}

/// Runs the program for every stream that the host opens to `port`, with the stream as its input and output.
fn vsock_exec(port: &str, program: &str, arguments: &[&str]) -> io::Result<()> {
    let listener = vsock::listen(parse(port)?)?;
    loop {
        let stream = vsock::accept(&listener)?;
        let (input, output) = (Stdio::from(stream.try_clone()?), Stdio::from(stream));
        let mut child = Command::new(program).args(arguments).stdin(input).stdout(output).spawn()?;
        thread::spawn(move || child.wait());
    }
}

/// Sends every byte back, on every stream at once; the end of one direction too.
fn vsock_echo(port: &str) -> io::Result<()> {
    let listener = vsock::listen(parse(port)?)?;
    loop {
        let stream = File::from(vsock::accept(&listener)?);
        // One descriptor for each: a thousand streams fit a limit of 1024.
        thread::Builder::new().stack_size(64 * 1024).spawn(move || echo(&mut &stream, &mut &stream))?;
    }
}

/// Sends its input to `port` of the host, and prints what comes back.
fn vsock_send(port: &str) -> io::Result<()> {
    let stream = vsock::connect(vsock::HOST, parse(port)?)?;
    let (mut reader, mut writer) = (File::from(stream.try_clone()?), File::from(stream));
    io::copy(&mut io::stdin(), &mut writer)?;
    vsock::end(&writer)?;
    io::copy(&mut reader, &mut io::stdout()).map(drop)
}

/// Opens `count` streams to `port` of the host, whose echo each of them sees while all are open; prints `held N`.
fn vsock_dial_many(count: &str, port: &str) -> io::Result<()> {
    let port = parse(port)?;
    let mut streams = Vec::new();
    for _ in 0..parse(count)? {
        streams.push(File::from(vsock::connect(vsock::HOST, port)?));
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&n.to_le_bytes())?;
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        let mut echo = [0; 8];
        stream.read_exact(&mut echo)?;
        if echo != n.to_le_bytes() {
            return Err(io::Error::other(format!("stream {n} has the bytes of another")));
        }
    }
    println!("held {}", streams.len());
    Ok(())
}

/// Opens `count` streams to `port` of the host, one after the other, and keeps the last thousand: silent ones, half messages,
/// garbage, lengths that lie, a flood. Prints `opened N refused M`.
fn vsock_rogue(count: &str, port: &str) -> io::Result<()> {
    let port = parse(port)?;
    let mut held = std::collections::VecDeque::new();
    let (mut opened, mut refused) = (0, 0);
    for n in 0..parse::<usize>(count)? {
        let Ok(stream) = vsock::connect(vsock::HOST, port) else {
            refused += 1;
            continue;
        };
        opened += 1;
        let mut stream = File::from(stream);
        let said = match n % 5 {
            0 => Ok(()),
            1 => stream.write_all(b"\0\0\0\x20{\"type\":\"hel"),
            2 => stream.write_all(&[0xff; 4096]),
            3 => stream.write_all(b"\x7f\xff\xff\xff"),
            _ => (0..64).try_for_each(|_| stream.write_all(b"\0\0\0\x02{}")),
        };
        // The host may have closed it at the first word.
        drop(said);
        held.push_back(stream);
        if held.len() > 1000 {
            held.pop_front();
        }
    }
    println!("opened {opened} refused {refused}");
    Ok(())
}

/// AF_VSOCK, which the standard library has not (`vsock(7)`).
mod vsock {
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    /// The host's address.
    pub(super) const HOST: u32 = 2;
    const ANY: u32 = u32::MAX;
    const AF_VSOCK: i32 = 40;
    const SOCK_CLOEXEC: i32 = 0o2_000_000;
    const SOCK_STREAM_CLOEXEC: i32 = 1 | SOCK_CLOEXEC;
    const SHUT_WR: i32 = 1;
    const BACKLOG: i32 = 1024;

    /// `struct sockaddr_vm`.
    #[repr(C)]
    struct Address {
        family: u16,
        reserved: u16,
        port: u32,
        cid: u32,
        flags: u8,
        zero: [u8; 3],
    }

    const LEN: u32 = 16;

    // SAFETY: the declarations are those of the C library that the standard library is linked to.
    unsafe extern "C" {
        fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
        fn bind(fd: i32, address: *const Address, len: u32) -> i32;
        #[link_name = "listen"]
        fn c_listen(fd: i32, backlog: i32) -> i32;
        fn accept4(fd: i32, address: *mut Address, len: *mut u32, flags: i32) -> i32;
        #[link_name = "connect"]
        fn c_connect(fd: i32, address: *const Address, len: u32) -> i32;
        fn shutdown(fd: i32, how: i32) -> i32;
    }

    fn address(cid: u32, port: u32) -> Address {
        Address { family: 40, reserved: 0, port, cid, flags: 0, zero: [0; 3] }
    }

    fn checked(result: i32) -> io::Result<i32> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    fn new() -> io::Result<OwnedFd> {
        // SAFETY: three integers.
        let fd = checked(unsafe { socket(AF_VSOCK, SOCK_STREAM_CLOEXEC, 0) })?;
        // SAFETY: the kernel has just made it, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub(super) fn listen(port: u32) -> io::Result<OwnedFd> {
        let (fd, address) = (new()?, address(ANY, port));
        // SAFETY: the address lives as long as the call, and has the length that is said.
        checked(unsafe { bind(fd.as_raw_fd(), &raw const address, LEN) })?;
        // SAFETY: two integers.
        checked(unsafe { c_listen(fd.as_raw_fd(), BACKLOG) })?;
        Ok(fd)
    }

    pub(super) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
        let (fd, none) = (listener.as_raw_fd(), std::ptr::null_mut());
        // Close-on-exec: what the program of `vsock-exec` leaves behind must not hold its stream.
        // SAFETY: no address is asked for.
        let fd = unsafe { accept4(fd, none, std::ptr::null_mut(), SOCK_CLOEXEC) };
        // SAFETY: as in `new`.
        checked(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub(super) fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
        let (fd, address) = (new()?, address(cid, port));
        // SAFETY: as in `listen`.
        checked(unsafe { c_connect(fd.as_raw_fd(), &raw const address, LEN) })?;
        Ok(fd)
    }

    /// Ends the sending direction.
    pub(super) fn end(stream: &impl AsRawFd) -> io::Result<()> {
        // SAFETY: two integers.
        checked(unsafe { shutdown(stream.as_raw_fd(), SHUT_WR) }).map(drop)
    }
}
