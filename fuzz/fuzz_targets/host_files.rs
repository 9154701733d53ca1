//! What the host says of names, of any text: resolv.conf, the hosts file, and resolvers as they are configured. Nothing
//! panics; a resolver that is read is written so that it is read the same; no more servers are taken than may be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portway::dns::{ResolvConf, Server, Upstream};

fuzz_target!(|text: &str| {
    assert!(ResolvConf::parse(text).servers.len() <= 3);
    portway::dns::read_any_hosts(text);
    for line in text.lines() {
        let _ = line.parse::<Upstream>();
        if let Ok(server) = line.parse::<Server>() {
            assert_eq!(server.to_string().parse(), Ok(server));
        }
    }
});
