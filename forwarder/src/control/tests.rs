use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use portway_api::control::Protocol;

use super::client::Client;
use super::*;

/// The server on a real socket, with a data thread that keeps published ports in a list.
struct Server {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn data_thread(requests: &Receiver<Request>) {
    let mut ports: Vec<(PublishSpec, PortInfo)> = Vec::new();
    while let Ok(request) = requests.recv() {
        match request {
            Request::Publish { spec, reply } => {
                let taken = ports.iter().any(|(s, _)| s.host == spec.host && s.proto == spec.proto);
                let info = PortInfo {
                    proto: spec.proto,
                    bind: vec!["127.0.0.1".into()],
                    host_port: match spec.host {
                        crate::publish::spec::HostEnd::Ports { first, .. } => first,
                        crate::publish::spec::HostEnd::Unix(_) => 0,
                    },
                    guest: "192.168.127.2".into(),
                    guest_port: spec.guest_port,
                    state: "listening".into(),
                    accepted: 0,
                };
                let result = if taken {
                    Err(PublishError::AlreadyPublished(spec.to_string()))
                } else {
                    Ok(info.clone())
                };
                ports.extend(result.is_ok().then_some((spec, info)));
                let _ = reply.send(vec![result]);
            }
            Request::Unpublish { spec, reply } => {
                let at = ports.iter().position(|(s, _)| s.host == spec.host && s.proto == spec.proto);
                let gone = at
                    .map(|i| vec![ports.remove(i).1])
                    .ok_or_else(|| PublishError::NotPublished(spec.to_string()));
                let _ = reply.send(gone);
            }
            Request::Ports { reply } => drop(reply.send(ports.iter().map(|p| p.1.clone()).collect())),
            Request::Leases { reply } => drop(reply.send(Vec::new())),
            _ => {}
        }
    }
}

fn dns() -> Arc<Dns> {
    Dns::new(crate::dns::DnsConfig {
        domain: crate::DOMAIN.into(),
        aliases: vec![],
        gateway: vec![[192, 168, 127, 1].into()],
        host: vec![],
        host_loopback: true,
        records: vec![],
        subnets: vec![],
        upstreams: vec![],
        rebind_protection: false,
        private_domains: vec![],
        resolv_conf: "/nonexistent".into(),
        uplinks: None,
        hosts: None,
    })
    .unwrap()
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = crate::unix_path::listen(&path, 0o600).unwrap();
        std::thread::spawn(move || {
            let poll = mio::Poll::new().unwrap();
            let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
            let (requests, receiver) = Requests::new(waker);
            std::thread::spawn(move || data_thread(&receiver));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let network = NetworkInfo {
                name: "test".into(),
                version: "0".into(),
                pid: 1,
                subnet: "192.168.127.0/24".into(),
                gateway: "192.168.127.1".into(),
                host_alias: "192.168.127.254".into(),
                domain: crate::DOMAIN.into(),
            };
            runtime.block_on(async {
                serve(UnixListener::from_std(listener).unwrap(), requests, dns(), network).await
            });
        });
        Self { path, _dir: dir }
    }

    fn client(&self) -> Client {
        Client::new(&self.path)
    }

