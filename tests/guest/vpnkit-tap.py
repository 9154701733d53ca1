#!/usr/bin/env python3
"""vpnkit-tap.py SOCKET UUID ADDRESS: what rootlesskit's vpnkit driver does in the child's namespaces.

Comes to vpnkit's ethernet socket under a UUID, makes tap0 with the MAC it is told, gives it ADDRESS/24 and the gateway
192.168.65.1, as the driver does without asking, prints "ready", and carries frames, each behind a 16-bit little-endian length.
"""

import fcntl
import os
import select
import socket
import struct
import subprocess
import sys

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x1002


def exactly(stream, n):
    data = b""
    while len(data) < n:
        more = stream.recv(n - len(data))
        if not more:
            sys.exit("vpnkit has ended")
        data += more
    return data


def ip(*words):
    subprocess.run(["ip", *words], check=True)


path, uuid, address = sys.argv[1:]
vif = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
vif.connect(path)
vif.sendall(b"VMN3T" + struct.pack("<I", 22) + b"0" * 40)
exactly(vif, 49)
vif.sendall(b"\x01" + uuid.encode() + b"\0" * 4)
answer = exactly(vif, 258)
if answer[0] != 1:
    sys.exit("refused: " + answer[2 : 2 + answer[1]].decode())
mtu = struct.unpack("<H", answer[1:3])[0]
mac = answer[5:11].hex(":")

tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP_NO_PI))
ip("link", "set", "tap0", "address", mac, "mtu", str(mtu), "up")
ip("address", "add", address + "/24", "dev", "tap0")
ip("route", "add", "default", "via", "192.168.65.1", "dev", "tap0")
print("ready", flush=True)
while True:
    for ready in select.select([tap, vif], [], [])[0]:
        if ready is vif:
            os.write(tap, exactly(vif, struct.unpack("<H", exactly(vif, 2))[0]))
        else:
            frame = os.read(tap, 65536)
            vif.sendall(struct.pack("<H", len(frame)) + frame)
