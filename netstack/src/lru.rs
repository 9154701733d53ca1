//! Doubly linked lists over slot numbers: which entry was used longest ago, in constant time.

const NONE: u32 = u32::MAX;

/// The ends of one list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lru {
    oldest: u32,
    newest: u32,
    pub(crate) len: usize,
}

impl Default for Lru {
    fn default() -> Self {
        Self { oldest: NONE, newest: NONE, len: 0 }
    }
}

impl Lru {
    pub(crate) fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }
}

/// The links of every slot; a slot is in one list at most.
#[derive(Debug, Default)]
pub(crate) struct Links(Vec<(u32, u32)>);

impl Links {
    pub(crate) fn push_newest(&mut self, list: &mut Lru, slot: u32) {
        let at = slot as usize;
        if self.0.len() <= at {
            self.0.resize(at + 1, (NONE, NONE));
        }
        self.0[at] = (list.newest, NONE);
        match self.0.get_mut(list.newest as usize) {
            Some(before) => before.1 = slot,
            None => list.oldest = slot,
        }
        list.newest = slot;
        list.len += 1;
    }

    pub(crate) fn unlink(&mut self, list: &mut Lru, slot: u32) {
        let (before, after) = self.0[slot as usize];
        match self.0.get_mut(before as usize) {
            Some(b) => b.1 = after,
            None => list.oldest = after,
        }
        match self.0.get_mut(after as usize) {
            Some(a) => a.0 = before,
            None => list.newest = before,
        }
        list.len -= 1;
    }

    pub(crate) fn to_newest(&mut self, list: &mut Lru, slot: u32) {
        if list.newest != slot {
            self.unlink(list, slot);
            self.push_newest(list, slot);
        }
    }
}
