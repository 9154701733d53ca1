//! Leases for real clients: dhclient, udhcpc, dhcpcd, systemd-networkd and perfdhcp in a network namespace behind the real `portway serve`. It
//! needs root; without, the tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portway_tests::namespace::Namespace;
use portway_tests::sidecar::{Sidecar, until};

/// How long a client may take: they wait a second or two by themselves.
const PATIENCE: Duration = Duration::from_secs(30);

struct Lab {
    namespace: Namespace,
    sidecar: Sidecar,
    dir: tempfile::TempDir,
}

impl Lab {
    /// `None` without root.
    fn new(options: &[&str]) -> Result<Option<Self>> {
        let Some(namespace) = Namespace::new()? else { return Ok(None) };
        let dir = tempfile::tempdir()?;
        let link = format!("tap:tap0,netns={}", namespace.path().display());
        let sidecar = Sidecar::start(dir.path(), &[&["--link", &link], options].concat())?;
        namespace.up("tap0")?;
        Ok(Some(Self { namespace, sidecar, dir }))
    }

    /// A script that writes what a client tells it, one file for each reason.
    fn script(&self, reason: &str) -> Result<PathBuf> {
        let path = self.dir.path().join("script");
        let text = format!("#!/bin/sh\nenv > {}/$${{{reason}}}.env\nexit 0\n", self.dir.path().display());
        std::fs::write(&path, text.replace("$$", "$"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// What the client told its script for `reason`: the value of one variable.
    fn told(&self, reason: &str, name: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.dir.path().join(format!("{reason}.env"))).ok()?;
        let found = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='))?;
        Some(found.to_owned())
    }

    fn lease(&self) -> Result<Option<(String, Option<String>)>> {
        let all = self.sidecar.json(&["leases"])?;
        let lease = all.as_array().and_then(|a| a.first().cloned());
        Ok(lease.map(|l| {
            let name = l["name"].as_str().map(str::to_owned);
            (l["ip"].as_str().unwrap_or_default().to_owned(), name)
        }))
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn udhcpc_gets_a_lease_with_its_options_and_gives_it_back() -> Result<()> {
    let options = ["--ntp-server", "192.0.2.123", "--state-dir"];
    let state = tempfile::tempdir()?;
    let Some(lab) = Lab::new(&[&options[..], &[text(state.path())]].concat())? else { return Ok(()) };
    let script = lab.dir.path().join("udhcpc.sh");
    // The client renews and releases from the address it has.
    let line = format!(
        "#!/bin/sh\n[ $1 = bound ] && ip address add $ip/$mask dev $interface\nenv > {}/$1.env\nexit 0\n",
        lab.dir.path().display()
    );
    std::fs::write(&script, line)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    let mut client = lab
        .namespace
        .command("busybox")
        .args(["udhcpc", "-i", "tap0", "-f", "-R", "-x", "hostname:Boxy", "-O", "ntpsrv", "-O", "search"])
        .args(["-O", "mtu", "-s", text(&script)])
        .spawn()?;
    until(PATIENCE, || lab.told("bound", "ip").is_some())?;
    let told = |name| lab.told("bound", name).unwrap_or_default();
    assert_eq!(
        (told("ip"), told("router"), told("dns")),
        ("192.168.127.2".into(), "192.168.127.1".into(), "192.168.127.1".into())
    );
    assert_eq!(
        (told("mask"), told("lease"), told("ntpsrv")),
        ("24".into(), "3600".into(), "192.0.2.123".into())
    );
    assert_eq!(told("mtu"), "1500");
    ensure!(told("search").starts_with("portway.internal"), "{}", told("search"));
    assert_eq!(lab.lease()?, Some(("192.168.127.2".into(), Some("boxy".into()))));
    let kept = || std::fs::read_to_string(state.path().join("leases.json")).unwrap_or_default();
    until(PATIENCE, || kept().contains("192.168.127.2"))?;
    // SIGUSR1 renews, SIGUSR2 releases.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(client.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1)?;
    until(PATIENCE, || lab.told("renew", "ip").is_some())?;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR2)?;
    until(PATIENCE, || lab.lease().is_ok_and(|l| l.is_none()))?;
    until(PATIENCE, || !kept().contains("192.168.127.2"))?;
    client.kill()?;
    client.wait()?;
    Ok(())
}

#[test]
fn dhclient_gets_a_lease_and_its_old_address_again_after_a_restart_of_both() -> Result<()> {
    let state = tempfile::tempdir()?;
    let options = ["--state-dir", text(state.path())];
    let Some(lab) = Lab::new(&options)? else { return Ok(()) };
    let script = lab.script("reason")?;
    let (leases, pid) = (lab.dir.path().join("dhclient.leases"), lab.dir.path().join("dhclient.pid"));
    std::fs::write(&leases, "")?;
    let config = lab.dir.path().join("dhclient.conf");
    std::fs::write(
        &config,
        "send host-name \"clienty\";\nsend dhcp-client-identifier 255:1:2:3:4;\n\
         request subnet-mask, routers, domain-name-servers, domain-search, interface-mtu;\n",
    )?;
    let run = |namespace: &Namespace| -> Result<()> {
        let out = namespace
            .command("dhclient")
            .args(["-4", "-1", "-v", "-sf", text(&script), "-lf", text(&leases), "-pf", text(&pid)])
            .args(["-cf", text(&config), "tap0"])
            .output()?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        // Its child writes that, in its own time.
        let mut child = None;
        until(Duration::from_secs(10), || {
            child = std::fs::read_to_string(&pid).ok().and_then(|text| text.trim().parse().ok());
            child.is_some()
        })?;
        let pid: i32 = child.context("no pid")?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        Ok(())
    };
    run(&lab.namespace)?;
    assert_eq!(lab.told("BOUND", "new_ip_address").as_deref(), Some("192.168.127.2"));
    assert_eq!(lab.told("BOUND", "new_interface_mtu").as_deref(), Some("1500"));
    assert_eq!(lab.lease()?, Some(("192.168.127.2".into(), Some("clienty".into()))));

    // The sidecar ends and comes back; the client knows its lease: INIT-REBOOT.
    let Lab { namespace, sidecar, dir } = lab;
    ensure!(sidecar.stop()?.success());
    let link = format!("tap:tap0,netns={}", namespace.path().display());
    let sidecar = Sidecar::start(dir.path(), &[&["--link", &link][..], &options].concat())?;
    namespace.up("tap0")?;
    let lab = Lab { namespace, sidecar, dir };
    assert_eq!(lab.lease()?, Some(("192.168.127.2".into(), Some("clienty".into()))), "kept");
    run(&lab.namespace)?;
    assert_eq!(lab.told("REBOOT", "new_ip_address").as_deref(), Some("192.168.127.2"));
    Ok(())
}

#[test]
fn dhcpcd_gets_a_lease_by_rapid_commit_and_its_full_name_is_known() -> Result<()> {
    let Some(lab) = Lab::new(&[])? else { return Ok(()) };
    // What it remembers of an earlier run, under the device's name.
    let _ = std::fs::remove_file("/var/lib/dhcpcd/tap0.lease");
    let (config, log) = (lab.dir.path().join("dhcpcd.conf"), lab.dir.path().join("dhcpcd.log"));
    let settings = "hostname fully\nfqdn both\nclientid\noption rapid_commit, domain_name_servers\nnoarp\n";
    std::fs::write(&config, settings)?;
    let mut client = lab
        .namespace
        .command("dhcpcd")
        .args(["-4", "-B", "-d", "-f", text(&config), "-c", "/bin/true", "--noconfigure", "tap0"])
        .stderr(std::fs::File::create(&log)?)
        .process_group(0)
        .spawn()?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let leased = until(PATIENCE, || said().contains("tap0: leased 192.168.127.2"));
    // It has helpers, in its process group.
    let group = nix::unistd::Pid::from_raw(i32::try_from(client.id())?);
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL)?;
    client.wait()?;
    leased.with_context(said)?;
    ensure!(!said().contains("requesting lease"), "one exchange was enough: {}", said());
    assert_eq!(lab.lease()?, Some(("192.168.127.2".into(), Some("fully".into()))));
    Ok(())
}

/// A daemon of systemd's in the namespace, on a `/run/systemd` of its own.
fn systemd(lab: &Lab, program: &str, set_up: &str) -> Result<Option<std::process::Child>> {
    let found = ["/usr/lib/systemd", "/lib/systemd"].map(|dir| Path::new(dir).join(program));
    let Some(path) = found.into_iter().find(|path| path.exists()) else {
        eprintln!("SKIPPED: there is no {program} here");
        return Ok(None);
    };
    // With /sys to be read alone, devices are not waited for udev to have seen.
    let script = format!(
        "set -e; mount -t tmpfs none /run/systemd; mount -o remount,ro /sys || mount -t sysfs -o ro sysfs /sys; \
         {set_up}; exec {}",
        path.display()
    );
    let log = std::fs::File::create(lab.dir.path().join("systemd.log"))?;
    let mut command = lab.namespace.command("unshare");
    command.args(["-m", "sh", "-c", &script]).env("SYSTEMD_LOG_LEVEL", "debug");
    Ok(Some(command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?))
}

#[test]
fn systemd_networkd_configures_the_link_by_dhcp_of_both_versions_and_router_advertisements() -> Result<()> {
    let Some(lab) = Lab::new(&["--ipv6", "on"])? else { return Ok(()) };
    let file = "[Match]\\nName=tap0\\n[Network]\\nDHCP=yes\\nIPv6AcceptRA=yes\\n[DHCPv4]\\nHostname=networky\\nUseMTU=yes\\n";
    let set_up = format!(
        "mkdir -p /run/systemd/network /run/systemd/netif/links /run/systemd/netif/leases; \
         printf '{file}' > /run/systemd/network/10-tap.network; chown -R systemd-network: /run/systemd/netif"
    );
    let Some(mut daemon) = systemd(&lab, "systemd-networkd", &set_up)? else { return Ok(()) };
    let ip = |words: &str| lab.namespace.run(words).map(|(_, text)| text).unwrap_or_default();
    let mut seen = String::new();
    let configured = until(PATIENCE, || {
        seen = [
            ip("ip -4 address show dev tap0"),
            ip("ip -6 address show dev tap0 scope global -tentative"),
            ip("ip route"),
            ip("ip -6 route"),
        ]
        .concat();
        let slaac =
            seen.lines().any(|l| l.trim().starts_with("inet6 fd6b:420b:1fb5:0:") && l.contains("/64 "));
        let leased =
            seen.lines().any(|l| l.trim().starts_with("inet6 fd6b:420b:1fb5::1:") && l.contains("/128 "));
        seen.contains("inet 192.168.127.2/24")
            && slaac
            && leased
            && seen.contains("default via 192.168.127.1 dev tap0 proto dhcp")
            && seen.contains("default via fe80::5894:efff:fee4:cdd dev tap0 proto ra")
    });
    let leases = lab.sidecar.json(&["leases"])?;
    daemon.kill()?;
    daemon.wait()?;
    let log = || std::fs::read_to_string(lab.dir.path().join("systemd.log")).unwrap_or_default();
    configured.with_context(|| format!("{seen}\n{}", log()))?;
    let named = leases.as_array().into_iter().flatten().filter(|l| l["name"] == "networky").count();
    assert_eq!(named, 2, "a lease of each version: {leases}");
    Ok(())
}

#[test]
fn perfdhcp_leases_five_hundred_addresses_and_every_one_of_its_messages_is_answered() -> Result<()> {
    let state = tempfile::tempdir()?;
    let options = ["--subnet", "192.168.112.0/20", "--state-dir", text(state.path())];
    let Some(lab) = Lab::new(&options)? else { return Ok(()) };
    // It speaks as a relay of 500 clients.
    lab.namespace.ip(&["address", "add", "192.168.127.200/20", "dev", "tap0"])?;
    let out = lab
        .namespace
        .command("perfdhcp")
        .args(["-4", "-l", "tap0", "-R", "500", "-n", "500", "-r", "250", "-p", "20", "-W", "1000000"])
        .output()?;
    let report = String::from_utf8_lossy(&out.stdout).into_owned();
    eprintln!("{report}");
    ensure!(out.status.success(), "{report}{}", String::from_utf8_lossy(&out.stderr));
    let drops: Vec<&str> = report.lines().filter(|l| l.trim().starts_with("drops:")).collect();
    ensure!(drops.len() == 2 && drops.iter().all(|l| l.trim() == "drops: 0"), "{report}");
    let leases = lab.sidecar.json(&["leases"])?;
    let count = leases.as_array().map_or(0, Vec::len);
    ensure!(count >= 490, "{count} leases");
    until(PATIENCE, || {
        let kept = std::fs::read_to_string(state.path().join("leases.json")).unwrap_or_default();
        kept.matches("\"ip\"").count() == count
    })
}
