//! DNS messages as bytes: what is read of a query, and the few things that are written by hand.
//!
//! The relay passes messages on untouched, so this module reads only what it must: header, question, the OPT
//! record and where each record lies. Parsing is total (RFC 1035 §4.1): any bytes give a value or a refusal.
//! Answers of our own zones are built by hickory; errors, hosts entries and OPT records are built here.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

use std::net::IpAddr;
use std::ops::Range;

/// Length of the header (RFC 1035 §4.1.1).
pub(super) const HEADER: usize = 12;
/// Longest name on the wire (RFC 1035 §3.1).
const NAME_MAX: usize = 255;
/// Payload a client takes that sends no OPT record (RFC 1035 §4.2.1).
const DATAGRAM_MIN: u16 = 512;
/// Largest answer sent in a datagram, whatever the client offers: it passes any link unfragmented (RFC 9715
/// §3.1, R3). A larger one is cut, and the client asks again by TCP.
pub(super) const DATAGRAM_MAX: u16 = 1400;
/// What we say we take, in OPT records we write.
const OUR_PAYLOAD: u16 = 1232;

/// Bits of header byte 2.
const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const AA: u8 = 0x04;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
/// Bits of header byte 3.
const RA: u8 = 0x80;
const AD: u8 = 0x20;
const CD: u8 = 0x10;
/// Bit of a variant: the client's DO.
const DO: u8 = 0x01;

/// Record types and classes this program looks at.
pub(super) mod kind {
    pub(in crate::dns) const A: u16 = 1;
    pub(in crate::dns) const SOA: u16 = 6;
    pub(in crate::dns) const PTR: u16 = 12;
    pub(in crate::dns) const AAAA: u16 = 28;
    pub(in crate::dns) const OPT: u16 = 41;
    pub(in crate::dns) const SVCB: u16 = 64;
    pub(in crate::dns) const HTTPS: u16 = 65;
    pub(in crate::dns) const IXFR: u16 = 251;
    pub(in crate::dns) const AXFR: u16 = 252;
    pub(in crate::dns) const ANY: u16 = 255;
    /// Class IN.
    pub(in crate::dns) const IN: u16 = 1;
}

/// Response codes (RFC 1035 §4.1.1, RFC 6891 §9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

impl Rcode {
    const fn low(self) -> u8 {
        (self as u8) & 0x0f
    }
    const fn high(self) -> u8 {
        (self as u8) >> 4
    }
}

/// A domain name in wire form, lower case: what names are compared and looked up by (RFC 4343).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Name(Box<[u8]>);

impl Name {
    /// The name `text` writes, its last dot optional; `None` when a label is empty or over 63 bytes, the whole
    /// over 255, or a byte is not a printable ASCII character. No escapes.
    pub(super) fn from_text(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let mut wire = Vec::with_capacity(text.len().checked_add(2)?);
        for label in text.split('.') {
            let length = u8::try_from(label.len()).ok().filter(|n| (1..=63).contains(n))?;
            if !label.bytes().all(|b| b.is_ascii_graphic() && b != b'\\') {
                return None;
            }
            wire.push(length);
            wire.extend(label.bytes().map(|b| b.to_ascii_lowercase()));
        }
        wire.push(0);
        (wire.len() <= NAME_MAX).then(|| Self(wire.into()))
    }

    /// The name with this wire form, which comes from another name.
    pub(super) fn from_wire(wire: &[u8]) -> Self {
        Self(wire.into())
    }

    /// `label` under `parent`; `None` when the label is none or the whole is too long.
    pub(super) fn from_label(label: &str, parent: &Self) -> Option<Self> {
        let mut wire = Self::from_text(label)?.0.into_vec();
        wire.pop();
        wire.extend_from_slice(&parent.0);
        (wire.len() <= NAME_MAX).then(|| Self(wire.into()))
    }

