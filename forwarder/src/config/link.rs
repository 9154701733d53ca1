//! `--link`: its grammar, and what becomes of it.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use portway_netstack::Mac;
use serde::Deserialize;

use super::values::{absolute, label};

/// How frames cross a link (DESIGN §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// A stream socket, a u32 length before each frame.
    Qemu,
    /// Standard input and output, a u16 length before each frame.
    Stdio,
    /// vpnkit's handshake, then a u16 length before each frame; several VMs on one socket.
    Vpnkit,
    /// A datagram socket, a frame each.
    Dgram,
    /// A sequenced-packet socket, a frame each.
    #[cfg(target_os = "linux")]
    Seqpacket,
    /// A tap device of the kernel.
    Tap,
    /// Rings in the guest's memory.
    #[cfg(target_os = "linux")]
    VhostUser,
}

impl LinkKind {
    const ALL: &'static [Self] = &[
        Self::Qemu,
        Self::Stdio,
        Self::Vpnkit,
        Self::Tap,
        Self::Dgram,
        #[cfg(target_os = "linux")]
        Self::Seqpacket,
        #[cfg(target_os = "linux")]
        Self::VhostUser,
    ];

    /// As it is typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Stdio => "stdio",
            Self::Vpnkit => "vpnkit",
            Self::Dgram => "dgram",
            #[cfg(target_os = "linux")]
            Self::Seqpacket => "seqpacket",
            Self::Tap => "tap",
            #[cfg(target_os = "linux")]
            Self::VhostUser => "vhost-user",
        }
    }

    /// The MTU when nobody says one: large where nothing else makes segments large, and otherwise what the VMMs of
    /// the kind take.
    pub(super) const fn mtu(self) -> u16 {
        match self {
            Self::Qemu => 65_520,
            Self::Stdio | Self::Tap | Self::Vpnkit | Self::Dgram => 1500,
            #[cfg(target_os = "linux")]
            Self::Seqpacket | Self::VhostUser => 1500,
        }
    }

    /// Whether there are VMMs that offload on links of this kind without a header (libkrun).
    const fn may_offload(self) -> bool {
        matches!(self, Self::Qemu | Self::Dgram)
    }

    /// An example of an address.
    const fn example(self) -> &'static str {
        match self {
            Self::Qemu => "qemu:unix:PATH, qemu:connect:unix:PATH or qemu:fd:N",
            Self::Stdio => "stdio alone",
            Self::Vpnkit => "vpnkit:unix:PATH or vpnkit:fd:N",
            Self::Dgram => "dgram:unix:PATH, dgram:connect:unix:PATH or dgram:fd:N",
            #[cfg(target_os = "linux")]
            Self::Seqpacket => "seqpacket:unix:PATH, seqpacket:connect:unix:PATH or seqpacket:fd:N",
            #[cfg(target_os = "linux")]
            Self::VhostUser => "vhost-user:unix:PATH, vhost-user:connect:unix:PATH or vhost-user:fd:N",
            Self::Tap => "tap:NAME or tap:NAME,netns=PATH or tap:NAME,netns=PID",
        }
    }
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// By path.
    Path(PathBuf),
    /// That of a process.
    Process(u32),
    /// A network namespace and the user namespace it belongs to, both by path.
    Within {
        /// The user namespace, entered first.
        user: PathBuf,
        /// The network namespace.
        net: PathBuf,
    },
}

/// One link, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// How frames cross it.
    pub kind: LinkKind,
    /// Where the VMM is.
    pub address: LinkAddress,
    /// The VM's name.
    pub name: Option<String>,
    /// The VM's address.
    pub ip: Option<Ipv4Addr>,
    /// The largest IP packet.
    pub mtu: u16,
    /// Whether other guests are out of its reach.
    pub isolate: bool,
    /// Whether the guest leaves sums and segments to us without a header that says so (libkrun).
    pub offload: bool,
}

impl LinkConfig {
    /// The directory of the socket we make for it.
    #[must_use]
    pub fn directory(&self) -> Option<PathBuf> {
        match &self.address {
            LinkAddress::Listen(path) => path.parent().map(Into::into),
            _ => None,
        }
    }
}

/// Where a VMM is met.
#[derive(Debug, Clone)]
pub enum LinkAddress {
    /// We listen.
    Listen(PathBuf),
    /// We connect, and again when it is gone.
    Connect(PathBuf),
    /// A descriptor we inherited, with a VMM at its other end or listening for one.
    Fd(i32),
    /// The same, under the name systemd gives it (`FileDescriptorName=`).
    Activated(String),
    /// A listening socket we hold already.
    Held(Arc<std::os::fd::OwnedFd>),
    /// Standard input and output.
    Stdio,
    /// A tap device.
    #[cfg(target_os = "linux")]
    Tap {
        /// Its name.
        name: String,
        /// Where it is; ours when nothing is said.
        namespace: Option<Namespace>,
        /// How it is set up there; `None`: the guest side does that.
        setup: Option<crate::link::tap::Setup>,
    },
}

impl PartialEq for LinkAddress {
    /// Two addresses are the same when they are written the same; a socket that is held is only itself.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Held(a), Self::Held(b)) => Arc::ptr_eq(a, b),
            #[cfg(target_os = "linux")]
            (Self::Tap { name: a, namespace: m, .. }, Self::Tap { name: b, namespace: n, .. }) => {
                (a, m) == (b, n)
            }
            _ => {
                std::mem::discriminant(self) == std::mem::discriminant(other)
                    && self.to_string() == other.to_string()
            }
        }
    }
}

