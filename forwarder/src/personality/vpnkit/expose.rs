//! Forwards that clients asked for: checked, published, listed, taken away.
//!
//! ```text
//!  9P, HTTP ─► Exposer ─┬─ --vsock-path given ─► plane: a listener of ours, a channel to the guest per connection
//!                       └─ else ───────────────► a published port of the network (request.rs)
//! ```
//! Without a data plane in the guest, a forward leads over the guest's own network card: then its address must be one of
//! the guests' subnet, and there are no unix sockets. At most [`FORWARDS`] at a time.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use portway_api::control::Protocol;
use portway_netstack::Subnet;
use tokio::sync::{Mutex, oneshot};

use super::forward::{End, Forward, Proto};
use super::plane::{Listening, Plane};
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::publish::{IN_USE, NOT_HERE, PRIVILEGE};
use crate::request::{PublishError, Request, Requests};
use crate::sandbox::paths::Paths;

/// Forwards at a time; further ones are an error.
pub(super) const FORWARDS: usize = 4096;

/// Why a forward could not be had; vpnkit's own texts, which clients show and some look for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ExposeError {
    #[error("Bind for {0} failed: port is already allocated")]
    Allocated(String),
    #[error("listen {0} {1}: bind: cannot assign requested address")]
    NoSuchAddress(Proto, String),
    #[error("Bind for {0} failed: permission denied")]
    Denied(String),
    #[error("Bind for {0} failed: the address is not one of --allowed-bind-addresses")]
    NotAllowed(String),
    #[error(
        "{0} is not an address of the guests' network {1}, and without --vsock-path nothing else can be reached"
    )]
    OutOfReach(IpAddr, Subnet),
    #[error("listen unix {path}: not in a directory of the sockets this vpnkit was started with", path = .0.display())]
    Outside(std::path::PathBuf),
    #[error("unix sockets of the guest need --vsock-path")]
    NoPlane,
    #[error("{FORWARDS} forwards are there already")]
    Limit,
    #[error("{0}")]
    Other(String),
}

/// How a forward is carried.
enum Carried {
    /// By the network: what was published.
    Published(PublishSpec),
    /// By the data plane; ends when dropped.
    Plane(#[expect(dead_code, reason = "held for its end")] Listening),
}

struct Entry {
    carried: Carried,
    /// With the real port.
    real: Forward,
}

/// The forwards of one network.
pub(super) struct Exposer {
    requests: Requests,
    subnet: Subnet,
    /// Where forwards may listen; empty: anywhere.
    allowed: Vec<IpAddr>,
    /// Where sockets may be made.
    paths: Arc<Paths>,
    plane: Option<Arc<Plane>>,
    entries: Mutex<BTreeMap<Forward, Entry>>,
}

impl Exposer {
    pub(super) fn new(
        requests: Requests,
        paths: Arc<Paths>,
        subnet: Subnet,
        allowed: Vec<IpAddr>,
        plane: Option<Arc<Plane>>,
    ) -> Self {
        // The unspecified address among them allows every one.
        let allowed = if allowed.iter().any(IpAddr::is_unspecified) { Vec::new() } else { allowed };
        Self { requests, paths, subnet, allowed, plane, entries: Mutex::default() }
    }

    /// Makes `forward` work. The answer has the real port; a forward that is there already is answered the same.
    pub(super) async fn expose(&self, forward: &Forward) -> Result<Forward, ExposeError> {
        let mut entries = self.entries.lock().await;
        if let Some(known) = entries.get(forward) {
            return Ok(known.real.clone());
        }
        if entries.len() >= FORWARDS {
            return Err(ExposeError::Limit);
        }
        if let End::Port(ip, _) = forward.out
            && !self.allowed.is_empty()
            && !self.allowed.contains(&ip)
        {
            return Err(ExposeError::NotAllowed(forward.out.to_string()));
        }
        let entry = match (&self.plane, &forward.out) {
            (Some(_), End::Path(path)) if !self.paths.may_make(path) => {
                return Err(ExposeError::Outside(path.clone()));
            }
            (Some(plane), _) => {
                let (listening, real) = plane.listen(forward).await.map_err(|e| bind_error(forward, &e))?;
                Entry { carried: Carried::Plane(listening), real }
            }
            (None, _) => self.publish(forward).await?,
        };
        let real = entry.real.clone();
        tracing::info!(forward = %real, "forward");
        entries.insert(forward.clone(), entry);
        Ok(real)
    }

