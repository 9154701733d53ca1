//! Descriptors that whoever started us left open: those nobody named are closed before anything is opened.

use std::os::fd::RawFd;

use crate::config::{Config, LinkAddress};

/// The descriptors the settings name, beside the standard ones.
fn named(config: &Config) -> Vec<RawFd> {
    let links = config.links.iter().filter_map(|link| match link.address {
        LinkAddress::Fd(fd) => Some(fd),
        _ => None,
    });
    links.chain(config.ready_fd).collect()
}

/// The descriptors systemd passes to this process (sd_listen_fds(3)): from 3 on.
fn activated() -> std::ops::Range<RawFd> {
    const FIRST: RawFd = 3;
    let number = |name| std::env::var(name).ok().and_then(|n| n.parse::<RawFd>().ok());
    let ours = number("LISTEN_PID").is_some_and(|pid| pid == nix::unistd::getpid().as_raw());
    let count = number("LISTEN_FDS").filter(|n| ours && (0..1024).contains(n)).unwrap_or(0);
    FIRST..FIRST + count
}

/// Closes what was inherited and is not named. To be called before the process opens anything.
pub(crate) fn close_others(config: &Config) {
    let Ok(open) = std::fs::read_dir("/proc/self/fd").or_else(|_| std::fs::read_dir("/dev/fd")) else {
        return;
    };
    let (named, activated) = (named(config), activated());
    // Collected first: the directory is read through a descriptor of its own, which is closed by then.
    let open: Vec<RawFd> = open.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2 && !named.contains(fd) && !activated.contains(fd)) {
        let _ = nix::unistd::close(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_links_and_of_ready_are_named() {
        let settings: crate::config::Settings =
            toml::from_str("link = [\"qemu:fd:7\", \"qemu:unix:/x\"]\nready-fd = 9\napi = \"unix:/a\"")
                .unwrap();
        assert_eq!(named(&Config::try_from(settings).unwrap()), [7, 9]);
    }
}
