//! What slow threads ask of the data thread, and how the answers come back.
//!
//! ```text
//! control API ─┐
//! DNS answers ─┼─► Requests (bounded queue) ─► Waker ─► data thread ─► reply channel of the request
//! signals ─────┘
//! ```
//! The data thread never waits for anybody: a reply is a `oneshot` that is sent and forgotten. The queue holds
//! control messages and DNS answers only, never the bytes of flows.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};

use portway_api::agent::AgentInfo;
use portway_api::control::{FlowInfo, LeaseInfo, LinkInfo, PortInfo, Protocol, Stats};
use portway_netstack::udp::BindingReport;
use portway_netstack::{Direction, FlowReport, FlowState, Mac, PortId, Reach, Transport};
use tokio::sync::oneshot;

use crate::capture::{CAPTURES, Capture};
use crate::config::LinkConfig;
use crate::events::Event;
use crate::publish::spec::{GuestName, HostEnd, PublishSpec};

/// One thing asked of the data thread.
#[derive(Debug)]
pub enum Request {
    /// Publish every port of `spec` (a range is several ports). The answer is one entry per port, in order.
    Publish {
        /// What to publish.
        spec: PublishSpec,
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<Result<PortInfo, PublishError>>>,
    },
    /// Stop publishing what `spec` names; established flows stay. Answers what was taken away.
    Unpublish {
        /// What to stop publishing.
        spec: PublishSpec,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Vec<PortInfo>, PublishError>>,
    },
    /// What a guest publishes of its own at the gateway's port 80; never kept over a restart: it asks again.
    GuestPublish {
        /// One port.
        spec: PublishSpec,
        /// The guest that asks.
        guest: IpAddr,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<PortInfo, PublishError>>,
    },
    /// Stop publishing what was asked for under these words. A guest takes away none but what it published itself.
    Unexpose {
        /// The host's end, with port 0 where that was asked for.
        host: HostEnd,
        /// The protocol.
        proto: Protocol,
        /// The guest that asks, when one does.
        guest: Option<IpAddr>,
        /// Where the answer goes.
        reply: oneshot::Sender<Option<PortInfo>>,
    },
    /// What a guest has published of its own.
    GuestPorts {
        /// The guest.
        guest: IpAddr,
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<PortInfo>>,
    },
    /// Every published port.
    Ports {
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<PortInfo>>,
    },
    /// Every lease.
    Leases {
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<LeaseInfo>>,
    },
    /// Every flow and NAT binding, with its counters.
    Flows {
        /// Where the answer goes.
        reply: oneshot::Sender<FlowReports>,
    },
    /// Every link.
    Links {
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<LinkInfo>>,
    },
    /// What stands behind an address for a guest.
    Reach {
        /// The address.
        to: SocketAddr,
        /// By what.
        transport: Transport,
        /// Where the answer goes.
        reply: oneshot::Sender<Reached>,
    },
    /// Begin a capture. It ends when its reader is dropped and [`Request::EndCaptures`] has been said.
    Capture {
        /// The capture.
        capture: Arc<Capture>,
        /// Where the answer goes: the names of the links it sees, or the limit that is reached.
        reply: oneshot::Sender<Result<Vec<String>, CaptureError>>,
    },
    /// Attach a VM that came through the API: a stream of frames behind lengths of 16 bits, little-endian.
    Attach {
        /// The stream.
        fd: OwnedFd,
    },
    /// Connect a client of the API to a guest.
    Tunnel {
        /// The guest's address and port.
        to: SocketAddr,
        /// The client.
        stream: TunnelEnd,
    },
    /// The Ethernet addresses guests use, and the numbers of their ports of the switch.
    Macs {
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<(Mac, PortId)>>,
    },
    /// Take captures off the links whose readers have gone.
    EndCaptures,
    /// The counters of the whole process.
    Stats {
        /// Where the answer goes.
        reply: oneshot::Sender<Stats>,
    },
    /// The DNS service's answer to a datagram the stack handed out.
    DnsAnswer {
        /// Whom it is for.
        ticket: DnsTicket,
        /// The message.
        answer: Vec<u8>,
    },
    /// The address a guest has now.
    GuestAddress {
        /// Whose.
        guest: GuestName,
        /// Where the answer goes.
        reply: oneshot::Sender<Option<IpAddr>>,
    },
    /// Something the control thread saw, for those who watch events.
    Note(Event),
    /// Every guest agent. Answered by the agent service.
    Agents {
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<AgentInfo>>,
    },
    /// Answer when a guest is ready, or when a published port has its listener in the guest. Answered by the agent
    /// service; whoever does not want to wait any more drops the receiver.
    Await {
        /// A host port; `None`: the first guest's readiness.
        port: Option<u16>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), PublishError>>,
    },
    /// The answer to [`crate::driver::Slow::HandOver`]: the connection, or that it is refused.
    HandedOver {
        /// The flow.
        flow: portway_netstack::FlowId,
        /// The connection.
        stream: Option<std::os::unix::net::UnixStream>,
    },
    /// Replace who takes which connections of guests.
    Outgoing(Vec<crate::personality::vpnkit::Outgoing>),
    /// Replace the ports of the gateway that lead elsewhere.
    GatewayForwards(Vec<portway_netstack::GatewayForward>),
    /// Whether the host has a way to the Internet over IPv6, now; for networks that follow it.
    Ipv6Uplink(bool),
    /// Other domains for guests to search, from their next DHCP answer on.
    Search {
        /// The domains.
        domains: Vec<String>,
    },
    /// One more VM, while the network runs. The answer is its link and what was published for it.
    Join {
        /// Its link.
        link: LinkConfig,
        /// Its ports.
        publish: Vec<PublishSpec>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(PortId, Vec<PortInfo>), JoinError>>,
    },
    /// A VM that came by [`Request::Join`] goes, and with it its link and its ports.
    Leave(PortId),
    /// Close listeners, reset flows, end the loop.
    Shutdown,
}

