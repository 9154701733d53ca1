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
    /// A number that makes no VM.
    #[error("{0}")]
    Setting(String),
    /// There is no QEMU.
    #[error("QEMU is missing ({0}): apt-get install qemu-system-x86, or give its path with --qemu")]
    NoQemu(String),
    /// `--accel kvm` and no KVM.
    #[error("KVM cannot be used: {0}; --accel tcg works everywhere, more slowly")]
    NoKvm(String),
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
    /// QEMU failed, or was killed by somebody else.
    #[error("QEMU ended ({status}), so the network was ended too:\n{log}")]
    QemuDied {
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
            Self::Setting(_) => 2,
            Self::SidecarNotReady { status, .. } | Self::QemuDied { status, .. } => {
                status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1)
            }
            _ => 1,
        }
    }

    pub(crate) fn system(what: &'static str, error: impl Into<io::Error>) -> Self {
        Self::System { what, error: error.into() }
    }
}
