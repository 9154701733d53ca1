//! What the system tests stand on: the lab around the real binary.

pub mod agent;
pub mod agent_lab;
pub mod attack;
pub mod guest;
pub mod host;
pub mod launch;
pub mod machine;
pub mod namespace;
pub mod program;
pub mod raw;
pub mod resolver;
pub mod secure;
pub mod sidecar;
pub mod vhost;
pub mod vm;
