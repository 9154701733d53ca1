//! Descriptors we inherit by number.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Descriptors that flows and NAT bindings leave to the control socket, DNS and state files, at the most.
pub(crate) const RESERVE: RawFd = 64;

/// From this number on descriptors are no flow's. Numbers are given from the lowest on, so a number tells how many are open.
static RESERVED: AtomicI32 = AtomicI32::new(RawFd::MAX);

/// Raises the soft limit of descriptors to the hard one, for every flow needs one, and keeps a reserve of a quarter.
pub(crate) fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let mut limit = soft;
    if soft < hard {
        match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => limit = hard,
            Err(error) => tracing::warn!(%error, soft, "the descriptor limit could not be raised"),
        }
    }
    let limit = RawFd::try_from(limit).unwrap_or(RawFd::MAX);
    RESERVED.store(limit - RESERVE.min(limit / 4), Ordering::Relaxed);
}

/// Refuses a descriptor of a guest's that would lie in the reserve.
///
/// # Errors
/// `EMFILE`, as if there were no more: the guest sees what it would see then.
pub(crate) fn within_share(fd: &impl AsRawFd) -> io::Result<()> {
    if fd.as_raw_fd() < RESERVED.load(Ordering::Relaxed) {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(nix::libc::EMFILE))
}

/// Takes descriptor `fd` over from whoever started us.
///
/// # Errors
/// When there is no such descriptor.
pub(crate) fn inherit(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number comes from our own command line, which gives it to exactly one setting; nothing else in the
    // process owns a descriptor that was open before it started. The call below fails for one that is not open.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(owned),
        Err(e) => {
            std::mem::forget(owned);
            Err(io::Error::new(io::ErrorKind::NotFound, format!("descriptor {fd}: {}", e.desc())))
        }
    }
}

/// The socket systemd holds for us under `name` (`FileDescriptorName=`, sd_listen_fds(3)), when there is one.
///
/// # Errors
/// When the environment promises descriptors that are not there.
pub(crate) fn activated(name: &str) -> io::Result<Option<OwnedFd>> {
    let found = sd_notify::listen_fds_with_names()?.find(|(_, n)| n == name);
    found.map(|(fd, _)| inherit(fd)).transpose()
}

/// Makes reads and writes of `fd` return at once.
///
/// # Errors
/// When the kernel does not know the descriptor.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = nix::fcntl::OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Takes over a descriptor that `recvmsg` gave (`SCM_RIGHTS`).
pub(crate) fn received(fd: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: the kernel made the descriptor for this process in the call the number comes from, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
