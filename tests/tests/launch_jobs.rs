//! `portway run` as a job of an interactive shell on a terminal (tmux): in the background it leaves the terminal alone and ends by
//! signals, in the foreground it has the keys, suspended it stands still.
//!
//! Needs QEMU and tmux (`tests/setup.sh`); without QEMU the tests are skipped, with a line that says so.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portway_tests::launch::{Terminal, has_qemu, path, process, processes, sockets};
use portway_tests::sidecar::until;
use portway_tests::vm::{guest_image, portway};

/// A guest under TCG takes some seconds; on a busy machine some more.
const BOOT: Duration = Duration::from_secs(120);
/// What everything else may take.
const SOON: Duration = Duration::from_secs(30);

/// The command that starts the job; what it and the guest say is in a file.
fn job(dir: &Path) -> Result<String> {
    Ok(format!(
        "clear; XDG_RUNTIME_DIR={} {} run --net none --mem 256 --state-dir {} {} > {} 2>&1 &",
        dir.display(),
        fs::canonicalize(portway()?)?.display(),
        path(dir, "state"),
        fs::canonicalize(guest_image()?.parent().context("a directory")?)?
            .join(guest_image()?.file_name().context("a name")?)
            .display(),
        path(dir, "out"),
    ))
}

fn said(dir: &Path) -> String {
    String::from_utf8_lossy(&fs::read(dir.join("out")).unwrap_or_default()).into_owned()
}

fn says(dir: &Path, text: &str, patience: Duration) -> Result<()> {
    until(patience, || said(dir).contains(text)).with_context(|| format!("no {text:?}:\n{}", said(dir)))
}

/// The letter of proc_pid_stat(5): T is stopped.
fn is_stopped(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// The job has ended by the guest's power-down, with exit code 0, and nothing is left.
fn ended_well(dir: &Path) -> Result<()> {
    says(dir, "the VM ended (guest-shutdown)", SOON)?;
    let left = || processes(dir).unwrap_or_default();
    until(SOON, || left().is_empty()).with_context(|| format!("{:?}", left()))?;
    let end = fs::read_to_string(dir.join("state/end"))?;
    ensure!(end.starts_with("0 "), "{end}");
    ensure!(sockets(&dir.join("state"))?.is_empty(), "{:?}", sockets(dir)?);
    Ok(())
}

#[test]
fn in_the_background_it_boots_leaves_the_terminal_alone_and_is_powered_down_by_sigterm() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let terminal = Terminal::start(dir.path(), &job(dir.path())?)?;
    says(dir.path(), "/ # ", BOOT)?;
    // The keys are the shell's all the while, and a job that was stopped by the terminal would be listed so.
    terminal.types(&["jobs; echo shell-$((40+2)); stty -a", "Enter"])?;
    terminal.shows("Running")?;
    terminal.shows("shell-42")?;
    terminal.shows(" icrnl")?;
    ensure!(!said(dir.path()).contains("shell-42"), "the guest got the shell's keys");
    kill(process(dir.path(), "run")?, Signal::SIGTERM)?;
    ended_well(dir.path())
}

#[test]
fn in_the_foreground_the_keys_are_the_guests_and_a_suspended_job_stands_still_until_it_goes_on() -> Result<()>
{
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let terminal = Terminal::start(dir.path(), &job(dir.path())?)?;
    says(dir.path(), "/ # ", BOOT)?;
    let (launcher, qemu) = (process(dir.path(), "run")?, process(dir.path(), "qemu-system-x86_64")?);

    terminal.types(&["fg", "Enter"])?;
    // bash tells a job that runs nothing when it is brought to the foreground.
    let taken = || terminal.types(&["", "Enter"]).is_ok() && said(dir.path()).matches("/ #").count() > 1;
    until(SOON, taken).with_context(|| said(dir.path()))?;
    terminal.types(&["echo guest-$((40+2))", "Enter"])?;
    says(dir.path(), "guest-42", SOON)?;
    // Ctrl-C is the guest's too. One process says that it has begun and sleeps: a shell that is just starting one keeps the key.
    terminal.types(&["sh -c 'echo begun-$((40+2)); exec sleep 1000'", "Enter"])?;
    says(dir.path(), "begun-42", SOON)?;
    terminal.types(&["C-c"])?;
    terminal.types(&["echo status-$?", "Enter"])?;
    says(dir.path(), "status-130", SOON)?;

    kill(launcher, Signal::SIGTSTP)?;
    terminal.shows("Stopped")?;
    ensure!(is_stopped(launcher) && is_stopped(qemu), "the guest runs on");
    terminal.types(&["clear; stty -a", "Enter"])?;
    terminal.shows(" icrnl")?;
    terminal.types(&["clear; bg", "Enter"])?;
    until(SOON, || !is_stopped(launcher) && !is_stopped(qemu)).context("bg")?;
    terminal.types(&["echo shell-$((40+2))", "Enter"])?;
    terminal.shows("shell-42")?;

    terminal.types(&["fg", "Enter"])?;
    let before = said(dir.path()).matches("/ #").count();
    let taken = || terminal.types(&["", "Enter"]).is_ok() && said(dir.path()).matches("/ #").count() > before;
    until(SOON, taken).with_context(|| said(dir.path()))?;
    terminal.types(&["echo again-$((40+2))", "Enter"])?;
    says(dir.path(), "again-42", SOON)?;

    // Stopped while it has the terminal, and asked to end: it is continued for that.
    kill(launcher, Signal::SIGTSTP)?;
    until(SOON, || is_stopped(launcher)).context("stopped again")?;
    terminal.types(&["clear; kill -INT %1; bg", "Enter"])?;
    ended_well(dir.path())
}
