//! The system calls a running sidecar may make: the sum of small tables that stand beside the code that needs them.
//!
//! A module that needs a call others do not has a `pub(crate) const CALLS: &[Call] = sandbox_calls![…]` of its own and
//! a line in [`ALL`]. A call with `: Only` is allowed with those arguments alone. `tests/tests/sandbox.rs` runs the sidecar under
//! strace and fails on a call that is not here.

/// One system call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// As strace writes it.
    pub(crate) name: &'static str,
    /// The kernel's number on this architecture.
    pub(crate) number: i64,
    /// With which arguments.
    pub(crate) only: Only,
}

/// What an argument has to be; arguments are counted from 0.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Only {
    /// Anything.
    Any,
    /// None of these bits is set in the argument.
    Without(u8, u64),
    /// All of these bits are set in the argument.
    With(u8, u64),
    /// The argument is one of these.
    OneOf(u8, &'static [u64]),
}

/// A table of [`Call`]s: `sandbox_calls![SYS_read, SYS_ioctl: Only::OneOf(1, &[…])]`. The names are `libc`'s; one that an
/// architecture does not have stands behind a `#[cfg(target_arch = "x86_64")]`.
macro_rules! sandbox_calls {
    ($($(#[$attr:meta])* $call:ident $(: $only:expr)?),* $(,)?) => {
        &[$($(#[$attr])* $crate::sandbox::Call {
            name: $crate::sandbox::calls::without_prefix(stringify!($call)),
            number: nix::libc::$call,
            only: { #[allow(unused_assignments, unused_mut, reason = "not every call has arguments to look at")]
                const ONLY: $crate::sandbox::Only = { let mut only = $crate::sandbox::Only::Any; $(only = $only;)? only };
                ONLY },
        }),*]
    };
}
pub(crate) use sandbox_calls;

/// `read` of `SYS_read`.
pub(crate) const fn without_prefix(name: &'static str) -> &'static str {
    name.split_at(4).1
}

/// Every table, and whose it is.
pub(crate) const ALL: &[(&str, &[Call])] = &[
    ("the C library and the Rust runtime", RUNTIME),
    ("descriptors of every kind", DESCRIPTORS),
    ("driver and tokio: waiting", WAITING),
    ("driver: its timer", crate::driver::CALLS),
    ("host: sockets of flows", crate::host::CALLS),
    ("datagrams", crate::datagrams::CALLS),
    ("rings", crate::rings::CALLS),
    ("link: VMMs that come and go", crate::link::CALLS),
    ("publish: listeners", crate::publish::CALLS),
    ("dns: files that are read again", crate::dns::CALLS),
    ("ssh: keys that are not swapped out", crate::ssh::CALLS),
    ("sidecar: state files", crate::sidecar::CALLS),
    ("sidecar: its supervisor", crate::sidecar::SUPERVISOR_CALLS),
];

/// Memory, threads, signals and the end. Memory is never both writable and executable, and a new task is a thread.
const RUNTIME: &[Call] = sandbox_calls![
    SYS_brk,
    SYS_mmap: Only::Without(2, PROT_EXEC),
    SYS_mprotect: Only::Without(2, PROT_EXEC),
    SYS_munmap,
    SYS_mremap,
    SYS_futex,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    // Its flags lie in memory, where a filter cannot look: `filter` answers ENOSYS, and the C library takes clone.
    SYS_clone3,
    SYS_clone: Only::With(0, THREAD),
    SYS_set_robust_list,
    SYS_rseq,
    SYS_gettid,
    SYS_getpid,
    SYS_prctl: Only::OneOf(0, &[PR_SET_NAME]),
    SYS_sigaltstack,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_restart_syscall,
    // abort() sends itself a signal. To other processes a signal is Landlock's to refuse.
    SYS_tgkill,
    SYS_exit,
    SYS_exit_group,
    SYS_getrandom,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    // How much memory and time the process takes and may take, for its metrics; of no other process.
    SYS_getrusage,
    SYS_prlimit64: Only::OneOf(0, &[0]),
    // Paths of API clients are made absolute.
    SYS_getcwd,
];

const PROT_EXEC: u64 = 4;
const PR_SET_NAME: u64 = 15;
/// `CLONE_VM | CLONE_SIGHAND | CLONE_THREAD`: a thread of this process and not a process of its own.
const THREAD: u64 = 0x100 | 0x800 | 0x1_0000;

const DESCRIPTORS: &[Call] = sandbox_calls![
    SYS_read,
    SYS_readv,
    SYS_write,
    SYS_writev,
    SYS_close,
    SYS_fcntl: Only::OneOf(1, &[F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC]),
    // Whether calls return at once, and whether something is a terminal.
    SYS_ioctl: Only::OneOf(1, &[FIONBIO, TCGETS]),
    SYS_eventfd2,
];

const F_GETFD: u64 = 1;
const F_SETFD: u64 = 2;
const F_GETFL: u64 = 3;
const F_SETFL: u64 = 4;
const F_DUPFD_CLOEXEC: u64 = 1030;
const FIONBIO: u64 = 0x5421;
const TCGETS: u64 = 0x5401;

const WAITING: &[Call] = sandbox_calls![
    #[cfg(target_arch = "x86_64")]
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_epoll_ctl,
    SYS_epoll_create1,
    #[cfg(target_arch = "x86_64")]
    SYS_poll,
    SYS_ppoll,
];

/// Calls nothing of ours ever makes, and which somebody who has taken the process over makes first. They end it.
pub(crate) const FATAL: &[Call] = sandbox_calls![
    SYS_execve,
    SYS_execveat,
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_pidfd_getfd,
    SYS_setns,
    SYS_unshare,
    SYS_mount,
    SYS_umount2,
    SYS_pivot_root,
    SYS_chroot,
    SYS_open_by_handle_at,
    SYS_bpf,
    SYS_perf_event_open,
    SYS_userfaultfd,
    SYS_io_uring_setup,
    SYS_keyctl,
    SYS_add_key,
    SYS_request_key,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_kexec_load,
    SYS_reboot,
    SYS_swapon,
    SYS_acct,
    SYS_settimeofday,
    SYS_clock_settime,
    SYS_personality,
];

/// The name of a call, for people: that of a table, else its number.
pub(crate) fn name(number: usize) -> String {
    let tables = ALL.iter().flat_map(|(_, calls)| calls.iter()).chain(FATAL);
    let known = tables.into_iter().find(|c| usize::try_from(c.number) == Ok(number));
    known.map_or_else(|| format!("number {number}"), |c| c.name.to_owned())
}

#[cfg(test)]
mod tests {
    use nix::libc;

    use super::*;

    #[test]
    fn no_call_is_both_needed_and_fatal() {
        for (whose, calls) in ALL {
            for call in *calls {
                assert!(FATAL.iter().all(|f| f.number != call.number), "{whose}: {}", call.name);
            }
        }
    }

    #[test]
    fn calls_have_the_names_strace_gives_them() {
        assert_eq!(name(usize::try_from(libc::SYS_execve).unwrap()), "execve");
        assert_eq!(name(100_000), "number 100000");
    }
}
