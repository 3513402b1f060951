"""A TCP proxy for bad lines: it trickles, and it flips bits."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

from tests.chaos.forks import own_host

_READ_BYTES = 65_536


class Proxy:
    """Between callers and one server, on a thread of its own; a context.

    Attributes:
        flips: bits flipped so far.
        connections: accepted so far.

    Args:
        target: HOST:PORT of the server.
        port: that it listens on.
        bytes_per_second: at most, each way of each connection; None for no bound.
        bytes_per_flip: one bit of so many bytes is flipped, on average, and one of twice as many at least; None
            for none.
        seed: of which ones.
    """

    def __init__(
        self,
        target: str,
        port: int,
        bytes_per_second: int | None = None,
        bytes_per_flip: int | None = None,
        seed: int = 0,
    ) -> None:
        self.address = f"{own_host()}:{port}"
        self._target, self._port = target, port
        self._bytes_per_second, self.bytes_per_flip = bytes_per_second, bytes_per_flip
        self._rng = random.Random(seed)  # noqa: S311 - no secret
        self._bytes_to_flip = self._rng.randrange(2 * (bytes_per_flip or 1))
        self.flips = self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    def __enter__(self) -> Proxy:
        self._thread.start()
        listen = asyncio.start_server(self._serve, own_host(), self._port)
        self._server = asyncio.run_coroutine_threadsafe(listen, self._loop).result()
        return self

    def __exit__(self, *_exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, _, port = self._target.rpartition(":")
        try:
            out_reader, out_writer = await asyncio.open_connection(host, int(port))
        except OSError:  # nobody there yet
            writer.transport.abort()
            return
        ways = [self._carry(reader, out_writer), self._carry(out_reader, writer)]
        tasks = [asyncio.ensure_future(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the proxy is closed; asyncio would log it
            pass
        finally:
            for task, each in zip(tasks, (writer, out_writer), strict=True):
                task.cancel()
                each.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rate = self._bytes_per_second
        with contextlib.suppress(OSError):  # an end that is gone
            while data := await reader.read(_READ_BYTES if rate is None else max(1, rate // 100)):
                writer.write(self._damaged(data))
                await writer.drain()
                if rate is not None:
                    await asyncio.sleep(len(data) / rate)

    def _damaged(self, data: bytes) -> bytes:
        if self.bytes_per_flip is None:
            return data
        damaged, position = bytearray(data), self._bytes_to_flip
        while position < len(damaged):
            damaged[position] ^= 1 << self._rng.randrange(8)
            self.flips += 1
            position += self._rng.randint(1, 2 * self.bytes_per_flip)
        self._bytes_to_flip = position - len(damaged)
        return bytes(damaged)
