//! Messages of the vhost-user protocol, to the network device and to vsock: any request, flags, size and body, with any
//! descriptors, whole, in pieces or run together, at a device that is set up or not. Nothing panics, and nothing waits for what
//! does not come.
//!
//! The first byte says which device, and whether it is set up before. Then messages: the request, a byte that says what its body
//! and its descriptors are, and what these need.
#![no_main]

mod frontend;

use frontend::{Device, Guest, Input, REGIONS, RINGS, With};
use libfuzzer_sys::fuzz_target;

/// The body of a message.
fn body(input: &mut Input<'_>, kind: u8) -> Option<Vec<u8>> {
    Some(match kind % 8 {
        0 => input.bytes()?.to_vec(),
        1 => frontend::state(input.u8()?.into(), input.u16()?.into()).to_vec(),
        2 => input.u64()?.to_ne_bytes().to_vec(),
        3 => frontend::regions(),
        // Regions with one number changed.
        4 => {
            let (which, bits, by) = (usize::from(input.u8()?), input.u8()?, input.u16()?);
            let mut body = frontend::regions();
            let at = which % (body.len() / 8) * 8;
            let value = u64::from(by).rotate_right(bits.into());
            body[at..at + 8].copy_from_slice(&value.to_ne_bytes());
            body
        }
        // A region, alone.
        5 => {
            let (which, by) = (usize::from(input.u8()?), input.u16()?);
            let [guest, user, len, file] = REGIONS[which % REGIONS.len()];
            let guest = guest + (u64::from(by) << 12);
            [0, guest, len, user, file].iter().flat_map(|word| word.to_ne_bytes()).collect()
        }
        6 => {
            let (index, at) = (input.u8()?, [input.u16()?, input.u16()?, input.u16()?]);
            frontend::addresses(index.into(), at.map(|at| REGIONS[0][1] + u64::from(at) * 4))
        }
        // A piece of the configuration space.
        _ => {
            let words = [input.u16()?, input.u16()?, input.u8()?.into()].map(u32::from);
            words.iter().flat_map(|word| word.to_ne_bytes()).chain([0; 16]).collect()
        }
    })
}

fn step(input: &mut Input<'_>, device: &mut Device, guest: &mut Guest) -> Option<()> {
    let (request, kind) = (input.u8()?, input.u8()?);
    if request >= 0xf0 {
        // What a guest does meanwhile.
        let ring = usize::from(kind) % RINGS;
        guest.post(ring, kind, 1600, ring != 1, &[0; 64]);
        device.kicked(guest, ring);
        device.to_guest(kind, kind, kind.into());
        device.turn()?;
        return device.later();
    }
    let shape = input.u8()?;
    let body = body(input, kind)?;
    // The usual: the first version, and a size that is right.
    let flags = if shape & 1 == 0 { 1 } else { input.u8()?.into() };
    let size = if shape & 2 == 0 { u32::try_from(body.len()).unwrap_or(0) } else { input.u16()?.into() };
    let bytes = frontend::message(request.into(), flags, size, &body);
    let ring = usize::from(kind >> 5);
    let with: &[With] = match (shape >> 2) % 8 {
        0 | 1 => &[],
        2 => &[With::Memory; REGIONS.len()],
        3 => &[With::Memory],
        4 => &[With::Kick(ring)],
        5 => &[With::Call(ring)],
        6 => &[With::Socket],
        _ => &[With::Memory, With::Kick(ring), With::Socket, With::Call(ring)],
    };
    let cut = if shape & 0x20 == 0 { bytes.len() } else { usize::from(input.u8()?).min(bytes.len()) };
    let (first, rest) = bytes.split_at(cut);
    guest.send(first, with);
    if !rest.is_empty() {
        device.turn()?;
        if shape & 0x40 == 0 {
            guest.send(rest, &[]);
        }
    }
    if shape & 0x80 == 0 {
        device.turn()?;
        guest.listen();
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(first) = input.u8() else { return };
    let (mut device, mut guest) = Device::new(first & 1 == 0);
    let mut run = || {
        if first & 2 != 0 {
            guest.say(1, &[], &[]);
            guest.say(15, &[], &[]);
            guest.say(16, &u64::MAX.to_ne_bytes(), &[]);
            guest.negotiate(0x1_7000_0000 | if first & 5 == 0 { 0x8000 } else { 0 });
            device.started(&mut guest, if first & 1 == 0 { 2 } else { RINGS })?;
        }
        for _ in 0..100 {
            step(&mut input, &mut device, &mut guest)?;
        }
        device.turn()
    };
    let _ = run();
    device.end(&guest);
});
