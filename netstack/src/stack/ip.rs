//! IP packets of guests: who may send them, what they are, and whom they are for. One way for both versions.
//!
//! ```text
//!  IPv4 ─┐                     ┌─ fragment ─► fragments ─► Handled::Whole ─► again from the start
//!  IPv6 ─┴─► Packet ─► source ─┼─ TCP ─► flow table        UDP ─► DNS · DHCP · bindings
//!                              └─ ICMP ─► echo · neighbour discovery
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{DNS, HTTP, Netstack};
use crate::config::{DnsAt, Transport};
use crate::drop_reason::DropReason;
use crate::fragments::Piece;
use crate::host::{Datagram, Echo, FlowId, Handled, HostTarget, METADATA_V6, Reach, Served, Service};
use crate::icmp::{self, Fault, Unreachable};
use crate::ndp;
use crate::switch::Destination;
use crate::tcp::{Arrival, FlowKey, Path, Verdict};
use crate::time::Instant;
use crate::types::{Mac, PortId};
use crate::udp::Target;
use crate::wire::ipv6::Fragment;
use crate::wire::{ethernet, ipv4, ipv6, tcp, udp};

/// The ports of DHCPv6 servers and clients (RFC 8415 §7.2).
const DHCP6_SERVER: u16 = 547;
/// See [`DHCP6_SERVER`].
pub(super) const DHCP6_CLIENT: u16 = 546;
/// All DHCPv6 servers and relays on the link (RFC 8415 §7.1).
const DHCP6_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// A packet of a guest, of either version.
#[derive(Clone, Copy)]
pub(super) struct Packet<'f> {
    pub(super) port: PortId,
    pub(super) mac: Mac,
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: u8,
    pub(super) hop_limit: u8,
    pub(super) dont_fragment: bool,
    /// All of it, as the guest sent it.
    pub(super) bytes: &'f [u8],
    pub(super) payload: &'f [u8],
    /// Whether headers stand between IPv6's own and the payload.
    pub(super) extended: bool,
}

impl<'f> Packet<'f> {
    fn v4(port: PortId, mac: Mac, packet: &ipv4::Packet<'f>) -> Self {
        let h = packet.header;
        Self {
            port,
            mac,
            src: h.src.into(),
            dst: h.dst.into(),
            protocol: h.protocol,
            hop_limit: h.hop_limit,
            dont_fragment: h.dont_fragment,
            bytes: packet.bytes,
            payload: packet.payload,
            extended: false,
        }
    }

    fn v6(port: PortId, mac: Mac, packet: &ipv6::Packet<'f>) -> Self {
        let h = packet.header;
        Self {
            port,
            mac,
            src: h.src.into(),
            dst: h.dst.into(),
            protocol: h.protocol,
            hop_limit: h.hop_limit,
            // RFC 8200 §4.5: only the source fragments, and one that did may do so again.
            dont_fragment: h.fragment.is_none(),
            bytes: packet.bytes,
            payload: packet.payload,
            extended: packet.is_extended(),
        }
    }

    fn target(&self, port: u16) -> Target {
        Target { port: self.port, mac: self.mac, guest: SocketAddr::new(self.src, port) }
    }
}

impl Netstack {
    /// Notes that the guest `mac` on `port` uses `ip`.
    pub(super) fn claim(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        ip: IpAddr,
    ) -> Result<(), DropReason> {
        let elsewhere = match ip {
            IpAddr::V4(v4) => self.dhcp.is_elsewhere(now, v4, port),
            IpAddr::V6(v6) => self.dhcp6.as_ref().is_some_and(|d| d.is_elsewhere(now, v6, port)),
        };
        if !self.is_guests(ip) || elsewhere {
            return Err(DropReason::SourceSpoofed);
        }
        if let IpAddr::V6(v6) = ip
            && let Some(maker) = ndp::ethernet_of(v6)
        {
            // Such an address is its maker's, whoever was first: everybody can guess it.
            let other = matches!(self.switch.destination(maker), Destination::Port(p) if p != port);
            if maker != mac && other {
                return Err(DropReason::SourceSpoofed);
            }
            if maker == mac {
                self.neighbours.take_from_others(ip, port);
            }
        }
        if self.neighbours.learn(ip, port, mac)? && self.tcp.is_resolving() {
            self.tcp.resolved(now, port, ip, mac, &mut self.commands);
        }
        Ok(())
    }

