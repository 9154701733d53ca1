//! A guest that offloads without a header (libkrun's `offloading=on`), on a link with `offload=on`: the kernel's own stack in a namespace,
//! behind a card that works as libkrun's does (`tests/guest/krun-tap.py`).

use std::fs;

use anyhow::{Result, ensure};
use portway_tests::host::echo_server;
use portway_tests::namespace::Namespace;
use portway_tests::program::Program;
use portway_tests::sidecar::{Sidecar, until};

/// Megabytes out and back, compared; and as many bytes of UDP as a datagram has.
const CLIENT: &str = "
import os, socket, sys, threading
s = socket.create_connection(('192.168.127.254', int(sys.argv[1])), 20)
data = os.urandom(1 << 20) * 8
threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
got = bytearray()
while more := s.recv(1 << 16):
    got += more
print('same' if got == data else f'{len(got)} of {len(data)}')
";

#[test]
fn a_guest_that_offloads_without_a_header_has_its_bytes_carried_both_ways() -> Result<()> {
    let Some(guest) = Namespace::new()? else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vm.sock");
    let link = format!("dgram:unix:{},name=vm,offload=on", socket.display());
    let sidecar = Sidecar::start(dir.path(), &["--link", &link])?;
    let mut card = guest.command("python3");
    card.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/guest/krun-tap.py")).arg(&socket);
    let log = dir.path().join("card");
    let mut card = Program::start(&mut card, &log)?;
    let says = |word: &str| fs::read_to_string(&log).is_ok_and(|text| text.contains(word));
    card.until("the card", || says("ready"))?;
    let (address, gateway) = ("192.168.127.2".parse()?, "192.168.127.1".parse()?);
    until(std::time::Duration::from_secs(20), || guest.configure("tap0", address, gateway, 1500).is_ok())?;

    let echo = echo_server()?;
    let out = guest.command("python3").args(["-c", CLIENT, &echo.to_string()]).output()?;
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    ensure!(said == "same\n", "{said}{}{}", card.log(), sidecar.log());
    ensure!(says("offloads"), "the guest has finished its frames itself");
    Ok(())
}
