use super::*;

/// What `ssh-keygen -t ed25519` makes, with a passphrase and without.
fn key(dir: &Path, name: &str, passphrase: &str) -> PathBuf {
    made(dir, name, passphrase, &["-t", "ed25519"])
}

fn made(dir: &Path, name: &str, passphrase: &str, options: &[&str]) -> PathBuf {
    let path = dir.join(name);
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-N", passphrase])
        .args(options)
        .arg("-f")
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

#[test]
fn keys_of_every_kind_but_rsa_are_used() {
    let dir = tempfile::tempdir().unwrap();
    for (name, options) in [("ecdsa", &["-t", "ecdsa"][..]), ("p384", &["-t", "ecdsa", "-b", "384"])] {
        Key::read(&made(dir.path(), name, "", options), None).unwrap();
    }
    for (name, format) in [("new", "RFC4716"), ("pem", "PEM"), ("pkcs8", "PKCS8")] {
        let key = made(dir.path(), name, "", &["-t", "rsa", "-b", "2048", "-m", format]);
        let said = Key::read(&key, None).unwrap_err();
        assert!(said.contains("RSA") || format == "PKCS8", "{name}: {said}");
    }
}
