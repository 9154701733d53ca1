//! How the VM's network card reaches the sidecar, or what it reaches instead.
//!
//! `vhost-user` moves frames through the guest's own memory, with segmentation offload: fastest at an ordinary MTU of 1500.
//! `socket` is QEMU's `-netdev stream`, with large frames. `datagrams` is what Virtualization.framework speaks.
//!
//! `auto` takes vhost-user with KVM, and under TCG from QEMU 8 on: QEMU 7.2 under TCG gives a busy guest wrong CPU flags
//! with it (its kernel ends in exceptions that cannot be), and dies itself when the guest masks an MSI-X vector.
//!
//! LinuxKit's `--networking` has a word for each of its back ends; [`Net::networking`] says what they are here.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{LaunchConfig, LaunchError};

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Net {
    /// Vhost-user where it works, else a socket.
    #[default]
    Auto,
    /// Guest memory.
    VhostUser,
    /// A stream socket.
    Socket,
    /// No network card.
    None,
    /// A tap device of the host's, which somebody else has made and connected: no sidecar.
    Tap(String),
    /// A bridge of the host's, through QEMU's setuid helper: no sidecar.
    Bridge(String),
}

/// What was taken, and why: one line for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) card: Card,
    pub(crate) reason: String,
}

/// What stands behind the VM's network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Card {
    /// The sidecar, in guest memory.
    VhostUser,
    /// The sidecar, by a stream socket.
    Socket,
    /// The sidecar, by a socket of datagrams.
    Datagrams,
    /// Nothing: there is no card.
    None,
    /// A tap device.
    Tap(String),
    /// A bridge.
    Bridge(String),
}

impl Card {
    /// Whether the sidecar is the VM's network.
    pub(crate) const fn needs_sidecar(&self) -> bool {
        matches!(self, Self::VhostUser | Self::Socket | Self::Datagrams)
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Socket => "socket",
            Self::Datagrams => "datagrams",
            Self::None => "none",
            Self::Tap(_) => "tap",
            Self::Bridge(_) => "bridge",
        }
    }
}

/// The MTU unless one is said: few large frames cost less than many small ones, and a large datagram is one packet.
const LARGE_MTU: u16 = 65520;
/// What Virtualization.framework takes.
pub(crate) const DATAGRAM_MTU: u16 = 1500;

/// The link's MTU in bytes.
pub(crate) fn mtu(config: &LaunchConfig, card: &Card) -> u16 {
    config.mtu.unwrap_or(if *card == Card::Datagrams { DATAGRAM_MTU } else { LARGE_MTU })
}

/// The first major version of QEMU whose TCG bears vhost-user.
const GOOD_TCG: u32 = 8;
/// Bytes of a device's name in the kernel (IFNAMSIZ without the end).
const DEVICE: usize = 15;

impl Net {
    /// A value of LinuxKit's `--networking`.
    ///
    /// # Errors
    /// When it is none, or one that cannot be had here; the text says what to take.
    pub fn networking(text: &str) -> Result<Self, String> {
        let (word, rest) = text.split_once(',').map_or((text, None), |(word, rest)| (word, Some(rest)));
        let device = |kind: &str| match rest {
            Some(name) if is_device(name) => Ok(name.to_owned()),
            _ => Err(format!(
                "{text:?}: {kind} needs a device's name of at most {DEVICE} letters, such as {kind},{kind}0"
            )),
        };
        match (word, rest) {
            // Each is LinuxKit's word for a network in user space with published ports.
            ("default" | "user" | "vpnkit" | "docker-for-mac" | "vmnet", None) => Ok(Self::Auto),
            ("vpnkit", Some(_)) => Err(format!(
                "{text:?}: a vpnkit that runs already is not joined; --network NAME joins a running network of Portway's"
            )),
            ("none", None) => Ok(Self::None),
            ("tap", _) => device("tap").map(Self::Tap),
            ("bridge", _) => device("bridge").map(Self::Bridge),
            _ => Err(format!(
                "{text:?} is none of user, vpnkit, docker-for-mac, vmnet, tap,NAME, bridge,NAME, none"
            )),
        }
    }

