//! What the stack is told when it is made, and the limits of everything a guest can make grow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::dhcp::StaticLease;
use crate::ndp;
use crate::time::Duration;
use crate::types::{Mac, Subnet};

/// The network, as one value.
#[derive(Debug, Clone)]
pub struct StackConfig {
    /// The guests' subnet.
    pub subnet: Subnet,
    /// Our address on it: router, DHCP and DNS server.
    pub gateway: Ipv4Addr,
    /// The address behind which the host's loopback stands.
    pub host_alias: Ipv4Addr,
    /// The Ethernet address of gateway and host alias.
    pub gateway_mac: Mac,
    /// What the gateway does for guests where that is not the usual.
    pub services: Services,
    /// The domain name guests are given (DHCP option 15).
    pub domain: String,
    /// More search domains (DHCP option 119).
    pub search: Vec<String>,
    /// Time servers guests are told of (DHCP option 42).
    pub ntp: Vec<Ipv4Addr>,
    /// The longest DHCP lease; a client may ask for a shorter one.
    pub lease_time: Duration,
    /// Addresses that belong to one guest for ever.
    pub static_leases: Vec<StaticLease>,
    /// Whether the host alias reaches the host's loopback.
    pub host_loopback: bool,
    /// Whether the gateway's port 80 is [`crate::Service::Api`].
    pub guest_api: bool,
    /// Whether link-local addresses (cloud metadata, 169.254.0.0/16) may be reached.
    pub metadata: bool,
    /// IPv6; `None` when it is not spoken.
    pub ipv6: Option<Ipv6Config>,
    /// How UDP is carried.
    pub udp: UdpConfig,
    /// The limits.
    pub limits: Limits,
}

/// Where DNS is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DnsAt {
    /// On the gateway's address.
    #[default]
    Gateway,
    /// On an address of its own, as with slirp.
    Address(Ipv4Addr),
    /// Nowhere: guests are told of no resolver.
    Nowhere,
}

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the gateway behind which something of the host's stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayForward {
    /// Of which protocol.
    pub transport: Transport,
    /// The gateway's port.
    pub port: u16,
    /// Where its connections and datagrams go.
    pub to: SocketAddr,
}

/// What the gateway does for guests where that is not the usual.
#[derive(Debug, Clone, Default)]
pub struct Services {
    /// Where DNS is served.
    pub dns: DnsAt,
    /// The first and the last address that is leased; `None`: all of the subnet that are not ours.
    pub pool: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Ports of the gateway that lead elsewhere; of two for the same port the first counts.
    pub forwards: Vec<GatewayForward>,
}

impl StackConfig {
    /// Where DNS is served, if anywhere.
    #[must_use]
    pub const fn dns(&self) -> Option<Ipv4Addr> {
        match self.services.dns {
            DnsAt::Gateway => Some(self.gateway),
            DnsAt::Address(ip) => Some(ip),
            DnsAt::Nowhere => None,
        }
    }

    /// Where a port of the gateway leads, when it is forwarded.
    #[must_use]
    pub fn forward(&self, transport: Transport, port: u16) -> Option<SocketAddr> {
        let forwards = self.services.forwards.iter();
        forwards.clone().find(|f| f.transport == transport && f.port == port).map(|f| f.to)
    }

    /// Whether `address` is one of ours on the subnet.
    #[must_use]
    pub fn is_ours(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(ip) => ip == self.gateway || ip == self.host_alias || self.dns() == Some(ip),
            IpAddr::V6(ip) => self.ipv6.as_ref().is_some_and(|v6| {
                ip == v6.gateway || ip == v6.host_alias || ip == ndp::link_local(self.gateway_mac)
            }),
        }
    }
}

/// IPv6 of the network.
#[derive(Debug, Clone)]
pub struct Ipv6Config {
    /// The guests' /64.
    pub subnet: Subnet,
    /// Our address in it: DHCPv6 and DNS server. The router is our link-local address.
    pub gateway: Ipv6Addr,
    /// The address behind which the host's loopback stands.
    pub host_alias: Ipv6Addr,
    /// Whether the host has a route for IPv6, at the start; [`crate::Netstack::set_ipv6_uplink`] tells later changes.
    pub uplink: bool,
}

/// Who may answer a guest's datagrams (RFC 4787 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum UdpFilter {
    /// Any port of an address the guest has sent to.
    #[default]
    Address,
    /// The address and port the guest has sent to.
    Endpoint,
    /// Anybody who knows the binding's address.
    Any,
}

