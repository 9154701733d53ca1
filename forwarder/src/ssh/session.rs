//! One SSH connection to a guest, made when it is needed and made anew when it breaks.
//!
//! A guest that boots has no sshd yet, and then perhaps not the key: everything that fails is tried again, at most [`DIALS`] times,
//! [`FIRST_WAIT`] apart at first and then longer, up to [`LONGEST_WAIT`]. A channel is tried [`CHANNELS`] times: its socket may come a
//! little after its sshd, and a connection that is dead is found dead by the first who wants something of it.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use russh::ChannelStream;
use russh::client::{self, Handle, Msg};
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate};

use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::Login;
use crate::request::{Request, Requests, TunnelEnd};

/// Attempts to connect.
const DIALS: u32 = 60;
/// Between the first two.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Between two at the most.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How long one attempt may take, from the SYN to the login.
const LOGIN_PATIENCE: Duration = Duration::from_secs(10);
/// Attempts to open a channel.
const CHANNELS: u32 = 3;
/// Between two of them.
const CHANNEL_WAIT: Duration = Duration::from_millis(200);
/// How long one may take.
const CHANNEL_PATIENCE: Duration = Duration::from_secs(5);
/// A guest that is silent for so long is asked whether it is there; three times in vain, and the connection is closed.
const ALIVE: Duration = Duration::from_secs(30);

/// Why a client cannot be connected.
#[derive(Debug, thiserror::Error)]
pub(super) enum SshError {
    /// SSH's own faults; among them a socket of the guest's that nobody listens on.
    #[error("{0}")]
    Ssh(#[from] russh::Error),
    /// The key was refused.
    #[error("{user} at {server} was not let in with the key given")]
    Login { user: String, server: SocketAddr },
    /// The host key is not a known one.
    #[error("the key of {0} is not among the user's known_hosts, and secure=true was asked for")]
    Unknown(SocketAddr),
    /// Silence.
    #[error("{0} did not answer in time")]
    Silent(SocketAddr),
    /// No descriptors, or the data thread does not take requests.
    #[error("{0}")]
    Host(#[from] std::io::Error),
}

/// The connection.
pub(super) struct Session {
    login: Login,
    requests: Requests,
    open: Mutex<Option<Arc<Handle<Server>>>>,
}

impl Session {
    /// Nothing is connected yet.
    pub(super) fn new(login: Login, requests: Requests) -> Self {
        Self { login, requests, open: Mutex::default() }
    }

    /// A channel to the guest's unix socket at `path`.
    ///
    /// # Errors
    /// The last one, when every attempt was in vain.
    pub(super) async fn channel(&self, path: &str) -> Result<ChannelStream<Msg>, SshError> {
        let mut last = SshError::Silent(self.login.server);
        for attempt in 0..CHANNELS {
            if attempt > 0 {
                tokio::time::sleep(CHANNEL_WAIT).await;
            }
            let handle = self.connected().await?;
            match timeout(CHANNEL_PATIENCE, handle.channel_open_direct_streamlocal(path)).await {
                Ok(Ok(channel)) => return Ok(channel.into_stream()),
                // sshd is well: it is the socket that is not there, or not allowed.
                Ok(Err(error @ russh::Error::ChannelOpenFailure(_))) => last = error.into(),
                Ok(Err(error)) => {
                    self.forget(&handle).await;
                    last = error.into();
                }
                Err(_) => self.forget(&handle).await,
            }
        }
        Err(last)
    }

    /// The connection, made if there is none. Those who wait for the same one wait here.
    async fn connected(&self) -> Result<Arc<Handle<Server>>, SshError> {
        let mut open = self.open.lock().await;
        if let Some(handle) = open.as_ref().filter(|h| !h.is_closed()) {
            return Ok(Arc::clone(handle));
        }
        let mut wait = FIRST_WAIT;
        let mut attempts = 1;
        let handle = loop {
            let tried = timeout(LOGIN_PATIENCE, self.log_in()).await;
            match tried.unwrap_or(Err(SshError::Silent(self.login.server))) {
                Ok(handle) => break Arc::new(handle),
                // Trying again does not make a host known.
                Err(error) if attempts >= DIALS || matches!(error, SshError::Unknown(_)) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::debug!(%error, server = %self.login.server, attempts, "waiting for the guest's sshd");
                }
            }
            attempts += 1;
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        };
        tracing::info!(server = %self.login.server, user = self.login.user, attempts, "logged in to the guest");
        *open = Some(Arc::clone(&handle));
        Ok(handle)
    }

    /// Drops the connection if it is still `dead`.
    async fn forget(&self, dead: &Arc<Handle<Server>>) {
        let mut open = self.open.lock().await;
        if open.as_ref().is_some_and(|handle| Arc::ptr_eq(handle, dead)) {
            *open = None;
        }
    }

    async fn log_in(&self) -> Result<Handle<Server>, SshError> {
        let login = &self.login;
        let (ours, guests) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        guests.set_nonblocking(true)?;
        let tunnel = Request::Tunnel { to: login.server, stream: TunnelEnd::Unix(guests) };
        self.requests.send(tunnel).map_err(std::io::Error::other)?;
        let config = client::Config { keepalive_interval: Some(ALIVE), ..client::Config::default() };
        let server = Server { address: login.server, known: login.known_host };
        let stream = UnixStream::from_std(ours)?;
        let mut handle = client::connect_stream(Arc::new(config), stream, server).await?;
        // The hash is for RSA keys alone.
        let key = PrivateKeyWithHashAlg::new(Arc::clone(&login.key.0), None);
        let answer = handle.authenticate_publickey(login.user.clone(), key).await?;
        if !answer.success() {
            return Err(SshError::Login { user: login.user.clone(), server: login.server });
        }
        Ok(handle)
    }
}

/// What we make of the server.
struct Server {
    address: SocketAddr,
    known: bool,
}

impl client::Handler for Server {
    type Error = SshError;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, SshError> {
        if !self.known {
            return Ok(true);
        }
        let PublicKeyOrCertificate::PublicKey { key, .. } = key else {
            return Err(SshError::Unknown(self.address));
        };
        let host = self.address.ip().to_string();
        match russh::keys::check_known_hosts(&host, self.address.port(), key) {
            Ok(true) => Ok(true),
            Ok(false) | Err(_) => Err(SshError::Unknown(self.address)),
        }
    }
}
