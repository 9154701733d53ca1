//! Directories of the host in the guest: virtiofs, served by `virtiofsd`, one process for each.
//!
//! The guest mounts it by its tag: `mount -t virtiofs TAG /mnt`. Guest and `virtiofsd` meet in the guest's memory, which is
//! therefore a memfd that is shared, as with a vhost-user network card.

use std::ffi::OsString;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use nix::sys::signal::Signal;

use crate::guard::Guard;
use crate::process::Process;
use crate::state::{Log, StateDir};
use crate::sys::Privileges;
use crate::{LaunchError, programs, sockets, sys};

/// Bytes of a tag (virtio 1.2 §5.11.4).
const TAG: usize = 36;
/// Shares of one VM.
pub(crate) const SHARES: usize = 16;
/// Where distributions keep `virtiofsd`, which is no command.
const PLACES: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd/virtiofsd",
];

/// A directory to share: `DIR[,tag=NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The directory.
    pub dir: PathBuf,
    /// What the guest mounts it by; `None`: `virtiofs0`, `virtiofs1`, … as LinuxKit has it.
    pub tag: Option<String>,
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "an example: --virtiofs /srv/code,tag=code";
        let (dir, options) = text.split_once(',').map_or((text, None), |(dir, rest)| (dir, Some(rest)));
        if dir.is_empty() {
            return Err(format!("{text:?} has no directory; {example}"));
        }
        let tag = match options.map(|o| o.split_once('=')) {
            None => None,
            Some(Some(("tag", tag))) => Some(tag.to_owned()),
            Some(_) => return Err(format!("{text:?}: only tag= may stand behind the directory; {example}")),
        };
        let good = |tag: &String| {
            (1..=TAG).contains(&tag.len())
                && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        match tag {
            Some(tag) if !good(&tag) => {
                Err(format!("tag={tag}: at most {TAG} letters, digits and - _ .; {example}"))
            }
            tag => Ok(Self { dir: dir.into(), tag }),
        }
    }
}

impl Share {
    /// The tag of the `n`th share.
    pub(crate) fn tag(&self, n: usize) -> String {
        self.tag.clone().unwrap_or_else(|| format!("virtiofs{n}"))
    }
}

/// Which `virtiofsd` this is: the two that are about have other options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Daemon {
    /// QEMU's own, up to QEMU 7.
    C(PathBuf),
    /// The one in Rust, since.
    Rust(PathBuf),
}

/// Checks the shares.
pub(crate) fn check(shares: &[Share]) -> Result<(), LaunchError> {
    let setting = |text: String| Err(LaunchError::Setting(text));
    if shares.len() > SHARES {
        return setting(format!("--virtiofs: {} shares, and at most {SHARES} are possible", shares.len()));
    }
    let tags: Vec<String> = shares.iter().enumerate().map(|(n, share)| share.tag(n)).collect();
    for (n, share) in shares.iter().enumerate() {
        if !share.dir.is_dir() {
            return setting(format!("--virtiofs {}: it is not a directory", share.dir.display()));
        }
        if tags.get(..n).unwrap_or_default().contains(&tags[n]) {
            return setting(format!(
                "--virtiofs: two shares have the tag {}: give one another tag=",
                tags[n]
            ));
        }
    }
    Ok(())
}

impl Daemon {
    /// Finds `virtiofsd`: where it was said to be, in `PATH`, or where distributions put it.
    pub(crate) fn find(named: Option<&Path>) -> Result<Self, LaunchError> {
        let setting = |text: String| Err(LaunchError::Setting(text));
        let program = match named {
            Some(path) => {
                let found = programs::named(path);
                Some(found.map_err(|why| LaunchError::Setting(format!("--virtiofsd: {why}")))?)
            }
            None => programs::in_path("virtiofsd").or_else(|| programs::first(&PLACES)),
        };
        let Some(program) = program else {
            return setting(
                "--virtiofs: virtiofsd is missing: apt-get install virtiofsd (Debian 12: qemu-system-common), or name it \
                 with --virtiofsd"
                    .into(),
            );
        };
        // QEMU's own tells its options as `-o`; the other is written with clap.
        let help = programs::says(&program, &["--help".as_ref()]);
        let (help, _) = help.map_err(|why| LaunchError::Setting(format!("--virtiofsd: {why}")))?;
        match () {
            () if help.contains("-o source=") => Ok(Self::C(program)),
            () if help.contains("--shared-dir") => Ok(Self::Rust(program)),
            () => setting(format!(
                "--virtiofsd {}: it is no virtiofsd: its --help has neither --shared-dir nor -o source=",
                program.display()
            )),
        }
    }
}

