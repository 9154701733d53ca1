//! Real guests in QEMU, attached to `portway serve` by each kind of socket that QEMU has.
//!
//! Needs QEMU (`tests/setup.sh`) and the demo's guest; without QEMU the tests say that they were skipped. QEMU has
//! `-netdev stream` and `-netdev dgram` since 7.2.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::guest_image;

/// A guest under TCG takes some seconds to its lease; on a busy machine some more.
const BOOT: Duration = Duration::from_secs(90);

/// A guest; killed when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn has_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: no qemu-system-x86_64 in PATH (tests/setup.sh says what to install)");
    }
    found
}

/// Boots the demo's guest with one network card.
fn boot(dir: &Path, netdev: &str, mac: &str) -> Result<Machine> {
    let image = guest_image()?;
    let part = |suffix: &str| format!("{}-{suffix}", image.display());
    let cmdline = std::fs::read_to_string(part("cmdline")).context("the guest's command line")?;
    let console = std::fs::File::create(dir.join(format!("console-{mac}")))?;
    let machine = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "tcg"])
        .args(["-cpu", "max", "-m", "256M", "-serial", "stdio"])
        .args(["-kernel", &part("kernel"), "-initrd", &part("initrd.img"), "-append", cmdline.trim()])
        .args(["-netdev", &format!("{netdev},id=net0")])
        .args(["-device", &format!("virtio-net-pci,netdev=net0,mac={mac},romfile=")])
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .spawn()
        .context("qemu-system-x86_64")?;
    Ok(Machine(machine))
}

/// The address that the guest with this MAC has leased.
fn lease(sidecar: &Sidecar, mac: &str) -> Option<String> {
    let leases = sidecar.json(&["leases"]).ok()?;
    let lease = leases.as_array()?.iter().find(|l| l["mac"] == mac)?;
    lease["ip"].as_str().map(str::to_owned)
}

fn awaits_lease(dir: &Path, sidecar: &Sidecar, mac: &str) -> Result<String> {
    let waited = until(BOOT, || lease(sidecar, mac).is_some());
    let console = || std::fs::read_to_string(dir.join(format!("console-{mac}"))).unwrap_or_default();
    waited.with_context(|| format!("no lease for {mac}:\n{}\n{}", console(), sidecar.log()))?;
    lease(sidecar, mac).context("a lease that went")
}

/// What the demo's web server says, through a published port.
fn web(sidecar: &Sidecar, guest: &str) -> Result<String> {
    let out = sidecar.cli(&["publish", &format!("0:{guest}:80")])?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let ports = sidecar.json(&["ports"])?;
    let port =
        ports.as_array().into_iter().flatten().find(|p| p["guest"] == guest).context("no such port")?;
    let url = format!("http://127.0.0.1:{}/cgi-bin/guest", port["host_port"]);
    let mut text = String::new();
    until(BOOT, || {
        let got = Command::new("curl").args(["-fsS", "--max-time", "5", &url]).output();
        text = got.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        text.contains("Hello from inside the guest")
    })?;
    Ok(text)
}

#[test]
fn two_vms_on_one_network_one_by_stream_and_one_by_datagrams() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let link = format!("dgram:unix:{},name=second", path("dgram"));
    let mut sidecar = Sidecar::start(dir.path(), &["--link", &link])?;
    let (one, two) = ("52:54:00:00:00:01", "52:54:00:00:00:02");
    let stream = format!("stream,server=off,addr.type=unix,addr.path={}", path("vm"));
    let datagrams = format!(
        "dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        path("qemu"),
        path("dgram")
    );
    let first = boot(dir.path(), &stream, one)?;
    let _second = boot(dir.path(), &datagrams, two)?;
    let (first_ip, second_ip) =
        (awaits_lease(dir.path(), &sidecar, one)?, awaits_lease(dir.path(), &sidecar, two)?);
    assert_ne!(first_ip, second_ip);
    for (ip, name) in [(&first_ip, "web"), (&second_ip, "second")] {
        let said = web(&sidecar, ip)?;
        ensure!(said.contains(&format!("eth0 {ip}/24")), "{name} at {ip} says: {said}");
    }

    // The VM goes, and another one comes to the same socket: the network and the other VM stay.
    drop(first);
    until(Duration::from_secs(10), || sidecar.log().contains("VMM detached"))?;
    ensure!(sidecar.is_alive()?);
    let _again = boot(dir.path(), &stream, one)?;
    ensure!(awaits_lease(dir.path(), &sidecar, one)? == first_ip, "the same VM has another address");
    ensure!(web(&sidecar, &second_ip).is_ok());
    Ok(())
}
