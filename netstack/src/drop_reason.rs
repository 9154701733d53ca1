//! Why a frame, packet or datagram of a guest went no further. Guest faults are counted, never logged as warnings:
//! a guest could fill the disk with them.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident $text:literal;)+) => {
        /// A reason, one counter each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum DropReason {
            $($(#[doc = $doc])+ #[error($text)] $name,)+
        }

        impl DropReason {
            /// Every reason, in the order of its counter.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The variant's name, for listings and metrics; `snake_case` is made of it there.
            const fn variant(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }
        }
    };
}

reasons! {
    /// A frame shorter than an Ethernet header.
    Runt "the frame is shorter than 14 bytes";
    /// A header that is cut off.
    Truncated "a header is cut off";
    /// A length field that does not fit what is there.
    BadLength "a length field exceeds what is there";
    /// A wrong IPv4 header checksum.
    BadChecksum "the header checksum is wrong";
    /// An EtherType nobody here speaks.
    UnknownEtherType "the EtherType is not ARP, IPv4 or IPv6";
    /// An IP protocol nobody here speaks.
    UnknownProtocol "the protocol is not spoken here";
    /// A frame for an address that is nobody's.
    NotForUs "the destination is nobody's";
    /// A source address with the group bit, or of the gateway, or of another link.
    MacSpoofed "the Ethernet source belongs to another link or cannot be a source";
    /// More Ethernet addresses on one link than allowed.
    MacLimit "too many Ethernet addresses on the link";
    /// An IP source that is not the guest's to use.
    SourceSpoofed "the IP source belongs to another link or cannot be a guest's";
    /// An IPv4 header with a wrong version or length.
    BadIpHeader "the IP header is malformed";
    /// A TCP header with a wrong offset, or port 0.
    BadTcpHeader "the TCP header is malformed";
    /// A UDP header with a wrong length, or port 0.
    BadUdpHeader "the UDP header is malformed";
    /// An ICMP message that is malformed.
    BadIcmp "the ICMP message is malformed";
    /// A DHCP message that is malformed or makes no sense.
    BadDhcp "the DHCP message is malformed";
    /// A DHCP message that needs no answer, or is for another server.
    DhcpIgnored "the DHCP message is not for this server";
    /// No address is left to lease.
    DhcpExhausted "no address is left to lease";
    /// More leases on one link than allowed.
    DhcpLimit "the link holds too many leases";
    /// A fragment that cannot be one: no multiple of eight, empty, or beyond 64 KiB.
    BadFragment "the fragment is malformed";
    /// A fragment that overlaps another one of its packet, or comes after one that did.
    FragmentOverlap "the fragment overlaps another";
    /// A fragment that found no room to wait for the others.
    FragmentLimit "too many fragments wait for others";
    /// A packet whose fragments did not all come in time.
    FragmentTimeout "fragments of the packet are missing";
    /// A neighbour discovery message that RFC 4861 has us drop.
    BadNeighbour "the neighbour discovery message is malformed";
    /// Router advertisements, redirects and answers of DHCPv6 servers from a guest.
    RogueRouter "a guest is no router and no DHCP server";
    /// A packet whose hop limit ended here; it was answered.
    HopLimit "the hop limit is used up";
    /// An echo that the host may not send on: it has no ping sockets for us.
    NoPing "the host gives no ping sockets";
    /// TCP data beyond the window we offered.
    BeyondWindow "TCP data lies beyond the window";
    /// A segment of no flow; it was answered with RST.
    NoFlow "the segment belongs to no flow";
    /// A SYN beyond the flows of a port; it was answered with RST.
    FlowLimit "the port's TCP flows are used up";
    /// A SYN beyond the pending connects of a port; the guest tries again.
    DialLimit "too many connects wait for the host";
    /// A destination that policy forbids.
    Forbidden "the destination is not allowed";
    /// Multicast or broadcast that goes nowhere.
    Multicast "multicast and broadcast are not forwarded to the host";
    /// A datagram from the host that the guest has not asked for.
    Filtered "the sender is not one the guest has sent to";
    /// A datagram, or a packet of another guest, larger than the guest's MTU.
    TooBig "the packet is larger than the link's MTU";
    /// A frame to another guest whose virtio-net header does not fit it.
    BadOffload "the virtio-net header does not fit the frame";
    /// A frame between two guests of which one is isolated.
    Isolated "the link is isolated from other guests";
    /// A datagram to a guest whose link had no room.
    LinkFull "the link had no room";
    /// An answer that found no room to wait.
    OutboxFull "too many answers wait for the link";
    /// The protocol engine panicked in a flow, which ended; a fault of ours.
    EngineFault "the protocol engine failed, and the flow was ended";
    /// More answers of a kind than a guest may cause.
    RateLimited "the rate of answers is limited";
}

impl DropReason {
    /// The name in listings and metrics, `beyond_window` for `BeyondWindow`.
    #[must_use]
    pub fn name(self) -> String {
        let mut out = String::new();
        for c in self.variant().chars() {
            if c.is_ascii_uppercase() && !out.is_empty() {
                out.push('_');
            }
            out.push(c.to_ascii_lowercase());
        }
        out
    }
}

/// One counter per reason.
#[derive(Debug, Clone)]
pub struct DropCounters([u64; DropReason::ALL.len()]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl DropCounters {
    /// Counts one more.
    pub fn count(&mut self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts `n` more.
    pub fn add(&mut self, reason: DropReason, n: u64) {
        self.0[reason as usize] += n;
    }

    /// How often `reason` was counted.
    #[must_use]
    pub const fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|r| (*r, self.get(*r)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_snake_case_and_counters_are_kept_apart() {
        assert_eq!(DropReason::BeyondWindow.name(), "beyond_window");
        let mut counters = DropCounters::default();
        counters.count(DropReason::Runt);
        counters.add(DropReason::TooBig, 2);
        assert_eq!(
            counters.iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>(),
            [(DropReason::Runt, 1), (DropReason::TooBig, 2)]
        );
    }
}
