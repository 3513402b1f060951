"""A network of its own for each process, and a cable between them that can be cut, one way or both, or lose packets.

Each host is a network namespace with a TUN device; a thread of this process carries the packets from one to the other.
All of it is gone with this process, however it ends. Needs root, /dev/net/tun and iproute2.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import selectors
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_PACKET_BYTES = 65_536
_MTU = 8192
_LIBC = ctypes.CDLL(None, use_errno=True)
_BLOCKS = 2**14
"""Of 8 addresses each, in 198.18.0.0/15, which is kept for tests of networks (RFC 2544)."""
_DESTINATION = slice(16, 20)
"""Of an IPv4 packet."""


def enter(namespace: str) -> None:
    """Moves the calling thread, and what it starts, into a namespace."""
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if _LIBC.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(descriptor)


def why_not() -> str:
    """Why this process cannot make networks; empty if it can."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    with subprocess.Popen(["/usr/bin/env", "unshare", "--net", "true"], stderr=subprocess.PIPE) as tried:
        _, why = tried.communicate()
    return why.decode().strip()


@dataclass(frozen=True, eq=False)
class Host:
    """A network namespace.

    Attributes:
        address: its only IPv4 address, beside loopback.
        namespace: path of a file that stands for it; empty for the one of this process.
        tun: descriptor that its packets come out of.
        handle: descriptor behind `namespace`.
    """

    address: str
    namespace: str
    tun: int
    handle: int | None = None


@dataclass(eq=False)
class Network:
    """Hosts, and a cable that connects them; a context. Host 0 is this process.

    Attributes:
        hosts: in the order of their making.
        dropped: packets that did not get through.
    """

    seed: int = 0
    hosts: list[Host] = field(default_factory=list)
    dropped: int = 0
    _loss: dict[tuple[str, str], float] = field(default_factory=dict)

    def __enter__(self) -> Network:
        self._base = (198 << 24) + (18 << 16) + 8 * (os.getpid() % _BLOCKS)
        self._rng = random.Random(self.seed)  # noqa: S311 - no secret
        self._selector = selectors.DefaultSelector()
        self._wake, self._stop = os.pipe()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._by_address: dict[bytes, Host] = {}
        self._thread = threading.Thread(target=self._carry, name="cable")
        self._thread.start()
        self._add(own=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._stop)
        self._thread.join()
        self._selector.close()
        os.close(self._wake)
        for host in self.hosts:
            os.close(host.tun)
            if host.handle is not None:
                os.close(host.handle)

    def add(self) -> Host:
        """A host in a namespace of its own."""
        made: list[Host] = []
        thread = threading.Thread(target=lambda: made.append(self._add(own=False)))  # threads have namespaces, too
        thread.start()
        thread.join()
        return made[0]

    def lose(self, share: float, source: Host, target: Host) -> None:
        """Loses this share of the packets from one host to another: at 1 none gets through, at 0 all do."""
        self._loss[source.address, target.address] = share

    def cut(self, one: Host, other: Host) -> None:
        """Lets nothing through, without a word to anybody."""
        self.lose(1, one, other)
        self.lose(1, other, one)

    def reject(self, one: Host, other: Host) -> None:
        """Has packets come back as those of a host that cannot be reached."""
        for source, target in ((one, other), (other, one)):
            self._route("add", source, target)

    def heal(self, one: Host, other: Host) -> None:
        """Lets everything through again."""
        for source, target in ((one, other), (other, one)):
            self.lose(0, source, target)
            self._route("del", source, target, check=False)

    def _route(self, action: str, source: Host, target: Host, check: bool = True) -> None:
        command = ["ip", "route", action, "unreachable", f"{target.address}/32"]
        if source.namespace:
            command = ["nsenter", f"--net={source.namespace}", *command]
        subprocess.run(command, check=check, capture_output=not check)

    def _add(self, own: bool) -> Host:
        if not own and _LIBC.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        handle = None if own else os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        number = self._base + 1 + len(self.hosts)
        address = ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        device = f"fdm{number & 0xFFFFFF:x}"
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN_NO_PI))
        for command in (
            f"ip address add {address}/29 dev {device}",
            f"ip link set {device} mtu {_MTU} up",
            *(() if own else ("ip link set lo up",)),
        ):
            subprocess.run(command.split(), check=True)
        host = Host(address, "" if own else f"/proc/{os.getpid()}/fd/{handle}", tun, handle)
        self.hosts.append(host)
        self._by_address[number.to_bytes(4, "big")] = host
        self._selector.register(tun, selectors.EVENT_READ, host)
        return host

    def _carry(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                packet = os.read(key.data.tun, _PACKET_BYTES)
                target = self._by_address.get(packet[_DESTINATION])
                if target is None:  # IPv6, or nobody's
                    continue
                if self._rng.random() < self._loss.get((key.data.address, target.address), 0):
                    self.dropped += 1
                    continue
                os.write(target.tun, packet)
