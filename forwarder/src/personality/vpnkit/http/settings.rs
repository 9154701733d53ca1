//! What an `--http` file says: the proxies, whom they are not for, and who may be asked at all.

use std::net::IpAddr;

use data_encoding::BASE64;
use portway_netstack::Subnet;
use serde::{Deserialize, Serialize};

/// Bytes of a list's entry, and of a proxy's URL.
const TEXT: usize = 1024;
/// Entries of a list.
const ENTRIES: usize = 1024;

/// The settings, as they are written and read. Keys that are none are passed over: Docker Desktop's file has more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Text {
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    https: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exclude: Option<OneOrMany>,
    transparent_http_ports: Ports,
    transparent_https_ports: HttpsPorts,
    allow_enabled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<OneOrMany>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allow_error_msg: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ports(Vec<u16>);

impl Default for Ports {
    fn default() -> Self {
        Self(vec![80])
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HttpsPorts(Vec<u16>);

impl Default for HttpsPorts {
    fn default() -> Self {
        Self(vec![443])
    }
}

/// A list, or its entries in one text with commas or blanks between.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn entries(&self) -> impl Iterator<Item = &str> {
        let texts = match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Many(texts) => texts,
        };
        texts.iter().flat_map(|t| t.split([',', ' ', '\t'])).filter(|e| !e.is_empty())
    }
}

/// The settings, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    text: Text,
    /// Whom requests go to.
    pub(super) http: Option<Upstream>,
    /// Whom connections that are not read go to.
    pub(super) https: Option<Upstream>,
    exclude: Vec<Match>,
    /// `None`: everybody may be asked.
    allow: Option<Vec<Match>>,
}

/// A proxy.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Upstream {
    /// Its name or address.
    pub(super) host: String,
    pub(super) port: u16,
    /// The value of `Proxy-Authorization`.
    pub(super) authorization: Option<String>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The password stays out of logs.
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl std::str::FromStr for Upstream {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || "[http://][USER:PASSWORD@]HOST:PORT is needed".to_owned();
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some((scheme, _)) => return Err(format!("a proxy is asked by http, not by {scheme}")),
        };
        let rest = rest.trim_end_matches('/');
        let (login, place) = rest.rsplit_once('@').map_or((None, rest), |(l, p)| (Some(l), p));
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !host.ends_with(':') => (host, port.parse().map_err(|_| fault())?),
            _ => (place, 3128),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let legal = |b: u8| b.is_ascii_graphic() && !b"/?#@\\".contains(&b);
        if host.is_empty() || port == 0 || text.len() > TEXT || !host.bytes().all(legal) {
            return Err(fault());
        }
        let authorization = login.map(|login| format!("Basic {}", BASE64.encode(&percent_decoded(login))));
        Ok(Self { host: host.to_owned(), port, authorization })
    }
}

/// Whom an entry of a list is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Match {
    Everybody,
    Net(Subnet),
    Address(IpAddr),
    /// This name, and every name under it; lower case.
    Domain(String),
}

impl Match {
    fn new(entry: &str) -> Self {
        if let Ok(address) = entry.parse() {
            return Self::Address(address);
        }
        if let Ok(net) = entry.parse() {
            return Self::Net(net);
        }
        // `*.x`, `.x` and `x` are all x and what is under it.
        match entry.trim_start_matches(['*', '.']).trim_end_matches('.') {
            "" => Self::Everybody,
            domain => Self::Domain(domain.to_ascii_lowercase()),
        }
    }

