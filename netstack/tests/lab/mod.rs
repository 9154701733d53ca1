//! The lab: a `Netstack` with a virtual clock, guests that are frames by hand, and a host that is a script.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "every test file uses a part of the lab")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

pub mod real;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use etherparse::{PacketBuilder, PacketBuilderStep, TcpOptionElement};
use portway_netstack::{
    DropReason, Duration, FlowId, FrameSink, Handled, HostCommand, HostEvent, Instant, Ipv6Config, Limits,
    Mac, Netstack, Offload, Offloads, PortConfig, PortId, RingClass, RingMemory, Rings, StackConfig,
    UdpConfig,
};

pub const GATEWAY_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
pub const GATEWAY: &str = "192.168.127.1";
pub const ALIAS: &str = "192.168.127.254";
pub const GATEWAY6: &str = "fd00:77::1";
pub const ALIAS6: &str = "fd00:77::254";
/// The gateway's link-local address: the router.
pub const ROUTER: &str = "fe80::5894:efff:fee4:cdd";
/// The first guest's addresses.
pub const GUEST6: &str = "fd00:77::2";
pub const GUEST6_LOCAL: &str = "fe80::ff:fe00:1";

/// Rings on the heap, for ever.
pub struct HeapRings {
    next: u32,
    pub left: usize,
}

impl RingMemory for HeapRings {
    fn take(&mut self, class: RingClass) -> Option<Rings> {
        self.left = self.left.checked_sub(1)?;
        let ring = |n| Box::leak(vec![0u8; n].into_boxed_slice());
        self.next += 1;
        // As the real one, so that windows and wrap-around are the real ones.
        Some(Rings { id: self.next, to_host: ring(class.sizes().0), to_guest: ring(class.sizes().1) })
    }
    fn discard(&mut self, _: u32) {}
}

/// A link that holds at most `room` frames.
#[derive(Default)]
pub struct Wire {
    pub frames: Vec<Vec<u8>>,
    pub room: usize,
}

impl FrameSink for Wire {
    fn has_room(&self) -> bool {
        self.frames.len() < self.room
    }
    fn frame<R>(&mut self, len: usize, _: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let mut frame = vec![0xa5; len];
        let result = fill(&mut frame);
        self.frames.push(frame);
        Some(result)
    }
}

/// What a guest sees, as far as tests speak of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Tcp {
        src: String,
        dst: String,
        flags: &'static str,
        seq: u32,
        ack: u32,
        window: u16,
        payload: Vec<u8>,
    },
    Udp {
        src: String,
        dst: String,
        payload: Vec<u8>,
    },
    Icmp {
        src: String,
        dst: String,
        kind: u8,
        code: u8,
        rest: Vec<u8>,
    },
    /// A fragment: where its bytes begin, and how many they are.
    Fragment {
        offset: usize,
        more: bool,
        len: usize,
    },
    Arp {
        is_reply: bool,
        sender: String,
        target: String,
    },
}

impl Seen {
    /// The flags of a segment; empty for anything else.
    pub fn flags(&self) -> &'static str {
        if let Self::Tcp { flags, .. } = self { flags } else { "" }
    }
}

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The beginning of a packet of a guest, to the gateway's Ethernet address.
pub fn ip(mac: Mac, from: IpAddr, to: IpAddr, hop_limit: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    let b = PacketBuilder::ethernet2(mac.0, GATEWAY_MAC.0);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => b.ipv4(from.octets(), to.octets(), hop_limit),
        (IpAddr::V6(from), IpAddr::V6(to)) => b.ipv6(from.octets(), to.octets(), hop_limit),
        _ => panic!("{from} and {to} are of two versions"),
    }
}

pub fn config(limits: Limits) -> StackConfig {
    StackConfig {
        subnet: "192.168.127.0/24".parse().unwrap(),
        gateway: GATEWAY.parse().unwrap(),
        host_alias: ALIAS.parse().unwrap(),
        gateway_mac: GATEWAY_MAC,
        services: portway_netstack::Services::default(),
        domain: "portway.internal".into(),
        search: vec![],
        ntp: vec![],
        lease_time: secs(3600),
        static_leases: vec![],
        host_loopback: true,
        guest_api: true,
        metadata: false,
        ipv6: Some(Ipv6Config {
            subnet: "fd00:77::/64".parse().unwrap(),
            gateway: GATEWAY6.parse().unwrap(),
            host_alias: ALIAS6.parse().unwrap(),
            uplink: true,
        }),
        udp: UdpConfig::default(),
        limits,
    }
}

pub struct Lab {
    pub stack: Netstack,
    pub now: Instant,
    pub wires: Vec<Wire>,
    pub ports: Vec<PortId>,
}

/// A link that keeps what came with each frame.
#[derive(Default)]
pub struct Unfinished(pub Vec<(Vec<u8>, Offload)>);

