//! The agent inside the guest.
//!
//! | called as | it |
//! |---|---|
//! | pid 1, `/init` | brings a small guest up, looks after it ([`init`]) and serves |
//! | `portway-agent run` | serves the host: listeners, published ports, carried connections ([`run`]) |
//! | `docker-proxy`, or with its flags | stands in for docker's proxy ([`expose`]) |
//! | `portway-agent tap` | carries Ethernet frames to the host ([`tap`]) |
//! | `portway-agent publish`, `unpublish`, `ports` | asks the serving one ([`commands`], [`local`]) |

mod args;
mod carry;
mod clock;
mod commands;
mod console;
mod dial;
mod events;
mod expose;
mod harden;
mod init;
mod kernel;
mod listeners;
mod local;
mod network;
mod power;
mod run;
mod services;
mod slab;
mod tap;

use std::process::ExitCode;

use args::Args;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return init::run();
    }
    let mut words = std::env::args();
    let called = words.next().unwrap_or_default();
    let called = called.rsplit('/').next().unwrap_or_default();
    let mut words: Vec<String> = words.collect();
    if called == "init" {
        console::say("called `init`, but this is not pid 1 of a guest: nothing done");
        return ExitCode::from(2);
    }
    if expose::is_called(called, words.first().map(String::as_str)) {
        return expose::run(Args::new(words));
    }
    if words.is_empty() {
        return commands::usage("a command is missing");
    }
    let command = words.remove(0);
    let args = Args::new(words);
    match command.as_str() {
        "--version" | "-version" | "-V" => {
            commands::print(&format!("portway-agent {}", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        "--help" | "-help" | "-h" | "help" => {
            commands::print(commands::USAGE);
            ExitCode::SUCCESS
        }
        "run" => commands::serve(args),
        "expose-port" => expose::run(args),
        "tap" => tap::run(args),
        "publish" | "unpublish" | "ports" => commands::ask(&command, args),
        "init" => commands::usage("init is what the agent does as pid 1 of a guest: name it /init there"),
        other => commands::usage(&format!("{other:?} is not a command")),
    }
}
