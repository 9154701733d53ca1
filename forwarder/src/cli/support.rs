//! `support`: one archive with what somebody who helps has to know: configuration, state, counters, log, host.
//!
//! Secrets are left out: values of keys that look like one ([`SECRET_WORDS`]) are replaced, in every file. What was left out
//! or could not be had is said in `README`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use flate2::Compression;
use flate2::write::GzEncoder;
use portway_api::control::NetworkInfo;
use serde_json::Value;

use super::{Failure, Target, client, doctor, listing};

/// Bytes of a log or state file that are taken, from its end.
const MOST: u64 = 1 << 20;

/// What stands in the place of a secret.
const LEFT_OUT: &str = "(left out)";
/// Words in a key that make its value a secret.
const SECRET_WORDS: [&str; 7] =
    ["secret", "token", "passw", "passphrase", "credential", "authorization", "private"];

/// The options of `support`.
#[derive(Debug, clap::Args)]
pub(super) struct SupportArgs {
    /// Where the archive goes [default: portway-support-TIME.tar.gz here]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The configuration file, to be in it too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    at: Target,
}

/// Resources of the API that go in, and their names there.
const RESOURCES: [(&str, &str); 10] = [
    ("/v1/network", "network.json"),
    ("/v1/links", "links.json"),
    ("/v1/ports", "ports.json"),
    ("/v1/leases", "leases.json"),
    ("/v1/flows?limit=1000", "flows.json"),
    ("/v1/stats", "stats.json"),
    ("/v1/dns", "dns.json"),
    ("/v1/agents", "agents.json"),
    ("/v1/events", "events.json"),
    ("/v1/metrics", "metrics.txt"),
];

/// What goes in.
struct Report {
    files: Vec<(String, String)>,
    notes: Vec<String>,
}

pub(super) fn support(args: &SupportArgs) -> Result<ExitCode, Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let name = format!("portway-support-{now}");
    let output = args.output.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
    // A network that is named is meant; the one that is not may be what does not run.
    if args.at.api.is_some() || args.at.network != "default" {
        client(&args.at)?.get::<NetworkInfo>("/v1/network").map_err(Failure::failed)?;
    }
    let report = collect(args);
    let written = write(&output, &name, now, &report);
    written.map_err(|e| Failure::failed(format!("{}: {e}", output.display())))?;
    listing::say(&format!(
        "wrote {} ({} files; secrets are left out)",
        output.display(),
        report.files.len() + 1
    ));
    Ok(ExitCode::SUCCESS)
}

fn collect(args: &SupportArgs) -> Report {
    let mut report = Report { files: Vec::new(), notes: Vec::new() };
    report.add("version.txt", &format!("portway {}\n", env!("CARGO_PKG_VERSION")));
    match serde_json::to_string_pretty(&doctor::checks(&args.at)) {
        Ok(text) => report.add("doctor.json", &text),
        Err(error) => report.notes.push(format!("doctor: {error}")),
    }
    for path in
        ["/proc/version", "/etc/os-release", "/etc/resolv.conf", "/proc/net/route", "/proc/net/ipv6_route"]
    {
        report.file(&format!("host{}", path.replace('/', "-")), Path::new(path));
    }
    if let Some(config) = &args.config {
        report.file("config.toml", config);
    }
    match client(&args.at) {
        Err(failure) => report.notes.push(failure.line),
        Ok(network) => {
            for (route, name) in RESOURCES {
                match network.text(route) {
                    Ok(text) => report.add(name, &text),
                    Err(error) => report.notes.push(format!("{route}: {error}")),
                }
            }
            if let Ok(info) = network.get::<NetworkInfo>("/v1/network") {
                report.process(&info);
            }
        }
    }
    report
}

impl Report {
    fn add(&mut self, name: &str, text: &str) {
        self.files.push((name.to_owned(), redacted(name, text)));
    }

    /// The end of a file of this host.
    fn file(&mut self, name: &str, path: &Path) {
        match tail(path) {
            Ok(text) => self.add(name, &text),
            Err(error) => self.notes.push(format!("{}: {error}", path.display())),
        }
    }

    /// What the running process tells beside its API.
    fn process(&mut self, info: &NetworkInfo) {
        let proc = PathBuf::from(format!("/proc/{}", info.pid));
        match std::fs::read(proc.join("cmdline")) {
            Ok(words) => {
                let words: Vec<String> = words
                    .split(|b| *b == 0)
                    .filter(|w| !w.is_empty())
                    .map(|w| String::from_utf8_lossy(w).into_owned())
                    .collect();
                self.add("cmdline.txt", &format!("{}\n", words.join("\n")));
            }
            Err(error) => self.notes.push(format!("cmdline: {error}")),
        }
        self.file("status.txt", &proc.join("status"));
        self.file("limits.txt", &proc.join("limits"));
        if let Some(log) = &info.log_file {
            self.file("log.txt", Path::new(log));
        } else {
            self.notes.push("log: it goes to standard error (journalctl has it for a unit)".into());
        }
        if let Some(dir) = &info.state_dir {
            for name in ["leases.json", "ports.json"] {
                self.file(&format!("state-{name}"), &Path::new(dir).join(name));
            }
        }
    }
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    if len > MOST {
        file.seek(SeekFrom::Start(len - MOST))?;
    }
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a key's value is a secret.
fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| key.contains(word))
}

/// A file's `text` without secrets: JSON by its keys, everything else line by line.
fn redacted(name: &str, text: &str) -> String {
    let json = if name.ends_with(".json") { serde_json::from_str::<Value>(text).ok() } else { None };
    match json.map(redacted_value).as_ref().map(serde_json::to_string_pretty) {
        Some(Ok(pretty)) => pretty + "\n",
        _ => redacted_lines(text),
    }
}

