//! The command line: what can be typed, and what each command does.
//!
//! Every long option may be written with one dash, as LinuxKit documents `-publish`: [`normalise`] rewrites argv
//! before clap sees it. Exit codes: 0, 1 for a failure, 2 for bad usage; an error is one line that says what to do.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "doc comments of options are help texts, with brackets of their own"
)]

mod dns;
mod doctor;
mod explain;
mod listing;
mod owner;
mod reference;
mod run;
mod support;
mod top;
mod vms;
mod wait;
mod watch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use hyper::Method;
use portway_api::agent::AgentInfo;
use portway_api::control::{FlowInfo, LeaseInfo, LinkInfo, PortInfo, PortsRequest, PortsResponse, Stats};

use crate::config::{Config, Settings, UnixPath, runtime_socket};
use crate::control::client::Client;
use crate::publish::spec::PublishSpec;

/// The network of a virtual machine, as one unprivileged process.
#[derive(Debug, Parser)]
#[command(name = "portway", version, about, max_term_width = 100, subcommand_required = true)]
#[command(
    after_help = "Called as slirp4netns or vpnkit (or `portway vpnkit ...`), it takes that program's options."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a VM with its network
    Run(Box<run::RunArgs>),
    /// List the VMs that run
    Vms {
        /// How to print
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Press a VM's power button and wait for its end
    Stop(vms::Which),
    /// End a VM at once
    Kill(vms::Which),
    /// The console of a VM that runs in the background; Ctrl-] leaves it
    Console(vms::Which),
    /// Wait for a VM's end, the exit code is the VM's; or with --ready or --port for its beginning
    Wait(wait::WaitArgs),
    /// The network alone, for any hypervisor
    Serve {
        #[command(flatten)]
        settings: Box<Settings>,
        /// Read settings from this TOML file too; its keys are the flags' names
        #[arg(long, value_name = "FILE", env = "PORTWAY_CONFIG", hide_env_values = true)]
        config: Option<PathBuf>,
        /// Check the settings and leave
        #[arg(long)]
        check_config: bool,
    },
    /// Publish ports of a running network
    Publish {
        /// [BIND:]HOST[-END]:[GUEST_ADDR:]GUEST[-END][/tcp|udp]
        #[arg(required = true, value_name = "SPEC")]
        specs: Vec<PublishSpec>,
        #[command(flatten)]
        at: Target,
    },
    /// Stop publishing ports; open connections stay
    Unpublish {
        /// As they were published
        #[arg(required = true, value_name = "SPEC")]
        specs: Vec<PublishSpec>,
        #[command(flatten)]
        at: Target,
    },
    /// List published ports
    Ports(Target),
    /// List DHCP leases
    Leases(Target),
    /// Names the network answers itself
    #[command(subcommand)]
    Dns(dns::DnsCommand),
    /// List the links and the VMs behind them
    Links(Target),
    /// List flows and NAT bindings
    Flows(FlowsArgs),
    /// Show counters
    Stats(Target),
    /// List guest agents
    Agents(Target),
    /// Show what has happened
    Events(watch::EventsArgs),
    /// Copy frames as they pass, for Wireshark
    Capture(watch::CaptureArgs),
    /// Watch VMs and flows live
    Top(top::TopArgs),
    /// Say what would happen to a guest's connection, and why
    Explain(explain::ExplainArgs),
    /// Check this host, and say what to do about what is missing
    Doctor(Target),
    /// Collect what somebody who helps has to know into one archive
    Support(support::SupportArgs),
    /// Be gvproxy: its flags, its API (a link to this program called gvproxy does the same)
    Gvproxy {
        /// gvproxy's flags; -help lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
        flags: Vec<OsString>,
    },
    /// Print completions for a shell
    Completions(reference::CompletionsArgs),
    /// Print a man page, or write all of them
    Man(reference::ManArgs),
}

/// The options of `flows`.
#[derive(Debug, clap::Args)]
struct FlowsArgs {
    /// Only flows of the guest behind this link
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Only tcp or udp
    #[arg(long, value_name = "PROTO", value_parser = ["tcp", "udp"])]
    proto: Option<String>,
    /// Only flows with this address at either end
    #[arg(long, value_name = "IP")]
    host: Option<std::net::IpAddr>,
    /// Only flows with this port at either end
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// At most this many, those with most bytes first
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    #[command(flatten)]
    at: Target,
}

