//! Programs of the host, by name.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The program in `PATH`.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    in_dirs(&env::var_os("PATH").unwrap_or_default(), program)
}

fn in_dirs(path: &OsStr, program: &str) -> Option<PathBuf> {
    env::split_paths(path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The first of these files that is there.
pub(crate) fn first_file(files: &[&str]) -> Option<PathBuf> {
    files.iter().map(Path::new).find(|file| file.is_file()).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_a_directory_of_the_path() {
        assert_eq!(
            in_dirs(OsStr::new("/nonexistent:/"), "proc/self/status"),
            Some("/proc/self/status".into())
        );
        assert_eq!(in_dirs(OsStr::new("/nonexistent"), "qemu"), None);
        assert_eq!(first_file(&["/nonexistent", "/proc/self/status"]), Some("/proc/self/status".into()));
    }
}
