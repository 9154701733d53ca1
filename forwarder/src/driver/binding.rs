//! The host socket of one binding: how it is set, what it sends, and what its error queue says.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant as Clock};

use mio::net::UdpSocket;
use portway_netstack::icmp::{Fault, Unreachable};
use portway_netstack::udp::BindingId;

use super::ping::Ping;
use crate::host_errors::{self, Report};

/// Faults of one batch of frames that guests are told of.
const FAULTS: usize = 256;
/// Ports of a socket for which 127.0.0.1 stands in for ::1; beyond it the first is tried anew.
const ONLY_V4: usize = 8;
/// Calls that fail one after the other before a socket is given up; the guest's next packet makes another.
pub(super) const FAILURES: u8 = 16;

/// Keeps a host that gives no sockets from being asked for each packet.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    pub(super) until: Option<Clock>,
    pub(super) wait: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(50);
    const MOST: Duration = Duration::from_secs(5);

    pub(super) fn admits(&self, now: Clock) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    pub(super) fn failed(&mut self, now: Clock) {
        self.wait = if self.wait.is_zero() { Self::FIRST } else { (self.wait * 2).min(Self::MOST) };
        self.until = Some(now + self.wait);
    }

    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// An unconnected socket, for datagrams or for echo requests.
pub(super) struct BindingSocket {
    pub(super) id: BindingId,
    pub(super) socket: UdpSocket,
    pub(super) v6: bool,
    /// What it is when it is not for datagrams.
    pub(super) ping: Option<Ping>,
    /// Whether the kernel and the route take segments; not asked again after the first refusal.
    pub(super) segments: bool,
    /// As they are set.
    pub(super) hop_limit: u8,
    pub(super) dont_fragment: bool,
    /// Whether its error queue may have something.
    pub(super) errors: bool,
    /// Whether it is among those that are ready.
    pub(super) queued: bool,
    /// Ports where nobody listens on ::1, and 127.0.0.1 is tried: the guest means the host's loopback, of either version.
    pub(super) only_v4: Vec<u16>,
    /// Calls that failed since one did not.
    pub(super) failures: u8,
}

impl BindingSocket {
    pub(super) fn new(id: BindingId, socket: UdpSocket, remote: SocketAddr, ping: Option<Ping>) -> Self {
        let v6 = remote.is_ipv6();
        // Values no packet has: the first sets them.
        let (hop_limit, dont_fragment) = (0, false);
        Self {
            id,
            socket,
            v6,
            ping,
            segments: true,
            hop_limit,
            dont_fragment,
            errors: false,
            queued: false,
            only_v4: Vec::new(),
            failures: 0,
        }
    }

    /// Makes the next packets leave as the guest sent them.
    pub(super) fn prepare(&mut self, hop_limit: u8, dont_fragment: bool) -> io::Result<()> {
        if self.hop_limit != hop_limit {
            host_errors::hop_limit(&self.socket, self.v6, hop_limit)?;
            self.hop_limit = hop_limit;
        }
        if self.dont_fragment != dont_fragment {
            host_errors::fragmenting(&self.socket, self.v6, !dont_fragment)?;
            self.dont_fragment = dont_fragment;
        }
        Ok(())
    }

