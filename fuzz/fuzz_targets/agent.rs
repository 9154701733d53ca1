//! The agent protocol, both sides: any bytes are cut into messages and read, in any pieces; what is read is written and
//! read the same; and no listener gets past the rules by panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::agent::rules::{Rule, place};
use portway_api::agent::{Decoder, MESSAGE_MAX, ToGuest, ToHost, encode, kind_of, parse};

fn through<T>(bytes: &[u8])
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(message) = parse::<T>(bytes) else { return };
    // A message of a newer peer has no bytes of its own.
    let Ok(written) = encode(&message) else { return };
    assert_eq!(parse::<T>(&written[4..]).as_ref(), Ok(&message));
}

fuzz_target!(|input: (Vec<u8>, u8)| {
    let (bytes, piece) = input;
    let rules = [Rule::everything(true)];
    let mut decoder = Decoder::default();
    for chunk in bytes.chunks(usize::from(piece).max(1)) {
        decoder.feed(chunk);
        loop {
            match decoder.message() {
                Ok(Some(message)) => {
                    assert!(message.len() <= MESSAGE_MAX);
                    assert!(kind_of(message).chars().count() <= 64);
                    through::<ToHost>(message);
                    through::<ToGuest>(message);
                    if let Ok(ToHost::Listeners { added, .. }) = parse(message) {
                        for listener in added.into_iter().filter(|l| !l.is_private()) {
                            let wanted = place(&rules, &listener).expect("everything is wanted");
                            assert!(wanted.candidates().len() <= 65);
                        }
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
