//! `/dev/net/tun`: the ioctls that make a tap device with a virtio-net header. All `unsafe` of the tap link is here.
//!
//! Source: Linux `include/uapi/linux/if_tun.h` and `Documentation/networking/tuntap.rst`.
#![allow(unsafe_code, reason = "ioctls have no safe interface")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc::{self, c_int, c_short, c_uint, ifreq};

use portway_netstack::Offloads;

use crate::link::vnet;

/// Leave checksums open; hand over TCP segments of up to 64 KiB, for IPv4 and IPv6.
const OFFLOADS: c_uint = 0x01 | 0x02 | 0x04;
/// Datagrams of UDP too, for both (`TUN_F_USO4`, `TUN_F_USO6`, Linux 6.2).
const UDP_OFFLOADS: c_uint = 0x20 | 0x40;

nix::ioctl_write_ptr_bad!(tun_set_iff, nix::request_code_write!(b'T', 202, size_of::<c_int>()), ifreq);
nix::ioctl_write_int_bad!(tun_set_offload, nix::request_code_write!(b'T', 208, size_of::<c_uint>()));
nix::ioctl_write_ptr_bad!(
    tun_set_header_size,
    nix::request_code_write!(b'T', 216, size_of::<c_int>()),
    c_int
);
nix::ioctl_write_ptr_bad!(tun_set_header_le, nix::request_code_write!(b'T', 220, size_of::<c_int>()), c_int);

/// Opens tap device `name` of the calling thread's network namespace, and makes it where it is not.
pub(super) fn open(name: &str) -> io::Result<File> {
    let fault = |e: io::Error, what: &str| io::Error::new(e.kind(), format!("{name}: {what}: {e}"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|e| fault(e, "cannot open /dev/net/tun (is the tun module loaded, and may this user?)"))?;
    // SAFETY: `ifreq` is plain C data for which all zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = c_char(*from);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads one `ifreq`, which lives through the call, and writes the name into it; that it is passed
    // as const is the macro's way, the value is not used afterwards.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }.map_err(|e| {
        let what = match e {
            nix::Error::EPERM => "making it needs CAP_NET_ADMIN in its network namespace; give netns=PID of a process of yours there",
            nix::Error::EBUSY => "another process holds the device",
            nix::Error::EINVAL => "the name is of a device that is no tap",
            _ => "cannot make the device",
        };
        fault(e.into(), what)
    })?;
    Ok(file)
}

/// Has the kernel speak the header of [`vnet`] and leave checksums and segments to us. What it takes in turn is the answer.
pub(super) fn configure(device: &File) -> io::Result<Offloads> {
    let fd = device.as_raw_fd();
    let (size, on): (c_int, c_int) = (c_int::try_from(vnet::LEN).unwrap_or(c_int::MAX), 1);
    // SAFETY: each of these reads one int through a pointer to a local that lives through the call.
    unsafe {
        tun_set_header_size(fd, &raw const size)?;
        tun_set_header_le(fd, &raw const on)?;
    }
    let offloads = |bits: c_uint| {
        // SAFETY: the argument is a number, not a pointer.
        unsafe { tun_set_offload(fd, c_int::try_from(bits).unwrap_or(0)) }
    };
    let udp = offloads(OFFLOADS | UDP_OFFLOADS).is_ok();
    if !udp {
        offloads(OFFLOADS)?;
    }
    Ok(Offloads { tcp: true, udp })
}

const fn c_char(byte: u8) -> libc::c_char {
    libc::c_char::from_ne_bytes([byte])
}
