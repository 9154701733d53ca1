//! QEMU by hand, with the demo's guest: no launcher, no network card but what a test plugs in, and a shell on vsock port 7000.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sidecar::until;
use crate::vm::guest_image;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// The port of the guest's shell.
pub const SHELL: u32 = 7000;

/// A VM without a network; killed when dropped.
#[derive(Debug)]
pub struct Machine {
    process: Child,
    qmp: BufReader<UnixStream>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Machine {
    /// Boots the demo's guest; `devices` are more arguments of QEMU. Its console is `dir/console`.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn boot(dir: &Path, devices: &[&str]) -> Result<Self> {
        let image = guest_image()?;
        let part = |suffix: &str| format!("{}-{suffix}", image.display());
        let cmdline = std::fs::read_to_string(part("cmdline")).context("the guest's command line")?;
        let console = std::fs::File::create(dir.join("console"))?;
        let qmp = dir.join("qmp");
        let process = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", "max"])
            .args(["-machine", "q35,memory-backend=ram", "-smp", "2", "-m", "640M"])
            .args(["-object", "memory-backend-memfd,id=ram,size=640M,share=on", "-serial", "stdio"])
            .args(["-kernel", &part("kernel"), "-initrd", &part("initrd.img"), "-append", cmdline.trim()])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(devices)
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .context("qemu-system-x86_64")?;
        let mut stream = None;
        until(PATIENCE, || {
            stream = UnixStream::connect(&qmp).ok();
            stream.is_some()
        })
        .with_context(|| std::fs::read_to_string(dir.join("console")).unwrap_or_default())?;
        let stream = stream.context("no QMP")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut machine = Self { process, qmp: BufReader::new(stream) };
        machine.command(r#"{"execute":"qmp_capabilities"}"#)?;
        Ok(machine)
    }

    /// The next line of QMP that has `key`.
    fn line(&mut self, key: &str) -> Result<serde_json::Value> {
        loop {
            let mut line = String::new();
            ensure!(self.qmp.read_line(&mut line)? > 0, "QEMU has ended");
            let said: serde_json::Value = serde_json::from_str(&line)?;
            ensure!(said.get("error").is_none(), "QEMU: {said}");
            if said.get(key).is_some() {
                return Ok(said);
            }
        }
    }

    /// Says something by QMP and waits for the answer.
    ///
    /// # Errors
    /// When QEMU refuses, or is gone.
    pub fn command(&mut self, command: &str) -> Result<()> {
        writeln!(self.qmp.get_mut(), "{command}")?;
        self.line("return").map(drop)
    }

    /// Waits until a device is unplugged.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn unplugged(&mut self, id: &str) -> Result<()> {
        while self.line("event")?["data"]["device"] != id {}
        Ok(())
    }
}

/// A stream to a port of the guest's, by its socket in `sockets`.
///
/// # Errors
/// When nobody listens at the socket.
pub fn port(sockets: &Path, port: u32) -> Result<UnixStream> {
    let path = sockets.join(format!("guest.{port:08x}"));
    let stream = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Runs a command in the guest by the shell's socket in `sockets` and answers what it printed; the shell is waited for.
///
/// # Errors
/// When there is no shell in time, or it ends in the middle.
pub fn shell(sockets: &Path, command: &str, patience: Duration) -> Result<String> {
    let deadline = Instant::now() + patience;
    loop {
        let mut said = String::new();
        let asked = port(sockets, SHELL).and_then(|mut shell| {
            writeln!(shell, "{command}; echo done")?;
            shell.shutdown(Shutdown::Write)?;
            Ok(shell.read_to_string(&mut said)?)
        });
        if let (Ok(_), Some(text)) = (&asked, said.strip_suffix("done\n")) {
            return Ok(text.to_owned());
        }
        ensure!(said.is_empty(), "in the guest: {command}: {said}");
        if Instant::now() > deadline {
            bail!("the guest does not answer: {asked:?}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}
