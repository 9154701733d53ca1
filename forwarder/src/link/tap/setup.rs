//! What a container's runtime would do to the device in its namespace, by rtnetlink: address, route, MTU, up.
//!
//! Source: `rtnetlink(7)`, RFC 3549, Linux `include/uapi/linux/rtnetlink.h`. One request at a time, each acknowledged;
//! numbers are in the host's byte order.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use portway_netstack::Mac;

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
/// `NLMSG_ERROR`: an acknowledgement, or why not.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 0x1 | 0x4;
/// `NLM_F_REPLACE | NLM_F_CREATE`.
const PUT: u16 = 0x100 | 0x400;
/// `IFF_UP`.
const UP: u32 = 1;
const AF_INET: u8 = 2;
/// `RT_TABLE_MAIN`, `RTPROT_BOOT`, `RT_SCOPE_UNIVERSE`, `RTN_UNICAST`.
const MAIN_BOOT_UNIVERSE_UNICAST: [u8; 4] = [254, 3, 0, 1];

/// How a device is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The length of the subnet's prefix, in bits.
    pub prefix: u8,
    /// The default route's gateway.
    pub gateway: Ipv4Addr,
    /// The largest IP packet, in bytes.
    pub mtu: u16,
    /// The device's Ethernet address; `None`: the kernel's choice.
    pub mac: Option<Mac>,
}

/// The text in which a setup is handed to a child process.
impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}/", self.address, self.prefix, self.gateway, self.mtu)?;
        self.mac.map_or(Ok(()), |mac| write!(f, "{mac}"))
    }
}

/// The text is not a setup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a device's setup: ADDRESS/PREFIX/GATEWAY/MTU/[MAC] is needed")]
pub struct BadSetup;

impl FromStr for Setup {
    type Err = BadSetup;
    fn from_str(text: &str) -> Result<Self, BadSetup> {
        let parts: Vec<&str> = text.split('/').collect();
        let [address, prefix, gateway, mtu, mac] = parts[..] else { return Err(BadSetup) };
        Ok(Self {
            address: address.parse().map_err(|_| BadSetup)?,
            prefix: prefix.parse().ok().filter(|p| *p <= 32).ok_or(BadSetup)?,
            gateway: gateway.parse().map_err(|_| BadSetup)?,
            mtu: mtu.parse().map_err(|_| BadSetup)?,
            mac: if mac.is_empty() { None } else { Some(mac.parse().map_err(|_| BadSetup)?) },
        })
    }
}

/// Sets `device` of the calling thread's network namespace up, and the loopback device too.
///
/// # Errors
/// The kernel's, with what was asked of it.
pub(super) fn apply(device: &str, setup: &Setup) -> io::Result<()> {
    let fault =
        |e: io::Error, what: &str| io::Error::new(e.kind(), format!("{device}: cannot set {what}: {e}"));
    let index = |name: &str| nix::net::if_::if_nametoindex(name).map_err(io::Error::from);
    let kernel = Kernel::open().map_err(|e| fault(e, "it up (netlink)"))?;
    index("lo").and_then(|lo| kernel.ask(&link(lo, &[]))).map_err(|e| fault(e, "the loopback device up"))?;

    let device = index(device).map_err(|e| fault(e, "its index"))?;
    let mut attributes = vec![(MTU, u32::from(setup.mtu).to_ne_bytes().to_vec())];
    attributes.extend(setup.mac.map(|mac| (HARDWARE, mac.0.to_vec())));
    kernel.ask(&link(device, &attributes)).map_err(|e| fault(e, "MTU and Ethernet address"))?;
    kernel.ask(&address(device, setup)).map_err(|e| fault(e, "the address"))?;
    kernel.ask(&route(device, setup.gateway)).map_err(|e| fault(e, "the default route"))
}

/// `IFLA_ADDRESS`, `IFLA_MTU`.
const HARDWARE: u16 = 1;
const MTU: u16 = 4;

fn link(index: u32, attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    // struct ifinfomsg: family, padding, type, index, flags, which flags.
    let body = [&[0; 4][..], &index.to_ne_bytes(), &UP.to_ne_bytes(), &UP.to_ne_bytes()].concat();
    message(NEW_LINK, REQUEST, &body, attributes)
}

