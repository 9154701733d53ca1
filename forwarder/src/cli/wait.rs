//! `portway wait`: until the guest is ready, or a published port has somebody behind it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::{Failure, Target, client};
use crate::control::client::ClientError;

/// Between two attempts while there is no network yet.
const AGAIN: Duration = Duration::from_millis(100);

/// The options of `wait`.
#[derive(Debug, clap::Args)]
pub(super) struct WaitArgs {
    /// Wait until somebody in the guest listens behind this published host port
    #[arg(long, value_name = "HOST_PORT")]
    port: Option<u16>,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    #[command(flatten)]
    at: Target,
}

#[derive(Deserialize)]
struct Waited {
    ready: bool,
}

pub(super) fn run(args: &WaitArgs) -> Result<ExitCode, Failure> {
    let client = client(&args.at)?;
    let route = args.port.map_or_else(|| "/v1/wait".to_owned(), |port| format!("/v1/wait?port={port}"));
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        let absent = match client.get::<Waited>(&route) {
            Ok(Waited { ready: true }) => return Ok(ExitCode::SUCCESS),
            Ok(Waited { ready: false }) => None,
            // A network that is being started is waited for too.
            Err(error @ ClientError::Absent { .. }) => Some(error),
            Err(error) => return Err(Failure::failed(error)),
        };
        if Instant::now() >= deadline {
            return Err(match absent {
                Some(error) => Failure::failed(error),
                None => Failure::failed(format!("{} within {} s", unmet(args.port), args.timeout)),
            });
        }
        if absent.is_some() {
            std::thread::sleep(AGAIN);
        }
    }
}

fn unmet(port: Option<u16>) -> String {
    match port {
        Some(port) => format!("nobody in the guest has listened behind host port {port}"),
        None => "the guest has not said that it is ready".to_owned(),
    }
}
