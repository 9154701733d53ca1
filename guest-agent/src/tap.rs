//! `portway-agent tap`: a network card for a guest that has none but vsock, as gvforwarder makes it.
//!
//! ```text
//! guest's stack ─ tap device ─► frames, each with its length ─► vsock or unix stream ─► gvproxy's /connect, or a qemu link
//! ```
//! Toward gvproxy the stream begins with an HTTP request that has no answer; then each frame has a u16 little-endian length.
//! With `--framing qemu` there is no request, and the length is a u32 big-endian: what `portway serve --link qemu:unix:PATH`
//! takes. The device has the MAC address that gvproxy leases 192.168.127.2 to, and its DHCP client is the guest's own.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, ExitCode, Stdio};
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::args::{Arg, Args};
use crate::console::say;
use crate::dial::{self, Host};

/// The largest frame: 64 KiB of packet and its header.
const FRAME: usize = 65_536 + 18;
/// The largest packet whose frame gvproxy's framing can carry.
const POST_MTU: u16 = u16::MAX - 18;
/// What gvproxy's static lease is for.
const MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee];
/// How long the host may take to take the connection.
const PATIENCE: Duration = Duration::from_secs(10);

const USAGE: &str = "\
usage: portway-agent tap [OPTIONS]
  -url URL             vsock://CID:PORT/PATH or unix:PATH [default: vsock://2:1024/connect]
  -framing post|qemu   gvproxy's, or that of a qemu link [default: post]
  -iface NAME          the device [default: tap0]
  -mac MAC             its address [default: 5a:94:ef:e4:0c:ee]
  -mtu N               [default: 1500]
  -preexisting         the device is there and has its address
  -stop-if-exist NAME  leave at once, with 0, where this device is: the guest has a card [default: eth0; ignore: never]
  -no-dhcp             do not start the guest's DHCP client";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Post,
    Qemu,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Options {
    host: Host,
    path: String,
    framing: Framing,
    device: String,
    mac: [u8; 6],
    mtu: u16,
    preexisting: bool,
    stop_if_exist: String,
    dhcp: bool,
    help: bool,
}

impl Options {
    fn parse(mut args: Args) -> Result<Self, String> {
        let mut options = Self {
            host: Host::Vsock { cid: 2, port: 1024 },
            path: "/connect".into(),
            framing: Framing::Post,
            device: "tap0".into(),
            mac: MAC,
            mtu: 1500,
            preexisting: false,
            stop_if_exist: "eth0".into(),
            dhcp: true,
            help: false,
        };
        while let Some(arg) = args.next()? {
            let Arg::Option(o) = arg else { return Err(format!("{arg:?} is not an option of tap")) };
            match o.as_str() {
                "url" => (options.host, options.path) = url(&args.value(&o)?)?,
                "framing" => {
                    options.framing = match args.value(&o)?.as_str() {
                        "post" => Framing::Post,
                        "qemu" => Framing::Qemu,
                        other => return Err(format!("-framing {other} is not post or qemu")),
                    }
                }
                "iface" => options.device = args.value(&o)?,
                "mac" => options.mac = mac(&args.value(&o)?)?,
                "mtu" => options.mtu = args.parsed(&o)?,
                "preexisting" => options.preexisting = args.switch(&o)?,
                "stop-if-exist" => options.stop_if_exist = args.value(&o)?,
                "no-dhcp" => options.dhcp = !args.switch(&o)?,
                "help" | "h" => options.help = true,
                // Accepted: there is nothing more to say than is said.
                "debug" => drop(args.switch(&o)?),
                _ => return Err(format!("-{o} is not an option of tap")),
            }
        }
        if options.device.is_empty() || options.device.len() > 15 || options.device.contains(['/', ' ']) {
            return Err(format!("-iface {:?} is not the name of a device", options.device));
        }
        if options.mtu < 576 {
            return Err(format!("-mtu {}: 576 at least", options.mtu));
        }
        // The length before a frame is two bytes there, and an Ethernet header stands before the packet.
        if options.framing == Framing::Post && options.mtu > POST_MTU {
            return Err(format!("-mtu {}: {POST_MTU} at most with gvproxy's framing", options.mtu));
        }
        Ok(options)
    }
}

/// `vsock://2:1024/connect`, or `unix:PATH` with gvproxy's own path.
fn url(text: &str) -> Result<(Host, String), String> {
    match text.strip_prefix("vsock://") {
        Some(rest) => {
            let (place, path) = rest.split_once('/').unwrap_or((rest, "connect"));
            Ok((Host::from_str(&format!("vsock://{place}"))?, format!("/{path}")))
        }
        None => Ok((text.parse()?, "/connect".into())),
    }
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
    let mac: Option<[u8; 6]> = bytes.and_then(|b| b.try_into().ok());
    mac.filter(|m| m[0] & 1 == 0).ok_or_else(|| format!("-mac {text} is not the address of a network card"))
}

