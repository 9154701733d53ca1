//! `portway-agent tap` in the place of gvforwarder: a network for a guest that has only a stream to the host.
//!
//! The guest is a network namespace, the stream a unix socket; the host's end is `portway serve`, Portway as `gvproxy`, and the
//! real gvproxy where `PORTWAY_GVPROXY` names it. Needs root for the namespace.

use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::agent::binary;
use portway_tests::agent_lab::answers;
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::{Sidecar, until};
use portway_tests::vm::portway;

const PATIENCE: Duration = Duration::from_secs(10);
/// gvforwarder's own: the MAC that has a static lease.
const DEVICE: &str = "tap9";

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The tap in the guest, with its address; its DHCP client is left out, for it would be this machine's.
fn tap(guest: &Namespace, options: &[&str], address: &str) -> Result<Running> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", guest.path().display())).arg(binary()?).arg("tap");
    command.args(["-iface", DEVICE, "-stop-if-exist", "ignore", "-no-dhcp"]).args(options);
    let mut tap = Running(command.stdin(Stdio::null()).spawn()?);
    let address: IpAddr = address.parse()?;
    let up = || guest.configure(DEVICE, address, IpAddr::from([192, 168, 127, 1]), 1500).is_ok();
    until(PATIENCE, up).with_context(|| format!("no device: {:?}", tap.0.try_wait()))?;
    Ok(tap)
}

/// Whether the guest reaches a server of the host's loopback.
fn reaches_the_host(guest: &Namespace) -> Result<()> {
    let server = TcpListener::bind("127.0.0.1:0")?;
    let port = server.local_addr()?.port();
    let reached = until(PATIENCE, || {
        guest.inside(|| Ok(answers(([192, 168, 127, 254], port), &server))).is_ok_and(|yes| yes)
    });
    reached.context("the guest does not reach the host")
}

#[test]
fn over_a_stream_to_serve() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), &[])?;
    let url = format!("unix:{}", dir.path().join("vm").display());
    let _tap = tap(&guest, &["-framing", "qemu", "-url", &url], "192.168.127.9")?;
    reaches_the_host(&guest).with_context(|| sidecar.log())
}

/// gvforwarder's job toward a program that is called as gvproxy is.
fn toward_gvproxy(program: &Path) -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("network.sock");
    let mut command = Command::new(program);
    command.args(["-ssh-port", "-1", "-listen", &format!("unix://{}", socket.display())]);
    command.env("XDG_RUNTIME_DIR", dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
    let _host = Running(command.spawn().with_context(|| program.display().to_string())?);
    until(PATIENCE, || socket.exists()).context("no socket")?;
    let url = format!("unix://{}", socket.display());
    let mut first = tap(&guest, &["-url", &url], "192.168.127.2")?;
    reaches_the_host(&guest)?;
    // The host ends it when the guest's side does, and takes the next.
    first.0.kill()?;
    first.0.wait()?;
    until(PATIENCE, || guest.delete(DEVICE).is_err()).context("the device outlives the tap")?;
    let _second = tap(&guest, &["-url", &url, "-mtu", "4000"], "192.168.127.2")?;
    reaches_the_host(&guest)
}

#[test]
fn over_gvproxys_connect_to_portway_called_as_gvproxy() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("gvproxy");
    std::os::unix::fs::symlink(portway()?, &program)?;
    toward_gvproxy(&program)
}

#[test]
fn over_gvproxys_connect_to_gvproxy_itself() -> Result<()> {
    let Some(program) = std::env::var_os("PORTWAY_GVPROXY") else {
        eprintln!("SKIPPED: PORTWAY_GVPROXY names no gvproxy");
        return Ok(());
    };
    toward_gvproxy(Path::new(&program))
}

#[test]
fn a_guest_that_has_a_card_needs_none() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let mut command = guest.command(&binary()?.display().to_string());
    let out = command.args(["tap", "-stop-if-exist", "lo", "-url", "unix:/nowhere"]).output()?;
    ensure!(out.status.success(), "{out:?}");
    ensure!(String::from_utf8_lossy(&out.stderr).contains("nothing to do"), "{out:?}");
    Ok(())
}
