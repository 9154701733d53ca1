//! What survives a restart, in the state directory: leases.
//!
//! ```text
//!  control thread ─► Keeper::keep (the newest replaces what waits) ─► its thread: write · fsync · rename · fsync
//! ```
//! The file is written whole beside the old one, which it then replaces: a crash, of the process or of the machine, leaves
//! the old file or the new one. A disk that is slow delays neither DHCP nor DNS: the answer to a guest does not wait for
//! it. A lease that a crash keeps from being written is the same guest's again as soon as that asks (see
//! `portway_netstack::dhcp`).

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portway_netstack::dhcp::LeaseReport;
use serde::{Deserialize, Serialize};

const FILE: &str = "leases.json";

#[derive(Serialize, Deserialize)]
struct Kept {
    ip: std::net::Ipv4Addr,
    mac: String,
    /// Hexadecimal digits.
    #[serde(default)]
    client_id: Option<String>,
    name: Option<String>,
    /// Whether the name is the operator's.
    #[serde(default)]
    named: bool,
    /// Seconds since 1970.
    expires: u64,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Writes leases, on a thread of its own once it has been started.
#[derive(Debug)]
pub(super) struct Keeper {
    dir: PathBuf,
    waiting: Arc<Waiting>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: Mutex<Next>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Next {
    leases: Option<Vec<LeaseReport>>,
    ended: bool,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives leases to a [`Keeper`].
#[derive(Debug, Clone)]
pub(super) struct Keep(Arc<Waiting>);

impl Keep {
    /// Has `leases` written; what still waits is forgotten.
    pub(super) fn keep(&self, leases: Vec<LeaseReport>) {
        self.0.lock().leases = Some(leases);
        self.0.news.notify_one();
    }
}

impl Keeper {
    /// A keeper of the leases in `dir`; what is given to it waits until it is started.
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), waiting: Arc::default(), thread: None }
    }

    /// Starts its thread.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub(super) fn start(&mut self) -> io::Result<()> {
        let (dir, waiting) = (self.dir.clone(), Arc::clone(&self.waiting));
        let thread = std::thread::Builder::new().name("state".into());
        self.thread = Some(thread.spawn(move || write_all(&dir, &waiting))?);
        Ok(())
    }

    /// The end that leases are given to.
    pub(super) fn sender(&self) -> Keep {
        Keep(Arc::clone(&self.waiting))
    }

    /// Writes `leases` as the last ones, and waits until that is done.
    pub(super) fn finish(mut self, leases: &[LeaseReport]) {
        self.waiting.lock().ended = true;
        self.waiting.news.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps leases panicked");
        }
        complain(&self.dir, keep_leases(&self.dir, leases), &mut false);
    }
}

fn write_all(dir: &Path, waiting: &Waiting) {
    let mut failing = false;
    loop {
        let leases = {
            let mut next = waiting.lock();
            loop {
                if next.ended {
                    return;
                }
                if let Some(leases) = next.leases.take() {
                    break leases;
                }
                next = waiting.news.wait(next).unwrap_or_else(PoisonError::into_inner);
            }
        };
        complain(dir, keep_leases(dir, &leases), &mut failing);
    }
}

/// Says a failure, the first of a row alone: a full disk is not helped by a full log.
fn complain(dir: &Path, written: io::Result<()>, failing: &mut bool) {
    if let Err(error) = &written
        && !*failing
    {
        tracing::warn!(%error, dir = %dir.display(), "leases could not be kept");
    }
    *failing = written.is_err();
}

/// Keeps `leases`.
fn keep_leases(dir: &Path, leases: &[LeaseReport]) -> io::Result<()> {
    let kept = leases.iter().filter_map(|l| {
        let expires = now() + l.remaining?.as_secs();
        let hex = |id: &[u8]| id.iter().map(|b| format!("{b:02x}")).collect();
        let client_id = l.client_id.as_deref().map(hex);
        let (mac, name) = (l.mac.to_string(), l.name.clone());
        // Fixed ones too: a guest in the midst of its lease goes by its name at once.
        Some(Kept { ip: l.ip, mac, client_id, name, named: l.named, expires })
    });
    let text = serde_json::to_vec(&kept.collect::<Vec<_>>()).map_err(io::Error::other)?;
    let new = dir.join(format!("{FILE}.new"));
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))?;
    // The rename is an entry of the directory: without this it may be lost though the file is not.
    std::fs::File::open(dir)?.sync_all()
}

