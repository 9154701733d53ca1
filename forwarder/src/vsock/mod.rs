//! Streams between host and guest over vsock, whatever carries them.
//!
//! ```text
//!  host program ─► guest.%08x ──┐                                  ┌─ vhost-user: our own device, in the guest's memory
//!  agent service ─► connect() ──┼─► Vsock ─► one stream descriptor ┼─ vhost: the kernel's AF_VSOCK
//!  agent service ◄─ listen() ◄──┤                                  ├─ firecracker: one socket, CONNECT port
//!  host program ◄─ 00000002.%08x┘                                  └─ dir: one socket per port (hyperkit, vfkit)
//! ```
//! Every transport gives a stream as a nonblocking stream descriptor in tokio's `UnixStream`: nothing but reading,
//! writing, `shutdown` and readiness is used of it, and an `AF_VSOCK` socket has all of them. The end of one direction
//! is carried both ways; a reset is the end of both.
//!
//! With our own device the descriptor of a client at a port's socket is the stream's host side itself ([`Vsock::carry`]),
//! so that its bytes are copied once between the client's socket and the guest's memory. Other transports copy between
//! two sockets.
//!
//! **Limits.** A guest may open [`BACKLOG`] streams to a port that nobody has taken from the receiver yet; further ones
//! are refused (by our own device) or wait (elsewhere). What our own device bounds is said in `device`.
//!
//! **Names.** A guest has CID 3 unless it is given another, the host is CID 2. The names of sockets are hyperkit's, which
//! LinuxKit documents (`docs/platform-hyperkit.md` there): CID and port in eight hex digits each.

#[cfg(target_os = "linux")]
pub(crate) mod device;
#[cfg(target_os = "linux")]
mod kernel;
mod ports;
mod sockets;
mod spec;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;

#[cfg(fuzzing)]
pub use self::device::fuzzed;
#[cfg(target_os = "linux")]
pub use self::kernel::HostPort;
#[cfg(target_os = "linux")]
pub(crate) use self::kernel::WatchedPort;
pub(crate) use self::ports::PortSockets;
pub(crate) use self::spec::check;
pub use self::spec::{Transport, VsockSpec};

/// The host's address on every vsock.
pub const HOST_CID: u32 = 2;
/// A guest's address unless it is given another: LinuxKit's and hyperkit's.
pub const GUEST_CID: u32 = 3;
/// Streams from the guest to one port that may wait in the receiver of [`Vsock::listen`].
pub const BACKLOG: usize = 128;
/// How long a guest has to answer [`Vsock::connect`]. One that has a listener or none answers at once.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a listener that cannot take a stream (no descriptors, as a rule) leaves it at that.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Bytes of each of the two buffers between two sockets.
const COPY: usize = 64 * 1024;

/// One guest's vsock. Clones are the same one.
#[derive(Clone)]
pub struct Vsock(Arc<Inner>);

struct Inner {
    name: Option<String>,
    cid: u32,
    carrier: Carrier,
}

/// What carries the streams.
enum Carrier {
    #[cfg(target_os = "linux")]
    Device(device::Device),
    #[cfg(target_os = "linux")]
    Kernel(kernel::Kernel),
    Sockets(sockets::Sockets),
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { name, cid, .. } = &*self.0;
        f.debug_struct("Vsock").field("name", name).field("cid", cid).finish_non_exhaustive()
    }
}

impl Vsock {
    /// Makes what `spec` says ready. The guest need not be there yet, and may go and come back.
    ///
    /// In `dir`, where our own device is the transport, a guest's stream to a port of the host that nobody
    /// [listens](Self::listen) on is connected to the unix socket that bears the port's name, if there is one.
    ///
    /// # Errors
    /// When the host does not have the transport, or a path cannot be listened on; the text says which and what helps.
    pub fn open(spec: &VsockSpec, dir: Option<&Path>) -> io::Result<Self> {
        #[cfg(not(target_os = "linux"))]
        let _ = dir;
        let carrier = match &spec.transport {
            #[cfg(target_os = "linux")]
            Transport::VhostUser(path) => {
                Carrier::Device(device::Device::bind(path, spec.cid, dir.map(Path::to_owned))?)
            }
            #[cfg(target_os = "linux")]
            Transport::Kernel => Carrier::Kernel(kernel::Kernel::open(spec.cid)?),
            Transport::Firecracker(path) => Carrier::Sockets(sockets::Sockets::Firecracker(path.clone())),
            Transport::Directory(path) => {
                Carrier::Sockets(sockets::Sockets::Directory { path: path.clone(), cid: spec.cid })
            }
        };
        Ok(Self(Arc::new(Inner { name: spec.name.clone(), cid: spec.cid, carrier })))
    }

    /// Serves what was made ready; until then a VMM waits. Apart from [`Self::open`] so that the process goes into its sandbox
    /// in between, with one thread.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(&self) -> io::Result<()> {
        match &self.0.carrier {
            #[cfg(target_os = "linux")]
            Carrier::Device(device) => device.start(),
            _ => Ok(()),
        }
    }

    /// The VM it belongs to, as its link calls it; `None` where there is only one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// The guest's address.
    #[must_use]
    pub fn cid(&self) -> u32 {
        self.0.cid
    }

    /// Opens a stream to `port` of the guest. A dropped future leaves nothing behind.
    ///
    /// # Errors
    /// - `ConnectionRefused`: nobody listens on that port in the guest.
    /// - `NotConnected`: there is no guest, or its driver is not up.
    /// - `TimedOut`: the guest has not answered within [`CONNECT_TIMEOUT`].
    /// - anything else: this host failed (descriptors, permissions).
    pub async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let connecting = async {
            match &self.0.carrier {
                #[cfg(target_os = "linux")]
                Carrier::Device(device) => device.connect(port).await,
                #[cfg(target_os = "linux")]
                Carrier::Kernel(kernel) => kernel.connect(port).await,
                Carrier::Sockets(sockets) => sockets.connect(port).await,
            }
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the guest does not answer")))
    }

    /// The streams that the guest opens to `port` of the host (CID 2), until the receiver is dropped; then they are
    /// refused. At most [`BACKLOG`] wait in it. Whoever listens last on a port has it.
    ///
    /// The receiver ends by itself only where the port cannot be listened on, which is logged.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O: the streams belong to the runtime that listens.
    #[must_use]
    pub fn listen(&self, port: u32) -> mpsc::Receiver<UnixStream> {
        match &self.0.carrier {
            #[cfg(target_os = "linux")]
            Carrier::Device(device) => device.listen(port),
            #[cfg(target_os = "linux")]
            Carrier::Kernel(kernel) => kernel.listen(port),
            Carrier::Sockets(sockets) => sockets.listen(port),
        }
    }

    /// Makes `client` one end of a stream to `port` of the guest; comes back when that has ended, or when our own device
    /// has taken it over.
    ///
    /// # Errors
    /// As [`Self::connect`], and when the stream broke.
    pub async fn carry(&self, port: u32, mut client: UnixStream) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if let Carrier::Device(device) = &self.0.carrier {
            return device.dial(port, client.into_std()?).await;
        }
        let mut stream = self.connect(port).await?;
        tokio::io::copy_bidirectional_with_sizes(&mut client, &mut stream, COPY, COPY).await.map(drop)
    }
}
