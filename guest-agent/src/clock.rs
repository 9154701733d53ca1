//! The guest's clock, which stood still while the host slept.
//!
//! The host tells its time when a session begins and every few seconds. Up to [`SLACK`] the guest's own NTP client is
//! left to its work; a clock that is further off was stopped, and is set at once. Only forward jumps are real on the guest
//! of a sleeping host, but a clock that began in the future (no RTC) is set back all the same.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// How far off a clock may be before it is set.
const SLACK: Duration = Duration::from_secs(1);

/// How far this clock is behind the host's, in milliseconds.
pub(crate) fn behind_ms(host_us: u64, now: SystemTime) -> i64 {
    let now_us = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros());
    let behind = (i128::from(host_us) - i128::try_from(now_us).unwrap_or(i128::MAX)) / 1000;
    i64::try_from(behind).unwrap_or(if behind < 0 { i64::MIN } else { i64::MAX })
}

/// Whether a clock that far off is to be set.
pub(crate) const fn is_off(behind_ms: i64) -> bool {
    behind_ms.unsigned_abs() as u128 >= SLACK.as_millis()
}

/// Sets the clock; needs `CAP_SYS_TIME`.
pub(crate) fn set(host_us: u64) -> nix::Result<()> {
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_micros(host_us)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_slept_is_behind_and_one_that_is_right_is_left_alone() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(behind_ms(1_000_000_000, now), 0);
        assert_eq!(behind_ms(4_600_000_000, now), 3_600_000);
        assert_eq!(behind_ms(0, now), -1_000_000);
        assert!(behind_ms(u64::MAX, now) > 0);
        assert!(is_off(1000) && is_off(-5000) && !is_off(999) && !is_off(0) && is_off(i64::MIN));
    }
}
