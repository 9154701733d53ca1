//! HTTP proxies between guests and the world, as `--http` and `--http-api-path` have them.
//!
//! ```text
//!  guest ─► any address, port 80 … ─► HTTP is read ─┬─ allowed? excluded? ─► where the guest wanted to go
//!  guest ─► gateway:3128, :3129 ───► proxy requests ┘                    └─► the `http` proxy, absolute URIs, Proxy-Authorization
//!  guest ─► any address, port 443 … ─► CONNECT address:port to the `https` proxy ─► bytes as they are
//! ```
//! A connection to the `https` proxy is made before the guest's is accepted: what the proxy refuses is refused. Names are resolved by
//! the DNS that guests ask, and where a guest itself may not go, nobody goes for it. TLS is not opened: such connections are excluded and
//! allowed by their address alone, since their names are not seen.
//!
//! Settings are followed: the file is looked at every second, the API changes them at once. Connections that are there stay as they are.
//! Sources: vpnkit's documents; RFC 9110 §7.6 (what a proxy takes out), §9.3.6 (CONNECT).

mod api;
mod proxy;
mod settings;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use portway_netstack::{GatewayForward, Subnet, Transport};

pub(super) use self::api::serve as serve_api;
pub use self::settings::Settings;
use super::outgoing::{Outgoing, Taker};
use crate::request::Request;
use crate::sidecar::DoorContext;

/// Ports of the gateway where guests find a proxy: for `http` URIs, and for `https` ones. Either takes both.
const EXPLICIT: [u16; 2] = [3128, 3129];
/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What of a connection is a proxy's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// It is read as HTTP on its way to where the guest wanted it to go.
    Transparent,
    /// It is carried by the `https` proxy.
    Tunnel,
    /// The guest knows that it speaks to a proxy.
    Explicit,
}

/// Ports of the gateway that lead to the proxies.
pub(super) fn gateway_forwards(gateway: Ipv4Addr) -> impl Iterator<Item = GatewayForward> {
    EXPLICIT.into_iter().map(move |port| GatewayForward {
        transport: Transport::Tcp,
        port,
        to: SocketAddr::new(gateway.into(), port),
    })
}

/// How connections of one kind are proxied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxied {
    via: Via,
    settings: Arc<Settings>,
    /// The address by which guests know the host.
    host: Option<Ipv4Addr>,
}

impl Proxied {
    /// Takes a guest's connection to `to`; the answer is what becomes of its bytes.
    ///
    /// # Errors
    /// When it is refused, or nobody can be reached.
    pub(super) async fn take(&self, to: SocketAddr, context: &DoorContext) -> io::Result<StdUnixStream> {
        // What the stack has made of the host alias, lists know by the name that guests have for it.
        let seen = match self.host.filter(|_| to.ip().is_loopback()) {
            Some(host) => host.into(),
            None => to.ip(),
        };
        let place = proxy::Place { to, seen };
        match self.via {
            Via::Tunnel => proxy::tunnel(&self.settings, place, context).await,
            Via::Transparent => proxy::serve(Arc::clone(&self.settings), Some(place), context.clone()),
            Via::Explicit => proxy::serve(Arc::clone(&self.settings), None, context.clone()),
        }
    }
}

/// The addresses of the network that matter here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub(super) gateway: Ipv4Addr,
    pub(super) host: Option<Ipv4Addr>,
}

/// Which connections are taken with these settings. Without any the gateway's ports refuse.
pub(super) fn rules(settings: Option<&Arc<Settings>>, at: Addresses) -> Vec<Outgoing> {
    let only_gateway = Subnet::new(at.gateway.into(), 32);
    let taker = |via, settings: &Arc<Settings>| {
        Taker::Http(Proxied { via, settings: Arc::clone(settings), host: at.host })
    };
    let explicit = EXPLICIT.into_iter().map(|port| {
        let taker = settings.map_or(Taker::Nobody, |settings| taker(Via::Explicit, settings));
        Outgoing { prefix: only_gateway, port, taker }
    });
    let transparent = settings.into_iter().flat_map(|settings| {
        let http = settings.http_ports().iter().map(|port| (*port, Via::Transparent));
        let https = settings.https_ports().iter().map(|port| (*port, Via::Tunnel));
        http.chain(https).map(|(port, via)| Outgoing { prefix: None, port, taker: taker(via, settings) })
    });
    explicit.chain(transparent).collect()
}

/// The settings of a running network.
pub(super) struct Live {
    /// Rules that are not ours, which come first.
    fixed: Vec<Outgoing>,
    at: Addresses,
    now: std::sync::Mutex<Option<Arc<Settings>>>,
}

impl Live {
    pub(super) fn new(fixed: Vec<Outgoing>, at: Addresses, settings: Option<Arc<Settings>>) -> Self {
        Self { fixed, at, now: std::sync::Mutex::new(settings) }
    }

    fn get(&self) -> Option<Arc<Settings>> {
        self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Puts other settings in force, for connections from now on.
    ///
    /// # Errors
    /// When the network does not take requests; nothing has changed then.
    fn set(&self, settings: Settings, context: &DoorContext) -> Result<(), String> {
        let settings = Arc::new(settings);
        let rules = [self.fixed.clone(), rules(Some(&settings), self.at)].concat();
        context.requests.send(Request::Outgoing(rules)).map_err(|e| e.to_string())?;
        *self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(settings);
        Ok(())
    }

    /// Follows the file at `path`, whose text was `text`. A file that cannot be used is said once and changes nothing.
    pub(super) async fn follow(self: Arc<Self>, path: PathBuf, mut text: String, context: DoorContext) {
        let mut look = tokio::time::interval(LOOK);
        let mut said = String::new();
        loop {
            look.tick().await;
            let changed = match super::files::read("--http", &path) {
                Ok(new) if new == text => continue,
                Ok(new) => Settings::parse(&new).map(|settings| (new, settings)),
                Err(error) => Err(error),
            };
            match changed.and_then(|(new, settings)| self.set(settings, &context).map(|()| new)) {
                Ok(new) => {
                    tracing::info!(path = %path.display(), "the HTTP proxies are other ones now");
                    text = new;
                    said.clear();
                }
                Err(error) if error != said => {
                    tracing::warn!(%error, "--http: the proxies stay as they are");
                    said = error;
                }
                Err(_) => {}
            }
        }
    }
}

/// Reads an `--http` file: its text, and what it says.
pub(super) fn read(path: &Path) -> Result<(String, Settings), String> {
    let text = super::files::read("--http", path)?;
    let settings = Settings::parse(&text).map_err(|e| format!("--http {}: {e}", path.display()))?;
    Ok((text, settings))
}
