//! What the process is allowed by who it is: user, capabilities, `no_new_privs`, `dumpable`.
//!
//! Root becomes somebody else. Who: `--runas`, else the first of *nobody* and the owners of our directories who can do
//! there what we do later (make, rename and remove sockets and state files). When that is nobody but root, user 0 stays,
//! without any capability and behind Landlock, and the report says so.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use caps::CapSet;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, User, chown, getegid, geteuid, setgroups, setresgid, setresuid};
use portway_api::control::SandboxPart;

use super::paths::Paths;
use crate::config::ConfigError;

/// Threads of this process, as far as that can be known.
pub(super) fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, |tasks| tasks.count())
}

/// Stops being root. Answers who we are now, for people.
///
/// # Errors
/// When `wanted` is no user, or cannot be had.
pub(super) fn become_user(wanted: Option<&str>, paths: &Paths) -> Result<String, ConfigError> {
    let fault = |text: String| ConfigError::new("--runas", text);
    let (me, my_group) = (geteuid(), getegid());
    let named = wanted.map(known).transpose()?;
    if !me.is_root() {
        return match named {
            Some((uid, _)) if uid != me => {
                Err(fault(format!("only root can become another user, and this is user {me}")))
            }
            _ => Ok(format!("uid {me}")),
        };
    }
    let (uid, gid) = match named {
        Some((uid, gid)) => {
            hand_over(uid, gid, paths);
            (uid, gid)
        }
        None => match candidates(paths)
            .into_iter()
            .find(|(uid, gid)| paths.write.iter().all(|d| can(*uid, *gid, d)))
        {
            Some(user) => user,
            None => {
                return Ok("uid 0, whose directories nobody else may write (--runas chooses another)".into());
            }
        },
    };
    let changed =
        setgroups(&[gid]).and_then(|()| setresgid(gid, gid, gid)).and_then(|()| setresuid(uid, uid, uid));
    if let Err(error) = changed {
        // Root of a user namespace may have nobody else to become (user_namespaces(7)), and is an ordinary user outside of it.
        if wanted.is_none() && geteuid() == me && getegid() == my_group {
            return Ok(format!("uid {me}, which may become nobody else here ({})", error.desc()));
        }
        return Err(fault(format!("cannot become user {uid}: {}", error.desc())));
    }
    if geteuid() != uid || getegid() != gid || (!uid.is_root() && setresuid(me, me, me).is_ok()) {
        return Err(fault(format!("the kernel did not make this process user {uid}")));
    }
    Ok(format!("uid {uid}"))
}

/// The user whom `--runas` names.
pub(super) fn known(name: &str) -> Result<(Uid, Gid), ConfigError> {
    user_called(name).ok_or_else(|| ConfigError::new("--runas", format!("{name:?} is no user here")))
}

fn user_called(name: &str) -> Option<(Uid, Gid)> {
    let by_number = || name.parse().ok().and_then(|n| User::from_uid(Uid::from_raw(n)).ok().flatten());
    let user = User::from_name(name).ok().flatten().or_else(by_number)?;
    Some((user.uid, user.gid))
}

/// Gives `uid` what it will need: directories of ours, and our sockets in them.
fn hand_over(uid: Uid, gid: Gid, paths: &Paths) {
    for path in &paths.ours {
        if let Err(error) = chown(path, Some(uid), Some(gid)) {
            tracing::debug!(%error, path = %path.display(), "not handed over");
        }
    }
    for directory in paths.write.iter().filter(|d| !can(uid, gid, d)) {
        tracing::warn!(directory = %directory.display(), %uid, "the user of --runas may not write there: sockets stay behind at the end, and state cannot be kept");
    }
}

fn candidates(paths: &Paths) -> Vec<(Uid, Gid)> {
    let owners = paths.write.iter().filter_map(|d| {
        let meta = std::fs::metadata(d).ok()?;
        Some((Uid::from_raw(meta.uid()), Gid::from_raw(meta.gid())))
    });
    user_called("nobody").into_iter().chain(owners).filter(|(uid, _)| !uid.is_root()).collect()
}

