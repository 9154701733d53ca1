//! What the processes of `portway run` may do, read from `/proc` while a VM runs: no new privileges, filtered system calls, and
//! no descriptor that they have no use for.
//!
//! Needs QEMU (`tests/setup.sh`); without it the test is skipped, with a line that says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use portway_tests::launch::{has_qemu, path, process, said};
use portway_tests::vm::{guest_image, portway};

/// The value of a line of proc_pid_status(5).
fn status(pid: Pid, key: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {key} of {pid}"))?.trim().to_owned())
}

/// What its descriptors are, by proc_pid_fd(5).
fn descriptors(pid: Pid) -> Result<Vec<PathBuf>> {
    let links = fs::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(links.flatten().filter_map(|link| fs::read_link(link.path()).ok()).collect())
}

/// Ends the VM with the test.
struct Vm<'a>(&'a Path);

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        if let Ok(portway) = portway() {
            let _ = Command::new(portway).args(["kill", "hard"]).env("XDG_RUNTIME_DIR", self.0).output();
        }
    }
}

#[test]
fn the_vms_processes_have_no_privileges_to_gain_and_no_descriptor_of_others() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let stray = dir.path().join("of-somebody-else");
    fs::write(&stray, "")?;
    // A shell that leaves a file open to what it starts, as shells do.
    let out = Command::new("bash")
        .args(["-c", "exec 9< \"$1\"; shift; exec \"$@\"", "bash"])
        .arg(&stray)
        .arg(portway()?)
        .args([
            "run",
            "--detach",
            "--name",
            "hard",
            "--mem",
            "256",
            "--state-dir",
            &path(dir.path(), "state"),
        ])
        .arg(guest_image()?)
        .env("XDG_RUNTIME_DIR", dir.path())
        .env("XDG_STATE_HOME", dir.path())
        .stdin(Stdio::null())
        .output()?;
    ensure!(out.status.success(), "{}", said(&out));
    let _vm = Vm(dir.path());

    let (qemu, sidecar) = (process(dir.path(), "qemu-system-x86_64")?, process(dir.path(), "serve")?);
    let guard = process(dir.path(), "__guard")?;
    for (name, pid) in [("QEMU", qemu), ("the sidecar", sidecar), ("the guard", guard)] {
        ensure!(status(pid, "NoNewPrivs")? == "1", "{name} may gain privileges");
        let open = descriptors(pid)?;
        ensure!(!open.is_empty(), "{name} has no descriptors: this test may not look");
        ensure!(!open.contains(&stray), "{name} has a descriptor of somebody else's: {open:?}");
    }
    for (name, pid) in [("QEMU", qemu), ("the sidecar", sidecar)] {
        // 2 is SECCOMP_MODE_FILTER.
        ensure!(status(pid, "Seccomp")? == "2", "{name} may call what it likes");
    }
    let command = fs::read_to_string(format!("/proc/{qemu}/cmdline"))?;
    ensure!(command.contains("spawn=deny") && command.contains("dump-guest-core=off"), "{command}");

    // QEMU has what it was given: its link, its channels, its memory, and nothing of the network's or the launcher's.
    let known = |file: &Path| {
        let name = file.to_string_lossy();
        ["socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/null", "/dev/urandom", "/dev/kvm"]
            .iter()
            .any(|start| name.starts_with(start))
            || name.ends_with("/vm.log")
    };
    let open = descriptors(qemu)?;
    let unknown: Vec<_> = open.iter().filter(|file| !known(file)).collect();
    ensure!(unknown.is_empty(), "{unknown:?}");
    Ok(())
}
