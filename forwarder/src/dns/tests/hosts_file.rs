//! The hosts file and its loopback entries.

use super::*;

fn dns(path: &Path, host_loopback: bool) -> Arc<Dns> {
    Dns::new(DnsConfig { hosts: Some(path.into()), host_loopback, ..config() }).unwrap()
}

#[tokio::test(start_paused = true)]
async fn its_names_are_answered_and_a_change_is_seen_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hosts");
    std::fs::write(&path, "192.0.2.1 web.example www\n2001:db8::1 six.example\n").unwrap();
    let dns = dns(&path, true);
    assert_eq!(data(&lookup(&dns, "WEB.example.", RecordType::A).await), ["192.0.2.1"]);
    let nodata = lookup(&dns, "web.example.", RecordType::AAAA).await;
    assert_eq!((code(&nodata), nodata.answers.len()), (ResponseCode::NoError, 0));
    let hints = lookup(&dns, "web.example.", RecordType::HTTPS).await;
    assert_eq!((code(&hints), hints.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(data(&lookup(&dns, "six.example.", RecordType::AAAA).await), ["2001:db8::1"]);
    assert_eq!(data(&lookup(&dns, "1.2.0.192.in-addr.arpa.", RecordType::PTR).await).len(), 1);

    let new = dir.path().join("new");
    std::fs::write(&new, "192.0.2.99 web.example\n").unwrap();
    std::fs::rename(&new, &path).unwrap();
    advance(watch_file::INTERVAL).await;
    assert_eq!(data(&lookup(&dns, "web.example.", RecordType::A).await), ["192.0.2.99"]);
    assert_eq!(code(&lookup(&dns, "www.", RecordType::A).await), ResponseCode::ServFail, "no resolver");
}

#[tokio::test]
async fn the_hosts_loopback_becomes_the_host_alias() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hosts");
    std::fs::write(&path, "127.0.0.1 dev.example\n127.0.1.1 dev.example\n::1 dev.example\n").unwrap();
    let on = dns(&path, true);
    assert_eq!(data(&lookup(&on, "dev.example.", RecordType::A).await), ["192.168.127.254"]);
    let v6 = lookup(&on, "dev.example.", RecordType::AAAA).await;
    assert_eq!((code(&v6), v6.answers.len()), (ResponseCode::NoError, 0), "the alias has no IPv6 address");
    let off = dns(&path, false);
    assert_eq!(code(&lookup(&off, "dev.example.", RecordType::A).await), ResponseCode::ServFail, "left out");
}

#[tokio::test]
async fn it_may_add_names_under_our_domain_but_not_change_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hosts");
    std::fs::write(&path, "127.0.0.1 kubernetes.docker.internal\n10.1.1.1 host.docker.internal\n").unwrap();
    let dns = dns(&path, true);
    let added = lookup(&dns, "kubernetes.docker.internal.", RecordType::A).await;
    assert_eq!(data(&added), ["192.168.127.254"]);
    assert_eq!(data(&lookup(&dns, "host.docker.internal.", RecordType::A).await), ["192.168.127.254"]);
}
