//! The guest's services: `/etc/portway/services`, one a line, `NAME PROGRAM ARGUMENT…`.
//!
//! Words are split at blanks, without quoting: what needs a shell is a script. A service that ends is reported
//! and stays down; a restart that hides a crash is worse than a service that is missing. The agent's own service is the
//! exception.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::console::say;
use crate::run::UNWANTED;

const SERVICES: &str = "/etc/portway/services";

/// One line of the file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
}

/// Parses the file; a line without a program is answered with its number.
pub(crate) fn parse(text: &str) -> Vec<Result<Service, usize>> {
    let mut services = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let mut words = line.split_whitespace().map(str::to_owned);
        let Some(name) = words.next().filter(|name| !name.starts_with('#')) else { continue };
        services.push(match words.next() {
            Some(program) => Ok(Service { name, program, args: words.collect() }),
            None => Err(index + 1),
        });
    }
    services
}

/// The name of the agent's own service, which pid 1 starts beside those of the file.
const AGENT: &str = "agent";
/// Until it is started again when it has ended: it is the one service that others are told to rely on.
const AGENT_AGAIN: Duration = Duration::from_secs(1);

/// More options of `portway-agent run`: words of all lines, without quoting, as those of services.
const AGENT_OPTIONS: &str = "/etc/portway/agent";

/// `portway-agent run`, in a process of its own: whatever becomes of it, pid 1 stays.
fn agent(options: &str) -> Service {
    let lines = options.lines().filter(|line| !line.trim_start().starts_with('#'));
    let words = lines.flat_map(str::split_whitespace).map(str::to_owned);
    let args = std::iter::once("run".to_owned()).chain(words).collect();
    Service { name: AGENT.into(), program: "/proc/self/exe".into(), args }
}

fn agent_options() -> String {
    match fs::read_to_string(AGENT_OPTIONS) {
        Ok(text) => text,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                say(&format!("cannot read {AGENT_OPTIONS}: {error}"));
            }
            String::new()
        }
    }
}

/// The processes the agent started, by pid, so that their end can be told by name.
#[derive(Debug, Default)]
pub(crate) struct Running {
    names: HashMap<Pid, String>,
    /// When the agent's own service is started again.
    agent_at: Option<Instant>,
}

impl Running {
    /// Starts every service of the file.
    pub(crate) fn start_all(&mut self) {
        let text = match fs::read_to_string(SERVICES) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return say(&format!("cannot read {SERVICES}: {error}")),
        };
        for service in parse(&text) {
            match service {
                Ok(service) => self.start(&service),
                Err(line) => say(&format!("{SERVICES} line {line}: a name and a program are needed")),
            }
        }
    }

    /// Starts the agent's own service, where there is a way to a host.
    pub(crate) fn start_agent(&mut self) {
        if Path::new("/dev/vsock").exists() {
            self.start(&agent(&agent_options()));
        }
    }

    /// When [`Self::tick`] has something to do.
    pub(crate) const fn next(&self) -> Option<Instant> {
        self.agent_at
    }

    /// Starts again what is to be started again now.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.agent_at.take_if(|at| *at <= now).is_some() {
            self.start(&agent(&agent_options()));
        }
    }

    /// Starts one program under a name.
    pub(crate) fn start(&mut self, service: &Service) {
        let mut command = Command::new(&service.program);
        command
            .args(&service.args)
            .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
            .env("HOME", "/root")
            .stdin(Stdio::null());
        with_no_signal_blocked(&mut command);
        match command.spawn().map(|child| i32::try_from(child.id())) {
            // The `Child` is dropped on purpose: pid 1 reaps everything in one place, by waitpid(-1).
            Ok(Ok(pid)) => {
                self.names.insert(Pid::from_raw(pid), service.name.clone());
                say(&format!("started {}", service.name));
            }
            Ok(Err(_)) => say(&format!("{}: the kernel gave a pid out of range", service.name)),
            Err(error) => say(&format!("cannot start {} ({}): {error}", service.name, service.program)),
        }
    }

    /// Tells that a process ended, if it was one of ours; orphans that came to pid 1 go without a word.
    pub(crate) fn ended(&mut self, status: WaitStatus) {
        let (pid, how) = match status {
            WaitStatus::Exited(pid, code) => (pid, format!("ended with status {code}")),
            WaitStatus::Signaled(pid, signal, _) => (pid, format!("was ended by {signal}")),
            _ => return,
        };
        let unwanted = matches!(status, WaitStatus::Exited(_, code) if code == i32::from(UNWANTED));
        match self.names.remove(&pid) {
            Some(name) if name == AGENT && !unwanted => {
                say(&format!("{name} {how}; it is started again"));
                self.agent_at = Some(Instant::now() + AGENT_AGAIN);
            }
            Some(name) => say(&format!("{name} {how}; it is not restarted")),
            None => {}
        }
    }
}

/// Pid 1 blocks the signals it reads from its signalfd, and a child inherits that: dropbear would never hear of
/// its own children's end, and nobody of SIGTERM.
fn with_no_signal_blocked(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec of a process with one thread and calls only sigemptyset and
    // pthread_sigmask, which are async-signal-safe (signal-safety(7)); it allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_name_a_program_and_its_arguments() {
        let services = parse("# comment\n\nssh  /bin/dropbear -F -E\n");
        let expected = Service {
            name: "ssh".into(),
            program: "/bin/dropbear".into(),
            args: vec!["-F".into(), "-E".into()],
        };
        assert_eq!(services, [Ok(expected)]);
    }

    #[test]
    fn the_agents_options_are_words_of_its_file() {
        assert_eq!(agent("").args, ["run"]);
        let text = "# vsudd's\n--inport 2374:unix:/run/docker.sock\n\n  --no-clock\n";
        assert_eq!(agent(text).args, ["run", "--inport", "2374:unix:/run/docker.sock", "--no-clock"]);
    }

    #[test]
    fn a_line_without_a_program_is_answered_with_its_number() {
        assert_eq!(parse("# one\nlonely\n"), [Err(2)]);
    }
}
