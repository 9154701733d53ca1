//! Answers that do not end: events (server-sent events) and captures (pcapng).
//!
//! Each has a place of its own ([`STREAMS`]), so that streams never keep listings out. What a client does not read waits in a
//! bounded queue: events are skipped beyond [`crate::events::EventLog::BEHIND`], frames are counted as lost beyond
//! [`crate::capture::BUDGET`].

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use portway_api::control::{EventInfo, Problem};
use tokio::sync::{OwnedSemaphorePermit, broadcast, mpsc};

use super::App;
use super::problem::Fault;
use super::query::{Query, wrong};
use crate::capture::pcapng::Encoder;
use crate::capture::{Capture, Filter, Reader};
use crate::request::{Request, Requests};

/// Streams at once.
pub const STREAMS: usize = 16;
/// Chunks that may wait for one client.
const CHUNKS: usize = 8;
/// Frames of a capture that are written together.
const FRAMES: usize = 256;
/// How long a stream is silent before it says that it lives; a client that has gone is noticed by it.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// The body of a stream: what a task sends, until it ends.
struct Chunks(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Chunks {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(cx).map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn place(app: &App) -> Result<OwnedSemaphorePermit, Fault> {
    Arc::clone(&app.streams).try_acquire_owned().map_err(|_| {
        let detail = format!("{STREAMS} clients follow events or captures already");
        Fault::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", "no room for one more stream", detail)
            .hint("end one of them first")
    })
}

/// What has happened
///
/// A JSON array of the last 1024 events; with `Accept: text/event-stream` or `follow=true`, server-sent events: those, and
/// what comes after. An event `lost` with a `count` says that the client was too slow for so many.
#[utoipa::path(get, path = "/v1/events",
    params(
        ("since" = Option<u64>, Query, description = "Only events from this number on; Last-Event-ID does the same"),
        ("follow" = Option<bool>, Query, description = "Stay, and send events as they happen"),
    ),
    responses(
        (status = 200, content((Vec<EventInfo> = "application/json"), (String = "text/event-stream"))),
        (status = 400, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn events(
    State(app): State<App>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Fault> {
    let query = Query::parse(query.as_deref(), &["since", "follow"])?;
    let mut since: u64 = query.get("since", "the number of an event")?.unwrap_or(0);
    if let Some(last) = headers.get("last-event-id") {
        let number = last.to_str().ok().and_then(|t| t.parse::<u64>().ok());
        let last = number
            .ok_or_else(|| wrong("Last-Event-ID", &String::from_utf8_lossy(last.as_bytes()), "a number"))?;
        since = since.max(last.saturating_add(1));
    }
    let accepts = |h: &axum::http::HeaderValue| h.to_str().is_ok_and(|t| t.contains("text/event-stream"));
    if !query.flag("follow")? && !headers.get_all(header::ACCEPT).iter().any(accepts) {
        let known: Vec<EventInfo> = app.events.since(since).iter().map(|e| (**e).clone()).collect();
        return Ok(Json(known).into_response());
    }
    let place = place(&app)?;
    let (known, live) = app.events.follow(since);
    let (out, body) = mpsc::channel(CHUNKS);
    tokio::spawn(async move {
        follow(known, live, out).await;
        drop(place);
    });
    let head = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((head, Body::new(Chunks(body))).into_response())
}

/// Sends events until the client goes.
async fn follow(
    known: Vec<Arc<EventInfo>>,
    mut live: broadcast::Receiver<Arc<EventInfo>>,
    out: mpsc::Sender<Bytes>,
) {
    let mut next = None;
    for event in known {
        if out.send(sse(&event, &mut next)).await.is_err() {
            return;
        }
    }
    loop {
        let chunk = tokio::select! {
            event = live.recv() => match event {
                Ok(event) => sse(&event, &mut next),
                // The gap in the numbers tells how many.
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            },
            () = tokio::time::sleep(HEARTBEAT) => Bytes::from_static(b": alive\n\n"),
            () = out.closed() => return,
        };
        if out.send(chunk).await.is_err() {
            return;
        }
    }
}

fn sse(event: &EventInfo, next: &mut Option<u64>) -> Bytes {
    let json = serde_json::to_value(event).unwrap_or_default();
    let kind = json.get("type").and_then(|t| t.as_str()).unwrap_or("event").to_owned();
    let lost = next.replace(event.id + 1).and_then(|n| event.id.checked_sub(n)).filter(|n| *n > 0);
    let lost = lost.map_or_else(String::new, |n| format!("event: lost\ndata: {{\"count\":{n}}}\n\n"));
    format!("{lost}id: {}\nevent: {kind}\ndata: {json}\n\n", event.id).into()
}

/// Frames as they pass, as pcapng
///
/// Ends when the client closes the connection. Frames it is too slow for are counted (`epb_dropcount`), and never wait.
#[utoipa::path(get, path = "/v1/capture",
    params(
        ("vm" = Option<String>, Query, description = "Only frames of this link"),
        ("host" = Option<String>, Query, description = "Only frames from or to this address"),
        ("port" = Option<u16>, Query, description = "Only TCP and UDP from or to this port"),
        ("proto" = Option<String>, Query, description = "`tcp`, `udp`, `icmp` or `arp`"),
        ("snaplen" = Option<usize>, Query, description = "Bytes kept of each frame"),
    ),
    responses(
        (status = 200, content_type = "application/x-pcapng", body = Vec<u8>),
        (status = 400, body = Problem), (status = 404, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn capture(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, Fault> {
    let query = Query::parse(query.as_deref(), &["vm", "host", "port", "proto", "snaplen"])?;
    let mut filter = Filter::default();
    for (key, value) in query.pairs() {
        filter.set(key, value).map_err(|e| wrong(e.field, &e.value, e.what))?;
    }
    let place = place(&app)?;
    let (capture, reader) = Capture::new(filter);
    let links = app.ask(|reply| Request::Capture { capture, reply }).await??;
    let (out, body) = mpsc::channel(CHUNKS);
    let requests = app.requests.clone();
    tokio::spawn(async move {
        send_frames(reader, &links, out).await;
        end_captures(&requests).await;
        drop(place);
    });
    Ok(([(header::CONTENT_TYPE, "application/x-pcapng")], Body::new(Chunks(body))).into_response())
}

/// Sends frames until the client goes, or the network ends.
async fn send_frames(mut reader: Reader, links: &[String], out: mpsc::Sender<Bytes>) {
    let mut encoder = Encoder::default();
    let mut chunk = Vec::new();
    encoder.begin(links, &mut chunk);
    let mut frames = Vec::new();
    loop {
        if out.send(std::mem::take(&mut chunk).into()).await.is_err() {
            return;
        }
        tokio::select! {
            more = reader.read(&mut frames, FRAMES) => if !more { return },
            () = tokio::time::sleep(HEARTBEAT) => encoder.statistics(reader.lost_total(), &mut chunk),
            () = out.closed() => return,
        }
        for frame in frames.drain(..) {
            encoder.frame(&frame, &mut chunk);
        }
    }
}

/// Has the taps taken off whose readers have gone.
async fn end_captures(requests: &Requests) {
    while requests.send(Request::EndCaptures).is_err() {
        // Overloaded: the taps cost little, and are taken off later.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
