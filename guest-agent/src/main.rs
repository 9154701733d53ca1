//! The agent inside the guest.
//!
//! As pid 1 (it is `/init` of small guests) it brings the guest up and looks after it; see [`init`] for the order.
//! Called by hand it only says what it is: the steering of forwards over vsock comes with a later release.

mod console;
mod events;
mod init;
mod kernel;
mod network;
mod power;
mod services;

use std::process::ExitCode;

const USAGE: &str = "usage: portway-agent --version
As pid 1, or called `init`, it brings up the guest it runs in.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return init::run();
    }
    let mut args = std::env::args();
    let called_init = args.next().is_some_and(|path| path.rsplit('/').next() == Some("init"));
    match args.next().as_deref() {
        Some("--version" | "-V") => {
            console::say(&format!("version {}", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        _ if called_init => {
            console::say("called `init`, but this is not pid 1 of a guest: nothing done");
            ExitCode::from(2)
        }
        _ => {
            console::say(USAGE);
            ExitCode::from(2)
        }
    }
}
