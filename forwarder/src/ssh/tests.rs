use super::*;

/// What `ssh-keygen -t ed25519` makes, with a passphrase and without.
fn key(dir: &Path, name: &str, passphrase: &str) -> PathBuf {
    let path = dir.join(name);
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", passphrase, "-f"])
        .arg(&path)
        .status();
    assert!(made.unwrap().success());
    path
}

#[test]
fn a_key_is_read_and_nothing_of_it_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let open = Key::read(&key(dir.path(), "open", ""), None).unwrap();
    assert_eq!(format!("{open:?}"), "Key(Ed25519)");
    let locked = key(dir.path(), "locked", "sesame");
    Key::read(&locked, Some("sesame")).unwrap();
    let other = dir.path().join("other");
    std::fs::write(&other, "no key, and a secret").unwrap();
    for (path, passphrase) in [
        (locked.as_path(), None),
        (&locked, Some("wrong-word")),
        (&other, None),
        (dir.path(), None),
        (Path::new("/dev/zero"), None),
        (Path::new("/nx/key"), None),
    ] {
        let said = Key::read(path, passphrase).unwrap_err();
        assert!(said.starts_with(&path.display().to_string()), "{said}");
        assert!(!said.contains("secret") && !said.contains("wrong-word"), "{said}");
    }
}
