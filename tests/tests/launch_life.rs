//! The life of VMs that `portway run` starts: in the background, on a terminal, on a network they share, and when the
//! launcher is killed.
//!
//! Needs QEMU and tmux (`tests/setup.sh`); without QEMU the tests are skipped, with a line that says so.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portway_tests::launch::{Detached, Terminal, cli, has_qemu, path, process, processes, said, sockets};
use portway_tests::sidecar::until;
use portway_tests::vm::{guest_image, portway};

/// What a clean power-down may take.
const POWER_DOWN: Duration = Duration::from_secs(10);

#[test]
fn a_detached_vm_is_listed_has_a_console_and_is_stopped_by_name() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &[])?;
    let listed = vm.vms()?;
    ensure!(
        listed[0]["name"] == "web" && listed[0]["detached"] == true && listed[0]["accel"].is_string(),
        "{listed}"
    );

    let again = vm.portway(&[
        "run",
        "--net",
        "none",
        "--state-dir",
        &vm.state(""),
        &guest_image()?.display().to_string(),
    ])?;
    ensure!(again.status.code() == Some(1) && said(&again).contains("in use by process"), "{}", said(&again));

    vm.await_console("portway-agent: ready")?;
    let program = portway()?.display().to_string();
    let runtime = dir.path().display().to_string();
    let command = format!(
        "stty -a > {runtime}/before; XDG_RUNTIME_DIR={runtime} {program} console web; stty -a > {runtime}/after; echo left=$?"
    );
    let terminal = Terminal::start(dir.path(), &command)?;
    terminal.shows("Ctrl-] leaves it")?;
    terminal.types(&["", "Enter"])?;
    terminal.shows("/ #")?;
    terminal.types(&["echo $((6*7))is-the-answer; tty", "Enter"])?;
    terminal.shows("42is-the-answer")?;
    terminal.types(&["C-]"])?;
    terminal.shows("left=0")?;
    let settings = |name: &str| fs::read_to_string(dir.path().join(name));
    ensure!(settings("before")? == settings("after")?, "the terminal is not as it was");

    let start = Instant::now();
    let mut waiting = Command::new(portway()?)
        .args(["wait", "web"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = vm.portway(&["stop", "web"])?;
    ensure!(out.status.success() && said(&out).contains("powered off"), "{}", said(&out));
    ensure!(start.elapsed() < POWER_DOWN, "stopping took {:?}", start.elapsed());
    ensure!(waiting.wait()?.success(), "wait has another exit code than the VM");
    ensure!(vm.vms()? == serde_json::json!([]), "it is still listed");
    for socket in ["qmp.sock", "console.sock"] {
        ensure!(!Path::new(&vm.state(socket)).exists(), "{socket} is still there");
    }
    Ok(())
}

/// The button is pressed while the firmware or the kernel has nobody yet who would notice.
#[test]
fn a_vm_that_is_stopped_while_it_boots_powers_off_all_the_same() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &["--net", "none", "--stop-timeout", "120"])?;
    let out = vm.portway(&["stop", "web"])?;
    ensure!(out.status.success() && said(&out).contains("powered off"), "{}", said(&out));
    Ok(())
}

/// The agent comes by the vsock that the VM has without a word, and where none can come nothing is started.
#[test]
fn a_run_that_waits_answers_when_the_guest_is_ready() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    for words in [&["--vsock", "off"][..], &["--network", "dev"]] {
        let (image, state) = (guest_image()?.display().to_string(), path(dir.path(), "state"));
        let out = cli(dir.path(), &[&["run", "--wait", "--state-dir", &state], words, &[&image]].concat())?;
        ensure!(out.status.code() == Some(2) && said(&out).contains("guest agent"), "{}", said(&out));
        ensure!(!Path::new(&state).exists(), "something was started");
    }
    let vm = Detached::start(dir.path(), "web", &["--wait", "-publish", "0:22"])?;
    let console = fs::read_to_string(vm.state("console.log"))?;
    ensure!(console.contains("host vsock://2:"), "it answered before the agent was there: {console}");
    let out = vm.portway(&["wait", "--ready", "--timeout", "5"])?;
    ensure!(out.status.success(), "{}", said(&out));
    let out = vm.portway(&["kill", "web"])?;
    ensure!(out.status.success(), "{}", said(&out));
    Ok(())
}

