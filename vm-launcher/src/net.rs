//! How the VM's network card reaches the sidecar.
//!
//! `vhost-user` moves frames through the guest's own memory, with segmentation offload: fastest at an ordinary MTU of 1500.
//! `socket` is QEMU's `-netdev stream` over a socketpair, with large frames.
//!
//! `auto` takes vhost-user with KVM, and under TCG from QEMU 8 on: QEMU 7.2 under TCG gives a busy guest wrong CPU flags
//! with it (its kernel ends in exceptions that cannot be), and dies itself when the guest masks an MSI-X vector.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::LaunchConfig;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Net {
    /// Vhost-user where it works, else a socket.
    #[default]
    Auto,
    /// Guest memory.
    VhostUser,
    /// A socketpair.
    Socket,
}

/// What was taken, and why: one line for the user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) vhost_user: bool,
    pub(crate) reason: String,
}

/// The first major version of QEMU whose TCG bears vhost-user.
const GOOD_TCG: u32 = 8;

impl Net {
    /// Decides by the accelerator and QEMU's version.
    pub(crate) fn choose(self, kvm: bool, qemu: &Path) -> Choice {
        match self {
            Self::VhostUser => Choice { vhost_user: true, reason: "asked for".into() },
            Self::Socket => Choice { vhost_user: false, reason: "asked for".into() },
            Self::Auto if kvm => Choice { vhost_user: true, reason: "with KVM".into() },
            Self::Auto => {
                let major = Command::new(qemu).arg("--version").output().ok().and_then(|o| major(&o.stdout));
                match major {
                    Some(n) if n >= GOOD_TCG => {
                        Choice { vhost_user: true, reason: format!("under TCG of QEMU {n}") }
                    }
                    Some(n) => {
                        let reason = format!("QEMU {n} under TCG does not bear vhost-user");
                        Choice { vhost_user: false, reason }
                    }
                    None => Choice { vhost_user: false, reason: "QEMU does not tell its version".into() },
                }
            }
        }
    }
}

/// The major version in `QEMU emulator version 7.2.22 (Debian …)`.
fn major(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

/// The socket on which the sidecar waits for QEMU's vhost-user: beside the control API's, which is short enough for a
/// socket's path and belongs to this network alone.
pub(crate) fn socket(config: &LaunchConfig) -> PathBuf {
    let mut path = config.api.clone().into_os_string();
    path.push("-vm");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_taken() {
        let nowhere = Path::new("/nonexistent");
        assert!(Net::VhostUser.choose(false, nowhere).vhost_user);
        assert!(!Net::Socket.choose(true, nowhere).vhost_user);
        assert!(Net::Auto.choose(true, nowhere).vhost_user);
        assert!(!Net::Auto.choose(false, nowhere).vhost_user);
    }

    #[test]
    fn qemus_version_is_read() {
        assert_eq!(major(b"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n"), Some(7));
        assert_eq!(major(b"QEMU emulator version 10.0.13\n"), Some(10));
        assert_eq!(major(b"nonsense"), None);
    }
}
