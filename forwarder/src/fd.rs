//! Descriptors we inherit by number.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

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
