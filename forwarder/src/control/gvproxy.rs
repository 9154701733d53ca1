//! gvproxy's routes, with its bodies, status codes and texts, so that its callers find what they know.
//!
//! On the host's side all of them; inside the guest, on the gateway's port 80, `/services/forwarder/*` alone and with limits:
//! a guest publishes and takes away ports of its own address, at most [`GUEST_PORTS`], on the host's loopback (in the gvproxy
//! personality also on every address, by `:PORT`), and no unix sockets. `/connect` and `/tunnel` are in `hijack`.
//!
//! Answers are `text/plain` even where they are JSON, and end with a newline. Where gvproxy fails without an answer (a
//! guest that is a name), ours is 500 with a text.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Extension, Router};
use portway_api::control::{PortInfo, Protocol};
use serde::{Deserialize, Serialize};

use super::problem::Fault;
use super::{App, publish_one};
use crate::config::GuestApi;
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::request::{PublishError, Request};

/// Ports one guest may publish by itself.
pub(crate) const GUEST_PORTS: usize = 256;

/// The guest who asks, when one does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest(pub(super) IpAddr);

pub(super) fn routes() -> Router<App> {
    guest_routes()
        .route("/services/dhcp/leases", any(leases))
        .route("/leases", any(leases))
        .route("/cam", any(cam))
        .route("/stats", any(stats))
}

/// What a guest may ask.
pub(super) fn guest_routes() -> Router<App> {
    Router::new()
        .route("/services/forwarder/all", any(all))
        .route("/services/forwarder/expose", any(expose))
        .route("/services/forwarder/unexpose", any(unexpose))
}

/// A line as Go's `http.Error` writes it.
pub(super) fn text(line: &str) -> impl IntoResponse + use<> {
    let nosniff = (HeaderName::from_static("x-content-type-options"), "nosniff");
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8"), nosniff], format!("{line}\n"))
}

fn fail(status: StatusCode, line: &str) -> Response {
    (status, text(line)).into_response()
}

#[derive(Serialize)]
struct Exposed {
    local: String,
    remote: String,
    protocol: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Body {
    local: String,
    remote: String,
    protocol: String,
}

fn local_of(port: &PortInfo) -> String {
    match port.bind.first().map(String::as_str) {
        Some(path) if path.starts_with("unix:") => path.trim_start_matches("unix:").to_owned(),
        // Both loopback addresses are one entry there; ours shows the one gvproxy's callers know.
        Some("::") => format!(":{}", port.host_port),
        Some(ip) if ip.contains(':') => format!("[{ip}]:{}", port.host_port),
        Some(ip) => format!("{ip}:{}", port.host_port),
        None => String::new(),
    }
}

fn json(value: &impl Serialize) -> Response {
    let json = serde_json::to_string(value).unwrap_or_else(|_| "null".into());
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], json + "\n").into_response()
}

/// Every lease, the gateway's own address among them.
async fn leases(State(app): State<App>) -> Result<Response, Fault> {
    let leases = app.ask(|reply| Request::Leases { reply }).await?;
    let mut map: BTreeMap<String, String> = leases.into_iter().map(|l| (l.ip, l.mac)).collect();
    map.insert(app.network.gateway.clone(), app.network.gateway_mac.clone());
    Ok(json(&map))
}

/// Which Ethernet address is behind which port of the switch.
async fn cam(State(app): State<App>) -> Result<Response, Fault> {
    let macs = app.macs().await.map_err(|_| Fault::unavailable())?;
    Ok(json(&macs.into_iter().collect::<BTreeMap<_, _>>()))
}

/// The counters gvproxy's callers look at, under its names; what is not counted here is left out.
async fn stats(State(app): State<App>) -> Result<Response, Fault> {
    let stats = app.stats().await?;
    let sum = |of: fn(&portway_api::control::LinkStats) -> u64| stats.links.iter().map(of).sum::<u64>();
    let empty = || serde_json::json!({});
    Ok(json(&serde_json::json!({
        "ARP": empty(),
        "BytesReceived": sum(|l| l.bytes_from_guest),
        "BytesSent": sum(|l| l.bytes_to_guest),
        "DroppedPackets": stats.drops.values().sum::<u64>(),
        "ICMP": empty(),
        "IGMP": empty(),
        "IP": { "PacketsReceived": sum(|l| l.frames_from_guest), "PacketsSent": sum(|l| l.frames_to_guest) },
        "NICs": empty(),
        "TCP": { "CurrentEstablished": stats.tcp_flows.saturating_sub(stats.tcp_dialing) },
        "UDP": empty(),
    })))
}

