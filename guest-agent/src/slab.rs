//! Things with a place each, known by place and generation: an event for one that is gone names nobody else.

/// Where a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

/// The places.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    most: usize,
}

impl<T> Slab<T> {
    /// At most `most` things.
    pub(crate) const fn new(most: usize) -> Self {
        Self { places: Vec::new(), free: Vec::new(), most }
    }

    /// Takes a thing in, or gives it back at the limit.
    pub(crate) fn add(&mut self, thing: T) -> Result<Key, T> {
        if let Some(slot) = self.free.pop()
            && let Some((generation, place)) = self.places.get_mut(slot as usize)
        {
            *place = Some(thing);
            return Ok(Key { slot, generation: *generation });
        }
        match u32::try_from(self.places.len()) {
            Ok(slot) if self.places.len() < self.most => {
                self.places.push((0, Some(thing)));
                Ok(Key { slot, generation: 0 })
            }
            _ => Err(thing),
        }
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let (generation, thing) = self.places.get_mut(key.slot as usize)?;
        thing.as_mut().filter(|_| *generation == key.generation)
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let (generation, place) = self.places.get_mut(key.slot as usize)?;
        if *generation != key.generation {
            return None;
        }
        let thing = place.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(key.slot);
        Some(thing)
    }

    /// Everything, with its key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        (0u32..).zip(&self.places).filter_map(|(slot, (generation, thing))| {
            thing.as_ref().map(|t| (Key { slot, generation: *generation }, t))
        })
    }

    /// The keys of the things for which `wanted` is true.
    pub(crate) fn keys(&self, mut wanted: impl FnMut(&T) -> bool) -> Vec<Key> {
        self.iter().filter(|(_, t)| wanted(t)).map(|(k, _)| k).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_one_that_is_gone_is_nobodys() {
        let mut slab = Slab::new(1);
        let first = slab.add('a').expect("room");
        assert_eq!(slab.add('b'), Err('b'));
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.add('b').expect("room again");
        assert_eq!(first.slot, second.slot);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut 'b'));
        assert_eq!(slab.iter().count(), 1);
    }
}
