//! `portway run`.

use std::process::ExitCode;

use super::Failure;

/// The options of `run`.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {}

pub(super) fn run(_args: RunArgs) -> Result<ExitCode, Failure> {
    Err(Failure::usage("not wired yet"))
}
