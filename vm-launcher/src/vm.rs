//! The hypervisor, started: what it inherits, where it listens, what is kept of what it says.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::config::Console;
use crate::console_log::ConsoleLog;
use crate::guard::Guard;
use crate::hypervisor::{Control, Hypervisor};
use crate::keys::Keys;
use crate::machine::Machine;
use crate::net::Card;
use crate::process::Process;
use crate::qemu::Wires;
use crate::share::Shares;
use crate::sidecar::Link;
use crate::sockets::{Listening, OwnedDir};
use crate::state::{self, Log, StateDir};
use crate::supervise::say;
use crate::sys::Privileges;
use crate::terminal::Terminal;
use crate::{LaunchConfig, LaunchError, sys};

/// The VM's end of its link.
pub(crate) enum VmEnd {
    /// To be inherited.
    Socket(OwnedFd),
    /// To be connected to.
    Path(std::path::PathBuf),
}

/// The hypervisor.
pub(crate) struct Vm {
    pub(crate) process: Process,
    pub(crate) control: Box<dyn Control>,
    pub(crate) log: Log,
    pub(crate) console_log: ConsoleLog,
    /// What is typed, when that is for us to hand on.
    pub(crate) keys: Option<Keys>,
    /// The terminal, when the hypervisor has it itself.
    pub(crate) lent: Option<Terminal>,
    pub(crate) name: &'static str,
    _sockets: Vec<Listening>,
    _forgotten: Option<OwnedDir>,
}

impl Vm {
    #[expect(clippy::too_many_arguments, reason = "each is one checked part of the machine, used once, here")]
    /// Starts the hypervisor with everything it is connected to.
    pub(crate) fn start(
        config: &LaunchConfig,
        hypervisor: &dyn Hypervisor,
        machine: &Machine,
        state: &StateDir,
        link: Option<VmEnd>,
        shares: &Shares,
        mut terminal: Terminal,
        guard: &mut Guard,
    ) -> Result<Self, LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot make a channel for the VM", error);
        for path in hypervisor.leaves(state) {
            guard.file(&path);
        }
        let (control, theirs) = hypervisor.control(state).map_err(failed)?;
        let mut inherited = Vec::new();
        let mut inherit = |fd: OwnedFd| {
            let number = sys::number(&fd);
            inherited.push(fd);
            number
        };
        let mut wires = Wires {
            link: link.map(|end| match end {
                VmEnd::Socket(fd) => Link::Inherited(inherit(fd)),
                VmEnd::Path(path) => Link::Path(path),
            }),
            ..Wires::default()
        };
        wires.qmp = theirs.map(&mut inherit);
        let mut listening = Vec::new();
        let mut listen = |name: &str, guard: &mut Guard| {
            let path = state.path().join(name);
            guard.file(&path);
            let socket = Listening::at(&path)?;
            let fd = socket.listener.as_fd().try_clone_to_owned()?;
            listening.push(socket);
            io::Result::Ok(fd)
        };
        if hypervisor.takes_sockets() {
            wires.monitor = Some(inherit(listen(state::QMP, guard).map_err(failed)?));
            if config.console == Console::Socket {
                wires.console = Some(inherit(listen(state::CONSOLE, guard).map_err(failed)?));
            }
        }
        let (console_log, pipe) =
            ConsoleLog::start(&state.path().join(state::CONSOLE_LOG)).map_err(failed)?;
        wires.console_log = Some(inherit(pipe));
        for (tag, socket) in &shares.sockets {
            let socket = socket.try_clone().map_err(failed)?;
            wires.shares.push((tag.clone(), inherit(socket)));
        }
        let log = state.log("vm.log")?;
        let mut command = Command::new(hypervisor.program());
        command.stderr(log.writer().map_err(failed)?);
        let mut forgotten = None;
        if config.disposable {
            let tmp = state.path().join(state::TMP);
            guard.directory(&tmp);
            std::fs::create_dir_all(&tmp).map_err(failed)?;
            command.env("TMPDIR", &tmp);
            forgotten = Some(OwnedDir(tmp));
        }
        let (mut keys, mut lent) = (None, None);
        let on_stdio = config.console == Console::Stdio;
        if on_stdio && hypervisor.reads_the_terminal() && terminal.is_in_front() {
            // It changes the terminal itself, and has to be in its foreground for that.
            terminal.remember(guard).map_err(failed)?;
            lent = Some(terminal);
            wires.terminal = true;
        } else {
            command.stdin(Stdio::null());
            if on_stdio && hypervisor.reads_the_terminal() {
                let log = state.path().join(state::CONSOLE_LOG);
                let name = hypervisor.name();
                say(format_args!(
                    "the console is in {}: {name} has it on a terminal or there",
                    log.display()
                ));
            } else if on_stdio && terminal.is_there() {
                let (typed, theirs) = Keys::of(terminal).map_err(failed)?;
                command.stdin(theirs);
                keys = Some(typed);
            }
            // Not in the terminal's foreground, where Ctrl-C would end it before the guest is down.
            command.process_group(0);
        }
        command.args(hypervisor.arguments(config, machine, &wires));
        if config.console == Console::Socket {
            // Whoever reads what we say until the machine runs must not have to wait for the hypervisor's end.
            command.stdout(log.writer().map_err(failed)?);
        }
        // The bridge's helper makes the device, and belongs to root.
        let has_helper = matches!(machine.card, Card::Bridge(_));
        let privileges = if has_helper { Privileges::Perhaps } else { Privileges::Never };
        sys::prepare(&mut command, inherited, Signal::SIGKILL, privileges);
        let process = Process::start(command)?;
        guard.watch(&process, false);
        Ok(Self {
            process,
            control,
            log,
            console_log,
            keys,
            lent,
            name: hypervisor.name(),
            _sockets: listening,
            _forgotten: forgotten,
        })
    }
}
