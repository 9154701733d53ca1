//! How a VM and its network live and die together, with shell scripts for both.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portway_launcher::{Accel, BootImage, LaunchConfig, LaunchError, Net, run};

/// What every fake begins with: the value of an argument, by pattern, and a note of its pid.
const PRELUDE: &str = r#"#!/bin/bash
# The guard, which is the sidecar's program: the real one is tested with the real program (tests/tests/launch.rs).
[ "$1" = __guard ] && exec cat > /dev/null
case " $* " in *" --version "*) echo "QEMU emulator version 7.2.0"; exit;; esac
after() { local want=$1 last; shift; for word; do [ "$last" = "$want" ] && { echo "$word"; return; }; last=$word; done; }
note() { echo "$2" > "$DIR/$1.new" && mv "$DIR/$1.new" "$DIR/$1"; }
"#;
/// A sidecar that is ready at once and ends on SIGTERM.
const GOOD_SIDECAR: &str = r#"
ready=$(after --ready-fd "$@")
trap 'note sidecar-ended SIGTERM; exit 0' TERM
eval "echo ready >&$ready; exec $ready>&-"
note sidecar $$
mkfifo "$DIR/never"; exec {never}<>"$DIR/never"
while :; do read -rt 0.2 -u $never; done
"#;
/// A QEMU that powers off when its button is pressed.
const GOOD_QEMU: &str = r#"
for word; do case $word in socket,id=qmp,fd=*) qmp=${word##*=};; esac; done
note qemu $$
while read -r line <&$qmp; do
  case $line in *system_powerdown*)
    echo '{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}' >&$qmp; exit 0;;
  esac
done
"#;
/// A QEMU that does not know what a power button is.
const DEAF_QEMU: &str = "note qemu $$; exec sleep 1000";

/// How long anything here may take; a whole life takes some 50 ms.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often is looked.
const POLL: Duration = Duration::from_millis(2);

struct Lab {
    dir: tempfile::TempDir,
    config: LaunchConfig,
}

impl Lab {
    fn new(sidecar: &str, qemu: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path();
        fs::write(path.join("os-kernel"), "kernel").expect("a kernel");
        let image = BootImage::Prefix(path.join("os"));
        let sidecar = script(path, "sidecar.sh", sidecar);
        let mut config =
            LaunchConfig::new(image, "demo".into(), path.join("state"), path.join("api.sock"), sidecar);
        config.net = Net::Socket;
        config.qemu = Some(script(path, "qemu.sh", qemu));
        config.accel = Accel::Tcg;
        Self { dir, config }
    }

    fn run(&self) -> Result<u8, LaunchError> {
        run(&self.config, |_| {})
    }

    /// Runs in a thread of its own, waits until QEMU has begun, and does `then` with the thread and QEMU's pid.
    fn run_and(self, then: impl FnOnce(&Self, Pthread)) -> Result<u8, LaunchError> {
        let (tell, told) = mpsc::channel();
        let config = self.config.clone();
        let running = thread::spawn(move || {
            tell.send(pthread_self()).expect("the test waits for it");
            run(&config, |_| {})
        });
        let launcher = told.recv().expect("the thread has begun");
        self.await_note("qemu");
        then(&self, launcher);
        let start = Instant::now();
        while !running.is_finished() {
            assert!(start.elapsed() < PATIENCE, "the launcher does not end");
            thread::sleep(POLL);
        }
        running.join().expect("the launcher does not panic")
    }

    fn await_note(&self, name: &str) -> String {
        await_file(&self.dir.path().join(name))
    }

    fn pid(&self, name: &str) -> Pid {
        Pid::from_raw(self.await_note(name).parse().expect("a pid"))
    }

    fn has_note(&self, name: &str) -> bool {
        self.dir.path().join(name).exists()
    }
}

fn await_file(path: &Path) -> String {
    let start = Instant::now();
    loop {
        if let Ok(text) = fs::read_to_string(path) {
            return text.trim().to_owned();
        }
        assert!(start.elapsed() < PATIENCE, "no {}", path.display());
        thread::sleep(POLL);
    }
}

fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    let text = format!("{PRELUDE}{body}").replace("$DIR", &dir.display().to_string());
    fs::write(&path, text).expect("a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it may run");
    path
}

fn signal(launcher: Pthread, signal: Signal) {
    pthread_kill(launcher, signal).expect("the launcher's thread is there");
}

fn is_alive(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

#[test]
fn a_vm_that_powers_off_ends_the_network_and_answers_0() {
    let lab = Lab::new(GOOD_SIDECAR, "note qemu $$; exit 0");
    assert_eq!(lab.run().expect("a clean end"), 0);
    assert_eq!(lab.await_note("sidecar-ended"), "SIGTERM");
    assert!(!is_alive(lab.pid("sidecar")));
}

#[test]
fn sigterm_presses_the_power_button() {
    let lab = Lab::new(GOOD_SIDECAR, GOOD_QEMU);
    assert_eq!(lab.run_and(|_, launcher| signal(launcher, Signal::SIGTERM)).expect("a clean end"), 0);
}

#[test]
fn a_guest_that_does_not_power_off_is_killed_at_the_deadline() {
    let mut lab = Lab::new(GOOD_SIDECAR, DEAF_QEMU);
    lab.config.stop_timeout = Duration::from_millis(200);
    let error = lab.run_and(|_, launcher| signal(launcher, Signal::SIGINT)).expect_err("it had to be killed");
    assert!(error.to_string().contains("0.2 s (--stop-timeout"), "{error}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn a_second_signal_does_not_wait_for_the_deadline() {
    let mut lab = Lab::new(GOOD_SIDECAR, DEAF_QEMU);
    lab.config.stop_timeout = Duration::from_secs(1000);
    let twice = |_: &Lab, launcher| {
        signal(launcher, Signal::SIGTERM);
        signal(launcher, Signal::SIGINT);
    };
    let error = lab.run_and(twice).expect_err("it was killed");
    assert!(matches!(error, LaunchError::Killed(_)), "{error}");
}

#[test]
fn a_qemu_that_fails_is_told_with_its_last_words_and_its_code() {
    let lab = Lab::new(GOOD_SIDECAR, "echo 'qemu: could not load kernel' >&2; exit 3");
    let error = lab.run().expect_err("QEMU failed");
    assert!(error.to_string().contains("could not load kernel"), "{error}");
    assert_eq!(error.exit_code(), 3);
    assert!(!is_alive(lab.pid("sidecar")));
}

#[test]
fn a_network_that_dies_takes_the_vm_with_it_and_says_why() {
    let lab =
        Lab::new(&GOOD_SIDECAR.replace("note sidecar $$", "echo panicked >&2; note sidecar $$"), GOOD_QEMU);
    let error = lab
        .run_and(|lab, _| kill(lab.pid("sidecar"), Signal::SIGKILL).expect("it is there"))
        .expect_err("the network died");
    let text = error.to_string();
    assert!(text.contains("SIGKILL") && text.contains("panicked"), "{text}");
}

#[test]
fn sigquit_kills_at_once() {
    let mut lab = Lab::new(GOOD_SIDECAR, DEAF_QEMU);
    lab.config.stop_timeout = Duration::from_secs(1000);
    let error = lab.run_and(|_, launcher| signal(launcher, Signal::SIGQUIT)).expect_err("it was killed");
    assert!(matches!(&error, LaunchError::Killed(why) if why.contains("SIGQUIT")), "{error}");
}

#[test]
fn a_share_whose_server_dies_takes_the_vm_with_it_and_says_why() {
    let mut lab = Lab::new(GOOD_SIDECAR, GOOD_QEMU);
    let server = "[ \"$1\" = --help ] && { echo --shared-dir; exit; }; echo 'no such directory' >&2; note virtiofsd $$; exec sleep 1000";
    lab.config.virtiofsd = Some(script(lab.dir.path(), "virtiofsd.sh", server));
    lab.config.shares = vec![format!("{},tag=code", lab.dir.path().display()).parse().expect("a share")];
    let error = lab
        .run_and(|lab, _| kill(lab.pid("virtiofsd"), Signal::SIGKILL).expect("it is there"))
        .expect_err("the share died");
    let text = error.to_string();
    assert!(text.contains("virtiofsd of code") && text.contains("no such directory"), "{text}");
}

#[test]
fn how_it_ended_is_noted_in_the_state_directory() {
    let lab = Lab::new(GOOD_SIDECAR, "echo oops >&2; exit 3");
    lab.run().expect_err("QEMU failed");
    let note = fs::read_to_string(lab.dir.path().join("state/end")).expect("a note");
    assert!(note.starts_with("3 QEMU ended") && note.contains("oops"), "{note}");
}

#[test]
fn without_a_network_card_there_is_no_sidecar() {
    let mut lab = Lab::new(GOOD_SIDECAR, "note qemu $$; exit 0");
    lab.config.net = Net::None;
    assert_eq!(lab.run().expect("a clean end"), 0);
    assert!(!lab.has_note("sidecar"));
}

#[test]
fn a_network_that_does_not_start_is_told_with_its_own_words_and_no_vm_starts() {
    let lab = Lab::new("echo 'bad spec \"22:x\": …' >&2; exit 2", GOOD_QEMU);
    let error = lab.run().expect_err("the sidecar refused");
    assert!(error.to_string().contains("bad spec"), "{error}");
    assert_eq!(error.exit_code(), 2);
    assert!(!lab.has_note("qemu"));
}

#[test]
fn what_is_wrong_is_told_before_anything_starts() {
    type Change = fn(&mut LaunchConfig);
    let wrong: [(&str, Change); 5] = [
        ("kernel", |config| config.image = BootImage::Prefix("/nonexistent/os".into())),
        ("--qemu: /nonexistent/qemu", |config| config.qemu = Some("/nonexistent/qemu".into())),
        ("letters, digits", |config| config.name = "a,mtu=1".into()),
        ("--cpus 1", |config| config.cpus = 0),
        ("--mem 256", |config| config.mem_mib = 0),
    ];
    for (words, change) in wrong {
        let mut lab = Lab::new(GOOD_SIDECAR, GOOD_QEMU);
        change(&mut lab.config);
        let error = lab.run().expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
        assert!(!lab.has_note("sidecar") && !lab.has_note("qemu"), "{words}: something was started");
    }
}

/// Not a test by itself: the launcher that `a_killed_launcher_leaves_nothing_behind` kills.
#[test]
#[ignore = "is started by a_killed_launcher_leaves_nothing_behind"]
fn launcher_to_be_killed() {
    let dir = PathBuf::from(std::env::var_os("LAB").expect("the test that starts this gives it"));
    let image = BootImage::Prefix(dir.join("os"));
    let mut config =
        LaunchConfig::new(image, "demo".into(), dir.join("state"), dir.join("api"), dir.join("sidecar.sh"));
    config.qemu = Some(dir.join("qemu.sh"));
    config.net = Net::Socket;
    let _ = run(&config, |_| {});
}

#[test]
fn a_killed_launcher_leaves_nothing_behind() {
    let lab = Lab::new(GOOD_SIDECAR, DEAF_QEMU);
    let mut launcher = std::process::Command::new(std::env::current_exe().expect("this test's own path"))
        .args(["--exact", "launcher_to_be_killed", "--ignored"])
        .env("LAB", lab.dir.path())
        .spawn()
        .expect("it starts");
    let (sidecar, qemu) = (lab.pid("sidecar"), lab.pid("qemu"));
    launcher.kill().expect("it is there");
    launcher.wait().expect("it ends");
    let start = Instant::now();
    // Orphans are reaped by pid 1, or stay zombies where pid 1 is nobody's mother: what counts is that they ended.
    while [sidecar, qemu].into_iter().any(runs) {
        assert!(start.elapsed() < PATIENCE, "left behind: sidecar {} qemu {}", runs(sidecar), runs(qemu));
        thread::sleep(POLL);
    }
}

/// Whether a process is there and is no zombie.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}
