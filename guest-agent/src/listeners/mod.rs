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
//! answer), connected UDP sockets (the dump has none).

mod diag;
mod nat;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use portway_api::agent::Listener;
use portway_api::control::Protocol;

use self::diag::Diag;
pub(crate) use self::nat::Redirections;

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
        let sockets = self.diag.listeners()?;
        let seen = wanted(sockets, &self.redirected, &ephemeral());
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

/// What the host is told of.
fn wanted(
    sockets: Vec<Listener>,
    redirected: &[Listener],
    ephemeral: &RangeInclusive<u16>,
) -> BTreeSet<Listener> {
    let client = |l: &Listener| l.proto == Protocol::Udp && ephemeral.contains(&l.port);
    let mut wanted: BTreeSet<Listener> =
        sockets.into_iter().filter(|l| !l.is_private() && !client(l)).collect();
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

    #[test]
    fn clients_of_udp_are_left_out_and_high_tcp_ports_are_not() {
        use Protocol::{Tcp, Udp};
        let sockets = vec![
            listener(Udp, "0.0.0.0:40000", false),
            listener(Tcp, "0.0.0.0:40000", false),
            listener(Udp, "0.0.0.0:68", false),
            listener(Udp, "127.0.0.1:9999", false),
        ];
        let told = wanted(sockets, &[], &(32_768..=60_999));
        let told: Vec<String> = told.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["tcp 0.0.0.0:40000", "udp 127.0.0.1:9999"]);
    }

    #[test]
    fn a_redirected_port_with_a_socket_of_its_own_is_told_once() {
        let sockets = vec![listener(Protocol::Tcp, "[::]:8080", false)];
        let rules =
            [listener(Protocol::Tcp, "0.0.0.0:8080", true), listener(Protocol::Tcp, "0.0.0.0:9090", true)];
        let told = wanted(sockets, &rules, &(1..=1));
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
