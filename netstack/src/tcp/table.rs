//! The flow table, and the sockets that flows take and give back.

use ahash::RandomState;
use hashbrown::HashTable;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::storage::RingBuffer;

use super::flow::{Flow, FlowKey};
use crate::host::FlowId;
use crate::rings::{RingClass, RingMemory};

struct Slot {
    generation: u32,
    flow: Option<Box<Flow>>,
}

/// Flows by id and by key. The hash is keyed by the seed: a guest chooses its ports, not its buckets.
pub(super) struct FlowTable {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots by the hash of their flow's key: the key itself stands in the flow alone.
    by_key: HashTable<u32>,
    hash: RandomState,
    /// The slot found last: bursts of one flow need no hash.
    last: u32,
}

impl FlowTable {
    pub(super) fn new(seed: u64) -> Self {
        let hash = RandomState::with_seeds(
            seed,
            seed.rotate_left(17),
            !seed,
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        Self { slots: Vec::new(), free: Vec::new(), by_key: HashTable::new(), hash, last: 0 }
    }

    /// Flows, resolving ones included.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn find(&mut self, key: &FlowKey) -> Option<FlowId> {
        let at = |slot: u32, slots: &[Slot]| FlowId { slot, generation: slots[slot as usize].generation };
        if let Some(Slot { flow: Some(flow), .. }) = self.slots.get(self.last as usize)
            && flow.key == *key
        {
            return Some(at(self.last, &self.slots));
        }
        let slots = &self.slots;
        let is_it = |slot: &u32| slots[*slot as usize].flow.as_ref().is_some_and(|f| f.key == *key);
        let slot = *self.by_key.find(self.hash.hash_one(key), is_it)?;
        self.last = slot;
        Some(at(slot, &self.slots))
    }

    pub(super) fn get(&self, id: FlowId) -> Option<&Flow> {
        self.slots.get(id.slot()).filter(|s| s.generation == id.generation)?.flow.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.slots.get_mut(id.slot()).filter(|s| s.generation == id.generation)?.flow.as_deref_mut()
    }

    pub(super) fn insert(&mut self, flow: Flow) -> FlowId {
        let flow = Some(Box::new(flow));
        if let Some(slot) = self.free.pop() {
            let at = &mut self.slots[slot as usize];
            at.flow = flow;
            return FlowId { slot, generation: at.generation };
        }
        let slot =
            u32::try_from(self.slots.len()).expect("flows per port and ports are limited far below 2^32");
        self.slots.push(Slot { generation: 0, flow });
        FlowId { slot, generation: 0 }
    }

    /// Makes `find` know the flow by its key.
    pub(super) fn index(&mut self, id: FlowId) {
        let Some(key) = self.get(id).map(|f| f.key) else { return };
        let (slots, hash) = (&self.slots, &self.hash);
        let rehash = |slot: &u32| slots[*slot as usize].flow.as_ref().map_or(0, |f| hash.hash_one(f.key));
        self.by_key.insert_unique(hash.hash_one(key), id.slot, rehash);
    }

    pub(super) fn remove(&mut self, id: FlowId) -> Option<Box<Flow>> {
        let slot = self.slots.get_mut(id.slot()).filter(|s| s.generation == id.generation)?;
        let flow = slot.flow.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.slot);
        // A flow that was never indexed (it waited for ARP) is not found here.
        if let Ok(entry) = self.by_key.find_entry(self.hash.hash_one(flow.key), |slot| *slot == id.slot) {
            entry.remove();
        }
        Some(flow)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = FlowId> + '_ {
        (0u32..)
            .zip(&self.slots)
            .filter(|(_, s)| s.flow.is_some())
            .map(|(slot, s)| FlowId { slot, generation: s.generation })
    }
}

/// A socket in a set of its own, with the rings it keeps for ever.
pub(super) struct FlowSocket {
    pub(super) set: SocketSet<'static>,
    handle: SocketHandle,
    rings: u32,
    class: RingClass,
}

impl FlowSocket {
    pub(super) fn tcp(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    pub(super) fn tcp_ref(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }
}

/// Sockets without a flow.
pub(super) struct SocketPool {
    memory: Box<dyn RingMemory>,
    /// Given back lately, their few pages still there: connection after connection costs no page fault.
    warm: [Vec<FlowSocket>; RingClass::ALL.len()],
    /// Without pages.
    cold: [Vec<FlowSocket>; RingClass::ALL.len()],
}

impl SocketPool {
    /// Warm sockets kept per class.
    const WARM: usize = 64;
    /// Flows above which new ones get small rings.
    const LARGE_FLOWS: usize = 4096;

    pub(super) fn new(memory: Box<dyn RingMemory>) -> Self {
        Self { memory, warm: [const { Vec::new() }; 2], cold: [const { Vec::new() }; 2] }
    }

    /// A socket in state Closed; `None` when ring memory is used up.
    pub(super) fn take(&mut self, open_flows: usize) -> Option<FlowSocket> {
        let class = if open_flows < Self::LARGE_FLOWS { RingClass::Large } else { RingClass::Small };
        let at = class as usize;
        if let Some(socket) = self.warm[at].pop().or_else(|| self.cold[at].pop()) {
            return Some(socket);
        }
        let rings = self.memory.take(class)?;
        let mut socket = tcp::Socket::new(RingBuffer::new(rings.to_host), RingBuffer::new(rings.to_guest));
        // The applications at both ends have decided about small segments already, and the link is memory.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(super::clock::engine_span(super::flow::ACK_DELAY)));
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Some(FlowSocket { set, handle, rings: rings.id, class })
    }

    /// Takes a socket back. `moved` is how many bytes crossed it, in both directions.
    pub(super) fn give_back(&mut self, mut socket: FlowSocket, moved: u64) {
        socket.tcp().abort();
        let at = socket.class as usize;
        // A flow that moved little touched few pages.
        if moved <= 64 * 1024 && self.warm[at].len() < Self::WARM {
            self.warm[at].push(socket);
        } else {
            self.memory.discard(socket.rings);
            self.cold[at].push(socket);
        }
    }

    /// Gives the pages of an idle flow's rings back.
    pub(super) fn discard(&mut self, socket: &FlowSocket) {
        self.memory.discard(socket.rings);
    }
}
