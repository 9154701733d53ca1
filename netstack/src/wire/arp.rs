//! ARP for IPv4 over Ethernet (RFC 826).

use std::net::Ipv4Addr;

use super::ethernet;
use crate::drop_reason::DropReason;
use crate::types::Mac;

/// Bytes of a message.
pub const LEN: usize = 28;

/// Request or reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Who has `target_ip`?
    Request,
    /// `sender_ip` is at `sender_mac`.
    Reply,
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// What it says.
    pub operation: Operation,
    /// Sender's Ethernet address.
    pub sender_mac: Mac,
    /// Sender's address.
    pub sender_ip: Ipv4Addr,
    /// Target's Ethernet address; zero in a request.
    pub target_mac: Mac,
    /// Target's address.
    pub target_ip: Ipv4Addr,
}

/// Reads one message.
///
/// # Errors
/// `Truncated` below 28 bytes, `UnknownProtocol` for other hardware, protocol or operation.
pub fn parse(bytes: &[u8]) -> Result<Message, DropReason> {
    let Some((m, _)) = bytes.split_first_chunk::<LEN>() else { return Err(DropReason::Truncated) };
    let &[
        0,
        1,
        8,
        0,
        6,
        4,
        0,
        op, //
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        a,
        b,
        c,
        d, //
        t0,
        t1,
        t2,
        t3,
        t4,
        t5,
        e,
        f,
        g,
        h,
    ] = m
    else {
        return Err(DropReason::UnknownProtocol);
    };
    let operation = match op {
        1 => Operation::Request,
        2 => Operation::Reply,
        _ => return Err(DropReason::UnknownProtocol),
    };
    Ok(Message {
        operation,
        sender_mac: Mac([s0, s1, s2, s3, s4, s5]),
        sender_ip: Ipv4Addr::new(a, b, c, d),
        target_mac: Mac([t0, t1, t2, t3, t4, t5]),
        target_ip: Ipv4Addr::new(e, f, g, h),
    })
}

/// The whole frame that carries `message` from its sender to `dst`.
#[must_use]
pub fn frame(message: &Message, dst: Mac) -> [u8; ethernet::HEADER + LEN] {
    let mut out = [0; ethernet::HEADER + LEN];
    let (head, body) = out.split_at_mut(ethernet::HEADER);
    head.copy_from_slice(&ethernet::Header { dst, src: message.sender_mac, kind: ethernet::ARP }.bytes());
    let operation = match message.operation {
        Operation::Request => 1,
        Operation::Reply => 2,
    };
    let fixed = [0, 1, 8, 0, 6, 4, 0, operation];
    let parts: [&[u8]; 5] = [
        &fixed,
        &message.sender_mac.0,
        &message.sender_ip.octets(),
        &message.target_mac.0,
        &message.target_ip.octets(),
    ];
    for (to, from) in body.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_write_we_read() {
        let message = Message {
            operation: Operation::Reply,
            sender_mac: Mac([2, 0, 0, 0, 0, 1]),
            sender_ip: Ipv4Addr::new(192, 168, 127, 1),
            target_mac: Mac([2, 0, 0, 0, 0, 2]),
            target_ip: Ipv4Addr::new(192, 168, 127, 2),
        };
        let frame = frame(&message, message.target_mac);
        let (header, body) = ethernet::parse(&frame).unwrap();
        assert_eq!((header.dst, header.kind), (message.target_mac, ethernet::ARP));
        assert_eq!(parse(body), Ok(message));
    }

    #[test]
    fn frames_of_14_to_41_bytes_are_truncated() {
        for n in 0..LEN {
            assert_eq!(parse(&[0; LEN][..n]), Err(DropReason::Truncated));
        }
    }
}
