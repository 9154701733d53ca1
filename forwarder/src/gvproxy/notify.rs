//! gvproxy's notifications: for each one a new connection to a unix socket, and a line of JSON.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use portway_api::control::{Event, EventInfo};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::broadcast;

use crate::control::App;

/// How often it is looked for Ethernet addresses that are new or gone.
const LOOK: Duration = Duration::from_millis(500);
/// How long one who is told may take; a notification he does not take is lost, and said.
const PATIENCE: Duration = Duration::from_secs(2);

/// Tells what happens, until the network ends.
pub(crate) async fn run(path: PathBuf, mut events: broadcast::Receiver<Arc<EventInfo>>, app: App) {
    tell(&path, "ready", None).await;
    let mut known: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            event = events.recv() => match event {
                // A link that goes takes its addresses with it: told at once and not at the next look.
                Ok(event) if matches!(event.event, Event::LinkDown { .. }) => {}
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            },
        }
        let Ok(now) = app.macs().await else { continue };
        for gone in known.iter().filter(|m| !now.iter().any(|(n, _)| n == *m)) {
            tell(&path, "connection_closed", Some(gone)).await;
        }
        for (new, _) in now.iter().filter(|(n, _)| !known.contains(n)) {
            tell(&path, "connection_established", Some(new)).await;
        }
        known = now.into_iter().map(|(mac, _)| mac).collect();
    }
}

async fn tell(path: &PathBuf, kind: &str, mac: Option<&str>) {
    let mac = mac.map_or_else(String::new, |m| format!(",\"mac_address\":\"{m}\""));
    let line = format!("{{\"notification_type\":\"{kind}\"{mac}}}\n");
    let told = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(line.as_bytes()).await?;
        stream.shutdown().await
    };
    match tokio::time::timeout(PATIENCE, told).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, kind, path = %path.display(), "a notification was not taken")
        }
        Err(_) => tracing::warn!(kind, path = %path.display(), "a notification was not taken in time"),
    }
}
