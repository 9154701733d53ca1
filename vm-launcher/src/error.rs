//! Why a VM could not be run; each is one line for a person, with what to do.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why `run` failed. The program's exit code is [`LaunchError::exit_code`].
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// One of the image's files is missing or cannot be read.
    #[error("cannot read the {what} {}: {reason}; {advice}", path.display())]
    Image {
        /// `kernel`, `initrd` or `command line`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// The kernel is not one that this guest can boot.
    #[error("kernel {}: {reason}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Something asked for that cannot be: the setting, the value, what to do.
    #[error("{0}")]
    Setting(String),
    /// A disk could not be made or read.
    #[error("--disk {}: {reason}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// There is no QEMU.
    #[error("QEMU is missing ({why}): apt-get install {package}, or give its path with --qemu")]
    NoQemu {
        /// What was looked for.
        why: String,
        /// The package that has it.
        package: &'static str,
    },
    /// There is no vfkit.
    #[error("vfkit is missing ({0}): brew install vfkit, or give its path with --vfkit")]
    NoVfkit(String),
    /// An accelerator was asked for that cannot be had.
    #[error("--accel {0} cannot be used: {1}; --accel tcg works everywhere, more slowly")]
    NoAccel(&'static str, String),
    /// The state directory cannot be used.
    #[error("state directory {}: {reason}", path.display())]
    State {
        /// The directory or the file in it.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A process could not be started.
    #[error("cannot start {program}: {error}")]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        error: io::Error,
    },
    /// The sidecar ended before it was ready: its own words say why (a bad spec, a port in use).
    #[error("{reason}")]
    SidecarNotReady {
        /// How it ended.
        status: ExitStatus,
        /// The last line it said.
        reason: String,
    },
    /// The sidecar neither became ready nor ended.
    #[error("the network was not ready after {} s:\n{log}", after.as_secs())]
    SidecarSilent {
        /// How long we waited.
        after: Duration,
        /// The last lines of its log.
        log: String,
    },
    /// The sidecar ended under a running VM, which was then ended too.
    #[error("the network ended ({status}), so the VM was ended too:\n{log}")]
    SidecarDied {
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// A network that VMs share did not take this one.
    #[error("network {network}: {reason}")]
    NotJoined {
        /// Its name.
        network: String,
        /// Its own words.
        reason: String,
    },
    /// A network that VMs share ended under a running VM, which was then ended too.
    #[error("the network ended, so the VM was ended too:\n{log}")]
    NetworkLost {
        /// The last lines of its log.
        log: String,
    },
    /// Who serves a share ended under a running VM, which was then ended too.
    #[error("virtiofsd of {tag} ended ({status}), so the VM was ended too:\n{log}")]
    ShareDied {
        /// The share.
        tag: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// The hypervisor failed, or was killed by somebody else.
    #[error("{program} ended ({status}), so the network was ended too:\n{log}")]
    VmDied {
        /// Which.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of what it said.
        log: String,
    },
    /// The guest did not power off and was killed.
    #[error("the VM was killed: {0}")]
    Killed(String),
    /// A signal came before the VM was started.
    #[error("{0} came before the VM was started")]
    Interrupted(&'static str),
    /// The system refused something that always works.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

impl LaunchError {
    /// 2 for what the user asked for wrongly, the process's own code where it has one, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setting(_) | Self::NotJoined { .. } => 2,
            Self::SidecarNotReady { status, .. } | Self::VmDied { status, .. } => {
                status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1)
            }
            _ => 1,
        }
    }

    pub(crate) fn system(what: &'static str, error: impl Into<io::Error>) -> Self {
        Self::System { what, error: error.into() }
    }
}
