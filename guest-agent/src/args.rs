//! Options as Go programs take them: `-name value`, `-name=value`, and the same with two dashes. Dockerd, LinuxKit and
//! the tools this agent stands in for write them so.

use std::collections::VecDeque;

/// One word of the command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arg {
    /// An option's name, without dashes.
    Option(String),
    /// Another word.
    Word(String),
}

/// The rest of the command line.
#[derive(Debug)]
pub(crate) struct Args {
    words: VecDeque<String>,
    /// The value of the last option, when it was written with `=`.
    value: Option<String>,
}

impl Args {
    pub(crate) fn new(words: impl IntoIterator<Item = String>) -> Self {
        Self { words: words.into_iter().collect(), value: None }
    }

    /// The next option or word.
    ///
    /// # Errors
    /// When the last option was given a value that nobody took.
    pub(crate) fn next(&mut self) -> Result<Option<Arg>, String> {
        if let Some(value) = self.value.take() {
            return Err(format!("the value {value:?} goes to an option that has none"));
        }
        let Some(word) = self.words.pop_front() else { return Ok(None) };
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|n| !n.is_empty());
        Ok(Some(match name.map(|n| n.split_once('=')) {
            None => Arg::Word(word),
            Some(None) => Arg::Option(name.unwrap_or_default().to_owned()),
            Some(Some((name, value))) => {
                self.value = Some(value.to_owned());
                Arg::Option(name.to_owned())
            }
        }))
    }

    /// The value of the option that came last.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn value(&mut self, option: &str) -> Result<String, String> {
        self.value.take().or_else(|| self.words.pop_front()).ok_or_else(|| format!("-{option} needs a value"))
    }

    /// The value of the option that came last, as what it stands for.
    ///
    /// # Errors
    /// When there is none, or it does not stand for one.
    pub(crate) fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
        &mut self,
        option: &str,
    ) -> Result<T, String> {
        let value = self.value(option)?;
        value.parse().map_err(|error| format!("-{option} {value}: {error}"))
    }

    /// Whether an option without a value is on: `-x`, `-x=true`, `-x=false`.
    ///
    /// # Errors
    /// When its value is neither.
    pub(crate) fn switch(&mut self, option: &str) -> Result<bool, String> {
        match self.value.take().as_deref() {
            None | Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(format!("-{option}={other} is neither true nor false")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        Args::new(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn both_forms_of_a_value_and_of_a_dash_are_the_same() {
        for line in ["-port 80", "--port 80", "-port=80", "--port=80"] {
            let mut args = args(line);
            assert_eq!(args.next(), Ok(Some(Arg::Option("port".into()))));
            assert_eq!(args.parsed::<u16>("port"), Ok(80), "{line}");
            assert_eq!(args.next(), Ok(None));
        }
    }

    #[test]
    fn a_missing_or_a_wrong_value_is_named() {
        let mut missing = args("-port");
        assert!(missing.next().is_ok() && missing.value("port").is_err());
        let mut wrong = args("-port=x");
        assert!(wrong.next().is_ok());
        assert!(wrong.parsed::<u16>("port").is_err_and(|e| e.contains("-port x")));
        let mut untaken = args("-v=x y");
        assert!(untaken.next().is_ok() && untaken.next().is_err());
    }

    #[test]
    fn a_switch_may_say_what_it_is() {
        for (line, on) in [("-v", Ok(true)), ("-v=true", Ok(true)), ("-v=false", Ok(false))] {
            let mut args = args(line);
            assert!(args.next().is_ok());
            assert_eq!(args.switch("v"), on);
        }
    }

    #[test]
    fn a_lone_dash_is_a_word() {
        assert_eq!(args("-").next(), Ok(Some(Arg::Word("-".into()))));
    }
}