/// What was kept and has not ended; a file that cannot be read counts as none, and is said. No lease has more than `longest`
/// left, whatever the clock was when it was written.
pub(super) fn leases(dir: &Path, longest: Duration) -> Vec<LeaseReport> {
    let text = match std::fs::read(dir.join(FILE)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(%error, dir = %dir.display(), "kept leases cannot be read");
            return Vec::new();
        }
    };
    let kept: Vec<Kept> = serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(%error, dir = %dir.display(), "kept leases cannot be used");
        Vec::new()
    });
    let now = now();
    let restore = |k: Kept| {
        let remaining = Duration::from_secs(k.expires.checked_sub(now).filter(|s| *s > 0)?).min(longest);
        let mac = k.mac.parse().ok()?;
        let client_id = match k.client_id {
            Some(hex) => Some(bytes_of(&hex)?),
            None => None,
        };
        Some(LeaseReport {
            ip: k.ip,
            mac,
            client_id,
            port: None,
            name: k.name,
            named: k.named,
            remaining: Some(remaining),
            age: Duration::ZERO,
            fixed: false,
        })
    };
    kept.into_iter().filter_map(restore).collect()
}

/// The bytes that pairs of hexadecimal digits stand for.
fn bytes_of(hex: &str) -> Option<Box<[u8]>> {
    let pairs = hex.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok().filter(|p| p.len() == 2)?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn lease(last: u8) -> LeaseReport {
        LeaseReport {
            ip: [192, 168, 127, last].into(),
            mac: portway_netstack::Mac([2, 0, 0, 0, 0, last]),
            client_id: last.is_multiple_of(2).then(|| vec![255, 0, last].into()),
            port: None,
            name: Some("web".into()),
            named: true,
            remaining: Some(Duration::from_secs(100)),
            age: Duration::ZERO,
            fixed: false,
        }
    }

    #[test]
    fn leases_are_read_back_and_a_torn_file_is_no_lease() {
        let dir = tempfile::tempdir().unwrap();
        keep_leases(dir.path(), &[lease(2), lease(3), LeaseReport { fixed: true, ..lease(4) }]).unwrap();
        let back = leases(dir.path(), HOUR);
        let who = |l: &LeaseReport| (l.ip, l.mac, l.client_id.clone(), l.name.clone(), l.named);
        let expected = [who(&lease(2)), who(&lease(3)), who(&lease(4))];
        assert_eq!(back.iter().map(who).collect::<Vec<_>>(), expected);
        std::fs::write(dir.path().join(FILE), "[{\"ip\":").unwrap();
        assert!(leases(dir.path(), HOUR).is_empty());
    }

    #[test]
    fn a_file_of_an_earlier_version_is_read_and_a_crash_before_the_rename_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let old = r#"[{"ip":"192.168.127.9","mac":"02:00:00:00:00:09","name":null,"expires":99999999999}]"#;
        std::fs::write(dir.path().join(FILE), old).unwrap();
        std::fs::write(dir.path().join(format!("{FILE}.new")), "[{\"ip\":\"192.1").unwrap();
        assert_eq!(leases(dir.path(), HOUR)[0].ip, std::net::Ipv4Addr::new(192, 168, 127, 9));
    }

    #[test]
    fn the_keeper_writes_the_newest_and_at_the_end_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::new(dir.path());
        keeper.start().unwrap();
        let sender = keeper.sender();
        for last in 2..200 {
            sender.keep(vec![lease(last)]);
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while leases(dir.path(), HOUR).first().map(|l| l.ip) != Some(lease(199).ip) {
            assert!(std::time::Instant::now() < deadline, "not written");
            std::thread::yield_now();
        }
        keeper.finish(&[lease(7)]);
        assert_eq!(leases(dir.path(), HOUR)[0].ip, lease(7).ip);
        assert!(!dir.path().join(format!("{FILE}.new")).exists());
    }

    #[test]
    fn a_directory_that_is_gone_is_an_error_and_no_panic() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        assert!(keep_leases(&gone, &[lease(2)]).is_err());
        let mut keeper = Keeper::new(&gone);
        keeper.start().unwrap();
        keeper.sender().keep(vec![lease(2)]);
        keeper.finish(&[]);
    }

    #[test]
    fn a_clock_that_jumped_between_two_runs_makes_no_lease_endless_and_ends_those_it_has_passed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |expires: u64, last: u8| {
            format!(
                r#"{{"ip":"192.168.127.{last}","mac":"02:00:00:00:00:0{last}","name":null,"expires":{expires}}}"#
            )
        };
        // Written when the clock was ten years ahead, and when it was a day behind.
        let text = format!("[{},{}]", at(now() + 315_360_000, 8), at(now() - 86_400, 9));
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let back = leases(dir.path(), HOUR);
        assert_eq!(
            back.iter().map(|l| (l.ip.octets()[3], l.remaining)).collect::<Vec<_>>(),
            [(8, Some(HOUR))]
        );
    }
}
