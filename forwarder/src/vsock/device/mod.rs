//! Our own vsock device, for VMMs that speak vhost-user (QEMU's `-device vhost-user-vsock-pci`): vsock for guests on
//! hosts without the kernel's, without any privilege.
//!
//! ```text
//!  guest ─ transmit ring ─► rings: one copy ─► packet ─► streams ─► send(2) ─► the host's side of the stream
//!  guest ◄─ receive ring ── rings: one copy ◄─ packet ◄─ streams ◄─ recv(2) ◄─ the host's side of the stream
//! ```
//! virtio 1.2, §5.10. The host's side of a stream is a unix socket: one end of a pair whose other end
//! [`Vsock::connect`](super::Vsock::connect) gave away, or the very socket of a client at a port's socket. One thread of
//! its own, `worker`, with its own poll: the network's data thread has nothing to do with it. Nothing is allocated per
//! packet.
//!
//! The rings are those of [`crate::vhost_user`] and not the `virtio-vsock` and `virtio-queue` crates' for the reasons
//! that are given there, and one more: a crate's packet borrows the guest's memory, and its header can change between two
//! looks at it. What those crates would do beyond that is `packet`, 60 lines of it.
//!
//! **A guest that comes and goes.** The VMM may leave and come back, the guest may reboot: streams end for the host as if
//! the guest had reset them, bytes it had sent before included. When *we* were away (the process was started anew) and a
//! driver runs already, it is told by the event that its streams are gone, if its VMM gives us the ring for it; QEMU does
//! not, and then packets of old streams are answered with resets.
//!
//! **Faults.** What a guest does wrong in a stream resets that stream, in a packet drops that packet, in a ring ends the
//! connection with the VMM; then the device is gone for the guest until the VMM comes back, and nothing else is.

mod arrivals;
mod credit;
#[cfg(fuzzing)]
pub mod fuzzed;
mod packet;
mod rings;
mod stream;
pub(crate) mod streams;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use self::arrivals::Arrivals;
use self::worker::Worker;

/// Streams that may wait to be asked for.
const DIALS: usize = 1024;

/// Where the outcome of a [`Dial`] goes.
#[derive(Debug)]
struct Reply(oneshot::Sender<io::Result<()>>);

impl Reply {
    fn send(self, result: io::Result<()>) {
        // Who has stopped waiting does not want it.
        let _ = self.0.send(result);
    }

    fn fail(self, kind: io::ErrorKind, text: &'static str) {
        self.send(Err(io::Error::new(kind, text)));
    }
}

/// A stream that the host wants.
#[derive(Debug)]
struct Dial {
    /// The guest's port.
    port: u32,
    /// The host's side.
    socket: StdStream,
    reply: Reply,
}

/// The device, from other threads.
#[derive(Debug)]
pub(super) struct Device {
    dials: SyncSender<Dial>,
    waker: Arc<mio::Waker>,
    arrivals: Arc<Arrivals>,
    /// What the thread will be made of, until it starts.
    idle: Mutex<Option<Box<Worker>>>,
}

/// A pair of sockets that never keep us waiting.
fn pair() -> io::Result<(StdStream, StdStream)> {
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

impl Device {
    /// Listens for the VMM on `path`; it waits until [`Self::start`].
    ///
    /// # Errors
    /// When the path cannot be listened on.
    pub(super) fn bind(path: &Path, cid: u32, dir: Option<PathBuf>) -> io::Result<Self> {
        let listener = crate::unix_path::listen(path, 0o600)?;
        let (mut device, worker) = Self::new(listener, cid, dir)?;
        device.idle = Mutex::new(Some(Box::new(worker)));
        Ok(device)
    }

    /// Serves the VMM, in a thread of its own, for as long as the process lives.
    ///
    /// # Errors
    /// When there is no thread.
    pub(super) fn start(&self) -> io::Result<()> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(worker) = idle else { return Ok(()) };
        std::thread::Builder::new().name("vsock".into()).spawn(move || worker.run()).map(drop)
    }

    fn new(
        listener: std::os::unix::net::UnixListener,
        cid: u32,
        dir: Option<PathBuf>,
    ) -> io::Result<(Self, Worker)> {
        let (dials, incoming): (_, Receiver<Dial>) = sync_channel(DIALS);
        let arrivals = Arc::new(Arrivals::new(dir));
        let (worker, waker) = Worker::new(listener, cid, incoming, Arc::clone(&arrivals))?;
        Ok((Self { dials, waker, arrivals, idle: Mutex::new(None) }, worker))
    }

    pub(super) async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = pair()?;
        let theirs = UnixStream::from_std(theirs)?;
        // A dropped future drops `theirs`, which the device sees.
        self.dial(port, ours).await?;
        Ok(theirs)
    }

    /// Makes `socket`, which must never keep its caller waiting, the host's side of a stream to the guest's `port`.
    pub(super) async fn dial(&self, port: u32, socket: StdStream) -> io::Result<()> {
        let (reply, outcome) = oneshot::channel();
        let dial = Dial { port, socket, reply: Reply(reply) };
        self.dials.try_send(dial).map_err(|_| {
            io::Error::new(io::ErrorKind::WouldBlock, "too many streams to the guest are asked for at once")
        })?;
        self.waker.wake()?;
        outcome.await.map_err(|_| io::Error::other("the vsock device has ended"))?
    }

    pub(super) fn listen(&self, port: u32) -> mpsc::Receiver<UnixStream> {
        self.arrivals.listen(port)
    }
}
