//! A guest with a real TCP of its own (smoltcp once more, the other way round), behind a link that loses, repeats and
//! reorders frames as a seed says.

use std::collections::VecDeque;
use std::net::IpAddr;

use portway_netstack::{Duration, FlowId, HostCommand, HostEvent};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint};

use super::{GATEWAY_MAC, Lab, mac_of};

/// xorshift64*: enough for a link's whims, and the same everywhere.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % below
    }
}

/// What a link does to frames, in percent.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    pub lost: u64,
    pub twice: u64,
    pub late: u64,
}

struct Nic {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    mtu: usize,
}

pub struct In(Vec<u8>);
pub struct Out<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = In;
    type TxToken<'a> = Out<'a>;
    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(In, Out<'_>)> {
        self.incoming.pop_front().map(|p| (In(p), Out(&mut self.outgoing)))
    }
    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Out<'_>> {
        Some(Out(&mut self.outgoing))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = self.mtu;
        caps.checksum = ChecksumCapabilities::default();
        caps
    }
}

/// The guest, its link, and the lab around.
pub struct Guest {
    pub lab: Lab,
    nic: Nic,
    iface: Interface,
    pub sockets: SocketSet<'static>,
    faults: Faults,
    dice: Dice,
    to_stack: VecDeque<Vec<u8>>,
    late_to_stack: Vec<Vec<u8>>,
    late_to_guest: Vec<Vec<u8>>,
}

impl Guest {
    pub fn new(lab: Lab, mtu: usize, faults: Faults, seed: u64) -> Self {
        let mut nic = Nic { incoming: VecDeque::new(), outgoing: Vec::new(), mtu };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut iface = Interface::new(config, &mut nic, smoltcp::time::Instant::ZERO);
        let own: IpAddr = [192, 168, 127, 2].into();
        iface.update_ip_addrs(|a| a.push(IpCidr::new(own.into(), 24)).unwrap());
        iface.routes_mut().add_default_ipv4_route([192, 168, 127, 1].into()).unwrap();
        let mut guest = Self {
            lab,
            nic,
            iface,
            sockets: SocketSet::new(Vec::new()),
            faults,
            dice: Dice(seed << 1 | 1),
            to_stack: VecDeque::new(),
            late_to_stack: Vec::new(),
            late_to_guest: Vec::new(),
        };
        // The stack knows where the guest is as soon as it has spoken.
        let hello = super::segment("A", "192.168.127.2:9", "192.168.127.1:9", 1, 1).frame(mac_of(0));
        guest.lab.frame(0, &hello);
        guest.lab.guest_sees();
        guest
    }

    /// A socket with rings of `bytes` each way.
    fn socket(&mut self, bytes: usize) -> SocketHandle {
        let ring = || tcp::SocketBuffer::new(vec![0; bytes]);
        self.sockets.add(tcp::Socket::new(ring(), ring()))
    }

    pub fn connect(&mut self, to: &str, from_port: u16) -> SocketHandle {
        self.connect_with(to, from_port, 262_144)
    }

    /// A connection of a guest that has `bytes` of memory for each direction of it.
    pub fn connect_with(&mut self, to: &str, from_port: u16, bytes: usize) -> SocketHandle {
        let handle = self.socket(bytes);
        let to: IpEndpoint = super::addr(to).into();
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(self.iface.context(), to, from_port).unwrap();
        handle
    }

    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.socket(262_144);
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).listen(port).unwrap();
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Whether the link lets one frame through: how often, and whether late.
    fn fate(&mut self) -> (usize, bool) {
        if self.dice.roll(100) < self.faults.lost {
            return (0, false);
        }
        let copies = 1 + usize::from(self.dice.roll(100) < self.faults.twice);
        (copies, self.dice.roll(100) < self.faults.late)
    }

    /// One millisecond of everything.
    pub fn step(&mut self) {
        self.lab.after(Duration::from_millis(1));
        let now = smoltcp::time::Instant::from_micros(i64::try_from(self.lab.now.micros()).unwrap());
        let header = [&GATEWAY_MAC.0[..], &mac_of(0).0, &[8, 0]].concat();
        self.iface.poll(now, &mut self.nic, &mut self.sockets);
        let late = std::mem::take(&mut self.late_to_stack);
        for packet in std::mem::take(&mut self.nic.outgoing) {
            let frame = [&header, &packet[..]].concat();
            match self.fate() {
                (copies, false) => self.to_stack.extend(std::iter::repeat_n(frame, copies)),
                (copies, true) => self.late_to_stack.extend(std::iter::repeat_n(frame, copies)),
            }
        }
        self.to_stack.extend(late);
        // As one batch: the stack sends nothing between these frames.
        for frame in std::mem::take(&mut self.to_stack) {
            let port = self.lab.ports[0];
            self.lab.stack.handle_frame(self.lab.now, port, &frame);
        }
        self.lab.transmit();
        let late = std::mem::take(&mut self.late_to_guest);
        for frame in std::mem::take(&mut self.lab.wires[0].frames) {
            let packet = frame[14..].to_vec();
            match self.fate() {
                (copies, false) => self.nic.incoming.extend(std::iter::repeat_n(packet, copies)),
                (copies, true) => self.late_to_guest.extend(std::iter::repeat_n(packet, copies)),
            }
        }
        self.nic.incoming.extend(late);
        self.iface.poll(now, &mut self.nic, &mut self.sockets);
    }

    /// Steps until the host is asked to connect, and connects.
    pub fn accept(&mut self) -> FlowId {
        for _ in 0..100_000 {
            self.step();
            if let Some(HostCommand::Connect { flow, .. }) = self.lab.stack.poll_host() {
                self.lab.host_says(HostEvent::Connected { flow });
                return flow;
            }
        }
        panic!("no connect within 100 s");
    }
}
