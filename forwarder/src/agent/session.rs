//! One session: the control stream of an agent that has said hello.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portway_api::agent::{Decoder, ToGuest, ToHost, kind_of, parse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::guest::Input;
use super::harmless;
use super::shared::Session;

/// Messages a second that are read of one agent in the long run.
pub(crate) const RATE: u32 = 200;
/// Messages that are read as fast as they come.
pub(super) const BURST: u32 = 2000;
/// How long an agent may take to take what it is told.
const WRITE: Duration = Duration::from_secs(10);
/// How often an agent is told the time: a guest whose host slept is right again so soon after.
const TIME: Duration = Duration::from_secs(10);
/// Bytes read at once.
const READ: usize = 16 * 1024;

/// Talks until the stream ends, the agent misbehaves, or the session is ended; says why.
pub(super) async fn talk(
    stream: UnixStream,
    session: Arc<Session>,
    mut outgoing: mpsc::Receiver<Vec<u8>>,
    guest: mpsc::Sender<Input>,
) -> String {
    let (mut from, mut to) = stream.into_split();
    let reading = async {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; READ];
        let mut budget = Budget::new(Instant::now());
        loop {
            match from.read(&mut buffer).await {
                Ok(0) => return "the agent ended it".to_owned(),
                Ok(n) => decoder.feed(buffer.get(..n).unwrap_or_default()),
                Err(error) => return error.to_string(),
            }
            loop {
                let message = match decoder.message() {
                    Ok(None) => break,
                    Ok(Some(bytes)) => match parse::<ToHost>(bytes) {
                        Ok(ToHost::Other) => {
                            session.tell(&ToGuest::Unknown { kind: harmless(&kind_of(bytes)) });
                            None
                        }
                        Ok(message) => Some(message),
                        Err(error) => return error.to_string(),
                    },
                    Err(error) => return error.to_string(),
                };
                // An agent that says more than that waits: its own socket fills, and nobody else notices.
                if let Some(pause) = budget.take(Instant::now()) {
                    tokio::time::sleep(pause).await;
                }
                let session = session.number;
                if let Some(message) = message
                    && guest.send(Input::Said { session, message }).await.is_err()
                {
                    return "the service has ended".to_owned();
                }
            }
        }
    };
    let writing = async {
        let mut clock = tokio::time::interval(TIME);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                bytes = outgoing.recv() => {
                    let Some(bytes) = bytes else { return "the service has ended".to_owned() };
                    match tokio::time::timeout(WRITE, to.write_all(&bytes)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return error.to_string(),
                        Err(_) => return "the agent does not read".to_owned(),
                    }
                }
                _ = clock.tick() => session.tell(&time()),
            }
        }
    };
    let why = tokio::select! {
        why = reading => why,
        why = writing => why,
        () = session.end.notified() => "the session was ended".to_owned(),
    };
    // What was said last (a good-bye) still goes, as far as it goes at once.
    while let Ok(bytes) = outgoing.try_recv() {
        if to.try_write(&bytes).is_err() {
            break;
        }
    }
    why
}

fn time() -> ToGuest {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    ToGuest::Time { unix_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX) }
}

/// A bucket of messages.
#[derive(Debug)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: f64::from(BURST), at: now }
    }

    /// Takes one; how long to wait for it.
    fn take(&mut self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + since * f64::from(RATE)).min(f64::from(BURST)) - 1.0;
        (self.left < 0.0).then(|| Duration::from_secs_f64(-self.left / f64::from(RATE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_messages_is_read_at_the_rate() {
        let began = Instant::now();
        let mut budget = Budget::new(began);
        for _ in 0..BURST + RATE {
            if let Some(pause) = budget.take(Instant::now()) {
                tokio::time::sleep(pause).await;
            }
        }
        let took = began.elapsed();
        assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1200), "{took:?}");
    }
}
