//! The lab of the VM test: `portway run` with the demo guest, ssh into it, and a host around it.
//!
//! The host's side is made of threads that live as long as the test: a web server with a large file, a sink that
//! tells the sha256 of what it got, a UDP echo, a resolver with one name, a black hole.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a boot may take under TCG on a busy machine; it takes some 3 s.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// How long its ssh server may take to listen once the guest is up.
const SSH_PATIENCE: Duration = Duration::from_secs(30);
/// How long the VM may take to power off.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How often a file or a process is looked at.
const POLL: Duration = Duration::from_millis(20);

/// The workspace's target directory, where the test binary lies in too.
///
/// # Errors
/// When the test's own path is unknown.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("this test's own path")?;
    // TARGET/PROFILE/deps/TEST
    exe.ancestors().nth(3).map(Path::to_owned).context("a target directory above this test")
}

/// The program under test: `PORTWAY_BIN`, else the one beside this test.
///
/// # Errors
/// When there is none.
pub fn portway() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PORTWAY_BIN") {
        return Ok(path.into());
    }
    let exe = std::env::current_exe().context("this test's own path")?;
    let path = exe.ancestors().nth(2).context("a profile directory above this test")?.join("portway");
    ensure!(path.exists(), "no {}: cargo build -p portway, or set PORTWAY_BIN", path.display());
    Ok(path)
}

/// The guest image's prefix: `PORTWAY_GUEST`, else the demo's, made if it is not there.
///
/// # Errors
/// When it cannot be made.
pub fn guest_image() -> Result<PathBuf> {
    let prefix = std::env::var_os("PORTWAY_GUEST")
        .map_or_else(|| Ok(target_dir()?.join("guest/demo")), |p| Ok(p.into()));
    let prefix: PathBuf = prefix.map_err(|e: anyhow::Error| e)?;
    if !Path::new(&format!("{}-kernel", prefix.display())).exists() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/build.sh");
        let status = Command::new(script).arg(&prefix).status().context("tests/guest/build.sh")?;
        ensure!(status.success(), "tests/guest/build.sh failed");
    }
    Ok(prefix)
}

/// The directory with the guest in its other forms, made if it is not there: see `tests/guest/media.sh`.
///
/// # Errors
/// When they cannot be made.
pub fn media() -> Result<PathBuf> {
    let prefix = guest_image()?;
    let dir = prefix.parent().context("the image lies in a directory")?.join("media");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/media.sh");
    let status = Command::new(script).arg(&prefix).arg(&dir).status().context("tests/guest/media.sh")?;
    ensure!(status.success(), "tests/guest/media.sh failed");
    Ok(dir)
}

/// A VM that runs; killed when dropped.
#[derive(Debug)]
pub struct Vm {
    launcher: Child,
    console: PathBuf,
    image: PathBuf,
    api: PathBuf,
    ssh_port: u16,
}

impl Vm {
    /// Boots the image with `portway run`, publishing the guest's port 22 on a free one, and waits until the guest
    /// says that it is ready.
    ///
    /// # Errors
    /// When it does not come up; the console's last lines are in the error.
    pub fn boot(dir: &Path, arguments: &[&str]) -> Result<Self> {
        let image = guest_image()?.display().to_string();
        Self::boot_image(dir, &[arguments, &[&image]].concat())
    }

