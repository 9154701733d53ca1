//! The local socket's clients, and the ports they asked for.
//!
//! A port that `portway-agent publish` asked for stays until it is unpublished or the guest reboots: the agent keeps it in a
//! file beside its socket, which lies on a tmpfs, and asks for it again at every session. A held one goes with its client.

use std::fs;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use portway_api::agent::{Decoder, ToHost, encode, parse};
use portway_api::control::PortInfo;

use super::{Agent, Token, watch};
use crate::console::say;
use crate::local::{Answer, Ask};
use crate::slab::Key;

/// Bytes of a spec at most.
const SPEC: usize = 1024;
/// Ports that are kept at most; the host has a limit of its own.
const KEPT: usize = 1024;

/// One client.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    decoder: Decoder,
    /// Whether it waits for an answer; its next question waits too.
    waits: bool,
}

/// A question that is with the host.
#[derive(Debug)]
pub(super) struct Asked {
    /// Who gets the answer; none: we asked by ourselves.
    client: Option<Key>,
    what: Ask,
}

/// A port that is asked for at every session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    spec: String,
    holder: Option<Key>,
}

fn file(socket: &Path) -> PathBuf {
    socket.with_extension("published")
}

/// What an agent before this one kept.
pub(super) fn restore(socket: &Path) -> Vec<Kept> {
    let text = fs::read_to_string(file(socket)).unwrap_or_default();
    let specs = text.lines().filter(|l| !l.is_empty() && l.len() <= SPEC).take(KEPT);
    specs.map(|spec| Kept { spec: spec.to_owned(), holder: None }).collect()
}

impl Agent {
    pub(super) fn welcome_clients(&mut self) {
        while let Ok((stream, _)) = self.local.accept() {
            let client = Client { stream, decoder: Decoder::default(), waits: false };
            // At the limit a client is closed at once, which it reads as an agent that has ended.
            let Ok(key) = self.clients.add(client) else { continue };
            let Some(client) = self.clients.get_mut(key) else { continue };
            let watched = client
                .stream
                .set_nonblocking(true)
                .and_then(|()| watch(&self.epoll, &client.stream, Token::Client(key), false));
            if watched.is_err() {
                self.clients.remove(key);
            }
        }
    }

