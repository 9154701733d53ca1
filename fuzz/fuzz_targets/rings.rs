//! vhost-user rings, of the network device and of vsock: rings anywhere, descriptors, tables, indices and memory of any
//! content, among packets and buffers that are right, while the device moves what there is. Nothing panics, no turn lasts,
//! nothing is written behind a region, and no stream is left.
//!
//! The first byte says which device and whether rings are where they should be; then features, and for each ring a size, a
//! base, and places if they are strange. Then steps, a byte each that says which, and what it needs.
#![no_main]

mod frontend;

use frontend::{Device, Guest, Input, Place, RINGS};
use libfuzzer_sys::fuzz_target;

/// The header of a packet from the guest, and its payload.
fn packet(input: &mut Input<'_>, net: bool) -> Option<(Vec<u8>, usize)> {
    let (op, ports, flags, len) = (input.u8()?, input.u8()?, input.u8()?, input.u16()?);
    let len = usize::from(len);
    if net {
        // flags, kind, header length, segment size, start, offset, buffers
        return Some((vec![flags, op, ports, 0, ports, 2, 34, 0, 16, 0, 0, 0], len));
    }
    let (host, guest) = (if ports & 8 == 0 { 80 } else { u32::from(ports & 7) }, u32::from(ports >> 4));
    let credit = input.u16()?;
    let mut header = Vec::new();
    header.extend(u64::from(if flags & 0x80 == 0 { portway::vsock::GUEST_CID } else { 9 }).to_le_bytes());
    header.extend(u64::from(portway::vsock::HOST_CID).to_le_bytes());
    header.extend(guest.to_le_bytes());
    // A host's streams have ports from 2^30 on.
    header.extend(if ports & 0xc == 0xc { 0x4000_0000 | host & 3 } else { host }.to_le_bytes());
    header.extend(u32::try_from(len).unwrap_or(0).to_le_bytes());
    header.extend(if flags & 0x40 == 0 { 1u16 } else { 2 }.to_le_bytes());
    header.extend(u16::from(op % 9).to_le_bytes());
    header.extend(u32::from(flags & 0x3f).to_le_bytes());
    header.extend((u32::from(credit) << 8).to_le_bytes());
    header.extend(u32::from(credit & 0xff).to_le_bytes());
    Some((header, len))
}

/// Sets the rings up as the input says.
fn set_up(input: &mut Input<'_>, device: &mut Device, guest: &mut Guest, strange: bool) -> Option<()> {
    guest.say(1, &[], &[]);
    device.turn()?;
    let offered = guest.listen().last_chunk().copied().map(u64::from_ne_bytes)?;
    let features = input.u64()? & offered;
    for (index, place) in guest.places.iter_mut().enumerate() {
        let shape = input.u8()?;
        let base = if shape & 0x80 == 0 { 0 } else { input.u16()? };
        *place = Place::usual(index, 1 << (shape % 9), base);
        if strange {
            for part in &mut place.parts {
                *part = u64::from(input.u16()?) * if shape & 0x40 == 0 { 16 } else { 2 };
            }
        }
    }
    // What was offered and used before is where the base is.
    for ring in 0..RINGS {
        guest.begin_at(ring, guest.places[ring].base);
    }
    guest.negotiate(features);
    Some(())
}

/// One step; `None` at the end of the input, or of the connection.
fn step(input: &mut Input<'_>, device: &mut Device, guest: &mut Guest, rings: usize) -> Option<()> {
    let net = rings == 2;
    let kind = input.u8()?;
    match kind % 14 {
        0 => {
            let (table, index, address) = (input.u8()?, input.u8()?, input.address()?);
            let (len, flags, next) = (input.u16()?, input.u8()?, input.u8()?);
            let len = if flags & 8 == 0 { len.into() } else { u32::from(len) << 16 | 0xffff };
            guest.describe(table, index.into(), (address, len), (flags & 7).into(), next.into());
        }
        1 => {
            let (ring, head) = (input.u8()?, input.u8()?);
            guest.offer(usize::from(ring) % rings, head.into());
        }
        2 => {
            let (ring, index) = (input.u8()?, input.u16()?);
            guest.index(usize::from(ring) % rings, index);
        }
        3 => {
            let (ring, wish) = (input.u8()?, input.u16()?);
            guest.wish(usize::from(ring) % rings, wish);
        }
        4 => {
            let (address, bytes) = (input.address()?, input.bytes()?);
            guest.put(address, bytes);
        }
        5..=7 => {
            let layout = input.u8()?;
            let (mut header, len) = packet(input, net)?;
            let total = u32::try_from(header.len() + len).unwrap_or(0);
            header.resize(header.len() + len.min(64), layout);
            guest.post(1, layout, total, false, &header);
            device.kicked(guest, 1);
        }
        8 => {
            let (ring, layout, count, len) = (input.u8()?, input.u8()?, input.u8()?, input.u16()?);
            // The ring of packets to the guest, or of events.
            let ring = if net || ring & 1 == 0 { 0 } else { 2 };
            for _ in 0..=count % 64 {
                guest.post(ring, layout, len.into(), true, &[]);
            }
            device.kicked(guest, ring);
        }
        9 => device.to_guest(input.u8()?, input.u8()?, input.u16()?),
        10 => device.later()?,
        11 => {
            let ring = usize::from(input.u8()?) % rings;
            device.kicked(guest, ring);
        }
        12 => {
            // A pause, and on from there or from the beginning; memory that is shared anew; a reset.
            let ring = usize::from(input.u8()?) % rings;
            match input.u8()? % 4 {
                0 => {
                    guest.listen();
                    guest.say(11, &frontend::state(u32::try_from(ring).unwrap_or(0), 0), &[]);
                    device.turn()?;
                    let said = guest.listen();
                    let base = said.get(16..18).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
                    guest.places[ring].base = base;
                    guest.start(ring);
                }
                1 => {
                    guest.begin_at(ring, 0);
                    guest.say(11, &frontend::state(u32::try_from(ring).unwrap_or(0), 0), &[]);
                    guest.start(ring);
                }
                2 => guest.share(),
                _ => guest.say(
                    18,
                    &frontend::state(u32::try_from(ring).unwrap_or(0), u32::from(kind > 127)),
                    &[],
                ),
            }
        }
        _ => {}
    }
    // Several steps may come between two turns.
    if kind & 0x80 == 0 {
        device.turn()?;
        guest.listen();
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(first) = input.u8() else { return };
    let (net, strange) = (first & 1 == 0, first & 2 != 0);
    let rings = if net { 2 } else { RINGS };
    let (mut device, mut guest) = Device::new(net);
    let mut run = || {
        set_up(&mut input, &mut device, &mut guest, strange)?;
        device.started(&mut guest, rings)?;
        for _ in 0..200 {
            step(&mut input, &mut device, &mut guest, rings)?;
        }
        device.turn()
    };
    let _ = run();
    device.end(&guest);
});
