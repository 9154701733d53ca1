//! A guest without a VM: smoltcp on the `qemu` stream socket, or on `vpnkit`'s, with DHCP, TCP and UDP.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, IpEndpoint};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

struct Nic {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<u8>,
    prefix: Prefix,
}

/// The length before each frame.
#[derive(Clone, Copy)]
enum Prefix {
    Be32,
    Le16,
}

struct Frame(Vec<u8>);
struct Wire<'a>(&'a mut Vec<u8>, Prefix);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Wire<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        match self.1 {
            Prefix::Be32 => self.0.extend(u32::try_from(len).unwrap_or(0).to_be_bytes()),
            Prefix::Le16 => self.0.extend(u16::try_from(len).unwrap_or(0).to_le_bytes()),
        }
        self.0.extend(frame);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Wire<'a>;
    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Frame, Wire<'_>)> {
        self.incoming.pop_front().map(|f| (Frame(f), Wire(&mut self.outgoing, self.prefix)))
    }
    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Wire<'_>> {
        Some(Wire(&mut self.outgoing, self.prefix))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = match self.prefix {
            Prefix::Be32 => 65_534,
            Prefix::Le16 => 1514,
        };
        caps
    }
}

/// The guest.
pub struct Guest {
    /// Its link, for bytes that no guest should send.
    pub link: UnixStream,
    nic: Nic,
    partial: Vec<u8>,
    iface: Interface,
    sockets: SocketSet<'static>,
    began: Instant,
    next_port: u16,
}

/// A connection to the socket at `path`. Its name is there a moment before anybody listens.
fn connected(path: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            connected => return connected.with_context(|| path.display().to_string()),
        }
    }
}

