//! Errors of `/v1`: RFC 9457 (`application/problem+json`) with a stable code, the field and a hint.

use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use portway_api::control::Problem;

use crate::request::{CaptureError, PublishError};

const CONTENT: HeaderValue = HeaderValue::from_static("application/problem+json");

/// An error on its way to the client.
#[derive(Debug)]
pub(super) struct Fault(Box<Problem>);

impl Fault {
    /// An error with a stable `code`; `detail` says what is wrong.
    pub(super) fn new(status: StatusCode, code: &str, title: &str, detail: impl Into<String>) -> Self {
        Self(Box::new(Problem {
            kind: "about:blank".into(),
            code: code.into(),
            status: status.as_u16(),
            title: title.into(),
            detail: detail.into(),
            field: None,
            hint: None,
        }))
    }

    /// What the client sent cannot be used.
    pub(super) fn bad(code: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, "the request cannot be used", detail)
    }

    /// The data thread is overloaded or ending.
    pub(super) fn unavailable() -> Self {
        let detail = "the network is overloaded or ending";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "no answer from the network", detail)
            .hint("try again")
    }

    /// Names what is wrong.
    pub(super) fn field(mut self, field: impl Into<String>) -> Self {
        self.0.field = Some(field.into());
        self
    }

    /// Says in general what is wrong.
    pub(super) fn title(mut self, title: &str) -> Self {
        self.0.title = title.into();
        self
    }

    /// Says what helps.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// The problem, for an answer that holds several.
    pub(super) fn into_problem(self) -> Problem {
        *self.0
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&self.0).unwrap_or_else(|_| "{}".into());
        (status, [(header::CONTENT_TYPE, CONTENT)], body).into_response()
    }
}

impl From<&PublishError> for Fault {
    fn from(error: &PublishError) -> Self {
        let (status, code, hint) = match error {
            PublishError::AlreadyPublished(_) => {
                (StatusCode::CONFLICT, "already_published", "unpublish it first or take another host port")
            }
            PublishError::NotPublished(_) => {
                (StatusCode::NOT_FOUND, "not_published", "GET /v1/ports lists what is published")
            }
            PublishError::Bind { .. } => {
                (StatusCode::CONFLICT, "cannot_listen", "take another host port, or 0 for a free one")
            }
            PublishError::NoGuest(_) => {
                (StatusCode::NOT_FOUND, "no_guest", "GET /v1/links lists the names; an address is good too")
            }
            PublishError::NotAGuest(_) => {
                (StatusCode::CONFLICT, "not_a_guest", "GET /v1/network says which networks are the guests'")
            }
            PublishError::NoAgent(_) => {
                (StatusCode::CONFLICT, "no_agent", "both are set when the network starts")
            }
            PublishError::Policy(_) => {
                (StatusCode::FORBIDDEN, "not_allowed", "--guest-binds says where guests may publish")
            }
            PublishError::Outside(_) => (
                StatusCode::FORBIDDEN,
                "outside",
                "--allow-path lets sockets be made in a directory; it is set when the network starts",
            ),
            PublishError::Limit(_) => {
                (StatusCode::CONFLICT, "limit", "unpublish ports that are not needed any more")
            }
        };
        Self::new(status, code, "a port was not changed", error.to_string()).hint(hint)
    }
}

impl From<CaptureError> for Fault {
    fn from(error: CaptureError) -> Self {
        let title = "no capture";
        match error {
            CaptureError::Limit => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_captures", title, error.to_string())
            }
            CaptureError::NoLink(_) => {
                Self::new(StatusCode::NOT_FOUND, "no_link", title, error.to_string()).field("vm")
            }
        }
        .hint(match error {
            CaptureError::Limit => "end a capture first",
            CaptureError::NoLink(_) => "`portway links` or GET /v1/links lists the names",
        })
    }
}

/// Makes problems of the errors that the framework answers by itself.
pub(super) async fn everywhere(request: HttpRequest, next: Next) -> Response {
    // Within the nest the path has no `/v1` any more.
    let path = format!("/v1{}", request.uri().path());
    let method = request.method().clone();
    let answer = next.run(request).await;
    let status = answer.status();
    let ours =
        answer.headers().get(header::CONTENT_TYPE).is_some_and(|t| *t == CONTENT || *t == "application/json");
    if !(status.is_client_error() || status.is_server_error()) || ours {
        return answer;
    }
    let fault = match status {
        StatusCode::NOT_FOUND => {
            Fault::new(status, "not_found", "no such resource", format!("{path} is not a resource"))
                .hint("GET /v1/openapi.json lists them")
        }
        StatusCode::METHOD_NOT_ALLOWED => Fault::new(
            status,
            "method_not_allowed",
            "the resource does not take this method",
            format!("{path} does not take {method}"),
        )
        .hint("the header Allow lists what it takes"),
        StatusCode::PAYLOAD_TOO_LARGE => Fault::new(
            status,
            "too_large",
            "the body is too large",
            format!("a body has at most {} bytes", super::BODY),
        )
        .hint("send fewer specs at a time"),
        other => Fault::new(other, "bad_request", "the request cannot be used", status.to_string()),
    };
    let allow = answer.headers().get(header::ALLOW).cloned();
    let mut response = fault.into_response();
    if let Some(allow) = allow {
        response.headers_mut().insert(header::ALLOW, allow);
    }
    response.map(Body::new)
}
