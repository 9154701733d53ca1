//! `portway vms | stop | kill | console | wait`: VMs that `portway run` has started.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use portway_launcher::console::{self, Left};
use portway_launcher::{VmInfo, control};

use super::run::{failure, registry};
use super::{Failure, Format, listing};

/// A VM that runs.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// Its name or the process id of its launcher; not needed when only one runs
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

impl Which {
    fn find(&self) -> Result<VmInfo, Failure> {
        control::find(&registry()?, self.name.as_deref()).map_err(failure)
    }
}

pub(super) fn list(format: Format) -> Result<ExitCode, Failure> {
    let vms = portway_launcher::list(&registry()?).map_err(Failure::failed)?;
    match format {
        Format::Json => listing::json(&vms),
        Format::Table => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            listing::vms(&vms, now);
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn stop(which: &Which) -> Result<ExitCode, Failure> {
    let vm = which.find()?;
    let ended = control::stop(&registry()?, &vm).map_err(failure)?;
    tell(&vm, &ended);
    // One that had to be killed was not stopped.
    Ok(if ended.code == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(super) fn kill(which: &Which) -> Result<ExitCode, Failure> {
    let vm = which.find()?;
    tell(&vm, &control::kill(&registry()?, &vm).map_err(failure)?);
    Ok(ExitCode::SUCCESS)
}

/// The exit code is the VM's.
pub(super) fn wait(which: &Which) -> Result<ExitCode, Failure> {
    let vm = which.find()?;
    let ended = control::wait(&registry()?, &vm).map_err(failure)?;
    tell(&vm, &ended);
    Ok(ExitCode::from(ended.code))
}

pub(super) fn console(which: &Which) -> Result<ExitCode, Failure> {
    let vm = which.find()?;
    if vm.detached {
        listing::complain(&format!("the console of {}; Ctrl-] leaves it", vm.name));
    }
    let program = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot find this program: {error}")))?;
    let left = console::console(&vm, &program).map_err(failure)?;
    if left == Left::Ended {
        listing::complain(&format!("{} has ended", vm.name));
    }
    Ok(ExitCode::from(console::exit_code(left)))
}

fn tell(vm: &VmInfo, ended: &control::Ended) {
    listing::say(&format!("{}: {}", vm.name, ended.words));
}
