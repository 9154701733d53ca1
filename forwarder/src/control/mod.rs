//! The control API: HTTP/1.1 and JSON on a unix socket that only its owner may open (0600).
//!
//! ```text
//!  client ─► unix socket ─► router ─┬─ /v1/…  (`v1`: our resources, problem+json errors; `stream`: events, captures)
//!                                   └─ /services/forwarder/…  (gvproxy's routes, its bodies and texts)
//!            router ─► Requests ─► data thread ─► oneshot ─► answer
//! ```
//! A client cannot stall the data thread: it only ever takes a message from a queue and drops an answer into a
//! channel. Limits: [`CONNECTIONS`], [`BODY`], [`PATIENCE`], [`stream::STREAMS`]. The document at `/v1/openapi.json` is made
//! from the handlers, and checked in under `docs/reference`.

mod agents;
mod body;
pub mod client;
mod dns;
mod explain;
pub(crate) mod gvproxy;
mod hijack;
pub mod kept;
pub mod metrics;
pub mod openapi;
mod problem;
mod query;
pub mod stream;
mod v1;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use portway_api::control::{NetworkInfo, PortInfo, SandboxInfo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Mutex, Semaphore, oneshot};

pub(crate) use self::agents::WAIT;
use self::hijack::Allowed;
use self::kept::KeptPorts;
use self::problem::Fault;
use crate::config::GuestApi;
use crate::dns::Dns;
use crate::events::EventLog;
use crate::publish::spec::PublishSpec;
use crate::request::{PublishError, Request, Requests};
use crate::sandbox::paths::Paths;
use crate::ssh::Forwards;

/// Clients at once; further ones wait to be accepted.
pub const CONNECTIONS: usize = 64;
/// Bytes of a request's body; beyond it the answer is 413.
pub const BODY: usize = 64 * 1024;
/// How long a client may take over its headers, and its body and answer together.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Connections of guests to the gateway's port 80 at once; further ones are closed.
pub const GUEST_CLIENTS: usize = 32;
/// Clients of `--metrics` at once.
pub const METRICS_CLIENTS: usize = 8;

/// What the handlers share.
#[derive(Clone)]
pub struct App {
    requests: Requests,
    network: Arc<NetworkInfo>,
    dns: Arc<Dns>,
    events: Arc<EventLog>,
    kept: Option<Arc<KeptPorts>>,
    /// Unix sockets that lead to guests over SSH.
    ssh: Forwards,
    /// Places of clients, and of those that stay.
    places: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    flow_listings: Arc<Mutex<()>>,
    guest_api: GuestApi,
    /// Places of guests' connections.
    guests: Arc<Semaphore>,
}

/// A further place where the API is served.
#[derive(Debug)]
pub enum DoorListener {
    /// A unix socket.
    Unix(std::os::unix::net::UnixListener),
    /// A TCP socket.
    Tcp(std::net::TcpListener),
    /// A port of the host's vsock. Guests find `/connect` there and nothing else; the host's own programs everything.
    #[cfg(target_os = "linux")]
    Vsock(crate::vsock::HostPort),
}

impl App {
    /// The API of one network. `kept`: where ports that clients publish are kept.
    #[must_use]
    pub fn new(
        requests: Requests,
        network: NetworkInfo,
        dns: Arc<Dns>,
        events: Arc<EventLog>,
        kept: Option<Arc<KeptPorts>>,
        guest_api: GuestApi,
    ) -> Self {
        Self {
            requests,
            network: Arc::new(network),
            dns,
            events,
            kept,
            ssh: Forwards::default(),
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            streams: Arc::new(Semaphore::new(stream::STREAMS)),
            flow_listings: Arc::default(),
            guest_api,
            guests: Arc::new(Semaphore::new(GUEST_CLIENTS)),
        }
    }

    /// The same, whose clients may have sockets that lead to guests over SSH made in `allowed` places; else nowhere.
    pub(crate) fn within(self, allowed: Arc<Paths>) -> Self {
        Self { ssh: Forwards::within(allowed), ..self }
    }
}

/// Serves the API until the listener fails; ends with the runtime.
pub async fn serve(listener: UnixListener, app: App) {
    serve_at(Listening::Unix(listener), true, app).await;
}

