//! The control API's resources (`/v1/…` on the unix socket; the CLI's `--format json` prints the same).

use serde::{Deserialize, Serialize};

/// The transport protocol of a flow or published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
pub struct FlowInfo {
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
}

/// The body of `POST /v1/ports` and `DELETE /v1/ports`: specs in the grammar of `--publish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortsRequest {
    /// One or more publish specs.
    pub specs: Vec<String>,
}

/// The answer to `POST /v1/ports`: what was published and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsResponse {
    /// The ports that are published now.
    pub published: Vec<PortInfo>,
    /// One line for each that failed; the good ones stay.
    pub errors: Vec<String>,
}

/// One DNS name that the network answers itself, and one address it stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[serde(deny_unknown_fields)]
pub struct DnsRequest {
    /// One or more records.
    pub records: Vec<String>,
}

/// An error's body (RFC 9457, `application/problem+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A stable code, such as `bad_spec`.
    pub code: String,
    /// The HTTP status.
    pub status: u16,
    /// One line for a person.
    pub title: String,
    /// What is wrong and what to do.
    pub detail: String,
}

/// `GET /v1/network`: what this network is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Behind it stands the host's loopback.
    pub host_alias: String,
    /// The domain of our own names.
    pub domain: String,
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
