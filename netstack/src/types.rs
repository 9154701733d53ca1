//! The small types that keep apart what must not mix.

use std::fmt;
use std::net::IpAddr;

/// One port of the switch; a link of the driver stands behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u16);

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// ff:ff:ff:ff:ff:ff.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether the group bit is set (broadcast too): such an address is never a source (IEEE 802.3 §3.2.3).
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not six pairs of hexadecimal digits with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address: six pairs of hexadecimal digits are needed, such as 5a:94:ef:e4:0c:ee")]
pub struct BadMac;

impl std::str::FromStr for Mac {
    type Err = BadMac;
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or(BadMac)?;
        }
        if parts.next().is_some() { Err(BadMac) } else { Ok(Self(mac)) }
    }
}

/// A network and the length of its prefix, host bits zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    network: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// `None` when the prefix is longer than the address; host bits of `address` are cleared.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let network = match address {
            IpAddr::V4(a) if prefix <= 32 => {
                IpAddr::V4((u32::from(a) & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)).into())
            }
            IpAddr::V6(a) if prefix <= 128 => IpAddr::V6(
                (u128::from(a) & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)).into(),
            ),
            _ => return None,
        };
        Some(Self { network, prefix })
    }

    /// The network's address.
    #[must_use]
    pub const fn network(&self) -> IpAddr {
        self.network
    }

    /// The length of the prefix, in bits.
    #[must_use]
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether `address` lies in the network.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.prefix).is_some_and(|s| s == *self)
    }

    /// The address `n` above the network's own; `None` outside the subnet.
    #[must_use]
    pub fn host(&self, n: u32) -> Option<IpAddr> {
        let address = match self.network {
            IpAddr::V4(a) => IpAddr::V4(u32::from(a).checked_add(n)?.into()),
            IpAddr::V6(a) => IpAddr::V6(u128::from(a).checked_add(u128::from(n))?.into()),
        };
        self.contains(address).then_some(address)
    }

    /// IPv4's broadcast address of the subnet; `None` for IPv6.
    #[must_use]
    pub fn broadcast(&self) -> Option<IpAddr> {
        match self.network {
            IpAddr::V4(a) => Some(IpAddr::V4(
                (u32::from(a) | u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0)).into(),
            )),
            IpAddr::V6(_) => None,
        }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// The text is not `ADDRESS/PREFIX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a subnet: ADDRESS/PREFIX is needed, such as 192.168.127.0/24")]
pub struct BadSubnet;

impl std::str::FromStr for Subnet {
    type Err = BadSubnet;
    fn from_str(text: &str) -> Result<Self, BadSubnet> {
        let (address, prefix) = text.split_once('/').ok_or(BadSubnet)?;
        let address = address.parse().map_err(|_| BadSubnet)?;
        let prefix = prefix.parse().map_err(|_| BadSubnet)?;
        Self::new(address, prefix).ok_or(BadSubnet)
    }
}
