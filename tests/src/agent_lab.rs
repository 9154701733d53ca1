//! The lab of the agent's tests: a network namespace as the guest, the real agent in it, and the real `portway serve` beside it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::SockRef;

use crate::agent::Agent;
use crate::namespace::Namespace;
use crate::sidecar::{Sidecar, until};

/// What issue 4 promises: opened, reachable; closed, gone.
pub const SECOND: Duration = Duration::from_secs(1);
/// How long anything else may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Clients that may wait to be accepted by a server in the guest: as many as any test has.
const BACKLOG: i32 = 2048;

/// A guest with an agent, and its sidecar.
#[derive(Debug)]
pub struct Lab {
    /// The agent, in the namespace.
    pub agent: Agent,
    /// The host's side.
    pub sidecar: Sidecar,
    /// The guest: 192.168.127.2 on a tap link, called `box`.
    pub guest: Namespace,
    /// Where both keep their files.
    pub dir: tempfile::TempDir,
}

impl Lab {
    /// Starts all of it, `options` for `serve`. `None` where namespaces cannot be made.
    ///
    /// # Errors
    /// When there is no session in time.
    pub fn start(options: &[&str]) -> Result<Option<Self>> {
        Self::start_with(options, &[])
    }

    /// The same, with options for the agent too.
    ///
    /// # Errors
    /// As of [`Self::start`].
    pub fn start_with(options: &[&str], agent: &[&str]) -> Result<Option<Self>> {
        Self::start_on(None, options, agent)
    }

    /// The same, in a namespace that is the host: all of its ports are free.
    ///
    /// # Errors
    /// As of [`Self::start`].
    pub fn start_on(host: Option<&Namespace>, options: &[&str], agent: &[&str]) -> Result<Option<Self>> {
        let Some(guest) = Namespace::new()? else { return Ok(None) };
        let dir = tempfile::tempdir()?;
        let sidecar = serve_on(host, dir.path(), &guest, options)?;
        guest.configure("vm0", "192.168.127.2".parse()?, "192.168.127.1".parse()?, 1500)?;
        // A guest says something before anybody knows that it is there, as one with DHCP does.
        guest.inside(|| Ok(UdpSocket::bind("0.0.0.0:0")?.send_to(b"here", "192.168.127.1:9")?))?;
        let agent = Agent::start(dir.path(), &guest, &dir.path().join("agent"), agent)?;
        let lab = Self { agent, sidecar, guest, dir };
        lab.until_session()?;
        Ok(Some(lab))
    }

    /// Waits for the agent.
    ///
    /// # Errors
    /// When it does not come in time; with both logs.
    pub fn until_session(&self) -> Result<()> {
        let connected = |v: serde_json::Value| v[0]["connected"] == true;
        until(PATIENCE, || self.sidecar.json(&["agents"]).is_ok_and(connected))
            .with_context(|| format!("no session\n{}\n{}", self.agent.log(), self.sidecar.log()))
    }

    /// Starts listening in the guest.
    ///
    /// # Errors
    /// When the address cannot be had there.
    pub fn listen(&self, at: &str) -> Result<TcpListener> {
        self.guest.inside(|| {
            let listener = TcpListener::bind(at)?;
            // The standard library's backlog is 128. Where more come at once than fit, Linux answers with SYN cookies; a cookie's
            // ACK that finds the queue full is forgotten, and a client that waits for the server to speak first waits for ever.
            SockRef::from(&listener).listen(BACKLOG)?;
            Ok(listener)
        })
    }

    /// Opens a UDP socket in the guest.
    ///
    /// # Errors
    /// When the address cannot be had there.
    pub fn bind_udp(&self, at: &str) -> Result<UdpSocket> {
        self.guest.inside(|| Ok(UdpSocket::bind(at)?))
    }

    /// What `portway ports` lists.
    ///
    /// # Errors
    /// When it lists nothing that is JSON.
    pub fn ports(&self) -> Result<Vec<serde_json::Value>> {
        Ok(self.sidecar.json(&["ports"])?.as_array().context("an array")?.clone())
    }

    /// Both logs and the ports, for a failure.
    #[must_use]
    pub fn context(&self) -> String {
        format!("{}\n{}\n{:?}", self.agent.log(), self.sidecar.log(), self.ports())
    }
}

/// `portway serve` with the guest's tap link, and a socket for its agent in `dir`.
///
/// # Errors
/// When it does not become ready.
pub fn serve(dir: &Path, guest: &Namespace, options: &[&str]) -> Result<Sidecar> {
    serve_on(None, dir, guest, options)
}

fn serve_on(host: Option<&Namespace>, dir: &Path, guest: &Namespace, options: &[&str]) -> Result<Sidecar> {
    let link = format!("tap:vm0,netns={},ip=192.168.127.2,name=box", guest.path().display());
    let agent = format!("unix:{},name=box", dir.join("agent").display());
    let mut all = vec!["--link", &link, "--agent", &agent];
    all.extend(options);
    match host {
        Some(host) => Sidecar::start_in(host, dir, &all),
        None => Sidecar::start(dir, &all),
    }
}

/// A port that is free here and in a guest, for TCP and UDP, below the ephemeral range: no client is given it meanwhile.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<u16> {
    static COUNT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() * 31 % 4000)?;
    for _ in 0..4000 {
        let port = 20_000 + (start + COUNT.fetch_add(1, Ordering::Relaxed)) % 4000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no free port below 24000")
}

/// Whether one byte gets to the server and another back.
pub fn answers(at: impl Into<SocketAddr>, server: &TcpListener) -> bool {
    let Ok(mut client) = TcpStream::connect(at.into()) else { return false };
    let _ = client.set_read_timeout(Some(PATIENCE));
    if client.write_all(b"?").is_err() || server.set_nonblocking(true).is_err() {
        return false;
    }
    let deadline = Instant::now() + SECOND;
    while Instant::now() < deadline {
        if let Ok((mut stream, _)) = server.accept() {
            let _ = stream.set_nonblocking(false);
            let mut byte = [0];
            // One that asks nothing has only looked whether somebody listens.
            if stream.read_exact(&mut byte).is_err() {
                continue;
            }
            return stream.write_all(b"!").is_ok() && client.read_exact(&mut byte).is_ok() && &byte == b"!";
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// Whether a datagram gets to the server and another back.
pub fn answers_udp(at: impl Into<SocketAddr>, server: &UdpSocket) -> bool {
    let at = at.into();
    let any = if at.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let Ok(client) = UdpSocket::bind(any) else { return false };
    let mut byte = [0; 8];
    let brief = Some(Duration::from_millis(300));
    client.connect(at).is_ok()
        && client.set_read_timeout(brief).is_ok()
        && server.set_read_timeout(brief).is_ok()
        && client.send(b"?").is_ok()
        && server.recv_from(&mut byte).is_ok_and(|(_, from)| server.send_to(b"!!", from).is_ok())
        && client.recv(&mut byte).is_ok_and(|len| byte.get(..len) == Some(b"!!"))
}

/// Whether somebody listens there.
#[must_use]
pub fn connects(at: SocketAddr) -> bool {
    TcpStream::connect_timeout(&at, SECOND).is_ok()
}