    /// Takes `forward` away, as it was asked for or with its real port; one that is not there is nothing.
    pub(super) async fn unexpose(&self, forward: &Forward) {
        let mut entries = self.entries.lock().await;
        let key = match entries.get(forward) {
            Some(_) => Some(forward.clone()),
            None => entries.iter().find(|(_, e)| e.real == *forward).map(|(key, _)| key.clone()),
        };
        let Some(entry) = key.and_then(|key| entries.remove(&key)) else { return };
        tracing::info!(forward = %entry.real, "forward ended");
        if let Carried::Published(spec) = entry.carried {
            let (reply, done) = oneshot::channel();
            let asked = self.requests.send(Request::Unpublish { spec, reply });
            if let (Ok(()), Ok(Err(error))) = (asked, done.await) {
                tracing::debug!(%error, "a forward was gone already");
            }
        }
    }

    /// Every forward, with its real port.
    pub(super) async fn list(&self) -> Vec<Forward> {
        self.entries.lock().await.values().map(|e| e.real.clone()).collect()
    }

    async fn publish(&self, forward: &Forward) -> Result<Entry, ExposeError> {
        let (End::Port(bind, port), End::Port(guest, guest_port)) = (&forward.out, &forward.inner) else {
            return Err(ExposeError::NoPlane);
        };
        let guest = match guest {
            ip if ip.is_unspecified() => GuestName::Default,
            ip if self.subnet.contains(*ip) => GuestName::Address(*ip),
            ip => return Err(ExposeError::OutOfReach(*ip, self.subnet)),
        };
        let proto = if forward.proto == Proto::Udp { Protocol::Udp } else { Protocol::Tcp };
        let spec = |first| PublishSpec {
            host: HostEnd::Ports { bind: Bind::Address(*bind), first },
            guest: guest.clone(),
            guest_port: *guest_port,
            count: 1,
            proto,
        };
        let (reply, done) = oneshot::channel();
        let asked = self.requests.send(Request::Publish { spec: spec(*port), reply });
        asked.map_err(|e| ExposeError::Other(e.to_string()))?;
        let gone = || ExposeError::Other("the network is ending".into());
        let info = done.await.map_err(|_| gone())?.pop().ok_or_else(gone)?;
        let info = info.map_err(|e| publish_error(forward, e))?;
        let real = Forward { out: End::Port(*bind, info.host_port), ..forward.clone() };
        Ok(Entry { carried: Carried::Published(spec(info.host_port)), real })
    }
}

fn publish_error(forward: &Forward, error: PublishError) -> ExposeError {
    let at = forward.out.to_string();
    match error {
        PublishError::AlreadyPublished(_) => ExposeError::Allocated(at),
        PublishError::Bind { reason, .. } if reason.starts_with(IN_USE) => ExposeError::Allocated(at),
        PublishError::Bind { reason, .. } if reason.contains(PRIVILEGE) => ExposeError::Denied(at),
        PublishError::Bind { reason, .. } if reason == NOT_HERE => {
            ExposeError::NoSuchAddress(forward.proto, at)
        }
        other => ExposeError::Other(other.to_string()),
    }
}

fn bind_error(forward: &Forward, error: &std::io::Error) -> ExposeError {
    let at = forward.out.to_string();
    match error.kind() {
        std::io::ErrorKind::AddrInUse => ExposeError::Allocated(at),
        std::io::ErrorKind::AddrNotAvailable => ExposeError::NoSuchAddress(forward.proto, at),
        std::io::ErrorKind::PermissionDenied => ExposeError::Denied(at),
        _ => ExposeError::Other(error.to_string()),
    }
}
