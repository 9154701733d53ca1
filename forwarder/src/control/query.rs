//! Query strings: every parameter known, given once, and of its type.

use std::fmt::Display;
use std::str::FromStr;

use super::problem::Fault;

/// The parameters of one request.
#[derive(Debug)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// The parameters of `text`, all of which have to be in `known`.
    ///
    /// # Errors
    /// A parameter that is not known, or is there twice.
    pub(super) fn parse(text: Option<&str>, known: &[&str]) -> Result<Self, Fault> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for (key, value) in form_urlencoded::parse(text.unwrap_or_default().as_bytes()) {
            if !known.contains(&key.as_ref()) {
                let hint = match crate::nearest::name(&key, known.iter().copied()) {
                    Some(near) => format!("did you mean {near}?"),
                    None if known.is_empty() => "it takes none".into(),
                    None => format!("it takes {}", known.join(", ")),
                };
                let detail = format!("{key:?} is not a parameter of this resource");
                return Err(Fault::bad("unknown_parameter", detail).field(key).hint(hint));
            }
            if pairs.iter().any(|(k, _)| *k == key) {
                let detail = format!("{key:?} is given twice");
                return Err(Fault::bad("duplicate_parameter", detail).field(key).hint("give it once"));
            }
            pairs.push((key.into_owned(), value.into_owned()));
        }
        Ok(Self(pairs))
    }

    /// All of them.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// The text of one parameter.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.pairs().find(|(k, _)| *k == key).map(|(_, v)| v)
    }

    /// One parameter as a `T`; `what` says what that is.
    pub(super) fn get<T: FromStr<Err: Display>>(&self, key: &str, what: &str) -> Result<Option<T>, Fault> {
        let Some(text) = self.text(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| wrong(key, text, what))
    }

    /// One parameter that has to be one of `values`.
    pub(super) fn one_of(&self, key: &str, values: &[&'static str]) -> Result<Option<&'static str>, Fault> {
        let Some(text) = self.text(key) else { return Ok(None) };
        let found = values.iter().find(|v| **v == text).copied();
        found.map(Some).ok_or_else(|| wrong(key, text, &values.join(" or ")))
    }

    /// `true` or `false`; absent is false.
    pub(super) fn flag(&self, key: &str) -> Result<bool, Fault> {
        Ok(self.one_of(key, &["true", "false"])? == Some("true"))
    }
}

/// A parameter whose value is not what it takes.
pub(super) fn wrong(key: &str, value: &str, what: &str) -> Fault {
    Fault::bad("bad_parameter", format!("{key}: {value:?} is not {what}"))
        .field(key)
        .hint(format!("give {what}"))
}
