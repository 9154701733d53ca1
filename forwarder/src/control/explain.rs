//! What would happen to a connection of a guest, and why.
//!
//! The name is resolved by the DNS service the guests use, the address judged by the stack that carries their packets, and
//! the host's own routing asked: nothing here decides by itself.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use hickory_proto::op::{Message, Query as DnsQuery};
use hickory_proto::rr::{Name, RData, RecordType};
use portway_api::control::{ExplainedAddress, Explanation, Problem};
use portway_netstack::{DropReason, METADATA_V6, PortId, Reach, Served, Transport};

use super::App;
use super::problem::Fault;
use super::query::{Query, wrong};
use crate::host::other_loopback;
use crate::request::{Reached, Request};

/// How long a probe waits for an answer.
const PROBE: Duration = Duration::from_secs(3);
/// Addresses of one name that are looked at.
const ADDRESSES: usize = 8;

/// What would happen to a connection, and why
#[utoipa::path(get, path = "/v1/explain",
    params(
        ("dest" = String, Query, description = "HOST:PORT, ADDRESS:PORT or [IPv6]:PORT; without a port 443"),
        ("proto" = Option<String>, Query, description = "`tcp` (the default) or `udp`"),
        ("probe" = Option<bool>, Query, description = "Connect once from the host and say what came of it (TCP)"),
    ),
    responses((status = 200, body = Explanation), (status = 400, body = Problem)))]
pub(super) async fn explain(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Json<Explanation>, Fault> {
    let query = Query::parse(query.as_deref(), &["dest", "proto", "probe"])?;
    let proto = query.one_of("proto", &["tcp", "udp"])?.unwrap_or("tcp");
    let probe = query.flag("probe")?;
    let dest = query.text("dest").ok_or_else(|| {
        Fault::bad("missing_parameter", "dest: HOST:PORT is needed")
            .field("dest")
            .hint("dest=example.com:443")
    })?;
    let (host, port) =
        split(dest).ok_or_else(|| wrong("dest", dest, "HOST:PORT, ADDRESS:PORT or [IPv6]:PORT"))?;
    let mut out =
        Explanation { dest: format!("{host}:{port}"), proto: proto.into(), ..Explanation::default() };
    let addresses = match host.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => {
            let name = Name::from_ascii(host)
                .map_err(|_| wrong("dest", dest, "HOST:PORT with a domain name, or an address"))?;
            app.resolve(&name, &mut out.dns).await
        }
    };
    for ip in addresses.into_iter().take(ADDRESSES) {
        let to = SocketAddr::new(ip, port);
        let mut address = app.judge(to, proto).await?;
        if let Some(host) =
            address.host_address.as_ref().and_then(|a| a.parse().ok()).filter(|_| probe && proto == "tcp")
        {
            address.probe = Some(probe_tcp(host).await);
        }
        out.addresses.push(address);
    }
    Ok(Json(out))
}

/// Host and port of `HOST`, `HOST:PORT`, `V6` or `[V6]:PORT`.
fn split(dest: &str) -> Option<(&str, u16)> {
    const DEFAULT: u16 = 443;
    let port = |text: &str| text.parse().ok().filter(|p| *p > 0);
    if let Some((v6, rest)) = dest.strip_prefix('[').and_then(|d| d.split_once(']')) {
        let port = if rest.is_empty() { DEFAULT } else { port(rest.strip_prefix(':')?)? };
        return v6.parse::<std::net::Ipv6Addr>().ok().map(|_| (v6, port));
    }
    if dest.parse::<std::net::Ipv6Addr>().is_ok() {
        return Some((dest, DEFAULT));
    }
    let (host, port) = match dest.split_once(':') {
        Some((host, text)) => (host, port(text)?),
        None => (dest, DEFAULT),
    };
    (!host.is_empty()).then_some((host, port))
}

