//! The stand-in for docker's proxy: `dockerd --userland-proxy-path=/usr/bin/portway-agent`.
//!
//! ```text
//! dockerd ─ fork, exec ─► portway-agent -proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80
//!   ▲                        ├─ asks the agent: publish on the host, for as long as this process lives
//!   └─ fd 3: `0`, or `1` and why ┴─ and does docker-proxy's own work: the port in the guest, to the container
//! ```
//! The contract: a line `0` on descriptor 3 when the port is there, or `1`, a line break and the reason, and status 1. Then
//! it stays until dockerd ends it, which ends what it holds. With `-use-listen-fd` the socket to accept on is descriptor
//! 4 (dockerd 28 binds it itself). The flags are docker-proxy's, and vpnkit-expose-port's beside them.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::args::{Arg, Args};
use crate::carry::{BUFFER, Carried, Turn};
use crate::console::say;
use crate::dial;
use crate::harden;
use crate::local::{Agent, Answer, Ask};

/// How long the agent and the host have to publish the port.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a client of a UDP port may be silent (docker-proxy's own).
const UDP_IDLE: Duration = Duration::from_secs(90);
/// Clients of a UDP port; at it the idlest goes.
const UDP_CLIENTS: usize = 1024;

const USAGE: &str = "\
usage: portway-agent expose-port -proto tcp|udp|unix -host-ip IP -host-port N -container-ip IP -container-port N
  -use-listen-fd          accept on descriptor 4
  -host-path, -container-path PATH   for -proto unix
  -control PATH           the agent's socket
  -local-bind best-effort|always|never   the port in the guest [default: best-effort]; -no-local-ip is never
  -i                      by hand: no descriptor 3";

