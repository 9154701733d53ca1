//! The name somebody probably meant.

/// The one of `known` that is nearest to `name`, when one is near enough to be meant.
pub(crate) fn name<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = name.to_ascii_lowercase().replace('_', "-");
    // Names are short; a text of a megabyte is compared by its beginning.
    let wanted: String = wanted.chars().take(64).collect();
    let distance = |known: &str| {
        let known = known.replace('_', "-");
        if wanted.len() >= 3 && known.starts_with(&wanted) {
            1
        } else {
            strsim::osa_distance(&wanted, &known)
        }
    };
    let (near, name) = known.map(|k| (distance(k), k)).min_by_key(|(d, _)| *d)?;
    (near <= (wanted.len() / 3).clamp(1, 3)).then_some(name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_slip_finds_its_name_and_nonsense_finds_none() {
        let known = ["publish", "static-lease", "mtu", "dns-host"];
        let near = |text: &str| super::name(text, known.into_iter());
        assert_eq!(near("publsh"), Some("publish"));
        assert_eq!(near("static_lease"), Some("static-lease"));
        assert_eq!(near("mto"), Some("mtu"));
        assert_eq!(near("dns"), Some("dns-host"));
        assert_eq!(near("colour"), None);
    }
}
