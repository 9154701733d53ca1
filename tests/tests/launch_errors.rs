//! `portway run` asked for what cannot be: one line that names the option, the value and what to do, before anything starts,
//! and nothing left behind. The table has every option that `portway run --help` has.
//!
//! Needs QEMU (`tests/setup.sh`), for what only QEMU knows; without it the tests are skipped, with a line that says so.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portway_tests::launch::{cli, has_qemu, path, processes, said, tree};
use portway_tests::vm::guest_image;

/// Options that no case of the table has, and why.
const EXEMPT: [(&str, &str); 3] = [
    ("--help", "it starts nothing"),
    ("--detach", "a flag that goes with everything; launch_life.rs has its failures"),
    ("--qemu-arg", "QEMU's own, who says himself what is wrong with it: the test below"),
];

/// Words of `run` (without the image), and what the line has to say.
type Case<'a> = (&'a [&'a str], &'a str);

/// The options of `portway run --help`.
fn options(dir: &Path) -> Result<BTreeSet<String>> {
    let help = said(&cli(dir, &["run", "--help"])?);
    let words = help.lines().filter_map(|line| {
        let line = line.trim_start();
        let at = if line.starts_with("--") { 0 } else { line.find(", --").filter(|at| *at == 2)? + 2 };
        line.get(at..)?.split([' ', '=']).next().map(str::to_owned)
    });
    Ok(words.filter(|word| word.len() > 2).collect())
}

