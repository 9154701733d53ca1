//! The command lines of `docs/guide/hypervisors.md` that say `tested`, run as they stand there, each with a real guest.
//!
//! What is changed: host ports are free ones; TCG takes KVM's place, which not every machine of tests has; and the kernel is
//! told not to mind a late timer, as on a busy machine under TCG. Programs that need KVM or macOS have stand-ins with the same
//! command line and the same wire (`tests/guest/stand-in`, `tests/guest/vfkit`).

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use portway_tests::sidecar::until;
use portway_tests::vm::{guest_image, media, portway};

/// A guest under TCG takes some seconds to its lease; on a busy machine some more.
const BOOT: Duration = Duration::from_secs(120);
/// The guest's address on Ethernet in every block.
const MAC: &str = "52:54:00:00:00:01";

/// The block of the guide with this mark.
fn block(mark: &str) -> Result<String> {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/hypervisors.md");
    let text = fs::read_to_string(guide)?;
    let head = format!("tested={mark}\n");
    let (_, rest) = text.split_once(&head).with_context(|| format!("no block {head}"))?;
    let (block, _) = rest.split_once("```").context("a block that ends")?;
    Ok(block
        .replace("--publish 2222:22", "--publish 0:22")
        .replace("-accel kvm", "-accel tcg")
        .replace("console=ttyS0", "console=ttyS0 no_timer_check"))
}

/// A shell and all it has started; asked to end when dropped, for the traps it has set, and killed.
struct Shell(Child);

impl Drop for Shell {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.0.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGTERM);
            let _ = until(Duration::from_secs(5), || self.0.try_wait().is_ok_and(|ended| ended.is_some()));
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// Who is nobody, for programs that are not themselves as root.
const NOBODY: u32 = 65_534;

/// Programs that have a stand-in.
const STAND_INS: [&str; 7] =
    ["firecracker", "cloud-hypervisor", "krunkit", "limactl", "minikube", "socket_vmnet_client", "podman"];

/// A directory for `PATH` with the stand-ins under the names of what they stand for.
fn stand_ins(dir: &Path) -> Result<String> {
    let (bin, ours) = (dir.join("stand-ins"), Path::new(env!("CARGO_MANIFEST_DIR")).join("guest"));
    fs::create_dir(&bin)?;
    for name in STAND_INS {
        symlink(ours.join("stand-in"), bin.join(name))?;
    }
    symlink(ours.join("vfkit"), bin.join("vfkit"))?;
    Ok(bin.display().to_string())
}

/// Whether the guest's ssh server greets on a port of the host's.
fn greets(port: u16) -> bool {
    let greeting = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).and_then(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut greeting = [0; 4];
        stream.read_exact(&mut greeting).map(|()| greeting)
    });
    greeting.is_ok_and(|greeting| greeting == *b"SSH-")
}

/// Runs a script beside the guest's files, with `portway` and the stand-ins in its path, and waits until the guest has its lease
/// and its ssh server greets on the published port; on `ssh`, where that is known before.
fn runs(dir: &Path, script: &str, ssh: Option<u16>) -> Result<()> {
    runs_as(dir, script, ssh, None)
}

/// The same as another user.
fn runs_as(dir: &Path, script: &str, ssh: Option<u16>, user: Option<u32>) -> Result<()> {
    let image = guest_image()?;
    let image =
        fs::canonicalize(image.parent().context("a directory")?)?.join(image.file_name().context("a name")?);
    for (name, suffix) in [("vmlinuz", "kernel"), ("vmlinux", "kernel"), ("initrd.img", "initrd.img")] {
        symlink(format!("{}-{suffix}", image.display()), dir.join(name))?;
    }
    let program = fs::canonicalize(portway()?)?;
    let bin = program.parent().context("a directory")?.display().to_string();
    let path = format!("{}:{bin}:{}", stand_ins(dir)?, std::env::var("PATH").unwrap_or_default());
    let log = fs::File::create(dir.join("log"))?;
    let mut shell = Command::new("bash");
    shell.args(["-ec", script]).current_dir(dir).stdin(Stdio::null()).process_group(0);
    shell.env("PATH", path).env("SSH_PORT", ssh.unwrap_or_default().to_string());
    for variable in ["HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
        shell.env(variable, dir);
    }
    if let Some(user) = user {
        // Whoever of us looks first makes the directory of control sockets, and it has to be that user's.
        let sockets = dir.join("portway");
        fs::DirBuilder::new().mode(0o700).create(&sockets)?;
        for directory in [dir, &sockets] {
            chown(directory, Some(user), Some(user))?;
        }
        shell.uid(user).gid(user);
    }
    let _shell = Shell(shell.stdout(log.try_clone()?).stderr(log).spawn()?);
    let listing = |what: &str| {
        let mut cli = Command::new(&program);
        cli.args([what, "--format", "json"]).env("XDG_RUNTIME_DIR", dir);
        if let Some(user) = user {
            // Another user's control sockets are refused, to root too.
            cli.uid(user).gid(user);
        }
        cli.output()
            .ok()
            .and_then(|o| serde_json::from_slice::<serde_json::Value>(&o.stdout).ok())
            .unwrap_or_default()
    };
    let leased = || {
        let leases = listing("leases");
        leases[0]["mac"] == MAC && leases[0]["expires_in_s"].is_number()
    };
    let published = || u16::try_from(listing("ports")[0]["host_port"].as_u64()?).ok();
    let reached = || match ssh {
        Some(port) => greets(port),
        None => leased() && published().is_some_and(greets),
    };
    until(BOOT, reached).with_context(|| fs::read_to_string(dir.join("log")).unwrap_or_default())
}

