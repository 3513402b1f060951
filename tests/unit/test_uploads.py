"""What is kept of an upload that ends before its time: all where its caller can go on, nothing where it was refused."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from feddymem.v1.array_pb2 import ArrayChunk
from feddymem.v1.federation_pb2 import BankHeader, UploadBankRequest
from services.aggregator.uploads import Uploads
from services.runtime.arrays import bank_to_wire
from services.runtime.errors import Refusal
from tests.integration.fake_site import make_bank

SENT_BYTES = 100


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        (grpc.StatusCode.UNAVAILABLE, SENT_BYTES),
        (grpc.StatusCode.DATA_LOSS, SENT_BYTES),
        (grpc.StatusCode.DEADLINE_EXCEEDED, SENT_BYTES),
        (grpc.StatusCode.INVALID_ARGUMENT, 0),
    ],
)
async def test_what_is_kept_depends_on_how_it_ends(tmp_path: Path, status: grpc.StatusCode, kept: int) -> None:
    [array] = [array for array in bank_to_wire(make_bank(), "float16") if array.manifest.name == "items"]
    header = BankHeader(federation="parts", site="a", round=1, arrays=[array.manifest])
    uploads = Uploads(tmp_path, lambda _site, _number: False)

    async def requests() -> AsyncIterator[UploadBankRequest]:
        data = array.data[:SENT_BYTES]
        yield UploadBankRequest(chunk=ArrayChunk(sha256=array.manifest.sha256, data=data, crc32=zlib.crc32(data)))
        raise Refusal(status, "as the line says")

    with pytest.raises(Refusal), uploads.receiving(header):
        await uploads.receive(header, requests())
    assert [each.offset for each in uploads.offsets(header).offsets] == [kept]
