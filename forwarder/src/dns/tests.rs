//! The service as guests see it, with a resolver on loopback in the place of the host's.

use std::collections::HashSet;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as Asked, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME, SOA};
use hickory_proto::rr::{Name as HickoryName, RData, Record, RecordType};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::time::{Instant, advance, sleep};

use super::*;

mod bad_input;
mod caching;
mod hosts_file;
mod limits;
mod names;
mod privacy;
mod relaying;
mod routing;
mod secure;
mod streams;

const GUEST: PortId = PortId(0);

fn config() -> DnsConfig {
    DnsConfig {
        domain: "portway.internal".into(),
        aliases: vec!["docker.internal".into()],
        gateway: vec![ip("192.168.127.1"), ip("fd00::1")],
        host: vec![ip("192.168.127.254")],
        host_loopback: true,
        records: vec![
            ("db.example".into(), ip("192.0.2.7")),
            ("deep.down.portway.internal".into(), ip("192.0.2.8")),
        ],
        subnets: vec!["192.168.127.0/24".parse().unwrap()],
        upstreams: asked(&[SocketAddr::from(([127, 0, 0, 1], 1))]), // nobody is there
        authorities: None,
        rebind_protection: false,
        private_domains: Vec::new(),
        resolv_conf: "/nonexistent/resolv.conf".into(),
        uplinks: None,
        hosts: None,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn name(text: &str) -> HickoryName {
    HickoryName::from_ascii(text).unwrap()
}

fn query(text: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Asked::query(name(text), kind));
    message
}

fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.edns = Some(edns);
    message
}

async fn ask(dns: &Dns, message: &Message) -> Message {
    let answer = dns.answer_datagram(GUEST, &message.to_vec().unwrap()).await.expect("an answer");
    let answer = Message::from_vec(&answer).expect("a well-formed answer");
    assert_eq!(answer.metadata.id, message.metadata.id);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    answer
}

async fn lookup(dns: &Dns, text: &str, kind: RecordType) -> Message {
    ask(dns, &query(text, kind)).await
}

fn data(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|r| r.data.to_string()).collect()
}

fn code(answer: &Message) -> ResponseCode {
    answer.metadata.response_code
}

/// What a resolver does with one query; `None` is silence.
type Script = Arc<dyn Fn(Message, bool) -> Option<Vec<u8>> + Send + Sync>;

/// A resolver on loopback, UDP and TCP on one port.
struct Resolver {
    address: SocketAddr,
    /// Ids and source ports of the queries seen by UDP, and the names as they were spelt; `tcp` counts those by TCP.
    seen: Arc<Mutex<Vec<(u16, u16, String)>>>,
    tcp: Arc<Mutex<usize>>,
}

impl Resolver {
    async fn start(script: impl Fn(Message) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self::start_with(move |message, _| script(message)).await
    }

    /// A script that is told whether it was asked by TCP.
    async fn start_with(script: impl Fn(Message, bool) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        let script: Script = Arc::new(script);
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let udp = UdpSocket::bind(address).await.unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let by_tcp = Arc::new(Mutex::new(0));
        let (log, answer) = (Arc::clone(&seen), Arc::clone(&script));
        tokio::spawn(async move {
            let mut bytes = [0; 4096];
            loop {
                let (length, from) = udp.recv_from(&mut bytes).await.unwrap();
                let message = Message::from_vec(&bytes[..length]).unwrap();
                let spelt = message.queries[0].name().to_ascii();
                log.lock().unwrap().push((message.metadata.id, from.port(), spelt));
                if let Some(reply) = answer(message, false) {
                    udp.send_to(&reply, from).await.unwrap();
                }
            }
        });
        let counter = Arc::clone(&by_tcp);
        tokio::spawn(async move {
            let mut silent = Vec::new();
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let length = stream.read_u16().await.unwrap();
                let mut bytes = vec![0; usize::from(length)];
                stream.read_exact(&mut bytes).await.unwrap();
                *counter.lock().unwrap() += 1;
                if let Some(reply) = script(Message::from_vec(&bytes).unwrap(), true) {
                    stream.write_u16(reply.len().try_into().unwrap()).await.unwrap();
                    stream.write_all(&reply).await.unwrap();
                } else {
                    silent.push(stream);
                }
            }
        });
        Self { address, seen, tcp: by_tcp }
    }

    fn asked(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

/// For every name.
fn asked(servers: &[SocketAddr]) -> Vec<Upstream> {
    servers.iter().map(|address| Upstream { domain: None, server: Server::from(*address) }).collect()
}

fn dns_with(servers: &[&Resolver]) -> Arc<Dns> {
    let servers: Vec<SocketAddr> = servers.iter().map(|s| s.address).collect();
    Dns::new(DnsConfig { upstreams: asked(&servers), ..config() }).unwrap()
}

fn reply_to(asked: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    reply.metadata.response_code = code;
    reply.metadata.recursion_available = true;
    reply.metadata.recursion_desired = true;
    reply.queries = asked.queries.clone();
    reply
}

/// One A record, of `ttl`.
fn address_reply(asked: &Message, address: &str, ttl: u32) -> Message {
    let mut reply = reply_to(asked, ResponseCode::NoError);
    let owner = asked.queries[0].name().clone();
    reply.add_answer(Record::from_rdata(owner, ttl, RData::A(A(address.parse().unwrap()))));
    reply
}

fn bytes(message: &Message) -> Option<Vec<u8>> {
    Some(message.to_vec().unwrap())
}

/// A server that is refused at once: a port nobody holds.
async fn closed_port() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

async fn send(stream: &mut (impl tokio::io::AsyncWrite + Unpin), message: &Message) {
    let bytes = message.to_vec().unwrap();
    stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
}

async fn receive(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Message> {
    let length = stream.read_u16().await.ok()?;
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await.ok()?;
    Message::from_vec(&bytes).ok()
}
