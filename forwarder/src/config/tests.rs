//! Settings as they are typed, and what is said about bad ones.

use super::*;

fn settings(toml: &str) -> Result<Config, String> {
    let settings = Settings::from_toml(toml)?;
    Config::try_from(settings).map_err(|e| e.to_string())
}

#[test]
fn a_file_has_the_flags_names() {
    let config = settings(
        r#"
        link = ["qemu:unix:/tmp/vm.sock,name=web,mtu=1500", "qemu:fd:7"]
        subnet = "10.1.0.0/16"
        publish = ["2222:22"]
        dns-upstream = ["192.0.2.53", "192.0.2.54:5353"]
        static-lease = ["52:54:00:12:34:56=10.1.0.9,db"]
        api = "unix:/tmp/api.sock"
        host-loopback = "off"
        "#,
    )
    .unwrap();
    assert_eq!(
        (config.gateway, config.host_alias),
        (Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 1, 255, 254))
    );
    assert_eq!((config.links[0].mtu, config.links[1].mtu), (1500, 65_520));
    assert_eq!(config.dns_upstream[0].server.address.port(), 53);
    assert!(!config.host_loopback && !config.metadata);
}

fn environment(pairs: &[(&str, &str)]) -> Result<Settings, String> {
    Settings::from_env(pairs.iter().map(|(k, v)| (k.into(), v.into()))).map_err(|e| e.to_string())
}

#[test]
fn the_environment_has_the_flags_names_too() {
    let settings = environment(&[
        ("PORTWAY_LINK", "qemu:unix:/a qemu:unix:/b,name=db"),
        ("PORTWAY_MTU", "1500"),
        ("PORTWAY_DNS_HOST", "a.test=192.0.2.1"),
        ("PORTWAY_BIN", "/not/a/setting"),
        ("PATH", "/bin"),
    ]);
    let settings = settings.unwrap();
    assert_eq!((settings.link.len(), settings.mtu, settings.dns_host.len()), (2, Some(1500), 1));
    for (pair, fault) in [
        (("PORTWAY_MTU", "big"), "PORTWAY_MTU"),
        (("PORTWAY_LINK", "wire:fd:1"), "is not a kind of link"),
        (("PORTWAY_LOG_LEVEL", ""), "PORTWAY_LOG_LEVEL"),
    ] {
        let error = environment(&[pair]).unwrap_err();
        assert!(error.contains(fault), "{pair:?}: {error}");
    }
}

#[test]
fn a_network_has_an_ipv6_prefix_of_its_own_that_stays_the_same() {
    let of = |extra: &str| settings(&format!("link = [\"qemu:unix:/x\"]\n{extra}")).unwrap().ipv6;
    let v6 = of("").unwrap();
    assert_eq!(v6.subnet.to_string(), "fd6b:420b:1fb5::/64");
    assert_eq!(v6.host_alias.to_string(), "fd6b:420b:1fb5::254");
    assert!(v6.follows_host && !of("ipv6 = \"on\"").unwrap().follows_host);
    assert_ne!(of("subnet = \"10.0.0.0/24\"").unwrap().subnet, v6.subnet);
    assert_eq!(of("ipv6 = \"off\""), None);
    let given = of("subnet6 = \"2001:db8:1::/64\"").unwrap();
    assert_eq!(given.gateway.to_string(), "2001:db8:1::1");
}

#[test]
fn the_command_line_wins_and_lists_append() {
    let file: Settings = toml::from_str("mtu = 1500\npublish = [\"1:1\"]").unwrap();
    let line: Settings = toml::from_str("mtu = 9000\npublish = [\"2:2\"]").unwrap();
    let both = line.over(file);
    assert_eq!((both.mtu, both.publish.len()), (Some(9000), 2));
}