#[test]
fn a_second_vm_without_a_word_of_its_network_has_one_by_its_own_name() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let first = Detached::start(dir.path(), "web", &["-publish", "0:22"])?;
    let second = Detached::start(dir.path(), "db", &["-publish", "0:80"])?;
    for (words, port) in [(&["ports"][..], 22), (&["ports", "--network", "db"], 80)] {
        let out = second.portway(&[words, &["--format", "json"]].concat())?;
        let ports: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        ensure!(ports[0]["guest_port"] == port && ports.as_array().is_some_and(|p| p.len() == 1), "{ports}");
    }
    let state = path(dir.path(), "state-third");
    let image = guest_image()?.display().to_string();
    let out = second.portway(&["run", "--detach", "--name", "db", "--state-dir", &state, &image])?;
    ensure!(out.status.code() == Some(2) && said(&out).contains("--api unix:PATH"), "{}", said(&out));
    for vm in [&first, &second] {
        let out = vm.portway(&["kill", if std::ptr::eq(vm, &first) { "web" } else { "db" }])?;
        ensure!(out.status.success(), "{}", said(&out));
    }
    Ok(())
}

/// Another launcher that stands still keeps the turn for itself: this one can be told to give up.
#[test]
fn a_launcher_that_waits_for_another_ends_when_it_is_told_to() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    fs::create_dir(dir.path().join("portway"))?;
    let lock = fs::File::open(dir.path().join("portway"))?;
    lock.lock()?;
    let (image, state) = (guest_image()?.display().to_string(), path(dir.path(), "state"));
    let mut waiting = Command::new(portway()?)
        .args(["run", "--network", "dev", "--state-dir", &state, &image])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(waiting.id())?);
    // It has its state directory, and so its signals, before it waits.
    until(Duration::from_secs(30), || Path::new(&state).exists())?;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    until(Duration::from_secs(30), || waiting.try_wait().is_ok_and(|ended| ended.is_some()))?;
    let out = waiting.wait_with_output()?;
    ensure!(out.status.code() == Some(1) && said(&out).contains("SIGTERM came before"), "{}", said(&out));
    Ok(())
}

#[test]
fn a_killed_vm_has_an_exit_code_of_its_own() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let vm = Detached::start(dir.path(), "web", &["--net", "none"])?;
    let waiting = Command::new(portway()?)
        .args(["wait", "web"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = vm.portway(&["kill", "web"])?;
    ensure!(out.status.success() && said(&out).contains("killed"), "{}", said(&out));
    let waited = waiting.wait_with_output()?;
    ensure!(waited.status.code() == Some(1), "{}", said(&waited));
    let out = vm.portway(&["stop", "web"])?;
    ensure!(out.status.code() == Some(2) && said(&out).contains("no VM runs"), "{}", said(&out));
    Ok(())
}

#[test]
fn a_detached_vm_that_cannot_start_says_why_and_is_not_there() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (image, state) = (guest_image()?.display().to_string(), path(dir.path(), "state"));
    let words =
        ["run", "--detach", "--net", "none", "--qemu-arg", "--no-such-option", "--state-dir", &state, &image];
    let out = cli(dir.path(), &words)?;
    ensure!(
        out.status.code() == Some(1) && said(&out).contains("--no-such-option"),
        "{}: {}",
        out.status,
        said(&out)
    );
    ensure!(
        serde_json::from_slice::<serde_json::Value>(&cli(dir.path(), &["vms", "--format", "json"])?.stdout)?
            == serde_json::json!([])
    );
    Ok(())
}

