"""What a site makes of a round rests on what it has kept of that round, and of no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from structlog.testing import capture_logs

from feddymem.feature_cache import CachedPatches
from feddymem.progress import no_progress
from feddymem.v1.federation_pb2 import BankHeader
from services.edge_client.computing import Computing
from services.edge_client.images import SiteImages
from services.edge_client.round_work import RoundWork
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState, Outcome
from services.runtime.identity import Role
from services.runtime.publisher import Publisher


class Present:
    """Images that are there now."""

    def only(self, names: frozenset[str]) -> frozenset[str]:
        return names - {"gone"}


def test_what_is_scored_was_held_out_of_the_bank_of_the_round(tmp_path: Path) -> None:
    fixed = {"aggregator": "127.0.0.1:1", "federation": "parts", "site": "a", "data": "."}
    settings = EdgeClientSettings(**fixed)  # type: ignore[arg-type]
    state = EdgeState(tmp_path)
    state.claim("federation parts, site a")
    publisher = Publisher(state.arrays, frozenset({Role.INFERENCE}), lambda _who, _federation: True)
    images = cast("SiteImages", SimpleNamespace())  # not looked at here
    work = RoundWork(settings, images, "cpu", state, publisher, Computing(settings, no_progress))
    present, names = cast("CachedPatches", Present()), frozenset({"a", "b", "gone"})
    state.put(Outcome(BankHeader(instance=state.instance, round=2), None, 2, names))
    assert state.last().bank is None  # its arrays are damaged: what was held out is known all the same
    assert cast("frozenset[str]", work._held_out(present, 2)) == {"a", "b"}
    with capture_logs() as logs:
        assert work._held_out(present, 3) is None
    assert [entry["event"] for entry in logs] == ["held_out_unknown"]
