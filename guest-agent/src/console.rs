//! What the agent says: single lines on the console, each beginning with `portway-agent: `.

use std::io::Write;

/// Writes one line to the console.
///
/// A console that cannot be written to must not end pid 1 (the kernel would panic), so an error here has nowhere
/// to go and is dropped; that is also why `eprintln!`, which panics, is not used.
pub(crate) fn say(line: &str) {
    let mut console = std::io::stderr().lock();
    let _ = writeln!(console, "portway-agent: {line}");
}