impl FlowsArgs {
    fn route(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let texts = [
            ("vm", self.vm.clone()),
            ("proto", self.proto.clone()),
            ("host", self.host.map(|h| h.to_string())),
            ("port", self.port.map(|p| p.to_string())),
            ("limit", self.limit.map(|n| n.to_string())),
        ];
        for (key, value) in texts {
            value.map(|v| query.append_pair(key, &v));
        }
        format!("/v1/flows?{}", query.finish())
    }
}

/// The running network a command is about.
#[derive(Debug, clap::Args)]
struct Target {
    /// The network's name
    #[arg(
        long,
        value_name = "NAME",
        default_value = "default",
        env = "PORTWAY_NETWORK",
        hide_env_values = true
    )]
    network: String,
    /// Its control socket, when it has one of its own
    #[arg(long, value_name = "unix:PATH", env = "PORTWAY_API", hide_env_values = true)]
    api: Option<UnixPath>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// One JSON document.
    Json,
}

/// Runs the program with `args` (argv, the program's name first).
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    #[cfg(target_os = "linux")]
    if args.get(1).is_some_and(|a| a == crate::link::tap::CHILD) {
        // A child of a tap link, which opens a device elsewhere: see there.
        let done = crate::link::tap::child(args.get(2..).unwrap_or_default());
        return if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if args.get(1).is_some_and(|a| a == portway_launcher::GUARD) {
        return portway_launcher::guard();
    }
    if let Some(code) = crate::personality::main(&args) {
        return code;
    }
    let called = args.first().and_then(|a| std::path::Path::new(a).file_name());
    if called.is_some_and(crate::gvproxy::is_called) {
        return as_gvproxy(args.get(1..).unwrap_or_default());
    }
    if args.get(1).is_some_and(|a| a == "gvproxy") {
        return as_gvproxy(args.get(2..).unwrap_or_default());
    }
    let args = if called.is_some_and(|n| n == watch::EXTCAP) { watch::extcap(args) } else { args };
    let cli = match Cli::try_parse_from(normalise(args)) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match execute(cli.command) {
        Ok(code) => code,
        Err(Failure { code, line }) => {
            listing::complain(&line);
            ExitCode::from(code)
        }
    }
}

fn as_gvproxy(words: &[OsString]) -> ExitCode {
    let words: Vec<String> = words.iter().map(|w| w.to_string_lossy().into_owned()).collect();
    crate::gvproxy::main(&words)
}

/// What ends the program with an error.
struct Failure {
    code: u8,
    line: String,
}

impl Failure {
    /// Something did not work.
    fn failed(error: impl std::fmt::Display) -> Self {
        Self { code: 1, line: error.to_string() }
    }

    /// It was asked for wrongly.
    fn usage(error: impl std::fmt::Display) -> Self {
        Self { code: 2, line: error.to_string() }
    }
}

/// clap's error as one line; help and version as they are.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    listing::complain(&one_line(error));
    ExitCode::from(2)
}

/// clap's error as one line.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    let first = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    // A list of what is missing, and a tip, are worth having; the usage is one `--help` away.
    let more: Vec<&str> =
        lines.take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more")).collect();
    let more = if more.is_empty() { String::new() } else { format!(" {}", more.join(" ")) };
    format!("{first}{more} (see portway --help)")
}

/// Rewrites `-option` to `--option` for every long option there is; values and what stands behind `--` stay.
fn normalise(args: Vec<OsString>) -> Vec<OsString> {
    fn longs(command: &clap::Command, into: &mut Vec<String>) {
        into.extend(command.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)));
        for sub in command.get_subcommands() {
            longs(sub, into);
        }
    }
    let mut known = vec!["help".to_owned(), "version".to_owned()];
    longs(&Cli::command(), &mut known);
    let mut literal = false;
    let rewrite = |arg: OsString| {
        let Some(text) = arg.to_str().filter(|_| !literal) else { return arg };
        literal = text == "--";
        let name =
            text.strip_prefix('-').filter(|n| !n.starts_with('-')).map(|n| n.split('=').next().unwrap_or(n));
        if name.is_some_and(|n| n.len() > 1 && known.iter().any(|k| k == n)) {
            format!("-{text}").into()
        } else {
            arg
        }
    };
    args.into_iter().map(rewrite).collect()
}

