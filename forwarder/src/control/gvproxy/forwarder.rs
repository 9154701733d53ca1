//! `/services/forwarder/*`: the ports of gvproxy's callers, and unix sockets of the host.
//!
//! A guest that asks publishes ports of its own address, at most [`GUEST_PORTS`](crate::publish::GUEST_PORTS), on the host's loopback (in the gvproxy
//! personality also on every address, by `:PORT`), and no unix sockets. It sees and takes away what it published itself, and
//! nothing that the operator did for it.
//! ```text
//!  unix:PATH ─┬─ tcp://GUEST:PORT ─► a published port whose listener is a unix socket
//!             └─ ssh-tunnel://… ───► `ssh`
//! ```

use std::net::{IpAddr, SocketAddr};

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use portway_api::control::{PortInfo, Protocol};
use serde::{Deserialize, Serialize};

use super::super::problem::Fault;
use super::super::{App, publish_one};
use super::{Guest, body, fail, json};
use crate::config::GuestApi;
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::publish::{IN_USE, NOT_HERE, PRIVILEGE};
use crate::request::{PublishError, Request};
use crate::ssh::{ForwardError, Remote};

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

pub(super) async fn all(State(app): State<App>, asker: Option<Extension<Guest>>) -> Result<Response, Fault> {
    let ports = match &asker {
        Some(Extension(Guest(guest))) => {
            app.ask(|reply| Request::GuestPorts { guest: *guest, reply }).await?
        }
        None => app.ask(|reply| Request::Ports { reply }).await?,
    };
    let mut list: Vec<Exposed> = ports
        .iter()
        .map(|p| Exposed {
            local: local_of(p),
            remote: match p.guest.parse::<IpAddr>() {
                Ok(ip) => SocketAddr::new(ip, p.guest_port).to_string(),
                // A guest without an address yet goes by its name.
                Err(_) => format!("{}:{}", p.guest, p.guest_port),
            },
            protocol: if p.bind.iter().any(|b| b.starts_with("unix:")) {
                "unix".into()
            } else {
                p.proto.to_string()
            },
        })
        .collect();
    if asker.is_none() {
        let sockets = app.ssh.list().into_iter();
        list.extend(sockets.map(|(local, remote)| Exposed { local, remote, protocol: "unix".into() }));
    }
    list.sort_by(|a, b| (&a.local, &a.protocol).cmp(&(&b.local, &b.protocol)));
    Ok(json(&list))
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

pub(super) async fn expose(
    State(app): State<App>,
    asker: Option<Extension<Guest>>,
    method: Method,
    bytes: Bytes,
) -> Result<Response, Fault> {
    let asker = asker.map(|Extension(Guest(ip))| ip);
    let body: Body = match body(&method, &bytes) {
        Ok(body) => body,
        Err(response) => return Ok(response),
    };
    let internal_text = |text: &str| fail(StatusCode::INTERNAL_SERVER_ERROR, text);
    let internal = |text: &str| Ok(internal_text(text));
    let Some((proto, name)) = protocol(&body.protocol) else {
        return internal(&match body.protocol.as_str() {
            "npipe" => "named pipes are not supported by this platform".to_owned(),
            other => format!("unknown protocol {other}"),
        });
    };
    let mut remote = body.remote.as_str();
    if name == "unix"
        && let Some((scheme, rest)) = remote.split_once("://")
    {
        // What a guest may not at all, it is told below.
        if scheme != "tcp" && asker.is_none() {
            return Ok(tunnel(&app, &body)
                .map_or_else(|text| internal_text(&text), |()| StatusCode::OK.into_response()));
        }
        remote = rest;
    }
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
        Some(guest) => {
            if let Some(why) = forbidden(&app, guest, &spec) {
                return internal(&why);
            }
            app.ask(|reply| Request::GuestPublish { spec, guest, reply }).await?
        }
    };
    match done {
        Ok(_) => Ok(StatusCode::OK.into_response()),
        Err(PublishError::AlreadyPublished(_)) => {
            internal(&format!("proxy already running for {name} on {}", body.local))
        }
        Err(PublishError::Bind { reason, .. }) => {
            internal(&format!("listen {name} {}: bind: {}", body.local, errno_text(&reason)))
        }
        Err(other) => internal(&other.to_string()),
    }
}

