//! The real binary under another program's name, as its callers start it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::sidecar::until;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A symlink `name` to the binary, in `dir`.
///
/// # Errors
/// When there is no binary, or the link cannot be made.
pub fn named(dir: &Path, name: &str) -> Result<PathBuf> {
    let link = dir.join(name);
    if !link.exists() {
        std::os::unix::fs::symlink(crate::vm::portway()?, &link)?;
    }
    Ok(link)
}

/// A running program; killed with the value.
#[derive(Debug)]
pub struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts `command`; what it says goes to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = std::fs::File::create(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// What it has said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `done`.
    ///
    /// # Errors
    /// When the time is over or the program has ended; what it said is in the error.
    pub fn until(&mut self, what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
        let mut ended = None;
        let waited = until(PATIENCE, || {
            let now = done();
            ended = if now { None } else { self.child.try_wait().ok().flatten() };
            now || ended.is_some()
        });
        ensure!(ended.is_none(), "{what}: it ended with {ended:?}: {}", self.log());
        waited.with_context(|| format!("{what}: {}", self.log()))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        until(PATIENCE, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })
        .with_context(|| format!("it does not end: {}", self.log()))?;
        status.context("no status")
    }

    /// Asks it to end, and waits.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        self.end()
    }

    /// Ends it by SIGKILL, which leaves it no time to clean up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends `request` to the socket at `path`, ends, and returns what comes back.
///
/// # Errors
/// When nobody is there, or no end comes in time.
pub fn ask(path: &Path, request: &[u8]) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // It may answer and close before it has read everything.
    let _ = stream.write_all(request);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Runs `rootlesskit` with `options` and a shell script. `None`, said on standard error, where it cannot run.
///
/// # Errors
/// When it cannot be started.
pub fn rootlesskit(dir: &Path, options: &[&str], script: &str, log: &Path) -> Result<Option<Program>> {
    let there = |program: &str| Command::new(program).arg("--help").output().is_ok();
    if !nix::unistd::geteuid().is_root() || !there("rootlesskit") || !there("newuidmap") {
        eprintln!("skipped: rootlesskit and newuidmap are needed, and root, which lends them ids");
        return Ok(None);
    }
    // Root has no ids to lend; a mount namespace gives it some, and leaves the machine's files alone.
    let ids = dir.join("subid");
    std::fs::write(&ids, "root:100000:65536\n")?;
    let mounts =
        "mount --bind \"$0\" /etc/subuid && mount --bind \"$0\" /etc/subgid && exec rootlesskit \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", mounts]).arg(&ids).args(options).args(["sh", "-ec", script]);
    Program::start(&mut command, log).map(Some)
}

/// Whether rootlesskit cannot do what it was told because of how it was built; said on standard error.
#[must_use]
pub fn left_out(kit: &Program) -> bool {
    let out = kit.log().contains("not supported in this Debian package");
    if out {
        eprintln!("skipped: Debian's rootlesskit is built without this network driver");
    }
    out
}

/// Runs a program to its end.
///
/// # Errors
/// When it cannot be started.
pub fn run(program: &Path, args: &[&str]) -> Result<Output> {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| program.display().to_string())
}
