//! Opening a device in another network namespace.
//!
//! By path (`/run/netns/NAME`, `/proc/PID/ns/net`) a thread of ours enters the namespace, opens the device and ends; that
//! needs `CAP_SYS_ADMIN`, as `ip netns exec` does. By process id no privilege is needed: a child process, which has only one
//! thread, enters the process's user namespace first, where it is root, and hands the descriptor back over a socket
//! (`setns(2)`, `user_namespaces(7)`).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::device;
use super::setup::{self, Setup};

/// The first argument of the child.
pub const CHILD: &str = "__open-tap";

/// Opens the device in the namespace that `path` names.
pub(super) fn by_path(name: &str, path: &Path, setup: Option<&Setup>) -> io::Result<File> {
    let fault =
        |e: io::Error, what: &str| io::Error::new(e.kind(), format!("netns={}: {what}: {e}", path.display()));
    let namespace = File::open(path).map_err(|e| fault(e, "no such network namespace"))?;
    std::thread::scope(|scope| {
        let entering = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|e| {
                fault(e.into(), "entering it needs CAP_SYS_ADMIN; netns=PID of a process in it does not")
            })?;
            made(name, setup)
        });
        entering.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// Opens the device in the namespaces of process `pid`, by a child of ours.
pub(super) fn by_process(name: &str, pid: u32, setup: Option<&Setup>) -> io::Result<File> {
    let namespace = |kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
    by_child(name, &namespace("user"), &namespace("net"), setup)
}

/// Opens the device in the network namespace `net`, which belongs to the user namespace `user`, by a child of ours.
pub(super) fn by_child(name: &str, user: &Path, net: &Path, setup: Option<&Setup>) -> io::Result<File> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new("/proc/self/exe")
        .args([CHILD, name])
        .args([user, net])
        .args(setup.map(ToString::to_string))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    let received = receive(&mut ours);
    child.wait()?;
    received
}

fn receive(from: &mut UnixStream) -> io::Result<File> {
    let mut text = [0; 512];
    let mut space = nix::cmsg_space!(std::os::fd::RawFd);
    let (bytes, fd) = {
        let mut parts = [IoSliceMut::new(&mut text)];
        let message =
            recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let fd = message.cmsgs()?.find_map(|c| match c {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (message.bytes, fd)
    };
    match fd {
        Some(fd) => Ok(crate::fd::received(fd).into()),
        None => {
            let mut fault = text[..bytes].to_vec();
            from.take(512).read_to_end(&mut fault)?;
            Err(io::Error::other(String::from_utf8_lossy(&fault).into_owned()))
        }
    }
}

/// The child: `arguments` are what follows [`CHILD`]; the answer goes to the socket on standard input.
///
/// # Errors
/// When the parent cannot be answered.
pub fn child(arguments: &[OsString]) -> io::Result<()> {
    let stdin = io::stdin();
    let socket = stdin.as_fd().try_clone_to_owned()?;
    match opened(arguments) {
        Ok(device) => {
            let fds = [device.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"ok")], &rights, MsgFlags::empty(), None)?;
            Ok(())
        }
        Err(error) => UnixStream::from(socket).write_all(error.to_string().as_bytes()),
    }
}

fn opened(arguments: &[OsString]) -> io::Result<File> {
    let (name, user, net, setup) = match arguments {
        [name, user, net] => (name, user, net, None),
        [name, user, net, setup] => (name, user, net, Some(setup)),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let setup = setup.map(|text| text.to_string_lossy().parse::<Setup>()).transpose();
    let setup = setup.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    let (name, shown) = (name.to_string_lossy(), net.to_string_lossy());
    let fault = |e: io::Error, what: &str| io::Error::new(e.kind(), format!("{shown}: {what}: {e}"));
    let namespace = |path: &OsString| {
        File::open(path).map_err(|e| fault(e, "no such process or namespace, or not one of yours"))
    };
    let (user, net) = (namespace(user)?, namespace(net)?);
    let own = File::open("/proc/self/ns/user")?;
    let id = |f: &File| nix::sys::stat::fstat(f).map(|s| (s.st_dev, s.st_ino));
    // Entering the user namespace one is in already is an error.
    if id(&user)? != id(&own)? {
        setns(&user, CloneFlags::CLONE_NEWUSER)
            .map_err(|e| fault(e.into(), "its user namespace cannot be entered"))?;
    }
    setns(&net, CloneFlags::CLONE_NEWNET)
        .map_err(|e| fault(e.into(), "its network namespace cannot be entered"))?;
    made(&name, setup.as_ref())
}

/// The device of the namespace we are in, set up if that is asked for.
fn made(name: &str, setup: Option<&Setup>) -> io::Result<File> {
    let device = device::open(name)?;
    setup.map_or(Ok(()), |setup| setup::apply(name, setup))?;
    Ok(device)
}
