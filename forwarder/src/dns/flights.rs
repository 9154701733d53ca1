//! Questions under way: clients that ask the same at one time share one query to the resolvers.
//!
//! Beside the work it saves, this is what keeps a forger's chances small: many queries of one question would give him as
//! many ids to hit (RFC 5452 §5). A query goes on as long as one client waits for it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::cache::Key;
use super::reply::Reply;

/// What came of a question: nothing, or an answer.
type Outcome = Option<Arc<Reply>>;

/// The questions under way; no more than clients that wait.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Key, watch::Sender<Option<Outcome>>>>);

impl Flights {
    /// The answer to the question of `key`: that of the query under way, or of `ask`, which is run for all who wait.
    pub(super) async fn join(self: &Arc<Self>, key: &Key, ask: impl FnOnce() -> Boxed) -> Outcome {
        let (known, mut landing) = {
            let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match flights.get(key) {
                Some(flight) => (None, flight.subscribe()),
                None => {
                    let (flight, landing) = watch::channel(None);
                    flights.insert(key.clone(), flight.clone());
                    (Some(flight), landing)
                }
            }
        };
        if let Some(flight) = known {
            let (flights, key, ask) = (Arc::clone(self), key.clone(), ask());
            tokio::spawn(async move {
                let mut ask = ask;
                let remove = |nobody_waits: bool| {
                    let mut flights = flights.0.lock().unwrap_or_else(PoisonError::into_inner);
                    // Who joins does so under this lock.
                    let done = !nobody_waits || flight.receiver_count() == 0;
                    if done {
                        flights.remove(&key);
                    }
                    done
                };
                loop {
                    tokio::select! {
                        outcome = &mut ask => {
                            // First out of the table: who comes now asks anew, or finds the answer in the cache.
                            remove(false);
                            flight.send_replace(Some(outcome));
                            return;
                        }
                        () = flight.closed() => if remove(true) { return },
                    }
                }
            });
        }
        match landing.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().flatten(),
            Err(_) => None,
        }
    }

    /// Questions under way now.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// A query that is run by itself.
pub(super) type Boxed = std::pin::Pin<Box<dyn Future<Output = Outcome> + Send>>;
