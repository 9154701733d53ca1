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
use super::query::Query;
use crate::request::Request;

/// How long one request waits; a client that wants to wait longer asks again.
const WAIT: Duration = Duration::from_secs(8);

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
    params(("port" = Option<u16>, Query, description = "A published host port; without it the first guest's readiness")),
    responses((status = 200, body = Waited), (status = 400, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn wait(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Json<Waited>, Fault> {
    let query = Query::parse(query.as_deref(), &["port"])?;
    let port = query.get::<NonZeroU16>("port", "a port, 1 to 65535")?.map(NonZeroU16::get);
    let (reply, answer) = oneshot::channel();
    app.requests.send(Request::Await { port, reply }).map_err(|_| Fault::unavailable())?;
    match tokio::time::timeout(WAIT, answer).await {
        Ok(Ok(Ok(()))) => Ok(Json(Waited { ready: true })),
        Ok(Ok(Err(error))) => Err(Fault::from(&error)),
        Ok(Err(_)) => Err(Fault::unavailable()),
        Err(_) => Ok(Json(Waited { ready: false })),
    }
}
