//! The pump: one turn after the other of frames in, flows, commands, frames out.
//!
//! A turn reads a batch of frames of every readable link, serves the flows they touched and the flows whose sockets are
//! ready, runs the stack's commands, and writes every link. It turns until nothing moves, [`TURNS`] times at the most.
//!
//! What a link brings in a turn is bounded by its [`Share`], in frames and in what they make the host do. The rest waits where it
//! is, in the VMM's socket or ring, so nothing is lost; and a turn in which a link had all its share is the last before
//! events are looked at again, so that the others are heard after a millisecond or two, whatever that link sends.

use std::ops::ControlFlow;

use portway_netstack::{Forward, Handled};

use super::{DnsTicket, Driver, Slow};
use crate::link::LinkState;

/// Reads of one link in one turn, while they bring much: with many flows in a batch, each has few segments in it, and larger
/// batches mean fewer system calls and ACKs for the same bytes.
const READS: usize = 8;

/// Frames of one link in one turn: a guest that sends thousands of small ones, each of which costs a system call of the host,
/// keeps the others waiting for no more than these.
const FRAMES: u64 = 512;

/// Flows and bindings one link may open in one turn: each costs the host a socket, a dozen system calls. The frames behind them
/// wait, none is lost.
pub(crate) const OPENINGS: u32 = 32;

/// Turns of the pump before events are looked at again. A link that had all its share ends them: what it has more comes
/// after the others have been heard.
const TURNS: usize = 8;

/// What one link may bring in one turn; the counts at which it is over.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Of frames of the link.
    frames: u64,
    /// Of [`Netstack::opened`](portway_netstack::Netstack::opened).
    opened: u64,
}

impl Driver {
    /// Moves bytes until nothing moves, or its turns are over. True in the second case.
    pub(super) fn pump(&mut self) -> bool {
        let mut busy = true;
        for _ in 0..TURNS {
            let (mut moved, mut crowded) = (false, false);
            for n in 0..self.links.len() {
                let share = Share {
                    frames: self.links[n].counters().frames_from_guest + FRAMES,
                    opened: self.stack.opened() + u64::from(OPENINGS),
                };
                for _ in 0..READS {
                    if !self.receive(n, share) {
                        break;
                    }
                    moved = true;
                    if self.links[n].counters().frames_from_guest >= share.frames
                        || self.stack.opened() >= share.opened
                    {
                        crowded = true;
                        break;
                    }
                }
            }
            moved |= self.accept_all();
            moved |= self.receive_datagrams();
            while let Some(flow) = self.stack.poll_flow() {
                moved |= self.serve(flow);
            }
            for _ in 0..self.ready.len() {
                let Some(flow) = self.ready.pop_front() else { break };
                moved |= self.serve(flow);
            }
            moved |= self.run_commands();
            for n in 0..self.links.len() {
                moved |= self.transmit(n);
            }
            moved |= self.run_commands();
            if !moved && self.ready.is_empty() {
                busy = false;
                break;
            }
            if crowded {
                break;
            }
            self.tick();
        }
        if self.stack.leases_changed() {
            self.tell_leases();
        }
        busy
    }

    /// One batch of frames of link `n`.
    fn receive(&mut self, n: usize, share: Share) -> bool {
        if !self.links[n].wants_receive() {
            return false;
        }
        // The link is taken out so that its frames can be copied into the others' buffers.
        let (before, rest) = self.links.split_at_mut(n);
        let Some((link, after)) = rest.split_first_mut() else { return false };
        let (stack, now, port) = (&mut self.stack, self.now, link.port);
        let (udp, slow, registry) = (&mut self.udp, &self.slow, self.poll.registry());
        let (entrances, backlog) = (&self.entrances, &self.backlog);
        let mut panicked = false;
        let mut take = |frame: &[u8], offload: portway_netstack::Offload| {
            crate::last_net::on_purpose(frame.get(42..).unwrap_or_default());
            let (whole, mut handled);
            handled = stack.handle_frame(now, port, frame);
            if let Handled::Whole(packet) = handled {
                whole = packet;
                handled = stack.handle_frame(now, port, &whole);
            }
            match handled {
                Handled::Done | Handled::Whole(_) => {}
                Handled::Echo(echo) => udp.ping(registry, &echo),
                Handled::Datagram(datagram) => udp.send_all(registry, &datagram, offload, entrances),
                Handled::Dns { guest, asked, query } => {
                    // At the limit the query is dropped: the guest asks again.
                    if let Some(waiting) = backlog.admit(port) {
                        let ticket = DnsTicket { guest, asked, port };
                        let _ = slow.try_send(Slow::Dns(ticket, query.to_vec(), waiting));
                    }
                }
                Handled::Forward(to) => {
                    for other in before.iter_mut().chain(after.iter_mut()) {
                        if matches!(to, Forward::Flood) || to == Forward::Port(other.port) {
                            let target = other.port;
                            if let Some(sink) = other.sink() {
                                stack.forward(now, (port, target), frame, offload, sink);
                            }
                        }
                    }
                }
            }
            if stack.opened() >= share.opened { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let state = link.receive(|frame, offload| {
            // What such a frame left half done is this link's, and goes with it; so do the frames behind it.
            let taken = (!panicked).then(|| crate::last_net::caught(|| take(frame, offload))).flatten();
            panicked = taken.is_none();
            taken.unwrap_or(ControlFlow::Break(()))
        });
        udp.flush();
        self.tell_faults();
        if state == LinkState::Gone || panicked {
            self.take_down(n);
        } else if state == LinkState::Restarted {
            self.restart(n);
        } else if let Some(hello) = self.links[n].take_hello() {
            let answer = self.admit(hello);
            if let Ok(mac) = answer
                && let Some(old) =
                    (0..self.links.len()).find(|i| *i != n && self.links[*i].given() == Some(mac))
            {
                // A VM that comes again before its first connection ended is one VM: rootlesskit asks for its address on
                // a connection of its own.
                self.take_down(old);
            }
            if self.links[n].answer(answer) == LinkState::Gone {
                self.take_down(n);
            }
        }
        true
    }

    /// Writes link `n` until the stack has nothing more or the VMM takes no more.
    pub(super) fn transmit(&mut self, n: usize) -> bool {
        let mut moved = false;
        loop {
            let link = &mut self.links[n];
            let port = link.port;
            let Some(sink) = link.sink() else { return moved };
            let wanted = self.stack.wants_transmit(port);
            let before = sink.written();
            let more = wanted && self.stack.poll_transmit(self.now, port, sink);
            // A carrier that writes at once has nothing waiting, and has moved all the same.
            moved |= sink.written() != before;
            match link.flush() {
                LinkState::Same => {}
                LinkState::Gone => {
                    self.take_down(n);
                    return true;
                }
                LinkState::Restarted => {
                    self.restart(n);
                    return true;
                }
            }
            if !more || link.is_blocked() {
                return moved;
            }
        }
    }
}
