//! What is done to a VM that runs already: find it by name, stop it, kill it, wait for it.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::process::timeout;
use crate::registry::{self, VmInfo};
use crate::sys::Watched;
use crate::{LaunchError, state};

/// How much longer than its own deadline a launcher may take to end: sidecar, files, guard.
const SLACK: Duration = Duration::from_secs(15);
/// How long the guard of a launcher that was killed may take to note the end.
const NOTE_PATIENCE: Duration = Duration::from_secs(10);
const NOTE_POLL: Duration = Duration::from_millis(20);

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The launcher's exit code; 137 when it was killed itself.
    pub code: u8,
    /// The launcher's last words.
    pub words: String,
}

/// Finds a VM that runs: by name, or the only one.
///
/// # Errors
/// When there is none, or more than one that may be meant; the text names them.
pub fn find(registry: &Path, name: Option<&str>) -> Result<VmInfo, LaunchError> {
    let vms = registry::list(registry)
        .map_err(|error| LaunchError::State { path: registry.to_owned(), reason: error.to_string() })?;
    let names = |vms: &[VmInfo]| vms.iter().map(|vm| vm.name.clone()).collect::<Vec<_>>().join(", ");
    let setting = |text: String| Err(LaunchError::Setting(text));
    let all = names(&vms);
    let meant: Vec<VmInfo> = vms
        .into_iter()
        .filter(|vm| name.is_none_or(|name| vm.name == name || vm.pid.to_string() == name))
        .collect();
    match (meant.as_slice(), name) {
        ([one], _) => Ok(one.clone()),
        ([], _) if all.is_empty() => setting("no VM runs: portway vms lists those that do".into()),
        ([], name) => setting(format!("no VM is called {:?}: there are {all}", name.unwrap_or_default())),
        (_, None) => setting(format!("several VMs run: say which of {all}")),
        (several, Some(name)) => {
            let pids: Vec<String> = several.iter().map(|vm| vm.pid.to_string()).collect();
            setting(format!(
                "several VMs are called {name:?}: say which by its process id, {}",
                pids.join(" or ")
            ))
        }
    }
}

/// A launcher that surely is this VM's.
struct Launcher {
    process: Watched,
}

impl Launcher {
    fn of(registry: &Path, vm: &VmInfo) -> Result<Option<Self>, LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot watch the VM's launcher", error);
        let pid = i32::try_from(vm.pid).map_err(|error| failed(io::Error::other(error)))?;
        let process = match Watched::open(Pid::from_raw(pid)) {
            Ok(process) => process,
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        // The number is still this launcher's if its file is still locked: it was when the process was opened.
        let lives = registry::list(registry).map_err(failed)?.contains(vm);
        Ok(lives.then_some(Self { process }))
    }

    fn signal(&self, signal: Signal) -> Result<(), LaunchError> {
        match self.process.signal(signal) {
            Err(error) if error.raw_os_error() != Some(Errno::ESRCH as i32) => {
                Err(LaunchError::system("cannot signal the VM's launcher", error))
            }
            _ => Ok(()),
        }
    }

    /// Whether it ends before the deadline; without one it is waited for as long as it takes.
    fn ends(&self, deadline: Option<Instant>) -> Result<bool, LaunchError> {
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let mut waited = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waited, left.map_or(PollTimeout::NONE, timeout)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(LaunchError::system("cannot wait for the VM", errno)),
            }
        }
    }
}

/// Presses the VM's power button and waits for its end. A launcher that was suspended is continued for that.
///
/// # Errors
/// When it cannot be told, or does not end.
pub fn stop(registry: &Path, vm: &VmInfo) -> Result<Ended, LaunchError> {
    if let Some(launcher) = Launcher::of(registry, vm)? {
        launcher.signal(Signal::SIGTERM)?;
        launcher.signal(Signal::SIGCONT)?;
        let patience = Duration::from_secs(vm.stop_timeout_s) + SLACK;
        if !launcher.ends(Some(Instant::now() + patience))? {
            return Err(LaunchError::Killed(format!(
                "{} did not end within {} s: portway kill {}",
                vm.name,
                patience.as_secs(),
                vm.name
            )));
        }
    }
    Ok(ended(vm))
}

/// Ends the VM at once, and everything that belongs to it.
///
/// # Errors
/// When it cannot be told.
pub fn kill(registry: &Path, vm: &VmInfo) -> Result<Ended, LaunchError> {
    if let Some(launcher) = Launcher::of(registry, vm)? {
        launcher.signal(Signal::SIGQUIT)?;
        launcher.signal(Signal::SIGCONT)?;
        if !launcher.ends(Some(Instant::now() + SLACK))? {
            // Its guard does the rest.
            launcher.signal(Signal::SIGKILL)?;
            launcher.ends(None)?;
        }
    }
    Ok(ended(vm))
}

/// Waits for the VM's end, however long that takes.
///
/// # Errors
/// When it cannot be waited for.
pub fn wait(registry: &Path, vm: &VmInfo) -> Result<Ended, LaunchError> {
    if let Some(launcher) = Launcher::of(registry, vm)? {
        launcher.ends(None)?;
    }
    Ok(ended(vm))
}

/// How it ended, by its own note or its guard's.
fn ended(vm: &VmInfo) -> Ended {
    let deadline = Instant::now() + NOTE_PATIENCE;
    loop {
        let note = fs::read_to_string(vm.state_dir.join(state::END)).unwrap_or_default();
        if let Some((code, words)) = note.split_once(' ')
            && let Ok(code) = code.parse()
        {
            return Ended { code, words: words.trim().to_owned() };
        }
        if Instant::now() >= deadline {
            return Ended { code: 1, words: "it left no note of its end".into() };
        }
        thread::sleep(NOTE_POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_is_not_there_is_said_so() {
        let error = find(Path::new("/nonexistent"), Some("web")).expect_err("there is none");
        assert!(error.to_string().contains("no VM runs"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
