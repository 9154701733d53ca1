//! Configuration files, and what a personality is told: no text panics, and a bad one is an error of one line that names the
//! setting or the line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::config::{Config, LinkSpec, Settings};
use portway::vsock::VsockSpec;

fuzz_target!(|text: &str| {
    match Settings::from_toml(text) {
        Err(fault) => assert!(!fault.is_empty()),
        Ok(settings) => {
            if let Err(error) = Config::try_from(settings.over(Settings::default())) {
                assert!(error.to_string().starts_with("--") || error.to_string().contains(": "));
            }
        }
    }
    for word in text.split_whitespace() {
        let _ = word.parse::<LinkSpec>();
        let _ = word.parse::<VsockSpec>();
    }
});
