//! Which resolvers answer, and what they cannot do.
//!
//! A server that was silent for its time, or could not be reached, is left out of the way of queries: for 2 s at first, then
//! twice as long each time, up to a minute. When that is over, one query is sent to it beside those that do not wait for
//! it; if it answers it has its place again. With all of them silent, all are asked.
//!
//! Two more things are remembered for ten minutes: that a server does not know EDNS (RFC 6891 §6.2.2), and that it does
//! not give names back in the letters they were sent in.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::server::Server;

/// The first time a silent server is left alone.
pub(super) const FIRST_REST: Duration = Duration::from_secs(2);
/// The longest.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// How long an inability is remembered.
const MEMORY: Duration = Duration::from_secs(600);

/// What is known of the servers; of those that are configured, so it does not grow.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<HashMap<Server, Known>>);

#[derive(Debug, Default)]
struct Known {
    strikes: u32,
    rests_until: Option<Instant>,
    without_edns_until: Option<Instant>,
    changes_letters_until: Option<Instant>,
}

/// In which order servers are to be asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// One after the other: those that answer, as they were configured, then the others.
    pub(super) servers: VecDeque<Server>,
    /// How many of them answer.
    pub(super) well: usize,
    /// To be asked beside the first, to see whether they answer again.
    pub(super) probes: Vec<Server>,
}

impl Health {
    /// The order for a query at `now`.
    pub(super) fn order(&self, servers: &[Server], now: Instant) -> Order {
        let mut known = self.lock();
        let rests = |known: &HashMap<Server, Known>, s: &Server| known.get(s).and_then(|k| k.rests_until);
        let (mut resting, well): (Vec<Server>, Vec<Server>) =
            servers.iter().cloned().partition(|s| rests(&known, s).is_some());
        resting.sort_by_key(|s| rests(&known, s));
        let mut probes = Vec::new();
        if !well.is_empty() {
            for server in &resting {
                if let Some(k) = known.get_mut(server).filter(|k| k.rests_until.is_some_and(|at| at <= now)) {
                    // The others need not try as well.
                    k.rests_until = Some(now + rest(k.strikes));
                    probes.push(server.clone());
                }
            }
            resting.retain(|s| !probes.contains(s));
        }
        let count = well.len();
        Order { servers: well.into_iter().chain(resting).collect(), well: count, probes }
    }

    /// `server` was silent, or is not there.
    pub(super) fn silent(&self, server: &Server, now: Instant) {
        let mut known = self.lock();
        let known = known.entry(server.clone()).or_default();
        known.strikes = known.strikes.saturating_add(1);
        known.rests_until = Some(now + rest(known.strikes));
    }

    /// `server` has answered.
    pub(super) fn well(&self, server: &Server) {
        if let Some(known) = self.lock().get_mut(server) {
            known.strikes = 0;
            known.rests_until = None;
        }
    }

    pub(super) fn is_resting(&self, server: &Server) -> bool {
        self.lock().get(server).is_some_and(|k| k.rests_until.is_some())
    }

    pub(super) fn knows_edns(&self, server: &Server, now: Instant) -> bool {
        self.lock().get(server).and_then(|k| k.without_edns_until).is_none_or(|until| until <= now)
    }

    pub(super) fn has_no_edns(&self, server: &Server, now: Instant) {
        self.lock().entry(server.clone()).or_default().without_edns_until = Some(now + MEMORY);
    }

    pub(super) fn keeps_letters(&self, server: &Server, now: Instant) -> bool {
        self.lock().get(server).and_then(|k| k.changes_letters_until).is_none_or(|until| until <= now)
    }

    pub(super) fn changes_letters(&self, server: &Server, now: Instant) {
        self.lock().entry(server.clone()).or_default().changes_letters_until = Some(now + MEMORY);
    }

    /// Forgets everything: the host is in another network.
    pub(super) fn reset(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Server, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rest(strikes: u32) -> Duration {
    let doubled = 1_u32.checked_shl(strikes.saturating_sub(1)).unwrap_or(u32::MAX);
    FIRST_REST.saturating_mul(doubled).min(LONGEST_REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(last: u8) -> Server {
        Server::from(std::net::SocketAddr::from(([192, 0, 2, last], 53)))
    }

    #[test]
    fn a_silent_server_stands_back_is_tried_beside_the_others_and_comes_back() {
        let (health, all, start) = (Health::default(), [server(1), server(2)], Instant::now());
        health.silent(&server(1), start);
        let at = |seconds| health.order(&all, start + Duration::from_secs(seconds));
        assert_eq!(Vec::from(at(1).servers), [server(2), server(1)]);
        assert_eq!((at(2).probes, at(2).probes), (vec![server(1)], vec![]), "one probe");
        health.silent(&server(1), start + Duration::from_secs(4));
        assert!(at(7).probes.is_empty(), "twice as long now");
        assert_eq!(at(8).probes, [server(1)]);
        health.well(&server(1));
        assert_eq!(Vec::from(at(9).servers), all);
    }

    #[test]
    fn with_all_silent_all_are_asked_the_one_that_rested_longest_first() {
        let (health, all, start) = (Health::default(), [server(1), server(2)], Instant::now());
        health.silent(&server(2), start);
        health.silent(&server(1), start + Duration::from_secs(1));
        let order = health.order(&all, start + Duration::from_secs(90));
        assert_eq!(
            (Vec::from(order.servers), order.well, order.probes),
            (vec![server(2), server(1)], 0, vec![])
        );
        health.reset();
        assert_eq!(health.order(&all, start).well, 2);
    }

    #[test]
    fn a_rest_is_a_minute_at_the_most() {
        assert_eq!(
            (rest(1), rest(2), rest(6), rest(99)),
            (FIRST_REST, FIRST_REST * 2, LONGEST_REST, LONGEST_REST)
        );
    }
}
