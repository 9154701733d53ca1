//! The client of the control API, for the CLI and for tests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Collected, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use portway_api::control::Problem;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// The largest answer that is read, in bytes: a listing of 100 000 flows.
const LARGEST: usize = 64 << 20;

/// Why the network did not answer as asked; one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No sidecar there.
    #[error(
        "no network answers at {path}: start one with `portway serve` or `portway run`, or name it with --network or --api ({source})"
    )]
    Absent {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// It answered with an error.
    #[error("{0}")]
    Refused(String),
    /// It did not answer properly.
    #[error("the network at {0} did not answer properly: {1}")]
    Broken(PathBuf, String),
}

/// One sidecar.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// The sidecar whose control socket is `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Fetches a resource.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, ClientError> {
        self.call(Method::GET, route, Vec::new())
    }

    /// Follows a resource that does not end: hands every piece of it to `take`, until that fails or the network ends.
    ///
    /// # Errors
    /// See [`ClientError`]; what `take` says is `Ok(Err(_))`.
    pub fn follow<E>(
        &self,
        route: &str,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Result<(), E>, ClientError> {
        let broken = |text: String| ClientError::Broken(self.path.clone(), text);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|e| broken(e.to_string()))?.block_on(async {
            let asked = self.request(Method::GET, route, Vec::new());
            let asked = tokio::time::timeout(PATIENCE, asked).await;
            let response = asked.map_err(|_| broken("no answer in time".into()))??;
            if !response.status().is_success() {
                return Err(self.refused(response).await?);
            }
            let mut body = response.into_body();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| broken(e.to_string()))?;
                if let Err(error) = frame.data_ref().map_or(Ok(()), |d| take(d)) {
                    return Ok(Err(error));
                }
            }
            Ok(Ok(()))
        })
    }

    /// Sends `body` to a resource. An answer of 409 is parsed like one of 200: it says what was done and what not.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        route: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body =
            serde_json::to_vec(body).map_err(|e| ClientError::Broken(self.path.clone(), e.to_string()))?;
        self.call(method, route, body)
    }

    /// Fetches a resource as it is.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn text(&self, route: &str) -> Result<String, ClientError> {
        let mut all = Vec::new();
        let taken = self.follow(route, |bytes| {
            all.extend_from_slice(bytes);
            if all.len() > LARGEST { Err(()) } else { Ok(()) }
        })?;
        let broken = |text: &str| ClientError::Broken(self.path.clone(), text.into());
        taken.map_err(|()| broken("the answer has no end"))?;
        String::from_utf8(all).map_err(|_| broken("the answer is no text"))
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        route: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let broken = |text: String| ClientError::Broken(self.path.clone(), text);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| broken(e.to_string()))?;
        let talk = async {
            let response = self.request(method, route, body).await?;
            if response.status().is_success() || response.status() == StatusCode::CONFLICT {
                let conflict = response.status() == StatusCode::CONFLICT;
                let body = self.body(response).await?;
                return match serde_json::from_slice(&body) {
                    // A 409 tells what was done in spite of it, where anything was; else it is a problem like any other.
                    Err(_) if conflict => Err(refusal(&body)),
                    parsed => parsed.map_err(|e| broken(e.to_string())),
                };
            }
            Err(self.refused(response).await?)
        };
        runtime
            .block_on(async { tokio::time::timeout(PATIENCE, talk).await })
            .map_err(|_| broken("no answer in time".into()))?
    }

    async fn request(
        &self,
        method: Method,
        route: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let broken = |text: String| ClientError::Broken(self.path.clone(), text);
        let absent = |source| ClientError::Absent { path: self.path.clone(), source };
        let stream = tokio::net::UnixStream::connect(&self.path).await.map_err(absent)?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|e| broken(e.to_string()))?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(route).header("host", "portway");
        let request = request.header("content-type", "application/json").body(Full::new(Bytes::from(body)));
        let request = request.map_err(|e| broken(e.to_string()))?;
        sender.send_request(request).await.map_err(|e| broken(e.to_string()))
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), LARGEST).collect().await;
        body.map(Collected::to_bytes).map_err(|e| ClientError::Broken(self.path.clone(), e.to_string()))
    }

    /// The error an answer tells of.
    async fn refused(&self, response: Response<Incoming>) -> Result<ClientError, ClientError> {
        Ok(refusal(&self.body(response).await?))
    }
}

/// What an answer that is an error says, as one line.
fn refusal(body: &[u8]) -> ClientError {
    ClientError::Refused(match serde_json::from_slice::<Problem>(body) {
        Ok(Problem { detail, hint: Some(hint), .. }) => format!("{detail}: {hint}"),
        Ok(problem) => problem.detail,
        Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
    })
}