/// Makes the unix socket `body` names lead over SSH to one of a guest.
///
/// # Errors
/// What gvproxy says.
fn tunnel(app: &App, body: &Body) -> Result<(), String> {
    let remote: Remote = body.remote.parse().map_err(|e: crate::ssh::RemoteError| e.to_string())?;
    let socket = std::path::absolute(&body.local).map_err(|e| format!("listen unix {}: {e}", body.local))?;
    let forward = remote.forward(socket).map_err(|e| e.to_string())?;
    app.ssh.add(forward, remote.shown(), app.requests.clone()).map_err(|error| match error {
        ForwardError::Taken => format!("proxy already running for unix on {}", body.local),
        ForwardError::Limit => format!("limit reached: {} unix sockets over SSH", crate::ssh::FORWARDS),
        ForwardError::Outside(path) => crate::request::PublishError::Outside(path).to_string(),
        ForwardError::Socket(why) => format!("listen unix {}: bind: {why}", body.local),
    })
}

/// The kernel's own words, which gvproxy's callers look for, where ours say more.
fn errno_text(reason: &str) -> &str {
    match reason {
        r if r.starts_with(IN_USE) => "address already in use",
        r if r.contains(PRIVILEGE) => "permission denied",
        r if r == NOT_HERE => "cannot assign requested address",
        other => other,
    }
}

/// Why the guest `ip` may not publish `spec`.
fn forbidden(app: &App, ip: IpAddr, spec: &PublishSpec) -> Option<String> {
    if spec.guest != GuestName::Address(ip) {
        return Some(format!("a guest exposes its own address only, {ip}"));
    }
    let everywhere = app.guest_api == GuestApi::Any;
    let bound = match &spec.host {
        HostEnd::Unix(_) => false,
        HostEnd::Ports { bind: Bind::Localhost, .. } => true,
        HostEnd::Ports { bind: Bind::Address(to), .. } => {
            to.is_loopback() || (everywhere && to.is_unspecified())
        }
    };
    (!bound).then(|| "a guest exposes ports on the host's loopback only, such as 127.0.0.1:8080".into())
}

pub(super) async fn unexpose(
    State(app): State<App>,
    asker: Option<Extension<Guest>>,
    method: Method,
    bytes: Bytes,
) -> Result<Response, Fault> {
    let body: Body = match body(&method, &bytes) {
        Ok(body) => body,
        Err(response) => return Ok(response),
    };
    let unknown = fail(StatusCode::INTERNAL_SERVER_ERROR, "proxy not found");
    let Some((proto, name)) = protocol(&body.protocol) else { return Ok(unknown) };
    let Ok(host) = host_end(&body.local, name) else { return Ok(unknown) };
    if let (HostEnd::Unix(path), None) = (&host, &asker)
        && std::path::absolute(path).is_ok_and(|path| app.ssh.remove(&path))
    {
        return Ok(StatusCode::OK.into_response());
    }
    let free = matches!(host, HostEnd::Ports { first: 0, .. });
    // The guest does not count: a host end is published once.
    let spec = PublishSpec { host, guest: GuestName::Default, guest_port: 1, count: 1, proto };
    let gone = match asker {
        Some(Extension(Guest(ip))) => app.unexpose(spec, Some(ip)).await?,
        // What was asked for with port 0 goes by the same words.
        None if free => app.unexpose(spec, None).await?,
        None => app.unpublish(spec).await?.is_ok(),
    };
    Ok(if gone { StatusCode::OK.into_response() } else { unknown })
}
