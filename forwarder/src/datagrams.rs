//! Many datagrams in one system call.
//!
//! Linux has `recvmmsg(2)`, and `UDP_SEGMENT` and `UDP_GRO` (`udp(7)`): datagrams of one size and one way that are handed
//! over as one piece. Elsewhere it is one call for each.

#[cfg(target_os = "linux")]
mod batch;

use mio::net::UdpSocket;

/// The largest datagram.
const LARGEST: usize = 65_535;

/// What a socket may hold for us, in bytes, while the data thread is about something else; the kernel gives less where
/// `net.core.rmem_max` says so.
const RECEIVE_BUFFER: usize = 1 << 20;

/// What the sandbox lets batches of datagrams do.
#[cfg(target_os = "linux")]
pub(crate) const CALLS: &[crate::sandbox::Call] =
    crate::sandbox::sandbox_calls![SYS_bind, SYS_recvmmsg, SYS_recvmsg, SYS_sendmmsg, SYS_sendmsg];

/// Makes a socket patient with bursts, as far as the host lets it.
pub(crate) fn hold_bursts(socket: &UdpSocket) {
    // With the default a burst loses datagrams earlier; it still works.
    let _ = socket2::SockRef::from(socket).set_recv_buffer_size(RECEIVE_BUFFER);
}

/// Has datagrams that arrive together come as one piece, where the host can.
pub(crate) fn come_together(socket: &UdpSocket) {
    // Without it each comes by itself.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::UdpGroSegment, &true);
    #[cfg(not(target_os = "linux"))]
    let _ = socket;
}

#[cfg(target_os = "linux")]
pub(crate) use batch::{Receiver, send_segments};
#[cfg(not(target_os = "linux"))]
pub(crate) use plain::{Receiver, send_segments};

#[cfg(not(target_os = "linux"))]
mod plain {
    use std::io;
    use std::net::SocketAddr;

    use super::{LARGEST, UdpSocket};

    /// Room for one datagram.
    pub(crate) struct Receiver(Box<[u8]>);

    impl Receiver {
        pub(crate) fn new() -> Self {
            Self(vec![0; LARGEST].into())
        }

        /// Hands one datagram and its size to `each`. False when there is nothing more for now.
        ///
        /// # Errors
        /// The socket's.
        pub(crate) fn receive(
            &mut self,
            socket: &UdpSocket,
            mut each: impl FnMut(SocketAddr, &[u8], usize),
        ) -> io::Result<bool> {
            match socket.recv_from(&mut self.0) {
                Ok((len, from)) => {
                    each(from, &self.0[..len], len);
                    Ok(true)
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(e) => Err(e),
            }
        }
    }

    /// There are no segments here.
    pub(crate) fn send_segments(_: &UdpSocket, _: &[u8], _: usize, _: SocketAddr) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn bind(ip: &str) -> Option<UdpSocket> {
        UdpSocket::bind(SocketAddr::new(ip.parse().unwrap(), 0)).ok()
    }

    /// Sends 5000 bytes as datagrams of 1200; what comes, with the sizes it came in.
    fn five_thousand_bytes(to: &UdpSocket) -> Vec<(Vec<u8>, usize)> {
        let from = bind("127.0.0.1").unwrap();
        let bytes: Vec<u8> = (0..5000).map(|n| u8::try_from(n % 250).unwrap()).collect();
        send_segments(&from, &bytes, 1200, to.local_addr().unwrap()).unwrap();
        let (mut receiver, mut got) = (Receiver::new(), Vec::new());
        // On loopback a datagram is there when `sendmsg` returns.
        let more = receiver.receive(to, |sender, bytes, size| {
            assert_eq!(sender, from.local_addr().unwrap());
            got.push((bytes.to_vec(), size));
        });
        assert!(!more.unwrap());
        assert!(!receiver.receive(to, |_, _, _| panic!()).unwrap());
        assert_eq!(got.iter().flat_map(|(b, _)| b).copied().collect::<Vec<_>>(), bytes);
        got
    }

    #[test]
    fn segments_arrive_as_datagrams_of_their_size_and_in_order() {
        let got = five_thousand_bytes(&bind("127.0.0.1").unwrap());
        let sizes: Vec<_> = got.iter().map(|(bytes, size)| (bytes.len(), *size)).collect();
        assert_eq!(sizes, [(1200, 1200), (1200, 1200), (1200, 1200), (1200, 1200), (200, 200)]);
    }

    #[test]
    fn datagrams_that_come_together_are_one_piece_and_their_size() {
        let to = bind("127.0.0.1").unwrap();
        come_together(&to);
        let got = five_thousand_bytes(&to);
        assert_eq!(got.iter().map(|(bytes, size)| (bytes.len(), *size)).collect::<Vec<_>>(), [(5000, 1200)]);
        // The next that comes alone has its own size, whatever the one before it had.
        let from = bind("127.0.0.1").unwrap();
        from.send_to(b"alone", to.local_addr().unwrap()).unwrap();
        let mut sizes = Vec::new();
        Receiver::new().receive(&to, |_, bytes, size| sizes.push((bytes.len(), size))).unwrap();
        assert_eq!(sizes, [(5, 5)]);
    }

    #[test]
    fn one_receiver_sees_sizes_and_senders_call_after_call() {
        let (to, mut receiver) = (bind("127.0.0.1").unwrap(), Receiver::new());
        come_together(&to);
        for size in [100_usize, 900, 1400, 7] {
            let from = bind("127.0.0.1").unwrap();
            send_segments(&from, &vec![1; size * 3], size, to.local_addr().unwrap()).unwrap();
            let mut got = Vec::new();
            receiver.receive(&to, |sender, bytes, each| got.push((sender, bytes.len(), each))).unwrap();
            assert_eq!(got, [(from.local_addr().unwrap(), size * 3, size)]);
        }
    }

    #[test]
    fn empty_datagrams_and_senders_of_both_families_are_seen() {
        let mut receiver = Receiver::new();
        for ip in ["127.0.0.1", "::1", "127.0.0.1", "::1"] {
            // A host without IPv6 has no ::1.
            let (Some(from), Some(to)) = (bind(ip), bind(ip)) else { continue };
            for bytes in [&b"x"[..], b""] {
                from.send_to(bytes, to.local_addr().unwrap()).unwrap();
            }
            let mut got = Vec::new();
            receiver.receive(&to, |sender, bytes, size| got.push((sender, bytes.len(), size))).unwrap();
            let sender = from.local_addr().unwrap();
            assert_eq!(got, [(sender, 1, 1), (sender, 0, 0)]);
        }
    }
}
