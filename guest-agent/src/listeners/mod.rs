//! What listens in the guest, and what has changed since the last look.
//!
//! ```text
//! SOCK_DIAG dump ──┐
//!                  ├─► filter ─► set ─► difference ─► deltas to the host
//! DNAT rules ──────┘
//! ```
//! The kernel tells nobody that a socket began to listen, so it is asked: [`BUSY`] apart while things change, [`CALM`]
//! apart otherwise, and not at all while no host wants to know. A look costs some 100 µs with a thousand listeners and ten
//! thousand connections, since the kernel filters; so both a new listener and one that is gone are seen within half a
//! second.
//!
//! Left out: what [`Listener::is_private`] names, UDP sockets in the ephemeral range (they are clients that wait for an
//! answer), connected UDP sockets. One that was seen without a peer stays a listener when it takes one, as `nc -lu` does with
//! its first client: else the port would close under that client.

mod diag;
mod nat;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use portway_api::agent::Listener;
use portway_api::control::Protocol;

use self::diag::{Diag, Seen};
pub(crate) use self::nat::Redirections;
use crate::console::say;

/// Between two looks for a while after something has changed.
const BUSY: Duration = Duration::from_millis(200);
/// Between two looks otherwise.
const CALM: Duration = Duration::from_millis(400);
/// How long after a change the looks are close together.
const BUSY_FOR: Duration = Duration::from_secs(3);

const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// What is new and what is gone.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Delta {
    pub(crate) added: Vec<Listener>,
    pub(crate) removed: Vec<Listener>,
}

/// Knows what listens.
#[derive(Debug)]
pub(crate) struct Watch {
    diag: Diag,
    known: BTreeSet<Listener>,
    redirected: Vec<Listener>,
    /// UDP sockets of `known`, by cookie.
    udp: HashMap<u64, Listener>,
    /// What the kernel cannot tell of, as far as it was said.
    missing: BTreeSet<&'static str>,
    next: Instant,
    busy_until: Instant,
}

impl Watch {
    /// Knows nothing yet.
    pub(crate) fn new(now: Instant) -> io::Result<Self> {
        Ok(Self {
            diag: Diag::open()?,
            known: BTreeSet::new(),
            redirected: Vec::new(),
            udp: HashMap::new(),
            missing: BTreeSet::new(),
            next: now,
            busy_until: now,
        })
    }

    /// When to look again.
    pub(crate) const fn next(&self) -> Instant {
        self.next
    }

    /// The ports the kernel sends on are these now.
    pub(crate) fn redirect(&mut self, ports: Vec<Listener>, now: Instant) {
        self.redirected = ports;
        self.next = now;
    }

    /// Looks, and tells what has changed since the last look.
    pub(crate) fn look(&mut self, now: Instant) -> io::Result<Delta> {
        self.next = now + CALM;
        // Connected ones matter only where one of them may have been a listener.
        let sockets = self.diag.sockets(!self.udp.is_empty())?;
        for module in self.diag.missing() {
            if self.missing.insert(module) {
                say(&format!("some listeners are not seen: this kernel lacks {module}"));
            }
        }
        let ephemeral = ephemeral();
        self.udp = servers(&sockets, &self.udp, &ephemeral);
        let tcp = sockets.iter().map(|s| s.listener).filter(|l| l.proto == Protocol::Tcp);
        let seen = wanted(tcp.chain(self.udp.values().copied()), &self.redirected);
        let delta = Delta {
            added: seen.difference(&self.known).copied().collect(),
            removed: self.known.difference(&seen).copied().collect(),
        };
        self.known = seen;
        if delta != Delta::default() {
            self.busy_until = now + BUSY_FOR;
        }
        if now < self.busy_until {
            self.next = now + BUSY;
        }
        Ok(delta)
    }

    /// All that is known.
    pub(crate) fn known(&self) -> Vec<Listener> {
        self.known.iter().copied().collect()
    }
}

/// The ports the kernel gives to clients; 32768 to 60999 where it does not say.
fn ephemeral() -> RangeInclusive<u16> {
    let text = fs::read_to_string(EPHEMERAL).unwrap_or_default();
    let mut words = text.split_whitespace().map(str::parse);
    match (words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last))) => first..=last,
        _ => 32_768..=60_999,
    }
}

