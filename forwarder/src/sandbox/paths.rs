//! Where the process may read and write once it runs, and Landlock, which holds it to that.
//!
//! Directories and not files, because sockets and state files come, go and are renamed in them, and because resolv.conf
//! is replaced. Unix sockets may be connected to anywhere their permissions allow: Landlock has no say in that
//! (`landlock(7)`, limitations).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::config::{Config, DoorAddress, LinkAddress, LinkConfig};
use crate::publish::spec::HostEnd;
use crate::vsock::Transport;

/// Where programs that manage resolv.conf keep what it is a link to, now or after the next change.
const RESOLVERS: [&str; 4] =
    ["/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"];

/// Links that are followed from resolv.conf to what it is.
const HOPS: usize = 8;

/// The directories.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// Where sockets and files come and go.
    pub(crate) write: BTreeSet<PathBuf>,
    /// Those of them in which API clients may have sockets made.
    pub(crate) live: BTreeSet<PathBuf>,
    /// Sockets and directories that are ours, whoever we become.
    pub(crate) ours: Vec<PathBuf>,
    /// Where files are read.
    pub(crate) read: BTreeSet<PathBuf>,
}

impl Paths {
    /// Those that `config` speaks of.
    pub(crate) fn of(config: &Config) -> Self {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(|d| PathBuf::from(d).join("portway"));
        // A personality that serves no control socket has no path for one.
        let api = config.particulars.control.then_some(&config.api);
        let live: BTreeSet<PathBuf> = api
            .and_then(|api| parent(api))
            .into_iter()
            .chain(config.state_dir.clone())
            .chain(runtime)
            .chain(config.allow_path.iter().cloned())
            .chain(config.particulars.directories.iter().filter_map(|d| std::path::absolute(d).ok()))
            .collect();
        let mut write = live.clone();
        write.extend(config.pid_file.as_deref().and_then(parent));
        write.extend(config.links.iter().filter_map(LinkConfig::directory));
        write.extend(config.agent.agents.iter().filter_map(|a| parent(&a.path)));
        write.extend(config.agent.rules.iter().filter_map(|rule| parent(rule.socket()?)));
        write.extend(config.doors.iter().filter_map(|door| match &door.address {
            DoorAddress::Unix(path) => parent(path),
            DoorAddress::Tcp(_) | DoorAddress::Vsock(_) => None,
        }));
        write.extend(config.join.as_deref().and_then(parent));
        write.extend(config.vsock_dir.clone());
        write.extend(config.vsock.iter().filter_map(|v| match &v.transport {
            Transport::VhostUser(path) | Transport::Firecracker(path) => parent(path),
            Transport::Directory(path) => Some(path.clone()),
            #[cfg(target_os = "linux")]
            Transport::Kernel => None,
        }));
        write.extend(config.publish.iter().filter_map(|p| match &p.host {
            HostEnd::Unix(path) => parent(path),
            HostEnd::Ports { .. } => None,
        }));
        let mut ours: Vec<PathBuf> =
            config.state_dir.iter().chain(api).chain(&config.pid_file).cloned().collect();
        ours.extend(config.links.iter().filter_map(|l| match &l.address {
            LinkAddress::Listen(path) => Some(path.clone()),
            _ => None,
        }));
        let files = std::iter::once(&config.resolv_conf).chain(&config.hosts_file);
        let files = files.chain(&config.particulars.followed);
        let mut read: BTreeSet<PathBuf> = RESOLVERS.iter().map(PathBuf::from).collect();
        for file in files {
            read.extend(directories_of(file));
        }
        // Forwards over SSH look there whether a guest is who it was; the file alone, for keys lie beside it.
        if !config.doors.is_empty() || !config.particulars.ssh.is_empty() {
            read.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".ssh/known_hosts")));
        }
        Self { write, live, ours, read }
    }

    /// Whether an API client may have a file made at `path`.
    pub(crate) fn may_make(&self, path: &Path) -> bool {
        let real = |p: &Path| p.canonicalize().ok();
        let Some(directory) = path.parent().and_then(real) else { return false };
        self.live.iter().filter_map(|d| real(d)).any(|d| directory.starts_with(d))
    }

    /// Holds the process to these directories.
    #[cfg(target_os = "linux")]
    pub(super) fn confine(&self) -> Result<String, String> {
        use landlock::{
            ABI, Access, AccessFs, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
            RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
        };
        let change = AccessFs::ReadFile
            | AccessFs::ReadDir
            | AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::MakeReg
            | AccessFs::MakeDir
            | AccessFs::MakeSock
            | AccessFs::RemoveFile
            | AccessFs::RemoveDir;
        let look = AccessFs::ReadFile | AccessFs::ReadDir;
        let own = [Path::new("/proc/self")];
        // Signals: to nobody else. Not abstract unix sockets: VMMs of `dgram` links have such names, and we answer them.
        let status = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))
            .and_then(|r| r.scope(Scope::Signal))
            .and_then(Ruleset::create)
            .and_then(|r| r.add_rules(path_beneath_rules(&self.write, change)))
            .and_then(|r| r.add_rules(path_beneath_rules(&self.read, look)))
            .and_then(|r| r.add_rules(path_beneath_rules(own, look)))
            .and_then(|r| r.restrict_self())
            .map_err(|e| e.to_string())?;
        let version = match status.landlock {
            LandlockStatus::Available { effective_abi, .. } => format!("version {}", effective_abi as i32),
            LandlockStatus::NotEnabled => "it is switched off in this kernel".into(),
            _ => "this kernel has none".into(),
        };
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok(version),
            RulesetStatus::PartiallyEnforced => Ok(format!("{version}, which lacks some rights")),
            RulesetStatus::NotEnforced => Err(version),
        }
    }
}

/// Whether this kernel has Landlock: a rule set is made, and nothing is held to it.
#[cfg(target_os = "linux")]
pub(super) fn landlock_is_there() -> bool {
    use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    let asked = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1));
    asked.and_then(Ruleset::create).is_ok()
}

/// The directory of `path`, wherever the process is.
fn parent(path: &Path) -> Option<PathBuf> {
    std::path::absolute(path).ok()?.parent().map(Path::to_path_buf)
}

/// The directory of `file`, and of everything it is a link to.
fn directories_of(file: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut at = file.to_path_buf();
    for _ in 0..HOPS {
        let Some(directory) = parent(&at) else { break };
        found.push(directory.clone());
        let Ok(to) = std::fs::read_link(&at) else { break };
        at = directory.join(to);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linked_file_brings_the_directories_of_every_link() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        std::fs::write(b.join("real"), "").unwrap();
        std::os::unix::fs::symlink("../b/real", a.join("resolv.conf")).unwrap();
        let found = directories_of(&a.join("resolv.conf"));
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].canonicalize().unwrap(), b.canonicalize().unwrap());
    }

    #[test]
    fn a_live_path_may_not_leave_its_directory_by_dots_or_links() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("allowed");
        std::fs::create_dir(&allowed).unwrap();
        std::os::unix::fs::symlink(dir.path(), allowed.join("out")).unwrap();
        let paths = Paths { live: [allowed.clone()].into(), ..Paths::default() };
        assert!(paths.may_make(&allowed.join("s")));
        assert!(!paths.may_make(&allowed.join("../s")));
        assert!(!paths.may_make(&allowed.join("out/s")));
        assert!(!paths.may_make(&allowed.join("absent/s")));
        assert!(!paths.may_make(Path::new("/s")));
    }
}
