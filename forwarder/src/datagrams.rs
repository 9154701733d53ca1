//! Many datagrams in one system call.
//!
//! Linux has `recvmmsg(2)` and `UDP_SEGMENT` (`udp(7)`); elsewhere it is one call for each.

use std::io;
use std::net::SocketAddr;

use mio::net::UdpSocket;

/// The largest datagram.
const LARGEST: usize = 65_535;

/// What a socket may hold for us, in bytes, while the data thread is about something else; the kernel gives less where
/// `net.core.rmem_max` says so.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Makes a socket patient with bursts, as far as the host lets it.
pub(crate) fn hold_bursts(socket: &UdpSocket) {
    // With the default a burst loses datagrams earlier; it still works.
    let _ = socket2::SockRef::from(socket).set_recv_buffer_size(RECEIVE_BUFFER);
}

#[cfg(target_os = "linux")]
pub(crate) use linux::{Receiver, send_segments};
#[cfg(not(target_os = "linux"))]
pub(crate) use plain::{Receiver, send_segments};

#[cfg(target_os = "linux")]
mod linux {
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmsg};

    use super::{LARGEST, SocketAddr, UdpSocket, io};

    /// Datagrams of one call.
    const BATCH: usize = 32;

    /// Room for one batch, used again and again; its pages come as datagrams need them.
    pub(crate) struct Receiver {
        /// For sockets of IPv4 and of IPv6. The kernel leaves the length of the sender's address in the header, where the
        /// next call takes it for the room there is: headers that have seen IPv4 have none for IPv6.
        headers: [MultiHeaders<SockaddrStorage>; 2],
        buffer: Box<[u8]>,
    }

    impl Receiver {
        pub(crate) fn new() -> Self {
            Self {
                headers: std::array::from_fn(|_| MultiHeaders::preallocate(BATCH, None)),
                buffer: vec![0; BATCH * LARGEST].into(),
            }
        }

        /// Hands what one call brings to `each`. `v6`: the socket is of IPv6. False when there is nothing more for now.
        ///
        /// # Errors
        /// The socket's own, or one that a datagram of ours caused (ICMP), which the call has taken off; there may be more.
        pub(crate) fn receive(
            &mut self,
            socket: &UdpSocket,
            v6: bool,
            mut each: impl FnMut(SocketAddr, &[u8]),
        ) -> io::Result<bool> {
            let mut rooms = self.buffer.chunks_exact_mut(LARGEST);
            let mut slices: [[IoSliceMut<'_>; 1]; BATCH] =
                std::array::from_fn(|_| [IoSliceMut::new(rooms.next().unwrap_or_default())]);
            let flags = MsgFlags::MSG_DONTWAIT;
            match recvmmsg(socket.as_raw_fd(), &mut self.headers[usize::from(v6)], &mut slices, flags, None) {
                Ok(messages) => {
                    let mut count = 0;
                    for message in messages {
                        count += 1;
                        let from = message.address.as_ref().and_then(address);
                        if let Some(from) = from {
                            // An empty datagram has no slice.
                            each(from, message.iovs().next().unwrap_or_default());
                        }
                    }
                    // Fewer than asked for: the queue is empty, and news comes as an event.
                    Ok(count == BATCH)
                }
                Err(nix::Error::EAGAIN) => Ok(false),
                Err(nix::Error::EINTR) => Ok(true),
                Err(e) => Err(e.into()),
            }
        }
    }

    fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
        storage
            .as_sockaddr_in()
            .map(|a| SocketAddr::V4((*a).into()))
            .or_else(|| storage.as_sockaddr_in6().map(|a| SocketAddr::V6((*a).into())))
    }

    /// Sends `bytes` as datagrams of `size` bytes each, the last with what is left.
    pub(crate) fn send_segments(
        socket: &UdpSocket,
        bytes: &[u8],
        size: usize,
        to: SocketAddr,
    ) -> io::Result<()> {
        let size = u16::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        let segments = [ControlMessage::UdpGsoSegments(&size)];
        let to = SockaddrStorage::from(to);
        let parts = [IoSlice::new(bytes)];
        sendmsg(socket.as_raw_fd(), &parts, &segments, MsgFlags::MSG_DONTWAIT, Some(&to))?;
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod plain {
    use super::{LARGEST, SocketAddr, UdpSocket, io};

    /// Room for one datagram.
    pub(crate) struct Receiver(Box<[u8]>);

    impl Receiver {
        pub(crate) fn new() -> Self {
            Self(vec![0; LARGEST].into())
        }

        /// Hands one datagram to `each`. False when there is nothing more for now.
        ///
        /// # Errors
        /// The socket's.
        pub(crate) fn receive(
            &mut self,
            socket: &UdpSocket,
            _: bool,
            mut each: impl FnMut(SocketAddr, &[u8]),
        ) -> io::Result<bool> {
            match socket.recv_from(&mut self.0) {
                Ok((len, from)) => {
                    each(from, &self.0[..len]);
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
mod tests {
    use super::*;

    #[test]
    fn segments_arrive_as_datagrams_of_their_size_and_in_order() {
        let bind = || UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let (from, to) = (bind(), bind());
        let bytes: Vec<u8> = (0..5000).map(|n| u8::try_from(n % 250).unwrap()).collect();
        send_segments(&from, &bytes, 1200, to.local_addr().unwrap()).unwrap();
        let (mut receiver, mut got) = (Receiver::new(), Vec::new());
        // On loopback a datagram is there when `sendmsg` returns.
        let more = receiver.receive(&to, false, |sender, bytes| {
            assert_eq!(sender, from.local_addr().unwrap());
            got.push(bytes.to_vec());
        });
        assert!(!more.unwrap());
        assert_eq!(got, bytes.chunks(1200).map(<[u8]>::to_vec).collect::<Vec<_>>());
        assert!(!receiver.receive(&to, false, |_, _| panic!()).unwrap());
    }

    #[test]
    fn empty_datagrams_and_senders_of_both_families_are_seen() {
        let bind = |ip: std::net::IpAddr| UdpSocket::bind(SocketAddr::new(ip, 0)).ok();
        let mut receiver = Receiver::new();
        for ip in ["127.0.0.1", "::1", "127.0.0.1", "::1"] {
            let ip: std::net::IpAddr = ip.parse().unwrap();
            // A host without IPv6 has no ::1.
            let (Some(from), Some(to)) = (bind(ip), bind(ip)) else { continue };
            for bytes in [&b"x"[..], b""] {
                from.send_to(bytes, to.local_addr().unwrap()).unwrap();
            }
            let mut got = Vec::new();
            receiver.receive(&to, ip.is_ipv6(), |sender, bytes| got.push((sender, bytes.len()))).unwrap();
            let sender = from.local_addr().unwrap();
            assert_eq!(got, [(sender, 1), (sender, 0)]);
        }
    }
}
