//! The lab: a `Netstack` with a virtual clock, guests that are frames by hand, and a host that is a script.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "every test file uses a part of the lab")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

pub mod real;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use etherparse::{PacketBuilder, TcpOptionElement};
use portway_netstack::{
    DropReason, Duration, FlowId, FrameSink, Handled, HostCommand, HostEvent, Instant, Limits, Mac, Netstack,
    Offload, PortConfig, PortId, RingClass, RingMemory, Rings, StackConfig,
};

pub const GATEWAY_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
pub const GATEWAY: &str = "192.168.127.1";
pub const ALIAS: &str = "192.168.127.254";

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
    Tcp { src: String, dst: String, flags: &'static str, seq: u32, ack: u32, window: u16, payload: Vec<u8> },
    Udp { src: String, dst: String, payload: Vec<u8> },
    Icmp { src: String, kind: u8, code: u8, rest: Vec<u8> },
    Arp { is_reply: bool, sender: String, target: String },
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

pub fn v4(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn config(limits: Limits) -> StackConfig {
    StackConfig {
        subnet: "192.168.127.0/24".parse().unwrap(),
        gateway: GATEWAY.parse().unwrap(),
        host_alias: ALIAS.parse().unwrap(),
        gateway_mac: GATEWAY_MAC,
        domain: "portway.internal".into(),
        search: vec![],
        ntp: vec![],
        lease_time: secs(3600),
        static_leases: vec![],
        host_loopback: true,
        metadata: false,
        limits,
    }
}

pub struct Lab {
    pub stack: Netstack,
    pub now: Instant,
    pub wires: Vec<Wire>,
    pub ports: Vec<PortId>,
}

/// One segment a guest sends.
#[derive(Clone)]
pub struct Segment {
    pub from: SocketAddrV4,
    pub to: SocketAddrV4,
    pub seq: u32,
    pub ack: Option<u32>,
    pub flags: &'static str,
    pub window: u16,
    /// The window scale option, of a SYN.
    pub scale: Option<u8>,
    pub payload: Vec<u8>,
}

pub fn segment(flags: &'static str, from: &str, to: &str, seq: u32, ack: u32) -> Segment {
    let ack = (flags != "S" && flags != "R").then_some(ack);
    Segment { from: v4(from), to: v4(to), seq, ack, flags, window: 65_535, scale: None, payload: vec![] }
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
        let mut b = PacketBuilder::ethernet2(mac.0, GATEWAY_MAC.0)
            .ipv4(self.from.ip().octets(), self.to.ip().octets(), 64)
            .tcp(self.from.port(), self.to.port(), self.seq, self.window);
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
        let ports = (0..guests).map(|_| stack.add_port(Instant::ZERO, port.clone(), false)).collect();
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

    /// The bytes of the segments the guest was sent, in order.
    pub fn guest_reads(&mut self) -> Vec<u8> {
        let payload = |seen| if let Seen::Tcp { payload, .. } = seen { payload } else { panic!("{seen:?}") };
        self.guest_sees().into_iter().flat_map(payload).collect()
    }

    pub fn udp<'f>(&mut self, from: &str, to: &str, payload: &[u8], frame: &'f mut Vec<u8>) -> Handled<'f> {
        let (from, to) = (v4(from), v4(to));
        let b = PacketBuilder::ethernet2(mac_of(0).0, GATEWAY_MAC.0).ipv4(
            from.ip().octets(),
            to.ip().octets(),
            64,
        );
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
            assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
            (ip.header().source_addr(), ip.header().destination_addr())
        }
        NetSlice::Ipv6(_) => panic!("IPv6 is not spoken yet"),
    };
    match packet.transport.unwrap() {
        TransportSlice::Tcp(t) => {
            let header = t.to_header();
            assert_eq!(
                header.checksum,
                header.calc_checksum_ipv4_raw(src.octets(), dst.octets(), t.payload()).unwrap()
            );
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
                src: format!("{src}:{}", header.source_port),
                dst: format!("{dst}:{}", header.destination_port),
                flags,
                seq: header.sequence_number,
                ack: header.acknowledgment_number,
                window: header.window_size,
                payload: t.payload().to_vec(),
            }
        }
        TransportSlice::Udp(u) => {
            let header = u.to_header();
            assert_eq!(
                header.checksum,
                header.calc_checksum_ipv4_raw(src.octets(), dst.octets(), u.payload()).unwrap()
            );
            let (src, dst) =
                (format!("{src}:{}", u.source_port()), format!("{dst}:{}", u.destination_port()));
            Seen::Udp { src, dst, payload: u.payload().to_vec() }
        }
        TransportSlice::Icmpv4(i) => Seen::Icmp {
            src: src.to_string(),
            kind: i.slice()[0],
            code: i.slice()[1],
            rest: i.slice()[8..].to_vec(),
        },
        _ => panic!("neither TCP, UDP nor ICMP"),
    }
}
