//! The life of a VM and its network.
//!
//! ```text
//! guard ─► sidecar ─ "ready" ─► virtiofsd ─► QEMU ─► running ─┬─ QEMU ends ───────────► the rest ended ─► the VM's exit code
//!                                                             ├─ SIGTERM, INT, HUP ─► power button, each second ─► deadline ─► killed
//!                                                             ├─ SIGQUIT ───────────► killed
//!                                                             └─ another child ends ► power button ─► deadline ─► killed, and why
//! ```
//! One thread, one poll; nothing sleeps. A second signal does not wait for the deadline.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::guard::Guard;
use crate::keys::Keys;
use crate::machine::Plan;
use crate::network::Network;
use crate::process::timeout;
use crate::registry::Registration;
use crate::share::{self, Serving};
use crate::signals::{Signals, Told};
use crate::state::{self, StateDir};
use crate::terminal::{Output, Terminal};
use crate::vm::Vm;
use crate::{LaunchConfig, LaunchError, sys};

/// How long a process has between SIGTERM and SIGKILL.
pub(crate) const END_PATIENCE: Duration = Duration::from_secs(3);
/// How long QEMU has to be seen ending when another child ended first: the end of QEMU ends the link, and the
/// sidecar may be quicker to go than the kernel is to take QEMU down.
const QEMU_FIRST: Duration = Duration::from_millis(250);
/// How often the power button is pressed.
const PRESS_EVERY: Duration = Duration::from_secs(1);

/// What `run` tells while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The network takes requests on its API socket; the VM has not started.
    NetworkReady,
    /// The machine is made, and its processors run.
    Running,
}

/// Runs the VM and its network until the VM ends, and answers the VM's exit code: 0 after a clean power-down.
///
/// `tell` is called once for each [`Event`], in order.
///
/// Blocks the calling thread, and blocks SIGTERM, SIGINT, SIGHUP and SIGQUIT in it: call it from the main thread, before
/// there are others. The children are bound to this thread's life.
///
/// # Errors
/// What was wrong before anything started, or which of the processes failed and its last words. When this
/// returns, none runs.
pub fn run(config: &LaunchConfig, mut tell: impl FnMut(Event)) -> Result<u8, LaunchError> {
    let plan = Plan::new(config)?;
    let signals = Signals::block().map_err(|error| LaunchError::system("cannot block signals", error))?;
    sys::keep_memory_private()
        .map_err(|error| LaunchError::system("cannot keep the memory to ourselves", error))?;
    let state = StateDir::open(&config.state_dir)?;
    let ended = run_in(config, &plan, &state, &signals, &mut tell);
    let (code, words) = match &ended {
        Ok(code) => (*code, "the VM powered off".to_owned()),
        Err(error) => (error.exit_code(), error.to_string()),
    };
    let note = state.path().join(state::END);
    let noted = state::write_private(&note, format!("{code} {words}\n").as_bytes(), |_| ());
    if let Err(error) = noted {
        say(format_args!("the end cannot be noted in the state directory: {error}"));
    }
    ended
}

fn run_in(
    config: &LaunchConfig,
    plan: &Plan,
    state: &StateDir,
    signals: &Signals,
    tell: &mut impl FnMut(Event),
) -> Result<u8, LaunchError> {
    let terminal = Terminal::on_stdin(Output::Lines);
    let lock = state.lock().map_err(|error| LaunchError::system("cannot share the lock", error))?;
    let mut guard = Guard::start(&config.sidecar, Some(lock), &terminal)?;
    guard.end_note(&state.path().join(state::END));
    let (machine, notes) = plan.prepare(config, state, &mut guard)?;
    let _registered = Registration::make(config, &plan.accel, &mut guard)?;
    for note in notes {
        say(note);
    }

    let mut network = None;
    let mut vm_end = None;
    if machine.card.needs_sidecar() {
        let (made, end) = Network::start(config, &machine, state, signals, &mut guard)?;
        tell(Event::NetworkReady);
        (network, vm_end) = (Some(made), Some(end));
    }
    say(format_args!("accelerator: {} ({})", plan.accel.kind.name(), plan.accel.reason));
    say(format_args!("network card: {} ({})", machine.card.name(), plan.net.reason));
    let shares = share::serve(&config.shares, plan.virtiofsd.as_ref(), state, &mut guard)?;
    let vm = Vm::start(config, &*plan.hypervisor, &machine, state, vm_end, &shares, terminal, &mut guard)?;
    drop(shares.sockets);
    let told_running = false;
    let guard = &mut guard;
    Supervisor { config, signals, guard, network, shares: shares.served, vm, ending: None, told_running }
        .run(tell)
}