    /// Where a datagram to `remote` goes: a socket of IPv6 reaches 127.0.0.1 under its mapped address.
    pub(super) fn place(&self, remote: SocketAddr) -> SocketAddr {
        if remote.ip() == IpAddr::V6(Ipv6Addr::LOCALHOST) && self.only_v4.contains(&remote.port()) {
            SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), remote.port())
        } else {
            remote
        }
    }

    /// Notes that nobody listens on ::1 at the port `report` is about; the datagram tries 127.0.0.1. False when the guest
    /// is to be told instead.
    pub(super) fn turns_to_v4(&mut self, report: &Report) -> bool {
        let refused = report.fault == Fault::Unreachable(Unreachable::Port);
        if !refused || self.ping.is_some() || report.to.ip() != IpAddr::V6(Ipv6Addr::LOCALHOST) {
            return false;
        }
        if !self.only_v4.contains(&report.to.port()) {
            if self.only_v4.len() >= ONLY_V4 {
                self.only_v4.remove(0);
            }
            self.only_v4.push(report.to.port());
        }
        // A larger one was not quoted whole, and is lost as datagrams are.
        if report.payload.len() < HostFault::QUOTED - 80 {
            let _ = self.socket.send_to(&report.payload, self.place(report.to));
        }
        true
    }

    /// Sends one packet; what the network said of earlier ones, and the kernel of this one, goes to `faults`.
    pub(super) fn send(&mut self, payload: &[u8], remote: SocketAddr, faults: &mut Vec<HostFault>) {
        for _ in 0..2 {
            let Err(error) = self.socket.send_to(payload, self.place(remote)) else {
                self.failures = 0;
                return;
            };
            if error.kind() == io::ErrorKind::WouldBlock {
                // No room: what is lost is lost, as on a wire.
                return;
            }
            let (mut mine, mut earlier) = (None, false);
            self.drain(
                |report| match report.reporter {
                    None => mine = Some(report.fault),
                    Some(_) => earlier = true,
                },
                faults,
            );
            let fault = mine.or_else(|| if earlier { None } else { host_errors::refused(&error) });
            if let Some(fault) = fault {
                tracing::debug!(%error, %remote, "a datagram was not sent");
                push(faults, HostFault::new(self.id, remote, None, fault, payload));
                return;
            }
            // The error was an earlier packet's, and says nothing about this one.
        }
        self.failures = self.failures.saturating_add(1);
    }

    /// Takes what is in the error queue: what routers and peers said goes to `faults`, and everything is shown to `each`.
    pub(super) fn drain(&mut self, mut each: impl FnMut(&Report), faults: &mut Vec<HostFault>) {
        let mut reports = Vec::new();
        host_errors::drain(&self.socket, |report| reports.push(report));
        for mut report in reports {
            each(&report);
            let ours = self.ping.is_none_or(|p| p.is_ours(&report.payload));
            if report.reporter.is_none() || !ours || self.turns_to_v4(&report) {
                continue;
            }
            report.to = as_asked(report.to);
            push(faults, HostFault::new(self.id, report.to, report.reporter, report.fault, &report.payload));
        }
        self.errors = false;
    }
}

/// The address a guest's datagram went to when 127.0.0.1 stood in for ::1.
pub(super) fn as_asked(from: SocketAddr) -> SocketAddr {
    if from.ip() == IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()) {
        SocketAddr::new(Ipv6Addr::LOCALHOST.into(), from.port())
    } else {
        from
    }
}

/// What a guest is to be told.
pub(super) struct HostFault {
    pub(super) binding: BindingId,
    pub(super) remote: SocketAddr,
    pub(super) reporter: Option<IpAddr>,
    pub(super) fault: Fault,
    pub(super) payload: Vec<u8>,
}

impl HostFault {
    /// More of a packet than any ICMP error quotes.
    const QUOTED: usize = 1280;

    pub(super) fn new(
        binding: BindingId,
        remote: SocketAddr,
        reporter: Option<IpAddr>,
        fault: Fault,
        payload: &[u8],
    ) -> Self {
        let payload = payload.get(..Self::QUOTED).unwrap_or(payload).to_vec();
        Self { binding, remote, reporter, fault, payload }
    }
}

pub(super) fn push(faults: &mut Vec<HostFault>, fault: HostFault) {
    if faults.len() < FAULTS {
        faults.push(fault);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_gives_no_sockets_is_asked_ever_less_often_and_at_once_when_it_does_again() {
        let (mut backoff, start) = (Backoff::default(), Clock::now());
        assert!(backoff.admits(start));
        let mut now = start;
        for _ in 0..10 {
            backoff.failed(now);
            assert!(!backoff.admits(now));
            now += backoff.wait;
            assert!(backoff.admits(now));
        }
        assert_eq!(backoff.wait, Backoff::MOST);
        assert!(now - start > Duration::from_secs(15));
        backoff.succeeded();
        assert!(backoff.admits(start));
    }
}
