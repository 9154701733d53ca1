//! The header of a vsock packet (virtio 1.2, §5.10.6): 44 bytes, little-endian, its payload behind it.

/// Bytes of a header.
pub(super) const LEN: usize = 44;
/// The most bytes of a payload, which is what Linux sends at once (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub(super) const PAYLOAD: usize = 64 * 1024;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// What a packet does (§5.10.6, `virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// Opens a stream.
    Request,
    /// Takes it.
    Response,
    /// Refuses or ends it at once.
    Reset,
    /// Ends directions, as the flags say.
    Shutdown,
    /// Carries bytes.
    Data,
    /// Tells the credit, as every packet does.
    CreditUpdate,
    /// Asks for the other's.
    CreditRequest,
}

impl Op {
    const fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    const fn of(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Flags of a shutdown: the sender will take no more bytes, or send no more. They stay in force (§5.10.6.4).
pub(super) mod ends {
    pub(in super::super) const RECEIVE: u32 = 1;
    pub(in super::super) const SEND: u32 = 2;
    pub(in super::super) const BOTH: u32 = RECEIVE | SEND;
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    /// [`STREAM`], or what a guest says else.
    pub(super) kind: u16,
    /// `None` for an operation that does not exist.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// Bytes the sender can keep of this stream.
    pub(super) buf_alloc: u32,
    /// Bytes it has had and does not keep any more, ever, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

fn take<const N: usize>(bytes: &[u8; LEN], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

impl Header {
    /// Any 44 bytes are a header.
    pub(super) fn parse(bytes: &[u8; LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(take(bytes, 0)),
            dst_cid: u64::from_le_bytes(take(bytes, 8)),
            src_port: u32::from_le_bytes(take(bytes, 16)),
            dst_port: u32::from_le_bytes(take(bytes, 20)),
            len: u32::from_le_bytes(take(bytes, 24)),
            kind: u16::from_le_bytes(take(bytes, 28)),
            op: Op::of(u16::from_le_bytes(take(bytes, 30))),
            flags: u32::from_le_bytes(take(bytes, 32)),
            buf_alloc: u32::from_le_bytes(take(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(take(bytes, 40)),
        }
    }

    /// As it lies in memory.
    pub(super) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, field: &[u8]| {
            if let Some(to) = bytes.get_mut(at..at + field.len()) {
                to.copy_from_slice(field);
            }
        };
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.map_or(0, Op::number).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_lies_as_the_standard_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 80,
            len: 5,
            kind: STREAM,
            op: Some(Op::Data),
            flags: 0,
            buf_alloc: 0x40000,
            fwd_cnt: 9,
        };
        let expected = [
            [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0],
            [0, 0, 0, 0, 0, 4, 3, 2, 1, 80, 0],
            [0, 0, 5, 0, 0, 0, 1, 0, 5, 0, 0],
            [0, 0, 0, 0, 0, 4, 0, 9, 0, 0, 0],
        ];
        assert_eq!(header.bytes(), *expected.as_flattened());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_what_is_known_of_it_comes_back(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform12(any::<u8>())) {
            let mut all = [0; LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            let header = Header::parse(&all);
            if header.op.is_none() {
                (all[30], all[31]) = (0, 0);
            }
            prop_assert_eq!(header.bytes(), all);
        }
    }
}
