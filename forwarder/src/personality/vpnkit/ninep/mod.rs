//! The 9P tree of `--port`: a directory per forward, whose `ctl` file takes one line and holds the forward while it is open.
//!
//! ```text
//!  mkdir NAME ─► open NAME/ctl ─► write "tcp:127.0.0.1:8080:tcp:192.168.65.3:80" ─► read "OK tcp:…\n", or "ERROR …\n"
//!                └─ clunk, or the connection's end ─► the forward ends
//! ```
//! `README` says the same to whoever looks. A directory whose forward stands is shown as a file with the forward's text;
//! removing it ends the forward. Names of one connection are its own and die with it.
//! Limits: [`MESSAGE`], [`FIDS`] and [`ENTRIES`] per connection; beyond them the request is an error.

pub(super) mod look;
pub mod wire;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use self::wire::{Answer, DIRECTORY, DMDIR, HEADER, NO_FID, Qid, Request, stat};
use super::expose::Exposer;
use super::forward::Forward;

/// Bytes of a message, its header included.
const MESSAGE: u32 = 32_768 + 24;
/// Of a message, the smallest that a client may ask to be the largest.
const SMALLEST: u32 = 256;
/// Files of one connection that may be known by a fid.
const FIDS: usize = 1024;
/// Directories of one connection.
const ENTRIES: usize = 1024;
/// Bytes of a name.
const NAME: usize = 255;
/// What of a message is not the bytes of a read.
const READ_OVERHEAD: u32 = 11;

const VERSION: &str = "9P2000";
const README: &str = "README";
const CTL: &str = "ctl";
const HELP: &str = "A directory made here is a forward to be:

    mkdir NAME; open NAME/ctl for reading and writing; write one of
        tcp:OUT_IP:OUT_PORT:tcp:IN_IP:IN_PORT
        udp:OUT_IP:OUT_PORT:udp:IN_IP:IN_PORT
        unix:BASE64(OUT_PATH):unix:BASE64(IN_PATH)
    and read from the beginning: OK and the forward with its real port, or ERROR and the reason.

The forward ends when ctl is closed. A NAME whose forward stands is a file that says what it is; removing it ends it too.
";
const NOTHING_YET: &str = "ERROR no request received. Please read the README.\n";

/// Whether a connection that begins with `first` speaks 9P: a message of type `Tversion`, of a size that one has.
pub(super) fn begins(first: [u8; 5]) -> bool {
    let [a, b, c, d, kind] = first;
    kind == 100 && (19..=1024).contains(&u32::from_le_bytes([a, b, c, d]))
}

/// A directory, or the forward that it has become.
#[derive(Debug, Default)]
struct Entry {
    name: String,
    /// What was answered, once something was written.
    answer: Option<String>,
    /// The forward, while it stands.
    forward: Option<(Forward, Forward)>,
    removed: bool,
}

/// What a fid stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    Readme,
    Entry(usize),
    Ctl(usize),
}

/// One connection.
struct Session {
    exposer: Arc<Exposer>,
    fids: HashMap<u32, Node>,
    entries: Vec<Entry>,
    largest: u32,
    /// Unlike that of any other session.
    number: u64,
}

/// A tree that a connection shows: what each request is answered with.
trait Tree {
    /// The bytes that a message may have.
    fn largest(&self) -> u32;

    /// Does what is asked.
    ///
    /// # Errors
    /// What the client is told instead of an answer.
    fn done(&mut self, request: Request<'_>) -> impl Future<Output = Result<Answer, &'static str>> + Send;
}

/// Answers requests until the client's end.
///
/// # Errors
/// When the connection breaks, or what comes over it cannot be a message.
async fn converse(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    tree: &mut impl Tree,
) -> io::Result<()> {
    let mut message = Vec::new();
    loop {
        let mut size = [0; 4];
        match from.read_exact(&mut size).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let size = u32::from_le_bytes(size);
        let body = usize::try_from(size).unwrap_or(usize::MAX).saturating_sub(4);
        if size > tree.largest() || body < HEADER - 4 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of a wrong size"));
        }
        message.resize(body, 0);
        from.read_exact(&mut message).await?;
        let answer = match wire::parse(&message) {
            Ok((tag, request)) => {
                let done = tree.done(request).await;
                done.unwrap_or_else(|fault| Answer::Error(fault.to_owned())).bytes(tag)
            }
            Err((Some(tag), fault)) => Answer::Error(fault.to_string()).bytes(tag),
            Err((None, fault)) => return Err(io::Error::new(io::ErrorKind::InvalidData, fault)),
        };
        to.write_all(&answer).await?;
    }
}

/// Serves one client until its end; its forwards end with it.
pub(super) async fn serve(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    exposer: Arc<Exposer>,
) -> io::Result<()> {
    let mut session = Session::new(exposer);
    let done = converse(&mut from, &mut to, &mut session).await;
    session.end().await;
    done
}

impl Tree for Session {
    fn largest(&self) -> u32 {
        self.largest
    }

