//! What of a DNS message the relay must understand (RFC 1035 §4): header, question, the places of TTLs. Total: no
//! bytes panic.

use std::net::IpAddr;

const HEADER: usize = 12;
/// TTL of answers from the hosts file and the operator's records, in seconds.
const TTL: u32 = 30;

pub(super) const A: u16 = 1;
pub(super) const SOA: u16 = 6;
pub(super) const PTR: u16 = 12;
pub(super) const AAAA: u16 = 28;
pub(super) const OPT: u16 = 41;

/// Response codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rcode {
    FormErr = 1,
    ServFail = 2,
    NotImp = 4,
}

/// Why a message has no question for us.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is no query at all.
    NoQuery,
    /// It is a query that is answered with an error.
    Answer(Vec<u8>),
}

/// The one question of a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// Lower case, dots between labels, none at the end.
    pub(super) name: String,
    pub(super) kind: u16,
    pub(super) class: u16,
    /// Where the question ends in the message.
    pub(super) end: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The end of the name at `at`, wherever its compression leads.
fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            n if n & 0xc0 == 0xc0 => return Some(at + 2),
            n if n & 0xc0 == 0 => at += 1 + usize::from(n),
            _ => return None,
        }
    }
}

impl Question {
    pub(super) fn parse(query: &[u8]) -> Result<Self, Fault> {
        let Some(&[_, _, flags, _, q0, q1, ..]) = query.first_chunk::<HEADER>() else {
            return Err(Fault::NoQuery);
        };
        if flags & 0x80 != 0 {
            return Err(Fault::NoQuery);
        }
        let bare = |code| Err(Fault::Answer(reply(query, HEADER, false, code, false)));
        if (flags >> 3) & 0x0f != 0 {
            return bare(Rcode::NotImp as u8);
        }
        if u16::from_be_bytes([q0, q1]) != 1 {
            return bare(Rcode::FormErr as u8);
        }
        Self::read(query).map_or_else(|| bare(Rcode::FormErr as u8), Ok)
    }

    /// The first question of any message.
    pub(super) fn read(message: &[u8]) -> Option<Self> {
        let (mut name, mut at) = (String::new(), HEADER);
        loop {
            let len = usize::from(*message.get(at)?);
            if len == 0 {
                break;
            }
            // The first name of a message has nothing to point back to.
            let label = message.get(at + 1..at + 1 + len).filter(|_| len < 64)?;
            if !name.is_empty() {
                name.push('.');
            }
            for byte in label {
                match byte {
                    b'!'..=b'~' if *byte != b'.' => name.push(char::from(byte.to_ascii_lowercase())),
                    // A byte that is no character is kept apart from every character.
                    other => name.push_str(&format!("\\{other:03}")),
                }
            }
            at += 1 + len;
            if at - HEADER > 255 {
                return None;
            }
        }
        let (kind, class) = (u16_at(message, at + 1)?, u16_at(message, at + 3)?);
        Some(Self { name, kind, class, end: at + 5 })
    }

