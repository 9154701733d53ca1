//! `--port`: a socket on which clients ask for forwards, in either of vpnkit's ways.
//!
//! ```text
//!  connection ─► its first bytes ─┬─ a 9P message (a small size, type 100) ─► ninep
//!                                 └─ anything else ─► HTTP/1.1: /forwards/…
//! ```
//! vpnkit itself speaks 9P there, its newer Go packages (linuxkit, `vpnkit-expose-port`) HTTP: here both find what they
//! speak. Limits: [`CONNECTIONS`], [`BODY`], [`PATIENCE`] for the first bytes and for a request.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::expose::Exposer;
use super::forward::{Body, Forward, Proto};
use super::ninep;

/// Clients at once, on each socket; further ones wait to be accepted.
const CONNECTIONS: usize = 64;
/// Bytes of a request's body.
const BODY: usize = 64 * 1024;
/// How long a client may take over its first bytes, and over each request's head.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that tell 9P from HTTP: a message's size and type.
const FIRST: usize = 5;

/// Serves one `--port` socket; ends with the runtime.
pub(super) async fn serve(listener: UnixListener, exposer: Arc<Exposer>) {
    let router = router(Arc::clone(&exposer));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (router, exposer) = (router.clone(), Arc::clone(&exposer));
                tokio::spawn(async move {
                    client(stream, router, exposer).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "--port cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn client(mut stream: UnixStream, router: Router, exposer: Arc<Exposer>) {
    let mut first = [0; FIRST];
    match tokio::time::timeout(PATIENCE, stream.read_exact(&mut first)).await {
        Ok(Ok(_)) => {}
        _ => return tracing::debug!("a client of --port said nothing"),
    }
    let (reading, writing) = stream.into_split();
    let reading = std::io::Cursor::new(first).chain(reading);
    if ninep::begins(first) {
        if let Err(error) = ninep::serve(reading, writing, exposer).await {
            tracing::debug!(%error, "a 9P client went away");
        }
        return;
    }
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .half_close(true)
        .serve_connection(TokioIo::new(tokio::io::join(reading, writing)), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a client of --port went away");
    }
}

fn router(exposer: Arc<Exposer>) -> Router {
    let expose = |kind| {
        put(move |state, body| expose(state, body, kind))
            .post(move |state, body| self::expose(state, body, kind))
    };
    let unexpose = |kind| {
        axum::routing::delete(move |state, body| unexpose(state, body, kind))
            .post(move |state, body| self::unexpose(state, body, kind))
    };
    Router::new()
        .route("/forwards/expose/port", expose(Kind::Port))
        .route("/forwards/expose/pipe", expose(Kind::Pipe))
        .route("/forwards/unexpose/port", unexpose(Kind::Port))
        .route("/forwards/unexpose/pipe", unexpose(Kind::Pipe))
        .route("/forwards/list", get(list))
        .route("/forwards/dump", get(dump))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(exposer)
}

/// Which of the two routes was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Port,
    Pipe,
}

fn fault(text: impl std::fmt::Display) -> Response {
    (StatusCode::BAD_REQUEST, Json(json!({ "message": text.to_string() }))).into_response()
}

/// The forward of a body; a protocol that is not the route's is answered with a bare text, as callers know it.
#[expect(clippy::result_large_err, reason = "the error is the HTTP answer")]
fn asked(body: &Bytes, kind: Kind) -> Result<Forward, Response> {
    let body: Body = serde_json::from_slice(body).map_err(fault)?;
    let right = match kind {
        Kind::Port => matches!(body.proto.as_str(), "tcp" | "udp"),
        Kind::Pipe => body.proto == "unix",
    };
    if !right {
        let text = format!("unexpected protocol {:?} on this route", body.proto);
        return Err((StatusCode::BAD_REQUEST, Json(text)).into_response());
    }
    Forward::try_from(body).map_err(fault)
}

async fn expose(State(exposer): State<Arc<Exposer>>, body: Bytes, kind: Kind) -> Response {
    match asked(&body, kind) {
        Ok(forward) => exposer.expose(&forward).await.map_or_else(fault, |_| StatusCode::OK.into_response()),
        Err(answer) => answer,
    }
}

async fn unexpose(State(exposer): State<Arc<Exposer>>, body: Bytes, kind: Kind) -> Response {
    match asked(&body, kind) {
        Ok(forward) => {
            exposer.unexpose(&forward).await;
            StatusCode::OK.into_response()
        }
        Err(answer) => answer,
    }
}

/// An array; `null` when there is nothing in it, as a Go program writes it.
async fn list(State(exposer): State<Arc<Exposer>>) -> Response {
    let forwards: Vec<Body> = exposer.list().await.iter().map(Body::from).collect();
    Json((!forwards.is_empty()).then_some(forwards)).into_response()
}

async fn dump(State(exposer): State<Arc<Exposer>>) -> String {
    lines(&exposer).await
}

/// Every forward, a line each.
pub(super) async fn lines(exposer: &Exposer) -> String {
    let line = |f: &Forward| {
        let path = |end: &super::forward::End| match end {
            super::forward::End::Path(path) => path.display().to_string(),
            other => other.to_string(),
        };
        match f.proto {
            Proto::Unix => format!("unix:{} -> {}\n", path(&f.out), path(&f.inner)),
            _ => format!("{f}\n"),
        }
    };
    exposer.list().await.iter().map(line).collect()
}

/// Answers each connection to a `--diagnostics` socket with one archive, and ends it.
pub(super) async fn answer_once(mut stream: UnixStream, bytes: Vec<u8>) {
    let sent = async {
        stream.write_all(&bytes).await?;
        stream.shutdown().await
    };
    match tokio::time::timeout(PATIENCE, sent).await {
        Ok(Ok(())) => {}
        _ => tracing::debug!("a client of --diagnostics did not take its answer"),
    }
}
