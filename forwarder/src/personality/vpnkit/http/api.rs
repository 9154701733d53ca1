//! `--http-api-path`: `GET` and `POST /http_proxy.json`. What is given back can be posted again.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::{Live, Settings};
use crate::sidecar::DoorContext;

/// Clients at once; further ones wait to be accepted.
const CONNECTIONS: usize = 16;
/// Bytes of a body.
const BODY: usize = 256 * 1024;
/// How long a client may take over each request's head.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the socket; ends with the runtime.
pub(in crate::personality::vpnkit) async fn serve(
    listener: UnixListener,
    live: Arc<Live>,
    context: DoorContext,
) {
    let router = Router::new()
        .route("/http_proxy.json", get(show).post(change))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state((live, context));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = TowerToHyperService::new(router.clone());
                tokio::spawn(async move {
                    let connection = hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(PATIENCE)
                        .half_close(true)
                        .serve_connection(TokioIo::new(stream), service);
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a client of --http-api-path went away");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "--http-api-path cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn show(State((live, _)): State<(Arc<Live>, DoorContext)>) -> Response {
    match live.get() {
        Some(settings) => ([(header::CONTENT_TYPE, "application/json")], settings.text()).into_response(),
        None => (StatusCode::NOT_FOUND, "None set").into_response(),
    }
}

async fn change(State((live, context)): State<(Arc<Live>, DoorContext)>, body: String) -> Response {
    match Settings::parse(&body).map(|settings| live.set(settings, &context)) {
        Ok(Ok(())) => StatusCode::OK.into_response(),
        Ok(Err(unavailable)) => (StatusCode::SERVICE_UNAVAILABLE, unavailable).into_response(),
        Err(fault) => (StatusCode::BAD_REQUEST, fault).into_response(),
    }
}
