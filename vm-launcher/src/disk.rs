//! Disks: `[file=]PATH[,size=N[G|M]][,format=raw|qcow2]`, LinuxKit's grammar.
//!
//! A sized disk that is not there is made: raw ones sparse, by us; qcow2 by `qemu-img`. One that is there is used as it is.
//! Without a path a disk lies in the VM's state directory.
//!
//! What lies in a raw disk is the guest's word, its first bytes too: a guest may write a qcow2 header there that names any
//! file of the host as a part of the disk. So content is never all that decides: see [`format_of`].

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use nix::sys::signal::Signal;

use crate::sys::Privileges;
use crate::{LaunchError, sys};

const EXAMPLE: &str = "an example: --disk data.qcow2,size=4G";

/// How a disk's content lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's own format, which grows.
    Qcow2,
}

impl Format {
    /// As QEMU and the user write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A disk as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Where it is; `None`: in the state directory.
    pub path: Option<PathBuf>,
    /// Bytes, when it is to be made.
    pub size: Option<u64>,
    /// Its format; `None`: found out.
    pub format: Option<Format>,
}

/// A disk that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    pub(crate) read_only: bool,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut disk = Self { path: None, size: None, format: None };
        for (n, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                None | Some(("file", _)) if disk.path.is_some() => {
                    return Err(format!("{text:?} has two paths; {EXAMPLE}"));
                }
                Some(("file", path)) => disk.path = Some(path_of(path)?),
                Some(("size", size)) => disk.size = Some(bytes(size)?),
                Some(("format", "raw")) => disk.format = Some(Format::Raw),
                Some(("format", "qcow2")) => disk.format = Some(Format::Qcow2),
                Some(("format", other)) => return Err(format!("format={other}: raw or qcow2")),
                // LinuxKit's short form: the path comes first, without a key.
                None if n == 0 => disk.path = Some(path_of(part)?),
                _ => return Err(format!("{part:?} is not file=, size= or format=; {EXAMPLE}")),
            }
        }
        if disk.path.is_none() && disk.size.is_none() {
            return Err(format!("{text:?} has neither a path nor a size; {EXAMPLE}"));
        }
        Ok(disk)
    }
}

fn path_of(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err(format!("the path is empty; {EXAMPLE}")) } else { Ok(text.into()) }
}

/// `4G`, `512M`, and a bare number of GiB as LinuxKit has it.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        _ => (text, 30),
    };
    let fault = || format!("size={text}: a number of G or M from 1M to 65536G, such as 4G");
    let number: u64 = digits.parse().map_err(|_| fault())?;
    number.checked_shl(shift).filter(|n| *n > 0 && *n <= 1 << 46 && number <= 1 << 26).ok_or_else(fault)
}

impl DiskSpec {
    /// Where the disk is, or will be; the `n`th of the VM.
    fn place(&self, n: usize, state_dir: &Path) -> PathBuf {
        self.path
            .clone()
            .unwrap_or_else(|| state_dir.join(format!("disk{n}.{}", self.format.unwrap_or(Format::Raw))))
    }

