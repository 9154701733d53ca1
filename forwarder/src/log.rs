//! Where the log goes: standard error, or a file.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::filter::LevelFilter;

use crate::config::{ConfigError, LogLevel};

/// Starts logging.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn start(level: LogLevel, file: Option<&Path>) -> Result<(), ConfigError> {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt().with_max_level(level).with_target(false);
    // A second start in one process (tests) keeps the first.
    let _ = match file {
        None => log
            .with_writer(std::io::stderr)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init(),
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file =
                file.map_err(|e| ConfigError::new("--log-file", format!("{}: {e}", path.display())))?;
            log.with_writer(Mutex::new(file)).with_ansi(false).try_init()
        }
    };
    Ok(())
}
