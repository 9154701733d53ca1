//! The guest's network: loopback up, and the guest's own DHCP client on the first Ethernet device.
//!
//! ```text
//! udhcpc ─► /usr/share/udhcpc/default.script ─► configures the device ─► one line to /run/portway/events ─► agent
//! ```
//! The client stays in the foreground for as long as the guest lives, so that leases are renewed.

use std::fs;
use std::io;
use std::path::Path;

use crate::services::Service;

const CLASS_NET: &str = "/sys/class/net";
/// `ARPHRD_ETHER`, as `/sys/class/net/*/type` writes it.
const TYPE_ETHERNET: &str = "1";

/// Brings loopback up. The `flags` attribute takes `IFF_UP`, which spares the agent an ioctl.
pub(crate) fn loopback_up() -> io::Result<()> {
    fs::write(Path::new(CLASS_NET).join("lo/flags"), "0x1")
}

/// The first Ethernet device by name, if the guest has one.
pub(crate) fn first_ethernet() -> io::Result<Option<String>> {
    first_ethernet_in(Path::new(CLASS_NET))
}

fn first_ethernet_in(class_net: &Path) -> io::Result<Option<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(class_net)? {
        let entry = entry?;
        // A device that went away between the two calls is not the one we want.
        let kind = fs::read_to_string(entry.path().join("type")).unwrap_or_default();
        if let (TYPE_ETHERNET, Ok(name)) = (kind.trim(), entry.file_name().into_string()) {
            names.push(name);
        }
    }
    Ok(names.into_iter().min())
}

/// The DHCP client as a service: it asks every second, for ever, and names the options its script uses.
pub(crate) fn dhcp_client(device: &str) -> Service {
    let mut args = vec!["-f".to_owned(), "-i".to_owned(), device.to_owned()];
    args.extend(["-t", "20", "-T", "1", "-A", "1"].map(str::to_owned));
    for option in ["mtu", "search", "staticroutes", "hostname"] {
        args.extend(["-O".to_owned(), option.to_owned()]);
    }
    Service { name: "dhcp".into(), program: "/bin/udhcpc".into(), args }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_not_taken_for_ethernet_and_the_first_name_wins() {
        let dir = std::env::temp_dir().join(format!("portway-agent-net-{}", std::process::id()));
        for (name, kind) in [("lo", "772"), ("eth1", "1"), ("eth0", "1")] {
            fs::create_dir_all(dir.join(name)).expect("a directory in the temporary directory");
            fs::write(dir.join(name).join("type"), format!("{kind}\n")).expect("a file in it");
        }
        let found = first_ethernet_in(&dir).expect("the directory is there");
        fs::remove_dir_all(&dir).expect("removing what was made");
        assert_eq!(found.as_deref(), Some("eth0"));
    }
}