/// A listener on tokio.
enum Listening {
    Unix(UnixListener),
    Tcp(TcpListener),
    #[cfg(target_os = "linux")]
    Vsock(crate::vsock::WatchedPort),
}

/// Serves the API at one place; `connect`: VMs may come in there.
async fn serve_at(listener: Listening, connect: bool, app: App) {
    let everything = router(app.clone());
    let allowed = Allowed { connect, tunnel: true };
    loop {
        let Ok(place) = Arc::clone(&app.places).acquire_owned().await else { return };
        let (router, app) = (everything.clone(), app.clone());
        let accepted = match &listener {
            Listening::Unix(l) => l.accept().await.map(|(client, _)| {
                tokio::spawn(serve_caller(client, allowed, app, router, place));
            }),
            Listening::Tcp(l) => l.accept().await.map(|(client, _)| {
                tokio::spawn(serve_caller(client, allowed, app, router, place));
            }),
            #[cfg(target_os = "linux")]
            Listening::Vsock(l) => l.accept().await.map(|(client, cid)| {
                // Below are the kernel and the host itself (vsock(7)).
                let (allowed, router) = match cid > crate::vsock::HOST_CID {
                    false => (allowed, router),
                    true => (Allowed { tunnel: false, ..allowed }, Router::new().fallback(not_found)),
                };
                tokio::spawn(serve_caller(client, allowed, app, router, place));
            }),
        };
        if let Err(error) = accepted {
            cannot_accept(&error).await;
        }
    }
}

/// Serves one client: `/connect` and `/tunnel` as far as they are `allowed`, else HTTP.
async fn serve_caller<C: hijack::Client>(
    client: C,
    allowed: Allowed,
    app: App,
    router: Router,
    place: tokio::sync::OwnedSemaphorePermit,
) {
    if let Some(client) = hijack::serve(client, allowed, &app).await {
        serve_client(client, router, place).await;
    }
}

impl App {
    /// Serves the API at one more place, until its listener fails.
    pub fn serve_door(&self, listener: DoorListener, connect: bool) {
        let listening = match listener {
            DoorListener::Unix(l) => UnixListener::from_std(l).map(Listening::Unix),
            DoorListener::Tcp(l) => TcpListener::from_std(l).map(Listening::Tcp),
            #[cfg(target_os = "linux")]
            DoorListener::Vsock(port) => port.watched().map(Listening::Vsock),
        };
        match listening {
            Ok(listening) => drop(tokio::spawn(serve_at(listening, connect, self.clone()))),
            Err(error) => tracing::error!(%error, "the API cannot be served at one of its places"),
        }
    }

    /// Serves a unix socket that leads to a guest over SSH, until the runtime ends.
    pub(crate) fn serve_forward(&self, bound: crate::ssh::Bound) {
        self.ssh.serve(bound, None, self.requests.clone());
    }

    /// Serves a guest's connection to the gateway's port 80. Beyond [`GUEST_CLIENTS`] it is closed.
    pub fn serve_guest(&self, stream: tokio::net::UnixStream, guest: std::net::IpAddr) {
        let Ok(place) = Arc::clone(&self.guests).try_acquire_owned() else { return };
        let router = Router::new()
            .merge(gvproxy::guest_routes())
            .fallback(not_found)
            .layer(axum::Extension(gvproxy::Guest(guest)))
            .layer(DefaultBodyLimit::max(BODY))
            .layer(middleware::from_fn(patient))
            .with_state(self.clone());
        tokio::spawn(serve_client(stream, router, place));
    }

    /// The Ethernet addresses of guests, and the numbers of their ports.
    pub(crate) async fn macs(&self) -> Result<Vec<(String, u16)>, Unanswered> {
        let macs = self.ask(|reply| Request::Macs { reply }).await.map_err(|_| Unanswered)?;
        Ok(macs.iter().map(|(mac, port)| (mac.to_string(), port.0)).collect())
    }
}

/// The data thread has not answered.
#[derive(Debug)]
pub(crate) struct Unanswered;

