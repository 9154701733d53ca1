//! What other programs of the guest ask of the agent, on a unix socket: `portway-agent publish` and its like, and the
//! stand-in for docker's proxy.
//!
//! The framing is the agent protocol's. A client asks one thing at a time. Any user of the guest may ask: whoever may
//! listen on a port has it published anyway, and what more there is to have, the host's policy decides.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use portway_api::agent::{Decoder, MessageError, encode, parse};
use portway_api::control::PortInfo;
use serde::{Deserialize, Serialize};

/// Root's agent is here.
const SYSTEM: &str = "/run/portway/agent.sock";
/// How long an answer may take; the host's own patience is shorter.
const PATIENCE: Duration = Duration::from_secs(15);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Ask {
    /// Publish a port; `hold`: for as long as this client stays connected.
    Publish { spec: String, hold: bool },
    /// Stop publishing it.
    Unpublish { spec: String },
    /// Which ports are published?
    Ports,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Answer {
    /// To `Publish` and `Unpublish`.
    Done { ports: Vec<PortInfo>, errors: Vec<String> },
    /// To `Ports`, in parts.
    Ports { ports: Vec<PortInfo>, more: bool },
    /// The agent cannot.
    Failed { reason: String },
}

/// Where the agent's socket is when nobody says: the system's for root, the user's otherwise.
pub(crate) fn default_socket() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| Path::new(d).is_absolute());
    match runtime {
        Some(dir) if !nix::unistd::geteuid().is_root() => PathBuf::from(dir).join("portway-agent.sock"),
        _ => SYSTEM.into(),
    }
}

/// The agent of this guest, for its clients.
#[derive(Debug)]
pub(crate) struct Agent {
    stream: UnixStream,
    decoder: Decoder,
}

impl Agent {
    /// Connects. The system's agent is tried when this user has none.
    pub(crate) fn connect(socket: Option<&Path>) -> io::Result<Self> {
        let own = socket.map_or_else(default_socket, Path::to_owned);
        let stream = match UnixStream::connect(&own) {
            Err(_) if socket.is_none() && own != Path::new(SYSTEM) => UnixStream::connect(SYSTEM),
            other => other,
        };
        let stream = stream.map_err(|e| {
            io::Error::new(
                e.kind(),
                format!("no agent answers at {}: {e}: is `portway-agent run` there?", own.display()),
            )
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream, decoder: Decoder::default() })
    }

    /// Asks one thing. The parts of a listing come as one.
    pub(crate) fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        self.stream.write_all(&encode(ask).map_err(broken)?)?;
        let mut all = Vec::new();
        loop {
            match self.answer()? {
                Answer::Ports { ports, more } => {
                    all.extend(ports);
                    if !more {
                        return Ok(Answer::Ports { ports: all, more: false });
                    }
                }
                other => return Ok(other),
            }
        }
    }

    fn answer(&mut self) -> io::Result<Answer> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.decoder.message().map_err(broken)? {
                return parse(message).map_err(broken);
            }
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent ended")),
                n => self.decoder.feed(buffer.get(..n).unwrap_or_default()),
            }
        }
    }

    /// Waits until the agent ends, or says what was not asked for.
    pub(crate) fn wait_for_end(&mut self) {
        // Without the patience of an answer; a stream that cannot be told so has ended.
        if self.stream.set_read_timeout(None).is_ok() {
            let _ = self.stream.read(&mut [0]);
        }
    }
}

fn broken(error: MessageError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
