//! `explain DEST`: what would happen to a connection of a guest, and why.

use std::process::ExitCode;

use portway_api::control::{ExplainedAddress, Explanation};

use super::{Failure, Format, Target, client, listing};

/// The options of `explain`.
#[derive(Debug, clap::Args)]
pub(super) struct ExplainArgs {
    /// HOST:PORT, ADDRESS:PORT or [IPv6]:PORT; without a port 443
    #[arg(value_name = "DEST")]
    dest: String,
    /// For UDP and not TCP
    #[arg(long)]
    udp: bool,
    /// Connect once from the host, and say what came of it
    #[arg(long, conflicts_with = "udp")]
    probe: bool,
    #[command(flatten)]
    at: Target,
}

pub(super) fn explain(args: &ExplainArgs) -> Result<ExitCode, Failure> {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("dest", &args.dest)
        .append_pair("proto", if args.udp { "udp" } else { "tcp" })
        .append_pair("probe", if args.probe { "true" } else { "false" })
        .finish();
    let told: Explanation =
        client(&args.at)?.get(&format!("/v1/explain?{query}")).map_err(Failure::failed)?;
    match args.at.format {
        Format::Json => listing::json(&told),
        Format::Table => lines(&told).iter().for_each(|l| listing::say(l)),
    }
    let goes = told.addresses.iter().any(|a| a.allowed);
    Ok(if goes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn lines(told: &Explanation) -> Vec<String> {
    let mut lines = vec![format!("{} {}", told.proto, told.dest)];
    lines.extend(told.dns.iter().map(|step| format!("  dns: {step}")));
    for address in &told.addresses {
        lines.push(format!("  {} -> {}", address.address, outcome(address)));
        lines.extend(address.why.iter().map(|step| format!("     {step}")));
        lines.extend(address.probe.as_ref().map(|p| format!("     tried now: {p}")));
    }
    lines
}

fn outcome(a: &ExplainedAddress) -> String {
    match (&a.host_address, a.target.as_str()) {
        (Some(at), "host_loopback") => format!("the host's own {at}"),
        (Some(_), _) if a.source.is_none() => "unreachable from this host".into(),
        (Some(at), _) => format!("the host connects to {at}"),
        (None, "gateway") if a.allowed => "the gateway".into(),
        (None, "gateway") => "refused by the gateway".into(),
        (None, "guest") => "another guest".into(),
        (None, _) => "not allowed".into(),
    }
}