    /// Decides by the accelerator and QEMU's version.
    pub(crate) fn choose(&self, kvm: bool, qemu: &Path) -> Choice {
        let asked = |card| Choice { card, reason: "as asked".into() };
        let found = |card, reason: String| Choice { card, reason };
        match self {
            Self::VhostUser => asked(Card::VhostUser),
            Self::Socket => asked(Card::Socket),
            Self::None => asked(Card::None),
            Self::Tap(name) => asked(Card::Tap(name.clone())),
            Self::Bridge(name) => asked(Card::Bridge(name.clone())),
            Self::Auto if kvm => found(Card::VhostUser, "with KVM".into()),
            Self::Auto => {
                let major = Command::new(qemu).arg("--version").output().ok().and_then(|o| major(&o.stdout));
                match major {
                    Some(n) if n >= GOOD_TCG => found(Card::VhostUser, format!("under TCG of QEMU {n}")),
                    Some(n) => found(Card::Socket, format!("QEMU {n} under TCG does not bear vhost-user")),
                    None => found(Card::Socket, "QEMU does not tell its version".into()),
                }
            }
        }
    }

    /// Whether the sidecar is the VM's network.
    #[must_use]
    pub const fn needs_sidecar(&self) -> bool {
        matches!(self, Self::Auto | Self::VhostUser | Self::Socket)
    }
}

fn is_device(name: &str) -> bool {
    (1..=DEVICE).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// What is published needs a network that publishes.
pub(crate) fn check(config: &LaunchConfig) -> Result<(), LaunchError> {
    if config.net.needs_sidecar() {
        return Ok(());
    }
    let needless =
        [("--publish", config.publish.first().cloned()), ("--ip", config.ip.map(|ip| ip.to_string()))];
    match needless.into_iter().find_map(|(option, value)| value.map(|value| (option, value))) {
        Some((option, value)) => Err(LaunchError::Setting(format!(
            "{option} {value}: goes with a network of Portway's, and the VM has none with this --net or --networking"
        ))),
        None => Ok(()),
    }
}

/// The major version in `QEMU emulator version 7.2.22 (Debian …)`.
fn major(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

/// The socket on which the sidecar waits for the hypervisor: beside the control API's, which is short enough for a socket's
/// path and belongs to this network alone.
pub(crate) fn socket(config: &LaunchConfig) -> PathBuf {
    let mut path = config.api.clone().into_os_string();
    path.push(format!("-{}", config.name));
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_taken() {
        let nowhere = Path::new("/nonexistent");
        assert_eq!(Net::VhostUser.choose(false, nowhere).card, Card::VhostUser);
        assert_eq!(Net::Socket.choose(true, nowhere).card, Card::Socket);
        assert_eq!(Net::None.choose(true, nowhere).card, Card::None);
        assert_eq!(Net::Auto.choose(true, nowhere).card, Card::VhostUser);
        assert_eq!(Net::Auto.choose(false, nowhere).card, Card::Socket);
    }

    #[test]
    fn qemus_version_is_read() {
        assert_eq!(major(b"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n"), Some(7));
        assert_eq!(major(b"QEMU emulator version 10.0.13\n"), Some(10));
        assert_eq!(major(b"nonsense"), None);
    }

    #[test]
    fn linuxkits_networks_have_their_meaning() {
        for word in ["default", "user", "vpnkit", "docker-for-mac", "vmnet"] {
            assert_eq!(Net::networking(word), Ok(Net::Auto), "{word}");
        }
        assert_eq!(Net::networking("none"), Ok(Net::None));
        assert_eq!(Net::networking("tap,tap0"), Ok(Net::Tap("tap0".into())));
        assert_eq!(Net::networking("bridge,br0"), Ok(Net::Bridge("br0".into())));
        for bad in [
            "",
            "tap",
            "tap,",
            "tap,a/b",
            "tap,0123456789abcdef",
            "bridge",
            "none,x",
            "vpnkit,/eth.sock",
            "nat",
        ] {
            let error = Net::networking(bad).expect_err(bad);
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[test]
    fn what_needs_our_network_is_refused_without_it() {
        let image = crate::BootImage::Prefix("/i".into());
        let mut config = LaunchConfig::new(image, "a".into(), "/s".into(), "/a".into(), "/p".into());
        config.net = Net::None;
        check(&config).expect("nothing needs it");
        config.publish = vec!["2222:22".into()];
        let error = check(&config).expect_err("nobody publishes").to_string();
        assert!(error.contains("--publish 2222:22"), "{error}");
        config.net = Net::Auto;
        check(&config).expect("the sidecar publishes");
    }
}
