//! `events` and `capture`: what goes on, as it goes on.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use portway_api::control::{Event, EventInfo};

use super::{Failure, Format, Target, client, listing};
use crate::control::client::ClientError;

/// The options of `events`.
#[derive(Debug, clap::Args)]
pub(super) struct EventsArgs {
    /// Stay, and print events as they happen; with --format json one object per line
    #[arg(long, short)]
    follow: bool,
    /// Only events from this number on
    #[arg(long, value_name = "N", default_value_t = 0)]
    since: u64,
    #[command(flatten)]
    at: Target,
}

pub(super) fn events(args: &EventsArgs) -> Result<ExitCode, Failure> {
    let network = client(&args.at)?;
    let json = args.at.format == Format::Json;
    if !args.follow {
        let events: Vec<EventInfo> =
            network.get(&format!("/v1/events?since={}", args.since)).map_err(Failure::failed)?;
        if json {
            listing::json(&events);
        } else {
            events.iter().for_each(|e| listing::say(&line(e)));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = Vec::new();
    let mut out = io::stdout();
    let mut take = |bytes: &[u8]| -> io::Result<()> {
        text.extend_from_slice(bytes);
        while let Some(end) = text.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = text.drain(..end + 2).collect();
            let event = String::from_utf8_lossy(&event);
            let field = |name: &str| event.lines().find_map(|l| l.strip_prefix(name));
            let Some(data) = field("data: ") else { continue };
            match serde_json::from_str::<EventInfo>(data) {
                Ok(_) if json => writeln!(out, "{data}")?,
                Ok(event) => writeln!(out, "{}", line(&event))?,
                Err(_) if field("event: ") == Some("lost") => {
                    listing::complain(&format!("events were lost, this program was too slow: {data}"));
                }
                // A newer network tells of more than we know.
                Err(_) => writeln!(out, "{data}")?,
            }
            out.flush()?;
        }
        Ok(())
    };
    ended(network.follow(&format!("/v1/events?follow=true&since={}", args.since), &mut take))
}

/// How following something ended.
fn ended(result: Result<io::Result<()>, ClientError>) -> Result<ExitCode, Failure> {
    match result.map_err(Failure::failed)? {
        Ok(()) => Err(Failure::failed("the network has ended")),
        // The reader of a pipe has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::failed(format!("cannot write: {error}"))),
    }
}

/// One event for a person.
fn line(event: &EventInfo) -> String {
    let text = match &event.event {
        Event::LinkUp { link } => format!("link {link} up"),
        Event::LinkDown { link } => format!("link {link} down"),
        Event::Lease { ip, mac } => format!("lease {ip} {mac}"),
        Event::LeaseEnded { ip, mac } => format!("lease ended {ip} {mac}"),
        Event::PortPublished { port } => listing::published(port),
        Event::PortUnpublished { port } => listing::unpublished(port),
        Event::AgentUp { guest } => format!("agent of {guest} up"),
        Event::AgentDown { guest } => format!("agent of {guest} down"),
        Event::GuestReady { guest } => format!("guest {guest} ready"),
        Event::NotPublished { guest, listener, reason } => {
            format!("not published: {listener} of {guest}: {reason}")
        }
    };
    format!("{} {:>4} {text}", clock(event.time_ms), event.id)
}

/// `HH:MM:SS.mmm`, in UTC.
fn clock(time_ms: u64) -> String {
    let s = time_ms / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", s / 3600 % 24, s / 60 % 60, s % 60, time_ms % 1000)
}

/// The options of `capture`.
#[derive(Debug, clap::Args)]
pub(super) struct CaptureArgs {
    /// Write pcapng here; `-` is standard output, for `| wireshark -k -i -`
    #[arg(long, short, value_name = "FILE|-", default_value = "-")]
    write: PathBuf,
    #[command(flatten)]
    filter: FilterArgs,
    #[command(flatten)]
    at: Target,
    #[command(flatten)]
    extcap: Extcap,
}

#[derive(Debug, clap::Args)]
struct FilterArgs {
    /// Only frames of this VM's link
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Only frames from or to this address
    #[arg(long, value_name = "IP")]
    host: Option<std::net::IpAddr>,
    /// Only TCP and UDP from or to this port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Only tcp, udp, icmp or arp
    #[arg(long, value_name = "PROTO", value_parser = ["tcp", "udp", "icmp", "arp"])]
    proto: Option<String>,
    /// Bytes kept of each frame
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(14..=262_144))]
    snaplen: Option<u32>,
}

impl FilterArgs {
    fn query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let texts = [
            ("vm", self.vm.clone()),
            ("host", self.host.map(|h| h.to_string())),
            ("port", self.port.map(|p| p.to_string())),
            ("proto", self.proto.clone()),
            ("snaplen", self.snaplen.map(|n| n.to_string())),
        ];
        for (key, value) in texts {
            value.map(|v| query.append_pair(key, &v));
        }
        query.finish()
    }
}

