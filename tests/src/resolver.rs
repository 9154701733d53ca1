//! A resolver of the test's own, on any address: it knows a few kinds of names.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

/// Runs until the process ends.
#[derive(Debug, Clone)]
pub struct Resolver {
    /// Where it is.
    pub address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Resolver {
    /// Starts one at `address`, UDP and TCP; port 0 takes a free one. What it says:
    ///
    /// - `nx.*`: NXDOMAIN, with a SOA of 5 s;
    /// - `none.*`: NODATA, likewise;
    /// - `big.*`: cut by UDP, 40 addresses by TCP;
    /// - `inside.*`: 10.0.0.1;
    /// - everything else: `answer`, for 300 s.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn start(address: SocketAddr, answer: [u8; 4]) -> Result<Self> {
        let tcp = TcpListener::bind(address)?;
        let address = tcp.local_addr()?;
        let udp = UdpSocket::bind(address)?;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut query = [0; 1500];
            while let Ok((n, from)) = udp.recv_from(&mut query) {
                count.fetch_add(1, Ordering::Relaxed);
                if let Some(reply) = reply_to(&query[..n], answer, false) {
                    let _ = udp.send_to(&reply, from);
                }
            }
        });
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                let mut query = Vec::new();
                if stream.read_exact(&mut length).is_ok() {
                    query.resize(usize::from(u16::from_be_bytes(length)), 0);
                }
                if stream.read_exact(&mut query).is_err() {
                    continue;
                }
                if let Some(reply) = reply_to(&query, answer, true) {
                    let length = u16::try_from(reply.len()).unwrap_or(0).to_be_bytes();
                    let _ = stream.write_all(&[&length[..], &reply].concat());
                }
            }
        });
        Ok(Self { address, asked })
    }

    /// Queries it had by UDP.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

pub(crate) fn reply_to(query: &[u8], answer: [u8; 4], tcp: bool) -> Option<Vec<u8>> {
    const SOA: u16 = 6;
    const A: u16 = 1;
    let question = query.get(12..)?;
    let mut end = 0;
    while *question.get(end)? != 0 {
        end += 1 + usize::from(question[end]);
    }
    let kind = u16::from_be_bytes([*question.get(end + 1)?, *question.get(end + 2)?]);
    let question = question.get(..end + 5)?;
    let first = question.get(1..=usize::from(*question.first()?))?.to_ascii_lowercase();
    let (code, cut, addresses): (u8, bool, Vec<[u8; 4]>) = match &first[..] {
        b"nx" => (3, false, vec![]),
        b"none" => (0, false, vec![]),
        b"big" if !tcp => (0, true, vec![]),
        b"big" => (0, false, (0..40).map(|n| [198, 51, 100, n]).collect()),
        b"inside" => (0, false, vec![[10, 0, 0, 1]]),
        _ if kind == A => (0, false, vec![answer]),
        _ => (0, false, vec![]),
    };
    let count = u16::try_from(addresses.len()).ok()?.to_be_bytes();
    let negative = addresses.is_empty() && !cut;
    let mut reply = query.get(..2)?.to_vec();
    reply.extend([0x81 | if cut { 2 } else { 0 }, 0x80 | code, 0, 1, count[0], count[1]]);
    reply.extend([0, u8::from(negative), 0, 0]);
    reply.extend(question);
    let mut put = |kind: u16, ttl: u32, data: &[u8]| {
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend([0, 1]);
        reply.extend(ttl.to_be_bytes());
        reply.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
        reply.extend(data);
    };
    for address in &addresses {
        put(A, 300, address);
    }
    if negative {
        let mut soa = vec![0xc0, 12, 0xc0, 12];
        for number in [1_u32, 3600, 600, 86_400, 5] {
            soa.extend(number.to_be_bytes());
        }
        put(SOA, 300, &soa);
    }
    Some(reply)
}
