//! `make install` into a directory of its own, and what is there then: the program, pages that `man` reads, completions that shells
//! load, systemd units.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use portway_tests::vm::portway;

/// Runs `command` to its end; what it printed. What it complained of is an error too.
fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success() && said.is_empty(), "{command:?}: {}: {said}", out.status);
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Whether a program is there; said on standard error where not.
fn has(program: &str) -> bool {
    let there =
        Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !there {
        eprintln!("skipped in part: no {program}");
    }
    there
}

/// The files under `dir`, relative to it.
fn files(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut directories = vec![dir.to_path_buf()];
    while let Some(at) = directories.pop() {
        for entry in fs::read_dir(at)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else {
                found.push(path.strip_prefix(dir)?.display().to_string());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Every command of the program, by its own list of them.
fn commands(program: &Path) -> Result<Vec<String>> {
    let help = output(Command::new(program).arg("--help"))?;
    let (_, rest) = help.split_once("Commands:\n").context("no list of commands")?;
    let lines = rest.lines().take_while(|line| !line.is_empty());
    let words = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    Ok(words.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
}

#[test]
fn make_install_leaves_a_program_with_its_pages_completions_and_units() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let built = fs::canonicalize(portway()?)?;
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .args(["--no-print-directory", "install"]);
    make.arg(format!("DESTDIR={}", dir.path().display())).arg("PREFIX=/opt/portway");
    make.arg(format!("PROGRAM={}", built.display()));
    // A make that runs this test has said things of its own.
    for variable in ["MAKEFLAGS", "MAKELEVEL", "MFLAGS"] {
        make.env_remove(variable);
    }
    let said = output(&mut make)?;
    ensure!(said.contains("installed under"), "{said}");
    let prefix = dir.path().join("opt/portway");
    let at = |name: &str| prefix.join(name);

    let program = at("bin/portway");
    let meta = fs::metadata(&program)?;
    ensure!(
        meta.permissions().mode() & 0o777 == 0o755 && meta.len() < fs::metadata(&built)?.len(),
        "not stripped"
    );
    let version = format!("portway {}\n", env!("CARGO_PKG_VERSION"));
    ensure!(output(Command::new(&program).arg("--version"))? == version);

    let commands = commands(&program)?;
    ensure!(commands.len() > 20 && commands.iter().any(|c| c == "serve"), "{commands:?}");
    let all = files(&prefix)?;
    let pages: Vec<&String> = all.iter().filter(|f| f.starts_with("share/man/man1/")).collect();
    for command in commands.iter().filter(|c| *c != "help") {
        let page = format!("share/man/man1/portway-{command}.1");
        ensure!(pages.contains(&&page), "no {page} among {pages:?}");
    }
    let others: Vec<&String> = all.iter().filter(|f| !f.starts_with("share/man/man1/")).collect();
    ensure!(
        others
            == [
                "bin/portway",
                "lib/systemd/user/portway@.service",
                "lib/systemd/user/portway@.socket",
                "share/bash-completion/completions/portway",
                "share/fish/vendor_completions.d/portway.fish",
                "share/zsh/site-functions/_portway",
            ],
        "{others:?}"
    );
    if has("man") {
        for page in &pages {
            // man itself says what of a page it does not understand.
            let mut man = Command::new("man");
            man.args(["--warnings", "-E", "UTF-8", "-l"])
                .arg(at(page))
                .env("MANWIDTH", "100")
                .env("LC_ALL", "C.UTF-8");
            let text = output(&mut man)?;
            ensure!(
                text.contains("NAME") && text.contains("SYNOPSIS") && text.contains("portway"),
                "{page}: {text}"
            );
        }
    }
    shells(&prefix)?;

    let unit = fs::read_to_string(at("lib/systemd/user/portway@.service"))?;
    ensure!(
        unit.contains("ExecStart=/opt/portway/bin/portway serve") && !unit.contains("@PREFIX@"),
        "{unit}"
    );
    Ok(())
}

/// The shells that are here load their completions, and complete.
fn shells(prefix: &Path) -> Result<()> {
    let at = |name: &str| -> PathBuf { prefix.join(name) };
    let bash = "source \"$0\" && complete -p portway && COMP_WORDS=(portway ser) && COMP_CWORD=1 && \
                _portway portway ser portway && echo \"${COMPREPLY[@]}\"";
    let file = at("share/bash-completion/completions/portway");
    let said = output(Command::new("bash").args(["--norc", "-c", bash]).arg(file))?;
    ensure!(said.contains("_portway") && said.ends_with("serve\n"), "bash: {said}");
    if has("zsh") {
        let zsh = "fpath=(\"$0\" $fpath); autoload -Uz compinit && compinit -D -u && echo $_comps[portway] && \
                   autoload +X _portway && whence -w _portway";
        let directory = at("share/zsh/site-functions");
        let said = output(Command::new("zsh").args(["-f", "-c", zsh]).arg(directory))?;
        ensure!(said == "_portway\n_portway: function\n", "zsh: {said}");
    }
    if has("fish") {
        let file = at("share/fish/vendor_completions.d/portway.fish");
        let fish = format!("source {}; complete -C 'portway ser'", file.display());
        let said = output(Command::new("fish").args(["--no-config", "-c", &fish]).env("HOME", prefix))?;
        ensure!(said.starts_with("serve\t"), "fish: {said}");
    }
    Ok(())
}
