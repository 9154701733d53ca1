//! What a VM boots, and how that is found out from files.
//!
//! ```text
//! IMAGE ─┬─ a file ─► its content: CD · raw or qcow2 disk (media)                   ┐
//!        └─ a prefix ─► LinuxKit's names: PREFIX-kernel -initrd.img -cmdline        │
//!                       -squashfs.img · PREFIX.iso -efi.iso .qcow2 -bios.img …      ├─► Boot, each file opened once
//! --kernel --initrd --cmdline · --squashfs · --iso · --uefi · --fw: said, not found │
//!                                                          kernel · firmware checks ┘
//! ```
//! A kernel beside other images of the same prefix wins, since that is what `linuxkit build` makes by default, and the line
//! for the user says what else there was. Other ambiguities are errors that name the candidates.

mod firmware;
mod kernel;
mod media;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

pub(crate) use self::firmware::Firmware;
use self::media::{Entrance, Medium};
use crate::disk::{self, Format};
use crate::{Arch, LaunchError};

const PREFIX_ADVICE: &str = "IMAGE is the PREFIX of PREFIX-kernel, PREFIX-initrd.img and PREFIX-cmdline, as `linuxkit build` names them, or a disk or ISO file";
const FILE_ADVICE: &str = "give a file this user can read";

/// What a prefix may end in beside a kernel, as `linuxkit build` names its outputs.
const ENDINGS: [&str; 10] = [
    ".iso",
    "-efi.iso",
    "-bios.img",
    "-efi.img",
    ".qcow2",
    "-efi.qcow2",
    ".raw",
    "-bios.raw",
    "-efi.raw",
    ".img",
];

/// What the VM boots, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootImage {
    /// A file, or the common beginning of several files' names: what it is, is found out.
    Prefix(PathBuf),
    /// Kernel, initial RAM disk and command line, each by itself.
    Files {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The kernel's command line.
        cmdline: String,
    },
    /// LinuxKit's `PREFIX-kernel` with `PREFIX-squashfs.img` as its root on the first disk.
    Squashfs {
        /// The common beginning of the files' names.
        prefix: PathBuf,
        /// An initial RAM disk for a kernel that has virtio or squashfs in modules.
        initrd: Option<PathBuf>,
    },
    /// A CD: a file, or the prefix of one.
    Iso(PathBuf),
}

/// Further words about booting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked<'a> {
    pub(crate) image: &'a BootImage,
    pub(crate) arch: Arch,
    pub(crate) uefi: bool,
    /// Whether the hypervisor brings its firmware along, so that none is looked for.
    pub(crate) own_firmware: bool,
    pub(crate) firmware: Option<&'a Path>,
}

/// What the VM boots, checked: the files could be opened and are what they have to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Boot {
    /// A kernel that the hypervisor loads.
    Kernel {
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
        /// A squashfs for the first disk.
        root: Option<PathBuf>,
    },
    /// A CD that the firmware starts.
    Cd { iso: PathBuf, firmware: Firmware },
    /// A disk that the firmware starts.
    Disk { disk: PathBuf, format: Format, firmware: Firmware },
}

/// [`Boot`], and a line for the user when it was not plain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) boot: Boot,
    pub(crate) note: Option<String>,
}