fn execute(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(args) => run::run(*args),
        Command::Vms { format } => vms::list(format),
        Command::Stop(which) => vms::stop(&which),
        Command::Kill(which) => vms::kill(&which),
        Command::Console(which) => vms::console(&which),
        Command::Serve { settings, config, check_config } => {
            let mut settings =
                settings.over(Settings::from_env(std::env::vars_os()).map_err(Failure::usage)?);
            if let Some(path) = config {
                settings = settings.over(Settings::from_file(&path).map_err(Failure::usage)?);
            }
            let config = Config::try_from(settings).map_err(Failure::usage)?;
            if check_config {
                listing::say("the settings are good");
                return Ok(ExitCode::SUCCESS);
            }
            // Before anything is opened.
            crate::sandbox::descriptors::close_others(&config);
            crate::log::start(config.log_level, config.log_format, config.log_file.as_deref())
                .map_err(Failure::usage)?;
            // The whole chain: the outermost error alone only names the setting.
            crate::sidecar::run(&config).map_err(|e| Failure::failed(owner::explain(&format!("{e:#}"))))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Publish { specs, at } => change(&Method::POST, &specs, &at),
        Command::Unpublish { specs, at } => change(&Method::DELETE, &specs, &at),
        Command::Ports(at) => list::<PortInfo>(&at, "/v1/ports", listing::ports),
        Command::Leases(at) => list::<LeaseInfo>(&at, "/v1/leases", listing::leases),
        Command::Agents(at) => list::<AgentInfo>(&at, "/v1/agents", listing::agents),
        Command::Wait(args) => wait::run(&args),
        Command::Dns(command) => dns::run(command),
        Command::Links(at) => list::<LinkInfo>(&at, "/v1/links", listing::links),
        Command::Flows(args) => list::<FlowInfo>(&args.at, &args.route(), listing::flows),
        Command::Events(args) => watch::events(&args),
        Command::Capture(args) => watch::capture(args),
        Command::Top(args) => top::top(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Doctor(at) => doctor::doctor(&at),
        Command::Support(args) => support::support(&args),
        Command::Gvproxy { flags } => Ok(as_gvproxy(&flags)),
        Command::Completions(args) => Ok(reference::completions(&args)),
        Command::Man(args) => reference::man(&args),
        Command::Stats(at) => {
            let stats: Stats = client(&at)?.get("/v1/stats").map_err(Failure::failed)?;
            match at.format {
                Format::Json => listing::json(&stats),
                Format::Table => listing::stats(&stats),
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn client(at: &Target) -> Result<Client, Failure> {
    let path = match &at.api {
        Some(UnixPath(path)) => path.clone(),
        None => runtime_socket(&at.network).map_err(Failure::usage)?,
    };
    Ok(Client::new(&path))
}

fn list<T>(at: &Target, route: &str, table: fn(&[T])) -> Result<ExitCode, Failure>
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    let rows: Vec<T> = client(at)?.get(route).map_err(Failure::failed)?;
    match at.format {
        Format::Json => listing::json(&rows),
        Format::Table => table(&rows),
    }
    Ok(ExitCode::SUCCESS)
}

/// Publishes or unpublishes; the good ones stay, any failure makes the exit code 1.
fn change(method: &Method, specs: &[PublishSpec], at: &Target) -> Result<ExitCode, Failure> {
    let body = PortsRequest { specs: specs.iter().map(ToString::to_string).collect() };
    let done: PortsResponse =
        client(at)?.send(method.clone(), "/v1/ports", &body).map_err(Failure::failed)?;
    match at.format {
        Format::Json => listing::json(&done.published),
        Format::Table if *method == Method::POST => {
            done.published.iter().for_each(|p| listing::say(&listing::published(p)))
        }
        Format::Table => done.published.iter().for_each(|p| listing::say(&listing::unpublished(p))),
    }
    for error in &done.errors {
        listing::complain(&owner::explain(error));
    }
    Ok(if done.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(normalise(line.split(' ').map(OsString::from).collect())).map(|c| c.command)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn one_dash_is_as_good_as_two() {
        for line in [
            "portway serve --link qemu:fd:3 --publish 2222:22/tcp",
            "portway serve -link qemu:fd:3 -publish 2222:22/tcp",
            "portway serve -link=qemu:fd:3 -publish=2222:22/tcp",
            "portway serve --link qemu:fd:3 -p 2222:22/tcp",
        ] {
            let Command::Serve { settings, .. } = parsed(line).expect(line) else { panic!("{line}") };
            assert_eq!(settings.publish, ["2222:22".parse().unwrap()], "{line}");
        }
    }

    #[test]
    fn what_is_not_an_option_is_left_alone() {
        let args: Vec<OsString> = ["portway", "-x", "-", "--", "-publish"].map(OsString::from).to_vec();
        assert_eq!(normalise(args.clone()), args);
    }

    #[test]
    fn bad_usage_is_an_error() {
        for line in [
            "portway",
            "portway serve --colour",
            "portway publish",
            "portway publish 99999:1",
            "portway serve --link wire:fd:3",
            "portway ports --format xml",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
