//! What the control thread asks, and its answers.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use portway_api::control::{LeaseInfo, LinkInfo, LinkStats, PortInfo, Protocol, Stats};
use portway_netstack::{Mac, Netstack, PortId, Reach, Transport};

use super::{Driver, Entrance, Kind, LeaseBook, names, token};
use crate::capture::{CAPTURES, Capture};
use crate::events::Event;
use crate::host::{HostFlow, HostStream};
use crate::link::Link;
use crate::publish::spec::{GuestName, HostEnd, PublishSpec};
use crate::publish::{self, GUEST_PORTS, Published};
use crate::request::{CaptureError, FlowReports, PublishError, Reached, Request, TunnelEnd};

/// Ports that may be published at once.
pub(crate) const PORTS: usize = 16_384;

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
                Request::GuestPublish { spec, guest, reply } => {
                    drop(reply.send(self.guest_publish(&spec, guest)));
                }
                Request::Unexpose { host, proto, guest, reply } => {
                    drop(reply.send(self.unexpose(&host, proto, guest)));
                }
                Request::GuestPorts { guest, reply } => drop(reply.send(self.guest_ports(guest))),
                Request::Ports { reply } => drop(reply.send(self.ports())),
                Request::Leases { reply } => drop(reply.send(self.leases())),
                Request::Flows { reply } => drop(reply.send(self.flow_reports())),
                Request::Links { reply } => drop(reply.send(self.link_infos())),
                Request::Reach { to, transport, reply } => drop(reply.send(self.reach(to, transport))),
                Request::Capture { capture, reply } => drop(reply.send(self.capture(capture))),
                Request::EndCaptures => self.end_captures(),
                Request::Attach { fd } => {
                    let config = self.attached.clone();
                    self.attach(&config, fd);
                }
                Request::Tunnel { to, stream } => self.tunnel(to, stream),
                Request::Macs { reply } => drop(reply.send(self.stack.macs().collect())),
                Request::Stats { reply } => drop(reply.send(self.stats())),
                Request::Ipv6Uplink(there) => self.stack.set_ipv6_uplink(there),
                Request::Search { domains } => self.stack.set_search(domains),
                Request::DnsAnswer { ticket, answer } => {
                    if let Some(sink) = Self::sink(&mut self.links, ticket.port) {
                        self.stack.dns_answer(ticket.guest, ticket.asked, ticket.port, &answer, sink);
                    }
                }
                Request::GuestAddress { guest, reply } => drop(reply.send(self.guest_address(&guest))),
                Request::Note(event) => self.events.push(event),
                // Without an agent service there are no agents.
                Request::Agents { reply } => drop(reply.send(Vec::new())),
                Request::Await { reply, .. } => {
                    drop(reply.send(Err(PublishError::NoAgent("waiting".into()))))
                }
                Request::HandedOver { flow, stream } => self.handed_over(flow, stream),
                Request::Outgoing(rules) => self.outgoing = rules,
                Request::GatewayForwards(forwards) => self.stack.set_gateway_forwards(forwards),
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
        (0..spec.count).map(|n| self.publish_one(spec, n, None)).collect()
    }

    /// Publishes one port for the guest that asks for it.
    fn guest_publish(&mut self, spec: &PublishSpec, guest: IpAddr) -> Result<PortInfo, PublishError> {
        // Counted by its link: a guest may have many addresses.
        let link = self.stack.known_port_of(guest);
        let own =
            |p: &&Published| p.by.is_some_and(|(ip, port)| ip == guest || port.is_some() && port == link);
        if self.published.iter().flatten().filter(own).count() >= GUEST_PORTS {
            return Err(PublishError::Limit(format!("a guest exposes {GUEST_PORTS} ports at the most")));
        }
        self.publish_one(spec, 0, Some((guest, link)))
    }

    /// Takes away what was published under `host`; for a `guest`, of its own alone. With port 0 it has to be clear which.
    fn unexpose(&mut self, host: &HostEnd, proto: Protocol, guest: Option<IpAddr>) -> Option<PortInfo> {
        let spec =
            PublishSpec { host: host.clone(), guest: GuestName::Default, guest_port: 0, count: 1, proto };
        let free = matches!(host, HostEnd::Ports { first: 0, .. });
        let named = |p: &Published| {
            let words = if free { p.proto == proto && p.host == *host } else { p.is_named(&spec, 0) };
            words && (guest.is_none() || p.by.map(|(ip, _)| ip) == guest)
        };
        let mut found = (0..self.published.len()).filter(|i| self.published[*i].as_ref().is_some_and(named));
        let slot = found.next()?;
        if found.next().is_some() {
            return None;
        }
        self.unpublish_slot(slot)
    }

    fn guest_ports(&self, guest: IpAddr) -> Vec<PortInfo> {
        let own = self.published.iter().flatten().filter(|p| p.by.is_some_and(|(ip, _)| ip == guest));
        own.map(|p| p.info(self.guest_label(&p.guest))).collect()
    }

    fn publish_one(
        &mut self,
        spec: &PublishSpec,
        n: u16,
        by: Option<(IpAddr, Option<PortId>)>,
    ) -> Result<PortInfo, PublishError> {
        if spec.needs_agent() {
            return Err(PublishError::NoAgent(spec.to_string()));
        }
        if let GuestName::Name(name) = &spec.guest
            && !self.links.iter().any(|l| l.name.as_ref() == Some(name))
        {
            return Err(PublishError::NoGuest(name.clone()));
        }
        if let GuestName::Address(ip) = &spec.guest
            && !self.stack.may_be_guest(*ip)
        {
            return Err(PublishError::NotAGuest(*ip));
        }
        if let Some(allowed) = &self.allowed {
            spec.within(allowed)?;
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
            by,
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
        Ok(gone.into_iter().filter_map(|slot| self.unpublish_slot(slot)).collect())
    }

    fn unpublish_slot(&mut self, slot: usize) -> Option<PortInfo> {
        self.close_entrances(slot);
        let port = self.published.get_mut(slot)?.take()?;
        let info = port.info(self.guest_label(&port.guest));
        self.events.push(Event::Unpublished(info.clone()));
        Some(info)
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
            GuestName::Socket(_) => None,
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
        let links = || self.links.iter().filter_map(|l| l.name.as_deref());
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
        // A guest that leased nothing goes by the addresses it uses.
        for link in self.links.iter().filter(|l| !l.ended) {
            let Some(name) = &link.name else { continue };
            for ip in self.stack.known_by(link.port) {
                let has = |(known, of): &(String, IpAddr)| known == name && of.is_ipv4() == ip.is_ipv4();
                if !names.iter().any(has) {
                    names.push((name.clone(), ip));
                }
            }
        }
        self.tell_lease_events(&leases);
        self.leases.send_replace(LeaseBook { leases, names });
    }

    /// Events for leases that are new, and for those that have ended.
    fn tell_lease_events(&mut self, leases: &[portway_netstack::dhcp::LeaseReport]) {
        let v4 = leases.iter().filter(|l| l.port.is_some()).map(|l| (IpAddr::V4(l.ip), l.mac));
        let v6 = self.stack.leases6(self.now).into_iter().filter(|l| l.port.is_some());
        let mut now: Vec<(IpAddr, Mac)> = v4.chain(v6.map(|l| (l.ip.into(), l.mac))).collect();
        now.sort_unstable();
        let before = std::mem::take(&mut self.known_leases);
        for (ip, mac) in before.iter().filter(|l| now.binary_search(l).is_err()) {
            self.events.push(Event::LeaseEnded(ip.to_string(), mac.to_string()));
        }
        for (ip, mac) in now.iter().filter(|l| before.binary_search(l).is_err()) {
            self.events.push(Event::Lease(ip.to_string(), mac.to_string()));
        }
        self.known_leases = now;
    }

    fn flow_reports(&self) -> FlowReports {
        FlowReports {
            tcp: self.stack.flows(self.now).collect(),
            udp: self.stack.bindings(self.now).collect(),
            links: self.links.iter().map(|l| (l.port, l.label())).collect(),
        }
    }

    fn link_infos(&self) -> Vec<LinkInfo> {
        let info = |(n, l): (usize, &Link)| {
            let c = l.counters();
            LinkInfo {
                name: l.label(),
                kind: l.kind().name().into(),
                address: match self.link_configs.get(n) {
                    Some(_) => l.address().to_string(),
                    None => "a further VM of a listener".into(),
                },
                up: l.is_up(),
                ip: self.stack.guest_of(l.port).map(|ip| ip.to_string()),
                addresses: self.stack.addresses(self.now, l.port).iter().map(ToString::to_string).collect(),
                mtu: l.mtu(),
                isolate: self.link_configs.get(n).is_some_and(|c| c.isolate),
                offload: l.offloads().tcp,
                frames_from_guest: c.frames_from_guest,
                bytes_from_guest: c.bytes_from_guest,
                frames_to_guest: c.frames_to_guest,
                bytes_to_guest: c.bytes_to_guest,
            }
        };
        self.links.iter().enumerate().filter(|(_, l)| !l.ended).map(info).collect()
    }

    fn reach(&self, to: std::net::SocketAddr, transport: Transport) -> Reached {
        let leased = self.stack.leases(self.now).into_iter().find(|l| to.ip() == l.ip).and_then(|l| l.port);
        // A guest that has not spoken yet is found by ARP when somebody asks for it.
        let reach = match (self.stack.reach(to, transport), leased) {
            (Reach::Nowhere(_), Some(port)) => Reach::Guest(port),
            (reach, _) => reach,
        };
        let guest = match reach {
            Reach::Guest(port) => self.links.iter().find(|l| l.port == port).map(Link::label),
            _ => None,
        };
        let taker = match reach {
            Reach::Host(at) | Reach::Forwarded(at) if transport == Transport::Tcp => {
                self.outgoing.iter().find(|o| o.takes(at)).map(|o| o.taker().shown())
            }
            _ => None,
        };
        Reached { reach, guest, taker }
    }

    /// Connects a client of the API to a guest, as if it had come to a published port.
    fn tunnel(&mut self, to: std::net::SocketAddr, stream: TunnelEnd) {
        let stream = match stream {
            TunnelEnd::Unix(s) => HostStream::Unix(mio::net::UnixStream::from_std(s)),
            TunnelEnd::Tcp(s) => HostStream::Tcp(mio::net::TcpStream::from_std(s)),
        };
        let client = std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        match self.stack.open_to_guest(self.now, to, client) {
            Ok(id) => self.adopt(HostFlow::open(id, stream)),
            Err(reason) => {
                tracing::debug!(%reason, %to, "a tunnel was not opened");
                stream.reset();
            }
        }
    }

    // ---- captures ----

    /// Begins a capture; the names of the links it sees.
    ///
    /// # Errors
    /// See [`CaptureError`].
    pub fn capture(&mut self, capture: Arc<Capture>) -> Result<Vec<String>, CaptureError> {
        self.end_captures();
        if self.captures.len() >= CAPTURES {
            return Err(CaptureError::Limit);
        }
        let links: Vec<String> =
            self.links.iter().filter(|l| !l.ended).map(Link::label).filter(|l| capture.wants(l)).collect();
        if let Some(vm) = capture.vm().filter(|_| links.is_empty()) {
            return Err(CaptureError::NoLink(vm.to_owned()));
        }
        self.captures.push(capture);
        self.tap_links();
        Ok(links)
    }

    fn end_captures(&mut self) {
        let before = self.captures.len();
        for over in self.captures.extract_if(.., |c| c.is_over()) {
            self.capture_lost += over.lost_total();
        }
        if self.captures.len() != before {
            self.tap_links();
        }
    }

    /// Lets the captures look at the links they want, and at no others.
    pub(super) fn tap_links(&mut self) {
        for link in &mut self.links {
            let label = link.label();
            link.tap(self.captures.iter().filter(|c| c.wants(&label)).map(Arc::clone).collect());
        }
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
            timers: counters.timers as u64,
            drops: self.stack.drops().iter().filter(|(_, n)| *n > 0).map(|(r, n)| (r.name(), n)).collect(),
            captures: self.captures.iter().filter(|c| !c.is_over()).count() as u64,
            capture_lost: self.capture_lost + self.captures.iter().map(|c| c.lost_total()).sum::<u64>(),
            events_lost: self.events.lost(),
            // What the control thread knows, it adds.
            ..Stats::default()
        }
    }
}
