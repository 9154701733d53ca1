//! What QEMU says of itself, asked before anything starts: its version, and whether it has a device.

use std::ffi::OsStr;
use std::path::Path;

use crate::programs;

/// Its major version, and whether it can filter its own system calls; an error when the program is not QEMU.
///
/// Options are read in turn, and `--version` ends it: a QEMU without seccomp, or on a kernel without, ends at the first one.
pub(super) fn version(program: &Path) -> Result<(u32, bool), String> {
    let filtered = programs::says(program, &["-sandbox".as_ref(), "on".as_ref(), "--version".as_ref()])?;
    if let (said, true) = filtered
        && let Some(version) = major(&said)
    {
        return Ok((version, true));
    }
    let (said, _) = programs::says(program, &["--version".as_ref()])?;
    let version = major(&said).ok_or_else(|| {
        format!("{} is not QEMU: to --version it says {:?}", program.display(), first_line(&said))
    })?;
    Ok((version, false))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// The major version in `QEMU emulator version 7.2.22 (Debian …)`.
fn major(text: &str) -> Option<u32> {
    text.strip_prefix("QEMU ")?.split_once("version ")?.1.split('.').next()?.parse().ok()
}

/// Checks a value of `--device`: that QEMU has such a device, and that the device has such properties. What the values may be
/// is QEMU's own to say.
pub(super) fn device(program: &Path, device: &OsStr) -> Result<(), String> {
    let Some(text) = device.to_str() else { return Ok(()) };
    // QEMU takes JSON too, and checks that by itself.
    if text.starts_with('{') {
        return Ok(());
    }
    let mut words = text.split(',');
    let name = words.next().map(|word| word.strip_prefix("driver=").unwrap_or(word)).unwrap_or_default();
    let fault = |why: String| Err(format!("--device {text}: {why}"));
    if name.is_empty() {
        return fault("it has no name; an example: --device usb-storage,drive=stick".into());
    }
    let (said, _) = programs::says(program, &["-device".as_ref(), format!("{name},help").as_ref()])?;
    let known = properties(&said);
    if known.is_empty() {
        return fault(format!("QEMU has no device {name}; {} -device help lists them", program.display()));
    }
    let generic = |key: &str| matches!(key, "id" | "bus" | "help");
    // A comma in a value is written twice, and then something stands here that is no key.
    let wrong = words.filter(|_| !text.contains(",,")).find_map(|word| {
        let key = word.split('=').next().unwrap_or_default();
        (!generic(key) && !known.contains(&key)).then_some(key)
    });
    match wrong {
        Some(key) => fault(format!(
            "{name} has no property {key:?}; {} -device {name},help lists them",
            program.display()
        )),
        None => Ok(()),
    }
}

/// The names in `  addr=<int32>  - Slot and …`.
fn properties(help: &str) -> Vec<&str> {
    help.lines().filter_map(|line| line.strip_prefix("  ")?.split_once("=<").map(|(name, _)| name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn qemus_version_is_read() {
        assert_eq!(major("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n"), Some(7));
        assert_eq!(major("QEMU emulator version 10.0.13\n"), Some(10));
        assert_eq!(major("qemu-img version 7.2.22"), None);
        assert_eq!(major("nonsense"), None);
    }

    #[test]
    fn another_program_is_no_qemu() {
        let error = version(Path::new("/bin/true")).expect_err("it is none");
        assert!(error.contains("/bin/true is not QEMU"), "{error}");
        assert!(version(Path::new("/nonexistent")).expect_err("it is not there").contains("cannot be run"));
    }

    #[test]
    fn a_device_or_a_property_that_qemu_does_not_have_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let qemu = dir.path().join("qemu");
        let script = "#!/bin/sh\n[ \"$2\" = stick,help ] || exit 0\nprintf 'stick options:\\n  drive=<str>  - ID\\n  port=<str>\\n'\n";
        fs::write(&qemu, script).expect("a script");
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).expect("it may run");
        let check = |text: &str| device(&qemu, text.as_ref());
        for good in [
            "stick",
            "stick,drive=a,id=b,bus=c",
            "driver=stick,port=1",
            "{\"driver\":\"x\"}",
            "stick,drive=a,,b",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for (bad, why) in
            [("rod", "no device rod"), ("stick,color=red", "\"color\""), ("stick,", "\"\""), ("", "no name")]
        {
            let error = check(bad).expect_err(bad);
            assert!(error.starts_with(&format!("--device {bad}: ")) && error.contains(why), "{error}");
        }
    }
}
