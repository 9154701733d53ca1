//! What survives a restart, in the state directory: leases. Written whole to a new file, then renamed: a crash leaves
//! the old file or the new one.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portway_netstack::dhcp::LeaseReport;
use serde::{Deserialize, Serialize};

const FILE: &str = "leases.json";

#[derive(Serialize, Deserialize)]
struct Kept {
    ip: std::net::Ipv4Addr,
    mac: String,
    name: Option<String>,
    /// Seconds since 1970.
    expires: u64,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Keeps `leases`.
pub(super) fn keep_leases(dir: &Path, leases: &[LeaseReport]) -> io::Result<()> {
    let kept = leases.iter().filter(|l| !l.fixed).filter_map(|l| {
        let expires = now() + l.remaining?.as_secs();
        Some(Kept { ip: l.ip, mac: l.mac.to_string(), name: l.name.clone(), expires })
    });
    let text = serde_json::to_vec(&kept.collect::<Vec<_>>()).map_err(io::Error::other)?;
    let new = dir.join(format!("{FILE}.new"));
    std::fs::write(&new, text)?;
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))
}

/// What was kept and has not ended; a file that cannot be read counts as none, and is said.
pub(super) fn leases(dir: &Path) -> Vec<LeaseReport> {
    let text = match std::fs::read(dir.join(FILE)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(%error, dir = %dir.display(), "kept leases cannot be read");
            return Vec::new();
        }
    };
    let kept: Vec<Kept> = serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(%error, dir = %dir.display(), "kept leases cannot be used");
        Vec::new()
    });
    let now = now();
    let restore = |k: Kept| {
        let remaining = Duration::from_secs(k.expires.checked_sub(now).filter(|s| *s > 0)?);
        let mac = k.mac.parse().ok()?;
        Some(LeaseReport {
            ip: k.ip,
            mac,
            port: None,
            name: k.name,
            remaining: Some(remaining),
            fixed: false,
        })
    };
    kept.into_iter().filter_map(restore).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_read_back_and_a_torn_file_is_no_lease() {
        let dir = tempfile::tempdir().unwrap();
        let lease = LeaseReport {
            ip: [192, 168, 127, 2].into(),
            mac: portway_netstack::Mac([2, 0, 0, 0, 0, 1]),
            port: None,
            name: Some("web".into()),
            remaining: Some(Duration::from_secs(100)),
            fixed: false,
        };
        keep_leases(dir.path(), std::slice::from_ref(&lease)).unwrap();
        assert_eq!(leases(dir.path())[0].mac, lease.mac);
        std::fs::write(dir.path().join(FILE), "[{\"ip\":").unwrap();
        assert!(leases(dir.path()).is_empty());
    }
}
