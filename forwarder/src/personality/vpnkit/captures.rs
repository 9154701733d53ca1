//! The frames that passed last, for whoever asks afterwards: rings that `--diagnostics` and `--introspection` show as pcap files.
//!
//! ```text
//!  capture ─► Captures::keep ─► each ring that wants the frame ─► its oldest go ─► file: a pcap of what is left
//! ```
//! Only with one of those options is anything recorded. Limits: the bytes of each of [`RINGS`]; [`WHOLE`] bytes of a frame, and
//! `--pcap-snaplen` in the ring that has all. A reader that is too slow loses frames, as every capture does.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::pcap;
use crate::capture::{Capture, Filter, Frame, Layer4};
use crate::request::{Request, Requests};

/// Bytes kept of a frame, where not fewer are: those of Ethernet's longest, and some more.
const WHOLE: usize = 2048;
/// Frames taken at one go.
const FRAMES: usize = 256;
/// The files' names, and how many bytes their rings hold.
const RINGS: [(&str, usize); 6] = [
    ("all.pcap", 256 << 10),
    ("dns.pcap", 256 << 10),
    ("ntp.pcap", 64 << 10),
    ("icmp.pcap", 8 << 10),
    ("http_proxy.pcap", 1 << 20),
    ("bad.pcap", 1 << 20),
];

/// The rings.
#[derive(Debug)]
pub(super) struct Captures {
    rings: Mutex<[Ring; RINGS.len()]>,
    /// Bytes of each frame in the first.
    snaplen: usize,
}

#[derive(Debug, Default)]
struct Ring {
    records: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Ring {
    fn push(&mut self, record: Vec<u8>, limit: usize) {
        self.bytes += record.len();
        self.records.push_back(record);
        while self.bytes > limit {
            let Some(oldest) = self.records.pop_front() else { return };
            self.bytes -= oldest.len();
        }
    }
}

impl Captures {
    /// Empty ones; of each frame the one that has all keeps `snaplen` bytes.
    pub(super) fn new(snaplen: usize) -> Self {
        Self { rings: Mutex::default(), snaplen: snaplen.min(WHOLE) }
    }

    /// Records until the network ends.
    pub(super) async fn keep(self: Arc<Self>, requests: Requests) {
        let (capture, mut reader) = Capture::new(Filter { snaplen: WHOLE, ..Filter::default() });
        let (reply, answer) = oneshot::channel();
        if requests.send(Request::Capture { capture, reply }).is_err() {
            return;
        }
        match answer.await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return tracing::warn!(%error, "--diagnostics records no frames"),
            Err(_) => return,
        }
        let mut frames = Vec::new();
        while reader.read(&mut frames, FRAMES).await {
            frames.drain(..).for_each(|frame| self.see(frame));
        }
    }

    fn see(&self, mut frame: Frame) {
        let wanted = RINGS.map(|(name, _)| wants(name, &frame));
        let mut record = Vec::new();
        pcap::record(&frame, &mut record);
        let mut rings = self.lock();
        for (n, (_, limit)) in RINGS.into_iter().enumerate().skip(1) {
            if wanted[n] {
                rings[n].push(record.clone(), limit);
            }
        }
        if frame.bytes.len() > self.snaplen {
            frame.bytes = frame.bytes[..self.snaplen].into();
            record.clear();
            pcap::record(&frame, &mut record);
        }
        rings[0].push(record, RINGS[0].1);
    }

    /// The names of the files.
    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        RINGS.into_iter().map(|(name, _)| name)
    }

    /// The file called `name`.
    pub(super) fn file(&self, name: &str) -> Option<Vec<u8>> {
        let n = RINGS.iter().position(|(known, _)| *known == name)?;
        let mut file = pcap::head();
        self.lock()[n].records.iter().for_each(|record| file.extend(record));
        Some(file)
    }

    fn lock(&self) -> MutexGuard<'_, [Ring; RINGS.len()]> {
        // A ring with half of a push is still one: a panicking holder leaves a count that is off at the most.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `frame` belongs into the ring called `name`.
