//! Datagrams of any bytes to the DNS service, without an upstream: nothing panics, and an answer bears the query's id.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use portway::dns::{Dns, DnsConfig};

static DNS: LazyLock<std::sync::Arc<Dns>> = LazyLock::new(|| {
    let config = DnsConfig {
        domain: "portway.internal".into(),
        aliases: vec![],
        gateway: vec![[192, 168, 127, 1].into()],
        host: vec![[192, 168, 127, 254].into()],
        host_loopback: true,
        records: vec![("a.test".into(), [192, 0, 2, 1].into())],
        subnets: vec!["192.168.127.0/24".parse().expect("a subnet")],
        upstreams: vec!["127.0.0.1:1".parse().expect("a server where nobody is")],
        authorities: None,
        rebind_protection: true,
        private_domains: vec![],
        resolv_conf: "/nonexistent".into(),
        uplinks: None,
        hosts: None,
    };
    Dns::new(config).expect("names that are names")
});

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    if let Some(answer) = runtime.block_on(DNS.answer_datagram(portway_netstack::PortId(0), data)) {
        assert_eq!(answer[..2], data[..2]);
        assert!(answer[2] & 0x80 != 0);
    }
});
