//! What the guest's agent has given up, looked at from outside: `/proc` of every thread. What it still has to be able to do is
//! what `agent.rs`, `agent_rules.rs` and `agent_containers.rs` show.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use portway_tests::agent::binary;
use portway_tests::agent_lab::{Lab, PATIENCE, free_port};
use portway_tests::host::Ends;
use portway_tests::sidecar::until;

const NOBODY: u32 = 65_534;
const NONE: u64 = 0;
const DAC_OVERRIDE: u64 = 1 << 1;
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;

/// Name, capabilities (effective, permitted, inheritable, ambient, bounding), no_new_privs and seccomp of a thread.
type Thread = (String, [u64; 5], [u64; 2]);

/// Every thread of a process.
fn threads(pid: u32) -> Result<Vec<Thread>> {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            let value = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':').map(str::trim));
            value.with_context(|| format!("no {name}"))
        };
        let mut sets = [0; 5];
        for (set, name) in sets.iter_mut().zip(["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"]) {
            *set = u64::from_str_radix(field(name)?, 16)?;
        }
        let name = field("Name")?.to_owned();
        all.push((name, sets, [field("NoNewPrivs")?.parse()?, field("Seccomp")?.parse()?]));
    }
    all.sort();
    Ok(all)
}

#[test]
fn each_thread_keeps_the_capabilities_of_its_work_and_no_way_to_more() -> Result<()> {
    let Some(lab) = Lab::start(&[])? else { return Ok(()) };
    let bounding = DAC_OVERRIDE | NET_ADMIN | NET_RAW;
    let wanted = [
        ("nat", [NET_ADMIN | NET_RAW, NET_ADMIN | NET_RAW, NONE, NONE, bounding]),
        // The lab's agent is told to leave the clock alone, so SYS_TIME has gone too.
        ("portway-agent", [DAC_OVERRIDE, DAC_OVERRIDE, NONE, NONE, bounding]),
    ];
    let wanted: Vec<_> = wanted.iter().map(|(name, sets)| ((*name).to_owned(), *sets, [1, 2])).collect();
    let found = || threads(lab.agent.pid()).unwrap_or_default();
    until(PATIENCE, || found() == wanted).with_context(|| format!("{:x?} and not {wanted:x?}", found()))
}

#[test]
fn what_stands_in_for_dockers_proxy_has_nothing_left() -> Result<()> {
    let Some(lab) = Lab::start(&[])? else { return Ok(()) };
    let number = free_port()?;
    let port = number.to_string();
    let mut command = lab.agent.command(&binary()?);
    command.args(["expose-port", "-i", "-proto", "tcp", "-host-ip", "127.0.0.1", "-host-port", &port]);
    command.args(["-container-ip", "127.0.0.1", "-container-port", "9", "-control"]).arg(lab.agent.socket());
    let proxy = Ends(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
    let published = || lab.ports().is_ok_and(|all| all.iter().any(|p| p["host_port"] == number));
    until(PATIENCE, published).with_context(|| lab.context())?;
    let found = || threads(proxy.0.id()).unwrap_or_default();
    let bare = |all: &[Thread]| {
        !all.is_empty() && all.iter().all(|(_, sets, bits)| *sets == [NONE; 5] && *bits == [1, 2])
    };
    until(PATIENCE, || bare(&found())).with_context(|| format!("{:x?}", found()))
}

#[test]
fn an_ordinary_users_agent_is_not_dumpable_and_behind_its_filter() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777))?;
    let program = dir.path().join("portway-agent");
    // By another process: one of ours that was forked meanwhile would keep it open for writing, and then it cannot be run.
    ensure!(Command::new("cp").arg(binary()?).arg(&program).status()?.success());
    let mut command = Command::new(&program);
    command.arg("run").arg("--host").arg(format!("unix:{}", dir.path().join("nobody-there").display()));
    command.arg("--socket").arg(dir.path().join("local"));
    let root = nix::unistd::geteuid().is_root();
    if root {
        command.uid(NOBODY).gid(NOBODY);
    }
    let agent = Ends(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
    let pid = agent.0.id();
    let found = || threads(pid).unwrap_or_default();
    let bare = |all: &[Thread]| {
        !all.is_empty() && all.iter().all(|(_, sets, bits)| sets[..4] == [NONE; 4] && *bits == [1, 2])
    };
    until(PATIENCE, || bare(&found())).with_context(|| format!("{:x?}", found()))?;
    // proc(5): the files of a process that is not dumpable are root's.
    ensure!(std::fs::metadata(format!("/proc/{pid}/environ"))?.uid() == 0);
    Ok(())
}
