//! Bodies of requests: one JSON object, and nothing behind it.

use axum::body::Bytes;
use serde::de::DeserializeOwned;

use super::problem::Fault;

/// Reads `body`; `example` is what would be right.
///
/// # Errors
/// `bad_json` for what is no JSON, `bad_field` with its path for what is wrong in it.
pub(super) fn read<T: DeserializeOwned>(body: &Bytes, example: &'static str) -> Result<T, Fault> {
    let hint = |fault: Fault| fault.hint(format!("send {example}"));
    let first = body.iter().find(|b| !b.is_ascii_whitespace());
    if first.is_some_and(|b| *b == b'[') {
        // serde would take an array for the fields in their order.
        return Err(hint(Fault::bad("bad_field", "an object is needed, and not an array")));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let read = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner();
        match inner.is_data() {
            true if path == "." => hint(Fault::bad("bad_field", inner.to_string())),
            true => hint(Fault::bad("bad_field", inner.to_string())).field(path),
            false => hint(Fault::bad("bad_json", inner.to_string())),
        }
    })?;
    json.end()
        .map_err(|e| Fault::bad("bad_json", e.to_string()).hint("one JSON object and nothing behind it"))?;
    Ok(read)
}
