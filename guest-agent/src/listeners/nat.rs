//! Ports that have no socket: the kernel sends their connections on (DNAT), as container engines without a userland proxy
//! and kube-proxy ask it to.
//!
//! ```text
//! nf_tables' multicast "a rule has changed" ─► (200 ms later) ─┬─ nft -j list ruleset ─┐
//! once at the start; every 2 s where iptables-legacy is used ──┴─ iptables-save -t nat ─┴─► ports
//! ```
//! The rules are read by the tools that made them, in a thread, for they take tens of milliseconds; a guest whose rules
//! do not change never starts one. Without the tools, or without the right to ask (root), there are no such ports.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use portway_api::agent::Listener;
use portway_api::control::Protocol;
use serde_json::Value;

use crate::harden;

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h, as a bit of `nl_groups`.
const NFTABLES_GROUP: u32 = 1 << (7 - 1);
/// An engine changes many rules at a time: they are read when it is done.
const SETTLE: Duration = Duration::from_millis(200);
/// How often rules of iptables-legacy are read, which tells nobody of a change.
const LEGACY: Duration = Duration::from_secs(2);
/// Where the kernel says that the old tables are in use.
const LEGACY_TABLES: &str = "/proc/net/ip_tables_names";
/// Ports taken from rules at most.
const PORTS: usize = 1024;
/// Bytes of a listing that are read at most.
const LISTING: usize = 8 << 20;

/// The thread that reads the rules.
#[derive(Debug)]
pub(crate) struct Redirections {
    ports: Receiver<Vec<Listener>>,
    news: EventFd,
}

impl Redirections {
    /// Starts it. `node_ports`: kube-proxy's too.
    pub(crate) fn watch(node_ports: bool) -> io::Result<Self> {
        let news = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let theirs = news.as_fd().try_clone_to_owned()?;
        let (tell, ports) = channel();
        let changes = subscribe()?;
        std::thread::Builder::new()
            .name("nat".into())
            .spawn(move || follow(&changes, &theirs, &tell, node_ports))?;
        Ok(Self { ports, news })
    }

    /// The latest ports, if they have changed.
    pub(crate) fn changed(&self) -> Option<Vec<Listener>> {
        // Only a bell: the ports are in the channel.
        let _ = self.news.read();
        self.ports.try_iter().last()
    }
}

impl AsFd for Redirections {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }
}

/// A socket that hears of every change of nf_tables' rules.
fn subscribe() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES_GROUP))?;
    Ok(socket)
}

fn follow(changes: &OwnedFd, bell: &OwnedFd, tell: &Sender<Vec<Listener>>, node_ports: bool) {
    harden::reader();
    let mut told = Vec::new();
    loop {
        let ports = read_rules(node_ports);
        if ports != told {
            told.clone_from(&ports);
            if tell.send(ports).is_err() || nix::unistd::write(bell, &1u64.to_ne_bytes()).is_err() {
                return;
            }
        }
        let legacy = std::fs::read_to_string(LEGACY_TABLES).is_ok_and(|t| t.lines().any(|l| l == "nat"));
        let wait = if legacy {
            PollTimeout::try_from(LEGACY).unwrap_or(PollTimeout::NONE)
        } else {
            PollTimeout::NONE
        };
        match poll(&mut [PollFd::new(changes.as_fd(), PollFlags::POLLIN)], wait) {
            Ok(0) => continue,
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return,
        }
        std::thread::sleep(SETTLE);
        let mut buffer = [0; 8192];
        // ENOBUFS says that more changed than was heard of, which is no other news.
        while !matches!(
            recv(changes.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT),
            Err(nix::errno::Errno::EAGAIN)
        ) {}
    }
}

