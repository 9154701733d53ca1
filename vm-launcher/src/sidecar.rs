//! The sidecar's command line.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::LaunchConfig;

/// Where the sidecar's link is.
#[derive(Debug, Clone)]
pub(crate) enum Link {
    /// An inherited stream socket.
    Socket(RawFd),
    /// The vhost-user socket it listens on.
    VhostUser(PathBuf),
}

/// The arguments of the sidecar: `serve` and what it needs to be this VM's network.
pub(crate) fn arguments(config: &LaunchConfig, link: &Link, ready: RawFd) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["serve".into()];
    let mut option = |name: &str, value: OsString| args.extend([name.into(), value]);
    let mut place = match link {
        Link::Socket(fd) => OsString::from(format!("qemu:fd:{fd}")),
        Link::VhostUser(path) => {
            let mut place = OsString::from("vhost-user:unix:");
            place.push(path);
            place
        }
    };
    place.push(format!(",name={},mtu={}", config.name, config.mtu));
    option("--link", place);
    let mut api = OsString::from("unix:");
    api.push(&config.api);
    option("--api", api);
    option("--state-dir", config.state_dir.clone().into());
    option("--ready-fd", ready.to_string().into());
    for spec in &config.publish {
        option("--publish", spec.into());
    }
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
        let expected = "serve --link qemu:fd:5,name=demo,mtu=65520 --api unix:/run/a.sock --state-dir /state \
            --ready-fd 6 --publish 2222:22/tcp --publish 8080:80 --dns-upstream 127.0.0.1:5353";
        let words = arguments(&config, &Link::Socket(5), 6);
        assert_eq!(words, expected.split(' ').map(OsString::from).collect::<Vec<_>>());
        let words = arguments(&config, &Link::VhostUser("/run/vm".into()), 6);
        assert_eq!(words[2], "vhost-user:unix:/run/vm,name=demo,mtu=65520");
    }
}
