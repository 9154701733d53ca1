//! A carrier whose frames are seen by captures: the same carrier, wrapped while at least one capture wants it.
//!
//! Wrapping makes captures cost nothing when there are none: no carrier asks for every frame whether somebody looks.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use portway_netstack::{FrameSink, Offload};

use super::{Batch, Carrier};
use crate::capture::Capture;

/// Who looks at a link's frames.
#[derive(Debug, Clone)]
pub struct Taps {
    /// The link's name.
    pub link: Arc<str>,
    /// The captures that want it; never empty.
    pub captures: Vec<Arc<Capture>>,
}

impl Taps {
    fn see(&self, to_guest: bool, frame: &[u8]) {
        for capture in &self.captures {
            capture.see(&self.link, to_guest, frame);
        }
    }
}

/// A carrier and those who look.
#[derive(Debug)]
pub struct Tapped {
    pub(super) inner: Carrier,
    taps: Taps,
}

impl Tapped {
    pub(super) const fn new(inner: Carrier, taps: Taps) -> Self {
        Self { inner, taps }
    }

    pub(super) fn into_inner(self) -> Carrier {
        self.inner
    }

    pub(super) fn receive(
        &mut self,
        mut handle: impl FnMut(&[u8], Offload) -> ControlFlow<()>,
    ) -> io::Result<Batch> {
        let taps = &self.taps;
        // As a trait object: `Carrier::receive` calls this, and would otherwise be made for ever deeper closures.
        let see: &mut dyn FnMut(&[u8], Offload) -> ControlFlow<()> = &mut |frame, offload| {
            taps.see(false, frame);
            handle(frame, offload)
        };
        self.inner.receive(see)
    }

    pub(super) fn frame<R>(
        &mut self,
        len: usize,
        offload: Offload,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        let taps = &self.taps;
        let mut fill = Some(fill);
        let mut result = None;
        let seen: &mut dyn FnMut(&mut [u8]) = &mut |frame| {
            if let Some(fill) = fill.take() {
                result = Some(fill(frame));
                taps.see(true, frame);
            }
        };
        self.inner.frame(len, offload, seen)?;
        result
    }
}
