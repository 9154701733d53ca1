//! A guest made by hand: a front end with a driver of the three rings, and the device it is attached to, turned by the
//! test itself.

use std::io::{ErrorKind, Read, Write};
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use vhost::VhostBackend;

use super::super::packet::{Header, LEN, Op, PAYLOAD, STREAM};
use super::super::rings::{RINGS, TO_GUEST, TO_HOST};
use super::super::*;
use crate::vhost_user::feature;
use crate::vhost_user::lab::Driver;
pub(super) use crate::vhost_user::lab::{BUFFERS, GUEST, Piece, REGION, SIZE};

pub(super) const ALL: u64 = feature::RINGS;
/// The guest's CID.
pub(super) const CID: u32 = 7;
/// How much the guest takes of each stream.
pub(super) const CREDIT: u32 = 256 * 1024;
/// Bytes of a buffer for a packet's payload, as Linux 6.1 posts them.
pub(super) const BUFFER: u32 = 4096;
/// Between two buffers to write to.
const STEP: u64 = 8192;
/// Where packets of the guest's are made.
const PACKETS: u64 = GUEST + REGION;
const PACKETS_END: u64 = GUEST + 2 * REGION - 70_000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Lab {
    pub(super) driver: Driver<RINGS>,
    pub(super) device: Device,
    pub(super) worker: Worker,
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) dir: tempfile::TempDir,
    /// The address of the buffer of each chain posted, by its head.
    posted: Vec<Option<u64>>,
    /// What the guest has seen is posted again.
    pub(super) reposts: bool,
    /// Bytes of a buffer for a packet's payload.
    pub(super) buffer: u32,
    next_packet: u64,
}

impl Deref for Lab {
    type Target = Driver<RINGS>;

    fn deref(&self) -> &Driver<RINGS> {
        &self.driver
    }
}

impl DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Driver<RINGS> {
        &mut self.driver
    }
}

/// A packet from port `src` of the guest to port `dst` of the host.
pub(super) fn packet(src: u32, dst: u32, op: Op) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: 2,
        src_port: src,
        dst_port: dst,
        len: 0,
        kind: STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: CREDIT,
        fwd_cnt: 0,
    }
}

/// Lets the front end talk while the device answers.
pub(super) fn talk<T: Send>(
    worker: &mut Worker,
    front: &mut vhost::vhost_user::Frontend,
    say: impl FnOnce(&mut vhost::vhost_user::Frontend) -> T + Send,
) -> T {
    crate::vhost_user::lab::talk(front, say, || {
        worker.turn(Some(Duration::from_millis(1)))?;
        Ok(crate::vhost_user::Changes::default())
    })
    .0
}

impl Lab {
    /// A guest with buffers posted, and its device.
    pub(super) fn new() -> Self {
        Self::with(ALL)
    }

    pub(super) fn with(features: u64) -> Self {
        let mut lab = Self::detached(features);
        lab.negotiate();
        lab.start([0; RINGS]);
        lab.post_buffers(64);
        lab
    }

    /// A VMM that has connected and said nothing.
    pub(super) fn detached(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = crate::unix_path::listen(&dir.path().join("vmm"), 0o600).unwrap();
        let (device, mut worker) = Device::new(listener, CID, Some(dir.path().to_owned())).unwrap();
        let stream = StdStream::connect(dir.path().join("vmm")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        worker.turn(Some(Duration::ZERO)).unwrap();
        Self {
            driver: Driver::new(stream, features),
            device,
            worker,
            runtime,
            dir,
            posted: vec![None; SIZE.into()],
            reposts: true,
            buffer: BUFFER,
            next_packet: PACKETS,
        }
    }

    /// The VMM goes, and one more comes.
    pub(super) fn reattach(&mut self) {
        let stream = StdStream::connect(self.dir.path().join("vmm")).unwrap();
        self.driver = Driver::new(stream, self.features);
        self.posted.fill(None);
        self.turn();
    }

    pub(super) fn negotiate(&mut self) {
        let (infos, features) = (self.driver.infos(), self.driver.features);
        let said = talk(&mut self.worker, &mut self.driver.front, |front| {
            Driver::<RINGS>::negotiate(front, features, &infos)
        });
        said.unwrap();
    }

    pub(super) fn start(&mut self, base: [u16; RINGS]) {
        let Driver { front, kick, call, .. } = &mut self.driver;
        talk(&mut self.worker, front, |front| Driver::start(front, kick, call, base)).unwrap();
    }

    pub(super) fn stop(&mut self) -> [u16; RINGS] {
        talk(&mut self.worker, &mut self.driver.front, |front| {
            std::array::from_fn(|ring| u16::try_from(front.get_vring_base(ring).unwrap()).unwrap())
        })
    }

    /// Posts `count` buffers of the size and the layout that Linux has.
    pub(super) fn post_buffers(&mut self, count: usize) {
        let free: Vec<u64> = (0u64..128)
            .map(|i| BUFFERS + STEP * i)
            .filter(|at| !self.posted.contains(&Some(*at)))
            .take(count)
            .collect();
        for at in free {
            self.post_buffer(at);
        }
        self.kicked(TO_GUEST);
    }

    fn post_buffer(&mut self, at: u64) {
        let header = u32::try_from(LEN).unwrap();
        let pieces: [Piece; 2] = [(at, header, true), (at + u64::from(header), self.buffer, true)];
        let head = self.driver.chain(TO_GUEST, &pieces, true);
        self.posted[usize::from(head)] = Some(at);
        self.driver.offer(TO_GUEST, head);
    }

    /// Kicks as a guest does, through the eventfd.
    pub(super) fn kicked(&mut self, ring: usize) {
        self.driver.kick[ring].write(1).unwrap();
    }

    /// Some turns of the device: enough for all that needs no waiting.
    pub(super) fn turn(&mut self) {
        for _ in 0..4 {
            self.worker.turn(Some(Duration::ZERO)).unwrap();
        }
    }

    /// The guest sends a packet, and the device has dealt with it.
    pub(super) fn sends(&mut self, header: Header, payload: &[u8]) {
        self.offers(header, payload);
        self.turn();
    }

    /// The guest sends a packet.
    pub(super) fn offers(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: u32::try_from(payload.len()).unwrap(), ..header };
        let at = self.next_packet;
        self.next_packet += 128 + payload.len() as u64;
        if self.next_packet > PACKETS_END {
            self.next_packet = PACKETS;
        }
        self.driver.put(at, &header.bytes());
        self.driver.put(at + 100, payload);
        let mut pieces: Vec<Piece> = vec![(at, u32::try_from(LEN).unwrap(), false)];
        if !payload.is_empty() {
            pieces.push((at + 100, header.len, false));
        }
        self.driver.post(TO_HOST, &pieces, true);
        self.kicked(TO_HOST);
    }

