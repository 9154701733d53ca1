//! Unix sockets we bind: only over nothing, or over a socket on which nobody listens.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A path that goes with this value.
#[derive(Debug)]
pub(crate) struct Removed(pub(crate) PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // Somebody may have taken it away: then it is gone already.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes way for a socket at `path`: removes one that nobody has. `probe` connects to it as its clients would.
///
/// # Errors
/// When another file is there, or somebody has the socket; the text says which.
pub(crate) fn clear(path: &Path, probe: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let fault = |kind, text: &str| io::Error::new(kind, format!("{}: {text}", path.display()));
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => Err(fault(
            io::ErrorKind::AlreadyExists,
            "is a file and not a socket: remove it or take another path",
        )),
        Ok(_) => match probe(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
            _ => Err(fault(io::ErrorKind::AddrInUse, "somebody listens there already: take another path")),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(fault(e.kind(), &e.to_string())),
    }
}

/// Listens on `path` with the given permissions.
///
/// # Errors
/// When another file is there, somebody listens there already, or the path cannot be bound; the text says which.
pub(crate) fn listen(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let fault = |kind, text: &str| io::Error::new(kind, format!("{}: {text}", path.display()));
    clear(path, |path| UnixStream::connect(path).map(drop))?;
    let listener =
        UnixListener::bind(path).map_err(|e| fault(e.kind(), &format!("cannot listen there: {e}")))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// As [`listen`], on a socket of type `kind`.
///
/// # Errors
/// As [`listen`].
pub(crate) fn listen_as(path: &Path, mode: u32, kind: socket2::Type) -> io::Result<socket2::Socket> {
    if kind == socket2::Type::STREAM {
        return listen(path, mode).map(Into::into);
    }
    let socket = || socket2::Socket::new(socket2::Domain::UNIX, kind, None);
    let address = socket2::SockAddr::unix(path)?;
    clear(path, |_| socket()?.connect(&address))?;
    let listener = socket()?;
    let bound = listener.bind(&address).and_then(|()| listener.listen(16));
    bound.map_err(|e| io::Error::new(e.kind(), format!("{}: cannot listen there: {e}", path.display())))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let live = listen(&path, 0o600).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listen(&path, 0o600).unwrap_err().to_string().contains("listens there already"));
        drop(live);
        listen(&path, 0o600).unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        assert!(listen(&file, 0o600).unwrap_err().to_string().contains("not a socket"));
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }
}