/// A host end as [`local_of`] shows its port.
fn local_text(host: &HostEnd) -> String {
    match host {
        HostEnd::Unix(path) => path.display().to_string(),
        HostEnd::Ports { bind: Bind::Localhost, first } => format!("127.0.0.1:{first}"),
        HostEnd::Ports { bind: Bind::Address(ip), first } if *ip == IpAddr::from([0; 16]) => {
            format!(":{first}")
        }
        HostEnd::Ports { bind: Bind::Address(ip), first } => SocketAddr::new(*ip, *first).to_string(),
    }
}

async fn all(State(app): State<App>, asker: Option<Extension<Guest>>) -> Result<Response, Fault> {
    let mut ports = app.ask(|reply| Request::Ports { reply }).await?;
    if let Some(Extension(Guest(ip))) = asker {
        ports.retain(|p| p.guest == ip.to_string());
    }
    let mut list: Vec<Exposed> = ports
        .iter()
        .map(|p| Exposed {
            local: local_of(p),
            remote: format!("{}:{}", p.guest, p.guest_port),
            protocol: if p.bind.iter().any(|b| b.starts_with("unix:")) {
                "unix".into()
            } else {
                p.proto.to_string()
            },
        })
        .collect();
    list.sort_by(|a, b| (&a.local, &a.protocol).cmp(&(&b.local, &b.protocol)));
    Ok(json(&list))
}

/// The body of a POST.
#[expect(clippy::result_large_err, reason = "the error is the HTTP answer")]
fn body(method: &Method, bytes: &Bytes) -> Result<Body, Response> {
    if method != Method::POST {
        return Err(fail(StatusCode::BAD_REQUEST, "post only"));
    }
    let text = if bytes.is_empty() {
        Err("EOF".into())
    } else {
        serde_json::from_slice(bytes).map_err(|e| go_text(&e))
    };
    text.map_err(|text: String| fail(StatusCode::BAD_REQUEST, &text))
}

fn go_text(error: &serde_json::Error) -> String {
    if error.is_eof() { "unexpected EOF".into() } else { error.to_string() }
}

/// Splits at the last colon, as Go's `net.SplitHostPort` does.
fn split(address: &str) -> Result<(&str, &str), String> {
    let fault = |why: &str| format!("address {address}: {why}");
    let (host, port) = address.rsplit_once(':').ok_or_else(|| {
        if address.is_empty() { "missing port in address".into() } else { fault("missing port in address") }
    })?;
    match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(inner) => Ok((inner, port)),
        None if host.contains(':') => Err(fault("too many colons in address")),
        None => Ok((host, port)),
    }
}

/// The host end of `local`; gvproxy's empty host means every address.
fn host_end(local: &str, proto: &str) -> Result<HostEnd, String> {
    if proto == "unix" {
        return Ok(HostEnd::Unix(local.into()));
    }
    if local.is_empty() {
        return Ok(HostEnd::Ports { bind: Bind::Address(std::net::IpAddr::from([0; 16])), first: 0 });
    }
    let (host, port) = split(local)?;
    let first = port.parse().map_err(|_| format!("listen {proto}: address {local}: invalid port"))?;
    let bind = match host {
        "" => Bind::Address(std::net::IpAddr::from([0; 16])),
        "localhost" => Bind::Localhost,
        ip => Bind::Address(ip.parse().map_err(|_| format!("listen {proto}: lookup {ip}: no such host"))?),
    };
    Ok(HostEnd::Ports { bind, first })
}

fn protocol(name: &str) -> Option<(Protocol, &'static str)> {
    match name {
        "" | "tcp" => Some((Protocol::Tcp, "tcp")),
        "udp" => Some((Protocol::Udp, "udp")),
        "unix" => Some((Protocol::Tcp, "unix")),
        _ => None,
    }
}

