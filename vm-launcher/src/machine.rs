//! The machine: everything of a [`LaunchConfig`] checked ([`Plan`]), then everything it needs made ([`Machine`]).
//!
//! A plan touches nothing; what is wrong is told before a file is made or a process starts. Making is what remains:
//! the metadata CDs and the firmware's variables in the state directory, disks that were given a size.

use std::fs;
use std::path::{Path, PathBuf};

use crate::accel;
use crate::boot::{Asked, Boot, Firmware, Found};
use crate::config::HypervisorKind;
use crate::disk::{self, Disk};
use crate::guard::Guard;
use crate::hypervisor::Hypervisor;
use crate::metadata::{self, Cd};
use crate::progress::Progress;
use crate::qemu::Qemu;
use crate::share::{self, Daemon};
use crate::state::{self, StateDir};
use crate::vfkit::Vfkit;
use crate::{LaunchConfig, LaunchError, Mac, net, vsock};

/// Disks of one VM, which q35's bus has slots for.
const DISKS: usize = 16;

/// What is going to run, checked.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) found: Found,
    pub(crate) hypervisor: Box<dyn Hypervisor>,
    pub(crate) accel: accel::Choice,
    pub(crate) net: net::Choice,
    pub(crate) virtiofsd: Option<Daemon>,
    cds: Vec<Cd>,
}

impl Plan {
    /// Checks everything that can be without touching anything.
    pub(crate) fn new(config: &LaunchConfig) -> Result<Self, LaunchError> {
        check(config)?;
        net::check(config)?;
        vsock::check(config)?;
        // vfkit has no other firmware, and brings it along.
        let own_firmware = config.hypervisor == HypervisorKind::Vfkit;
        let asked = Asked {
            image: &config.image,
            arch: config.arch,
            uefi: config.uefi && !own_firmware,
            own_firmware,
            firmware: config.firmware.as_deref(),
        };
        let found = asked.resolve()?;
        if config.disks.len() > DISKS {
            return setting(format!(
                "--disk: {} disks, and at most {DISKS} are possible",
                config.disks.len()
            ));
        }
        for (n, disk) in config.disks.iter().enumerate() {
            disk.check(n, &config.state_dir, config.disposable)?;
        }
        check_twice(config, &found.boot)?;
        if let Boot::Disk { disk, .. } = &found.boot
            && !config.disposable
            && let Err(reason) = disk::writable(disk)
        {
            return setting(format!("{}: {reason}", disk.display()));
        }
        let mut cds = Vec::new();
        if let Some(data) = &config.data {
            cds.push(Cd::config(data)?);
        }
        if let Some(dir) = &config.cloud_init {
            cds.push(Cd::no_cloud(dir, &config.name)?);
        }
        if let Some(path) = &config.ignition {
            metadata::check_ignition(path)?;
        }
        check_hypervisor(config)?;
        let hypervisor: Box<dyn Hypervisor> = match config.hypervisor {
            HypervisorKind::Qemu => Box::new(Qemu::find(config)?),
            HypervisorKind::Vfkit => Box::new(Vfkit::find(config)?),
        };
        hypervisor.check(config, &found.boot)?;
        share::check(&config.shares)?;
        let virtiofsd = match config.shares.is_empty() || hypervisor.serves_shares() {
            true => None,
            false => Some(Daemon::find(config.virtiofsd.as_deref())?),
        };
        let accel = hypervisor.accel(config)?;
        let net = hypervisor.net(config, accel.kind);
        Ok(Self { found, hypervisor, accel, net, virtiofsd, cds })
    }