    /// As [`Self::boot`], with an image among the arguments.
    ///
    /// # Errors
    /// As there.
    pub fn boot_image(dir: &Path, arguments: &[&str]) -> Result<Self> {
        let image = guest_image()?;
        let (console, api) = (dir.join("console.log"), dir.join("api.sock"));
        let output = File::create(&console)?;
        let launcher = Command::new(portway()?)
            .args(["run", "--mem", "512", "--cpus", "2", "--name", "demo", "-publish", "0:22/tcp"])
            .arg("--state-dir")
            .arg(dir.join("state"))
            .arg("--api")
            .arg(format!("unix:{}", api.display()))
            .args(arguments)
            .env("XDG_RUNTIME_DIR", dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("portway run")?;
        let mut vm = Self { launcher, console, image, api, ssh_port: 0 };
        vm.await_console("portway-agent: ready")?;
        vm.ssh_port = vm.published(22)?;
        Ok(vm)
    }

    fn await_console(&mut self, line: &str) -> Result<()> {
        let start = Instant::now();
        while !self.console().contains(line) {
            if let Some(status) = self.launcher.try_wait()? {
                bail!("portway run ended ({status}):\n{}", self.console());
            }
            ensure!(start.elapsed() < BOOT_PATIENCE, "no {line:?} on the console:\n{}", self.console());
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// What the console and the launcher said so far.
    #[must_use]
    pub fn console(&self) -> String {
        let read = |file: &Path| String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned();
        let said = read(&self.console);
        // vfkit's, where it is no terminal.
        let place = said.split_once("the console is in ").and_then(|(_, rest)| rest.split_once(": "));
        let logged = place.map(|(file, _)| read(Path::new(file))).unwrap_or_default();
        said + &logged
    }

    /// Runs `portway COMMAND… --api …` against this network and answers what it printed.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn portway(&self, command: &[&str]) -> Result<String> {
        let api = format!("unix:{}", self.api.display());
        let output = Command::new(portway()?).args(command).args(["--api", &api]).output()?;
        text_of(output).with_context(|| format!("portway {}", command.join(" ")))
    }

    /// The host port that `guest_port` is published on.
    ///
    /// # Errors
    /// When it is not published.
    pub fn published(&self, guest_port: u16) -> Result<u16> {
        let ports: serde_json::Value = serde_json::from_str(&self.portway(&["ports", "--format", "json"])?)?;
        let ports = ports.as_array().context("one JSON array")?;
        let port = ports.iter().find(|port| port["guest_port"] == guest_port).context("published")?;
        Ok(u16::try_from(port["host_port"].as_u64().context("a number")?)?)
    }

    /// Runs a command in the guest through the published ssh port and answers what it printed.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn guest(&self, command: &str) -> Result<String> {
        let dir = self.image.parent().context("the image lies in a directory")?;
        let known = format!("UserKnownHostsFile={}", dir.join("known_hosts").display());
        let mut ssh = Command::new("ssh");
        ssh.arg("-n")
            .arg("-i")
            .arg(dir.join("id_ed25519"))
            .args([
                "-o",
                "BatchMode=yes",
                "-o",
                "IdentitiesOnly=yes",
                "-o",
                "HostKeyAlias=portway-guest",
                "-o",
            ])
            .arg(known)
            .args(["-o", "ConnectTimeout=30", "-p", &self.ssh_port.to_string(), "root@localhost", command]);
        let start = Instant::now();
        let output = loop {
            let output = ssh.output().context("ssh")?;
            // The guest is up before its server listens: the connection is reset, and no command was begun.
            let early = String::from_utf8_lossy(&output.stderr).contains("kex_exchange_identification");
            if output.status.success() || !early || start.elapsed() > SSH_PATIENCE {
                break output;
            }
            thread::sleep(POLL);
        };
        text_of(output).with_context(|| format!("in the guest: {command}"))
    }

    /// SIGTERM to the launcher, and its exit status.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(mut self) -> Result<(ExitStatus, String)> {
        kill(Pid::from_raw(i32::try_from(self.launcher.id())?), Signal::SIGTERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.launcher.try_wait()? {
                return Ok((status, self.console()));
            }
            ensure!(start.elapsed() < STOP_PATIENCE, "portway run does not end:\n{}", self.console());
            thread::sleep(POLL);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // The VM and the network go with the launcher; after `stop` there is nothing to kill.
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

fn text_of(output: Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

/// The sha256 of a file, by the host's own program.
///
/// # Errors
/// When it cannot be run.
pub fn sha256(path: &Path) -> Result<String> {
    let text = text_of(Command::new("sha256sum").arg(path).output().context("sha256sum")?)?;
    Ok(first_word(&text))
}

/// The first word of a text.
#[must_use]
pub fn first_word(text: &str) -> String {
    text.split_whitespace().next().unwrap_or_default().to_owned()
}

/// A file of pseudo-random bytes (xorshift, so that a lost or doubled piece never looks right).
///
/// # Errors
/// When it cannot be written.
pub fn blob(path: &Path, len: usize) -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_ne_bytes());
    }
    bytes.truncate(len);
    Ok(fs::write(path, bytes)?)
}

/// A web server on loopback that answers every request with a file; the answer's length is announced.
///
/// # Errors
/// When no port can be had.
pub fn serve_file(path: &Path) -> Result<u16> {
    let path = path.to_owned();
    accept_each(move |mut stream| {
        let mut line = String::new();
        let mut request = BufReader::new(stream.try_clone()?);
        while request.read_line(&mut line)? > 2 {
            line.clear();
        }
        let mut file = File::open(&path)?;
        let len = file.metadata()?.len();
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {len}\r\n\r\n")?;
        io::copy(&mut file, &mut stream).map(drop)
    })
}

/// A listener on loopback that keeps what it is sent in a file and, at the end, answers `got N bytes`.
///
/// # Errors
/// When no port can be had.
pub fn sink(path: &Path) -> Result<u16> {
    let path = path.to_owned();
    accept_each(move |mut stream| {
        let len = io::copy(&mut stream, &mut File::create(&path)?)?;
        writeln!(stream, "got {len} bytes")
    })
}

fn accept_each(serve: impl Fn(TcpStream) -> io::Result<()> + Send + 'static) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            // One client's error is seen by what the client got.
            let _ = stream.and_then(&serve);
        }
    });
    Ok(port)
}

