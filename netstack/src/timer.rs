//! A hierarchical timer wheel: setting a timer costs the same with ten flows and with ten thousand.
//!
//! ```text
//!  level 0: 64 slots of 1 ms · level 1: 64 of 64 ms · level 2: 64 of 4 s · level 3: 64 of 4.4 min · overflow
//! ```
//! An entry lies in the level whose slot width its distance fits and moves down as its time comes near. There is
//! no cancellation: the owner remembers the deadline it means and ignores entries that say another. Entries are
//! rounded up to the millisecond, so nothing fires early.

use crate::time::Instant;

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const LEVELS: usize = 4;

struct Level<K> {
    slots: [Vec<(Instant, K)>; SLOTS],
    /// Bit n: slot n is not empty.
    occupied: u64,
}

/// Timers with a key each.
pub(crate) struct TimerWheel<K> {
    levels: [Level<K>; LEVELS],
    overflow: Vec<(Instant, K)>,
    /// The tick up to which every entry has fired, in milliseconds.
    tick: u64,
    /// Entries that are due and not yet returned.
    due: Vec<(Instant, K)>,
    /// Scratch for a slot that is emptied.
    scratch: Vec<(Instant, K)>,
}

impl<K: Copy> TimerWheel<K> {
    pub(crate) fn new() -> Self {
        let level = || Level { slots: [const { Vec::new() }; SLOTS], occupied: 0 };
        Self {
            levels: [level(), level(), level(), level()],
            overflow: Vec::new(),
            tick: 0,
            due: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Fires `key` at `at`, or at the next millisecond after it.
    pub(crate) fn insert(&mut self, at: Instant, key: K) {
        self.place(at, key);
    }

    fn place(&mut self, at: Instant, key: K) {
        let tick = at.micros().div_ceil(1000);
        if tick <= self.tick {
            self.due.push((at, key));
            return;
        }
        // The highest bit in which the two times differ says which level still tells them apart.
        let level = ((tick ^ self.tick).ilog2() / BITS) as usize;
        let Some(to) = self.levels.get_mut(level) else {
            self.overflow.push((at, key));
            return;
        };
        let slot = Self::slot(tick, level);
        to.occupied |= 1 << slot;
        to.slots[slot].push((at, key));
    }

    const fn slot(tick: u64, level: usize) -> usize {
        // LEVELS * BITS is far below 64.
        ((tick >> (BITS * level as u32)) & (SLOTS as u64 - 1)) as usize
    }

    /// When something has to be done: not later than the earliest entry (rounded up), perhaps earlier. `None` when
    /// there is no entry.
    pub(crate) fn poll_at(&self) -> Option<Instant> {
        if !self.due.is_empty() {
            return Some(Instant::from_millis(self.tick));
        }
        self.next_tick().map(Instant::from_millis)
    }

    /// The first tick after `self.tick` at which a slot has to be emptied.
    fn next_tick(&self) -> Option<u64> {
        for (n, level) in self.levels.iter().enumerate() {
            let now = Self::slot(self.tick, n);
            // Entries of a level lie in slots after the current one: place() saw a higher digit.
            let ahead = level.occupied & u64::MAX.checked_shl(now as u32 + 1).unwrap_or(0);
            if ahead != 0 {
                let shift = BITS * n as u32;
                let base = self.tick >> (shift + BITS) << (shift + BITS);
                return Some(base + (u64::from(ahead.trailing_zeros()) << shift));
            }
        }
        let span = BITS * LEVELS as u32;
        (!self.overflow.is_empty()).then(|| ((self.tick >> span) + 1) << span)
    }

    /// The next entry that is due, with the time it was inserted for. Call until `None`.
    pub(crate) fn pop_expired(&mut self, now: Instant) -> Option<(Instant, K)> {
        let until = now.micros() / 1000;
        loop {
            if let Some(due) = self.due.pop() {
                return Some(due);
            }
            let Some(next) = self.next_tick().filter(|next| *next <= until) else {
                self.tick = self.tick.max(until);
                self.settle_after_jump();
                return self.due.pop();
            };
            self.advance(next);
        }
    }

    /// Moves to `tick` and empties the slots that begin there.
    fn advance(&mut self, tick: u64) {
        let wrapped = tick >> (BITS * LEVELS as u32) != self.tick >> (BITS * LEVELS as u32);
        self.tick = tick;
        if wrapped {
            for (at, key) in std::mem::take(&mut self.overflow) {
                self.place(at, key);
            }
        }
        for n in (0..LEVELS).rev() {
            self.empty_current(n);
        }
    }

    /// Entries of the slot the clock stands in belong to lower levels now.
    fn empty_current(&mut self, n: usize) {
        let slot = Self::slot(self.tick, n);
        let level = &mut self.levels[n];
        if level.occupied & (1 << slot) == 0 {
            return;
        }
        level.occupied &= !(1 << slot);
        let mut entries = std::mem::replace(&mut level.slots[slot], std::mem::take(&mut self.scratch));
        for (at, key) in entries.drain(..) {
            self.place(at, key);
        }
        self.scratch = entries;
    }

    /// After a jump to a time without a slot boundary of its own, the slots it stands in are emptied as well.
    fn settle_after_jump(&mut self) {
        for n in (1..LEVELS).rev() {
            self.empty_current(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn ms(n: u64) -> Instant {
        Instant::from_millis(n)
    }

    #[test]
    fn a_timer_fires_at_its_time_and_not_before() {
        let mut wheel = TimerWheel::new();
        wheel.insert(ms(5000), 'a');
        assert!(wheel.poll_at().unwrap() <= ms(5000));
        assert_eq!(wheel.pop_expired(ms(4999)), None);
        assert_eq!(wheel.pop_expired(ms(5000)), Some((ms(5000), 'a')));
        assert_eq!(wheel.poll_at(), None);
    }

    #[test]
    fn days_ahead_works_too() {
        let mut wheel = TimerWheel::new();
        wheel.insert(ms(7 * 86_400_000), 'w');
        assert_eq!(wheel.pop_expired(ms(6 * 86_400_000)), None);
        assert_eq!(wheel.pop_expired(ms(7 * 86_400_000)).map(|e| e.1), Some('w'));
    }

    proptest! {
        #[test]
        fn the_wheel_agrees_with_a_sorted_map(ops in prop::collection::vec((0u64..40_000_000, 0u64..3_000_000), 1..200)) {
            let (mut wheel, mut model, mut now) = (TimerWheel::new(), BTreeMap::<u64, Vec<usize>>::new(), 0u64);
            for (n, (after, step)) in ops.into_iter().enumerate() {
                let at = now + after;
                wheel.insert(Instant::from_micros(at), n);
                model.entry(at.div_ceil(1000)).or_default().push(n);
                let earliest = *model.keys().next().unwrap();
                prop_assert!(wheel.poll_at().unwrap() <= ms(earliest.max(now / 1000)));
                now += step;
                let mut fired: Vec<usize> = std::iter::from_fn(|| wheel.pop_expired(Instant::from_micros(now)).map(|e| e.1)).collect();
                let rest = model.split_off(&(now / 1000 + 1));
                let mut expected: Vec<usize> = std::mem::replace(&mut model, rest).into_values().flatten().collect();
                fired.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(fired, expected);
            }
        }
    }
}