    /// Makes what the machine needs; the answer's texts are lines for the user. What is half made when the launcher is killed is
    /// for the guard to remove.
    pub(crate) fn prepare(
        &self,
        config: &LaunchConfig,
        state: &StateDir,
        guard: &mut Guard,
    ) -> Result<(Machine, Vec<String>), LaunchError> {
        let mut progress = Progress::new(self.cds.len() + config.disks.len());
        let mut notes: Vec<String> = self.found.note.iter().cloned().collect();
        let mac = match config.mac {
            Some(mac) => mac,
            None => state.mac(|half| guard.file(half))?,
        };
        let mut cds = Vec::new();
        for cd in &self.cds {
            progress.step(format_args!("writing {}", cd.name()));
            cds.push(cd.write(&config.state_dir, |half| guard.file(half))?);
        }
        let vars = match &self.found.boot {
            Boot::Cd { firmware: Firmware::Flash { vars, .. }, .. }
            | Boot::Disk { firmware: Firmware::Flash { vars, .. }, .. } => {
                Some(variables(vars, &config.state_dir, |half| guard.file(half))?)
            }
            _ => None,
        };
        // Disks last: they are the user's, and stay when something before fails.
        let mut disks = Vec::new();
        for (n, disk) in config.disks.iter().enumerate() {
            progress.step(disk.what(n, &config.state_dir));
            let (disk, note) = disk.prepare(n, &config.state_dir, |half| guard.file(half))?;
            disks.push(disk);
            notes.extend(note);
        }
        let machine = Machine {
            boot: self.found.boot.clone(),
            disks,
            cds,
            vars,
            accel: self.accel.kind,
            card: self.net.card.clone(),
            mac,
        };
        Ok((machine, notes))
    }
}

/// The machine as a hypervisor is told of it.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) boot: Boot,
    pub(crate) disks: Vec<Disk>,
    pub(crate) cds: Vec<PathBuf>,
    /// The firmware's variables.
    pub(crate) vars: Option<PathBuf>,
    pub(crate) accel: accel::Kind,
    pub(crate) card: net::Card,
    pub(crate) mac: Mac,
}

fn setting<T>(text: String) -> Result<T, LaunchError> {
    Err(LaunchError::Setting(text))
}

/// What can be known to be wrong without looking at the machine.
pub(crate) fn check(config: &LaunchConfig) -> Result<(), LaunchError> {
    // The name is a DNS label (RFC 1123 §2.1), and a part of --link, where a comma would end it.
    let label = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let name = &config.name;
    let ends = name.starts_with('-') || name.ends_with('-');
    if name.is_empty() || name.len() > 63 || ends || !name.bytes().all(label) {
        return setting(format!(
            "--name {name:?}: letters, digits and inner - only, at most 63, such as --name web"
        ));
    }
    if config.cpus == 0 || config.cpus > 255 {
        return setting(format!("--cpus {}: 1 to 255, such as --cpus 1", config.cpus));
    }
    if config.mem_mib < 32 {
        return setting(format!("--mem {}: so few MiB boot no Linux: --mem 256 or more", config.mem_mib));
    }
    if config.state_dir.exists() && !config.state_dir.is_dir() {
        return setting(format!(
            "--state-dir {}: it is not a directory: name another, which is made if it is not there",
            config.state_dir.display()
        ));
    }
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    if let Some(has) = memory(&meminfo).filter(|has| u64::from(config.mem_mib) > *has) {
        return setting(format!("--mem {}: this host has {has} MiB, swap included", config.mem_mib));
    }
    let patience = LaunchConfig::LONGEST_STOP_TIMEOUT;
    if config.stop_timeout > patience {
        return setting(format!(
            "--stop-timeout {}: at most {} seconds",
            config.stop_timeout.as_secs(),
            patience.as_secs()
        ));
    }
    Ok(())
}

/// What is said of one hypervisor says nothing to the other.
fn check_hypervisor(config: &LaunchConfig) -> Result<(), LaunchError> {
    let (other, path, flag) = match config.hypervisor {
        HypervisorKind::Qemu => ("QEMU", &config.vfkit, "--vfkit"),
        HypervisorKind::Vfkit => ("vfkit", &config.qemu, "--qemu"),
    };
    match path {
        Some(path) => setting(format!("{flag} {}: {other} runs this VM: leave {flag} out", path.display())),
        None if config.virtiofsd.is_some() && config.shares.is_empty() => {
            setting("--virtiofsd: it serves --virtiofs DIR, and there is none".into())
        }
        None => Ok(()),
    }
}

