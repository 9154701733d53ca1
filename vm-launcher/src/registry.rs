//! The VMs that run: one file each in a directory of this user, so that they can be listed and told to stop by name.
//!
//! The launcher holds a lock on its file for as long as it lives. A file whose lock is free belongs to a launcher that was
//! killed, and whoever comes across it removes it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::config::{Console, HypervisorKind};
use crate::guard::Guard;
use crate::sockets::Owned;
use crate::{LaunchConfig, LaunchError, accel};

/// Bytes of one file that are read.
const RECORD_MAX: u64 = 64 * 1024;

/// A VM that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// The launcher's process id.
    pub pid: u32,
    /// Its state directory: logs, `qmp.sock`, `console.sock`.
    pub state_dir: PathBuf,
    /// The control socket of its network; absent when it has none.
    pub api: Option<PathBuf>,
    /// `x86_64` or `aarch64`.
    pub arch: String,
    /// `kvm`, `hvf` or `tcg`.
    pub accel: String,
    /// Virtual CPUs.
    pub cpus: u16,
    /// Memory in MiB.
    pub mem_mib: u32,
    /// Whether its console is on a socket, for `portway console`.
    pub detached: bool,
    /// Seconds the guest has to power off.
    pub stop_timeout_s: u64,
    /// When it was started: seconds since 1970.
    pub started_s: u64,
}

/// This VM's file.
#[derive(Debug)]
pub(crate) struct Registration {
    _lock: Option<Flock<File>>,
    _file: Option<Owned>,
}

impl Registration {
    /// Lists the VM, where there is a list.
    pub(crate) fn make(
        config: &LaunchConfig,
        accel: &accel::Choice,
        guard: &mut Guard,
    ) -> Result<Self, LaunchError> {
        let Some(registry) = &config.registry else { return Ok(Self { _lock: None, _file: None }) };
        let pid = std::process::id();
        let path = registry.join(format!("{}.{pid}.json", config.name));
        let fail = |error: io::Error| LaunchError::State { path: path.clone(), reason: error.to_string() };
        fs::create_dir_all(registry).map_err(fail)?;
        let absolute = |path: &Path| std::path::absolute(path).map_err(fail);
        let info = VmInfo {
            name: config.name.clone(),
            pid,
            state_dir: absolute(&config.state_dir)?,
            api: config.net.needs_sidecar().then(|| absolute(&config.api)).transpose()?,
            arch: config.arch.name().into(),
            accel: accel.kind.name().into(),
            cpus: config.cpus,
            mem_mib: config.mem_mib,
            detached: config.console == Console::Socket && config.hypervisor == HypervisorKind::Qemu,
            stop_timeout_s: config.stop_timeout.as_secs(),
            started_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        guard.file(&path);
        let new = registry.join(format!(".{pid}.new"));
        guard.file(&new);
        // Under a name that nobody reads until it is locked.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(fail)?;
        let temporary = Owned(new.clone());
        let mut lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| fail(errno.into()))?;
        let text = serde_json::to_vec(&info).map_err(|error| fail(error.into()))?;
        lock.write_all(&text).and_then(|()| fs::rename(&new, &path)).map_err(fail)?;
        drop(temporary);
        Ok(Self { _lock: Some(lock), _file: Some(Owned(path)) })
    }
}

/// The VMs that run, by name.
///
/// # Errors
/// When the directory is there and cannot be read.
pub fn list(registry: &Path) -> io::Result<Vec<VmInfo>> {
    let entries = match fs::read_dir(registry) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut vms = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            vms.extend(read(&path));
        }
    }
    vms.sort_by(|a: &VmInfo, b: &VmInfo| (&a.name, a.pid).cmp(&(&b.name, b.pid)));
    Ok(vms)
}

/// The VM of a file, if its launcher lives. One that goes meanwhile is none.
fn read(path: &Path) -> Option<VmInfo> {
    let file = File::open(path).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_free) => {
            let _ = fs::remove_file(path);
            None
        }
        Err((file, _)) => {
            let mut text = String::new();
            file.take(RECORD_MAX).read_to_string(&mut text).ok()?;
            serde_json::from_str(&text).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str) -> VmInfo {
        VmInfo {
            name: name.into(),
            pid: 7,
            state_dir: "/s".into(),
            api: None,
            arch: "x86_64".into(),
            accel: "tcg".into(),
            cpus: 1,
            mem_mib: 512,
            detached: false,
            stop_timeout_s: 10,
            started_s: 0,
        }
    }

    #[test]
    fn a_file_whose_launcher_is_gone_is_removed_and_one_that_is_locked_is_listed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let write = |name: &str| {
            let path = dir.path().join(format!("{name}.7.json"));
            fs::write(&path, serde_json::to_vec(&info(name)).expect("JSON")).expect("writing");
            path
        };
        let (stale, live) = (write("stale"), write("live"));
        fs::write(dir.path().join("notes.txt"), "not ours").expect("writing");
        let file = File::open(&live).expect("it is there");
        let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("it is free");
        assert_eq!(list(dir.path()).expect("a list"), [info("live")]);
        assert!(!stale.exists() && live.exists() && dir.path().join("notes.txt").exists());
        assert_eq!(list(Path::new("/nonexistent")).expect("no list, no VMs"), []);
    }
}
