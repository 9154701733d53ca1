//! A file of the host that is read again when it changes.
//!
//! There is no inotify watch: resolv.conf is replaced by rename, through symlinks, on overlay mounts and by
//! programs that truncate it in place. Instead the file's identity (device, inode, size, mtime, ctime) is compared
//! before a query uses it, at most once a second. A missing file is an empty one; a file that cannot be read leaves
//! what was known, and says so once.

use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Time between two looks at a file.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// Largest file read; a larger one is refused (block lists in hosts files reach some MiB).
const SIZE_MAX: u64 = 16 << 20;
/// A file changed this recently may change again within its clock tick, unseen: it is read again at the next look.
const SETTLED: Duration = Duration::from_millis(100);

#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// A parsed file, and when it was last looked at.
#[derive(Debug)]
pub(super) struct Watched<T> {
    path: PathBuf,
    parse: fn(&str) -> T,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    value: Arc<T>,
    stamp: Option<Stamp>,
    looked: Option<Instant>,
    failing: bool,
}

impl<T: Default + PartialEq> Watched<T> {
    /// A watch on `path`; nothing is read before `current`.
    pub(super) fn new(path: PathBuf, parse: fn(&str) -> T) -> Self {
        let state = State { value: Arc::default(), stamp: None, looked: None, failing: false };
        Self { path, parse, state: Mutex::new(state) }
    }

    /// What the file says now, and whether that is something new.
    pub(super) fn current(&self, now: Instant) -> (Arc<T>, bool) {
        let mut state = self.lock();
        if state.looked.is_some_and(|at| now.saturating_duration_since(at) < INTERVAL) {
            return (Arc::clone(&state.value), false);
        }
        state.looked = Some(now);
        let value = match read_if_changed(&self.path, state.stamp.as_ref()) {
            Ok(None) => return (Arc::clone(&state.value), false),
            Ok(Some((text, stamp))) => {
                state.stamp = stamp;
                state.failing = false;
                (self.parse)(&text)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                state.stamp = None;
                state.failing = false;
                T::default()
            }
            Err(error) => {
                if !state.failing {
                    tracing::warn!(path = %self.path.display(), %error, "cannot read; what it said before stays");
                }
                state.failing = true;
                return (Arc::clone(&state.value), false);
            }
        };
        let changed = *state.value != value;
        if changed {
            state.value = Arc::new(value);
        }
        (Arc::clone(&state.value), changed)
    }

    /// Has the next `current` look at the file, however soon it comes.
    pub(super) fn look_again(&self) {
        self.lock().looked = None;
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The text of `path` and its stamp, unless the stamp is still `known`. No stamp: read again next time.
fn read_if_changed(path: &Path, known: Option<&Stamp>) -> io::Result<Option<(String, Option<Stamp>)>> {
    let found = stamp_of(&std::fs::metadata(path)?)?;
    if known == Some(&found) {
        return Ok(None);
    }
    let file = std::fs::File::open(path)?;
    let meta = file.metadata()?;
    let stamp = stamp_of(&meta)?; // of what is read, should the file have been replaced meanwhile
    let mut bytes = Vec::new();
    file.take(SIZE_MAX).read_to_end(&mut bytes)?;
    let settled = meta
        .modified()
        .ok()
        .and_then(|at| SystemTime::now().duration_since(at).ok())
        .is_some_and(|age| age > SETTLED);
    Ok(Some((String::from_utf8_lossy(&bytes).into_owned(), settled.then_some(stamp))))
}

fn stamp_of(meta: &std::fs::Metadata) -> io::Result<Stamp> {
    // Opening a FIFO would block for ever.
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if meta.len() > SIZE_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {SIZE_MAX} bytes")));
    }
    Ok(Stamp {
        dev: meta.dev(),
        ino: meta.ino(),
        size: meta.size(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        ctime: (meta.ctime(), meta.ctime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(text: &str) -> String {
        text.to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_replaced_file_is_seen_within_a_second_and_a_missing_one_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let file = Watched::new(path.clone(), owned);
        assert_eq!(*file.current(Instant::now()).0, "");
        std::fs::write(&path, "one").unwrap();
        assert_eq!(*file.current(Instant::now()).0, "", "looked at less than a second ago");
        tokio::time::advance(INTERVAL).await;
        assert_eq!(*file.current(Instant::now()).0, "one");
        let other = dir.path().join("new");
        std::fs::write(&other, "two").unwrap();
        std::fs::rename(&other, &path).unwrap();
        tokio::time::advance(INTERVAL).await;
        assert_eq!(*file.current(Instant::now()).0, "two");
        std::fs::remove_file(&path).unwrap();
        tokio::time::advance(INTERVAL).await;
        assert_eq!(*file.current(Instant::now()).0, "");
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_read_leaves_what_was_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        std::fs::write(&path, "one").unwrap();
        let file = Watched::new(path.clone(), owned);
        file.current(Instant::now());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        tokio::time::advance(INTERVAL).await;
        assert_eq!(*file.current(Instant::now()).0, "one");
    }
}