    /// What can be known to be wrong before anything is made.
    ///
    /// The guest writes to it, unless the VM is `disposable`.
    pub(crate) fn check(&self, n: usize, state_dir: &Path, disposable: bool) -> Result<(), LaunchError> {
        let path = self.place(n, state_dir);
        let fail = |reason: String| LaunchError::Setting(format!("--disk {}: {reason}", path.display()));
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => Err(fail("it is a directory".into())),
            Ok(meta) if !is_disk(&meta) => Err(fail("it is neither a file nor a block device".into())),
            Ok(_) => {
                self.format_there(&path).map_err(fail)?;
                if disposable { Ok(()) } else { writable(&path).map_err(fail) }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
                if self.size.is_none() {
                    Err(fail("there is no such file; with size=4G it is made".into()))
                } else if self.path.is_some() && directory.is_some_and(|d| !d.is_dir()) {
                    Err(fail("its directory is not there: make it first".into()))
                } else if self.format == Some(Format::Raw) && is_called_qcow2(&path) {
                    Err(fail(
                        "a raw disk with a name that says qcow2 would be taken for one later: another name"
                            .into(),
                    ))
                } else if self.wanted_format(&path) == Format::Qcow2 && !has_qemu_img() {
                    Err(fail("qemu-img, which makes qcow2 disks, is missing: apt-get install qemu-utils, or format=raw".into()))
                } else {
                    Ok(())
                }
            }
            Err(error) => Err(fail(error.to_string())),
        }
    }

    fn wanted_format(&self, path: &Path) -> Format {
        let by_name = if is_called_qcow2(path) { Format::Qcow2 } else { Format::Raw };
        self.format.unwrap_or(by_name)
    }

    /// The format of a disk that is there: see [`format_of`]. One of ours in the state directory has the one of its name, and
    /// one that these words would have made raw is no other for what its guest has written.
    fn format_there(&self, path: &Path) -> Result<Format, String> {
        let format = format_of(path, self.format.or_else(|| self.path.is_none().then_some(Format::Raw)))?;
        let made_raw = self.size.is_some() && self.wanted_format(path) == Format::Raw;
        if made_raw && format == Format::Qcow2 {
            return Err(TURNED.into());
        }
        Ok(format)
    }

    /// What [`Self::prepare`] is about to do.
    pub(crate) fn what(&self, n: usize, state_dir: &Path) -> String {
        let path = self.place(n, state_dir);
        match self.size.filter(|_| !path.exists()) {
            Some(size) => format!("making {} ({} MiB)", path.display(), size >> 20),
            None => format!("looking at {}", path.display()),
        }
    }

    /// The format it has, or will have; `None` when it cannot be read.
    pub(crate) fn will_be(&self, n: usize, state_dir: &Path) -> Option<Format> {
        let path = self.place(n, state_dir);
        if path.exists() { self.format_there(&path).ok() } else { Some(self.wanted_format(&path)) }
    }

    /// The disk, made if it is not there. The answer's text is a line for the user. It is made under another name, which `half`
    /// is told first, so that a disk that is there is whole.
    pub(crate) fn prepare(
        &self,
        n: usize,
        state_dir: &Path,
        half: impl FnOnce(&Path),
    ) -> Result<(Disk, Option<String>), LaunchError> {
        let path = self.place(n, state_dir);
        let fail = |reason: String| LaunchError::Disk { path: path.clone(), reason };
        if path.exists() {
            let format = self.format_there(&path).map_err(fail)?;
            let note = self.size.filter(|size| capacity(&path, format).is_some_and(|has| has != *size)).map(
                |size| {
                    format!(
                        "{} is there already with another size than {} MiB: used as it is",
                        path.display(),
                        size >> 20
                    )
                },
            );
            return Ok((Disk { path, format, read_only: false }, note));
        }
        let size = self.size.ok_or_else(|| fail("it is gone".into()))?;
        let format = self.wanted_format(&path);
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        half(&new);
        let made = match format {
            Format::Raw => make_raw(&new, size).map_err(|error| error.to_string()),
            Format::Qcow2 => make_qcow2(&new, size),
        };
        let made = made.and_then(|()| fs::rename(&new, &path).map_err(|error| error.to_string()));
        if let Err(why) = made {
            // A file system that has no room for it must not keep a stump; the error told is the first.
            let _ = fs::remove_file(&new);
            return Err(fail(why));
        }
        let note = Some(format!("made {} ({format}, {} MiB)", path.display(), size >> 20));
        Ok((Disk { path, format, read_only: false }, note))
    }
}

/// A raw disk by all that the user says of it, and not by its content.
const TURNED: &str = "it was made as a raw disk, or is called one, and its first bytes are those of a qcow2 disk: a --disk has \
    format=raw if its guest has written them, and format=qcow2 if it is one";

/// The format of a disk that is there, or why it is not taken. `said` is what the user says of it.
///
/// Anything without qcow2's magic is raw, as QEMU has it too. A name `*.qcow2` and the content have to agree, for else a raw
/// disk of that name could become whatever its guest writes; and a disk on top of another file has to be called so, or
/// said to be one.
pub(crate) fn format_of(path: &Path, said: Option<Format>) -> Result<Format, String> {
    let head = header(path).map_err(|error| error.to_string())?;
    let is_qcow2 = head.starts_with(b"QFI\xfb");
    match (said, is_qcow2, is_called_qcow2(path)) {
        (Some(Format::Raw), true, true) => {
            Err("it is a qcow2 disk, and as raw its content would be destroyed: format=qcow2".into())
        }
        (Some(Format::Raw), _, _) => Ok(Format::Raw),
        (Some(Format::Qcow2), false, _) => Err("it is not a qcow2 disk: format=raw".into()),
        (None, false, true) => Err("it is not a qcow2 disk, as its name says: a raw one needs another name".into()),
        (None, true, false) if names_another_file(&head) => Err(
            "its first bytes are those of a qcow2 disk on top of another file of this host, and a guest can write such \
             bytes to a raw disk: a disk that is meant so is called NAME.qcow2, or is a --disk with format=qcow2; a raw one \
             has format=raw"
                .into(),
        ),
        (None, true, _) if path.extension().is_some_and(|e| e == "raw") => Err(TURNED.into()),
        (Some(Format::Qcow2), true, _) | (None, true, _) => Ok(Format::Qcow2),
        (None, false, false) => Ok(Format::Raw),
    }
}

