//! Programs of the host, by name.

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program in `PATH`.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    in_dirs(&env::var_os("PATH").unwrap_or_default(), program)
}

fn in_dirs(path: &OsStr, program: &str) -> Option<PathBuf> {
    env::split_paths(path).map(|dir| dir.join(program)).find(|file| is_program(file))
}

/// Whether a file may be run, by its mode.
fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// A program that was named: there, and one that may be run.
pub(crate) fn named(path: &Path) -> Result<PathBuf, String> {
    match path.metadata() {
        Ok(_) if is_program(path) => Ok(path.to_owned()),
        Ok(meta) if meta.is_file() => {
            Err(format!("{} is no program: nobody may run it (chmod +x)", path.display()))
        }
        Ok(_) => Err(format!("{} is not a file", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// What a program says on stdout when it is asked for something that ends at once, such as `--version`; and whether it
/// ended well.
pub(crate) fn says(program: &Path, words: &[&OsStr]) -> Result<(String, bool), String> {
    let out = Command::new(program).args(words).stdin(Stdio::null()).output();
    let out = out.map_err(|error| format!("{} cannot be run: {error}", program.display()))?;
    Ok((String::from_utf8_lossy(&out.stdout).into_owned(), out.status.success()))
}

/// The first of these programs that is there.
pub(crate) fn first(files: &[&str]) -> Option<PathBuf> {
    files.iter().map(Path::new).find(|file| is_program(file)).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_a_directory_of_the_path() {
        assert_eq!(in_dirs(OsStr::new("/nonexistent:/"), "bin/sh"), Some("/bin/sh".into()));
        assert_eq!(in_dirs(OsStr::new("/nonexistent"), "qemu"), None);
        assert_eq!(in_dirs(OsStr::new("/"), "etc/passwd"), None, "nobody may run it");
        assert_eq!(first(&["/nonexistent", "/bin/sh"]), Some("/bin/sh".into()));
    }

    #[test]
    fn what_was_named_and_cannot_be_run_is_told_with_the_reason() {
        assert_eq!(named(Path::new("/bin/sh")), Ok("/bin/sh".into()));
        for (path, why) in
            [("/nonexistent", "No such file"), ("/etc/passwd", "chmod +x"), ("/etc", "not a file")]
        {
            let error = named(Path::new(path)).expect_err(path);
            assert!(error.contains(path) && error.contains(why), "{error}");
        }
        let said = says(Path::new("/bin/sh"), &["-c".as_ref(), "echo hello".as_ref()]);
        assert_eq!(said, Ok(("hello\n".into(), true)));
        assert!(says(Path::new("/nonexistent"), &[]).is_err());
    }
}
