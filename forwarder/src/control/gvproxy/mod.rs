//! gvproxy's routes, with its bodies, status codes and texts, so that its callers find what they know.
//!
//! On the host's side all of them; inside the guest, on the gateway's port 80, those of `forwarder` alone and with limits.
//! `/connect` and `/tunnel` are in `hijack`.
//!
//! Answers are `text/plain` even where they are JSON, and end with a newline. The keys of bodies have no case, and those that are
//! none are passed over, as Go's decoder has it. Where gvproxy fails without an answer (a guest that is a name), ours is 500
//! with a text.

mod dns;
pub(crate) mod forwarder;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::App;
use super::problem::Fault;
use crate::request::Request;

/// The guest who asks, when one does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest(pub(super) IpAddr);

pub(super) fn routes() -> Router<App> {
    guest_routes()
        .route("/services/dns/all", any(dns::all))
        .route("/services/dns/add", any(dns::add))
        .route("/services/dhcp/leases", any(leases))
        .route("/leases", any(leases))
        .route("/cam", any(cam))
        .route("/stats", any(stats))
}

/// What a guest may ask.
pub(super) fn guest_routes() -> Router<App> {
    Router::new()
        .route("/services/forwarder/all", any(forwarder::all))
        .route("/services/forwarder/expose", any(forwarder::expose))
        .route("/services/forwarder/unexpose", any(forwarder::unexpose))
}

/// A line as Go's `http.Error` writes it.
pub(super) fn text(line: &str) -> impl IntoResponse + use<> {
    let nosniff = (HeaderName::from_static("x-content-type-options"), "nosniff");
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8"), nosniff], format!("{line}\n"))
}

fn fail(status: StatusCode, line: &str) -> Response {
    (status, text(line)).into_response()
}

fn json(value: &impl Serialize) -> Response {
    let json = serde_json::to_string(value).unwrap_or_else(|_| "null".into());
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], json + "\n").into_response()
}

/// Every lease, the gateway's own address among them. Of IPv4 alone, as gvproxy's: Lima takes whichever address of a MAC it finds.
async fn leases(State(app): State<App>) -> Result<Response, Fault> {
    let leases = app.ask(|reply| Request::Leases { reply }).await?;
    let v4 = leases.into_iter().filter(|l| l.ip.parse::<Ipv4Addr>().is_ok());
    let mut map: BTreeMap<String, String> = v4.map(|l| (l.ip, l.mac)).collect();
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

/// The body of a POST, read as Go's decoder reads it.
#[expect(clippy::result_large_err, reason = "the error is the HTTP answer")]
fn body<T: DeserializeOwned>(method: &Method, bytes: &Bytes) -> Result<T, Response> {
    if method != Method::POST {
        return Err(fail(StatusCode::BAD_REQUEST, "post only"));
    }
    read(bytes).map_err(|text| fail(StatusCode::BAD_REQUEST, &text))
}

/// # Errors
/// What is wrong, in Go's words where it has a word.
fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    if bytes.is_empty() {
        return Err("EOF".into());
    }
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| if e.is_eof() { "unexpected EOF".into() } else { e.to_string() })?;
    if !value.is_object() {
        // serde would take an array for the fields in their order.
        return Err("json: cannot unmarshal: an object is needed".into());
    }
    T::deserialize(without_case(value)).map_err(|e| format!("json: cannot unmarshal: {e}"))
}

/// `value` with the keys of its objects in lower case.
fn without_case(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().map(|(key, value)| (key.to_ascii_lowercase(), without_case(value))).collect()
        }
        Value::Array(list) => list.into_iter().map(without_case).collect(),
        other => other,
    }
}