    /// Status and body of one request, as curl would send it.
    fn raw(&self, method: &str, route: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        let len = body.len();
        write!(
            stream,
            "{method} {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }
}

fn request(specs: &[&str]) -> PortsRequest {
    PortsRequest { specs: specs.iter().map(|s| (*s).to_owned()).collect() }
}

#[test]
fn ports_are_published_listed_and_taken_away() {
    let server = Server::start();
    let done: PortsResponse =
        server.client().send(hyper::Method::POST, "/v1/ports", &request(&["2222:22", "53:53/udp"])).unwrap();
    assert_eq!((done.published.len(), done.errors.len()), (2, 0));
    let again: PortsResponse =
        server.client().send(hyper::Method::POST, "/v1/ports", &request(&["2222:22", "80:80"])).unwrap();
    assert_eq!((again.published.len(), again.errors.len()), (1, 1));
    let gone: PortsResponse =
        server.client().send(hyper::Method::DELETE, "/v1/ports", &request(&["53:53/udp"])).unwrap();
    assert_eq!(gone.published[0].proto, Protocol::Udp);
    assert_eq!(server.client().get::<Vec<PortInfo>>("/v1/ports").unwrap().len(), 2);
}

#[test]
fn a_bad_body_is_a_problem_with_a_code_and_changes_nothing() {
    let server = Server::start();
    for (body, code) in [
        ("", "bad_json"),
        ("[]", "bad_json"),
        ("{\"specs\": [\"2222:22\", \"x\"]}", "bad_spec"),
        ("{\"specs\": []}", "bad_spec"),
        ("{\"specs\": [\"1:1\"], \"color\": 1}", "bad_json"),
    ] {
        let (status, answer) = server.raw("POST", "/v1/ports", body);
        let problem: Problem = serde_json::from_str(&answer).unwrap();
        assert_eq!((status, problem.code.as_str()), (400, code), "{body}");
    }
    assert!(server.client().get::<Vec<PortInfo>>("/v1/ports").unwrap().is_empty());
    assert_eq!(server.raw("POST", "/v1/ports", &"x".repeat(BODY + 1)).0, 413);
    assert_eq!(server.raw("PUT", "/v1/ports", "{}").0, 405);
    assert_eq!(server.raw("GET", "/v2", ""), (404, "404 page not found\n".into()));
}

#[test]
fn gvproxys_routes_answer_in_gvproxys_words() {
    let server = Server::start();
    let expose = |body: &str| server.raw("POST", "/services/forwarder/expose", body);
    assert_eq!(server.raw("GET", "/services/forwarder/all", ""), (200, "[]\n".into()));
    let good = r#"{"local":"127.0.0.1:9090","remote":"192.168.127.2:80","protocol":"tcp"}"#;
    assert_eq!(expose(good), (200, String::new()));
    assert_eq!(expose(good), (500, "proxy already running for tcp on 127.0.0.1:9090\n".into()));
    let all = r#"[{"local":"127.0.0.1:9090","remote":"192.168.127.2:80","protocol":"tcp"}]"#;
    assert_eq!(server.raw("GET", "/services/forwarder/all", ""), (200, format!("{all}\n")));
    for (body, status, text) in [
        ("{", 400, "unexpected EOF"),
        (r#"{"local":":1","remote":"80"}"#, 400, "address 80: missing port in address"),
        (r#"{"local":":1","remote":":8080"}"#, 400, "address @: missing port in address"),
        (r#"{"local":":1","remote":"1.2.3.4:5","protocol":"sctp"}"#, 500, "unknown protocol sctp"),
        (r#"{"local":":1","remote":"a.name:5"}"#, 500, "invalid remote addr"),
    ] {
        assert_eq!(expose(body), (status, format!("{text}\n")), "{body}");
    }
    assert_eq!(server.raw("GET", "/services/forwarder/expose", ""), (400, "post only\n".into()));
    let unexpose = |body: &str| server.raw("POST", "/services/forwarder/unexpose", body);
    assert_eq!(unexpose(r#"{"local":"127.0.0.1:9090","protocol":"tcp"}"#), (200, String::new()));
    assert_eq!(unexpose(r#"{"local":"127.0.0.1:9090","protocol":"tcp"}"#), (500, "proxy not found\n".into()));
}

#[test]
fn without_a_network_the_client_says_what_to_do() {
    let error = Client::new(std::path::Path::new("/nonexistent/x.sock"))
        .get::<Vec<PortInfo>>("/v1/ports")
        .unwrap_err();
    assert!(error.to_string().contains("start one with `portway serve`"), "{error}");
}

#[test]
fn names_are_added_listed_and_removed_all_or_nothing() {
    let server = Server::start();
    let names = |body: &str| -> Vec<String> {
        let all: Vec<portway_api::control::DnsRecord> = serde_json::from_str(body).unwrap();
        all.into_iter().map(|r| format!("{} {} {}", r.name, r.address, r.origin)).collect()
    };
    let own = "gateway.portway.internal 192.168.127.1 network".to_owned();
    let (status, body) =
        server.raw("POST", "/v1/dns", r#"{"records":["Db.example=192.0.2.7","*.apps.example=::9"]}"#);
    assert_eq!(
        (status, names(&body)),
        (200, vec!["*.apps.example ::9 live".into(), "db.example 192.0.2.7 live".into(), own.clone()])
    );
    for (method, body, status) in [
        ("POST", r#"{"records":["x.example=192.0.2.8","y"]}"#, 400),
        ("POST", r#"{"records":[]}"#, 400),
        ("POST", r#"{"names":["x.example=192.0.2.8"]}"#, 400),
        ("DELETE", r#"{"records":["db.example","x.example"]}"#, 404),
        ("DELETE", r#"{"records":["db.example=192.0.2.9"]}"#, 404),
        ("DELETE", r#"{"records":["db.example=here"]}"#, 400),
    ] {
        assert_eq!(server.raw(method, "/v1/dns", body).0, status, "{method} {body}");
    }
    assert_eq!(names(&server.raw("GET", "/v1/dns", "").1).len(), 3);
    let (status, body) =
        server.raw("DELETE", "/v1/dns", r#"{"records":["DB.example","*.apps.example=::9"]}"#);
    assert_eq!((status, names(&body)), (200, vec![own]));
}
