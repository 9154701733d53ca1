//! The seccomp filters: what is in [`calls::ALL`] goes, all else is refused with `EPERM` and told, [`calls::FATAL`] ends
//! the process.
//!
//! Refused and not fatal, because a call a C library begins to make with its next version must not cost every guest its
//! network; told, because it must be seen ([`super::refused`]). The kernel takes the strictest of several filters, so each
//! answer is a filter of its own. Calls without a condition cost nothing: the kernel remembers that they always go
//! (Linux 5.11, `seccomp_cache`).

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::calls::{self, Call, Only};
use super::refused;

/// Whether this kernel has filters: without `CONFIG_SECCOMP_FILTER` the file is not there.
pub(super) fn is_there() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").is_ok_and(|all| all.contains("trap"))
}

/// Puts every thread of the process, and every thread that comes, under the filters.
///
/// # Errors
/// What the kernel lacks, in words.
pub(super) fn install() -> Result<(), String> {
    let programs = programs()?;
    refused::watch().map_err(|e| format!("SIGSYS cannot be handled: {e}"))?;
    for program in &programs {
        seccompiler::apply_filter_all_threads(program).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The filters, in the order in which they are put in place: `seccomp(2)` itself is in no table, so the list comes last.
fn programs() -> Result<[BpfProgram; 3], String> {
    let fatal = calls::FATAL.iter().map(|c| (c.number, Vec::new())).collect();
    let absent = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok([
        compile(fatal, SeccompAction::Allow, SeccompAction::KillProcess)?,
        compile([(libc::SYS_clone3, Vec::new())].into(), SeccompAction::Allow, absent)?,
        listed()?,
    ])
}

/// A program that does `these` on `rules`, and `others` on all else.
fn compile(
    rules: std::collections::BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    let filter = SeccompFilter::new(rules, others, these, arch).map_err(|e| e.to_string())?;
    BpfProgram::try_from(filter).map_err(|e| e.to_string())
}

fn listed() -> Result<BpfProgram, String> {
    let mut rules = std::collections::BTreeMap::<i64, Option<Vec<SeccompRule>>>::new();
    for call in calls::ALL.iter().flat_map(|(_, calls)| calls.iter()) {
        let mine = conditions(call)?;
        let all = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
        // Who allows everything allows more than who does not.
        match (&mut *all, mine) {
            (_, None) => *all = None,
            (Some(known), Some(more)) => known.extend(more),
            (None, Some(_)) => {}
        }
    }
    let rules = rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default())).collect();
    compile(rules, refused::ACTION, SeccompAction::Allow)
}

/// The rules one of which has to hold; `None`: none is needed.
fn conditions(call: &Call) -> Result<Option<Vec<SeccompRule>>, String> {
    // The kernel looks at the lower half of an int, and a filter must not be stricter or laxer than the kernel.
    let rule = |arg, op, value| {
        let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value);
        condition.and_then(|c| SeccompRule::new(vec![c])).map_err(|e| e.to_string())
    };
    match call.only {
        Only::Any => Ok(None),
        Only::Without(arg, bits) => rule(arg, SeccompCmpOp::MaskedEq(bits), 0).map(|r| Some(vec![r])),
        Only::With(arg, bits) => rule(arg, SeccompCmpOp::MaskedEq(bits), bits).map(|r| Some(vec![r])),
        Only::OneOf(arg, values) => {
            values.iter().map(|v| rule(arg, SeccompCmpOp::Eq, *v)).collect::<Result<_, _>>().map(Some)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use super::*;

    /// Puts the calling thread alone under the filters.
    fn on_this_thread() {
        refused::watch().unwrap();
        nix::sys::prctl::set_no_new_privs().unwrap();
        for program in programs().unwrap() {
            seccompiler::apply_filter(&program).unwrap();
        }
    }

    #[test]
    fn a_call_that_is_not_listed_fails_with_eperm_and_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&file, "x").unwrap();
        let before = refused::count();
        let outcome = std::thread::spawn(move || {
            on_this_thread();
            let refused = std::fs::hard_link(&file, &link);
            (refused.map_err(|e| e.raw_os_error()), std::fs::read(&file).map_err(|e| e.to_string()))
        });
        let (refused, read) = outcome.join().unwrap();
        assert_eq!(refused, Err(Some(libc::EPERM)));
        assert_eq!(read, Ok(b"x".to_vec()), "what is listed goes on");
        assert!(refused::count() > before);
        let number = format!("number {}", libc::SYS_linkat);
        assert!(refused::Teller::default().news().contains(&number));
    }

    #[test]
    fn arguments_are_looked_at() {
        let outcome = std::thread::spawn(|| {
            on_this_thread();
            let raw = nix::sys::socket::socket(
                nix::sys::socket::AddressFamily::Packet,
                nix::sys::socket::SockType::Raw,
                nix::sys::socket::SockFlag::empty(),
                None,
            );
            (
                raw.err(),
                std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
                std::thread::spawn(|| 7).join().ok(),
            )
        });
        assert_eq!(outcome.join().unwrap(), (Some(nix::Error::EPERM), true, Some(7)));
    }

    #[test]
    fn starting_a_program_ends_the_process() {
        let programs = programs().unwrap();
        let mut command = Command::new("true");
        // SAFETY: between fork and exec only system calls are made: prctl and seccomp.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_no_new_privs()?;
                // The first kills; the list would refuse what std does when `exec` comes back.
                seccompiler::apply_filter(&programs[0]).map_err(|e| std::io::Error::other(e.to_string()))
            })
        };
        let ended = command.status().unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGSYS), "{ended:?}");
    }
}
