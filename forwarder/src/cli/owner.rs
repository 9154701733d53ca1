//! Who owns a port that is in use. The CLI looks, not the sidecar, which must not read other processes.

use std::fs;
use std::net::SocketAddr;

/// An error's text, with the owner of the port it speaks of where that can be known.
pub(super) fn explain(error: &(impl ToString + ?Sized)) -> String {
    let text = error.to_string();
    let Some(rest) = text.split("cannot listen on ").nth(1).filter(|_| text.contains("in use")) else {
        return text;
    };
    let mut words = rest.split([' ', ',']);
    let (Some(proto), Some(address)) = (words.next(), words.next()) else { return text };
    let address = address.trim_end_matches(':').parse::<SocketAddr>();
    match address.ok().and_then(|a| owner(proto, a.port())) {
        Some(owner) => format!("{text} (it belongs to {owner})"),
        None => text,
    }
}

/// The process that has local port `port` open, as `NAME (pid N)`.
fn owner(proto: &str, port: u16) -> Option<String> {
    let inode = [proto.to_owned(), format!("{proto}6")].iter().find_map(|table| {
        let text = fs::read_to_string(format!("/proc/net/{table}")).ok()?;
        text.lines().skip(1).find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let local = u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?;
            // 0A: listening (TCP), 07: bound (UDP).
            (local == port && matches!(*fields.get(3)?, "0A" | "07"))
                .then(|| (*fields.get(9).unwrap_or(&"0")).to_owned())
        })
    })?;
    let link = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let mut open = fs::read_dir(process.path().join("fd")).ok()?.flatten();
        open.find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == link.as_str()))?;
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        Some(format!("{} (pid {pid})", name.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_taken_port_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let text = explain(&format!("cannot listen on tcp {address}: the port is in use"));
        assert!(text.contains(&format!("(pid {})", std::process::id())), "{text}");
        assert_eq!(explain("something else"), "something else");
    }
}
