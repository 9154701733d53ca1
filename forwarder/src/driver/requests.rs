//! What the control thread asks, and its answers.

use std::net::IpAddr;

use portway_api::control::{FlowInfo, LeaseInfo, LinkStats, PortInfo, Protocol, Stats};
use portway_netstack::{Direction, FlowState, Netstack};

use super::{Driver, Entrance, Kind, LeaseBook, names, token};
use crate::events::Event;
use crate::link::Link;
use crate::publish::spec::{GuestName, HostEnd, PublishSpec};
use crate::publish::{self, Published};
use crate::request::{PublishError, Request};

/// Ports that may be published at once.
const PORTS: usize = 16_384;

impl Driver {
    /// Publishes every port of the configuration.
    ///
    /// # Errors
    /// The first that fails: at the start nothing is half done.
    pub fn publish_at_start(&mut self, specs: &[PublishSpec]) -> Result<Vec<PortInfo>, PublishError> {
        let mut done = Vec::new();
        for spec in specs {
            for result in self.publish(spec) {
                done.push(result?);
            }
        }
        Ok(done)
    }

    pub(super) fn answer_requests(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            // A caller that has gone away does not want its answer.
            match request {
                Request::Publish { spec, reply } => drop(reply.send(self.publish(&spec))),
                Request::Unpublish { spec, reply } => drop(reply.send(self.unpublish(&spec))),
                Request::Ports { reply } => drop(reply.send(self.ports())),
                Request::Leases { reply } => drop(reply.send(self.leases())),
                Request::Flows { reply } => drop(reply.send(self.list_flows())),
                Request::Stats { reply } => drop(reply.send(self.stats())),
                Request::Search { domains } => self.stack.set_search(domains),
                Request::DnsAnswer { ticket, answer } => {
                    if let Some(sink) = Self::sink(&mut self.links, ticket.port) {
                        self.stack.dns_answer(ticket.guest, ticket.asked, ticket.port, &answer, sink);
                    }
                }
                Request::Join { link, publish, reply } => {
                    // One who has gone meanwhile does not stay.
                    if let Err(Ok((port, _))) = reply.send(self.join(&link, publish)) {
                        self.leave(port);
                    }
                }
                Request::Leave(port) => self.leave(port),
                Request::Shutdown => self.ending = true,
            }
        }
    }

    pub(super) fn publish(&mut self, spec: &PublishSpec) -> Vec<Result<PortInfo, PublishError>> {
        (0..spec.count).map(|n| self.publish_one(spec, n)).collect()
    }

    fn publish_one(&mut self, spec: &PublishSpec, n: u16) -> Result<PortInfo, PublishError> {
        if let GuestName::Name(name) = &spec.guest
            && !self.links.iter().any(|l| l.name.as_ref() == Some(name))
        {
            return Err(PublishError::NoGuest(name.clone()));
        }
        let free = matches!(spec.host, HostEnd::Ports { first: 0, .. });
        if !free && self.published.iter().flatten().any(|p| p.is_named(spec, n)) {
            return Err(PublishError::AlreadyPublished(spec.to_string()));
        }
        if self.published.iter().flatten().count() >= PORTS {
            return Err(PublishError::Limit(format!("{PORTS} ports are published already")));
        }
        let port = match spec.host {
            HostEnd::Ports { first: 0, .. } | HostEnd::Unix(_) => 0,
            HostEnd::Ports { first, .. } => first.saturating_add(n),
        };
        let (listeners, bound, host_port) = publish::bind(&spec.host, port, spec.proto, self.keep_alive)?;
        let slot = self.published.iter().position(Option::is_none).unwrap_or(self.published.len());
        for mut listener in listeners {
            let at = self.entrances.iter().position(Option::is_none).unwrap_or(self.entrances.len());
            let watched = listener.register(self.poll.registry(), token(Kind::Listener, at));
            if let Err(error) = watched {
                self.close_entrances(slot);
                let address = format!("{} {}", spec.proto, bound.join(","));
                return Err(PublishError::Bind { address, reason: error.to_string() });
            }
            self.ready_entrances.push(at);
            let entrance = Some(Entrance { listener, published: slot, ready: true });
            if at == self.entrances.len() {
                self.entrances.push(entrance);
            } else {
                self.entrances[at] = entrance;
            }
        }
        let published = Published {
            proto: spec.proto,
            host: spec.host.clone(),
            bound,
            host_port,
            guest: spec.guest.clone(),
            guest_port: spec.guest_port.saturating_add(n),
            accepted: 0,
        };
        let info = published.info(self.guest_label(&published.guest));
        if slot == self.published.len() {
            self.published.push(Some(published));
        } else {
            self.published[slot] = Some(published);
        }
        self.events.push(Event::Published(info.clone()));
        Ok(info)
    }

    fn unpublish(&mut self, spec: &PublishSpec) -> Result<Vec<PortInfo>, PublishError> {
        let named = |p: &Published| (0..spec.count).any(|n| p.is_named(spec, n));
        let gone: Vec<usize> =
            (0..self.published.len()).filter(|i| self.published[*i].as_ref().is_some_and(named)).collect();
        if gone.is_empty() {
            return Err(PublishError::NotPublished(spec.to_string()));
        }
        let mut infos = Vec::new();
        for slot in gone {
            self.close_entrances(slot);
            if let Some(port) = self.published[slot].take() {
                let info = port.info(self.guest_label(&port.guest));
                self.events.push(Event::Unpublished(info.clone()));
                infos.push(info);
            }
        }
        Ok(infos)
    }

    pub(super) fn close_entrances(&mut self, published: usize) {
        for (n, at) in (0u32..).zip(&mut self.entrances) {
            if at.take_if(|e| e.published == published).is_some() {
                self.stack.listener_closed(n);
            }
        }
    }

    fn ports(&self) -> Vec<PortInfo> {
        self.published.iter().flatten().map(|p| p.info(self.guest_label(&p.guest))).collect()
    }

    /// The address a published port's guest has now.
    pub(super) fn guest_address(&self, guest: &GuestName) -> Option<IpAddr> {
        Self::guest_of(&self.links, &self.stack, guest)
    }

    pub(super) fn guest_of(links: &[Link], stack: &Netstack, guest: &GuestName) -> Option<IpAddr> {
        match guest {
            GuestName::Address(ip) => Some(*ip),
            GuestName::Default => links.first().and_then(|l| stack.guest_of(l.port)),
            GuestName::Name(name) => {
                links.iter().find(|l| l.name.as_ref() == Some(name)).and_then(|l| stack.guest_of(l.port))
            }
        }
    }

    fn guest_label(&self, guest: &GuestName) -> String {
        let address = self.guest_address(guest).map(|ip| ip.to_string());
        address.unwrap_or_else(|| match guest {
            GuestName::Name(name) => name.clone(),
            _ => self.links.first().map_or_else(String::new, Link::label),
        })
    }

    fn leases(&self) -> Vec<LeaseInfo> {
        let all = self.stack.leases(self.now).into_iter();
        let info = |l: portway_netstack::dhcp::LeaseReport| LeaseInfo {
            ip: l.ip.to_string(),
            mac: l.mac.to_string(),
            name: l.name,
            expires_in_s: l.remaining.map(|d| d.as_secs()),
            fixed: l.fixed,
        };
        let v6 = self.stack.leases6(self.now).into_iter().map(|l| LeaseInfo {
            ip: l.ip.to_string(),
            mac: l.mac.to_string(),
            name: self.lease6_name(&l).map(|(name, _)| name),
            expires_in_s: Some(l.remaining.as_secs()),
            fixed: false,
        });
        all.map(info).chain(v6).collect()
    }

    /// The name of a guest by its IPv6 lease: its link's, the one its IPv4 lease has, or what it sent; and whether it is
    /// that last one.
    fn lease6_name(&self, lease: &portway_netstack::dhcp6::Lease6Report) -> Option<(String, bool)> {
        let v4 = self.stack.leases(self.now).into_iter().find(|l| l.mac == lease.mac);
        let link = self.links.iter().find(|l| Some(l.port) == lease.port).and_then(|l| l.name.clone());
        let given = link.or_else(|| v4.and_then(|l| l.name));
        given.map(|name| (name, false)).or_else(|| lease.name.clone().map(|name| (name, true)))
    }

    /// Tells the control thread which leases there are, and which names they give.
    pub(super) fn tell_leases(&mut self) {
        let leases = self.stack.leases(self.now);
        let links = || self.link_configs.iter().filter_map(|l| l.name.as_deref());
        let mut names = names::of(&leases, links());
        let of_v4 = names.len();
        for lease in self.stack.leases6(self.now) {
            let Some((name, own)) = self.lease6_name(&lease) else { continue };
            // One address of each version, of the same machine; a link's name is nobody else's.
            let owner = names.iter().find(|(known, _)| *known == name).map(|(_, ip)| *ip);
            let same = owner.is_none_or(|ip| leases.iter().any(|l| l.mac == lease.mac && ip == l.ip));
            let free = !own || links().all(|link| link != name);
            if same && free && !names[of_v4..].iter().any(|(known, _)| *known == name) {
                names.push((name, lease.ip.into()));
            }
        }
        let before = self.leases.send_replace(LeaseBook { leases: leases.clone(), names });
        // What is new, or was renewed.
        for lease in leases.iter().filter(|l| l.remaining.is_some()) {
            let known = before.leases.iter().find(|b| b.ip == lease.ip && b.mac == lease.mac);
            if known.is_none_or(|b| b.remaining < lease.remaining) {
                self.events.push(Event::Lease(lease.ip.to_string(), lease.mac.to_string()));
            }
        }
    }

    fn list_flows(&self) -> Vec<FlowInfo> {
        let tcp = self.stack.flows(self.now).map(|f| FlowInfo {
            proto: Protocol::Tcp,
            direction: direction(f.direction == Direction::Published),
            guest: f.guest.to_string(),
            remote: f.remote.to_string(),
            state: match f.state {
                FlowState::Dialing => "dialing",
                FlowState::Open => "open",
                FlowState::Closing => "closing",
            }
            .into(),
            bytes_to_host: f.bytes_to_host,
            bytes_to_guest: f.bytes_to_guest,
            age_s: f.age.as_secs(),
            idle_s: f.idle.as_secs(),
        });
        let udp = self.stack.bindings(self.now).map(|b| FlowInfo {
            proto: Protocol::Udp,
            direction: direction(b.published),
            guest: b.guest.to_string(),
            remote: b.remote.to_string(),
            state: "bound".into(),
            bytes_to_host: b.bytes_to_host,
            bytes_to_guest: b.bytes_to_guest,
            age_s: b.age.as_secs(),
            idle_s: b.idle.as_secs(),
        });
        tcp.chain(udp).collect()
    }

    fn stats(&self) -> Stats {
        let counters = self.stack.counters();
        let links = self.links.iter().filter(|l| !l.ended).map(|l| {
            let c = l.counters();
            LinkStats {
                name: l.label(),
                kind: l.kind().name().into(),
                up: l.is_up(),
                frames_from_guest: c.frames_from_guest,
                bytes_from_guest: c.bytes_from_guest,
                frames_to_guest: c.frames_to_guest,
                bytes_to_guest: c.bytes_to_guest,
            }
        });
        Stats {
            uptime_s: self.started.elapsed().as_secs(),
            links: links.collect(),
            tcp_flows: counters.flows as u64,
            tcp_dialing: counters.dialing as u64,
            tcp_flows_total: counters.flows_total,
            udp_bindings: counters.bindings as u64,
            dns_queries: counters.dns_queries,
            drops: self.stack.drops().iter().filter(|(_, n)| *n > 0).map(|(r, n)| (r.name(), n)).collect(),
        }
    }
}

fn direction(published: bool) -> String {
    if published { "published" } else { "outbound" }.to_owned()
}