    fn fits(&self, host: &str) -> bool {
        match self {
            Self::Everybody => true,
            Self::Net(net) => host.parse().is_ok_and(|ip| net.contains(ip)),
            Self::Address(address) => host.parse() == Ok(*address),
            Self::Domain(domain) => {
                let host = host.trim_end_matches('.').to_ascii_lowercase();
                host.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        }
    }
}

impl Settings {
    /// Reads the text of a file, or of a POST.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim_start().starts_with('[') {
            // serde would take an array for the fields in their order.
            return Err("invalid type: an object is needed".into());
        }
        let text: Text = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let upstream = |key: &str, value: &Option<String>| -> Result<Option<Upstream>, String> {
            let value = value.as_deref().map(str::trim).filter(|v| !v.is_empty());
            value.map(|v| v.parse().map_err(|e| format!("{key}: {e}"))).transpose()
        };
        let list = |key: &str, value: &Option<OneOrMany>| -> Result<Vec<Match>, String> {
            let entries: Vec<&str> = value.iter().flat_map(OneOrMany::entries).collect();
            if entries.len() > ENTRIES || entries.iter().any(|e| e.len() > TEXT) {
                return Err(format!("{key}: at most {ENTRIES} entries of {TEXT} bytes"));
            }
            Ok(entries.into_iter().map(Match::new).collect())
        };
        let ports = text.transparent_http_ports.0.iter().chain(&text.transparent_https_ports.0);
        if ports.clone().any(|p| *p == 0) || ports.count() > ENTRIES {
            return Err(format!("transparent ports: 1 to 65535, at most {ENTRIES} of them"));
        }
        if let Some(port) =
            text.transparent_http_ports.0.iter().find(|p| text.transparent_https_ports.0.contains(p))
        {
            return Err(format!("port {port} is both a transparent http and a transparent https port"));
        }
        Ok(Self {
            http: upstream("http", &text.http)?,
            https: upstream("https", &text.https)?,
            exclude: list("exclude", &text.exclude)?,
            allow: text.allow_enabled.then(|| list("allow", &text.allow)).transpose()?,
            text,
        })
    }

    /// The settings as [`Self::parse`] reads them.
    pub(super) fn text(&self) -> String {
        serde_json::to_string(&self.text).unwrap_or_else(|_| "{}".into())
    }

    /// Ports whose connections are read as HTTP, wherever they lead; none when there is nothing to do with them.
    pub(super) fn http_ports(&self) -> &[u16] {
        match self.http.is_some() || self.allow.is_some() {
            true => &self.text.transparent_http_ports.0,
            false => &[],
        }
    }

    /// Ports whose connections go to the `https` proxy.
    pub(super) fn https_ports(&self) -> &[u16] {
        match self.https.is_some() || self.allow.is_some() {
            true => &self.text.transparent_https_ports.0,
            false => &[],
        }
    }

    /// Whether connections to `host`, a name or an address, pass the proxies by.
    pub(super) fn excludes(&self, host: &str) -> bool {
        self.exclude.iter().any(|entry| entry.fits(host))
    }

    /// Whether `host` may be asked.
    pub(super) fn allows(&self, host: &str) -> bool {
        self.allow.as_ref().is_none_or(|list| list.iter().any(|entry| entry.fits(host)))
    }

    /// What one is told who may not.
    pub(super) fn refusal(&self, host: &str) -> String {
        let text = self.text.allow_error_msg.as_deref().filter(|t| !t.is_empty());
        text.unwrap_or("Connections to %s are not allowed.").replace("%s", host)
    }
}

/// `%XX` as bytes (RFC 3986 §2.1); anything else stays.
fn percent_decoded(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let mut ahead = bytes.clone();
        let mut digit = || char::from(ahead.next()?).to_digit(16).and_then(|d| u8::try_from(d).ok());
        match (byte, digit(), digit()) {
            (b'%', Some(high), Some(low)) => {
                out.push(high << 4 | low);
                bytes = ahead;
            }
            _ => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_given_back() {
        let text = r#"{"http":"http://u:p%40ss@proxy.test:8080","https":"proxy.test","exclude":"*.local,10.0.0.0/8 1.2.3.4",
            "transparent_http_ports":[80,8000],"allow_enabled":true,"allow":["ok.test"],"allow_error_msg":"not %s"}"#;
        let known = Settings::parse(text).unwrap();
        let http = known.http.as_ref().unwrap();
        assert_eq!((http.host.as_str(), http.port), ("proxy.test", 8080));
        // The known answer of `printf u:p@ss | base64`.
        assert_eq!(http.authorization.as_deref(), Some("Basic dTpwQHNz"));
        assert_eq!(format!("{http:?}"), "proxy.test:8080");
        assert_eq!(known.https.as_ref().unwrap().port, 3128);
        assert_eq!((known.http_ports(), known.https_ports()), (&[80, 8000][..], &[443][..]));
        for (host, excluded) in [
            ("a.local", true),
            ("LOCAL.", true),
            ("notlocal", false),
            ("10.9.9.9", true),
            ("1.2.3.4", true),
            ("1.2.3.5", false),
        ] {
            assert_eq!(known.excludes(host), excluded, "{host}");
        }
        assert!(known.allows("x.ok.test") && !known.allows("other.test"));
        assert_eq!(known.refusal("other.test"), "not other.test");
        assert_eq!(Settings::parse(&known.text()).unwrap(), known);
        let nothing = Settings::parse("{}").unwrap();
        assert!(nothing.http_ports().is_empty() && nothing.allows("x") && !nothing.excludes("x"));
        assert!(Settings::parse(r#"{"exclude":"*"}"#).unwrap().excludes("anybody"));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, fault) in [
            ("[]", "invalid type"),
            ("{", "EOF"),
            (r#"{"http":3}"#, "invalid type"),
            (r#"{"http":"socks5://x:1"}"#, "http: a proxy is asked by http, not by socks5"),
            (r#"{"http":"x:y"}"#, "HOST:PORT"),
            (r#"{"https":"http://:1"}"#, "HOST:PORT"),
            (r#"{"transparent_http_ports":[0]}"#, "1 to 65535"),
            (r#"{"transparent_http_ports":[443]}"#, "port 443 is both"),
            (r#"{"allow_enabled":"yes"}"#, "invalid type"),
        ] {
            let said = Settings::parse(text).unwrap_err();
            assert!(said.contains(fault), "{text}: {said}");
        }
        assert!(Settings::parse(&format!(r#"{{"exclude":"{}"}}"#, "a,".repeat(2000))).is_err());
    }
}
