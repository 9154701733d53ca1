//! The last net below the protocol engine, which is not ours: a panic in it costs the flow it was about.
//!
//! Every panic smoltcp is known to have has a guard before it ([`super`]). One that nobody knows yet would take every guest's
//! network with it; here it is stopped, the flow's socket is never used again, the host's connection is reset, and the guest
//! gets RST with its next segment. It is counted as [`crate::DropReason::EngineFault`]; the driver's panic hook has told where
//! it was. The engine's state is one socket in a set of its own; what is shared (the port's `Interface`) holds addresses and a
//! seed, and no half-done work between calls.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// It panicked.
#[derive(Debug)]
pub(super) struct EngineFault;

/// Runs the engine for one flow.
pub(super) fn caught<T>(engine: impl FnOnce() -> T) -> Result<T, EngineFault> {
    catch_unwind(AssertUnwindSafe(engine)).map_err(|_| EngineFault)
}
