//! The real `portway-agent run` in a network namespace: a guest without a VM.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    namespace: PathBuf,
}

/// The agent's binary: `PORTWAY_AGENT_BIN`, else the one beside these tests.
///
/// # Errors
/// When it is not there.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PORTWAY_AGENT_BIN") {
        return Ok(path.into());
    }
    let path = crate::vm::portway()?.with_file_name("portway-agent");
    ensure!(path.exists(), "no {}: cargo build -p portway-agent, or set PORTWAY_AGENT_BIN", path.display());
    Ok(path)
}

/// A command that runs in a namespace.
fn inside(namespace: &Path, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).arg(program);
    command
}

impl Agent {
    /// Starts one in `namespace` that comes to the host's socket `host`; its files are in `dir`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(dir: &Path, namespace: &Namespace, host: &Path, options: &[&str]) -> Result<Self> {
        let (socket, log) = (dir.join("local.sock"), dir.join("agent.log"));
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = inside(&namespace.path(), &binary()?);
        command.arg("run").arg("--host").arg(format!("unix:{}", host.display()));
        // The clock is this machine's.
        command.arg("--socket").arg(&socket).arg("--no-clock").args(options);
        let child =
            command.stdin(Stdio::null()).stderr(file).spawn().context("nsenter (package util-linux)")?;
        Ok(Self { child, socket, log, namespace: namespace.path() })
    }

    /// What it has said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// One of its commands, run in its namespace.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        let mut command = inside(&self.namespace, &binary()?);
        Ok(command.args(args).arg("--socket").arg(&self.socket).output()?)
    }

    /// Where other programs of the guest ask.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A program in its namespace.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        inside(&self.namespace, program)
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        // nsenter becomes the program.
        self.child.id()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
