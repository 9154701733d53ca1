//! Frames of vpnkit's multiplexer: many connections on one stream to the forwarder in the guest.
//!
//! ```text
//!  header length u16 · command u8 · channel u32 · what the command needs          (little-endian)
//!  1 Open: dedicated? u8 · protocol u8 · address      2 Close     3 Shutdown     4 Data: length u32, bytes     5 Window: u64
//! ```
//! A window is the total of bytes the receiver takes since the channel was opened; it begins at nothing. Datagrams travel
//! in a channel with their peer's address before each. Parsing is total, and what is kept is at most one frame.
//! Source: vpnkit's `docs/` and the frames its implementations exchange. Left out: dedicated connections, which no
//! forwarder takes.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::forward::{End, Proto};

/// Bytes one side takes before it says more.
pub const WINDOW: u64 = 65_536;
/// The longest header: an Open with a path.
const HEADER: usize = 256;
/// Length, command and channel.
const COMMON: usize = 7;
/// What both sides send first, where they do: the text, a length, nothing.
pub const GREETING: &[u8] = b"https://github.com/moby/vpnkit multiplexer protocol\n\0\0";

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The channel.
    pub id: u32,
    /// What happens to it.
    pub command: Command,
}

/// What happens to a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// It begins, to this destination.
    Open(Proto, End),
    /// It ends.
    Close,
    /// The sender sends no more.
    Shutdown,
    /// Bytes.
    Data(Vec<u8>),
    /// The sender takes bytes up to this total.
    Window(u64),
}

/// Why bytes are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The header is shorter than its command needs, or longer than any.
    #[error("a frame's header has a wrong length")]
    Header,
    /// A command we do not know.
    #[error("a frame has the unknown command {0}")]
    Command(u8),
    /// An Open of something we do not know.
    #[error("a frame opens something unknown")]
    Open,
    /// More bytes than any window.
    #[error("a frame is larger than the window")]
    Data,
}

impl Frame {
    /// The frame `bytes` begin with, and its length; `None`: more are needed.
    ///
    /// # Errors
    /// When they begin with no frame: the stream cannot be read on.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Fault> {
        let Some((length, _)) = bytes.split_first_chunk::<2>() else { return Ok(None) };
        let length = usize::from(u16::from_le_bytes(*length));
        if !(COMMON..=HEADER).contains(&length) {
            return Err(Fault::Header);
        }
        let Some((header, rest)) = bytes.split_at_checked(length) else { return Ok(None) };
        let Some((&[_, _, command, a, b, c, d], body)) = header.split_first_chunk::<COMMON>() else {
            return Err(Fault::Header);
        };
        let id = u32::from_le_bytes([a, b, c, d]);
        let mut total = length;
        let command = match (command, body) {
            (1, [_, proto, body @ ..]) => open(*proto, body)?,
            (2, []) => Command::Close,
            (3, []) => Command::Shutdown,
            (4, &[a, b, c, d]) => {
                let len = u32::from_le_bytes([a, b, c, d]);
                if u64::from(len) > WINDOW {
                    return Err(Fault::Data);
                }
                let len = usize::try_from(len).map_err(|_| Fault::Data)?;
                let Some(data) = rest.get(..len) else { return Ok(None) };
                total += len;
                Command::Data(data.to_vec())
            }
            (5, body) => Command::Window(u64::from_le_bytes(body.try_into().map_err(|_| Fault::Header)?)),
            (1..=4, _) => return Err(Fault::Header),
            (other, _) => return Err(Fault::Command(other)),
        };
        Ok(Some((Self { id, command }, total)))
    }

    /// The frame's bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0, 0];
        out.push(match &self.command {
            Command::Open(..) => 1,
            Command::Close => 2,
            Command::Shutdown => 3,
            Command::Data(_) => 4,
            Command::Window(_) => 5,
        });
        out.extend(self.id.to_le_bytes());
        match &self.command {
            Command::Open(proto, end) => put_open(&mut out, *proto, end),
            Command::Close | Command::Shutdown => {}
            Command::Data(data) => out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes()),
            Command::Window(total) => out.extend(total.to_le_bytes()),
        }
        let length = u16::try_from(out.len()).unwrap_or(u16::MAX);
        out[..2].copy_from_slice(&length.to_le_bytes());
        if let Command::Data(data) = &self.command {
            out.extend(data);
        }
        out
    }
}