#[test]
fn two_vms_share_a_network_find_each_other_by_name_and_it_ends_with_the_last() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let network = ["--network", "lab"];
    let one = Detached::start(dir.path(), "one", &[&network[..], &["-publish", "0:22"]].concat())?;
    let two = Detached::start(
        dir.path(),
        "two",
        &[&network[..], &["-publish", "0:80", "--ip", "192.168.127.77"]].concat(),
    )?;
    let late = cli(
        dir.path(),
        &["run", "--network", "lab", "--dns-host", "a.test=1.2.3.4", &guest_image()?.display().to_string()],
    )?;
    ensure!(
        late.status.code() == Some(2) && said(&late).contains("--dns-host cannot be given now"),
        "{}",
        said(&late)
    );
    let again = cli(
        dir.path(),
        &[
            "run",
            "--network",
            "lab",
            "--name",
            "two",
            "--state-dir",
            &path(dir.path(), "s"),
            &guest_image()?.display().to_string(),
        ],
    )?;
    ensure!(
        again.status.code() == Some(2) && said(&again).contains("\"two\" is on this network already"),
        "{}",
        said(&again)
    );
    for vm in [&one, &two] {
        vm.await_console("portway-agent: ready")?;
    }
    one.types("ping -c 1 -W 10 two && echo found-$((40+2))", "found-42")?;
    two.types("ping -c 1 -W 10 one.portway.internal && echo found-$((40+2))", "found-42")?;
    two.await_console("lease 192.168.127.77")?;
    let ports = cli(dir.path(), &["ports", "--network", "lab", "--format", "json"])?;
    let ports: serde_json::Value = serde_json::from_slice(&ports.stdout)?;
    ensure!(ports.as_array().is_some_and(|ports| ports.len() == 2), "{ports}");

    // The first may go: the network stays for the second, without the first's ports.
    ensure!(one.portway(&["stop", "one"])?.status.success());
    let left = || -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(
            &cli(dir.path(), &["ports", "--network", "lab", "--format", "json"])?.stdout,
        )?)
    };
    until(Duration::from_secs(10), || left().is_ok_and(|p| p.as_array().is_some_and(|p| p.len() == 1)))?;
    ensure!(left()?[0]["guest_port"] == 80, "{}", left()?);
    two.types("nslookup gateway.portway.internal && echo still-$((40+2))", "still-42")?;
    ensure!(two.portway(&["stop", "two"])?.status.success());
    until(Duration::from_secs(10), || sockets(dir.path()).is_ok_and(|left| left.is_empty()))
        .with_context(|| format!("left behind: {:?}", sockets(dir.path())))
}

/// What dies under a VM: the word that finds the process, and what is told of its end, with its last lines or where they are.
const DEATHS: [(&str, &str); 3] = [
    ("qemu-system-x86_64", "QEMU ended (signal: 9 (SIGKILL)), so the network was ended too"),
    ("serve", "the network ended (signal: 9 (SIGKILL)), so the VM was ended too"),
    ("virtiofsd", "virtiofsd of code ended (signal: 9 (SIGKILL)), so the VM was ended too"),
];

#[test]
fn a_process_that_dies_is_told_with_its_log_and_takes_the_others_with_it() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    for (word, told) in DEATHS {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("share"))?;
        let share = format!("{},tag=code", path(dir.path(), "share"));
        let vm = Detached::start(dir.path(), "web", &["--virtiofs", &share, "--stop-timeout", "1"])?;
        let waiting = Command::new(portway()?)
            .args(["wait", "web"])
            .env("XDG_RUNTIME_DIR", dir.path())
            .stdout(Stdio::piped())
            .spawn()?;
        nix::sys::signal::kill(process(dir.path(), word)?, nix::sys::signal::Signal::SIGKILL)?;
        let waited = waiting.wait_with_output()?;
        ensure!(waited.status.code() == Some(1) && said(&waited).contains(told), "{word}: {}", said(&waited));
        // The log's last lines, or that it has none.
        let words = said(&waited);
        let log = words.lines().nth(1).unwrap_or_default();
        ensure!(!log.is_empty(), "{word}: without its log: {words}");
        until(Duration::from_secs(10), || {
            processes(dir.path()).is_ok_and(|p| p.is_empty())
                && sockets(dir.path()).is_ok_and(|s| s.is_empty())
        })
        .with_context(|| format!("{word}: {:?} {:?}", processes(dir.path()), sockets(dir.path())))?;
        drop(vm);
    }
    Ok(())
}

