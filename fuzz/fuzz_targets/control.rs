//! The control API and what guests reach of it: any bytes on a connection, with a data thread that answers nothing. Nothing
//! panics (the hook of libFuzzer ends the process on a panic of any task), and no connection stays.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, mpsc};

use libfuzzer_sys::fuzz_target;
use portway::config::GuestApi;
use portway::control::App;
use portway::dns::{Dns, DnsConfig};
use portway::events::EventLog;
use portway::request::{Request, Requests};

struct Api {
    runtime: tokio::runtime::Runtime,
    app: App,
    /// What is asked of the data thread; dropped unanswered.
    asked: std::sync::Mutex<mpsc::Receiver<Request>>,
    path: std::path::PathBuf,
    _poll: mio::Poll,
    /// libFuzzer's `main` leaves SIGPIPE as it is, where Rust's would ignore it.
    _pipe: tokio::signal::unix::Signal,
}

static API: LazyLock<Api> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let poll = mio::Poll::new().expect("a poll");
    let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).expect("a waker"));
    let (requests, asked) = Requests::new(waker);
    let dns = Dns::new(DnsConfig {
        domain: "portway.internal".into(),
        aliases: vec![],
        gateway: vec![[192, 168, 127, 1].into()],
        host: vec![[192, 168, 127, 254].into()],
        host_loopback: true,
        records: vec![],
        subnets: vec![],
        upstreams: vec!["127.0.0.1:1".parse().expect("a server where nobody is")],
        authorities: None,
        rebind_protection: false,
        private_domains: vec![],
        resolv_conf: "/nonexistent".into(),
        uplinks: None,
        hosts: None,
    });
    let app = App::new(
        requests,
        serde_json::from_str(r#"{"name":"n","version":"0","pid":1,"subnet":"","gateway":"","host_alias":"","domain":""}"#)
            .expect("what every version has"),
        dns.expect("names that are names"),
        Arc::new(EventLog::default()),
        None,
        GuestApi::Any,
    );
    let path = std::env::temp_dir().join(format!("portway-fuzz-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a listener");
    listener.set_nonblocking(true).expect("a listener");
    runtime.block_on(async { app.serve_door(portway::control::DoorListener::Unix(listener), true) });
    let pipe = runtime.block_on(async { tokio::signal::unix::signal(tokio::signal::unix::SignalKind::pipe()) });
    let _pipe = pipe.expect("a handler");
    Api { runtime, app, asked: std::sync::Mutex::new(asked), path, _poll: poll, _pipe }
});

/// Says `bytes` and listens until the end.
fn talk(mut client: UnixStream, bytes: &[u8]) {
    let _ = client.write_all(bytes);
    let _ = client.shutdown(std::net::Shutdown::Write);
    client.set_read_timeout(Some(std::time::Duration::from_millis(50))).expect("a socket");
    let mut answer = [0; 4096];
    // A follower of events has no end of its own.
    while client.read(&mut answer).is_ok_and(|n| n > 0) {
        API.asked.lock().expect("one thread").try_iter().for_each(drop);
    }
    API.asked.lock().expect("one thread").try_iter().for_each(drop);
}

fuzz_target!(|data: &[u8]| {
    // The first byte says who speaks.
    let Some((&who, bytes)) = data.split_first() else { return };
    let api = &*API;
    if who & 1 == 1 {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        theirs.set_nonblocking(true).expect("a socket");
        api.runtime.block_on(async {
            let theirs = tokio::net::UnixStream::from_std(theirs).expect("a socket");
            api.app.serve_guest(theirs, [192, 168, 127, 2].into());
        });
        talk(ours, bytes);
    } else if let Ok(client) = UnixStream::connect(&api.path) {
        talk(client, bytes);
    }
});
