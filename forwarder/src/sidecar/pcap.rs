//! `--pcap FILE`: a capture of everything, written by a thread of its own.
//!
//! A disk that is slower than the network loses frames, which the file tells; it never holds the network up. When the disk
//! fails the capture ends, and the network goes on.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, anyhow};

use crate::capture::pcapng::Encoder;
use crate::capture::{Capture, Filter, Reader};
use crate::driver::Driver;

/// A capture that is not written yet.
pub(super) struct Pcap {
    file: File,
    reader: Reader,
    links: Vec<String>,
    shown: String,
}

impl Pcap {
    /// Opens `path` for the frames of every link.
    pub(super) fn open(driver: &mut Driver, path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path)?;
        let (capture, reader) = Capture::new(Filter::default());
        let links = driver.capture(capture).map_err(|e| anyhow!("{e}"))?;
        Ok(Self { file, reader, links, shown: path.display().to_string() })
    }

    /// Begins to write. The thread ends behind the driver.
    pub(super) fn start(self) -> anyhow::Result<JoinHandle<()>> {
        let thread = std::thread::Builder::new().name("pcap".into());
        let write = move || {
            if let Err(error) = write(self.file, self.reader, &self.links) {
                tracing::error!(%error, path = self.shown, "the capture has ended");
            }
        };
        thread.spawn(write).context("cannot start the thread that writes it")
    }
}

fn write(mut file: File, mut reader: Reader, links: &[String]) -> io::Result<()> {
    let mut encoder = Encoder::default();
    let (mut chunk, mut frames) = (Vec::new(), Vec::new());
    encoder.begin(links, &mut chunk);
    loop {
        file.write_all(&chunk)?;
        chunk.clear();
        frames.clear();
        if !reader.read_blocking(&mut frames) {
            return Ok(());
        }
        for frame in &frames {
            encoder.frame(frame, &mut chunk);
        }
    }
}
