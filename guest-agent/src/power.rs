//! The power button, and the way down.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

const INPUT: &str = "/dev/input";
/// `struct input_event` of a 64-bit kernel: 16 bytes of time, u16 type, u16 code, i32 value.
const EVENT_LEN: usize = 24;
/// `EV_KEY` and `KEY_POWER` of linux/input-event-codes.h, and the value of a press.
const POWER_PRESSED: (u16, u16, i32) = (1, 116, 1);

/// One input device that may carry the power button; ACPI's button and a keyboard both look like this.
#[derive(Debug)]
pub(crate) struct Button(File);

impl Button {
    /// Every input device of the guest (modules `evdev` and `button` make the ACPI one appear).
    pub(crate) fn all() -> io::Result<Vec<Self>> {
        let mut buttons = Vec::new();
        if !Path::new(INPUT).exists() {
            return Ok(buttons);
        }
        for entry in fs::read_dir(INPUT)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("event") {
                let file = OpenOptions::new()
                    .read(true)
                    .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_CLOEXEC.bits())
                    .open(entry.path())?;
                buttons.push(Self(file));
            }
        }
        Ok(buttons)
    }

    /// Reads what is there; true if the power button was pressed.
    pub(crate) fn pressed(&mut self) -> io::Result<bool> {
        let mut buffer = [0; EVENT_LEN * 16];
        let mut pressed = false;
        loop {
            match self.0.read(&mut buffer) {
                Ok(0) => return Ok(pressed),
                Ok(read) => pressed |= has_power_press(buffer.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(pressed),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Button {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn has_power_press(events: &[u8]) -> bool {
    events.chunks_exact(EVENT_LEN).any(|event| match event {
        [_, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, t0, t1, c0, c1, v0, v1, v2, v3] => {
            let kind = u16::from_ne_bytes([*t0, *t1]);
            let code = u16::from_ne_bytes([*c0, *c1]);
            (kind, code, i32::from_ne_bytes([*v0, *v1, *v2, *v3])) == POWER_PRESSED
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(code.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        assert!(has_power_press(&[event(0, 0, 0), event(1, 116, 1)].concat()));
        assert!(!has_power_press(&event(1, 116, 0)), "the release is not a press");
        assert!(!has_power_press(&event(1, 30, 1)), "another key");
        assert!(!has_power_press(&event(1, 116, 1)[..20]), "a torn event");
    }
}