impl App {
    /// The addresses of `name`, and how they were found.
    async fn resolve(&self, name: &Name, steps: &mut Vec<String>) -> Vec<IpAddr> {
        let mut found = Vec::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            let mut message = Message::query();
            message.metadata.recursion_desired = true;
            message.add_query(DnsQuery::query(name.clone(), kind));
            let Ok(bytes) = message.to_vec() else { continue };
            let answer = match self.dns.answer_datagram(PortId(u16::MAX), &bytes).await {
                Some(bytes) => Message::from_vec(&bytes),
                None => {
                    steps.push(format!("{kind} {name}: no answer: too many queries wait for the resolvers"));
                    continue;
                }
            };
            let Ok(answer) = answer else {
                steps.push(format!("{kind} {name}: an answer that cannot be read"));
                continue;
            };
            let code = answer.metadata.response_code;
            let mut texts = Vec::new();
            for record in &answer.answers {
                match &record.data {
                    RData::A(ip) => found.push(IpAddr::V4(ip.0)),
                    RData::AAAA(ip) => found.push(IpAddr::V6(ip.0)),
                    _ => {}
                }
                texts.push(format!("{} {}", record.record_type(), record.data));
            }
            let texts = if texts.is_empty() { "no records".into() } else { texts.join(", ") };
            steps.push(format!("{kind} {name}: {code}: {texts}"));
        }
        if found.is_empty() {
            let asked: Vec<String> = self.dns.upstreams().iter().map(ToString::to_string).collect();
            steps.push(format!(
                "the name has no address: a guest would not get as far as a connection (resolvers: {})",
                if asked.is_empty() { "none".into() } else { asked.join(", ") }
            ));
        }
        found
    }

    /// What the stack does with packets to `to`.
    async fn judge(&self, to: SocketAddr, proto: &str) -> Result<ExplainedAddress, Fault> {
        let transport = if proto == "udp" { Transport::Udp } else { Transport::Tcp };
        let Reached { reach, guest, taker } =
            self.ask(|reply| Request::Reach { to, transport, reply }).await?;
        let mut out = ExplainedAddress { address: to.to_string(), ..ExplainedAddress::default() };
        match reach {
            Reach::Gateway => {
                out.target = "gateway".into();
                out.why.push("the address is the gateway's own".into());
                out.why.push(format!(
                    "nothing serves {proto} port {} there: a guest is refused at once",
                    to.port()
                ));
            }
            Reach::Served(served) => {
                out.target = "gateway".into();
                out.allowed = true;
                out.why.push(match served {
                    Served::Dns => "the network's DNS service".into(),
                    Served::Dhcp => "the network's DHCP server: guests get their addresses there".into(),
                    Served::Api => "port 80 is where guests publish ports of theirs (--guest-api on)".into(),
                });
            }
            Reach::Guest(_) => {
                out.target = "guest".into();
                out.allowed = true;
                let name = guest.unwrap_or_else(|| "another link".into());
                out.why.push(format!(
                    "the guest behind {name} has this address; frames go there through the switch"
                ));
                out.why.push("unless one of the two links has isolate=on".into());
            }
            Reach::Host(at) | Reach::Forwarded(at) => {
                let loopback = at.ip().is_loopback() && !to.ip().is_loopback();
                out.target = if loopback { "host_loopback" } else { "network" }.into();
                out.why.push(match reach {
                    Reach::Forwarded(_) => format!("the gateway's port is forwarded to {at} by the configuration"),
                    _ if loopback => {
                        "the address is the host alias: behind it stands the host's loopback (--host-loopback on)"
                            .into()
                    }
                    _ => "the address is outside the guests' subnet: the host connects to it".into(),
                });
                if let Some((taker, takes)) = taker {
                    out.allowed = takes;
                    out.why.push(format!("such connections are taken by {taker}"));
                } else {
                    out.allowed = true;
                    out.host_address = Some(at.to_string());
                    routed(&mut out, at);
                }
            }
            Reach::Nowhere(reason) => {
                out.target = "dropped".into();
                out.why.push(self.why_not(to.ip(), reason));
            }
        }
        Ok(out)
    }

    fn why_not(&self, ip: IpAddr, reason: DropReason) -> String {
        let network = &self.network;
        let is = |ours: Option<&String>| ours.is_some_and(|o| o.parse::<IpAddr>() == Ok(ip));
        let alias = is(Some(&network.host_alias)) || is(network.host_alias6.as_ref());
        let metadata = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6 == METADATA_V6,
        };
        let text = match (reason, ip) {
            (DropReason::Forbidden, _) if alias => {
                "the address is the host alias, and --host-loopback is off".to_owned()
            }
            (DropReason::Forbidden, IpAddr::V6(_)) if !network.ipv6 => {
                "guests of this network have no IPv6 (--ipv6 off)".into()
            }
            (DropReason::Forbidden, _) if metadata => {
                "link-local addresses, where clouds serve credentials, are blocked (--metadata allow opens them)".into()
            }
            (DropReason::Forbidden, IpAddr::V4(_)) => {
                "an address a guest never reaches: loopback and 0.0.0.0/8 are its own".into()
            }
            (DropReason::Forbidden, IpAddr::V6(_)) => {
                "an address a guest never reaches: loopback, and those with an IPv4 address inside that is forbidden by itself"
                    .into()
            }
            (DropReason::Multicast, _) => {
                "a group's or everybody's address: nothing is sent from here to the host's network".into()
            }
            (DropReason::NotForUs, IpAddr::V6(v6)) if v6.is_unicast_link_local() => {
                "link-local: in the guests' own network, and no guest has it now".into()
            }
            (DropReason::NotForUs, _) => {
                let subnet = if ip.is_ipv4() { Some(&network.subnet) } else { network.subnet6.as_ref() };
                let subnet = subnet.map_or("", String::as_str);
                format!("in the guests' subnet {subnet}, and no guest has it now")
            }
            (other, _) => other.to_string(),
        };
        format!("{text} (counted as {})", reason.name())
    }
}

