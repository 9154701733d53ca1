//! How much of its receive window a flow tells the guest.
//!
//! A ring is large, so that one flow alone can fill the link. When many flows of a guest send at once, their windows
//! together exceed what the guest's own transmit queue holds (1000 frames under Linux, `txqueuelen`): the guest then drops
//! its own frames and sends them again. So the flows that send share one such queue between them: [`Senders`] counts them,
//! [`Advertised`] puts a flow's share into the segments smoltcp writes. Without it eight streams at MTU 1500 lose 7 %
//! of their frames inside the guest and run at a third of the speed.
//!
//! What else is told when a connection opens is kept beside it: the guest's MSS.
//!
//! A window once told is never taken back (RFC 9293 §3.8.6: a receiver should not shrink it); a share that has become
//! smaller takes effect as bytes arrive.

use std::num::Wrapping;

use super::after;
use crate::time::Instant;
use crate::wire::tcp as wire;

/// Frames of the guest's queue that all windows together may fill; the rest is for what is not TCP.
const QUEUE: u32 = 768;
/// No flow is told less, however many send: ten segments, as an initial window (RFC 6928).
const LEAST: u32 = 16 * 1024;
/// A guest that tells less gets these all the same: a segment for each byte would be a flood of our own making.
const LEAST_MSS: u16 = 64;
/// Microseconds; two flows that sent within the same or the next span of this length count as sending at once.
const EPOCH: u64 = 10_000;

/// How many flows of a port send.
#[derive(Debug, Default)]
pub(super) struct Senders {
    epoch: u64,
    now: u32,
    before: u32,
}

impl Senders {
    /// A flow sent bytes; `last` is its own memory of when it was counted.
    pub(super) fn note(&mut self, now: Instant, last: &mut u64) {
        let epoch = now.micros() / EPOCH + 1;
        if epoch != self.epoch {
            self.before = if epoch == self.epoch + 1 { self.now } else { 0 };
            (self.epoch, self.now) = (epoch, 0);
        }
        if *last != epoch {
            *last = epoch;
            self.now += 1;
        }
    }

    /// The bytes of window one flow may tell. `frame` is the largest frame of the link.
    pub(super) fn share(&self, frame: u32) -> u32 {
        (QUEUE * frame / self.now.max(self.before).max(1)).max(LEAST)
    }
}

/// What of its window one flow has told the guest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Advertised {
    /// The shift smoltcp applies; `None` until the guest's SYN has shown whether it understands scaling.
    shift: Option<u8>,
    /// The first sequence number beyond what the guest was told it may send.
    edge: Option<Wrapping<u32>>,
    /// The first sequence number beyond what was sent to it, FIN included.
    sent: Option<Wrapping<u32>>,
    /// The data bytes of a segment the guest takes: what it told, or what everybody takes over IPv6 (RFC 9293 §3.7.1).
    pub(super) guest_mss: u16,
}

impl Advertised {
    /// The guest's SYN, or SYN|ACK, of a flow whose ring to the host has `capacity` bytes.
    pub(super) fn begin(&mut self, segment: &[u8], capacity: usize) {
        // As smoltcp's `Socket::new`: as little as makes the whole ring fit into 16 bits.
        let shift = (usize::BITS - capacity.leading_zeros()).saturating_sub(16);
        *self = Self {
            shift: u8::try_from(shift).ok().filter(|_| wire::offers_scaling(segment)),
            edge: None,
            sent: self.sent,
            guest_mss: wire::mss(segment).map_or(1220, |mss| mss.max(LEAST_MSS)),
        };
    }

    /// Notes an outgoing segment.
    pub(super) fn note_sent(&mut self, segment: &[u8]) {
        if let Some(end) = wire::sequence_end(segment)
            && self.sent.is_none_or(|sent| after(end, sent))
        {
            self.sent = Some(end);
        }
    }

    /// Whether nothing has been sent yet.
    pub(super) const fn is_silent(&self) -> bool {
        self.sent.is_none()
    }

