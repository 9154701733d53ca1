//! A hierarchical timer wheel: setting a timer costs the same with ten flows and with ten thousand.
//!
//! ```text
//!  level 0: 64 slots of 1 ms · level 1: 64 of 64 ms · level 2: 64 of 4 s · level 3: 64 of 4.4 min · overflow
//! ```
//! An entry lies in the level whose slot width its distance fits and moves down as its time comes near. There is
//! no cancellation: the owner remembers the deadline it means and ignores entries that say another, and takes out those
//! it has no use for when they are many ([`TimerWheel::retain`]). Entries are
//! rounded up to the millisecond, so nothing fires early.

use crate::time::Instant;

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const LEVELS: u32 = 4;

struct Level<K> {
    slots: [Vec<(Instant, K)>; SLOTS],
    /// Bit n: slot n is not empty.
    occupied: u64,
}

/// Timers with a key each.
pub(crate) struct TimerWheel<K> {
    levels: [Level<K>; LEVELS as usize],
    overflow: Vec<(Instant, K)>,
    /// The tick up to which every entry has fired, in milliseconds.
    tick: u64,
    /// Entries that are due and not yet returned.
    due: Vec<(Instant, K)>,
    /// Entries, those that are due included.
    len: usize,
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
            len: 0,
            scratch: Vec::new(),
        }
    }

    /// Fires `key` at `at`, or at the next millisecond after it.
    pub(crate) fn insert(&mut self, at: Instant, key: K) {
        self.len += 1;
        self.place(at, key);
    }

    /// Entries, with those whose owner has no use for them any more.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Takes out every entry that is not `wanted`. Costs as much as there are entries.
    pub(crate) fn retain(&mut self, mut wanted: impl FnMut(Instant, K) -> bool) {
        let mut keep = |entries: &mut Vec<(Instant, K)>| {
            entries.retain(|(at, key)| wanted(*at, *key));
            // What was a crowd once is not kept room for.
            entries.shrink_to(entries.len() * 2);
            entries.len()
        };
        let mut len = keep(&mut self.due) + keep(&mut self.overflow);
        for level in &mut self.levels {
            for (n, slot) in level.slots.iter_mut().enumerate() {
                let left = keep(slot);
                len += left;
                if left == 0 {
                    level.occupied &= !(1 << n);
                }
            }
        }
        self.len = len;
    }

    fn place(&mut self, at: Instant, key: K) {
        let tick = at.micros().div_ceil(1000);
        if tick <= self.tick {
            self.due.push((at, key));
            return;
        }
        // The highest bit in which the two times differ says which level still tells them apart.
        let level = (tick ^ self.tick).ilog2() / BITS;
        let Some(to) = self.levels.get_mut(level as usize) else {
            self.overflow.push((at, key));
            return;
        };
        let slot = Self::slot(tick, level);
        to.occupied |= 1 << slot;
        to.slots[slot].push((at, key));
    }

    #[expect(clippy::cast_possible_truncation, reason = "the mask leaves six bits")]
    const fn slot(tick: u64, level: u32) -> usize {
        ((tick >> (BITS * level)) & (SLOTS as u64 - 1)) as usize
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
        for (n, level) in (0..).zip(&self.levels) {
            let now = Self::slot(self.tick, n);
            // Entries of a level lie in slots after the current one: place() saw a higher digit.
            let ahead =
                level.occupied & u64::MAX.checked_shl(u32::try_from(now).unwrap_or(63) + 1).unwrap_or(0);
            if ahead != 0 {
                let shift = BITS * n;
                let base = self.tick >> (shift + BITS) << (shift + BITS);
                return Some(base + (u64::from(ahead.trailing_zeros()) << shift));
            }
        }
        let span = BITS * LEVELS;
        (!self.overflow.is_empty()).then(|| ((self.tick >> span) + 1) << span)
    }

    /// The next entry that is due, with the time it was inserted for. Call until `None`.
    pub(crate) fn pop_expired(&mut self, now: Instant) -> Option<(Instant, K)> {
        let until = now.micros() / 1000;
        loop {
            if let Some(due) = self.due.pop() {
                self.len -= 1;
                return Some(due);
            }
            let Some(next) = self.next_tick().filter(|next| *next <= until) else {
                self.tick = self.tick.max(until);
                self.settle_after_jump();
                let due = self.due.pop();
                self.len -= usize::from(due.is_some());
                return due;
            };
            self.advance(next);
        }
    }

    /// Moves to `tick` and empties the slots that begin there.
    fn advance(&mut self, tick: u64) {
        let wrapped = tick >> (BITS * LEVELS) != self.tick >> (BITS * LEVELS);
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
    fn empty_current(&mut self, n: u32) {
        let slot = Self::slot(self.tick, n);
        let level = &mut self.levels[n as usize];
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

    #[test]
    fn what_nobody_wants_is_taken_out_and_the_rest_fires() {
        let mut wheel = TimerWheel::new();
        for n in 0..10_000 {
            wheel.insert(ms(1 + n * 997), n);
        }
        wheel.retain(|at, n| {
            assert_eq!(at, ms(1 + n * 997));
            n.is_multiple_of(1000)
        });
        assert_eq!(wheel.len(), 10);
        let mut fired: Vec<u64> =
            std::iter::from_fn(|| wheel.pop_expired(ms(20_000_000)).map(|e| e.1)).collect();
        fired.sort_unstable();
        assert_eq!(fired, (0..10).map(|n| n * 1000).collect::<Vec<_>>());
        assert_eq!((wheel.len(), wheel.poll_at()), (0, None));
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
