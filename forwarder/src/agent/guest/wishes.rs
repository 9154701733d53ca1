//! Ports a guest asks for itself (`portway-agent publish`, docker's proxy), within its policy.
//!
//! A wish stays until it is taken back, or a new session has not claimed it again in time. It goes before a rule: a port that
//! published itself gives way.
//!
//! Dockerd asks twice for a port of every address, once as 0.0.0.0 and once as ::. Here both are localhost, so the second has
//! what the first has: one port with two claims, which stays until both are taken back.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use portway_api::control::PortInfo;
use tokio::time::Instant;

use super::auto::{Auto, Wanted};
use super::published::{Published, Way, carried, carried_target};
use super::{Guest, PORTS};
use crate::agent::rules::Place;
use crate::agent::{GuestBinds, harmless};
use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::request::PublishError;

/// Bytes of a spec that a guest asks for.
const SPEC: usize = 1024;

/// A wish of the guest, granted.
#[derive(Debug)]
pub(super) struct Wish {
    /// One, or two that share the ports: see the module.
    claims: Vec<Claim>,
    pub(super) ports: Vec<Published>,
}

/// What the guest said, and the session that said it last.
#[derive(Debug)]
struct Claim {
    text: String,
    session: u64,
    /// For which every address it is: of IPv6, or IPv4.
    everywhere: Option<bool>,
}

impl Claim {
    /// Whether `text` is this, perhaps in other words.
    fn is(&self, text: &str) -> bool {
        self.text == text
            || text.parse::<PublishSpec>().is_ok_and(|s| Ok(s) == self.text.parse::<PublishSpec>())
    }
}

impl Wish {
    /// Forgets what this session has not claimed; false when nobody is left.
    pub(super) fn settle(&mut self, session: u64) -> bool {
        self.claims.retain(|claim| claim.session == session);
        !self.claims.is_empty()
    }

    /// Whether a claim for every address of the other version may share this.
    fn admits(&self, spec: &PublishSpec, everywhere: bool) -> bool {
        let other = |claim: &Claim| claim.everywhere == Some(!everywhere);
        let named = self.ports.iter().filter(|p| p.is_named(spec)).count();
        matches!(self.claims.as_slice(), [only] if other(only)) && named == usize::from(spec.count)
    }
}

