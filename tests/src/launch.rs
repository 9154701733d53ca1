//! The lab of the launcher's tests: `portway run` in directories of its own, in the background, on a terminal (tmux), and
//! what it leaves behind.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::sidecar::until;
use crate::vm::{guest_image, portway};

/// Whether QEMU is there; says that the test is skipped when it is not.
#[must_use]
pub fn has_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: no qemu-system-x86_64 in PATH (tests/setup.sh says what to install)");
    }
    found
}

/// A path as text.
#[must_use]
pub fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// `portway` with a runtime directory of its own.
///
/// # Errors
/// When it cannot be run.
pub fn cli(dir: &Path, words: &[&str]) -> Result<Output> {
    let out = Command::new(portway()?)
        .args(words)
        .env("XDG_RUNTIME_DIR", dir)
        .env("XDG_STATE_HOME", dir)
        .stdin(Stdio::null())
        .output()?;
    Ok(out)
}

/// What a program said, on both of its outputs.
#[must_use]
pub fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Every file and directory below.
///
/// # Errors
/// When a directory cannot be read.
pub fn tree(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(tree(&path)?);
        }
        all.push(path);
    }
    all.sort();
    Ok(all)
}

/// A VM in the background, killed with the test.
#[derive(Debug)]
pub struct Detached<'a> {
    dir: &'a Path,
    name: &'static str,
}

impl<'a> Detached<'a> {
    /// Starts it with `run --detach`.
    ///
    /// # Errors
    /// When it does not start; with what it said.
    pub fn start(dir: &'a Path, name: &'static str, options: &[&str]) -> Result<Self> {
        let vm = Self { dir, name };
        let (image, state) = (guest_image()?.display().to_string(), vm.state(""));
        let words = ["run", "--detach", "--name", name, "--mem", "256", "--state-dir", &state];
        let out = vm.portway(&[&words[..], options, &[&image]].concat())?;
        ensure!(out.status.success(), "{}", said(&out));
        ensure!(out.stdout == format!("{name}\n").into_bytes(), "{}", said(&out));
        Ok(vm)
    }

    /// Runs `portway` beside it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn portway(&self, words: &[&str]) -> Result<Output> {
        cli(self.dir, words)
    }

    /// A file of its state directory.
    #[must_use]
    pub fn state(&self, file: &str) -> String {
        path(self.dir, &format!("state-{}/{file}", self.name))
    }

    /// Waits for a text on its console.
    ///
    /// # Errors
    /// When it does not come; with what did.
    pub fn await_console(&self, text: &str) -> Result<()> {
        let log = || fs::read(self.state("console.log")).unwrap_or_default();
        let waited = until(Duration::from_secs(120), || String::from_utf8_lossy(&log()).contains(text));
        waited.with_context(|| format!("no {text:?}:\n{}", String::from_utf8_lossy(&log())))
    }

    /// Types a command on the console and waits for what it says.
    ///
    /// # Errors
    /// When it does not say it.
    pub fn types(&self, command: &str, answer: &str) -> Result<()> {
        let mut console = UnixStream::connect(self.state("console.sock")).context("console.sock")?;
        console.write_all(format!("\n{command}\n").as_bytes())?;
        // A console that nobody reads stops the guest at its next lines.
        let mut unread = console.try_clone()?;
        let reading = std::thread::spawn(move || std::io::copy(&mut unread, &mut std::io::sink()));
        let answered = self.await_console(answer);
        console.shutdown(std::net::Shutdown::Both)?;
        reading.join().ok().context("the reader panicked")??;
        answered
    }

    /// What `portway vms` lists.
    ///
    /// # Errors
    /// When it lists nothing that is JSON.
    pub fn vms(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&self.portway(&["vms", "--format", "json"])?.stdout)?)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let _ = self.portway(&["kill", self.name]);
    }
}

/// tmux with a server of its own.
#[derive(Debug)]
pub struct Terminal {
    socket: String,
}

impl Terminal {
    /// Starts it with a command typed.
    ///
    /// # Errors
    /// When tmux does not start.
    pub fn start(dir: &Path, command: &str) -> Result<Self> {
        let terminal = Self { socket: path(dir, "tmux") };
        terminal.tmux(&["new-session", "-d", "-x", "120", "-y", "40", "bash --norc --noprofile"])?;
        terminal.types(&[command, "Enter"])?;
        Ok(terminal)
    }

    fn tmux(&self, words: &[&str]) -> Result<String> {
        let out = Command::new("tmux").arg("-S").arg(&self.socket).args(words).output().context("tmux")?;
        ensure!(out.status.success(), "tmux {words:?}: {}", said(&out));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Types keys, by tmux's names.
    ///
    /// # Errors
    /// When tmux is gone.
    pub fn types(&self, keys: &[&str]) -> Result<()> {
        self.tmux(&[&["send-keys"], keys].concat()).map(drop)
    }

    /// Waits until the screen has a text.
    ///
    /// # Errors
    /// When it does not come; with the screen.
    pub fn shows(&self, text: &str) -> Result<()> {
        let screen = || self.tmux(&["capture-pane", "-p", "-J"]).unwrap_or_default();
        until(Duration::from_secs(120), || screen().contains(text))
            .with_context(|| format!("no {text:?}:\n{}", screen()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

/// Sockets, and other things that belong to a running VM alone.
///
/// # Errors
/// When a directory cannot be read.
pub fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let is_left = |path: &PathBuf| {
        let socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        socket || name == "tmp" || name.ends_with(".new") || path.parent().is_some_and(|p| p.ends_with("vms"))
    };
    Ok(tree(dir)?.into_iter().filter(is_left).collect())
}

/// Processes that were started with this runtime directory, zombies excepted.
///
/// # Errors
/// When /proc cannot be read.
pub fn processes(dir: &Path) -> Result<Vec<String>> {
    Ok(every_process(dir)?.into_iter().map(|(_, line)| line).collect())
}

/// The process among these that has a word in its command line.
///
/// # Errors
/// When there is none, or /proc cannot be read.
pub fn process(dir: &Path, word: &str) -> Result<Pid> {
    let mut all = every_process(dir)?.into_iter();
    let found =
        all.find(|(_, line)| line.split(' ').any(|part| part == word || part.ends_with(&format!("/{word}"))));
    found.map(|(pid, _)| pid).with_context(|| format!("no process has {word:?}"))
}

fn every_process(dir: &Path) -> Result<Vec<(Pid, String)>> {
    let mark = format!("XDG_RUNTIME_DIR={}\0", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // A process that ends meanwhile is none.
        let environment = fs::read(path.join("environ")).unwrap_or_default();
        if environment.windows(mark.len()).any(|bytes| bytes == mark.as_bytes()) {
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            let number = path.file_name().unwrap_or_default().to_string_lossy().parse()?;
            found.push((Pid::from_raw(number), String::from_utf8_lossy(&line).replace('\0', " ")));
        }
    }
    Ok(found)
}
