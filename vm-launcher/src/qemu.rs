//! QEMU's command line, for 7.2 (Debian 12) and newer.
//!
//! The link is the inherited end of a socketpair (`-netdev stream,addr.type=fd`), and so is QMP: no paths, which
//! have length limits and permissions. The console is the serial port on stdio; Ctrl-A x ends QEMU, as its own
//! `-nographic` has it.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::image::Boot;
use crate::sidecar::Link;
use crate::state::Mac;
use crate::{LaunchConfig, LaunchError};

/// What connects QEMU with the sidecar and with us.
#[derive(Debug, Clone)]
pub(crate) struct Wires {
    pub(crate) link: Link,
    /// Inherited.
    pub(crate) qmp: RawFd,
}

/// The machine QEMU has for this host's architecture.
struct Machine {
    program: &'static str,
    kind: &'static str,
}

const MACHINE: Machine = if cfg!(target_arch = "aarch64") {
    Machine { program: "qemu-system-aarch64", kind: "virt" }
} else {
    Machine { program: "qemu-system-x86_64", kind: "q35" }
};

/// Finds QEMU: where it was said to be, else in `PATH`.
pub(crate) fn find(asked: Option<&Path>) -> Result<PathBuf, LaunchError> {
    match asked {
        Some(path) if path.is_file() => Ok(path.to_owned()),
        Some(path) => Err(LaunchError::NoQemu(format!("{} is not a file", path.display()))),
        None => in_path(&env::var_os("PATH").unwrap_or_default(), MACHINE.program)
            .ok_or_else(|| LaunchError::NoQemu(format!("no {} in PATH", MACHINE.program))),
    }
}