    /// Whether `ip` is an address that a guest can have.
    #[must_use]
    pub fn may_be_guest(&self, ip: IpAddr) -> bool {
        self.is_guests(ip)
    }

    /// Whether a guest may have `ip`: in a subnet, or link-local for IPv6, and not one of ours.
    pub(super) fn is_guests(&self, ip: IpAddr) -> bool {
        if self.config.is_ours(ip) {
            return false;
        }
        match (ip, &self.config.ipv6) {
            (IpAddr::V4(_), _) => {
                let subnet = &self.config.subnet;
                subnet.contains(ip) && ip != subnet.network() && Some(ip) != subnet.broadcast()
            }
            // RFC 4291 §2.6.1: the prefix itself is the routers' anycast address.
            (IpAddr::V6(v6), Some(config)) => {
                (config.subnet.contains(ip) && ip != config.subnet.network()) || v6.is_unicast_link_local()
            }
            (IpAddr::V6(_), None) => false,
        }
    }

    /// A frame between guests must not claim an address of ours or of another port, nor say what only we say.
    pub(super) fn check_claim(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        let source: IpAddr = match header.kind {
            ethernet::IPV4 => ipv4::parse(payload)?.header.src.into(),
            ethernet::ARP => crate::wire::arp::parse(payload)?.sender_ip.into(),
            ethernet::IPV6 if self.speaks_v6(port) => {
                return self.guard_v6(now, port, header.src, &ipv6::parse(payload)?);
            }
            _ => return Ok(()),
        };
        if source.is_unspecified() { Ok(()) } else { self.claim(now, port, header.src, source) }
    }

    /// What every IPv6 packet of a guest is looked at for, wherever it goes (RFC 6105, RFC 7610).
    fn guard_v6(
        &mut self,
        now: Instant,
        port: PortId,
        mac: Mac,
        packet: &ipv6::Packet<'_>,
    ) -> Result<(), DropReason> {
        let h = packet.header;
        if !h.src.is_unspecified() {
            self.claim(now, port, mac, h.src.into())?;
        }
        if h.fragment.is_some_and(|f| f.is_part()) {
            return Ok(());
        }
        match (h.protocol, packet.payload) {
            (ipv6::ICMP, [ndp::ROUTER_ADVERTISEMENT | ndp::REDIRECT, ..]) => Err(DropReason::RogueRouter),
            // RFC 6980 §5: neighbour discovery never comes in fragments.
            (ipv6::ICMP, [ndp::ROUTER_SOLICITATION..=ndp::NEIGHBOUR_ADVERTISEMENT, ..])
                if h.fragment.is_some() =>
            {
                Err(DropReason::BadNeighbour)
            }
            (ipv6::ICMP, [ndp::NEIGHBOUR_ADVERTISEMENT, ..]) => {
                match ndp::parse(h.src, h.dst, h.hop_limit, packet.payload)? {
                    ndp::Message::Advertisement { target } => self.claim(now, port, mac, target.into()),
                    _ => Ok(()),
                }
            }
            (ipv4::UDP, [s0, s1, ..]) if u16::from_be_bytes([*s0, *s1]) == DHCP6_SERVER => {
                Err(DropReason::RogueRouter)
            }
            _ => Ok(()),
        }
    }

    /// Whether IPv6 is spoken on `port`: it is configured, and the link is large enough (RFC 8200 §5).
    pub(super) fn speaks_v6(&self, port: PortId) -> bool {
        let port = self.ports.get(usize::from(port.0)).and_then(Option::as_ref);
        self.config.ipv6.is_some() && port.is_some_and(|p| p.config.mtu >= ipv6::MIN_MTU)
    }

