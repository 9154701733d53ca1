//! The OpenAPI document, made from the handlers.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use super::{agents, dns, explain, stream, v1};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Portway's control API",
        description = "HTTP/1.1 on the network's unix socket. Errors are application/problem+json (RFC 9457) with a stable \
                       `code`, the `field` that is wrong and a `hint`. Fields are only ever added to.",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(
        v1::network,
        v1::links,
        v1::link,
        v1::ports,
        v1::publish,
        v1::unpublish,
        v1::leases,
        agents::agents,
        agents::wait,
        dns::list,
        dns::add,
        dns::remove,
        v1::flows,
        v1::stats,
        v1::metrics,
        stream::events,
        stream::capture,
        explain::explain
    )
)]
struct Api;

/// The document, as it is served and checked in under `docs/reference`.
#[must_use]
pub fn text() -> String {
    let mut text = Api::openapi().to_pretty_json().unwrap_or_else(|_| "{}".into());
    text.push('\n');
    text
}

pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_the_one_that_is_checked_in() {
        crate::drift::check("docs/reference/openapi.json", &text());
    }

    #[test]
    fn it_is_openapi_3_1() {
        let document: serde_json::Value = serde_json::from_str(&text()).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
