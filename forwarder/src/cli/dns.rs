//! `portway dns`: names of one's own, on a running network.

use std::process::ExitCode;

use clap::Subcommand;
use hyper::Method;
use portway_api::control::{DnsRecord, DnsRequest};

use super::{Failure, Format, Target, client, list, listing};
use crate::config::DnsHost;

/// What to do with records.
#[derive(Debug, Subcommand)]
pub(super) enum DnsCommand {
    /// Add names
    Add {
        /// NAME=IP; `*.NAME` stands for every name under NAME
        #[arg(required = true, value_name = "NAME=IP")]
        records: Vec<DnsHost>,
        #[command(flatten)]
        at: Target,
    },
    /// Remove names, those of --dns-host too
    Rm {
        /// A name with all its addresses, or one of them
        #[arg(required = true, value_name = "NAME[=IP]")]
        records: Vec<String>,
        #[command(flatten)]
        at: Target,
    },
    /// List the names
    Ls(Target),
}

pub(super) fn run(command: DnsCommand) -> Result<ExitCode, Failure> {
    match command {
        DnsCommand::Add { records, at } => {
            let records = records.iter().map(|DnsHost(name, ip)| format!("{name}={ip}")).collect();
            change(&Method::POST, "added", records, &at)
        }
        DnsCommand::Rm { records, at } => change(&Method::DELETE, "removed", records, &at),
        DnsCommand::Ls(at) => list::<DnsRecord>(&at, "/v1/dns", listing::dns),
    }
}

fn change(method: &Method, done: &str, records: Vec<String>, at: &Target) -> Result<ExitCode, Failure> {
    let request = DnsRequest { records };
    let now: Vec<DnsRecord> =
        client(at)?.send(method.clone(), "/v1/dns", &request).map_err(Failure::failed)?;
    match at.format {
        Format::Json => listing::json(&now),
        Format::Table => request.records.iter().for_each(|record| listing::say(&format!("{done} {record}"))),
    }
    Ok(ExitCode::SUCCESS)
}
