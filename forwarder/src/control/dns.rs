//! `/v1/dns`: the names the network answers itself.

use std::net::IpAddr;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use portway_api::control::{DnsRecord, DnsRequest, Problem};

use super::App;
use super::problem::Fault;
use super::query::Query;
use crate::config::DnsHost;
use crate::dns::{DnsError, Known, Origin};

/// The names the network answers itself; the host's hosts file is not among them
#[utoipa::path(get, path = "/v1/dns", responses((status = 200, body = [DnsRecord])))]
pub(super) async fn list(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<DnsRecord>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    Ok(records(&app))
}

/// Adds records, all or none; answers with all names there are
#[utoipa::path(post, path = "/v1/dns", request_body = DnsRequest,
    responses((status = 200, body = [DnsRecord]), (status = 400, body = Problem), (status = 429, body = Problem)))]
pub(super) async fn add(
    State(app): State<App>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<Json<Vec<DnsRecord>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    let record = |text: &String| match text.parse::<DnsHost>() {
        Ok(DnsHost(name, address)) => Ok((name, address)),
        Err(fault) => Err(bad_record(fault)),
    };
    let wanted = texts(&body)?.iter().map(record).collect::<Result<Vec<_>, _>>()?;
    app.dns.add_records(&wanted).map_err(|error| unchanged(&error))?;
    Ok(records(&app))
}

/// Takes records away, all or none; answers with the names that are left
#[utoipa::path(delete, path = "/v1/dns", request_body = DnsRequest,
    responses((status = 200, body = [DnsRecord]), (status = 400, body = Problem), (status = 404, body = Problem)))]
pub(super) async fn remove(
    State(app): State<App>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<Json<Vec<DnsRecord>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    let record = |text: &String| match text.split_once('=') {
        None => Ok((text.clone(), None)),
        Some((name, address)) => match address.parse::<IpAddr>() {
            Ok(address) => Ok((name.to_owned(), Some(address))),
            Err(_) => {
                Err(bad_record(format!("{text:?} is neither NAME nor NAME=IP; an example: db.example")))
            }
        },
    };
    let wanted = texts(&body)?.iter().map(record).collect::<Result<Vec<_>, _>>()?;
    app.dns.remove_records(&wanted).map_err(|error| unchanged(&error))?;
    Ok(records(&app))
}

fn records(app: &App) -> Json<Vec<DnsRecord>> {
    let origin = |origin| match origin {
        Origin::Network => "network",
        Origin::Guest => "guest",
        Origin::Config => "config",
        Origin::Live => "live",
    };
    let shown = |known: Known| DnsRecord {
        name: known.name,
        address: known.address.to_string(),
        origin: origin(known.origin).to_owned(),
    };
    Json(app.dns.known().into_iter().map(shown).collect())
}

/// Why nothing was changed.
fn unchanged(error: &DnsError) -> Fault {
    let (status, code) = match error {
        DnsError::NoRecord(_) => (StatusCode::NOT_FOUND, "no_record"),
        DnsError::TooManyRecords(_) => (StatusCode::TOO_MANY_REQUESTS, "limit"),
        _ => (StatusCode::BAD_REQUEST, "bad_record"),
    };
    Fault::new(status, code, "nothing was changed", error.to_string()).field("records")
}

fn texts(body: &Bytes) -> Result<Vec<String>, Fault> {
    let request: DnsRequest = super::body::read(body, "{\"records\": [\"db.example=192.0.2.7\"]}")?;
    if request.records.is_empty() {
        return Err(bad_record("one at least is needed, such as \"db.example=192.0.2.7\"".into()));
    }
    Ok(request.records)
}

fn bad_record(detail: String) -> Fault {
    Fault::bad("bad_record", detail).field("records")
}
