//! vpnkit's handshake, with which hyperkit, linuxkit and rootlesskit begin; frames behind u16 lengths follow.
//!
//! ```text
//!  client ── Init, 49 bytes ──►  ◄── Init, 49 bytes ──
//!  client ── Command, 41 bytes: a UUID, perhaps an address ──►  ◄── Response, 258 bytes: MTU and MAC, or why not ──
//! ```
//! A UUID keeps its MAC: it is made from the UUID. And so it keeps its address, by the lease of that MAC. Integers are
//! little-endian. Source: vpnkit's `docs/ethernet.md` and the wire format as its clients read it.

use std::hash::{BuildHasher, RandomState};
use std::net::Ipv4Addr;

use portway_netstack::Mac;

/// Bytes of the first message, both ways.
const INIT: usize = 49;
/// Bytes of the second, from the client.
const COMMAND: usize = 41;
/// Bytes of the answer.
const RESPONSE: usize = 258;
const MAGIC: &[u8; 5] = b"VMN3T";
const VERSION: u32 = 22;
/// The text in our first message, where vpnkit has the commit it was made from.
const COMMIT: &[u8; 40] = b"portway                                 ";
const ETHERNET: u8 = 1;
const PREFERRED_IPV4: u8 = 8;
/// What clients take beside the MTU: headers, and a margin vpnkit has always had.
const MARGIN: u16 = 50;

/// What a client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Who it is; `None`: nobody in particular.
    pub uuid: Option<[u8; 36]>,
    /// The address it wants.
    pub address: Option<Ipv4Addr>,
}

impl Hello {
    /// The client's MAC: locally administered, the same for the same UUID for ever (FNV-1a of it), else random.
    #[must_use]
    pub fn mac(&self) -> Mac {
        let hash = match self.uuid {
            Some(uuid) => uuid.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
            }),
            None => RandomState::new().hash_one(0),
        };
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Mac([2, a, b, c, d, e])
    }
}

/// How far the handshake is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Init,
    Command,
    Done,
}

/// The server's side of the handshake: bytes in, bytes to answer out.
#[derive(Debug)]
pub struct Handshake {
    stage: Stage,
    bytes: Vec<u8>,
}

/// What came of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More is needed; the answer so far.
    More(Vec<u8>),
    /// The client is known; it waits for [`accept`] or [`refuse`]. The answer so far comes first.
    Hello(Vec<u8>, Hello),
    /// It speaks something else: send this, and close.
    Close(Vec<u8>),
}

impl Handshake {
    /// Nothing has come yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { stage: Stage::Init, bytes: Vec::new() }
    }

    /// Bytes from the client; never more than a handshake's are kept.
    pub fn feed(&mut self, bytes: &[u8]) -> Step {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > INIT + COMMAND {
            // A client waits for the answer before it sends frames.
            return Step::Close(refuse("too many bytes before the answer"));
        }
        let mut answer = Vec::new();
        if self.stage == Stage::Init {
            let Some(init) = self.bytes.first_chunk::<INIT>() else { return Step::More(answer) };
            let version = u32::from_le_bytes([init[5], init[6], init[7], init[8]]);
            answer.extend_from_slice(MAGIC);
            answer.extend_from_slice(&VERSION.to_le_bytes());
            answer.extend_from_slice(COMMIT);
            if init[..5] != *MAGIC || version != VERSION {
                return Step::Close(answer);
            }
            self.bytes.drain(..INIT);
            self.stage = Stage::Command;
        }
        let Some(command) = self.bytes.first_chunk::<COMMAND>() else { return Step::More(answer) };
        let [op, uuid @ .., a, b, c, d] = command;
        self.stage = Stage::Done;
        let address = match *op {
            ETHERNET => None,
            // The number of the address, little-endian.
            PREFERRED_IPV4 => Some(Ipv4Addr::from(u32::from_le_bytes([*a, *b, *c, *d]))),
            _ => {
                answer.extend(refuse("Unsupported command"));
                return Step::Close(answer);
            }
        };
        let uuid = (*uuid != [0; 36]).then_some(*uuid);
        Step::Hello(answer, Hello { uuid, address })
    }
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

/// The answer to a client that may come in.
#[must_use]
pub fn accept(mac: Mac, mtu: u16) -> Vec<u8> {
    let mut response = vec![0; RESPONSE];
    response[0] = 1;
    response[1..3].copy_from_slice(&mtu.to_le_bytes());
    response[3..5].copy_from_slice(&mtu.saturating_add(MARGIN).to_le_bytes());
    response[5..11].copy_from_slice(&mac.0);
    response
}

/// The answer to one that may not, with the reason.
#[must_use]
pub fn refuse(reason: &str) -> Vec<u8> {
    let mut response = vec![0; RESPONSE];
    let reason = &reason.as_bytes()[..reason.len().min(255)];
    response[0] = 2;
    response[1] = u8::try_from(reason.len()).unwrap_or(u8::MAX);
    response[2..2 + reason.len()].copy_from_slice(reason);
    response
}

