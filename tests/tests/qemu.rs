//! Real guests in QEMU, attached to `portway serve` by each kind of socket that QEMU has.
//!
//! Needs QEMU (`tests/setup.sh`) and the demo's guest; without QEMU the tests say that they were skipped. QEMU has
//! `-netdev stream` and `-netdev dgram` since 7.2.

use std::io::{BufRead, BufReader};
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

/// One of the files of the demo's guest.
fn part(suffix: &str) -> Result<String> {
    Ok(format!("{}-{suffix}", guest_image()?.display()))
}

/// Boots the demo's guest with one network card.
fn boot(dir: &Path, netdev: &str, mac: &str) -> Result<Machine> {
    let cmdline = std::fs::read_to_string(part("cmdline")?).context("the guest's command line")?;
    let console = std::fs::File::create(dir.join(format!("console-{mac}")))?;
    let machine = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "tcg"])
        .args(["-cpu", "max", "-m", "256M", "-serial", "stdio"])
        .args(["-kernel", &part("kernel")?, "-initrd", &part("initrd.img")?, "-append", cmdline.trim()])
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
    let of_guest = leases.as_array()?.iter().filter(|l| l["mac"] == mac);
    // It has one of IPv6 too.
    of_guest.filter_map(|l| l["ip"].as_str()).find(|ip| !ip.contains(':')).map(str::to_owned)
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

/// A web server on the host's loopback; ended when dropped.
struct WebServer {
    child: Child,
    port: u16,
}

impl Drop for WebServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl WebServer {
    fn start(dir: &Path) -> Result<Self> {
        let mut child = Command::new("python3")
            .args(["-u", "-m", "http.server", "--bind", "127.0.0.1", "0"])
            .current_dir(dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("python3")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
        // Serving HTTP on 127.0.0.1 port 34567 (http://127.0.0.1:34567/) ...
        let port = line.split_whitespace().nth(5).and_then(|p| p.parse().ok());
        Ok(Self { child, port: port.with_context(|| line.clone())? })
    }
}

/// iPXE lays its descriptors out as no Linux does (header and frame in descriptors of their own, no MRG_RXBUF): a
/// layout at which one of passt's versions ends.
#[test]
fn ipxe_boots_a_guest_from_the_hosts_web_server_over_vhost_user() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    for file in ["kernel", "initrd.img"] {
        std::os::unix::fs::symlink(part(file)?, dir.path().join(file))?;
    }
    let server = WebServer::start(dir.path())?;
    let cmdline = std::fs::read_to_string(part("cmdline")?)?;
    let url = format!("http://192.168.127.254:{}", server.port);
    let script =
        format!("#!ipxe\ndhcp\nkernel {url}/kernel {}\ninitrd {url}/initrd.img\nboot\n", cmdline.trim());
    std::fs::write(dir.path().join("boot.ipxe"), script)?;
    let link = format!("vhost-user:unix:{},name=pxe,mtu=1500", path("pxe"));
    let sidecar = Sidecar::start(dir.path(), &["--link", &link])?;

    let mac = "52:54:00:00:00:03";
    let console = std::fs::File::create(dir.path().join(format!("console-{mac}")))?;
    let ipxe = guest_image()?.with_file_name("ipxe.lkrn");
    // QEMU 7.2 ends when a guest masks an MSI-X vector of a vhost-user device, and its cmpxchg16b leaves wrong flags.
    let machine = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,memory-backend=ram"])
        .args(["-accel", "tcg", "-cpu", "max,-cx16", "-m", "384M", "-serial", "stdio"])
        .args(["-object", "memory-backend-memfd,id=ram,size=384M,share=on"])
        .args(["-chardev", &format!("socket,id=link,path={}", path("pxe"))])
        .args(["-netdev", "vhost-user,id=net0,chardev=link"])
        .args(["-device", &format!("virtio-net-pci,netdev=net0,mac={mac},vectors=0,romfile=")])
        .arg("-kernel")
        .arg(ipxe)
        .args(["-initrd", &path("boot.ipxe")])
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .spawn()
        .context("qemu-system-x86_64")?;
    let _machine = Machine(machine);
    let ip = awaits_lease(dir.path(), &sidecar, mac)?;
    let said = web(&sidecar, &ip)?;
    ensure!(said.contains(&format!("eth0 {ip}/24")), "the guest says: {said}");
    Ok(())
}
