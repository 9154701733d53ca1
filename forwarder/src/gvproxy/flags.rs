//! gvproxy's command line, in the grammar of Go's `flag` package: `-x v`, `--x v`, `-x=v`; a switch needs no value.
//!
//! Parsing ends at the first word that is no flag, and at `--`; what follows is ignored, as gvproxy ignores it.

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Switch,
    Text,
    Number,
    /// May be given more than once.
    Texts,
}

/// Every flag: its name, what it takes, and what it is for.
const FLAGS: &[(&str, Takes, &str)] = &[
    ("config", Takes::Text, "YAML configuration file"),
    ("debug", Takes::Switch, "log every decision"),
    ("deviceIP", Takes::Text, "the VM's address (default: the second of the subnet)"),
    ("ec2-metadata-access", Takes::Switch, "let the VM reach link-local addresses"),
    ("forward-dest", Takes::Texts, "path of the guest's unix socket a -forward-sock leads to"),
    ("forward-identity", Takes::Texts, "SSH key of a -forward-sock"),
    ("forward-sock", Takes::Texts, "unix socket to forward to the guest over SSH"),
    ("forward-user", Takes::Texts, "SSH user of a -forward-sock"),
    ("gatewayIP", Takes::Text, "the gateway's address (default: the first of the subnet)"),
    ("hostIP", Takes::Text, "the address that is the host's loopback (default: the last of the subnet)"),
    ("listen", Takes::Texts, "URL of the control API, with /connect"),
    ("listen-bess", Takes::Text, "unixpacket:// socket for one VM"),
    ("listen-qemu", Takes::Text, "unix:// or tcp:// socket for one VM of QEMU"),
    ("listen-stdio", Takes::Text, "frames on standard input and output"),
    ("listen-vfkit", Takes::Text, "unixgram:// socket for one VM of vfkit"),
    ("listen-vpnkit", Takes::Text, "unix:// socket for VMs of HyperKit"),
    ("log-file", Takes::Text, "the log goes here, anew"),
    ("mtu", Takes::Number, "the largest IP packet (default 1500)"),
    ("notification", Takes::Text, "unix:// socket that is told what happens"),
    ("pcap", Takes::Text, "file for every frame"),
    ("pid-file", Takes::Text, "file for the process id"),
    ("services", Takes::Text, "URL of the control API, without /connect"),
    ("ssh-port", Takes::Number, "port of the host that leads to the VM's 22; -1 for none (default 2222)"),
    ("subnet", Takes::Text, "the VMs' subnet (default 192.168.127.0/24)"),
    ("version", Takes::Switch, "print the version"),
];

/// What was typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Flags {
    given: Vec<(&'static str, String)>,
}

/// Why a command line cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    /// `-h` or `-help`.
    Help,
    /// What is wrong.
    Wrong(String),
}

impl Flags {
    /// Parses the words behind the program's name.
    pub(super) fn parse(words: &[String]) -> Result<Self, Refused> {
        let mut flags = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(body) = word.strip_prefix('-').filter(|b| !b.is_empty()) else { break };
            let body = body.strip_prefix('-').unwrap_or(body);
            if body.is_empty() {
                break;
            }
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (body, None),
            };
            if name.is_empty() || name.starts_with('-') {
                return Err(Refused::Wrong(format!("bad flag syntax: {word}")));
            }
            if matches!(name, "h" | "help") {
                return Err(Refused::Help);
            }
            let Some((name, takes, _)) = FLAGS.iter().find(|(n, ..)| *n == name) else {
                return Err(Refused::Wrong(format!("flag provided but not defined: -{name}")));
            };
            let value = match (takes, value) {
                (_, Some(value)) => value.to_owned(),
                (Takes::Switch, None) => "true".to_owned(),
                (_, None) => words
                    .next()
                    .cloned()
                    .ok_or_else(|| Refused::Wrong(format!("flag needs an argument: -{name}")))?,
            };
            let invalid =
                |what| Refused::Wrong(format!("invalid {what}value {value:?} for flag -{name}: parse error"));
            match takes {
                Takes::Switch
                    if !matches!(
                        value.as_str(),
                        "1" | "t"
                            | "T"
                            | "true"
                            | "TRUE"
                            | "True"
                            | "0"
                            | "f"
                            | "F"
                            | "false"
                            | "FALSE"
                            | "False"
                    ) =>
                {
                    return Err(invalid("boolean "));
                }
                Takes::Number if value.parse::<i64>().is_err() => return Err(invalid("")),
                _ => {}
            }
            if *takes != Takes::Texts {
                // As in Go, the last one wins.
                flags.given.retain(|(n, _)| n != name);
            }
            flags.given.push((name, value));
        }
        Ok(flags)
    }

    /// The value of a flag; nothing for an empty one, which is the default everywhere.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let last = self.given.iter().rev().find(|(n, _)| *n == name);
        last.map(|(_, v)| v.as_str()).filter(|v| !v.is_empty())
    }

    /// Every value of a flag.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.given.iter().filter(move |(n, _)| *n == name).map(|(_, v)| v.as_str())
    }

    /// Whether a switch is on.
    pub(super) fn is_on(&self, name: &str) -> bool {
        self.text(name).is_some_and(|v| v.starts_with(['1', 't', 'T']))
    }

    /// The value of a number.
    pub(super) fn number(&self, name: &str) -> Option<i64> {
        self.text(name)?.parse().ok()
    }
}

/// What `-help` prints.
pub(super) fn usage() -> String {
    let line = |(name, takes, help): &(&str, Takes, &str)| {
        let value = match takes {
            Takes::Switch => "",
            Takes::Text => " string",
            Takes::Number => " int",
            Takes::Texts => " value",
        };
        format!("  -{name}{value}\n    \t{help}\n")
    };
    format!("Usage of gvproxy:\n{}", FLAGS.iter().map(line).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, Refused> {
        Flags::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_gos() {
        let flags = parse("-mtu 1500 --debug -ssh-port=-1 -listen unix:///a -listen=unix:///b -services x -services y rest -mtu 1").unwrap();
        assert_eq!(flags.number("mtu"), Some(1500));
        assert_eq!(flags.number("ssh-port"), Some(-1));
        assert_eq!(flags.all("listen").collect::<Vec<_>>(), ["unix:///a", "unix:///b"]);
        assert_eq!(flags.text("services"), Some("y"));
        assert!(flags.is_on("debug") && !flags.is_on("version"));
        assert!(!parse("-debug=false").unwrap().is_on("debug"));
    }

    #[test]
    fn a_bad_flag_is_told_in_gos_words() {
        for (line, text) in [
            ("-foo", "flag provided but not defined: -foo"),
            ("-mtu", "flag needs an argument: -mtu"),
            ("-mtu x", "invalid value \"x\" for flag -mtu: parse error"),
            (
                "-mtu=99999999999999999999",
                "invalid value \"99999999999999999999\" for flag -mtu: parse error",
            ),
            ("-debug=maybe", "invalid boolean value \"maybe\" for flag -debug: parse error"),
            ("---x", "bad flag syntax: ---x"),
            ("-=x", "bad flag syntax: -=x"),
        ] {
            assert_eq!(parse(line), Err(Refused::Wrong(text.into())), "{line}");
        }
        assert_eq!(parse("-h"), Err(Refused::Help));
        assert!(usage().contains("-ssh-port int"));
    }
}
