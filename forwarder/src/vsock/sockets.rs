//! VMMs that have vsock inside and show it as unix sockets.
//!
//! - **firecracker** (also Cloud Hypervisor, crosvm-like devices): one socket; `CONNECT PORT\n` is answered with
//!   `OK N\n` when the guest takes the stream, and with the end of file when it does not. What the guest opens, the VMM
//!   connects to `PATH_PORT` (Firecracker `docs/vsock.md`).
//! - **dir**: a socket for each port. To the guest `guest.%08x` or `CID.%08x`, and where neither is there hyperkit's
//!   `connect`, which takes `CID.%08x\n` and answers nothing; from the guest `00000002.%08x`. vfkit's
//!   `--device virtio-vsock,port=P,socketURL=…` is given these names by who starts it.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::{BACKLOG, HOST_CID};

/// The most bytes of Firecracker's answer: `OK`, a u32, and the end of the line.
const ANSWER: usize = 16;

/// Where the sockets are.
#[derive(Debug)]
pub(super) enum Sockets {
    Firecracker(PathBuf),
    Directory { path: PathBuf, cid: u32 },
}

/// The name of a port's socket.
pub(super) fn name(cid: u32, port: u32) -> String {
    format!("{cid:08x}.{port:08x}")
}

/// The name of the guest's port's socket that does not need its CID.
pub(super) fn guest_name(port: u32) -> String {
    format!("guest.{port:08x}")
}

fn refused(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, text)
}

impl Sockets {
    pub(super) async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Firecracker(path) => {
                let mut stream = vmm(path).await?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
                taken(&mut stream).await?;
                Ok(stream)
            }
            Self::Directory { path, cid } => {
                for name in [guest_name(port), name(*cid, port)] {
                    match UnixStream::connect(path.join(name)).await {
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                        connected => return connected,
                    }
                }
                // Without a socket of its own a port may be asked for; where nobody can be asked, nobody listens.
                let connect = path.join("connect");
                if !connect.exists() {
                    return Err(refused("no socket in the directory has the port's name"));
                }
                let mut stream = vmm(&connect).await?;
                stream.write_all(format!("{}\n", name(*cid, port)).as_bytes()).await?;
                Ok(stream)
            }
        }
    }

    /// Where the VMM brings what the guest opens to `port`.
    fn arrivals(&self, port: u32) -> PathBuf {
        match self {
            Self::Firecracker(path) => {
                let mut path = path.clone().into_os_string();
                path.push(format!("_{port}"));
                path.into()
            }
            Self::Directory { path, .. } => path.join(name(HOST_CID, port)),
        }
    }

    pub(super) fn listen(&self, port: u32) -> mpsc::Receiver<UnixStream> {
        let path = self.arrivals(port);
        let (streams, receiver) = mpsc::channel(BACKLOG);
        let listener = crate::unix_path::listen(&path, 0o600)
            .and_then(|listener: StdListener| UnixListener::from_std(listener));
        match listener {
            Ok(listener) => drop(tokio::spawn(accept(listener, path, streams))),
            Err(error) => tracing::warn!(%error, port, "the guest's streams cannot be taken"),
        }
        receiver
    }
}

/// The VMM's socket; where it is not there, there is no guest.
async fn vmm(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path).await.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            let text = format!("{}: the VMM is not there ({e})", path.display());
            io::Error::new(io::ErrorKind::NotConnected, text)
        }
        _ => e,
    })
}

/// Reads Firecracker's answer, and not a byte more: what follows is the stream's.
async fn taken(stream: &mut UnixStream) -> io::Result<()> {
    let mut answer = Vec::with_capacity(ANSWER);
    while answer.last() != Some(&b'\n') {
        if answer.len() == ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM does not answer as Firecracker"));
        }
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(e)
                if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
                    && answer.is_empty() =>
            {
                return Err(refused("the guest does not take it"));
            }
            Err(e) => return Err(e),
        }
    }
    if answer.starts_with(b"OK ") {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM does not answer as Firecracker"))
}

/// Hands on what arrives until nobody wants it. While the receiver is full, the VMM's connects wait in the backlog.
async fn accept(listener: UnixListener, path: PathBuf, streams: mpsc::Sender<UnixStream>) {
    let _gone = crate::unix_path::Removed(path);
    loop {
        let Ok(place) = streams.reserve().await else { return };
        tokio::select! {
            () = streams.closed() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => place.send(stream),
                Err(error) => {
                    tracing::warn!(%error, "a stream of the guest's was not taken");
                    tokio::time::sleep(super::ACCEPT_AGAIN).await;
                }
            },
        }
    }
}