/// Sums the IPv4 header of `frame` where nobody has: vpnkit's own Go client, with which rootlesskit asks for its address, leaves the sum
/// 0 in the packet of its DHCPDISCOVER, "as if offloaded".
///
/// Only a header whose sum is 0 is touched: of a right one that is what comes out again (RFC 1071 §1: 0 and ffff are the same).
pub fn finish_header(frame: &mut [u8]) {
    // Ethernet's 14 bytes; version 4, words of the header; the sum at 10.
    let Some([.., 0x08, 0x00, first]) = frame.first_chunk::<15>() else { return };
    let length = usize::from(first & 15) * 4;
    if first >> 4 != 4 || length < 20 {
        return;
    }
    let Some(header) = frame.get_mut(14..14 + length) else { return };
    if header[10..12] != [0, 0] {
        return;
    }
    let words = header.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).unwrap_or(u16::MAX);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The header of vpnkit's Go client, and the sum it has by RFC 1071.
    #[test]
    fn a_header_without_a_sum_gets_its_own_and_nothing_else_is_touched() {
        let header = [0x45, 0, 1, 0x10, 0x7f, 0x61, 0, 0, 0x40, 0x11, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
        let frame = [&[2; 12][..], &[8, 0], &header, &[7; 252]].concat();
        let mut finished = frame.clone();
        finish_header(&mut finished);
        let sum = |bytes: &[u8]| {
            let words = bytes[14..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>();
            (words & 0xffff) + (words >> 16)
        };
        assert_eq!(sum(&finished), 0xffff);
        finished[24..26].fill(0);
        assert_eq!(finished, frame);
        // Those with a sum, right or wrong; of another kind; cut; with a header that is none.
        let changed = |at: usize, byte: u8| {
            let mut frame = frame.clone();
            frame[at] = byte;
            frame
        };
        let others =
            [changed(24, 1), changed(12, 0x86), changed(14, 0x65), changed(14, 0x44), frame[..33].to_vec()];
        for other in others.into_iter().chain((0..34).map(|n| frame[..n].to_vec())) {
            let mut after = other.clone();
            finish_header(&mut after);
            assert_eq!(after, other);
        }
    }

    const UUID: &[u8; 36] = b"d7a1e0c6-8a5c-4b6e-9f0e-0123456789ab";

    fn init(version: u32) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend([b'0'; 40]);
        bytes
    }

    fn command(op: u8, uuid: &[u8; 36], address: [u8; 4]) -> Vec<u8> {
        let mut bytes = vec![op];
        bytes.extend(uuid);
        bytes.extend(address);
        bytes
    }

    #[test]
    fn every_way_of_tearing_the_handshake_ends_the_same() {
        let bytes = [init(22), command(8, UUID, [7, 65, 168, 192])].concat();
        for first in 0..bytes.len() {
            let mut handshake = Handshake::new();
            let mut answer = Vec::new();
            let mut hello = None;
            for part in [&bytes[..first], &bytes[first..]] {
                match handshake.feed(part) {
                    Step::More(bytes) => answer.extend(bytes),
                    Step::Hello(bytes, who) => {
                        answer.extend(bytes);
                        hello = Some(who);
                    }
                    Step::Close(_) => panic!("at {first}"),
                }
            }
            assert_eq!(answer.len(), INIT);
            let address = Some(Ipv4Addr::new(192, 168, 65, 7));
            assert_eq!(hello, Some(Hello { uuid: Some(*UUID), address }));
        }
    }

    #[test]
    fn another_version_gets_ours_and_the_end_another_command_a_reason() {
        assert!(matches!(Handshake::new().feed(&init(1)), Step::Close(answer) if answer.len() == INIT));
        assert!(matches!(Handshake::new().feed(&[b'x'; INIT]), Step::Close(_)));
        let bytes = [init(22), command(6, UUID, [0; 4])].concat();
        let Step::Close(answer) = Handshake::new().feed(&bytes) else { panic!() };
        assert_eq!((answer.len(), answer[INIT]), (INIT + RESPONSE, 2));
        assert!(matches!(Handshake::new().feed(&[0; 1000]), Step::Close(_)));
    }

    #[test]
    fn a_uuid_has_one_mac_and_nobody_in_particular_another_each_time() {
        let hello = |uuid| Hello { uuid, address: None };
        assert_eq!(hello(Some(*UUID)).mac(), hello(Some(*UUID)).mac());
        assert_ne!(hello(Some([b'0'; 36])).mac(), hello(Some(*UUID)).mac());
        assert_ne!(hello(None).mac(), hello(None).mac());
        assert_eq!(hello(None).mac().0[0], 2);
    }

    #[test]
    fn answers_have_258_bytes_whatever_the_reason() {
        let yes = accept(Mac([2, 1, 2, 3, 4, 5]), 1500);
        assert_eq!((yes.len(), &yes[..11]), (258, &[1, 0xdc, 5, 0x0e, 6, 2, 1, 2, 3, 4, 5][..]));
        let no = refuse(&"x".repeat(999));
        assert_eq!((no.len(), no[0], no[1]), (258, 2, 255));
    }
}
