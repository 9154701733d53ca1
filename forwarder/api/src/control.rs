//! The control API's resources (`/v1/…` on the unix socket; the CLI's `--format json` prints the same).

use serde::{Deserialize, Serialize};

/// The transport protocol of a flow or published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One published port: a listener on the host, a port of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PortInfo {
    /// `tcp` or `udp`.
    pub proto: Protocol,
    /// The host addresses the listener is bound to, such as `["127.0.0.1", "::1"]`.
    pub bind: Vec<String>,
    /// The host port; the real one when 0 was asked for.
    pub host_port: u16,
    /// The guest: an address, or the name of its link while it has no address yet.
    pub guest: String,
    /// The guest's port.
    pub guest_port: u16,
    /// `listening`.
    pub state: String,
    /// Connections (or UDP clients) forwarded since the port was published.
    pub accepted: u64,
}

/// One DHCP lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct LeaseInfo {
    /// The leased address.
    pub ip: String,
    /// The guest's Ethernet address.
    pub mac: String,
    /// The name: the link's, else the one the guest sent.
    pub name: Option<String>,
    /// Seconds until the lease ends; null for a static lease that is not in use.
    pub expires_in_s: Option<u64>,
    /// Whether the address was fixed in the configuration.
    pub fixed: bool,
}

/// One flow or NAT binding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct FlowInfo {
    /// The name of the guest's link.
    #[serde(default)]
    pub vm: String,
    /// `tcp` or `udp`.
    pub proto: Protocol,
    /// `outbound` (the guest opened it) or `published`.
    pub direction: String,
    /// The guest's end, `ADDRESS:PORT`.
    pub guest: String,
    /// The other end as the guest sees it; for a UDP binding the last address it sent to.
    pub remote: String,
    /// `dialing`, `open`, `closing`, or `bound` for UDP.
    pub state: String,
    /// Payload bytes from the guest to the host.
    pub bytes_to_host: u64,
    /// Payload bytes from the host to the guest.
    pub bytes_to_guest: u64,
    /// Seconds since the flow began.
    pub age_s: u64,
    /// Seconds since a byte last moved.
    pub idle_s: u64,
}

/// The counters of one link.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct LinkStats {
    /// The link's name.
    pub name: String,
    /// Its kind, `qemu`.
    pub kind: String,
    /// Whether a VMM is attached.
    pub up: bool,
    /// Frames from the guest.
    pub frames_from_guest: u64,
    /// Bytes in those frames.
    pub bytes_from_guest: u64,
    /// Frames to the guest.
    pub frames_to_guest: u64,
    /// Bytes in those frames.
    pub bytes_to_guest: u64,
}

/// The counters of the process since it started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Stats {
    /// Seconds since start.
    pub uptime_s: u64,
    /// One entry per link.
    pub links: Vec<LinkStats>,
    /// TCP flows now.
    pub tcp_flows: u64,
    /// Guest connects that wait for the host now.
    pub tcp_dialing: u64,
    /// TCP flows since start.
    pub tcp_flows_total: u64,
    /// UDP bindings now.
    pub udp_bindings: u64,
    /// DNS queries from guests since start.
    pub dns_queries: u64,
    /// Frames dropped, by reason.
    pub drops: std::collections::BTreeMap<String, u64>,
    /// The DNS service.
    #[serde(default)]
    pub dns: DnsStats,
    /// Captures that run now.
    #[serde(default)]
    pub captures: u64,
    /// Frames that captures lost since start, because their readers were slower than the network.
    #[serde(default)]
    pub capture_lost: u64,
    /// Events that nobody could be told since start.
    #[serde(default)]
    pub events_lost: u64,
    /// Clients of the control API now.
    #[serde(default)]
    pub api_clients: u64,
    /// Panics that were caught since the start: faults of ours, each of which cost one flow or one link.
    #[serde(default)]
    pub panics: u64,
    /// Timers now, those included that mean nothing any more.
    #[serde(default)]
    pub timers: u64,
    /// What the sidecar has given up.
    #[serde(default)]
    pub sandbox: SandboxInfo,
}

