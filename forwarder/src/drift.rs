//! Pages that are generated and checked in: a test fails when one is not what the program would write.
//!
//! `PORTWAY_BLESS=1 cargo test -p portway drift` and the like write them anew.

use std::path::Path;

/// Fails when the page at `path` (from the top of the repository) is not `text`.
pub(crate) fn check(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    if std::env::var_os("PORTWAY_BLESS").is_some() {
        std::fs::create_dir_all(file.parent().expect("it lies in a directory"))
            .expect("the directory can be made");
        std::fs::write(&file, text).expect("the page can be written");
    }
    let there = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(there == text, "{path} is out of date: run the tests once with PORTWAY_BLESS=1 and commit it");
}