    pub(super) fn ipv4<'f>(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        let read = ipv4::parse(payload)?;
        let packet = Packet::v4(port, header.src, &read);
        if read.header.fragment {
            self.claim(now, port, header.src, packet.src)?;
            self.forbid_groups(read.header.dst)?;
            return self.piece(now, &packet, read.fragment());
        }
        let dst = read.header.dst;
        if packet.protocol == ipv4::UDP {
            let (ports, body) = udp::parse(packet.payload)?;
            if ports.dst == 67 && (dst.is_broadcast() || dst == self.config.gateway) {
                return self.dhcp(now, port, header.src, body).map(|()| Handled::Done);
            }
            self.claim(now, port, header.src, packet.src)?;
            self.forbid_groups(dst)?;
            return self.udp(now, &packet, ports, body);
        }
        self.claim(now, port, header.src, packet.src)?;
        self.forbid_groups(dst)?;
        match packet.protocol {
            ipv4::TCP => self.tcp(now, &packet).map(|()| Handled::Done),
            ipv4::ICMP => {
                if icmp::is_echo_request(packet.payload)? {
                    return self.echo(now, &packet);
                }
                self.refusal(&packet).map(|()| Handled::Done)
            }
            _ => self.unknown(now, &packet),
        }
    }

    pub(super) fn ipv6<'f>(
        &mut self,
        now: Instant,
        port: PortId,
        header: ethernet::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        if !self.speaks_v6(port) {
            return Err(DropReason::UnknownEtherType);
        }
        let read = ipv6::parse(payload)?;
        self.guard_v6(now, port, header.src, &read)?;
        self.router_begins(now, port);
        let h = read.header;
        let packet = Packet::v6(port, header.src, &read);
        if let Some(place) = h.fragment.filter(Fragment::is_part) {
            if h.dst.is_multicast() {
                return Err(DropReason::Multicast);
            }
            if h.src.is_unspecified() {
                return Err(DropReason::SourceSpoofed);
            }
            return self.piece(now, &packet, place);
        }
        if h.protocol == ipv6::ICMP {
            return self.icmp_v6(now, &packet, h);
        }
        if h.src.is_unspecified() {
            return Err(DropReason::SourceSpoofed);
        }
        match h.protocol {
            ipv4::UDP => {
                let (ports, body) = udp::parse(packet.payload)?;
                let servers = h.dst == DHCP6_SERVERS || self.config.is_ours(h.dst.into());
                if ports.dst == DHCP6_SERVER && servers {
                    return self.dhcp6(now, &packet, body).map(|()| Handled::Done);
                }
                if h.dst.is_multicast() {
                    return Err(DropReason::Multicast);
                }
                self.udp(now, &packet, ports, body)
            }
            _ if h.dst.is_multicast() => Err(DropReason::Multicast),
            ipv4::TCP => self.tcp(now, &packet).map(|()| Handled::Done),
            _ => self.unknown(now, &packet),
        }
    }

    fn icmp_v6<'f>(
        &mut self,
        now: Instant,
        packet: &Packet<'f>,
        h: ipv6::Header,
    ) -> Result<Handled<'f>, DropReason> {
        if packet.payload.len() < 4 || ipv6::icmp_checksum(h.src, h.dst, &[packet.payload]) != 0 {
            return Err(DropReason::BadIcmp);
        }
        match packet.payload.first() {
            Some(&icmp::ECHO_REQUEST_V6) if packet.payload.len() >= icmp::ECHO_HEADER => {
                if h.src.is_unspecified() {
                    return Err(DropReason::SourceSpoofed);
                }
                if h.dst.is_multicast() {
                    return Err(DropReason::Multicast);
                }
                self.echo(now, packet)
            }
            Some(ndp::ROUTER_SOLICITATION..=ndp::REDIRECT) => {
                self.neighbour_discovery(now, packet, h).map(|()| Handled::Done)
            }
            // Reports of multicast listeners, with which every guest begins.
            _ if h.dst.is_multicast() => Err(DropReason::Multicast),
            _ => self.refusal(packet).map(|()| Handled::Done),
        }
    }

    /// A guest's ICMP message that asks for nothing. One that says that nobody has a port any more ends that port's binding, and
    /// with it the host's socket: the host's kernel tells the same to who goes on sending. About somebody else than the
    /// guest sent to last it says nothing, for a connected socket of the guest's refuses others.
    fn refusal(&mut self, packet: &Packet<'_>) -> Result<(), DropReason> {
        let about = icmp::refused_datagram(packet.payload, packet.src.is_ipv6());
        let (guest, seen) = about.filter(|(g, _)| g.ip() == packet.src).ok_or(DropReason::UnknownProtocol)?;
        let remote = self.forwarded(seen, Transport::Udp).map_or_else(|| self.host_view(seen), Ok)?;
        self.udp.refused(packet.port, guest, remote);
        Ok(())
    }

    fn neighbour_discovery(
        &mut self,
        now: Instant,
        packet: &Packet<'_>,
        h: ipv6::Header,
    ) -> Result<(), DropReason> {
        let (port, mac) = (packet.port, packet.mac);
        match ndp::parse(h.src, h.dst, h.hop_limit, packet.payload)? {
            ndp::Message::RouterSolicitation => {
                self.limit(now, port)?;
                let guest = (!h.src.is_unspecified()).then_some((h.src, mac));
                self.advertise_router(port, guest);
            }
            ndp::Message::Solicitation { target } if self.config.is_ours(target.into()) => {
                self.limit(now, port)?;
                let router = self.config.ipv6.as_ref().is_some_and(|c| c.host_alias != target);
                let frame = ndp::advertisement(target, self.config.gateway_mac, router, h.src, mac);
                self.answer(port, &frame);
            }
            // RFC 4862 §5.4: a guest asks whether anybody has the address it is about to use. Nobody here does; whoever
            // else has it answers for itself. Until then we know where it will be.
            ndp::Message::Solicitation { target } if h.src.is_unspecified() => {
                let _ = self.claim(now, port, mac, target.into());
            }
            // An advertisement's address was noted with every packet's.
            ndp::Message::Solicitation { .. } | ndp::Message::Advertisement { .. } => {}
        }
        Ok(())
    }

    fn forbid_groups(&self, dst: Ipv4Addr) -> Result<(), DropReason> {
        let directed = Some(IpAddr::V4(dst)) == self.config.subnet.broadcast();
        if dst.is_multicast() || dst.is_broadcast() || directed { Err(DropReason::Multicast) } else { Ok(()) }
    }

    fn piece<'f>(
        &mut self,
        now: Instant,
        packet: &Packet<'f>,
        place: Fragment,
    ) -> Result<Handled<'f>, DropReason> {
        let Packet { port, mac, src, dst, protocol, payload: bytes, .. } = *packet;
        let piece = Piece { port, mac, src, dst, protocol, place, bytes };
        let whole = self.fragments.add(now, &piece, self.config.gateway_mac)?;
        Ok(whole.map_or(Handled::Done, Handled::Whole))
    }

    fn unknown<'f>(&mut self, now: Instant, packet: &Packet<'f>) -> Result<Handled<'f>, DropReason> {
        let why =
            if self.config.is_ours(packet.dst) { Unreachable::Protocol } else { Unreachable::Prohibited };
        self.refuse(now, packet, Fault::Unreachable(why))?;
        Err(DropReason::UnknownProtocol)
    }

    /// A destination of a guest as the host knows it. `Err` when policy forbids it.
    pub(super) fn host_view(&self, dst: SocketAddr) -> Result<SocketAddr, DropReason> {
        let ip = match dst.ip() {
            IpAddr::V4(ip) => self.host_view_v4(ip)?.into(),
            IpAddr::V6(ip) => self.host_view_v6(ip)?.into(),
        };
        Ok(SocketAddr::new(ip, dst.port()))
    }

    fn host_view_v4(&self, ip: Ipv4Addr) -> Result<Ipv4Addr, DropReason> {
        if ip == self.config.host_alias && self.config.host_loopback {
            return Ok(Ipv4Addr::LOCALHOST);
        }
        // The gateway serves what it serves; nothing of the host stands behind it.
        if ip == self.config.host_alias
            || self.config.is_ours(ip.into())
            || (ip.is_link_local() && !self.config.metadata)
            || ip.is_loopback()
            || ip.octets()[0] == 0
        {
            return Err(DropReason::Forbidden);
        }
        // An address of the subnet that no guest has: there is nobody, and the host's network of the same
        // numbers is not meant.
        if self.config.subnet.contains(ip.into()) { Err(DropReason::NotForUs) } else { Ok(ip) }
    }

    fn host_view_v6(&self, ip: Ipv6Addr) -> Result<Ipv6Addr, DropReason> {
        let Some(config) = &self.config.ipv6 else { return Err(DropReason::Forbidden) };
        if ip == config.host_alias && self.config.host_loopback {
            return Ok(Ipv6Addr::LOCALHOST);
        }
        // An IPv4 address inside (mapped, compatible, NAT64 of RFC 6052) must not lead where IPv4 itself may not.
        let inner = match ip.segments() {
            [0, 0, 0, 0, 0, 0xffff, ..] | [0, 0, 0, 0, 0, 0, ..] => return Err(DropReason::Forbidden),
            [0x64, 0xff9b, 0, 0, 0, 0, a, b] => Some(Ipv4Addr::from(u32::from(a) << 16 | u32::from(b))),
            _ => None,
        };
        if self.config.is_ours(ip.into())
            || (ip == METADATA_V6 && !self.config.metadata)
            || inner.is_some_and(|v4| self.host_view_v4(v4) == Err(DropReason::Forbidden))
        {
            return Err(DropReason::Forbidden);
        }
        if config.subnet.contains(ip.into()) || ip.is_unicast_link_local() {
            return Err(DropReason::NotForUs);
        }
        Ok(ip)
    }

    /// The Ethernet addresses guests use now, and the ports they are behind.
    pub fn macs(&self) -> impl Iterator<Item = (Mac, PortId)> + '_ {
        self.switch.macs()
    }

    /// The guest's end of a flow.
    #[must_use]
    pub fn guest_of_flow(&self, flow: FlowId) -> Option<SocketAddr> {
        self.tcp.guest_of(flow)
    }

    /// What stands behind `to` for a guest, as the data path decides it; for those who ask before they connect.
    #[must_use]
    pub fn reach(&self, to: SocketAddr, transport: Transport) -> Reach {
        let udp = transport == Transport::Udp;
        let dhcp = match to.ip() {
            IpAddr::V4(ip) => to.port() == 67 && (ip.is_broadcast() || ip == self.config.gateway),
            IpAddr::V6(ip) => {
                let servers = ip == DHCP6_SERVERS || self.config.is_ours(to.ip());
                to.port() == DHCP6_SERVER && self.config.ipv6.is_some() && servers
            }
        };
        if udp && dhcp {
            return Reach::Served(Served::Dhcp);
        }
        let group = match to.ip() {
            IpAddr::V4(ip) => self.forbid_groups(ip).is_err(),
            IpAddr::V6(ip) => ip.is_multicast(),
        };
        if group {
            return Reach::Nowhere(DropReason::Multicast);
        }
        if self.is_dns(to) {
            return Reach::Served(Served::Dns);
        }
        if let Some(to) = self.forwarded(to, transport) {
            return Reach::Forwarded(to);
        }
        if !udp && self.is_api(to) {
            return Reach::Served(Served::Api);
        }
        if self.is_gateway(to.ip()) {
            return Reach::Gateway;
        }
        match self.neighbours.get(to.ip()) {
            Some(neighbour) => Reach::Guest(neighbour.port),
            None => self.host_view(to).map_or_else(Reach::Nowhere, Reach::Host),
        }
    }

    /// An address of the host that answers, as a guest of that version knows it.
    pub(super) fn guest_view(&self, remote: SocketAddr, v6: bool) -> SocketAddr {
        let ip = match (remote.ip().to_canonical(), &self.config.ipv6) {
            (IpAddr::V4(ip), _) if !v6 && !ip.is_loopback() && !self.config.subnet.contains(ip.into()) => {
                ip.into()
            }
            (IpAddr::V6(ip), Some(c))
                if v6
                    && !ip.is_loopback()
                    && !ip.is_unicast_link_local()
                    && !c.subnet.contains(ip.into()) =>
            {
                ip.into()
            }
            (_, Some(c)) if v6 => c.host_alias.into(),
            _ => self.config.host_alias.into(),
        };
        SocketAddr::new(ip, remote.port())
    }

    /// A client of a published port as a guest of that version knows it: by an address it has a route to.
    pub(super) fn client_view(&self, client: SocketAddr, v6: bool) -> SocketAddr {
        match &self.config.ipv6 {
            Some(c) if v6 && !self.router.as_ref().is_some_and(|r| r.uplink()) => {
                SocketAddr::new(c.host_alias.into(), client.port())
            }
            _ => self.guest_view(client, v6),
        }
    }

    pub(super) fn is_gateway(&self, ip: IpAddr) -> bool {
        let host_alias = match ip {
            IpAddr::V4(ip) => ip == self.config.host_alias,
            IpAddr::V6(ip) => self.config.ipv6.as_ref().is_some_and(|c| ip == c.host_alias),
        };
        self.config.is_ours(ip) && !host_alias
    }

    fn is_dns(&self, to: SocketAddr) -> bool {
        to.port() == DNS
            && match to.ip() {
                IpAddr::V4(ip) => self.config.dns() == Some(ip),
                ip @ IpAddr::V6(_) => self.config.services.dns != DnsAt::Nowhere && self.is_gateway(ip),
            }
    }

    /// Whether the API for guests is there: on the gateway's addresses, and not where that is the host's as well.
    fn is_api(&self, to: SocketAddr) -> bool {
        let gateway = match (to.ip(), &self.config.ipv6) {
            (IpAddr::V4(ip), _) => ip == self.config.gateway && ip != self.config.host_alias,
            (IpAddr::V6(ip), Some(config)) => ip == config.gateway && ip != config.host_alias,
            (IpAddr::V6(_), None) => false,
        };
        self.config.guest_api && to.port() == HTTP && gateway
    }

    /// Where a port of the gateway leads, when it is forwarded.
    fn forwarded(&self, to: SocketAddr, transport: Transport) -> Option<SocketAddr> {
        let gateway = to.ip() == IpAddr::V4(self.config.gateway);
        gateway.then(|| self.config.forward(transport, to.port())).flatten()
    }

    /// Routers a packet to `remote` may still pass. The host's loopback is behind none.
    fn hops(&mut self, now: Instant, packet: &Packet<'_>, remote: IpAddr) -> Result<u8, DropReason> {
        if remote.is_loopback() {
            return Ok(packet.hop_limit.max(1));
        }
        match packet.hop_limit.checked_sub(1) {
            Some(left @ 1..) => Ok(left),
            _ => {
                self.refuse(now, packet, Fault::HopLimit)?;
                Err(DropReason::HopLimit)
            }
        }
    }

    fn tcp(&mut self, now: Instant, packet: &Packet<'_>) -> Result<(), DropReason> {
        let segment = tcp::parse(packet.payload)?;
        let (port, guest_mac) = (packet.port, packet.mac);
        let key = FlowKey::new(
            port,
            SocketAddr::new(packet.src, segment.src),
            SocketAddr::new(packet.dst, segment.dst),
        );
        let path = Path { gateway: self.config.gateway_mac, guest: guest_mac };
        let plain;
        let bytes = if packet.extended {
            plain = without_extensions(packet);
            &plain[..]
        } else {
            packet.bytes
        };
        let arrival = Arrival { key, path, segment, packet: bytes };
        let Some(outbox) = self.outboxes.get_mut(usize::from(port.0)).and_then(Option::as_mut) else {
            return Err(DropReason::NotForUs);
        };
        match self.tcp.from_guest(now, arrival, outbox, &mut self.commands) {
            Verdict::Done(result) => result,
            Verdict::Syn => self.syn(now, packet, arrival),
        }
    }

    /// A SYN of a connection that is not known.
    fn syn(&mut self, now: Instant, packet: &Packet<'_>, arrival: Arrival<'_>) -> Result<(), DropReason> {
        let remote = arrival.key.remote();
        let target = if self.is_dns(remote) {
            Ok(HostTarget::Service(Service::Dns))
        } else if let Some(to) = self.forwarded(remote, Transport::Tcp) {
            Ok(HostTarget::Address(to))
        } else if self.is_api(remote) {
            Ok(HostTarget::Service(Service::Api))
        } else {
            self.host_view(remote).map(HostTarget::Address)
        };
        if let Ok(HostTarget::Address(to)) = target {
            self.hops(now, packet, to.ip())?;
        }
        let outbox = self.outboxes.get_mut(usize::from(packet.port.0)).and_then(Option::as_mut);
        let Some(outbox) = outbox else { return Err(DropReason::NotForUs) };
        match target {
            Ok(target) => self.tcp.dial(now, arrival, target, outbox, &mut self.commands),
            Err(DropReason::NotForUs) => {
                self.refuse(now, packet, Fault::Unreachable(Unreachable::Host))?;
                Err(DropReason::NotForUs)
            }
            Err(reason) => {
                self.tcp.reject(now, packet.port, arrival.path, arrival.packet, outbox);
                Err(reason)
            }
        }
    }

    fn udp<'f>(
        &mut self,
        now: Instant,
        packet: &Packet<'f>,
        ports: udp::Header,
        payload: &'f [u8],
    ) -> Result<Handled<'f>, DropReason> {
        let guest = SocketAddr::new(packet.src, ports.src);
        let seen = SocketAddr::new(packet.dst, ports.dst);
        if self.is_dns(seen) {
            self.dns_queries += 1;
            return Ok(Handled::Dns { guest, asked: seen, query: payload });
        }
        let forwarded = self.forwarded(seen, Transport::Udp);
        if forwarded.is_none() && self.is_gateway(seen.ip()) {
            self.refuse(now, packet, Fault::Unreachable(Unreachable::Port))?;
            return Err(DropReason::NotForUs);
        }
        let remote = match forwarded {
            Some(to) => to,
            None => self.allowed(now, packet, seen)?,
        };
        let hop_limit = self.hops(now, packet, remote.ip())?;
        let path = self.udp.to_host(now, packet.target(ports.src), seen, remote, payload.len());
        let dont_fragment = packet.dont_fragment;
        Ok(Handled::Datagram(Datagram { path, remote, payload, hop_limit, dont_fragment }))
    }

    /// Where a datagram or echo request to `seen` goes; a guest that may not is told.
    fn allowed(
        &mut self,
        now: Instant,
        packet: &Packet<'_>,
        seen: SocketAddr,
    ) -> Result<SocketAddr, DropReason> {
        let reason = match self.host_view(seen) {
            Ok(remote) => return Ok(remote),
            Err(reason) => reason,
        };
        let why = if reason == DropReason::NotForUs { Unreachable::Host } else { Unreachable::Prohibited };
        self.refuse(now, packet, Fault::Unreachable(why))?;
        Err(reason)
    }

    /// An echo request, whose checksum is right.
    fn echo<'f>(&mut self, now: Instant, packet: &Packet<'f>) -> Result<Handled<'f>, DropReason> {
        let message = packet.payload;
        self.limit(now, packet.port)?;
        if self.config.is_ours(packet.dst) {
            if let Some(reply) = icmp::echo_reply(packet.dst, packet.src, message) {
                self.answer_ip(packet.port, packet.mac, &reply);
            }
            return Ok(Handled::Done);
        }
        let remote = self.allowed(now, packet, SocketAddr::new(packet.dst, 0))?;
        let hop_limit = self.hops(now, packet, remote.ip())?;
        let from = packet.target(icmp::echo_id(message));
        let binding = self.udp.echo_to_host(now, from, remote, message.len());
        let dont_fragment = packet.dont_fragment;
        Ok(Handled::Echo(Echo { binding, remote, message, hop_limit, dont_fragment }))
    }
}

/// An IPv6 packet as it would be without extension headers: what smoltcp and the flow's held SYN know.
fn without_extensions(packet: &Packet<'_>) -> Vec<u8> {
    let (IpAddr::V6(src), IpAddr::V6(dst)) = (packet.src, packet.dst) else { return packet.bytes.to_vec() };
    let length = u16::try_from(packet.payload.len()).unwrap_or(u16::MAX);
    let mut plain = ipv6::header(src, dst, packet.protocol, packet.hop_limit, length).to_vec();
    plain.extend_from_slice(packet.payload);
    plain
}
