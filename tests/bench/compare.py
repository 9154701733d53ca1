#!/usr/bin/env python3
"""portway and its peers, side by side: one run, round by round, the same measurements in turn.

Four groups of rows; a row's name is GROUP/MTU/WHAT, and `--list` prints them all:
  netns   the guest is a Linux stack in a network namespace, its TAP carried to the program's stream
          socket by tapbridge.c (the `qemu` framing)
  tap     the program owns the TAP device in the namespace; plain veth is shown as the limit
  qemu    a real guest in QEMU, stream netdev                vhost   the same, vhost-user
One class per program says how it is started (see Program). Every number comes with a check that the
bytes arrived (netload.c); what did not work is printed as failed, with the reason below the table.
Needs root, gcc, iproute2 and the directory filled by setup-peers.sh; QEMU for the last two groups."""
import argparse, atexit, collections, contextlib, ctypes, fcntl, fnmatch, itertools, json, math, os, random, resource
import shutil, signal, socket, statistics, struct, subprocess, sys, tempfile, threading, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GUEST_PORT = 5401
MAC = "5a:94:ef:e4:0c:ee"
QUICK = ("netns/*/tcp_gh_1,netns/*/tcp_hg_1,netns/1500/rr_p??,netns/1500/crr,netns/65520/pub_in,"
         "tap/65520/tcp_gh_1,tap/65520/tcp_hg_1,netns/1500/start_*,netns/1500/rss_idle")


class Failed(Exception):
    pass


# ---- the programs ------------------------------------------------------------------------------

class Program:
    """One program under test. To add one: `name`, the MTUs it can do in each group, and `command`;
    where it differs, `publish` (port s.pub of the host's loopback to GUEST_PORT of the guest),
    the addresses, and the QEMU options. `s` is the Session: s.sock, s.dir, s.id, s.mtu, s.group, s.pub."""
    name = ""
    groups: dict = {}
    limit = False               # shown, never counted as a peer
    configures_tap = False      # gives tap0 its address and routes by itself
    host_addr, guest_addr, gateway = "192.168.127.254", "192.168.127.2", "192.168.127.1"

    def __init__(self, opts):
        self.opts = opts
        self.peers = Path(opts.peers or "/nonexistent")

    def present(self):
        return True

    def command(self, s):
        raise NotImplementedError

    def publish(self, s):
        pass

    def netdev(self, s):
        if s.group == "vhost":
            return ["-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-machine", "memory-backend=mem",
                    "-chardev", f"socket,id=c,path={s.sock}", "-netdev", "vhost-user,id=n,chardev=c"]
        return ["-netdev", f"stream,id=n,server=off,addr.type=unix,addr.path={s.sock}"]

    def sid(self, program):
        """A program of DIR/sid, run through the C library that came with it."""
        root = self.peers / "sid"
        ld = next(iter(sorted(root.glob("usr/lib*/ld-linux*.so.*"))), None) or next(iter(sorted(root.glob("usr/lib/*/ld-linux*.so.*"))), None)
        libc = next(iter(root.glob("usr/lib/*/libc.so.6")), None)
        exe = root / "usr/bin" / program
        best = exe.with_name(program + ".avx2")
        if "avx2" in Path("/proc/cpuinfo").read_text() and best.exists():
            exe = best
        return [str(ld), "--library-path", str(libc.parent), str(exe)] if ld and libc and exe.exists() else None


class Portway(Program):
    name = "portway"
    groups = {"netns": (1500, 65520), "tap": (1500, 65520), "qemu": (1500, 65520), "vhost": (1500, 65520)}

    def present(self):
        return bool(self.opts.portway)

    def command(self, s):
        link = {"tap": f"tap:tap0,netns=/run/netns/{s.id}", "vhost": f"vhost-user:unix:{s.sock}"}.get(s.group, f"qemu:unix:{s.sock}")
        return [self.opts.portway, "serve", "--link", f"{link},mtu={s.mtu}", "--mtu", str(s.mtu),
                "--publish", f"127.0.0.1:{s.pub}:{self.guest_addr}:{GUEST_PORT}", "--api", f"unix:{s.dir}/api", "--state-dir", str(s.dir)]


class Passt(Program):
    name = "passt"
    groups = {"netns": (1500, 65520), "qemu": (1500, 65520), "vhost": (1500, 65520)}

    def present(self):
        return self.sid("passt")

    def addresses(self, s):
        return ["-f", "-q", "-m", str(s.mtu), "-t", f"127.0.0.1/{s.pub}:{GUEST_PORT}", "-u", "none", "-a", self.guest_addr, "-n", "24",
                "-g", self.gateway, "--map-host-loopback", self.host_addr]

    def command(self, s):
        return self.sid("passt") + ["-s", str(s.sock)] + self.addresses(s) + (["--vhost-user"] if s.group == "vhost" else [])


class Pasta(Passt):
    name = "pasta"
    groups = {"tap": (1500, 65520)}
    configures_tap = True

    def command(self, s):
        return self.sid("pasta") + self.addresses(s) + ["-4", "-I", "tap0", "--config-net", "-T", "none", "-U", "none", "--runas", "0", "--netns", f"/run/netns/{s.id}"]