/// What Wireshark asks of a capture program (extcap(4)); a symbolic link to `portway` in its extcap directory, called
/// `portway-extcap`, is such a program.
#[derive(Debug, clap::Args)]
#[group(id = "extcap-args")]
struct Extcap {
    /// For Wireshark: list what can be captured
    #[arg(long, hide = true)]
    extcap_interfaces: bool,
    /// For Wireshark: the running version
    #[arg(long, hide = true, value_name = "VERSION", num_args = 0..=1, default_missing_value = "")]
    extcap_version: Option<String>,
    /// For Wireshark: which of them
    #[arg(long, hide = true, value_name = "NAME")]
    extcap_interface: Option<String>,
    /// For Wireshark: the link types of one
    #[arg(long, hide = true)]
    extcap_dlts: bool,
    /// For Wireshark: the options of one
    #[arg(long, hide = true)]
    extcap_config: bool,
    /// For Wireshark: its own filter, which it applies itself
    #[arg(long, hide = true, value_name = "TEXT")]
    extcap_capture_filter: Option<String>,
    /// For Wireshark: capture
    #[arg(long, hide = true)]
    capture: bool,
    /// For Wireshark: where to
    #[arg(long, hide = true, value_name = "FILE")]
    fifo: Option<PathBuf>,
}

/// The name under which Wireshark starts us.
pub(super) const EXTCAP: &str = "portway-extcap";

/// argv of a program called [`EXTCAP`], as `capture` takes it.
pub(super) fn extcap(args: Vec<OsString>) -> Vec<OsString> {
    let mut words = args.into_iter();
    let program = words.next().unwrap_or_default();
    [program, "capture".into()].into_iter().chain(words).collect()
}

impl Extcap {
    /// Answers Wireshark's questions; false when it is to capture.
    fn answer(&self) -> bool {
        if self.extcap_interfaces {
            listing::say(concat!("extcap {version=", env!("CARGO_PKG_VERSION"), "}"));
            for name in networks() {
                listing::say(&format!(
                    "interface {{value=portway-{name}}}{{display=Portway network {name}}}"
                ));
            }
        } else if self.extcap_dlts {
            listing::say("dlt {number=1}{name=EN10MB}{display=Ethernet}");
        } else if self.extcap_config {
            for (n, (call, display, kind, tooltip)) in [
                ("--vm", "VM", "string", "Only frames of this VM's link"),
                ("--host", "Host", "string", "Only frames from or to this address"),
                ("--port", "Port", "unsigned", "Only TCP and UDP from or to this port"),
                ("--proto", "Protocol", "string", "Only tcp, udp, icmp or arp"),
            ]
            .into_iter()
            .enumerate()
            {
                listing::say(&format!(
                    "arg {{number={n}}}{{call={call}}}{{display={display}}}{{type={kind}}}{{tooltip={tooltip}}}"
                ));
            }
        } else {
            return false;
        }
        true
    }
}

/// The networks of this user that have a control socket now.
fn networks() -> Vec<String> {
    let Ok(socket) = crate::config::runtime_socket("x") else { return Vec::new() };
    let found = socket.parent().and_then(|dir| std::fs::read_dir(dir).ok());
    let mut names: Vec<String> = found
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some(e.file_name().to_str()?.strip_suffix(".sock")?.to_owned()))
        .collect();
    names.sort();
    names
}

pub(super) fn capture(mut args: CaptureArgs) -> Result<ExitCode, Failure> {
    if args.extcap.answer() {
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(network) = args.extcap.extcap_interface.as_deref().and_then(|i| i.strip_prefix("portway-")) {
        network.clone_into(&mut args.at.network);
    }
    let path = args.extcap.fifo.clone().unwrap_or(args.write);
    let mut out: Box<dyn Write> = if path.as_os_str() == "-" {
        if io::IsTerminal::is_terminal(&io::stdout()) {
            return Err(Failure::usage(
                "a terminal cannot show pcapng: give -w FILE, or a pipe such as `| wireshark -k -i -`",
            ));
        }
        Box::new(io::stdout())
    } else {
        Box::new(File::create(&path).map_err(|e| Failure::failed(format!("-w {}: {e}", path.display())))?)
    };
    let route = match args.filter.query() {
        query if query.is_empty() => "/v1/capture".to_owned(),
        query => format!("/v1/capture?{query}"),
    };
    // Written through, so that a reader sees frames as they pass.
    ended(client(&args.at)?.follow(&route, |bytes| out.write_all(bytes).and_then(|()| out.flush())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_shows_utc() {
        assert_eq!(clock(86_400_000 + 3_723_004), "01:02:03.004");
    }
}
