//! What the process may still do once its listeners stand: less than the user who started it.
//!
//! ```text
//!  start ─► descriptors nobody named are closed ─► everything is bound ─► enter() ─► threads start, `ready`, first frame
//!                                                                          │
//!            an ordinary user · no capabilities · no_new_privs · not dumpable · Landlock · seccomp
//! ```
//! [`enter`] runs while the process has one thread, so that all it later starts inherit everything. Each part that this
//! host lacks is a warning that names it; under `--sandbox require` it is an error, and nothing has started. What is in
//! force is looked up afterwards in `/proc/thread-self/status` and shown by `/v1/network` and `portway stats`.
//!
//! What remains possible is what a running sidecar does: sockets of all kinds it serves, files under the directories of
//! [`paths`], and the calls of [`calls`]. It cannot start a program, so a tap device of another process's namespace is
//! opened before. Not here: what a namespace of its own would hide (mounts, processes): Landlock and seccomp deny the calls.
//!
//! Sources: `capabilities(7)`, `PR_SET_NO_NEW_PRIVS` and `PR_SET_DUMPABLE` in `prctl(2)`, `landlock(7)`, `seccomp(2)`.

#[cfg(target_os = "linux")]
pub(crate) mod calls;
pub(crate) mod descriptors;
#[cfg(target_os = "linux")]
mod filter;
pub(crate) mod paths;
#[cfg(target_os = "linux")]
mod privileges;
#[cfg(target_os = "linux")]
pub(crate) mod refused;

use portway_api::control::{SandboxInfo, SandboxPart};
use serde::Deserialize;

#[cfg(target_os = "linux")]
pub(crate) use self::calls::{Call, Only, sandbox_calls};
use crate::config::{Config, ConfigError};

/// How much of the sandbox there has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All of it, or the process does not start.
    Require,
    /// What this host has; a warning names what it lacks.
    #[default]
    BestEffort,
    /// None, for debuggers and strace.
    Off,
}

impl Mode {
    /// As it is typed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Require => "require",
            Self::BestEffort => "best-effort",
            Self::Off => "off",
        }
    }
}

/// Every part, in the order in which they come into force.
const PARTS: [&str; 6] = ["user", "capabilities", "no_new_privs", "not_dumpable", "landlock", "seccomp"];

/// Calls that the sandbox has refused since the start.
#[must_use]
pub(crate) fn refused_calls() -> u64 {
    #[cfg(target_os = "linux")]
    return refused::count();
    #[cfg(not(target_os = "linux"))]
    0
}

/// The system calls a running sidecar may make, by name, and which module needs each: for tests and documentation.
#[must_use]
pub fn allowed_calls() -> Vec<(&'static str, &'static str)> {
    #[cfg(target_os = "linux")]
    return calls::ALL.iter().flat_map(|(whose, calls)| calls.iter().map(|c| (*whose, c.name))).collect();
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

/// The parts this kernel may lack, and whether it has them.
#[cfg(target_os = "linux")]
pub(crate) fn offered() -> [(&'static str, bool); 2] {
    [("Landlock", paths::landlock_is_there()), ("seccomp filters", filter::is_there())]
}

/// Looks at `--runas` before anything starts.
///
/// # Errors
/// When it names nobody, or there is no sandbox to enter as somebody else.
pub(crate) fn check_user(runas: Option<&str>, mode: Mode) -> Result<(), ConfigError> {
    let Some(name) = runas else { return Ok(()) };
    if mode == Mode::Off {
        return Err(ConfigError::new("--runas", "with --sandbox off nobody becomes another user"));
    }
    #[cfg(target_os = "linux")]
    return privileges::known(name).map(drop);
    #[cfg(not(target_os = "linux"))]
    Err(ConfigError::new("--runas", format!("{name:?}: not on this system")))
}

/// Goes into the sandbox; there is no way back.
///
/// # Errors
/// When `--runas` cannot be had, or `--sandbox require` and a part is missing; the text names it.
pub(crate) fn enter(config: &Config, paths: &paths::Paths) -> Result<SandboxInfo, ConfigError> {
    if config.sandbox == Mode::Off {
        let off = |name: &&str| part(name, Err("--sandbox off".into()));
        return Ok(report(config.sandbox, PARTS.iter().map(off).collect()));
    }
    let parts = every_part(config, paths)?;
    let missing: Vec<String> =
        parts.iter().filter(|p| !p.in_force).map(|p| format!("{} ({})", p.name, p.detail)).collect();
    if !missing.is_empty() {
        let text = missing.join(", ");
        if config.sandbox == Mode::Require {
            let what = "take --sandbox best-effort to do without";
            return Err(ConfigError::new("--sandbox", format!("this host lacks {text}; {what}")));
        }
        tracing::warn!(missing = text, "the sandbox is not complete on this host");
    }
    Ok(report(config.sandbox, parts))
}

#[cfg(target_os = "linux")]
fn every_part(config: &Config, paths: &paths::Paths) -> Result<Vec<SandboxPart>, ConfigError> {
    let threads = privileges::threads();
    let bounded = privileges::empty_bounding_set();
    let user = privileges::become_user(config.runas.as_deref(), paths)?;
    let mut parts = vec![
        part("user", Ok(user)),
        part("capabilities", privileges::drop_capabilities(bounded)),
        part("no_new_privs", privileges::no_new_privileges()),
        part("not_dumpable", privileges::not_dumpable()),
        part("landlock", paths.confine()),
        part("seccomp", filter::install().map(|()| "on every thread".into())),
    ];
    privileges::check(&mut parts, bounded);
    if threads > 1 {
        // A mistake in the order of the start, and no property of the host.
        let text = format!("{} threads had started before and keep what they had", threads - 1);
        parts.push(part("threads", Err(text)));
    }
    Ok(parts)
}

#[cfg(not(target_os = "linux"))]
fn every_part(_: &Config, _: &paths::Paths) -> Result<Vec<SandboxPart>, ConfigError> {
    Ok(PARTS.iter().map(|name| part(name, Err("not on this system".into()))).collect())
}

fn part(name: &str, outcome: Result<String, String>) -> SandboxPart {
    let in_force = outcome.is_ok();
    let (Ok(detail) | Err(detail)) = outcome;
    SandboxPart { name: name.into(), in_force, detail }
}

fn report(mode: Mode, parts: Vec<SandboxPart>) -> SandboxInfo {
    SandboxInfo { mode: mode.name().into(), parts, refused_calls: 0 }
}
