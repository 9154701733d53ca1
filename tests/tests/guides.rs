//! The command lines of `docs/guide/hypervisors.md` that say `tested`, run as they stand there, each with a real guest.
//!
//! What is changed: host ports are free ones; TCG takes KVM's place, which not every machine of tests has; and the kernel is
//! told not to mind a late timer, as on a busy machine under TCG.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use portway_tests::sidecar::until;
use portway_tests::vm::{guest_image, portway};

/// A guest under TCG takes some seconds to its lease; on a busy machine some more.
const BOOT: Duration = Duration::from_secs(120);
/// The guest's address on Ethernet in every block.
const MAC: &str = "52:54:00:00:00:01";

/// The block of the guide with this mark.
fn block(mark: &str) -> Result<String> {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/hypervisors.md");
    let text = fs::read_to_string(guide)?;
    let head = format!("tested={mark}\n");
    let (_, rest) = text.split_once(&head).with_context(|| format!("no block {head}"))?;
    let (block, _) = rest.split_once("```").context("a block that ends")?;
    Ok(block
        .replace("--publish 2222:22", "--publish 0:22")
        .replace("-accel kvm", "-accel tcg")
        .replace("console=ttyS0", "console=ttyS0 no_timer_check"))
}

/// A shell and all it has started; killed when dropped.
struct Shell(Child);

impl Drop for Shell {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.0.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// Runs a script beside the guest's files, with `portway` in its path, and waits for the guest's lease.
fn runs(dir: &Path, script: &str) -> Result<()> {
    let image = guest_image()?;
    for (name, suffix) in [("vmlinuz", "kernel"), ("initrd.img", "initrd.img")] {
        std::os::unix::fs::symlink(
            format!(
                "{}-{suffix}",
                fs::canonicalize(image.parent().context("a directory")?)?
                    .join(image.file_name().context("a name")?)
                    .display()
            ),
            dir.join(name),
        )?;
    }
    let program = fs::canonicalize(portway()?)?;
    let bin = program.parent().context("a directory")?.display().to_string();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
    let log = fs::File::create(dir.join("log"))?;
    let _shell = Shell(
        Command::new("bash")
            .args(["-ec", script])
            .current_dir(dir)
            .env("PATH", path)
            .env("XDG_RUNTIME_DIR", dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?,
    );
    let leased = || {
        let out =
            Command::new(&program).args(["leases", "--format", "json"]).env("XDG_RUNTIME_DIR", dir).output();
        let leases = out.ok().and_then(|o| serde_json::from_slice::<serde_json::Value>(&o.stdout).ok());
        leases.is_some_and(|leases| leases[0]["mac"] == MAC && leases[0]["expires_in_s"].is_number())
    };
    until(BOOT, leased).with_context(|| fs::read_to_string(dir.join("log")).unwrap_or_default())
}

/// QEMU's major version, where there is one.
fn qemu() -> Option<u32> {
    let out = Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

fn tested(mark: &str, needs: u32) -> Result<()> {
    let dir = tempfile::tempdir()?;
    match qemu() {
        Some(major) if major >= needs => runs(dir.path(), &block(mark)?),
        found => {
            eprintln!("SKIPPED: QEMU {needs} or newer is needed for {mark}, here is {found:?}");
            block(mark).map(drop)
        }
    }
}

#[test]
fn qemu_by_a_stream_socket() -> Result<()> {
    tested("qemu-stream", 7)
}

#[test]
fn qemu_by_datagrams() -> Result<()> {
    tested("qemu-dgram", 7)
}

#[test]
fn qemu_by_vhost_user() -> Result<()> {
    // See vm-launcher's `net` for what is wrong with older ones under TCG.
    tested("qemu-vhost-user", 8)
}

#[test]
fn libvirt_by_vhost_user() -> Result<()> {
    let domain = block("libvirt")?;
    let virsh = Command::new("virsh").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !virsh || qemu().is_none_or(|major| major < 8) {
        eprintln!("SKIPPED: virsh and QEMU 8 or newer are needed for libvirt");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("domain.xml"), domain)?;
    let script = "portway serve --link vhost-user:unix:$PWD/vm.sock,name=vm &\n\
        until [ -S vm.sock ]; do sleep 0.1; done\n\
        trap 'virsh -c qemu:///session destroy portway-guide' EXIT\n\
        sed \"s|PWD|$PWD|\" domain.xml > here.xml && virsh -c qemu:///session create here.xml\nwait";
    let ran = runs(dir.path(), script);
    // The shell is gone by SIGKILL, and its trap with it.
    let _ = Command::new("virsh").args(["-c", "qemu:///session", "destroy", "portway-guide"]).output();
    ran
}