/// The counters of the DNS service since start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DnsStats {
    /// Messages received, bad ones included.
    pub queries: u64,
    /// Answered from our zones.
    pub from_zones: u64,
    /// Answered from the hosts file, `--dns-host` records or as localhost.
    pub from_hosts: u64,
    /// Answered from the cache.
    pub from_cache: u64,
    /// Sent to the host's resolvers.
    pub relayed: u64,
    /// Of these, without any answer: SERVFAIL.
    pub failed: u64,
    /// Answered with an error for what they are.
    pub rejected: u64,
    /// Dropped or refused because too many were at the resolvers.
    pub over_limit: u64,
    /// Answers kept from guests, which led inside (`--dns-rebind-protection`).
    #[serde(default)]
    pub rebinding: u64,
    /// Answers too large for a datagram, for which the guest comes again over TCP.
    #[serde(default)]
    pub truncated: u64,
    /// Queries at the resolvers now.
    pub in_flight: u64,
    /// Answers in the cache now.
    pub cached: u64,
}

/// One link, and the VM behind it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct LinkInfo {
    /// The VM's name, else `link0`, `link1` …
    pub name: String,
    /// The kind of link, such as `qemu`.
    pub kind: String,
    /// Where the VMM is met, such as `unix:/run/user/1000/vm.sock`.
    pub address: String,
    /// Whether a VMM is attached.
    pub up: bool,
    /// The guest's address; null until it has one.
    pub ip: Option<String>,
    /// The largest IP packet, in bytes.
    pub mtu: u16,
    /// Every address its guests leased or use, IPv4 first.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Whether other guests are out of its reach.
    pub isolate: bool,
    /// Whether the guest takes segments and checksums that are not finished.
    pub offload: bool,
    /// Frames from the guest.
    pub frames_from_guest: u64,
    /// Bytes in those frames.
    pub bytes_from_guest: u64,
    /// Frames to the guest.
    pub frames_to_guest: u64,
    /// Bytes in those frames.
    pub bytes_to_guest: u64,
}

/// Something that happened: one object of `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct EventInfo {
    /// Its number since the start; a gap means that events were lost.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A VMM attached to a link.
    LinkUp {
        /// The link's name.
        link: String,
    },
    /// It is gone.
    LinkDown {
        /// The link's name.
        link: String,
    },
    /// A guest got a lease.
    Lease {
        /// The address.
        ip: String,
        /// The guest's Ethernet address.
        mac: String,
    },
    /// A lease ended.
    LeaseEnded {
        /// The address.
        ip: String,
        /// The guest's Ethernet address.
        mac: String,
    },
    /// A port is published.
    PortPublished {
        /// The port.
        port: PortInfo,
    },
    /// A port is not published any more.
    PortUnpublished {
        /// The port.
        port: PortInfo,
    },
    /// A guest's agent has a session.
    AgentUp {
        /// The guest's name.
        guest: String,
    },
    /// It has none any more.
    AgentDown {
        /// The guest's name.
        guest: String,
    },
    /// A guest says that it is ready.
    GuestReady {
        /// The guest's name.
        guest: String,
    },
    /// A guest's listener, which a rule wants published, is not.
    NotPublished {
        /// The guest's name.
        guest: String,
        /// The listener.
        listener: String,
        /// Why.
        reason: String,
    },
}

/// `GET /v1/explain`: what would happen to a connection of a guest, and why.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Explanation {
    /// What was asked, `HOST:PORT`.
    pub dest: String,
    /// `tcp` or `udp`.
    pub proto: String,
    /// How the name was resolved, a line per step; empty when an address was asked.
    pub dns: Vec<String>,
    /// One entry per address.
    pub addresses: Vec<ExplainedAddress>,
}

/// One address of an [`Explanation`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ExplainedAddress {
    /// The address and port the guest would use.
    pub address: String,
    /// `gateway`, `guest`, `host_loopback`, `network` or `dropped`.
    pub target: String,
    /// Whether a connection would be tried at all.
    pub allowed: bool,
    /// Where the host would connect; null when it would not.
    pub host_address: Option<String>,
    /// The source address the host's routing would take; null when there is no route, or no connection.
    pub source: Option<String>,
    /// What a connection tried now came to, with `probe=true`: `open`, `refused`, `unreachable …` or `no answer`.
    pub probe: Option<String>,
    /// Why, a line per step.
    pub why: Vec<String>,
}

/// The body of `POST /v1/ports` and `DELETE /v1/ports`: specs in the grammar of `--publish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PortsRequest {
    /// One or more publish specs.
    pub specs: Vec<String>,
}

