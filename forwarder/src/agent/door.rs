//! Where a guest's streams arrive: what each is, its first message says.
//!
//! Anybody in the guest can open a stream. One that does not say within [`PATIENCE`] what it is, or says something else,
//! is closed; at [`NAMELESS`] streams that have not said it yet, and as many more as are awaited, the oldest is: so a flood
//! of silent ones keeps no agent out, whose own say it at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use portway_api::agent::{FIRST_MESSAGE_MAX, ToHost, kind_of, parse};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::carry::{Stream, carry};
use super::guest::Input;
use super::shared::Shared;
use super::{Complaints, SocketPair, harmless};

/// Streams that have not said what they are, beside those that are awaited.
pub(crate) const NAMELESS: usize = 64;
/// How long one may take to say it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lets streams in until there are no more.
pub(super) async fn keep(
    mut arrivals: mpsc::Receiver<UnixStream>,
    shared: Arc<Shared>,
    guest: mpsc::Sender<Input>,
    sockets: Vec<SocketPair>,
) {
    let sockets = Arc::new(sockets);
    let complaints = Arc::new(Complaints::new());
    let mut nameless: VecDeque<AbortHandle> = VecDeque::new();
    while let Some(stream) = arrivals.recv().await {
        nameless.retain(|task| !task.is_finished());
        if nameless.len() >= NAMELESS + shared.awaited()
            && let Some(oldest) = nameless.pop_front()
        {
            oldest.abort();
            if complaints.may() {
                tracing::warn!(
                    most = NAMELESS,
                    "a guest opens streams and says nothing: the oldest is closed"
                );
            }
        }
        let (shared, guest, sockets) = (Arc::clone(&shared), guest.clone(), Arc::clone(&sockets));
        let complaints = Arc::clone(&complaints);
        let task = tokio::spawn(async move {
            if let Err(fault) = admit(stream, &shared, &guest, &sockets).await
                && complaints.may()
            {
                tracing::warn!(fault, "a guest's stream is closed");
            }
        });
        nameless.push_back(task.abort_handle());
        // Those who have come say what they are before more are let in.
        tokio::task::yield_now().await;
    }
}

/// Reads the first message and hands the stream to whom it is for.
async fn admit(
    mut stream: UnixStream,
    shared: &Arc<Shared>,
    guest: &mpsc::Sender<Input>,
    sockets: &[SocketPair],
) -> Result<(), String> {
    let first = tokio::time::timeout(PATIENCE, first_message(&mut stream)).await;
    let first = first.map_err(|_| "it has not said what it is".to_owned())??;
    match parse::<ToHost>(&first).map_err(|e| e.to_string())? {
        ToHost::Hello(hello) => {
            guest.send(Input::Hello { stream, hello }).await.map_err(|_| "the service has ended".to_owned())
        }
        ToHost::Stream { stream: number, key } => match shared.arrive(number, key, stream) {
            true => Ok(()),
            false => Err("nobody awaits it".into()),
        },
        ToHost::Client { socket, key } => {
            let known = shared.session.borrow().as_ref().is_some_and(|s| s.key == key);
            let pair = usize::try_from(socket).ok().and_then(|n| sockets.get(n)).filter(|_| known);
            let pair = pair.ok_or("a client of no socket of ours")?.clone();
            let place = shared.place().ok_or("there are too many streams")?;
            let shared = Arc::clone(shared);
            // Beyond the door: a carried stream is not nameless any more.
            tokio::spawn(async move {
                let _place = place;
                out_to_host(stream, &pair, &shared).await;
            });
            Ok(())
        }
        _ => Err(format!("it begins with {:?}", harmless(&kind_of(&first)))),
    }
}

async fn first_message(stream: &mut UnixStream) -> Result<Vec<u8>, String> {
    let gone = |e: std::io::Error| format!("it ended before it said what it is: {e}");
    let len = usize::try_from(stream.read_u32().await.map_err(gone)?).unwrap_or(usize::MAX);
    if len > FIRST_MESSAGE_MAX {
        return Err(format!("its first message has {len} bytes"));
    }
    let mut message = vec![0; len];
    stream.read_exact(&mut message).await.map_err(gone)?;
    Ok(message)
}

/// A client in the guest, and the host's unix socket it wants.
async fn out_to_host(guest: UnixStream, pair: &SocketPair, shared: &Shared) {
    let host = match UnixStream::connect(&pair.host).await {
        Ok(host) => host,
        Err(error) => {
            return tracing::debug!(%error, path = %pair.host.display(), "a guest's client is refused");
        }
    };
    let (far, near) = (Stream::Unix(guest), Stream::Unix(host));
    let mut sessions = shared.session.subscribe();
    sessions.mark_unchanged();
    tokio::select! {
        _ = carry(&near, &far) => {}
        // Another session, or none: this stream was of the one before.
        _ = sessions.changed() => {}
    }
}