fn in_path(path: &OsStr, program: &str) -> Option<PathBuf> {
    env::split_paths(path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The arguments of QEMU.
pub(crate) fn arguments(
    config: &LaunchConfig,
    boot: &Boot,
    kvm: bool,
    mac: Mac,
    wires: &Wires,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |words: &[&OsStr]| args.extend(words.iter().map(OsString::from));
    let s = OsStr::new;
    // Nothing we did not ask for: no default devices, no configuration of the user's, no window.
    add(&[s("-nodefaults"), s("-no-user-config"), s("-display"), s("none")]);
    let shared = matches!(wires.link, Link::VhostUser(_));
    let machine =
        if shared { format!("{},memory-backend=ram", MACHINE.kind) } else { MACHINE.kind.to_owned() };
    add(&[s("-name"), s(&escaped(&config.name)), s("-machine"), s(&machine)]);
    match kvm {
        true => add(&[s("-accel"), s("kvm"), s("-cpu"), s("host")]),
        false => add(&[s("-accel"), s("tcg,thread=multi"), s("-cpu"), s("max")]),
    }
    add(&[s("-smp"), s(&config.cpus.to_string()), s("-m"), s(&format!("{}M", config.mem_mib))]);
    add(&[s("-kernel"), boot.kernel.as_os_str()]);
    if let Some(initrd) = &boot.initrd {
        add(&[s("-initrd"), initrd.as_os_str()]);
    }
    if !boot.cmdline.is_empty() {
        add(&[s("-append"), s(&boot.cmdline)]);
    }
    match &wires.link {
        Link::Socket(fd) => {
            add(&[s("-netdev"), s(&format!("stream,id=net0,server=off,addr.type=fd,addr.str={fd}"))]);
        }
        Link::VhostUser(path) => {
            // The sidecar maps the guest's memory: it has to be a file, if one without a name.
            let memory = format!("memory-backend-memfd,id=ram,size={}M,share=on", config.mem_mib);
            add(&[s("-object"), s(&memory)]);
            let socket = format!("socket,id=link,path={}", escaped(&path.to_string_lossy()));
            add(&[s("-chardev"), s(&socket), s("-netdev"), s("vhost-user,id=net0,chardev=link")]);
        }
    }
    // romfile=: nobody boots from the network here, and the option ROM is a package of its own.
    let device = format!("virtio-net-pci,netdev=net0,mac={mac},host_mtu={},romfile=", config.mtu);
    add(&[s("-device"), s(&device)]);
    add(&[s("-chardev"), s("stdio,id=console,mux=on,signal=off")]);
    add(&[s("-serial"), s("chardev:console"), s("-mon"), s("chardev=console,mode=readline")]);
    add(&[s("-chardev"), s(&format!("socket,id=qmp,fd={}", wires.qmp))]);
    add(&[s("-mon"), s("chardev=qmp,mode=control")]);
    args.extend(config.qemu_args.iter().cloned());
    args
}

/// A comma in a value is written twice in QEMU's options.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BootImage;

    fn config() -> LaunchConfig {
        let image = BootImage::Prefix("/images/demo".into());
        let mut config = LaunchConfig::new(image, "demo".into(), "/s".into(), "/a".into(), "/p".into());
        config.cpus = 2;
        config.mem_mib = 512;
        config
    }

    fn boot() -> Boot {
        Boot {
            kernel: "/images/demo-kernel".into(),
            initrd: Some("/images/demo-initrd.img".into()),
            cmdline: "console=ttyS0 quiet".into(),
        }
    }

    fn line(config: &LaunchConfig, boot: &Boot, kvm: bool) -> String {
        let mac = "52:00:00:00:00:07".parse().expect("a MAC");
        let wires = Wires { link: Link::Socket(5), qmp: 7 };
        let words = arguments(config, boot, kvm, mac, &wires);
        words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join("\n")
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_whole_command_line_under_tcg() {
        let expected = "-nodefaults\n-no-user-config\n-display\nnone\n-name\ndemo\n-machine\nq35\n\
            -accel\ntcg,thread=multi\n-cpu\nmax\n-smp\n2\n-m\n512M\n\
            -kernel\n/images/demo-kernel\n-initrd\n/images/demo-initrd.img\n-append\nconsole=ttyS0 quiet\n\
            -netdev\nstream,id=net0,server=off,addr.type=fd,addr.str=5\n\
            -device\nvirtio-net-pci,netdev=net0,mac=52:00:00:00:00:07,host_mtu=65520,romfile=\n\
            -chardev\nstdio,id=console,mux=on,signal=off\n\
            -serial\nchardev:console\n-mon\nchardev=console,mode=readline\n\
            -chardev\nsocket,id=qmp,fd=7\n-mon\nchardev=qmp,mode=control";
        assert_eq!(line(&config(), &boot(), false), expected);
    }

    #[test]
    fn vhost_user_shares_the_guests_memory() {
        let mac = "52:00:00:00:00:07".parse().expect("a MAC");
        let wires = Wires { link: Link::VhostUser("/run/a,b".into()), qmp: 7 };
        let words = arguments(&config(), &boot(), true, mac, &wires);
        let line = words.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ");
        for part in [
            ",memory-backend=ram ",
            "-object memory-backend-memfd,id=ram,size=512M,share=on -chardev socket,id=link,path=/run/a,,b \
             -netdev vhost-user,id=net0,chardev=link ",
            "host_mtu=65520",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn kvm_takes_the_hosts_cpu() {
        let line = line(&config(), &boot(), true);
        assert!(line.contains("-accel\nkvm\n-cpu\nhost"), "{line}");
    }

    #[test]
    fn what_is_absent_has_no_option_and_the_users_arguments_come_last() {
        let mut config = config();
        config.qemu_args = vec!["-snapshot".into()];
        config.name = "a,b".into();
        let bare = Boot { initrd: None, cmdline: String::new(), ..boot() };
        let line = line(&config, &bare, false);
        assert!(!line.contains("-initrd") && !line.contains("-append"), "{line}");
        assert!(line.contains("-name\na,,b\n") && line.ends_with("\n-snapshot"), "{line}");
    }

    #[test]
    fn a_missing_qemu_says_what_to_install() {
        let error = find(Some(Path::new("/nonexistent/qemu"))).expect_err("it is not there").to_string();
        assert!(error.contains("apt-get install qemu-system-x86"), "{error}");
        assert_eq!(in_path(OsStr::new("/nonexistent"), "qemu"), None);
    }
}
