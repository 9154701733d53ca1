//! vpnkit's multiplexer and its datagrams, and forwards as text: nothing panics, what is read is written the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::personality::vpnkit::forward::Forward;
use portway::personality::vpnkit::mux::{Frame, datagram, parse_datagram};

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Ok(Some((frame, n))) = Frame::parse(rest) {
        let bytes = frame.bytes();
        assert_eq!(Frame::parse(&bytes), Ok(Some((frame, bytes.len()))));
        rest = &rest[n..];
    }
    if let Ok(Some((peer, payload, _))) = parse_datagram(data) {
        let bytes = datagram(peer, payload);
        // A zone, which is left out, may have made it shorter; never longer.
        assert_eq!(parse_datagram(&bytes), Ok(Some((peer, payload, bytes.len()))));
    }
    if let Some(forward) = std::str::from_utf8(data).ok().and_then(|text| text.parse::<Forward>().ok()) {
        assert_eq!(forward.to_string().parse(), Ok(forward));
    }
});
