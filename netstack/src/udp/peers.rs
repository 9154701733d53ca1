//! Whom a binding has sent to, for its filter.
//!
//! Most have one or two peers; a peer-to-peer program has hundreds on one socket. So a few lie in a vector, more in two sets:
//! the newer one becomes the older when it is full, and what was in that is forgotten.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::UdpFilter;

/// Peers a binding remembers at the least; twice as many at the most. 4096 bindings with all of theirs take 40 MiB.
pub const PEERS: usize = 128;
/// Peers that are looked through one by one.
const FEW: usize = 8;

/// An address, and a port where the filter looks at it.
type Peer = (IpAddr, u16);

#[derive(Debug)]
pub(super) enum Peers {
    Few(Vec<Peer>),
    Many(Box<[BTreeSet<Peer>; 2]>),
}

impl Default for Peers {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

fn peer(filter: UdpFilter, remote: SocketAddr) -> Peer {
    match filter {
        UdpFilter::Address => (remote.ip(), 0),
        UdpFilter::Endpoint => (remote.ip(), remote.port()),
        UdpFilter::Any => (Ipv4Addr::UNSPECIFIED.into(), 0),
    }
}

impl Peers {
    pub(super) fn note(&mut self, filter: UdpFilter, remote: SocketAddr) {
        let peer = peer(filter, remote);
        match self {
            Self::Few(few) if few.contains(&peer) => {}
            Self::Few(few) if few.len() < FEW => few.push(peer),
            Self::Few(few) => {
                let mut newer: BTreeSet<Peer> = few.drain(..).collect();
                newer.insert(peer);
                *self = Self::Many(Box::new([newer, BTreeSet::new()]));
            }
            Self::Many(sets) => {
                let [newer, older] = &mut **sets;
                if newer.len() >= PEERS && !newer.contains(&peer) {
                    *older = std::mem::take(newer);
                }
                newer.insert(peer);
            }
        }
    }

    pub(super) fn admit(&self, filter: UdpFilter, remote: SocketAddr) -> bool {
        let peer = peer(filter, remote);
        match self {
            Self::Few(few) => few.contains(&peer),
            Self::Many(sets) => sets.iter().any(|set| set.contains(&peer)),
        }
    }
}
