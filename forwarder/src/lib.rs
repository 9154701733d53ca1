//! The sidecar: everything of Portway that touches the host.
//!
//! ```text
//!  main ─► cli ─► config ─► sidecar ─┬─ data thread: driver ─ link · host · publish ─ netstack
//!                                    └─ control thread (tokio): control · dns
//! ```

pub mod agent;
pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
mod datagrams;

pub mod dns;
#[cfg(test)]
mod drift;
pub mod driver;
pub mod events;
mod fd;
pub mod gvproxy;
pub mod host;
mod host_errors;
mod last_net;
pub mod limits;
pub mod link;
mod log;
mod nearest;
pub mod personality;
mod program;
pub mod publish;
pub mod request;
pub mod rings;
pub mod sandbox;
pub mod sidecar;
pub mod ssh;
mod unix_path;
mod uplink;
#[cfg(target_os = "linux")]
mod vhost_user;
pub mod vsock;

/// The domain of our own names: `gateway.`, `host.` and the VMs' names lie in it.
pub const DOMAIN: &str = "portway.internal";
