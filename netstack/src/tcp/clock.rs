//! smoltcp's clock, which runs ten times as fast as ours.
//!
//! smoltcp's timers are made for networks: a segment is sent again after a second at the earliest (RFC 6298 §2.4 asks for
//! that). Our network is memory of the same machine with a round trip below a millisecond, and what gets lost there is lost
//! inside the guest: a Linux guest whose receive buffer runs over drops a segment it has offered a window for
//! (`TcpExtRcvPruned`). A second for each would stall a stream that moves gigabits. With the clock ten times as fast it is
//! 100 ms, half of Linux's own shortest time; it grows with the round trip and doubles as ever.
//!
//! No other module sees smoltcp's time. What it means by 10 s of TIME-WAIT does not matter: a flow ends when both FINs are
//! acknowledged.

use crate::time::{Duration, Instant};

/// How much faster smoltcp's clock runs.
const SPEED: u32 = 10;

/// Our time as smoltcp sees it.
pub(super) fn engine_time(at: Instant) -> smoltcp::time::Instant {
    let micros = at.micros().saturating_mul(u64::from(SPEED));
    smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// A span of our time as smoltcp sees it.
pub(super) fn engine_span(span: Duration) -> smoltcp::time::Duration {
    (span * SPEED).into()
}

/// A time of smoltcp's as we see it; never earlier than it means.
pub(super) fn our_time(at: smoltcp::time::Instant) -> Instant {
    Instant::from_micros(u64::try_from(at.total_micros()).unwrap_or(0).div_ceil(SPEED.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_of_the_engine_has_expired_when_we_think_so() {
        for micros in [0, 1, 999, 1_000_001, 123_456_789] {
            let theirs = smoltcp::time::Instant::from_micros(micros);
            assert!(engine_time(our_time(theirs)) >= theirs);
        }
        assert_eq!(our_time(engine_time(Instant::from_millis(77))), Instant::from_millis(77));
    }
}
