//! A published port of a guest, and the two ways its connections can go.
//!
//! ```text
//! Network(port) ──► the data thread listens and the stack connects      Carried(target) ──► an entrance here, the agent connects
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;

use portway_api::agent::Target;
use portway_api::control::{PortInfo, Protocol};

use super::Guest;
use crate::agent::entrance::{BoundPort, Entrance};
use crate::agent::{ask_data_thread, note, note_published, socket_label};
use crate::events::Event;
use crate::publish::spec::{GuestName, HostEnd, PublishSpec};
use crate::request::{PublishError, Request};

/// Where a connection to a published port goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// Through the stack, to the guest's own address.
    Network(u16),
    /// Through the agent.
    Carried(Target),
}

/// One port of the host.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) proto: Protocol,
    pub(super) host: HostEnd,
    pub(super) bound: Vec<String>,
    pub(super) host_port: u16,
    pub(super) way: Way,
    /// Of a carried one; the data thread has the others.
    pub(super) entrance: Option<Entrance>,
}

impl Published {
    pub(super) fn info(&self) -> PortInfo {
        let (guest, guest_port) = match &self.way {
            Way::Network(port) => (String::new(), *port),
            Way::Carried(Target::Tcp { address } | Target::Udp { address }) => {
                (address.ip().to_string(), address.port())
            }
            Way::Carried(Target::Unix { path }) => (socket_label(path.as_ref()), 0),
        };
        PortInfo {
            proto: self.proto,
            bind: self.bound.clone(),
            host_port: self.host_port,
            guest,
            guest_port,
            state: "listening".into(),
            accepted: self.entrance.as_ref().map_or(0, |e| e.accepted.load(Ordering::Relaxed)),
        }
    }

    /// Whether the operator's `spec` means this port, at some place of its range.
    pub(super) fn is_named(&self, spec: &PublishSpec) -> bool {
        self.proto == spec.proto
            && match (&self.host, &spec.host) {
                (HostEnd::Unix(a), HostEnd::Unix(b)) => a == b,
                (HostEnd::Ports { bind: a, .. }, HostEnd::Ports { bind: b, first }) => {
                    let range = *first..=first.saturating_add(spec.count - 1);
                    a == b && *first != 0 && range.contains(&self.host_port)
                }
                _ => false,
            }
    }
}

impl Guest {
    pub(super) async fn publish(
        &mut self,
        host: HostEnd,
        proto: Protocol,
        way: Way,
    ) -> Result<Published, PublishError> {
        match way {
            Way::Carried(target) => {
                let port = match host {
                    HostEnd::Ports { first, .. } => first,
                    HostEnd::Unix(_) => 0,
                };
                let bound = BoundPort::new(&host, port, proto, self.config.keep_alive)?;
                let port = self.serve(&host, bound, proto, target)?;
                note_published(&self.requests, &port.info());
                Ok(port)
            }
            Way::Network(guest_port) => {
                let spec =
                    PublishSpec { host: host.clone(), guest: self.guest_name(), guest_port, count: 1, proto };
                let mut done = ask_data_thread(&self.requests, |reply| Request::Publish { spec, reply })
                    .await
                    .ok_or_else(|| PublishError::Limit("the network is overloaded or ending".into()))?;
                let info =
                    done.pop().ok_or_else(|| PublishError::Limit("no port was published".into()))??;
                // With the number of a free port, by which it is unpublished.
                let host = match host {
                    HostEnd::Ports { bind, .. } => HostEnd::Ports { bind, first: info.host_port },
                    unix @ HostEnd::Unix(_) => unix,
                };
                let (bound, host_port) = (info.bind, info.host_port);
                Ok(Published { proto, host, bound, host_port, way: Way::Network(guest_port), entrance: None })
            }
        }
    }

    pub(super) fn serve(
        &self,
        host: &HostEnd,
        bound: BoundPort,
        proto: Protocol,
        target: Target,
    ) -> Result<Published, PublishError> {
        let address = format!("{proto} {}", bound.bound.join(","));
        let entrance = bound
            .serve(&target, &self.shared)
            .map_err(|e| PublishError::Bind { address, reason: e.to_string() })?;
        Ok(Published {
            proto,
            host: host.clone(),
            bound: entrance.bound.clone(),
            host_port: entrance.host_port,
            way: Way::Carried(target),
            entrance: Some(entrance),
        })
    }

    pub(super) async fn close(&self, port: Published) {
        let info = port.info();
        match port.entrance {
            Some(entrance) => {
                entrance.close().await;
                note(&self.requests, Event::Unpublished(info));
            }
            None => {
                let Way::Network(guest_port) = port.way else { return };
                let (host, guest, proto) = (port.host, self.guest_name(), port.proto);
                let spec = PublishSpec { host, guest, guest_port, count: 1, proto };
                // The operator may have unpublished it already.
                let _ = ask_data_thread(&self.requests, |reply| Request::Unpublish { spec, reply }).await;
            }
        }
    }

    pub(super) async fn close_all(&self, ports: Vec<Published>) {
        for port in ports {
            self.close(port).await;
        }
    }
}

pub(super) fn carried(proto: Protocol, address: IpAddr, port: u16) -> Way {
    let address = SocketAddr::new(address, port);
    Way::Carried(match proto {
        Protocol::Tcp => Target::Tcp { address },
        Protocol::Udp => Target::Udp { address },
    })
}

/// Where place `n` of a spec that goes through the agent leads.
pub(super) fn carried_target(spec: &PublishSpec, n: u16) -> Target {
    let port = spec.guest_port.saturating_add(n);
    let address = match &spec.guest {
        GuestName::Socket(path) => return Target::Unix { path: path.display().to_string() },
        GuestName::Address(ip) => SocketAddr::new(*ip, port),
        GuestName::Default | GuestName::Name(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
    };
    match spec.proto {
        Protocol::Tcp => Target::Tcp { address },
        Protocol::Udp => Target::Udp { address },
    }
}

pub(super) fn with_guest(mut info: PortInfo, guest: &str) -> PortInfo {
    if info.guest.is_empty() {
        guest.clone_into(&mut info.guest);
    }
    info
}