impl Asked<'_> {
    /// Finds the files and opens each once, so that the hypervisor does not start only to fail.
    pub(crate) fn resolve(&self) -> Result<Found, LaunchError> {
        if self.uefi && matches!(self.image, BootImage::Files { .. } | BootImage::Squashfs { .. }) {
            return setting("--uefi goes with an ISO or a disk: a kernel is loaded without firmware");
        }
        let found = match self.image {
            BootImage::Prefix(path) => self.found(path)?,
            BootImage::Files { kernel, initrd, cmdline } => {
                plain(self.kernel(kernel, initrd.as_deref(), cmdline.clone(), None, FILE_ADVICE)?)
            }
            BootImage::Squashfs { prefix, initrd } => plain(self.squashfs(prefix, initrd.as_deref())?),
            BootImage::Iso(path) => self.iso(path)?,
        };
        if let (Boot::Kernel { .. }, Some(firmware)) = (&found.boot, self.firmware) {
            return setting(format!(
                "--fw {}: goes with an ISO or a disk: a kernel is loaded without firmware",
                firmware.display()
            ));
        }
        Ok(found)
    }

    /// A file, or a prefix.
    fn found(&self, path: &Path) -> Result<Found, LaunchError> {
        let kernel = with_suffix(path, "-kernel");
        let others = candidates(path);
        match (path.is_file(), kernel.is_file()) {
            (true, true) => setting(format!(
                "{}: ambiguous: it is a file, and {} is there too: for the kernel say --kernel {}, for the file remove or \
                 rename one of them",
                path.display(),
                kernel.display(),
                kernel.display()
            )),
            (true, false) => self.medium(path),
            (false, true) if self.uefi => match others.as_slice() {
                [] => setting(format!(
                    "--uefi goes with an ISO or a disk, and of {} there is only a kernel, which is loaded without firmware",
                    path.display()
                )),
                [one] => self.medium(one),
                many => Err(ambiguous(path, many)),
            },
            (false, true) => {
                let found = self.kernel_of(path)?;
                let more = (!others.is_empty()).then(|| {
                    format!(
                        "booting {}; there is also {}: name a file to boot that",
                        kernel.display(),
                        listed(&others)
                    )
                });
                Ok(Found { note: found.note.or(more), boot: found.boot })
            }
            (false, false) => match others.as_slice() {
                [one] => self.medium(one),
                [] => {
                    // The error of the kernel that is missing says what IMAGE is.
                    readable("kernel", &kernel, PREFIX_ADVICE)?;
                    self.kernel_of(path)
                }
                many => Err(ambiguous(path, many)),
            },
        }
    }

    /// The kernel of a prefix, with what goes with it.
    fn kernel_of(&self, prefix: &Path) -> Result<Found, LaunchError> {
        let kernel = with_suffix(prefix, "-kernel");
        let (initrd, root) = (with_suffix(prefix, "-initrd.img"), with_suffix(prefix, "-squashfs.img"));
        if !is_absent(&root) && is_absent(&initrd) {
            return Ok(plain(self.squashfs(prefix, None)?));
        }
        let note = (!is_absent(&root)).then(|| {
            format!("booting {}; {} is there too: --squashfs takes that", initrd.display(), root.display())
        });
        let initrd = (!is_absent(&initrd)).then_some(initrd);
        let boot = self.kernel(&kernel, initrd.as_deref(), cmdline(prefix)?, None, PREFIX_ADVICE)?;
        Ok(Found { boot, note })
    }

    fn squashfs(&self, prefix: &Path, initrd: Option<&Path>) -> Result<Boot, LaunchError> {
        let root = with_suffix(prefix, "-squashfs.img");
        readable("squashfs", &root, "`linuxkit build --format kernel+squashfs` makes it")?;
        let kernel = with_suffix(prefix, "-kernel");
        let mut cmdline = cmdline(prefix)?;
        if !cmdline.split_whitespace().any(|word| word.starts_with("root=")) {
            cmdline = format!("{cmdline} root=/dev/vda ro").trim_start().to_owned();
        }
        self.kernel(&kernel, initrd, cmdline, Some(root), PREFIX_ADVICE)
    }

    fn kernel(
        &self,
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: String,
        root: Option<PathBuf>,
        advice: &'static str,
    ) -> Result<Boot, LaunchError> {
        readable("kernel", kernel, advice)?;
        let fail = |reason: String| LaunchError::Kernel { path: kernel.to_owned(), reason };
        let head = kernel::head(kernel).map_err(|error| fail(error.to_string()))?;
        kernel::check(kernel, kernel::form(&head), self.arch).map_err(fail)?;
        if let Some(initrd) = initrd {
            readable("initrd", initrd, FILE_ADVICE)?;
        }
        Ok(Boot::Kernel { kernel: kernel.to_owned(), initrd: initrd.map(Path::to_owned), cmdline, root })
    }

    fn iso(&self, path: &Path) -> Result<Found, LaunchError> {
        let of_prefix = [with_suffix(path, ".iso"), with_suffix(path, "-efi.iso")];
        let there: Vec<PathBuf> = match path.is_file() {
            true => vec![path.to_owned()],
            false => of_prefix.iter().filter(|file| file.is_file()).cloned().collect(),
        };
        let iso = match there.as_slice() {
            [] => {
                readable(
                    "ISO",
                    path,
                    "--iso takes an ISO file, or the PREFIX of PREFIX.iso or PREFIX-efi.iso",
                )?;
                path
            }
            [one] => one,
            // LinuxKit's two: the one for the firmware that was asked for.
            [bios, efi, ..] => {
                if self.uefi {
                    efi
                } else {
                    bios
                }
            }
        };
        match look(iso)? {
            Medium::Iso(_) => self.medium(iso),
            _ => setting(format!("--iso {}: it is not an ISO 9660 file", iso.display())),
        }
    }

    /// A disk or a CD.
    fn medium(&self, path: &Path) -> Result<Found, LaunchError> {
        readable("image", path, FILE_ADVICE)?;
        let file = path.display();
        let boot = |entrance: Entrance| self.firmware_for(path, entrance);
        match look(path)? {
            Medium::Iso(entrance) => {
                let (firmware, note) = boot(entrance)?;
                Ok(Found { boot: Boot::Cd { iso: path.to_owned(), firmware }, note })
            }
            Medium::Disk(_, entrance) => {
                let format = disk::format_of(path, None)
                    .map_err(|reason| LaunchError::Setting(format!("{file}: {reason}")))?;
                let (firmware, note) = boot(entrance)?;
                Ok(Found { boot: Boot::Disk { disk: path.to_owned(), format, firmware }, note })
            }
            Medium::Foreign(format) => setting(format!(
                "{file}: it is a {format} disk, and only raw and qcow2 disks are booted: qemu-img convert -O qcow2 {file} \
                 {file}.qcow2"
            )),
            Medium::Kernel => {
                setting(format!("{file}: it is a kernel: --kernel {file}, with --initrd and --cmdline"))
            }
            Medium::Unknown => setting(format!(
                "{file}: it is neither an ISO, nor a qcow2 disk, nor a raw disk with a boot record, so nothing in it can be \
                 booted; {PREFIX_ADVICE}"
            )),
        }
    }

    /// The firmware for a medium, and why when nobody said it.
    fn firmware_for(
        &self,
        path: &Path,
        entrance: Entrance,
    ) -> Result<(Firmware, Option<String>), LaunchError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let by_name = name.contains("-efi.") && entrance == Entrance::Unknown;
        let only = entrance == Entrance::UefiOnly;
        let why = match () {
            () if self.own_firmware => {
                let firmware = self.firmware.map_or(Ok(Firmware::Default), firmware::by_name)?;
                return Ok((firmware, None));
            }
            () if self.uefi => None,
            () if self.arch == Arch::Aarch64 => Some(format!("UEFI: {} has no other firmware", self.arch)),
            () if only => Some(format!("UEFI: {} boots by nothing else", path.display())),
            () if by_name => Some(format!("UEFI: by the name of {}", path.display())),
            () => {
                // A firmware that is named, and no word of UEFI, is whatever it is.
                let firmware = self.firmware.map_or(Ok(Firmware::Default), firmware::by_name)?;
                return Ok((firmware, None));
            }
        };
        Ok((firmware::uefi(self.arch, self.firmware)?, why))
    }
}

