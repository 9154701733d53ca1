//! A launcher in the background: `run --detach` answers when the VM runs, and the VM stays.
//!
//! The child goes on as the launcher. Until the machine runs it belongs to the terminal, speaks there and ends with Ctrl-C;
//! then it has a session of its own, and what it says goes to `launcher.log` of the state directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use crate::{LaunchError, sys};

const LOG: &str = "launcher.log";

/// Who goes on after [`detach`].
#[derive(Debug)]
pub enum Side {
    /// The one that was started: the VM runs, or this is the exit code of a launcher that could not start it and has said why.
    Front(Result<(), u8>),
    /// The launcher.
    Launcher(Leave),
}

/// The launcher's tie to the terminal.
#[derive(Debug)]
pub struct Leave {
    front: File,
    log: PathBuf,
}

/// Divides the process in two. It must have one thread.
///
/// # Errors
/// When the system refuses a pipe or a process.
pub fn detach(state_dir: &Path) -> Result<Side, LaunchError> {
    let failed = |error: io::Error| LaunchError::system("cannot go into the background", error);
    let (read, write) = sys::pipe().map_err(failed)?;
    match sys::fork().map_err(failed)? {
        Some(child) => {
            drop(write);
            let mut told = Vec::new();
            File::from(read).read_to_end(&mut told).map_err(failed)?;
            if told == b"running" {
                return Ok(Side::Front(Ok(())));
            }
            let code = match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => u8::try_from(code).unwrap_or(1),
                _ => 1,
            };
            Ok(Side::Front(Err(code.max(1))))
        }
        None => {
            let null = File::open("/dev/null").map_err(failed)?;
            dup2_stdin(&null).map_err(|errno| failed(errno.into()))?;
            Ok(Side::Launcher(Leave { front: write.into(), log: state_dir.join(LOG) }))
        }
    }
}

impl Leave {
    /// The machine runs: lets the terminal go.
    ///
    /// # Errors
    /// When the log cannot be opened.
    pub fn leave(mut self) -> Result<(), LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot go into the background", error);
        let log = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&self.log);
        let log =
            log.map_err(|error| LaunchError::State { path: self.log.clone(), reason: error.to_string() })?;
        setsid().map_err(|errno| failed(errno.into()))?;
        dup2_stdout(&log).and_then(|()| dup2_stderr(&log)).map_err(|errno| failed(errno.into()))?;
        // One who has stopped waiting is not told.
        let _ = self.front.write_all(b"running");
        Ok(())
    }
}
