use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use portway_api::control::{
    EventInfo, Explanation, FlowInfo, LinkInfo, PortsRequest, PortsResponse, Problem, Protocol, Stats,
};
use portway_netstack::{PortId, Reach};

use super::client::Client;
use super::*;
use crate::capture::Capture;
use crate::events::EventQueue;
use crate::request::{CaptureError, FlowReports, Reached};

/// The server on a real socket, with a data thread that keeps published ports in a list.
struct Server {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn data_thread(requests: &Receiver<Request>, mut events: EventQueue) {
    let mut captures: Vec<Arc<Capture>> = Vec::new();
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
                events.push(crate::events::Event::Published(info.clone()));
                for capture in &captures {
                    capture.see(&"web".into(), true, &[7; 60]);
                }
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
            Request::Links { reply } => {
                let link = LinkInfo { name: "web".into(), kind: "qemu".into(), ..LinkInfo::default() };
                let _ = reply.send(vec![link]);
            }
            Request::Flows { reply } => drop(reply.send(flow_reports())),
            Request::Stats { reply } => {
                let captures = captures.iter().filter(|c| !c.is_over()).count() as u64;
                let _ = reply.send(Stats { captures, ..Stats::default() });
            }
            Request::Reach { to, reply, .. } => {
                drop(reply.send(Reached { reach: Reach::Host(to), guest: None, taker: None }));
            }
            Request::Capture { capture, reply } => {
                let known = capture.wants("web");
                let vm = capture.vm().unwrap_or_default().to_owned();
                captures.push(capture);
                let _ =
                    reply.send(if known { Ok(vec!["web".into()]) } else { Err(CaptureError::NoLink(vm)) });
            }
            Request::EndCaptures => captures.retain(|c| !c.is_over()),
            Request::Macs { reply } => drop(reply.send(vec![(portway_netstack::Mac([2; 6]), PortId(0))])),
            Request::Attach { .. }
            | Request::Tunnel { .. }
            | Request::DnsAnswer { .. }
            | Request::Join { .. }
            | Request::Leave(_)
            | Request::HandedOver { .. }
            | Request::Outgoing(_)
            | Request::GatewayForwards(_)
            | Request::Ipv6Uplink(_)
            | Request::Search { .. }
            | Request::GuestAddress { .. }
            | Request::Note(_)
            | Request::Agents { .. }
            | Request::Await { .. }
            | Request::GuestPublish { .. }
            | Request::Unexpose { .. }
            | Request::GuestPorts { .. }
            | Request::Shutdown => {}
        }
    }
}

