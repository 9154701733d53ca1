//! Ethernet addresses of VMs.

use std::fmt;
use std::str::FromStr;

/// An Ethernet address of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Makes random bytes an address that no manufacturer has given out: locally administered, unicast.
    pub(crate) const fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Self(bytes)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let byte = |part: &str| {
            let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes: [u8; 6] = bytes
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or("not an Ethernet address such as 52:54:00:12:34:56")?;
        if bytes == [0; 6] {
            return Err("no address at all: a guest would take another");
        }
        if bytes[0] & 1 == 1 {
            return Err("a group address cannot be a VM's own");
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_up_address_is_nobodys() {
        assert_eq!(Mac::local([0xff; 6]).0[0] & 3, 2, "locally administered, unicast");
    }

    #[test]
    fn text_and_address_are_one() {
        for good in ["52:54:00:12:34:56", "02:00:00:00:00:00"] {
            assert_eq!(good.parse::<Mac>().expect(good).to_string(), good);
        }
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:5",
            "01:00:5e:00:00:01",
            "+1:54:00:12:34:56",
            "00:00:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }
}
