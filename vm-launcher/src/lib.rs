//! `portway run`: a VM and its network as processes that live and die together.
//!
//! ```text
//! LaunchConfig ─► Plan (image, disks, metadata, QEMU, accelerator) ─► state directory ─► sidecar ─► "ready" ─► QEMU
//!                                                                             └── guest memory, or a socketpair ──┘
//! then one poll: signals · end of any process · QMP        (supervise)
//! ```
//! Everything that can be wrong is looked at before the first process starts. The sidecar is `portway serve`, with
//! a vhost-user socket as its link, or one end of a socketpair whose other end QEMU has as `-netdev stream` ([`Net`]). Neither
//! needs a port or root. Both are told by the kernel when the launcher dies, so nothing is left behind, not even by SIGKILL.
//!
//! | question | module |
//! |---|---|
//! | what boots, and by which firmware | `boot` |
//! | disks, CDs of metadata, shared directories | `disk`, `metadata` and `iso`, `share` |
//! | the hypervisor's command line and control | `hypervisor`, `qemu` and `qmp`, `vfkit` and `http` |
//! | the network card and what is behind it | `net`, `network`, `sidecar`, `shared` |
//! | start, signals, end | `machine`, `vm`, `supervise`, `process`, `state`, `guard`, `sys` |
//! | the terminal | `terminal`, `keys` |
//! | VMs that run already | `registry`, `control`, `console`, `detach`, `console_log` |
//!
//! Not here: the options of the command line (`forwarder`).

mod accel;
mod arch;
mod boot;
mod config;
pub mod console;
mod console_log;
pub mod control;
mod detach;
mod disk;
mod error;
mod guard;
mod http;
mod hypervisor;
mod iso;
mod keys;
mod mac;
mod machine;
mod metadata;
mod net;
mod network;
mod process;
mod programs;
mod progress;
mod qemu;
mod qmp;
mod registry;
mod share;
mod shared;
mod sidecar;
mod signals;
mod sockets;
mod state;
mod supervise;
mod sys;
mod terminal;
mod vfkit;
mod vm;
mod vsock;

pub use accel::Accel;
pub use arch::Arch;
pub use boot::BootImage;
pub use config::{Console, HypervisorKind, LaunchConfig};
pub use detach::{Leave, Side, detach};
pub use disk::{DiskSpec, Format};
pub use error::LaunchError;
pub use guard::{GUARD, guard};
pub use mac::Mac;
pub use metadata::Data;
pub use net::Net;
pub use registry::{VmInfo, list};
pub use share::Share;
pub use shared::SharedNetwork;
pub use supervise::{Event, run};
