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

use super::{Failure, Target, client, doctor, listing};

/// Bytes of a log or state file that are taken, from its end.
const MOST: u64 = 1 << 20;

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
const RESOURCES: [(&str, &str); 8] = [
    ("/v1/network", "network.json"),
    ("/v1/links", "links.json"),
    ("/v1/ports", "ports.json"),
    ("/v1/leases", "leases.json"),
    ("/v1/flows?limit=1000", "flows.json"),
    ("/v1/stats", "stats.json"),
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
        self.files.push((name.to_owned(), redacted(text)));
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

/// `text` with the values of keys that look like secrets replaced: `key = value`, `"key": value`, `--key=value`, and the
/// word after `--key`. Whole lines go: it is better to know too little.
fn redacted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut next = false;
    for line in text.split_inclusive('\n') {
        let lower = line.to_ascii_lowercase();
        let found = SECRET_WORDS.iter().filter_map(|w| lower.find(w)).min();
        let userinfo = lower.match_indices("://").any(|(at, _)| {
            let host = lower[at + 3..].split(['/', ' ', '"']).next().unwrap_or_default();
            host.contains('@')
        });
        if std::mem::take(&mut next) || userinfo {
            out.push_str("(left out)\n");
            continue;
        }
        match found {
            None => out.push_str(line),
            Some(at) => {
                let end = line[at..].find(['=', ':', ' ']).map(|n| at + n);
                // An option alone on its line, as in a command line: its value is the next.
                next = end.is_none();
                out.push_str(end.map_or(line, |end| &line[..=end]));
                if end.is_some() {
                    out.push_str(" (left out)\n");
                }
            }
        }
    }
    out
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
        let left = redacted(text);
        assert!(!left.contains(['x', 'y', 'z', 'v']), "{left}");
        assert!(
            left.contains("mtu = 1500\n") && left.ends_with("plain\n") && left.contains("--mtu\n"),
            "{left}"
        );
    }
}
