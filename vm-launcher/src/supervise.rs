//! The life of a VM and its network.
//!
//! ```text
//! sidecar ─ "ready" ─► QEMU ─► running ─┬─ QEMU ends ───────────────► sidecar ended ─► the VM's exit code
//!                                       ├─ SIGTERM, INT, HUP ─► power button ─► deadline ─► killed
//!                                       └─ sidecar ends ──────► power button ─► deadline ─► killed, and why
//! ```
//! One thread, one poll; nothing sleeps. A second signal does not wait for the deadline.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::pipe2;

use crate::accel::{Choice, Host};
use crate::image::Boot;
use crate::process::{Process, timeout};
use crate::qmp::Qmp;
use crate::state::{Log, Mac, StateDir};
use crate::terminal::Terminal;
use crate::{LaunchConfig, LaunchError, net, qemu, sidecar, sys};

/// How long the sidecar has to be ready; it takes milliseconds.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// How long a process has between SIGTERM and SIGKILL.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// How long QEMU has to be seen ending when the sidecar ended first: the end of QEMU ends the link, and the
/// sidecar may be quicker to go than the kernel is to take QEMU down.
const QEMU_FIRST: Duration = Duration::from_millis(250);

/// Runs the VM and its network until the VM ends, and answers the VM's exit code: 0 after a clean power-down.
///
/// `on_ready` is called once, when the network takes requests on its API socket and before the VM starts.
///
/// Blocks the calling thread, and blocks SIGTERM, SIGINT and SIGHUP in it: call it from the main thread, before
/// there are others. The children are bound to this thread's life.
///
/// # Errors
/// What was wrong before anything started, or which of the two processes failed and its last words. When this
/// returns, neither runs.
pub fn run(config: &LaunchConfig, on_ready: impl FnOnce()) -> Result<u8, LaunchError> {
    check(config)?;
    let boot = config.image.resolve()?;
    let program = qemu::find(config.qemu.as_deref())?;
    let accel = config.accel.choose(&Host::detect())?;
    let state = StateDir::open(&config.state_dir)?;
    let mac = state.mac()?;
    let signals = Signals::block().map_err(|error| LaunchError::system("cannot block signals", error))?;
    let terminal = Terminal::remember()
        .map_err(|error| LaunchError::system("cannot read the terminal's settings", error))?;
    let net = config.net.choose(accel.kvm, &program);
    let ends = match net.vhost_user {
        true => None,
        false => {
            Some(UnixStream::pair().map_err(|error| LaunchError::system("cannot make a socketpair", error))?)
        }
    };
    let (network_end, vm_end) = ends.map(|(ours, vms)| (OwnedFd::from(ours), OwnedFd::from(vms))).unzip();

    let mut network = Network::start(config, &state, network_end)?;
    network.await_ready(&signals)?;
    on_ready();
    say(format_args!("accelerator: {} ({})", if accel.kvm { "kvm" } else { "tcg" }, accel.reason));
    say(format_args!(
        "network card: {} ({})",
        if net.vhost_user { "vhost-user" } else { "socket" },
        net.reason
    ));
    let vm = Vm::start(config, &program, &boot, &accel, mac, &state, vm_end, &terminal)?;
    Supervisor { config, signals, network, vm, ending: None }.run()
}

/// What can be known to be wrong without looking at the machine.
fn check(config: &LaunchConfig) -> Result<(), LaunchError> {
    let setting = |text: String| Err(LaunchError::Setting(text));
    // The name is a DNS label (RFC 1123 §2.1), and a part of --link, where a comma would end it.
    let label = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if config.name.is_empty() || config.name.len() > 63 || !config.name.bytes().all(label) {
        return setting(format!(
            "a VM cannot be called {:?}: letters, digits and - only, at most 63",
            config.name
        ));
    }
    if config.cpus == 0 {
        return setting("a VM needs at least one CPU: --cpus 1".into());
    }
    if config.mem_mib < 32 {
        return setting(format!("{} MiB of memory boot no Linux: --mem 256 or more", config.mem_mib));
    }
    Ok(())
}

/// One line for the user. The console is on stdout, so this goes to stderr; that may be closed, and then there is
/// nobody to tell.
fn say(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "portway: {line}");
}

