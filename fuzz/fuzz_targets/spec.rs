//! Publish specs: no text panics, and what is read is written the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::publish::spec::PublishSpec;

fuzz_target!(|text: &str| {
    if let Ok(spec) = text.parse::<PublishSpec>() {
        assert_eq!(spec.to_string().parse(), Ok(spec));
    }
});
