//! Command lines of vpnkit's callers, and those that are wrong.

use clap::Parser;

use super::*;

fn prepared(line: &str) -> Result<Prepared, String> {
    let args = Args::try_parse_from(std::iter::once(NAME).chain(line.split(' ')));
    prepare(&args.map_err(|e| e.to_string())?)
}

fn plan(line: &str) -> Result<Plan, String> {
    Plan::of(&Args::try_parse_from(std::iter::once(NAME).chain(line.split_whitespace())).unwrap())
}

#[test]
fn the_network_is_the_smallest_that_holds_all_addresses() {
    let usual = plan("").unwrap();
    assert_eq!(
        (usual.subnet.to_string().as_str(), usual.host),
        ("192.168.65.0/24", Some([192, 168, 65, 2].into()))
    );
    let moved = "--gateway-ip 10.1.0.1 --host-ip 10.1.0.2 --lowest-ip 10.1.0.3 --highest-ip 10.1.3.200";
    assert_eq!(plan(moved).unwrap().subnet.to_string(), "10.1.0.0/22");
    let small = "--gateway-ip 10.1.0.1 --host-ip 0.0.0.0 --lowest-ip 10.1.0.3 --highest-ip 10.1.0.6";
    assert_eq!(
        plan(small).unwrap(),
        Plan {
            subnet: "10.1.0.0/29".parse().unwrap(),
            gateway: [10, 1, 0, 1].into(),
            host: None,
            pool: ([10, 1, 0, 3].into(), [10, 1, 0, 6].into()),
        }
    );
    assert!(plan("--gateway-ip 10.0.0.1").unwrap_err().contains("no common network"));
    assert!(plan("--host-ip 192.168.65.1").unwrap_err().contains("both"));
    assert!(plan("--lowest-ip 192.168.65.254 --highest-ip 192.168.65.3").unwrap_err().contains("above"));
}

#[test]
fn the_command_lines_of_callers_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    // rootlesskit
    let kit = prepared(&format!("--ethernet {} --mtu 1500 --host-ip 0.0.0.0", at("eth"))).unwrap();
    assert_eq!(kit.config.ntp, [kit.config.gateway], "option 42");
    assert!(!kit.config.host_loopback && !kit.config.particulars.control && kit.warnings.is_empty());
    // Docker Desktop, as far as it can be met here.
    std::fs::write(at("dhcp.json"), r#"{"searchDomains":["corp.test"],"domainName":"lan.test"}"#).unwrap();
    std::fs::write(at("http.json"), "{}").unwrap();
    let desktop = prepared(&format!(
        "--ethernet {} --port {} --diagnostics {} --pcap {} --vsock-path vms/0/connect --host-names host.docker.internal,docker.for.mac.localhost \
         --gateway-names gateway.docker.internal --vm-names docker-for-desktop --listen-backlog 32 --mtu 1500 --allowed-bind-addresses 0.0.0.0 \
         --http {} --dhcp {} --port-max-idle-time 300 --max-connections 2000 --gateway-ip 192.168.65.1 --highest-ip 192.168.65.254 \
         --udpv4-forwards 123:127.0.0.1:1123 --gc-compact-interval 1800",
        at("eth2"), at("port"), at("diag"), at("pcap"), at("http.json"), at("dhcp.json")
    ))
    .unwrap();
    let Config { particulars, limits, dns_host, .. } = &desktop.config;
    assert_eq!(
        (particulars.domain.as_str(), &particulars.search[..]),
        ("lan.test", &["corp.test".to_owned()][..])
    );
    assert_eq!((limits.tcp_idle, limits.flows), (Duration::from_secs(300), 2000));
    // One of the line, and the two ports of the proxies.
    assert_eq!((particulars.services.forwards.len(), dns_host.len()), (3, 4));
    assert_eq!(desktop.warnings.len(), 2, "{:?}", desktop.warnings);
    let never = prepared(&format!("--ethernet {} --port-max-idle-time -1", at("eth3"))).unwrap();
    assert_eq!(never.config.limits.tcp_idle, NEVER);
}

#[test]
fn what_is_wrong_is_said_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let http = dir.path().join("http.json");
    std::fs::write(&http, r#"{"http":"socks5://proxy:3128"}"#).unwrap();
    let http = format!("--ethernet /tmp/x --http {}", http.display());
    for (line, fault) in [
        ("--debug", "--ethernet is needed"),
        ("--ethernet hyperv-connect://vm", "Hyper-V"),
        ("--ethernet fd:x", "fd:N"),
        ("--ethernet /tmp/x --port hyperkit://:62373/./vms/0", "hyperkit sockets are not served"),
        ("--ethernet /tmp/x --port fd:0", "not a listening socket"),
        ("--ethernet /tmp/x --vsock-path hyperv-connect://vm", "--vsock-path"),
        ("--ethernet /tmp/x --tcpv4-forwards 80:127.0.0.1", "LPORT:IPv4:RPORT"),
        ("--ethernet /tmp/x --udpv4-forwards 0:127.0.0.1:80", "--udpv4-forwards"),
        ("--ethernet /tmp/x --gateway-forwards /nonexistent", "/nonexistent"),
        ("--ethernet /tmp/x --dns /nonexistent", "/nonexistent"),
        ("--ethernet /tmp/x --dhcp-path /nonexistent", "/nonexistent"),
        ("--ethernet /tmp/x --allowed-bind-addresses here", "here"),
        ("--ethernet /tmp/x --server-macaddr 01:00:00:00:00:01", "group address"),
        ("--ethernet /tmp/x --max-connections 0", "1 to 1000000"),
        ("--ethernet /tmp/x --mtu 100", "576"),
        ("--ethernet /tmp/x --pcap-snaplen 13", "14 or more"),
        ("--ethernet /tmp/x --introspection hyperkit://62373/./vms/0", "hyperkit sockets are not served"),
        ("--ethernet /tmp/x --forwards /nonexistent", "--forwards /nonexistent"),
        ("--ethernet /tmp/x --http /nonexistent", "/nonexistent"),
        ("--ethernet /tmp/x --http-api-path http://x", "--http-api-path"),
        (&http, "a proxy is asked by http, not by socks5"),
        ("--ethernet /tmp/x --bogus", "--bogus"),
    ] {
        let Err(error) = prepared(line) else { panic!("{line}") };
        assert!(error.contains(fault), "{line}: {error}");
    }
}