/// The UDP sockets that serve: those without a peer, and those that had none when they were seen first.
fn servers(
    sockets: &[Seen],
    before: &HashMap<u64, Listener>,
    ephemeral: &RangeInclusive<u16>,
) -> HashMap<u64, Listener> {
    let serves = |seen: &Seen| {
        let now = seen.listener;
        let listener = if seen.connected { *before.get(&seen.cookie)? } else { now };
        let good =
            now.proto == Protocol::Udp && !listener.is_private() && !ephemeral.contains(&listener.port);
        good.then_some((seen.cookie, listener))
    };
    sockets.iter().filter_map(serves).collect()
}

/// What the host is told of.
fn wanted(sockets: impl Iterator<Item = Listener>, redirected: &[Listener]) -> BTreeSet<Listener> {
    let mut wanted: BTreeSet<Listener> = sockets.filter(|l| !l.is_private()).collect();
    // A port that has a socket too (docker's proxy) is known by it.
    let others: Vec<Listener> = redirected
        .iter()
        .filter(|r| !r.is_private())
        .filter(|r| {
            !wanted.iter().any(|l| {
                (l.proto, l.port) == (r.proto, r.port)
                    && (l.address.is_unspecified() || l.address == r.address)
            })
        })
        .copied()
        .collect();
    wanted.extend(others);
    wanted
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    fn listener(proto: Protocol, at: &str, redirected: bool) -> Listener {
        let at: SocketAddr = at.parse().expect("an address");
        Listener { proto, address: at.ip(), port: at.port(), v6_only: false, redirected }
    }

    fn seen(proto: Protocol, at: &str, cookie: u64, connected: bool) -> Seen {
        Seen { listener: listener(proto, at, false), cookie, connected }
    }

    #[test]
    fn clients_of_udp_are_left_out() {
        use Protocol::{Tcp, Udp};
        let sockets = [
            seen(Udp, "0.0.0.0:40000", 1, false),
            seen(Tcp, "0.0.0.0:40000", 2, false),
            seen(Udp, "0.0.0.0:68", 3, false),
            seen(Udp, "127.0.0.1:9999", 4, false),
            seen(Udp, "127.0.0.1:9998", 5, true),
        ];
        let told = servers(&sockets, &HashMap::new(), &(32_768..=60_999));
        assert_eq!(told, HashMap::from([(4, listener(Udp, "127.0.0.1:9999", false))]));
    }

    #[test]
    fn a_udp_server_that_takes_a_peer_stays_where_it_was_until_it_closes() {
        use Protocol::Udp;
        let bound = [seen(Udp, "0.0.0.0:9999", 7, false)];
        let before = servers(&bound, &HashMap::new(), &(1..=1));
        // connect(2) gives a socket of every address one of its own.
        let taken = [seen(Udp, "192.168.127.2:9999", 7, true), seen(Udp, "127.0.0.1:5000", 8, true)];
        let after = servers(&taken, &before, &(1..=1));
        assert_eq!(after, before);
        assert!(servers(&[], &after, &(1..=1)).is_empty());
    }

    #[test]
    fn a_redirected_port_with_a_socket_of_its_own_is_told_once() {
        let sockets = [listener(Protocol::Tcp, "[::]:8080", false)];
        let rules =
            [listener(Protocol::Tcp, "0.0.0.0:8080", true), listener(Protocol::Tcp, "0.0.0.0:9090", true)];
        let told = wanted(sockets.into_iter(), &rules);
        assert_eq!(told.iter().filter(|l| l.port == 8080).count(), 1);
        assert!(told.iter().any(|l| l.port == 9090 && l.redirected));
    }

    #[test]
    fn opens_and_closes_come_as_deltas_and_make_the_looks_frequent() {
        let began = Instant::now();
        let mut watch = Watch::new(began).expect("sock_diag");
        watch.look(began).expect("a look");
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        let later = began + Duration::from_secs(10);
        let opened = watch.look(later).expect("a look");
        assert!(opened.added.iter().any(|l| l.port == port));
        assert_eq!(watch.next(), later + BUSY);
        drop(socket);
        let closed = watch.look(later).expect("a look");
        assert!(
            closed.removed.iter().any(|l| l.port == port) && !watch.known().iter().any(|l| l.port == port)
        );
    }
}
