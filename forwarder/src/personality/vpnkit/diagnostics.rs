//! `--diagnostics`: each connection gets one tar archive of what there is to know, and its end.
//!
//! Files: `connections` (the counters), `flows`, `endpoints` (the leases), `ports` (the forwards). The archive is POSIX
//! ustar (IEEE Std 1003.1, pax). Left out: vpnkit's ring captures; nothing is recorded before somebody asks.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Semaphore, oneshot};

use super::control::{answer_once, lines};
use super::expose::Exposer;
use crate::request::{Request, Requests};

/// Clients at once; further ones wait to be accepted.
const CONNECTIONS: usize = 8;

pub(super) async fn serve(listener: UnixListener, requests: Requests, exposer: Arc<Exposer>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (requests, exposer) = (requests.clone(), Arc::clone(&exposer));
                tokio::spawn(async move {
                    answer_once(stream, archive(&requests, &exposer).await).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "--diagnostics cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Asks the data thread one thing; what `shown` makes of the answer, as JSON.
async fn ask<T, S: serde::Serialize>(
    requests: &Requests,
    make: impl FnOnce(oneshot::Sender<T>) -> Request,
    shown: impl FnOnce(T) -> S,
) -> Vec<u8> {
    let (reply, answer) = oneshot::channel();
    let told = match requests.send(make(reply)) {
        Ok(()) => answer.await.map_err(|_| "the network is ending".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let text = told.and_then(|told| serde_json::to_string_pretty(&shown(told)).map_err(|e| e.to_string()));
    // What cannot be told says why.
    let mut text = text.unwrap_or_else(|fault| fault);
    text.push('\n');
    text.into_bytes()
}

async fn archive(requests: &Requests, exposer: &Exposer) -> Vec<u8> {
    let files = [
        ("connections", ask(requests, |reply| Request::Stats { reply }, |stats| stats).await),
        (
            "flows",
            ask(requests, |reply| Request::Flows { reply }, |flows| flows.infos().collect::<Vec<_>>()).await,
        ),
        ("endpoints", ask(requests, |reply| Request::Leases { reply }, |leases| leases).await),
        ("ports", lines(exposer).await.into_bytes()),
    ];
    tar(&files)
}

/// Bytes of a block: a header, and what contents are filled up to.
const BLOCK: usize = 512;

fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        out.extend(header(name, content.len()));
        out.extend(content);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

/// A header: fields at fixed places, numbers as octal digits.
fn header(name: &str, size: usize) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        for (to, from) in block.iter_mut().skip(at).zip(text.bytes()) {
            *to = from;
        }
    };
    put(0, name);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    // The sum is that of the header with blanks where it stands.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar");
    put(263, "00");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    for (to, from) in block.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").bytes()) {
        *to = from;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_itself_reads_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(
            &path,
            tar(&[("flows", b"[]\n".to_vec()), ("ports", vec![b'x'; 1000]), ("none", vec![])]),
        )
        .unwrap();
        let out = std::process::Command::new("tar").arg("-tvf").arg(&path).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 3 && lines[1].contains("1000") && lines[2].ends_with("none"), "{text}");
    }
}