/// What stands behind an address for a guest.
#[derive(Debug)]
pub struct Reached {
    /// As the stack decides it.
    pub reach: Reach,
    /// The name of the guest's link, when it is a guest.
    pub guest: Option<String>,
    /// Who takes such connections in place of the host's own network: what it is, and whether there is anybody.
    pub taker: Option<(String, bool)>,
}

/// Where the answer to a guest's DNS datagram goes: the guest, and the address it asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DnsTicket {
    /// The guest's address and port.
    pub guest: SocketAddr,
    /// The address the guest sent its query to.
    pub asked: SocketAddr,
    /// The link the query came from.
    pub port: portway_netstack::PortId,
}

/// Why a VM cannot join; `to_string()` is the line a user reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Its name is taken.
    #[error("a VM called {0:?} is on this network already: give this one another --name")]
    Name(String),
    /// The address it is to have is kept for another VM.
    #[error("--ip: {0} is the address of {1}: give this one another, or none")]
    Address(Ipv4Addr, String),
    /// A link needs a name, by which its ports are known.
    #[error("a link that joins needs name=")]
    NoName,
    /// Its link could not be made.
    #[error("--link: {0}")]
    Link(String),
    /// A port could not be published.
    #[error("--publish: {0}")]
    Publish(#[from] PublishError),
    /// There are as many as may be.
    #[error("the network has {0} VMs, and no more may join")]
    Limit(usize),
}

/// A client that becomes one end of a connection to a guest.
#[derive(Debug)]
pub enum TunnelEnd {
    /// Of a unix socket.
    Unix(std::os::unix::net::UnixStream),
    /// Of a TCP socket.
    Tcp(std::net::TcpStream),
}

/// Every flow and binding, as the stack tells them: the data thread copies numbers and leaves the texts to others.
#[derive(Debug, Default)]
pub struct FlowReports {
    /// TCP flows.
    pub tcp: Vec<FlowReport>,
    /// UDP bindings.
    pub udp: Vec<BindingReport>,
    /// The names of the links.
    pub links: Vec<(PortId, String)>,
}