    /// The address a reverse lookup asks for (RFC 1035 §3.5, RFC 3596 §2.5).
    pub(super) fn reverse(&self) -> Option<IpAddr> {
        if self.kind != PTR {
            return None;
        }
        if let Some(text) = self.name.strip_suffix(".in-addr.arpa") {
            let mut octets = text.split('.').map(|o| o.parse::<u8>().ok()).collect::<Option<Vec<_>>>()?;
            octets.reverse();
            return <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
        }
        let text = self.name.strip_suffix(".ip6.arpa")?;
        let mut digits = text
            .split('.')
            .map(|d| u8::from_str_radix(d, 16).ok().filter(|_| d.len() == 1))
            .collect::<Option<Vec<_>>>()?;
        digits.reverse();
        let octets: Vec<u8> = digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect();
        (digits.len() == 32).then(|| <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)).flatten()
    }

    /// An error about this question.
    pub(super) fn error(&self, query: &[u8], code: Rcode) -> Vec<u8> {
        reply(query, self.end, true, code as u8, false)
    }

    /// An answer with records of our own; none at all is NODATA.
    pub(super) fn answer(&self, query: &[u8], records: &[Data]) -> Vec<u8> {
        let mut out = reply(query, self.end, true, 0, true);
        let mut count = 0u16;
        for record in records {
            let (kind, data) = match record {
                Data::Address(IpAddr::V4(ip)) => (A, ip.octets().to_vec()),
                Data::Address(IpAddr::V6(ip)) => (AAAA, ip.octets().to_vec()),
                Data::Name(name) => (PTR, labels(name)),
            };
            let Ok(len) = u16::try_from(data.len()) else { continue };
            // The name is the question's: a pointer to it.
            out.extend([0xc0, 0x0c]);
            out.extend(kind.to_be_bytes());
            out.extend(1u16.to_be_bytes());
            out.extend(TTL.to_be_bytes());
            out.extend(len.to_be_bytes());
            out.extend(data);
            count += 1;
        }
        out[6..8].copy_from_slice(&count.to_be_bytes());
        out
    }
}

/// A record of our own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Data {
    Address(IpAddr),
    Name(String),
}

fn labels(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.').filter(|l| (1..64).contains(&l.len())) {
        out.push(u8::try_from(label.len()).unwrap_or(63));
        out.extend(label.as_bytes());
    }
    out.push(0);
    out
}

/// A reply to `query` with its question, and no records yet.
fn reply(query: &[u8], end: usize, question: bool, code: u8, authoritative: bool) -> Vec<u8> {
    let mut out = query.get(..end).unwrap_or(query).to_vec();
    out.resize(out.len().max(HEADER), 0);
    // QR and RD as asked; RA; everything else cleared.
    out[2] = 0x80 | (out[2] & 0x79) | if authoritative { 0x04 } else { 0 };
    out[3] = 0x80 | (out[3] & 0x10) | code;
    out[4..HEADER].fill(0);
    out[5] = u8::from(question);
    out
}

/// The UDP size a query offers: 512 without EDNS (RFC 6891 §6.2.5).
pub(super) fn udp_size(query: &[u8]) -> usize {
    let offered = records(query).and_then(|r| r.into_iter().find(|r| r.kind == OPT)).map(|r| r.class);
    usize::from(offered.unwrap_or(512).max(512))
}

/// An answer that fits `size`: itself, or its question with TC.
pub(super) fn fit(answer: Vec<u8>, size: usize) -> Vec<u8> {
    if answer.len() <= size {
        return answer;
    }
    let Some(question) = Question::read(&answer) else { return answer };
    let mut out = answer[..question.end.min(answer.len())].to_vec();
    out[2] |= 0x02;
    out[6..HEADER].fill(0);
    out
}

/// One record's place in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: u16,
    pub(super) class: u16,
    /// Where its TTL stands.
    pub(super) ttl_at: usize,
    pub(super) ttl: u32,
    /// Where its data ends.
    pub(super) end: usize,
}

/// Every record of a message with one question; `None` when it is malformed.
pub(super) fn records(message: &[u8]) -> Option<Vec<Record>> {
    let header = message.first_chunk::<HEADER>()?;
    let counts = [6, 8, 10].map(|at| u32::from(u16::from_be_bytes([header[at], header[at + 1]])));
    let mut at = Question::read(message)?.end;
    let mut out = Vec::new();
    for _ in 0..counts.iter().sum() {
        at = skip_name(message, at)?;
        let (kind, class) = (u16_at(message, at)?, u16_at(message, at + 2)?);
        let ttl = u32::from_be_bytes(message.get(at + 4..at + 8)?.try_into().ok()?);
        let end = at + 10 + usize::from(u16_at(message, at + 8)?);
        message.get(..end)?;
        out.push(Record { kind, class, ttl_at: at + 4, ttl, end });
        at = end;
    }
    Some(out)
}