impl Eq for LinkAddress {}

impl std::fmt::Display for LinkAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Listen(path) => write!(f, "unix:{}", path.display()),
            Self::Connect(path) => write!(f, "connect:unix:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
            Self::Activated(name) => write!(f, "fd:{name}"),
            Self::Held(_) => f.write_str("a listening socket"),
            Self::Stdio => f.write_str("stdio"),
            #[cfg(target_os = "linux")]
            Self::Tap { name, .. } => f.write_str(name),
        }
    }
}

/// A `--link` as it was typed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct LinkSpec {
    pub(super) kind: LinkKind,
    pub(super) address: LinkAddress,
    pub(super) name: Option<String>,
    pub(super) mac: Option<Mac>,
    pub(super) ip: Option<Ipv4Addr>,
    pub(super) mtu: Option<u16>,
    pub(super) isolate: bool,
    pub(super) offload: bool,
}

impl FromStr for LinkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let place = parts.next().unwrap_or_default();
        let (kind, address) = place.split_once(':').unwrap_or((place, ""));
        let kind = LinkKind::ALL.iter().copied().find(|k| k.name() == kind).ok_or_else(|| {
            let kinds = LinkKind::ALL.iter().map(|k| k.name()).collect::<Vec<_>>().join(", ");
            format!("{kind:?} is not a kind of link ({kinds}); an example: qemu:unix:/run/user/1000/vm.sock")
        })?;
        let fault = || format!("{place:?} is not an address of a {} link: {}", kind.name(), kind.example());
        let address = match kind {
            LinkKind::Stdio if address.is_empty() => LinkAddress::Stdio,
            LinkKind::Stdio => return Err(fault()),
            LinkKind::Tap => tap_address(address).ok_or_else(fault)?,
            LinkKind::Qemu | LinkKind::Vpnkit | LinkKind::Dgram => {
                socket_address(address)?.ok_or_else(fault)?
            }
            #[cfg(target_os = "linux")]
            LinkKind::VhostUser | LinkKind::Seqpacket => socket_address(address)?.ok_or_else(fault)?,
        };
        let (isolate, offload) = (false, false);
        let mut link = Self { kind, address, name: None, mac: None, ip: None, mtu: None, isolate, offload };
        for option in parts {
            let (key, value) =
                option.split_once('=').ok_or_else(|| format!("{option:?} is not KEY=VALUE"))?;
            match key {
                "name" => link.name = Some(label(value)?),
                "mac" => link.mac = Some(value.parse().map_err(|e| format!("mac={value}: {e}"))?),
                "ip" => {
                    link.ip = Some(value.parse().map_err(|_| format!("ip={value} is not an IPv4 address"))?)
                }
                "mtu" => link.mtu = Some(mtu_of(value)?),
                "isolate" => link.isolate = switch(key, value)?,
                "netns" => link.enter(value)?,
                "offload" if kind.may_offload() => link.offload = switch(key, value)?,
                "offload" => return Err(format!("offload= is not an option of a {} link", kind.name())),
                _ => {
                    return Err(format!(
                        "{key:?} is not an option of a link: name, mac, ip, mtu, isolate, offload, netns"
                    ));
                }
            }
        }
        Ok(link)
    }
}

impl LinkSpec {
    /// `netns=`: a path, or a process.
    #[cfg(target_os = "linux")]
    fn enter(&mut self, text: &str) -> Result<(), String> {
        let LinkAddress::Tap { namespace, .. } = &mut self.address else {
            return Err("netns= is an option of tap links alone".into());
        };
        *namespace = Some(match text.parse() {
            Ok(pid) => Namespace::Process(pid),
            Err(_) => Namespace::Path(absolute(text)?),
        });
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    fn enter(&mut self, _: &str) -> Result<(), String> {
        Err("netns= needs Linux".into())
    }
}

/// The address of a socket; `None` when it is none.
fn socket_address(text: &str) -> Result<Option<LinkAddress>, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return absolute(path).map(|p| Some(LinkAddress::Listen(p)));
    }
    if let Some(path) = text.strip_prefix("connect:unix:") {
        return absolute(path).map(|p| Some(LinkAddress::Connect(p)));
    }
    let Some(fd) = text.strip_prefix("fd:") else { return Ok(None) };
    if let Ok(fd) = fd.parse() {
        return Ok(Some(fd).filter(|fd| *fd >= 0).map(LinkAddress::Fd));
    }
    let name =
        !fd.is_empty() && fd.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    Ok((name && !fd.starts_with('-')).then(|| LinkAddress::Activated(fd.to_owned())))
}

/// A device name as the kernel allows it: at most 15 bytes, no slash, no space.
#[cfg(target_os = "linux")]
fn tap_address(name: &str) -> Option<LinkAddress> {
    let good = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%')
        && name != "."
        && name != "..";
    good.then(|| LinkAddress::Tap { name: name.to_owned(), namespace: None, setup: None })
}

#[cfg(not(target_os = "linux"))]
fn tap_address(_: &str) -> Option<LinkAddress> {
    None
}

fn switch(key: &str, text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={text} is neither on nor off")),
    }
}

fn mtu_of(text: &str) -> Result<u16, String> {
    let mtu = text.parse().ok().filter(|m| (576..=65_535).contains(m));
    mtu.ok_or_else(|| format!("mtu={text}: 576 to 65535 bytes"))
}
