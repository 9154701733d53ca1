//! What the commands print: tables for people, one JSON document for programs.
#![allow(clippy::print_stderr, reason = "this is where the program speaks")]

use portway_api::agent::AgentInfo;
use portway_api::control::{DnsRecord, FlowInfo, LeaseInfo, LinkInfo, PortInfo, Stats};
use portway_launcher::VmInfo;
use serde::Serialize;

/// One line to standard output.
pub(super) fn say(line: &str) {
    use std::io::Write;
    // A reader that has gone away (`| head`) is no fault of ours.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// One line to standard error.
pub(super) fn complain(line: &str) {
    eprintln!("portway: {line}");
}

pub(super) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => say(&text),
        Err(error) => complain(&error.to_string()),
    }
}

/// Columns as wide as their widest cell.
fn table(head: &[&str], rows: &[Vec<String>]) {
    let mut width: Vec<usize> = head.iter().map(|h| h.len()).collect();
    for row in rows {
        for (w, cell) in width.iter_mut().zip(row) {
            *w = (*w).max(cell.len());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.zip(&width).map(|(c, w)| format!("{c:w$}")).collect();
        say(cells.join("  ").trim_end());
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}

fn host_end(p: &PortInfo) -> String {
    let end = |ip: &String| match (p.host_port, ip.contains(':')) {
        (0, _) => ip.clone(),
        (port, true) => format!("[{ip}]:{port}"),
        (port, false) => format!("{ip}:{port}"),
    };
    p.bind.iter().map(end).collect::<Vec<_>>().join(" ")
}

fn guest_end(p: &PortInfo) -> String {
    match (p.guest_port, p.guest.contains(':')) {
        // A unix socket in the guest.
        (0, _) => p.guest.clone(),
        (port, true) => format!("[{}]:{port}", p.guest),
        (port, false) => format!("{}:{port}", p.guest),
    }
}

pub(super) fn published(p: &PortInfo) -> String {
    format!("published {} {} -> {}", p.proto, host_end(p), guest_end(p))
}

pub(super) fn vms(vms: &[VmInfo], now_s: u64) {
    let rows: Vec<Vec<String>> = vms
        .iter()
        .map(|vm| {
            let console = if vm.detached { "portway console" } else { "its terminal" };
            vec![
                vm.name.clone(),
                vm.pid.to_string(),
                format!("{} {}", vm.arch, vm.accel),
                vm.cpus.to_string(),
                format!("{} MiB", vm.mem_mib),
                format!("{} s", now_s.saturating_sub(vm.started_s)),
                console.into(),
                vm.state_dir.display().to_string(),
            ]
        })
        .collect();
    table(&["NAME", "PID", "MACHINE", "CPUS", "MEMORY", "UP", "CONSOLE", "STATE"], &rows);
}

pub(super) fn unpublished(p: &PortInfo) -> String {
    format!("unpublished {} {} -> {}", p.proto, host_end(p), guest_end(p))
}

pub(super) fn ports(ports: &[PortInfo]) {
    let row = |p: &PortInfo| {
        vec![p.proto.to_string(), host_end(p), guest_end(p), p.state.clone(), p.accepted.to_string()]
    };
    table(&["PROTO", "HOST", "GUEST", "STATE", "ACCEPTED"], &ports.iter().map(row).collect::<Vec<_>>());
}

pub(super) fn leases(leases: &[LeaseInfo]) {
    let row = |l: &LeaseInfo| {
        let name = l.name.clone().unwrap_or_else(|| "-".into());
        let expires = l.expires_in_s.map_or_else(|| "-".into(), |s| format!("{s} s"));
        vec![l.ip.clone(), l.mac.clone(), name, expires, if l.fixed { "fixed".into() } else { String::new() }]
    };
    table(&["ADDRESS", "MAC", "NAME", "EXPIRES", ""], &leases.iter().map(row).collect::<Vec<_>>());
}

pub(super) fn dns(records: &[DnsRecord]) {
    let row = |r: &DnsRecord| vec![r.name.clone(), r.address.clone(), r.origin.clone()];
    table(&["NAME", "ADDRESS", "ORIGIN"], &records.iter().map(row).collect::<Vec<_>>());
}

pub(super) fn links(links: &[LinkInfo]) {
    let row = |l: &LinkInfo| {
        vec![
            l.name.clone(),
            l.kind.clone(),
            if l.up { "up" } else { "down" }.into(),
            l.ip.clone().unwrap_or_else(|| "-".into()),
            l.mtu.to_string(),
            l.address.clone(),
        ]
    };
    table(&["VM", "LINK", "STATE", "GUEST", "MTU", "ADDRESS"], &links.iter().map(row).collect::<Vec<_>>());
}

pub(super) fn flows(flows: &[FlowInfo]) {
    let row = |f: &FlowInfo| {
        vec![
            f.vm.clone(),
            f.proto.to_string(),
            f.direction.clone(),
            f.guest.clone(),
            f.remote.clone(),
            f.state.clone(),
            f.bytes_to_host.to_string(),
            f.bytes_to_guest.to_string(),
            format!("{} s", f.idle_s),
        ]
    };
    let head = ["VM", "PROTO", "DIRECTION", "GUEST", "REMOTE", "STATE", "TO HOST", "TO GUEST", "IDLE"];
    table(&head, &flows.iter().map(row).collect::<Vec<_>>());
}

pub(super) fn agents(agents: &[AgentInfo]) {
    let row = |a: &AgentInfo| {
        let state = match (a.connected, a.ready) {
            (true, true) => "ready",
            (true, false) => "connected",
            (false, _) => "away",
        };
        vec![
            a.name.clone().unwrap_or_else(|| "-".into()),
            state.into(),
            a.version.clone().unwrap_or_else(|| "-".into()),
            a.listeners.to_string(),
            a.ports.to_string(),
            a.refused.to_string(),
            a.streams.to_string(),
        ]
    };
    let head = ["VM", "STATE", "VERSION", "LISTENERS", "PORTS", "NOT PUBLISHED", "STREAMS"];
    table(&head, &agents.iter().map(row).collect::<Vec<_>>());
}

pub(super) fn stats(s: &Stats) {
    say(&format!("up {} s", s.uptime_s));
    say(&format!(
        "tcp flows     {} now, {} dialing, {} since start",
        s.tcp_flows, s.tcp_dialing, s.tcp_flows_total
    ));
    say(&format!("udp bindings  {}", s.udp_bindings));
    say(&format!("dns queries   {}", s.dns_queries));
    for l in &s.links {
        let state = if l.up { "up" } else { "down" };
        say(&format!(
            "link {} ({}) {state}: {} frames, {} bytes from the guest; {} frames, {} bytes to it",
            l.name, l.kind, l.frames_from_guest, l.bytes_from_guest, l.frames_to_guest, l.bytes_to_guest
        ));
    }
    for part in &s.sandbox.parts {
        let state = if part.in_force { "in force" } else { "missing" };
        say(&format!("sandbox       {} {state}: {}", part.name, part.detail));
    }
    if s.sandbox.refused_calls > 0 {
        say(&format!("sandbox       refused {} system calls", s.sandbox.refused_calls));
    }
    for (reason, n) in &s.drops {
        say(&format!("dropped       {n} {reason}"));
    }
}
