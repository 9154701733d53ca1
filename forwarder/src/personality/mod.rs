//! Portway under another program's name: the same network, behind that program's flags and sockets.
//!
//! ```text
//!  argv[0], or `portway NAME …` ─► NAME's options ─► Config with Particulars ─┐
//!                                                └─► Doors (its own sockets) ─┴─► sidecar::run_with
//! ```
//! What callers depend on is kept: addresses, sockets, texts, exit codes. An option that can have no meaning here is
//! refused with the reason, or accepted with a warning; docs/guide/ has a page for each program, option by option.

#[cfg(target_os = "linux")]
pub mod slirp4netns;
pub mod vpnkit;

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use portway_netstack::{Mac, Services};

use crate::config::{Config, Settings};
use crate::sidecar::Door;

/// What of a [`Config`] only a personality sets; the default is Portway's own way.
#[derive(Debug, Clone)]
pub struct Particulars {
    /// Whether the control socket is served.
    pub control: bool,
    /// What is written to the descriptor that waits for us to be ready.
    pub ready: &'static str,
    /// The Ethernet address of gateway and host alias.
    pub gateway_mac: Mac,
    /// The domain guests are told.
    pub domain: String,
    /// More domains they search, before the host's.
    pub search: Vec<String>,
    /// What the gateway does for guests.
    pub services: Services,
    /// Destinations whose connections are handed to a program.
    pub outgoing: Vec<vpnkit::Outgoing>,
    /// The host's address outgoing connections and datagrams leave from.
    pub outbound: Option<Ipv4Addr>,
    /// Directories of the sockets its flags name: there more may be made, and those are removed at the end.
    pub directories: Vec<PathBuf>,
    /// Files that are read again while it runs.
    pub followed: Vec<PathBuf>,
    /// Unix sockets of the host that lead to guests' over SSH.
    pub ssh: Vec<crate::ssh::Forward>,
    /// Zones whose names may be patterns.
    pub zones: Vec<crate::dns::GivenZone>,
}

impl Default for Particulars {
    fn default() -> Self {
        Self {
            control: true,
            ready: "ready\n",
            gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
            domain: crate::DOMAIN.to_owned(),
            search: Vec::new(),
            services: Services::default(),
            outgoing: Vec::new(),
            outbound: None,
            directories: Vec::new(),
            followed: Vec::new(),
            ssh: Vec::new(),
            zones: Vec::new(),
        }
    }
}

/// Runs the program `args` (argv) calls by its name, if it is another than Portway.
#[must_use]
pub fn main(args: &[OsString]) -> Option<ExitCode> {
    let (name, args) = called(args)?;
    match name {
        #[cfg(target_os = "linux")]
        "slirp4netns" => Some(slirp4netns::main(args)),
        "vpnkit" => Some(vpnkit::main(args)),
        _ => None,
    }
}

/// What of `PORTWAY_*` counts under another name too: how the process confines itself, for which no other program has a flag.
///
/// # Errors
/// A value that is none for its setting.
pub(crate) fn confinement() -> Result<Settings, String> {
    const ALONE: [&str; 3] = ["PORTWAY_SANDBOX", "PORTWAY_RUNAS", "PORTWAY_ALLOW_PATH"];
    let set = std::env::vars_os().filter(|(name, _)| ALONE.iter().any(|known| name == known));
    Settings::from_env(set).map_err(|e| e.to_string())
}

/// The program that is meant, and its argv: by the file name of `argv[0]`, or by the first argument of `portway`.
fn called(args: &[OsString]) -> Option<(&str, &[OsString])> {
    const NAMES: [&str; 2] = ["slirp4netns", "vpnkit"];
    let name = Path::new(args.first()?).file_name()?.to_str()?;
    // An absolute path may bear a version, as in `vpnkit-0.6`: that is no name of ours.
    if let Some(known) = NAMES.into_iter().find(|n| *n == name) {
        return Some((known, args));
    }
    let name = args.get(1)?.to_str()?;
    let known = NAMES.into_iter().find(|n| *n == name)?;
    Some((known, args.get(1..)?))
}

/// Reads the options of `name`. Without any to go on with, what was asked for has been shown, or what is wrong been said, and the exit
/// code is the answer.
fn parsed<A: clap::Parser>(name: &str, args: &[OsString]) -> Result<A, ExitCode> {
    A::try_parse_from(args).map_err(|error| {
        let text = error.render().to_string();
        if !error.use_stderr() {
            say(&text);
            return ExitCode::SUCCESS;
        }
        let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        fail(name, &format!("{line} (see {name} --help)"))
    })
}

/// Runs the network `config` describes with `doors` until it is told to end; then `sockets` are removed. `name` stands
/// before an error.
fn serve(name: &str, config: &Config, doors: Vec<Door>, sockets: &[PathBuf]) -> ExitCode {
    let started = crate::log::start(config.log_level, config.log_format, config.log_file.as_deref());
    let done = started.map_err(|e| e.to_string()).and_then(|()| {
        // The whole chain: the outermost error alone only names the setting.
        crate::sidecar::run_with(config, doors).map_err(|e| format!("{e:#}"))
    });
    for socket in sockets {
        let _ = std::fs::remove_file(socket);
    }
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => fail(name, &line),
    }
}

/// Says why `name` ends, and gives its exit code, 1.
fn fail(name: &str, line: &str) -> ExitCode {
    use std::io::Write;
    // Without anybody to tell, the code alone has to do.
    let _ = writeln!(std::io::stderr(), "{name}: {line}");
    ExitCode::FAILURE
}

/// Writes `text` to standard output.
fn say(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_its_file_name_or_by_the_first_argument() {
        let named = |line: &str| {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            called(&args).map(|(name, args)| (name.to_owned(), args.len()))
        };
        let slirp = |n| Some(("slirp4netns".to_owned(), n));
        assert_eq!(named("slirp4netns -c 7 tap0"), slirp(4));
        assert_eq!(named("/usr/bin/slirp4netns 7 tap0"), slirp(3));
        assert_eq!(named("portway slirp4netns 7 tap0"), slirp(3));
        assert_eq!(named("/opt/portway vpnkit"), Some(("vpnkit".to_owned(), 1)));
        for line in ["portway", "portway serve vpnkit", "portway-vpnkit", "vpnkit-0.6 --debug"] {
            assert_eq!(named(line), None, "{line}");
        }
    }
}