fn flow_reports() -> FlowReports {
    let flow = |port: u16, bytes| portway_netstack::FlowReport {
        port: PortId(0),
        direction: portway_netstack::Direction::Outbound,
        guest: ([192, 168, 127, 2], port).into(),
        remote: ([192, 0, 2, 7], 443).into(),
        state: portway_netstack::FlowState::Open,
        bytes_to_host: bytes,
        bytes_to_guest: 0,
        age: portway_netstack::Duration::from_secs(1),
        idle: portway_netstack::Duration::from_secs(1),
    };
    let links = vec![(PortId(0), "web".into())];
    FlowReports { tcp: vec![flow(4000, 1), flow(4001, 9)], udp: Vec::new(), links }
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
            let (queue, incoming_events) = EventQueue::new();
            std::thread::spawn(move || data_thread(&receiver, queue));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let network = NetworkInfo {
                name: "test".into(),
                version: "0".into(),
                pid: 1,
                subnet: "192.168.127.0/24".into(),
                gateway: "192.168.127.1".into(),
                gateway_mac: "5a:94:ef:e4:0c:dd".into(),
                host_alias: "192.168.127.254".into(),
                ipv6: false,
                subnet6: None,
                gateway6: None,
                host_alias6: None,
                domain: crate::DOMAIN.into(),
                sandbox: portway_api::control::SandboxInfo::default(),
                dns_upstreams: Vec::new(),
                log_file: None,
                state_dir: None,
                started_ms: 1_700_000_000_000,
            };
            let dns = Dns::new(crate::dns::DnsConfig {
                authorities: None,
                domain: crate::DOMAIN.into(),
                aliases: Vec::new(),
                gateway: vec![[192, 168, 127, 1].into()],
                host: vec![[192, 168, 127, 254].into()],
                host_loopback: true,
                records: Vec::new(),
                subnets: Vec::new(),
                upstreams: vec!["127.0.0.1:1".parse().unwrap()],
                rebind_protection: false,
                private_domains: Vec::new(),
                resolv_conf: "/nonexistent".into(),
                uplinks: None,
                hosts: None,
            });
            let events = Arc::new(EventLog::default());
            let app =
                App::new(requests, network, dns.unwrap(), Arc::clone(&events), None, GuestApi::Loopback);
            runtime.block_on(async {
                tokio::spawn(async move { events.keep(incoming_events).await });
                serve(UnixListener::from_std(listener).unwrap(), app).await
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
        let head = format!(
            "{method} {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n"
        );
        // A server that has answered already may be gone before the body.
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
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
        ("[]", "bad_field"),
        ("{\"specs\": [\"2222:22\", \"x\"]}", "bad_spec"),
        ("{\"specs\": []}", "bad_spec"),
        ("{\"specs\": [\"1:1\"], \"color\": 1}", "bad_field"),
        ("{\"specs\": \"1:1\"}", "bad_field"),
        ("{\"specs\": [1]}", "bad_field"),
        ("{\"specs\": null}", "bad_field"),
        ("{\"specs\": [\"1:1\"], \"specs\": []}", "bad_field"),
        ("{}", "bad_field"),
        ("{\"specs\": [\"1:1\"]} x", "bad_json"),
        ("{\"specs\": [\"1:1\"", "bad_json"),
        ("\u{1}", "bad_json"),
    ] {
        let (status, answer) = server.raw("POST", "/v1/ports", body);
        let problem: Problem = serde_json::from_str(&answer).unwrap();
        assert_eq!((status, problem.code.as_str()), (400, code), "{body}");
        let (status, answer) = server.raw("DELETE", "/v1/ports", body);
        let problem: Problem = serde_json::from_str(&answer).unwrap();
        assert_eq!((status, problem.code.as_str()), (400, code), "{body}");
    }
    assert!(server.client().get::<Vec<PortInfo>>("/v1/ports").unwrap().is_empty());
    assert_eq!(server.raw("POST", "/v1/ports", &"x".repeat(BODY + 1)).0, 413);
    assert_eq!(server.raw("PUT", "/v1/ports", "{}").0, 405);
    let (_, answer) = server.raw("POST", "/v1/ports", r#"{"specs": ["1:1", "x:y"]}"#);
    assert_eq!(serde_json::from_str::<Problem>(&answer).unwrap().field.as_deref(), Some("specs[1]"));
    let (_, answer) = server.raw("POST", "/v1/ports", r#"{"specs": ["1:1", 7]}"#);
    assert_eq!(serde_json::from_str::<Problem>(&answer).unwrap().field.as_deref(), Some("specs[1]"));
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

/// Every route that is read, and what it takes.
const READ: [&str; 13] = [
    "/v1/network",
    "/v1/links",
    "/v1/links/web",
    "/v1/ports",
    "/v1/leases",
    "/v1/dns",
    "/v1/flows",
    "/v1/stats",
    "/v1/metrics",
    "/v1/events",
    "/v1/explain?dest=192.0.2.7:80",
    "/v1/openapi.json",
    "/services/forwarder/all",
];

#[test]
fn every_route_answers_and_refuses_what_it_does_not_know() {
    let server = Server::start();
    let problem =
        |answer: &str| serde_json::from_str::<Problem>(answer).unwrap_or_else(|e| panic!("{answer}: {e}"));
    for route in READ {
        assert_eq!(server.raw("GET", route, "").0, 200, "{route}");
        if route.starts_with("/services") {
            continue;
        }
        let (status, answer) = server.raw("PUT", route, "{}");
        assert_eq!((status, problem(&answer).code.as_str()), (405, "method_not_allowed"), "{route}");
        if route != "/v1/openapi.json" {
            let more = format!("{route}{}colour=red", if route.contains('?') { "&" } else { "?" });
            let (status, answer) = server.raw("GET", &more, "");
            let fault = problem(&answer);
            assert_eq!((status, fault.code.as_str()), (400, "unknown_parameter"), "{more}");
            assert_eq!(fault.field.as_deref(), Some("colour"), "{more}");
            assert!(fault.hint.is_some(), "{more}");
        }
    }
    let (status, answer) = server.raw("GET", "/v1/flowz", "");
    assert_eq!((status, problem(&answer).code.as_str()), (404, "not_found"));
    assert_eq!(problem(&answer).detail, "/v1/flowz is not a resource");
    assert_eq!(problem(&server.raw("PUT", "/v1/flows", "{}").1).detail, "/v1/flows does not take PUT");
    let metrics = server.raw("GET", "/v1/metrics", "").1;
    assert!(
        metrics.contains("portway_dns_rebinding_total 0")
            && metrics.contains("portway_dns_truncated_total 0")
    );
    let (status, answer) = server.raw("GET", "/v1/links/db", "");
    assert_eq!((status, problem(&answer).code.as_str()), (404, "no_link"));
}

#[test]
fn a_bad_parameter_is_named() {
    let server = Server::start();
    for (route, code, field) in [
        ("/v1/flows?proto=sctp", "bad_parameter", "proto"),
        ("/v1/flows?port=70000", "bad_parameter", "port"),
        ("/v1/flows?port=-1", "bad_parameter", "port"),
        ("/v1/flows?host=a.name", "bad_parameter", "host"),
        ("/v1/flows?limit=many", "bad_parameter", "limit"),
        ("/v1/flows?state=", "bad_parameter", "state"),
        ("/v1/flows?direction=up", "bad_parameter", "direction"),
        ("/v1/flows?vm=a&vm=b", "duplicate_parameter", "vm"),
        ("/v1/flows?prot=tcp", "unknown_parameter", "prot"),
        ("/v1/events?since=x", "bad_parameter", "since"),
        ("/v1/events?since=18446744073709551616", "bad_parameter", "since"),
        ("/v1/events?follow=1", "bad_parameter", "follow"),
        ("/v1/capture?host=x", "bad_parameter", "host"),
        ("/v1/capture?port=0", "bad_parameter", "port"),
        ("/v1/capture?proto=ip", "bad_parameter", "proto"),
        ("/v1/capture?snaplen=1", "bad_parameter", "snaplen"),
        ("/v1/capture?vm=db", "no_link", "vm"),
        ("/v1/flows?vm=db", "no_link", "vm"),
        ("/v1/explain", "missing_parameter", "dest"),
        ("/v1/explain?dest=a:b", "bad_parameter", "dest"),
        ("/v1/explain?dest=a..b:80", "bad_parameter", "dest"),
        ("/v1/explain?dest=a&proto=icmp", "bad_parameter", "proto"),
        ("/v1/explain?dest=a&probe=yes", "bad_parameter", "probe"),
    ] {
        let (_, answer) = server.raw("GET", route, "");
        let fault: Problem =
            serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{route}: {answer}: {e}"));
        assert_eq!(
            (fault.code.as_str(), fault.field.as_deref()),
            (code, Some(field)),
            "{route}: {}",
            fault.detail
        );
    }
    assert_eq!(server.client().get::<Stats>("/v1/stats").unwrap().captures, 0, "nothing was begun");
}

#[test]
fn flows_are_filtered_and_the_largest_come_first_when_limited() {
    let server = Server::start();
    let flows = |query: &str| server.client().get::<Vec<FlowInfo>>(&format!("/v1/flows{query}")).unwrap();
    assert_eq!(flows("").len(), 2);
    assert_eq!(flows("?vm=web&proto=tcp&state=open&direction=outbound&host=192.0.2.7").len(), 2);
    assert_eq!(flows("?port=4000")[0].guest, "192.168.127.2:4000");
    assert_eq!(flows("?limit=1")[0].bytes_to_host, 9);
    assert!(flows("?proto=udp").is_empty());
}

/// Reads a stream until `done`, or panics after 10 s.
fn read_until(stream: &mut UnixStream, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut got, mut buffer) = (Vec::new(), [0; 4096]);
    while !done(&got) {
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "ended: {}", String::from_utf8_lossy(&got));
        got.extend_from_slice(&buffer[..n]);
    }
    got
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|w| w == text.as_bytes())
}

impl Server {
    fn open(&self, route: &str) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        write!(stream, "GET {route} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        stream
    }

    fn publish(&self, spec: &str) {
        let body = request(&[spec]);
        let _: PortsResponse = self.client().send(hyper::Method::POST, "/v1/ports", &body).unwrap();
    }
}

#[test]
fn events_are_listed_and_followed_from_where_one_left() {
    let server = Server::start();
    server.publish("1000:1");
    let mut follower = server.open("/v1/events?follow=true");
    let got = read_until(&mut follower, |b| contains(b, "\n\n") && contains(b, "port_published"));
    assert!(contains(&got, "text/event-stream") && contains(&got, "id: 0"));
    server.publish("1001:1");
    read_until(&mut follower, |b| contains(b, "id: 1\nevent: port_published\ndata: {"));
    let known: Vec<EventInfo> = server.client().get("/v1/events?since=1").unwrap();
    assert_eq!(known.iter().map(|e| e.id).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_capture_begins_with_its_head_shows_frames_and_ends_with_its_client() {
    let server = Server::start();
    let mut client = server.open("/v1/capture?vm=web");
    let got = read_until(&mut client, |b| contains(b, "\x0a\x0d\x0d\x0a") && contains(b, "web"));
    assert!(contains(&got, "application/x-pcapng"));
    assert_eq!(server.client().get::<Stats>("/v1/stats").unwrap().captures, 1);
    server.publish("1000:1");
    read_until(&mut client, |b| b.windows(60).any(|w| w == [7; 60]));
    drop(client);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while server.client().get::<Stats>("/v1/stats").unwrap().captures > 0 {
        assert!(std::time::Instant::now() < deadline, "the capture outlives its client");
        server.publish("1000:1");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn streams_have_places_of_their_own_and_never_keep_listings_out() {
    let server = Server::start();
    let mut followers: Vec<UnixStream> =
        (0..stream::STREAMS).map(|_| server.open("/v1/events?follow=true")).collect();
    for follower in &mut followers {
        read_until(follower, |b| contains(b, "200 OK"));
    }
    let (status, answer) = server.raw("GET", "/v1/capture", "");
    let fault: Problem = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, fault.code.as_str()), (503, "too_many_streams"));
    assert_eq!(server.raw("GET", "/v1/ports", "").0, 200);
}

#[test]
fn an_explanation_says_where_the_host_would_connect() {
    let server = Server::start();
    let told: Explanation = server.client().get("/v1/explain?dest=127.0.0.9:80").unwrap();
    assert_eq!(told.addresses[0].host_address.as_deref(), Some("127.0.0.9:80"));
    assert_eq!(told.addresses[0].source.as_deref(), Some("127.0.0.1"));
    let told: Explanation =
        server.client().get("/v1/explain?dest=gateway.portway.internal:53&proto=udp").unwrap();
    assert_eq!(told.addresses[0].address, "192.168.127.1:53");
    let told: Explanation = server.client().get("/v1/explain?dest=nobody.portway.internal").unwrap();
    assert!(told.addresses.is_empty() && told.dns.iter().any(|l| l.contains("no address")), "{told:?}");
}

#[test]
fn names_are_added_listed_and_removed_all_or_nothing() {
    let server = Server::start();
    let names = |body: &str| -> Vec<String> {
        let all: Vec<portway_api::control::DnsRecord> = serde_json::from_str(body).unwrap();
        all.into_iter().map(|r| format!("{} {} {}", r.name, r.address, r.origin)).collect()
    };
    let own =
        ["gateway.portway.internal 192.168.127.1 network", "host.portway.internal 192.168.127.254 network"];
    let with_own =
        |more: &[&str]| -> Vec<String> { more.iter().chain(&own).map(ToString::to_string).collect() };
    let (status, body) =
        server.raw("POST", "/v1/dns", r#"{"records":["Db.example=192.0.2.7","*.apps.example=::9"]}"#);
    assert_eq!(
        (status, names(&body)),
        (200, with_own(&["*.apps.example ::9 live", "db.example 192.0.2.7 live"]))
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
    assert_eq!(names(&server.raw("GET", "/v1/dns", "").1).len(), 4);
    let (status, body) =
        server.raw("DELETE", "/v1/dns", r#"{"records":["DB.example","*.apps.example=::9"]}"#);
    assert_eq!((status, names(&body)), (200, with_own(&[])));
}
