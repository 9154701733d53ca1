//! The 9P tree of `--introspection`: what a `--diagnostics` archive has, as files that are made when they are opened.
//!
//! ```text
//!  / ─┬─ connections, flows, endpoints, ports
//!     └─ capture/ ── all.pcap, dns.pcap …
//! ```
//! Nothing can be written, made or removed. Limits of a connection: [`FIDS`], and [`OPEN`] files at once, whose contents are kept.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::super::diagnostics::Source;
use super::wire::{Answer, DIRECTORY, NO_FID, Qid, Request, stat};
use super::{FIDS, MESSAGE, READ_OVERHEAD, SMALLEST, Tree, VERSION, converse, whole};

/// Files of one connection that are open at once.
const OPEN: usize = 16;
/// The directory of captures.
const CAPTURE: &str = "capture";

/// What a fid stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    Capture,
    /// One of [`Source::names`].
    File(usize),
}

/// A fid; with its contents where it is an open file.
#[derive(Debug)]
struct Known {
    node: Node,
    contents: Option<Vec<u8>>,
}

/// One connection.
struct Session {
    source: Arc<Source>,
    names: Vec<String>,
    fids: HashMap<u32, Known>,
    largest: u32,
}

/// Serves one client until its end.
pub(in super::super) async fn serve(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    source: Arc<Source>,
) -> io::Result<()> {
    let names = Source::names().collect();
    let mut session = Session { source, names, fids: HashMap::new(), largest: MESSAGE };
    converse(&mut from, &mut to, &mut session).await
}

impl Tree for Session {
    fn largest(&self) -> u32 {
        self.largest
    }

    async fn done(&mut self, request: Request<'_>) -> Result<Answer, &'static str> {
        Ok(match request {
            Request::Version(size, name) => {
                self.fids.clear();
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
                Answer::Attach(qid(Node::Root))
            }
            Request::Flush(_) => Answer::Flush,
            Request::Walk(fid, new, names) => self.walk(fid, new, &names)?,
            Request::Open(fid, mode) => self.open(fid, mode).await?,
            Request::Read(fid, offset, count) => Answer::Read(self.read(fid, offset, count)?),
            Request::Stat(fid) => {
                let node = self.known(fid)?.node;
                Answer::Stat(stat(qid(node), self.name(node)))
            }
            Request::Clunk(fid) => {
                self.fids.remove(&fid).ok_or("unknown fid")?;
                Answer::Clunk
            }
            Request::Remove(fid) => {
                // remove(5): the fid is gone whatever becomes of the file.
                self.fids.remove(&fid).ok_or("unknown fid")?;
                return Err("Permission denied");
            }
            Request::Create(..) | Request::Write(..) | Request::Wstat(_) => return Err("Permission denied"),
            Request::Unknown(_) => return Err("not a message of 9P2000"),
        })
    }
}

impl Session {
    fn known(&self, fid: u32) -> Result<&Known, &'static str> {
        self.fids.get(&fid).ok_or("unknown fid")
    }

    fn remember(&mut self, fid: u32, node: Node) -> Result<(), &'static str> {
        if fid == NO_FID || self.fids.contains_key(&fid) {
            return Err("the fid is in use");
        }
        if self.fids.len() >= FIDS {
            return Err("too many open files");
        }
        self.fids.insert(fid, Known { node, contents: None });
        Ok(())
    }

    /// The last part of a node's path.
    fn name(&self, node: Node) -> &str {
        match node {
            Node::Root => "/",
            Node::Capture => CAPTURE,
            Node::File(n) => self.names.get(n).map_or("", |name| name.rsplit('/').next().unwrap_or_default()),
        }
    }

    /// What a directory has.
    fn entries(&self, directory: Node) -> Vec<Node> {
        let inside = |n: &usize| self.names.get(*n).is_some_and(|name| name.contains('/'));
        let files = (0..self.names.len()).filter(|n| inside(n) == (directory == Node::Capture));
        let captures = (directory == Node::Root).then_some(Node::Capture);
        files.map(Node::File).chain(captures).collect()
    }

    fn step(&self, from: Node, name: &str) -> Option<Node> {
        match (from, name) {
            (_, ".") => Some(from),
            (Node::Root | Node::Capture, "..") => Some(Node::Root),
            (Node::File(_), _) => None,
            (directory, name) => self.entries(directory).into_iter().find(|node| self.name(*node) == name),
        }
    }

    fn walk(&mut self, fid: u32, new: u32, names: &[&str]) -> Result<Answer, &'static str> {
        let known = self.known(fid)?;
        if known.contents.is_some() {
            // walk(5): not from a file that is open.
            return Err("the file is open");
        }
        let mut at = known.node;
        let mut qids = Vec::new();
        for name in names {
            let Some(next) = self.step(at, name) else { break };
            at = next;
            qids.push(qid(at));
        }
        if qids.len() < names.len() {
            return if qids.is_empty() { Err("No such file or directory") } else { Ok(Answer::Walk(qids)) };
        }
        if new == fid {
            self.fids.insert(fid, Known { node: at, contents: None });
        } else {
            self.remember(new, at)?;
        }
        Ok(Answer::Walk(qids))
    }

    async fn open(&mut self, fid: u32, mode: u8) -> Result<Answer, &'static str> {
        let node = self.known(fid)?.node;
        // open(5): the two low bits say read, write, both or execute; 0x10 empties the file first.
        if mode & 3 == 1 || mode & 3 == 2 || mode & 0x10 != 0 {
            return Err("Permission denied");
        }
        if let Node::File(n) = node {
            let open = self.fids.iter().filter(|(f, known)| **f != fid && known.contents.is_some()).count();
            if open >= OPEN {
                return Err("too many open files");
            }
            let name = self.names.get(n).ok_or("No such file or directory")?;
            let contents = self.source.file(name).await.ok_or("No such file or directory")?;
            self.fids.insert(fid, Known { node, contents: Some(contents) });
        }
        Ok(Answer::Open(qid(node), self.largest - 24))
    }

    fn read(&self, fid: u32, offset: u64, count: u32) -> Result<Vec<u8>, &'static str> {
        let most = usize::try_from(count.min(self.largest - READ_OVERHEAD)).unwrap_or(usize::MAX);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let known = self.known(fid)?;
        match (known.node, &known.contents) {
            (Node::File(_), Some(contents)) => {
                Ok(contents.get(from..).unwrap_or_default().iter().take(most).copied().collect())
            }
            (Node::File(_), None) => Err("the file is not open"),
            (directory, _) => {
                let all = self.entries(directory).into_iter();
                Ok(whole(all.map(|node| stat(qid(node), self.name(node))), from, most))
            }
        }
    }
}

fn qid(node: Node) -> Qid {
    let (kind, path) = match node {
        Node::Root => (DIRECTORY, 0),
        Node::Capture => (DIRECTORY, 1),
        Node::File(n) => (0, n as u64 + 2),
    };
    Qid { kind, path }
}
