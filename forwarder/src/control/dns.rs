//! `/v1/dns`: the names the network answers itself.

use std::net::IpAddr;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use portway_api::control::{DnsRecord, DnsRequest};

use super::{App, problem};
use crate::config::DnsHost;
use crate::dns::{DnsError, Origin};

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/dns", get(list).post(add).delete(remove))
}

/// Every name that is answered without a resolver, hosts files excepted.
fn records(app: &App) -> Vec<DnsRecord> {
    let origin = |origin| match origin {
        Origin::Network => "network",
        Origin::Guest => "guest",
        Origin::Config => "config",
        Origin::Live => "live",
    };
    let shown = |known: crate::dns::Known| DnsRecord {
        name: known.name,
        address: known.address.to_string(),
        origin: origin(known.origin).to_owned(),
    };
    app.dns.known().into_iter().map(shown).collect()
}

async fn list(State(app): State<App>) -> Response {
    Json(records(&app)).into_response()
}

/// What is wrong with a request: the problem's code, and its detail.
type Fault = (&'static str, String);

async fn add(State(app): State<App>, body: Bytes) -> Response {
    let record = |text: &String| match text.parse::<DnsHost>() {
        Ok(DnsHost(name, address)) => Ok((name, address)),
        Err(fault) => Err(("bad_record", fault)),
    };
    match texts(&body).and_then(|texts| texts.iter().map(record).collect::<Result<Vec<_>, _>>()) {
        Ok(records) => done(&app, app.dns.add_records(&records)),
        Err(fault) => bad(fault),
    }
}

async fn remove(State(app): State<App>, body: Bytes) -> Response {
    let record = |text: &String| match text.split_once('=') {
        None => Ok((text.clone(), None)),
        Some((name, address)) => match address.parse::<IpAddr>() {
            Ok(address) => Ok((name.to_owned(), Some(address))),
            Err(_) => {
                Err(("bad_record", format!("{text:?} is neither NAME nor NAME=IP; an example: db.example")))
            }
        },
    };
    match texts(&body).and_then(|texts| texts.iter().map(record).collect::<Result<Vec<_>, _>>()) {
        Ok(records) => done(&app, app.dns.remove_records(&records)),
        Err(fault) => bad(fault),
    }
}

/// The answer to a change: what there is now, or why nothing was changed.
fn done(app: &App, result: Result<(), DnsError>) -> Response {
    let error = match result {
        Ok(()) => return Json(records(app)).into_response(),
        Err(error) => error,
    };
    let (status, code) = match &error {
        DnsError::NoRecord(_) => (StatusCode::NOT_FOUND, "no_record"),
        DnsError::TooManyRecords(_) => (StatusCode::TOO_MANY_REQUESTS, "limit"),
        _ => (StatusCode::BAD_REQUEST, "bad_record"),
    };
    problem(status, code, "nothing was changed", error.to_string())
}

fn texts(body: &Bytes) -> Result<Vec<String>, Fault> {
    let request: DnsRequest = serde_json::from_slice(body).map_err(|e| ("bad_json", e.to_string()))?;
    if request.records.is_empty() {
        let fault = "records: one at least is needed, such as \"db.example=192.0.2.7\"";
        return Err(("bad_record", fault.into()));
    }
    Ok(request.records)
}

fn bad((code, detail): Fault) -> Response {
    problem(StatusCode::BAD_REQUEST, code, "the request cannot be used", detail)
}