/// Whether it may be written; nothing is.
pub(crate) fn writable(path: &Path) -> Result<(), String> {
    let opened = OpenOptions::new().write(true).open(path);
    opened.map(drop).map_err(|error| format!("it cannot be written: {error}; --disposable only reads it"))
}

/// A block device is a disk too.
fn is_disk(meta: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    meta.is_file() || meta.file_type().is_block_device()
}

fn is_called_qcow2(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "qcow2")
}

/// As much as a qcow2 header needs (QEMU docs/interop/qcow2.txt); less where there is less.
fn header(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    fs::File::open(path)?.take(80).read_to_end(&mut head)?;
    Ok(head)
}

/// A big-endian field of a header.
fn field<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..)?.first_chunk().copied()
}

/// Whether a qcow2 header names a backing file (its name's offset at 8), or a file of its data (bit 2 of the incompatible
/// features at 72, from version 3 on).
fn names_another_file(head: &[u8]) -> bool {
    let backing = field(head, 8).map_or(0, u64::from_be_bytes);
    let version = field(head, 4).map_or(0, u32::from_be_bytes);
    let features = field(head, 72).map_or(0, u64::from_be_bytes);
    backing != 0 || (version >= 3 && features & 1 << 2 != 0)
}

/// Bytes a guest sees, where they can be told.
fn capacity(path: &Path, format: Format) -> Option<u64> {
    match format {
        Format::Raw => fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|meta| meta.len()),
        // The virtual size stands at 24.
        Format::Qcow2 => field(&header(path).ok()?, 24).map(u64::from_be_bytes),
    }
}

/// A sparse file.
fn make_raw(path: &Path, size: u64) -> io::Result<()> {
    // One that is there is what a run that was killed, guard and all, has left.
    OpenOptions::new().write(true).create(true).truncate(true).open(path)?.set_len(size)
}

fn has_qemu_img() -> bool {
    crate::programs::in_path("qemu-img").is_some()
}

