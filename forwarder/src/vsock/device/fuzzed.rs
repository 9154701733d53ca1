//! The device without its thread, turned by who fuzzes it.

use std::io;
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream as StdStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::worker::Worker;
use super::{Device, Dial, Reply, pair};
use crate::vsock::{CONNECT_TIMEOUT, GUEST_CID};

/// The port of the host that somebody listens on.
pub const PORT: u32 = 80;

/// A device with a VMM attached, and a host that listens on [`PORT`].
#[derive(Debug)]
pub struct Fuzzed {
    device: Device,
    worker: Worker,
    streams: mpsc::Receiver<UnixStream>,
}

impl Fuzzed {
    /// The device, and the VMM's end of the connection with it. In a tokio runtime.
    ///
    /// # Errors
    /// When the host has no sockets for it.
    pub fn new() -> io::Result<(Self, StdStream)> {
        static NAMES: AtomicU64 = AtomicU64::new(0);
        let name = format!("portway-fuzz-{}-{}", std::process::id(), NAMES.fetch_add(1, Ordering::Relaxed));
        let address = SocketAddr::from_abstract_name(name)?;
        let listener = UnixListener::bind_addr(&address)?;
        let (device, mut worker) = Device::new(listener, GUEST_CID, None)?;
        let vmm = StdStream::connect_addr(&address)?;
        worker.turn(Some(Duration::ZERO))?;
        let streams = device.listen(PORT);
        Ok((Self { device, worker, streams }, vmm))
    }

    /// One turn; says whether the VMM is attached still.
    ///
    /// # Errors
    /// When the host's poll does not work.
    pub fn turn(&mut self) -> io::Result<bool> {
        self.worker.turn(Some(Duration::ZERO))?;
        Ok(self.worker.front.is_some())
    }

    /// A stream that the guest has opened.
    pub fn accepted(&mut self) -> Option<StdStream> {
        self.streams.try_recv().ok()?.into_std().ok()
    }

    /// Asks for a stream to `port` of the guest; gives the host's end of it.
    ///
    /// # Errors
    /// When the host has no sockets for it.
    pub fn dial(&mut self, port: u32) -> io::Result<StdStream> {
        let (ours, theirs) = pair()?;
        let (reply, _) = oneshot::channel();
        // Where too many wait, the host's end is closed.
        let _ = self.device.dials.try_send(Dial { port, socket: ours, reply: Reply(reply) });
        self.device.waker.wake()?;
        Ok(theirs)
    }

    /// Lets the time pass after which a guest that does not answer is given up.
    pub fn give_up(&mut self) {
        self.worker.streams.expire(Instant::now() + CONNECT_TIMEOUT);
    }

    /// Ends the VMM's connection, and the host's ends of all streams; says how many streams are left then.
    ///
    /// # Errors
    /// When the host's poll does not work.
    pub fn end(&mut self, vmm: &StdStream, hosts: Vec<StdStream>) -> io::Result<usize> {
        vmm.shutdown(Shutdown::Both)?;
        drop(hosts);
        // What is left after the VMM has gone goes with the next events of the sockets.
        for _ in 0..16 {
            while self.accepted().is_some() {}
            self.turn()?;
        }
        Ok(self.worker.streams.count())
    }
}