async fn expose(
    State(app): State<App>,
    asker: Option<Extension<Guest>>,
    method: Method,
    bytes: Bytes,
) -> Result<Response, Fault> {
    let asker = asker.map(|Extension(Guest(ip))| ip);
    let body = match body(&method, &bytes) {
        Ok(body) => body,
        Err(response) => return Ok(response),
    };
    let internal = |text: &str| Ok(fail(StatusCode::INTERNAL_SERVER_ERROR, text));
    let Some((proto, name)) = protocol(&body.protocol) else {
        return internal(&match body.protocol.as_str() {
            "npipe" => "named pipes are not supported by this platform".to_owned(),
            other => format!("unknown protocol {other}"),
        });
    };
    let remote = if name == "unix" { body.remote.trim_start_matches("tcp://") } else { &body.remote };
    let own = asker.map(|ip| ip.to_string());
    let (guest, port) = match split(remote) {
        Ok(("", port)) if own.is_some() => (own.as_deref().unwrap_or_default(), port),
        // An empty host means the one who asks, and the host's own clients have no address in the network.
        Ok(("", _)) => return Ok(fail(StatusCode::BAD_REQUEST, "address @: missing port in address")),
        Ok(both) => both,
        Err(text) => return Ok(fail(StatusCode::BAD_REQUEST, &text)),
    };
    let Ok(guest) = guest.parse() else { return internal("invalid remote addr") };
    let Some(guest_port) = port.parse().ok().filter(|p| *p > 0) else {
        return internal(&format!("strconv.Atoi: parsing {port:?}: invalid syntax"));
    };
    let host = match host_end(&body.local, name) {
        Ok(host) => host,
        Err(text) => return internal(&text),
    };
    let spec = PublishSpec { host, guest: GuestName::Address(guest), guest_port, count: 1, proto };
    let done = match asker {
        None => publish_one(&app, spec).await?,
        Some(ip) => {
            // One guest at a time, so that the limit holds.
            let _turn = app.guest_turn.lock().await;
            if let Some(why) = forbidden(&app, ip, &spec).await? {
                return internal(&why);
            }
            // What a guest publishes is not kept over a restart: it asks again.
            let mut results = app.ask(|reply| Request::Publish { spec, reply }).await?;
            results.pop().ok_or_else(Fault::unavailable)?
        }
    };
    match done {
        Ok(_) => Ok(StatusCode::OK.into_response()),
        Err(PublishError::AlreadyPublished(_)) => {
            internal(&format!("proxy already running for {name} on {}", body.local))
        }
        Err(PublishError::Bind { reason, .. }) => {
            internal(&format!("listen {name} {}: bind: {reason}", body.local))
        }
        Err(other) => internal(&other.to_string()),
    }
}

/// Why the guest `ip` may not publish `spec`.
async fn forbidden(app: &App, ip: IpAddr, spec: &PublishSpec) -> Result<Option<String>, Fault> {
    if spec.guest != GuestName::Address(ip) {
        return Ok(Some(format!("a guest exposes its own address only, {ip}")));
    }
    let everywhere = app.guest_api == GuestApi::Any;
    let bound = match &spec.host {
        HostEnd::Unix(_) => false,
        HostEnd::Ports { bind: Bind::Localhost, .. } => true,
        HostEnd::Ports { bind: Bind::Address(to), .. } => {
            to.is_loopback() || (everywhere && to.is_unspecified())
        }
    };
    if !bound {
        return Ok(Some("a guest exposes ports on the host's loopback only, such as 127.0.0.1:8080".into()));
    }
    let ports = app.ask(|reply| Request::Ports { reply }).await?;
    let own = ports.iter().filter(|p| p.guest == ip.to_string()).count();
    Ok((own >= GUEST_PORTS)
        .then(|| format!("limit reached: a guest exposes {GUEST_PORTS} ports at the most")))
}

async fn unexpose(
    State(app): State<App>,
    asker: Option<Extension<Guest>>,
    method: Method,
    bytes: Bytes,
) -> Result<Response, Fault> {
    let body = match body(&method, &bytes) {
        Ok(body) => body,
        Err(response) => return Ok(response),
    };
    let unknown = fail(StatusCode::INTERNAL_SERVER_ERROR, "proxy not found");
    let Some((proto, name)) = protocol(&body.protocol) else { return Ok(unknown) };
    let Ok(host) = host_end(&body.local, name) else { return Ok(unknown) };
    if matches!(host, HostEnd::Ports { first: 0, .. }) {
        return Ok(unknown);
    }
    if let Some(Extension(Guest(ip))) = asker {
        let ports = app.ask(|reply| Request::Ports { reply }).await?;
        let shown = if name == "unix" { String::new() } else { local_text(&host) };
        let own = |p: &PortInfo| p.guest == ip.to_string() && p.proto == proto && local_of(p) == shown;
        if !ports.iter().any(own) {
            return Ok(unknown);
        }
    }
    // The guest does not count: a host end is published once.
    let spec = PublishSpec { host, guest: GuestName::Default, guest_port: 1, count: 1, proto };
    match app.unpublish(spec).await? {
        Ok(_) => Ok(StatusCode::OK.into_response()),
        Err(_) => Ok(unknown),
    }
}
