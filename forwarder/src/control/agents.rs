//! `/v1/agents` and `/v1/wait`: guest agents, and waiting for a guest.

use std::time::Duration;

use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::sync::oneshot;

use super::App;
use crate::request::Request;

/// How long one request waits; a client that wants to wait longer asks again.
const WAIT: Duration = Duration::from_secs(8);

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/agents", get(agents)).route("/v1/wait", get(wait))
}

async fn agents(State(app): State<App>) -> Response {
    match app.ask(|reply| Request::Agents { reply }).await {
        Ok(agents) => Json(agents).into_response(),
        Err(error) => error.into_response(),
    }
}

/// `port=N`, a host port; without it the first guest's readiness.
fn port_of(query: Option<&str>) -> Result<Option<u16>, String> {
    let Some(query) = query.filter(|q| !q.is_empty()) else { return Ok(None) };
    let port = query.strip_prefix("port=").and_then(|p| p.parse().ok()).filter(|p| *p > 0);
    port.map(Some).ok_or_else(|| format!("{query:?} is not port=N, 1 to 65535"))
}

/// What has come of the wait.
#[derive(Debug, Serialize)]
struct Waited {
    ready: bool,
}

async fn wait(State(app): State<App>, RawQuery(query): RawQuery) -> Response {
    let port = match port_of(query.as_deref()) {
        Ok(port) => port,
        Err(fault) => return (StatusCode::BAD_REQUEST, fault).into_response(),
    };
    let (reply, answer) = oneshot::channel();
    if let Err(error) = app.requests.send(Request::Await { port, reply }) {
        return (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response();
    }
    match tokio::time::timeout(WAIT, answer).await {
        Ok(Ok(Ok(()))) => Json(Waited { ready: true }).into_response(),
        Ok(Ok(Err(error))) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
        Ok(Err(_)) => (StatusCode::SERVICE_UNAVAILABLE, "the network is ending").into_response(),
        Err(_) => Json(Waited { ready: false }).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_one_or_none() {
        assert_eq!(port_of(None), Ok(None));
        assert_eq!(port_of(Some("")), Ok(None));
        assert_eq!(port_of(Some("port=80")), Ok(Some(80)));
        for bad in ["port=0", "port=x", "port=65536", "prot=80", "80"] {
            assert!(port_of(Some(bad)).is_err(), "{bad}");
        }
    }
}