#[test]
fn a_bad_value_names_the_setting_the_value_and_what_to_do() {
    for (toml, fault) in [
        ("", "--link: one at least is needed"),
        ("link = [\"qemu\"]", "is not an address of a qemu link"),
        ("link = [\"stdio:1\"]", "is not an address of a stdio link"),
        ("link = [\"tap:a-very-long-device\"]", "is not an address of a tap link"),
        ("link = [\"qemu:unix:/x,netns=1\"]", "netns= is an option of tap links alone"),
        ("link = [\"tap:tap0,offload=on\"]", "offload= is not an option of a tap link"),
        ("link = [\"qemu:unix:/x,isolate=yes\"]", "isolate=yes is neither on nor off"),
        ("link = [\"wire:unix:/x\"]", "is not a kind of link"),
        ("link = [\"qemu:tcp:1.2.3.4:5\"]", "is not an address of a qemu link"),
        ("link = [\"qemu:unix:/x,mtu=100\"]", "576 to 65535"),
        ("link = [\"qemu:unix:/x,color=red\"]", "is not an option of a link"),
        ("link = [\"qemu:unix:/x\"]\nmtu = 1", "--mtu: 1: 576"),
        ("link = [\"qemu:unix:/x\"]\nsubnet = \"10.0.0.0/30\"", "--subnet: 10.0.0.0/30"),
        ("link = [\"qemu:unix:/x\"]\nsubnet6 = \"fd00::/48\"", "--subnet6: fd00::/48"),
        ("link = [\"qemu:unix:/x\"]\nsubnet6 = \"10.0.0.0/24\"", "--subnet6: 10.0.0.0/24"),
        ("link = [\"qemu:unix:/x\"]\nudp-idle = 5", "--udp-idle: 5: 30 to 86400"),
        ("link = [\"qemu:unix:/x\"]\nudp-filter = \"none\"", "unknown variant `none`"),
        ("link = [\"qemu:unix:/x,ip=10.0.0.9\"]", "10.0.0.9 is not in the subnet"),
        ("link = [\"qemu:unix:/x,ip=192.168.127.254\"]", "is the network's own"),
        ("link = [\"qemu:unix:/x\", \"qemu:unix:/x\"]", "the same address or name"),
        ("link = [\"qemu:unix:/x\"]\npublish = [\"1:1\", \"1:2\"]", "given twice"),
        ("link = [\"qemu:unix:/x\"]\ndns-upstream = [\"dns.test\"]", "is not IP[:PORT]"),
        ("link = [\"qemu:unix:/x\"]\ndns-upstream = [\"a..b=1.1.1.1\"]", "\"a..b\" is not a domain"),
        ("link = [\"qemu:unix:/x\"]\ndns-host = [\"*=1.1.1.1\"]", "is not NAME=IP"),
        ("link = [\"qemu:unix:/x\"]\nstatic-lease = [\"a=b\"]", "is not MAC=IP"),
        ("link = [\"qemu:unix:/x\"]\nlease-time = 5", "--lease-time: 5: 60 seconds at least"),
        ("link = [\"qemu:unix:/x\"]\nvsock = [\"wire:/x\"]", "is not a kind of vsock"),
        ("link = [\"qemu:unix:/x\"]\nvsock = [\"dir:/x\", \"dir:/y\"]", "--vsock: two guests have CID 3"),
        ("link = [\"qemu:unix:/x\"]\nvsock-ports = [1]", "--vsock-ports: there is no --vsock"),
        ("link = [\"qemu:unix:/x\"]\nvsock = [\"dir:/x\"]\nvsock-ports = [1]", "--vsock-ports: they need"),
        ("link = [\"qemu:unix:/x\"]\nmto = 3", "line 2: \"mto\" is not a setting: did you mean \"mtu\"?"),
        ("link = [\"qemu:unix:/x\"]\ncolour = 3", "is not a setting; there are link, subnet"),
        ("link = [\"qemu:unix:/x\"]\nmtu = \"big\"", "line 2: mtu: invalid type"),
        (
            "link = [\"qemu:unix:/x\"]\nguest-api = true",
            "line 2: guest-api: invalid type: boolean `true`, expected \"on\" or \"off\"",
        ),
        (
            "link = [\"qemu:unix:/x\"]\nhost-loopback = \"no\"",
            "line 2: host-loopback: invalid value: string \"no\", expected \"on\" or \"off\"",
        ),
        ("link = [\"qemu:unix:/x\"]\n[limits]\nmax-tcp = 3", "line 3: \"max-tcp\" is not a setting"),
        ("link = [\"qemu:unix:/x\"]\nsubnet = \"127.1.0.0/16\"", "--subnet: 127.1.0.0/16: 127.0.0.0/8 is"),
        ("link = [\"qemu:unix:/x\"]\nsubnet = \"0.1.0.0/16\"", "--subnet: 0.1.0.0/16: a host in 0.0.0.0/8"),
        (
            "link = [\"qemu:unix:/x\"]\nsubnet = \"239.1.0.0/16\"",
            "--subnet: 239.1.0.0/16: these are addresses of groups",
        ),
        ("link = [\"qemu:unix:/x\"]\nsubnet6 = \"fe80::/64\"", "--subnet6: fe80::/64: link-local"),
        (
            "link = [\"qemu:unix:/x\"]\nsubnet6 = \"ff02::/64\"",
            "--subnet6: ff02::/64: these are addresses of groups",
        ),
        (
            "link = [\"qemu:unix:/x,ip=192.168.127.9\", \"qemu:unix:/y,ip=192.168.127.9\"]",
            "two links have ip=192.168.127.9",
        ),
        ("link = [\"qemu:unix:/x,name=gateway\"]", "\"gateway\" is the network's own name"),
        ("link = [\"qemu:unix:/x\"]\npublish = [\"1:db:1\"]", "no guest is called \"db\""),
        ("link = [\"qemu:unix:/x\"]\npublish = [\"1:10.0.0.9:1\"]", "10.0.0.9 is not in the subnet"),
        (
            "link = [\"qemu:unix:/x\"]\nstatic-lease = [\"01:00:5e:00:00:01=192.168.127.9\"]",
            "no guest's Ethernet address",
        ),
        (
            "link = [\"qemu:unix:/x\"]\nstatic-lease = [\"00:00:00:00:00:00=192.168.127.9\"]",
            "no guest's Ethernet address",
        ),
        (
            "link = [\"qemu:unix:/x\"]\nstatic-lease = [\"02:00:00:00:00:01=192.168.127.9,db\", \"02:00:00:00:00:02=192.168.127.8,db\"]",
            "two guests are called \"db\"",
        ),
        ("link = [\"qemu:unix:/x\"]\ndns-upstream = [\"192.0.2.53:0\"]", "is not IP[:PORT]"),
        ("link = [\"qemu:unix:/x\"]\nmtu = 1500\nmtu = 1501", "duplicate key"),
        ("link = [\"qemu:unix:/x\"]\nmetrics = \"9110\"", "is not HOST:PORT"),
        ("link = [\"qemu:unix:/x\"]\nlog-format = \"xml\"", "unknown variant"),
    ] {
        let error = settings(toml).expect_err(toml);
        assert!(error.contains(fault), "{toml}: {error}");
    }
}
