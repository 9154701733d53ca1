//! What a VM boots: LinuxKit's `PREFIX-kernel`, `PREFIX-initrd.img` and `PREFIX-cmdline`, or the three by name.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::LaunchError;

const PREFIX_ADVICE: &str = "IMAGE is the PREFIX of PREFIX-kernel, PREFIX-initrd.img and PREFIX-cmdline, as `linuxkit build` names them";
const FILE_ADVICE: &str = "give a file this user can read";

/// What the VM boots, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootImage {
    /// The common beginning of the three files' names; the initrd and the command line may be absent.
    Prefix(PathBuf),
    /// Each by itself.
    Files {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The kernel's command line.
        cmdline: String,
    },
}

/// What the VM boots, checked: the files could be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Boot {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
}

impl BootImage {
    /// Finds the files and opens each once, so that QEMU does not start only to fail.
    pub(crate) fn resolve(&self) -> Result<Boot, LaunchError> {
        match self {
            Self::Prefix(prefix) => {
                let kernel = with_suffix(prefix, "-kernel");
                readable("kernel", &kernel, PREFIX_ADVICE)?;
                let initrd = with_suffix(prefix, "-initrd.img");
                let initrd = match readable("initrd", &initrd, PREFIX_ADVICE) {
                    Ok(()) => Some(initrd),
                    Err(_) if is_absent(&initrd) => None,
                    Err(error) => return Err(error),
                };
                let path = with_suffix(prefix, "-cmdline");
                let cmdline = match fs::read_to_string(&path) {
                    Ok(text) => text.trim().to_owned(),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
                    Err(error) => {
                        let reason = error.to_string();
                        return Err(LaunchError::Image {
                            what: "command line",
                            path,
                            reason,
                            advice: FILE_ADVICE,
                        });
                    }
                };
                Ok(Boot { kernel, initrd, cmdline })
            }
            Self::Files { kernel, initrd, cmdline } => {
                readable("kernel", kernel, FILE_ADVICE)?;
                if let Some(initrd) = initrd {
                    readable("initrd", initrd, FILE_ADVICE)?;
                }
                Ok(Boot { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: cmdline.clone() })
            }
        }
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

fn readable(what: &'static str, path: &Path, advice: &'static str) -> Result<(), LaunchError> {
    let fail = |reason: String| LaunchError::Image { what, path: path.to_owned(), reason, advice };
    let metadata =
        File::open(path).and_then(|file| file.metadata()).map_err(|error| fail(error.to_string()))?;
    match metadata.is_file() {
        true if metadata.len() == 0 => Err(fail("it is empty".into())),
        true => Ok(()),
        false => Err(fail("it is not a file".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("a file in it");
        }
        let prefix = dir.path().join("my.os");
        (dir, prefix)
    }

    #[test]
    fn a_prefix_finds_linuxkits_three_files() {
        let (_dir, prefix) =
            image(&[("my.os-kernel", "k"), ("my.os-initrd.img", "i"), ("my.os-cmdline", "console=ttyS0\n")]);
        let boot = BootImage::Prefix(prefix.clone()).resolve().expect("all three are there");
        assert_eq!(boot.kernel, with_suffix(&prefix, "-kernel"));
        assert_eq!(boot.initrd, Some(with_suffix(&prefix, "-initrd.img")));
        assert_eq!(boot.cmdline, "console=ttyS0");
    }

    #[test]
    fn the_initrd_and_the_command_line_may_be_absent() {
        let (_dir, prefix) = image(&[("my.os-kernel", "k")]);
        let boot = BootImage::Prefix(prefix).resolve().expect("a kernel is enough");
        assert_eq!((boot.initrd, boot.cmdline.as_str()), (None, ""));
    }

    #[test]
    fn a_missing_or_empty_kernel_is_named_with_what_to_do() {
        let (_dir, prefix) = image(&[]);
        let error = BootImage::Prefix(prefix.clone()).resolve().expect_err("there is none").to_string();
        assert!(error.contains("my.os-kernel") && error.contains("linuxkit build"), "{error}");
        let (_dir, prefix) = image(&[("my.os-kernel", "")]);
        let error = BootImage::Prefix(prefix).resolve().expect_err("it is empty").to_string();
        assert!(error.contains("it is empty"), "{error}");
    }

    #[test]
    fn an_initrd_that_is_named_must_be_there() {
        let (dir, _) = image(&[("k", "k")]);
        let files = BootImage::Files {
            kernel: dir.path().join("k"),
            initrd: Some(dir.path().join("gone")),
            cmdline: String::new(),
        };
        let error = files.resolve().expect_err("it is gone");
        assert!(error.to_string().contains("initrd"), "{error}");
        assert_eq!(error.exit_code(), 1);
    }
}