fn address(index: u32, setup: &Setup) -> Vec<u8> {
    // struct ifaddrmsg: family, prefix, flags, scope, index.
    let body = [&[AF_INET, setup.prefix, 0, 0][..], &index.to_ne_bytes()].concat();
    let own = setup.address.octets().to_vec();
    let host_bits = u32::MAX.checked_shr(setup.prefix.into()).unwrap_or(0);
    let broadcast = Ipv4Addr::from(u32::from(setup.address) | host_bits).octets().to_vec();
    // IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST.
    message(NEW_ADDRESS, REQUEST | PUT, &body, &[(1, own.clone()), (2, own), (4, broadcast)])
}

fn route(index: u32, gateway: Ipv4Addr) -> Vec<u8> {
    // struct rtmsg: family, lengths of both prefixes, tos, table, protocol, scope, type, flags.
    let body = [&[AF_INET, 0, 0, 0][..], &MAIN_BOOT_UNIVERSE_UNICAST, &[0; 4]].concat();
    // RTA_GATEWAY, RTA_OIF.
    let attributes = [(5, gateway.octets().to_vec()), (4, index.to_ne_bytes().to_vec())];
    message(NEW_ROUTE, REQUEST | PUT, &body, &attributes)
}

fn message(kind: u16, flags: u16, body: &[u8], attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    // Sequence and port: one request is under way at a time, on a socket of its own.
    out.extend([0; 8]);
    out.extend(body);
    for (kind, data) in attributes {
        out.extend(u16::try_from(4 + data.len()).unwrap_or(u16::MAX).to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    let len = u32::try_from(out.len()).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&len.to_ne_bytes());
    out
}

/// The kernel's end of rtnetlink.
struct Kernel(OwnedFd);

impl Kernel {
    fn open() -> io::Result<Self> {
        let kind =
            (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        Ok(Self(socket(kind.0, kind.1, kind.2, kind.3)?))
    }

    fn ask(&self, request: &[u8]) -> io::Result<()> {
        send(self.0.as_raw_fd(), request, MsgFlags::empty())?;
        let mut answer = [0; 1024];
        let n = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        match outcome(answer.get(..n).unwrap_or_default()) {
            Some(0) => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The error number in an acknowledgement; 0: done.
fn outcome(answer: &[u8]) -> Option<i32> {
    let (&[_, _, _, _, a, b, ..], rest) = answer.split_first_chunk::<16>()?;
    let (number, _) = rest.split_first_chunk::<4>()?;
    (u16::from_ne_bytes([a, b]) == ERROR).then(|| i32::from_ne_bytes(*number).saturating_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETUP: Setup = Setup {
        address: Ipv4Addr::new(10, 0, 2, 100),
        prefix: 24,
        gateway: Ipv4Addr::new(10, 0, 2, 2),
        mtu: 65_520,
        mac: Some(Mac([2, 0, 0, 0, 0, 9])),
    };

    #[test]
    fn a_setup_survives_the_way_to_the_child() {
        for setup in [SETUP, Setup { mac: None, ..SETUP }] {
            assert_eq!(setup.to_string().parse(), Ok(setup));
        }
        for bad in ["", "10.0.2.100/24/10.0.2.2/1500", "10.0.2.100/33/10.0.2.2/1500/", "a/24/10.0.2.2/1500/"]
        {
            assert_eq!(bad.parse::<Setup>(), Err(BadSetup), "{bad}");
        }
    }

    #[test]
    fn attributes_are_padded_and_lengths_are_right() {
        let bytes = link(7, &[(HARDWARE, vec![2, 0, 0, 0, 0, 9]), (MTU, vec![1, 2, 3, 4])]);
        assert_eq!(bytes.len(), 16 + 16 + 12 + 8);
        assert_eq!(bytes[..4], u32::try_from(bytes.len()).unwrap().to_ne_bytes());
        assert_eq!(bytes[32..36], [10_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat()[..]);
        assert_eq!(address(7, &SETUP).len(), 16 + 8 + 3 * 8);
    }

    #[test]
    fn an_acknowledgement_says_what_became_of_it() {
        let mut answer = [0; 36];
        answer[4..6].copy_from_slice(&ERROR.to_ne_bytes());
        assert_eq!(outcome(&answer), Some(0));
        answer[16..20].copy_from_slice(&(-1_i32).to_ne_bytes());
        assert_eq!(outcome(&answer), Some(1));
        assert_eq!(outcome(&answer[..19]), None);
        answer[4] = 9;
        assert_eq!(outcome(&answer), None);
    }
}