impl FlowReports {
    /// What listings show.
    pub fn infos(&self) -> impl Iterator<Item = FlowInfo> + '_ {
        let vm = |port| self.links.iter().find(|(p, _)| *p == port).map_or_else(String::new, |l| l.1.clone());
        let direction = |published| if published { "published" } else { "outbound" }.to_owned();
        let tcp = self.tcp.iter().map(move |f| FlowInfo {
            vm: vm(f.port),
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
        let udp = self.udp.iter().map(move |b| FlowInfo {
            vm: vm(b.port),
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
        tcp.chain(udp)
    }
}

/// Why a capture cannot begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// There are as many as may be.
    #[error("{CAPTURES} captures run already")]
    Limit,
    /// Its filter names a VM that is not there.
    #[error("no link is called {0:?}")]
    NoLink(String),
}

/// Why a port could not be published or taken away; `to_string()` is the line a user reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The same protocol and host address are published already, by us.
    #[error("{0} is published already: `portway unpublish` it first or take another host port")]
    AlreadyPublished(String),
    /// Nothing published matches.
    #[error("{0} is not published: `portway ports` lists what is")]
    NotPublished(String),
    /// The host refused the address.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// Protocol and host address, such as `tcp 127.0.0.1:2222`.
        address: String,
        /// What the host said and what helps.
        reason: String,
    },
    /// A socket outside of the directories in which they may be made live.
    #[error(
        "{path} lies outside of the directories where sockets may be made (of --api, --state-dir, --allow-path): start the network with --allow-path {directory}, or with PORTWAY_ALLOW_PATH set to it",
        path = .0.display(), directory = .0.parent().unwrap_or(.0).display()
    )]
    Outside(std::path::PathBuf),
    /// The guest the spec names is not known.
    #[error("no guest is called {0:?}: a link's name=, or an address, is needed")]
    NoGuest(String),
    /// The address is none that a guest can have.
    #[error(
        "{0} is no guest's address: it lies outside of the guests' networks, or is one of the network's own"
    )]
    NotAGuest(IpAddr),
    /// A named limit is reached.
    #[error("limit reached: {0}")]
    Limit(String),
    /// It takes a guest agent, and there is none to be expected.
    #[error("{0} needs the guest agent: give the network a way to it, --vsock or --agent")]
    NoAgent(String),
    /// The policy for what guests ask does not allow it.
    #[error("not allowed for a guest: {0}")]
    Policy(String),
}

/// The sending end of the queue: cheap to clone, used by the control and DNS threads.
#[derive(Debug, Clone)]
pub struct Requests {
    queue: mpsc::SyncSender<Request>,
    waker: Arc<mio::Waker>,
    /// The agent service, where there is one: what is asked about ports is asked of it first.
    agents: Arc<OnceLock<tokio::sync::mpsc::Sender<Request>>>,
}

/// The data thread has ended, or its queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the network does not take requests (it is ending, or overloaded)")]
pub struct Unavailable;

impl Requests {
    /// Requests that may wait in the queue; beyond it a caller is told `Unavailable`.
    pub const LIMIT: usize = 1024;

    /// A queue whose receiving end belongs to the data thread; `waker` wakes its poll.
    #[must_use]
    pub fn new(waker: Arc<mio::Waker>) -> (Self, mpsc::Receiver<Request>) {
        let (queue, requests) = mpsc::sync_channel(Self::LIMIT);
        (Self { queue, waker, agents: Arc::default() }, requests)
    }

    /// From now on the agent service gets what is asked about ports and agents.
    pub(crate) fn by_way_of(&self, agents: tokio::sync::mpsc::Sender<Request>) {
        // There is one service, made once.
        let _ = self.agents.set(agents);
    }

    /// As [`Self::send`], for a request that must not be lost.
    ///
    /// # Errors
    /// The request, when the queue is full or the data thread is gone.
    pub fn offer(&self, request: Request) -> Result<(), Box<Request>> {
        self.queue.try_send(request).map_err(|e| match e {
            mpsc::TrySendError::Full(request) | mpsc::TrySendError::Disconnected(request) => {
                Box::new(request)
            }
        })?;
        // Without a waker the data thread is ending, and looks at nothing any more.
        let _ = self.waker.wake();
        Ok(())
    }

    /// Puts one request into the queue and wakes the data thread.
    ///
    /// # Errors
    /// `Unavailable` when the queue is full or the data thread is gone.
    pub fn send(&self, request: Request) -> Result<(), Unavailable> {
        use Request::{Agents, Await, Ports, Publish, Unpublish};
        match self.agents.get() {
            Some(agents)
                if matches!(
                    request,
                    Publish { .. } | Unpublish { .. } | Ports { .. } | Agents { .. } | Await { .. }
                ) =>
            {
                agents.try_send(request).map_err(|_| Unavailable)
            }
            _ => self.send_to_data_thread(request),
        }
    }

    /// As [`Self::send`], past the agent service.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(crate) fn send_to_data_thread(&self, request: Request) -> Result<(), Unavailable> {
        self.queue.try_send(request).map_err(|_| Unavailable)?;
        self.waker.wake().map_err(|_| Unavailable)
    }
}
