//! slirp4netns's API socket: one JSON request per connection, one answer, end.
//!
//! ```text
//!  {"execute":"add_hostfwd","arguments":{…}} SHUT_WR ──►   ◄── {"return":{"id":1}}  EOF
//! ```
//! Limits: [`REQUEST`] bytes, [`PATIENCE`] for a request to be whole, [`CLIENTS`] connections at a time (further ones
//! wait in the listener's queue). Answers are slirp4netns's to the byte; where its own texts only say that something
//! failed, the reason follows. Ids count up from 1 and are not used twice.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portway_api::control::Protocol;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};

use crate::publish::spec::{Bind, GuestName, HostEnd, PublishSpec};
use crate::request::{Request, Requests};
use crate::sidecar::Door;

/// Bytes of a request.
const REQUEST: u64 = 4096;
/// Bytes of a larger one that are read, so that its sender sees the answer.
const LEFT: u64 = 1 << 20;
/// How long a client may take to send it, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients served at a time.
const CLIENTS: usize = 16;

/// One forward, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Forward {
    id: u64,
    proto: Protocol,
    host_addr: Ipv4Addr,
    host_port: u16,
    guest_addr: Ipv4Addr,
    guest_port: u16,
}

impl Forward {
    fn spec(&self) -> PublishSpec {
        PublishSpec {
            host: HostEnd::Ports { bind: Bind::Address(IpAddr::V4(self.host_addr)), first: self.host_port },
            guest: GuestName::Address(IpAddr::V4(self.guest_addr)),
            guest_port: self.guest_port,
            count: 1,
            proto: self.proto,
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    forwards: BTreeMap<u64, Forward>,
}

/// The API, shared by its connections.
struct Api {
    requests: Requests,
    guest: Ipv4Addr,
    table: Mutex<Table>,
}

/// Binds the socket at `path`; `guest` is whom forwards without an address are for.
///
/// # Errors
/// When it cannot be bound.
pub(super) fn door(path: &Path, guest: Ipv4Addr) -> io::Result<Door> {
    let listener = crate::unix_path::listen(path, 0o600)?;
    Ok(Box::new(move |context| {
        let requests = context.requests.clone();
        let api = Arc::new(Api { requests, guest, table: Mutex::default() });
        tokio::spawn(async move {
            if let Err(error) = serve(listener, api).await {
                tracing::error!(%error, "the API socket cannot be served");
            }
        });
    }))
}

async fn serve(listener: std::os::unix::net::UnixListener, api: Arc<Api>) -> io::Result<()> {
    let accepting = UnixListener::from_std(listener)?;
    let clients = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return Ok(()) };
        match accepting.accept().await {
            Ok((stream, _)) => {
                let api = Arc::clone(&api);
                tokio::spawn(async move {
                    if tokio::time::timeout(PATIENCE, api.client(stream)).await.is_err() {
                        tracing::debug!("an API client took too long");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors: somebody else's end frees one.
                tracing::warn!(%error, "an API client could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

impl Api {
    async fn client(&self, mut stream: UnixStream) {
        let mut request = Vec::new();
        let answer = match (&mut stream).take(REQUEST).read_to_end(&mut request).await {
            Err(error) => return tracing::debug!(%error, "an API client is gone"),
            Ok(n) if n as u64 == REQUEST => Err("too large message".to_owned()),
            Ok(_) => self.answer(&request).await,
        };
        let answer = answer
            .unwrap_or_else(|fault| json!({"error": {"desc": format!("bad request: {fault}")}}).to_string());
        if let Err(error) = stream.write_all(answer.as_bytes()).await {
            tracing::debug!(%error, "an API client did not take its answer");
        }
        // What is left unread would reset the connection, and the answer with it (unix(7)).
        let _ = stream.shutdown().await;
        let _ = tokio::io::copy(&mut (&mut stream).take(LEFT), &mut tokio::io::sink()).await;
    }

    async fn answer(&self, request: &[u8]) -> Result<String, String> {
        // What follows the first value is left alone, as slirp4netns does.
        let first = serde_json::Deserializer::from_slice(request).into_iter::<Value>().next();
        let Some(Ok(request)) = first else { return Err("cannot parse JSON".into()) };
        let Value::Object(request) = request else { return Err("json_object() failed".into()) };
        let arguments = request.get("arguments").unwrap_or(&Value::Null);
        match request.get("execute").and_then(Value::as_str) {
            None => Err("no execute found".into()),
            Some("add_hostfwd") => self.add(arguments).await.map_err(|e| format!("add_hostfwd: {e}")),
            Some("list_hostfwd") => self.list(),
            Some("remove_hostfwd") => {
                self.remove(arguments).await.map_err(|e| format!("remove_hostfwd: {e}"))
            }
            Some(_) => Err("unknown execute".into()),
        }
    }

    async fn add(&self, arguments: &Value) -> Result<String, String> {
        let mut forward = forward(arguments, self.guest)?;
        let (reply, published) = oneshot::channel();
        let asked = self.requests.send(Request::Publish { spec: forward.spec(), reply });
        asked.map_err(|e| format!("slirp_add_hostfwd failed: {e}"))?;
        let published =
            published.await.map_err(|_| "slirp_add_hostfwd failed: the network is ending".to_owned())?;
        for outcome in published {
            outcome.map_err(|e| format!("slirp_add_hostfwd failed: {e}"))?;
        }
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.last += 1;
        forward.id = table.last;
        table.forwards.insert(forward.id, forward.clone());
        Ok(json!({"return": {"id": forward.id}}).to_string())
    }

    fn list(&self) -> Result<String, String> {
        #[derive(Serialize)]
        struct Entries<'a> {
            entries: Vec<&'a Forward>,
        }
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = Entries { entries: table.forwards.values().collect() };
        serde_json::to_string(&entries).map_err(|e| e.to_string())
    }

    async fn remove(&self, arguments: &Value) -> Result<String, String> {
        let id = arguments.get("id").and_then(Value::as_u64);
        let known = || {
            let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            id.and_then(|id| table.forwards.get(&id)).cloned()
        };
        let forward = known().ok_or("bad arguments.id")?;
        let (reply, done) = oneshot::channel();
        let asked = self.requests.send(Request::Unpublish { spec: forward.spec(), reply });
        asked.map_err(|e| format!("slirp_remove_hostfwd failed: {e}"))?;
        // What is not published any more (another client was faster) is gone all the same.
        if let Ok(Err(error)) = done.await {
            tracing::debug!(%error, "a forward was gone already");
        }
        self.table.lock().unwrap_or_else(PoisonError::into_inner).forwards.remove(&forward.id);
        Ok(json!({"return": {}}).to_string())
    }
}

/// What `arguments` ask for; the id is not known yet.
fn forward(arguments: &Value, guest: Ipv4Addr) -> Result<Forward, String> {
    let bad = |what: &str| format!("bad arguments.{what}");
    let port = |what: &str| {
        let port = arguments.get(what).and_then(Value::as_u64).and_then(|p| u16::try_from(p).ok());
        port.filter(|p| *p > 0).ok_or_else(|| bad(what))
    };
    let address = |what: &str, default: Ipv4Addr| match arguments.get(what) {
        None | Some(Value::Null) => Ok(default),
        // An empty text is as good as none.
        Some(Value::String(text)) if text.is_empty() => Ok(default),
        Some(Value::String(text)) => text.parse().map_err(|_| bad(what)),
        Some(_) => Err(bad(what)),
    };
    let proto = match arguments.get("proto").and_then(Value::as_str) {
        Some("tcp") => Protocol::Tcp,
        Some("udp") => Protocol::Udp,
        _ => return Err(bad("proto")),
    };
    Ok(Forward {
        id: 0,
        proto,
        host_addr: address("host_addr", Ipv4Addr::UNSPECIFIED)?,
        host_port: port("host_port")?,
        guest_addr: address("guest_addr", guest)?,
        guest_port: port("guest_port")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked_one_by_one_and_have_slirps_defaults() {
        let guest = Ipv4Addr::new(10, 0, 2, 100);
        let good = json!({"proto": "udp", "host_port": 5353, "guest_port": 53, "junk": 1});
        let good = forward(&good, guest).unwrap();
        assert_eq!((good.host_addr, good.guest_addr), (Ipv4Addr::UNSPECIFIED, guest));
        for (arguments, what) in [
            (json!(null), "proto"),
            (json!(3), "proto"),
            (json!({}), "proto"),
            (json!({"proto": "sctp", "host_port": 1, "guest_port": 1}), "proto"),
            (json!({"proto": "tcp", "guest_port": 1}), "host_port"),
            (json!({"proto": "tcp", "host_port": 0, "guest_port": 1}), "host_port"),
            (json!({"proto": "tcp", "host_port": 65_536, "guest_port": 1}), "host_port"),
            (json!({"proto": "tcp", "host_port": -1, "guest_port": 1}), "host_port"),
            (json!({"proto": "tcp", "host_port": 1.5, "guest_port": 1}), "host_port"),
            (json!({"proto": "tcp", "host_port": "1", "guest_port": 1}), "host_port"),
            (json!({"proto": "tcp", "host_port": 1}), "guest_port"),
            (json!({"proto": "tcp", "host_addr": "x", "host_port": 1, "guest_port": 1}), "host_addr"),
            (json!({"proto": "tcp", "host_addr": "::1", "host_port": 1, "guest_port": 1}), "host_addr"),
            (json!({"proto": "tcp", "host_addr": 5, "host_port": 1, "guest_port": 1}), "host_addr"),
            (json!({"proto": "tcp", "host_port": 1, "guest_addr": "y", "guest_port": 1}), "guest_addr"),
        ] {
            assert_eq!(forward(&arguments, guest), Err(format!("bad arguments.{what}")), "{arguments}");
        }
    }

    #[test]
    fn an_entry_is_written_as_slirp4netns_writes_it() {
        let arguments =
            json!({"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 8080, "guest_port": 80});
        let entry = forward(&arguments, Ipv4Addr::new(10, 0, 2, 100)).unwrap();
        let expected = r#"{"id":0,"proto":"tcp","host_addr":"127.0.0.1","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}"#;
        assert_eq!(serde_json::to_string(&entry).unwrap(), expected);
    }
}