impl FrameSink for Unfinished {
    fn has_room(&self) -> bool {
        true
    }
    fn frame<R>(&mut self, len: usize, offload: Offload, fill: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let mut frame = vec![0xa5; len];
        let result = fill(&mut frame);
        self.0.push((frame, offload));
        Some(result)
    }
}

/// One segment a guest sends.
#[derive(Clone)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub seq: u32,
    pub ack: Option<u32>,
    pub flags: &'static str,
    pub window: u16,
    /// The window scale option, of a SYN.
    pub scale: Option<u8>,
    /// The maximum segment size, of a SYN.
    pub mss: Option<u16>,
    pub payload: Vec<u8>,
}

pub fn segment(flags: &'static str, from: &str, to: &str, seq: u32, ack: u32) -> Segment {
    let ack = (flags != "S" && flags != "R").then_some(ack);
    Segment {
        from: addr(from),
        to: addr(to),
        seq,
        ack,
        flags,
        window: 65_535,
        scale: None,
        mss: None,
        payload: vec![],
    }
}

impl Segment {
    pub fn with(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    pub fn window(mut self, window: u16) -> Self {
        self.window = window;
        self
    }

    pub fn frame(&self, mac: Mac) -> Vec<u8> {
        let mut b = ip(mac, self.from.ip(), self.to.ip(), 64).tcp(
            self.from.port(),
            self.to.port(),
            self.seq,
            self.window,
        );
        for flag in self.flags.chars() {
            b = match flag {
                'S' => b.syn(),
                'F' => b.fin(),
                'R' => b.rst(),
                'P' => b.psh(),
                _ => b,
            };
        }
        if let Some(ack) = self.ack {
            b = b.ack(ack);
        }
        if let Some(shift) = self.scale {
            b = b.options(&[TcpOptionElement::WindowScale(shift)]).unwrap();
        }
        if let Some(mss) = self.mss {
            b = b.options(&[TcpOptionElement::MaximumSegmentSize(mss)]).unwrap();
        }
        let mut out = Vec::new();
        b.write(&mut out, &self.payload).unwrap();
        out
    }
}

pub fn syn(from: &str, to: &str) -> Segment {
    segment("S", from, to, 1000, 0)
}

pub fn mac_of(guest: usize) -> Mac {
    Mac([2, 0, 0, 0, 0, u8::try_from(guest).unwrap() + 1])
}

impl Lab {
    pub fn new() -> Self {
        Self::with(Limits::default(), 1, 1500)
    }

    pub fn with(limits: Limits, guests: usize, mtu: u16) -> Self {
        Self::with_rings(limits, guests, mtu, usize::MAX)
    }

    pub fn with_rings(limits: Limits, guests: usize, mtu: u16, rings: usize) -> Self {
        Self::with_memory(limits, guests, mtu, Box::new(HeapRings { next: 0, left: rings }))
    }

    pub fn with_memory(limits: Limits, guests: usize, mtu: u16, rings: Box<dyn RingMemory>) -> Self {
        Self::of(config(limits), guests, mtu, rings)
    }

    /// One guest, and the defaults with something changed.
    pub fn configured(change: impl FnOnce(&mut StackConfig)) -> Self {
        Self::configured_for(1, change)
    }

    /// The defaults with something changed.
    pub fn configured_for(guests: usize, change: impl FnOnce(&mut StackConfig)) -> Self {
        let mut config = config(Limits::default());
        change(&mut config);
        Self::of(config, guests, 1500, Box::new(HeapRings { next: 0, left: usize::MAX }))
    }

    fn of(config: StackConfig, guests: usize, mtu: u16, rings: Box<dyn RingMemory>) -> Self {
        let mut stack = Netstack::new(config, rings, 0x5eed);
        let port = PortConfig { name: None, mtu, address: None, isolate: false };
        let ports =
            (0..guests).map(|_| stack.add_port(Instant::ZERO, port.clone(), Offloads::default())).collect();
        let wires = (0..guests).map(|_| Wire { frames: vec![], room: usize::MAX }).collect();
        Self { stack, now: Instant::ZERO, wires, ports }
    }

    /// Lets time pass; timers that come due on the way run at their time.
    pub fn after(&mut self, time: Duration) -> &mut Self {
        let end = self.now + time;
        while let Some(at) = self.stack.poll_timeout().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.stack.handle_timeout(self.now);
            self.transmit();
        }
        self.now = end;
        self.stack.handle_timeout(end);
        self.transmit();
        self
    }

    pub fn transmit(&mut self) {
        for (port, wire) in self.ports.iter().zip(&mut self.wires) {
            self.stack.poll_transmit(self.now, *port, wire);
        }
    }

