//! The host's side of a test: servers guests come to, and programs that end with it.

use std::net::{Shutdown, TcpListener};
use std::process::Child;

use anyhow::Result;

use crate::guest::Guest;
use crate::sidecar::Sidecar;

/// A child that ends with the value.
#[derive(Debug)]
pub struct Ends(pub Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network with one guest that has its lease, and the directory of its files.
///
/// # Errors
/// When one of them does not come.
pub fn started(options: &[&str]) -> Result<(tempfile::TempDir, Sidecar, Guest)> {
    let dir = tempfile::tempdir()?;
    let sidecar = Sidecar::start(dir.path(), options)?;
    let mut guest = Guest::attach(&dir.path().join("vm"), 1)?;
    guest.dhcp()?;
    Ok((dir, sidecar, guest))
}

/// A server on the host's loopback that echoes every connection, and its end; its port.
///
/// # Errors
/// When no port is free.
pub fn echo_server() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let Ok(mut from) = stream.try_clone() else { return };
                let mut to = stream;
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
    Ok(port)
}

/// A port of the host's loopback that was free a moment ago.
///
/// # Errors
/// When none is.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