/// How UDP is carried.
#[derive(Debug, Clone)]
pub struct UdpConfig {
    /// Who may answer.
    pub filter: UdpFilter,
    /// A binding ends so long after the guest's last datagram (RFC 4787 REQ-5: not below 2 min, 5 min recommended).
    pub idle: Duration,
}

impl Default for UdpConfig {
    fn default() -> Self {
        Self { filter: UdpFilter::default(), idle: Duration::from_secs(300) }
    }
}

/// One port of the switch.
#[derive(Debug, Clone)]
pub struct PortConfig {
    /// The VM's name, for DNS and listings.
    pub name: Option<String>,
    /// The largest IP packet, in bytes, that may cross the link.
    pub mtu: u16,
    /// An address the first guest on the link is given.
    pub address: Option<Ipv4Addr>,
    /// Whether the guest sees the gateway alone and no other guest.
    pub isolate: bool,
}

/// Every limit of what a guest can make grow. Each says what happens at it.
#[derive(Debug, Clone)]
pub struct Limits {
    /// TCP flows per port. At it a SYN is answered by RST.
    pub flows: usize,
    /// Connects of one port that wait for the host, loopback not counted. At it a SYN is not answered: the guest's
    /// own retransmission tries again.
    pub dialing: usize,
    /// The same for destinations on the host's loopback, so that black holes elsewhere never starve them.
    pub dialing_loopback: usize,
    /// UDP NAT bindings per port. At it the idlest binding goes.
    pub udp_bindings: usize,
    /// Identifiers of echo requests per port that are remembered. At it the idlest goes.
    pub pings: usize,
    /// Learned Ethernet addresses per port. At it frames from further ones are dropped.
    pub macs: usize,
    /// Learned IP addresses per port. At it further ones are not remembered: they can open connections, but not be found.
    pub addresses: usize,
    /// DHCP leases one port has whatever the others do: offered, in use and declined addresses together, fixed ones not
    /// counted. Beyond it a port gets more as long as half of the pool is free, else a client without a lease gets no
    /// answer, so that a guest that asks under many names leaves the pool to the others.
    pub leases: usize,
    /// Bytes of answers (ARP, DHCP, ICMP, RST) that wait for one port. At it further answers are dropped.
    pub outbox_bytes: usize,
    /// Published connections that wait for a guest's ARP answer. At it further ones are reset.
    pub resolving: usize,
    /// An open TCP flow without a byte ends after this (RFC 5382 REQ-5: not below 2 h 4 min).
    pub tcp_idle: Duration,
    /// After this time without a segment the guest is asked whether it is still there (RFC 9293 §3.8.4); a guest that
    /// answers keeps its flow, whatever `tcp_idle` says. `None`: it is not asked.
    pub tcp_keepalive: Option<Duration>,
    /// A half-closed or closing TCP flow without a byte ends after this (RFC 5382 REQ-5: not below 4 min).
    pub tcp_half_closed: Duration,
    /// A guest that does not finish its handshake, or does not answer ours, is given up after this.
    pub tcp_handshake: Duration,
    /// A guest that acknowledges nothing while bytes are under way is given up after this (RFC 9293 §3.8.3, R2).
    pub tcp_unacknowledged: Duration,
    /// An open flow that is quiet this long gives the pages of its rings back.
    pub ring_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 65_536,
            dialing: 1024,
            dialing_loopback: 1024,
            udp_bindings: 4096,
            pings: 256,
            macs: 1024,
            addresses: 1024,
            leases: 64,
            outbox_bytes: 256 * 1024,
            resolving: 256,
            tcp_idle: Duration::from_secs(7440),
            tcp_keepalive: None,
            tcp_half_closed: Duration::from_secs(240),
            tcp_handshake: Duration::from_secs(30),
            tcp_unacknowledged: Duration::from_secs(120),
            ring_idle: Duration::from_millis(100),
        }
    }
}

impl Limits {
    /// When an open flow ends from which nothing was heard: a guest that is asked has the time of two questions, for one may
    /// get lost.
    pub(crate) fn open_for(&self) -> Duration {
        const GRACE: Duration = Duration::from_secs(60);
        self.tcp_keepalive.map_or(self.tcp_idle, |every| self.tcp_idle.max(every * 2 + GRACE))
    }
}
