//! Lima's table of port-forward cases (hack/test-port-forwarding.pl), row by row, with real listeners and real clients; and the
//! cases it lacks: UDP, and IPv6 on the host.
//!
//! The numbers are Lima's. The host is a namespace of its own, where each of its ports is free and low ones too; the guest is
//! 192.168.127.2 where Lima's is 192.168.5.15, and the host's other address is 127.0.0.9. What the rules say is tested in
//! `forwarder/src/agent/rules.rs`; here it is what a user gets. Needs root for the namespaces.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::agent_lab::{Lab, PATIENCE, answers, answers_udp, connects};
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::until;

const RULES: &str = r#"
[[auto-publish]]
guest-address = "127.0.0.2"
guest-ports = "3000-3009"
ignore = true
[[auto-publish]]
guest-address = "any"
guest-ports = "3010-3019"
ignore = true
[[auto-publish]]
guest-address = "any"
guest-ports = "3000-3029"
host-ports = "2000-2029"
[[auto-publish]]
guest-address = "any"
guest-ports = "3020-3029"
ignore = true
[[auto-publish]]
guest-ports = "3030-3033"
host-bind = "127.0.0.9"
[[auto-publish]]
guest-ports = "310-318"
host-bind = "0.0.0.0"
[[auto-publish]]
guest-address = "192.168.127.2"
guest-ports = "4000-4009"
[[auto-publish]]
guest-address = "::1"
guest-ports = "4010-4019"
host-bind = "::"
[[auto-publish]]
guest-address = "any"
guest-ports = "4020-4029"
[[auto-publish]]
guest-address = "unspecified"
guest-ports = "4040-4049"
[[auto-publish]]
guest-address = "any"
guest-ports = "4040-4049"
ignore = true
[[auto-publish]]
guest-address = "unspecified"
guest-ports = 8888
host-bind = "0.0.0.0"
[[auto-publish]]
guest-ports = 5000
proto = "tcp"
host-socket = "SOCKET"
[[auto-publish]]
guest-address = "127.0.0.1"
"#;

/// A listener of the guest, and where it is on the host: `ADDRESS PORT`, `localhost PORT`, `socket`, or `-` for nowhere.
const ROWS: &[(&str, &str)] = &[
    // 1: an ignore for one address, and the wildcard rule behind it.
    ("tcp 127.0.0.2:3000", "-"),
    ("tcp 127.0.0.3:3001", "localhost 2001"),
    ("tcp 0.0.0.0:3002", "localhost 2002"),
    // 2: an ignore for every address; a later one behind a forward has no effect.
    ("tcp 0.0.0.0:3010", "-"),
    ("tcp 127.0.0.1:3011", "-"),
    // 3: the wildcard rule takes every address.
    ("tcp 127.0.0.2:3020", "localhost 2020"),
    ("tcp 127.0.0.1:3021", "localhost 2021"),
    ("tcp 0.0.0.0:3022", "localhost 2022"),
    ("tcp [::]:3023", "localhost 2023"),
    ("tcp [::1]:3024", "localhost 2024"),
    // 4: where the host listens.
    ("tcp 127.0.0.1:3030", "127.0.0.9 3030"),
    ("tcp 0.0.0.0:3031", "127.0.0.9 3031"),
    ("tcp [::]:3032", "127.0.0.9 3032"),
    ("tcp [::1]:3033", "127.0.0.9 3033"),
    ("tcp 127.0.0.1:310", "0.0.0.0 310"),
    ("tcp 0.0.0.0:311", "0.0.0.0 311"),
    // 5: the default is loopback; the card's address needs a rule that names it.
    ("tcp 192.168.127.2:304", "-"),
    ("tcp 192.168.127.2:314", "-"),
    ("tcp 192.168.127.2:4000", "localhost 4000"),
    ("tcp 127.0.0.1:325", "localhost 325"),
    ("tcp 0.0.0.0:326", "localhost 326"),
    ("tcp [::]:327", "localhost 327"),
    ("tcp [::1]:328", "localhost 328"),
    // 6: IPv6 on either side.
    ("tcp [::1]:4010", ":: 4010"),
    ("tcp 127.0.0.1:4020", "localhost 4020"),
    ("tcp 127.0.0.2:4021", "localhost 4021"),
    ("tcp 192.168.127.2:4022", "localhost 4022"),
    ("tcp 0.0.0.0:4023", "localhost 4023"),
    ("tcp [::]:4024", "localhost 4024"),
    ("tcp [::1]:4025", "localhost 4025"),
    // 7: listeners on every address alone, then an ignore for the rest.
    ("tcp 0.0.0.0:4040", "localhost 4040"),
    ("tcp [::]:4041", "localhost 4041"),
    ("tcp 127.0.0.1:4042", "-"),
    ("tcp 192.168.127.2:4043", "-"),
    ("tcp 0.0.0.0:8888", "0.0.0.0 8888"),
    // 8: a unix socket on the host.
    ("tcp 127.0.0.1:5000", "socket"),
    ("tcp 192.168.127.2:5001", "-"),
    // Lima's gaps: UDP by the same rules, on each kind of address …
    ("udp 127.0.0.2:3000", "-"),
    ("udp 127.0.0.3:3001", "localhost 2001"),
    ("udp 0.0.0.0:3002", "localhost 2002"),
    ("udp 0.0.0.0:3010", "-"),
    ("udp 127.0.0.1:3021", "localhost 2021"),
    ("udp [::]:3023", "localhost 2023"),
    ("udp [::1]:3024", "localhost 2024"),
    ("udp 127.0.0.1:3030", "127.0.0.9 3030"),
    ("udp 192.168.127.2:304", "-"),
    ("udp 192.168.127.2:4000", "localhost 4000"),
    ("udp [::1]:4010", ":: 4010"),
    ("udp 0.0.0.0:4040", "localhost 4040"),
    ("udp 127.0.0.1:4042", "-"),
    ("udp 127.0.0.1:5000", "localhost 5000"),
    // … and an IPv6 address of the guest's card.
    ("tcp [fd00::15]:4026", "localhost 4026"),
    ("tcp [fd00::15]:4001", "-"),
];

