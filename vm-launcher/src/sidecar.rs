//! The sidecar's command line, and its word that it is ready.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::net::{self, Card};
use crate::signals::Signals;
use crate::{LaunchConfig, LaunchError, SharedNetwork, machine};

/// How long the sidecar has to be ready; it takes milliseconds.
pub(crate) const READY_PATIENCE: Duration = Duration::from_secs(30);

/// What came of waiting for the sidecar's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// It takes requests.
    Ready,
    /// It has closed the pipe without the word: it is about to end.
    Closed,
    /// Nothing within [`READY_PATIENCE`].
    Silent,
}

/// Waits for `ready` on the pipe of `--ready-fd`.
///
/// # Errors
/// A signal that ends us, or what the system refuses.
pub(crate) fn await_word(ready: &OwnedFd, signals: &Signals) -> Result<Word, LaunchError> {
    let failed = |error: io::Error| LaunchError::system("cannot wait for the network", error);
    let deadline = Instant::now() + READY_PATIENCE;
    let mut told = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Word::Silent);
        }
        let readable = signals.wait(Some(ready.as_fd()), left).map_err(failed)?;
        signals.heed()?;
        if !readable {
            continue;
        }
        let mut buffer = [0; 64];
        let read = nix::unistd::read(ready, &mut buffer).map_err(|errno| failed(errno.into()))?;
        told.extend_from_slice(buffer.get(..read).unwrap_or_default());
        if told.starts_with(b"ready\n") {
            return Ok(Word::Ready);
        }
        if read == 0 || told.len() > buffer.len() {
            return Ok(Word::Closed);
        }
    }
}

/// Where sidecar and VM meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// Each has inherited its end of a socketpair.
    Inherited(RawFd),
    /// The sidecar listens here.
    Path(PathBuf),
}

/// The link in the words of `--link`.
pub(crate) fn link_spec(config: &LaunchConfig, card: &Card, link: &Link) -> OsString {
    let kind = match card {
        Card::VhostUser => "vhost-user",
        Card::Datagrams => "dgram",
        _ => "qemu",
    };
    let mut spec = match link {
        Link::Inherited(fd) => OsString::from(format!("{kind}:fd:{fd}")),
        Link::Path(path) => {
            let mut spec = OsString::from(format!("{kind}:unix:"));
            spec.push(path);
            spec
        }
    };
    spec.push(format!(",name={},mtu={}", config.name, net::mtu(config, card)));
    if let Some(ip) = config.ip {
        spec.push(format!(",ip={ip}"));
    }
    spec
}

impl LaunchConfig {
    /// The sidecar's command line, as far as it is known before anything is made: for whoever can say what is wrong with it.
    /// `None` when the VM needs no sidecar.
    ///
    /// On a network that is shared the address and the ports are for that network to judge.
    ///
    /// # Errors
    /// When what would become a part of it is wrong by itself, such as the VM's name.
    pub fn sidecar_arguments(&self) -> Result<Option<Vec<OsString>>, LaunchError> {
        machine::check(self)?;
        if !self.net.needs_sidecar() {
            return Ok(None);
        }
        let mut config = self.clone();
        if config.shared.take().is_some() {
            config.ip = None;
        }
        let link = Link::Path(net::socket(&config));
        Ok(Some(settings(&config, &Card::Socket, &link)))
    }
}

/// The arguments of the sidecar: `serve` and what it needs to be this VM's network.
pub(crate) fn arguments(config: &LaunchConfig, card: &Card, link: &Link, ready: RawFd) -> Vec<OsString> {
    let mut args = settings(config, card, link);
    args.extend(["--ready-fd".into(), ready.to_string().into()]);
    args
}

fn settings(config: &LaunchConfig, card: &Card, link: &Link) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["serve".into()];
    let mut option = |name: &str, value: OsString| args.extend([name.into(), value]);
    option("--link", link_spec(config, card, link));
    let mut api = OsString::from("unix:");
    api.push(&config.api);
    option("--api", api);
    option("--state-dir", config.state_dir.clone().into());
    for spec in &config.publish {
        option("--publish", spec.into());
    }
    args.extend(crate::vsock::serve_arguments(config));
    args.extend(config.serve_args.iter().cloned());
    args
}

/// The arguments of a sidecar that several VMs share.
pub(crate) fn shared_arguments(
    config: &LaunchConfig,
    shared: &SharedNetwork,
    join: &Path,
    ready: RawFd,
) -> Vec<OsString> {
    let unix = |path: &Path| {
        let mut place = OsString::from("unix:");
        place.push(path);
        place
    };
    let mut args: Vec<OsString> = vec!["serve".into(), "--network".into(), shared.name.clone().into()];
    args.extend(["--join".into(), unix(join), "--api".into(), unix(&config.api)]);
    args.extend(["--state-dir".into(), shared.state_dir.clone().into()]);
    args.extend(["--ready-fd".into(), ready.to_string().into()]);
    args.extend(config.serve_args.iter().cloned());
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BootImage;

    #[test]
    fn the_whole_command_line() {
        let image = BootImage::Prefix("/images/demo".into());
        let mut config =
            LaunchConfig::new(image, "demo".into(), "/state".into(), "/run/a.sock".into(), "/p".into());
        config.publish = vec!["2222:22/tcp".into(), "8080:80".into()];
        config.serve_args = vec!["--dns-upstream".into(), "127.0.0.1:5353".into()];
        config.vsock = false;
        let expected = "serve --link qemu:fd:5,name=demo,mtu=65520 --api unix:/run/a.sock --state-dir /state \
            --publish 2222:22/tcp --publish 8080:80 --dns-upstream 127.0.0.1:5353 --ready-fd 6";
        let words = arguments(&config, &Card::Socket, &Link::Inherited(5), 6);
        assert_eq!(words, expected.split(' ').map(OsString::from).collect::<Vec<_>>());
        let words = arguments(&config, &Card::VhostUser, &Link::Path("/run/vm".into()), 6);
        assert_eq!(words[2], "vhost-user:unix:/run/vm,name=demo,mtu=65520");
        config.ip = Some("192.168.127.9".parse().expect("an address"));
        let shared = SharedNetwork { name: "dev".into(), state_dir: "/n".into() };
        let words = shared_arguments(&config, &shared, Path::new("/run/j"), 6);
        let expected = "serve --network dev --join unix:/run/j --api unix:/run/a.sock --state-dir /n --ready-fd 6 \
            --dns-upstream 127.0.0.1:5353";
        assert_eq!(words, expected.split(' ').map(OsString::from).collect::<Vec<_>>());
        config.shared = Some(shared);
        let known = config.sidecar_arguments().expect("nothing is wrong").expect("it needs one");
        assert_eq!(
            known[2], "qemu:unix:/run/a.sock-demo,name=demo,mtu=65520",
            "the address is the network's to judge"
        );
        config.net = crate::Net::None;
        assert_eq!(config.sidecar_arguments().expect("nothing is wrong"), None);
        config.name = "a,mtu=1".into();
        assert!(config.sidecar_arguments().expect_err("a comma").to_string().contains("--name"));
        config.name = "demo".into();
        let spec = link_spec(&config, &Card::Datagrams, &Link::Inherited(5));
        assert_eq!(spec, "dgram:fd:5,name=demo,mtu=1500,ip=192.168.127.9");
    }
}
