//! `/v1`: the resources of the network.

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use portway_api::control::{
    DnsStats, FlowInfo, LeaseInfo, LinkInfo, NetworkInfo, PortInfo, PortsRequest, PortsResponse, Problem,
    Stats,
};

use super::problem::{self, Fault};
use super::query::Query;
use super::{App, agents, body, dns, metrics, openapi, stream};
use crate::publish::spec::{PublishSpec, SpecError};
use crate::request::{PublishError, Request};

pub(super) fn routes() -> Router<App> {
    let v1 = Router::new()
        .route("/network", get(network))
        .route("/links", get(links))
        .route("/links/{name}", get(link))
        .route("/ports", get(ports).post(publish).delete(unpublish))
        .route("/leases", get(leases))
        .route("/agents", get(agents::agents))
        .route("/wait", get(agents::wait))
        .route("/dns", get(dns::list).post(dns::add).delete(dns::remove))
        .route("/flows", get(flows))
        .route("/stats", get(stats))
        .route("/metrics", get(metrics))
        .route("/events", get(stream::events))
        .route("/capture", get(stream::capture))
        .route("/explain", get(super::explain::explain))
        .route("/openapi.json", get(openapi::document))
        .fallback(async || StatusCode::NOT_FOUND)
        .layer(middleware::from_fn(problem::everywhere));
    Router::new().nest("/v1", v1)
}

/// What this network is
#[utoipa::path(get, path = "/v1/network", responses((status = 200, body = NetworkInfo)))]
pub(super) async fn network(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<NetworkInfo>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    let mut network = (*app.network).clone();
    network.sandbox = app.sandbox();
    network.dns_upstreams = app.dns.upstreams().iter().map(ToString::to_string).collect();
    Ok(Json(network))
}

/// The links, and the VMs behind them
#[utoipa::path(get, path = "/v1/links", responses((status = 200, body = [LinkInfo])))]
pub(super) async fn links(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<LinkInfo>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    Ok(Json(app.ask(|reply| Request::Links { reply }).await?))
}

/// One link
#[utoipa::path(get, path = "/v1/links/{name}", params(("name" = String, Path, description = "The link's name")),
    responses((status = 200, body = LinkInfo), (status = 404, body = Problem)))]
pub(super) async fn link(
    State(app): State<App>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<LinkInfo>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    let links = app.ask(|reply| Request::Links { reply }).await?;
    let names: Vec<String> = links.iter().map(|l| l.name.clone()).collect();
    links.into_iter().find(|l| l.name == name).map(Json).ok_or_else(|| {
        let detail = format!("no link is called {name:?}; there are {}", names.join(", "));
        Fault::new(StatusCode::NOT_FOUND, "no_link", "no such link", detail)
            .field("name")
            .hint("GET /v1/links lists the names")
    })
}

/// The published ports
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = [PortInfo])))]
pub(super) async fn ports(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<PortInfo>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    Ok(Json(app.ask(|reply| Request::Ports { reply }).await?))
}

/// The DHCP leases
#[utoipa::path(get, path = "/v1/leases", responses((status = 200, body = [LeaseInfo])))]
pub(super) async fn leases(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<LeaseInfo>>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    Ok(Json(app.ask(|reply| Request::Leases { reply }).await?))
}

/// What of a flow has to match.
const FLOW_FILTERS: &[&str] = &["vm", "proto", "direction", "state", "host", "port", "limit"];

/// The flows and NAT bindings, with their counters
#[utoipa::path(get, path = "/v1/flows",
    params(
        ("vm" = Option<String>, Query, description = "Only flows of the guest behind this link"),
        ("proto" = Option<String>, Query, description = "`tcp` or `udp`"),
        ("direction" = Option<String>, Query, description = "`outbound` or `published`"),
        ("state" = Option<String>, Query, description = "`dialing`, `open`, `closing` or `bound`"),
        ("host" = Option<String>, Query, description = "Only flows with this address at either end"),
        ("port" = Option<u16>, Query, description = "Only flows with this port at either end"),
        ("limit" = Option<usize>, Query, description = "At most this many, those with most bytes first"),
    ),
    responses((status = 200, body = [FlowInfo]), (status = 400, body = Problem)))]
