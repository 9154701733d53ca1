//! The VM's network: a sidecar of its own from its start to its end, or a place on one that VMs share.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::guard::Guard;
use crate::machine::Machine;
use crate::net::{self, Card};
use crate::process::Process;
use crate::shared::Joined;
use crate::sidecar::{self, Link, READY_PATIENCE, Word};
use crate::signals::Signals;
use crate::state::{Log, StateDir};
use crate::supervise::END_PATIENCE;
use crate::sys::Privileges;
use crate::vm::VmEnd;
use crate::{LaunchConfig, LaunchError, sockets, sys};

/// What the VM is connected to.
#[derive(Debug)]
pub(crate) enum Network {
    /// A sidecar of its own.
    Own(Sidecar),
    /// A place on a shared one.
    Shared(Joined),
}

impl Network {
    /// Starts or joins it and waits until it is ready; the answer's other part is the VM's end of the link.
    pub(crate) fn start(
        config: &LaunchConfig,
        machine: &Machine,
        state: &StateDir,
        signals: &Signals,
        guard: &mut Guard,
    ) -> Result<(Self, VmEnd), LaunchError> {
        if let Some(shared) = &config.shared {
            let (joined, socket) = Joined::new(config, shared, machine, signals, guard)?;
            return Ok((Self::Shared(joined), VmEnd::Path(socket)));
        }
        let (mut sidecar, end) = Sidecar::start(config, machine, state, guard)?;
        sidecar.await_ready(signals)?;
        Ok((Self::Own(sidecar), end))
    }

    /// The error to tell when the network has ended under the VM.
    pub(crate) fn ended(&mut self) -> io::Result<Option<LaunchError>> {
        match self {
            Self::Own(sidecar) => sidecar.ended(),
            Self::Shared(joined) => joined.ended(),
        }
    }
}

impl AsFd for Network {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(sidecar) => sidecar.process.as_fd(),
            Self::Shared(joined) => joined.as_fd(),
        }
    }
}

/// The sidecar of one VM.
#[derive(Debug)]
pub(crate) struct Sidecar {
    process: Process,
    ready: OwnedFd,
    log: Log,
    /// Its sockets, which it removes itself when it ends in order.
    paths: Vec<std::path::PathBuf>,
}

impl Sidecar {
    /// Starts it; the answer's other part is the VM's end of the link.
    fn start(
        config: &LaunchConfig,
        machine: &Machine,
        state: &StateDir,
        guard: &mut Guard,
    ) -> Result<(Self, VmEnd), LaunchError> {
        let failed = |what| move |error: io::Error| LaunchError::system(what, error);
        let mut paths = vec![config.api.clone()];
        let mut inherited = Vec::new();
        let (link, vm_end) = if machine.card == Card::VhostUser {
            let path = net::socket(config);
            paths.push(path.clone());
            (Link::Path(path.clone()), VmEnd::Path(path))
        } else {
            let (ours, vms) = pair(&machine.card).map_err(failed("cannot make a socketpair"))?;
            let link = Link::Inherited(sys::number(&ours));
            inherited.push(ours);
            (link, VmEnd::Socket(vms))
        };
        paths.extend(crate::vsock::socket(config));
        for path in &paths {
            guard.socket(path);
        }
        let (ready, told) = sys::pipe().map_err(failed("cannot make a pipe"))?;
        let log = state.log("sidecar.log")?;
        let mut command = Command::new(&config.sidecar);
        let writer = || log.writer().map_err(failed("cannot share a log"));
        command
            .args(sidecar::arguments(config, &machine.card, &link, sys::number(&told)))
            .stdin(Stdio::null());
        command.stdout(writer()?).stderr(writer()?);
        // A group of its own: Ctrl-C in the terminal is for us, and the network is needed until the guest is down.
        command.process_group(0);
        inherited.push(told);
        // SIGTERM, so that it closes its sockets in order when we are killed.
        sys::prepare(&mut command, inherited, Signal::SIGTERM, Privileges::Perhaps);
        let process = Process::start(command)?;
        guard.watch(&process, true);
        Ok((Self { process, ready, log, paths }, vm_end))
    }

    /// Waits for `ready`, for the end of the sidecar, or for a signal.
    fn await_ready(&mut self, signals: &Signals) -> Result<(), LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot wait for the network", error);
        match sidecar::await_word(&self.ready, signals)? {
            Word::Ready => Ok(()),
            Word::Silent => Err(LaunchError::SidecarSilent { after: READY_PATIENCE, log: self.log.tail() }),
            // If it does not end by itself, it is made to.
            Word::Closed => {
                let status = match self.process.wait(END_PATIENCE).map_err(failed)? {
                    Some(status) => status,
                    None => self.process.end(END_PATIENCE).map_err(failed)?,
                };
                Err(LaunchError::SidecarNotReady { status, reason: self.log.last_words() })
            }
        }
    }

    fn ended(&mut self) -> io::Result<Option<LaunchError>> {
        let status = self.process.ended()?;
        Ok(status.map(|status| LaunchError::SidecarDied { status, log: self.log.tail() }))
    }
}

impl Drop for Sidecar {
    /// In order, whatever ended the VM. One that had to be killed has left its sockets.
    fn drop(&mut self) {
        let _ = self.process.end(END_PATIENCE);
        for path in &self.paths {
            sockets::remove_dead(path);
        }
    }
}

/// A pair of sockets for the two ends of a link.
fn pair(card: &Card) -> io::Result<(OwnedFd, OwnedFd)> {
    if *card == Card::Datagrams {
        let (ours, theirs) = UnixDatagram::pair()?;
        return Ok((ours.into(), theirs.into()));
    }
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours.into(), theirs.into()))
}