    /// The name whose PTR record names `address` (RFC 1035 §3.5, RFC 3596 §2.5).
    pub(super) fn reverse(address: IpAddr) -> Self {
        let mut wire = Vec::with_capacity(80);
        let mut label = |text: &[u8]| {
            wire.push(u8::try_from(text.len()).unwrap_or(0));
            wire.extend_from_slice(text);
        };
        match address {
            IpAddr::V4(a) => {
                for byte in a.octets().iter().rev() {
                    label(byte.to_string().as_bytes());
                }
                label(b"in-addr");
            }
            IpAddr::V6(a) => {
                for byte in a.octets().iter().rev() {
                    label(format!("{:x}", byte & 0x0f).as_bytes());
                    label(format!("{:x}", byte >> 4).as_bytes());
                }
                label(b"ip6");
            }
        }
        label(b"arpa");
        wire.push(0);
        Self(wire.into())
    }

    /// The name as it is typed, without a dot at the end; bytes that are not printable as `?`.
    pub(super) fn text(&self) -> String {
        let labels =
            self.suffixes().filter_map(|s| s.split_first().and_then(|(n, rest)| rest.get(..usize::from(*n))));
        let shown = |b: &u8| if b.is_ascii_graphic() { char::from(*b) } else { '?' };
        let labels = labels.filter(|l| !l.is_empty()).map(|l| l.iter().map(shown).collect::<String>());
        labels.collect::<Vec<_>>().join(".")
    }

    /// The bytes of the wire form, the root label included.
    pub(super) fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The name, then its parent, and so on; the root last.
    pub(super) fn suffixes(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::successors(Some(&*self.0), |name| {
            let (length, rest) = name.split_first()?;
            if *length == 0 { None } else { rest.get(usize::from(*length)..) }
        })
    }

    /// The parent of a name whose first label is `*`; `None` for every other name.
    pub(super) fn below_wildcard(&self) -> Option<Self> {
        self.0.strip_prefix(b"\x01*").map(|parent| Self(parent.into()))
    }

    /// Whether the last label is `label`.
    pub(super) fn ends_in(&self, label: &str) -> bool {
        let mut wire = vec![u8::try_from(label.len()).unwrap_or(0)];
        wire.extend_from_slice(label.as_bytes());
        wire.push(0);
        self.suffixes().any(|s| s == wire)
    }
}

/// Tables keyed by names are searched by slices of wire form; `Hash` is that of the slice.
impl std::borrow::Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// Why bytes are not a query we go on with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    /// No answer is due: no whole header, or itself an answer.
    Silently,
    /// The answer that says what is wrong.
    With(Vec<u8>),
}

/// The client's OPT record (RFC 6891 §6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opt {
    payload: u16,
    version: u8,
    dnssec_ok: bool,
    /// No option asks for an answer made for this client alone (client subnet and the like).
    plain: bool,
}

/// A well-formed query: one question, every record within bounds.
#[derive(Debug)]
pub(super) struct Query<'a> {
    bytes: &'a [u8],
    flags: [u8; 2],
    /// The bytes of the question section.
    question: &'a [u8],
    pub(super) name: Name,
    pub(super) kind: u16,
    pub(super) class: u16,
    opt: Option<Opt>,
    /// No records but OPT: not signed (TSIG, SIG(0)).
    bare: bool,
}

