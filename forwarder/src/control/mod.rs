//! The control API: HTTP/1.1 and JSON on a unix socket that only its owner may open (0600).
//!
//! ```text
//!  client ─► unix socket ─► router ─┬─ /v1/…  (our resources, problem+json errors)
//!                                   └─ /services/forwarder/…  (gvproxy's routes, its bodies and texts)
//!            router ─► Requests ─► data thread ─► oneshot ─► answer
//! ```
//! A client cannot stall the data thread: it only ever takes a message from a queue and drops an answer into a
//! channel. Limits: [`CONNECTIONS`], [`BODY`], [`PATIENCE`].

pub mod client;
mod dns;
mod gvproxy;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use portway_api::control::{NetworkInfo, PortInfo, PortsRequest, PortsResponse, Problem};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, oneshot};

use crate::dns::Dns;
use crate::publish::spec::PublishSpec;
use crate::request::{PublishError, Request, Requests};

/// Clients at once; further ones wait to be accepted.
pub const CONNECTIONS: usize = 64;
/// Bytes of a request's body; beyond it the answer is 413.
pub const BODY: usize = 64 * 1024;
/// How long a client may take over its headers, and its body and answer together.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What the handlers share.
#[derive(Clone)]
struct App {
    requests: Requests,
    dns: Arc<Dns>,
    network: Arc<NetworkInfo>,
}

/// Serves until the listener fails; ends with the runtime.
pub async fn serve(listener: UnixListener, requests: Requests, dns: Arc<Dns>, network: NetworkInfo) {
    let router = router(App { requests, dns, network: Arc::new(network) });
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _place = place;
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                // gvproxy's callers shut their writing side down behind the request.
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a control client went away");
            }
        });
    }
}

fn router(app: App) -> Router {
    Router::new()
        .route("/v1/network", get(network))
        .route("/v1/ports", get(ports).post(publish).delete(unpublish))
        .route("/v1/leases", get(leases))
        .route("/v1/flows", get(flows))
        .route("/v1/stats", get(stats))
        .merge(dns::routes())
        .merge(gvproxy::routes())
        .fallback(async || (StatusCode::NOT_FOUND, gvproxy::text("404 page not found")))
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn(patient))
        .with_state(app)
}

async fn patient(request: HttpRequest, next: Next) -> Result<Response, Infallible> {
    Ok(tokio::time::timeout(PATIENCE, next.run(request)).await.unwrap_or_else(|_| {
        problem(
            StatusCode::REQUEST_TIMEOUT,
            "too_slow",
            "the request took too long",
            "send the body with the headers".into(),
        )
    }))
}

fn problem(status: StatusCode, code: &str, title: &str, detail: String) -> Response {
    let body = Problem { code: code.into(), status: status.as_u16(), title: title.into(), detail };
    (
        status,
        [(header::CONTENT_TYPE, "application/problem+json")],
        serde_json::to_string(&body).unwrap_or_else(|_| "{}".into()),
    )
        .into_response()
}

impl App {
    /// Asks the data thread one thing.
    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Unanswered> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(make(reply)).map_err(|_| Unanswered)?;
        answer.await.map_err(|_| Unanswered)
    }
}

/// The data thread is overloaded or ending.
struct Unanswered;

impl IntoResponse for Unanswered {
    fn into_response(self) -> Response {
        let detail = "the network is overloaded or ending: try again".to_owned();
        problem(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "no answer from the network", detail)
    }
}

async fn network(State(app): State<App>) -> Json<NetworkInfo> {
    Json((*app.network).clone())
}

async fn ports(State(app): State<App>) -> Result<Response, Unanswered> {
    Ok(Json(app.ask(|reply| Request::Ports { reply }).await?).into_response())
}

async fn leases(State(app): State<App>) -> Result<Response, Unanswered> {
    Ok(Json(app.ask(|reply| Request::Leases { reply }).await?).into_response())
}

async fn flows(State(app): State<App>) -> Result<Response, Unanswered> {
    Ok(Json(app.ask(|reply| Request::Flows { reply }).await?).into_response())
}

async fn stats(State(app): State<App>) -> Result<Response, Unanswered> {
    Ok(Json(app.ask(|reply| Request::Stats { reply }).await?).into_response())
}

/// The specs of a body; a bad one refuses the whole request, and nothing is changed.
#[expect(clippy::result_large_err, reason = "the error is the HTTP answer")]
fn specs(body: &Bytes) -> Result<Vec<PublishSpec>, Response> {
    let bad = |code: &str, detail: String| {
        problem(StatusCode::BAD_REQUEST, code, "the request cannot be used", detail)
    };
    let request: PortsRequest = serde_json::from_slice(body).map_err(|e| bad("bad_json", e.to_string()))?;
    if request.specs.is_empty() {
        return Err(bad("bad_spec", "specs: one at least is needed, such as \"2222:22/tcp\"".into()));
    }
    request
        .specs
        .iter()
        .map(|s| s.parse().map_err(|e: crate::publish::spec::SpecError| bad("bad_spec", e.to_string())))
        .collect()
}

async fn publish(State(app): State<App>, body: Bytes) -> Result<Response, Unanswered> {
    let specs = match specs(&body) {
        Ok(specs) => specs,
        Err(response) => return Ok(response),
    };
    let mut done = PortsResponse { published: Vec::new(), errors: Vec::new() };
    for spec in specs {
        for result in app.ask(|reply| Request::Publish { spec, reply }).await? {
            match result {
                Ok(port) => done.published.push(port),
                Err(error) => done.errors.push(error.to_string()),
            }
        }
    }
    let status = if done.errors.is_empty() { StatusCode::OK } else { StatusCode::CONFLICT };
    Ok((status, Json(done)).into_response())
}

async fn unpublish(State(app): State<App>, body: Bytes) -> Result<Response, Unanswered> {
    let specs = match specs(&body) {
        Ok(specs) => specs,
        Err(response) => return Ok(response),
    };
    let (mut gone, mut errors): (Vec<PortInfo>, Vec<String>) = Default::default();
    for spec in specs {
        match app.ask(|reply| Request::Unpublish { spec, reply }).await? {
            Ok(mut ports) => gone.append(&mut ports),
            Err(error) => errors.push(error.to_string()),
        }
    }
    let status = if errors.is_empty() { StatusCode::OK } else { StatusCode::CONFLICT };
    Ok((status, Json(PortsResponse { published: gone, errors })).into_response())
}

async fn publish_one(app: &App, spec: PublishSpec) -> Result<Result<PortInfo, PublishError>, Unanswered> {
    let mut results = app.ask(|reply| Request::Publish { spec, reply }).await?;
    results.pop().ok_or(Unanswered)
}

#[cfg(test)]
mod tests;