enum Server {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// Where a port of the host is listed.
fn listed(port: &serde_json::Value) -> String {
    let bind: Vec<&str> = port["bind"].as_array().into_iter().flatten().filter_map(|b| b.as_str()).collect();
    match bind.as_slice() {
        ["127.0.0.1", "::1"] => format!("{} localhost {}", port["proto"], port["host_port"]),
        [one] if one.starts_with("unix:") => format!("{} socket", port["proto"]),
        other => format!("{} {} {}", port["proto"], other.join(","), port["host_port"]),
    }
    .replace('"', "")
}

#[test]
fn limas_table_of_cases_row_by_row() -> Result<()> {
    let Some(host) = Namespace::new()? else { return Ok(()) };
    // The sidecar is nobody special by then, and the table has ports below 1024.
    host.sysctl("net.ipv4.ip_unprivileged_port_start", "0")?;
    let files = tempfile::tempdir()?;
    let (socket, config) = (files.path().join("port5000.sock"), files.path().join("portway.toml"));
    std::fs::write(&config, RULES.replace("SOCKET", &socket.display().to_string()))?;
    let options = ["--config", &config.display().to_string()];
    let Some(lab) = Lab::start_on(Some(&host), &options, &[])? else { return Ok(()) };
    lab.guest.ip(&["address", "add", "fd00::15/128", "dev", "vm0", "nodad"])?;

    let mut servers = Vec::new();
    for (listener, place) in ROWS {
        let (proto, at) = listener.split_once(' ').context("proto and address")?;
        let server = match proto {
            "tcp" => Server::Tcp(lab.listen(at)?),
            _ => Server::Udp(lab.bind_udp(at)?),
        };
        servers.push((*listener, proto, *place, server));
    }
    let mut wanted: Vec<String> =
        ROWS.iter().filter(|(_, p)| *p != "-").map(|(l, p)| format!("{} {p}", &l[..3])).collect();
    wanted.sort();
    let mut found = Vec::new();
    let same = until(PATIENCE, || {
        found = lab.ports().unwrap_or_default().iter().map(listed).collect();
        found.sort();
        found == wanted
    });
    same.with_context(|| format!("wanted {wanted:#?}\nfound {found:#?}\n{}", lab.context()))?;

    for (listener, proto, place, server) in &servers {
        let works = match (*place, server) {
            ("socket", Server::Tcp(server)) => by_socket(&socket, server)?,
            ("-", _) => {
                let port: u16 = listener.rsplit(':').next().context("a port")?.parse()?;
                // Its own number on the host, and what the wildcard rule would have made of it.
                let numbers = [port, port.saturating_sub(1000)];
                host.inside(|| Ok(numbers.iter().all(|p| is_free(proto, *p))))?
                    // Unless another row has it.
                    || wanted.iter().any(|w| numbers.iter().any(|p| w.ends_with(&format!(" {p}"))))
            }
            (place, server) => {
                let (bind, port) = place.split_once(' ').context("an address and a port")?;
                let port = port.parse()?;
                let addresses: &[&str] = match bind {
                    "localhost" | "::" => &["127.0.0.1", "::1"],
                    "0.0.0.0" => &["127.0.0.1", "127.0.0.9"],
                    _ => &["127.0.0.9"],
                };
                let mut all = true;
                for address in addresses {
                    let at = SocketAddr::new(address.parse::<IpAddr>()?, port);
                    all &= host.inside(|| {
                        Ok(match server {
                            Server::Tcp(server) => answers(at, server),
                            Server::Udp(server) => (0..5).any(|_| answers_udp(at, server)),
                        })
                    })?;
                }
                all
            }
        };
        ensure!(works, "{listener} -> {place}\n{}", lab.context());
    }

    // All of them close; nothing is left.
    drop(servers);
    until(PATIENCE, || lab.ports().is_ok_and(|p| p.is_empty())).with_context(|| lab.context())?;
    ensure!(!socket.exists(), "the socket's file is left");
    Ok(())
}

/// A client of the unix socket.
fn by_socket(socket: &std::path::Path, server: &TcpListener) -> Result<bool> {
    use std::io::{Read, Write};
    let mut client = UnixStream::connect(socket)?;
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    server.set_nonblocking(false)?;
    let (mut accepted, _) = server.accept()?;
    client.write_all(b"ping")?;
    let mut bytes = [0; 4];
    accepted.read_exact(&mut bytes)?;
    accepted.write_all(b"pong")?;
    client.read_exact(&mut bytes)?;
    Ok(&bytes == b"pong")
}

fn is_free(proto: &str, port: u16) -> bool {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match proto {
        "tcp" => !connects(at),
        _ => UdpSocket::bind(at).is_ok(),
    }
}

/// Lima's ninth: what is static is there without the agent's rules, and what is dynamic is not.
#[test]
fn without_rules_only_what_is_published_by_hand_is_there() -> Result<()> {
    let Some(host) = Namespace::new()? else { return Ok(()) };
    let by_hand = ["--publish", "9090:127.0.0.1:9090"];
    let both = [&by_hand[..], &["--publish", "auto"]].concat();
    for (options, dynamic) in [(&both[..], true), (&by_hand[..], false)] {
        let Some(lab) = Lab::start_on(Some(&host), options, &[])? else { return Ok(()) };
        let at_hand = lab.listen("127.0.0.1:9090")?;
        let servers = [lab.listen("127.0.0.1:29080")?, lab.listen("0.0.0.0:29070")?];
        let here = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        ensure!(host.inside(|| Ok(answers(here(9090), &at_hand)))?, "{}", lab.context());
        if dynamic {
            for (server, port) in servers.iter().zip([29_080, 29_070]) {
                let reached = || host.inside(|| Ok(answers(here(port), server))).unwrap_or(false);
                until(PATIENCE, reached).with_context(|| lab.context())?;
            }
        }
        // The agent has told of all three.
        until(PATIENCE, || lab.sidecar.json(&["agents"]).is_ok_and(|a| a[0]["listeners"] == 3))
            .with_context(|| lab.context())?;
        ensure!(lab.ports()?.len() == if dynamic { 3 } else { 1 }, "{}", lab.context());
        ensure!(host.inside(|| Ok(connects(here(29_080))))? == dynamic, "{}", lab.context());
    }
    Ok(())
}