    pub(super) fn hear_client(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let mut buffer = [0; 4096];
        match client.stream.read(&mut buffer) {
            Ok(0) => return self.lose_client(key),
            Ok(n) => client.decoder.feed(buffer.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(_) => return self.lose_client(key),
        }
        // Nobody types ahead by more than a question.
        if client.waits && client.decoder.held() > SPEC * 2 {
            return self.lose_client(key);
        }
        self.serve_client(key);
    }

    fn serve_client(&mut self, key: Key) {
        while let Some(client) = self.clients.get_mut(key).filter(|c| !c.waits) {
            let ask = match client.decoder.message() {
                Ok(None) => return,
                Ok(Some(bytes)) => parse::<Ask>(bytes),
                Err(error) => Err(error),
            };
            match ask {
                Ok(ask) => {
                    client.waits = true;
                    self.ask_host(Some(key), ask);
                }
                Err(error) => {
                    self.answer(key, &Answer::Failed { reason: error.to_string() });
                    return self.lose_client(key);
                }
            }
        }
    }

    fn ask_host(&mut self, client: Option<Key>, what: Ask) {
        if let Some(reason) = self.fault_of(&what) {
            if let Some(key) = client {
                self.answer(key, &Answer::Failed { reason });
            }
            return;
        }
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        let message = match &what {
            Ask::Publish { spec, .. } => ToHost::Publish { id, spec: spec.clone() },
            Ask::Unpublish { spec } => ToHost::Unpublish { id, spec: spec.clone() },
            Ask::Ports => ToHost::Ports { id },
        };
        self.asked.insert(id, Asked { client, what });
        self.tell(&message);
    }

    fn fault_of(&self, what: &Ask) -> Option<String> {
        let spec = match what {
            Ask::Publish { spec, .. } | Ask::Unpublish { spec } => spec.as_str(),
            Ask::Ports => "",
        };
        if self.talk.welcome().is_none() {
            Some(format!("the host does not answer at {}", self.options.host))
        } else if spec.len() > SPEC || spec.contains('\n') {
            Some(format!("a publish spec has one line of at most {SPEC} bytes"))
        } else if matches!(what, Ask::Publish { .. }) && self.kept.len() >= KEPT {
            Some(format!("{KEPT} ports are published already"))
        } else {
            None
        }
    }

    /// Asks for everything that is kept.
    pub(super) fn publish_again(&mut self) {
        for Kept { spec, holder } in self.kept.clone() {
            self.ask_host(None, Ask::Publish { spec, hold: holder.is_some() });
        }
    }

    /// The host has answered `Publish` or `Unpublish`.
    pub(super) fn done(&mut self, id: u32, ports: Vec<PortInfo>, errors: Vec<String>) {
        let Some(Asked { client, what }) = self.asked.remove(&id) else { return };
        match &what {
            Ask::Publish { spec, hold } if client.is_some() && !ports.is_empty() => {
                let holder = client.filter(|_| *hold);
                if holder.is_some_and(|key| self.clients.get_mut(key).is_none()) {
                    // It has gone while we asked.
                    return self.ask_host(None, Ask::Unpublish { spec: spec.clone() });
                }
                self.kept.retain(|k| k.spec != *spec);
                self.kept.push(Kept { spec: spec.clone(), holder });
                self.keep();
            }
            Ask::Unpublish { spec } if !ports.is_empty() => {
                self.kept.retain(|k| k.spec != *spec);
                self.keep();
            }
            _ => {}
        }
        match client {
            Some(key) => self.answer(key, &Answer::Done { ports, errors }),
            None => errors.iter().for_each(|error| say(error)),
        }
    }

    /// The host has answered `Ports`.
    pub(super) fn list(&mut self, id: u32, ports: Vec<PortInfo>, more: bool) {
        let Some(client) = self.asked.get(&id).and_then(|a| a.client) else { return };
        if !more {
            self.asked.remove(&id);
        }
        if let Some(c) = self.clients.get_mut(client) {
            c.waits = more;
        }
        self.answer(client, &Answer::Ports { ports, more });
    }

    /// Answers a client. One that does not read its answer is gone.
    fn answer(&mut self, key: Key, answer: &Answer) {
        use std::os::fd::AsRawFd;
        let Some(client) = self.clients.get_mut(key) else { return };
        client.waits = matches!(answer, Answer::Ports { more: true, .. });
        let bytes = encode(answer).unwrap_or_default();
        let sent = send(client.stream.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
        match sent {
            Ok(n) if n == bytes.len() => {}
            Ok(_) | Err(Errno::EAGAIN | _) => self.lose_client(key),
        }
    }

    fn lose_client(&mut self, key: Key) {
        if self.clients.remove(key).is_none() {
            return;
        }
        let held: Vec<String> =
            self.kept.iter().filter(|k| k.holder == Some(key)).map(|k| k.spec.clone()).collect();
        self.kept.retain(|k| k.holder != Some(key));
        for spec in held {
            self.ask_host(None, Ask::Unpublish { spec });
        }
    }

    /// The session is over: nobody will answer what was asked.
    pub(super) fn fail_clients(&mut self, reason: &str) {
        let waiting: Vec<Key> = self.asked.drain().filter_map(|(_, asked)| asked.client).collect();
        for key in waiting {
            self.answer(key, &Answer::Failed { reason: format!("the host went away: {reason}") });
        }
    }

    fn keep(&self) {
        let specs = self.kept.iter().filter(|k| k.holder.is_none()).map(|k| format!("{}\n", k.spec));
        let path = file(&self.options.socket);
        let new = path.with_extension("new");
        let written = fs::write(&new, specs.collect::<String>()).and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            say(&format!("published ports are not kept: {}: {error}", path.display()));
        }
    }
}
