//! Pid 1 of a small guest.
//!
//! ```text
//! mounts ─► modules ─► loopback ─► DHCP client ─► agent ─► services ─┐
//!                                                                     ▼
//!            poll: signals · DHCP events · power button ─► "ready" once there is a lease
//!                                                           ▼
//!            power button, SIGTERM, SIGINT, SIGUSR1/2 ─► TERM and HUP to all ─► 2 s ─► KILL ─► sync ─► power off
//! ```
//! Nothing here may fail the boot: what does not work is said on the console and the rest goes on. Pid 1 never
//! returns while the guest can still be powered off, since the kernel panics when it does.

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};

use crate::console::say;
use crate::events::{Event, Events};
use crate::power::Button;
use crate::services::Running;
use crate::{kernel, network};

/// How long processes have between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// When a missing lease is worth a line.
const LEASE_PATIENCE: Duration = Duration::from_secs(15);

/// Signals pid 1 listens to. Busybox's `halt`, `poweroff` and `reboot` send USR1, USR2 and TERM; the guest has no
/// state that outlives it, so all of them power off.
const SIGNALS: [Signal; 5] =
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2];

/// Brings the guest up, looks after it, powers it off.
pub(crate) fn run() -> ExitCode {
    say(&format!("version {} as pid 1", env!("CARGO_PKG_VERSION")));
    let reason = match supervise() {
        Ok(reason) => reason,
        Err(error) => format!("cannot go on: {error}"),
    };
    say(&format!("powering off: {reason}"));
    power_off()
}

/// From the first mount to the reason for powering off.
fn supervise() -> io::Result<String> {
    // Before the first child, so that no SIGCHLD is lost.
    let signals = block_signals()?;
    kernel::mount_all();
    kernel::load_modules();
    let mut guest = Guest { running: Running::default(), started: Instant::now(), lease: Lease::Awaited };
    let mut events = Events::open()?;
    let mut buttons = Button::all()?;
    guest.start_network();
    guest.running.start_agent();
    guest.running.start_all();
    loop {
        let mut waited = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(events.as_fd(), PollFlags::POLLIN),
        ];
        waited.extend(buttons.iter().map(|button| PollFd::new(button.as_fd(), PollFlags::POLLIN)));
        match poll(&mut waited, guest.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        drop(waited);
        while let Some(signal) = signals.read_signal()? {
            match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                Ok(Ok(Signal::SIGCHLD)) => guest.reap(),
                Ok(Ok(signal)) => return Ok(signal.to_string()),
                _ => {}
            }
        }
        for event in events.read()? {
            guest.handle(event);
        }
        // A device that cannot be read any more (unplugged) is let go, or poll would spin on it.
        let mut pressed = false;
        buttons.retain_mut(|button| match button.pressed() {
            Ok(now) => {
                pressed |= now;
                true
            }
            Err(_) => false,
        });
        if pressed {
            return Ok("power button".into());
        }
        guest.complain_once();
        guest.running.tick(Instant::now());
    }
}

/// Whether the guest has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lease {
    Awaited,
    /// Awaited, and the console was told so.
    Overdue,
    Held,
    /// No device to ask on.
    Impossible,
}

struct Guest {
    running: Running,
    started: Instant,
    lease: Lease,
}

impl Guest {
    fn start_network(&mut self) {
        if let Err(error) = network::loopback_up() {
            say(&format!("cannot bring loopback up: {error}"));
        }
        match network::first_ethernet() {
            Ok(Some(device)) => {
                say(&format!("network device {device}"));
                self.running.start(&network::dhcp_client(&device));
            }
            Ok(None) => {
                say("no Ethernet device: no network");
                self.lease = Lease::Impossible;
            }
            Err(error) => {
                say(&format!("cannot look for network devices: {error}"));
                self.lease = Lease::Impossible;
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Lease(address) => {
                say(&format!("lease {address}"));
                if self.lease != Lease::Held {
                    self.lease = Lease::Held;
                    say("ready");
                }
            }
        }
    }

    fn reap(&mut self) {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(status) => self.running.ended(status),
                Err(Errno::EINTR) => {}
                Err(errno) => return say(&format!("waitpid: {errno}")),
            }
        }
    }

    fn timeout(&self) -> PollTimeout {
        let overdue =
            (self.lease == Lease::Awaited).then(|| LEASE_PATIENCE.saturating_sub(self.started.elapsed()));
        let again = self.running.next().map(|at| at.saturating_duration_since(Instant::now()));
        match overdue.into_iter().chain(again).min() {
            // One millisecond more than the rest: the time is there when poll returns.
            Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::NONE),
            None => PollTimeout::NONE,
        }
    }

    fn complain_once(&mut self) {
        if self.lease == Lease::Awaited && self.started.elapsed() >= LEASE_PATIENCE {
            self.lease = Lease::Overdue;
            say(&format!("no lease after {} s; still asking", LEASE_PATIENCE.as_secs()));
        }
    }
}

fn block_signals() -> io::Result<SignalFd> {
    let set: SigSet = SIGNALS.into_iter().collect();
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

/// Ends every process and switches the machine off; does not come back unless the kernel refuses.
fn power_off() -> ExitCode {
    // Pid -1 is every process but pid 1 itself. ESRCH: there is none.
    let everyone = Pid::from_raw(-1);
    let told = kill(everyone, Signal::SIGTERM);
    // An interactive shell ignores TERM and ends on HUP.
    let _ = kill(everyone, Signal::SIGHUP);
    if told.is_ok() && !all_reaped_within(GRACE) {
        let _ = kill(everyone, Signal::SIGKILL);
    }
    sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(errno) => {
            say(&format!("the kernel does not power off: {errno}"));
            ExitCode::FAILURE
        }
    }
}

/// Reaps until no child is left (true) or the time is over (false). SIGCHLD is still blocked here, so the wait
/// is a `sigtimedwait` in all but name: a signalfd of its own, and poll.
fn all_reaped_within(grace: Duration) -> bool {
    let deadline = Instant::now() + grace;
    let Ok(signals) = block_signals() else { return false };
    loop {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Err(Errno::ECHILD) => return true,
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut waited = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        // Rounded up: a rest below one millisecond must not become a busy loop.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::ZERO);
        if poll(&mut waited, timeout).is_err_and(|errno| errno != Errno::EINTR) {
            return false;
        }
        while matches!(signals.read_signal(), Ok(Some(_))) {}
    }
}
