//! pcapng, as Wireshark reads it (draft-ietf-opsawg-pcapng): one section, an interface per link, nanoseconds.
//!
//! Direction is the sidecar's: *inbound* frames come from the guest, *outbound* ones go to it, as on the tap device that a
//! link stands for.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Filter, Frame};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;

const OPT_END: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;
const ISB_IFDROP: u16 = 5;

/// Makes the bytes of one capture, from its first to its last.
#[derive(Debug, Default)]
pub struct Encoder {
    interfaces: Vec<Arc<str>>,
}

impl Encoder {
    /// The head of the file, with an interface for each of `links`; further ones are added when they are first seen.
    pub fn begin(&mut self, links: &[String], out: &mut Vec<u8>) {
        block(SECTION, out, |body| {
            body.extend(0x1a2b_3c4d_u32.to_le_bytes());
            body.extend([1, 0, 0, 0]);
            // The section's length is not known: it is live.
            body.extend(u64::MAX.to_le_bytes());
            option(SHB_USERAPPL, concat!("portway ", env!("CARGO_PKG_VERSION")).as_bytes(), body);
            option(OPT_END, &[], body);
        });
        for link in links {
            self.interface(&Arc::from(link.as_str()), out);
        }
    }

    /// One frame.
    pub fn frame(&mut self, frame: &Frame, out: &mut Vec<u8>) {
        let interface = self.interface(&frame.link, out);
        block(ENHANCED_PACKET, out, |body| {
            body.extend(interface.to_le_bytes());
            body.extend(timestamp(frame.at));
            body.extend(word(frame.bytes.len()));
            body.extend(word(frame.len));
            body.extend_from_slice(&frame.bytes);
            pad(body);
            let direction: u32 = if frame.to_guest { 2 } else { 1 };
            option(EPB_FLAGS, &direction.to_le_bytes(), body);
            if frame.lost > 0 {
                option(EPB_DROPCOUNT, &frame.lost.to_le_bytes(), body);
            }
            option(OPT_END, &[], body);
        });
    }

    /// How many frames were lost so far, at any link; also a sign of life while no frame comes.
    pub fn statistics(&self, lost: u64, out: &mut Vec<u8>) {
        block(STATISTICS, out, |body| {
            body.extend(0u32.to_le_bytes());
            body.extend(timestamp(SystemTime::now()));
            option(ISB_IFDROP, &lost.to_le_bytes(), body);
            option(OPT_END, &[], body);
        });
    }

    /// The number of a link's interface; described when it is new.
    fn interface(&mut self, link: &Arc<str>, out: &mut Vec<u8>) -> u32 {
        let at = self.interfaces.iter().position(|i| i == link).unwrap_or_else(|| {
            block(INTERFACE, out, |body| {
                body.extend(ETHERNET.to_le_bytes());
                body.extend(word(Filter::SNAPLEN));
                option(IF_NAME, link.as_bytes(), body);
                option(IF_TSRESOL, &[9], body);
                option(OPT_END, &[], body);
            });
            self.interfaces.push(Arc::clone(link));
            self.interfaces.len() - 1
        });
        u32::try_from(at).unwrap_or(u32::MAX)
    }
}

/// Nanoseconds since 1970, the high word first.
fn timestamp(at: SystemTime) -> [u8; 8] {
    let since = at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    // In a u64 until the year 2554.
    let [h3, h2, h1, h0, l3, l2, l1, l0] = u64::try_from(since).unwrap_or(u64::MAX).to_be_bytes();
    [h0, h1, h2, h3, l0, l1, l2, l3]
}

fn word(n: usize) -> [u8; 4] {
    u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes()
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A block begins and ends with its length.
fn block(kind: u32, out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut body = Vec::with_capacity(128);
    fill(&mut body);
    let len = word(body.len() + 12);
    out.extend(kind.to_le_bytes());
    out.extend(len);
    out.append(&mut body);
    out.extend(len);
}

fn option(code: u16, value: &[u8], out: &mut Vec<u8>) {
    let value = value.get(..usize::from(u16::MAX)).unwrap_or(value);
    out.extend(code.to_le_bytes());
    out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(value);
    // Every field before an option is a multiple of four bytes long, so that padding the body pads the option.
    pad(out);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Type and body of every block; panics when lengths disagree.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |b: &[u8]| u32::from_le_bytes(b[..4].try_into().unwrap());
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let len = word(&bytes[4..]) as usize;
            assert_eq!(len % 4, 0);
            assert_eq!(word(&bytes[len - 4..]) as usize, len);
            out.push((word(bytes), bytes[8..len - 4].to_vec()));
            bytes = &bytes[len..];
        }
        out
    }

    #[test]
    fn a_link_is_described_once_and_before_its_first_frame() {
        let (mut encoder, mut out) = (Encoder::default(), Vec::new());
        encoder.begin(&["web".into()], &mut out);
        let frame = |link: &str, lost| Frame {
            link: link.into(),
            to_guest: true,
            at: SystemTime::UNIX_EPOCH + Duration::from_nanos(0x1_0000_0002),
            len: 100,
            bytes: vec![1, 2, 3].into(),
            lost,
        };
        for f in [frame("web", 0), frame("db", 7), frame("db", 0)] {
            encoder.frame(&f, &mut out);
        }
        let blocks = blocks(&out);
        let kinds: Vec<u32> = blocks.iter().map(|b| b.0).collect();
        assert_eq!(kinds, [SECTION, INTERFACE, ENHANCED_PACKET, INTERFACE, ENHANCED_PACKET, ENHANCED_PACKET]);
        let packet = &blocks[4].1;
        assert_eq!(packet[..4], 1u32.to_le_bytes(), "the second interface");
        assert_eq!(packet[4..12], [1, 0, 0, 0, 2, 0, 0, 0], "high word first");
        assert_eq!(packet[12..20], [3, 0, 0, 0, 100, 0, 0, 0]);
        assert!(packet.windows(12).any(|w| w == [4, 0, 8, 0, 7, 0, 0, 0, 0, 0, 0, 0]), "the drop count");
    }
}
