"""Services: a headless one's name stands for the addresses of all its pods that are ready; another one's for an address
of its own, from which a connection goes on to one of them, as of kube-proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self

from tests.deploy.arguments import DOMAIN
from tests.deploy.manifest import Service
from tests.deploy.names import NameServer

_log = logging.getLogger(__name__)

_DNS_PORT = 53
_SECONDS = 10
_BYTES = 2**16
_RESET = struct.pack("ii", 1, 0)

Ready = Callable[[Service], list[tuple[str, dict[str, int]]]]
"""Of a Service, the address and the ports by name of each pod that is ready."""


class Services:
    """All Services of a cluster, and its DNS; a context.

    Attributes:
        name_server: address and port of the DNS.

    Args:
        address: where to answer questions for names.
        ready: who is behind a Service just now.
    """

    def __init__(self, address: str, ready: Ready) -> None:
        self._address = address
        self._ready = ready
        self._services: dict[str, Service] = {}
        self._own: dict[str, str] = {}
        self._open: list[asyncio.BaseTransport | asyncio.AbstractServer] = []

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="services", daemon=True)
        self._thread.start()
        self._wait_for(self._serve_names())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait_for(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, service: Service, address: str) -> None:
        """Adds a Service.

        Args:
            service: what it is like.
            address: its own, for one that is not headless.
        """
        self._services[service.name] = service
        if not service.headless:
            self._own[service.name] = address
            for port, target in service.ports.items():
                self._wait_for(self._forward(service, address, port, target))

    def resolve(self, name: str) -> list[str] | None:
        """What DNS says of a name; None if it has no address."""
        service = self._services.get(name.removesuffix(f".{DOMAIN}")) if name.endswith(f".{DOMAIN}") else None
        if service is None:
            return None
        if not service.headless:
            return [self._own[service.name]]
        # In another order each time, as CoreDNS has it.
        addresses = [address for address, _ports in self._ready(service)]
        return random.sample(addresses, len(addresses)) or None

    async def _serve_names(self) -> None:
        names, _protocol = await self._loop.create_datagram_endpoint(
            lambda: NameServer(self.resolve), local_addr=(self._address, _DNS_PORT)
        )
        self._open.append(names)
        self.name_server = names.get_extra_info("sockname")

    async def _forward(self, service: Service, address: str, port: int, target: str | int) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            pods = [
                (host, target if isinstance(target, int) else ports[target]) for host, ports in self._ready(service)
            ]
            try:
                if not pods:
                    raise ConnectionRefusedError
                # From the Service's address, so that a pod can tell it from its node.
                to_pod = asyncio.open_connection(*random.choice(pods), local_addr=(address, 0))  # noqa: S311
                there = await asyncio.wait_for(to_pod, _SECONDS)
            except (OSError, TimeoutError) as error:
                _log.info("%s: refused: %r", service.name, error)
                _reset(writer)
                return
            with contextlib.suppress(asyncio.CancelledError):  # at the end, and nobody waits for this task
                await asyncio.gather(_carry(reader, there[1]), _carry(there[0], writer))

        self._open.append(await asyncio.start_server(connected, address, port))

    async def _end(self) -> None:
        for each in self._open:
            each.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_SECONDS)


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Carries bytes until either end is closed, and closes the other one."""
    try:
        while data := await source.read(_BYTES):
            target.write(data)
            await target.drain()
    except OSError:
        pass
    finally:
        target.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection as one that was refused looks."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def matching(service: Service, pods: Iterable[Any]) -> list[Any]:
    """The pods that a Service selects, of those with `labels`."""
    return [pod for pod in pods if service.selector.items() <= pod.labels.items()]