    /// The sequence numbers that are under way when the guest has acknowledged `ack`.
    pub(super) fn in_flight(&self, ack: Wrapping<u32>) -> u32 {
        self.sent.filter(|sent| after(*sent, ack)).map_or(0, |sent| (sent - ack).0)
    }

    /// Puts no more than `share` bytes into the window of an outgoing segment. `checksummed`: its checksum covers the
    /// header and is kept right.
    pub(super) fn curb(&mut self, share: u32, segment: &mut [u8], checksummed: bool) {
        let Some(shift) = self.shift else { return };
        let Some((ack, window)) = wire::acknowledged(segment) else { return };
        let offered = u32::from(window) << shift;
        let mut told = offered.min(share);
        if let Some(edge) = self.edge
            && after(edge, ack + Wrapping(told))
        {
            told = (edge - ack).0.min(offered);
        }
        let field = u16::try_from(told.div_ceil(1 << shift)).unwrap_or(u16::MAX).min(window);
        self.edge = Some(ack + Wrapping(u32::from(field) << shift));
        if field != window {
            wire::set_window(segment, field, checksummed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(ack: u32, window: u16) -> Vec<u8> {
        let mut segment = vec![0, 80, 4, 0, 0, 0, 0, 1];
        segment.extend(ack.to_be_bytes());
        segment.extend([0x50, wire::ACK]);
        segment.extend(window.to_be_bytes());
        segment.extend([0; 4]);
        let sum = crate::wire::checksum(&[&segment]).to_be_bytes();
        segment[16..18].copy_from_slice(&sum);
        segment
    }

    fn told(segment: &[u8], shift: u8) -> u32 {
        u32::from(wire::acknowledged(segment).unwrap().1) << shift
    }

    fn begun(capacity: usize) -> Advertised {
        let mut advertised = Advertised::default();
        let mut syn = ack(0, 1000);
        syn[12] = 0x60;
        syn[13] = wire::SYN;
        syn.extend([1, 3, 3, 7]);
        advertised.begin(&syn, capacity);
        advertised
    }

    #[test]
    fn a_share_is_told_and_the_checksum_stays_right() {
        let mut advertised = begun(1 << 20);
        let mut segment = ack(1000, 0x8000);
        advertised.curb(100_000, &mut segment, true);
        assert_eq!(told(&segment, 5), 100_000);
        assert_eq!(crate::wire::checksum(&[&segment]), 0);
    }

    #[test]
    fn what_was_told_is_not_taken_back() {
        let mut advertised = begun(1 << 20);
        advertised.curb(u32::MAX, &mut ack(1000, 0x8000), true);
        let mut later = ack(501_000, 0x8000);
        advertised.curb(16_384, &mut later, true);
        assert_eq!(told(&later, 5), (1 << 20) - 500_000);
        let mut much_later = ack(1000 + (1 << 20), 0x8000);
        advertised.curb(16_384, &mut much_later, true);
        assert_eq!(told(&much_later, 5), 16_384);
    }

    #[test]
    fn a_guest_that_does_not_scale_is_told_what_smoltcp_says() {
        let mut advertised = Advertised::default();
        let mut syn = ack(0, 1000);
        syn[13] = wire::SYN;
        advertised.begin(&syn, 1 << 20);
        let mut segment = ack(1000, 0xffff);
        advertised.curb(16_384, &mut segment, true);
        assert_eq!(told(&segment, 0), 0xffff);
    }

    #[test]
    fn flows_that_send_in_the_same_or_the_last_epoch_share_one_queue() {
        let mut senders = Senders::default();
        let mut flows = [0; 8];
        for at in [0, 3] {
            for flow in &mut flows {
                senders.note(Instant::from_micros(at), flow);
            }
        }
        assert_eq!(senders.share(1514), QUEUE * 1514 / 8);
        senders.note(Instant::from_micros(EPOCH), &mut flows[0]);
        assert_eq!(senders.share(1514), QUEUE * 1514 / 8);
        senders.note(Instant::from_micros(2 * EPOCH), &mut flows[0]);
        assert_eq!(senders.share(1514), QUEUE * 1514);
        assert_eq!(senders.share(1), LEAST);
    }
}
