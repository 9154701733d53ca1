//! What the stack asks of the host.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;

use portway_netstack::{FlowId, HostCommand, HostEvent, HostTarget, Service};

use super::{Driver, Slow};
use crate::host::{HostFlow, HostStream, connect_error, other_loopback};

impl Driver {
    /// Runs every command that waits.
    pub(super) fn run_commands(&mut self) -> bool {
        let mut ran = false;
        while let Some(command) = self.stack.poll_host() {
            ran = true;
            match command {
                HostCommand::Connect { flow, target: HostTarget::Address(to) } => self.connect(flow, to),
                HostCommand::Connect { flow, target: HostTarget::Service(service) } => {
                    self.serve_by_control(flow, service)
                }
                HostCommand::ShutdownWrite { flow } => {
                    if let Some(host) = self.host_flow(flow) {
                        host.stream.shutdown_write();
                    }
                }
                HostCommand::Close { flow } => {
                    self.handing.retain(|f| *f != flow);
                    drop(self.take_flow(flow));
                }
                HostCommand::Reset { flow } => {
                    // Whoever is asked to take it is too late.
                    self.handing.retain(|f| *f != flow);
                    if let Some(host) = self.take_flow(flow) {
                        host.stream.reset();
                    }
                }
                HostCommand::CloseBinding { binding } => self.udp.close(self.poll.registry(), binding),
            }
        }
        ran
    }

    fn host_flow(&mut self, id: FlowId) -> Option<&mut HostFlow> {
        self.flows.get_mut(id.slot())?.as_mut().filter(|f| f.id == id)
    }

    fn take_flow(&mut self, id: FlowId) -> Option<HostFlow> {
        self.flows.get_mut(id.slot())?.take_if(|f| f.id == id)
    }

    pub(super) fn connect(&mut self, flow: FlowId, to: SocketAddr) {
        if let Some(taker) = self.outgoing.iter().find(|o| o.takes(to)) {
            let taker = taker.taker().clone();
            if self.slow.try_send(Slow::HandOver { flow, to, taker }).is_ok() {
                self.handing.push(flow);
            } else {
                let error = portway_netstack::ConnectError::Exhausted;
                self.stack.handle_host(self.now, HostEvent::Failed { flow, error });
            }
            return;
        }
        let fallback = other_loopback(to);
        match HostStream::connect(to, self.outbound, self.keep_alive) {
            Ok(stream) => {
                // Loopback answers inside `connect`: the flow is served at once, without waiting for the event.
                self.adopt(HostFlow { fallback, ..HostFlow::dialing(flow, stream) });
            }
            Err(error) => self.not_connected(flow, fallback, &error),
        }
    }

    /// Whoever was asked to take a flow has answered.
    pub(super) fn handed_over(&mut self, flow: FlowId, stream: Option<std::os::unix::net::UnixStream>) {
        let Some(place) = self.handing.iter().position(|f| *f == flow) else { return };
        self.handing.swap_remove(place);
        match stream {
            Some(stream) => {
                let stream = HostStream::Unix(mio::net::UnixStream::from_std(stream));
                self.adopt(HostFlow::dialing(flow, stream));
            }
            None => {
                let error = portway_netstack::ConnectError::Refused;
                self.stack.handle_host(self.now, HostEvent::Failed { flow, error });
            }
        }
    }

    /// A connect has failed: the other loopback address is tried, or the guest told.
    pub(super) fn not_connected(
        &mut self,
        flow: FlowId,
        fallback: Option<NonZeroU16>,
        error: &std::io::Error,
    ) {
        if let Some(port) = fallback {
            self.connect(flow, SocketAddr::from((Ipv4Addr::LOCALHOST, port.get())));
            return;
        }
        self.stack.handle_host(self.now, HostEvent::Failed { flow, error: connect_error(error) });
    }

    /// The other end of the flow is a stream that the control thread serves.
    fn serve_by_control(&mut self, flow: FlowId, service: Service) {
        let Some(port) = self.stack.port_of(flow) else { return };
        // One that asks over IPv6 is the same guest, whose address is its IPv4 one where it has that.
        let guest = match self.stack.guest_of_flow(flow).map(|g| g.ip()) {
            Some(v6 @ IpAddr::V6(_)) => self.stack.guest_of(port).filter(IpAddr::is_ipv4).or(Some(v6)),
            v4 => v4,
        };
        let made = std::os::unix::net::UnixStream::pair().and_then(|(ours, theirs)| {
            crate::fd::within_share(&theirs)?;
            ours.set_nonblocking(true)?;
            theirs.set_nonblocking(true)?;
            Ok((ours, theirs))
        });
        let failed = match made {
            Ok((ours, theirs)) => match self.slow.try_send(match (service, guest) {
                (Service::Api, Some(guest)) => Slow::ApiStream(theirs, guest),
                _ => Slow::DnsStream(port, theirs),
            }) {
                Ok(()) => {
                    self.adopt(HostFlow::dialing(
                        flow,
                        HostStream::Unix(mio::net::UnixStream::from_std(ours)),
                    ));
                    return;
                }
                Err(_) => portway_netstack::ConnectError::Exhausted,
            },
            Err(error) => connect_error(&error),
        };
        self.stack.handle_host(self.now, HostEvent::Failed { flow, error: failed });
    }
}
