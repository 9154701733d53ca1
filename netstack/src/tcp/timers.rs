//! The times at which flows need us: one entry of the wheel each, the earliest of retransmission, reaping and giving rings back.

use std::collections::VecDeque;

use super::Tcp;
use super::clock::{engine_time, our_time};
use super::flow::{Life, Resolving};
use crate::host::{FlowId, HostCommand};
use crate::time::{Duration, Instant};

/// Stale entries of the wheel that are not worth a sweep.
const STALE_TIMERS: usize = 1024;

impl Tcp {
    /// Puts the earliest time a flow needs us into the wheel, unless an earlier one is there already.
    pub(super) fn arm(&mut self, now: Instant, id: FlowId) {
        let Some(flow) = self.table.get_mut(id) else { return };
        let mut at = flow.reaped_at(&self.limits);
        if flow.warm {
            at = at.min(flow.last_active + self.limits.ring_idle);
        }
        let v6 = flow.key.is_v6();
        match &mut flow.life {
            Life::Live(live) => {
                let port = self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut);
                if let Some(t) =
                    port.and_then(|p| p.engine(v6).poll_at(engine_time(live.clock(now)), &live.socket.set))
                    && live.time_wait_since.is_none()
                {
                    at = at.min(our_time(t));
                }
            }
            Life::Resolving(r) => at = at.min(flow.created + Duration::from_secs(u64::from(r.asked))),
            Life::Dialing(_) => return,
        }
        let at = at.max(now);
        if flow.deadline.is_none_or(|d| at < d) {
            flow.deadline = Some(at);
            self.wheel.insert(at, id);
            self.sweep();
        }
    }

    /// Entries of flows that have gone stay in the wheel until their time, which may be hours: when they are more than those
    /// in use, they are taken out. Otherwise a guest could fill memory with flows it lets cool and closes.
    fn sweep(&mut self) {
        if self.wheel.len() <= 2 * self.table.len() + STALE_TIMERS {
            return;
        }
        let table = &self.table;
        self.wheel.retain(|at, id| table.get(id).is_some_and(|flow| flow.deadline == Some(at)));
    }

    /// Entries of the timer wheel, stale ones included.
    pub(crate) fn timers(&self) -> usize {
        self.wheel.len()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.wheel.poll_at()
    }

    /// Runs every timer that is due. `ask` is called with the address a connection still waits for.
    pub(crate) fn handle_timeout(
        &mut self,
        now: Instant,
        commands: &mut VecDeque<HostCommand>,
        mut ask: impl FnMut(std::net::IpAddr),
    ) {
        while let Some((at, id)) = self.wheel.pop_expired(now) {
            let Some(flow) = self.table.get_mut(id) else { continue };
            if flow.deadline != Some(at) {
                continue; // an older, later entry of the same flow
            }
            flow.deadline = None;
            if now >= flow.reaped_at(&self.limits) {
                if !flow.host_gone {
                    flow.host_gone = true;
                    commands.push_back(HostCommand::Reset { flow: id });
                }
                self.abort(id);
                continue;
            }
            if flow.warm && now >= flow.last_active + self.limits.ring_idle {
                flow.warm = false;
                if let Life::Live(live) = &mut flow.life
                    && live.holds_nothing()
                {
                    self.pool.discard(&live.socket);
                }
            }
            match &mut flow.life {
                Life::Live(_) => {
                    if let Some(port) =
                        self.ports.get_mut(usize::from(flow.key.port.0)).and_then(Option::as_mut)
                    {
                        // Only smoltcp's own timers have something to send; the rest is re-armed below.
                        let due = {
                            let Life::Live(live) = &mut flow.life else { continue };
                            let due = port
                                .engine(flow.key.is_v6())
                                .poll_at(engine_time(live.clock(now)), &live.socket.set)
                                .is_some_and(|t| our_time(t) <= now);
                            if due {
                                live.waited_in_vain();
                            }
                            due
                        };
                        if due {
                            Self::queue(port, flow, id);
                            continue;
                        }
                    }
                }
                Life::Resolving(r) => {
                    if r.asked >= Resolving::TRIES {
                        commands.push_back(HostCommand::Reset { flow: id });
                        self.release(id);
                        continue;
                    }
                    r.asked += 1;
                    ask(flow.key.guest().ip());
                }
                Life::Dialing(_) => {}
            }
            self.arm(now, id);
        }
    }
}
