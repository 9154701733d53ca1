//! `--pcap`: each connection gets the frames that pass from then on, without end, as a pcap file (draft-ietf-opsawg-pcap).
//!
//! A client that is too slow loses frames and nobody waits for it: see [`crate::capture`].

use std::time::{Duration, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use crate::capture::{Capture, Filter, Frame, Reader};
use crate::request::{Request, Requests};

/// Microseconds, as most readers expect.
const MAGIC: u32 = 0xa1b2_c3d4;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;
/// Bytes of a frame at the most: what tcpdump says.
const SNAPLEN: u32 = 262_144;
/// Frames written at one go.
const FRAMES: usize = 256;

/// Serves one socket; ends with the runtime. How many may listen at once is a matter of [`crate::capture::CAPTURES`].
pub(super) async fn serve(listener: UnixListener, requests: Requests) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(client(stream, requests.clone()))),
            Err(error) => {
                tracing::warn!(%error, "--pcap cannot accept, trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn client(stream: UnixStream, requests: Requests) {
    let (capture, reader) = Capture::new(Filter::default());
    let (reply, answer) = oneshot::channel();
    if requests.send(Request::Capture { capture, reply }).is_err() {
        return;
    }
    match answer.await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return tracing::warn!(%error, "a client of --pcap was sent away"),
        Err(_) => return,
    }
    if let Err(error) = send(stream, reader).await {
        tracing::debug!(%error, "a client of --pcap went away");
    }
    // When the data thread is overloaded the next capture takes this one off.
    let _ = requests.send(Request::EndCaptures);
}

/// Sends frames until the client goes, or the network ends.
async fn send(mut stream: UnixStream, mut reader: Reader) -> std::io::Result<()> {
    let mut chunk = head();
    let mut frames = Vec::new();
    let mut nothing = [0; 64];
    loop {
        stream.write_all(&chunk).await?;
        chunk.clear();
        tokio::select! {
            more = reader.read(&mut frames, FRAMES) => if !more { return Ok(()) },
            // It has nothing to say, and its end is the end.
            said = stream.read(&mut nothing) => if said? == 0 { return Ok(()) },
        }
        frames.drain(..).for_each(|frame| record(&frame, &mut chunk));
    }
}

/// What a file begins with.
pub(super) fn head() -> Vec<u8> {
    let mut head = MAGIC.to_le_bytes().to_vec();
    // Version 2.4, and two fields that are always 0.
    head.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    head.extend(SNAPLEN.to_le_bytes());
    head.extend(ETHERNET.to_le_bytes());
    head
}

/// A frame, as it stands in a file.
pub(super) fn record(frame: &Frame, out: &mut Vec<u8>) {
    let at = frame.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    // Seconds since 1970 do not fit for ever; nor does the format.
    out.extend(u32::try_from(at.as_secs()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(at.subsec_micros().to_le_bytes());
    out.extend(word(frame.bytes.len()));
    out.extend(word(frame.len));
    out.extend_from_slice(&frame.bytes);
}