pub(super) async fn flows(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<FlowInfo>>, Fault> {
    let query = Query::parse(query.as_deref(), FLOW_FILTERS)?;
    let proto = query.one_of("proto", &["tcp", "udp"])?;
    let direction = query.one_of("direction", &["outbound", "published"])?;
    let state = query.one_of("state", &["dialing", "open", "closing", "bound"])?;
    let host: Option<std::net::IpAddr> = query.get("host", "an IP address")?;
    let port: Option<u16> = query.get("port", "a port from 0 to 65535")?;
    let limit: Option<usize> = query.get("limit", "a number")?;
    // One listing at a time: it is the largest thing the data thread is ever asked for.
    let turn = app.flow_listings.lock().await;
    let reports = app.ask(|reply| Request::Flows { reply }).await?;
    drop(turn);
    if let Some(vm) = query.text("vm")
        && !reports.links.iter().any(|(_, name)| name == vm)
    {
        let detail = format!("no link is called {vm:?}");
        return Err(Fault::new(StatusCode::NOT_FOUND, "no_link", "no flows", detail)
            .field("vm")
            .hint("`portway links` or GET /v1/links lists the names"));
    }
    let ends = |f: &FlowInfo| [&f.guest, &f.remote].map(|e| e.parse::<std::net::SocketAddr>().ok());
    let mut flows: Vec<FlowInfo> = reports
        .infos()
        .filter(|f| query.text("vm").is_none_or(|vm| f.vm == vm))
        .filter(|f| proto.is_none_or(|p| f.proto.to_string() == p))
        .filter(|f| direction.is_none_or(|d| f.direction == d) && state.is_none_or(|s| f.state == s))
        .filter(|f| host.is_none_or(|h| ends(f).iter().flatten().any(|e| e.ip() == h)))
        .filter(|f| port.is_none_or(|p| ends(f).iter().flatten().any(|e| e.port() == p)))
        .collect();
    if let Some(limit) = limit {
        flows.sort_by_key(|f| std::cmp::Reverse(f.bytes_to_host.saturating_add(f.bytes_to_guest)));
        flows.truncate(limit);
    }
    Ok(Json(flows))
}

/// The counters of the process
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = Stats)))]
pub(super) async fn stats(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Json<Stats>, Fault> {
    Query::parse(query.as_deref(), &[])?;
    Ok(Json(app.stats().await?))
}

/// The counters as Prometheus reads them
#[utoipa::path(get, path = "/v1/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, Fault> {
    Query::parse(query.as_deref(), &[])?;
    let text = metrics::text(&app.network, &app.stats().await?);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

impl App {
    /// The data thread's counters, and those of this one.
    pub(super) async fn stats(&self) -> Result<Stats, Fault> {
        let mut stats = self.ask(|reply| Request::Stats { reply }).await?;
        let dns = self.dns.stats();
        stats.dns = DnsStats {
            queries: dns.queries,
            from_zones: dns.from_zones,
            from_hosts: dns.from_hosts,
            from_cache: dns.from_cache,
            relayed: dns.relayed,
            failed: dns.failed,
            rejected: dns.rejected,
            over_limit: dns.over_limit,
            rebinding: dns.rebinding,
            truncated: dns.truncated,
            in_flight: dns.in_flight as u64,
            cached: dns.cached as u64,
        };
        stats.sandbox = self.sandbox();
        stats.panics = crate::last_net::panics();
        stats.api_clients = super::CONNECTIONS.saturating_sub(self.places.available_permits()) as u64;
        Ok(stats)
    }
}

/// The specs of a body; a bad one refuses the whole request, and nothing is changed.
fn specs(body: &Bytes) -> Result<Vec<PublishSpec>, Fault> {
    let request: PortsRequest = body::read(body, "{\"specs\": [\"2222:22/tcp\"]}")?;
    if request.specs.is_empty() {
        let detail = "specs: one at least is needed, such as \"2222:22/tcp\"";
        return Err(Fault::bad("bad_spec", detail).field("specs"));
    }
    let parse = |(n, s): (usize, &String)| {
        s.parse().map_err(|e: SpecError| Fault::bad("bad_spec", e.to_string()).field(format!("specs[{n}]")))
    };
    request.specs.iter().enumerate().map(parse).collect()
}

/// Publish ports; the good ones stay when others fail
#[utoipa::path(post, path = "/v1/ports", request_body = PortsRequest,
    responses((status = 200, body = PortsResponse), (status = 400, body = Problem),
        (status = 409, body = PortsResponse, description = "Some were not published: see `problems`")))]
pub(super) async fn publish(
    State(app): State<App>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<Response, Fault> {
    change_ports(&app, query.as_deref(), &body, Change::Publish).await
}

/// Stop publishing ports; open connections stay
#[utoipa::path(delete, path = "/v1/ports", request_body = PortsRequest,
    responses((status = 200, body = PortsResponse), (status = 400, body = Problem),
        (status = 409, body = PortsResponse, description = "Some were not published: see `problems`")))]
pub(super) async fn unpublish(
    State(app): State<App>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<Response, Fault> {
    change_ports(&app, query.as_deref(), &body, Change::Unpublish).await
}

/// What is done with ports.
#[derive(Debug, Clone, Copy)]
enum Change {
    Publish,
    Unpublish,
}

/// Does it with every spec of a body, and tells what came of each.
async fn change_ports(
    app: &App,
    query: Option<&str>,
    body: &Bytes,
    change: Change,
) -> Result<Response, Fault> {
    Query::parse(query, &[])?;
    let mut done = PortsResponse::default();
    for (n, spec) in specs(body)?.into_iter().enumerate() {
        let results: Vec<Result<PortInfo, PublishError>> = match change {
            Change::Publish => app.publish(spec).await?,
            Change::Unpublish => match app.unpublish(spec).await? {
                Ok(gone) => gone.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            },
        };
        for result in results {
            match result {
                Ok(port) => done.published.push(port),
                Err(error) => {
                    done.errors.push(error.to_string());
                    done.problems.push(Fault::from(&error).field(format!("specs[{n}]")).into_problem());
                }
            }
        }
    }
    let status = if done.errors.is_empty() { StatusCode::OK } else { StatusCode::CONFLICT };
    Ok((status, Json(done)).into_response())
}
