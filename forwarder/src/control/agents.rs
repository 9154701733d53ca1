//! `/v1/agents` and `/v1/wait`: guest agents, and waiting for a guest.

use std::num::NonZeroU16;
use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use portway_api::agent::AgentInfo;
use portway_api::control::{Problem, Waited};
use tokio::sync::oneshot;

use super::App;
use super::problem::Fault;
use super::query::{Query, wrong};
use crate::request::Request;

/// How many seconds one request waits at the most; a client that wants to wait longer asks again.
pub(crate) const WAIT: u64 = 8;

/// What the parameter `seconds` takes.
const SECONDS: &str = "a number of seconds from 1 to 8";

/// The guest agents
#[utoipa::path(get, path = "/v1/agents", responses((status = 200, body = [AgentInfo])))]
pub(super) async fn agents(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<AgentInfo>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    Ok(Json(app.ask(|reply| Request::Agents { reply }).await?))
}

/// Waits until the first guest is ready, or somebody in a guest listens behind a published port; 8 s at most
#[utoipa::path(get, path = "/v1/wait",
    params(("port" = Option<u16>, Query, description = "A published host port; without it the first guest's readiness"),
        ("seconds" = Option<u64>, Query, description = "Give up after so many, 1 to 8; 8 unless given")),
    responses((status = 200, body = Waited), (status = 400, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn wait(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Json<Waited>, Fault> {
    let query = Query::parse(query.as_deref(), &["port", "seconds"])?;
    let port = query.get::<NonZeroU16>("port", "a port, 1 to 65535")?.map(NonZeroU16::get);
    let seconds = match query.get::<u64>("seconds", SECONDS)? {
        Some(n) if !(1..=WAIT).contains(&n) => return Err(wrong("seconds", &n.to_string(), SECONDS)),
        given => given.unwrap_or(WAIT),
    };
    let (reply, answer) = oneshot::channel();
    app.requests.send(Request::Await { port, reply }).map_err(|_| Fault::unavailable())?;
    match tokio::time::timeout(Duration::from_secs(seconds), answer).await {
        Ok(Ok(Ok(()))) => Ok(Json(Waited { ready: true })),
        Ok(Ok(Err(error))) => Err(Fault::from(&error).title("there is nothing to wait for")),
        Ok(Err(_)) => Err(Fault::unavailable()),
        Err(_) => Ok(Json(Waited { ready: false })),
    }
}