/// The signals that end the VM, as a file descriptor; the mask is put back when this is dropped.
struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    fn block() -> io::Result<Self> {
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        let before = SigSet::thread_get_mask()?;
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { fd, before })
    }

    fn next(&self) -> io::Result<Option<Signal>> {
        let Some(info) = self.fd.read_signal()? else { return Ok(None) };
        Ok(i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok()))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // It was the mask of this thread a moment ago, so it can be again.
        let _ = self.before.thread_set_mask();
    }
}

/// A process's end of the link.
fn link_of(config: &LaunchConfig, end: Option<&OwnedFd>) -> sidecar::Link {
    match end {
        Some(end) => sidecar::Link::Socket(sys::number(end)),
        None => sidecar::Link::VhostUser(net::socket(config)),
    }
}

/// The sidecar.
struct Network {
    process: Process,
    ready: OwnedFd,
    log: Log,
}

impl Network {
    fn start(config: &LaunchConfig, state: &StateDir, link: Option<OwnedFd>) -> Result<Self, LaunchError> {
        let (ready, told) =
            pipe2(OFlag::O_CLOEXEC).map_err(|errno| LaunchError::system("cannot make a pipe", errno))?;
        let log = state.log("sidecar.log")?;
        let mut command = Command::new(&config.sidecar);
        let writer = || log.writer().map_err(|error| LaunchError::system("cannot share a log", error));
        command
            .args(sidecar::arguments(config, &link_of(config, link.as_ref()), sys::number(&told)))
            .stdin(Stdio::null());
        command.stdout(writer()?).stderr(writer()?);
        // A group of its own: Ctrl-C in the terminal is for us, and the network is needed until the guest is down.
        command.process_group(0);
        // SIGTERM, so that it closes its sockets in order when we are killed.
        sys::prepare(&mut command, link.into_iter().chain([told]).collect(), Signal::SIGTERM);
        Ok(Self { process: Process::start(command)?, ready, log })
    }

    /// Waits for `ready`, for the end of the sidecar, or for a signal.
    fn await_ready(&mut self, signals: &Signals) -> Result<(), LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot wait for the network", error);
        let deadline = Instant::now() + READY_PATIENCE;
        let mut told = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LaunchError::SidecarSilent { after: READY_PATIENCE, log: self.log.tail() });
            }
            let mut waited = [
                PollFd::new(signals.fd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.ready.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut waited, timeout(left)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            let readable = waited[1].any().unwrap_or(false);
            if let Some(signal) = signals.next().map_err(failed)? {
                return Err(LaunchError::Interrupted(signal.as_str()));
            }
            if !readable {
                continue;
            }
            let mut buffer = [0; 64];
            let read = nix::unistd::read(&self.ready, &mut buffer).map_err(|errno| failed(errno.into()))?;
            told.extend_from_slice(buffer.get(..read).unwrap_or_default());
            if told.starts_with(b"ready\n") {
                return Ok(());
            }
            if read == 0 || told.len() > buffer.len() {
                // Closed without the word: it is about to end. If not, it is made to.
                let status = match self.process.wait(END_PATIENCE).map_err(failed)? {
                    Some(status) => status,
                    None => self.process.end(END_PATIENCE).map_err(failed)?,
                };
                return Err(LaunchError::SidecarNotReady { status, reason: self.log.last_words() });
            }
        }
    }
}

/// QEMU.
struct Vm {
    process: Process,
    qmp: Qmp,
    log: Log,
}

impl Vm {
    #[expect(clippy::too_many_arguments, reason = "each is one checked part of the machine, used once, here")]
    fn start(
        config: &LaunchConfig,
        program: &Path,
        boot: &Boot,
        accel: &Choice,
        mac: Mac,
        state: &StateDir,
        link: Option<OwnedFd>,
        terminal: &Terminal,
    ) -> Result<Self, LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot make the control channel of QEMU", error);
        let (ours, qemus) = UnixStream::pair().map_err(failed)?;
        let qmp = Qmp::new(ours).map_err(failed)?;
        let qemus = OwnedFd::from(qemus);
        let log = state.log("qemu.log")?;
        let wires = qemu::Wires { link: link_of(config, link.as_ref()), qmp: sys::number(&qemus) };
        let mut command = Command::new(program);
        command
            .args(qemu::arguments(config, boot, accel.kvm, mac, &wires))
            .stderr(log.writer().map_err(failed)?);
        if !terminal.is_there() {
            // No console to type on; and with it no reason to be in the terminal's foreground, where Ctrl-C would
            // end QEMU before the guest is down.
            command.stdin(Stdio::null()).process_group(0);
        }
        sys::prepare(&mut command, link.into_iter().chain([qemus]).collect(), Signal::SIGKILL);
        Ok(Self { process: Process::start(command)?, qmp, log })
    }
}

