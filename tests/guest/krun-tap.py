#!/usr/bin/env python3
"""krun-tap.py SOCKET: a Linux guest's network card as libkrun has it with offloading, on the kernel's own stack.

Makes tap0 with checksums and segments left to the network, and carries a frame in each datagram, without the virtio-net header: none
toward the network, one of zeros toward the guest, which is what libkrun puts there. Prints "ready".
"""
import fcntl
import os
import select
import socket
import struct
import sys

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP_NO_PI_VNET_HDR = 0x5002
CSUM_TSO4_TSO6 = 7
HEADER = 10

(path,) = sys.argv[1:]
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP_NO_PI_VNET_HDR))
fcntl.ioctl(tap, TUNSETOFFLOAD, CSUM_TSO4_TSO6)
card = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
card.bind(path + "-krun.sock")
card.connect(path)
print("ready", flush=True)
open_sums = large = 0
while True:
    for ready in select.select([tap, card], [], [])[0]:
        if ready is card:
            os.write(tap, bytes(HEADER) + card.recv(65600))
        else:
            frame = os.read(tap, 65600)
            # What makes this a test: the guest does leave sums open and segments large.
            open_sums, large = open_sums + (frame[0] & 1), large + (len(frame) > 1600)
            if open_sums and large:
                print("offloads", flush=True)
                open_sums = large = -1 << 60
            card.send(frame[HEADER:])
