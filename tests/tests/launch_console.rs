//! `portway console` on a terminal (tmux): what is typed is the guest's, and the terminal is as it was on every way out.
//!
//! Needs QEMU and tmux (`tests/setup.sh`); without QEMU the tests are skipped, with a line that says so.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use portway_tests::launch::{Detached, Terminal, has_qemu, path, process, said};
use portway_tests::sidecar::until;
use portway_tests::vm::portway;

/// A script that runs the console and says how it was left, and whether the terminal is as it was. Not an interactive shell:
/// that would put the terminal back itself.
fn script(dir: &Path, name: &str, vm: &str) -> Result<String> {
    let at = |suffix: &str| path(dir, &format!("{name}-{suffix}"));
    let text = format!(
        "stty -a > {before}\n\
         XDG_RUNTIME_DIR={dir} {portway} console {vm}\n\
         echo left=$?\n\
         for i in $(seq 200); do stty -a > {after}; cmp -s {before} {after} && break; sleep 0.05; done\n\
         cmp {before} {after} && echo {name} is-as-it-was\n",
        before = at("before"),
        after = at("after"),
        dir = dir.display(),
        portway = portway()?.display(),
    );
    fs::write(at("script"), text)?;
    Ok(format!("clear; bash {}", at("script")))
}

#[test]
fn keys_are_the_guests_and_the_terminal_is_as_it_was_however_the_console_is_left() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &["--net", "none"])?;
    vm.await_console("/ # ")?;
    let terminal = Terminal::start(dir.path(), &script(dir.path(), "asked", "web")?)?;
    terminal.shows("Ctrl-] leaves it")?;

    // Ctrl-C ends what runs in the guest, and neither the console nor the VM.
    terminal.types(&["", "Enter"])?;
    terminal.shows("/ #")?;
    terminal.types(&["echo begun-$((40+2)); sleep 1000; echo slept-to-its-end-$((40+2))", "Enter"])?;
    terminal.shows("begun-42")?;
    terminal.types(&["C-c"])?;
    terminal.shows("^C")?;
    terminal.types(&["echo status-$?", "Enter"])?;
    // 128 and SIGINT.
    terminal.shows("status-130")?;
    // Ctrl-D is the shell's end of input in the guest: it leaves that shell, and the next one greets.
    terminal.types(&["exec sh -c 'echo cat-begun-$((40+2)); cat; echo cat-ended-$((40+2)); sh'", "Enter"])?;
    terminal.shows("cat-begun-42")?;
    terminal.types(&["C-d"])?;
    terminal.shows("cat-ended-42")?;

    let again = vm.portway(&["console", "web"])?;
    ensure!(again.status.code() == Some(2) && said(&again).contains("in use"), "{}", said(&again));

    terminal.types(&["C-]"])?;
    terminal.shows("left=0")?;
    terminal.shows("asked is-as-it-was")?;

    for (name, signal, code) in [("told", Signal::SIGTERM, 143), ("killed", Signal::SIGKILL, 137)] {
        terminal.types(&[&script(dir.path(), name, "web")?, "Enter"])?;
        // Until the shell has cleared the screen, it shows the console before.
        let mut console = None;
        until(Duration::from_secs(20), || {
            console = process(dir.path(), "console").ok();
            console.is_some()
        })?;
        terminal.shows("Ctrl-] leaves it")?;
        terminal.types(&["", "Enter"])?;
        terminal.shows("/ #")?;
        kill(console.context("no console")?, signal)?;
        terminal.shows(&format!("left={code}"))?;
        terminal.shows(&format!("{name} is-as-it-was"))?;
    }
    ensure!(vm.vms()?[0]["name"] == "web", "the VM goes on");

    terminal.types(&[&script(dir.path(), "ended", "web")?, "Enter"])?;
    terminal.shows("Ctrl-] leaves it")?;
    let stopped = vm.portway(&["stop", "web"])?;
    ensure!(stopped.status.success(), "{}", said(&stopped));
    terminal.shows("web has ended")?;
    terminal.shows("left=0")?;
    terminal.shows("ended is-as-it-was")
}

#[test]
fn a_console_without_a_terminal_hands_on_what_comes_in_and_ends_with_the_vm() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &["--net", "none"])?;
    // What comes before there is a shell is lost.
    vm.await_console("/ # ")?;
    let mut console = Command::new(portway()?)
        .args(["console", "web"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = console.stdin.take().context("a pipe")?;
    // The end of input is not the end of the console: what the guest says to it is still to come.
    std::io::Write::write_all(&mut input, b"\necho piped-$((40+2)); poweroff -f\n")?;
    drop(input);
    let mut out = None;
    until(Duration::from_secs(60), || {
        out = console.try_wait().ok().flatten();
        out.is_some()
    })?;
    let out = console.wait_with_output()?;
    ensure!(out.status.success() && said(&out).contains("piped-42"), "{}: {}", out.status, said(&out));
    Ok(())
}
