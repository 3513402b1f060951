"""The upload of a bank: from where an interrupted one stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from grpc import aio

from feddymem.v1.federation_pb2 import BankHeader, UploadBankRequest, UploadBankResponse
from services.edge_client import metrics
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import chunks

if TYPE_CHECKING:
    from feddymem.v1.federation_pb2_grpc import FederationServiceAsyncStub  # in the stubs only

_Call = aio.StreamStreamCall[UploadBankRequest, UploadBankResponse]


async def upload_bank(
    header: BankHeader, arrays: ArrayStore, aggregator: FederationServiceAsyncStub, seconds: float
) -> int:
    """Uploads a bank. Idempotent: a bank that is there already is accepted again.

    Args:
        header: of the bank.
        arrays: has its arrays.
        aggregator: where to.
        seconds: that it may take.

    Returns:
        Bytes that the aggregator has received of it.

    Raises:
        grpc.aio.AioRpcError: the aggregator does not take it, or the line broke.
        Refusal: an array was damaged on the disk.
    """
    call = aggregator.UploadBank(timeout=seconds)
    response: object = aio.EOF
    with contextlib.suppress(asyncio.InvalidStateError, aio.AioRpcError):  # the call has ended; its status says why
        async for request in _requests(header, arrays, call):
            metrics.SENT_BYTES.inc(request.ByteSize())
            await call.write(request)
        await call.done_writing()
        response = await call.read()
    if not isinstance(response, UploadBankResponse):
        code, details = await call.code(), await call.details()
        raise aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=details)
    return response.accepted.received_bytes


async def _requests(header: BankHeader, arrays: ArrayStore, call: _Call) -> AsyncIterator[UploadBankRequest]:
    yield UploadBankRequest(header=header)
    response = await call.read()
    if not isinstance(response, UploadBankResponse):  # end of stream: the caller reads the status
        return
    offsets = {offset.sha256: offset.offset for offset in response.resume.offsets}
    for manifest in header.arrays:
        data = await asyncio.to_thread(arrays.read, manifest.sha256)
        for chunk in chunks(manifest.sha256, data, offsets[manifest.sha256]):
            yield UploadBankRequest(chunk=chunk)