/// A UDP echo on loopback.
///
/// # Errors
/// When no port can be had.
pub fn udp_echo() -> Result<u16> {
    answer_datagrams(|datagram| Some(datagram.to_vec()))
}

/// A resolver on loopback that knows one name and one address, and answers NXDOMAIN to all else.
///
/// # Errors
/// When no port can be had.
pub fn resolver(name: &str, address: Ipv4Addr) -> Result<u16> {
    let mut wanted: Vec<u8> = Vec::new();
    for label in name.split('.') {
        wanted.push(u8::try_from(label.len())?);
        wanted.extend_from_slice(label.as_bytes());
    }
    wanted.push(0);
    answer_datagrams(move |query| answer(query, &wanted, address))
}

/// RFC 1035 §4: the header and the question given back, and for the wanted name's A one answer.
fn answer(query: &[u8], wanted: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let (id, rest) = (query.get(..2)?, query.get(12..)?);
    let end = rest.iter().position(|byte| *byte == 0)? + 1;
    let (name, question) = (rest.get(..end)?, rest.get(..end + 4)?);
    let known = name.eq_ignore_ascii_case(wanted);
    let has_answer = known && question.get(end..end + 2)? == [0, 1];
    let mut reply = id.to_vec();
    // QR, RD, RA; NXDOMAIN for a name we do not know.
    reply.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(has_answer), 0, 0, 0, 0]);
    reply.extend_from_slice(question);
    if has_answer {
        // A pointer to the question's name; A, IN, 60 s, 4 bytes.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

fn answer_datagrams(answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> Result<u16> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = socket.local_addr()?.port();
    thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            if let Some(reply) = buffer.get(..len).and_then(&answer) {
                // An error belongs to one client, which sees it as silence.
                let _ = socket.send_to(&reply, from);
            }
        }
    });
    Ok(port)
}

/// A loopback port whose listener is full: further connects get no answer, as in a black hole.
#[derive(Debug)]
pub struct BlackHole {
    _listener: socket2::Socket,
    _queued: Vec<socket2::Socket>,
    /// The port.
    pub port: u16,
}

impl BlackHole {
    /// Makes the listener and fills its queue.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn new() -> Result<Self> {
        use socket2::{Domain, Socket, Type};
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        listener.listen(0)?;
        let address = listener.local_addr()?;
        let port = address.as_socket().context("an IP address")?.port();
        let mut queued = Vec::new();
        // A backlog of 0 holds one connection; a few more fill whatever the kernel rounds it up to.
        for _ in 0..8 {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            match socket.connect(&address) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
                Err(error) => return Err(error).context("filling the queue"),
            }
            queued.push(socket);
        }
        Ok(Self { _listener: listener, _queued: queued, port })
    }
}

/// Sends a file to a published port, ends the sending half, and answers what came back.
///
/// # Errors
/// When the connection fails.
pub fn send_file(port: u16, path: &Path) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    io::copy(&mut File::open(path)?, &mut stream)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Reads a published port to its end, into a file.
///
/// # Errors
/// When the connection fails.
pub fn fetch_file(port: u16, path: &Path) -> Result<u64> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    Ok(io::copy(&mut stream, &mut File::create(path)?)?)
}
