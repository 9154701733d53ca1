//! `doctor`: what this host has of what Portway can use, and how to get what is missing.

use std::fs;
use std::net::{Ipv6Addr, TcpListener};
use std::process::{Command, ExitCode};

use serde::Serialize;

use super::{Failure, Format, Target, client, listing};
use crate::config::runtime_socket;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    /// Something is slower or not there; the rest works.
    Warn,
    /// Nothing works before it is fixed.
    Fail,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Check {
    /// A stable name.
    check: &'static str,
    outcome: Outcome,
    /// What was found.
    found: String,
    /// What to do; null when nothing is.
    fix: Option<String>,
}

fn ok(check: &'static str, found: impl Into<String>) -> Check {
    Check { check, outcome: Outcome::Ok, found: found.into(), fix: None }
}

fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { check, outcome: Outcome::Warn, found: found.into(), fix: Some(fix.into()) }
}

fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { check, outcome: Outcome::Fail, found: found.into(), fix: Some(fix.into()) }
}

pub(super) fn doctor(at: &Target) -> Result<ExitCode, Failure> {
    let checks = checks(at);
    match at.format {
        Format::Json => listing::json(&checks),
        Format::Table => checks.iter().for_each(|c| lines(c).iter().for_each(|l| listing::say(l))),
    }
    let failed = checks.iter().any(|c| c.outcome == Outcome::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn lines(check: &Check) -> Vec<String> {
    let mark = match check.outcome {
        Outcome::Ok => "ok  ",
        Outcome::Warn => "warn",
        Outcome::Fail => "FAIL",
    };
    let mut lines = vec![format!("{mark}  {:<18} {}", check.check, check.found)];
    lines.extend(check.fix.as_ref().map(|fix| format!("      {:<18} fix: {fix}", "")));
    lines
}

/// Every check, in the order of what depends on what.
pub(super) fn checks(at: &Target) -> Vec<Check> {
    vec![
        runtime_dir(),
        descriptors(),
        resolver(),
        ipv6_loopback(),
        privileged_ports(),
        ping(),
        tun(),
        user_namespaces(),
        kvm(),
        vsock(),
        qemu(),
        sandbox(),
        network(at),
        sandbox_in_force(at),
    ]
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

fn openable(path: &str) -> std::io::Result<()> {
    fs::OpenOptions::new().read(true).write(true).open(path).map(drop)
}

fn runtime_dir() -> Check {
    const NAME: &str = "runtime-dir";
    match runtime_socket("default") {
        Ok(path) => ok(NAME, format!("control sockets lie in {}", path.parent().unwrap_or(&path).display())),
        Err(error) => fail(NAME, error.to_string(), "set XDG_RUNTIME_DIR to a directory of yours, mode 0700"),
    }
}

fn descriptors() -> Check {
    const NAME: &str = "descriptors";
    match nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= 65_536 => ok(NAME, format!("{hard} may be open; each flow takes one")),
        Ok((_, hard)) => warn(
            NAME,
            format!("only {hard} may be open; each flow takes one"),
            "raise the hard limit: LimitNOFILE= in a unit, `nofile` in /etc/security/limits.conf",
        ),
        Err(error) => warn(NAME, error.to_string(), "none is known"),
    }
}

fn resolver() -> Check {
    const NAME: &str = "resolver";
    let path = "/etc/resolv.conf";
    let fix = "name a resolver there, or start with --dns-upstream IP";
    match read(path) {
        None => warn(NAME, format!("{path} cannot be read: guests get no names of the Internet"), fix),
        Some(text) => {
            let servers: Vec<&str> =
                text.lines().filter_map(|l| l.trim().strip_prefix("nameserver")).map(str::trim).collect();
            if servers.is_empty() {
                warn(NAME, format!("{path} names no resolver: guests get no names of the Internet"), fix)
            } else {
                ok(NAME, format!("{path}: {}", servers.join(", ")))
            }
        }
    }
}

fn ipv6_loopback() -> Check {
    const NAME: &str = "ipv6-loopback";
    match TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        Ok(_) => ok(NAME, "published ports are on ::1 too"),
        Err(error) => warn(
            NAME,
            format!("no ::1 ({error}): ports are published on 127.0.0.1 alone"),
            "sysctl net.ipv6.conf.lo.disable_ipv6=0, when programs of yours want localhost to be ::1",
        ),
    }
}

fn privileged_ports() -> Check {
    const NAME: &str = "low-ports";
    let first: u16 =
        read("/proc/sys/net/ipv4/ip_unprivileged_port_start").and_then(|t| t.parse().ok()).unwrap_or(1024);
    if nix::unistd::geteuid().is_root() || first <= 80 {
        ok(NAME, "ports below 1024 can be published")
    } else {
        warn(
            NAME,
            format!("ports below {first} cannot be published"),
            "sysctl net.ipv4.ip_unprivileged_port_start=80, when you want ports 80 and 443",
        )
    }
}

fn ping() -> Check {
    const NAME: &str = "ping";
    let text = read("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default();
    let mut bounds = text.split_whitespace().filter_map(|n| n.parse::<u32>().ok());
    let range = bounds.next().zip(bounds.next());
    let group = nix::unistd::getegid().as_raw();
    if nix::unistd::geteuid().is_root() || range.is_some_and(|(low, high)| (low..=high).contains(&group)) {
        ok(NAME, "this user may open ping sockets")
    } else {
        warn(
            NAME,
            format!("this user may not open ping sockets (net.ipv4.ping_group_range is {text:?})"),
            "sysctl net.ipv4.ping_group_range=\"0 2147483647\", when guests are to ping",
        )
    }
}

fn tun() -> Check {
    const NAME: &str = "tap";
    match openable("/dev/net/tun") {
        Ok(()) => ok(NAME, "/dev/net/tun can be opened: tap links work"),
        Err(error) => warn(
            NAME,
            format!("/dev/net/tun: {error}: no tap links"),
            "modprobe tun, and give this user the device; only containers and namespaces need it",
        ),
    }
}

fn user_namespaces() -> Check {
    const NAME: &str = "user-namespaces";
    let most: u64 = read("/proc/sys/user/max_user_namespaces").and_then(|t| t.parse().ok()).unwrap_or(0);
    let refused = read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0")
        || read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1");
    if most > 0 && !refused {
        ok(NAME, "tap:NAME,netns=PID works without root")
    } else {
        warn(
            NAME,
            "unprivileged user namespaces are switched off: tap:NAME,netns=PID needs root",
            "sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces=15000",
        )
    }
}

fn kvm() -> Check {
    const NAME: &str = "kvm";
    let cpu = read("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|l| l.starts_with("flags") || l.starts_with("Features")).unwrap_or_default();
    let virtual_cpu = flags.split(' ').any(|f| f == "vmx" || f == "svm") || cfg!(not(target_arch = "x86_64"));
    match openable("/dev/kvm") {
        Ok(()) if virtual_cpu => ok(NAME, "/dev/kvm works"),
        Ok(()) => warn(
            NAME,
            "/dev/kvm is there, but the CPU has neither vmx nor svm (a VM without nesting)",
            "switch nesting on at the outer host; QEMU translates meanwhile, ten times slower",
        ),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            warn(NAME, "/dev/kvm may not be opened by this user", "usermod -aG kvm $USER, and log in again")
        }
        Err(error) => warn(
            NAME,
            format!("/dev/kvm: {error}"),
            "switch virtualization on in the firmware and modprobe kvm_intel or kvm_amd; QEMU translates meanwhile",
        ),
    }
}

fn vsock() -> Check {
    const NAME: &str = "vsock";
    match openable("/dev/vhost-vsock") {
        Ok(()) => ok(NAME, "/dev/vhost-vsock works"),
        Err(error) => warn(
            NAME,
            format!("/dev/vhost-vsock: {error}"),
            "only --vsock vhost:CID needs it (`portway run` has a device of its own): modprobe vhost_vsock, and give this user the device",
        ),
    }
}

fn qemu() -> Check {
    const NAME: &str = "qemu";
    let program = format!("qemu-system-{}", std::env::consts::ARCH);
    let out = Command::new(&program).arg("--version").output();
    let version = out.ok().filter(|o| o.status.success()).and_then(|o| {
        let text = String::from_utf8_lossy(&o.stdout).into_owned();
        text.split("version ").nth(1)?.split([' ', '\n', '(']).next().map(str::to_owned)
    });
    let fix = "install it (Debian: qemu-system-x86); `portway serve` works with any other hypervisor";
    match version {
        None => warn(NAME, format!("{program} is not there: `portway run` cannot start VMs"), fix),
        Some(version) => {
            let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
            if (numbers.next(), numbers.next()) >= (Some(7), Some(2)) {
                ok(NAME, format!("{program} {version}"))
            } else {
                warn(NAME, format!("{program} {version} has no `-netdev stream`"), "install 7.2 or newer")
            }
        }
    }
}

/// What this kernel has of the sandbox.
#[cfg(target_os = "linux")]
fn sandbox() -> Check {
    const NAME: &str = "sandbox";
    let missing: Vec<&str> =
        crate::sandbox::offered().into_iter().filter(|(_, there)| !there).map(|(part, _)| part).collect();
    if missing.is_empty() {
        ok(NAME, "this kernel has Landlock and seccomp: --sandbox require works")
    } else {
        warn(
            NAME,
            format!("this kernel has no {}: networks run without", missing.join(" and no ")),
            "boot with lsm=landlock,… (Linux 5.13 or newer), CONFIG_SECCOMP_FILTER=y; what is missing is warned of at each start",
        )
    }
}

#[cfg(not(target_os = "linux"))]
fn sandbox() -> Check {
    ok("sandbox", "there is none on this system")
}

/// What the running network has given up.
fn sandbox_in_force(at: &Target) -> Check {
    const NAME: &str = "sandbox-in-force";
    let answer = client(at).ok().and_then(|c| c.get::<portway_api::control::NetworkInfo>("/v1/network").ok());
    let Some(sandbox) = answer.map(|n| n.sandbox) else { return ok(NAME, "no network runs") };
    let missing: Vec<String> =
        sandbox.parts.iter().filter(|p| !p.in_force).map(|p| format!("{} ({})", p.name, p.detail)).collect();
    if sandbox.parts.is_empty() {
        warn(NAME, "the network does not say (an older version)", "start it anew")
    } else if sandbox.refused_calls > 0 {
        warn(
            NAME,
            format!("{} system calls were refused", sandbox.refused_calls),
            "its log names them; please report it",
        )
    } else if !missing.is_empty() {
        warn(NAME, format!("without {}", missing.join(", ")), "see docs/security.md")
    } else {
        let parts: Vec<String> = sandbox.parts.iter().map(|p| format!("{}: {}", p.name, p.detail)).collect();
        ok(NAME, format!("complete ({}); {}", sandbox.mode, parts.join("; ")))
    }
}

fn network(at: &Target) -> Check {
    const NAME: &str = "network";
    let answer = client(at)
        .map_err(|f| f.line)
        .and_then(|c| c.get::<portway_api::control::NetworkInfo>("/v1/network").map_err(|e| e.to_string()));
    match answer {
        Ok(n) if n.version == env!("CARGO_PKG_VERSION") => {
            ok(NAME, format!("{} runs (pid {}, {})", n.name, n.pid, n.subnet))
        }
        Ok(n) => warn(
            NAME,
            format!("{} runs version {}, this program is {}", n.name, n.version, env!("CARGO_PKG_VERSION")),
            "start it anew",
        ),
        Err(line) if at.api.is_some() || at.network != "default" => {
            fail(NAME, line, "start it with `portway serve`")
        }
        Err(_) => ok(NAME, "none runs under this name"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_is_not_ok_says_the_fix() {
        for check in [
            runtime_dir(),
            descriptors(),
            resolver(),
            ipv6_loopback(),
            ping(),
            tun(),
            kvm(),
            vsock(),
            sandbox(),
        ] {
            assert_eq!(check.fix.is_none(), check.outcome == Outcome::Ok, "{check:?}");
            assert!(!check.found.is_empty());
        }
        assert_eq!(
            lines(&fail("a", "b", "c")),
            ["FAIL  a                  b", "                         fix: c"]
        );
    }
}
