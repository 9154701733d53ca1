//! A network that several VMs share: started by the first that names it, joined by the others, ended with the last.
//!
//! ```text
//! launcher ─┬─ somebody listens at API-join ─────────────────────────────┐
//!           └─ nobody: `serve --join`, a process of its own, and "ready" ─┴─► {"link":…,"publish":…} ─► {"ports":…}
//!                                                                              │ the connection stays as long as the VM
//! ```
//! The sidecar belongs to no launcher: the first may end while the others go on. It holds nothing that a launcher has to
//! clean up: a connection that ends takes the VM's link and ports away, and the last one the network. Launchers that come
//! at the same time wait for each other with a lock on the sockets' directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use crate::guard::Guard;
use crate::machine::Machine;
use crate::net;
use crate::sidecar::{self, Link, READY_PATIENCE, Word};
use crate::signals::Signals;
use crate::state::Log;
use crate::sys::Privileges;
use crate::{LaunchConfig, LaunchError, sockets, sys};

/// How long the sidecar may take to be ready, and to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a network that is just ending is tried again.
const TRIES: usize = 5;
/// How often a lock that another launcher has is tried for.
const TURN_POLL: Duration = Duration::from_millis(50);
const LOG: &str = "sidecar.log";

/// A network by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedNetwork {
    /// Its name.
    pub name: String,
    /// Where it keeps leases and its log: it outlives the VM that starts it.
    pub state_dir: PathBuf,
}

/// This VM's place on a shared network.
#[derive(Debug)]
pub(crate) struct Joined {
    stream: UnixStream,
    log: PathBuf,
    /// The link's socket, which the sidecar removes.
    socket: PathBuf,
}

/// The socket where VMs join.
fn join_socket(config: &LaunchConfig) -> PathBuf {
    with_ending(&config.api, "-join")
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(ending);
    path.into()
}

impl Joined {
    /// Joins the network, and starts it when it does not run.
    pub(crate) fn new(
        config: &LaunchConfig,
        shared: &SharedNetwork,
        machine: &Machine,
        signals: &Signals,
        guard: &mut Guard,
    ) -> Result<(Self, PathBuf), LaunchError> {
        let failed = |error: io::Error| LaunchError::system("cannot join the network", error);
        let (socket, log) = (net::socket(config), shared.state_dir.join(LOG));
        let _turn = turn(&config.api, signals)?;
        for _ in 0..TRIES {
            let stream = match sockets::connect(&join_socket(config)) {
                Ok(stream) => {
                    check_settings(config, shared)?;
                    stream
                }
                Err(_) if sockets::connect(&config.api).is_ok() => {
                    return Err(LaunchError::Setting(format!(
                        "--network {}: it runs, but takes no further VMs (it was not started with --network or --join)",
                        shared.name
                    )));
                }
                Err(_) => {
                    start(config, shared, signals, guard)?;
                    sockets::connect(&join_socket(config)).map_err(failed)?
                }
            };
            guard.socket(&socket);
            let spec = sidecar::link_spec(config, &machine.card, &Link::Path(socket.clone()));
            let request = json!({ "link": spec.to_string_lossy(), "publish": config.publish });
            let Some(answer) = ask(&stream, &request).map_err(failed)? else { continue };
            return match answer.get("error").and_then(Value::as_str) {
                Some(error) => {
                    Err(LaunchError::NotJoined { network: shared.name.clone(), reason: error.to_owned() })
                }
                None => Ok((Self { stream, log, socket: socket.clone() }, socket)),
            };
        }
        Err(LaunchError::NotJoined { network: shared.name.clone(), reason: "it is ending: try again".into() })
    }

    /// The error to tell when the network has ended under the VM.
    pub(crate) fn ended(&mut self) -> io::Result<Option<LaunchError>> {
        let mut byte = [0];
        self.stream.set_nonblocking(true)?;
        match io::Read::read(&mut self.stream, &mut byte) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            _ => Ok(Some(LaunchError::NetworkLost { log: Log::tail_of(&self.log) })),
        }
    }
}

impl AsFd for Joined {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        // The sidecar does this too, when it sees our end; one that was killed does not.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let _ = fs::remove_file(&self.socket);
    }
}

/// One launcher at a time starts or joins a network of this directory. A lock on the directory leaves no file.
fn turn(api: &Path, signals: &Signals) -> Result<Flock<File>, LaunchError> {
    let failed = |error: io::Error| LaunchError::system("cannot wait for other launchers", error);
    let directory = api.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = File::open(directory).map_err(failed)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(failed(errno.into())),
        }
        // flock(2) has no descriptor that tells of a lock that is free.
        signals.wait(None, TURN_POLL).map_err(failed)?;
        signals.heed()?;
    }
}

/// Settings of the network are given to the launcher that starts it.
fn check_settings(config: &LaunchConfig, shared: &SharedNetwork) -> Result<(), LaunchError> {
    match config.serve_args.first() {
        Some(option) => Err(LaunchError::Setting(format!(
            "{} cannot be given now: the network {} runs, and has the settings of the VM that started it",
            option.to_string_lossy(),
            shared.name
        ))),
        None => Ok(()),
    }
}

/// Asks, and reads the answer; `None` when the network ended instead.
fn ask(stream: &UnixStream, request: &Value) -> io::Result<Option<Value>> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut writer = stream;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    let asked = writer.write_all(&line).and_then(|()| BufReader::new(stream).read_line(&mut answer));
    match asked {
        Ok(0) => return Ok(None),
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            return Ok(None);
        }
        other => other?,
    };
    stream.set_read_timeout(None)?;
    Ok(Some(serde_json::from_str(&answer)?))
}

/// Starts the sidecar and waits until it is ready.
fn start(
    config: &LaunchConfig,
    shared: &SharedNetwork,
    signals: &Signals,
    guard: &mut Guard,
) -> Result<(), LaunchError> {
    let failed = |error: io::Error| LaunchError::system("cannot start the network", error);
    let path = &shared.state_dir;
    let unusable = |error: io::Error| LaunchError::State { path: path.clone(), reason: error.to_string() };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(unusable)?;
    let log = path.join(LOG);
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&log).map_err(unusable)?;
    file.set_len(0).map_err(unusable)?;
    let join = join_socket(config);
    guard.socket(&join);
    guard.socket(&config.api);
    let (ready, told) = sys::pipe().map_err(failed)?;
    let mut command = Command::new(&config.sidecar);
    command.args(sidecar::shared_arguments(config, shared, &join, sys::number(&told)));
    command.stdin(Stdio::null()).stdout(file.try_clone().map_err(failed)?).stderr(file);
    sys::prepare_session(&mut command, vec![told], Privileges::Perhaps);
    let mut child = command
        .spawn()
        .map_err(|error| LaunchError::Start { program: config.sidecar.display().to_string(), error })?;
    drop(command);
    let silent = || LaunchError::SidecarSilent { after: READY_PATIENCE, log: Log::tail_of(&log) };
    let given_up = match sidecar::await_word(&ready, signals) {
        Ok(Word::Ready) => return Ok(()),
        Ok(Word::Closed) => None,
        Ok(Word::Silent) => Some(silent()),
        Err(error) => Some(error),
    };
    if let Some(error) = given_up {
        // It belongs to no launcher, but nobody knows of one that never was ready.
        let _ = child.kill().and_then(|()| child.wait());
        for socket in [&join, &config.api] {
            sockets::remove_dead(socket);
        }
        return Err(error);
    }
    let status = child.wait().map_err(failed)?;
    Err(LaunchError::SidecarNotReady { status, reason: Log::last_words_of(&log) })
}
