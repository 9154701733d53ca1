//! The real `portway serve`, on paths of its own, ended with the test.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::namespace::Namespace;

/// A running sidecar with one `qemu` listener.
#[derive(Debug)]
pub struct Sidecar {
    /// Its directory: `vm` and `api` sockets, `pid`, `log`.
    pub dir: PathBuf,
    child: Child,
}

impl Sidecar {
    /// Starts `portway serve` with `options` more, and waits until it says that it is ready.
    ///
    /// # Errors
    /// When it ends before that; its log is in the error.
    pub fn start(dir: &Path, options: &[&str]) -> Result<Self> {
        Self::start_by(Command::new(crate::vm::portway()?), dir, options)
    }

    /// The same in a network namespace: its sockets, routes and sysctls are the host's.
    ///
    /// # Errors
    /// As of [`Self::start`].
    pub fn start_in(namespace: &Namespace, dir: &Path, options: &[&str]) -> Result<Self> {
        let portway = crate::vm::portway()?;
        Self::start_by(namespace.command(&portway.display().to_string()), dir, options)
    }

    /// As [`Self::start`], by a command that ends in the program: another user's, a tracer's.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_by(mut command: Command, dir: &Path, options: &[&str]) -> Result<Self> {
        let (ready, theirs) = nix::unistd::pipe()?;
        let log = std::fs::File::create(dir.join("log"))?;
        let fd = theirs.as_raw_fd();
        command.arg("serve").arg("--link").arg(format!("qemu:unix:{},name=web", dir.join("vm").display()));
        command.arg("--api").arg(format!("unix:{}", dir.join("api").display()));
        command.arg("--ready-fd").arg(fd.to_string()).arg("--pid-file").arg(dir.join("pid")).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // The pipe must outlive exec: nix makes it without close-on-exec.
        let child = command.spawn().context("portway serve")?;
        drop::<OwnedFd>(theirs);
        let mut line = String::new();
        BufReader::new(std::fs::File::from(ready)).read_line(&mut line)?;
        let sidecar = Self { dir: dir.to_owned(), child };
        ensure!(line == "ready\n", "not ready: {}", sidecar.log());
        Ok(sidecar)
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The process that was started.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// The CPU time it has used.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // proc(5): user and system time are the 12th and 13th field after the name, in ticks of 10 ms.
        let after = stat.rsplit_once(')').context("no name")?.1;
        let mut ticks = 0;
        for field in after.split_whitespace().skip(11).take(2) {
            ticks += field.parse::<u64>()?;
        }
        Ok(Duration::from_millis(ticks * 10))
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        Ok(kib.context("VmRSS")?.trim().parse::<u64>()? * 1024)
    }

    /// A command of the CLI about this network.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        let api = format!("unix:{}", self.dir.join("api").display());
        Ok(Command::new(crate::vm::portway()?).args(args).args(["--api", &api]).output()?)
    }

    /// A listing of the CLI as JSON.
    ///
    /// # Errors
    /// When the command fails, or prints something else.
    pub fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let out = self.cli(&[args, &["--format", "json"]].concat())?;
        ensure!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(serde_json::from_slice(&out.stdout)?)
    }

    /// Asks it to end, and waits.
    ///
    /// # Errors
    /// When it does not end within 10 s.
    pub fn stop(mut self) -> Result<ExitStatus> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let mut status = None;
        until(Duration::from_secs(10), || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        status.context("no status")
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again until `done`, a moment apart.
///
/// # Errors
/// When the time is over.
pub fn until(time: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + time;
    while !done() {
        if Instant::now() > deadline {
            bail!("not within {time:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
