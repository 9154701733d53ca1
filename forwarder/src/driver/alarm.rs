//! The data thread's one timer.
//!
//! A timeout given to `epoll_wait(2)` programs the CPU's timer before the sleep and again after it. On a virtual machine each
//! is an exit to the hypervisor, and a request that is answered within 100 µs pays four of them (measured: 10 to 20 % of a
//! round trip). So on Linux the time lies in a `timerfd` that stays armed while the thread sleeps and wakes: it is set only
//! when something is due earlier than what it is set to. It may ring with nothing due; it is never late.

#[cfg(target_os = "linux")]
pub(super) use linux::Alarm;
#[cfg(not(target_os = "linux"))]
pub(super) use plain::Alarm;

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::{AsFd, AsRawFd};
    use std::time::Duration;

    use mio::unix::SourceFd;
    use mio::{Interest, Registry, Token};
    use nix::sys::time::TimeSpec;
    use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
    use portway_netstack::Instant;

    /// The timer, and what it is set to.
    pub(in crate::driver) struct Alarm {
        timer: TimerFd,
        set_to: Option<Instant>,
    }

    impl Alarm {
        /// A timer that wakes the poll of `registry` with `token`.
        ///
        /// # Errors
        /// When the kernel has no descriptor left.
        pub(in crate::driver) fn new(registry: &Registry, token: Token) -> io::Result<Self> {
            let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
            let fd = timer.as_fd().as_raw_fd();
            registry.register(&mut SourceFd(&fd), token, Interest::READABLE)?;
            Ok(Self { timer, set_to: None })
        }

        /// It has rung. Edge-triggered: there is nothing to read, and setting it again forgets what it counted.
        pub(in crate::driver) const fn rang(&mut self) {
            self.set_to = None;
        }

        /// How long the poll may sleep so that it wakes at `at`: for ever, once the timer is set to that or earlier.
        pub(in crate::driver) fn sleep_until(
            &mut self,
            now: Instant,
            at: Option<Instant>,
        ) -> Option<Duration> {
            let at = at?;
            let left = at.since(now);
            if left.is_zero() {
                return Some(left);
            }
            if self.set_to.is_some_and(|set_to| set_to <= at) {
                return None;
            }
            let once = Expiration::OneShot(TimeSpec::from_duration(left));
            match self.timer.set(once, TimerSetTimeFlags::empty()) {
                Ok(()) => self.set_to = Some(at),
                // No known kernel refuses; the poll's own timeout does as well.
                Err(_) => return Some(left),
            }
            None
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod plain {
    use std::io;
    use std::time::Duration;

    use mio::{Registry, Token};
    use portway_netstack::Instant;

    /// The poll's own timeout.
    pub(in crate::driver) struct Alarm;

    impl Alarm {
        /// Nothing to make.
        ///
        /// # Errors
        /// None.
        pub(in crate::driver) fn new(_: &Registry, _: Token) -> io::Result<Self> {
            Ok(Self)
        }

        /// It never rings.
        pub(in crate::driver) const fn rang(&mut self) {}

        /// The time until `at`.
        pub(in crate::driver) fn sleep_until(
            &mut self,
            now: Instant,
            at: Option<Instant>,
        ) -> Option<Duration> {
            at.map(|at| at.since(now))
        }
    }
}
