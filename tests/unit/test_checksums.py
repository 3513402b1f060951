"""Checksums of messages: no flipped bit gets through, be it in a name, a number or a quantisation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import aio

from feddymem.v1.array_pb2 import DATA_TYPE_UINT8, Array, Quantisation
from feddymem.v1.federation_pb2 import BankHeader, GetStatusRequest, GetStatusResponse, UploadBankRequest
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.release_pb2 import Release, WatchReleasesRequest, WatchReleasesResponse
from feddymem.v1.release_pb2_grpc import ReleaseServiceStub
from services.runtime.checksums import checked_channel, with_checksum, without_checksum
from services.runtime.errors import Refusal
from services.runtime.rpc import RpcBoundary

ARRAY = Array(
    name="items",
    data_type=DATA_TYPE_UINT8,
    shape=[1, 2],
    size_bytes=2,
    quantisation=Quantisation(scale=[0.5, 1], offset=[-1, 0]),
)
MESSAGES: list[Any] = [
    UploadBankRequest(header=BankHeader(federation="parts", site="a", round=3, images=9, arrays=[ARRAY])),
    WatchReleasesResponse(release=Release(federation="parts", version=2, arrays=[ARRAY])),
]
CHECKSUM_BYTES = 9


def flipped(raw: bytes, bit: int) -> bytes:
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.DESCRIPTOR.name)
def test_a_flipped_bit_is_found_wherever_it_is(message: Any) -> None:
    raw = with_checksum(type(message).SerializeToString)(message)
    assert without_checksum(raw) == message.SerializeToString()
    told = (len(raw) - CHECKSUM_BYTES) * 8
    for bit in [*range(told), *range(len(raw) * 8 - 32, len(raw) * 8)]:
        with pytest.raises(Refusal) as caught:
            without_checksum(flipped(raw, bit))
        assert caught.value.status == grpc.StatusCode.DATA_LOSS


async def test_an_answer_without_a_message_is_lost_data() -> None:
    """So gRPC gives it where a line has made an end of the answer before its message."""

    class Channel:
        def unary_unary(self, *_args: Any, **_more: Any) -> Any:
            async def answered(_request: bytes) -> None:
                return None

            return answered

    channel: Any = Channel()
    status = checked_channel(channel).unary_unary("/status", bytes, GetStatusResponse.FromString)
    with pytest.raises(Refusal, match="answered without a message") as caught:
        await status(b"")
    assert caught.value.status == grpc.StatusCode.DATA_LOSS


def test_a_reader_that_knows_no_checksum_passes_over_it() -> None:
    [message, _] = MESSAGES
    read = UploadBankRequest.FromString(with_checksum(UploadBankRequest.SerializeToString)(message))
    assert read.header == message.header


@pytest.mark.parametrize("raw", [b"", b"\n\x05parts", MESSAGES[1].SerializeToString()])
def test_a_message_without_checksum_is_taken_as_it_is(raw: bytes) -> None:
    assert without_checksum(raw) == raw


@pytest.fixture
async def channel() -> AsyncIterator[aio.Channel]:
    """To a server whose answers are damaged: that to GetStatus has a bad checksum, those of WatchReleases no sense."""
    sealed = with_checksum(GetStatusResponse.SerializeToString)

    async def status(_request: bytes, _context: Any) -> GetStatusResponse:
        return GetStatusResponse()

    async def releases(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield with_checksum(WatchReleasesResponse.SerializeToString)(MESSAGES[1])
        yield b"\xff"

    server = aio.server()
    broken: Any = grpc.unary_unary_rpc_method_handler(
        status, response_serializer=lambda message: flipped(sealed(message), 8 * CHECKSUM_BYTES - 1)
    )
    watched: Any = grpc.unary_stream_rpc_method_handler(releases)
    handlers = {"FederationService": {"GetStatus": broken}, "ReleaseService": {"WatchReleases": watched}}
    for service, methods in handlers.items():
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"feddymem.v1.{service}", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield checked_channel(opened)
    await server.stop(None)


async def test_a_damaged_answer_is_data_loss(channel: aio.Channel) -> None:
    with pytest.raises(Refusal, match=r"has a bad CRC-32; send it again") as caught:
        await FederationServiceStub(channel).GetStatus(GetStatusRequest())
    assert caught.value.status == grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize("read", [True, False])
async def test_a_stream_with_a_damaged_message_ends_with_it(channel: aio.Channel, read: bool) -> None:
    call: Any = ReleaseServiceStub(channel).WatchReleases(WatchReleasesRequest())
    messages: Any = call if read else call.__aiter__()
    assert (await (messages.read() if read else anext(messages))) == MESSAGES[1]
    with pytest.raises(Refusal, match="cannot be read"):
        await (messages.read() if read else anext(messages))
    assert await call.code() == grpc.StatusCode.CANCELLED


async def test_a_damaged_request_is_told_so() -> None:
    async def status(_request: GetStatusRequest, _context: Any) -> GetStatusResponse:
        return GetStatusResponse()

    method = "/feddymem.v1.FederationService/GetStatus"
    server = aio.server(interceptors=[RpcBoundary({}, {}, {}, 1000, 100, 100)])
    handler: Any = grpc.unary_unary_rpc_method_handler(
        status, GetStatusRequest.FromString, GetStatusResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("feddymem.v1.FederationService", {"GetStatus": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        call: Any = opened.unary_unary(method)
        sent = with_checksum(GetStatusRequest.SerializeToString)(GetStatusRequest(federation="parts"))
        assert without_checksum(await call(sent)) == b""
        with pytest.raises(aio.AioRpcError, match="bad CRC-32") as caught:
            await call(flipped(sent, 20))
        assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    await server.stop(None)