fn read_rules(node_ports: bool) -> Vec<Listener> {
    let mut ports = BTreeSet::new();
    if let Some(text) = run("nft", &["-j", "list", "ruleset"]) {
        from_nft(&text, node_ports, &mut ports);
    }
    for (tool, any) in [
        ("iptables-save", IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        ("ip6tables-save", IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    ] {
        if let Some(text) = run(tool, &["-t", "nat"]) {
            from_iptables(&text, any, node_ports, &mut ports);
        }
    }
    ports.into_iter().take(PORTS).collect()
}

/// What a tool prints; nothing when it is not there or fails.
fn run(tool: &str, args: &[&str]) -> Option<String> {
    use std::io::Read;
    let mut command = Command::new(tool);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let mut text = Vec::new();
    let read = child.stdout.take()?.take(LISTING as u64).read_to_end(&mut text);
    // Whoever prints more than is read ends by its closed pipe.
    let ended = child.wait().ok()?;
    (read.is_ok() && ended.success()).then(|| String::from_utf8_lossy(&text).into_owned())
}

fn redirected(proto: Protocol, address: IpAddr, port: u16) -> Listener {
    Listener { proto, address, port, v6_only: address.is_ipv6(), redirected: true }
}

/// `-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80`
fn from_iptables(text: &str, any: IpAddr, node_ports: bool, into: &mut BTreeSet<Listener>) {
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (["-A", chain, ..], Some(target)) = (words.as_slice(), value_of(&words, "-j")) else { continue };
        let node = node_ports && *chain == "KUBE-NODEPORTS";
        if target != "DNAT" && !node {
            continue;
        }
        let proto = match value_of(&words, "-p") {
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            _ => continue,
        };
        // A rule for what leaves the guest, or not for this address, is none for the host: `! -d`, `-o`.
        let address = match value_of(&words, "-d") {
            None => any,
            Some(net) => match net.trim_end_matches("/32").trim_end_matches("/128").parse() {
                Ok(ip) => ip,
                Err(_) => continue,
            },
        };
        if let Some((first, last)) = value_of(&words, "--dport").and_then(port_range) {
            into.extend((first..=last).take(PORTS).map(|port| redirected(proto, address, port)));
        }
    }
}

/// The word behind `option`; none when `!` stands before it.
fn value_of<'a>(words: &[&'a str], option: &str) -> Option<&'a str> {
    let at = words.iter().position(|w| *w == option)?;
    let negated = at > 0 && words.get(at - 1) == Some(&"!");
    if negated { None } else { words.get(at + 1).copied() }
}

fn port_range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first > 0 && first <= last).then_some((first, last))
}

/// Rules such as netavark's: `{"rule": {"expr": [{"match": {"left": {"payload": {"protocol": "tcp", "field": "dport"}},
/// "right": 8080}}, {"dnat": {…}}]}}`, and kube-proxy's map of ports.
fn from_nft(text: &str, node_ports: bool, into: &mut BTreeSet<Listener>) {
    let Ok(document) = serde_json::from_str::<Value>(text) else { return };
    let Some(items) = document.get("nftables").and_then(Value::as_array) else { return };
    if node_ports {
        items.iter().filter_map(|i| i.get("map")).for_each(|map| from_kube_proxy(map, into));
    }
    for rule in items.iter().filter_map(|i| i.get("rule")) {
        let Some(expressions) = rule.get("expr").and_then(Value::as_array) else { continue };
        if !expressions.iter().any(|e| e.get("dnat").is_some()) {
            continue;
        }
        let v6 = rule.get("family").and_then(Value::as_str) == Some("ip6");
        let mut address =
            if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        let mut ports = Vec::new();
        let mut proto = None;
        for matched in expressions.iter().filter_map(|e| e.get("match")) {
            let payload = matched.pointer("/left/payload");
            let word = |key: &str| payload.and_then(|p| p.get(key)).and_then(Value::as_str);
            let Some(right) = matched.get("right") else { continue };
            if matched.get("op").and_then(Value::as_str) == Some("!=") {
                continue;
            }
            match (word("protocol"), word("field")) {
                (Some(p @ ("tcp" | "udp")), Some("dport")) => {
                    proto = Some(if p == "tcp" { Protocol::Tcp } else { Protocol::Udp });
                    numbers(right, &mut ports);
                }
                (Some("ip" | "ip6"), Some("daddr")) => {
                    if let Some(ip) = right.as_str().and_then(|t| t.parse().ok()) {
                        address = ip;
                    }
                }
                _ => {}
            }
        }
        if let Some(proto) = proto {
            into.extend(ports.into_iter().map(|port| redirected(proto, address, port)));
        }
    }
}

