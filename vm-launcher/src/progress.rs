//! What is being prepared, as a line on the terminal that the next one takes the place of. Without a terminal nothing is shown:
//! what was made is told in lines of its own anyway.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

/// The line.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Whether there is somebody to see it, and how much there is to do.
    steps: Option<usize>,
    done: usize,
    shown: bool,
}

impl Progress {
    /// For so many steps, on stderr if that is a terminal.
    pub(crate) fn new(steps: usize) -> Self {
        Self { steps: io::stderr().is_terminal().then_some(steps), done: 0, shown: false }
    }

    /// Says what is being done now.
    pub(crate) fn step(&mut self, what: impl Display) {
        self.done += 1;
        if let Some(steps) = self.steps {
            // A terminal that is gone needs no line.
            let _ = write!(io::stderr().lock(), "{}", line(self.done, steps, &what));
            self.shown = true;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr().lock(), "{CLEAR}");
        }
    }
}

/// The beginning of the line, and everything behind it removed (ECMA-48 EL).
const CLEAR: &str = "\r\x1b[K";

fn line(done: usize, steps: usize, what: &impl Display) -> String {
    format!("{CLEAR}portway: [{done}/{steps}] {what} …")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_takes_the_place_of_the_last_and_says_how_far_it_is() {
        assert_eq!(line(1, 3, &"making d.qcow2"), "\r\x1b[Kportway: [1/3] making d.qcow2 …");
    }

    #[test]
    fn nobody_sees_it_without_a_terminal() {
        let mut progress = Progress { steps: None, done: 0, shown: false };
        progress.step("making d.qcow2");
        assert!(!progress.shown && progress.done == 1);
    }
}
