//! `/services/dns/*`: the zones gvproxy's callers see and add.

use std::net::IpAddr;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::super::App;
use super::{body, fail, json};
use crate::dns::{DnsError, GivenRecord, GivenZone};

/// A zone, in gvproxy's words.
#[derive(Serialize, Deserialize)]
#[serde(rename_all(serialize = "PascalCase", deserialize = "lowercase"))]
struct Zone {
    #[serde(default)]
    name: String,
    #[serde(default)]
    records: Option<Vec<Record>>,
    #[serde(rename(serialize = "DefaultIP", deserialize = "defaultip"), default)]
    default: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all(serialize = "PascalCase", deserialize = "lowercase"))]
struct Record {
    #[serde(default)]
    name: String,
    #[serde(rename(serialize = "IP", deserialize = "ip"), default)]
    address: Option<String>,
    #[serde(rename(serialize = "Regexp", deserialize = "regexp"), default)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pattern: Option<String>,
}

/// An address in gvproxy's words: nothing is an empty text.
fn shown(address: Option<IpAddr>) -> Option<String> {
    Some(address.map_or_else(String::new, |a| a.to_string()))
}

fn address(text: Option<String>) -> Result<Option<IpAddr>, String> {
    match text.filter(|t| !t.is_empty()) {
        None => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| format!("invalid IP address: {text}")),
    }
}

impl From<GivenZone> for Zone {
    fn from(zone: GivenZone) -> Self {
        let record = |r: GivenRecord| Record { name: r.name, address: shown(r.address), pattern: r.pattern };
        Self {
            name: zone.name,
            records: Some(zone.records.into_iter().map(record).collect()),
            default: shown(zone.default),
        }
    }
}

impl TryFrom<Zone> for GivenZone {
    type Error = String;

    fn try_from(zone: Zone) -> Result<Self, String> {
        let record = |r: Record| {
            let pattern = r.pattern.filter(|p| !p.is_empty());
            Ok(GivenRecord { name: r.name, address: address(r.address)?, pattern })
        };
        let records = zone.records.unwrap_or_default().into_iter().map(record);
        Ok(Self {
            name: zone.name,
            records: records.collect::<Result<_, String>>()?,
            default: address(zone.default)?,
        })
    }
}

pub(super) async fn all(State(app): State<App>) -> Response {
    json(&app.dns.given_zones().into_iter().map(Zone::from).collect::<Vec<_>>())
}

pub(super) async fn add(State(app): State<App>, method: Method, bytes: Bytes) -> Response {
    let bad = |text: &str| fail(StatusCode::BAD_REQUEST, text);
    let zone = match body::<Zone>(&method, &bytes) {
        Ok(zone) => zone,
        Err(answer) => return answer,
    };
    let zone = match GivenZone::try_from(zone) {
        Ok(zone) => zone,
        Err(text) => return bad(&text),
    };
    match app.dns.add_zone(&zone) {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error @ (DnsError::TooManyRecords(_) | DnsError::TooManyZones(_))) => {
            fail(StatusCode::TOO_MANY_REQUESTS, &error.to_string())
        }
        Err(error) => bad(&error.to_string()),
    }
}
