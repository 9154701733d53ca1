//! vm-launcher.
