"""Podman, as it has to be called on a machine that may not raise limits; all that one run makes can be removed."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

LABEL = "feddymem-deploy-test"
"""Of every container and network that a run makes."""
_LOCK = Path("/run/lock/feddymem-deploy-test")
_RUN = ("run", "--runtime", "runc", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=32768:32768")
"""crun cannot cope with hybrid cgroups, and Podman would ask for higher limits than a machine may set."""
_ENV = "/usr/bin/env"
_HARDWARE_ADDRESS = "02:00:00:00:00:01"
_SECONDS = 60
_GRACE = 30
"""For everything to be removed: a machine may be busy."""


class EngineError(RuntimeError):
    """Podman refused, or did not answer in time."""


def why_not() -> str:
    """Why containers cannot run here; empty if they can."""
    if os.geteuid():
        return "containers need root here"
    missing = [tool for tool in ("podman", "runc", "netavark", "ip", "iptables", "nsenter") if not _found(tool)]
    if missing:
        return f"{', '.join(missing)} not installed; CONTRIBUTING.md has the packages"
    try:
        call("unshare", "--net", "--mount", "--pid", "--fork", "true")
    except EngineError as error:
        return str(error)
    return ""


def _found(tool: str) -> bool:
    return bool(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/lib/podman:/usr/libexec/podman:/usr/sbin"))


def call(*command: str) -> str:
    """What a command prints.

    Raises:
        EngineError: it failed, or took too long.
    """
    try:
        done = subprocess.run([_ENV, *command], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{' '.join(command)}: no end after {_SECONDS} s") from error
    if done.returncode:
        raise EngineError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def podman(*arguments: str) -> str:
    """What a call of Podman prints.

    Raises:
        EngineError: it failed, or took too long.
    """
    return call("podman", *arguments)


class Engine:
    """Containers in one network, from which nothing outside of it can be reached; a context that leaves nothing behind.

    One at a time on a machine: what an earlier one had to leave, because it was killed, is removed first.

    Attributes:
        folder: for files of this run.
        subnet: of the network; its first address is this process's.
    """

    def __init__(self, image: str) -> None:
        self._image = image
        self._attached: list[subprocess.Popen[bytes]] = []
        self._tags: list[str] = []

    def __enter__(self) -> Self:
        self._lock: IO[str] = _LOCK.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_all()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{LABEL}-", dir="/var/tmp"))
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes everything; may be called twice."""
        for process in self._attached:
            process.kill()
            process.wait(_GRACE)
        self._attached.clear()
        remove_all()
        for tag in self._tags:
            podman("untag", tag, tag)
        self._tags.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @property
    def gateway(self) -> str:
        """The address of this process in the network, as of a node."""
        return str(self.subnet[1])

    def tag(self, image: str, name: str) -> None:
        """Gives an image one more name for as long as this run lasts."""
        podman("tag", image, name)
        self._tags.append(name)

    def run(self, name: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a container; a process that ends with it, with the same exit code.

        Args:
            name: of the container.
            arguments: of `podman run`, image and command included.
            log: file that its output is appended to.
        """
        own = ["--name", name, "--label", LABEL, "--network", LABEL, "--pull", "never", "--sig-proxy=false"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [_ENV, "podman", *_RUN, *own, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self._attached.append(process)
        return process

    def remove(self, name: str) -> None:
        """Removes a container, and ends it where it has not."""
        podman("rm", "--force", "--volumes", "--time", "0", "--ignore", name)

    def signal(self, name: str, signal: str) -> None:
        """Sends a container a signal, where it is there."""
        with contextlib.suppress(EngineError):
            podman("kill", "--signal", signal, name)

    def inside(self, name: str, *command: str) -> str:
        """What a command prints in a container."""
        return podman("exec", name, *command)

    def pid(self, name: str) -> int:
        """The process of a container, as this machine numbers it."""
        return int(podman("inspect", "--format", "{{.State.Pid}}", name))

    def add_address(self, address: str) -> None:
        """Has this process reached at one more address of the network."""
        call("ip", "address", "add", f"{address}/32", "dev", self._bridge)

    def _connect(self) -> None:
        # Its names are looked up with this process, which knows who is ready, instead of with Podman.
        podman("network", "create", "--internal", "--disable-dns", "--label", LABEL, LABEL)
        network = json.loads(podman("network", "inspect", LABEL))[0]
        self._bridge = network["network_interface"]
        self.subnet = ipaddress.IPv4Network(network["subnets"][0]["subnet"])
        # The bridge is there for as long as somebody is connected; the machine itself is not until it is told to.
        keep = ["--detach", "--label", LABEL, "--network", LABEL, "--ip", str(self.subnet[2]), "--pull", "never"]
        podman(*_RUN, *keep, "--entrypoint", "sleep", self._image, "infinity")
        # Else it has the hardware address of one of its containers until that ends, and the others look for it in vain.
        call("ip", "link", "set", "dev", self._bridge, "address", _HARDWARE_ADDRESS)
        call("ip", "address", "add", f"{self.gateway}/{self.subnet.prefixlen}", "dev", self._bridge)


def remove_containers() -> None:
    """Removes all containers that runs have made."""
    containers = podman("ps", "--all", "--quiet", "--filter", f"label={LABEL}").split()
    if containers:
        podman("rm", "--force", "--volumes", "--time", "0", "--ignore", *containers)


def remove_all() -> None:
    """Removes all containers and the network that runs have made, and their folders."""
    remove_containers()
    for network in podman("network", "ls", "--quiet", "--filter", f"label={LABEL}").split():
        podman("network", "rm", "--force", network)
    for folder in Path("/var/tmp").glob(f"{LABEL}-*"):  # noqa: S108 - made by mkdtemp, and on disk where /tmp may not be
        shutil.rmtree(folder, ignore_errors=True)
