//! The bytes of DHCPv6 (RFC 8415 §8, §21; RFC 3646, RFC 4704).

use std::net::Ipv6Addr;

use super::IAS;
use crate::types::Mac;
use crate::wire::labels;

const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const PREFERENCE: u16 = 7;
const STATUS_CODE: u16 = 13;
const RAPID_COMMIT: u16 = 14;
const RESOLVERS: u16 = 23;
const SEARCH: u16 = 24;
const CLIENT_FQDN: u16 = 39;

const ADVERTISE: u8 = 2;
const REPLY: u8 = 7;

/// The longest DUID (RFC 8415 §11.1), its type included.
const DUID: usize = 130;
/// Addresses of one IA that count.
const ADDRESSES: usize = 8;
/// Bytes of the search list.
const SEARCH_BYTES: usize = 480;

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Solicit,
    Request,
    Confirm,
    Renew,
    Rebind,
    Release,
    Decline,
    InformationRequest,
}

/// RFC 8415 §21.13.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Success = 0,
    NoAddrsAvail = 2,
    NoBinding = 3,
    NotOnLink = 4,
    UseMulticast = 5,
}

/// An identity association: its id, and the addresses the client names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ia {
    pub(super) id: u32,
    pub(super) addresses: Vec<Ipv6Addr>,
}

/// What of a message matters here.
#[derive(Debug)]
pub(super) struct Message<'m> {
    pub(super) kind: Kind,
    transaction: [u8; 3],
    pub(super) client: Option<&'m [u8]>,
    pub(super) server: Option<&'m [u8]>,
    pub(super) ias: Vec<Ia>,
    pub(super) rapid_commit: bool,
    pub(super) name: Option<String>,
}

/// Walks options; `None` from `each`, or one that is cut off, ends the message.
fn options<'m>(mut bytes: &'m [u8], mut each: impl FnMut(u16, &'m [u8]) -> Option<()>) -> Option<()> {
    while !bytes.is_empty() {
        let (&[c0, c1, l0, l1], rest) = bytes.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes([l0, l1])))?;
        each(u16::from_be_bytes([c0, c1]), value)?;
        bytes = rest;
    }
    Some(())
}

/// Reads a client's message; `None` for what is none.
pub(super) fn parse(bytes: &[u8]) -> Option<Message<'_>> {
    let (&[kind, a, b, c], rest) = bytes.split_first_chunk()?;
    let kind = match kind {
        1 => Kind::Solicit,
        3 => Kind::Request,
        4 => Kind::Confirm,
        5 => Kind::Renew,
        6 => Kind::Rebind,
        8 => Kind::Release,
        9 => Kind::Decline,
        11 => Kind::InformationRequest,
        _ => return None,
    };
    let mut message = Message {
        kind,
        transaction: [a, b, c],
        client: None,
        server: None,
        ias: Vec::new(),
        rapid_commit: false,
        name: None,
    };
    options(rest, |code, value| {
        match code {
            CLIENT_ID => message.client = Some(value).filter(|v| (3..=DUID).contains(&v.len()))?.into(),
            SERVER_ID => message.server = Some(value),
            IA_NA if message.ias.len() < IAS => message.ias.push(association(value)?),
            RAPID_COMMIT => message.rapid_commit = true,
            // RFC 4704 §4.1: flags, then the name.
            CLIENT_FQDN => message.name = value.get(1..).and_then(labels::first_host_label),
            _ => {}
        }
        Some(())
    })?;
    Some(message)
}

fn association(value: &[u8]) -> Option<Ia> {
    let (&[a, b, c, d, ..], rest) = value.split_first_chunk::<12>()?;
    let mut addresses = Vec::new();
    options(rest, |code, value| {
        if code == IA_ADDRESS && addresses.len() < ADDRESSES {
            addresses.push(Ipv6Addr::from(*value.first_chunk::<16>()?));
        }
        Some(())
    })?;
    Some(Ia { id: u32::from_be_bytes([a, b, c, d]), addresses })
}

/// The name a server goes by: its Ethernet address (RFC 8415 §11.4, DUID-LL).
pub(super) fn duid(mac: Mac) -> [u8; 10] {
    let [a, b, c, d, e, f] = mac.0;
    [0, 3, 0, 1, a, b, c, d, e, f]
}

/// An answer while it is written.
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn new(message: &Message<'_>, server: &[u8]) -> Self {
        let [a, b, c] = message.transaction;
        let mut out = Self(vec![REPLY, a, b, c]);
        if let Some(client) = message.client {
            out.put(CLIENT_ID, client);
        }
        out.put(SERVER_ID, server);
        out
    }

    fn put(&mut self, code: u16, value: &[u8]) {
        self.0.extend(code.to_be_bytes());
        // No value here comes near 64 KiB: the longest is a search list.
        self.0.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
        self.0.extend(value);
    }

    /// One IA with its addresses, each with its preferred and valid lifetime in seconds.
    pub(super) fn ia(&mut self, id: u32, addresses: &[(Ipv6Addr, u32, u32)], status: Option<Status>) {
        let preferred = addresses.first().map_or(0, |(_, preferred, _)| *preferred);
        let mut inner = Self(Vec::new());
        for (ip, preferred, valid) in addresses {
            let address = [&ip.octets()[..], &preferred.to_be_bytes(), &valid.to_be_bytes()].concat();
            inner.put(IA_ADDRESS, &address);
        }
        if let Some(status) = status {
            inner.status(status);
        }
        // RFC 8415 §21.4: renew at half, rebind at four fifths of the preferred lifetime.
        let (t1, t2) = (preferred / 2, preferred / 5 * 4);
        let value = [&id.to_be_bytes()[..], &t1.to_be_bytes(), &t2.to_be_bytes(), &inner.0].concat();
        self.put(IA_NA, &value);
    }

    pub(super) fn status(&mut self, status: Status) {
        let text = match status {
            Status::Success => "",
            Status::NoAddrsAvail => "no addresses left",
            Status::NoBinding => "no such lease",
            Status::NotOnLink => "not on this link",
            Status::UseMulticast => "use multicast",
        };
        self.put(STATUS_CODE, &[&[0, status as u8], text.as_bytes()].concat());
    }

    pub(super) fn options(&mut self, resolver: Ipv6Addr, domains: &[String]) {
        self.put(RESOLVERS, &resolver.octets());
        let search = labels::list(domains, SEARCH_BYTES);
        if !search.is_empty() {
            self.put(SEARCH, &search);
        }
    }

    /// RFC 8415 §18.2.1: a client takes the largest at once, and waits a second for others after any less.
    pub(super) fn preference(&mut self, preference: u8) {
        self.put(PREFERENCE, &[preference]);
    }

    pub(super) fn rapid_commit(&mut self) {
        self.put(RAPID_COMMIT, &[]);
    }

    pub(super) fn reply(self) -> Vec<u8> {
        self.0
    }

    pub(super) fn advertise(mut self) -> Vec<u8> {
        if let Some(kind) = self.0.first_mut() {
            *kind = ADVERTISE;
        }
        self.0
    }
}