fn wants(name: &str, frame: &Frame) -> bool {
    let any = Filter::default();
    let one = |filter: Filter| filter.wants(&frame.bytes);
    let port = |proto, port| one(Filter { proto: Some(proto), port: Some(port), ..any.clone() });
    match name {
        "all.pcap" => true,
        "dns.pcap" => port(Layer4::Udp, 53) || port(Layer4::Tcp, 53),
        "ntp.pcap" => port(Layer4::Udp, 123),
        "icmp.pcap" => one(Filter { proto: Some(Layer4::Icmp), ..any }),
        "http_proxy.pcap" => port(Layer4::Tcp, 3128) || port(Layer4::Tcp, 3129),
        _ => is_bad(&frame.bytes, frame.len),
    }
}

/// Whether a frame of `len` bytes, of which these are the first, is neither ARP nor a whole packet of IP.
fn is_bad(bytes: &[u8], len: usize) -> bool {
    let Some((header, packet)) = bytes.split_first_chunk::<14>() else { return true };
    let carried = len.saturating_sub(header.len());
    match [header[12], header[13]] {
        // RFC 826: 28 bytes, of Ethernet and IPv4.
        [0x08, 0x06] => carried < 28,
        // RFC 791 §3.1: version, words of the header, total length.
        [0x08, 0x00] => match packet {
            [first, _, high, low, ..] => {
                let (words, total) =
                    (usize::from(first & 15), usize::from(u16::from_be_bytes([*high, *low])));
                first >> 4 != 4 || words < 5 || total < words * 4 || total > carried
            }
            _ => true,
        },
        // RFC 8200 §3.
        [0x86, 0xdd] => carried < 40 || packet.first().is_none_or(|first| first >> 4 != 6),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(bytes: &[u8]) -> Frame {
        let at = std::time::SystemTime::UNIX_EPOCH;
        Frame { link: "vm".into(), to_guest: false, at, len: bytes.len(), bytes: bytes.into(), lost: 0 }
    }

    /// An IPv4 packet with this payload of `proto`, its first bytes being ports.
    fn packet(proto: u8, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let header =
            [&[0x45, 0][..], &total, &[0, 0, 0, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]].concat();
        [&[0; 12][..], &[8, 0], &header, payload].concat()
    }

    #[test]
    fn frames_go_to_the_rings_they_are_for_and_are_cut_where_all_are() {
        let captures = Captures::new(20);
        let udp = |port: u16| packet(17, &[&[0xc0, 0][..], &port.to_be_bytes(), &[0; 40]].concat());
        let tcp = |port: u16| packet(6, &[&port.to_be_bytes()[..], &[0xc0, 0], &[0; 40]].concat());
        for bytes in [udp(53), tcp(53), udp(123), tcp(3128), packet(1, &[8; 30]), udp(9), vec![0; 13]] {
            captures.see(frame(&bytes));
        }
        let records = |name: &str| {
            let file = captures.file(name).unwrap();
            let mut at = 24;
            let mut lengths = Vec::new();
            while let Some(header) = file.get(at..at + 16) {
                let kept = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
                lengths.push(kept);
                at += 16 + kept;
            }
            assert_eq!(at, file.len(), "{name}");
            lengths
        };
        assert_eq!(records("all.pcap"), [20, 20, 20, 20, 20, 20, 13]);
        assert_eq!(records("dns.pcap"), [78, 78]);
        for (name, length) in [("ntp.pcap", 78), ("http_proxy.pcap", 78), ("icmp.pcap", 64), ("bad.pcap", 13)]
        {
            assert_eq!(records(name), [length], "{name}");
        }
        assert_eq!(captures.file("none.pcap"), None);
    }

    #[test]
    fn a_ring_that_is_full_forgets_its_oldest() {
        let captures = Captures::new(WHOLE);
        for n in 0..=u8::MAX {
            captures.see(frame(&packet(1, &[n; 1000])));
        }
        let file = captures.file("icmp.pcap").unwrap();
        assert!(file.len() <= 24 + (8 << 10) && file.len() > 7 << 10, "{}", file.len());
        assert!(file.ends_with(&[255; 1000]));
    }

    #[test]
    fn what_is_cut_or_of_no_known_kind_is_bad() {
        let whole = packet(17, &[1; 20]);
        assert!(!is_bad(&whole, whole.len()));
        // A part of it that is kept is not a part that came.
        assert!(!is_bad(&whole[..20], whole.len()));
        for cut in 0..whole.len() {
            assert!(is_bad(&whole[..cut], cut), "{cut}");
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            is_bad(&bytes, bytes.len())
        };
        assert!(with(14, 0x65) && with(14, 0x44) && with(12, 0x88) && with(17, 200));
    }
}