/// Serves `/metrics` alone, on TCP.
pub async fn serve_metrics(listener: TcpListener, app: App) {
    let places = Arc::new(Semaphore::new(METRICS_CLIENTS));
    let router = Router::new()
        .route("/metrics", get(v1::metrics))
        .fallback(async || {
            (StatusCode::NOT_FOUND, gvproxy::text("404 page not found: /metrics is what there is"))
        })
        .layer(DefaultBodyLimit::max(0))
        .layer(middleware::from_fn(patient))
        .with_state(app);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(serve_client(stream, router.clone(), place))),
            Err(error) => cannot_accept(&error).await,
        }
    }
}

/// Between two attempts of a listener that cannot accept. Each may let in only as many as there are descriptors, and behind a crowd of
/// clients that have gone again somebody waits who has not.
const AGAIN: Duration = Duration::from_millis(10);

async fn cannot_accept(error: &std::io::Error) {
    tracing::warn!(%error, "a listener of the control thread cannot accept, trying again");
    tokio::time::sleep(AGAIN).await;
}

async fn serve_client<T>(stream: T, router: Router, place: tokio::sync::OwnedSemaphorePermit)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let _place = place;
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // An idle client is sent away after as long.
        .header_read_timeout(PATIENCE)
        // gvproxy's callers shut their writing side down behind the request.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a control client went away");
    }
}

fn router(app: App) -> Router {
    Router::new()
        .merge(v1::routes())
        .merge(gvproxy::routes())
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn(patient))
        .with_state(app)
}

/// What there is not, in gvproxy's words.
async fn not_found() -> impl IntoResponse {
    (StatusCode::NOT_FOUND, gvproxy::text("404 page not found"))
}

async fn patient(request: HttpRequest, next: Next) -> Result<Response, Infallible> {
    Ok(tokio::time::timeout(PATIENCE, next.run(request)).await.unwrap_or_else(|_| {
        Fault::new(
            StatusCode::REQUEST_TIMEOUT,
            "too_slow",
            "the request took too long",
            format!("headers, body and answer have {} s together", PATIENCE.as_secs()),
        )
        .hint("send the body with the headers")
        .into_response()
    }))
}

impl App {
    /// What was given up at the start, and what was refused since.
    fn sandbox(&self) -> SandboxInfo {
        SandboxInfo { refused_calls: crate::sandbox::refused_calls(), ..self.network.sandbox.clone() }
    }

    /// Asks the data thread one thing.
    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(make(reply)).map_err(|_| Fault::unavailable())?;
        answer.await.map_err(|_| Fault::unavailable())
    }

    /// Publishes what `spec` names, and keeps what could be.
    async fn publish(&self, spec: PublishSpec) -> Result<Vec<Result<PortInfo, PublishError>>, Fault> {
        let done = self.ask(|reply| Request::Publish { spec: spec.clone(), reply }).await?;
        if let Some(kept) = &self.kept {
            kept.add(&spec, &done).await;
        }
        Ok(done)
    }

    /// Unpublishes what `spec` names, and does not keep it any more.
    async fn unpublish(&self, spec: PublishSpec) -> Result<Result<Vec<PortInfo>, PublishError>, Fault> {
        let done = self.ask(|reply| Request::Unpublish { spec: spec.clone(), reply }).await?;
        if let (Some(kept), Ok(gone)) = (&self.kept, &done) {
            kept.remove(&spec, gone).await;
        }
        Ok(done)
    }

    /// Takes away what was asked for in the words of `spec`, for a guest of what it published alone. Whether there was any.
    async fn unexpose(&self, spec: PublishSpec, guest: Option<std::net::IpAddr>) -> Result<bool, Fault> {
        let (host, proto) = (spec.host.clone(), spec.proto);
        let Some(gone) = self.ask(|reply| Request::Unexpose { host, proto, guest, reply }).await? else {
            return Ok(false);
        };
        if let (Some(kept), None) = (&self.kept, guest) {
            kept.remove(&spec, std::slice::from_ref(&gone)).await;
        }
        Ok(true)
    }
}

async fn publish_one(app: &App, spec: PublishSpec) -> Result<Result<PortInfo, PublishError>, Fault> {
    app.publish(spec).await?.pop().ok_or_else(Fault::unavailable)
}

#[cfg(test)]
mod tests;
