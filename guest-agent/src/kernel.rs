//! What a guest's user space needs of the kernel: file systems and modules.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};

use crate::console::say;

/// Modules to load, one path a line, in order.
const MODULES: &str = "/etc/portway/modules";

/// Source, where to, options: what every Linux user space expects to find mounted.
const MOUNTS: [(&str, &str, &str, &str); 7] = [
    ("proc", "proc", "/proc", ""),
    ("sysfs", "sysfs", "/sys", ""),
    ("devtmpfs", "devtmpfs", "/dev", "mode=0755"),
    ("devpts", "devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666"),
    ("tmpfs", "shm", "/dev/shm", "mode=1777"),
    ("tmpfs", "run", "/run", "mode=0755"),
    ("tmpfs", "tmp", "/tmp", "mode=1777,size=75%"),
];

/// Mounts the kernel's file systems. One that fails is reported and the rest still come: a guest that boots half
/// way says more than one that does not boot.
pub(crate) fn mount_all() {
    for (kind, source, target, options) in MOUNTS {
        let made = fs::create_dir_all(target);
        let mounted = mount(
            Some(source),
            target,
            Some(kind),
            MsFlags::MS_NOSUID,
            (!options.is_empty()).then_some(options),
        );
        match (made, mounted) {
            // EBUSY: the kernel mounted it already (CONFIG_DEVTMPFS_MOUNT).
            (_, Ok(()) | Err(Errno::EBUSY)) => {}
            (made, Err(errno)) => {
                let why = made.err().map_or_else(|| errno.to_string(), |error| error.to_string());
                say(&format!("cannot mount {kind} on {target}: {why}"));
            }
        }
    }
}

/// Loads the modules of `/etc/portway/modules`; a kernel with everything built in has no such file.
pub(crate) fn load_modules() {
    let list = match fs::read_to_string(MODULES) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return say(&format!("cannot read {MODULES}: {error}")),
    };
    for path in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Err(error) = load(Path::new(path)) {
            say(&format!("cannot load module {path}: {error}"));
        }
    }
}

fn load(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match finit_module(&file, &CString::default(), ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
