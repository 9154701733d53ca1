//! 9P2000 messages: bytes to requests, answers to bytes. Total, without allocation beyond a message's own strings.
//!
//! Source: Plan 9's manual, section 5 (`intro`, `version`, `walk`, `stat` …). All integers are little-endian.

/// What no tag and no fid may be: "none".
pub const NO_FID: u32 = u32::MAX;
/// Names of one walk (`MAXWELEM`).
pub const WALK: usize = 16;
/// Size, type and tag before each message.
pub const HEADER: usize = 7;
/// Of a qid: a directory.
pub const DIRECTORY: u8 = 0x80;
/// Of a mode: a directory.
pub const DMDIR: u32 = 0x8000_0000;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request<'a> {
    /// The largest message, and the protocol.
    Version(u32, &'a str),
    /// Authentication, which there is none of.
    Auth,
    /// The root, as this fid.
    Attach(u32),
    /// Give up the request of this tag.
    Flush(u16),
    /// From a fid, by names, to a new fid.
    Walk(u32, u32, Vec<&'a str>),
    /// A fid, with a mode.
    Open(u32, u8),
    /// In the directory of a fid: a name, with permissions.
    Create(u32, &'a str, u32),
    /// A fid, from an offset, so many bytes.
    Read(u32, u64, u32),
    /// A fid, at an offset.
    Write(u32, u64, &'a [u8]),
    /// A fid is not needed any more.
    Clunk(u32),
    /// A fid is not needed, nor is its file.
    Remove(u32),
    /// What a fid is.
    Stat(u32),
    /// Change what a fid is.
    Wstat(u32),
    /// Something we do not know.
    Unknown(u8),
}

/// Why a message is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It ends in the middle of something.
    #[error("the message is too short")]
    Short,
    /// Something follows.
    #[error("the message is too long")]
    Long,
    /// A name that is not UTF-8.
    #[error("a name is not UTF-8")]
    Text,
    /// A walk of more than [`WALK`] names.
    #[error("too many names")]
    Names,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Fault::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, Fault> {
        self.bytes::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Result<u16, Fault> {
        self.bytes().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn data(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(Fault::Short)?;
        self.0 = rest;
        Ok(head)
    }

    fn text(&mut self) -> Result<&'a str, Fault> {
        let len = usize::from(self.u16()?);
        std::str::from_utf8(self.data(len)?).map_err(|_| Fault::Text)
    }
}

/// Reads one message, its size left out: type, tag, body. The tag is there when anything is, so that it can be answered.
///
/// # Errors
/// What is wrong with the body, with the tag.
pub fn parse(message: &[u8]) -> Result<(u16, Request<'_>), (Option<u16>, Fault)> {
    let mut r = Reader(message);
    let kind = r.u8().map_err(|e| (None, e))?;
    let tag = r.u16().map_err(|e| (None, e))?;
    let request = body(kind, &mut r).map_err(|e| (Some(tag), e))?;
    if r.0.is_empty() || matches!(request, Request::Unknown(_)) {
        Ok((tag, request))
    } else {
        Err((Some(tag), Fault::Long))
    }
}

fn body<'a>(kind: u8, r: &mut Reader<'a>) -> Result<Request<'a>, Fault> {
    Ok(match kind {
        100 => Request::Version(r.u32()?, r.text()?),
        102 => {
            // 9P2000.u, which the Linux client tries, adds a number to some messages: those are read and left.
            r.0 = &[];
            Request::Auth
        }
        104 => {
            let fid = r.u32()?;
            r.0 = &[];
            Request::Attach(fid)
        }
        108 => Request::Flush(r.u16()?),
        110 => {
            let (fid, new, count) = (r.u32()?, r.u32()?, usize::from(r.u16()?));
            if count > WALK {
                return Err(Fault::Names);
            }
            let names = (0..count).map(|_| r.text()).collect::<Result<Vec<_>, _>>()?;
            Request::Walk(fid, new, names)
        }
        112 => Request::Open(r.u32()?, r.u8()?),
        114 => {
            let (fid, name, permissions) = (r.u32()?, r.text()?, r.u32()?);
            r.u8()?;
            Request::Create(fid, name, permissions)
        }
        116 => Request::Read(r.u32()?, r.u64()?, r.u32()?),
        118 => {
            let (fid, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
            Request::Write(fid, offset, r.data(usize::try_from(count).map_err(|_| Fault::Short)?)?)
        }
        120 => Request::Clunk(r.u32()?),
        122 => Request::Remove(r.u32()?),
        124 => Request::Stat(r.u32()?),
        126 => {
            let fid = r.u32()?;
            r.0 = &[];
            Request::Wstat(fid)
        }
        other => Request::Unknown(other),
    })
}

/// What a file is, for good: type, version, number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qid {
    /// [`DIRECTORY`], or 0.
    pub kind: u8,
    /// Unlike that of any other file.
    pub path: u64,
}

impl Qid {
    fn put(self, out: &mut Vec<u8>) {
        out.push(self.kind);
        out.extend([0; 4]);
        out.extend(self.path.to_le_bytes());
    }
}

/// What a client is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The largest message, and the protocol.
    Version(u32, &'static str),
    /// What went wrong.
    Error(String),
    /// The request is given up, or was done.
    Flush,
    /// The root.
    Attach(Qid),
    /// Every file on the way.
    Walk(Vec<Qid>),
    /// The file, and the largest read or write that is one.
    Open(Qid, u32),
    /// The same of a new file.
    Create(Qid, u32),
    /// Bytes.
    Read(Vec<u8>),
    /// How many were taken.
    Write(u32),
    /// Done.
    Clunk,
    /// Done.
    Remove,
    /// As [`stat`] writes it.
    Stat(Vec<u8>),
}

impl Answer {
    /// The message, its size first.
    #[must_use]
    pub fn bytes(&self, tag: u16) -> Vec<u8> {
        let kind = match self {
            Self::Version(..) => 101,
            Self::Attach(_) => 105,
            Self::Error(_) => 107,
            Self::Flush => 109,
            Self::Walk(_) => 111,
            Self::Open(..) => 113,
            Self::Create(..) => 115,
            Self::Read(_) => 117,
            Self::Write(_) => 119,
            Self::Clunk => 121,
            Self::Remove => 123,
            Self::Stat(_) => 125,
        };
        let mut out = vec![0, 0, 0, 0, kind];
        out.extend(tag.to_le_bytes());
        match self {
            Self::Version(size, name) => {
                out.extend(size.to_le_bytes());
                text(&mut out, name);
            }
            Self::Error(fault) => text(&mut out, fault),
            Self::Flush | Self::Clunk | Self::Remove => {}
            Self::Attach(qid) => qid.put(&mut out),
            Self::Walk(qids) => {
                out.extend(u16::try_from(qids.len()).unwrap_or(u16::MAX).to_le_bytes());
                qids.iter().for_each(|q| q.put(&mut out));
            }
            Self::Open(qid, unit) | Self::Create(qid, unit) => {
                qid.put(&mut out);
                out.extend(unit.to_le_bytes());
            }
            Self::Read(bytes) => {
                out.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
                out.extend(bytes);
            }
            Self::Write(count) => out.extend(count.to_le_bytes()),
            Self::Stat(stat) => {
                out.extend(u16::try_from(stat.len()).unwrap_or(u16::MAX).to_le_bytes());
                out.extend(stat);
            }
        }
        let size = u32::try_from(out.len()).unwrap_or(u32::MAX);
        out[..4].copy_from_slice(&size.to_le_bytes());
        out
    }
}

/// A text of at most 65535 bytes; a longer one is cut.
fn text(out: &mut Vec<u8>, text: &str) {
    let end =
        (0..=text.len().min(usize::from(u16::MAX))).rev().find(|n| text.is_char_boundary(*n)).unwrap_or(0);
    out.extend(u16::try_from(end).unwrap_or(0).to_le_bytes());
    out.extend(&text.as_bytes()[..end]);
}

/// An entry of a directory, and the content of a stat: the machine-independent form, its own size first.
#[must_use]
pub fn stat(qid: Qid, name: &str) -> Vec<u8> {
    let directory = qid.kind & DIRECTORY != 0;
    let mut out = vec![0; 2];
    // Type and device, for the kernel's use.
    out.extend([0; 6]);
    qid.put(&mut out);
    out.extend((if directory { DMDIR | 0o755 } else { 0o644 }).to_le_bytes());
    // Times never change, and the length is never known: what is read is made when it is asked for.
    out.extend([0; 4 + 4 + 8]);
    text(&mut out, name);
    for owner in ["root", "root", "root"] {
        text(&mut out, owner);
    }
    let size = u16::try_from(out.len().saturating_sub(2)).unwrap_or(u16::MAX);
    out[..2].copy_from_slice(&size.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, body: &[&[u8]]) -> Vec<u8> {
        [&[kind, 7, 0][..], &body.concat()].concat()
    }

    #[test]
    fn messages_are_read() {
        let version = message(100, &[&8192_u32.to_le_bytes(), &[6, 0], b"9P2000"]);
        assert_eq!(parse(&version), Ok((7, Request::Version(8192, "9P2000"))));
        let walk = message(110, &[&[1, 0, 0, 0, 2, 0, 0, 0, 2, 0, 1, 0, b'a', 2, 0, b'b', b'c']]);
        assert_eq!(parse(&walk), Ok((7, Request::Walk(1, 2, vec!["a", "bc"]))));
        let write = message(118, &[&[1, 0, 0, 0], &[0; 8], &[2, 0, 0, 0], b"hi"]);
        assert_eq!(parse(&write), Ok((7, Request::Write(1, 0, b"hi"))));
        assert_eq!(parse(&[99, 7, 0, 1, 2, 3]), Ok((7, Request::Unknown(99))));
    }

    #[test]
    fn a_message_cut_anywhere_is_too_short_and_a_longer_one_too_long() {
        let walk = message(110, &[&[1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 3, 0], b"abc"]);
        for n in 0..walk.len() {
            assert!(matches!(parse(&walk[..n]), Err((_, Fault::Short))), "{n}");
        }
        assert_eq!(parse(&[&walk[..], &[0]].concat()), Err((Some(7), Fault::Long)));
        let many = message(110, &[&[1, 0, 0, 0, 2, 0, 0, 0, 17, 0]]);
        assert_eq!(parse(&many), Err((Some(7), Fault::Names)));
        let name = message(114, &[&[1, 0, 0, 0, 1, 0, 0xff], &[0; 5]]);
        assert_eq!(parse(&name), Err((Some(7), Fault::Text)));
    }

    #[test]
    fn an_answer_begins_with_its_size() {
        let qid = Qid { kind: DIRECTORY, path: 3 };
        for answer in [
            Answer::Version(8192, "9P2000"),
            Answer::Error("é".repeat(40_000)),
            Answer::Walk(vec![qid; 3]),
            Answer::Read(vec![1; 100]),
            Answer::Stat(stat(qid, "a")),
        ] {
            let bytes = answer.bytes(9);
            assert_eq!(bytes[..4], u32::try_from(bytes.len()).unwrap().to_le_bytes());
            assert_eq!(bytes[5..7], [9, 0]);
        }
        assert_eq!(stat(qid, "a").len(), 2 + 47 + 1 + 3 * 4 - 8 + 8);
    }
}