impl<'a> Query<'a> {
    /// Reads a query.
    ///
    /// # Errors
    /// `Rejected::Silently` for less than a header and for answers; FORMERR for anything malformed and for a
    /// number of questions other than one (RFC 9619); NOTIMP for opcodes other than QUERY.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Rejected> {
        let Some((&[_, _, f2, f3, q0, q1, ..], _)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(Rejected::Silently);
        };
        if f2 & QR != 0 {
            return Err(Rejected::Silently);
        }
        if f2 & OPCODE != 0 {
            return Err(Rejected::With(bare_error(bytes, Rcode::NotImp)));
        }
        let malformed = || Rejected::With(bare_error(bytes, Rcode::FormErr));
        if u16::from_be_bytes([q0, q1]) != 1 {
            return Err(malformed());
        }
        let (question, name, kind, class) = read_question(bytes).ok_or_else(malformed)?;
        let records = records(bytes).ok_or_else(malformed)?;
        let mut opts = records.iter().filter(|r| r.kind == kind::OPT);
        let opt = opts.next().map(|r| read_opt(bytes, r));
        let bare = records.iter().all(|r| r.kind == kind::OPT);
        if opts.next().is_some() {
            return Err(malformed()); // RFC 6891 §6.1.1: more than one OPT is FORMERR
        }
        Ok(Self { bytes, flags: [f2, f3], question, name, kind, class, opt, bare })
    }

    /// The query as it came.
    pub(super) const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The client's id, which is the first two bytes.
    pub(super) fn id(&self) -> [u8; 2] {
        self.bytes.first_chunk().copied().unwrap_or_default()
    }

    /// The bytes of the question, with the client's own spelling of the name.
    pub(super) const fn question(&self) -> &'a [u8] {
        self.question
    }

    /// Whether the client speaks a version of EDNS that is not ours (RFC 6891 §6.1.3).
    pub(super) fn newer_edns(&self) -> bool {
        self.opt.is_some_and(|o| o.version > 0)
    }

    /// The largest answer that may be sent back in a datagram.
    pub(super) fn datagram_limit(&self) -> usize {
        usize::from(self.opt.map_or(DATAGRAM_MIN, |o| o.payload.clamp(DATAGRAM_MIN, DATAGRAM_MAX)))
    }

    /// What besides the question makes answers differ (RD, CD, AD, DO); `None` when the answer is for this
    /// client only or recursion is not wanted, so that it is neither stored nor taken from the cache.
    pub(super) fn variant(&self) -> Option<u8> {
        let [f2, f3] = self.flags;
        let plain = self.opt.is_none_or(|o| o.plain && o.version == 0);
        (f2 & RD != 0 && plain && self.bare)
            .then(|| (f3 & (AD | CD)) | if self.opt.is_some_and(|o| o.dnssec_ok) { DO } else { 0 })
    }

    /// A query of this question alone: no flag but RD, no other record. What our zones are asked.
    pub(super) fn canonical(&self) -> Vec<u8> {
        let mut bytes = header(self.id(), self.flags[0] & RD, 0, [1, 0, 0, 0]);
        bytes.extend_from_slice(self.question);
        bytes
    }

    /// An answer without records; with the question, and an OPT record if the client sent one.
    pub(super) fn error(&self, rcode: Rcode) -> Vec<u8> {
        let [f2, f3] = self.flags;
        let mut answer = header(self.id(), QR | (f2 & RD), RA | (f3 & CD) | rcode.low(), [1, 0, 0, 0]);
        answer.extend_from_slice(self.question);
        self.push_opt(&mut answer, rcode.high());
        answer
    }

    /// An answer of `records`, which all bear the name of the question. None is NODATA, with the SOA of a zone that begins at
    /// the name, so that it may be kept (RFC 2308 §3).
    pub(super) fn answer(&self, ttl: u32, records: &[Data<'_>], source: &Source) -> Vec<u8> {
        let [f2, f3] = self.flags;
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX);
        let mut answer = header(self.id(), QR | (f2 & RD), RA | (f3 & CD), [1, count, 0, 0]);
        answer.extend_from_slice(self.question);
        for record in records.iter().take(usize::from(count)) {
            // The name of the question, by pointer (RFC 1035 §4.1.4).
            answer.extend_from_slice(&[0xc0, 0x0c]);
            let mut put = |kind: u16, data: &[u8]| {
                answer.extend_from_slice(&kind.to_be_bytes());
                answer.extend_from_slice(&kind::IN.to_be_bytes());
                answer.extend_from_slice(&ttl.to_be_bytes());
                answer.extend_from_slice(&u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
                answer.extend_from_slice(data);
            };
            match record {
                Data::Address(IpAddr::V4(a)) => put(kind::A, &a.octets()),
                Data::Address(IpAddr::V6(a)) => put(kind::AAAA, &a.octets()),
                Data::Pointer(name) => put(kind::PTR, name.wire()),
            }
        }
        if records.is_empty() {
            answer.extend_from_slice(&[0xc0, 0x0c]);
            answer.extend_from_slice(&source.soa);
            if let Some(slot) = answer.get_mut(8..10) {
                slot.copy_from_slice(&1_u16.to_be_bytes());
            }
        }
        self.push_opt(&mut answer, 0);
        answer
    }

    /// Appends our OPT record when the client sent one (RFC 6891 §7), DO copied (RFC 3225 §3). The answer must
    /// not hold one yet.
    pub(super) fn push_opt(&self, answer: &mut Vec<u8>, rcode_high: u8) {
        let Some(opt) = self.opt else { return };
        let Some(&[n0, n1]) = answer.get(10..12).and_then(|n| n.first_chunk()) else { return };
        let Some(count) = u16::from_be_bytes([n0, n1]).checked_add(1) else { return };
        if let Some(slot) = answer.get_mut(10..12) {
            slot.copy_from_slice(&count.to_be_bytes());
        }
        push_opt_record(answer, rcode_high, opt.dnssec_ok);
    }

    /// `answer` if it fits into `limit` bytes, else its header with TC, the question, and OPT (RFC 2181 §9: a
    /// client must not use what is in a cut answer, so nothing is).
    pub(super) fn fit(&self, answer: Vec<u8>, limit: usize) -> Vec<u8> {
        if answer.len() <= limit {
            return answer;
        }
        let Some(&[_, _, f2, f3]) = answer.first_chunk() else { return self.error(Rcode::ServFail) };
        let mut cut = header(self.id(), f2 | TC, f3, [1, 0, 0, 0]);
        cut.extend_from_slice(self.question);
        self.push_opt(&mut cut, 0);
        cut
    }
}

