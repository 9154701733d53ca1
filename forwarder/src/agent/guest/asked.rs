//! What is asked of a guest from outside: the operator's own ports, listings, and those who wait.

use std::collections::HashSet;
use std::net::IpAddr;

use portway_api::agent::AgentInfo;
use portway_api::control::PortInfo;

use super::Guest;
use super::auto::{Auto, Wanted, refused_info};
use super::published::{Published, carried_target, with_guest};
use crate::agent::{ask_data_thread, bind, note_published};
use crate::publish::spec::PublishSpec;
use crate::request::{PublishError, Request};

impl Guest {
    pub(super) fn publish_configured(&mut self, spec: &PublishSpec) -> Vec<Result<PortInfo, PublishError>> {
        let publish = |n: u16| {
            let bound = bind(spec, n, self.config.keep_alive)?;
            let port = self.serve(&spec.host, bound, spec.proto, carried_target(spec, n))?;
            let info = port.info();
            note_published(&self.requests, &info);
            Ok((port, info))
        };
        let done: Vec<Result<(Published, PortInfo), PublishError>> = (0..spec.count).map(publish).collect();
        let mut infos = Vec::new();
        for result in done {
            infos.push(result.map(|(port, info)| {
                self.configured.push(port);
                info
            }));
        }
        infos
    }

    pub(super) async fn unpublish_named(&mut self, spec: &PublishSpec) -> Option<Vec<PortInfo>> {
        let mut gone: Vec<Published> = self.configured.extract_if(.., |p| p.is_named(spec)).collect();
        let named = |auto: &Auto| matches!(auto, Auto::Published(_, p) if p.is_named(spec));
        let autos: Vec<Wanted> = self.auto.iter().filter(|(_, a)| named(a)).map(|(w, _)| w.clone()).collect();
        for wanted in autos {
            if let Some(Auto::Published(listener, port)) = self.auto.remove(&wanted) {
                // Until it closes: what the operator takes away does not come back by itself.
                self.unwanted.insert(listener);
                gone.push(port);
            }
        }
        for wish in &mut self.wishes {
            gone.extend(wish.ports.extract_if(.., |p| p.is_named(spec)));
        }
        self.wishes.retain(|w| !w.ports.is_empty());
        if gone.is_empty() {
            return None;
        }
        let label = self.own_address().await.map_or_else(|| self.label(), |ip| ip.to_string());
        let infos = gone.iter().map(|p| with_guest(p.info(), &label)).collect();
        self.close_all(gone).await;
        Some(infos)
    }

    /// The ports that the data thread does not list: carried ones, and those that could not be published.
    pub(super) fn extra_ports(&self) -> Vec<PortInfo> {
        let auto = self.auto.values().filter_map(|a| match a {
            Auto::Published(_, port) => Some(port),
            Auto::Refused(..) => None,
        });
        let published = auto.chain(self.wishes.iter().flat_map(|w| &w.ports)).chain(&self.configured);
        let carried = published.filter(|p| p.entrance.is_some()).map(Published::info);
        let refused = self.auto.iter().filter_map(|(wanted, auto)| match auto {
            Auto::Refused(listener, reason) => Some(refused_info(wanted, listener, reason)),
            Auto::Published(..) => None,
        });
        carried.chain(refused).collect()
    }

    /// For the guest: all that is its own.
    pub(super) async fn all_ports(&self) -> Vec<PortInfo> {
        let label = self.own_address().await.map_or_else(|| self.label(), |ip| ip.to_string());
        let auto = self.auto.values().filter_map(|a| match a {
            Auto::Published(_, port) => Some(port),
            Auto::Refused(..) => None,
        });
        let network = auto.chain(self.wishes.iter().flat_map(|w| &w.ports)).filter(|p| p.entrance.is_none());
        let mut ports: Vec<PortInfo> = network.map(|p| with_guest(p.info(), &label)).collect();
        ports.extend(self.extra_ports());
        ports
    }

    pub(super) fn info(&self) -> AgentInfo {
        let refused = self.auto.values().filter(|a| matches!(a, Auto::Refused(..))).count();
        AgentInfo {
            name: self.name.clone(),
            connected: self.session.is_some(),
            ready: self.ready,
            version: self.version.clone(),
            listeners: self.listeners.len(),
            ports: self.count(),
            refused,
            streams: self.shared.streams(),
            sessions: self.sessions,
        }
    }

    /// Ports published by rule or wish.
    pub(super) fn count(&self) -> usize {
        let auto = self.auto.values().filter(|a| matches!(a, Auto::Published(..))).count();
        auto + self.wishes.iter().map(|w| w.ports.len()).sum::<usize>()
    }

    /// The guest's own address, where the stack knows it.
    pub(super) async fn own_address(&self) -> Option<IpAddr> {
        let guest = self.guest_name();
        ask_data_thread(&self.requests, |reply| Request::GuestAddress { guest, reply }).await.flatten()
    }

    /// Rings for those whose wish has come true.
    pub(super) async fn ring(&mut self) {
        if self.waiters.is_empty() {
            return;
        }
        let ports = if self.waiters.iter().any(|(p, _)| p.is_some()) && self.session.is_some() {
            self.reachable().await
        } else {
            HashSet::new()
        };
        let ready = self.ready;
        self.waiters.retain(|(port, met)| {
            let Some(met) = met.upgrade() else { return false };
            let is_met = port.map_or(ready, |p| ports.contains(&p));
            if is_met {
                met.notify_one();
            }
            !is_met
        });
    }

    /// Host ports whose listener is there in the guest.
    pub(super) async fn reachable(&self) -> HashSet<u16> {
        let listens = |port: u16| self.listeners.iter().any(|l| l.port == port);
        let own = self.all_ports().await;
        let listed =
            ask_data_thread(&self.requests, |reply| Request::Ports { reply }).await.unwrap_or_default();
        let label = self.own_address().await.map(|ip| ip.to_string());
        let of_mine = listed.into_iter().filter(|p| Some(&p.guest) == label.as_ref());
        own.into_iter()
            .chain(of_mine)
            .filter(|p| p.state == "listening" && (listens(p.guest_port) || p.guest_port == 0))
            .map(|p| p.host_port)
            .collect()
    }
}
