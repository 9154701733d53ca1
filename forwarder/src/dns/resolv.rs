//! The host's resolver configuration (resolv.conf(5)), read again when it changes.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// How often the file is looked at, at the most.
const LOOK: Duration = Duration::from_secs(1);
/// Resolvers used of one file, as glibc does.
const SERVERS: usize = 3;

/// What a file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Resolv {
    pub(super) servers: Vec<SocketAddr>,
    pub(super) search: Vec<String>,
}

pub(super) fn parse(text: &str) -> Resolv {
    let mut out = Resolv::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") if out.servers.len() < SERVERS => {
                // The scope of a link-local address is given by its number or name; only the number can be kept.
                let Some(text) = words.next() else { continue };
                let (ip, scope) = text.split_once('%').unwrap_or((text, "0"));
                match ip.parse() {
                    Ok(IpAddr::V4(ip)) => out.servers.push((ip, 53).into()),
                    Ok(IpAddr::V6(ip)) => {
                        let scope = scope.parse().ok().or_else(|| nix::net::if_::if_nametoindex(scope).ok());
                        out.servers.push(std::net::SocketAddrV6::new(ip, 53, 0, scope.unwrap_or(0)).into());
                    }
                    Err(_) => {}
                }
            }
            // The last of these lines counts.
            Some("search" | "domain") => {
                out.search = words
                    .map(|w| w.trim_end_matches('.').to_ascii_lowercase())
                    .filter(|w| !w.is_empty())
                    .collect();
            }
            _ => {}
        }
    }
    out
}

/// A file and what it said last.
#[derive(Debug)]
pub(super) struct Watched {
    path: PathBuf,
    looked: Option<Instant>,
    seen: Option<(SystemTime, u64, u64)>,
    pub(super) resolv: Resolv,
}

impl Watched {
    pub(super) fn new(path: PathBuf) -> Self {
        let mut watched = Self { path, looked: None, seen: None, resolv: Resolv::default() };
        watched.refresh();
        watched
    }

    /// Reads the file again if it is another one, or another text, than last time.
    pub(super) fn refresh(&mut self) {
        use std::os::unix::fs::MetadataExt;
        let now = Instant::now();
        if self.looked.is_some_and(|at| now.duration_since(at) < LOOK) {
            return;
        }
        self.looked = Some(now);
        let meta = std::fs::metadata(&self.path).ok();
        let seen = meta.and_then(|m| Some((m.modified().ok()?, m.len(), m.ino())));
        if seen != self.seen || seen.is_none() {
            self.seen = seen;
            self.resolv = std::fs::read_to_string(&self.path).map(|t| parse(&t)).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_servers_and_the_last_search_line_count() {
        let text = "# x\nnameserver 192.0.2.1\nnameserver bad\nnameserver ::1\nsearch a.test\nnameserver fe80::1%2\nnameserver 192.0.2.4\nsearch Corp.test. lan\noptions ndots:5\n";
        let resolv = parse(text);
        assert_eq!(resolv.servers.len(), 3);
        assert_eq!(resolv.servers[0], "192.0.2.1:53".parse().unwrap());
        assert_eq!(resolv.search, ["corp.test", "lan"]);
    }
}
