//! Ports that publish themselves: the listeners an agent reports, what rules make of them, and what came of it.
//!
//! ```text
//! Listeners ─► the set of them ─► rules: wanted places ─► less what the operator and wishes have ─► published, or refused
//! ```
//! What is published is compared with what is wanted at each change, at most once in [`PACE`]; what was refused is tried again
//! every [`RETRY`].

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use portway_api::agent::{Listener, Part, ToGuest};
use portway_api::control::{PortInfo, Protocol};
use tokio::time::Instant;

use super::published::{Published, Way, carried};
use super::{Guest, PORTS};
use crate::agent::rules::{Place, place};
use crate::agent::{ask_data_thread, note, socket_label};
use crate::events::Event;
use crate::publish::spec::{Bind, HostEnd};
use crate::request::{PublishError, Request};

/// Listeners of one guest; further ones are not seen.
pub(crate) const LISTENERS: usize = 4096;
/// Refused listeners that are known beside as many published ones.
pub(crate) const REFUSED: usize = 256;
/// How often a refused port is tried again, and a port that is carried for want of an address looked at.
const RETRY: Duration = Duration::from_secs(5);
/// Between two comparisons of what is published with what is wanted, however fast listeners come and go.
const PACE: Duration = Duration::from_millis(50);

/// What a rule wants: a place on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    pub(super) proto: Protocol,
    pub(super) place: Place,
}

/// And what came of it.
#[derive(Debug)]
pub(super) enum Auto {
    Published(Listener, Published),
    Refused(Listener, String),
}

impl Guest {
    pub(super) async fn hear_listeners(&mut self, part: Part, added: Vec<Listener>, removed: &[Listener]) {
        let room = |set: &BTreeSet<Listener>| LISTENERS.saturating_sub(set.len());
        let public = added.into_iter().filter(|l| !l.is_private());
        match part {
            Part::Delta => {
                for gone in removed {
                    self.listeners.remove(gone);
                }
                let room = room(&self.listeners);
                self.listeners.extend(public.take(room));
            }
            Part::Whole => self.listeners = public.take(LISTENERS).collect(),
            Part::First => {
                self.staged = Some(public.take(LISTENERS).collect());
                return;
            }
            Part::Middle | Part::Last => {
                let Some(staged) = self.staged.as_mut() else { return };
                let room = room(staged);
                staged.extend(public.take(room));
                if part == Part::Middle {
                    return;
                }
                self.listeners = self.staged.take().unwrap_or_default();
            }
        }
        let listeners = &self.listeners;
        self.unwanted.retain(|l| listeners.contains(l));
        let now = Instant::now();
        match self.reconciled.map(|at| at + PACE).filter(|at| *at > now) {
            None => self.reconcile(false).await,
            // A listener that flaps is bound and closed so many times a second, and no more.
            Some(at) => self.reconcile_at = Some(at),
        }
    }

    /// Makes what is published what is wanted. `retry`: also what was refused before.
    pub(super) async fn reconcile(&mut self, retry: bool) {
        self.reconciled = Some(Instant::now());
        self.reconcile_at = None;
        let own = self.own_address().await;
        let mut wanted = wanted(&self.listeners, |listener| {
            (!self.unwanted.contains(listener)).then(|| place(&self.config.rules, listener)).flatten()
        });
        if !wanted.is_empty() {
            let taken = self.taken_elsewhere(own).await;
            wanted.retain(|w, l| !self.is_wished(w) && !taken.contains(&(l.proto, l.port)));
        }
        let stale: Vec<Wanted> = self
            .auto
            .iter()
            .filter(|(place, auto)| match (wanted.get(*place), auto) {
                (Some(l), Auto::Published(_, port)) => self.way(l, own) != port.way,
                (Some(_), Auto::Refused(..)) => false,
                (None, _) => true,
            })
            .map(|(place, _)| place.clone())
            .collect();
        for place in stale {
            if let Some(Auto::Published(_, port)) = self.auto.remove(&place) {
                self.close(port).await;
            }
        }
        for (place, listener) in wanted {
            self.publish_auto(place, listener, own, retry).await;
        }
        let refused = self.auto.values().any(|a| matches!(a, Auto::Refused(..)));
        let carried_for_now = own.is_none()
            && self.auto.values().any(|a| matches!(a, Auto::Published(l, _) if l.address.is_unspecified()));
        self.retry_at = (refused || carried_for_now).then(|| Instant::now() + RETRY);
        self.ring().await;
    }

    pub(super) async fn publish_auto(
        &mut self,
        wanted: Wanted,
        listener: Listener,
        own: Option<IpAddr>,
        retry: bool,
    ) {
        let full = self.auto.len() >= PORTS + REFUSED;
        let known = match self.auto.get_mut(&wanted) {
            Some(Auto::Published(known, _)) => return *known = listener,
            Some(Auto::Refused(known, _)) if !retry && *known == listener => return,
            Some(Auto::Refused(_, reason)) => Some(reason.clone()),
            // Beyond both limits nothing is tried: it would be tried again with every change.
            None if full => return,
            None => None,
        };
        let done = if self.count() >= PORTS {
            Err(PublishError::Limit(format!("{PORTS} ports of one guest are published")))
        } else {
            self.publish_at(&wanted, self.way(&listener, own)).await
        };
        match done {
            Ok(port) => {
                if self.complaints.may() {
                    let (host_port, bind) = (port.host_port, port.bound.join(","));
                    tracing::info!(guest = self.label(), %listener, bind, host_port, "published by rule");
                }
                self.auto.insert(wanted, Auto::Published(listener, port));
            }
            Err(error) => {
                let reason = error.to_string();
                if known.as_ref() != Some(&reason) {
                    if self.complaints.may() {
                        tracing::info!(guest = self.label(), %listener, reason, "not published");
                    }
                    let event = Event::NotPublished(self.label(), listener.to_string(), reason.clone());
                    note(&self.requests, event);
                    self.tell(&ToGuest::Refused { listener, reason: reason.clone() });
                }
                self.auto.insert(wanted, Auto::Refused(listener, reason));
            }
        }
    }