/// Runs each case and looks at what it says and what is there afterwards. A control socket's directory is made to know its path.
fn all_refused(dir: &Path, cases: &[Case<'_>], image: &[&str]) -> Result<()> {
    let files =
        || -> Result<Vec<_>> { Ok(tree(dir)?.into_iter().filter(|p| !p.ends_with("portway")).collect()) };
    let before = files()?;
    for (words, expected) in cases {
        let out = cli(dir, &[&["run"], *words, image].concat())?;
        let text = said(&out);
        ensure!(matches!(out.status.code(), Some(1 | 2)), "{words:?}: {}: {text}", out.status);
        ensure!(text.contains(expected), "{words:?} does not say {expected:?}: {text}");
        ensure!(text.trim_end().lines().count() == 1, "{words:?}: more than one line: {text}");
        ensure!(files()? == before, "{words:?} left something behind: {:?}", files()?);
        ensure!(processes(dir)?.is_empty(), "{words:?} left {:?}", processes(dir)?);
    }
    Ok(())
}

#[test]
fn every_options_bad_value_is_named_with_the_option_before_anything_starts() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| path(dir.path(), name);
    fs::write(at("text"), "hello")?;
    fs::write(at("gz-kernel"), b"\x1f\x8b\x08")?;
    fs::write(at("empty-kernel"), b"")?;
    fs::create_dir(at("empty"))?;
    fs::create_dir(at("ci"))?;
    fs::write(at("ci/user-data"), "")?;
    fs::create_dir(at("ci/deep"))?;
    fs::write(at("vmdk"), b"KDMV")?;
    fs::write(at("good.ign"), "{}")?;
    fs::write(at("qcow2"), b"QFI\xfb\0\0\0\x03")?;
    let guest = guest_image()?;
    // A good image, so that nothing but the case is wrong.
    for suffix in ["kernel", "initrd.img", "cmdline"] {
        symlink(fs::canonicalize(format!("{}-{suffix}", guest.display()))?, at(&format!("os-{suffix}")))?;
    }
    let (image, text, empty, ci) = (at("os"), at("text"), at("empty"), at("ci"));
    let (gz, vmdk, no_version, qcow2) = (at("gz"), at("vmdk"), at("good.ign"), at("qcow2"));
    let (kernel, twice) = (at("os-kernel"), format!("{},size=1M", at("new.raw")));
    let (long, deep) = (format!("unix:/tmp/{}", "a".repeat(200)), "n".repeat(100));
    let as_raw = format!("{},format=raw", at("named.qcow2"));
    fs::write(at("named.qcow2"), b"QFI\xfb\0\0\0\x03")?;
    // What a guest may have written to its raw disk: a disk on top of a file of the host.
    let mut header = b"QFI\xfb\0\0\0\x02\0\0\0\0\0\0\0\x40".to_vec();
    header.resize(4096, 0);
    fs::write(at("backed"), header)?;
    let (backed, fifo) = (at("backed"), at("fifo"));
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU)?;
    let image = image.as_str();

    // What boots.
    let boot: [Case<'_>; 22] = [
        (&[], "IMAGE"),
        (&[&backed], "on top of another file"),
        (&["--kernel", &fifo], "not a file"),
        (&["--kernel", &kernel, "--initrd", &fifo], "not a file"),
        (&[&text], "neither an ISO"),
        (&[&vmdk], "qemu-img convert"),
        (&[&kernel], "--kernel"),
        (&[&at("empty")], "empty-kernel: it is empty"),
        (&["/nonexistent/os"], "/nonexistent/os-kernel"),
        (&["--kernel", "/nonexistent/k"], "/nonexistent/k"),
        (&["--kernel", &kernel, image], "cannot be used with"),
        (&["--kernel", &kernel, "--initrd", "/nonexistent/i"], "/nonexistent/i"),
        (&["--cmdline", "quiet", image], "--cmdline goes with --kernel"),
        (&["--initrd", &text, image], "--initrd goes with --kernel"),
        (&["--squashfs", image], "os-squashfs.img"),
        (&["--squashfs", "--iso", image], "cannot be used with"),
        (&["--iso", &text], "not an ISO 9660"),
        (&["--uefi", image], "--uefi"),
        (&["--uefi", "--kernel", &kernel], "cannot be used with"),
        (&["--fw", "/nonexistent/fw", image], "--fw /nonexistent/fw"),
        (&["--arch", "riscv64", image], "x86_64, aarch64"),
        (&["--arch", "aarch64", &gz], "flat Image"),
    ];
    all_refused(dir.path(), &boot, &[])?;

    let machine: [Case<'_>; 49] = [
        (&["--disk", &backed], "on top of another file"),
        (&["--disk", &fifo], "neither a file nor a block device"),
        (&["--disk", "/dev/null"], "neither a file nor a block device"),
        (&["--arch", "aarch64"], "--arch x86_64"),
        (&["--cpus", "0"], "from 1 to 255"),
        (&["--cpus", "many"], "--cpus"),
        (&["--mem", "1"], "such as 1024"),
        (&["--mem", "4294967295"], "this host has"),
        (&["--accel", "hvf"], "--accel hvf"),
        (&["--accel", "fast"], "auto, kvm, hvf, tcg"),
        (&["--disk", "size=0"], "size=0"),
        (&["--disk", "/nonexistent/d"], "--disk /nonexistent/d"),
        (&["--disk", "/nonexistent/d,size=1G"], "its directory is not there"),
        (&["--disk", "a,cache=none"], "cache=none"),
        (&["--disk", &as_raw], "would be destroyed"),
        (&["--disk", &empty], "a directory"),
        (&["--disk", &twice, "--disk", &twice], "cannot be two disks"),
        (&["--data-file", "/nonexistent/f"], "--data-file /nonexistent/f"),
        (&["--data", "a", "--data-file", "b"], "--data-file"),
        (&["--cloud-init", "/nonexistent"], "--cloud-init /nonexistent"),
        (&["--cloud-init", &empty], "user-data"),
        (&["--cloud-init", &ci], "deep is a directory"),
        (&["--ignition", &text], "not JSON"),
        (&["--ignition", &no_version], "no ignition.version"),
        (&["--virtiofs", "/nonexistent"], "--virtiofs /nonexistent"),
        (&["--virtiofs", "/tmp,ro"], "tag="),
        (&["--virtiofs", "/tmp,tag=a", "--virtiofs", "/,tag=a"], "the tag a"),
        (&["--virtiofs", "/tmp", "--virtiofsd", "/nonexistent"], "--virtiofsd: /nonexistent"),
        (&["--virtiofs", "/tmp", "--virtiofsd", "/bin/true"], "no virtiofsd"),
        (&["--virtiofsd", "/bin/true"], "--virtiofs DIR"),
        (&["--device", "no-such-device"], "QEMU has no device no-such-device"),
        (&["--device", "virtio-rng-pci,colour=red"], "no property \"colour\""),
        (&["--qemu", "/nonexistent/qemu"], "--qemu: /nonexistent/qemu"),
        (&["--qemu", &text], "chmod +x"),
        (&["--qemu", "/bin/true"], "/bin/true is not QEMU"),
        (&["--hypervisor", "xen"], "qemu, vfkit"),
        (&["--vfkit", "/nonexistent/vfkit"], "--vfkit: /nonexistent/vfkit"),
        (&["--hypervisor", "qemu", "--vfkit", "/bin/true"], "leave --vfkit out"),
        (&["--vfkit", "/bin/true", "--qemu", "/bin/true"], "leave --qemu out"),
        (&["--vfkit", "/bin/true", "--disposable"], "--disposable cannot be had with vfkit"),
        (&["--vfkit", "/bin/true", "--net", "vhost-user"], "--net cannot be had with vfkit"),
        (&["--vfkit", "/bin/true", "--accel", "kvm"], "--accel cannot be had with vfkit"),
        (&["--vfkit", "/bin/true", "--mtu", "9000"], "--mtu cannot be had with vfkit"),
        (&["--vfkit", "/bin/true", "--disk", &qcow2], "qemu-img convert -O raw"),
        (&["--name", "a,b"], "--name \"a,b\""),
        (&["--state-dir", &text], "it is not a directory"),
        (&["--state-dir", "/proc/nonexistent"], "cannot make it"),
        (&["--stop-timeout", "soon"], "such as 30"),
        (&["--stop-timeout", "86401"], "from 0 to 86400"),
    ];
    all_refused(dir.path(), &machine, &[image])?;

    let network: [Case<'_>; 39] = [
        (&["-publish", "99999:22"], "99999:22"),
        (&["-p", "80:81:junk:x"], "80:81:junk:x"),
        (&["-publish", "2222:22", "-publish", "2222:23"], "given twice"),
        (&["--net", "none", "-publish", "2222:22"], "--publish 2222:22"),
        (&["--net", "wire"], "vhost-user"),
        (&["--networking", "nat"], "\"nat\""),
        (&["--networking", "tap,"], "tap,"),
        (&["--networking", "none", "--net", "socket"], "cannot be used with"),
        (&["--networking", "tap,tap0", "--mtu", "1500"], "--mtu 1500"),
        (&["--mac", "01:00:5e:00:00:01"], "01:00:5e:00:00:01"),
        (&["--mac", "00:00:00:00:00:00"], "00:00:00:00:00:00"),
        (&["--mac", "52:54:00"], "52:54:00:12:34:56"),
        (&["--net", "none", "--mac", "52:54:00:00:00:01"], "--mac 52:54:00:00:00:01"),
        (&["--ip", "300.1.1.1"], "300.1.1.1"),
        (&["--ip", "10.0.0.1"], "--ip: 10.0.0.1 is not in the subnet"),
        (&["--ip", "192.168.127.1"], "--ip: 192.168.127.1 is the network's own"),
        (&["--net", "none", "--ip", "192.168.127.9"], "--ip 192.168.127.9"),
        (&["--mtu", "100"], "from 576 to 65535"),
        (&["--vsock", "maybe"], "on, off"),
        (&["--net", "none", "--vsock", "on"], "--vsock on"),
        (&["--vsock-ports", "0"], "such as 2374"),
        (&["--vsock-ports", "4294967295"], "such as 2374"),
        (&["--vsock-ports", "1,1"], "port 1 is given twice"),
        (&["--vsock-ports", "2374", "--vsock", "off"], "--vsock-ports 2374"),
        (&["--network", ""], "--network \"\""),
        (&["--network", "a b"], "--network \"a b\""),
        (&["--network", "../up"], "--network \"../up\""),
        (&["--network", &deep], "at most 40"),
        (&["--network", "dev", "--net", "none"], "--network dev"),
        (&["--api", "/run/a.sock"], "unix:PATH"),
        (&["--api", "unix:/nonexistent/a.sock"], "make it first"),
        (&["--api", &long], "bytes"),
        (&["--dns-upstream", "resolver"], "\"resolver\" is not IP[:PORT]"),
        (&["--dns-host", "a.test"], "\"a.test\" is not NAME=IP"),
        (&["--dns-ca", "/nonexistent/ca.pem"], "--dns-ca /nonexistent/ca.pem"),
        (&["--guest-socket", "/only-one"], "--guest-socket"),
        (&["--guest-binds", "nowhere"], "--guest-binds"),
        (&["--config", "/nonexistent/config.toml"], "/nonexistent/config.toml"),
        (&["--wait", "--net", "none"], "--wait"),
    ];
    all_refused(dir.path(), &network, &[image])?;

    let named: BTreeSet<&str> =
        [&boot[..], &machine, &network].concat().iter().flat_map(|(words, _)| words.to_vec()).collect();
    let covered = |option: &str| named.contains(option) || EXEMPT.iter().any(|(exempt, _)| *exempt == option);
    let options = options(dir.path())?;
    ensure!(options.len() > 40, "the help has other words than this test reads: {options:?}");
    // LinuxKit's one dash, and one letter, are the same option.
    let missing: Vec<_> = options
        .iter()
        .filter(|option| !covered(option) && !named.contains(option.trim_start_matches('-')))
        .filter(|option| !named.contains(option[1..].trim()))
        .collect();
    ensure!(missing.is_empty(), "no case has a bad value of {missing:?}");
    Ok(())
}

