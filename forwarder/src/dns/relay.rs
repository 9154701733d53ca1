//! Queries on their way to the host's resolvers, and the answers back.
//!
//! ```text
//! question ─► server 1 ──(2 s, or at once when it refuses)──► server 2 ──► … 5 s in all
//!              └───────────── the first good answer wins, late ones too ─────┘
//! ```
//! Servers are asked in the order they are configured, as far as they answer ([`super::health`]). SERVFAIL, REFUSED and
//! NOTIMP make us ask the next, and are passed on if none is better; a server that failed so where another did not stands
//! back as a silent one does. Silence of all is no answer: the caller says
//! SERVFAIL, never NXDOMAIN.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::{Instant, sleep_until};

use super::ask::{self, Question};
use super::health::Health;
use super::secure::Lines;
use super::server::Server;
use super::wire::{self, Rcode};

/// Time after which a query has failed.
pub(super) const TOTAL: Duration = Duration::from_secs(5);
/// Time a server has before the next one is asked too (the only one: asked again, the datagram may be lost).
pub(super) const NEXT_SERVER: Duration = Duration::from_secs(2);
/// The same when none of them answered of late.
const NEXT_OF_SILENT: Duration = Duration::from_millis(300);

/// Asks servers.
#[derive(Debug, Default)]
pub(super) struct Relay {
    health: Health,
    lines: Lines,
}

type Attempt<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<u8>>> + Send + 'a>>;

/// The attempts under way, and since when.
struct Running<'a> {
    server: Server,
    since: Instant,
    attempt: Attempt<'a>,
}

impl Relay {
    /// One that asks servers over TLS and HTTPS by `lines`.
    pub(super) fn over(lines: Lines) -> Self {
        Self { health: Health::default(), lines }
    }

    /// Asks `servers`; the answer bears an id of ours. `None` when none gave any.
    pub(super) async fn ask(&self, question: &Question, servers: &[Server]) -> Option<Vec<u8>> {
        let start = Instant::now();
        let order = self.health.order(servers, start);
        let mut untried: VecDeque<Server> = order.servers;
        let mut silent = order.well == 0;
        let mut running: Vec<Running<'_>> = Vec::new();
        let begin = |server: Server| Running {
            server: server.clone(),
            since: Instant::now(),
            attempt: Box::pin(ask::ask(server, question, &self.health, &self.lines)),
        };
        running.extend(order.probes.into_iter().map(begin));
        let mut poor_answer: Option<Vec<u8>> = None;
        let mut failed: Vec<Server> = Vec::new();
        let deadline = start + TOTAL;
        let mut next_at = start;
        loop {
            let now = Instant::now();
            self.note_silent(&mut running, now);
            if next_at <= now {
                // With all of them asked, the one silent longest is asked again.
                let server = untried.pop_front().or_else(|| running.first().map(|r| r.server.clone()));
                let Some(server) = server else { break };
                silent &= self.health.is_resting(&server);
                running.push(begin(server));
                let pace = if silent && !untried.is_empty() { NEXT_OF_SILENT } else { NEXT_SERVER };
                next_at = now + pace;
            }
            let finished = tokio::select! {
                finished = first_of(&mut running) => Some(finished),
                () = sleep_until(next_at) => None,
                () = sleep_until(deadline) => break,
            };
            let Some((server, result)) = finished else { continue };
            match result {
                Ok(reply) => {
                    self.health.well(&server);
                    if !is_poor(&reply) {
                        // What one server knows the others should not have failed at.
                        failed.iter().for_each(|server| self.health.silent(server, Instant::now()));
                        return Some(reply);
                    }
                    tracing::debug!(%server, rcode = wire::rcode(&reply), "resolver does not answer this one");
                    failed.push(server.clone());
                    poor_answer.get_or_insert(reply);
                }
                Err(error) => {
                    tracing::debug!(%server, %error, "resolver cannot be asked");
                    if !is_our_own(&error) {
                        self.health.silent(&server, Instant::now());
                    }
                }
            }
            running.retain(|r| r.server != server); // its repeats would fare no better
            if running.is_empty() || !untried.is_empty() {
                next_at = Instant::now();
            }
        }
        self.note_silent(&mut running, deadline);
        poor_answer
    }

    /// Forgets which server works; for a new list of servers, or another network.
    pub(super) fn reset(&self) {
        self.health.reset();
        self.lines.reset();
    }

    /// Servers that had their time; counted once for each attempt.
    fn note_silent(&self, running: &mut [Running<'_>], now: Instant) {
        for r in running {
            if now.saturating_duration_since(r.since) >= NEXT_SERVER && !self.health.is_resting(&r.server) {
                tracing::debug!(server = %r.server, "resolver is silent");
                self.health.silent(&r.server, now);
            }
        }
    }
}

/// Another server may know better than this one.
fn is_poor(reply: &[u8]) -> bool {
    let rcode = wire::rcode(reply);
    [Rcode::ServFail, Rcode::Refused, Rcode::NotImp].iter().any(|r| *r as u8 == rcode)
}

/// Whether the server has nothing to do with `error`: this process has no more descriptors, or the system no memory.
fn is_our_own(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM))
}

/// The first attempt to end, taken out; for ever pending when there is none.
async fn first_of(running: &mut Vec<Running<'_>>) -> (Server, io::Result<Vec<u8>>) {
    poll_fn(|context| {
        for at in 0..running.len() {
            if let Some(r) = running.get_mut(at)
                && let Poll::Ready(result) = r.attempt.as_mut().poll(context)
            {
                let server = r.server.clone();
                drop(running.remove(at));
                return Poll::Ready((server, result));
            }
        }
        Poll::Pending
    })
    .await
}
