//! What a resolver may send back, of any bytes: nothing panics, and what is made of it for a client bears the client's id and
//! is well-formed. The first half of the input is the query, the second the reply.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (query, reply) = data.split_at(data.len() / 2);
    portway::dns::read_any_reply(query, reply);
    // The bytes of a usual query, which the fuzzer need not find.
    let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x03www\x07example\x00\x00\x01\x00\x01\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00";
    portway::dns::read_any_reply(query, data);
});
