//! What a VM is told about itself: LinuxKit's metadata CD, cloud-init's NoCloud CD, Ignition.
//!
//! | option | the guest finds |
//! |---|---|
//! | `--data`, `--data-file` | a CD (`/dev/sr0`) with one file, `/config`, as LinuxKit's `metadata` package reads it |
//! | `--cloud-init DIR` | a CD with the volume name `cidata` and the files of DIR: `user-data`, `meta-data`, … |
//! | `--ignition FILE` | the firmware configuration `opt/com.coreos/config` |
//!
//! The CDs are made in the state directory at every start. A `meta-data` that DIR lacks is made, since NoCloud wants one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::LaunchError;
use crate::iso::{self, Entry};

/// Bytes of a metadata text or an Ignition configuration; QEMU copies the latter into its own memory.
const TEXT_MAX: u64 = 16 << 20;

/// Where the metadata comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// Said on the command line.
    Text(String),
    /// In a file.
    File(PathBuf),
}

/// A CD to be made: its file's name in the state directory, and its bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cd {
    file: &'static str,
    bytes: Vec<u8>,
}

impl Cd {
    /// LinuxKit's metadata CD.
    pub(crate) fn config(data: &Data) -> Result<Self, LaunchError> {
        let content = match data {
            Data::Text(text) => text.clone().into_bytes(),
            Data::File(path) => read("--data-file", path)?,
        };
        let bytes = iso::image("config", vec![Entry { name: "config".into(), content }])
            .map_err(|error| LaunchError::Setting(format!("--data: {error}")))?;
        Ok(Self { file: "data.iso", bytes })
    }

    /// cloud-init's CD.
    pub(crate) fn no_cloud(dir: &Path, name: &str) -> Result<Self, LaunchError> {
        let fail = |reason: String| LaunchError::Setting(format!("--cloud-init {}: {reason}", dir.display()));
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)
            .map_err(|error| fail(format!("{error}; a directory with user-data is needed")))?
        {
            let path = entry.map_err(|error| fail(error.to_string()))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                return Err(fail(format!("{name} is a directory, and NoCloud's files lie side by side")));
            }
            if files.len() == iso::FILES {
                return Err(fail(iso::IsoError::TooMany.to_string()));
            }
            files.push(Entry { name, content: read("--cloud-init", &path)? });
        }
        if !files.iter().any(|file| file.name == "user-data") {
            return Err(fail(
                "it has no file user-data, without which cloud-init sees no data source".into(),
            ));
        }
        if !files.iter().any(|file| file.name == "meta-data") {
            let content = format!("instance-id: {name}\nlocal-hostname: {name}\n").into_bytes();
            files.push(Entry { name: "meta-data".into(), content });
        }
        let bytes = iso::image("cidata", files).map_err(|error| fail(error.to_string()))?;
        Ok(Self { file: "cidata.iso", bytes })
    }

    /// Its file's name.
    pub(crate) const fn name(&self) -> &'static str {
        self.file
    }

    /// Writes the CD into the state directory; `half` is told the name it has until it is whole.
    pub(crate) fn write(&self, state_dir: &Path, half: impl FnOnce(&Path)) -> Result<PathBuf, LaunchError> {
        let path = state_dir.join(self.file);
        let fail =
            |error: std::io::Error| LaunchError::State { path: path.clone(), reason: error.to_string() };
        crate::state::write_private(&path, &self.bytes, half).map_err(fail)?;
        Ok(path)
    }
}

/// Looks at an Ignition configuration: JSON with a version, or the guest only says so after minutes.
pub(crate) fn check_ignition(path: &Path) -> Result<(), LaunchError> {
    let fail = |reason: &str| LaunchError::Setting(format!("--ignition {}: {reason}", path.display()));
    let bytes = read("--ignition", path)?;
    let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| {
        fail(&format!(
            "it is not JSON ({error}); a Butane file has to be translated first: butane FILE > FILE.ign"
        ))
    })?;
    let version = json.pointer("/ignition/version").and_then(|version| version.as_str());
    version.map(drop).ok_or_else(|| fail("it has no ignition.version, so it is no Ignition configuration"))
}

fn read(option: &str, path: &Path) -> Result<Vec<u8>, LaunchError> {
    let fail = |reason: String| LaunchError::Setting(format!("{option} {}: {reason}", path.display()));
    let meta = fs::metadata(path).map_err(|error| fail(error.to_string()))?;
    if !meta.is_file() {
        return Err(fail("it is not a file".into()));
    }
    if meta.len() > TEXT_MAX {
        return Err(fail(format!("it has more than {} MiB", TEXT_MAX >> 20)));
    }
    fs::read(path).map_err(|error| fail(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("writing");
        }
        dir
    }

    #[test]
    fn a_cd_has_the_text_and_is_written_for_this_user_alone() {
        use std::os::unix::fs::PermissionsExt;
        let cd = Cd::config(&Data::Text("hello".into())).expect("a CD");
        let state = dir(&[]);
        let path = cd.write(state.path(), |_| ()).expect("it can be written");
        assert_eq!(path, state.path().join("data.iso"));
        let bytes = fs::read(&path).expect("reading");
        assert!(bytes.windows(5).any(|w| w == b"hello"));
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn no_cloud_needs_user_data_and_gets_its_meta_data() {
        let good = dir(&[("user-data", "#cloud-config\n")]);
        let cd = Cd::no_cloud(good.path(), "web").expect("a CD");
        assert!(cd.bytes.windows(16).any(|w| w == b"instance-id: web"));
        let error = Cd::no_cloud(dir(&[]).path(), "web").expect_err("no user-data").to_string();
        assert!(error.contains("user-data"), "{error}");
        let error = Cd::no_cloud(Path::new("/nonexistent"), "web").expect_err("none").to_string();
        assert!(error.contains("--cloud-init /nonexistent"), "{error}");
        let nested = dir(&[("user-data", "x")]);
        fs::create_dir(nested.path().join("sub")).expect("a directory");
        let error = Cd::no_cloud(nested.path(), "web").expect_err("nested").to_string();
        assert!(error.contains("sub is a directory"), "{error}");
    }

    #[test]
    fn ignition_is_json_with_a_version() {
        let dir = dir(&[
            ("good", r#"{"ignition":{"version":"3.4.0"}}"#),
            ("yaml", "variant: fcos\n"),
            ("json", "{}"),
        ]);
        check_ignition(&dir.path().join("good")).expect("it is good");
        let error = check_ignition(&dir.path().join("yaml")).expect_err("YAML").to_string();
        assert!(error.contains("butane"), "{error}");
        let error = check_ignition(&dir.path().join("json")).expect_err("no version").to_string();
        assert!(error.contains("ignition.version"), "{error}");
        let error = check_ignition(&dir.path().join("gone")).expect_err("absent").to_string();
        assert!(error.contains("--ignition"), "{error}");
    }

    #[test]
    fn a_metadata_file_that_is_no_file_is_refused() {
        let error = Cd::config(&Data::File("/nonexistent/d".into())).expect_err("absent").to_string();
        assert!(error.contains("--data-file /nonexistent/d"), "{error}");
        let error = Cd::config(&Data::File("/".into())).expect_err("a directory").to_string();
        assert!(error.contains("not a file"), "{error}");
    }
}
