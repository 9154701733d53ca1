//! What the tasks of one guest share: the session there is, the streams that are awaited, and the limits on both.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portway_api::agent::{DialError, Target, ToGuest, encode};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// Streams of one guest at once, awaited ones and clients of its unix sockets among them; at it a client is reset.
pub(crate) const STREAMS: usize = 2048;
/// How long an agent may take to bring a stream or say why not.
const PATIENCE: Duration = Duration::from_secs(12);
/// How long a client that came while there was no session waits for one.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// Messages for an agent that may wait; an agent that does not read them loses its session.
pub(super) const OUTGOING: usize = 1024;

/// The session of the moment.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) boot_id: String,
    /// What a stream of the session's clients must know.
    pub(super) key: u64,
    out: mpsc::Sender<Vec<u8>>,
    /// Rung when the session must end.
    pub(super) end: Notify,
}

impl Session {
    pub(super) fn new(number: u64, boot_id: String, key: u64, out: mpsc::Sender<Vec<u8>>) -> Self {
        Self { number, boot_id, key, out, end: Notify::new() }
    }

    /// Says something to the agent.
    pub(super) fn tell(&self, message: &ToGuest) {
        let fault = match encode(message) {
            Ok(bytes) => match self.out.try_send(bytes) {
                Ok(()) => return,
                Err(_) => "the agent does not read".to_owned(),
            },
            Err(error) => error.to_string(),
        };
        tracing::warn!(fault, "an agent's session ends");
        self.end.notify_one();
    }
}

/// A stream that was asked for.
struct Awaited {
    session: u64,
    key: u64,
    arrived: oneshot::Sender<Result<UnixStream, DialError>>,
}

/// Why a client cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CarryError {
    #[error("there is no agent")]
    NoAgent,
    #[error("the agent could not connect: {0:?}")]
    Dial(DialError),
    #[error("the agent does not bring the stream")]
    Silent,
    #[error("{STREAMS} streams are open already")]
    Limit,
}

/// See the module.
pub(super) struct Shared {
    pub(super) session: watch::Sender<Option<Arc<Session>>>,
    awaited: Mutex<HashMap<u64, Awaited>>,
    /// Rung when the agent says that a stream is reset.
    carried: Mutex<HashMap<u64, Arc<Notify>>>,
    places: Arc<tokio::sync::Semaphore>,
    next: AtomicU64,
}

/// A stream's name while it is carried; forgotten with the value.
pub(super) struct Named {
    pub(super) stream: u64,
    pub(super) reset: Arc<Notify>,
    pub(super) session: Arc<Session>,
    shared: Arc<Shared>,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Drop for Named {
    fn drop(&mut self) {
        lock(&self.shared.carried).remove(&self.stream);
        lock(&self.shared.awaited).remove(&self.stream);
    }
}

/// Nobody panics while holding one of these.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number nobody can guess.
pub(super) fn secret() -> u64 {
    // Without randomness a number of the guest's own would do as well: what it guards is the guest's.
    getrandom::u64().unwrap_or_else(|_| std::process::id().into())
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            session: watch::Sender::new(None),
            awaited: Mutex::default(),
            carried: Mutex::default(),
            places: Arc::new(tokio::sync::Semaphore::new(STREAMS)),
            next: AtomicU64::new(1),
        })
    }

    /// The session, at once or within [`GRACE`].
    async fn some_session(&self) -> Option<Arc<Session>> {
        let mut sessions = self.session.subscribe();
        let found = tokio::time::timeout(GRACE, sessions.wait_for(Option::is_some)).await;
        found.ok()?.ok()?.clone()
    }

    /// Streams that are open or awaited.
    pub(super) fn streams(&self) -> usize {
        STREAMS - self.places.available_permits()
    }

    /// Streams that were asked for and have not come.
    pub(super) fn awaited(&self) -> usize {
        lock(&self.awaited).len()
    }

    /// A place for a stream, for one that the guest brings by itself.
    pub(super) fn place(&self) -> Option<tokio::sync::OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// Has the agent connect to `target`, and waits for the stream it brings.
    pub(super) async fn open(self: &Arc<Self>, target: &Target) -> Result<(UnixStream, Named), CarryError> {
        let place = self.place().ok_or(CarryError::Limit)?;
        let session = self.some_session().await.ok_or(CarryError::NoAgent)?;
        let stream = self.next.fetch_add(1, Ordering::Relaxed);
        let key = secret();
        let (arrived, arrival) = oneshot::channel();
        let reset = Arc::new(Notify::new());
        lock(&self.carried).insert(stream, Arc::clone(&reset));
        lock(&self.awaited).insert(stream, Awaited { session: session.number, key, arrived });
        let shared = Arc::clone(self);
        let named = Named { stream, reset, session: Arc::clone(&session), shared, _place: place };
        session.tell(&ToGuest::Open { stream, key, target: target.clone() });
        match tokio::time::timeout(PATIENCE, arrival).await {
            Ok(Ok(Ok(far))) => Ok((far, named)),
            Ok(Ok(Err(error))) => Err(CarryError::Dial(error)),
            // The session ended.
            Ok(Err(_)) => Err(CarryError::NoAgent),
            Err(_) => Err(CarryError::Silent),
        }
    }

    /// A stream has come; false when nobody awaits it.
    pub(super) fn arrive(&self, stream: u64, key: u64, far: UnixStream) -> bool {
        let mut awaited = lock(&self.awaited);
        if awaited.get(&stream).is_none_or(|a| a.key != key) {
            return false;
        }
        awaited.remove(&stream).is_some_and(|a| a.arrived.send(Ok(far)).is_ok())
    }

    /// A stream will not come.
    pub(super) fn fail(&self, stream: u64, error: DialError) {
        if let Some(awaited) = lock(&self.awaited).remove(&stream) {
            // Whoever waited may have gone.
            let _ = awaited.arrived.send(Err(error));
        }
    }

    /// A stream's end in the guest was reset.
    pub(super) fn reset(&self, stream: u64) {
        if let Some(reset) = lock(&self.carried).get(&stream) {
            reset.notify_one();
        }
    }

    /// A session is over: so is everything it carried.
    pub(super) fn end_session(&self, number: u64) {
        lock(&self.awaited).retain(|_, a| a.session != number);
        for reset in lock(&self.carried).values() {
            reset.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn beyond_the_limit_of_streams_a_client_is_told_at_once_and_a_place_that_is_free_is_used_again() {
        let shared = Shared::new();
        let target = Target::Unix { path: "/run/x".into() };
        let mut places: Vec<_> = (0..STREAMS).map(|n| shared.place().ok_or(n).unwrap()).collect();
        assert!(shared.place().is_none() && shared.streams() == STREAMS);
        assert_eq!(shared.open(&target).await.err(), Some(CarryError::Limit));
        places.pop();
        assert_eq!(shared.open(&target).await.err(), Some(CarryError::NoAgent), "there was a place");
        assert_eq!(shared.streams(), STREAMS - 1);
    }
}