fn redacted_value(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let of = |(key, value): (String, Value)| {
                let value = if is_secret(&key) { LEFT_OUT.into() } else { redacted_value(value) };
                (key, value)
            };
            map.into_iter().map(of).collect()
        }
        Value::Array(list) => list.into_iter().map(redacted_value).collect(),
        Value::String(text) => redacted_lines(&text).trim_end_matches('\n').into(),
        other => other,
    }
}

/// The values of keys that look like secrets go: `key = value`, `"key": value`, `key: value`, `--key=value`, and the word after
/// `--key`; and with them the rest of their lines, for it is better to know too little. So do lines with a URL that has a
/// user in it, and the paths of `https://`, where resolvers' tokens stand.
fn redacted_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut next = false;
    for line in text.split_inclusive('\n') {
        let userinfo = line.match_indices("://").any(|(at, _)| {
            let host = line[at + 3..].split(['/', ' ', '"']).next().unwrap_or_default();
            host.contains('@')
        });
        if std::mem::take(&mut next) || userinfo {
            out.push_str(LEFT_OUT);
            out.push('\n');
            continue;
        }
        // An option alone on its line, as in a command line: its value is the next.
        next = line.starts_with('-') && !line.contains('=') && is_secret(line);
        match end_of_secret_key(line) {
            Some(end) => {
                out.push_str(&without_paths(&line[..end]));
                out.push(' ');
                out.push_str(LEFT_OUT);
                out.push('\n');
            }
            None => out.push_str(&without_paths(line)),
        }
    }
    out
}

/// Where in `line` the value of a key begins that looks like a secret. A word by itself, such as a VM's name, is none.
fn end_of_secret_key(line: &str) -> Option<usize> {
    let in_key = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let mut at = 0;
    while let Some(start) = line[at..].find(in_key).map(|n| at + n) {
        let end = line[start..].find(|c| !in_key(c)).map_or(line.len(), |n| start + n);
        let rest = &line[end..];
        let quoted = rest.starts_with(['"', '\'']);
        let after = rest.trim_start_matches(['"', '\'', ' ', '\t']);
        let assigned =
            after.starts_with('=') || after.starts_with(": ") || (quoted && after.starts_with(':'));
        if assigned && is_secret(&line[start..end]) {
            return Some(line.len() - after.len() + 1);
        }
        at = end;
    }
    None
}

/// `text` with `https://host` in place of `https://host/path`.
fn without_paths(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("https://") {
        let (before, url) = rest.split_at(at + "https://".len());
        let path = url.find(|c: char| c == '/' || c.is_whitespace() || "\"',<>)]}?#".contains(c));
        let (host, after) = url.split_at(path.unwrap_or(url.len()));
        let end = after.find(|c: char| c.is_whitespace() || "\"',<>)]}".contains(c)).unwrap_or(after.len());
        out.push_str(before);
        out.push_str(host);
        if end > 1 {
            out.push('/');
            out.push_str(LEFT_OUT);
        }
        rest = &after[end..];
    }
    out + rest
}

fn write(path: &Path, name: &str, now: u64, report: &Report) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;

    // It tells much about this host: for its owner alone.
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let mut readme = String::from(
        "What `portway support` collected. Values of keys that look like secrets are left out.\nNot had:\n",
    );
    for note in &report.notes {
        readme.push_str(&format!("- {note}\n"));
    }
    for (file, text) in std::iter::once(&("README".to_owned(), readme)).chain(&report.files) {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now);
        archive.append_data(&mut header, format!("{name}/{file}"), text.as_bytes())?;
    }
    archive.into_inner()?.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out_and_the_rest_is_not() {
        let text = "mtu = 1500\npassphrase = \"x\"\n\"api_token\": \"y\",\n--secret\nz\n--mtu\nhttp://u:v@proxy/\nplain\n";
        let left = redacted("config.toml", text);
        assert!(!left.contains(['x', 'y', 'z', 'v']), "{left}");
        assert!(
            left.contains("mtu = 1500\n") && left.ends_with("plain\n") && left.contains("--mtu\n"),
            "{left}"
        );
    }

    #[test]
    fn json_is_redacted_by_key_and_a_vm_that_is_called_private_is_shown() {
        let text = r#"[{"name":"private","ip":"192.168.127.2","nested":{"Auth_Token":["a","b"],"mtu":1}},{"name":"b"}]"#;
        let left = redacted("links.json", text);
        let value: Value = serde_json::from_str(&left).unwrap();
        assert_eq!((&value[0]["name"], &value[1]["name"]), (&"private".into(), &"b".into()));
        assert_eq!(value[0]["nested"], serde_json::json!({"Auth_Token": LEFT_OUT, "mtu": 1}));
        assert!(left.lines().count() > 5, "{left}");
        let line = "--publish\n0:private:22\nqemu:unix:/run/vm,name=private\n";
        assert_eq!(redacted("cmdline.txt", line), line);
    }

    #[test]
    fn the_path_of_an_encrypted_resolver_is_its_token() {
        let left =
            redacted("network.json", r#"{"dns_upstreams":["https://dns.example:8443/s3cret/q","tls://a"]}"#);
        assert!(!left.contains("s3cret") && left.contains("https://dns.example:8443/(left out)\""), "{left}");
        let line = "--dns-upstream\nexample=https://dns.example/s3cret?x=s3cret\nhttps://plain/\n";
        assert_eq!(
            redacted("cmdline.txt", line),
            "--dns-upstream\nexample=https://dns.example/(left out)\nhttps://plain\n"
        );
    }
}