/// How well an answer fits what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    /// To the letter.
    Exact,
    /// But for the case of letters in the name.
    OtherLetters,
}

/// Whether `reply` answers `sent`, whose id was `id`: an answer, the id, and the same question (RFC 5452 §9.1).
pub(super) fn answers(sent: &[u8], id: [u8; 2], reply: &[u8]) -> Option<Match> {
    let &[i0, i1, f2, _, q0, q1, ..] = reply.first_chunk::<HEADER>()?;
    if [i0, i1] != id || f2 & QR == 0 || f2 & OPCODE != 0 {
        return None;
    }
    let (asked, ours) = (read_question(sent)?, u16::from_be_bytes([q0, q1]));
    match ours {
        1 => {
            let got = read_question(reply)?;
            let same = (&got.1, got.2, got.3) == (&asked.1, asked.2, asked.3);
            let exact = got.0 == asked.0;
            same.then_some(if exact { Match::Exact } else { Match::OtherLetters })
        }
        // Some servers leave the question out of an error; no record can come with it.
        0 => (reply.len() == HEADER && rcode(reply) != Rcode::NoError as u8).then_some(Match::Exact),
        _ => None,
    }
}

/// A query of our own for `name`, with the bits of `variant` ([`Query::variant`]). The letters of the name are turned where
/// `mix` has a bit set; `edns` adds an OPT record, which says what we take.
pub(super) fn recursive(
    id: [u8; 2],
    name: &Name,
    (kind, class): (u16, u16),
    variant: u8,
    mix: &[u8; 32],
    edns: bool,
) -> Vec<u8> {
    let mut bytes = header(id, RD, variant & (AD | CD), [1, 0, 0, u16::from(edns)]);
    let bits = mix.iter().flat_map(|byte| (0..8).map(move |n| byte >> n & 1 == 1));
    // Length bytes are at most 63 and thus no letters.
    let turned = name.wire().iter().zip(bits).map(|(b, turn)| if turn { b.to_ascii_uppercase() } else { *b });
    bytes.extend(turned);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&class.to_be_bytes());
    if edns {
        push_opt_record(&mut bytes, 0, variant & DO != 0);
    }
    bytes
}

/// Fills `query`, whose last record is our OPT without options, up to a multiple of `block` bytes (RFC 7830).
pub(super) fn pad(query: &mut Vec<u8>, block: usize) {
    const PADDING: u16 = 12;
    const OPTION: usize = 4;
    let bare = query.len().saturating_add(OPTION);
    let Ok(fill) = u16::try_from(bare.next_multiple_of(block) - bare) else { return };
    // The length of the OPT's data is the last there is.
    let Some(length) = query.last_chunk_mut::<2>().filter(|length| **length == [0, 0]) else { return };
    *length = fill.saturating_add(4).to_be_bytes();
    query.extend_from_slice(&PADDING.to_be_bytes());
    query.extend_from_slice(&fill.to_be_bytes());
    query.resize(query.len().saturating_add(usize::from(fill)), 0);
}