class Slirp4netns(Program):
    name = "slirp4netns"
    groups = {"tap": (1500, 65520)}
    configures_tap = True
    host_addr, guest_addr, gateway = "10.0.2.2", "10.0.2.100", "10.0.2.2"

    def present(self):
        return self.sid("slirp4netns")

    def command(self, s):
        return self.sid("slirp4netns") + ["--netns-type=path", f"--mtu={s.mtu}", f"--api-socket={s.dir}/api", "--configure", f"/run/netns/{s.id}", "tap0"]

    def publish(self, s):
        unix_talk(s.dir / "api", json.dumps({"execute": "add_hostfwd", "arguments": {
            "proto": "tcp", "host_addr": "127.0.0.1", "host_port": s.pub, "guest_port": GUEST_PORT}}), "return")


class Gvproxy(Program):
    name = "gvproxy"
    groups = {"netns": (1500, 65520), "qemu": (1500, 65520)}

    def path(self):
        return self.opts.gvproxy or str(self.peers / "trixie/usr/bin/gvproxy")

    def present(self):
        return os.access(self.path(), os.X_OK)

    def command(self, s):
        return [self.path(), "-mtu", str(s.mtu), "-ssh-port", str(free_port()), "-listen", f"unix://{s.dir}/api", "-listen-qemu", f"unix://{s.sock}"]

    def publish(self, s):
        body = json.dumps({"local": f"127.0.0.1:{s.pub}", "remote": f"{self.guest_addr}:{GUEST_PORT}"})
        unix_talk(s.dir / "api", "POST /services/forwarder/expose HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                  f"Content-Length: {len(body)}\r\n\r\n{body}", " 200 ")


class QemuUser(Program):
    name = "user"
    groups = {"qemu": (1500,)}
    host_addr = "10.0.2.2"

    def command(self, s):
        return None

    def netdev(self, s):
        return ["-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{s.pub}-:{GUEST_PORT}"]


class Native(Program):
    """No program at all: a veth pair. What the kernel alone can do."""
    name = "veth"
    groups = {"tap": (1500, 65520)}
    limit = configures_tap = True

    def command(self, s):
        n = s.number % 250 + 1
        s.host_addr, s.guest_addr = f"10.201.{n}.1", f"10.201.{n}.2"
        s.published = s.guest_addr, GUEST_PORT
        sh("ip", "link", "add", s.id, "type", "veth", "peer", "name", "tap0", "netns", s.id)
        sh("ip", "addr", "add", s.host_addr + "/24", "dev", s.id)
        sh("ip", "link", "set", s.id, "mtu", s.mtu, "up")
        sh("ip", "-n", s.id, "addr", "add", s.guest_addr + "/24", "dev", "tap0")
        sh("ip", "-n", s.id, "link", "set", "tap0", "mtu", s.mtu, "up")


PROGRAMS = [Portway, Passt, Gvproxy, QemuUser, Pasta, Slirp4netns, Native]


# ---- the lab: processes, namespaces, guests ----------------------------------------------------

def sh(*args):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if r.returncode:
        raise Failed(f"{' '.join(map(str, args))}: {r.stderr.strip()}")
    return r.stdout


def free_port():
    while True:
        port = random.randint(20000, 30000)
        with contextlib.suppress(OSError), socket.socket() as t, socket.socket(type=socket.SOCK_DGRAM) as u:
            t.bind(("", port))
            u.bind(("", port))
            return port


def until(check, seconds, what, pause=0.02):
    end = time.monotonic() + seconds
    while True:
        got = check()
        if got:
            return got
        if time.monotonic() > end:
            raise Failed(what)
        time.sleep(pause)


def connected(path):
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(str(path))
        return s
    except OSError:
        s.close()


def unix_talk(path, text, expect):
    with until(lambda: connected(path), 5, f"nothing listens on {path.name}") as s:
        s.settimeout(5)
        s.sendall(text.encode())
        s.shutdown(socket.SHUT_WR)
        answer = b""
        while expect.encode() not in answer:
            d = s.recv(4096)
            if not d:
                raise Failed(f"control socket answered {answer[:80]!r}")
            answer += d


def tree(pid):
    """pid and its descendants."""
    kids = collections.defaultdict(list)
    for p in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            kids[int(p.read_text().rsplit(")", 1)[1].split()[1])].append(int(p.parent.name))
    todo, out = [pid], []
    while todo:
        out.append(todo.pop())
        todo += kids[out[-1]]
    return out


def cpu_seconds(pid):
    total = 0.0
    for p in tree(pid):
        for f in Path(f"/proc/{p}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(f.read_text().split()[0]) / 1e9
    return total


def rss_kib(pid):
    total = 0
    for p in tree(pid):
        with contextlib.suppress(OSError):
            total += sum(int(l.split()[1]) for l in Path(f"/proc/{p}/status").read_text().splitlines() if l.startswith("VmRSS:"))
    return total


def numbers(text):
    """netload's line as a dict; Failed when it is absent or says so."""
    line = next((l for l in text.splitlines() if l.startswith("NETLOAD ")), None)
    if not line:
        raise Failed("netload said nothing: " + (text.strip()[-120:] or "no output"))
    d = dict(w.split("=", 1) for w in line.split()[1:])
    if d["ok"] != "1":
        raise Failed(d.get("err", "failed").replace("_", " "))
    return {k: float(v) for k, v in d.items()}


class Lab:
    """The scratch directory, the compiled tools, the server on the host, everything to clean up."""

    def __init__(self, opts):
        self.opts, self.sessions, self.count = opts, [], itertools.count(1)
        self.dir = Path(tempfile.mkdtemp(prefix="pwbench"))
        atexit.register(self.close)
        self.dir.chmod(0o777)   # passt gives up root before it makes its socket
        for tool in "netload", "tapbridge":
            sh("gcc", "-O2", "-pthread", "-o", self.dir / tool, HERE / f"{tool}.c")
        self.netload, self.port = str(self.dir / "netload"), free_port()
        self.server = subprocess.Popen([self.netload, "serve", str(self.port)])

    def session(self, program, group, mtu):
        s = (QemuSession if group in ("qemu", "vhost") else NetnsSession)(self, program, group, mtu)
        self.sessions.append(s)
        return s

    def close(self):
        for s in list(self.sessions):
            s.close()
        if hasattr(self, "server"):
            stop([self.server])
        shutil.rmtree(self.dir, ignore_errors=True)


def stop(procs):
    for p in procs:
        with contextlib.suppress(OSError):
            p.terminate()
    end = time.monotonic() + 2
    for p in procs:
        try:
            p.wait(max(0.01, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


class Session:
    """One program, running, with a guest behind it."""

    def __init__(self, lab, program, group, mtu):
        self.lab, self.program, self.group, self.mtu = lab, program, group, mtu
        self.number = next(lab.count)
        self.id = f"pw{os.getpid() % 100000}n{self.number}"
        self.dir = lab.dir / self.id
        self.dir.mkdir()
        self.dir.chmod(0o777)
        self.sock, self.pub, self.procs, self.sidecar = self.dir / "vm", free_port(), [], None
        self.host_addr, self.guest_addr, self.published = program.host_addr, program.guest_addr, ("127.0.0.1", self.pub)

    def spawn(self, args, **kw):
        p = subprocess.Popen([str(a) for a in args], **{"stdin": subprocess.DEVNULL, "stdout": open(self.dir / "log", "ab"), "stderr": subprocess.STDOUT, **kw})
        self.procs.append(p)
        return p

    def launch(self):
        command = self.program.command(self)
        if command:
            self.sidecar = self.spawn(command)

    def alive(self):
        if self.sidecar and self.sidecar.poll() is not None:
            log = (self.dir / "log").read_text(errors="replace").strip().splitlines()
            raise Failed(f"{self.program.name} ended with {self.sidecar.returncode}: {(log or ['no output'])[-1][:150]}")

    def host(self, verb, *args, timeout=40):
        return self.netload([], verb, *self.published, *args, timeout=timeout)

    def guest(self, verb, *args, timeout=40):
        return self.netload(self.inside, verb, self.host_addr, self.lab.port, *args, timeout=timeout)

    def netload(self, prefix, *args, timeout):
        self.alive()
        try:
            r = subprocess.run([*prefix, self.lab.netload, *map(str, args)], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end within {timeout} s") from None
        return numbers(r.stdout + r.stderr)

    def check(self):
        """A byte there and back, both ways, before anything is measured."""
        self.why = "no answer"

        def answers(call):
            def once():
                try:
                    return call("echo", timeout=3)
                except Failed as e:
                    self.alive()
                    self.why = e
            return once
        for way, call in ("guest to host", self.guest), ("published port", self.host):
            try:
                until(answers(call), 6, way, 0.05)
            except Failed as e:
                raise Failed(f"{e}: no echo ({self.why})") from None

    def close(self):
        if self in self.lab.sessions:
            self.lab.sessions.remove(self)
        stop(self.procs)


class NetnsSession(Session):
    @property
    def inside(self):
        return ["ip", "netns", "exec", self.id]

    def namespace(self):
        sh("ip", "netns", "add", self.id)
        sh(*self.inside, "sh", "-c", "cd /proc/sys/net; echo 1 > ipv6/conf/all/disable_ipv6; echo 1 > ipv6/conf/default/disable_ipv6; "
           "echo 1 > ipv4/tcp_tw_reuse; echo 1024 65535 > ipv4/ip_local_port_range; ip link set lo up")

    def start(self):
        self.namespace()
        self.launch()
        if self.group == "netns":
            self.spawn([*self.inside, self.lab.dir / "tapbridge", "qemu", self.sock, "tap0"])

        def tap():
            self.alive()
            r = subprocess.run(["ip", "-n", self.id, "-4", "addr", "show", "dev", "tap0"], capture_output=True, text=True)
            return r.returncode == 0 and (not self.program.configures_tap or "inet " in r.stdout)
        until(tap, 6, "tap0 did not come")
        if not self.program.configures_tap:
            sh("ip", "-n", self.id, "link", "set", "tap0", "mtu", self.mtu, "up")
            sh("ip", "-n", self.id, "addr", "replace", self.guest_addr + "/24", "dev", "tap0")
            sh("ip", "-n", self.id, "route", "replace", "default", "via", self.program.gateway)
        self.program.publish(self)
        self.spawn([*self.inside, self.lab.netload, "serve", GUEST_PORT])
        self.check()

    @contextlib.contextmanager
    def held(self, n, timeout=40):
        p = self.spawn([*self.inside, self.lab.netload, "hold", self.host_addr, self.lab.port, n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            t = threading.Timer(timeout, p.kill)
            t.start()
            line = p.stdout.readline()
            t.cancel()
            if not line:
                raise Failed(f"{n} connections: not open within {timeout} s")
            numbers(line)
            yield
        finally:
            p.stdin.close()
            stop([p])
            self.procs.remove(p)

    def close(self):
        super().close()
        for what in (["netns", "del", self.id], ["link", "del", self.id]):
            subprocess.run(["ip", *what], capture_output=True)


class QemuSession(Session):
    def start(self):
        guest = self.program.peers / "guest"
        self.launch()
        if self.sidecar:
            until(lambda: self.alive() or self.sock.exists(), 5, "no VM socket")
        self.program.publish(self)
        began = time.monotonic()
        self.vm = self.spawn(["qemu-system-x86_64", "-accel", self.lab.opts.accel, "-cpu", "max", "-M", "q35", "-m", "256M", "-smp", "1", "-display", "none",
                              "-vga", "none", "-serial", "stdio", "-no-reboot", "-nodefaults", "-kernel", guest / "vmlinuz", "-initrd", guest / "initrd.gz",
                              "-append", "console=ttyS0 quiet panic=-1", *self.program.netdev(self),
                              "-device", f"virtio-net-pci,netdev=n,mac={MAC},romfile=" + (f",host_mtu={self.mtu}" if self.mtu != 1500 else "")
                              # QEMU 7.2.22 (Debian 12) dies with vhost-user under TCG when the guest masks an MSI-X vector.
                              + (",vectors=0" if self.group == "vhost" and self.lab.opts.accel == "tcg" else "")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines, self.more = [], threading.Condition()
        threading.Thread(target=self.reader, daemon=True).start()
        self.await_line("GUEST-LEASE", 40)
        self.boot_to_lease = time.monotonic() - began
        self.await_line("GUEST-READY", 5)
        self.tell(f"netload serve {GUEST_PORT} &")
        self.check()

    def reader(self):
        for l in self.vm.stdout:
            with self.more:
                self.lines.append(l.decode(errors="replace").strip())
                self.more.notify()

    def await_line(self, word, seconds, start=0):
        with self.more:
            if not self.more.wait_for(lambda: any(word in l for l in self.lines[start:]) or self.vm.poll() is not None, seconds):
                raise Failed(f"the guest did not say {word} within {seconds} s")
            line = next((l for l in self.lines[start:] if word in l), None)
            if line is None:
                raise Failed(f"QEMU ended: {' '.join(self.lines[-2:])[:150]}")
            return line

    def tell(self, text):
        self.vm.stdin.write(text.encode() + b"\n")
        self.vm.stdin.flush()

    def guest(self, verb, *args, timeout=40):
        self.alive()
        start = len(self.lines)
        self.tell(" ".join(map(str, ["netload", verb, self.host_addr, self.lab.port, *args])))
        return numbers(self.await_line("NETLOAD", timeout, start))


# ---- the measurements --------------------------------------------------------------------------

Row = collections.namedtuple("Row", "key unit better tie about")
Measure = collections.namedtuple("Measure", "run rows groups mtus fresh")
MEASURES = []


def measure(groups, rows, mtus=(1500, 65520), fresh=False):
    """rows: lines "key unit +|- tie about": + more is better; within `tie` ("5%", or an amount of the
    unit) of the best peer counts as level. fresh: the function starts the session it gets."""
    rows = [Row(*l.split(None, 4)) for l in rows.strip().splitlines()]
    return lambda run: MEASURES.append(Measure(run, rows, groups.split(), mtus, fresh)) or run


def framed_discover():
    xid = random.randbytes(4)
    mac = bytes.fromhex(MAC.replace(":", ""))
    bootp = b"\x01\x01\x06\x00" + xid + b"\0\0\x80\0" + bytes(16) + mac + bytes(10 + 64 + 128) + b"\x63\x82\x53\x63\x35\x01\x01\x37\x04\x01\x03\x06\x1a\xff"
    bootp = bootp.ljust(300, b"\0")
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(bootp), 1, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", ip))
    total = (total >> 16) + (total & 0xffff)
    ip = ip[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xffff) + ip[12:]
    return xid, b"\xff" * 6 + mac + b"\x08\x00" + ip + struct.pack("!HHHH", 68, 67, 8 + len(bootp), 0) + bootp


def is_offer(frame, xid):
    return len(frame) > 282 and frame[12:14] == b"\x08\x00" and frame[46:50] == xid and b"\x35\x01\x02" in frame[282:]


@measure("netns", """
start_socket ms - 0 exec to VM socket accepting
start_dhcp   ms - 0 exec to DHCP offer""", mtus=(1500,), fresh=True)
def start_stream(s):
    xid, frame = framed_discover()
    began = time.monotonic()
    s.launch()
    with until(lambda: s.alive() or connected(s.sock), 5, "VM socket does not accept", 0.0002) as c:
        accepting = time.monotonic()
        c.settimeout(0.005)
        got = b""
        while time.monotonic() < began + 5:
            c.sendall(struct.pack("!I", len(frame)) + frame)
            with contextlib.suppress(TimeoutError):
                while True:
                    d = c.recv(65536)
                    if not d:
                        raise Failed("VM socket closed")
                    got += d
                    while len(got) >= 4 and len(got) >= 4 + (n := struct.unpack("!I", got[:4])[0]):
                        if is_offer(got[4:4 + n], xid):
                            return {"start_socket": (accepting - began) * 1e3, "start_dhcp": (time.monotonic() - began) * 1e3}
                        got = got[4 + n:]
    raise Failed("no DHCP offer within 5 s")


def set_up(sock, name):
    """Sets a device of the socket's network namespace up (netdevice(7))."""
    get, put, up = 0x8913, 0x8914, 1
    flags = struct.unpack_from("h", fcntl.ioctl(sock, get, struct.pack("16sh14x", name.encode(), 0)), 16)[0]
    fcntl.ioctl(sock, put, struct.pack("16sh14x", name.encode(), flags | up))


@measure("tap", "start_dhcp ms - 0 exec to DHCP offer on tap0", mtus=(1500,), fresh=True)
def start_tap(s):
    if s.program.limit:
        return {}
    s.namespace()
    xid, frame = framed_discover()
    result, ready = [], threading.Event()

    def inside():       # a thread of its own, for setns moves only the calling thread
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{s.id}") as ns:
            libc.setns(ns.fileno(), 0x40000000)
        ready.set()
        end = time.monotonic() + 5
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as c:
            c.settimeout(0.002)
            up = False
            while time.monotonic() < end:
                try:
                    if not up:
                        c.bind(("tap0", 3))
                        if not s.program.configures_tap:
                            # By ioctl: a process started for it would take longer than the program under test.
                            set_up(c, "tap0")
                        up = True
                    c.send(frame)
                    while not is_offer(c.recv(65536), xid):
                        pass
                    result.append(time.monotonic())
                    return
                except TimeoutError:
                    pass
                except OSError:
                    time.sleep(0.0002)
    t = threading.Thread(target=inside)
    t.start()
    ready.wait(5)
    began = time.monotonic()
    s.launch()
    t.join(6)
    s.alive()
    if not result:
        raise Failed("no DHCP offer within 5 s")
    return {"start_dhcp": (result[0] - began) * 1e3}


@measure("netns tap", """
rss_idle MiB - 0 resident, link up, no traffic yet
idle_cpu ms  - 2 CPU time in 5 s without traffic""", mtus=(1500,), fresh=True)
def idle(s):
    s.start()
    if not s.sidecar:
        return {}
    time.sleep(0.5)
    before, secs = cpu_seconds(s.sidecar.pid), 1 if s.lab.opts.quick else 5
    time.sleep(secs)
    return {"rss_idle": rss_kib(s.sidecar.pid) / 1024, "idle_cpu": (cpu_seconds(s.sidecar.pid) - before) * 1e3 * 5 / secs}


@measure("netns tap", """
rr_cpu       us  - 0 CPU per round trip, 8 connections, no other flows
flow_2000    KiB - 1 resident per held flow, 2000 held
flow_many    KiB - 1 resident per held flow, 10000 held (fewer where the open-file limit is low: see the last line)
rr_cpu_many  us  - 0 CPU per round trip, 8 connections, as many idle flows held
rr_growth    x   - 5% rr_cpu_many over rr_cpu""", mtus=(1500,), fresh=True)
def scale(s):
    s.start()
    if not s.sidecar:
        return {}
    pid, out = s.sidecar.pid, {}

    def cost():
        before = cpu_seconds(pid)
        n = s.guest("mrr", s.lab.opts.secs, 8)["n"]
        return (cpu_seconds(pid) - before) * 1e6 / n
    try:
        out["rr_cpu"] = cost()
        before = rss_kib(pid)
        with s.held(2000):
            time.sleep(0.2)
            out["flow_2000"] = (rss_kib(pid) - before) / 2000
            many = s.lab.opts.many
            with s.held(many - 2000, 60):
                time.sleep(0.2)
                out["flow_many"] = (rss_kib(pid) - before) / many
                out["rr_cpu_many"] = cost()
                out["rr_growth"] = out["rr_cpu_many"] / out["rr_cpu"]
    except Failed as e:
        out["failed"] = str(e)
    return out


def bulk(groups, key, unit_rows, call):
    @measure(groups, unit_rows)
    def run(s):
        before = cpu_seconds(s.sidecar.pid) if s.sidecar else 0
        r = call(s, s.lab.opts.secs)
        out = {key: r["gbit"]}
        if r["stalled"]:
            out["stalled"] = key
        if "_per_gb" in unit_rows and s.sidecar:
            out[f"cpu_per_gb_{key[4:6]}"] = (cpu_seconds(s.sidecar.pid) - before) / (r["bytes"] / 1e9)
        return out


for way, verb, arrow in ("gh", "tcp-send", "guest to host"), ("hg", "tcp-recv", "host to guest"):
    bulk("netns tap", f"tcp_{way}_1", f"tcp_{way}_1 Gbit/s + 0 TCP {arrow}, 1 stream\ncpu_per_gb_{way} s/GB - 0 CPU of the program, same run",
         lambda s, t, verb=verb: s.guest(verb, t, 1))
    bulk("netns tap", f"tcp_{way}_8", f"tcp_{way}_8 Gbit/s + 0 TCP {arrow}, 8 streams", lambda s, t, verb=verb: s.guest(verb, t, 8))
    bulk("qemu vhost", f"tcp_{way}_1", f"tcp_{way}_1 Gbit/s + 0 TCP {arrow}, 1 stream", lambda s, t, verb=verb: s.guest(verb, t, 1))
    bulk("qemu vhost", f"tcp_{way}_4", f"tcp_{way}_4 Gbit/s + 0 TCP {arrow}, 4 streams", lambda s, t, verb=verb: s.guest(verb, t, 4))
bulk("netns tap qemu vhost", "pub_in", "pub_in Gbit/s + 0 published port, host sends", lambda s, t: s.host("tcp-send", t, 1))
bulk("netns tap qemu vhost", "pub_out", "pub_out Gbit/s + 0 published port, guest sends", lambda s, t: s.host("tcp-recv", t, 1))


@measure("qemu vhost", "boot_to_lease s - 5% QEMU start to the guest's DHCP lease")
def boot(s):
    return {"boot_to_lease": s.boot_to_lease}


@measure("netns tap", "rr_p50 us - 0 round trip, outbound, median\nrr_p99 us - 0 round trip, outbound, 99th percentile", mtus=(1500,))
def rr(s):
    r = s.guest("rr", s.lab.opts.secs)
    return {"rr_p50": r["p50"], "rr_p99": r["p99"]}


@measure("netns tap", "pub_rr_p50 us - 0 round trip, published, median\npub_rr_p99 us - 0 round trip, published, 99th percentile", mtus=(1500,))
def pub_rr(s):
    r = s.host("rr", s.lab.opts.secs)
    return {"pub_rr_p50": r["p50"], "pub_rr_p99": r["p99"]}


@measure("netns tap", "mrr 1/s + 0 round trips on 32 connections, outbound", mtus=(1500,))
def mrr(s):
    return {"mrr": s.guest("mrr", s.lab.opts.secs, 32)["rate"]}


@measure("netns tap", "crr 1/s + 0 connections opened, used, closed; outbound", mtus=(1500,))
def crr(s):
    return {"crr": s.guest("crr", s.lab.opts.secs)["rate"]}


@measure("netns tap", "pub_crr 1/s + 0 connections opened, used, closed; published", mtus=(1500,))
def pub_crr(s):
    return {"pub_crr": s.host("crr", s.lab.opts.secs)["rate"]}


for way, verb, arrow in ("gh", "udp-send", "guest to host"), ("hg", "udp-recv", "host to guest"):
    @measure("netns tap", f"udp_{way}_pps 1/s + 0 UDP {arrow}, 1400 B, arriving when sent as fast as possible", mtus=(1500,))
    def udp_flood(s, verb=verb, key=f"udp_{way}_pps"):
        return {key: s.guest(verb, s.lab.opts.secs, 0, 1400)["pps"]}

    @measure("netns tap", f"udp_{way}_loss % - 0.1 UDP {arrow}, 1400 B, lost at 20000 packets/s", mtus=(1500,))
    def udp_paced(s, verb=verb, key=f"udp_{way}_loss"):
        return {key: s.guest(verb, s.lab.opts.secs, 20000, 1400)["loss"]}


# ---- the run -----------------------------------------------------------------------------------

class Results:
    def __init__(self):
        self.rows = {}      # id -> {"row", "values", "failed": {program: [..]}, "stalled": {program}}

    def slot(self, rid, row):
        return self.rows.setdefault(rid, {"row": row, "values": collections.defaultdict(list), "failed": collections.defaultdict(list), "stalled": set()})


def wanted(rid, opts):
    return any(fnmatch.fnmatch(rid, p) or fnmatch.fnmatch(rid.split("/")[-1], p) for p in opts.rows)


def run_all(lab, programs, opts, results):
    plan = collections.OrderedDict()
    for group in "netns", "tap", "qemu", "vhost":
        for mtu in 1500, 65520:
            todo = [m for m in MEASURES if group in m.groups and mtu in m.mtus and any(wanted(f"{group}/{mtu}/{r.key}", opts) for r in m.rows)]
            if todo:
                plan[group, mtu] = todo

    def take(m, s, group, mtu, name, call):
        rows = {r.key: results.slot(f"{group}/{mtu}/{r.key}", r) for r in m.rows if wanted(f"{group}/{mtu}/{r.key}", opts)}
        try:
            got = call()
        except Failed as e:
            got = {"failed": str(e)}
        except Exception as e:      # a bug or a surprise is a failed row too, not the end of the run
            got = {"failed": f"{type(e).__name__}: {e}"}
        for key, slot in rows.items():
            if key in got:
                slot["values"][name].append(got[key])
                if got.get("stalled") == key:
                    slot["stalled"].add(name)
            elif "failed" in got:
                slot["failed"][name].append(got["failed"])
                print(f"  failed: {name} {group}/{mtu}/{key}: {got['failed']}", file=sys.stderr, flush=True)

    for rnd in range(opts.rounds):
        for (group, mtu), todo in plan.items():
            who = [p for p in programs if mtu in p.groups.get(group, ())]
            who = who[rnd % len(who):] + who[:rnd % len(who)] if who else who   # nobody is always first
            print(f"round {rnd + 1}/{opts.rounds}  {group} mtu {mtu}: {' '.join(p.name for p in who)}", file=sys.stderr, flush=True)
            for m in (m for m in todo if m.fresh):
                for p in who:
                    for _ in range(3 if m.run in (start_stream, start_tap) else 1):
                        s = lab.session(p, group, mtu)
                        take(m, s, group, mtu, p.name, lambda: m.run(s))
                        s.close()
            rest = [m for m in todo if not m.fresh]
            running = {}
            for p in who if rest else []:
                s = lab.session(p, group, mtu)
                try:
                    s.start()
                    running[p] = s
                except Exception as e:
                    running[p] = f"did not start: {e}"
                    s.close()
            for m in rest:
                for p in who:
                    s = running[p]
                    def call():
                        if isinstance(s, str):
                            raise Failed(s)
                        return m.run(s)
                    take(m, s, group, mtu, p.name, call)
            for s in running.values():
                if not isinstance(s, str):
                    s.close()


# Where a peer plays another game, what counts as level: slirp4netns has no stack state of its own to speak of when idle,
# and pasta splices published loopback ports from socket to socket, past the TAP.
FLOORS = {"tap/*/rss_idle": lambda mine, best: mine <= 12, "tap/*/pub_in": lambda mine, best: mine >= 0.7 * best,
          "tap/*/pub_out": lambda mine, best: mine >= 0.7 * best}


def level(mine, best, row, rid=""):
    gap = mine - best if row.better == "-" else best - mine
    for pattern, enough in FLOORS.items():
        if fnmatch.fnmatch(rid, pattern) and enough(mine, best):
            return True
    return gap <= 0 or gap <= (abs(best) * float(row.tie[:-1]) / 100 if row.tie.endswith("%") else float(row.tie))


def ratio(mine, best, better):
    """Above 1: portway is ahead."""
    a, b = (mine, best) if better == "+" else (best, mine)
    return a / b if b else (1.0 if not a else math.inf)


def judge(results, programs):
    peers = [p.name for p in programs if p.name != "portway" and not p.limit]
    out = {}
    for rid, d in results.rows.items():
        row = d["row"]
        med = {n: statistics.median(v) for n, v in d["values"].items() if v}
        ranked = sorted((n for n in med if n in peers), key=lambda n: med[n], reverse=row.better == "+")
        e = out[rid] = {"unit": row.unit, "better": row.better, "about": row.about, "median": med, "values": dict(d["values"]), "failed": dict(d["failed"]), "stalled": sorted(d["stalled"]),
                        "best_peer": ranked[0] if ranked else None, "ratio": None, "ratios": {}, "verdict": None}
        if "portway" in d["failed"] or "portway" in d["stalled"]:
            e["verdict"] = "failed"
        elif "portway" in med:
            e["ratios"] = {n: ratio(med["portway"], med[n], row.better) for n in ranked}
            e["ratio"] = e["ratios"].get(e["best_peer"])
            e["verdict"] = "no peer" if not ranked else "ahead" if e["ratio"] > 1 else "level" if level(med["portway"], med[ranked[0]], row, rid) else "behind"
    return out


def number(x):
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 100 else f"{x:.2f}" if abs(x) >= 1 or not x else f"{x:.3f}"


def table(rows, programs):
    notes, text = [], []
    for group in "netns", "tap", "qemu", "vhost":
        mine = {rid: e for rid, e in rows.items() if rid.startswith(group + "/")}
        who = [p for p in programs if group in p.groups]
        if not mine or not who:
            continue
        lines = [["row", "unit"] + [p.name + (" (limit)" if p.limit else "") for p in who] + ["best peer", "ratio", ""]]
        for rid, e in mine.items():
            mtu, cells = int(rid.split("/")[1]), []
            for p in who:
                bad = e["failed"].get(p.name, [])
                if p.name in e["median"]:
                    cells.append(number(e["median"][p.name]) + "~" * (p.name in e["stalled"]) + (f" [{len(bad)} failed]" if bad else ""))
                else:
                    cells.append("failed" if bad else "n/a" if mtu in p.groups[group] else "-")
                if bad:
                    notes.append(f"  {rid} {p.name}: {bad[0]}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""))
            lines.append([rid, e["unit"]] + cells + [e["best_peer"] or "none", f"{e['ratio']:.2f}" if e["ratio"] is not None else "", e["verdict"] or ""])
        width = [max(len(l[i]) for l in lines) for i in range(len(lines[0]))]
        text += ["  ".join(c.ljust(w) if i < 2 or i >= len(l) - 3 else c.rjust(w) for i, (c, w) in enumerate(zip(l, width))).rstrip() for l in lines] + [""]
    if any(e["stalled"] for e in rows.values()):
        text += ["~ a stream stalled: what was sent had not all arrived 3 s after the end; the number is what had arrived at the end", ""]
    return "\n".join(text + (["failed:"] + notes + [""] if notes else []))


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(__doc__.split("\n")[2:]))
    a.add_argument("--portway", metavar="PATH", help="the binary; without it the peers alone are measured")
    a.add_argument("--peers", metavar="DIR", help="what setup-peers.sh filled")
    a.add_argument("--rows", metavar="PATTERNS", help="comma-separated, e.g. 'netns/*,tcp_gh_1' (default: all)")
    a.add_argument("--programs", metavar="NAMES", help="only these, comma-separated")
    a.add_argument("--quick", action="store_true", help="the short selection, one round of 0.8 s, without the limit")
    a.add_argument("--secs", type=float, help="seconds per measurement (default 2)")
    a.add_argument("--rounds", type=int, help="rounds; the table shows medians (default 3)")
    a.add_argument("--json", metavar="FILE", help="everything measured, as JSON")
    a.add_argument("--gvproxy", metavar="PATH", help="another gvproxy than the packaged one")
    a.add_argument("--accel", default="tcg", help="QEMU accelerator (default tcg)")
    a.add_argument("--list", action="store_true", help="print the rows and leave")
    o = a.parse_args()
    o.rows = (o.rows or (QUICK if o.quick else "*")).split(",")
    o.secs, o.rounds = o.secs or (0.8 if o.quick else 2), o.rounds or (1 if o.quick else 3)
    if o.list:
        for m in MEASURES:
            for g, r in itertools.product(m.groups, m.rows):
                print(f"{g}/{'|'.join(map(str, m.mtus))}/{r.key}".ljust(34), r.unit.ljust(7), r.better, r.about)
        return 0
    if os.geteuid():
        sys.exit("compare.py: needs root (network namespaces and TAP devices)")
    if not o.peers:
        sys.exit("compare.py: --peers DIR is missing; fill it with setup-peers.sh DIR")
    if o.portway:
        o.portway = str(Path(o.portway).resolve())
        if not os.access(o.portway, os.X_OK):
            sys.exit(f"compare.py: {o.portway} is not executable")
    programs = [c(o) for c in PROGRAMS]
    if o.programs:
        programs = [p for p in programs if p.name in o.programs.split(",")]
    for p in programs:
        if not p.present() and p.name != "portway":
            sys.exit(f"compare.py: {p.name} is not under {o.peers}; run setup-peers.sh")
    programs = [p for p in programs if p.present() and not (o.quick and p.limit)]
    for most in 200000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            break
    o.many = 10000 if most > 21000 else most * 9 // 20      # passt takes two descriptors for a flow
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began, results = time.monotonic(), Results()
    lab = Lab(o)
    cut = False
    try:
        run_all(lab, programs, o, results)
    except KeyboardInterrupt:
        cut = True
    lab.close()
    rows = judge(results, programs)
    meta = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "kernel": os.uname().release, "cpus": os.cpu_count(), "secs": o.secs, "rounds": o.rounds,
            "took_s": round(time.monotonic() - began), "load": os.getloadavg(), "programs": [p.name for p in programs], "many_flows": o.many}
    with contextlib.suppress(OSError):
        meta["versions"] = (Path(o.peers) / "versions.txt").read_text().splitlines()
    if o.json:
        Path(o.json).write_text(json.dumps({"meta": meta, "rows": rows}, indent=1))
    print(table(rows, programs))
    print(f"{meta['date']}, Linux {meta['kernel']}, {meta['cpus']} CPUs, {o.rounds} rounds of {o.secs:g} s, {meta['took_s']} s in all, load {meta['load'][0]:.1f}; many = {o.many} flows")
    if cut or not o.portway:
        return 130 if cut else 0
    bad = [r for r, e in rows.items() if e["verdict"] not in ("ahead", "level", "no peer")]
    compared = {r: e for r, e in rows.items() if e["verdict"]}
    if not compared:
        print("nothing was compared")
        return 1
    worst = min(compared, key=lambda r: (compared[r]["verdict"] == "level", 0 if compared[r]["ratio"] is None else compared[r]["ratio"]))
    failed = compared[worst]["ratio"] is None
    print(f"{len(compared) - len(bad)} of {len(compared)} rows ahead or level; worst: " + ("failed" if failed else f"{compared[worst]['ratio']:.2f}")
          + f" {worst} (best peer {compared[worst]['best_peer'] or 'none'})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
