//! `ssh-tunnel://USER@IP[:22]/PATH?key=FILE[&passphrase=TEXT][&secure=true]`: gvproxy's name for a socket of a guest.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::{Forward, Key, Login};

/// The port of SSH.
const PORT: u16 = 22;

/// A socket of a guest, behind its sshd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    user: String,
    server: SocketAddr,
    path: String,
    key: PathBuf,
    passphrase: Option<String>,
    secure: bool,
}

/// Why a text is no [`Remote`]; `to_string()` is what gvproxy says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RemoteError {
    /// Another protocol, or none.
    #[error("remote protocol for unix forwarder is not implemented: {0}")]
    Scheme(String),
    /// The guest is not an address.
    #[error("invalid remote addr")]
    Host,
    /// Nobody to log in as.
    #[error("user not provided for unix-ssh connection")]
    NoUser,
    /// No path.
    #[error("remote uri must contain a path to a socket file")]
    NoPath,
    /// No key.
    #[error("key not provided for unix-ssh connection")]
    NoKey,
    /// `secure` is neither true nor false.
    #[error("invalid value for secure: {0:?}")]
    Secure(String),
    /// The key cannot be used.
    #[error("{0}")]
    Key(String),
}

impl std::str::FromStr for Remote {
    type Err = RemoteError;

    fn from_str(text: &str) -> Result<Self, RemoteError> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        if scheme != "ssh-tunnel" {
            return Err(RemoteError::Scheme(scheme.to_owned()));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (place, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (user, host) = place.rsplit_once('@').unwrap_or(("", place));
        // gvproxy takes a password here and does not use it.
        let user = user.split(':').next().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let server = bare.map(|ip| SocketAddr::new(ip, PORT)).or_else(|_| host.parse::<SocketAddr>());
        let server = server.map_err(|_| RemoteError::Host)?;
        let value = |name: &str| {
            let found = form_urlencoded::parse(query.as_bytes()).find(|(k, _)| k == name);
            found.map(|(_, v)| v.into_owned()).filter(|v| !v.is_empty())
        };
        if path.len() < 2 {
            return Err(RemoteError::NoPath);
        }
        Ok(Self {
            user: Some(decoded(user)).filter(|u| !u.is_empty()).ok_or(RemoteError::NoUser)?,
            server,
            path: decoded(path),
            key: value("key").ok_or(RemoteError::NoKey)?.into(),
            passphrase: value("passphrase"),
            secure: match value("secure").as_deref() {
                None | Some("false" | "0") => false,
                Some("true" | "1") => true,
                Some(other) => return Err(RemoteError::Secure(other.to_owned())),
            },
        })
    }
}

/// A part of a URL as it is meant (RFC 3986 §2.1); in it a `+` stands for itself.
fn decoded(part: &str) -> String {
    let pair = format!("={}", part.replace('+', "%2B").replace('&', "%26"));
    form_urlencoded::parse(pair.as_bytes()).map(|(_, v)| v.into_owned()).collect()
}

impl Remote {
    /// The forward from `socket` to here; the key is read.
    ///
    /// # Errors
    /// When the key cannot be used.
    pub(crate) fn forward(&self, socket: PathBuf) -> Result<Forward, RemoteError> {
        let key = Key::read(&self.key, self.passphrase.as_deref()).map_err(RemoteError::Key)?;
        let login = Login { server: self.server, user: self.user.clone(), key, known_host: self.secure };
        Ok(Forward { socket, dest: self.path.clone(), login })
    }

    /// The text again, without the passphrase.
    pub(crate) fn shown(&self) -> String {
        let secure = if self.secure { "&secure=true" } else { "" };
        let key = self.key.display();
        format!("ssh-tunnel://{}@{}{}?key={key}{secure}", self.user, self.server, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_is_a_user_at_a_guest_a_path_and_a_key() {
        let remote: Remote =
            "ssh-tunnel://core@192.168.127.2/run/podman/podman.sock?key=/home/me/a+b%20c&passphrase=p&secure=true"
                .parse()
                .unwrap();
        assert_eq!((remote.user.as_str(), remote.path.as_str()), ("core", "/run/podman/podman.sock"));
        assert_eq!(remote.server, ([192, 168, 127, 2], 22).into());
        // In a query a plus is a blank.
        assert_eq!((remote.key.to_str(), remote.secure), (Some("/home/me/a b c"), true));
        assert!(!remote.shown().contains("passphrase"), "{}", remote.shown());
        let other: Remote = "ssh-tunnel://a%2Bb:pw@192.168.127.2:2022/a%20b+c?key=k".parse().unwrap();
        assert_eq!((other.user.as_str(), other.path.as_str(), other.server.port()), ("a+b", "/a b+c", 2022));
    }

    #[test]
    fn what_is_none_is_told_in_gvproxys_words() {
        for (text, said) in [
            ("udp://x", "remote protocol for unix forwarder is not implemented: udp"),
            ("", "remote protocol for unix forwarder is not implemented: "),
            ("ssh-tunnel://core@a.name/x?key=k", "invalid remote addr"),
            ("ssh-tunnel://core@192.168.127.2:99999/x?key=k", "invalid remote addr"),
            ("ssh-tunnel://core@192.168.127.2?key=k", "remote uri must contain a path to a socket file"),
            ("ssh-tunnel://core@192.168.127.2/?key=k", "remote uri must contain a path to a socket file"),
            ("ssh-tunnel://core@192.168.127.2/x", "key not provided for unix-ssh connection"),
            ("ssh-tunnel://192.168.127.2/x?key=k", "user not provided for unix-ssh connection"),
            ("ssh-tunnel://a@192.168.127.2/x?key=k&secure=perhaps", "invalid value for secure: \"perhaps\""),
        ] {
            assert_eq!(text.parse::<Remote>().unwrap_err().to_string(), said, "{text}");
        }
        let absent: Remote = "ssh-tunnel://a@192.168.127.2/x?key=/nx/key".parse().unwrap();
        assert!(absent.forward("/s".into()).unwrap_err().to_string().contains("/nx/key"));
    }
}
