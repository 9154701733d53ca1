//! Where VMs join a running network (`--join`).
//!
//! ```text
//! VM's launcher ─► {"link":"qemu:unix:PATH,name=VM","publish":["2222:22"]}\n
//!               ◄─ {"ports":[…]}\n  or  {"error":"…"}\n, and the end
//!               … the connection stays; when it ends, however that happens, the link and its ports go
//! ```
//! The network ends when the last VM has gone, or when none has come within [`FIRST`]. The socket is 0600 like the control
//! socket. Limits: [`CONNECTIONS`], [`LINE`], [`PATIENCE`]; the driver has one for VMs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portway_api::control::{JoinAnswer, JoinRequest};
use portway_netstack::PortId;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};

use crate::config::{Config, LinkAddress, LinkSpec};
use crate::publish::spec::PublishSpec;
use crate::request::{PublishError, Request, Requests};
use crate::sandbox::paths::Paths;

/// Connections at once; further ones wait to be accepted.
const CONNECTIONS: usize = 300;
/// Bytes of a request.
const LINE: u64 = 64 * 1024;
/// How long a client may take over its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the network waits for its first VM.
const FIRST: Duration = Duration::from_secs(10);

/// What the connections share.
struct Shared {
    config: Config,
    /// Where sockets may be made.
    allowed: Arc<Paths>,
    requests: Requests,
    /// As many as there are VMs, and one more; the network ends with the last VM.
    vms: Arc<()>,
    ending: AtomicBool,
}

/// Serves until the runtime ends.
pub(super) async fn serve(listener: UnixListener, config: Config, allowed: Arc<Paths>, requests: Requests) {
    let shared =
        Arc::new(Shared { config, allowed, requests, vms: Arc::new(()), ending: AtomicBool::new(false) });
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let first = tokio::time::sleep(FIRST);
    tokio::pin!(first);
    let mut waiting = true;
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut first, if waiting => {
                waiting = false;
                if Arc::strong_count(&shared.vms) == 1 {
                    tracing::info!("no VM has come");
                    shared.end();
                }
                continue;
            }
        };
        match accepted {
            Ok((stream, _)) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    let _place = place;
                    shared.serve(stream).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the socket of --join cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

impl Shared {
    fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        // A queue that is full is one that still works; the end of the next VM says it again.
        let _ = self.requests.send(Request::Shutdown);
    }

    async fn serve(&self, stream: UnixStream) {
        // From here on: a VM that is just being let in keeps the network from ending under it.
        let here = Arc::clone(&self.vms);
        self.host(stream).await;
        drop(here);
        if Arc::strong_count(&self.vms) == 1 {
            tracing::info!("the last VM has gone");
            self.end();
        }
    }

    /// One VM, from its request to the end of its connection.
    async fn host(&self, mut stream: UnixStream) {
        let (port, answer) = match tokio::time::timeout(PATIENCE, self.admit(&mut stream)).await {
            Ok(Ok((port, ports))) => (Some(port), JoinAnswer { ports, error: None }),
            Ok(Err(error)) => (None, JoinAnswer { ports: Vec::new(), error: Some(error) }),
            Err(_) => {
                (None, JoinAnswer { ports: Vec::new(), error: Some("the request took too long".into()) })
            }
        };
        let mut line = serde_json::to_vec(&answer).unwrap_or_default();
        line.push(b'\n');
        // Who does not take its answer has gone.
        let told = stream.write_all(&line).await;
        let Some(port) = port else { return };
        if told.is_ok() {
            // The connection is the VM's life. A client has nothing more to say; what it says all the same is its end too.
            let _ = stream.read(&mut [0; 1]).await;
        }
        self.leave(port).await;
    }

    /// A full queue does not keep a VM's link for ever.
    async fn leave(&self, port: PortId) {
        while self.requests.send(Request::Leave(port)).is_err() && !self.ending.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn admit(
        &self,
        stream: &mut UnixStream,
    ) -> Result<(PortId, Vec<portway_api::control::PortInfo>), String> {
        let mut line = String::new();
        let mut reader = BufReader::new(stream).take(LINE);
        reader.read_line(&mut line).await.map_err(|error| error.to_string())?;
        let JoinRequest { link, publish } = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let link: LinkSpec = link.parse()?;
        let link = self.config.joining(link).map_err(|error| error.to_string())?;
        if let LinkAddress::Listen(path) = &link.address
            && !self.allowed.may_make(path)
        {
            return Err(PublishError::Outside(path.clone()).to_string());
        }
        let publish: Result<Vec<PublishSpec>, _> = publish.iter().map(|spec| spec.parse()).collect();
        let publish = publish.map_err(|error| error.to_string())?;
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Join { link, publish, reply }).map_err(|error| error.to_string())?;
        let joined = answer.await.map_err(|_| "the network is ending".to_owned())?;
        joined.map_err(|error| error.to_string())
    }
}
