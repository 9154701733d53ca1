//! A guest that sends whatever it likes: frames made by hand, on a socket of the `qemu` link.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The Ethernet address of gateway and host alias.
pub const GATEWAY: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd];

/// TCP flags.
pub const SYN: u8 = 2;
/// TCP flags.
pub const RST: u8 = 4;
/// TCP flags.
pub const ACK: u8 = 0x10;
/// TCP flags.
pub const PSH: u8 = 8;
/// TCP flags.
pub const URG: u8 = 0x20;

/// The Internet checksum of `parts` (RFC 1071), of which all but the last have an even length.
#[must_use]
pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|p| p.chunks(2));
    let mut sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap_or(0)).to_be_bytes()
}

/// An Ethernet frame to the gateway.
#[must_use]
pub fn ethernet(from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&GATEWAY[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An IPv4 packet. `fragment` is the field of that name: flags and offset.
#[must_use]
pub fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let [f0, f1] = fragment.to_be_bytes();
    let mut head = vec![0x45, 0, len[0], len[1], 0x12, 0x34, f0, f1, 64, protocol, 0, 0];
    head.extend(src.octets());
    head.extend(dst.octets());
    let sum = checksum(&[&head]);
    head[10..12].copy_from_slice(&sum);
    head.extend(payload);
    head
}

fn pseudo(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, len: usize) -> Vec<u8> {
    let len = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    [&src.octets()[..], &dst.octets(), &[0, protocol, len[0], len[1]]].concat()
}

/// A UDP datagram in its packet.
#[must_use]
pub fn udp(src: SocketAddrV4, dst: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut datagram = [&src.port().to_be_bytes()[..], &dst.port().to_be_bytes(), &len, &[0, 0]].concat();
    datagram.extend(payload);
    let sum = checksum(&[&pseudo(*src.ip(), *dst.ip(), 17, datagram.len()), &datagram]);
    datagram[6..8].copy_from_slice(&sum);
    ipv4(*src.ip(), *dst.ip(), 17, 0, &datagram)
}

/// What of a TCP segment is not its addresses and payload.
#[derive(Debug, Clone, Default)]
pub struct Segment {
    /// Its sequence number.
    pub seq: u32,
    /// What it acknowledges.
    pub ack: u32,
    /// Its flags.
    pub flags: u8,
    /// The urgent pointer.
    pub urgent: u16,
    /// Options; padded to words.
    pub options: Vec<u8>,
}

/// A TCP segment in its packet.
#[must_use]
pub fn tcp(src: SocketAddrV4, dst: SocketAddrV4, segment: &Segment, payload: &[u8]) -> Vec<u8> {
    let mut options = segment.options.clone();
    options.resize(options.len().next_multiple_of(4), 0);
    let offset = u8::try_from(((20 + options.len()) / 4) << 4).unwrap_or(0xf0);
    let mut bytes = [&src.port().to_be_bytes()[..], &dst.port().to_be_bytes()].concat();
    bytes.extend(segment.seq.to_be_bytes());
    bytes.extend(segment.ack.to_be_bytes());
    bytes.extend([offset, segment.flags, 0xff, 0xff, 0, 0]);
    bytes.extend(segment.urgent.to_be_bytes());
    bytes.extend(options);
    bytes.extend(payload);
    let sum = checksum(&[&pseudo(*src.ip(), *dst.ip(), 6, bytes.len()), &bytes]);
    bytes[16..18].copy_from_slice(&sum);
    ipv4(*src.ip(), *dst.ip(), 6, 0, &bytes)
}

/// A TCP segment that came: sequence number, acknowledgement, flags, payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its sequence number.
    pub seq: u32,
    /// What it acknowledges.
    pub ack: u32,
    /// Its flags.
    pub flags: u8,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// The guest.
#[derive(Debug)]
pub struct RawGuest {
    /// Its link.
    pub link: UnixStream,
    /// Its address, which nobody leased to it.
    pub ip: Ipv4Addr,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    partial: Vec<u8>,
    next_port: u16,
}

impl RawGuest {
    /// Attaches to the socket at `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn attach(path: &Path, last: u8) -> Result<Self> {
        let link = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        let ip = Ipv4Addr::new(192, 168, 127, last);
        Ok(Self { link, ip, mac: [2, 0, 0, 0, 1, last], partial: Vec::new(), next_port: 30_000 })
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// When the link has ended.
    pub fn frame(&mut self, frame: &[u8]) -> Result<()> {
        let len = u32::try_from(frame.len())?.to_be_bytes();
        self.link.set_nonblocking(false)?;
        self.link.set_write_timeout(Some(Duration::from_secs(10)))?;
        Ok(self.link.write_all(&[&len[..], frame].concat())?)
    }

    /// Sends one IPv4 packet.
    ///
    /// # Errors
    /// When the link has ended.
    pub fn packet(&mut self, packet: &[u8]) -> Result<()> {
        self.frame(&ethernet(self.mac, 0x0800, packet))
    }

    /// Frames that have come, without waiting.
    ///
    /// # Errors
    /// When the link has ended.
    pub fn frames(&mut self) -> Result<Vec<Vec<u8>>> {
        self.link.set_nonblocking(true)?;
        let mut buffer = [0; 65_536];
        loop {
            match self.link.read(&mut buffer) {
                Ok(0) => bail!("the link ended"),
                Ok(n) => self.partial.extend(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        let mut frames = Vec::new();
        while let Some((len, rest)) = self.partial.split_first_chunk::<4>() {
            let len = u32::from_be_bytes(*len) as usize;
            let Some(frame) = rest.get(..len) else { break };
            frames.push(frame.to_vec());
            self.partial.drain(..4 + len);
        }
        Ok(frames)
    }

    /// Waits for a frame of which `wanted` makes something. ARP requests are answered meanwhile.
    ///
    /// # Errors
    /// When none comes within 10 s; `what` is in the error.
    pub fn wait<T>(&mut self, what: &str, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            for frame in self.frames()? {
                self.answer_arp(&frame)?;
                if let Some(found) = wanted(&frame) {
                    return Ok(found);
                }
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        bail!("{what}: not within 10 s")
    }

    fn answer_arp(&mut self, frame: &[u8]) -> Result<()> {
        let asked = frame.get(38..42).is_some_and(|ip| ip == self.ip.octets());
        if frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 1]) && asked {
            let mut reply = vec![0, 1, 8, 0, 6, 4, 0, 2];
            reply.extend(self.mac);
            reply.extend(self.ip.octets());
            reply.extend(frame.get(22..32).unwrap_or_default());
            self.frame(&ethernet(self.mac, 0x0806, &reply))?;
        }
        Ok(())
    }

    /// The next segment of the conversation between `ours` and `theirs`.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn segment(&mut self, ours: SocketAddrV4, theirs: SocketAddrV4) -> Result<Seen> {
        self.wait("a segment", |frame| seen(frame, theirs, ours))
    }

    /// An address of ours that has not been used.
    pub fn address(&mut self) -> SocketAddrV4 {
        self.next_port += 1;
        SocketAddrV4::new(self.ip, self.next_port)
    }

    /// Reads `len` bytes from `theirs`, of which the first has number `ack`, and acknowledges each; `seq` is our own number.
    ///
    /// # Errors
    /// When they do not come in time.
    pub fn read(
        &mut self,
        ours: SocketAddrV4,
        theirs: SocketAddrV4,
        (seq, mut ack): (u32, u32),
        len: usize,
    ) -> Result<Vec<u8>> {
        let mut got = Vec::new();
        while got.len() < len {
            let segment = self.segment(ours, theirs)?;
            // A repetition may begin before what is missing and go on behind it.
            let known = ack.wrapping_sub(segment.seq) as usize;
            let Some(new) = segment.payload.get(known..).filter(|n| !n.is_empty()) else { continue };
            got.extend(new);
            ack = ack.wrapping_add(u32::try_from(new.len())?);
            let segment = Segment { seq, ack, flags: ACK, ..Segment::default() };
            self.packet(&tcp(ours, theirs, &segment, &[]))?;
        }
        Ok(got)
    }

    /// Opens a connection: our address, and the next sequence number and acknowledgement. `None`: refused.
    ///
    /// # Errors
    /// When there is no answer in time.
    pub fn open(&mut self, to: SocketAddrV4, options: &[u8]) -> Result<Option<(SocketAddrV4, u32, u32)>> {
        let from = self.address();
        let syn = Segment { seq: 1000, flags: SYN, options: options.to_vec(), ..Segment::default() };
        self.packet(&tcp(from, to, &syn, &[]))?;
        let answer = self.segment(from, to)?;
        if answer.flags & RST != 0 {
            return Ok(None);
        }
        let ack = answer.seq.wrapping_add(1);
        let segment = Segment { seq: 1001, ack, flags: ACK, ..Segment::default() };
        self.packet(&tcp(from, to, &segment, &[]))?;
        Ok(Some((from, 1001, ack)))
    }
}

/// The segment in `frame`, if it goes from `src` to `dst`.
fn seen(frame: &[u8], src: SocketAddrV4, dst: SocketAddrV4) -> Option<Seen> {
    let packet = frame.get(14..).filter(|p| frame[12..14] == [8, 0] && p.len() >= 40 && p[9] == 6)?;
    let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let segment = packet.get(20..total)?;
    let word =
        |at: usize| u32::from_be_bytes([segment[at], segment[at + 1], segment[at + 2], segment[at + 3]]);
    let ports = [&src.port().to_be_bytes()[..], &dst.port().to_be_bytes()].concat();
    let addresses = [src.ip().octets(), dst.ip().octets()].concat();
    (segment[..4] == ports && packet[12..20] == addresses).then(|| Seen {
        seq: word(4),
        ack: word(8),
        flags: segment[13],
        payload: segment.get(usize::from(segment[12] >> 4) * 4..).unwrap_or_default().to_vec(),
    })
}