/// Whether the command line is that of a proxy, which dockerd calls without a command.
pub(crate) fn is_called(program: &str, first: Option<&str>) -> bool {
    let names =
        ["docker-proxy", "rootlessport", "vpnkit-expose-port", "slirp-proxy", "vpnkit-userland-proxy"];
    let flags = ["proto", "host-ip", "host-port", "container-ip", "container-port", "use-listen-fd"];
    names.contains(&program)
        || first.and_then(|f| f.strip_prefix("--").or_else(|| f.strip_prefix('-'))).is_some_and(|f| {
            let name = f.split('=').next().unwrap_or_default();
            flags.contains(&name)
        })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bind {
    BestEffort,
    Always,
    Never,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    proto: String,
    host_ip: IpAddr,
    host_port: u16,
    host_path: String,
    container_ip: IpAddr,
    container_port: u16,
    container_path: String,
    listen_fd: bool,
    control: Option<PathBuf>,
    bind: Bind,
    by_hand: bool,
    help: bool,
}

impl Wish {
    fn parse(mut args: Args) -> Result<Self, String> {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let mut wish = Self {
            proto: "tcp".into(),
            host_ip: any,
            host_port: 0,
            host_path: String::new(),
            container_ip: any,
            container_port: 0,
            container_path: String::new(),
            listen_fd: false,
            control: None,
            bind: Bind::BestEffort,
            by_hand: false,
            help: false,
        };
        while let Some(arg) = args.next()? {
            let Arg::Option(o) = arg else { return Err(format!("{arg:?} is not an option")) };
            match o.as_str() {
                "proto" => wish.proto = args.value(&o)?,
                "host-ip" => wish.host_ip = args.parsed(&o)?,
                "host-port" => wish.host_port = args.parsed(&o)?,
                "host-path" => wish.host_path = args.value(&o)?,
                "container-ip" => wish.container_ip = args.parsed(&o)?,
                "container-port" => wish.container_port = args.parsed(&o)?,
                "container-path" => wish.container_path = args.value(&o)?,
                "use-listen-fd" => wish.listen_fd = args.switch(&o)?,
                "control" => {
                    let path = args.value(&o)?;
                    let path = path.strip_prefix("unix://").unwrap_or(&path);
                    if !path.starts_with('/') {
                        return Err(format!("-control {path}: the path of the agent's socket is needed"));
                    }
                    wish.control = Some(path.into());
                }
                "local-bind" => {
                    wish.bind = match args.value(&o)?.as_str() {
                        "best-effort" => Bind::BestEffort,
                        "always" => Bind::Always,
                        "never" => Bind::Never,
                        other => {
                            return Err(format!("-local-bind {other} is not best-effort, always or never"));
                        }
                    }
                }
                "no-local-ip" => {
                    if args.switch(&o)? {
                        wish.bind = Bind::Never;
                    }
                }
                "i" => wish.by_hand = args.switch(&o)?,
                "help" | "h" => wish.help = true,
                // Accepted: there is nothing more to say than is said.
                "debug" => drop(args.switch(&o)?),
                _ => return Err(format!("-{o} is not an option of expose-port")),
            }
        }
        match wish.proto.as_str() {
            _ if wish.help => Ok(wish),
            "tcp" | "udp" if wish.host_port == 0 || wish.container_port == 0 => {
                Err("-host-port and -container-port are needed".into())
            }
            "tcp" | "udp" => Ok(wish),
            "unix" if wish.host_path.is_empty() || wish.container_path.is_empty() => {
                Err("-host-path and -container-path are needed".into())
            }
            "unix" => Ok(Self { bind: Bind::Never, ..wish }),
            other => Err(format!("-proto {other}: tcp, udp and unix are what can be published")),
        }
    }

    /// In the grammar of `portway publish`.
    fn spec(&self) -> String {
        let bracketed = |ip: IpAddr| if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
        if self.proto == "unix" {
            return format!("unix:{}:{}", self.host_path, self.container_path);
        }
        let (host, container) = (bracketed(self.host_ip), bracketed(self.container_ip));
        format!("{host}:{}:{container}:{}/{}", self.host_port, self.container_port, self.proto)
    }
}

/// What is told on descriptor 3.
struct Parent(Option<std::fs::File>);

impl Parent {
    fn tell(&mut self, text: &str) {
        if let Some(mut file) = self.0.take() {
            // A parent that has gone away does not listen.
            let _ = file.write_all(text.as_bytes());
        }
    }

    fn fail(&mut self, reason: &str) -> ExitCode {
        say(reason);
        self.tell(&format!("1\n{reason}"));
        ExitCode::FAILURE
    }
}

/// Descriptor `number`, which the parent gave.
fn inherited(number: i32) -> Option<OwnedFd> {
    nix::fcntl::fcntl(
        // SAFETY: only asked whether it is open; nothing is done with it otherwise.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(number) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .ok()?;
    // SAFETY: it is open, was given to us by number, and nothing else in this process has taken it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Runs until dockerd ends it.
pub(crate) fn run(args: Args) -> ExitCode {
    let wish = match Wish::parse(args) {
        Ok(wish) if wish.help => {
            crate::commands::print(USAGE);
            return ExitCode::SUCCESS;
        }
        Ok(wish) => wish,
        Err(fault) => {
            let mut parent = Parent(inherited(3).map(Into::into));
            parent.fail(&fault);
            return ExitCode::from(2);
        }
    };
    let mut parent = Parent(if wish.by_hand { None } else { inherited(3).map(Into::into) });
    let local = match Local::bind(&wish) {
        Ok(local) => local,
        Err(error) => {
            let (ip, port) = (wish.host_ip, wish.host_port);
            return parent
                .fail(&format!("cannot listen on {} in the guest: {error}", SocketAddr::new(ip, port)));
        }
    };
    let agent = match publish(&wish) {
        Ok(agent) => agent,
        Err(reason) => return parent.fail(&reason),
    };
    harden::carrier();
    parent.tell("0\n");
    let container = SocketAddr::new(wish.container_ip, wish.container_port);
    let served = std::thread::Builder::new().name("proxy".into()).spawn(move || match local {
        Local::None => {}
        Local::Tcp(listener) => serve_tcp(&listener, container),
        Local::Udp(socket) => serve_udp(&socket, container),
    });
    if let Err(error) = served {
        say(&format!("the port in the guest is not served: {error}"));
    }
    hold(&wish, agent)
}

/// Has the port published; tries again while the agent or the host is not there yet.
fn publish(wish: &Wish) -> Result<Agent, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let reason = match ask(wish) {
            Ok(Ok(agent)) => return Ok(agent),
            Ok(Err(refused)) => return Err(refused),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(reason);
        }
        std::thread::sleep(AGAIN);
    }
}

/// One attempt: an agent that has it, a refusal, or nobody to ask.
fn ask(wish: &Wish) -> io::Result<Result<Agent, String>> {
    let mut agent = Agent::connect(wish.control.as_deref())?;
    match agent.ask(&Ask::Publish { spec: wish.spec(), hold: true })? {
        Answer::Done { ports, .. } if !ports.is_empty() => Ok(Ok(agent)),
        Answer::Done { errors, .. } => Ok(Err(errors.join("; "))),
        Answer::Failed { reason } => Err(io::Error::other(reason)),
        Answer::Ports { .. } => Err(io::Error::other("the agent answers what was not asked")),
    }
}

/// Stays; when the agent is started again, asks it again.
fn hold(wish: &Wish, mut agent: Agent) -> ExitCode {
    loop {
        agent.wait_for_end();
        say("the agent ended; asking the next");
        let mut said = String::new();
        agent = loop {
            match ask(wish) {
                Ok(Ok(agent)) => break agent,
                // Once, not five times a second.
                Ok(Err(refused)) if refused != said => {
                    say(&refused);
                    said = refused;
                }
                Ok(Err(_)) => {}
                // It is not there yet.
                Err(_) => {}
            }
            std::thread::sleep(AGAIN);
        };
    }
}

/// The port in the guest.
enum Local {
    None,
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Local {
    fn bind(wish: &Wish) -> io::Result<Self> {
        let at = SocketAddr::new(wish.host_ip, wish.host_port);
        if wish.bind == Bind::Never {
            return Ok(Self::None);
        }
        if wish.listen_fd {
            let fd = inherited(4)
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "descriptor 4 is not open"))?;
            return Ok(if wish.proto == "udp" { Self::Udp(fd.into()) } else { Self::Tcp(fd.into()) });
        }
        let bound = match wish.proto.as_str() {
            "udp" => UdpSocket::bind(at).map(Self::Udp),
            _ => TcpListener::bind(at).map(Self::Tcp),
        };
        match bound {
            Err(_) if wish.bind == Bind::BestEffort => Ok(Self::None),
            other => other,
        }
    }
}

