//! A limited number of places that guests share: each has as many as it likes while there are free ones, and when there are
//! none, one who has fewer takes one from the guest that has most.
//!
//! Thus a guest alone has all of them, and a guest that asks without end leaves the others their share. Who loses a place
//! loses the oldest of its guest, the one least likely to be of use still.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portway_netstack::PortId;
use tokio::sync::oneshot;

/// The places.
#[derive(Debug)]
pub(super) struct Places {
    limit: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    total: usize,
    /// By guest, the oldest first; nobody is in here with none.
    by_guest: HashMap<PortId, BTreeMap<u64, oneshot::Sender<()>>>,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    guest: PortId,
    number: u64,
    lost: oneshot::Receiver<()>,
}

impl Places {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, taken: Mutex::default() })
    }

    /// A place for `guest`; `None` when all are taken and nobody has two more than it.
    pub(super) fn take(self: &Arc<Self>, guest: PortId) -> Option<Place> {
        let mut taken = self.lock();
        if taken.total >= self.limit {
            let own = taken.by_guest.get(&guest).map_or(0, BTreeMap::len);
            // The one with most; of several the first by number, so that the same calls give the same places.
            let most =
                taken.by_guest.iter().map(|(port, places)| (places.len(), std::cmp::Reverse(*port))).max();
            let (_, std::cmp::Reverse(hog)) = most.filter(|(n, _)| *n > own + 1)?;
            let (_, loser) = taken.by_guest.get_mut(&hog)?.pop_first()?;
            taken.total -= 1;
            // Nobody may be waiting any more.
            let _ = loser.send(());
        }
        let (loser, lost) = oneshot::channel();
        let number = taken.next;
        taken.next += 1;
        taken.total += 1;
        taken.by_guest.entry(guest).or_default().insert(number, loser);
        drop(taken);
        Some(Place { places: Arc::clone(self), guest, number, lost })
    }

    /// Places taken now.
    pub(super) fn len(&self) -> usize {
        self.lock().total
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until the place is taken away.
    pub(super) async fn lost(&mut self) {
        // An error would be that the sender is gone: it goes with the place alone.
        let _ = (&mut self.lost).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if let Some(places) = taken.by_guest.get_mut(&self.guest) {
            let given_back = places.remove(&self.number).is_some();
            if places.is_empty() {
                taken.by_guest.remove(&self.guest);
            }
            if given_back {
                taken.total -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PortId = PortId(0);
    const B: PortId = PortId(1);
    const C: PortId = PortId(2);

    fn is_lost(place: &mut Place) -> bool {
        place.lost.try_recv().is_ok()
    }

    #[test]
    fn a_guest_alone_has_all_and_loses_its_oldest_to_the_others_until_they_are_even() {
        let places = Places::new(12);
        let mut first: Vec<Place> = (0..12).map(|_| places.take(A).unwrap()).collect();
        assert!(places.take(A).is_none());
        let second: Vec<Place> = std::iter::from_fn(|| places.take(B)).collect();
        assert_eq!(second.len(), 6);
        let lost: Vec<bool> = first.iter_mut().map(is_lost).collect();
        assert_eq!(lost, [[true; 6], [false; 6]].concat(), "the oldest");
        let third: Vec<Place> = std::iter::from_fn(|| places.take(C)).collect();
        assert_eq!((third.len(), places.len()), (4, 12));
    }

    #[test]
    fn a_place_is_given_back_once() {
        let places = Places::new(2);
        let (a, b) = (places.take(A).unwrap(), places.take(A).unwrap());
        let c = places.take(B).unwrap();
        assert_eq!(places.len(), 2);
        drop(a); // it was lost to B
        assert_eq!(places.len(), 2);
        drop((b, c));
        assert_eq!(places.len(), 0);
        assert!(places.lock().by_guest.is_empty());
    }
}
