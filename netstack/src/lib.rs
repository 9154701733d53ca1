//! The network of a virtual machine as a sans-IO state machine.
//!
//! ```text
//!             handle_frame ──► switch ─┬─► ARP NDP DHCP ICMP ─────► outbox ─┐
//!  link ─────►                         ├─► UDP: NAT bindings ─► Handled    ├─► poll_transmit ─► link
//!                                      └─► TCP: flow table ─► rings ───────┘
//!  host ─────► handle_host · to_host · from_host · datagrams_from_host · poll_host
//! ```
//! [`Netstack`] owns everything a guest can see. Frames and host events go in with the time they happened at;
//! frames and [`HostCommand`]s come out. There is no socket, no clock, no thread and no `unsafe` here; the same
//! seed and the same calls give the same bytes. `forwarder` is the driver in the real program, the lab under
//! `tests/` the one with a virtual clock.
//!
//! Bytes of TCP never travel in events: [`Netstack::to_host`] and [`Netstack::from_host`] lend slices of the
//! flow's rings to the driver's `send` and `recv`. Bytes of UDP are lent by [`Handled::Datagram`].

#![forbid(unsafe_code)]

mod config;
pub mod dhcp;
pub mod dhcp6;
mod drop_reason;
pub mod fragments;
mod host;
pub mod icmp;
mod lru;
pub mod ndp;
mod neighbours;
mod rings;
pub mod segments;
mod sink;
mod stack;
mod switch;
mod tcp;
mod time;
mod timer;
mod types;
pub mod udp;
pub mod wire;

pub use config::{
    DnsAt, GatewayForward, Ipv6Config, Limits, PortConfig, Services, StackConfig, Transport, UdpConfig,
    UdpFilter,
};
pub use drop_reason::{DropCounters, DropReason};
pub use host::{
    ConnectError, Datagram, Direction, Echo, FlowId, FlowReport, FlowState, Forward, Handled, HostCommand,
    HostError, HostEvent, HostTarget, METADATA_V6, OpenError, Reach, Served, Service, UdpPath,
};
pub use neighbours::PER_MAC;
pub use rings::{RingClass, RingMemory, Rings};
pub use sink::{FrameSink, Offload, Offloads, PartialChecksum, SegmentKind, Segments};
pub use stack::{Netstack, StackCounters};
pub use time::{Duration, Instant};
pub use types::{BadMac, BadSubnet, Mac, PortId, Subnet};