    /// Publishes at the first of the place's ports that is free.
    pub(super) async fn publish_at(&mut self, wanted: &Wanted, way: Way) -> Result<Published, PublishError> {
        let mut last = None;
        for port in wanted.place.candidates() {
            let host = match &wanted.place {
                Place::Socket(path) => HostEnd::Unix(path.clone()),
                Place::Port { bind, .. } => {
                    HostEnd::Ports { bind: bind.map_or(Bind::Localhost, Bind::Address), first: port }
                }
            };
            match self.publish(host, wanted.proto, way.clone()).await {
                Err(error @ (PublishError::Bind { .. } | PublishError::AlreadyPublished(_))) => {
                    // The first says most: the port that was wanted.
                    last.get_or_insert(error);
                }
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| PublishError::Limit("no port is left".into())))
    }

    /// Guest ports the operator published by hand: a rule adds nothing to them.
    pub(super) async fn taken_elsewhere(&self, own: Option<IpAddr>) -> HashSet<(Protocol, u16)> {
        let all = ask_data_thread(&self.requests, |reply| Request::Ports { reply }).await.unwrap_or_default();
        let labels = [own.map(|ip| ip.to_string()), self.name.clone()];
        let mine = |p: &PortInfo| {
            let auto = self.auto.values().filter_map(|a| match a {
                Auto::Published(_, port) => Some(port),
                Auto::Refused(..) => None,
            });
            auto.chain(self.wishes.iter().flat_map(|w| &w.ports)).any(|q| {
                q.entrance.is_none() && (q.proto, q.host_port, &q.bound) == (p.proto, p.host_port, &p.bind)
            })
        };
        let by_hand = all.iter().filter(|p| labels.iter().flatten().any(|l| *l == p.guest) && !mine(p));
        let configured = self.configured.iter().map(|p| {
            let info = p.info();
            (p.proto, info.guest_port)
        });
        by_hand.map(|p| (p.proto, p.guest_port)).chain(configured).collect()
    }

    /// How a listener is reached best.
    pub(super) fn way(&self, listener: &Listener, own: Option<IpAddr>) -> Way {
        let everywhere = listener.address.is_unspecified();
        // The stack's address of a guest is of one family; a socket of IPv6 alone does not answer on the other.
        let same_family = own.is_some_and(|ip| !(listener.v6_only && ip.is_ipv4()));
        if own == Some(listener.address) || (everywhere && same_family) {
            return Way::Network(listener.port);
        }
        let address = match listener.address {
            ip if !everywhere => ip,
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        carried(listener.proto, address, listener.port)
    }
}

pub(super) fn refused_info(wanted: &Wanted, listener: &Listener, reason: &str) -> PortInfo {
    let (bind, host_port) = match &wanted.place {
        Place::Socket(path) => (vec![socket_label(path)], 0),
        Place::Port { bind, port, .. } => {
            (vec![bind.unwrap_or(Ipv4Addr::LOCALHOST.into()).to_string()], *port)
        }
    };
    PortInfo {
        proto: wanted.proto,
        bind,
        host_port,
        guest: listener.address.to_string(),
        guest_port: listener.port,
        state: format!("not published: {}", reason.chars().take(200).collect::<String>()),
        accepted: 0,
    }
}

/// The places rules want, and for each the listener that has it: of several, the one that most can reach.
fn wanted(
    listeners: &BTreeSet<Listener>,
    place: impl Fn(&Listener) -> Option<Place>,
) -> BTreeMap<Wanted, Listener> {
    let rank = |l: &Listener| match l.address {
        ip if ip.is_unspecified() => (0, l.v6_only, l.redirected),
        ip if ip.is_loopback() => (2, ip.is_ipv6(), l.redirected),
        _ => (1, l.v6_only, l.redirected),
    };
    let mut wanted: BTreeMap<Wanted, Listener> = BTreeMap::new();
    for listener in listeners {
        let Some(place) = place(listener) else { continue };
        let best = wanted.entry(Wanted { proto: listener.proto, place }).or_insert(*listener);
        if rank(listener) < rank(best) {
            *best = *listener;
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::agent::rules::Rule;

    fn listener(text: &str) -> Listener {
        let at: SocketAddr = text.parse().expect("an address");
        Listener {
            proto: Protocol::Tcp,
            address: at.ip(),
            port: at.port(),
            v6_only: false,
            redirected: false,
        }
    }

    #[test]
    fn of_several_listeners_on_one_port_the_most_reachable_is_published() {
        let everything = [Rule::everything(false)];
        let chosen = |texts: &[&str]| {
            let listeners: BTreeSet<Listener> = texts.iter().map(|t| listener(t)).collect();
            let wanted = wanted(&listeners, |l| place(&everything, l));
            wanted.values().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(chosen(&["127.0.0.1:80", "[::1]:80"]), ["tcp 127.0.0.1:80"]);
        assert_eq!(chosen(&["127.0.0.1:80", "0.0.0.0:80", "10.0.0.1:80"]), ["tcp 0.0.0.0:80"]);
        assert_eq!(chosen(&["[::1]:80", "10.0.0.1:80"]), ["tcp 10.0.0.1:80"]);
        assert_eq!(chosen(&["[::1]:80", "127.0.0.1:81"]).len(), 2);
    }
}
