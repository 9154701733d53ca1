//! QEMU's control channel (QMP: JSON, one message a line), as far as a clean end needs it.
//!
//! We say `qmp_capabilities` at once and `system_powerdown` when the VM is to end; QEMU tells in `SHUTDOWN` why
//! it ended. Its answer to the first command is the sign that the machine is made and runs. Everything else is read and dropped,
//! so that QEMU never waits for us.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::hypervisor::Control;

/// Bytes of one message at most; QEMU's are a few hundred.
const MESSAGE_MAX: usize = 64 * 1024;
/// How long QEMU may take to answer somebody who asks in passing.
const PATIENCE: Duration = Duration::from_secs(1);

/// Our end of the channel.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    partial: Vec<u8>,
    open: bool,
    /// QEMU answers once its devices are made.
    answered: bool,
    shutdown: Option<String>,
}

impl Qmp {
    /// Takes our end of the socketpair. The first command waits in the socket until QEMU reads it.
    pub(crate) fn new(mut stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        Ok(Self { stream, partial: Vec::new(), open: true, answered: false, shutdown: None })
    }

    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.hear();
                self.partial.clear();
            } else if self.partial.len() < MESSAGE_MAX {
                self.partial.push(byte);
            }
        }
    }
}

impl Qmp {
    fn hear(&mut self) {
        let Ok(message) = serde_json::from_slice::<Value>(&self.partial) else { return };
        self.answered |= message.get("return").is_some();
        if message.get("event").is_some_and(|event| event == "SHUTDOWN") {
            let reason = message.pointer("/data/reason").and_then(Value::as_str).unwrap_or("no reason given");
            self.shutdown = Some(reason.to_owned());
        }
    }
}

impl Control for Qmp {
    fn power_down(&mut self) -> io::Result<()> {
        self.stream.write_all(b"{\"execute\":\"system_powerdown\"}\n")
    }

    fn look(&mut self) {
        let mut buffer = [0; 4096];
        while self.open {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.open = false,
                Ok(read) => self.feed(buffer.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The process's own end, which the pidfd tells, says more than this.
                Err(_) => self.open = false,
            }
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.open.then(|| self.stream.as_fd())
    }

    fn look_at(&self) -> Option<Instant> {
        None
    }

    fn is_running(&self) -> bool {
        self.answered
    }

    fn shutdown_reason(&self) -> Option<&str> {
        self.shutdown.as_deref()
    }
}

/// Asks QEMU, at a socket where it takes QMP from anyone, whether somebody is connected to this character device. When it does
/// not say (somebody else speaks with it, or there is no such socket), nothing is known to be in the way.
pub(crate) fn is_taken(socket: &Path, device: &str) -> bool {
    let ask = || -> io::Result<Value> {
        let mut stream = crate::sockets::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-chardev\"}\n")?;
        let mut lines = BufReader::new(stream.take(MESSAGE_MAX as u64)).lines();
        loop {
            let line = lines.next().ok_or(io::ErrorKind::UnexpectedEof)??;
            let message: Value = serde_json::from_str(&line)?;
            if message.get("return").is_some_and(Value::is_array) {
                return Ok(message);
            }
        }
    };
    ask().is_ok_and(|answer| is_connected(&answer, device))
}

/// QEMU writes `disconnected:` before the name of a socket that waits for somebody.
fn is_connected(answer: &Value, device: &str) -> bool {
    let devices = answer.get("return").and_then(Value::as_array);
    let found = devices.into_iter().flatten().find(|one| one.get("label").is_some_and(|l| l == device));
    let name = found.and_then(|one| one.get("filename")).and_then(Value::as_str);
    name.is_some_and(|name| !name.starts_with("disconnected:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_read_from_the_shutdown_event_in_any_pieces() {
        let (ours, mut qemus) = UnixStream::pair().expect("a socketpair");
        let mut qmp = Qmp::new(ours).expect("a fresh channel");
        qemus.write_all(b"{\"QMP\": {}}\r\n").expect("writing");
        qmp.look();
        assert!(!qmp.is_running());
        qemus
            .write_all(b"{\"return\": {}}\r\nnonsense\n{\"event\": \"SHUTDOWN\", \"data\"")
            .expect("writing");
        qmp.look();
        assert!(qmp.is_running());
        assert_eq!(qmp.shutdown_reason(), None);
        qemus.write_all(b": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\r\n").expect("writing");
        qmp.look();
        assert_eq!(qmp.shutdown_reason(), Some("guest-shutdown"));
    }

    #[test]
    fn a_device_that_somebody_is_connected_to_is_known() {
        let answer: Value = serde_json::from_str(
            r#"{"return": [{"frontend-open": true, "filename": "disconnected:unix:/s", "label": "console"},
                {"frontend-open": true, "filename": "unix:/m,server=on <-> unix:", "label": "monitor"}]}"#,
        )
        .expect("JSON");
        assert!(!is_connected(&answer, "console") && is_connected(&answer, "monitor"));
        assert!(!is_connected(&answer, "nothing") && !is_connected(&Value::Null, "console"));
        assert!(!is_taken(Path::new("/nonexistent"), "console"));
    }

    #[test]
    fn commands_are_lines_and_an_end_is_seen() {
        let (ours, mut qemus) = UnixStream::pair().expect("a socketpair");
        let mut qmp = Qmp::new(ours).expect("a fresh channel");
        qmp.power_down().expect("there is room in the socket");
        let mut said = [0; 256];
        let len = qemus.read(&mut said).expect("two commands");
        let expected = "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"system_powerdown\"}\n";
        assert_eq!(said.get(..len), Some(expected.as_bytes()));
        drop(qemus);
        qmp.look();
        assert!(qmp.source().is_none());
    }
}