/// Whether a user without other groups can make and remove files in `directory`. Access lists are not looked at.
fn can(uid: Uid, gid: Gid, directory: &Path) -> bool {
    const SEARCH: u32 = 1;
    const CHANGE: u32 = 3;
    const STICKY: u32 = 0o1000;
    const OWNER: u32 = 6;
    let Ok(real) = directory.canonicalize() else {
        // Not there, and so nothing of ours is.
        return true;
    };
    real.ancestors().all(|at| {
        let Ok(meta) = std::fs::metadata(at) else { return false };
        let shift = if meta.uid() == uid.as_raw() {
            OWNER
        } else if meta.gid() == gid.as_raw() {
            3
        } else {
            0
        };
        let need = if at == real { CHANGE } else { SEARCH };
        // In a sticky directory only its owner removes what is another's, and our sockets are root's.
        let sticky = at == real && meta.mode() & STICKY != 0 && shift != OWNER;
        (meta.mode() >> shift) & need == need && !sticky
    })
}

/// Empties the bounding set: what the process could get by starting a program. Only `CAP_SETPCAP` may, and it goes when
/// root becomes another user, so this comes first. False where it may not.
pub(super) fn empty_bounding_set() -> bool {
    caps::runtime::thread_all_supported()
        .into_iter()
        .all(|capability| caps::drop(None, CapSet::Bounding, capability).is_ok())
}

/// Gives every capability up. `bounded`: what [`empty_bounding_set`] said.
pub(super) fn drop_capabilities(bounded: bool) -> Result<String, String> {
    let clear = |set| caps::clear(None, set).map_err(|e| e.to_string());
    if caps::runtime::ambient_set_supported().is_ok() {
        clear(CapSet::Ambient)?;
    }
    clear(CapSet::Inheritable)?;
    clear(CapSet::Effective)?;
    clear(CapSet::Permitted)?;
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        if !caps::read(None, set).map_err(|e| e.to_string())?.is_empty() {
            return Err(format!("the {set:?} set is not empty"));
        }
    }
    Ok(match bounded {
        true => "none, and none in the bounding set".into(),
        // No program can be started that would take something from it: no_new_privs, and execve is fatal.
        false => "none; the bounding set stays, for only CAP_SETPCAP may empty it".into(),
    })
}

/// Nothing this process starts gets more than it has.
pub(super) fn no_new_privileges() -> Result<String, String> {
    prctl::set_no_new_privs().map_err(|e| e.desc().to_owned())?;
    Ok("set".into())
}

/// No core dumps, and no other process of the user may look into the memory.
pub(super) fn not_dumpable() -> Result<String, String> {
    prctl::set_dumpable(false).map_err(|e| e.desc().to_owned())?;
    Ok("set".into())
}

/// Compares what was done with what the kernel says of this thread; a part that is not so is missing. `bounded`: what
/// [`empty_bounding_set`] said.
pub(super) fn check(parts: &mut [SandboxPart], bounded: bool) {
    const NONE: &str = "0000000000000000";
    let Ok(status) = std::fs::read_to_string("/proc/thread-self/status") else {
        tracing::debug!("/proc is not there: the sandbox cannot be looked at from outside");
        return;
    };
    let wanted = [
        ("capabilities", "CapEff", NONE),
        ("capabilities", "CapPrm", NONE),
        ("capabilities", "CapInh", NONE),
        ("no_new_privs", "NoNewPrivs", "1"),
        ("seccomp", "Seccomp", "2"),
    ];
    let bound = bounded.then_some(("capabilities", "CapBnd", NONE));
    for (name, line, wanted) in wanted.into_iter().chain(bound) {
        let found = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':').map(str::trim));
        let Some(part) = parts.iter_mut().find(|p| p.name == name && p.in_force) else { continue };
        if found.is_some_and(|f| f != wanted) {
            part.in_force = false;
            part.detail = format!("the kernel says {line} {}", found.unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_user_needs_every_directory_on_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, nobody) = (dir.path().join("inner"), (Uid::from_raw(65_534), Gid::from_raw(65_534)));
        std::fs::create_dir(&inner).unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
        mode(&inner, 0o777).unwrap();
        mode(dir.path(), 0o700).unwrap();
        assert!(!can(nobody.0, nobody.1, &inner));
        mode(dir.path(), 0o711).unwrap();
        assert!(can(nobody.0, nobody.1, &inner));
        mode(&inner, 0o755).unwrap();
        assert!(!can(nobody.0, nobody.1, &inner));
    }

    #[test]
    fn an_unknown_user_is_said() {
        let error = become_user(Some("no-such-user"), &Paths::default()).unwrap_err().to_string();
        assert!(error.starts_with("--runas: \"no-such-user\" is no user"), "{error}");
    }
}