    async fn done(&mut self, request: Request<'_>) -> Result<Answer, &'static str> {
        Ok(match request {
            Request::Version(size, name) => {
                // Version begins the session anew (version(5)).
                self.end().await;
                (self.fids, self.entries) = (HashMap::new(), Vec::new());
                if size < SMALLEST {
                    return Err("the message size is too small");
                }
                self.largest = size.min(MESSAGE);
                let known = name.starts_with("9P2000");
                Answer::Version(self.largest, if known { VERSION } else { "unknown" })
            }
            Request::Auth => return Err("no authentication is needed"),
            Request::Attach(fid) => {
                self.remember(fid, Node::Root)?;
                Answer::Attach(self.qid(Node::Root))
            }
            // Requests are answered one after the other: that one is done.
            Request::Flush(_) => Answer::Flush,
            Request::Walk(fid, new, names) => self.walk(fid, new, &names)?,
            Request::Open(fid, mode) => {
                let node = self.node(fid)?;
                let writes = mode & 3 == 1 || mode & 3 == 2 || mode & 0x10 != 0;
                if writes && !matches!(node, Node::Ctl(_)) {
                    return Err("Permission denied");
                }
                Answer::Open(self.qid(node), self.unit())
            }
            Request::Create(fid, name, permissions) => self.create(fid, name, permissions)?,
            Request::Read(fid, offset, count) => {
                let node = self.node(fid)?;
                Answer::Read(self.read(node, offset, count))
            }
            Request::Write(fid, _, data) => {
                let Node::Ctl(n) = self.node(fid)? else { return Err("Permission denied") };
                self.write(n, data).await?
            }
            Request::Clunk(fid) => {
                self.clunk(fid).await?;
                Answer::Clunk
            }
            Request::Remove(fid) => {
                let node = self.node(fid)?;
                // remove(5): the fid is gone whatever becomes of the file.
                self.clunk(fid).await?;
                let Node::Entry(n) = node else { return Err("Permission denied") };
                self.release(n).await;
                self.entries[n].removed = true;
                Answer::Remove
            }
            Request::Stat(fid) => {
                let node = self.node(fid)?;
                Answer::Stat(stat(self.qid(node), self.name(node)))
            }
            Request::Wstat(_) => return Err("Permission denied"),
            Request::Unknown(_) => return Err("not a message of 9P2000"),
        })
    }
}

impl Session {
    fn new(exposer: Arc<Exposer>) -> Self {
        static SESSIONS: AtomicU64 = AtomicU64::new(0);
        let number = SESSIONS.fetch_add(1, Ordering::Relaxed);
        Self { exposer, fids: HashMap::new(), entries: Vec::new(), largest: MESSAGE, number }
    }

    async fn end(&mut self) {
        for n in 0..self.entries.len() {
            self.release(n).await;
        }
    }

    fn unit(&self) -> u32 {
        self.largest - 24
    }

    fn node(&self, fid: u32) -> Result<Node, &'static str> {
        self.fids.get(&fid).copied().ok_or("unknown fid")
    }

