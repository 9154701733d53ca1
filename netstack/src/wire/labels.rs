//! Domain names as DNS labels (RFC 1035 §3.1) without compression, as DHCP and router advertisements carry them.

/// `domains`, one after the other, as far as whole ones fit `limit` bytes; a name with an empty or overlong label is left out.
#[must_use]
pub fn list<T: AsRef<str>>(domains: &[T], limit: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for domain in domains {
        let domain = domain.as_ref().trim_end_matches('.');
        let mut name = Vec::with_capacity(domain.len() + 2);
        let good = domain.split('.').all(|label| {
            name.push(u8::try_from(label.len()).unwrap_or(0));
            name.extend(label.as_bytes());
            (1..=63).contains(&label.len())
        });
        name.push(0);
        if good && name.len() <= 255 && out.len() + name.len() <= limit {
            out.append(&mut name);
        }
    }
    out
}

/// The first label of the name `bytes` begin with, in lower case, when it is one of a host (RFC 1123 §2.1).
#[must_use]
pub fn first_host_label(bytes: &[u8]) -> Option<String> {
    let (&length, rest) = bytes.split_first()?;
    let label = rest.get(..usize::from(length)).filter(|_| (1..=63).contains(&length))?;
    let text = std::str::from_utf8(label).ok()?;
    let good = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    good.then(|| text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_or_do_not_fit_are_left_out() {
        let long = "a".repeat(64);
        assert_eq!(list(&["a.b.", "", "x..y", &long, "c"], 100), b"\x01a\x01b\0\x01c\0");
        assert_eq!(list(&["a.b", "cc", "d"], 8), b"\x01a\x01b\0\x01d\0");
    }

    #[test]
    fn a_hosts_label_is_letters_digits_and_inner_hyphens() {
        assert_eq!(first_host_label(b"\x03WeB\x03lan\0"), Some("web".into()));
        for bad in [&b"\0"[..], b"\x04web", b"\x02-a", b"\x02a\xff", b"\x40", b""] {
            assert_eq!(first_host_label(bad), None, "{bad:?}");
        }
    }
}