/// How the host gets there, for the explanation of an address.
fn routed(out: &mut ExplainedAddress, at: SocketAddr) {
    match route(at) {
        Ok(source) => {
            out.why.push(format!("the host's routing takes {source} as the source"));
            out.source = Some(source.to_string());
        }
        Err(error) => {
            out.why.push(format!("the host has no way there ({error}): the guest is told unreachable"));
        }
    }
}

/// The source address the host's routing takes to `to`; no packet is sent.
fn route(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// As a guest's connection goes, the other loopback address after the first.
async fn probe_tcp(to: SocketAddr) -> String {
    let said = probe_one(to).await;
    match other_loopback(to).filter(|_| said != "open") {
        Some(port) => {
            let other = SocketAddr::from((Ipv4Addr::LOCALHOST, port.get()));
            let second = probe_one(other).await;
            if second == "open" { format!("open at {other}") } else { second }
        }
        None => said,
    }
}

async fn probe_one(to: SocketAddr) -> String {
    match tokio::time::timeout(PROBE, tokio::net::TcpStream::connect(to)).await {
        Ok(Ok(_)) => "open".into(),
        Ok(Err(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused => "refused".into(),
        Ok(Err(e)) => format!("unreachable: {e}"),
        Err(_) => format!("no answer within {} s", PROBE.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn a_destination_is_a_host_and_a_port() {
        for (dest, parts) in [
            ("example.com", Some(("example.com", 443))),
            ("example.com:80", Some(("example.com", 80))),
            ("192.0.2.7:22", Some(("192.0.2.7", 22))),
            ("2001:db8::1", Some(("2001:db8::1", 443))),
            ("[2001:db8::1]:53", Some(("2001:db8::1", 53))),
            ("[2001:db8::1]", Some(("2001:db8::1", 443))),
            ("", None),
            (":80", None),
            ("a:0", None),
            ("a:b", None),
            ("a:70000", None),
            ("[a]:1", None),
            ("[::1]x", None),
        ] {
            assert_eq!(split(dest), parts, "{dest}");
        }
    }
}