/// An answer without records to a question for `name`.
pub(super) fn empty_answer(name: &Name, (kind, class): (u16, u16)) -> Vec<u8> {
    let mut bytes = header([0, 0], QR | RD, RA, [1, 0, 0, 0]);
    bytes.extend_from_slice(name.wire());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&class.to_be_bytes());
    bytes
}

/// Whether `message` bears an OPT record.
pub(super) fn has_opt(message: &[u8]) -> bool {
    records(message).is_some_and(|all| all.iter().any(|r| r.kind == kind::OPT))
}

fn push_opt_record(message: &mut Vec<u8>, rcode_high: u8, dnssec_ok: bool) {
    let [p0, p1] = OUR_PAYLOAD.to_be_bytes();
    let [k0, k1] = kind::OPT.to_be_bytes();
    let dnssec_ok = if dnssec_ok { 0x80 } else { 0 };
    message.extend_from_slice(&[0, k0, k1, p0, p1, rcode_high, 0, dnssec_ok, 0, 0, 0]);
}

/// Who says what is written by hand: the SOA record of such answers, from its type on.
#[derive(Debug, Clone)]
pub(super) struct Source {
    soa: Vec<u8>,
}

impl Source {
    /// The SOA of `server`, whose negative answers are kept for `ttl` seconds.
    pub(super) fn new(server: &Name, contact: &Name, ttl: u32) -> Self {
        let mut data = [server.wire(), contact.wire()].concat();
        for number in [1, 3600, 600, 86_400, ttl] {
            data.extend_from_slice(&number.to_be_bytes());
        }
        let mut soa = Vec::with_capacity(data.len().saturating_add(10));
        soa.extend_from_slice(&kind::SOA.to_be_bytes());
        soa.extend_from_slice(&kind::IN.to_be_bytes());
        soa.extend_from_slice(&ttl.to_be_bytes());
        soa.extend_from_slice(&u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
        soa.extend(data);
        Self { soa }
    }
}

/// What a record written by hand holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Data<'a> {
    /// A or AAAA.
    Address(IpAddr),
    /// PTR.
    Pointer(&'a Name),
}

/// Section of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    Answer,
    Authority,
    Additional,
}

/// Where one record lies in its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) section: Section,
    pub(super) kind: u16,
    pub(super) class: u16,
    pub(super) ttl: u32,
    /// Offset of the four bytes of the TTL.
    pub(super) ttl_at: usize,
    /// The whole record, from its name to the end of its data.
    pub(super) span: Range<usize>,
    pub(super) data: Range<usize>,
}

/// The records of a message with one question; `None` when one does not lie within it, or bytes are left over.
pub(super) fn records(message: &[u8]) -> Option<Vec<Record>> {
    let counts = message.get(6..HEADER)?;
    let (question, ..) = read_question(message)?;
    let mut at = HEADER.checked_add(question.len())?;
    let mut records = Vec::new();
    for (section, count) in
        [Section::Answer, Section::Authority, Section::Additional].into_iter().zip(counts.chunks_exact(2))
    {
        for _ in 0..u16::from_be_bytes(*count.first_chunk()?) {
            let start = at;
            at = skip_name(message, at)?;
            let &[k0, k1, c0, c1, t0, t1, t2, t3, l0, l1] = message.get(at..)?.first_chunk()?;
            let ttl_at = at.checked_add(4)?;
            let data = at.checked_add(10)?;
            at = data.checked_add(usize::from(u16::from_be_bytes([l0, l1])))?;
            message.get(data..at)?;
            records.push(Record {
                section,
                kind: u16::from_be_bytes([k0, k1]),
                class: u16::from_be_bytes([c0, c1]),
                ttl: u32::from_be_bytes([t0, t1, t2, t3]),
                ttl_at,
                span: start..at,
                data: data..at,
            });
        }
    }
    (at == message.len()).then_some(records)
}

