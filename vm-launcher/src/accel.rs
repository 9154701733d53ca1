//! What runs the guest's instructions: KVM, Hypervisor.framework, or QEMU's translator.
//!
//! `/dev/kvm` may be there and still boot nothing: inside some VMs it answers, but without `vmx` or `svm` among the
//! CPU's flags a stock kernel does not come up. So `auto` takes KVM only when the device opens and the flags say so. A guest
//! of another architecture than the host's is always translated.

use std::fs::{self, OpenOptions};

use crate::{Arch, LaunchError};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accel {
    /// The host's virtualization where it works, else TCG.
    #[default]
    Auto,
    /// Linux's virtualization.
    Kvm,
    /// macOS's virtualization.
    Hvf,
    /// QEMU's translator: works everywhere, slowly.
    Tcg,
}

/// What is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Kvm,
    Hvf,
    Tcg,
}

impl Kind {
    /// As QEMU has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Hvf => "hvf",
            Self::Tcg => "tcg",
        }
    }
}

/// What was taken, and why: one line for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) kind: Kind,
    pub(crate) reason: String,
}

/// What the host offers.
#[derive(Debug)]
pub(crate) struct Host {
    /// Whether this is macOS, with Hypervisor.framework and without KVM.
    pub(crate) macos: bool,
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
            macos: cfg!(target_os = "macos"),
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
    /// Decides by what the host offers and what the guest is.
    pub(crate) fn choose(self, host: &Host, guest: Arch) -> Result<Choice, LaunchError> {
        let choice = |kind, reason: &str| Ok(Choice { kind, reason: reason.to_owned() });
        let foreign = guest != Arch::HOST;
        let other = format!("the guest is {guest} and this host {}", Arch::HOST);
        match (self, &host.device) {
            (Self::Tcg, _) => choice(Kind::Tcg, "as asked"),
            (Self::Kvm | Self::Hvf, _) if foreign => Err(LaunchError::NoAccel(self.name(), other)),
            (Self::Auto, _) if foreign => choice(Kind::Tcg, &other),
            (Self::Hvf, _) if host.macos => choice(Kind::Hvf, "as asked"),
            (Self::Hvf, _) => Err(LaunchError::NoAccel("hvf", "only macOS has Hypervisor.framework".into())),
            (Self::Auto, _) if host.macos => choice(Kind::Hvf, "macOS has Hypervisor.framework"),
            (Self::Kvm, Ok(())) => choice(Kind::Kvm, "as asked"),
            (Self::Kvm, Err(why)) => Err(LaunchError::NoAccel("kvm", why.clone())),
            (Self::Auto, Err(why)) => choice(Kind::Tcg, why),
            (Self::Auto, Ok(())) if host.cpu => choice(Kind::Kvm, "/dev/kvm works"),
            (Self::Auto, Ok(())) => choice(
                Kind::Tcg,
                "/dev/kvm is there, but the CPU has neither vmx nor svm (a VM without nesting)",
            ),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Hvf => "hvf",
            Self::Tcg => "tcg",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(device: bool, cpu: bool) -> Host {
        let device = if device { Ok(()) } else { Err("/dev/kvm: Permission denied".into()) };
        Host { macos: false, device, cpu }
    }

    fn takes(accel: Accel, host: &Host) -> Kind {
        accel.choose(host, Arch::HOST).expect("there is a choice").kind
    }

    fn foreign() -> Arch {
        if Arch::HOST == Arch::X86_64 { Arch::Aarch64 } else { Arch::X86_64 }
    }

    #[test]
    fn auto_takes_kvm_only_with_device_and_flag() {
        assert_eq!(takes(Accel::Auto, &host(true, true)), Kind::Kvm);
        assert_eq!(takes(Accel::Auto, &host(true, false)), Kind::Tcg, "the device alone boots nothing");
        assert_eq!(takes(Accel::Auto, &host(false, true)), Kind::Tcg);
    }

    #[test]
    fn the_choice_says_why() {
        let choice = Accel::Auto.choose(&host(false, true), Arch::HOST).expect("TCG always works");
        assert_eq!(choice.reason, "/dev/kvm: Permission denied");
    }

    #[test]
    fn kvm_that_was_asked_for_is_an_error_without_the_device_and_tried_without_the_flag() {
        let error = Accel::Kvm.choose(&host(false, true), Arch::HOST).expect_err("no device");
        assert!(error.to_string().contains("--accel tcg"), "{error}");
        assert_eq!(takes(Accel::Kvm, &host(true, false)), Kind::Kvm);
    }

    #[test]
    fn a_guest_of_another_architecture_is_translated() {
        let choice = Accel::Auto.choose(&host(true, true), foreign()).expect("TCG always works");
        assert_eq!(choice.kind, Kind::Tcg);
        assert!(choice.reason.contains(foreign().name()), "{}", choice.reason);
        let error = Accel::Kvm.choose(&host(true, true), foreign()).expect_err("KVM does not translate");
        assert!(error.to_string().contains(foreign().name()), "{error}");
    }

    #[test]
    fn hvf_is_macoss() {
        let mac = Host { macos: true, device: Err("/dev/kvm: No such file".into()), cpu: true };
        assert_eq!(takes(Accel::Auto, &mac), Kind::Hvf);
        assert_eq!(takes(Accel::Hvf, &mac), Kind::Hvf);
        let error = Accel::Hvf.choose(&host(true, true), Arch::HOST).expect_err("this is Linux");
        assert!(error.to_string().contains("only macOS"), "{error}");
    }

    #[test]
    fn flags_are_words_of_the_flags_line() {
        assert!(virtualizes("flags\t\t: fpu vmx sse"));
        assert!(virtualizes("processor: 0\nflags : svm"));
        assert!(!virtualizes("flags : fpu\nvmx flags : vnmi"), "Intel's `vmx flags` line is another one");
        assert!(!virtualizes("flags : svm_lock"));
    }
}