/// Runs until the host ends it.
pub(crate) fn run(args: Args) -> ExitCode {
    let options = match Options::parse(args) {
        Ok(options) if options.help => {
            crate::commands::print(USAGE);
            return ExitCode::SUCCESS;
        }
        Ok(options) => options,
        Err(fault) => return crate::commands::usage(&fault),
    };
    let stop = options.stop_if_exist.as_str();
    if !matches!(stop, "" | "ignore") && nix::net::if_::if_nametoindex(stop).is_ok() {
        say(&format!("{stop} is there: nothing to do"));
        return ExitCode::SUCCESS;
    }
    match serve(&options) {
        Ok(()) => say("the host ended the connection"),
        Err(error) => say(&error.to_string()),
    }
    ExitCode::FAILURE
}

fn serve(options: &Options) -> io::Result<()> {
    let named = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"))
    };
    let mut device = open_device(options).map_err(named(&options.device))?;
    let mut host = File::from(connect(&options.host).map_err(named(&options.host.to_string()))?);
    if options.framing == Framing::Post {
        let path = &options.path;
        write!(host, "POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n")?;
    }
    say(&format!("{} is carried to {}", options.device, options.host));
    if options.dhcp {
        start_dhcp(&options.device);
    }
    carry(&mut device, &mut host, options.framing)
}

/// Moves frames until one side ends.
fn carry(device: &mut File, host: &mut File, framing: Framing) -> io::Result<()> {
    let mut buffer = vec![0; FRAME + 4];
    let mut partial = Vec::with_capacity(2 * FRAME);
    loop {
        let mut waited =
            [PollFd::new(device.as_fd(), PollFlags::POLLIN), PollFd::new(host.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [from_guest, from_host] = waited.map(|fd| fd.any().unwrap_or(false));
        if from_guest {
            match device.read(buffer.get_mut(4..).unwrap_or_default()) {
                // The length stands before the frame, so that both leave in one write.
                Ok(len) => {
                    let start = prefix(&mut buffer, len, framing);
                    host.write_all(buffer.get(start..4 + len).unwrap_or_default())?;
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
        if from_host {
            let len = match host.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            partial.extend_from_slice(buffer.get(..len).unwrap_or_default());
            let mut at = 0;
            while let Some((head, frame)) = next_frame(partial.get(at..).unwrap_or_default(), framing)? {
                // A frame that the device does not take (it is down) is lost, as on a wire.
                let _ = device.write(frame);
                at += head + frame.len();
            }
            partial.drain(..at);
        }
    }
}

/// Writes the length before the frame at 4, and says where it begins.
fn prefix(buffer: &mut [u8], len: usize, framing: Framing) -> usize {
    let (start, bytes) = match framing {
        Framing::Post => (2, u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes().to_vec()),
        Framing::Qemu => (0, u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes().to_vec()),
    };
    if let Some(place) = buffer.get_mut(start..4) {
        place.copy_from_slice(&bytes);
    }
    start
}

/// The first whole frame, and the bytes of its length.
fn next_frame(bytes: &[u8], framing: Framing) -> io::Result<Option<(usize, &[u8])>> {
    let (head, len) = match framing {
        Framing::Post => match bytes.first_chunk::<2>() {
            Some(len) => (2, usize::from(u16::from_le_bytes(*len))),
            None => return Ok(None),
        },
        Framing::Qemu => match bytes.first_chunk::<4>() {
            Some(len) => (4, usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX)),
            None => return Ok(None),
        },
    };
    if len > FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the host sends a frame of {len} bytes"),
        ));
    }
    Ok(bytes.get(head..head + len).map(|frame| (head, frame)))
}

/// Connects, and waits for it.
fn connect(host: &Host) -> io::Result<OwnedFd> {
    let fd = dial::host(host)?;
    let mut waited = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::NONE);
    if poll(&mut waited, timeout)? == 0 || !dial::outcome(&fd)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(fd)
}

nix::ioctl_write_ptr_bad!(
    /// Makes or takes a device: linux/if_tun.h.
    tunsetiff,
    nix::libc::TUNSETIFF,
    nix::libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets a device's Ethernet address: netdevice(7).
    siocsifhwaddr,
    nix::libc::SIOCSIFHWADDR,
    nix::libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets its MTU.
    siocsifmtu,
    nix::libc::SIOCSIFMTU,
    nix::libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets its flags.
    siocsifflags,
    nix::libc::SIOCSIFFLAGS,
    nix::libc::ifreq
);