fn plain(boot: Boot) -> Found {
    Found { boot, note: None }
}

fn setting<T>(text: impl Into<String>) -> Result<T, LaunchError> {
    Err(LaunchError::Setting(text.into()))
}

fn look(path: &Path) -> Result<Medium, LaunchError> {
    media::look(path).map_err(|error| LaunchError::Image {
        what: "image",
        path: path.to_owned(),
        reason: error.to_string(),
        advice: FILE_ADVICE,
    })
}

/// The images beside a kernel that a prefix may mean.
fn candidates(prefix: &Path) -> Vec<PathBuf> {
    let endings = ENDINGS.iter().map(|ending| with_suffix(prefix, ending));
    endings.filter(|file| file.is_file()).collect()
}

fn listed(files: &[PathBuf]) -> String {
    files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn ambiguous(prefix: &Path, files: &[PathBuf]) -> LaunchError {
    LaunchError::Setting(format!(
        "{}: ambiguous: it may be {}: name the file to boot, or say --iso",
        prefix.display(),
        listed(files)
    ))
}

/// The command line of a prefix; empty when there is none.
fn cmdline(prefix: &Path) -> Result<String, LaunchError> {
    let path = with_suffix(prefix, "-cmdline");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(LaunchError::Image {
            what: "command line",
            path,
            reason: error.to_string(),
            advice: FILE_ADVICE,
        }),
    }
}

/// Adds to the last part of a path, whatever dots it has.
fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(suffix);
    PathBuf::from(name)
}

fn is_absent(path: &Path) -> bool {
    matches!(fs::symlink_metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// A file that can be opened and has something in it.
pub(crate) fn readable(what: &'static str, path: &Path, advice: &'static str) -> Result<(), LaunchError> {
    let fail = |reason: String| LaunchError::Image { what, path: path.to_owned(), reason, advice };
    // Looked at before it is opened: a FIFO would wait for a writer.
    let metadata = fs::metadata(path).map_err(|error| fail(error.to_string()))?;
    match metadata.is_file() {
        true if metadata.len() == 0 => Err(fail("it is empty".into())),
        true => File::open(path).map(drop).map_err(|error| fail(error.to_string())),
        false => Err(fail("it is not a file".into())),
    }
}

#[cfg(test)]
mod tests;
