//! What the system tests stand on: the lab around the real binary.

pub mod vm;
