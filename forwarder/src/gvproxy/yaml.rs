//! gvproxy's configuration file, in YAML. A key without a value is as if it were not there, and so is an empty file.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The file. Unlike gvproxy's, a key that is none is an error: it would be ignored in silence otherwise.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    pub(super) listen: Vec<String>,
    #[serde(rename = "log-level")]
    pub(super) log_level: String,
    #[serde(rename = "pid-file")]
    pub(super) pid_file: String,
    #[serde(rename = "log-file")]
    pub(super) log_file: String,
    pub(super) services: String,
    #[serde(rename = "ec2-metadata-access")]
    pub(super) ec2_metadata_access: bool,
    pub(super) notification: String,
    pub(super) interfaces: Interfaces,
    pub(super) forwards: Vec<SshForward>,
    pub(super) stack: Stack,
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let read: Result<Option<Self>, _> = serde_saphyr::from_str(text);
        // Behind the first line is a picture of the place, which that line has in numbers.
        let first =
            |text: String| text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Ok(read.map_err(|e| first(e.to_string()))?.unwrap_or_default())
    }
}

/// Where VMs are met.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Interfaces {
    pub(super) vpnkit: String,
    pub(super) qemu: String,
    pub(super) bess: String,
    pub(super) stdio: String,
    pub(super) vfkit: String,
}

/// A unix socket of the host that leads to one of the guest, over SSH.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SshForward {
    pub(super) socket: String,
    pub(super) dest: String,
    pub(super) user: String,
    pub(super) identity: String,
}

/// The network.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct Stack {
    pub(super) debug: bool,
    #[serde(rename = "capture-file")]
    pub(super) capture_file: String,
    pub(super) mtu: i64,
    pub(super) subnet: String,
    #[serde(rename = "gatewayIP")]
    pub(super) gateway_ip: String,
    #[serde(rename = "deviceIP")]
    pub(super) device_ip: String,
    #[serde(rename = "hostIP")]
    pub(super) host_ip: String,
    pub(super) gateway_mac_address: String,
    pub(super) dns: Vec<Zone>,
    pub(super) dns_search_domains: Option<Vec<String>>,
    pub(super) forwards: BTreeMap<String, String>,
    pub(super) nat: BTreeMap<String, String>,
    #[serde(rename = "gatewayVirtualIPs")]
    pub(super) gateway_virtual_ips: Vec<String>,
    #[serde(rename = "dhcpStaticLeases")]
    pub(super) dhcp_static_leases: BTreeMap<String, String>,
    #[serde(rename = "vpnKitUUIDMacAddresses")]
    pub(super) vpnkit_macs: BTreeMap<String, String>,
    pub(super) ec2_metadata_access: bool,
}

/// A zone of DNS.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Zone {
    pub(super) name: String,
    pub(super) records: Vec<Record>,
    #[serde(rename = "defaultIP")]
    pub(super) default_ip: String,
}

/// One of its names.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) ip: String,
    pub(super) regexp: String,
}
