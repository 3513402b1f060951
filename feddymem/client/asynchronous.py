"""The client for programs with asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from pathlib import Path
from types import TracebackType
from typing import Unpack

import grpc

from feddymem.client.channel import MAX_ATTEMPTS, inspection_options
from feddymem.client.errors import InspectionError, from_rpc_error
from feddymem.client.feedback import Opinion
from feddymem.client.images import Image
from feddymem.client.renewal import Renewed
from feddymem.client.requests import ClientSettings, Wishes
from feddymem.client.results import InspectionResult, from_response
from feddymem.client.tls import async_channel_to
from feddymem.client.tracing import traced_inspection
from feddymem.in_order import in_order_async
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub


class AsyncInspectionClient:
    """`InspectionClient` for asyncio: made and used inside one event loop.

    Example:
        async with AsyncInspectionClient("127.0.0.1:7072", site="plant-a") as client:
            print((await client.inspect("part.png")).score)
    """

    def __init__(
        self,
        server: str,
        *,
        federation: str = "",
        site: str = "",
        timeout_seconds: float = 30,
        attempts: int = MAX_ATTEMPTS,
        window: int = 4,
        tls_dir: Path | None = None,
    ) -> None:
        self._settings = ClientSettings(federation, site, timeout_seconds, window)
        options = inspection_options(attempts)
        self._channels = Renewed(lambda: async_channel_to(server, options, tls_dir), tls_dir)

    async def __aenter__(self) -> AsyncInspectionClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; inspections under way are cancelled."""
        for channel in self._channels.all():
            await channel.close()

    async def inspect(self, image: Image, **wishes: Unpack[Wishes]) -> InspectionResult:
        """Inspects one image; a file is read, and pixels are packed, on another thread.

        Raises:
            InspectionError: there is no result; its kind says why.
        """
        request, timeout = (
            await asyncio.to_thread(self._settings.request, image, wishes),
            self._settings.timeout(wishes),
        )
        stub = InspectionServiceStub(self._channels.channel())
        try:
            with traced_inspection() as metadata:
                return from_response(await stub.Inspect(request, timeout=timeout, metadata=metadata))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def report_feedback(self, image: Image, opinion: Opinion, *, note: str = "") -> str:
        """See `InspectionClient.report_feedback`.

        Raises:
            InspectionError: it was not kept; its kind says why.
        """
        request = await asyncio.to_thread(self._settings.feedback, image, opinion, note)
        stub = InspectionServiceStub(self._channels.channel())
        try:
            return (await stub.ReportFeedback(request, timeout=self._settings.timeout({}))).image
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def inspect_many(
        self, images: Iterable[Image] | AsyncIterable[Image], **wishes: Unpack[Wishes]
    ) -> AsyncIterator[InspectionResult | InspectionError]:
        """Inspects images, several at once; what became of each, in the order of the images.

        See `InspectionClient.inspect_many`. An iterable that is not asynchronous must not block.
        """

        async def outcome(image: Image) -> InspectionResult | InspectionError:
            try:
                return await self.inspect(image, **wishes)
            except InspectionError as error:
                return error

        return in_order_async(outcome, images, self._settings.window)
