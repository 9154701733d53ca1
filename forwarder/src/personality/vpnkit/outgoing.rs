//! `--forwards`: a guest's connections to some destinations, handed to a program behind a unix socket.
//!
//! ```text
//!  guest's SYN ─► Driver::connect ─► Slow::HandOver ─► dial: connect, {"dst_ip":…} ─► {"accepted":true} ─► Request::HandedOver ─► SYN|ACK
//! ```
//! Before each JSON stands its length, u16, little-endian. Whoever does not accept, or is not there, or takes longer than
//! [`PATIENCE`], has refused: the guest gets RST. Bytes follow on the same socket.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use portway_netstack::Subnet;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::http::Proxied;
use crate::sidecar::DoorContext;

/// How long the program may take to accept.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of its answer.
const ANSWER: u16 = 4096;

/// Destinations that are handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Their network; `None`: every IPv4 address.
    pub(super) prefix: Option<Subnet>,
    /// Their port; 0: any.
    pub(super) port: u16,
    /// To whom.
    pub(super) taker: Taker,
}

/// Who takes a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taker {
    /// The program behind this socket.
    Program(PathBuf),
    /// An HTTP proxy.
    Http(Proxied),
    /// It is refused.
    Nobody,
}

impl Taker {
    /// What it is in a line, and whether it takes anything at all.
    pub(crate) fn shown(&self) -> (String, bool) {
        match self {
            Self::Program(path) => (format!("the program behind {}", path.display()), true),
            Self::Http(_) => ("an HTTP proxy".into(), true),
            Self::Nobody => ("nobody: the configuration refuses it".into(), false),
        }
    }

    /// Has it take a connection to `to`; the answer is the other end of its bytes.
    ///
    /// # Errors
    /// When it is not there, or does not accept in time.
    pub(crate) async fn take(&self, to: SocketAddr, context: &DoorContext) -> io::Result<StdUnixStream> {
        match self {
            Self::Program(path) => dial(path, to).await,
            Self::Http(proxied) => proxied.take(to, context).await,
            Self::Nobody => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}

impl Outgoing {
    /// Whether a connection to `to` is handed over.
    #[must_use]
    pub fn takes(&self, to: SocketAddr) -> bool {
        self.prefix.map_or(to.is_ipv4(), |prefix| prefix.contains(to.ip()))
            && (self.port == 0 || self.port == to.port())
    }

    /// Who takes it.
    #[must_use]
    pub fn taker(&self) -> &Taker {
        &self.taker
    }
}

#[derive(Deserialize)]
struct Entry {
    protocol: String,
    dst_prefix: Subnet4,
    #[serde(default)]
    dst_port: u16,
    path: PathBuf,
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Subnet4(Subnet);

impl TryFrom<String> for Subnet4 {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|e: portway_netstack::BadSubnet| format!("{text:?}: {e}"))
    }
}

/// Reads the text of a `--forwards` file.
pub(super) fn parse(text: &str) -> Result<Vec<Outgoing>, String> {
    let entries: Vec<Entry> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let one = |e: Entry| {
        if e.protocol != "tcp" {
            return Err(format!("protocol {:?}: tcp is needed", e.protocol));
        }
        let path = std::path::absolute(&e.path).map_err(|f| format!("path {}: {f}", e.path.display()))?;
        Ok(Outgoing { prefix: Some(e.dst_prefix.0), port: e.dst_port, taker: Taker::Program(path) })
    };
    entries.into_iter().map(one).collect()
}

/// Asks the program at `path` to take a connection to `to`; the answer is the connection.
///
/// # Errors
/// When it is not there, or does not accept in time.
async fn dial(path: &Path, to: SocketAddr) -> io::Result<StdUnixStream> {
    tokio::time::timeout(PATIENCE, accepted(path, to)).await?
}

async fn accepted(path: &Path, to: SocketAddr) -> io::Result<StdUnixStream> {
    #[derive(Deserialize)]
    struct Answer {
        accepted: bool,
    }
    let mut stream = UnixStream::connect(path).await?;
    // vpnkit never says whose connection it is.
    let asked = json!({
        "protocol": "tcp", "src_ip": "0.0.0.0", "src_port": 0, "dst_ip": to.ip().to_string(), "dst_port": to.port(),
    })
    .to_string();
    let length = u16::try_from(asked.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_le_bytes()[..], asked.as_bytes()].concat()).await?;
    let length = stream.read_u16_le().await?;
    if length > ANSWER {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    let answer: Answer = serde_json::from_slice(&answer)?;
    if answer.accepted { stream.into_std() } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_told_by_network_and_port() {
        let text = r#"[{"protocol":"tcp","dst_prefix":"10.0.0.0/8","path":"/a"},{"protocol":"tcp","dst_prefix":"192.0.2.7/32","dst_port":443,"path":"/b"}]"#;
        let known = parse(text).unwrap();
        let taken = |to: &str| known.iter().find(|o| o.takes(to.parse().unwrap())).map(|o| o.taker.clone());
        assert_eq!(taken("10.9.9.9:1"), Some(Taker::Program("/a".into())));
        assert_eq!(taken("192.0.2.7:443"), Some(Taker::Program("/b".into())));
        assert_eq!((taken("192.0.2.7:80"), taken("[fd00::1]:443")), (None, None));
        for bad in [
            "{}",
            r#"[{"protocol":"udp","dst_prefix":"10.0.0.0/8","path":"/a"}]"#,
            r#"[{"protocol":"tcp","dst_prefix":"10.0.0.0","path":"/a"}]"#,
            r#"[{"protocol":"tcp","dst_prefix":"10.0.0.0/8"}]"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_program_accepts_refuses_or_says_nonsense() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let answers =
            [&b"\x11\0{\"accepted\":true}bytes"[..], b"\x12\0{\"accepted\":false}", b"\x02\0{}", b"\xff\xff"];
        let program = async {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = vec![0; usize::from(stream.read_u16_le().await.unwrap())];
                stream.read_exact(&mut asked).await.unwrap();
                let asked: serde_json::Value = serde_json::from_slice(&asked).unwrap();
                assert_eq!(
                    (asked["dst_ip"].as_str(), asked["dst_port"].as_u64()),
                    (Some("10.0.0.7"), Some(80))
                );
                stream.write_all(answer).await.unwrap();
            }
        };
        let guest = async {
            let to = "10.0.0.7:80".parse().unwrap();
            let taken = dial(&path, to).await.unwrap();
            taken.set_nonblocking(false).unwrap();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut &taken, &mut bytes).unwrap();
            assert_eq!(bytes, b"bytes", "what follows the answer belongs to the connection");
            for _ in 0..3 {
                assert!(dial(&path, to).await.is_err());
            }
        };
        tokio::join!(program, guest);
        assert!(dial(&dir.path().join("none"), "10.0.0.7:80".parse().unwrap()).await.is_err());
    }
}
