//! KVM or TCG.
//!
//! `/dev/kvm` may be there and still boot nothing: inside some VMs it answers, but without `vmx` or `svm` among the
//! CPU's flags a stock kernel does not come up. So `auto` takes KVM only when the device opens and the flags say so.

use std::fs::{self, OpenOptions};

use crate::LaunchError;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accel {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// The host's own virtualization.
    Kvm,
    /// QEMU's translator: works everywhere, slowly.
    Tcg,
}

/// What was taken, and why: one line for the user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) kvm: bool,
    pub(crate) reason: String,
}

/// What the host offers.
#[derive(Debug)]
pub(crate) struct Host {
    /// Whether `/dev/kvm` opens for reading and writing, or why not.
    pub(crate) device: Result<(), String>,
    /// Whether the CPU says that it virtualizes; always so where no flag says it (arm64).
    pub(crate) cpu: bool,
}

impl Host {
    pub(crate) fn detect() -> Self {
        let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        // No cpuinfo, no flag: TCG is the answer that works.
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            device: device.map(drop).map_err(|error| format!("/dev/kvm: {error}")),
            cpu: !cfg!(target_arch = "x86_64") || virtualizes(&cpuinfo),
        }
    }
}

fn virtualizes(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

impl Accel {
    /// Decides by what the host offers.
    pub(crate) fn choose(self, host: &Host) -> Result<Choice, LaunchError> {
        let tcg = |reason: String| Ok(Choice { kvm: false, reason });
        match (self, &host.device) {
            (Self::Tcg, _) => tcg("as asked".into()),
            (Self::Kvm, Ok(())) => Ok(Choice { kvm: true, reason: "as asked".into() }),
            (Self::Kvm, Err(why)) => Err(LaunchError::NoKvm(why.clone())),
            (Self::Auto, Err(why)) => tcg(why.clone()),
            (Self::Auto, Ok(())) if host.cpu => Ok(Choice { kvm: true, reason: "/dev/kvm works".into() }),
            (Self::Auto, Ok(())) => {
                tcg("/dev/kvm is there, but the CPU has neither vmx nor svm (a VM without nesting)".into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(device: bool, cpu: bool) -> Host {
        Host { device: if device { Ok(()) } else { Err("/dev/kvm: Permission denied".into()) }, cpu }
    }

    fn takes_kvm(accel: Accel, host: &Host) -> bool {
        accel.choose(host).expect("there is a choice").kvm
    }

    #[test]
    fn auto_takes_kvm_only_with_device_and_flag() {
        assert!(takes_kvm(Accel::Auto, &host(true, true)));
        assert!(!takes_kvm(Accel::Auto, &host(true, false)), "the device alone boots nothing");
        assert!(!takes_kvm(Accel::Auto, &host(false, true)));
    }

    #[test]
    fn the_choice_says_why() {
        let choice = Accel::Auto.choose(&host(false, true)).expect("TCG always works");
        assert_eq!(choice.reason, "/dev/kvm: Permission denied");
    }

    #[test]
    fn kvm_that_was_asked_for_is_an_error_without_the_device_and_tried_without_the_flag() {
        let error = Accel::Kvm.choose(&host(false, true)).expect_err("no device");
        assert!(error.to_string().contains("--accel tcg"), "{error}");
        assert!(takes_kvm(Accel::Kvm, &host(true, false)));
    }

    #[test]
    fn flags_are_words_of_the_flags_line() {
        assert!(virtualizes("flags\t\t: fpu vmx sse"));
        assert!(virtualizes("processor: 0\nflags : svm"));
        assert!(!virtualizes("flags : fpu\nvmx flags : vnmi"), "Intel's `vmx flags` line is another one");
        assert!(!virtualizes("flags : svm_lock"));
    }
}
