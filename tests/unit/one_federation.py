"""A federation in this process, and sites that join it and upload banks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from feddymem.feature_space import FeatureSpace
from feddymem.method import Method
from feddymem.v1.federation_pb2 import BankHeader, JoinRequest, UploadBankRequest
from services.aggregator.federation import Federation
from services.aggregator.settings import FederationSettings
from services.aggregator.state import State
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_to_wire, chunks
from services.runtime.messages import feature_space_to_message
from services.runtime.publisher import Publisher
from tests.feature_spaces import SPACE
from tests.integration.fake_site import make_bank

METHOD = Method(bank_items=30, memory_items=100, rounds=1, item_type="float16", hold_out_share=0)
SETTINGS = FederationSettings(quorum=2, method=METHOD)


@contextmanager
def opened(folder: Path, settings: FederationSettings = SETTINGS) -> Iterator[Federation]:
    state, store = State(folder), ArrayStore(folder / "releases")
    publisher = Publisher(store, frozenset(), lambda _who, _federation: True)
    try:
        yield Federation("parts", settings, state, folder / "banks", store, publisher)
    finally:
        state.close()


def join(federation: Federation, site: str, images: int = 10, space: FeatureSpace = SPACE) -> None:
    message = feature_space_to_message(space)
    federation.join(JoinRequest(federation="parts", site=site, instance=site, feature_space=message, images=images))


async def upload(federation: Federation, site: str, number: int = 1) -> None:
    arrays = bank_to_wire(make_bank(ord(site) + number), "float16")
    header = BankHeader(
        federation="parts",
        site=site,
        instance=site,
        round=number,
        fingerprint=SPACE.fingerprint,
        images=10,
        arrays=[array.manifest for array in arrays],
    )

    async def stream() -> AsyncIterator[UploadBankRequest]:
        for array in arrays:
            for chunk in chunks(array.manifest.sha256, array.data):
                yield UploadBankRequest(chunk=chunk)

    assert not federation.check_header(header)
    with federation.uploads.receiving(header):
        await federation.uploads.receive(header, stream())
        await federation.accept(header)
