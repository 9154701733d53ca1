//! What the command line says of itself: completions, man pages, and the pages under `docs/reference`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Failure, listing};

/// The options of `completions`.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "portway", &mut text);
    listing::say(String::from_utf8_lossy(&text).trim_end());
    ExitCode::SUCCESS
}

/// The options of `man`.
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// The page of this command; without one that of portway itself
    #[arg(value_name = "COMMAND", conflicts_with = "output")]
    command: Option<String>,
    /// Write every page into this directory
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(super) fn man(args: &ManArgs) -> Result<ExitCode, Failure> {
    let mut portway = Cli::command();
    portway.build();
    if let Some(dir) = &args.output {
        let fault = |e: std::io::Error| Failure::failed(format!("{}: {e}", dir.display()));
        std::fs::create_dir_all(dir).map_err(fault)?;
        write_pages(&portway, dir).map_err(fault)?;
        return Ok(ExitCode::SUCCESS);
    }
    let command = match &args.command {
        None => portway,
        Some(name) => {
            let names: Vec<String> = subcommands(&portway).map(|c| c.get_name().to_owned()).collect();
            let found = portway.find_subcommand(name).filter(|_| names.contains(name)).cloned();
            found.ok_or_else(|| {
                Failure::usage(format!("{name:?} is not a command; there are {}", names.join(", ")))
            })?
        }
    };
    let page = page(&command).map_err(Failure::failed)?;
    listing::say(page.trim_end());
    Ok(ExitCode::SUCCESS)
}

/// The commands that are shown.
fn subcommands(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help")
}

fn page(command: &Command) -> std::io::Result<String> {
    let mut page = Vec::new();
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    clap_mangen::Man::new(command.clone().name(name)).render(&mut page)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

fn write_pages(portway: &Command, dir: &Path) -> std::io::Result<()> {
    std::fs::write(dir.join("portway.1"), page(portway)?)?;
    for command in subcommands(portway) {
        std::fs::write(dir.join(format!("portway-{}.1", command.get_name())), page(command)?)?;
    }
    Ok(())
}

/// `docs/reference/cli.md`: the help of every command.
#[cfg(test)]
fn cli_page() -> String {
    use std::fmt::Write;

    let mut portway = Cli::command().term_width(100);
    portway.build();
    let mut text = String::from(
        "# Commands\n\nGenerated from the program (`PORTWAY_BLESS=1 cargo test -p portway reference`). Long options may be \
         written with one dash. Exit codes: 0, 1 for a failure, 2 for bad usage. `--format json` prints the objects of\n\
         [openapi.json](openapi.json); fields are only ever added to.\n",
    );
    let all = std::iter::once(portway.clone()).chain(subcommands(&portway).cloned());
    for mut command in all {
        let name = command.get_display_name().unwrap_or(command.get_name()).replace("portway-", "portway ");
        let help = command.render_long_help().to_string();
        let help: Vec<&str> = help.lines().map(str::trim_end).collect();
        // Writing to a string does not fail.
        let _ = write!(text, "\n## `{name}`\n\n```text\n{}\n```\n", help.join("\n").trim_end());
    }
    text
}

/// `docs/reference/config.md`: every setting.
#[cfg(test)]
fn config_page() -> String {
    use std::fmt::Write;

    let command = crate::config::Settings::command();
    let mut text = String::from(
        "# Settings\n\nGenerated from the program (`PORTWAY_BLESS=1 cargo test -p portway reference`). Every setting is a flag of \
         `portway serve`, a key of the TOML\nfile of `--config` and an environment variable. The command line wins over the environment, \
         that over the file; repeatable settings\nappend to the file's. In the file they are arrays, in the environment a list \
         with blanks between. `portway serve --check-config` says\nwhether the settings are good and starts nothing.\n\n\
         | flag | in the file | environment | meaning |\n|---|---|---|---|\n",
    );
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let value = arg.get_value_names().and_then(|v| v.first()).map_or("", |v| v.as_str());
        let list = matches!(arg.get_action(), clap::ArgAction::Append);
        let key = if list { format!("{long} = [\"…\"]") } else { format!("{long} = …") };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
        let short = arg.get_short().map(|s| format!("`-{s}`, ")).unwrap_or_default();
        let value = value.replace('|', "\\|");
        let _ = writeln!(
            text,
            "| {short}`--{long} {value}` | `{key}` | `{}` | {help} |",
            crate::config::variable(long)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_pages_are_those_that_are_checked_in() {
        crate::drift::check("docs/reference/cli.md", &cli_page());
        crate::drift::check("docs/reference/config.md", &config_page());
    }

    #[test]
    fn every_command_has_a_man_page_and_every_shell_its_completions() {
        let dir = tempfile::tempdir().unwrap();
        let mut portway = Cli::command();
        portway.build();
        write_pages(&portway, dir.path()).unwrap();
        let page = std::fs::read_to_string(dir.path().join("portway-serve.1")).unwrap();
        assert!(page.contains(".TH portway-serve 1") && page.contains("static"), "{page}");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "portway", &mut text);
            assert!(String::from_utf8(text).unwrap().contains("unpublish"), "{shell}");
        }
    }
}
