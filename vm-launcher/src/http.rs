//! One request and its answer over a unix socket, for a hypervisor's REST interface.

use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::sockets;

/// How long an answer may take; the other end is a process of ours on this machine.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of an answer.
const LARGEST: u64 = 64 * 1024;

/// Asks `method path` of the server at `socket`, with a JSON body if there is one, and answers the JSON that comes back.
pub(crate) fn ask(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> io::Result<Value> {
    let mut stream = sockets::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: vm\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(LARGEST).read_to_end(&mut answer)?;
    parse(&answer)
}

fn parse(answer: &[u8]) -> io::Result<Value> {
    let text = String::from_utf8_lossy(answer);
    let broken = || io::Error::new(io::ErrorKind::InvalidData, format!("not an answer in HTTP: {text:.80}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(broken)?;
    let status = head.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)).ok_or_else(broken)?;
    if !status.starts_with('2') {
        return Err(io::Error::other(format!("it answered {status}: {}", body.trim())));
    }
    // Between the braces: the length of a chunk may stand before them.
    match (body.find('{'), body.rfind('}')) {
        (Some(from), Some(to)) if from < to => {
            Ok(serde_json::from_str(body.get(from..=to).unwrap_or_default())?)
        }
        _ => Ok(Value::Null),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_with_and_without_chunks() {
        let good = parse(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{\"a\": 1}\n").expect("an answer");
        assert_eq!(good["a"], 1);
        let chunked = parse(b"HTTP/1.1 200 OK\r\n\r\n8\r\n{\"a\": 1}\r\n0\r\n\r\n").expect("an answer");
        assert_eq!(chunked, good);
        assert_eq!(parse(b"HTTP/1.1 202 Accepted\r\n\r\n").expect("nothing to say"), Value::Null);
    }

    #[test]
    fn refusals_and_nonsense_are_errors() {
        let error = parse(b"HTTP/1.1 500 Oops\r\n\r\ncannot stop\n").expect_err("refused").to_string();
        assert!(error.contains("500") && error.contains("cannot stop"), "{error}");
        for bad in [&b""[..], b"hello", b"HTTP/1.1 200\r\n\r\n{\"a\":}", b"HTTP/1.1\r\n\r\n"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
