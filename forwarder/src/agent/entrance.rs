//! The host's listeners of published ports that go through the agent.
//!
//! ```text
//! client ─► listener ─► Shared::open(target) ─► stream from the agent ─► carry
//! ```
//! A client that comes while the agent is away waits for it a moment; one that cannot be carried is reset, as a guest
//! that refuses resets it. UDP is in `udp`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use portway_api::agent::{Target, ToGuest};
use tokio::task::JoinHandle;

use super::carry::{Ended, Stream, carry};
use super::shared::Shared;
use super::udp;
use crate::publish::spec::HostEnd;
use crate::publish::{self, Listener};
use crate::request::PublishError;
use portway_api::control::Protocol;

/// A published port.
#[derive(Debug)]
pub(super) struct Entrance {
    pub(super) bound: Vec<String>,
    pub(super) host_port: u16,
    pub(super) accepted: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Entrance {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// What is bound, before there is a runtime to serve it.
#[derive(Debug)]
pub(super) struct BoundPort {
    listeners: Vec<Listener>,
    pub(super) bound: Vec<String>,
    pub(super) host_port: u16,
}

impl BoundPort {
    /// Binds every address of one port.
    ///
    /// # Errors
    /// See [`publish::bind`].
    pub(super) fn new(
        host: &HostEnd,
        port: u16,
        proto: Protocol,
        keep_alive: Option<std::time::Duration>,
    ) -> Result<Self, PublishError> {
        let (listeners, bound, host_port) = publish::bind(host, port, proto, keep_alive)?;
        Ok(Self { listeners, bound, host_port })
    }

    /// Begins to serve; needs the runtime.
    ///
    /// # Errors
    /// When the sockets cannot be watched.
    pub(super) fn serve(self, target: &Target, shared: &Arc<Shared>) -> std::io::Result<Entrance> {
        let accepted = Arc::new(AtomicU64::new(0));
        let mut entrance = Entrance {
            bound: self.bound,
            host_port: self.host_port,
            accepted: Arc::clone(&accepted),
            tasks: Vec::new(),
        };
        for listener in self.listeners {
            let (target, shared, accepted) = (target.clone(), Arc::clone(shared), Arc::clone(&accepted));
            let fd = listener.fd()?;
            // The listener itself goes along: a unix socket's file is removed with it.
            let task = match &listener {
                Listener::Tcp(_) => {
                    let socket = tokio::net::TcpListener::from_std(fd.into())?;
                    tokio::spawn(async move {
                        let _kept = listener;
                        loop {
                            let client = socket.accept().await.map(|(client, _)| {
                                let _ = client.set_nodelay(true);
                                Stream::Tcp(client)
                            });
                            welcome(client, &target, &shared, &accepted).await;
                        }
                    })
                }
                Listener::Unix(..) => {
                    let socket = tokio::net::UnixListener::from_std(fd.into())?;
                    tokio::spawn(async move {
                        let _kept = listener;
                        loop {
                            let client = socket.accept().await.map(|(client, _)| Stream::Unix(client));
                            welcome(client, &target, &shared, &accepted).await;
                        }
                    })
                }
                Listener::Udp(..) => {
                    let socket = tokio::net::UdpSocket::from_std(fd.into())?;
                    tokio::spawn(async move {
                        let _kept = listener;
                        udp::serve(socket, target, shared, accepted).await;
                    })
                }
            };
            entrance.tasks.push(task);
        }
        Ok(entrance)
    }
}

impl Entrance {
    /// Closes the listeners; comes back when they are closed, so that their port can be bound again.
    pub(super) async fn close(mut self) {
        for task in std::mem::take(&mut self.tasks) {
            task.abort();
            // Aborted, or ended: either is closed.
            let _ = task.await;
        }
    }
}

async fn welcome(
    client: std::io::Result<Stream>,
    target: &Target,
    shared: &Arc<Shared>,
    accepted: &AtomicU64,
) {
    match client {
        Ok(client) => {
            accepted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(serve(client, target.clone(), Arc::clone(shared)));
        }
        Err(error) => {
            tracing::warn!(%error, "cannot accept at a published port, trying again");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
}

/// One client.
async fn serve(near: Stream, target: Target, shared: Arc<Shared>) {
    let (far, named) = match shared.open(&target).await {
        Ok(opened) => opened,
        Err(error) => {
            tracing::debug!(%error, %target, "a client is reset");
            return near.reset();
        }
    };
    let far = Stream::Unix(far);
    let ended = tokio::select! {
        ended = carry(&near, &far) => ended,
        () = named.reset.notified() => Ended::FarReset,
    };
    match ended {
        Ended::Done => {}
        Ended::NearReset => named.session.tell(&ToGuest::Reset { stream: named.stream }),
        Ended::FarReset => near.reset(),
    }
}