impl Guest {
    pub(super) async fn wish(&mut self, text: String) -> (Vec<PortInfo>, Vec<String>) {
        let session = self.sessions;
        for wish in &mut self.wishes {
            if let Some(claim) = wish.claims.iter_mut().find(|c| c.text == text) {
                claim.session = session;
                return (wish.ports.iter().map(Published::info).collect(), Vec::new());
            }
        }
        let (spec, everywhere) = match allowed(&text, self.config.binds) {
            Ok(allowed) => allowed,
            Err(error) => return (Vec::new(), vec![error.to_string()]),
        };
        if let Some(v6) = everywhere
            && let Some(wish) = self.wishes.iter_mut().find(|w| w.admits(&spec, v6))
        {
            wish.claims.push(Claim { text, session, everywhere });
            return (wish.ports.iter().map(Published::info).collect(), Vec::new());
        }
        if usize::from(spec.count) > PORTS {
            let line = PublishError::Limit(format!("{} ports at once: {PORTS} at most", spec.count));
            return (Vec::new(), vec![line.to_string()]);
        }
        let own = self.own_address().await;
        let (mut ports, mut infos, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        for n in 0..spec.count {
            let done = if self.count() + ports.len() >= PORTS {
                Err(PublishError::Limit(format!("{PORTS} ports of one guest are published")))
            } else {
                self.make_way(&spec, n).await;
                let host = match &spec.host {
                    HostEnd::Ports { bind, first } if *first != 0 => {
                        HostEnd::Ports { bind: *bind, first: first.saturating_add(n) }
                    }
                    other => other.clone(),
                };
                self.publish(host, spec.proto, self.wished_way(&spec, n, own)).await
            };
            match done {
                Ok(port) => {
                    infos.push(port.info());
                    ports.push(port);
                }
                Err(error) => errors.push(error.to_string()),
            }
        }
        if !ports.is_empty() {
            if self.complaints.may() {
                tracing::info!(guest = self.label(), spec = harmless(&text), "published at the guest's wish");
            }
            let claims = vec![Claim { text, session, everywhere }];
            self.wishes.push(Wish { claims, ports });
        }
        (infos, errors)
    }

    pub(super) async fn unwish(&mut self, text: &str) -> (Vec<PortInfo>, Vec<String>) {
        let Some(at) = self.wishes.iter().position(|w| w.claims.iter().any(|c| c.is(text))) else {
            let line = PublishError::NotPublished(harmless(text)).to_string();
            return (Vec::new(), vec![line]);
        };
        if let Some(shared) = self.wishes.get_mut(at).filter(|w| w.claims.len() > 1) {
            shared.claims.retain(|c| !c.is(text));
            return (shared.ports.iter().map(Published::info).collect(), Vec::new());
        }
        let wish = self.wishes.remove(at);
        let infos = wish.ports.iter().map(Published::info).collect();
        self.close_all(wish.ports).await;
        // The port may be one that a rule wants; but the listener may be closing too, and is seen to in a moment.
        self.retry_at = Some(Instant::now() + Duration::from_secs(1));
        (infos, Vec::new())
    }

    /// A wish goes before a rule: one that has the port gives it away.
    pub(super) async fn make_way(&mut self, spec: &PublishSpec, n: u16) {
        let HostEnd::Ports { first, .. } = spec.host else { return };
        let port = first.saturating_add(n);
        let has = |auto: &Auto| matches!(auto, Auto::Published(_, p) if p.proto == spec.proto && p.host_port == port);
        let found: Vec<Wanted> = self.auto.iter().filter(|(_, a)| has(a)).map(|(w, _)| w.clone()).collect();
        for wanted in found.into_iter().filter(|_| first != 0) {
            if let Some(Auto::Published(_, port)) = self.auto.remove(&wanted) {
                self.close(port).await;
            }
        }
    }

    pub(super) fn is_wished(&self, wanted: &Wanted) -> bool {
        let Place::Port { port, .. } = wanted.place else { return false };
        let wished = self.wishes.iter().flat_map(|w| &w.ports);
        wished.into_iter().any(|p| p.proto == wanted.proto && p.host_port == port)
    }

    pub(super) fn wished_way(&self, spec: &PublishSpec, n: u16, own: Option<IpAddr>) -> Way {
        let port = spec.guest_port.saturating_add(n);
        match &spec.guest {
            GuestName::Address(ip) if Some(*ip) != own => carried(spec.proto, *ip, port),
            GuestName::Socket(_) => Way::Carried(carried_target(spec, n)),
            _ if own.is_some() => Way::Network(port),
            _ => carried(spec.proto, Ipv4Addr::LOCALHOST.into(), port),
        }
    }
}

/// What the policy makes of a guest's wish; beside it whether that was for every address, and of IPv6.
fn allowed(text: &str, binds: GuestBinds) -> Result<(PublishSpec, Option<bool>), PublishError> {
    if text.len() > SPEC {
        return Err(PublishError::Policy(format!("a spec of {} bytes", text.len())));
    }
    let mut spec: PublishSpec = text.parse().map_err(|e| PublishError::Policy(format!("{e}")))?;
    let mut everywhere = None;
    match spec.host {
        HostEnd::Unix(_) => return Err(PublishError::Policy("a socket file on the host".into())),
        HostEnd::Ports { bind: Bind::Address(ip), first } if binds == GuestBinds::Loopback => match ip {
            ip if ip.is_loopback() => {}
            // Docker asks for every address unless it is told otherwise. A port of our choice is another each time.
            ip if ip.is_unspecified() => {
                everywhere = (first != 0).then_some(ip.is_ipv6());
                spec.host = HostEnd::Ports { bind: Bind::Localhost, first };
            }
            ip => {
                return Err(PublishError::Policy(format!(
                    "listening on {ip}: loopback only, unless the host says --guest-binds any"
                )));
            }
        },
        HostEnd::Ports { .. } => {}
    }
    if let GuestName::Name(name) = &spec.guest {
        return Err(PublishError::Policy(format!("another guest, {name:?}")));
    }
    Ok((spec, everywhere))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_wish_is_granted_within_the_policy() {
        let loopback = |text: &str| allowed(text, GuestBinds::Loopback);
        let host = |text: &str| loopback(text).map(|(s, _)| s.host);
        let localhost = |first| Ok(HostEnd::Ports { bind: Bind::Localhost, first });
        assert_eq!(host("8080:80"), localhost(8080));
        assert_eq!(host("0.0.0.0:8080:80"), localhost(8080));
        assert_eq!(host("[::]:8080:172.17.0.2:80"), localhost(8080));
        assert!(host("127.0.0.1:8080:80").is_ok());
        assert!(
            allowed("0.0.0.0:8080:80", GuestBinds::Any)
                .is_ok_and(|(s, _)| s.to_string().starts_with("0.0.0.0"))
        );
        for (text, fault) in [
            ("192.0.2.1:8080:80", "--guest-binds any"),
            ("unix:/tmp/x:80", "a socket file on the host"),
            ("unix:/tmp/x:/tmp/y", "a socket file on the host"),
            ("8080:db:80", "another guest"),
            ("nonsense", "bad publish spec"),
        ] {
            assert!(loopback(text).is_err_and(|e| e.to_string().contains(fault)), "{text}");
        }
        assert!(loopback(&"1".repeat(SPEC + 1)).is_err());
    }
}
