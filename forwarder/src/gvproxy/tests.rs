use super::*;

fn planned(line: &str) -> Result<Config, String> {
    let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    plan(&Flags::parse(&words).unwrap())
}

#[test]
fn podmans_lines_give_its_network() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let config = planned(&format!(
        "-debug -mtu 1500 -ssh-port 40022 -listen-vfkit unixgram://{} -pid-file {} -log-file {}",
        path("vfkit.sock"),
        path("pid"),
        path("log")
    ))
    .unwrap();
    assert_eq!((config.links[0].kind.name(), config.links[0].mtu), ("dgram", 1500));
    assert_eq!(config.publish[0].to_string(), "127.0.0.1:40022:192.168.127.2:22/tcp");
    assert_eq!(config.static_lease[0].ip, Ipv4Addr::new(192, 168, 127, 2));
    assert!(config.ends_with_vm && config.log_level == LogLevel::Debug);
    let config = planned(&format!("-mtu 1500 -ssh-port -1 -listen unix://{}", path("api"))).unwrap();
    assert!(config.links.is_empty() && config.stays && config.publish.is_empty());
    assert!(config.doors[0].connect);
}

#[test]
fn what_cannot_be_is_told_and_nothing_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let taken = dir.path().join("taken");
    std::fs::write(&taken, "").unwrap();
    let taken = taken.display().to_string();
    for (line, text) in [
        ("-mtu 1500".to_owned(), "no VM can come"),
        ("-listen-qemu http://x".into(), "is not unix://PATH"),
        ("-listen-qemu unix://".into(), "has no path"),
        (format!("-listen-qemu unix://{taken}"), "already exists"),
        ("-listen-bess unix:///tmp/x".into(), "is not unixpacket://PATH"),
        ("-listen-vfkit unix:///tmp/x".into(), "is not unixgram://PATH"),
        ("-listen-qemu unix:///nx/a -listen-bess unixpacket:///nx/b".into(), "qemu and bess protocol"),
        ("-listen ftp://x".into(), "unix://PATH, tcp://HOST:PORT or vsock://[CID]:PORT"),
        ("-listen vsock://a:1".into(), "vsock://[CID]:PORT is needed"),
        ("-listen vsock://:99999999999".into(), "is not a port"),
        ("-listen unix:///nx/a -mtu 99999999".into(), "576 to 65535"),
        ("-listen unix:///nx/a -mtu -1".into(), "576 to 65535"),
        ("-listen unix:///nx/a -ssh-port 22".into(), "between 1024 and 65535"),
        ("-listen unix:///nx/a -subnet 10.0.0.0/30".into(), "/29 or larger"),
        ("-listen unix:///nx/a -subnet x".into(), "subnet \"x\""),
        ("-listen unix:///nx/a -gatewayIP 10.0.0.1".into(), "not a usable address"),
        ("-listen unix:///nx/a -hostIP 192.168.127.1".into(), "three addresses"),
        ("-listen unix:///nx/a -deviceIP 192.168.127.255".into(), "not a usable address"),
        ("-listen unix:///nx/a -forward-sock x".into(), "all be specified together"),
        ("-listen unix:///nx/a -notification /x".into(), "is not unix://PATH"),
        ("-config /nx/none.yaml".into(), "/nx/none.yaml"),
    ] {
        let error = planned(&line).expect_err(&line);
        assert!(error.contains(text), "{line}: {error}");
    }
}

