//! The log: where it goes, in which format, and how much of it there can be.
//!
//! One place in the program may say [`BURST`] lines in [`WINDOW`]; further ones are counted, and the count is told with the next
//! line of that place. So neither a guest nor a broken host fills a disk. `debug` and `trace` are not limited: who asks for
//! every decision gets it. A log that nobody reads loses lines; it holds nobody up ([`output`]).

mod output;

use std::collections::HashMap;
use std::fmt;
use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{Format, Full, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use self::output::Output;
use crate::config::{ConfigError, LogFormat, LogLevel};

/// Lines one place may say in a window.
pub(crate) const BURST: u32 = 20;
/// How long a window is.
pub(crate) const WINDOW: Duration = Duration::from_secs(10);

static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// Lines that were not written since the start.
pub(crate) fn suppressed() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// Counts one more of them.
fn lose() {
    SUPPRESSED.fetch_add(1, Ordering::Relaxed);
}

/// Starts logging.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn start(level: LogLevel, format: LogFormat, file: Option<&Path>) -> Result<(), ConfigError> {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let file = file
        .map(|path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map_err(|e| ConfigError::new("--log-file", format!("{}: {e}", path.display())))
        })
        .transpose()?;
    let ansi = file.is_none() && colours();
    let text = tracing_subscriber::fmt().with_max_level(level).with_ansi(ansi).event_format(Limited {
        inner: Format::default().with_ansi(ansi).with_target(false),
        json: false,
        limit: Limit::default(),
    });
    let json = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .fmt_fields(JsonFields::new())
        .event_format(Limited {
            inner: Format::default()
                .json()
                .flatten_event(true)
                .with_target(false)
                .with_current_span(false)
                .with_span_list(false),
            json: true,
            limit: Limit::default(),
        });
    let output = Output::new(file);
    // A second start in one process (tests) keeps the first.
    let _ = match format {
        LogFormat::Text => text.with_writer(output).try_init(),
        LogFormat::Json => json.with_writer(output).try_init(),
    };
    Ok(())
}

/// Whether standard error is a terminal whose user has nothing against colours (no-color.org).
fn colours() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A format that keeps to the limit.
struct Limited<F> {
    inner: F,
    json: bool,
    limit: Limit,
}

/// The limited formats; both are tracing's own.
trait Inner {}
impl Inner for Format<Full> {}
impl Inner for Format<Json> {}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N> + Inner,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if *event.metadata().level() <= Level::INFO {
            match self.limit.take(event.metadata().callsite(), Instant::now()) {
                None => return Ok(()),
                Some(0) => {}
                Some(n) if self.json => writeln!(
                    writer,
                    "{{\"level\":\"WARN\",\"message\":\"lines like the next were not logged\",\"suppressed\":{n}}}"
                )?,
                Some(n) => writeln!(writer, "({n} lines like the next were not logged)")?,
            }
        }
        self.inner.format_event(ctx, writer, event)
    }
}

/// How much each place has said.
#[derive(Default)]
struct Limit(Mutex<HashMap<Identifier, Said>>);

struct Said {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

impl Limit {
    /// Takes one line's place: how many were suppressed before it, or `None` when it may not be said.
    fn take(&self, place: Identifier, now: Instant) -> Option<u64> {
        // As many places as the program's text has.
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = places.entry(place).or_insert(Said { since: now, lines: 0, suppressed: 0 });
        if now.saturating_duration_since(said.since) >= WINDOW {
            (said.since, said.lines) = (now, 0);
        }
        if said.lines >= BURST {
            said.suppressed += 1;
            lose();
            return None;
        }
        said.lines += 1;
        Some(std::mem::take(&mut said.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_says_so_much_and_then_how_much_more_there_was() {
        // Any callsite will do.
        let place = {
            use tracing::callsite::Callsite;
            struct Here;
            impl Callsite for Here {
                fn set_interest(&self, _: tracing::subscriber::Interest) {}
                fn metadata(&self) -> &tracing::Metadata<'_> {
                    unreachable!("nobody asks")
                }
            }
            static HERE: Here = Here;
            tracing::callsite::Identifier(&HERE)
        };
        let (limit, start) = (Limit::default(), Instant::now());
        let said = (0..BURST + 5).filter(|_| limit.take(place.clone(), start).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(limit.take(place.clone(), start + WINDOW), Some(5));
        assert_eq!(limit.take(place, start + WINDOW), Some(0));
    }
}