/// The response code in the header of `message`, without EDNS's upper bits.
pub(super) fn rcode(message: &[u8]) -> u8 {
    message.get(3).map_or(0, |f| f & 0x0f)
}

/// Whether the answer was cut (TC).
pub(super) fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|f| f & TC != 0)
}

/// Puts `id` into the header of `message`.
pub(super) fn set_id(message: &mut [u8], id: [u8; 2]) {
    if let Some(slot) = message.first_chunk_mut() {
        *slot = id;
    }
}

/// "There is no such name" becomes "it has nothing of this type".
pub(super) fn without_nxdomain(mut message: Vec<u8>) -> Vec<u8> {
    if let Some(flags) = message.get_mut(3)
        && *flags & 0x0f == Rcode::NxDomain as u8
    {
        *flags &= 0xf0;
    }
    message
}

/// Sets RA: whoever answers from a zone of ours recurses for other names too.
pub(super) fn set_recursion_available(message: &mut [u8]) {
    if let Some(flags) = message.get_mut(3) {
        *flags |= RA;
    }
}

/// Clears AA: what a cache gives is not the authority's word.
pub(super) fn clear_authoritative(message: &mut [u8]) {
    if let Some(flags) = message.get_mut(2) {
        *flags &= !AA;
    }
}

fn header(id: [u8; 2], f2: u8, f3: u8, counts: [u16; 4]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend_from_slice(&id);
    bytes.extend_from_slice(&[f2, f3]);
    for count in counts {
        bytes.extend_from_slice(&count.to_be_bytes());
    }
    bytes
}

/// A header-only error, for a query whose question cannot be trusted.
fn bare_error(query: &[u8], rcode: Rcode) -> Vec<u8> {
    let (id, f2) = match query.first_chunk() {
        Some(&[i0, i1, f2]) => ([i0, i1], f2),
        None => ([0, 0], 0),
    };
    header(id, QR | (f2 & (OPCODE | RD)), RA | rcode.low(), [0; 4])
}

/// The question's bytes, name, type and class; `None` unless whole and uncompressed.
fn read_question(message: &[u8]) -> Option<(&[u8], Name, u16, u16)> {
    let section = message.get(HEADER..)?;
    let mut end = 0_usize;
    loop {
        let length = *section.get(end)?;
        end = end.checked_add(1)?;
        match length {
            0 => break,
            1..=63 => end = end.checked_add(usize::from(length))?,
            _ => return None, // nothing before it that a pointer could mean
        }
    }
    let name = section.get(..end).filter(|name| name.len() <= NAME_MAX)?;
    let &[k0, k1, c0, c1] = section.get(end..)?.first_chunk()?;
    let question = section.get(..end.checked_add(4)?)?;
    // Length bytes are at most 63 and thus no letters: the whole can be lowered at once.
    let name = Name(name.to_ascii_lowercase().into());
    Some((question, name, u16::from_be_bytes([k0, k1]), u16::from_be_bytes([c0, c1])))
}

/// The offset behind the name at `at`; pointers are not followed.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let length = *message.get(at)?;
        at = at.checked_add(1)?;
        match length {
            0 => return Some(at),
            1..=63 => at = at.checked_add(usize::from(length))?,
            0xc0.. => return at.checked_add(1),
            _ => return None,
        }
    }
}

fn read_opt(message: &[u8], record: &Record) -> Opt {
    let [_, version, flags, _] = record.ttl.to_be_bytes();
    let mut options = message.get(record.data.clone()).unwrap_or_default();
    let mut plain = true;
    while let Some((&[c0, c1, l0, l1], rest)) = options.split_first_chunk() {
        // NSID, cookie, keepalive and padding say nothing about the answer's records.
        plain &= matches!(u16::from_be_bytes([c0, c1]), 3 | 10 | 11 | 12);
        options = rest.get(usize::from(u16::from_be_bytes([l0, l1]))..).unwrap_or_default();
    }
    Opt { payload: record.class, version, dnssec_ok: flags & 0x80 != 0, plain }
}