#[test]
fn a_file_is_read_and_a_key_that_is_none_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let config = |text: &str| {
        std::fs::write(&file, text).unwrap();
        planned(&format!("-config {}", file.display()))
    };
    let good = config(
        r#"{"listen": ["unix:///nx/api"], "log-level": "debug", "stack": {
            "mtu": 4000, "subnet": "10.1.2.0/24", "gatewayMacAddress": "5a:94:ef:e4:0c:aa",
            "dns": [{"name": "test.", "records": [{"name": "db", "ip": "10.1.2.9"}]}], "dnsSearchDomains": ["a.test"],
            "forwards": {"127.0.0.1:2200": "10.1.2.2:22", "udp:0.0.0.0:53": "10.1.2.2:53"},
            "dhcpStaticLeases": {"10.1.2.7": "5a:94:ef:e4:0c:ef"}, "nat": {"10.1.2.254": "127.0.0.1"}}}"#,
    )
    .unwrap();
    assert_eq!((good.gateway, good.host_alias), (Ipv4Addr::new(10, 1, 2, 1), Ipv4Addr::new(10, 1, 2, 254)));
    assert_eq!(good.particulars.gateway_mac, Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xaa]));
    let db = GivenRecord { name: "db".into(), address: Some([10, 1, 2, 9].into()), pattern: None };
    assert_eq!(
        good.particulars.zones,
        [GivenZone { name: "test.".into(), records: vec![db], default: None }]
    );
    assert_eq!(good.dns_search, Some(vec!["a.test".to_owned()]));
    assert_eq!((good.publish.len(), good.static_lease.len(), good.attached_mtu), (2, 1, 4000));
    for (text, fault) in [
        (r#"{"listn": []}"#, "listn"),
        (r#"{"listen": ["unix:///nx/a"], "stack": {"mtu": "x"}}"#, "line 1 column 47: invalid i64"),
        (r#"{"listen": ["unix:///nx/a"], "stack": {"nat": {"1.2.3.4": "5.6.7.8"}}}"#, "nat: 1.2.3.4"),
        (r#"{"listen": ["unix:///nx/a"], "stack": {"forwards": {"x": "y"}}}"#, "forwards: \"x\""),
        (
            r#"{"listen": ["unix:///nx/a"], "stack": {"dhcpStaticLeases": {"10.0.0.1": "x"}}}"#,
            "dhcpStaticLeases",
        ),
        (
            r#"{"listen": ["unix:///nx/a"], "stack": {"dns": [{"name": "a.", "defaultIP": "1.1.1"}]}}"#,
            "dns: a.: \"1.1.1\" is not an address",
        ),
        ("[", "config.yaml"),
    ] {
        let error = config(text).expect_err(text);
        assert!(error.contains(fault), "{text}: {error}");
    }
}

/// A file as gvproxy's own documentation writes it, with an anchor, comments and keys without a value.
const YAML: &str = r#"
# what podman's tests use
listen:
  - unix:///nx/api
log-level: debug
pid-file: /nx/pid
interfaces: {vfkit: "unixgram:///nx/vfkit.sock"}
forwards:
  - socket: /nx/podman.sock
    dest: /run/podman/podman.sock
    user: core
    identity: IDENTITY
stack: &stack
  mtu: 4000
  subnet: 10.1.2.0/24
  gatewayMacAddress: 5a:94:ef:e4:0c:aa
  dns:
    - name: crc.testing.
      records:
        - {name: api, ip: 10.1.2.2}
        - regexp: "^app-.*"
          ip: 10.1.2.9
      defaultIP: 10.1.2.3
  dnsSearchDomains:
  forwards:
    "127.0.0.1:2200": 10.1.2.2:22
    udp:0.0.0.0:5353: "10.1.2.2:53"
  vpnKitUUIDMacAddresses:
    c3d68012-0208-11ea-9fd7-f2189899ab08: 5a:94:ef:e4:0c:ee
"#;

#[test]
fn a_file_is_yaml_and_its_forwards_lead_to_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("config.yaml"), dir.path().join("key"));
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ecdsa", "-N", "", "-f"])
        .arg(&key)
        .status()
        .unwrap();
    assert!(made.success());
    let planned_from = |text: &str| {
        std::fs::write(&file, text).unwrap();
        planned(&format!("-config {}", file.display()))
    };
    let good = planned_from(&YAML.replace("IDENTITY", &key.display().to_string())).unwrap();
    let [forward] = &good.particulars.ssh[..] else { panic!("{:?}", good.particulars.ssh) };
    assert_eq!(
        (forward.login.server, forward.dest.as_str()),
        (([10, 1, 2, 2], 22).into(), "/run/podman/podman.sock")
    );
    assert_eq!((forward.socket.to_str(), forward.login.user.as_str()), (Some("/nx/podman.sock"), "core"));
    let [zone] = &good.particulars.zones[..] else { panic!("{:?}", good.particulars.zones) };
    assert_eq!((zone.records.len(), zone.default), (2, Some([10, 1, 2, 3].into())));
    assert_eq!((good.publish.len(), good.vpnkit_macs.len(), good.attached_mtu), (2, 1, 4000));
    assert_eq!((good.log_level, good.links[0].kind.name()), (LogLevel::Debug, "dgram"));
    assert_eq!(good.dns_search, Some(Vec::new()));
    for (text, fault) in [
        ("", "no VM can come"),
        ("listen: [unix:///nx/a]\nlistn: 1\n", "listn"),
        ("listen: unix:///nx/a\n", "line 1"),
        ("listen: [unix:///nx/a]\nstack: {mtu: many}\n", "line 2"),
        ("listen: [\n", "config.yaml"),
        ("a: &a [*a, *a]\n", "config.yaml"),
        (&YAML.replace("IDENTITY", "/nx/key"), "-forward-identity: /nx/key"),
    ] {
        let error = planned_from(text).expect_err(text);
        assert!(error.contains(fault), "{text}: {error}");
    }
}