    /// A raw frame of guest `n`.
    pub fn frame<'f>(&mut self, n: usize, frame: &'f [u8]) -> Handled<'f> {
        let handled = self.stack.handle_frame(self.now, self.ports[n], frame);
        self.transmit();
        handled
    }

    pub fn guest_sends(&mut self, segment: &Segment) {
        self.frame(0, &segment.frame(mac_of(0)));
    }

    /// The guest speaks: the stack knows where it is.
    pub fn guest_announces(&mut self) {
        self.guest_sends(&segment("A", "192.168.127.2:9", "192.168.127.1:9", 1, 1));
        self.guest_sees();
    }

    /// The guest speaks IPv6: the stack knows where its addresses are.
    pub fn guest_announces_v6(&mut self) {
        self.guest_sends(&segment("A", "[fd00:77::2]:9", "[fd00:77::1]:9", 1, 1));
        self.guest_sees();
    }

    /// An ICMPv6 message of guest `n`: type, code and four bytes of it, and what follows.
    pub fn icmp6<'f>(
        &mut self,
        n: usize,
        from: &str,
        to: &str,
        hop_limit: u8,
        (head, body): ([u8; 6], &[u8]),
        frame: &'f mut Vec<u8>,
    ) -> Handled<'f> {
        let (from, to): (std::net::Ipv6Addr, std::net::Ipv6Addr) =
            (from.parse().unwrap(), to.parse().unwrap());
        let [kind, code, rest @ ..] = head;
        frame.clear();
        let b = ip(mac_of(n), from.into(), to.into(), hop_limit);
        b.icmpv6_raw(kind, code, rest).write(frame, body).unwrap();
        if to.is_multicast() {
            frame[..2].copy_from_slice(&[0x33, 0x33]);
            frame[2..6].copy_from_slice(&to.octets()[12..]);
        }
        self.frame(n, frame)
    }

    /// The bytes of the segments the guest was sent, in order.
    pub fn guest_reads(&mut self) -> Vec<u8> {
        let payload = |seen| if let Seen::Tcp { payload, .. } = seen { payload } else { panic!("{seen:?}") };
        self.guest_sees().into_iter().flat_map(payload).collect()
    }

    pub fn udp<'f>(&mut self, from: &str, to: &str, payload: &[u8], frame: &'f mut Vec<u8>) -> Handled<'f> {
        let (from, to) = (addr(from), addr(to));
        let b = ip(mac_of(0), from.ip(), to.ip(), 64);
        frame.clear();
        b.udp(from.port(), to.port()).write(frame, payload).unwrap();
        self.frame(0, frame)
    }

    /// Everything guest `n` was sent since this was last asked.
    pub fn guest_n_sees(&mut self, n: usize) -> Vec<Seen> {
        self.transmit();
        std::mem::take(&mut self.wires[n].frames).iter().map(|f| read(f)).collect()
    }

    pub fn guest_sees(&mut self) -> Vec<Seen> {
        self.guest_n_sees(0)
    }

    /// The flags of the segments the guest was sent.
    pub fn guest_sees_flags(&mut self) -> Vec<&'static str> {
        self.guest_sees().iter().map(Seen::flags).collect()
    }

    pub fn host_sees(&mut self) -> Vec<HostCommand> {
        std::iter::from_fn(|| self.stack.poll_host()).collect()
    }

    pub fn host_says(&mut self, event: HostEvent) {
        self.stack.handle_host(self.now, event);
        self.transmit();
    }

    /// The flow of the one connect the host is asked for.
    pub fn connect(&mut self) -> FlowId {
        match self.host_sees()[..] {
            [HostCommand::Connect { flow, .. }] => flow,
            ref other => panic!("not one connect: {other:?}"),
        }
    }

    /// A connection from `from` to `to` that is open at both ends: the flow, and the next sequence numbers of guest
    /// and stack.
    pub fn open(&mut self, from: &str, to: &str) -> (FlowId, u32, u32) {
        self.guest_sends(&syn(from, to));
        let flow = self.connect();
        self.host_says(HostEvent::Connected { flow });
        let isn = match &self.guest_sees()[..] {
            [Seen::Tcp { flags: "SA", seq, .. }] => *seq,
            other => panic!("not one SYN|ACK: {other:?}"),
        };
        self.guest_sends(&segment("A", from, to, 1001, isn + 1));
        assert_eq!(self.guest_sees(), []);
        (flow, 1001, isn + 1)
    }

    /// What the host takes out of a flow's ring.
    pub fn host_reads(&mut self, flow: FlowId) -> Vec<u8> {
        let mut out = Vec::new();
        while let Some(n) = self.stack.to_host(self.now, flow, |bytes| {
            out.extend_from_slice(bytes);
            bytes.len()
        }) {
            assert!(n > 0);
        }
        self.transmit();
        out
    }

    /// What the host puts into a flow's ring; how many bytes found room.
    pub fn host_writes(&mut self, flow: FlowId, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let put = self.stack.from_host(self.now, flow, |space| {
                let n = space.len().min(bytes.len() - done);
                space[..n].copy_from_slice(&bytes[done..done + n]);
                n
            });
            match put {
                Some(n) if n > 0 => done += n,
                _ => break,
            }
        }
        self.transmit();
        done
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.stack.drops().get(reason)
    }
}