impl Daemon {
    pub(crate) fn program(&self) -> &Path {
        match self {
            Self::C(program) | Self::Rust(program) => program,
        }
    }

    /// The arguments, with the listening socket as an inherited descriptor: no path, nothing to remove.
    pub(crate) fn arguments(&self, share: &Share, socket: RawFd) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec![format!("--fd={socket}").into()];
        match self {
            Self::C(_) => {
                let mut source = OsString::from("source=");
                source.push(&share.dir);
                args.extend(["-o".into(), source, "-f".into()]);
            }
            Self::Rust(_) => {
                args.extend(["--shared-dir".into(), share.dir.clone().into()]);
                // Only root has the namespaces and capabilities of the default sandbox.
                let sandbox = if nix::unistd::geteuid().is_root() { "namespace" } else { "none" };
                args.extend(["--sandbox".into(), sandbox.into()]);
            }
        }
        args
    }
}

/// A process that serves a share.
pub(crate) struct Serving {
    pub(crate) process: Process,
    pub(crate) log: Log,
    pub(crate) tag: String,
}

/// The shares: who serves them, and QEMU's ends.
pub(crate) struct Shares {
    pub(crate) served: Vec<Serving>,
    pub(crate) sockets: Vec<(String, OwnedFd)>,
}

/// Starts a daemon for each share; without one the hypervisor serves them itself.
pub(crate) fn serve(
    shares: &[Share],
    daemon: Option<&Daemon>,
    state: &StateDir,
    guard: &mut Guard,
) -> Result<Shares, LaunchError> {
    let mut made = Shares { served: Vec::new(), sockets: Vec::new() };
    let Some(daemon) = daemon else { return Ok(made) };
    let failed = |error: io::Error| LaunchError::system("cannot make a socket for virtiofsd", error);
    for (n, share) in shares.iter().enumerate() {
        let path = state.path().join(format!("virtiofs{n}.sock"));
        guard.file(&path);
        let (listener, socket) = sockets::nameless(&path).map_err(failed)?;
        let listener = OwnedFd::from(listener);
        let log = state.log(&format!("virtiofs{n}.log"))?;
        let process = start_daemon(daemon, share, listener, &log)?;
        guard.watch(&process, false);
        made.served.push(Serving { process, log, tag: share.tag(n) });
        made.sockets.push((share.tag(n), socket.into()));
    }
    Ok(made)
}

fn start_daemon(
    daemon: &Daemon,
    share: &Share,
    listener: OwnedFd,
    log: &Log,
) -> Result<Process, LaunchError> {
    let writer = || log.writer().map_err(|error| LaunchError::system("cannot share a log", error));
    let mut command = Command::new(daemon.program());
    command.args(daemon.arguments(share, sys::number(&listener))).stdin(Stdio::null());
    command.stdout(writer()?).stderr(writer()?).process_group(0);
    sys::prepare(&mut command, vec![listener], Signal::SIGKILL, Privileges::Never);
    Process::start(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_directory_and_a_tag() {
        let share: Share = "/srv,tag=code".parse().expect("a share");
        assert_eq!((share.dir.to_str(), share.tag(3)), (Some("/srv"), "code".into()));
        assert_eq!("/srv".parse::<Share>().expect("a share").tag(3), "virtiofs3");
        for bad in ["", ",tag=a", "/srv,ro", "/srv,tag=", "/srv,tag=a b", "/srv,tag=a,b"] {
            assert!(bad.parse::<Share>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        let share = |text: &str| text.parse::<Share>().expect(text);
        let refused = |shares: &[Share]| check(shares).expect_err("refused").to_string();
        assert!(refused(&[share("/nonexistent")]).contains("not a directory"));
        assert!(refused(&[share("/,tag=a"), share("/,tag=a")]).contains("the tag a"));
        assert!(refused(&vec![share("/"); SHARES + 1]).contains("at most 16"));
        check(&[share("/")]).expect("a directory");
        let error = Daemon::find(Some(Path::new("/nonexistent"))).expect_err("absent").to_string();
        assert!(error.contains("--virtiofsd: /nonexistent"), "{error}");
        let error = Daemon::find(Some(Path::new("/bin/true"))).expect_err("another program").to_string();
        assert!(error.contains("no virtiofsd"), "{error}");
    }

    #[test]
    fn each_daemon_gets_its_own_options() {
        let share = "/srv".parse().expect("a share");
        let line = |daemon: Daemon| {
            let args = daemon.arguments(&share, 7);
            args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line(Daemon::C("/v".into())), "--fd=7 -o source=/srv -f");
        assert!(line(Daemon::Rust("/v".into())).starts_with("--fd=7 --shared-dir /srv --sandbox "));
    }
}