/// Why the VM is being ended.
enum Cause {
    Signal,
    /// The sidecar ended, like this.
    Network(ExitStatus),
}

/// The VM has been told to power off.
struct Ending {
    cause: Cause,
    deadline: Instant,
}

/// How the VM ended.
enum End {
    /// QEMU ended by itself.
    ByItself(ExitStatus),
    /// We killed it, because.
    Killed(String),
}

struct Supervisor<'a> {
    config: &'a LaunchConfig,
    signals: Signals,
    network: Network,
    vm: Vm,
    ending: Option<Ending>,
}

impl Supervisor<'_> {
    fn run(mut self) -> Result<u8, LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot wait for the VM", error);
        let end = loop {
            if let Some(end) = self.turn().map_err(failed)? {
                break end;
            }
        };
        self.vm.qmp.read();
        self.network.process.end(END_PATIENCE).map_err(failed)?;
        if let Some(Ending { cause: Cause::Network(status), .. }) = self.ending {
            return Err(LaunchError::SidecarDied { status, log: self.network.log.tail() });
        }
        match end {
            End::ByItself(status) if status.success() => {
                say(format_args!(
                    "the VM ended ({})",
                    self.vm.qmp.shutdown_reason().unwrap_or("no reason given")
                ));
                Ok(0)
            }
            End::ByItself(status) => Err(LaunchError::QemuDied { status, log: self.vm.log.tail() }),
            End::Killed(reason) => Err(LaunchError::Killed(reason)),
        }
    }

    fn turn(&mut self) -> io::Result<Option<End>> {
        self.poll()?;
        self.vm.qmp.read();
        if let Some(status) = self.vm.process.ended()? {
            return Ok(Some(End::ByItself(status)));
        }
        while let Some(signal) = self.signals.next()? {
            if self.ending.is_some() {
                self.vm.process.kill()?;
                return Ok(Some(End::Killed(format!("{signal} came while it was powering off"))));
            }
            let patience = self.config.stop_timeout.as_secs_f32();
            say(format_args!("{signal}: powering the VM off (within {patience} s; again to kill it)"));
            self.begin_ending(Cause::Signal);
        }
        if self.ending.is_none()
            && self.vm.qmp.shutdown_reason().is_none()
            && let Some(network) = self.network.process.ended()?
        {
            if let Some(status) = self.vm.process.wait(QEMU_FIRST)? {
                return Ok(Some(End::ByItself(status)));
            }
            say(format_args!("the network ended ({network}): powering the VM off"));
            self.begin_ending(Cause::Network(network));
        }
        if self.ending.as_ref().is_some_and(|ending| Instant::now() >= ending.deadline) {
            self.vm.process.kill()?;
            let patience = self.config.stop_timeout.as_secs_f32();
            let reason = format!("it did not power off within {patience} s (--stop-timeout gives it longer)");
            return Ok(Some(End::Killed(reason)));
        }
        Ok(None)
    }

    /// Presses the power button and sets the deadline. QEMU that does not listen any more is killed by that.
    fn begin_ending(&mut self, cause: Cause) {
        if let Err(error) = self.vm.qmp.power_down() {
            say(format_args!("QEMU does not take the power button: {error}"));
        }
        self.ending = Some(Ending { cause, deadline: Instant::now() + self.config.stop_timeout });
    }

    fn poll(&mut self) -> io::Result<()> {
        let left =
            self.ending.as_ref().map(|ending| ending.deadline.saturating_duration_since(Instant::now()));
        let mut waited = vec![
            PollFd::new(self.signals.fd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.vm.process.as_fd(), PollFlags::POLLIN),
        ];
        if self.vm.qmp.is_open() {
            waited.push(PollFd::new(self.vm.qmp.as_fd(), PollFlags::POLLIN));
        }
        // Once the VM is ending, the sidecar's end is nothing new, and its pidfd would stay readable.
        if self.ending.is_none() && self.vm.qmp.shutdown_reason().is_none() {
            waited.push(PollFd::new(self.network.process.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut waited, left.map_or(PollTimeout::NONE, timeout)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