#[test]
fn what_is_prepared_is_shown_on_the_terminal_and_half_a_disk_is_never_left() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| path(dir.path(), name);
    // A slow disk: the real qemu-img, once it is let.
    let real = Command::new("bash").args(["-c", "command -v qemu-img"]).output()?;
    let script = format!(
        "#!/bin/bash\ntouch \"${{@: -2:1}}\"; touch {}; while [ ! -e {} ]; do sleep 0.05; done; exec {} \"$@\"\n",
        at("begun"),
        at("let"),
        said(&real).trim()
    );
    fs::create_dir(at("bin"))?;
    fs::write(at("bin/qemu-img"), script)?;
    fs::set_permissions(at("bin/qemu-img"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let command = format!(
        "clear; PATH={}:$PATH XDG_RUNTIME_DIR={} {} run --net none --mem 256 --state-dir {} --disk {},size=64M {}",
        at("bin"),
        dir.path().display(),
        portway()?.display(),
        at("state"),
        at("data.qcow2"),
        guest_image()?.display()
    );
    let terminal = Terminal::start(dir.path(), &command)?;
    terminal.shows("[1/1] making")?;
    ensure!(!Path::new(&at("data.qcow2")).exists(), "half a disk has the name of a whole one");
    nix::sys::signal::kill(process(dir.path(), "run")?, nix::sys::signal::Signal::SIGKILL)?;
    until(Duration::from_secs(10), || !Path::new(&at("data.qcow2.new")).exists())
        .context("half a disk is left")?;
    fs::write(at("let"), "")?;

    terminal.types(&[&command, "Enter"])?;
    terminal.shows("data.qcow2 (qcow2, 64 MiB)")?;
    ensure!(Path::new(&at("data.qcow2")).exists(), "no disk");
    nix::sys::signal::kill(process(dir.path(), "run")?, nix::sys::signal::Signal::SIGQUIT)?;
    until(Duration::from_secs(10), || processes(dir.path()).is_ok_and(|left| left.is_empty()))
        .with_context(|| format!("{:?}", processes(dir.path())))
}

#[test]
fn a_launcher_that_is_killed_at_any_moment_leaves_nothing_behind() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let image = guest_image()?.display().to_string();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..50 {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| path(dir.path(), name);
        fs::create_dir(at("share"))?;
        let (state, disk, share) = (at("state"), format!("{},size=1M", at("disk")), at("share"));
        let mut words =
            vec!["run", "--mem", "64", "--disposable", "--disk", &disk, "--data", "x", "--state-dir", &state];
        match round % 3 {
            0 => words.extend(["--network", "lab"]),
            1 => words.extend(["--virtiofs", &share]),
            _ => {}
        }
        words.push(&image);
        let mut launcher = Command::new(portway()?)
            .args(&words)
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("XDG_STATE_HOME", dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(at("said"))?)
            .spawn()?;
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_millis(random % 400));
        launcher.kill()?;
        launcher.wait()?;
        let gone = until(Duration::from_secs(30), || {
            processes(dir.path()).is_ok_and(|p| p.is_empty())
                && sockets(dir.path()).is_ok_and(|s| s.is_empty())
        });
        gone.with_context(|| {
            let said = fs::read_to_string(at("said")).unwrap_or_default();
            format!("round {round}: {:?} {:?}\n{said}", processes(dir.path()), sockets(dir.path()))
        })?;
        // And the same state can be used again at once.
        if round % 10 == 9 {
            let out =
                cli(dir.path(), &["run", "--state-dir", &state, "--qemu-arg", "--no-such-option", &image])?;
            ensure!(said(&out).contains("--no-such-option"), "{}", said(&out));
        }
    }
    Ok(())
}

#[test]
fn a_terminal_is_the_console_and_is_as_it_was_even_after_the_launcher_is_killed() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| path(dir.path(), name);
    // Not an interactive shell: that would put the terminal back itself.
    let script = format!(
        "stty -a > {before}\n\
         XDG_RUNTIME_DIR={dir} {portway} run --net none --mem 256 --state-dir {state} {image}\n\
         for i in $(seq 200); do stty -a > {after}; cmp -s {before} {after} && break; sleep 0.05; done\n\
         cmp {before} {after} && echo as-it-was\n",
        before = at("before"),
        after = at("after"),
        dir = dir.path().display(),
        portway = portway()?.display(),
        state = at("state"),
        image = guest_image()?.display(),
    );
    fs::write(at("script"), script)?;
    let terminal = Terminal::start(dir.path(), &format!("bash {}", at("script")))?;
    terminal.shows("/ #")?;
    terminal.types(&["", "Enter"])?;
    terminal.types(&["echo $((6*7))is-the-answer", "Enter"])?;
    terminal.shows("42is-the-answer")?;
    let log = || fs::read(at("state/console.log")).unwrap_or_default();
    until(Duration::from_secs(10), || String::from_utf8_lossy(&log()).contains("42is-the-answer"))
        .context("console.log")?;
    let pid: i32 = fs::read_to_string(at("state/pid"))?.trim().parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    terminal.shows("as-it-was")?;
    until(Duration::from_secs(30), || processes(dir.path()).is_ok_and(|left| left.is_empty()))
        .with_context(|| format!("{:?}", processes(dir.path())))?;
    ensure!(fs::read_to_string(at("state/end"))?.starts_with("137 "), "the end is not noted");
    Ok(())
}
