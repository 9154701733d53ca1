//! The VM's vsock: the sidecar's own device (`portway serve --vsock vhost-user:unix:…`), which needs no module of the
//! host's kernel and no privilege. Ports of the guest have sockets in the state directory, with LinuxKit's names.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::{HypervisorKind, LaunchConfig, LaunchError};

/// What its path has more than the link's.
pub(crate) const ENDING: &str = "-vsock";

/// The socket on which the sidecar waits for the hypervisor's vsock device, beside the link's; `None` when the VM has no
/// vsock: nobody wants one, or no sidecar is this VM's own.
pub(crate) fn socket(config: &LaunchConfig) -> Option<PathBuf> {
    if !config.vsock || !is_possible(config) {
        return None;
    }
    let mut path = crate::net::socket(config).into_os_string();
    path.push(ENDING);
    Some(path.into())
}

/// Whether there is a sidecar for this VM alone, and vhost-user is to be had.
fn is_possible(config: &LaunchConfig) -> bool {
    let takes_device = cfg!(target_os = "linux") && config.hypervisor == HypervisorKind::Qemu;
    takes_device && config.shared.is_none() && config.net.needs_sidecar()
}

/// The name of a guest's port in the state directory, as LinuxKit has it.
pub(crate) fn name(port: u32) -> String {
    format!("guest.{port:08x}")
}

/// Ports need a vsock. vfkit has its own, whatever the network is.
pub(crate) fn check(config: &LaunchConfig) -> Result<(), LaunchError> {
    let Some(port) = config.vsock_ports.first() else { return Ok(()) };
    let by_vfkit = config.vsock && config.hypervisor == HypervisorKind::Vfkit;
    if by_vfkit || socket(config).is_some() {
        return Ok(());
    }
    let why = if !config.vsock {
        "the VM has no vsock with --vsock off"
    } else if config.shared.is_some() {
        "a VM on a network that is shared has no vsock yet: leave --network out"
    } else {
        "in QEMU the VM has a vsock only with a network of Portway's, and on Linux"
    };
    Err(LaunchError::Setting(format!("--vsock-ports {port}: {why}")))
}

/// What the sidecar is told.
pub(crate) fn serve_arguments(config: &LaunchConfig) -> Vec<OsString> {
    let Some(path) = socket(config) else { return Vec::new() };
    let mut place = OsString::from("vhost-user:unix:");
    place.push(path);
    place.push(format!(",name={}", config.name));
    let mut args: Vec<OsString> = vec!["--vsock".into(), place];
    if !config.vsock_ports.is_empty() {
        let ports: Vec<String> = config.vsock_ports.iter().map(u32::to_string).collect();
        args.extend(["--vsock-ports".into(), ports.join(",").into()]);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BootImage, Net, SharedNetwork};

    fn config() -> LaunchConfig {
        let image = BootImage::Prefix("/i".into());
        let mut config = LaunchConfig::new(image, "demo".into(), "/s".into(), "/run/a".into(), "/p".into());
        config.vsock_ports = vec![2374, 62373];
        config
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_sidecar_serves_the_device_and_the_ports() {
        let words: Vec<String> =
            serve_arguments(&config()).iter().map(|w| w.to_string_lossy().into_owned()).collect();
        assert_eq!(
            words,
            ["--vsock", "vhost-user:unix:/run/a-demo-vsock,name=demo", "--vsock-ports", "2374,62373"]
        );
    }

    #[test]
    fn vfkits_vsock_is_its_own_and_needs_no_network() {
        let mut config = config();
        config.hypervisor = HypervisorKind::Vfkit;
        config.net = Net::None;
        check(&config).expect("vfkit has one");
        assert!(serve_arguments(&config).is_empty());
        assert_eq!(name(2374), "guest.00000946");
    }

    #[test]
    fn ports_without_a_vsock_are_refused_and_nothing_else_is() {
        let mut off = config();
        off.vsock = false;
        let mut none = config();
        none.net = Net::None;
        let mut shared = config();
        shared.shared = Some(SharedNetwork { name: "dev".into(), state_dir: "/n".into() });
        for (mut config, why) in [(off, "--vsock off"), (none, "a network of Portway's"), (shared, "shared")]
        {
            let error = check(&config).expect_err(why).to_string();
            assert!(error.contains("--vsock-ports 2374") && error.contains(why), "{error}");
            config.vsock_ports.clear();
            assert!(check(&config).is_ok() && serve_arguments(&config).is_empty());
        }
    }
}