    fn remember(&mut self, fid: u32, node: Node) -> Result<(), &'static str> {
        if fid == NO_FID || self.fids.contains_key(&fid) {
            return Err("the fid is in use");
        }
        if self.fids.len() >= FIDS {
            return Err("too many open files");
        }
        self.fids.insert(fid, node);
        Ok(())
    }

    fn name(&self, node: Node) -> &str {
        match node {
            Node::Root => "/",
            Node::Readme => README,
            Node::Ctl(_) => CTL,
            Node::Entry(n) => self.entries.get(n).map_or("", |e| &e.name),
        }
    }

    fn qid(&self, node: Node) -> Qid {
        let number = |n: usize, odd: u64| n as u64 * 2 + 2 + odd;
        let (kind, path) = match node {
            Node::Root => (DIRECTORY, 0),
            Node::Readme => (0, 1),
            Node::Entry(n) => {
                let stands = self.entries.get(n).is_some_and(|e| e.forward.is_some());
                (if stands { 0 } else { DIRECTORY }, number(n, 0))
            }
            Node::Ctl(n) => (0, number(n, 1)),
        };
        Qid { kind, path }
    }

    fn step(&self, from: Node, name: &str) -> Option<Node> {
        match (from, name) {
            (_, ".") => Some(from),
            (Node::Root | Node::Entry(_), "..") => Some(Node::Root),
            (Node::Root, README) => Some(Node::Readme),
            (Node::Root, name) => {
                self.entries.iter().position(|e| !e.removed && e.name == name).map(Node::Entry)
            }
            (Node::Entry(n), CTL) => Some(Node::Ctl(n)),
            _ => None,
        }
    }

    fn walk(&mut self, fid: u32, new: u32, names: &[&str]) -> Result<Answer, &'static str> {
        let mut at = self.node(fid)?;
        let mut qids = Vec::new();
        for name in names {
            let Some(next) = self.step(at, name) else { break };
            at = next;
            qids.push(self.qid(at));
        }
        if qids.len() < names.len() {
            // walk(5): an error at the first name only; else the answer says how far it went, and there is no new fid.
            return if qids.is_empty() { Err("No such file or directory") } else { Ok(Answer::Walk(qids)) };
        }
        if new == fid {
            self.fids.insert(fid, at);
        } else {
            self.remember(new, at)?;
        }
        Ok(Answer::Walk(qids))
    }

    fn create(&mut self, fid: u32, name: &str, permissions: u32) -> Result<Answer, &'static str> {
        if self.node(fid)? != Node::Root || permissions & DMDIR == 0 {
            return Err("Permission denied");
        }
        if !(1..=NAME).contains(&name.len())
            || name.contains(['/', '\0'])
            || matches!(name, "." | ".." | README)
        {
            return Err("Invalid argument");
        }
        if self.step(Node::Root, name).is_some() {
            return Err("File exists");
        }
        let place = self.entries.iter().enumerate().position(|(n, e)| {
            let free = |node: &Node| !matches!(node, Node::Entry(m) | Node::Ctl(m) if *m == n);
            e.removed && self.fids.values().all(free)
        });
        let n = place.unwrap_or(self.entries.len());
        if n >= ENTRIES {
            return Err("No space left on device");
        }
        let entry = Entry { name: name.to_owned(), ..Entry::default() };
        if n == self.entries.len() {
            self.entries.push(entry);
        } else {
            self.entries[n] = entry;
        }
        self.fids.insert(fid, Node::Entry(n));
        Ok(Answer::Create(self.qid(Node::Entry(n)), self.unit()))
    }

    fn read(&self, node: Node, offset: u64, count: u32) -> Vec<u8> {
        let most = usize::try_from(count.min(self.largest - READ_OVERHEAD)).unwrap_or(usize::MAX);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = |bytes: &[u8]| bytes.iter().skip(from).take(most).copied().collect();
        let entry = |n: usize| self.entries.get(n);
        match node {
            Node::Readme => part(HELP.as_bytes()),
            Node::Ctl(n) => {
                part(entry(n).and_then(|e| e.answer.as_deref()).unwrap_or(NOTHING_YET).as_bytes())
            }
            Node::Entry(n) if entry(n).is_some_and(|e| e.forward.is_some()) => {
                let real = entry(n).and_then(|e| e.forward.as_ref()).map(|(_, real)| real.to_string());
                part(real.unwrap_or_default().as_bytes())
            }
            Node::Entry(n) => {
                whole(std::iter::once(Node::Ctl(n)).map(|c| stat(self.qid(c), self.name(c))), from, most)
            }
            Node::Root => {
                let there = (0..self.entries.len()).filter(|n| !self.entries[*n].removed).map(Node::Entry);
                let all = std::iter::once(Node::Readme).chain(there);
                whole(all.map(|n| stat(self.qid(n), self.name(n))), from, most)
            }
        }
    }

    async fn write(&mut self, n: usize, data: &[u8]) -> Result<Answer, &'static str> {
        let entry = self
            .entries
            .get(n)
            .filter(|e| !e.removed && e.answer.is_none())
            .ok_or("Operation not permitted")?;
        debug_assert!(entry.forward.is_none(), "a forward comes with its answer");
        let asked = std::str::from_utf8(data).map_err(|e| e.to_string());
        let asked = asked.and_then(|text| text.parse::<Forward>().map_err(|e| e.to_string()));
        let done = match asked {
            Ok(mut forward) => {
                // Two directories with the same forward are two forwards: the second finds its port taken.
                forward.annotation = format!("9p:{}/{n}", self.number);
                self.exposer.expose(&forward).await.map(|real| (forward, real)).map_err(|e| e.to_string())
            }
            Err(fault) => Err(fault),
        };
        let entry = &mut self.entries[n];
        match done {
            Ok((forward, real)) => {
                entry.answer = Some(format!("OK {real}\n"));
                entry.forward = Some((forward, real));
            }
            Err(fault) => entry.answer = Some(format!("ERROR {fault}\n")),
        }
        Ok(Answer::Write(u32::try_from(data.len()).unwrap_or(u32::MAX)))
    }

    async fn clunk(&mut self, fid: u32) -> Result<(), &'static str> {
        let node = self.fids.remove(&fid).ok_or("unknown fid")?;
        if let Node::Ctl(n) = node {
            // Any of them: the holder keeps it open as long as it wants the forward.
            if self.entries.get(n).is_some_and(|e| e.forward.is_some()) {
                self.release(n).await;
                self.entries[n].removed = true;
            }
        }
        Ok(())
    }

    /// Ends the forward of an entry, if it has one.
    async fn release(&mut self, n: usize) {
        if let Some((forward, _)) = self.entries.get_mut(n).and_then(|e| e.forward.take()) {
            self.exposer.unexpose(&forward).await;
        }
    }
}

/// Of a directory: whole entries only (read(5)), from the one at `from` on, as many as fit.
fn whole(entries: impl Iterator<Item = Vec<u8>>, from: usize, most: usize) -> Vec<u8> {
    let (mut at, mut out) = (0_usize, Vec::new());
    for entry in entries {
        if at >= from {
            if out.len() + entry.len() > most {
                break;
            }
            out.extend(&entry);
        }
        at += entry.len();
    }
    out
}

#[cfg(test)]
mod tests;
