//! How the VM's network card reaches the sidecar, or what it reaches instead.
//!
//! `vhost-user` moves frames through the guest's own memory, with segmentation offload: fastest at an ordinary MTU of 1500.
//! `socket` is QEMU's `-netdev stream`, with large frames. `datagrams` is what Virtualization.framework speaks.
//!
//! `auto` takes vhost-user with KVM, and under TCG from QEMU 8 on: QEMU 7.2 under TCG gives a busy guest wrong CPU flags
//! with it (its kernel ends in exceptions that cannot be), and dies itself when the guest masks an MSI-X vector.
//!
//! LinuxKit's `--networking` has a word for each of its back ends; [`Net::networking`] says what they are here.

use std::path::PathBuf;

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
/// Bytes of a unix socket's path (sun_path of unix(7), without the NUL).
const SOCKET_PATH: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

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
    pub(crate) fn choose(&self, kvm: bool, version: u32) -> Choice {
        let asked = |card| Choice { card, reason: "as asked".into() };
        let found = |card, reason: String| Choice { card, reason };
        match self {
            Self::VhostUser => asked(Card::VhostUser),
            Self::Socket => asked(Card::Socket),
            Self::None => asked(Card::None),
            Self::Tap(name) => asked(Card::Tap(name.clone())),
            Self::Bridge(name) => asked(Card::Bridge(name.clone())),
            Self::Auto if kvm => found(Card::VhostUser, "with KVM".into()),
            Self::Auto if version >= GOOD_TCG => {
                found(Card::VhostUser, format!("under TCG of QEMU {version}"))
            }
            Self::Auto => found(Card::Socket, format!("QEMU {version} under TCG does not bear vhost-user")),
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

/// What is asked of the network needs a network of ours; and the sockets of ours need room.
pub(crate) fn check(config: &LaunchConfig) -> Result<(), LaunchError> {
    if config.net.needs_sidecar() {
        return check_sockets(config);
    }
    let card = !matches!(config.net, Net::None);
    let needless = [
        ("--publish", config.publish.first().cloned()),
        ("--ip", config.ip.map(|ip| ip.to_string())),
        ("--mtu", config.mtu.map(|mtu| mtu.to_string())),
        ("--network", config.shared.as_ref().map(|shared| shared.name.clone())),
        ("--mac", config.mac.filter(|_| !card).map(|mac| mac.to_string())),
    ];
    match needless.into_iter().find_map(|(option, value)| value.map(|value| (option, value))) {
        Some((option, value)) => Err(LaunchError::Setting(format!(
            "{option} {value}: goes with a network of Portway's, and the VM has none with this --net or --networking: \
             leave one of them out"
        ))),
        None => Ok(()),
    }
}

/// The control socket and those beside it ([`socket`], vsock's, that of the VMs that join) fit into a socket's address, and
/// their directory is there.
fn check_sockets(config: &LaunchConfig) -> Result<(), LaunchError> {
    let api = &config.api;
    let fail = |why: String| Err(LaunchError::Setting(format!("--api unix:{}: {why}", api.display())));
    if let Some(directory) = api.parent().filter(|path| !path.as_os_str().is_empty() && !path.is_dir()) {
        return fail(format!("{} is not a directory: make it first", directory.display()));
    }
    let longest = socket(config).as_os_str().len() + crate::vsock::ENDING.len();
    match longest > SOCKET_PATH {
        true => fail(format!(
            "with --name {} its sockets' paths would have {longest} bytes, and the system takes {SOCKET_PATH}: give \
             another, such as --api unix:/tmp/vm.sock",
            config.name
        )),
        false => Ok(()),
    }
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
        assert_eq!(Net::VhostUser.choose(false, 7).card, Card::VhostUser);
        assert_eq!(Net::Socket.choose(true, 10).card, Card::Socket);
        assert_eq!(Net::None.choose(true, 10).card, Card::None);
    }

    #[test]
    fn auto_takes_vhost_user_where_qemu_bears_it_and_says_why() {
        for (kvm, version, card, why) in [
            (true, 7, Card::VhostUser, "with KVM"),
            (false, 8, Card::VhostUser, "TCG of QEMU 8"),
            (false, 7, Card::Socket, "QEMU 7 under TCG does not bear vhost-user"),
        ] {
            let choice = Net::Auto.choose(kvm, version);
            assert!(choice.card == card && choice.reason.contains(why), "{choice:?}");
        }
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
        type Change = fn(&mut LaunchConfig);
        let changes: [(&str, Change); 5] = [
            ("--publish 2222:22", |c| c.publish = vec!["2222:22".into()]),
            ("--ip 192.168.127.9", |c| c.ip = Some(std::net::Ipv4Addr::new(192, 168, 127, 9))),
            ("--mtu 1500", |c| c.mtu = Some(1500)),
            ("--mac 52:54:00:00:00:01", |c| c.mac = "52:54:00:00:00:01".parse().ok()),
            ("--network dev", |c| {
                c.shared = Some(crate::SharedNetwork { name: "dev".into(), state_dir: "/n".into() });
            }),
        ];
        for (option, change) in changes {
            let mut config = config.clone();
            change(&mut config);
            let error = check(&config).expect_err(option).to_string();
            assert!(error.starts_with(&format!("{option}: ")), "{error}");
            config.net = Net::Auto;
            check(&config).expect("the sidecar has it");
        }
        config.net = Net::Tap("tap0".into());
        config.mac = "52:54:00:00:00:01".parse().ok();
        check(&config).expect("a card on a tap has an address");
    }

    #[test]
    fn sockets_that_cannot_be_made_are_told_with_the_option() {
        let image = crate::BootImage::Prefix("/i".into());
        let mut config = LaunchConfig::new(image, "a".into(), "/s".into(), "/tmp/a".into(), "/p".into());
        check(&config).expect("a directory that is there, a short path");
        config.api = "/nonexistent/a".into();
        let error = check(&config).expect_err("no directory").to_string();
        assert!(error.contains("--api unix:/nonexistent/a") && error.contains("make it first"), "{error}");
        config.api = std::path::Path::new("/tmp").join("a".repeat(97));
        let error = check(&config).expect_err("too long").to_string();
        assert!(error.contains("110 bytes"), "{error}");
    }
}
