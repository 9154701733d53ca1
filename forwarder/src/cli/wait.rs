//! `portway wait --ready` and `--port N`: until the guest is ready, or a published port has somebody behind it. Without them
//! it is the end of a VM that is waited for, in `vms`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use portway_api::control::Waited;

use super::{Failure, Target, client, vms};
use crate::control::WAIT;
use crate::control::client::{Client, ClientError};

/// How long a guest may take, when nobody says.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// Between two attempts while there is no network yet.
const AGAIN: Duration = Duration::from_millis(100);

/// The options of `wait`.
#[derive(Debug, clap::Args)]
pub(super) struct WaitArgs {
    #[command(flatten)]
    which: vms::Which,
    /// Wait until the guest says that it is ready; needs the guest agent, as --port does
    #[arg(long, conflicts_with = "name")]
    ready: bool,
    /// Wait until somebody in the guest listens behind this published host port
    #[arg(long, value_name = "HOST_PORT", conflicts_with = "name", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Give up the wait for a guest or its port after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = PATIENCE.as_secs())]
    timeout: u64,
    #[command(flatten)]
    at: Target,
}

pub(super) fn run(args: &WaitArgs) -> Result<ExitCode, Failure> {
    if !args.ready && args.port.is_none() {
        return vms::wait(&args.which);
    }
    until_ready(&client(&args.at)?, args.port, Duration::from_secs(args.timeout))
}

/// Waits for the first guest, or for what is behind a host port.
pub(super) fn until_ready(
    client: &Client,
    port: Option<u16>,
    patience: Duration,
) -> Result<ExitCode, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let seconds = left.div_ceil(1000).clamp(1, WAIT.into());
        let route = match port {
            Some(port) => format!("/v1/wait?port={port}&seconds={seconds}"),
            None => format!("/v1/wait?seconds={seconds}"),
        };
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
                None => Failure::failed(format!("{} within {} s", unmet(port), patience.as_secs())),
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
