//! `portway run`: a VM and its network as two processes that live and die together.
//!
//! ```text
//! LaunchConfig ─► checks (image, QEMU, accelerator, state directory) ─► sidecar ─► "ready" ─► QEMU
//!                                                          └── guest memory, or a socketpair ──┘
//! then one poll: signals · end of either process · QMP        (supervise)
//! ```
//! Everything that can be wrong is looked at before the first process starts. The sidecar is `portway serve`, with
//! a vhost-user socket as its link, or one end of a socketpair whose other end QEMU has as `-netdev stream` ([`Net`]). Neither
//! needs a port or root. Both are told by the kernel when the launcher dies, so nothing is left behind, not even by SIGKILL.
//!
//! Not here: the options of the command line (`forwarder`), and any other hypervisor than QEMU yet.

mod accel;
mod config;
mod error;
mod image;
mod net;
mod process;
mod qemu;
mod qmp;
mod sidecar;
mod state;
mod supervise;
mod sys;
mod terminal;

pub use accel::Accel;
pub use config::LaunchConfig;
pub use error::LaunchError;
pub use image::BootImage;
pub use net::Net;
pub use supervise::run;