impl Guest {
    /// Attaches to the socket at `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn attach(path: &Path, last: u8) -> Result<Self> {
        let link = connected(path)?;
        Self::on(link, EthernetAddress([0x52, 0x54, 0, 0, 0, last]), Prefix::Be32)
    }

    /// Attaches to the vpnkit socket at `path`, with the handshake hyperkit makes; the MAC is what the answer says.
    ///
    /// # Errors
    /// When nobody listens there, or the answer is no.
    pub fn attach_vpnkit(path: &Path, uuid: &[u8; 36]) -> Result<Self> {
        let mut link = connected(path)?;
        link.set_read_timeout(Some(PATIENCE))?;
        let init = [&b"VMN3T"[..], &22_u32.to_le_bytes(), &[b'0'; 40]].concat();
        link.write_all(&init)?;
        link.read_exact(&mut [0; 49])?;
        link.write_all(&[&[1][..], uuid, &[0; 4]].concat())?;
        let mut answer = [0; 258];
        link.read_exact(&mut answer)?;
        ensure!(answer[0] == 1, "{}", String::from_utf8_lossy(&answer[2..2 + usize::from(answer[1])]));
        let mac = EthernetAddress::from_bytes(&answer[5..11]);
        Self::on(link, mac, Prefix::Le16)
    }

    fn on(link: UnixStream, mac: EthernetAddress, prefix: Prefix) -> Result<Self> {
        link.set_nonblocking(true)?;
        let mut nic = Nic { incoming: VecDeque::new(), outgoing: Vec::new(), prefix };
        let iface = Interface::new(
            Config::new(HardwareAddress::Ethernet(mac)),
            &mut nic,
            smoltcp::time::Instant::ZERO,
        );
        let (sockets, began) = (SocketSet::new(Vec::new()), Instant::now());
        Ok(Self { link, nic, partial: Vec::new(), iface, sockets, began, next_port: 40_000 })
    }

    /// Moves frames once. True when the link has ended.
    pub fn step(&mut self) -> bool {
        let mut ended = false;
        let mut buffer = [0; 65_536];
        loop {
            match self.link.read(&mut buffer) {
                Ok(0) => ended = true,
                Ok(n) => {
                    self.partial.extend(&buffer[..n]);
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => ended = true,
            }
            break;
        }
        loop {
            let (size, len) = match (self.nic.prefix, &self.partial[..]) {
                (Prefix::Be32, [a, b, c, d, ..]) => (4, u32::from_be_bytes([*a, *b, *c, *d]) as usize),
                (Prefix::Le16, [a, b, ..]) => (2, usize::from(u16::from_le_bytes([*a, *b]))),
                _ => break,
            };
            let Some(frame) = self.partial.get(size..size + len) else { break };
            self.nic.incoming.push_back(frame.to_vec());
            self.partial.drain(..size + len);
        }
        let now =
            smoltcp::time::Instant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(0));
        self.iface.poll(now, &mut self.nic, &mut self.sockets);
        while !self.nic.outgoing.is_empty() {
            match self.link.write(&self.nic.outgoing) {
                Ok(n) => drop(self.nic.outgoing.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return true,
            }
        }
        ended
    }

    /// Steps until `done` has an answer.
    ///
    /// # Errors
    /// When the time is over; `what` is in the error.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> Result<T> {
        let (mut waited, mut last) = (Duration::ZERO, Instant::now());
        loop {
            let ended = self.step();
            if let Some(answer) = done(self) {
                return Ok(answer);
            }
            ensure!(!ended, "{what}: the link ended");
            // A machine that stood still meanwhile, this process with it, is not one that was asked in vain.
            waited += last.elapsed().min(Duration::from_secs(1));
            last = Instant::now();
            ensure!(waited < PATIENCE, "{what}: not within {PATIENCE:?}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Gets a lease by DHCP and uses it: address, router, resolver.
    ///
    /// # Errors
    /// When there is none in time.
    pub fn dhcp(&mut self) -> Result<(Ipv4Addr, Ipv4Addr, Vec<Ipv4Addr>)> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let lease = self.until("DHCP", |g| match g.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            Some(dhcpv4::Event::Configured(c)) => Some((c.address, c.router, c.dns_servers.to_vec())),
            _ => None,
        })?;
        self.sockets.remove(handle);
        self.iface.update_ip_addrs(|a| {
            a.clear();
            let _ = a.push(IpCidr::Ipv4(lease.0));
        });
        let router = lease.1.context("no router")?;
        self.iface.routes_mut().add_default_ipv4_route(router)?;
        Ok((lease.0.address(), router, lease.2))
    }

    fn ring() -> tcp::SocketBuffer<'static> {
        tcp::SocketBuffer::new(vec![0; 262_144])
    }

    /// Begins a connection.
    ///
    /// # Errors
    /// When smoltcp refuses.
    pub fn dial(&mut self, to: SocketAddr) -> Result<SocketHandle> {
        self.next_port += 1;
        let handle = self.sockets.add(tcp::Socket::new(Self::ring(), Self::ring()));
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        let connected = socket.connect(self.iface.context(), IpEndpoint::from(to), self.next_port);
        connected.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(handle)
    }

    /// Connects. `Ok(None)`: refused.
    ///
    /// # Errors
    /// When there is no answer in time.
    pub fn connect(&mut self, to: SocketAddr) -> Result<Option<SocketHandle>> {
        let handle = self.dial(to)?;
        self.until(&format!("connect to {to}"), |g| match g.tcp(handle).state() {
            tcp::State::Established => Some(Some(handle)),
            tcp::State::Closed => Some(None),
            _ => None,
        })
    }

    /// Listens.
    ///
    /// # Errors
    /// When smoltcp refuses.
    pub fn listen(&mut self, port: u16) -> Result<SocketHandle> {
        let handle = self.sockets.add(tcp::Socket::new(Self::ring(), Self::ring()));
        self.tcp(handle).listen(port).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(handle)
    }

    /// One TCP socket.
    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends every byte and then reads as many as `expect`.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn exchange(&mut self, handle: SocketHandle, send: &[u8], expect: usize) -> Result<Vec<u8>> {
        let (mut sent, mut got) = (0, Vec::new());
        self.until("exchange", |g| {
            let socket = g.tcp(handle);
            if sent < send.len() && socket.can_send() {
                sent += socket.send_slice(&send[sent..]).unwrap_or(0);
            }
            while socket.can_recv() {
                let taken = socket.recv(|b| {
                    got.extend_from_slice(b);
                    (b.len(), b.len())
                });
                if taken.is_err() {
                    break;
                }
            }
            (sent == send.len() && got.len() >= expect).then_some(())
        })?;
        // What was expected may have been there already: what is sent leaves all the same, before anybody waits for it elsewhere.
        self.step();
        Ok(got)
    }

    /// Sends one datagram from `port` and waits for the answer.
    ///
    /// # Errors
    /// When there is none in time.
    pub fn ask_udp(&mut self, port: u16, to: SocketAddr, payload: &[u8]) -> Result<(SocketAddr, Vec<u8>)> {
        let handle = self.udp(port)?;
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket.send_slice(payload, IpEndpoint::from(to)).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        let answer = self.until("UDP answer", |g| {
            let socket = g.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.recv().ok().map(|(bytes, meta)| (SocketAddr::from(meta.endpoint), bytes.to_vec()))
        });
        self.sockets.remove(handle);
        answer
    }

    /// Sends one datagram from `port`, `times` times, and waits for nothing.
    ///
    /// # Errors
    /// When smoltcp or the link refuses.
    pub fn flood_udp(&mut self, port: u16, to: SocketAddr, payload: &[u8], times: usize) -> Result<()> {
        let handle = self.udp(port)?;
        for _ in 0..times {
            let socket = self.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.send_slice(payload, IpEndpoint::from(to)).map_err(|e| anyhow::anyhow!("{e:?}"))?;
            self.step();
        }
        self.sockets.remove(handle);
        Ok(())
    }

    /// A UDP socket on `port`.
    ///
    /// # Errors
    /// When smoltcp refuses.
    pub fn udp(&mut self, port: u16) -> Result<SocketHandle> {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 100_000]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        if let Err(e) = socket.bind(port) {
            bail!("{e:?}");
        }
        Ok(self.sockets.add(socket))
    }

    /// Puts one datagram on its way.
    ///
    /// # Errors
    /// When smoltcp refuses.
    pub fn send_udp(&mut self, handle: SocketHandle, to: SocketAddr, payload: &[u8]) -> Result<()> {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket.send_slice(payload, IpEndpoint::from(to)).map_err(|e| anyhow::anyhow!("{e:?}"))
    }

    /// Closes a socket at once.
    pub fn forget(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
    }

    /// Echoes the next datagram of a socket to its sender, whom it answers with.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn echo_udp(&mut self, handle: SocketHandle) -> Result<SocketAddr> {
        let from = self.until("datagram", |g| {
            let socket = g.sockets.get_mut::<udp::Socket<'_>>(handle);
            let (bytes, meta) = socket.recv().ok().map(|(b, m)| (b.to_vec(), m))?;
            socket.send_slice(&bytes, meta.endpoint).ok()?;
            Some(meta.endpoint.into())
        })?;
        self.step();
        Ok(from)
    }

    /// Sends raw bytes down the link.
    ///
    /// # Errors
    /// When the link is gone.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.link.set_nonblocking(false)?;
        self.link.write_all(bytes)?;
        Ok(self.link.set_nonblocking(true)?)
    }
}
