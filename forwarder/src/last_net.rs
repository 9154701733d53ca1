//! The last net: a panic costs what it was about, and not the process.
//!
//! ```text
//!  a flow's turn (`Driver::serve`)      ─► that flow is reset at both ends
//!  a frame of a link (`Driver::receive`) ─► that link is closed, and its listener waits for the VMM to come again
//!  the protocol engine, inside the stack ─► that flow (`portway_netstack`, tcp/last_net.rs)
//!  a task of the control thread          ─► that request (tokio)
//!  the control thread itself, and the rest of the data thread ─► the process ends, in order and with exit code 1
//! ```
//! No panic is known; what one leaves half done is thrown away with the flow or the link, and counted
//! ([`portway_api::control::Stats::panics`]). The hook tells each in the log, as far as the log's limit lets it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Panics since the start.
#[must_use]
pub(crate) fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Has panics told in the log, in one line each.
pub(crate) fn tell_panics() {
    std::panic::set_hook(Box::new(|info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        let text = info.payload_as_str().unwrap_or("no text");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        tracing::error!(
            text,
            place,
            thread = thread.name().unwrap_or_default(),
            "panicked; this is a fault of portway, please report it"
        );
    }));
}

/// Runs what may panic although nothing should; `None` when it did.
pub(crate) fn caught<T>(what: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(what)).ok()
}

/// A panic on purpose, for tests of the real program: where `PORTWAY_TEST_PANIC` is set, bytes that begin with its value panic.
/// Release builds have none of this.
#[cfg(debug_assertions)]
pub(crate) fn on_purpose(bytes: &[u8]) {
    use std::sync::LazyLock;
    static WORD: LazyLock<Option<Vec<u8>>> = LazyLock::new(|| {
        std::env::var("PORTWAY_TEST_PANIC").ok().filter(|w| !w.is_empty()).map(String::into_bytes)
    });
    if let Some(word) = WORD.as_deref() {
        assert!(!bytes.starts_with(word), "on purpose");
    }
}

#[cfg(not(debug_assertions))]
pub(crate) const fn on_purpose(_: &[u8]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_panics_is_told_from_what_does_not() {
        assert_eq!(caught(|| 7), Some(7));
        assert_eq!(caught(|| -> u8 { panic!("once") }), None);
    }
}