/// MiB of memory and swap in `/proc/meminfo`; where there is none, nothing is known.
fn memory(meminfo: &str) -> Option<u64> {
    let kib = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((kib("MemTotal:")? + kib("SwapTotal:").unwrap_or(0)) / 1024)
}

/// One file cannot be two disks: QEMU would refuse the second after everything else has started.
fn check_twice(config: &LaunchConfig, boot: &Boot) -> Result<(), LaunchError> {
    let mut seen: Vec<(PathBuf, String)> = Vec::new();
    let boots = match boot {
        Boot::Disk { disk, .. } => Some(("the disk that boots".to_owned(), disk.clone())),
        _ => None,
    };
    let disks = config.disks.iter().filter_map(|disk| {
        let path = disk.path.clone()?;
        Some((format!("--disk {}", path.display()), path))
    });
    for (what, path) in boots.into_iter().chain(disks) {
        // A disk that is to be made has no other name yet.
        let path = path.canonicalize().or_else(|_| std::path::absolute(&path)).unwrap_or(path);
        if let Some((_, first)) = seen.iter().find(|(other, _)| *other == path) {
            return setting(format!(
                "{what}: this file is {first} already, and one file cannot be two disks"
            ));
        }
        seen.push((path, what));
    }
    Ok(())
}

/// The VM's own copy of the firmware's variables, kept from run to run; anew when it belongs to another firmware.
fn variables(template: &Path, state_dir: &Path, half: impl FnOnce(&Path)) -> Result<PathBuf, LaunchError> {
    let path = state_dir.join("efi-vars.fd");
    let fail = |error: std::io::Error| LaunchError::State { path: path.clone(), reason: error.to_string() };
    let wanted = fs::metadata(template).map_err(fail)?.len();
    if !fs::metadata(&path).is_ok_and(|meta| meta.len() == wanted) {
        let bytes = fs::read(template).map_err(fail)?;
        state::write_private(&path, &bytes, half).map_err(fail)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Format;

    #[test]
    fn the_hosts_memory_is_read() {
        assert_eq!(memory("MemTotal:  24117248 kB\nSwapTotal:   1048576 kB\n"), Some(24576));
        assert_eq!(memory("MemTotal:  2048 kB\n"), Some(2));
        assert_eq!(memory(""), None);
    }

    #[test]
    fn one_file_is_not_two_disks() {
        let image = crate::BootImage::Prefix("/i".into());
        let mut config = LaunchConfig::new(image, "a".into(), "/s".into(), "/a".into(), "/p".into());
        let boot =
            Boot::Disk { disk: "/etc/passwd".into(), format: Format::Raw, firmware: Firmware::Default };
        let disk = |text: &str| text.parse().expect("a disk");
        config.disks = vec![disk("/etc/hosts"), disk("size=1M"), disk("size=1M"), disk("/new,size=1M")];
        check_twice(&config, &boot).expect("each is another");
        config.disks.push(disk("/etc/../etc/hosts"));
        let error = check_twice(&config, &boot).expect_err("twice").to_string();
        assert!(error.contains("--disk /etc/../etc/hosts: this file is --disk /etc/hosts"), "{error}");
        config.disks = vec![disk("/etc/passwd")];
        let error = check_twice(&config, &boot).expect_err("it boots").to_string();
        assert!(error.contains("the disk that boots"), "{error}");
        config.disks = vec![disk("/new,size=1M"), disk("/./new,size=1M")];
        check_twice(&config, &boot).expect_err("twice the same that is to be made");
    }

    #[test]
    fn the_firmwares_variables_are_kept_and_anew_for_another_firmware() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let template = dir.path().join("VARS.fd");
        fs::write(&template, "empty").expect("writing");
        let vars = variables(&template, dir.path(), |_| ()).expect("a copy");
        fs::write(&vars, "FULL!").expect("the VM writes");
        assert_eq!(
            fs::read(variables(&template, dir.path(), |_| ()).expect("kept")).expect("reading"),
            b"FULL!"
        );
        fs::write(&template, "another").expect("writing");
        assert_eq!(
            fs::read(variables(&template, dir.path(), |_| ()).expect("anew")).expect("reading"),
            b"another"
        );
    }
}