/// A request about `device`; everything else in it is zero.
fn request(device: &str) -> nix::libc::ifreq {
    // SAFETY: `ifreq` is integers, arrays of them and a union of the same, for which all zero bytes are a value.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(15).zip(device.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// The device, up, with its address and MTU.
fn open_device(options: &Options) -> io::Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_CLOEXEC.bits())
        .open("/dev/net/tun")?;
    let mut attach = request(&options.device);
    let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI;
    attach.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    // SAFETY: TUNSETIFF reads one `ifreq`, which lives until the call is over.
    unsafe { tunsetiff(tun.as_raw_fd(), &raw const attach) }?;
    // Any socket will do: the requests below are about the device they name.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    if !options.preexisting {
        let mut address = request(&options.device);
        let mut hardware = nix::libc::sockaddr { sa_family: nix::libc::ARPHRD_ETHER, sa_data: [0; 14] };
        for (to, from) in hardware.sa_data.iter_mut().zip(options.mac) {
            *to = from.cast_signed();
        }
        address.ifr_ifru.ifru_hwaddr = hardware;
        // SAFETY: SIOCSIFHWADDR reads one `ifreq`, which lives until the call is over.
        unsafe { siocsifhwaddr(socket.as_raw_fd(), &raw const address) }?;
    }
    let mut size = request(&options.device);
    size.ifr_ifru.ifru_mtu = i32::from(options.mtu);
    let mut up = request(&options.device);
    let flags = nix::libc::IFF_UP | nix::libc::IFF_BROADCAST | nix::libc::IFF_MULTICAST;
    up.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    // SAFETY: both read one `ifreq`, which lives until the call is over.
    unsafe {
        siocsifmtu(socket.as_raw_fd(), &raw const size)?;
        siocsifflags(socket.as_raw_fd(), &raw const up)?;
    }
    Ok(tun)
}

/// The guest's own DHCP client, for as long as this process lives.
fn start_dhcp(device: &str) {
    for (client, args) in [("udhcpc", ["-f", "-i"].as_slice()), ("dhclient", &["-4", "-d"])] {
        let mut command = Command::new(client);
        command.args(args).arg(device).stdin(Stdio::null());
        match command.spawn() {
            // It ends with the device.
            Ok(_) => return,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return say(&format!("{client}: {e}")),
        }
    }
    say("neither udhcpc nor dhclient is there: give the device an address");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options, String> {
        Options::parse(Args::new(line.split_whitespace().map(str::to_owned)))
    }

    #[test]
    fn gvforwarders_command_line_is_understood() {
        let line = "-url vsock://2:1024/connect -iface tap1 -stop-if-exist ignore -mac 02:00:00:00:00:01 -mtu 4000 -debug";
        let options = parsed(line).expect("gvforwarder's own");
        assert_eq!((options.host, options.path.as_str()), (Host::Vsock { cid: 2, port: 1024 }, "/connect"));
        assert_eq!((options.device.as_str(), options.mtu, options.mac[5]), ("tap1", 4000, 1));
        for (line, fault) in [
            ("-mac 01:00:00:00:00:00", "is not the address"),
            ("-mac here", "is not the address"),
            ("-url tcp://x", "is not vsock"),
            ("-iface a/b", "is not the name"),
            ("-mtu 5", "576 at least"),
            ("-mtu 65535", "65517 at most"),
            ("-framing x", "is not post or qemu"),
        ] {
            assert!(parsed(line).is_err_and(|e| e.contains(fault)), "{line}");
        }
    }

    #[test]
    fn frames_are_cut_out_of_the_stream_in_both_framings() {
        for (framing, bytes) in
            [(Framing::Post, &b"\x03\0abc\x02\0d"[..]), (Framing::Qemu, &b"\0\0\0\x03abc\0\0\0\x02d"[..])]
        {
            let (head, frame) = next_frame(bytes, framing).expect("good").expect("whole");
            assert_eq!(frame, b"abc");
            assert_eq!(next_frame(&bytes[head + 3..], framing).expect("good"), None, "torn");
            let mut buffer = *b"....abc";
            let start = prefix(&mut buffer, 3, framing);
            assert_eq!(&buffer[start..], &bytes[..head + 3]);
        }
        assert!(next_frame(&[0xff; 8], Framing::Qemu).is_err());
    }
}