pub fn read(frame: &[u8]) -> Seen {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (src, dst) = match packet.net.unwrap() {
        NetSlice::Arp(arp) => {
            let ip = |b: &[u8]| Ipv4Addr::from(<[u8; 4]>::try_from(b).unwrap()).to_string();
            let is_reply = arp.operation() == etherparse::ArpOperation::REPLY;
            return Seen::Arp {
                is_reply,
                sender: ip(arp.sender_protocol_addr()),
                target: ip(arp.target_protocol_addr()),
            };
        }
        NetSlice::Ipv4(ip) => {
            let h = ip.header();
            assert_eq!(h.header_checksum(), h.to_header().calc_header_checksum());
            if h.is_fragmenting_payload() {
                let offset = usize::from(h.fragments_offset().value()) * 8;
                return Seen::Fragment { offset, more: h.more_fragments(), len: ip.payload().payload.len() };
            }
            (IpAddr::V4(h.source_addr()), IpAddr::V4(h.destination_addr()))
        }
        NetSlice::Ipv6(ip) => {
            if ip.extensions().is_fragmenting_payload() {
                // The first extension header here is the fragment's.
                let field = u16::from_be_bytes([frame[14 + 40 + 2], frame[14 + 40 + 3]]);
                let len = ip.payload().payload.len();
                return Seen::Fragment { offset: usize::from(field & !7), more: field & 1 != 0, len };
            }
            (IpAddr::V6(ip.header().source_addr()), IpAddr::V6(ip.header().destination_addr()))
        }
    };
    let text = |ip: IpAddr, port: u16| SocketAddr::new(ip, port).to_string();
    match packet.transport.unwrap() {
        TransportSlice::Tcp(t) => {
            let header = t.to_header();
            let sum = match (src, dst) {
                (IpAddr::V4(s), IpAddr::V4(d)) => {
                    header.calc_checksum_ipv4_raw(s.octets(), d.octets(), t.payload())
                }
                (IpAddr::V6(s), IpAddr::V6(d)) => {
                    header.calc_checksum_ipv6_raw(s.octets(), d.octets(), t.payload())
                }
                _ => unreachable!(),
            };
            assert_eq!(header.checksum, sum.unwrap());
            let flags = match (header.syn, header.fin, header.rst, header.psh, header.ack) {
                (true, _, _, _, true) => "SA",
                (true, ..) => "S",
                (_, true, ..) => "FA",
                (_, _, true, _, true) => "RA",
                (_, _, true, ..) => "R",
                (_, _, _, true, _) => "PA",
                _ => "A",
            };
            Seen::Tcp {
                src: text(src, header.source_port),
                dst: text(dst, header.destination_port),
                flags,
                seq: header.sequence_number,
                ack: header.acknowledgment_number,
                window: header.window_size,
                payload: t.payload().to_vec(),
            }
        }
        TransportSlice::Udp(u) => {
            let header = u.to_header();
            let sum = match (src, dst) {
                (IpAddr::V4(s), IpAddr::V4(d)) => {
                    header.calc_checksum_ipv4_raw(s.octets(), d.octets(), u.payload())
                }
                (IpAddr::V6(s), IpAddr::V6(d)) => {
                    header.calc_checksum_ipv6_raw(s.octets(), d.octets(), u.payload())
                }
                _ => unreachable!(),
            };
            assert_eq!(header.checksum, sum.unwrap());
            let (src, dst) = (text(src, u.source_port()), text(dst, u.destination_port()));
            Seen::Udp { src, dst, payload: u.payload().to_vec() }
        }
        TransportSlice::Icmpv4(i) => icmp(src, dst, i.slice()),
        TransportSlice::Icmpv6(i) => {
            let (IpAddr::V6(s), IpAddr::V6(d)) = (src, dst) else { unreachable!() };
            assert!(i.is_checksum_valid(s.octets(), d.octets()));
            icmp(src, dst, i.slice())
        }
        TransportSlice::Igmp(_) => panic!("nobody here speaks IGMP"),
    }
}

fn icmp(src: IpAddr, dst: IpAddr, message: &[u8]) -> Seen {
    let (kind, code, rest) = (message[0], message[1], message[8..].to_vec());
    Seen::Icmp { src: src.to_string(), dst: dst.to_string(), kind, code, rest }
}
