//! 9P messages of any bytes: nothing panics, and a write never has more bytes than its message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::personality::vpnkit::ninep::wire::{Request, WALK, parse};

fuzz_target!(|data: &[u8]| {
    match parse(data) {
        Ok((_, Request::Write(_, _, bytes))) => assert!(bytes.len() < data.len()),
        Ok((_, Request::Walk(_, _, names))) => assert!(names.len() <= WALK),
        _ => {}
    }
});