    /// What the guest has got since the last time.
    pub(super) fn sees(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.turn();
        let mut packets = Vec::new();
        for (head, len) in self.driver.used(TO_GUEST) {
            let head = usize::try_from(head).unwrap();
            let at = self.posted[head].take().expect("a chain the guest has posted");
            if len > 0 {
                let bytes = self.driver.get(at, len as usize);
                let (header, payload) = bytes.split_first_chunk().expect("a header");
                let header = Header::parse(header);
                assert_eq!(header.len as usize, payload.len());
                assert!(payload.len() <= PAYLOAD);
                assert_eq!((header.src_cid, header.dst_cid), (2, CID.into()));
                packets.push((header, payload.to_vec()));
            }
            if self.reposts {
                self.post_buffer(at);
            }
        }
        if self.reposts {
            self.kicked(TO_GUEST);
        }
        packets
    }

    /// The operations the guest sees, and whose ports and flags they have.
    pub(super) fn sees_ops(&mut self) -> Vec<(Op, u32, u32, u32)> {
        let all = self.sees();
        all.iter().map(|(h, _)| (h.op.expect("an operation"), h.src_port, h.dst_port, h.flags)).collect()
    }

    /// Steps until `done` has an answer.
    pub(super) fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = done(self) {
                return answer;
            }
            assert!(std::time::Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
            self.worker.turn(Some(Duration::from_millis(1))).unwrap();
        }
    }

    pub(super) fn listen(&mut self, port: u32) -> mpsc::Receiver<UnixStream> {
        let _runtime = self.runtime.enter();
        self.device.listen(port)
    }

    /// The next stream of a listener's.
    pub(super) fn accepted(&mut self, streams: &mut mpsc::Receiver<UnixStream>) -> StdStream {
        streams.try_recv().expect("a stream").into_std().unwrap()
    }

    /// Opens a stream from port `src` of the guest to `dst`, where somebody listens, and gives the host's end.
    pub(super) fn opened(&mut self, src: u32, dst: u32) -> StdStream {
        let mut streams = self.listen(dst);
        self.sends(packet(src, dst, Op::Request), &[]);
        let seen = self.sees_ops();
        assert_eq!(seen, [(Op::Response, dst, src, 0)]);
        self.accepted(&mut streams)
    }

    /// The host asks for a stream to `port`; gives its end, and where the outcome will be.
    pub(super) fn dials(&mut self, port: u32) -> (StdStream, oneshot::Receiver<io::Result<()>>) {
        let (ours, theirs) = pair().unwrap();
        let (reply, outcome) = oneshot::channel();
        self.device.dials.send(Dial { port, socket: ours, reply: Reply(reply) }).unwrap();
        self.device.waker.wake().unwrap();
        self.turn();
        (theirs, outcome)
    }
}

/// What can be read without waiting, and whether the end came.
pub(super) fn read_all(stream: &mut StdStream) -> (Vec<u8>, bool) {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 65_536]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (all, true),
            Ok(n) => all.extend(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return (all, false),
            Err(e) => panic!("{e}"),
        }
    }
}

/// Writes what is taken without waiting; says how much that was.
pub(super) fn write_some(stream: &mut StdStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match stream.write(&bytes[done..]) {
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    done
}
