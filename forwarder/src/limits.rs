//! Every limit of what a guest, a client or an API caller can make grow: the table `[limits]` of the configuration file, and
//! the page docs/reference/limits.md, which is made of what stands here.
//!
//! What may be set is in [`LimitSettings`]; it becomes [`Limits`]. What is fixed has its constant where it is used, and a line in
//! [`fixed`], so that the page cannot say another number than the code.

use portway_netstack::Limits;
use serde::Deserialize;

use crate::config::ConfigError;

/// One limit.
struct Limit {
    name: &'static str,
    default: usize,
    unit: &'static str,
    at: &'static str,
}

macro_rules! limits {
    ($($field:ident, $key:literal, $least:literal ..= $most:literal, $unit:literal, $at:literal;)+) => {
        /// The table `[limits]`: what is not in it has its default.
        #[derive(Debug, Clone, Default, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
        pub struct LimitSettings {
            $(#[doc = $at] pub $field: Option<usize>,)+
        }

        impl LimitSettings {
            /// The limits, with what is set here.
            ///
            /// # Errors
            /// When one is outside of its range; the text has both.
            pub fn limits(&self) -> Result<Limits, ConfigError> {
                let mut limits = Limits::default();
                $(if let Some(wanted) = self.$field {
                    if !($least..=$most).contains(&wanted) {
                        let text = format!("{} = {wanted}: {} to {} {}", $key, $least, $most, $unit);
                        return Err(ConfigError::new("limits", text));
                    }
                    limits.$field = wanted;
                })+
                Ok(limits)
            }
        }

        fn settable() -> Vec<Limit> {
            let defaults = Limits::default();
            vec![$(Limit { name: $key, default: defaults.$field, unit: $unit, at: $at }),+]
        }
    };
}

limits! {
    flows, "flows", 1..=1_000_000, "TCP flows per link", "A SYN is answered by RST; open flows live.";
    dialing, "dialing", 1..=65_536, "pending connects per link", "A SYN waits: the guest's own retransmission tries again.";
    dialing_loopback, "dialing-loopback", 1..=65_536, "pending connects to the host's loopback per link",
        "The same; counted apart, so that black holes elsewhere never starve it.";
    udp_bindings, "udp-bindings", 1..=65_536, "NAT bindings per link", "The idlest binding goes.";
    pings, "pings", 1..=65_536, "identifiers of echo requests per link", "The idlest goes.";
    macs, "macs", 1..=65_536, "Ethernet addresses per link", "Frames from further ones are dropped and counted.";
    addresses, "addresses", 1..=65_536, "IP addresses per link", "Further ones can open connections, but not be found.";
    leases, "leases", 1..=4096, "DHCP leases per link, fixed ones not counted", "While half of the pool is free there are more; then a client without a lease gets no answer.";
    outbox_bytes, "outbox-bytes", 4096..=16_777_216, "bytes of answers that wait for one link", "Further answers are dropped and counted.";
    resolving, "resolving", 1..=65_536, "published connections that wait for a guest's address", "Further ones are reset.";
}

/// Limits that are no settings: the constants where they are used.
fn fixed() -> Vec<Limit> {
    use crate::{agent, capture, control, dns, driver, log, publish, vsock};
    use portway_netstack::{dhcp, dhcp6, fragments, icmp, udp, wire};
    let seconds = |time: std::time::Duration| usize::try_from(time.as_secs()).unwrap_or(usize::MAX);
    [
        ("fragments: bytes", fragments::BYTES, "bytes of fragments that wait for others", "The link that has most of them loses its oldest."),
        ("fragments: bytes of a link", fragments::PORT_BYTES, "the same, of one link", "Its oldest packet goes."),
        ("fragments: packets of a link", fragments::PORT_PACKETS, "packets of one link that are not whole", "Its oldest goes."),
        ("fragments: pieces", fragments::PIECES, "pieces of one packet that lie apart", "The packet is given up."),
        ("fragments: patience", seconds(fragments::PATIENCE), "seconds until a packet must be whole", "It is given up, and told by ICMP when its first piece came."),
        ("dhcp: leases", dhcp::LEASES, "addresses that are remembered", "The one that ended longest ago is forgotten; when none has ended there is no answer."),
        ("dhcp6: leases", dhcp6::LEASES, "leases by DHCPv6", "The client is told that there are none."),
        ("dhcp6: addresses", dhcp6::IAS, "addresses asked for in one message", "Further ones are not answered."),
        ("ipv6: addresses", portway_netstack::PER_MAC, "IPv6 addresses of one Ethernet address", "The newest count."),
        ("ipv6: extension headers", wire::ipv6::EXTENSIONS, "extension headers of one packet", "It is dropped and counted."),
        ("icmp: answers", to_usize(icmp::RateLimit::PER_SECOND), "ICMP answers and errors a second, of one link", "They are dropped and counted."),
        ("udp: peers", udp::PEERS, "remotes a binding remembers, and up to twice as many", "Those longest unused may not answer."),
        ("control: connections", control::CONNECTIONS, "clients of the control socket", "Further ones wait to be accepted."),
        ("control: body", control::BODY, "bytes of a request", "The answer is 413."),
        ("control: patience", seconds(control::PATIENCE), "seconds for headers, and for a request and its answer", "The answer is 408, or the connection is closed."),
        ("control: requests", crate::request::Requests::LIMIT, "requests that wait for the data thread", "The answer is 503."),
        ("control: followers", control::stream::STREAMS, "clients that follow events or captures", "The answer is 503."),
        ("control: guests", control::GUEST_CLIENTS, "connections of guests to the gateway's port 80", "Further ones are closed."),
        ("control: ports of a guest", publish::GUEST_PORTS, "ports a guest publishes by the gateway", "Publishing fails and says so."),
        ("control: metrics", control::METRICS_CLIENTS, "clients of `--metrics`", "Further ones wait to be accepted."),
        ("dns: in flight", dns::IN_FLIGHT_MAX, "queries that wait for resolvers of the host", "The guest that has most of them loses one; without a place a datagram gets no answer and a stream REFUSED."),
        ("dns: streams", dns::STREAMS_MAX, "connections to the DNS service", "Further ones are closed."),
        ("dns: in flight of a connection", dns::stream::IN_FLIGHT_MAX, "queries under way on one connection", "No more are read until one is answered."),
        ("dns: cache", dns::cache::ENTRIES_MAX, "answers that are remembered", "The oldest goes."),
        ("dns: cache bytes", dns::cache::BYTES_MAX, "bytes of them", "The oldest goes."),
        ("dns: records", dns::RECORDS_MAX, "names that were added while the network runs", "Adding fails and says so."),
        ("dns: names", dns::GUESTS_MAX, "guests that have a name", "Further ones have none."),
        ("agent: listeners", agent::guest::auto::LISTENERS, "listeners of one guest that are known", "Further ones are not published."),
        ("agent: ports", agent::guest::PORTS, "ports one guest's agent has published", "Publishing fails and says so."),
        ("agent: streams", agent::shared::STREAMS, "connections carried by one guest's agent", "Further ones are reset."),
        ("agent: messages", to_usize(agent::session::RATE), "messages a second of one agent, some bursts apart", "It is heard more slowly."),
        ("agent: datagrams", agent::udp::CLIENTS, "clients of one UDP port that goes through an agent", "The idlest goes."),
        ("agent: silent streams", agent::door::NAMELESS, "streams of one guest that have not said what they are", "The oldest is closed."),
        ("agent: slow receivers", agent::carry::HELD, "connections with 128 KiB for a receiver that does not take them", "Further ones have 4 KiB."),
        ("vsock: backlog", vsock::BACKLOG, "streams at one port that nobody has taken yet", "Further ones are reset."),
        #[cfg(target_os = "linux")]
        ("vsock: bytes", to_usize(vsock::device::streams::SPARE), "bytes kept for slow hosts, beyond 16 KiB of each stream", "The guest's writers wait."),
        #[cfg(target_os = "linux")]
        ("vsock: resets", vsock::device::streams::RESETS, "resets that wait for buffers of the guest's", "No more packets are taken from it."),
        #[cfg(target_os = "linux")]
        ("vsock: streams", crate::vsock::device::streams::STREAMS, "streams of one guest's vsock device", "Further ones are reset."),
        ("driver: openings", driver::pump::OPENINGS as usize, "flows and bindings that one link opens in one turn", "What it sent behind them waits until the other links were heard."),
        ("driver: slow", driver::SLOW_LIMIT, "queries that wait for the control thread", "They are dropped, and the guest asks again."),
        ("driver: ports", driver::PORTS, "published ports", "Publishing fails and says so."),
        ("driver: joined", driver::join::JOINED, "VMs that have joined (`--join`)", "A further one is told so."),
        ("capture: captures", capture::CAPTURES, "captures at once", "The answer is 503."),
        ("capture: budget", capture::BUDGET, "bytes of frames one capture's reader has not taken", "Frames are lost, and the capture says how many."),
        ("events", crate::events::EventQueue::LIMIT, "events that are remembered", "The oldest goes."),
        ("log: lines", to_usize(log::BURST), "lines one place of the program says in ten seconds", "Further ones are counted, and the count is told."),
        ("descriptors: reserve", to_usize(crate::fd::RESERVE.unsigned_abs()), "descriptors (at most a quarter) that flows leave to others", "Flows and bindings beyond are refused."),
    ]
    .into_iter()
    .map(|(name, default, unit, at)| Limit { name, default, unit, at })
    .collect()
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The page docs/reference/limits.md.
#[must_use]
pub fn reference() -> String {
    let mut page = "# Limits\n\nMade from `forwarder/src/limits.rs`; `PORTWAY_BLESS=1 cargo test -p portway --lib limits` writes it again.\n\n\
         The first table is `[limits]` of the file of `--config`, with these keys.\n"
        .to_owned();
    for (title, limits) in [("Settings", settable()), ("Fixed", fixed())] {
        page += &format!("\n## {title}\n\n| limit | default | of | at it |\n|---|---|---|---|\n");
        for Limit { name, default, unit, at } in limits {
            page += &format!("| `{name}` | {default} | {unit} | {at} |\n");
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_of_the_log_is_what_the_page_says() {
        assert_eq!(crate::log::WINDOW, std::time::Duration::from_secs(10));
    }

    #[test]
    fn the_page_says_what_the_code_does() {
        crate::drift::check("docs/reference/limits.md", &reference());
    }

    #[test]
    fn what_is_set_is_taken_within_its_range_and_the_rest_has_its_default() {
        let settings: LimitSettings = toml::from_str("flows = 10\nudp-bindings = 20").unwrap();
        let limits = settings.limits().unwrap();
        assert_eq!((limits.flows, limits.udp_bindings, limits.macs), (10, 20, Limits::default().macs));
        let bad: LimitSettings = toml::from_str("leases = 0").unwrap();
        assert!(bad.limits().unwrap_err().to_string().contains("leases = 0: 1 to 4096"));
        assert!(toml::from_str::<LimitSettings>("flow = 1").is_err());
    }
}
