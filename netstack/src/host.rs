//! What passes between the stack and the host side: ids, commands, events.

use std::net::{Ipv6Addr, SocketAddr};

use crate::drop_reason::DropReason;
use crate::time::Duration;
use crate::types::PortId;
use crate::udp::BindingId;

/// Amazon's metadata service, where clouds serve credentials over IPv6.
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// One TCP flow. The slot is small and reused, so a driver may keep its side in a vector; the generation tells a
/// flow from the one that had the slot before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

impl FlowId {
    /// The slot: below the largest number of flows that ever were open at once.
    #[must_use]
    pub const fn slot(self) -> usize {
        self.slot as usize
    }
}

/// A service of the gateway that the driver provides on a byte stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// DNS over TCP (RFC 7766).
    Dns,
    /// HTTP on port 80, where guests publish ports of theirs.
    Api,
}

/// What a guest's connection goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostTarget {
    /// An address as the host knows it: the host alias is loopback here already.
    Address(SocketAddr),
    /// A service of the gateway.
    Service(Service),
}

/// What stands behind an address for a guest ([`crate::Netstack::reach`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The gateway itself, where nothing serves this port.
    Gateway,
    /// A service of the gateway's.
    Served(Served),
    /// A port of the gateway that leads here.
    Forwarded(SocketAddr),
    /// A guest on this port of the switch; the switch carries the frames.
    Guest(PortId),
    /// The host connects here.
    Host(SocketAddr),
    /// Nobody, for this reason.
    Nowhere(DropReason),
}

/// What the gateway serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Names.
    Dns,
    /// Addresses: DHCP, and DHCPv6.
    Dhcp,
    /// The API for guests.
    Api,
}

/// What the stack asks of the host side. `FlowId`s in commands stay valid until the driver has been told `Close`
/// or `Reset`, or has reported the end itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCommand {
    /// Connect; the outcome comes back as [`HostEvent::Connected`] or [`HostEvent::Failed`].
    Connect {
        /// The flow.
        flow: FlowId,
        /// Where to.
        target: HostTarget,
    },
    /// The guest has sent its FIN and the host socket has every byte: `shutdown(SHUT_WR)`.
    ShutdownWrite {
        /// The flow.
        flow: FlowId,
    },
    /// Both directions ended in order: close the host socket. The id is dead after this.
    Close {
        /// The flow.
        flow: FlowId,
    },
    /// The guest reset the flow, or is gone: close the host socket with RST (`SO_LINGER` 0). The id is dead after this.
    Reset {
        /// The flow.
        flow: FlowId,
    },
    /// A NAT binding has ended: close its socket.
    CloseBinding {
        /// The binding.
        binding: BindingId,
    },
}

/// What the network answered to a connect; it becomes the code of an ICMP destination unreachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostError {
    /// `ENETUNREACH`.
    NetworkUnreachable,
    /// `EHOSTUNREACH`.
    HostUnreachable,
    /// `EACCES`, `EPERM`: the host's own policy.
    Prohibited,
}

/// Why the host side could not connect; it decides what the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConnectError {
    /// `ECONNREFUSED`: RST to the guest.
    Refused,
    /// An answer of the network: ICMP destination unreachable of that kind to the guest.
    Unreachable(HostError),
    /// `ETIMEDOUT`: silence, the guest's own timer decides.
    TimedOut,
    /// Out of descriptors or memory: RST, so that the guest knows at once.
    Exhausted,
}

/// What happened at the host side of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostEvent {
    /// `connect` is done.
    Connected {
        /// The flow.
        flow: FlowId,
    },
    /// `connect` failed. The id is dead after this.
    Failed {
        /// The flow.
        flow: FlowId,
        /// Why.
        error: ConnectError,
    },
    /// The host's end of file: everything it sent has been taken by `from_host`.
    Eof {
        /// The flow.
        flow: FlowId,
    },
    /// The host reset the connection, or its socket failed: the guest gets RST. The id is dead after this.
    Reset {
        /// The flow.
        flow: FlowId,
    },
}

/// Where the datagram of a guest goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UdpPath {
    /// The socket of this binding; to be made when `new`.
    Binding {
        /// The binding.
        binding: BindingId,
        /// Whether this is its first datagram.
        new: bool,
    },
    /// Back to the client of a published port, from that port's socket.
    Client {
        /// The driver's number of the published port.
        listener: u32,
        /// The client.
        client: SocketAddr,
    },
}

/// A datagram from a guest, lent from the link's receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram<'f> {
    /// The socket that sends it.
    pub path: UdpPath,
    /// Its destination as the host knows it.
    pub remote: SocketAddr,
    /// The payload.
    pub payload: &'f [u8],
    /// Routers it may still pass, this one not counted; at least 1.
    pub hop_limit: u8,
    /// Whether nobody may fragment it: where it does not fit, the guest is told ([`crate::Netstack::host_fault`]).
    pub dont_fragment: bool,
}

/// An echo request of a guest, lent from the link's receive buffer. The answer comes back by
/// [`crate::Netstack::echo_from_host`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo<'f> {
    /// The guest's identifier stands behind it: one host socket each.
    pub binding: BindingId,
    /// Where to, as the host knows it; the port means nothing.
    pub remote: SocketAddr,
    /// The whole ICMP message, of either version; the host's socket puts its own identifier into what it sends.
    pub message: &'f [u8],
    /// As of a [`Datagram`].
    pub hop_limit: u8,
    /// As of a [`Datagram`].
    pub dont_fragment: bool,
}

/// The other links a frame goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Forward {
    /// One port.
    Port(PortId),
    /// Every port but the one it came from.
    Flood,
}

/// What the driver still has to do about a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handled<'f> {
    /// Nothing.
    Done,
    /// Send a datagram.
    Datagram(Datagram<'f>),
    /// Send an echo request.
    Echo(Echo<'f>),
    /// This was the last fragment of a packet: hand its frame in, from the same port.
    Whole(Vec<u8>),
    /// Answer a DNS query, by [`crate::Netstack::dns_answer`], when the answer is there.
    Dns {
        /// Who asks.
        guest: SocketAddr,
        /// The address that was asked.
        asked: SocketAddr,
        /// The query.
        query: &'f [u8],
    },
    /// Copy the frame to other links.
    Forward(Forward),
}

/// Why a published connection could not be opened toward a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum OpenError {
    /// The address is not one a guest can have.
    #[error("not an address of a guest")]
    NoGuest,
    /// The port's flows, or the ring memory, are used up.
    #[error("no room for one more flow")]
    Limit,
}

/// Who opened a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The guest.
    Outbound,
    /// A client of a published port.
    Published,
}

/// Where a flow is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowState {
    /// One side waits for the other to connect.
    Dialing,
    /// Open in both directions.
    Open,
    /// One direction has ended, or both and the last acknowledgement is under way.
    Closing,
}

/// What a listing says of one flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowReport {
    /// The guest's port of the switch.
    pub port: PortId,
    /// Who opened it.
    pub direction: Direction,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The other end, as the guest sees it.
    pub remote: SocketAddr,
    /// Its state.
    pub state: FlowState,
    /// Payload bytes the host took.
    pub bytes_to_host: u64,
    /// Payload bytes the host gave.
    pub bytes_to_guest: u64,
    /// Since it began.
    pub age: Duration,
    /// Since a segment or byte last moved.
    pub idle: Duration,
}
