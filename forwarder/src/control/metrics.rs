//! The counters as Prometheus reads them (text exposition format 0.0.4).
//!
//! Labels have few values: a link's name, a direction, a reason for a drop. Never an address.

use std::fmt::Write;

use portway_api::control::{NetworkInfo, Stats};

/// The format's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// One family of samples: its labels, `{a="b"}` or nothing, and value.
struct Families(String);

impl Families {
    fn add(&mut self, name: &str, kind: &str, help: &str, samples: &[(String, u64)]) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.add(name, "counter", help, &[(String::new(), value)]);
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.add(name, "gauge", help, &[(String::new(), value)]);
    }
}

/// `{key="value",…}` with the value escaped as the format wants it.
fn labels(pairs: &[(&str, &str)]) -> String {
    let pair = |(key, value): &(&str, &str)| {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        format!("{key}=\"{value}\"")
    };
    format!("{{{}}}", pairs.iter().map(pair).collect::<Vec<_>>().join(","))
}

/// Every metric.
#[must_use]
pub fn text(network: &NetworkInfo, s: &Stats) -> String {
    let mut out = Families(String::with_capacity(8192));
    let info = labels(&[("version", &network.version), ("network", &network.name)]);
    out.add("portway_build_info", "gauge", "The version and the network's name.", &[(info, 1)]);
    out.gauge(
        "portway_start_time_seconds",
        "When the process started, since 1970.",
        network.started_ms / 1000,
    );
    out.gauge("portway_uptime_seconds", "Time since the start.", s.uptime_s);

    let up = s.links.iter().map(|l| (labels(&[("link", &l.name), ("kind", &l.kind)]), u64::from(l.up)));
    out.add("portway_link_up", "gauge", "Whether a VMM is attached to the link.", &up.collect::<Vec<_>>());
    let both = |to_host: fn(&portway_api::control::LinkStats) -> u64,
                to_guest: fn(&portway_api::control::LinkStats) -> u64| {
        let way = |l, direction, n| (labels(&[("link", l), ("direction", direction)]), n);
        let links = s.links.iter();
        links
            .flat_map(|l| [way(&l.name, "to_host", to_host(l)), way(&l.name, "to_guest", to_guest(l))])
            .collect::<Vec<_>>()
    };
    let frames = both(|l| l.frames_from_guest, |l| l.frames_to_guest);
    out.add("portway_link_frames_total", "counter", "Frames that crossed the link.", &frames);
    let bytes = both(|l| l.bytes_from_guest, |l| l.bytes_to_guest);
    out.add("portway_link_bytes_total", "counter", "Bytes of those frames.", &bytes);

    out.gauge("portway_tcp_flows", "TCP flows now.", s.tcp_flows);
    out.gauge("portway_tcp_dialing", "Connects of guests that wait for the host now.", s.tcp_dialing);
    out.counter("portway_tcp_flows_total", "TCP flows since the start.", s.tcp_flows_total);
    out.gauge("portway_udp_bindings", "UDP bindings now.", s.udp_bindings);
    let drops = s.drops.iter().map(|(reason, n)| (labels(&[("reason", reason)]), *n)).collect::<Vec<_>>();
    out.add("portway_frames_dropped_total", "counter", "Frames of guests that were dropped.", &drops);

    out.counter("portway_dns_queries_total", "DNS messages received.", s.dns.queries);
    let from = |kind: &str, n| (labels(&[("from", kind)]), n);
    let answers = [
        from("zones", s.dns.from_zones),
        from("hosts", s.dns.from_hosts),
        from("cache", s.dns.from_cache),
        from("relay", s.dns.relayed.saturating_sub(s.dns.failed)),
    ];
    out.add("portway_dns_answers_total", "counter", "DNS answers, by where they came from.", &answers);
    out.counter("portway_dns_failures_total", "Queries no resolver answered (SERVFAIL).", s.dns.failed);
    out.counter("portway_dns_rejected_total", "Queries refused for what they are.", s.dns.rejected);
    out.counter("portway_dns_over_limit_total", "Queries dropped at the limit.", s.dns.over_limit);
    out.counter(
        "portway_dns_rebinding_total",
        "Answers kept from guests, which led inside.",
        s.dns.rebinding,
    );
    out.counter("portway_dns_truncated_total", "Answers too large for a datagram.", s.dns.truncated);
    out.gauge("portway_dns_in_flight", "Queries at the resolvers now.", s.dns.in_flight);
    out.gauge("portway_dns_cached", "Answers in the cache now.", s.dns.cached);

    out.gauge("portway_api_clients", "Clients of the control API now.", s.api_clients);
    out.counter("portway_panics_total", "Panics that were caught; faults of portway.", s.panics);
    out.gauge("portway_timers", "Timers now.", s.timers);
    out.gauge(
        "portway_sandbox_complete",
        "Whether every part of the sandbox is in force.",
        u64::from(!s.sandbox.parts.is_empty() && s.sandbox.parts.iter().all(|p| p.in_force)),
    );
    out.counter(
        "portway_sandbox_refused_calls_total",
        "System calls the sandbox refused.",
        s.sandbox.refused_calls,
    );
    out.gauge("portway_captures", "Captures that run now.", s.captures);
    out.counter("portway_capture_frames_lost_total", "Frames captures lost to slow readers.", s.capture_lost);
    out.counter("portway_events_lost_total", "Events nobody could be told.", s.events_lost);
    out.counter(
        "portway_log_suppressed_total",
        "Log lines the rate limit kept back.",
        crate::log::suppressed(),
    );
    process(&mut out);
    out.0
}

/// What the kernel says of this process, under the names every exporter gives it.
fn process(out: &mut Families) {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = pages.split(' ').map(|n| n.parse::<u64>().unwrap_or(0));
    let page = u64::try_from(
        nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096),
    );
    let page = page.unwrap_or(4096);
    if let (Some(size), Some(resident)) = (pages.next(), pages.next()) {
        out.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", size * page);
        out.gauge("process_resident_memory_bytes", "Resident memory size in bytes.", resident * page);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        out.gauge("process_open_fds", "Number of open file descriptors.", open.count() as u64);
    }
    use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
    use nix::sys::time::TimeValLike;
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        out.gauge("process_max_fds", "Maximum number of open file descriptors.", soft);
    }
    if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
        let (user, system) = (usage.user_time(), usage.system_time());
        let micros = user.num_microseconds() + system.num_microseconds();
        let name = "process_cpu_seconds_total";
        let _ = writeln!(
            out.0,
            "# HELP {name} Total user and system CPU time spent in seconds.\n# TYPE {name} counter\n{name} {}.{:06}",
            micros / 1_000_000,
            micros % 1_000_000
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(labels(&[("a", "x\"\\\n"), ("b", "")]), r#"{a="x\"\\\n",b=""}"#);
    }
}
