//! Unix sockets in the state directory, however long its path is ([`sys::short`]).

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;

/// Connects to the socket at `path`.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (_fd, short) = sys::short(path)?;
    UnixStream::connect(short)
}

/// A listening socket in a directory that nobody else may enter; its file goes with this.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) listener: UnixListener,
    _file: Owned,
}

impl Listening {
    /// Listens at `path`, where nobody else does: the directory is locked, so what is there is stale.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let (_fd, short) = sys::short(path)?;
        let listener = UnixListener::bind(short)?;
        Ok(Self { listener, _file: Owned(path.to_owned()) })
    }
}

/// A connected pair of sockets whose listening end has no name any more: for programs that insist on accepting.
pub(crate) fn nameless(path: &Path) -> io::Result<(UnixListener, UnixStream)> {
    let Listening { listener, _file } = Listening::at(path)?;
    let stream = connect(path)?;
    Ok((listener, stream))
}

/// A file that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Owned(pub(crate) PathBuf);

impl Drop for Owned {
    fn drop(&mut self) {
        // That it is gone already is no fault.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A directory that is removed with all that is in it when this is dropped.
#[derive(Debug)]
pub(crate) struct OwnedDir(pub(crate) PathBuf);

impl Drop for OwnedDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Removes a socket on which nobody listens any more, and nothing else. False when somebody does.
pub(crate) fn remove_dead(path: &Path) -> bool {
    if !std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        return true;
    }
    let dead = connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if dead {
        let _ = std::fs::remove_file(path);
    }
    dead
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_path_of_any_length_can_be_listened_at() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).expect("directories");
        let path = deep.join("s");
        let listening = Listening::at(&path).expect("it listens");
        let mut client = connect(&path).expect("it answers");
        client.write_all(b"x").expect("writing");
        let (mut server, _) = listening.listener.accept().expect("somebody came");
        let mut byte = [0];
        server.read_exact(&mut byte).expect("reading");
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_dead_one_removed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).expect("a socket"));
        assert!(path.exists());
        let listening = Listening::at(&path).expect("it was stale");
        remove_dead(&path);
        assert!(path.exists(), "somebody listens there");
        drop(listening);
        drop(UnixListener::bind(dir.path().join("t")).expect("a socket"));
        remove_dead(&dir.path().join("t"));
        assert!(!dir.path().join("t").exists());
        std::fs::write(&path, "a file").expect("writing");
        remove_dead(&path);
        assert!(path.exists(), "it is no socket");
    }

    #[test]
    fn a_nameless_pair_leaves_no_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        let (listener, _stream) = nameless(&path).expect("a pair");
        assert!(!path.exists());
        listener.accept().expect("the stream waits there");
    }
}
