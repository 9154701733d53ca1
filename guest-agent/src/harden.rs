//! What the agent gives up once it has what it needs. The host may be trusted, but whoever connects to a carried port, asks at
//! the local socket or names a rule is not, and an agent that is taken over should be worth little.
//!
//! | thread | capabilities that stay (of root's) | calls that end the process |
//! |---|---|---|
//! | the service | `DAC_OVERRIDE` (sockets of other users), `SYS_TIME` (unless `--no-clock`) | [`FATAL`] and [`PROGRAMS`] |
//! | the reader of rules | `NET_ADMIN`, `NET_RAW`: what nft and iptables-save ask the kernel with | [`FATAL`] |
//! | `expose-port` | none | [`FATAL`] and [`PROGRAMS`] |
//!
//! All of them: `no_new_privs`, not dumpable, the bounding set no larger than what some thread keeps. Sources: `capabilities(7)`,
//! `PR_SET_NO_NEW_PRIVS` and `PR_SET_DUMPABLE` of `prctl(2)`, `seccomp(2)`. Not here: Landlock, for unix sockets are carried to and
//! from any path of the guest that the host's rules name. What a kernel refuses is said and goes without: a guest with a network
//! and half a sandbox is better off than one without a network.

use std::collections::{BTreeMap, HashSet};

use caps::{CapSet, Capability};
use nix::libc;
use nix::sys::prctl;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::console::say;

/// Capabilities of the thread that reads the rules, and of the tools it starts.
const READER: [Capability; 2] = [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW];

/// Calls no thread of ours makes, and which somebody who has taken one over makes first.
const FATAL: &[i64] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_acct,
    libc::SYS_personality,
];

/// Starting a program, which only the reader of rules does.
const PROGRAMS: &[i64] = &[libc::SYS_execve, libc::SYS_execveat];

/// What the service keeps.
fn of_the_service(clock: bool) -> HashSet<Capability> {
    let clock = clock.then_some(Capability::CAP_SYS_TIME);
    [Capability::CAP_DAC_OVERRIDE].into_iter().chain(clock).collect()
}

/// Before any thread starts, so that all of them have it: what no thread needs goes. `redirections`: there will be a reader of rules.
pub(crate) fn every_thread(clock: bool, redirections: bool) {
    let mut keep = of_the_service(clock);
    if redirections {
        keep.extend(READER);
    }
    tell("no_new_privs", prctl::set_no_new_privs());
    tell("not dumpable", prctl::set_dumpable(false));
    bound_to(&keep);
    keep_only(&keep);
    forbid(&[FATAL]);
}

/// The thread of the service, when the others have started.
pub(crate) fn service(clock: bool) {
    keep_only(&of_the_service(clock));
    forbid(&[PROGRAMS]);
}

/// The thread that reads rules.
pub(crate) fn reader() {
    keep_only(&READER.into());
}

/// A process that only carries bytes, before its threads start.
pub(crate) fn carrier() {
    tell("no_new_privs", prctl::set_no_new_privs());
    tell("not dumpable", prctl::set_dumpable(false));
    bound_to(&HashSet::new());
    keep_only(&HashSet::new());
    forbid(&[FATAL, PROGRAMS]);
}

fn tell(part: &str, done: nix::Result<()>) {
    if let Err(errno) = done {
        say(&format!("{part}: not on this kernel ({})", errno.desc()));
    }
}

/// Empties the bounding set but for `keep`. Only who has `CAP_SETPCAP` may; no_new_privs makes the rest of no use to others.
fn bound_to(keep: &HashSet<Capability>) {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        return;
    }
    for capability in caps::runtime::thread_all_supported().difference(keep) {
        if let Err(error) = caps::drop(None, CapSet::Bounding, *capability) {
            return say(&format!("{capability} stays in the bounding set: {error}"));
        }
    }
}

/// Gives up every capability of this thread but `keep`, of which it keeps what it has.
fn keep_only(keep: &HashSet<Capability>) {
    let reduce = || -> Result<(), caps::errors::CapsError> {
        if caps::runtime::ambient_set_supported().is_ok() {
            caps::clear(None, CapSet::Ambient)?;
        }
        caps::clear(None, CapSet::Inheritable)?;
        let left = caps::read(None, CapSet::Permitted)?.intersection(keep).copied().collect();
        caps::set(None, CapSet::Effective, &left)?;
        caps::set(None, CapSet::Permitted, &left)
    };
    if let Err(error) = reduce() {
        say(&format!("capabilities stay as they are: {error}"));
    }
}

/// Makes these calls end the process, on this thread and those it starts.
fn forbid(tables: &[&[i64]]) {
    let done = filter(tables).and_then(|f| seccompiler::apply_filter(&f).map_err(|e| e.to_string()));
    if let Err(error) = done {
        say(&format!("no filter of system calls: {error}"));
    }
}

fn filter(tables: &[&[i64]]) -> Result<BpfProgram, String> {
    let rules: BTreeMap<_, _> = tables.iter().copied().flatten().map(|call| (*call, Vec::new())).collect();
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::KillProcess, arch)
        .map_err(|e| e.to_string())?;
    BpfProgram::try_from(filter).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use super::*;

    #[test]
    fn a_service_that_starts_a_program_is_ended_and_the_reader_of_rules_is_not() {
        for (tables, ended) in [(&[FATAL, PROGRAMS][..], true), (&[FATAL], false)] {
            let program = filter(tables).expect("a filter");
            let mut command = Command::new("true");
            // SAFETY: between fork and exec only prctl and seccomp are called, on what was made before.
            unsafe {
                command.pre_exec(move || {
                    prctl::set_no_new_privs()?;
                    seccompiler::apply_filter(&program).map_err(|_| std::io::ErrorKind::Other.into())
                });
            }
            let status = command.status().expect("a process");
            assert_eq!(status.signal() == Some(libc::SIGSYS), ended, "{status}");
        }
    }

    #[test]
    fn the_filters_compile_and_only_the_reader_may_start_programs() {
        filter(&[FATAL]).expect("a filter");
        filter(&[FATAL, PROGRAMS]).expect("a filter");
        assert!(PROGRAMS.iter().all(|call| !FATAL.contains(call)));
    }

    #[test]
    fn the_clock_is_the_services_only_when_it_may_be_set() {
        assert!(of_the_service(true).contains(&Capability::CAP_SYS_TIME));
        assert!(!of_the_service(false).contains(&Capability::CAP_SYS_TIME));
        assert!(READER.iter().all(|c| !of_the_service(true).contains(c)));
    }
}