/// The answer to `POST /v1/ports`: what was published and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PortsResponse {
    /// The ports that are published now.
    pub published: Vec<PortInfo>,
    /// One line for each that failed; the good ones stay.
    pub errors: Vec<String>,
    /// The same failures, each with a stable code, the spec it is about and what helps.
    #[serde(default)]
    pub problems: Vec<Problem>,
}

/// One DNS name that the network answers itself, and one address it stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DnsRecord {
    /// The name, without a dot at the end; it may begin with `*.`.
    pub name: String,
    /// The address.
    pub address: String,
    /// `network` (gateway, host), `guest` (a lease), `config` (`--dns-host`) or `live` (`POST /v1/dns`).
    pub origin: String,
}

/// The body of `POST /v1/dns` (records `NAME=IP`) and `DELETE /v1/dns` (`NAME=IP`, or `NAME` for all its addresses). All of
/// it is done, or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DnsRequest {
    /// One or more records.
    pub records: Vec<String>,
}

/// An error's body (RFC 9457, `application/problem+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Problem {
    /// `about:blank`: `code` tells problems apart.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: String,
    /// A stable code, such as `bad_spec`.
    pub code: String,
    /// The HTTP status.
    pub status: u16,
    /// One line for a person.
    pub title: String,
    /// What is wrong and what to do.
    pub detail: String,
    /// The field, parameter or header that is wrong, such as `specs[0]`; null when it is none of them.
    #[serde(default)]
    pub field: Option<String>,
    /// What helps, when that is known.
    #[serde(default)]
    pub hint: Option<String>,
}

fn about_blank() -> String {
    "about:blank".into()
}

/// `GET /v1/network`: what this network is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct NetworkInfo {
    /// Its name.
    pub name: String,
    /// The version of the sidecar.
    pub version: String,
    /// The sidecar's process id.
    pub pid: u32,
    /// The guests' subnet.
    pub subnet: String,
    /// Router, DHCP and DNS server.
    pub gateway: String,
    /// The gateway's Ethernet address.
    #[serde(default)]
    pub gateway_mac: String,
    /// Behind it stands the host's loopback.
    pub host_alias: String,
    /// Whether guests have IPv6.
    #[serde(default)]
    pub ipv6: bool,
    /// The guests' IPv6 network, when they have one.
    #[serde(default)]
    pub subnet6: Option<String>,
    /// Router, DHCPv6 and DNS server there.
    #[serde(default)]
    pub gateway6: Option<String>,
    /// Behind it stands the host's loopback, over IPv6.
    #[serde(default)]
    pub host_alias6: Option<String>,
    /// The domain of our own names.
    pub domain: String,
    /// Resolvers that are asked now.
    #[serde(default)]
    pub dns_upstreams: Vec<String>,
    /// Where the log goes, when that is a file.
    #[serde(default)]
    pub log_file: Option<String>,
    /// Where leases and live ports are kept, when they are.
    #[serde(default)]
    pub state_dir: Option<String>,
    /// When it started, in milliseconds since 1970.
    #[serde(default)]
    pub started_ms: u64,
    /// What the sidecar has given up.
    #[serde(default)]
    pub sandbox: SandboxInfo,
}

/// What the sidecar has given up before the first frame.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SandboxInfo {
    /// `require`, `best-effort` or `off`.
    pub mode: String,
    /// One entry per part.
    pub parts: Vec<SandboxPart>,
    /// System calls that were refused since the start; a number above 0 is a fault of ours or an intruder.
    pub refused_calls: u64,
}

/// One part of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SandboxPart {
    /// `user`, `capabilities`, `no_new_privs`, `not_dumpable`, `landlock` or `seccomp`.
    pub name: String,
    /// Whether it is in force.
    pub in_force: bool,
    /// How, or why not.
    pub detail: String,
}

/// What a VM's launcher says on the socket of `--join`, as one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The VM's link, in the grammar of `--link`, with a name.
    pub link: String,
    /// Its ports, in the grammar of `--publish`; without a guest they are this VM's.
    #[serde(default)]
    pub publish: Vec<String>,
}

/// The answer, as one line of JSON. The VM is on the network for as long as the connection stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// What was published.
    #[serde(default)]
    pub ports: Vec<PortInfo>,
    /// Why the VM has not joined.
    #[serde(default)]
    pub error: Option<String>,
}

/// What has come of a wait (`GET /v1/wait`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Waited {
    /// Whether it was not in vain; otherwise ask again.
    pub ready: bool,
}