/// kube-proxy's nftables mode: a map `service-nodeports` of its table, `tcp . 30080 comment "default/web" : goto external-…`,
/// which is `[{"elem": {"val": {"concat": ["tcp", 30080]}, …}}, {"goto": …}]`, without a comment `[{"concat": …}, …]`.
fn from_kube_proxy(map: &Value, into: &mut BTreeSet<Listener>) {
    let word = |key: &str| map.get(key).and_then(Value::as_str);
    if (word("table"), word("name")) != (Some("kube-proxy"), Some("service-nodeports")) {
        return;
    }
    let any = if word("family") == Some("ip6") {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    let elements = map.get("elem").and_then(Value::as_array).into_iter().flatten();
    for key in elements.take(PORTS).filter_map(|e| e.get(0)) {
        let key = key.pointer("/elem/val").unwrap_or(key);
        let Some([proto, port]) = key.get("concat").and_then(Value::as_array).map(Vec::as_slice) else {
            continue;
        };
        let proto = match proto.as_str() {
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            _ => continue,
        };
        let mut ports = Vec::new();
        numbers(port, &mut ports);
        into.extend(ports.into_iter().map(|port| redirected(proto, any, port)));
    }
}

/// A number, `{"range": [a, b]}`, or `{"set": […]}` of them.
fn numbers(value: &Value, into: &mut Vec<u16>) {
    let port = |v: &Value| v.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|p| *p > 0);
    if let Some(one) = port(value) {
        into.push(one);
    } else if let Some([first, last]) = value.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        if let (Some(first), Some(last)) = (port(first), port(last)) {
            into.extend((first..=last).take(PORTS));
        }
    } else if let Some(set) = value.get("set").and_then(Value::as_array) {
        set.iter().take(PORTS).filter(|v| v.get("set").is_none()).for_each(|v| numbers(v, into));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(ports: &BTreeSet<Listener>) -> Vec<String> {
        ports.iter().map(ToString::to_string).collect()
    }

    fn iptables(text: &str, node_ports: bool) -> Vec<String> {
        let mut ports = BTreeSet::new();
        from_iptables(text, IpAddr::V4(Ipv4Addr::UNSPECIFIED), node_ports, &mut ports);
        shown(&ports)
    }

    #[test]
    fn dockers_rules_are_ports() {
        let rules = "*nat\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
            -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n\
            -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\n\
            -A DOCKER -d 127.0.0.1/32 ! -i docker0 -p udp -m udp --dport 5300:5301 -j DNAT --to-destination 172.17.0.2:53\n\
            -A DOCKER -p tcp ! --dport 7 -j DNAT --to-destination 172.17.0.3:7\n\
            -A OTHER -p sctp --dport 9 -j DNAT --to-destination 172.17.0.3:9\nCOMMIT\n";
        assert_eq!(iptables(rules, false), ["tcp 0.0.0.0:8080", "udp 127.0.0.1:5300", "udp 127.0.0.1:5301"]);
    }

    #[test]
    fn node_ports_are_ports_when_they_are_wanted() {
        let rules = "-A KUBE-NODEPORTS -p tcp -m comment --comment \"default/web\" -m tcp --dport 30080 -j KUBE-EXT-X\n";
        assert_eq!(iptables(rules, true), ["tcp 0.0.0.0:30080"]);
        assert!(iptables(rules, false).is_empty());
    }

    #[test]
    fn rules_of_nft_are_ports() {
        let rules = r#"{"nftables": [{"metainfo": {}}, {"rule": {"family": "inet", "expr": [
            {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "127.0.0.1"}},
            {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 8080}},
            {"dnat": {"family": "ip", "addr": "10.88.0.2", "port": 80}}]}},
            {"rule": {"family": "ip6", "expr": [
            {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": {"set": [53, {"range": [60, 61]}]}}},
            {"dnat": {"addr": "fd00::2"}}]}},
            {"rule": {"family": "ip", "expr": [
            {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}, {"accept": null}]}}]}"#;
        let mut ports = BTreeSet::new();
        from_nft(rules, true, &mut ports);
        assert_eq!(shown(&ports), ["tcp 127.0.0.1:8080", "udp [::]:53", "udp [::]:60", "udp [::]:61"]);
    }

    #[test]
    fn node_ports_of_kube_proxys_nftables_mode_are_ports_when_they_are_wanted() {
        let rules = r#"{"nftables": [
            {"map": {"family": "ip", "name": "service-nodeports", "table": "kube-proxy", "map": "verdict", "elem": [
                [{"concat": ["udp", 30053]}, {"goto": {"target": "external-A"}}],
                [{"elem": {"val": {"concat": ["tcp", 30080]}, "comment": "default/web:http"}}, {"goto": {"target": "external-A"}}],
                [{"concat": ["sctp", 30009]}, {"goto": {"target": "external-A"}}], [], [7], 7]}},
            {"map": {"family": "ip6", "name": "service-nodeports", "table": "kube-proxy", "elem": [[{"concat": ["tcp", 30081]}, {}]]}},
            {"map": {"family": "ip", "name": "no-endpoint-nodeports", "table": "kube-proxy", "elem": [[{"concat": ["tcp", 30999]}, {"drop": null}]]}},
            {"map": {"family": "ip", "name": "service-nodeports", "table": "other", "elem": [[{"concat": ["tcp", 1]}, {}]]}}]}"#;
        let mut ports = BTreeSet::new();
        from_nft(rules, false, &mut ports);
        assert!(ports.is_empty());
        from_nft(rules, true, &mut ports);
        assert_eq!(shown(&ports), ["tcp 0.0.0.0:30080", "tcp [::]:30081", "udp 0.0.0.0:30053"]);
    }

    #[test]
    fn nonsense_is_no_port() {
        assert!(
            iptables("-A\n-A X\n-A X -j DNAT -p tcp --dport\n-A X -p tcp --dport 0 -j DNAT\n-j\n", true)
                .is_empty()
        );
        let mut ports = BTreeSet::new();
        for text in
            ["", "[]", "{\"nftables\": 7}", "{\"nftables\": [{\"rule\": {\"expr\": [{\"dnat\": 1}]}}]}"]
        {
            from_nft(text, true, &mut ports);
        }
        assert!(ports.is_empty());
    }
}
