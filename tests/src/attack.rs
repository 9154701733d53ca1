//! The lab of the security tests: one guest that may send anything, and another whose network must not notice.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use smoltcp::iface::SocketHandle;

use crate::guest::Guest;
use crate::host::echo_server;
use crate::raw::{ACK, PSH, RST, RawGuest, Segment, tcp};
use crate::sidecar::Sidecar;

/// The host alias: the host's loopback, seen by a guest.
pub const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
/// The gateway.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
/// DESIGN §6: by how much a guest may make the process grow beyond its flows.
pub const GROWTH: u64 = 64 << 20;

/// An attacker, a bystander, and servers of the host for both.
pub struct Lab {
    /// Its files: sockets of the links (`vm`, `second`) and of the API.
    pub dir: tempfile::TempDir,
    /// The program under attack.
    pub sidecar: Sidecar,
    /// Sends what it likes, on the link `vm`.
    pub attacker: RawGuest,
    /// Has to be served before, during and after, on the link `second`.
    pub bystander: Guest,
    /// The bystander's connection that is open throughout.
    flow: SocketHandle,
    /// The port of a server of the host that echoes.
    pub echo: u16,
    turns: u32,
}

impl Lab {
    /// Starts a sidecar with two links and `options`.
    ///
    /// # Errors
    /// When one of the parties does not come.
    pub fn new(options: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Self::in_dir(dir, options)
    }

    /// The same with a directory that has files already.
    ///
    /// # Errors
    /// When one of the parties does not come.
    pub fn in_dir(dir: tempfile::TempDir, options: &[&str]) -> Result<Self> {
        let second = format!("qemu:unix:{},name=second", dir.path().join("second").display());
        let sidecar = Sidecar::start(dir.path(), &[&["--link", &second], options].concat())?;
        let echo = echo_server()?;
        let attacker = RawGuest::attach(&dir.path().join("vm"), 77)?;
        let mut bystander = Guest::attach(&dir.path().join("second"), 9)?;
        bystander.dhcp()?;
        let flow = bystander.connect((ALIAS, echo).into())?.context("refused")?;
        Ok(Self { dir, sidecar, attacker, bystander, flow, echo, turns: 0 })
    }

    /// The bystander's open flow carries bytes, a new one opens, and a name is resolved.
    ///
    /// # Errors
    /// When any of them does not.
    pub fn bystander_is_served(&mut self) -> Result<()> {
        self.open_flow_lives()?;
        let new = self.bystander.connect((ALIAS, self.echo).into())?.context("refused")?;
        ensure!(self.bystander.exchange(new, b"new", 3)? == b"new", "a new flow");
        self.bystander.tcp(new).abort();
        self.bystander.step();
        self.bystander.forget(new);
        let asked = query(&["host", "portway", "internal"]);
        let answer = self.bystander.ask_udp(5353, (ROUTER, 53).into(), &asked)?.1;
        ensure!(answer.ends_with(&ALIAS.octets()), "a name: {answer:?}");
        Ok(())
    }

    /// The bystander's open flow carries bytes.
    ///
    /// # Errors
    /// When it does not.
    pub fn open_flow_lives(&mut self) -> Result<()> {
        self.turns += 1;
        let bytes = vec![u8::try_from(self.turns % 251)?; 3000];
        ensure!(self.bystander.exchange(self.flow, &bytes, bytes.len())? == bytes, "the open flow");
        Ok(())
    }

    /// The same for the attacker's own link: it is counted, not cut off.
    ///
    /// # Errors
    /// When it is cut off.
    pub fn attacker_is_served(&mut self) -> Result<()> {
        let to = SocketAddrV4::new(ALIAS, self.echo);
        let (from, seq, ack) = self.attacker.open(to, &[])?.context("refused")?;
        let segment = Segment { seq, ack, flags: PSH | ACK, ..Segment::default() };
        self.attacker.packet(&tcp(from, to, &segment, b"alive"))?;
        let got = self.attacker.read(from, to, (seq + 5, ack), 5)?;
        ensure!(got == b"alive", "{got:?}");
        let segment = Segment { seq: seq + 5, ack: ack + 5, flags: RST, ..Segment::default() };
        self.attacker.packet(&tcp(from, to, &segment, &[]))
    }

    /// Both, and the process is whole.
    ///
    /// # Errors
    /// When one of them is not served, or something panicked.
    pub fn everybody_is_served(&mut self) -> Result<()> {
        self.attacker_is_served()?;
        self.bystander_is_served()?;
        ensure!(self.sidecar.is_alive()?);
        ensure!(!self.sidecar.log().contains("panicked"), "{}", self.sidecar.log());
        Ok(())
    }

    /// Resident memory of the sidecar, in bytes.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn rss(&self) -> Result<u64> {
        self.sidecar.resident()
    }

    /// A number of `portway stats`; 0 where there is none.
    ///
    /// # Errors
    /// When the API does not answer.
    pub fn stat(&self, path: &[&str]) -> Result<u64> {
        let stats = self.sidecar.json(&["stats"])?;
        Ok(path.iter().fold(&stats, |at, key| &at[*key]).as_u64().unwrap_or(0))
    }
}

/// A DNS query for the A record of a name of these labels, which may be any.
#[must_use]
pub fn query(labels: &[&str]) -> Vec<u8> {
    let mut q = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in labels {
        q.push(u8::try_from(label.len()).unwrap_or(0xff));
        q.extend(label.as_bytes());
    }
    q.extend([0, 0, 1, 0, 1]);
    q
}