/// QEMU's major version, where there is one.
fn qemu() -> Option<u32> {
    let out = Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

fn tested(mark: &str, needs: u32) -> Result<()> {
    let dir = tempfile::tempdir()?;
    match qemu() {
        Some(major) if major >= needs => runs(dir.path(), &block(mark)?, None),
        found => {
            eprintln!("SKIPPED: QEMU {needs} or newer is needed for {mark}, here is {found:?}");
            block(mark).map(drop)
        }
    }
}

#[test]
fn qemu_by_a_stream_socket() -> Result<()> {
    tested("qemu-stream", 7)
}

#[test]
fn qemu_by_datagrams() -> Result<()> {
    tested("qemu-dgram", 7)
}

#[test]
fn qemu_by_vhost_user() -> Result<()> {
    // See vm-launcher's `net` for what is wrong with older ones under TCG.
    tested("qemu-vhost-user", 8)
}

#[test]
fn cloud_hypervisor_by_vhost_user() -> Result<()> {
    tested("cloud-hypervisor", 8)
}

#[test]
fn firecracker_on_a_tap_in_a_namespace() -> Result<()> {
    tested("firecracker", 7)
}

#[test]
fn vfkit_by_datagrams() -> Result<()> {
    tested("vfkit", 7)
}

#[test]
fn lima_by_a_socket() -> Result<()> {
    tested("lima", 7)
}

#[test]
fn minikube_through_socket_vmnets_client() -> Result<()> {
    tested("minikube", 7)
}

/// A guest that boots its disk by UEFI, which is what krunkit has.
fn krunkit(mark: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    if qemu().is_none() || !Path::new("/usr/share/OVMF").exists() {
        eprintln!("SKIPPED: QEMU and OVMF are needed for {mark} (tests/setup.sh says what to install)");
        return block(mark).map(drop);
    }
    symlink(fs::canonicalize(media()?)?.join("efi.img"), dir.path().join("disk.raw"))?;
    runs(dir.path(), &block(mark)?, None)
}

#[test]
fn krunkit_by_datagrams() -> Result<()> {
    krunkit("krunkit-unixgram")
}

#[test]
fn krunkit_by_a_stream() -> Result<()> {
    krunkit("krunkit-unixstream")
}

#[test]
fn podman_machine_by_gvproxys_name() -> Result<()> {
    if qemu().is_none() {
        eprintln!("SKIPPED: no qemu-system-x86_64 in PATH (tests/setup.sh says what to install)");
        return block("podman").map(drop);
    }
    let dir = tempfile::tempdir()?;
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    runs(dir.path(), &block("podman")?, Some(port))
}

/// Creates the domain of a block under libvirt's daemon of one user, which it does not have for root: there it is nobody's.
fn libvirt(name: &str, link: &str) -> Result<()> {
    let domain = block(name)?;
    let found = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found("virsh") || !found("libvirtd") || qemu().is_none() {
        eprintln!("SKIPPED: virsh, libvirtd and QEMU are needed for libvirt");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("domain.xml"), domain)?;
    // virsh would start the daemon itself, and nobody would end it.
    let script = format!(
        "libvirtd & daemon=$!\n\
        portway serve --link {link}:unix:$PWD/vm.sock,name=vm --publish 0:22 & network=$!\n\
        trap 'virsh -c qemu:///session destroy portway-guide; kill $daemon $network' EXIT\n\
        trap exit TERM\n\
        until [ -S vm.sock ] && [ -S libvirt/libvirt-sock ]; do sleep 0.1; done\n\
        sed \"s|PWD|$PWD|g\" domain.xml > here.xml && virsh -c qemu:///session create here.xml\nwait"
    );
    let user = nix::unistd::geteuid().is_root().then_some(NOBODY);
    runs_as(dir.path(), &script, None, user)
}

#[test]
fn libvirt_by_stream() -> Result<()> {
    libvirt("libvirt-stream", "qemu")
}

#[test]
fn libvirt_by_vhost_user() -> Result<()> {
    if qemu().is_none_or(|major| major < 8) {
        eprintln!("SKIPPED: vhost-user under TCG needs QEMU 8 or newer");
        return Ok(());
    }
    libvirt("libvirt-vhost-user", "vhost-user")
}
