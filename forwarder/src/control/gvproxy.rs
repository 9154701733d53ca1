//! gvproxy's `/services/forwarder/*`, with its bodies, status codes and texts, so that its callers find what they know.
//!
//! Answers are `text/plain` even where they are JSON, and end with a newline. Where gvproxy fails without an answer (a
//! guest that is a name), ours is 500 with a text.

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use portway_api::control::{PortInfo, Protocol};
use serde::{Deserialize, Serialize};

use super::problem::Fault;
use super::{App, publish_one};
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::request::{PublishError, Request};

pub(super) fn routes() -> Router<App> {
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

async fn all(State(app): State<App>) -> Result<Response, Fault> {
    let ports = app.ask(|reply| Request::Ports { reply }).await?;
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
    let json = serde_json::to_string(&list).unwrap_or_else(|_| "[]".into());
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], json + "\n").into_response())
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

async fn expose(State(app): State<App>, method: Method, bytes: Bytes) -> Result<Response, Fault> {
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
    let (guest, port) = match split(remote) {
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
    match publish_one(&app, spec).await? {
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

async fn unexpose(State(app): State<App>, method: Method, bytes: Bytes) -> Result<Response, Fault> {
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
    // The guest does not count: a host end is published once.
    let spec = PublishSpec { host, guest: GuestName::Default, guest_port: 1, count: 1, proto };
    match app.unpublish(spec).await? {
        Ok(_) => Ok(StatusCode::OK.into_response()),
        Err(_) => Ok(unknown),
    }
}