fn make_qcow2(path: &Path, size: u64) -> Result<(), String> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size.to_string()).stdin(Stdio::null());
    // It must not go on writing when the launcher is killed.
    sys::prepare(&mut command, Vec::new(), Signal::SIGKILL, Privileges::Never);
    match command.output() {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
        Err(error) => Err(format!("qemu-img: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> DiskSpec {
        text.parse().expect(text)
    }

    #[test]
    fn linuxkits_grammar_is_understood() {
        let (raw, qcow2) = (Some(Format::Raw), Some(Format::Qcow2));
        let disk =
            |path: Option<&str>, size, format| DiskSpec { path: path.map(PathBuf::from), size, format };
        assert_eq!(spec("d.img"), disk(Some("d.img"), None, None));
        assert_eq!(spec("file=d.img,size=1G"), disk(Some("d.img"), Some(1 << 30), None));
        assert_eq!(spec("d,size=2"), disk(Some("d"), Some(2 << 30), None));
        assert_eq!(spec("size=512M,format=qcow2"), disk(None, Some(512 << 20), qcow2));
        assert_eq!(spec("d,format=raw"), disk(Some("d"), None, raw));
    }

    #[test]
    fn bad_disks_are_refused_with_an_example() {
        for text in [
            "",
            "a,b",
            "a,file=b",
            "a,size=0",
            "a,size=-1",
            "a,size=1T",
            "a,size=99999999999G",
            "a,format=vmdk",
            "a,cache=none",
            "format=raw",
            "file=",
        ] {
            assert!(text.parse::<DiskSpec>().is_err(), "{text:?}");
        }
        let error = "a,cache=none".parse::<DiskSpec>().expect_err("no such key");
        assert!(error.contains("cache=none") && error.contains("an example"), "{error}");
    }

    #[test]
    fn a_sized_disk_is_made_sparse_and_kept() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = spec("size=1G");
        disk.check(0, dir.path(), false).expect("it can be made");
        let (made, note) = disk.prepare(0, dir.path(), |_| ()).expect("it is made");
        assert!(note.expect("a note").contains("1024 MiB"));
        assert_eq!((made.path.clone(), made.format), (dir.path().join("disk0.raw"), Format::Raw));
        let meta = fs::metadata(&made.path).expect("it is there");
        assert_eq!(meta.len(), 1 << 30);
        assert!(std::os::unix::fs::MetadataExt::blocks(&meta) < 1000, "it is not sparse");
        fs::write(&made.path, "kept").expect("writing");
        let (_, note) = disk.prepare(0, dir.path(), |_| ()).expect("it is there");
        assert!(note.expect("a note").contains("used as it is"));
        assert_eq!(fs::read(&made.path).expect("reading"), b"kept");
    }

    #[test]
    fn a_disk_that_cannot_be_made_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = spec(&format!("{},size=1M", dir.path().join("deep/d").display()));
        let mut told = None;
        disk.prepare(0, dir.path(), |half| told = Some(half.to_owned())).expect_err("no directory");
        assert_eq!(told, Some(dir.path().join("deep/d.new")));
        let disk = spec(&format!("{},size=1M", dir.path().join("d").display()));
        fs::write(dir.path().join("d.new"), "left by a run that was killed").expect("writing");
        disk.prepare(0, dir.path(), |_| ()).expect("it is made");
        let names: Vec<_> =
            fs::read_dir(dir.path()).expect("reading").map(|e| e.expect("an entry").file_name()).collect();
        assert_eq!(names, ["d"]);
        assert_eq!(disk.what(0, dir.path()), format!("looking at {}", dir.path().join("d").display()));
        assert!(
            spec("size=2G").what(0, dir.path()).contains("making")
                && spec("size=2G").what(1, dir.path()).contains("2048 MiB")
        );
    }

    #[test]
    fn what_would_destroy_a_disk_or_cannot_be_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("d");
        let check = |text: &str| spec(text).check(0, dir.path(), false).expect_err(text).to_string();
        let named = dir.path().join("d.qcow2");
        let qcow2 = named.display();
        assert!(check(&format!("{qcow2},format=raw,size=1M")).contains("another name"));
        fs::write(&named, b"QFI\xfb").expect("writing");
        assert!(check(&format!("{qcow2},format=raw")).contains("would be destroyed"));
        fs::write(&named, b"a raw one").expect("writing");
        assert!(check(&qcow2.to_string()).contains("as its name says"));
        assert!(check("/dev/null").contains("neither a file nor a block device"));
        let file = path.display();
        assert!(check(&dir.path().display().to_string()).contains("a directory"));
        assert!(check("/nonexistent/d").contains("size=4G"));
        assert!(check("/nonexistent/d,size=1G").contains("its directory is not there"));
        fs::write(&path, b"text").expect("writing");
        assert!(check(&format!("{file},format=qcow2")).contains("format=raw"));
    }

    /// What a guest can do to a raw disk: make it look like a disk that another file of the host is a part of.
    #[test]
    fn a_guest_that_writes_a_header_to_its_raw_disk_gets_no_other_file_of_the_host() {
        let mut backed = vec![0; 512];
        backed[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        backed[15] = 200;
        let mut outside = vec![0; 512];
        outside[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        outside[79] = 4;
        // Without one it could grow as it likes.
        let mut grown = vec![0; 512];
        grown[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        let dir = tempfile::tempdir().expect("a temporary directory");
        for name in ["d.raw", "d.img,size=1M"] {
            let disk = spec(&format!("{}/{name}", dir.path().display()));
            fs::write(disk.path.as_ref().expect("a path"), &grown).expect("writing");
            let error = disk.check(0, dir.path(), false).expect_err(name).to_string();
            assert!(error.contains("format=raw if its guest has written them"), "{error}");
            disk.prepare(0, dir.path(), |_| ()).expect_err(name);
        }
        for header in [backed, outside] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let path = dir.path().join("d.raw");
            fs::write(&path, &header).expect("writing");
            let file = path.display();
            for refused in [spec(&file.to_string()), spec(&format!("{file},size=1M"))] {
                let error = refused.check(0, dir.path(), false).expect_err("by its content").to_string();
                assert!(error.contains("on top of another file"), "{error}");
                refused.prepare(0, dir.path(), |_| ()).expect_err("by its content");
            }
            // Said by the user, it is what it is said to be.
            assert_eq!(format_of(&path, Some(Format::Raw)), Ok(Format::Raw));
            assert_eq!(format_of(&path, Some(Format::Qcow2)), Ok(Format::Qcow2));
            // One of ours in the state directory is what it was made as.
            fs::rename(&path, dir.path().join("disk0.raw")).expect("renaming");
            let ours = spec("size=1M");
            ours.check(0, dir.path(), false).expect("ours");
            let (disk, _) = ours.prepare(0, dir.path(), |_| ()).expect("ours");
            assert_eq!(disk.format, Format::Raw);
            // A chain that the user made, called what it is.
            let chain = dir.path().join("top.qcow2");
            fs::write(&chain, &header).expect("writing");
            assert_eq!(format_of(&chain, None), Ok(Format::Qcow2));
        }
    }
}