fn serve_tcp(listener: &TcpListener, container: SocketAddr) {
    for client in listener.incoming() {
        let Ok(client) = client else {
            std::thread::sleep(AGAIN);
            continue;
        };
        // A client for which there is no thread is closed.
        let _ = std::thread::Builder::new().spawn(move || {
            if let Err(errno) = proxy(client, container) {
                say(&format!("a client of {container} is lost: {}", errno.desc()));
            }
        });
    }
}

/// One client and the container.
fn proxy(client: TcpStream, container: SocketAddr) -> nix::Result<()> {
    let Ok(server) = TcpStream::connect_timeout(&container, Duration::from_secs(30)) else {
        dial::reset_on_close(&client.into());
        return Ok(());
    };
    for stream in [&client, &server] {
        // The applications at both ends have decided about small segments already.
        let _ = stream.set_nodelay(true);
        stream.set_nonblocking(true).map_err(|_| Errno::EIO)?;
    }
    let mut carried = Carried::new(client.into(), server.into(), Vec::new(), false);
    let mut buffer = vec![0; BUFFER];
    loop {
        match carried.turn(&mut buffer) {
            Turn::Again => continue,
            Turn::Idle => {}
            Turn::Done => return Ok(()),
            Turn::NearReset => {
                dial::reset_on_close(&carried.far.fd);
                return Ok(());
            }
            Turn::FarReset => {
                dial::reset_on_close(&carried.near.fd);
                return Ok(());
            }
        }
        // An end of which nothing is wanted is left out: its hang-up would come again and again.
        let wants = [carried.near.wants(), carried.far.wants()];
        let ends = [carried.near.as_fd(), carried.far.as_fd()];
        let mut waited: Vec<PollFd<'_>> = ends
            .iter()
            .zip(wants)
            .filter(|(_, wants)| !wants.is_empty())
            .map(|(fd, wants)| PollFd::new(*fd, wants))
            .collect();
        match poll(&mut waited, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut found = waited.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        let found = wants.map(|w| if w.is_empty() { PollFlags::empty() } else { found.next().unwrap_or(w) });
        carried.near.note_poll(found[0]);
        carried.far.note_poll(found[1]);
    }
}

/// Clients of a UDP port, each with a socket of its own toward the container.
fn serve_udp(socket: &UdpSocket, container: SocketAddr) {
    let mut clients: HashMap<SocketAddr, (UdpSocket, Instant)> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    loop {
        let now = Instant::now();
        clients.retain(|_, (_, heard)| now.duration_since(*heard) < UDP_IDLE);
        let order: Vec<SocketAddr> = clients.keys().copied().collect();
        let mut waited = vec![PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        waited.extend(clients.values().map(|(s, _)| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(Duration::from_secs(10)).unwrap_or(PollTimeout::NONE);
        if poll(&mut waited, timeout).is_err_and(|errno| errno != Errno::EINTR) {
            return;
        }
        let mut ready = waited.iter().map(|fd| fd.any().unwrap_or(false));
        let news = ready.next().unwrap_or(false);
        let answers: Vec<SocketAddr> =
            order.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|(client, _)| client).collect();
        drop(waited);
        for client in answers {
            if let Some((server, heard)) = clients.get_mut(&client)
                && let Ok(len) = server.recv(&mut buffer)
            {
                // A container that goes on sending is used, though its client only listens.
                *heard = now;
                // What the network does not take is lost; likewise below.
                let _ = socket.send_to(buffer.get(..len).unwrap_or_default(), client);
            }
        }
        if !news {
            continue;
        }
        let Ok((len, client)) = socket.recv_from(&mut buffer) else { continue };
        if !clients.contains_key(&client) {
            if clients.len() >= UDP_CLIENTS
                && let Some(idlest) = clients.iter().min_by_key(|(_, (_, heard))| *heard).map(|(a, _)| *a)
            {
                clients.remove(&idlest);
            }
            let any: SocketAddr =
                if container.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
            let Ok(server) = UdpSocket::bind(any) else { continue };
            if server.connect(container).is_err() {
                continue;
            }
            clients.insert(client, (server, now));
        }
        if let Some((server, heard)) = clients.get_mut(&client) {
            *heard = now;
            let _ = server.send(buffer.get(..len).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Wish, String> {
        Wish::parse(Args::new(line.split_whitespace().map(str::to_owned)))
    }

    #[test]
    fn dockerds_command_line_is_understood() {
        let line = "-proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80 -use-listen-fd";
        let wish = parsed(line).expect("dockerd's own");
        assert!(wish.listen_fd);
        assert_eq!(wish.spec(), "0.0.0.0:8080:172.17.0.2:80/tcp");
        let v6 = parsed("-proto udp -host-ip :: -host-port 53 -container-ip fd00::2 -container-port 53");
        assert_eq!(v6.expect("IPv6").spec(), "[::]:53:[fd00::2]:53/udp");
    }

    #[test]
    fn vpnkits_command_line_is_understood() {
        let wish =
            parsed("-proto unix -host-path /a -container-path /b -control /run/agent.sock -no-local-ip");
        let wish = wish.expect("vpnkit's own");
        assert_eq!((wish.spec(), wish.bind), ("unix:/a:/b".into(), Bind::Never));
        let never = parsed("-host-port 1 -container-port 2 -local-bind=never").expect("good");
        assert_eq!(never.bind, Bind::Never);
    }

    #[test]
    fn what_cannot_be_published_is_said() {
        for (line, fault) in [
            ("-proto sctp -host-port 1 -container-port 1", "sctp"),
            ("-proto tcp -host-port 1", "-container-port are needed"),
            ("-proto unix -host-path /a", "-container-path are needed"),
            ("-host-port 70000", "-host-port 70000"),
            ("-host-ip here", "-host-ip here"),
            ("-colour", "is not an option"),
            ("-control 4098", "the path of the agent's socket"),
        ] {
            assert!(parsed(line).is_err_and(|e| e.contains(fault)), "{line}");
        }
    }

    #[test]
    fn a_proxy_is_known_by_its_name_or_its_flags() {
        assert!(is_called("docker-proxy", None));
        assert!(is_called("portway-agent", Some("-proto")));
        assert!(is_called("portway-agent", Some("--host-ip=0.0.0.0")));
        assert!(!is_called("portway-agent", Some("run")) && !is_called("portway-agent", Some("--version")));
    }
}
