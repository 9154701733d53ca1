//! `--vsock KIND:ADDRESS[,cid=N][,name=VM]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use super::GUEST_CID;
use crate::config::ConfigError;

/// What carries a guest's streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// Our own device, for the VMM that connects to the path.
    #[cfg(target_os = "linux")]
    VhostUser(PathBuf),
    /// The kernel's AF_VSOCK: the VMM has a vhost-vsock device.
    #[cfg(target_os = "linux")]
    Kernel,
    /// The VMM's unix socket, on which a port is asked for; what the guest opens arrives at `PATH_PORT`.
    Firecracker(PathBuf),
    /// A directory with one unix socket per port.
    Directory(PathBuf),
}

/// A `--vsock` as it was typed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct VsockSpec {
    /// What carries the streams.
    pub transport: Transport,
    /// The guest's address.
    pub cid: u32,
    /// The VM's name.
    pub name: Option<String>,
}

impl TryFrom<String> for VsockSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Kinds and examples, for errors.
const KINDS: &str = "vhost-user:unix:PATH, vhost:CID, firecracker:PATH or dir:PATH";

impl FromStr for VsockSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let place = parts.next().unwrap_or_default();
        let (kind, address) = place.split_once(':').unwrap_or((place, ""));
        let path = |address: &str| {
            let fault = |why: &str| format!("{place:?} is not a vsock: {why}; one is {KINDS}");
            if address.is_empty() {
                return Err(fault("its path is empty"));
            }
            std::path::absolute(address).map_err(|e| fault(&e.to_string()))
        };
        let mut given = None;
        let transport = match kind {
            #[cfg(target_os = "linux")]
            "vhost-user" => match address.strip_prefix("unix:") {
                Some(address) => Transport::VhostUser(path(address)?),
                None => return Err(format!("{place:?} is not a vsock: vhost-user:unix:PATH is one")),
            },
            #[cfg(target_os = "linux")]
            "vhost" => {
                given = Some(guest(address)?);
                Transport::Kernel
            }
            "firecracker" => Transport::Firecracker(path(address)?),
            "dir" => Transport::Directory(path(address)?),
            _ => return Err(format!("{kind:?} is not a kind of vsock: {KINDS}")),
        };
        let mut name = None;
        for option in parts {
            match option.split_once('=') {
                Some(("name", value)) if !value.is_empty() => name = Some(value.to_owned()),
                Some(("cid", value)) if given.is_none() => given = Some(guest(value)?),
                _ => return Err(format!("{option:?} is not an option of a vsock: cid=N (once) or name=VM")),
            }
        }
        Ok(Self { transport, cid: given.unwrap_or(GUEST_CID), name })
    }
}

/// A CID that a guest may have: 0 to 2 are the hypervisor's, loopback's and the host's, the last one is a wildcard
/// (virtio 1.2, §5.10.4).
fn guest(text: &str) -> Result<u32, String> {
    let cid = text.parse().ok().filter(|cid| (GUEST_CID..u32::MAX).contains(cid));
    cid.ok_or_else(|| format!("{text:?} is not the CID of a guest: 3 to {}", u32::MAX - 1))
}

/// Whether the settings go together.
///
/// # Errors
/// When two guests have one CID, or ports have no guest or no directory.
pub(crate) fn check(specs: &[VsockSpec], ports: &[u32], has_dir: bool) -> Result<(), ConfigError> {
    for (n, spec) in specs.iter().enumerate() {
        if specs.iter().take(n).any(|other| other.cid == spec.cid) {
            let fault = format!("two guests have CID {}: give one of them another by cid=N", spec.cid);
            return Err(ConfigError::new("--vsock", fault));
        }
    }
    let fault = |text: &str| Err(ConfigError::new("--vsock-ports", text));
    match ports.iter().enumerate().find(|(n, port)| ports.iter().take(*n).any(|other| other == *port)) {
        Some((_, port)) => fault(&format!("port {port} is given twice")),
        None if ports.contains(&u32::MAX) => fault("4294967295 is not a port"),
        None if ports.is_empty() => Ok(()),
        None if specs.is_empty() => fault("there is no --vsock whose ports they could be"),
        None if !has_dir => fault("they need --vsock-dir or --state-dir for their sockets"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_what_is_meant() {
        let parsed = |text: &str| text.parse::<VsockSpec>().expect(text);
        let ours = Transport::VhostUser("/run/v".into());
        assert_eq!(parsed("vhost-user:unix:/run/v"), VsockSpec { transport: ours, cid: 3, name: None });
        let kernel = VsockSpec { transport: Transport::Kernel, cid: 42, name: None };
        assert_eq!(parsed("vhost:42"), kernel);
        let fire = Transport::Firecracker("/run/v.sock".into());
        let named = VsockSpec { transport: fire, cid: 3, name: Some("web".into()) };
        assert_eq!(parsed("firecracker:/run/v.sock,name=web"), named);
        let dir = Transport::Directory("/run/vm".into());
        assert_eq!(parsed("dir:/run/vm,cid=7"), VsockSpec { transport: dir, cid: 7, name: None });
    }

    #[test]
    fn what_is_no_vsock_says_what_is() {
        for (text, fault) in [
            ("", "is not a kind of vsock"),
            ("hyperkit:/x", "firecracker:PATH"),
            ("vhost-user:/x", "vhost-user:unix:PATH is one"),
            ("vhost-user:unix:", "its path is empty"),
            ("vhost:2", "is not the CID of a guest"),
            ("vhost:4294967295", "is not the CID of a guest"),
            ("vhost:5,cid=6", "is not an option"),
            ("dir:", "its path is empty"),
            ("dir:/x,cid=", "is not the CID of a guest"),
            ("dir:/x,color=red", "is not an option"),
            ("dir:/x,name=", "is not an option"),
        ] {
            let error = text.parse::<VsockSpec>().expect_err(text);
            assert!(error.contains(fault), "{text:?}: {error}");
        }
    }
}
