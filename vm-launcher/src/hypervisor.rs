//! A program that runs virtual machines: what the rest of the launcher needs of it.
//!
//! QEMU is the one of Linux, vfkit (Virtualization.framework) the one of macOS. Both are processes with a command line, a
//! control channel, and inherited descriptors for the link; everything else of a VM's life is the same for both.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::accel;
use crate::boot::Boot;
use crate::machine::Machine;
use crate::qemu::Wires;
use crate::state::StateDir;
use crate::{LaunchConfig, LaunchError, net};

/// A hypervisor that was found.
pub(crate) trait Hypervisor: fmt::Debug {
    /// As the user knows it.
    fn name(&self) -> &'static str;

    /// Its program.
    fn program(&self) -> &Path;

    /// Refuses what this hypervisor cannot do, with the option and what to do.
    fn check(&self, config: &LaunchConfig, boot: &Boot) -> Result<(), LaunchError>;

    /// What is going to run the guest's instructions.
    fn accel(&self, config: &LaunchConfig) -> Result<accel::Choice, LaunchError>;

    /// How the network card reaches the sidecar.
    fn net(&self, config: &LaunchConfig, accel: accel::Kind) -> net::Choice;

    /// Its arguments.
    fn arguments(&self, config: &LaunchConfig, machine: &Machine, wires: &Wires) -> Vec<OsString>;

    /// Our end of the control channel, and the end it inherits, if it does.
    fn control(&self, state: &StateDir) -> io::Result<(Box<dyn Control>, Option<OwnedFd>)>;

    /// Whether it takes listening sockets for QMP and the console.
    fn takes_sockets(&self) -> bool {
        false
    }

    /// Whether it insists on the terminal itself for its stdin; others take a pipe of what was typed.
    fn reads_the_terminal(&self) -> bool {
        false
    }

    /// Whether it serves shared directories itself.
    fn serves_shares(&self) -> bool {
        false
    }

    /// Files it makes in the state directory and leaves there when it is killed.
    fn leaves(&self, _state: &StateDir) -> Vec<PathBuf> {
        Vec::new()
    }
}

/// The control channel of a VM.
pub(crate) trait Control: fmt::Debug {
    /// Presses the guest's power button.
    fn power_down(&mut self) -> io::Result<()>;

    /// Takes in what the hypervisor has said, or asks it when it says nothing by itself.
    fn look(&mut self);

    /// What becomes readable when there is something to take in.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// When to look without that.
    fn look_at(&self) -> Option<Instant>;

    /// Whether the machine has been seen running.
    fn is_running(&self) -> bool;

    /// Why the machine stopped, in the hypervisor's word.
    fn shutdown_reason(&self) -> Option<&str>;
}