/// What a stream that carries one connection begins with, as the forwarder of 2017 takes it; `None` for what it does not know.
#[must_use]
pub fn destination(proto: Proto, end: &End) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    put_destination(&mut out, proto, end);
    (proto != Proto::Unix).then_some(out)
}

fn put_open(out: &mut Vec<u8>, proto: Proto, end: &End) {
    // 2: in this connection, with the others.
    out.push(2);
    put_destination(out, proto, end);
}

fn put_destination(out: &mut Vec<u8>, proto: Proto, end: &End) {
    out.push(match proto {
        Proto::Tcp => 1,
        Proto::Udp => 2,
        Proto::Unix => 3,
    });
    match end {
        End::Port(ip, port) => {
            put_ip(out, *ip);
            out.extend(port.to_le_bytes());
        }
        End::Path(path) => {
            let path = path.as_os_str().as_encoded_bytes();
            out.extend(u16::try_from(path.len()).unwrap_or(u16::MAX).to_le_bytes());
            out.extend(path);
        }
    }
}

fn put_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => out.extend([&[4, 0][..], &ip.octets()].concat()),
        IpAddr::V6(ip) => out.extend([&[16, 0][..], &ip.octets()].concat()),
    }
}

fn open(proto: u8, body: &[u8]) -> Result<Command, Fault> {
    let (length, rest) = body.split_first_chunk::<2>().ok_or(Fault::Open)?;
    let (address, rest) =
        rest.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or(Fault::Open)?;
    let proto = match (proto, rest) {
        (1, [_, _]) => Proto::Tcp,
        (2, [_, _]) => Proto::Udp,
        (3, []) => {
            let path = std::str::from_utf8(address).map_err(|_| Fault::Open)?;
            return Ok(Command::Open(Proto::Unix, End::Path(PathBuf::from(path))));
        }
        _ => return Err(Fault::Open),
    };
    let port: [u8; 2] = rest.try_into().map_err(|_| Fault::Open)?;
    Ok(Command::Open(proto, End::Port(ip(address).ok_or(Fault::Open)?, u16::from_le_bytes(port))))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// A datagram in a channel: its peer outside, and its payload.
#[must_use]
pub fn datagram(peer: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0, 0];
    put_ip(&mut out, peer.ip());
    out.extend(peer.port().to_le_bytes());
    // No zone.
    out.extend([0, 0]);
    out.extend(u16::try_from(payload.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend(payload);
    let length = u16::try_from(out.len()).unwrap_or(u16::MAX);
    out[..2].copy_from_slice(&length.to_le_bytes());
    out
}

/// The largest payload whose datagram still counts its length in 16 bits, with an IPv6 address.
pub const DATAGRAM: usize = 65_535 - 26;

/// A datagram of a channel: its peer, its payload, and how many bytes it took.
pub type Enclosed<'a> = (SocketAddr, &'a [u8], usize);

/// The datagram `bytes` begin with, and its length; `None`: more are needed. The zone is left out.
///
/// # Errors
/// When they begin with none.
pub fn parse_datagram(bytes: &[u8]) -> Result<Option<Enclosed<'_>>, Fault> {
    let Some((length, _)) = bytes.split_first_chunk::<2>() else { return Ok(None) };
    let total = usize::from(u16::from_le_bytes(*length));
    let Some(datagram) = bytes.get(..total) else { return Ok(None) };
    let rest = datagram.get(2..).ok_or(Fault::Header)?;
    let field = |rest: &'_ [u8]| -> Option<(usize, usize)> {
        let (length, after) = rest.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length));
        (after.len() >= length).then_some((2, 2 + length))
    };
    let parsed = || {
        let (from, to) = field(rest)?;
        let (address, rest) = (rest.get(from..to)?, rest.get(to..)?);
        let (port, rest) = rest.split_first_chunk::<2>()?;
        let (_, to) = field(rest)?;
        let rest = rest.get(to..)?;
        let (from, to) = field(rest)?;
        (rest.len() == to).then_some(())?;
        Some((SocketAddr::new(ip(address)?, u16::from_le_bytes(*port)), rest.get(from..to)?))
    };
    let (peer, payload) = parsed().ok_or(Fault::Header)?;
    Ok(Some((peer, payload, total)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_bytes_that_are_known() {
        let data = [&[0x0b, 0, 4, 8, 0, 0, 0, 0x80, 0, 0, 0][..], &[7; 0x80]].concat();
        let frame = Frame { id: 8, command: Command::Data(vec![7; 0x80]) };
        assert_eq!((frame.bytes(), Frame::parse(&data)), (data.clone(), Ok(Some((frame, data.len())))));
        let window = [0x0f, 0, 5, 9, 0, 0, 0, 0x38, 0xa2, 0x87, 0, 0, 0, 0, 0];
        let frame = Frame { id: 9, command: Command::Window(0x0087_a238) };
        assert_eq!((frame.bytes(), Frame::parse(&window)), (window.to_vec(), Ok(Some((frame, 15)))));
        let open = Frame { id: 1, command: Command::Open(Proto::Tcp, End::Port([127, 0, 0, 1].into(), 80)) };
        assert_eq!(open.bytes()[..11], [0x11, 0, 1, 1, 0, 0, 0, 2, 1, 4, 0]);
    }

    #[test]
    fn every_frame_is_read_as_it_was_written_and_not_before_it_is_whole() {
        for command in [
            Command::Open(Proto::Tcp, End::Port([10, 0, 0, 7].into(), 80)),
            Command::Open(Proto::Udp, End::Port("fd00::7".parse().unwrap(), 53)),
            Command::Open(Proto::Unix, End::Path("/run/docker.sock".into())),
            Command::Close,
            Command::Shutdown,
            Command::Data(vec![]),
            Command::Data(vec![3; 65_536]),
            Command::Window(u64::MAX),
        ] {
            let frame = Frame { id: 0x7fff_ffff, command };
            let bytes = frame.bytes();
            for n in 0..bytes.len().min(300) {
                assert_eq!(Frame::parse(&bytes[..n]), Ok(None), "{n} of {frame:?}");
            }
            assert_eq!(Frame::parse(&bytes), Ok(Some((frame, bytes.len()))));
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for (bytes, fault) in [
            (&[6, 0, 2, 0, 0, 0][..], Fault::Header),
            (&[255, 255], Fault::Header),
            (&[8, 0, 2, 0, 0, 0, 0, 0], Fault::Header),
            (&[7, 0, 6, 0, 0, 0, 0], Fault::Command(6)),
            (&[11, 0, 4, 0, 0, 0, 0, 1, 0, 1, 0], Fault::Data),
            (&[14, 0, 1, 0, 0, 0, 0, 2, 1, 3, 0, 1, 2, 3], Fault::Open),
            (&[11, 0, 1, 0, 0, 0, 0, 2, 9, 0, 0], Fault::Open),
        ] {
            assert_eq!(Frame::parse(bytes), Err(fault), "{bytes:?}");
        }
    }

    #[test]
    fn datagrams_keep_their_peers() {
        for peer in ["192.0.2.7:53", "[2001:db8::1]:5353"] {
            let peer: SocketAddr = peer.parse().unwrap();
            let bytes = datagram(peer, b"query");
            for n in 0..bytes.len() {
                assert_eq!(parse_datagram(&bytes[..n]), Ok(None), "{n}");
            }
            assert_eq!(parse_datagram(&bytes), Ok(Some((peer, &b"query"[..], bytes.len()))));
        }
        for bad in [&[0, 0][..], &[4, 0, 9, 9], &[6, 0, 4, 0, 1, 2]] {
            assert_eq!(parse_datagram(bad), Err(Fault::Header));
        }
        assert_eq!(datagram("[::1]:1".parse().unwrap(), &vec![0; DATAGRAM]).len(), 65_535);
    }
}