#[test]
fn what_qemu_refuses_by_itself_is_told_in_its_words_and_leaves_nothing() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (image, state) = (guest_image()?.display().to_string(), path(dir.path(), "state"));
    for words in [["--qemu-arg", "--nonsense"], ["--device", "virtio-rng-pci,addr=nowhere"]] {
        let out = cli(dir.path(), &[&["run", "--state-dir", &state][..], &words, &[&image]].concat())?;
        ensure!(out.status.code() == Some(1), "{words:?}: {}", said(&out));
        let wrong = words[1].rsplit('=').next().context("a word")?;
        ensure!(said(&out).contains("QEMU ended") && said(&out).contains(wrong), "{words:?}: {}", said(&out));
        ensure!(processes(dir.path())?.is_empty(), "{words:?} left {:?}", processes(dir.path())?);
        let left = portway_tests::launch::sockets(dir.path())?;
        ensure!(left.is_empty(), "{words:?} left {left:?}");
    }
    Ok(())
}

#[test]
fn a_port_in_use_ends_the_run_before_the_vm_starts() -> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (image, state) = (guest_image()?.display().to_string(), path(dir.path(), "state"));
    let taken = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let port = taken.local_addr()?.port();
    let spec = format!("{port}:22");
    let out = cli(dir.path(), &["run", "--state-dir", &state, "-publish", &spec, &image])?;
    ensure!(
        out.status.code() == Some(1) && said(&out).contains(&format!("127.0.0.1:{port}")),
        "{}: {}",
        out.status,
        said(&out)
    );
    ensure!(!Path::new(&path(dir.path(), "state/vm.log")).exists(), "the VM was started");
    ensure!(processes(dir.path())?.is_empty(), "{:?}", processes(dir.path())?);
    let left = portway_tests::launch::sockets(dir.path())?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn what_may_be_meant_by_an_image_is_an_error_that_names_the_files_or_a_line_that_says_what_boots()
-> Result<()> {
    if !has_qemu() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let at = |name: &str| path(dir.path(), name);
    let make = |name: &str| -> Result<()> {
        Ok(Command::new("truncate").args(["-s", "1M", &at(name)]).status().map(drop)?)
    };
    make("two.iso")?;
    make("two.qcow2")?;
    make("both-kernel")?;
    make("both")?;
    all_refused(
        dir.path(),
        &[(&[&at("two")], "ambiguous: it may be"), (&[&at("both")], "ambiguous: it is a file, and")],
        &[],
    )
}
