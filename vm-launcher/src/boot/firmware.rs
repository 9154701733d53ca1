//! UEFI firmware: found where distributions put it, or named with `--fw`.
//!
//! EDK II comes in two flash images: the code, which all VMs share read-only, and an empty variable store, which each VM
//! gets a copy of in its state directory. A single image (`OVMF.fd`, or a BIOS) is given to QEMU as it is.

use std::path::{Path, PathBuf};

use crate::{Arch, LaunchError};

/// The firmware a VM starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Firmware {
    /// The machine's own.
    Default,
    /// One image for `-bios`.
    Single(PathBuf),
    /// EDK II in two flash images.
    Flash {
        /// Shared, read-only.
        code: PathBuf,
        /// What a VM's variables begin as.
        vars: PathBuf,
    },
}

/// Code and variables, by distribution: Debian and Ubuntu, Fedora, Arch, openSUSE, QEMU's own build (Homebrew).
const X86_64: &[(&str, &str)] = &[
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
    ("/opt/homebrew/share/qemu/edk2-x86_64-code.fd", "/opt/homebrew/share/qemu/edk2-i386-vars.fd"),
    ("/usr/local/share/qemu/edk2-x86_64-code.fd", "/usr/local/share/qemu/edk2-i386-vars.fd"),
];
const AARCH64: &[(&str, &str)] = &[
    ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
    ("/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"),
    ("/usr/share/edk2/aarch64/QEMU_CODE.fd", "/usr/share/edk2/aarch64/QEMU_VARS.fd"),
    ("/usr/share/qemu/aavmf-aarch64-code.bin", "/usr/share/qemu/aavmf-aarch64-vars.bin"),
    ("/usr/share/qemu/edk2-aarch64-code.fd", "/usr/share/qemu/edk2-arm-vars.fd"),
    ("/opt/homebrew/share/qemu/edk2-aarch64-code.fd", "/opt/homebrew/share/qemu/edk2-arm-vars.fd"),
    ("/usr/local/share/qemu/edk2-aarch64-code.fd", "/usr/local/share/qemu/edk2-arm-vars.fd"),
];

/// UEFI firmware for `arch`.
pub(crate) fn uefi(arch: Arch, named: Option<&Path>) -> Result<Firmware, LaunchError> {
    if let Some(path) = named {
        return by_name(path);
    }
    let known = match arch {
        Arch::X86_64 => X86_64,
        Arch::Aarch64 => AARCH64,
    };
    first_there(known).ok_or_else(|| {
        let package = match arch {
            Arch::X86_64 => "ovmf",
            Arch::Aarch64 => "qemu-efi-aarch64",
        };
        LaunchError::Setting(format!(
            "--uefi: no UEFI firmware for {arch} where distributions put it: apt-get install {package}, or name it with --fw"
        ))
    })
}

/// The firmware that was named: with the variable store beside it, where its name has one.
pub(crate) fn by_name(path: &Path) -> Result<Firmware, LaunchError> {
    if !path.is_file() {
        return Err(LaunchError::Setting(format!(
            "--fw {}: there is no such file; OVMF is in the package ovmf, in /usr/share/OVMF",
            path.display()
        )));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let vars = [("CODE", "VARS"), ("code", "vars")]
        .iter()
        .filter(|(code, _)| name.contains(code))
        .map(|(code, vars)| path.with_file_name(name.replacen(code, vars, 1)))
        .find(|vars| vars.is_file());
    Ok(match vars {
        Some(vars) => Firmware::Flash { code: path.to_owned(), vars },
        None => Firmware::Single(path.to_owned()),
    })
}

fn first_there(known: &[(&str, &str)]) -> Option<Firmware> {
    let (code, vars) =
        known.iter().find(|(code, vars)| Path::new(code).is_file() && Path::new(vars).is_file())?;
    Some(Firmware::Flash { code: code.into(), vars: vars.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_named_code_image_brings_its_variables_along() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (code, vars) = (dir.path().join("OVMF_CODE_4M.fd"), dir.path().join("OVMF_VARS_4M.fd"));
        fs::write(&code, "c").expect("writing");
        assert_eq!(by_name(&code).expect("it is there"), Firmware::Single(code.clone()));
        fs::write(&vars, "v").expect("writing");
        assert_eq!(by_name(&code).expect("it is there"), Firmware::Flash { code, vars });
    }

    #[test]
    fn firmware_that_is_not_there_is_an_error_with_the_option_and_the_package() {
        let error = by_name(Path::new("/nonexistent/OVMF.fd")).expect_err("it is not there");
        let text = error.to_string();
        assert!(text.contains("--fw /nonexistent/OVMF.fd") && text.contains("ovmf"), "{text}");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(first_there(&[("/nonexistent/a", "/nonexistent/b")]), None);
    }
}