/// One line for the user. The console is on stdout, so this goes to stderr; that may be closed, and then there is
/// nobody to tell.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "portway: {line}");
}

/// Why the VM is being ended.
enum Cause {
    Signal,
    /// A child ended, and this is what is told of it.
    Child(LaunchError),
}

/// The VM has been told to power off.
struct Ending {
    cause: Cause,
    deadline: Instant,
    /// When the power button is pressed again: a guest that still boots does not notice that it was.
    press_at: Instant,
}

/// How the VM ended.
enum End {
    /// The hypervisor ended by itself.
    ByItself(ExitStatus),
    /// We killed it, because.
    Killed(String),
}

struct Supervisor<'a> {
    config: &'a LaunchConfig,
    signals: &'a Signals,
    guard: &'a mut Guard,
    network: Option<Network>,
    shares: Vec<Serving>,
    vm: Vm,
    ending: Option<Ending>,
    told_running: bool,
}

impl Supervisor<'_> {
    fn run(mut self, tell: &mut impl FnMut(Event)) -> Result<u8, LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot wait for the VM", error);
        self.look_at_terminal().map_err(failed)?;
        let end = loop {
            if let Some(end) = self.turn(tell).map_err(failed)? {
                break end;
            }
        };
        self.vm.control.look();
        self.vm.console_log.read();
        // What is said from here on is said on the terminal as it was.
        (self.vm.keys, self.vm.lent) = (None, None);
        drop(self.network.take());
        for mut share in self.shares {
            share.process.end(END_PATIENCE).map_err(failed)?;
        }
        if let Some(Ending { cause: Cause::Child(error), .. }) = self.ending {
            return Err(error);
        }
        match end {
            End::ByItself(status) if status.success() => {
                say(format_args!(
                    "the VM ended ({})",
                    self.vm.control.shutdown_reason().unwrap_or("no reason given")
                ));
                Ok(0)
            }
            End::ByItself(status) => {
                Err(LaunchError::VmDied { program: self.vm.name, status, log: self.vm.log.tail() })
            }
            End::Killed(reason) => Err(LaunchError::Killed(reason)),
        }
    }

    fn turn(&mut self, tell: &mut impl FnMut(Event)) -> io::Result<Option<End>> {
        let typed = self.poll()?;
        if let Some(keys) = &mut self.vm.keys {
            keys.turn(typed, self.guard)?;
        }
        self.vm.control.look();
        self.vm.console_log.read();
        if let Some(status) = self.vm.process.ended()? {
            return Ok(Some(End::ByItself(status)));
        }
        if self.vm.control.is_running() && !std::mem::replace(&mut self.told_running, true) {
            tell(Event::Running);
        }
        while let Some(told) = self.signals.next()? {
            let signal = match told {
                Told::End(signal) => signal,
                Told::Suspend => {
                    self.suspend()?;
                    continue;
                }
                Told::Continued => {
                    self.look_at_terminal()?;
                    continue;
                }
            };
            if signal == Signal::SIGQUIT || self.ending.is_some() {
                self.vm.process.kill()?;
                let why =
                    if self.ending.is_some() { " came while it was powering off" } else { " asks for that" };
                return Ok(Some(End::Killed(format!("{signal}{why}"))));
            }
            let patience = self.config.stop_timeout.as_secs_f32();
            say(format_args!("{signal}: powering the VM off (within {patience} s; again to kill it)"));
            self.begin_ending(Cause::Signal);
        }
        if self.watches_children()
            && let Some(error) = self.child_that_ended()?
        {
            if let Some(status) = self.vm.process.wait(QEMU_FIRST)? {
                return Ok(Some(End::ByItself(status)));
            }
            say(format_args!(
                "{}: powering the VM off",
                error.to_string().lines().next().unwrap_or_default().trim_end_matches(':')
            ));
            self.begin_ending(Cause::Child(error));
        }
        if self.presses_again()
            && let Some(ending) = self.ending.as_mut().filter(|ending| Instant::now() >= ending.press_at)
        {
            ending.press_at += PRESS_EVERY;
            // One that does not take it was told of when it was pressed first.
            let _ = self.vm.control.power_down();
        }
        if self.ending.as_ref().is_some_and(|ending| Instant::now() >= ending.deadline) {
            self.vm.process.kill()?;
            let patience = self.config.stop_timeout.as_secs_f32();
            let reason = format!("it did not power off within {patience} s (--stop-timeout gives it longer)");
            return Ok(Some(End::Killed(reason)));
        }
        Ok(None)
    }

    /// Once the VM is ending, the end of what serves it is nothing new.
    fn watches_children(&self) -> bool {
        self.ending.is_none() && self.vm.control.shutdown_reason().is_none()
    }

    /// Whether the guest may not have noticed yet that it is to power off.
    fn presses_again(&self) -> bool {
        self.ending.is_some() && self.vm.control.shutdown_reason().is_none()
    }

    fn child_that_ended(&mut self) -> io::Result<Option<LaunchError>> {
        if let Some(error) = self.network.as_mut().map(Network::ended).transpose()?.flatten() {
            return Ok(Some(error));
        }
        for share in &mut self.shares {
            if let Some(status) = share.process.ended()? {
                let (tag, log) = (share.tag.clone(), share.log.tail());
                return Ok(Some(LaunchError::ShareDied { tag, status, log }));
            }
        }
        Ok(None)
    }

    /// Presses the power button and sets the deadline. QEMU that does not listen any more is killed by that.
    fn begin_ending(&mut self, cause: Cause) {
        if let Err(error) = self.vm.control.power_down() {
            say(format_args!("{} does not take the power button: {error}", self.vm.name));
        }
        let now = Instant::now();
        self.ending =
            Some(Ending { cause, deadline: now + self.config.stop_timeout, press_at: now + PRESS_EVERY });
    }

    fn look_at_terminal(&mut self) -> io::Result<()> {
        self.vm.keys.as_mut().map_or(Ok(()), |keys| keys.look(self.guard))
    }

    /// Ctrl-Z before the terminal is raw, or a shell's `suspend`: the whole job stands still, the guest too, until `fg` or `bg`.
    fn suspend(&mut self) -> io::Result<()> {
        if let Some(keys) = &mut self.vm.keys {
            keys.put_back(self.guard);
        }
        self.vm.process.signal(Signal::SIGSTOP)?;
        let suspended = self.signals.suspend();
        self.vm.process.signal(Signal::SIGCONT)?;
        suspended?;
        self.look_at_terminal()
    }

    /// Waits; answers whether the terminal has something to read.
    fn poll(&mut self) -> io::Result<bool> {
        let keys = self.vm.keys.as_ref();
        let deadlines = [
            self.ending.as_ref().map(|ending| ending.deadline),
            self.ending.as_ref().filter(|_| self.presses_again()).map(|ending| ending.press_at),
            self.vm.control.look_at(),
            keys.and_then(Keys::look_at),
        ];
        let next = deadlines.into_iter().flatten().min();
        let left = next.map(|at| at.saturating_duration_since(Instant::now()));
        let mut waited: Vec<BorrowedFd<'_>> = vec![self.signals.as_fd(), self.vm.process.as_fd()];
        waited.extend(self.vm.control.source());
        waited.extend(self.vm.console_log.source());
        if self.watches_children() {
            // A pidfd stays readable, so it is looked at only while its end is news.
            waited.extend(self.network.as_ref().map(AsFd::as_fd));
            waited.extend(self.shares.iter().map(|share| share.process.as_fd()));
        }
        let stdin = io::stdin();
        let mut waited: Vec<PollFd<'_>> =
            waited.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        waited.extend(keys.and_then(Keys::wants_room).map(|fd| PollFd::new(fd, PollFlags::POLLOUT)));
        let typed = keys.filter(|keys| keys.wants_keys()).map(|_| waited.len());
        waited.extend(typed.map(|_| PollFd::new(stdin.as_fd(), PollFlags::POLLIN)));
        match poll(&mut waited, left.map_or(PollTimeout::NONE, timeout)) {
            Ok(_) => Ok(typed.and_then(|at| waited.get(at)).and_then(PollFd::any).unwrap_or(false)),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}
